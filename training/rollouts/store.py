"""Which shards a node keeps: a bounded store's decisions, and an index that outlives the process.

The store holds names and sizes; the bytes are where contents are (the shell's), pinned as long as the store keeps them.
Events come in, orders come out: `Keep` and `Drop`. What is dropped first is of the oldest policy version; of one
version, what was used up, then what gives the fewest samples for its bytes. An author has no more than a share of the
room, and where it wants more, its own shards go: nobody can push out the others' by making many.

The index is plain data (`Store.index`, `Store.of_index`). Whoever persists it before it carries an order out, loses
nothing by a restart: shards that are kept are kept, and what was used or refused is not taken again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.rollouts.shard import MAX_SHARD_BYTES, Place, Shard
from shoal.training.statements import MAX_EPOCH

MAX_SHARDS: Final = 65_536
MAX_REMEMBERED: Final = 65_536
"""Places of shards that are not kept any more: they are not taken a second time."""
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024


class Reason(StrEnum):
    """Why a shard is not kept."""

    STALE = "stale"
    AHEAD = "ahead"
    KNOWN = "known"
    TWICE = "twice"
    FALSE = "false"
    SHUNNED = "shunned"
    NO_ROOM = "no room"
    USED_UP = "used up"
    UNCHECKED = "unchecked"
    TOO_LARGE = "too large"


@dataclass(frozen=True, slots=True)
class Kept:
    """A shard in the store.

    Attributes:
        cid: its name.
        place: where it stands among its author's.
        version: of the policy that acted.
        num_bytes: of its content.
        units: how many samples each of its parts has that may be drawn by itself: a row is one environment's steps, a
            take's unit all plays of one scenario.
        uses: how often each was used, as long as ``units``.
        is_checked: whether it was looked into and found true.
    """

    cid: Cid
    place: Place
    version: int
    num_bytes: int
    units: tuple[int, ...]
    uses: tuple[int, ...]
    is_checked: bool = False

    @classmethod
    def of(cls, shard: Shard, units: tuple[int, ...]) -> Kept:
        """One that has just come."""
        return cls(shard.cid, shard.place, shard.head.version, shard.num_bytes, units, (0,) * len(units))

    @property
    def samples(self) -> int:
        """Of all its parts."""
        return sum(self.units)


# What happens.


@dataclass(frozen=True, slots=True)
class Came:
    """A shard is here, opened and with what can be checked at once checked."""

    shard: Kept


@dataclass(frozen=True, slots=True)
class Advanced:
    """The policy is of this version now."""

    version: int


@dataclass(frozen=True, slots=True)
class Used:
    """Parts of a shard went into an update."""

    cid: Cid
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FoundTrue:
    """A shard was looked into."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class FoundFalse:
    """A shard was looked into; its author has no shard here any more, nor will have."""

    cid: Cid
    author: PeerId


StoreEvent: TypeAlias = Came | Advanced | Used | FoundTrue | FoundFalse

# What to do.


