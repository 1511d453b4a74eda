"""The records that a node keeps for others, within bounds that no number of names gets around.

At most `max_records` are held, `MAX_PER_KEY` at one key, `MAX_PER_AUTHOR` of one author. Names cost nothing, so where a
key or the whole is full, what makes room is the oldest record of the *group* (the network that they were handed in
from) that has most there: whoever floods a key from one place pushes out its own, and somebody else's record stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from shoal.dht.keyspace import Key
from shoal.dht.records import Record, Slot
from shoal.protocol.ids import PeerId

MAX_RECORDS: Final = 8192
MAX_PER_KEY: Final = 64
MAX_PER_AUTHOR: Final = 256


@dataclass(slots=True)
class Kept:
    """One record here.

    Attributes:
        record: what is kept.
        group: where it was handed in from.
        fork: another record that contradicts it.
    """

    record: Record
    group: str
    fork: Record | None = None


class RecordStore:
    """What is kept.

    Attributes:
        num_refused: records that were not taken: older than what is here, or one too many.
        num_evicted: records that made room for others.
    """

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self.num_refused = 0
        self.num_evicted = 0
        self._max_records = max_records
        self._kept: dict[Slot, Kept] = {}  # the oldest first
        self._at_key: dict[Key, dict[Slot, None]] = {}
        self._num_of: Counter[PeerId] = Counter()
        self._num_from: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, record: Record, group: str, now: float) -> Kept | None:
        """Keep a record, unless a better one is here; gives what is here of its slot then, None if there is no room.

        Args:
            record: which.
            group: of whoever hands it in.
            now: Unix seconds.
        """
        slot = record.slot
        known = self._kept.get(slot)
        if known is not None and known.record.statement.expires_at > now:
            if record.digest == known.record.digest:
                return known
            if record.contradicts(known.record):
                known.fork = known.record if record.beats(known.record) else record
            if not record.beats(known.record):
                self.num_refused += 1
                return known
            known.record = record
            self._kept[slot] = self._kept.pop(slot)
            return known
        if known is not None:
            self._drop(slot)
        self._make_room(record, now)
        if self._num_of[record.author] >= MAX_PER_AUTHOR:
            self.num_refused += 1
            return None
        kept = self._kept[slot] = Kept(record, group)
        self._at_key.setdefault(record.key, {})[slot] = None
        self._num_of[record.author] += 1
        self._num_from[group] += 1
        return kept

    def get(self, key: Key, now: float) -> list[Kept]:
        """What is kept at a key, the newest first."""
        found = [self._kept[slot] for slot in self._at_key.get(key, ())]
        gone = [kept.record.slot for kept in found if kept.record.statement.expires_at <= now]
        for slot in gone:
            self._drop(slot)
        alive = [kept for kept in found if kept.record.statement.expires_at > now]
        return alive[::-1]

    def record(self, slot: Slot) -> Record | None:
        """What is kept of a slot."""
        kept = self._kept.get(slot)
        return None if kept is None else kept.record

    def drop_expired(self, now: float) -> None:
        """Forget what has expired."""
        for slot in [slot for slot, kept in self._kept.items() if kept.record.statement.expires_at <= now]:
            self._drop(slot)

    def _make_room(self, record: Record, now: float) -> None:
        if len(self._kept) >= self._max_records:
            self.drop_expired(now)
        here = self._at_key.get(record.key, {})
        if len(here) >= MAX_PER_KEY:
            groups = Counter(self._kept[slot].group for slot in here)
            self._evict(here, groups)
        if len(self._kept) >= self._max_records:
            self._evict(self._kept, self._num_from)

    def _evict(self, slots: dict[Slot, None] | dict[Slot, Kept], groups: Counter[str]) -> None:
        greediest = groups.most_common(1)[0][0]
        self._drop(next(slot for slot in slots if self._kept[slot].group == greediest))
        self.num_evicted += 1

    def _drop(self, slot: Slot) -> None:
        kept = self._kept.pop(slot)
        here = self._at_key[kept.record.key]
        del here[slot]
        if not here:
            del self._at_key[kept.record.key]
        self._num_of -= Counter([slot.author])
        self._num_from -= Counter([kept.group])
