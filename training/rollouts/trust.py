"""How closely a learner looks at an actor's shards: a core, of what it found itself and of whom anybody accuses.

Of who is new all shards are replayed, the first ones whole. With every one that is found true fewer are, and of these
one environment alone, which stands for all: that costs a fraction, and who lies in all of them is found as surely. What
is false in one of N environments is then found by one look in N, and does a shard's N-th of harm.

Nobody but this learner knows which shard and which environment it looks at: ``chance`` is to be drawn from what nobody
can foresee.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from shoal.protocol.ids import PeerId

PATIENCE: Final = 4
"""Shards found true after which the share that is looked into is a quarter."""
NUM_WHOLE: Final = 2
"""Shards of an actor that are looked at whole."""

MAX_AUTHORS: Final = 1024


class Look(Enum):
    """At a shard, before it is learned from."""

    NONE = 0
    ONE = 1
    """Of its environments."""
    WHOLE = 2


@dataclass(slots=True)
class Trust:
    """Of one learner.

    Attributes:
        least: the share of anybody's shards that is looked into; 0: none ever are.
        suspects: whom anybody accuses: all that they make is looked at.
    """

    least: float
    suspects: set[PeerId] = field(default_factory=set)
    _found_true: Counter[PeerId] = field(default_factory=Counter)

    def look(self, author: PeerId, chance: float) -> Look:
        """How closely to look at a shard; ``chance``: from 0 to 1."""
        if not self.least:
            return Look.NONE
        if author in self.suspects:
            return Look.WHOLE
        found_true = self._found_true[author]
        if chance >= rate_of(found_true, least=self.least):
            return Look.NONE
        return Look.WHOLE if found_true < NUM_WHOLE else Look.ONE

    def found_true(self, author: PeerId) -> None:
        """A shard of it was looked into, and is true; of very many authors, the first is new again."""
        if author not in self._found_true and len(self._found_true) >= MAX_AUTHORS:
            del self._found_true[next(iter(self._found_true))]
        self._found_true[author] += 1


def rate_of(found_true: int, *, least: float = 0.05, patience: int = PATIENCE) -> float:
    """The share of an author's shards that is looked into: all at first, then fewer, and never fewer than ``least``.

    Args:
        found_true: how many were looked into and found true.
        least: of anybody's.
        patience: after how many the share is a quarter.
    """
    return max(least, (patience / (patience + found_true)) ** 2)


def caught_after(false_share: float, rate: float, shards: int) -> float:
    """How likely one who falsifies a share of its shards is found out within so many of them."""
    return 1 - (1 - false_share * rate) ** shards
