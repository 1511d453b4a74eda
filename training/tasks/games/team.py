"""A team within another game: its members' mean return is a score, and rewards count by a factor.

Games whose rewards differ in size cannot share what values them; and of a game with somebody to play against, what all
earn on average says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.cast import kind_of_role
from shoal.training.tasks.play import End, Game, Play, Role
from shoal.training.tasks.source import Scenario

SCORE = "team"


@dataclass(frozen=True)
class Team:
    """Another game, with a score of some of its roles.

    Attributes:
        inner: the other game.
        member: a role of the team, or a kind of role.
        factor: by which the rewards of all are multiplied.
    """

    inner: Game
    member: str
    factor: float = 1.0

    @property
    def name(self) -> str:
        """For messages."""
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    @property
    def roles(self) -> Mapping[str, Role]:
        """The other game's."""
        return self.inner.roles

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play of the other game.

        Raises:
            UsageError: if nobody is of the team.
        """
        members = [role for role in self.roles if self.member in (role, kind_of_role(role))]
        if not members:
            raise UsageError(f"{self.name} has no role called {self.member!r:.80}")
        earned = 0.0
        with closing(self.inner.play(scenario, rng)) as inner:
            asks = next(inner)
            while True:
                earned += sum(ask.reward for ask in asks if ask.role in members)
                acts = yield tuple(replace(ask, reward=self.factor * ask.reward) for ask in asks)
                try:
                    asks = inner.send(acts)
                except StopIteration as stop:
                    end: End = stop.value
                    earned += sum(end.rewards.get(role, 0.0) for role in members)
                    rewards = {role: self.factor * reward for role, reward in end.rewards.items()}
                    scores = {**end.scores, SCORE: self.factor * earned / len(members)}
                    return replace(end, rewards=rewards, scores=scores)
