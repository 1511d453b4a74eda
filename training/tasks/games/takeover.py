"""An expert beside a role: it says what it would do, and may act in the role's place.

With ``share``, that is DAgger (Ross et al., arXiv 1011.0686): the expert is asked wherever the role comes, and acts in
its place with that chance, drawn in each turn; its take holds the labels. Without, it takes over when it wants (Sirius,
arXiv 2211.08416): its acts have one number more, and `go_on` gives the one that leaves the role to itself. A person, or
another node, may sit there.

The takes of both have the same sights and the same length; where the expert's act counted, the role's own was not
carried out, and `End.scores` says how often (``taken_over``).

Deviation: DAgger draws who acts for a whole trajectory of an iteration; here it is drawn in every turn.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.base import Continuous, Discrete
from shoal.training.tasks.play import Act, ActSpace, Ask, End, Game, Play, Role, Text
from shoal.training.tasks.source import Scenario

EXPERT: Final = "expert"


class TakeOver:
    """Another game, with an expert beside one of its roles.

    Raises:
        UsageError: if the game has no such role, or one of the expert's name.
    """

    def __init__(self, game: Game, expert: str = EXPERT, *, role: str = "", share: float | None = None) -> None:
        """Put it there.

        Args:
            game: any.
            expert: what the new role is called.
            role: beside which one; none: the first.
            share: how often the expert acts, 0 to 1; none: when it wants.
        """
        self.inner, self.expert, self._share = game, expert, share
        self.role = role or next(iter(game.roles))
        self.name = f"{getattr(game, 'name', type(game).__name__)} with {expert}"
        if self.role not in game.roles or expert in game.roles or not 0 <= (share or 0) <= 1:
            raise UsageError(f"{self.name}: it needs a role of the game, another name for the expert, a share to 1")
        spaces = game.roles[self.role]
        self._acts = spaces.acts
        self.roles = {
            **game.roles,
            expert: Role(spaces.sights, spaces.acts if share is not None else _with_go_on(spaces.acts)),
        }

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play of the other game."""
        chance = np.random.default_rng((scenario.seed, 1))  # the game draws what it would draw without an expert
        taken = 0
        with closing(self.inner.play(scenario, rng)) as inner:
            asks = next(inner)
            while True:
                place = next((index for index, ask in enumerate(asks) if ask.role == self.role), None)
                if place is None:
                    acts = yield asks
                else:
                    *others, said = yield (*asks, self._beside(asks[place]))
                    instead = self._instead(said, chance)
                    if instead is not None:
                        others[place] = instead
                        taken += 1
                    acts = tuple(others)
                try:
                    asks = inner.send(acts)
                except StopIteration as stop:
                    end: End = stop.value
                    cut = {**end.cut, self.expert: end.cut[self.role]} if self.role in end.cut else end.cut
                    return replace(end, cut=cut, scores={**end.scores, "taken_over": float(taken)})

    def _beside(self, ask: Ask) -> Ask:
        legal = ask.legal
        if legal is not None and self._share is None:
            legal = np.append(legal, True)
        return replace(ask, role=self.expert, reward=0.0, legal=legal)

    def _instead(self, said: Act, chance: np.random.Generator) -> Act | None:
        """What is done in the role's place; none: what it does itself."""
        if self._share is not None:
            return said if chance.random() < self._share else None
        match self._acts:
            case Discrete(count):
                return None if said == count else said
            case Continuous():
                return said[:-1] if isinstance(said, np.ndarray) and said[-1] > 0 else None
            case Text():
                return said or None


def _with_go_on(space: ActSpace) -> ActSpace:
    match space:
        case Discrete(count):
            return Discrete(count + 1)
        case Continuous(size):
            return Continuous(size + 1)
        case Text():
            return space


def go_on(space: ActSpace) -> Act:
    """What an expert that takes over when it wants says when it does not want to.

    Args:
        space: of the role's acts, beside which it sits.
    """
    match space:
        case Discrete(count):
            return count
        case Continuous(size):
            return np.full(size + 1, -1, np.float32)
        case Text():
            return ""
