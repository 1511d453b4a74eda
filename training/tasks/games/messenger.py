"""A strong messenger sees everything and tells each of many weak agents something (HAMMER, arXiv 2102.00824).

``Messenger(game, size)`` puts one more role, ``messenger``, before any parallel game: it sees what all see, one after
the other, acts ``size`` numbers for each role, and these are added to what that role sees. It earns the mean of what
they earn. With ``local`` a role sees the first numbers of its sight alone, and the messenger all of them. Baselines are
``is_mute``, which tells zeros to roles that are as large, ``is_random``, which tells them numbers drawn evenly from -1
to 1, and ``size=0``, without anybody to tell anything.

Deviation: who has left the game is seen as zeros, and is told nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Act, Ask, Box, Continuous, End, Game, Play, Role, Sight
from shoal.training.tasks.source import Scenario

MESSENGER: Final = "messenger"


@dataclass(frozen=True)
class Messenger:
    """Another game, with a messenger before it.

    Attributes:
        inner: the other game.
        size: numbers that each role is told; 0: there is no messenger.
        is_random: whether they are told numbers at random, likewise.
        local: numbers of its own sight that each role sees, the first ones; 0: all. The messenger sees all in any case.
        is_mute: whether all are told zeros, whatever the messenger says: what messages are worth shows beside that.
    """

    inner: Game
    size: int
    is_mute: bool = False
    is_random: bool = False
    local: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"a messenger tells 0 numbers or more, not {self.size}")
        if self.is_mute and self.is_random:
            raise UsageError("who is told zeros is not told numbers at random; leave is_mute or is_random out")
        if self.local < 0 or (self.local and not self.size):
            raise UsageError("who is told nothing sees all of its sight, 0 in local; else local is how much of it")

    @property
    def name(self) -> str:
        """For messages."""
        return f"{getattr(self.inner, 'name', type(self.inner).__name__)} with {self.size} numbers of messages"

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """What each role of the other game sees."""
        return {role: _size(role, spaces) for role, spaces in self.inner.roles.items()}

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """The messenger's and the others'.

        Raises:
            UsageError: if a role of the game does not see numbers, or is called ``messenger`` already.
        """
        if MESSENGER in self._sizes:
            raise UsageError(f"a messenger needs to be the only role called {MESSENGER!r}")
        roles = {
            role: Role(Box(len(range(self._sizes[role])[: self._shown]) + self.size), spaces.acts)
            for role, spaces in self.inner.roles.items()
        }
        if not self.size:
            return roles
        everything = sum(self._sizes.values())
        return {MESSENGER: Role(Box(everything), Continuous(self.size * len(self._sizes)))} | roles

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play of the other game."""
        if not self.size:
            return (yield from self.inner.play(scenario, rng))
        with closing(self.inner.play(scenario, rng)) as inner:
            asks, paid = next(inner), 0.0
            while True:
                (said,) = yield (Ask(MESSENGER, self._together({ask.role: ask.sight for ask in asks}), paid),)
                words = self._words(said, rng)
                told = tuple(replace(ask, sight=self._told(ask.sight, words[ask.role])) for ask in asks)
                try:
                    asks = inner.send((yield told))
                except StopIteration as stop:
                    return self._end(stop.value, words)
                paid = _mean([ask.reward for ask in asks])

    def _end(self, end: End, words: Mapping[str, Floats]) -> End:
        cut: dict[str, Sight] = {role: self._told(sight, words[role]) for role, sight in end.cut.items()}
        if cut:
            cut[MESSENGER] = self._together(end.cut)
        return replace(end, rewards={**end.rewards, MESSENGER: _mean(list(end.rewards.values()))}, cut=cut)

    def _together(self, sights: Mapping[str, Any]) -> Floats:
        shown = (sights.get(role, np.zeros(size, np.float32)) for role, size in self._sizes.items())
        return np.concatenate(list(shown)).astype(np.float32)

    @property
    def _shown(self) -> int | None:
        """How many numbers of its sight a role sees; None: all."""
        return self.local or None

    def _told(self, sight: Any, words: Floats) -> Floats:
        """What a role sees: of its sight as much as is shown it, and what it is told."""
        seen: Floats = np.append(sight[: self._shown], words)
        return seen

    def _words(self, said: Act, rng: np.random.Generator) -> dict[str, Floats]:
        told = np.zeros_like(said) if self.is_mute else np.tanh(said)
        if self.is_random:
            told = rng.uniform(-1, 1, np.shape(said)).astype(np.float32)
        return dict(zip(self._sizes, told.reshape(-1, self.size), strict=True))


def _mean(rewards: list[float]) -> float:
    return sum(rewards) / len(rewards) if rewards else 0.0


def _size(role: str, spaces: Role) -> int:
    if not isinstance(spaces.sights, Box):
        raise UsageError(f"the role {role!r:.80} reads text; a messenger tells numbers")
    return spaces.sights.size
