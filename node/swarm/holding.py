"""Contents in memory: each in one piece, whole or on its way, of which its blocks are parts.

What somebody holds (a run: the contributions of its rounds, its newest policies) stays. The rest is idle: a little of
it is kept for whoever is a moment late, oldest out first; a content that is being taken by a peer, or that came in part
before its fetch failed, a while longer. What does not fit into the memory for contents lies in a file that has no name
and is gone with the process; what does not fit there either is refused.

Nothing here waits or reads a clock: what takes long, making a file and copying into it, is a function for a thread.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shoal.dht.blocks import Named
from shoal.protocol.errors import ResourceError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES

MEMORY_BYTES: Final = 256 * 1024 * 1024
FILE_BYTES: Final = 8 * 1024 * 1024 * 1024
"""Of contents in files without a name."""
IDLE_BYTES: Final = 2 * 1024 * 1024
"""Of contents that nobody holds, beside those that are leased or came in part."""
MAX_IDLE: Final = 1024
LEASE_S: Final = 30.0
"""A content of which a peer took a block is there for its next one for so long."""
PART_S: Final = 600.0
"""What came of a content before its fetch failed is there for the next try for so long."""
MAX_LOOKED_AT: Final = 32
"""Idle contents looked at each time."""


class NoRoomError(ResourceError):
    """A content does not fit beside what is held."""


@dataclass(slots=True, eq=False)
class Held:
    """One content.

    Attributes:
        cid: its name.
        data: all of its bytes; those of blocks that are missing are zeros.
        manifest_bytes: its manifest as a block; empty if it is one block.
        places: where each block begins, and its bytes.
        missing: blocks that have not come.
        in_file: whether it lies in a file.
        num_users: fetches that fill it.
        used_at: when it became idle, or a peer took a block of it.
        is_leased: whether a peer did.
    """

    cid: Cid
    data: memoryview
    manifest_bytes: bytes
    places: dict[Cid, list[tuple[int, int]]]
    missing: set[Cid]
    in_file: bool
    num_users: int = 0
    used_at: float = 0.0
    is_leased: bool = False

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self.data) + len(self.manifest_bytes)

    def block(self, cid: Cid) -> memoryview | bytes | None:
        """A block of it, if it has come."""
        if cid == self.cid and self.manifest_bytes:
            return self.manifest_bytes
        if cid in self.missing:
            return None
        start, num_bytes = self.places[cid][0]
        return self.data[start : start + num_bytes]

    def fill(self, cid: Cid, block: bytes | memoryview) -> None:
        """A block came, of the size that the manifest says; it goes wherever the content has it."""
        for start, num_bytes in self.places[cid]:
            self.data[start : start + num_bytes] = block


def open_memory(num_bytes: int) -> memoryview:
    """Zeros that take memory only where they are written, and give it back to the system as soon as they are gone."""
    if num_bytes < BLOCK_BYTES:
        return memoryview(bytearray(num_bytes))
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def open_file(folder: Path, num_bytes: int) -> memoryview:
    """The same in a file without a name. Blocks; for a thread.

    Raises:
        NoRoomError: if the disk has no room for it.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # not later: who writes to a full disk by a map is killed
            return memoryview(mmap.mmap(file.fileno(), num_bytes))
    except OSError as error:
        raise NoRoomError(f"no room for {num_bytes} bytes in {folder}: {error.strerror}; free some space") from error


