"""Atari games (the Arcade Learning Environment, ``gym:ALE/Pong-v5``) as they are usually learned.

The set of Mnih et al. ("Human-level control through deep reinforcement learning", Nature 518, 2015), as OpenAI
Baselines wrote it down, on top of the version of the game that the id names (``-v5`` has sticky actions):

- each action lasts four frames, of which the last two are joined by their brighter points; every episode begins with 1
  to 30 frames in which nothing is done;
- a frame is grey and 84 by 84; four of them, the newest last, are one observation: ``[4, 84, 84]`` bytes;
- games that wait for FIRE are started, at first and after each life;
- in training alone a lost life ends an episode, though the next one goes on in the same game, and a reward counts by
  its sign. Evaluations play whole games for their score.

Deviation: Baselines presses a second button after FIRE, which no game needs.

Needs the extra ``atari``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Final

import gymnasium
import numpy as np

from shoal.protocol.errors import UsageError

SCHEME: Final = "ALE/"
FRAMES: Final = 4
ARGUMENTS: Final = ("mode", "difficulty", "repeat_action_probability", "full_action_space")
"""That may be said of a game."""
_NOTHING_AND_MORE: Final = 3  # actions of a game that has FIRE as its second


def is_atari(env_id: str) -> bool:
    """Whether an id is one of ALE's."""
    return env_id.startswith(SCHEME)


def register() -> None:
    """Have ALE's games in Gymnasium's registry.

    Raises:
        UsageError: if ALE is not installed.
    """
    # Frames are resized by cv2, which takes a fifth of a second to load: who lists games only wants to know of it.
    missing = [name for name in ("ale_py", "cv2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"Atari games need ALE: pip install 'shoal[atari]' ({missing[0]} is missing)")
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)


def make(env_id: str, arguments: Mapping[str, Any], *, is_training: bool) -> Any:
    """One game, with some of `ARGUMENTS`; see the head.

    Raises:
        gymnasium.error.Error: if it cannot be made.
    """
    env = gymnasium.make(env_id, frameskip=1, disable_env_checker=True, **arguments)
    env = gymnasium.wrappers.AtariPreprocessing(env)
    env = Lives(env, is_training=is_training)
    return gymnasium.wrappers.FrameStackObservation(env, FRAMES)


class Lives(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Starts each life; in training it is an episode, whose rewards count by their sign."""

    def __init__(self, env: Any, *, is_training: bool) -> None:
        super().__init__(env)
        self._is_training = is_training
        meanings = env.unwrapped.get_action_meanings()
        self._fires = len(meanings) >= _NOTHING_AND_MORE and meanings[1] == "FIRE"
        self._lives = 0
        self._goes_on = False  # the game, after the episode that ended with a life

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The next life; a new game, if the last one is over or another is asked for by a seed."""
        if self._goes_on and seed is None:
            observation, _, terminated, truncated, info = self.env.step(0)
            if not (terminated or truncated):
                return self._begun(observation, info)
        return self._begun(*self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act."""
        reward: Any
        observation, reward, terminated, truncated, info = self.env.step(action)
        lives, is_over = self._left(), terminated or truncated
        is_lost, self._lives = lives < self._lives and not is_over, lives
        self._goes_on = is_lost
        if is_lost and not self._is_training and self._fires:
            observation, more, terminated, truncated, info = self.env.step(1)
            reward += more
        if self._is_training:
            reward = float(np.sign(reward))
            terminated = terminated or is_lost
        return observation, reward, terminated, truncated, info

    def _begun(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._fires:
            fired, _, terminated, truncated, more = self.env.step(1)
            observation, info = (fired, more) if not (terminated or truncated) else self.env.reset()
        self._lives, self._goes_on = self._left(), False
        return observation, info

    def _left(self) -> int:
        game: Any = self.env.unwrapped
        return int(game.ale.lives())