@dataclass(frozen=True, slots=True)
class Keep:
    """Pin this content."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class Drop:
    """Let go of this content, or do not take it at all.

    Attributes:
        cid: its name.
        author: of the shard.
        reason: for the counters, and for people.
        instead_of: of a second shard in one place, the first: both heads together prove two histories.
    """

    cid: Cid
    author: PeerId
    reason: Reason
    instead_of: Cid | None = None


StoreOutput: TypeAlias = Keep | Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """How much is kept.

    Attributes:
        max_bytes: of all shards together.
        author_share: of ``max_bytes``, that one author may have; the node itself may have all.
        max_age: versions; older shards are of no use to anybody.
        max_uses: of each part.
    """

    max_bytes: int
    author_share: float = 0.5
    max_age: int = 6
    max_uses: int = 1

    def __post_init__(self) -> None:
        if self.max_bytes < 0 or not 0 < self.author_share <= 1 or self.max_age < 0 or self.max_uses < 1:
            raise UsageError("a store has room, shares from 0 to 1, an age of 0 or more, and uses of 1 or more")


class Store:
    """The decisions of one run's store at one node."""

    def __init__(self, me: PeerId, limits: StoreLimits) -> None:
        self._me, self._limits = me, limits
        self._kept: dict[Cid, Kept] = {}
        self._by_place: dict[Place, Cid] = {}
        self._past: dict[Place, Cid] = {}  # of shards that are gone, oldest first
        self._shunned: dict[PeerId, None] = {}
        self._version = 0
        self._bytes: Counter[PeerId] = Counter()
        self.dropped: Counter[Reason] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        """All shards that are kept, by version and name."""
        return iter(sorted(self._kept.values(), key=lambda kept: (kept.version, kept.cid)))

    def __contains__(self, cid: Cid) -> bool:
        return cid in self._kept

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(self._bytes.values())

    @property
    def version(self) -> int:
        """Of the policy, as far as it was told."""
        return self._version

    @property
    def shunned(self) -> frozenset[PeerId]:
        """Authors of whom nothing is taken any more."""
        return frozenset(self._shunned)

    def handle(self, event: StoreEvent) -> list[StoreOutput]:
        """Take note of what happened; there are no waits in here, so no time is asked for."""
        match event:
            case Came(shard):
                return self._came(shard)
            case Advanced(version):
                self._version = max(self._version, version)
                oldest = self._version - self._limits.max_age
                stale = [kept for kept in self if kept.version < oldest]
                return [self._drop(kept, Reason.STALE) for kept in stale]
            case Used(cid, units):
                return self._used(cid, units)
            case FoundTrue(cid):
                if cid in self._kept:
                    self._kept[cid] = replace(self._kept[cid], is_checked=True)
                return []
            case FoundFalse(_, author):
                self._shunned[author] = None
                return [self._drop(kept, Reason.FALSE) for kept in self if kept.place.author == author]

    def _came(self, shard: Kept) -> list[StoreOutput]:
        limits, author = self._limits, shard.place.author
        known = self._by_place.get(shard.place) or self._past.get(shard.place)
        reason: Reason | None = None
        if author in self._shunned:
            reason = Reason.SHUNNED
        elif known is not None:
            reason = Reason.KNOWN if known == shard.cid else Reason.TWICE
        elif shard.version > self._version:
            reason = Reason.AHEAD
        elif shard.version < self._version - limits.max_age:
            reason = Reason.STALE
        elif shard.num_bytes > self._room_of(author):
            reason = Reason.NO_ROOM
        if reason is not None:
            self.dropped[reason] += 1
            if shard.cid in self._kept:  # it came once more, and stays
                return []
            return [Drop(shard.cid, author, reason, known if reason is Reason.TWICE else None)]
        self._kept[shard.cid], self._by_place[shard.place] = shard, shard.cid
        self._bytes[author] += shard.num_bytes
        dropped: list[StoreOutput] = []
        while self._bytes[author] > self._room_of(author):
            dropped.append(self._drop(self._worst(author), Reason.NO_ROOM))
        while self.num_bytes > limits.max_bytes or len(self._kept) > MAX_SHARDS:
            dropped.append(self._drop(self._worst(None), Reason.NO_ROOM))
        return [*([Keep(shard.cid)] if shard.cid in self._kept else []), *dropped]

    def _used(self, cid: Cid, units: tuple[int, ...]) -> list[StoreOutput]:
        kept = self._kept.get(cid)
        if kept is None:
            return []
        uses = list(kept.uses)
        for unit in units:
            uses[unit] += 1
        self._kept[cid] = kept = replace(kept, uses=tuple(uses))
        return [self._drop(kept, Reason.USED_UP)] if min(uses) >= self._limits.max_uses else []

    def _room_of(self, author: PeerId) -> int:
        most = self._limits.max_bytes
        return most if author == self._me else int(most * self._limits.author_share)

    def _worst(self, author: PeerId | None) -> Kept:
        """What goes first: of all, or of one author."""
        return min(
            (kept for kept in self._kept.values() if author is None or kept.place.author == author),
            key=lambda kept: (kept.version, self._worth(kept), kept.cid),
        )

    def _worth(self, kept: Kept) -> float:
        """Samples that it can still give, for each of its bytes."""
        left = sum(
            size * max(0, self._limits.max_uses - uses) for size, uses in zip(kept.units, kept.uses, strict=True)
        )
        return left / max(1, kept.num_bytes)

    def _drop(self, kept: Kept, reason: Reason) -> Drop:
        del self._kept[kept.cid], self._by_place[kept.place]
        self._bytes[kept.place.author] -= kept.num_bytes
        self._past[kept.place] = kept.cid
        while len(self._past) > MAX_REMEMBERED:
            del self._past[next(iter(self._past))]
        self.dropped[reason] += 1
        return Drop(kept.cid, kept.place.author, reason)

    # --- what outlives the process ---

    def index(self) -> bytes:
        """All that has to be known after a restart."""
        past = tuple(_Past(place, cid) for place, cid in self._past.items())
        return encode(_Index(self._version, tuple(self), past, tuple(self._shunned)))

    @classmethod
    def of_index(cls, data: bytes, me: PeerId, limits: StoreLimits) -> tuple[Store, list[StoreOutput]]:
        """The store as it was, held to limits that may be others now; and what is to be dropped for them.

        Raises:
            ProtocolError: if this is no index; begin with an empty one then, and drop all contents.
        """
        read = decode(_Index, data, max_bytes=MAX_INDEX_BYTES, strict=True)
        store = cls(me, limits)
        store._version = read.version
        store._shunned = dict.fromkeys(read.shunned)
        outputs: list[StoreOutput] = []
        for kept in read.kept:
            if len(kept.units) != len(kept.uses) or not kept.units or not 0 < kept.num_bytes <= MAX_SHARD_BYTES:
                raise ProtocolError(f"the index has a shard {kept.cid} that cannot be; begin with an empty one")
            outputs += [each for each in store.handle(Came(kept)) if isinstance(each, Drop)]
        store.dropped.clear()
        for each in read.past:
            store._past[each.place] = each.cid
        if not 0 <= read.version <= MAX_EPOCH:
            raise ProtocolError("the index is of a version that no run reaches; begin with an empty one")
        return store, outputs


@dataclass(frozen=True, slots=True)
class _Past:
    place: Place
    cid: Cid


@dataclass(frozen=True, slots=True)
class _Index:
    version: int
    kept: tuple[Kept, ...]
    past: tuple[_Past, ...]
    shunned: tuple[PeerId, ...]
