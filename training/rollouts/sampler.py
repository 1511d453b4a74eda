"""What of others' plays an update learns from: so many, drawn evenly, none too old, none twice, of nobody too much.

SAPO (arXiv 2509.08721) takes so many own and so many foreign rollouts for each update. Of the foreign ones it drops
first what teaches nothing, groups of plays that all earned alike, and draws evenly from the rest. Here a draw is a
*unit*: all plays of one scenario in one shard, since the advantages of a group need the whole of it. Deviations:
numbers are of acts and not of rollouts, as plays are of unlike lengths; no author gives more than a share, so that
making much is not having much to say; newer versions come first, what is older than the run allows is dropped, and what
was drawn is not drawn again.

What waits is bounded. When there is no room, the author who has most of it loses its oldest: nobody can push out what
others made by making much. It lies in memory: what a worker had when it was killed is lost, and the others' next shards
come with the next epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.protocol.ids import PeerId
from shoal.training.rollouts.takes import PlayOf, groups_of
from shoal.training.tasks.play import Take

MOST_SHARE: Final = 0.5
"""Of an update's foreign acts, that one author may give; where there are few authors, an equal share."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """All plays of one scenario in one shard.

    Attributes:
        author: of the shard.
        version: of the policy that acted.
        takes: of all plays and roles.
    """

    author: PeerId
    version: int
    takes: tuple[Take, ...]

    @property
    def samples(self) -> int:
        """Acts."""
        return sum(map(len, self.takes))

    @property
    def teaches(self) -> bool:
        """Whether plays of a role differ in what they earned."""
        earned: dict[str, set[float]] = {}
        for take in self.takes:
            earned.setdefault(take.role, set()).add(take.earned)
        return any(len(each) > 1 for each in earned.values())


def units_of(author: PeerId, version: int, plays: Sequence[PlayOf]) -> list[Unit]:
    """The units of a shard, with what its plays showed."""
    return [
        Unit(author, version, tuple(part.take for number in group for part in plays[number].parts))
        for group in groups_of(plays)
    ]


class Sampler:
    """What waits for one learner's updates."""

    def __init__(self, most: int, capacity: int, rng: np.random.Generator) -> None:
        """Hold nothing.

        Args:
            most: acts of one update.
            capacity: acts in all.
            rng: of the draws.
        """
        self._most, self._capacity, self._rng = most, capacity, rng
        self._waiting: list[Unit] = []
        self._drawn: list[Unit] = []

    @property
    def waiting(self) -> int:
        """Acts in all."""
        return sum(unit.samples for unit in self._waiting)

    @property
    def next(self) -> int:
        """Acts that an update would get by now, at most."""
        return min(self._most, self.waiting)

    def add(self, units: Sequence[Unit]) -> int:
        """Some came; how many acts of them teach anything, and wait now."""
        kept = [unit for unit in units if unit.teaches]
        self._waiting += kept
        by_author: Counter[PeerId] = Counter()
        for unit in self._waiting:
            by_author[unit.author] += unit.samples
        while sum(by_author.values()) > self._capacity:
            author = max(sorted(by_author), key=by_author.__getitem__)
            gone = min((unit for unit in self._waiting if unit.author == author), key=lambda unit: unit.version)
            by_author[author] -= gone.samples
            self._waiting = [unit for unit in self._waiting if unit is not gone]
        return sum(unit.samples for unit in kept)

    def forget_older(self, version: int) -> None:
        """Drop what earlier policies made."""
        self._waiting = [unit for unit in self._waiting if unit.version >= version]

    def forget(self, author: PeerId) -> None:
        """Drop what one made."""
        self._waiting = [unit for unit in self._waiting if unit.author != author]

    def draw(self) -> Sequence[Unit]:
        """What the update that begins now learns from."""
        authors = {unit.author for unit in self._waiting}
        most_of_one = self._most * max(MOST_SHARE, 1 / max(1, len(authors)))
        given: Counter[PeerId] = Counter()
        self._drawn = []
        order = self._rng.permutation(len(self._waiting)).tolist()
        for index in sorted(order, key=lambda each: -self._waiting[each].version):
            unit = self._waiting[index]
            is_much = given[unit.author] + unit.samples > most_of_one
            if not is_much and given.total() + unit.samples <= self._most:
                given[unit.author] += unit.samples
                self._drawn.append(unit)
        return self._drawn

    def used(self) -> Sequence[tuple[PeerId, int, int]]:
        """The update is done: whose, of which version, and how many acts it learned from; they are not drawn again."""
        gone = set(map(id, self._drawn))
        self._waiting = [unit for unit in self._waiting if id(unit) not in gone]
        found: Counter[tuple[PeerId, int]] = Counter()
        for unit in self._drawn:
            found[unit.author, unit.version] += unit.samples
        self._drawn = []
        return [(author, version, samples) for (author, version), samples in sorted(found.items())]
