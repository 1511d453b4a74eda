"""Gymnasium environments as games: ``GymGame("CartPole-v1")``, with one role, ``agent``.

What may be made, what it may answer, and how acts become its own is as in `shoal.training.tasks.gym`. Each play resets
its environment by the scenario's seed, so it can be had again; plays without that need take the `VectorEnv`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.answers import read_reset, read_reward, read_step, read_truth
from shoal.training.tasks.base import MultiDiscrete
from shoal.training.tasks.games.pool import Pool
from shoal.training.tasks.making import close_env, is_gymnasiums_own, make_env
from shoal.training.tasks.play import Ask, End, Play, Role
from shoal.training.tasks.source import Scenario
from shoal.training.tasks.spaces import ToEnv, action_space, shown_by

AGENT: Final = "agent"
_FLOAT32: Final = np.dtype(np.float32)


class GymGame:
    """One Gymnasium environment id.

    Raises:
        UsageError: if there is none of this name, or it cannot be learned by what is here.
    """

    def __init__(self, env_id: str) -> None:
        self.name = f"gym:{env_id}"
        env = make_env(env_id, 0, is_training=False)
        space = action_space(self.name, env.action_space)
        if isinstance(space, MultiDiscrete):
            raise UsageError(f"{self.name} acts by {len(space.counts)} choices at once, and roles act by one")
        self._is_own = is_gymnasiums_own(env)
        self._shown = shown_by(self.name, env.observation_space, is_bounded=not self._is_own, is_vector=True)
        self.roles = {AGENT: Role(self._shown.box, space)}
        self._to_env = ToEnv(env.action_space)
        self._pool = Pool(lambda: make_env(env_id, 0, is_training=False), lambda each: close_env(each, 0))
        close_env(env, 0)

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One episode. What the environment's horizon cuts off is cut."""
        shown, is_own = self._shown, self._is_own
        shape, dtype = shown.shape, shown.dtype
        start = self._to_env.start
        with self._pool.one() as env:
            step = env.step
            observation: Any = read_reset(env.reset(seed=scenario.seed), shown)
            reward = 0.0
            while True:
                (act,) = yield (Ask(AGENT, observation, reward),)
                answer = step(act if start == 0 else self._to_env.one(act))
                if type(answer) is not tuple or len(answer) != 5:
                    answer = read_step(answer)
                observation, reward, ends, is_cut, _ = answer
                if type(observation) is not np.ndarray or observation.dtype != dtype or observation.shape != shape:
                    observation = shown.read(observation)
                if observation.dtype is not _FLOAT32:
                    observation = shown.copy(observation)
                if not is_own:
                    shown.check(observation)
                if type(reward) is not float:
                    reward = read_reward(reward)
                if ends is not False or is_cut is not False:
                    if read_truth("terminated", ends):
                        return End({AGENT: reward})
                    if read_truth("truncated", is_cut):
                        return End({AGENT: reward}, cut={AGENT: observation})
