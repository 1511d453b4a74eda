"""PettingZoo environments (https://pettingzoo.farama.org) as games: ``PettingZooGame("mpe2:simple_spread_v3")``.

In parallel form all agents that are there are asked at once, in AEC form the one whose turn it is. Sights are flat Box
observations (`Box` of any shape, flattened), or ``observation`` beside ``action_mask``, as the classic games have it.
What an agent earns after its last act, it gets with the end. Only what `TABLE` names is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import gymnasium
import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.plugins import suggest
from shoal.training.tasks.answers import read_reward, read_truth
from shoal.training.tasks.base import Discrete, Floats
from shoal.training.tasks.games.needs import needed
from shoal.training.tasks.games.pool import Pool
from shoal.training.tasks.play import ActSpace, Ask, Box, Continuous, End, Play, Role
from shoal.training.tasks.source import Scenario
from shoal.training.tasks.spaces import ToEnv

_MPE: Final = (
    *("simple_v3", "simple_adversary_v3", "simple_crypto_v3", "simple_push_v3", "simple_reference_v3"),
    *("simple_speaker_listener_v4", "simple_spread_v3", "simple_tag_v3", "simple_world_comm_v3"),
)
TABLE: Final[Mapping[str, tuple[str, str]]] = {
    **{f"mpe2:{name}": (f"mpe2.{name}", "shoal[games]") for name in _MPE},
    "sisl:multiwalker_v9": ("pettingzoo.sisl.multiwalker_v9", "pettingzoo[sisl]"),
    "sisl:pursuit_v5": ("pettingzoo.sisl.pursuit_v5", "pettingzoo[sisl]"),
}
"""By name: the module, and what brings it."""
OWN_NUMBERS: Final[Mapping[str, int]] = {"mpe2:simple_spread_v3": 10}
"""Of a sight, how many of its first numbers an agent knows without the others: of spread its own motion and place, and
where the three landmarks are."""


class PettingZooGame:
    """One PettingZoo environment.

    Raises:
        UsageError: if the table does not name it, it is not installed, or its spaces are of another kind.
    """

    def __init__(self, name: str, *, is_parallel: bool = True, local_sight: bool = False, **options: Any) -> None:
        """Make one to learn its roles.

        Args:
            name: in `TABLE`.
            is_parallel: whether all act at once.
            local_sight: leave out of sights what is about the others, where `OWN_NUMBERS` knows it.
            options: of the environment itself, such as ``continuous_actions=True``.
        """
        if name not in TABLE:
            raise UsageError(f"no PettingZoo game is called {name!r:.80}; {suggest(name, TABLE)}")
        if local_sight and name not in OWN_NUMBERS:
            raise UsageError(f"what of {name} is about oneself is not known; leave out local_sight")
        self.name = name
        self._is_parallel = is_parallel
        self._own = OWN_NUMBERS[name] if local_sight else None
        module = needed(TABLE[name][0], name, TABLE[name][1])
        make = module.parallel_env if is_parallel else module.env
        self._pool = Pool(lambda: make(**options), lambda env: env.close())
        try:
            env = make(**options)
        except TypeError as error:
            raise UsageError(f"{name} does not know one of these options: {error}") from error
        if not is_parallel:
            env.reset(seed=0)  # some know their spaces only then
        self.roles = {
            agent: Role(self._box(agent, env.observation_space(agent)), self._acts(agent, env.action_space(agent)))
            for agent in env.possible_agents
        }
        self._to_env = {agent: ToEnv(env.action_space(agent)) for agent in env.possible_agents}
        env.close()

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One episode."""
        return self._parallel(scenario.seed) if self._is_parallel else self._by_turns(scenario.seed)

    def _parallel(self, seed: int) -> Play:
        earned = dict.fromkeys(self.roles, 0.0)
        cut: dict[str, Any] = {}
        with self._pool.one() as env:
            shown, _ = env.reset(seed=seed % 2**32)
            while env.agents:
                agents = list(env.agents)
                asks = []
                for agent in agents:
                    sight, legal = self._sight(shown[agent])
                    asks.append(Ask(agent, sight, earned[agent], legal))
                acts = yield tuple(asks)
                told = {agent: self._to_env[agent].one(act) for agent, act in zip(agents, acts, strict=True)}
                shown, rewards, ends, cuts, _ = env.step(told)
                for agent in agents:
                    earned[agent] = read_reward(rewards.get(agent, 0.0))
                    if read_truth("truncated", cuts.get(agent, False)) and not ends.get(agent, False):
                        cut[agent] = self._sight(shown[agent])[0]
                for agent in earned.keys() - set(agents):  # what comes after one has left
                    earned[agent] += read_reward(rewards.get(agent, 0.0))
            return End(earned, cut)

    def _by_turns(self, seed: int) -> Play:
        earned = dict.fromkeys(self.roles, 0.0)
        cut: dict[str, Any] = {}
        with self._pool.one() as env:
            env.reset(seed=seed % 2**32)
            for agent in env.agent_iter():
                shown, reward, ends, is_cut, _ = env.last()
                sight, legal = self._sight(shown)
                if ends or is_cut:
                    earned[agent] = read_reward(reward)
                    if is_cut and not ends:
                        cut[agent] = sight
                    env.step(None)
                    continue
                (act,) = yield (Ask(agent, sight, read_reward(reward), legal),)
                env.step(self._to_env[agent].one(act))
            return End(earned, cut)

    def _sight(self, shown: Any) -> tuple[Floats, Any]:
        """What an agent sees, and which of its acts are legal."""
        legal = None
        if isinstance(shown, dict):
            shown, legal = shown["observation"], np.asarray(shown["action_mask"], np.bool_)
        return np.asarray(shown, np.float32).ravel()[: self._own], legal

    def _box(self, agent: str, space: Any) -> Box:
        if isinstance(space, gymnasium.spaces.Dict) and "observation" in space.spaces:
            space = space["observation"]
        if not isinstance(space, gymnasium.spaces.Box):
            raise UsageError(f"{self.name} shows {agent} {space}; only Box observations can be learned from")
        return Box(int(np.prod(space.shape)) if self._own is None else self._own)

    def _acts(self, agent: str, space: Any) -> ActSpace:
        if isinstance(space, gymnasium.spaces.Discrete):
            return Discrete(int(space.n))
        if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
            return Continuous(int(space.shape[0]))
        raise UsageError(f"{self.name}: {agent} acts in {space}; only Discrete and flat Box actions can be learned")
