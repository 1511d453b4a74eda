"""How much an actor makes: shards of about a second's work, and of each policy version no more than is learned from.

A shard costs its node and every other member some messages, however large it is, so it is as large as may be: of what
an update takes of others the part that falls to one actor, a half at most, so that nobody fills it alone.

What learners do not take is made for nobody. A version lasts as long as an update needs, so of each version all actors
together make what all learners take for one update, and some more, as nobody knows whose shards come first. Then an
actor waits for the next version, and says so.
"""

from __future__ import annotations

import math
from typing import Final

SHARD_S: Final = 1.0
FIRST_SAMPLES: Final = 128
"""Of the first shard, when nobody knows yet how fast this actor is."""
MIN_SAMPLES: Final = 16
MARGIN: Final = 2.0
LEAST_PARTS: Final = 2
MOST_PARTS: Final = 8
"""Shards that would fill a learner's update by themselves: about as many as there are actors for each learner."""


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
        of_each = max(1, actors) / max(1, learners)
        if self._made >= math.ceil(MARGIN * self._share / of_each):
            return 0
        wanted = int(speed * SHARD_S) if speed else FIRST_SAMPLES
        parts = min(MOST_PARTS, max(LEAST_PARTS, math.ceil(of_each)))
        return max(MIN_SAMPLES, min(wanted, self._share // parts))

    def made(self, version: int, samples: int) -> None:
        """A shard of so many was made."""
        if version == self._version:
            self._made += max(samples, 1)
