"""How much an actor makes: shards of about a second's work, and of each policy version no more than is learned from.

What learners do not take is made for nobody. A version lasts as long as an update needs, so of each version all actors
together make what all learners take for one update, and some more, as nobody knows whose shards come first. Then an
actor waits for the next version, and says so.
"""

from __future__ import annotations

import math
from typing import Final

SHARD_S: Final = 0.5
FIRST_SAMPLES: Final = 128
"""Of the first shard, when nobody knows yet how fast this actor is."""
MIN_SAMPLES: Final = 16
MARGIN: Final = 2.0
_PARTS: Final = 4
"""Shards that would fill a learner's update by themselves, at least: so that several actors have their turn."""


class Rationing:
    """Of one actor."""

    __slots__ = ("_made", "_share", "_version")

    def __init__(self, share: int) -> None:
        """Nothing is made yet; ``share``: samples of others that one learner's update takes, at most."""
        self._share = share
        self._version = -1
        self._made = 0

    def next(self, version: int, speed: float, learners: int, actors: int) -> int:
        """How many samples the next shard takes; 0: this actor has to wait for a newer version.

        Args:
            version: of the policy that acts.
            speed: environment steps per second; 0, if that is not known.
            learners: that are there.
            actors: likewise, this one among them.
        """
        if version != self._version:
            self._version, self._made = version, 0
        if self._made >= math.ceil(MARGIN * self._share * max(1, learners) / max(1, actors)):
            return 0
        wanted = int(speed * SHARD_S) if speed else FIRST_SAMPLES
        return max(MIN_SAMPLES, min(wanted, self._share // _PARTS))

    def made(self, version: int, samples: int) -> None:
        """A shard of so many was made."""
        if version == self._version:
            self._made += max(samples, 1)
