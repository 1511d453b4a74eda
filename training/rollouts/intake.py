"""Which shards a learner takes: a core. Each shard is learned from once, by one learner, as long as it is new enough.

Of what actors say that they have, a learner takes what falls to it by rendezvous hash among the learners that are
there, so that what several take are other samples, and one that goes leaves its part to the others. What is older than
the run's limit, or more than fits into an update, is taken by nobody, and counted. What is on its way is bounded, in
number and in bytes, of one actor and of all; what does not fit is asked for later, if it is still named and still new
enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.protocol.ids import Cid, PeerId
from shoal.training.statements import GivenShard, RoundKey, first_after, turn_rank

MAX_COMING: Final = 16
MAX_COMING_OF_ONE: Final = 4
MAX_COMING_BYTES: Final = 64 * 1024 * 1024
MAX_TALLIES: Final = 1024
"""Actors of which accounts are kept."""
UPDATES_TAKEN: Final = 2
"""Where each learner draws from all shards: for so many updates it takes of each version, so that several authors are
among them."""
MAX_REMEMBERED: Final = 4096
"""Shards that were taken or refused, by name."""


@dataclass(slots=True)
class Tally:
    """Of one actor's shards, as this node met them.

    Attributes:
        made: that it named.
        used: that were learned from.
        checked: of these, those that were replayed.
        refused: that are false, or none, or not of this run's kind.
        stale: that were too old when they could have been taken.
        samples: of those that were used.
        staleness: of these samples, summed: policy versions.
    """

    made: int = 0
    used: int = 0
    checked: int = 0
    refused: int = 0
    stale: int = 0
    samples: int = 0
    staleness: int = 0

    @property
    def mean_staleness(self) -> float:
        """Policy versions, of the samples that were used."""
        return self.staleness / self.samples if self.samples else 0.0


@dataclass(slots=True)
class _Coming:
    author: PeerId
    num_bytes: int
    samples: int
    version: int


@dataclass(slots=True)
class Intake:
    """Of one learner.

    Attributes:
        me: this node.
        max_staleness: versions.
        most_waiting: samples that may wait to be learned from before no more are fetched.
        most_samples: of a shard.
        waiting: those that do.
        tallies: by actor.
        shunned: actors from which nothing is taken.
        most_of_version: where every learner may take every shard and draws from it, samples of one version after which
            it takes no more; None: each shard is one learner's.
        oldest: version whose policy is here, as after a restart none before that is; shards of those before cannot be
            looked at, and are not fetched.
    """

    me: PeerId
    max_staleness: int
    most_waiting: int = 2**31
    most_samples: int = 2**31
    waiting: int = 0
    tallies: dict[PeerId, Tally] = field(default_factory=dict)
    shunned: set[PeerId] = field(default_factory=set)
    most_of_version: int | None = None
    oldest: int = 0
    _took: Counter[int] = field(default_factory=Counter)
    _named: dict[PeerId, tuple[GivenShard, ...]] = field(default_factory=dict)
    _seen: dict[Cid, None] = field(default_factory=dict)
    _coming: dict[Cid, _Coming] = field(default_factory=dict)

    def named(self, author: PeerId, given: Sequence[GivenShard]) -> None:
        """An actor says what it has."""
        before = {each.cid for each in self._named.get(author, ())}
        self._named[author] = tuple(given)
        self.tally(author).made += len({each.cid for each in given} - before)

    def gone(self, author: PeerId) -> None:
        """An actor is no longer heard of."""
        self._named.pop(author, None)

    def next(self, version: int, learners: Sequence[PeerId]) -> list[tuple[PeerId, GivenShard]]:
        """What to fetch now, newest versions first.

        Args:
            version: epoch of the policy that this node holds.
            learners: the others that are there.
        """
        for cid in [cid for cid, each in self._coming.items() if each.version < version - self.max_staleness]:
            self.came(cid)  # it is of no use any more, whatever became of it
        for old in [each for each in self._took if each < version - self.max_staleness]:
            del self._took[old]
        open_ones = [
            (author, each)
            for author, given in self._named.items()
            if author not in self.shunned
            for each in given
            if each.cid not in self._seen and each.cid not in self._coming
        ]
        found: list[tuple[PeerId, GivenShard]] = []
        for author, each in sorted(open_ones, key=lambda pair: (-pair[1].version, pair[1].cid)):
            if each.version < max(version - self.max_staleness, self.oldest):
                self._remember(each.cid)
                self.tally(author).stale += 1
            elif each.samples > self.most_samples:
                self._remember(each.cid)
                self.tally(author).refused += 1
            elif each.version > version:
                continue  # this node is behind, or that one lies
            elif self._falls_to_me(each.cid, learners) and self._has_room(author, each):
                self._coming[each.cid] = _Coming(author, each.num_bytes, each.samples, each.version)
                found.append((author, each))
        return found

    def came(self, cid: Cid) -> None:
        """It is here, or was not to be had."""
        self._coming.pop(cid, None)
        self._remember(cid)

    def took(self, version: int, samples: int) -> None:
        """So many of a version are learned from."""
        self._took[version] += samples

    def tally(self, author: PeerId) -> Tally:
        """Of an actor; of very many, the first that was met is forgotten."""
        if author not in self.tallies and len(self.tallies) >= MAX_TALLIES:
            del self.tallies[next(iter(self.tallies))]
        return self.tallies.setdefault(author, Tally())

    def _falls_to_me(self, cid: Cid, learners: Sequence[PeerId]) -> bool:
        if self.most_of_version is not None:
            return True
        key = RoundKey(0, 0, first_after(cid))
        return min((self.me, *learners), key=lambda peer: turn_rank("learn from", key, 0, peer)) == self.me

    def _has_room(self, author: PeerId, given: GivenShard) -> bool:
        if self.most_of_version is None:
            if self.waiting + sum(each.samples for each in self._coming.values()) >= self.most_waiting:
                return False
        else:
            coming = sum(each.samples for each in self._coming.values() if each.version == given.version)
            if self._took[given.version] + coming >= self.most_of_version:
                return False
        of_one = Counter(each.author for each in self._coming.values())[author]
        num_bytes = sum(each.num_bytes for each in self._coming.values()) + given.num_bytes
        return len(self._coming) < MAX_COMING and of_one < MAX_COMING_OF_ONE and num_bytes <= MAX_COMING_BYTES

    def _remember(self, cid: Cid) -> None:
        self._seen[cid] = None
        while len(self._seen) > MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
