"""A strong messenger sees everything and tells each of many weak agents something (HAMMER, arXiv 2102.00824).

``Messenger(game, size)`` puts one more role, ``messenger``, before any parallel game: it sees what all see, one after
the other, acts ``size`` numbers for each role, and these are added to what that role sees. It earns the mean of what
they earn. Baselines are ``size=0``, without anybody to tell anything, and a messenger that says anything
(``Scripted("random")``).

Deviation: who has left the game is seen as zeros, and is told nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Act, Ask, Box, Continuous, End, Game, Play, Role, Sight
from shoal.training.tasks.source import Scenario

MESSENGER: Final = "messenger"


class Messenger:
    """Another game, with a messenger before it.

    Raises:
        UsageError: if a role of the game does not see numbers, or is called ``messenger`` already.
    """

    def __init__(self, game: Game, size: int) -> None:
        self.inner, self.size = game, size
        self.name = f"{getattr(game, 'name', type(game).__name__)} with {size} numbers of messages"
        self._sizes = {role: _size(role, spaces) for role, spaces in game.roles.items()}
        if MESSENGER in self._sizes or size < 0:
            raise UsageError(f"a messenger needs 0 numbers or more, and to be the only role called {MESSENGER!r}")
        self.roles = {role: Role(Box(self._sizes[role] + size), spaces.acts) for role, spaces in game.roles.items()}
        if size:
            everything = sum(self._sizes.values())
            self.roles = {MESSENGER: Role(Box(everything), Continuous(size * len(self._sizes)))} | self.roles

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play of the other game."""
        if not self.size:
            return (yield from self.inner.play(scenario, rng))
        with closing(self.inner.play(scenario, rng)) as inner:
            asks, paid = next(inner), 0.0
            while True:
                (said,) = yield (Ask(MESSENGER, self._together({ask.role: ask.sight for ask in asks}), paid),)
                words = self._words(said)
                told = tuple(replace(ask, sight=np.append(ask.sight, words[ask.role])) for ask in asks)
                try:
                    asks = inner.send((yield told))
                except StopIteration as stop:
                    return self._end(stop.value, words)
                paid = _mean([ask.reward for ask in asks])

    def _end(self, end: End, words: Mapping[str, Floats]) -> End:
        cut: dict[str, Sight] = {role: np.append(sight, words[role]) for role, sight in end.cut.items()}
        if cut:
            cut[MESSENGER] = self._together(end.cut)
        return replace(end, rewards={**end.rewards, MESSENGER: _mean(list(end.rewards.values()))}, cut=cut)

    def _together(self, sights: Mapping[str, Any]) -> Floats:
        shown = (sights.get(role, np.zeros(size, np.float32)) for role, size in self._sizes.items())
        return np.concatenate(list(shown)).astype(np.float32)

    def _words(self, said: Act) -> dict[str, Floats]:
        return dict(zip(self._sizes, np.tanh(said).reshape(-1, self.size), strict=True))


def _mean(rewards: list[float]) -> float:
    return sum(rewards) / len(rewards) if rewards else 0.0


def _size(role: str, spaces: Role) -> int:
    if not isinstance(spaces.sights, Box):
        raise UsageError(f"the role {role!r:.80} reads text; a messenger tells numbers")
    return spaces.sights.size
