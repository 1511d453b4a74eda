"""Games and actors that the tests of plays share: small, and without chance that is not the scenario's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.training.tasks.play import Act, Ask, Box, Continuous, Discrete, End, Play, Role, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.training.tasks.play import Take
    from shoal.training.tasks.source import Scenario

KINDS = (
    Role(Box(3), Discrete(4)),
    Role(Box(3), Continuous(2)),
    Role(Text(), Text()),
    Role(Text(), Discrete(2)),
    Role(Box(1), Text()),
)


def code(*parts: object) -> int:
    """A number that differs with every part."""
    words = [part.tobytes().hex() if isinstance(part, np.ndarray) else repr(part) for part in parts]
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:4], "big")


@dataclass
class Tangle:
    """A game of every kind of role, in which all that is shown hangs on all that was done."""

    kinds: tuple[int, ...] = (0, 1, 2)
    turns: int = 5
    name: str = "tangle"

    def __post_init__(self) -> None:
        self.roles = {f"role_{number}": KINDS[kind] for number, kind in enumerate(self.kinds)}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        so_far = code(scenario.seed, dict(scenario.params))
        names = list(self.roles)
        for _ in range(1 + so_far % self.turns):
            asked = [name for name in names if rng.random() < 0.6] or [names[int(rng.integers(len(names)))]]
            acts = yield tuple(self._ask(name, code(so_far, name), rng) for name in asked)
            so_far = code(so_far, *acts)
        cut = {names[0]: self._ask(names[0], so_far, rng).sight} if so_far % 3 == 0 else {}
        return End(dict.fromkeys(names, so_far % 7 / 3), cut, {"last": float(so_far % 2)})

    def _ask(self, name: str, number: int, rng: np.random.Generator) -> Ask:
        role = self.roles[name]
        sight: Any = str(number)
        if isinstance(role.sights, Box):
            sight = np.random.default_rng(number).normal(size=role.sights.size).astype(np.float32)
        legal = None
        if isinstance(role.acts, Discrete) and number % 2:
            legal = np.random.default_rng(number).random(role.acts.count) < 0.5
            legal[number % role.acts.count] = True
        return Ask(name, sight, float(rng.normal()), legal, max_tokens=number % 5)


class Echo:
    """Acts that follow from the take alone, and so from nothing around it."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[Act], np.ndarray]:
        self.calls.append(len(takes))
        acts: list[Act] = []
        for take in takes:
            number = code(take.sights[-1], len(take.acts))
            match take.spaces.acts:
                case Discrete(count):
                    legal = take.asked_legal
                    able = np.arange(count) if legal is None else np.flatnonzero(legal)
                    acts.append(int(able[number % len(able)]))
                case Continuous(size):
                    acts.append(np.random.default_rng(number).uniform(-1, 1, size).astype(np.float32))
                case Text():
                    acts.append(f"word {number % 10}")
        return acts, -np.arange(1, len(takes) + 1, dtype=np.float32)


@dataclass
class Count:
    """One role counts to ``turns``: it sees how far it is, and earns what it says."""

    turns: int = 3
    name: str = "count"

    def __post_init__(self) -> None:
        self.roles = {"agent": Role(Box(1), Discrete(3))}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        said: Any = 0
        for turn in range(self.turns):
            (said,) = yield (Ask("agent", np.array([turn], np.float32), float(said)),)
        return End({"agent": float(said)}, scores={"said": float(said)})
