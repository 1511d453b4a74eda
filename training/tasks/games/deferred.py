"""A game that is made when somebody asks for it: recipes are listed also where its package is not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from shoal.training.tasks.play import Game, Play, Role
from shoal.training.tasks.source import Scenario


class Deferred:
    """What ``make`` makes, from the first time on that anything but its name is asked of it."""

    def __init__(self, name: str, make: Callable[[], Game]) -> None:
        self.name = name
        self._make = make
        self._made: Game | None = None

    @property
    def roles(self) -> Mapping[str, Role]:
        """The game's.

        Raises:
            UsageError: if it cannot be made, for want of a package.
        """
        return self._game().roles

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play of it."""
        return self._game().play(scenario, rng)

    def _game(self) -> Game:
        if self._made is None:
            self._made = self._make()
        return self._made