@dataclass(slots=True)
class Holding:
    """Every content in memory; and the blocks of all of them, by name.

    Attributes:
        max_memory_bytes: of contents in memory.
        max_file_bytes: of contents in files.
        memory_bytes: that they take.
        file_bytes: that they take.
        num_refused: contents that there was no room for.
    """

    max_memory_bytes: int = MEMORY_BYTES
    max_file_bytes: int = FILE_BYTES
    memory_bytes: int = 0
    file_bytes: int = 0
    num_refused: int = 0
    _contents: dict[Cid, Held] = field(default_factory=dict)
    _with_block: dict[Cid, list[Held]] = field(default_factory=dict)
    _held_by: dict[str, set[Cid]] = field(default_factory=dict)
    _idle: OrderedDict[Cid, Held] = field(default_factory=OrderedDict)
    _idle_bytes: int = 0

    def get(self, cid: Cid) -> Held | None:
        """A content, whole or in part."""
        return self._contents.get(cid)

    def find(self, cid: Cid) -> memoryview | bytes | None:
        """A block, of whichever content."""
        for held in self._with_block.get(cid, ()):
            block = held.block(cid)
            if block is not None:
                return block
        return None

    def lease(self, cid: Cid, now: float) -> None:
        """A peer took a block. Of a content that is one block it has all, and will not come again."""
        for held in self._with_block.get(cid, ()):
            if not held.manifest_bytes:
                continue
            held.used_at, held.is_leased = now, True
            if held.cid in self._idle:
                self._idle.move_to_end(held.cid)

    def take_room(self, num_bytes: int, now: float, *, is_better_in_file: bool = False) -> bool:
        """Set room aside: True for memory, False for a file. What is idle makes way for it.

        Raises:
            NoRoomError: if there is neither.
        """
        self._make_way(num_bytes, now, leased=False)
        in_memory = self.memory_bytes + num_bytes <= self.max_memory_bytes
        if is_better_in_file and self.file_bytes + num_bytes <= self.max_file_bytes:
            in_memory = False
        if not in_memory and self.file_bytes + num_bytes > self.max_file_bytes:
            self._make_way(num_bytes, now, leased=True)
            in_memory = self.memory_bytes + num_bytes <= self.max_memory_bytes
            if not in_memory and self.file_bytes + num_bytes > self.max_file_bytes:
                self.num_refused += 1
                raise NoRoomError(
                    f"no room for {num_bytes} bytes beside the contents that are held; start the node with a higher "
                    "--max-disk, or leave a swarm"
                )
        self._count(num_bytes, in_file=not in_memory)
        return in_memory

    def give_room_back(self, num_bytes: int, *, in_file: bool) -> None:
        """What was set aside is not needed."""
        self._count(-num_bytes, in_file=in_file)

    def add(
        self, named: Named, data: memoryview, now: float, *, in_file: bool, is_whole: bool, owner: str | None = None
    ) -> Held:
        """A content for which room was taken: `num_bytes` of it. One that is here already stays, and is given back."""
        if owner is not None:
            self._held_by.setdefault(owner, set()).add(named.cid)
        num_bytes = len(data) + len(named.manifest_bytes)
        known = self._contents.get(named.cid)
        if known is not None and (not known.missing or not is_whole):
            self.give_room_back(num_bytes, in_file=in_file)
            self._sort(known)
            return known
        if known is not None:
            self._forget(known)
        places = _places(named, len(data))
        missing = set() if is_whole else set(places)
        held = Held(named.cid, data, named.manifest_bytes, places, missing, in_file, used_at=now)
        self._contents[held.cid] = held
        for cid in _blocks_of(held):
            self._with_block.setdefault(cid, []).append(held)
        self._sort(held)
        return held

    def use(self, held: Held) -> None:
        """A fetch fills it, until `unuse`; it does not go meanwhile."""
        held.num_users += 1
        self._sort(held)

    def unuse(self, held: Held, now: float) -> None:
        """A fetch fills it no more."""
        held.num_users -= 1
        held.used_at = now
        self._sort(held)
        self.trim(now)

    def hold(self, owner: str, cids: Iterable[Cid], now: float) -> None:
        """From now on somebody holds these contents, here or yet to come, and no others."""
        before, after = self._held_by.get(owner, set()), set(cids)
        if before == after:
            return
        self._held_by[owner] = after
        if not after:
            del self._held_by[owner]
        for cid in before ^ after:
            held = self._contents.get(cid)
            if held is not None:
                held.used_at = now
                self._sort(held)
        self.trim(now)

    def add_holder(self, owner: str, cid: Cid) -> None:
        """Somebody holds this content too."""
        self._held_by.setdefault(owner, set()).add(cid)
        held = self._contents.get(cid)
        if held is not None:
            self._sort(held)

    def trim(self, now: float) -> None:
        """Forget what is idle and too much."""
        for held in self._oldest():
            if self._idle_bytes <= IDLE_BYTES and len(self._idle) <= MAX_IDLE:
                return
            is_over = self._idle_bytes > self.max_memory_bytes or len(self._idle) > MAX_IDLE
            if is_over or not self._stays_a_while(held, now):
                self._forget(held)

    def _make_way(self, num_bytes: int, now: float, *, leased: bool) -> None:
        for held in self._oldest():
            if self.memory_bytes + num_bytes <= self.max_memory_bytes:
                return
            if leased or not self._stays_a_while(held, now):
                self._forget(held)

    def _oldest(self) -> list[Held]:
        return [held for held, _ in zip(self._idle.values(), range(MAX_LOOKED_AT), strict=False)]

    def _stays_a_while(self, held: Held, now: float) -> bool:
        if held.missing:
            return now < held.used_at + PART_S
        return held.is_leased and now < held.used_at + LEASE_S

    def _sort(self, held: Held) -> None:
        """Among the idle ones, or not; one that was filled while another made it whole is none of these contents."""
        if self._contents.get(held.cid) is not held:
            return
        is_idle = held.num_users == 0 and not any(held.cid in cids for cids in self._held_by.values())
        was_idle = held.cid in self._idle
        if is_idle and not was_idle:
            self._idle[held.cid] = held
            self._idle_bytes += held.num_bytes
        elif was_idle and not is_idle:
            del self._idle[held.cid]
            self._idle_bytes -= held.num_bytes

    def _forget(self, held: Held) -> None:
        del self._contents[held.cid]
        if self._idle.pop(held.cid, None) is not None:
            self._idle_bytes -= held.num_bytes
        self._count(-held.num_bytes, in_file=held.in_file)
        for cid in _blocks_of(held):
            others = self._with_block[cid]
            others.remove(held)
            if not others:
                del self._with_block[cid]

    def _count(self, num_bytes: int, *, in_file: bool) -> None:
        if in_file:
            self.file_bytes += num_bytes
        else:
            self.memory_bytes += num_bytes


def _blocks_of(held: Held) -> set[Cid]:
    return {*held.places, held.cid}


def _places(named: Named, size: int) -> dict[Cid, list[tuple[int, int]]]:
    if named.manifest is None:
        return {named.cid: [(0, size)]}
    places: dict[Cid, list[tuple[int, int]]] = {}
    for index, cid in enumerate(named.manifest.blocks):
        start = index * BLOCK_BYTES
        places.setdefault(cid, []).append((start, min(BLOCK_BYTES, size - start)))
    return places
