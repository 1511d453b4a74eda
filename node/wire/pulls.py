"""The puller's side of a bulk transfer (`shoal.node.wire.bulk`), without I/O: what is still owed, and where it belongs.

It belongs into memory that the caller gave; or it falls into *parts*, of which each is handed on, in the thread that
brought it, when all of it is there. Parts lie in memory of the path that brings them, which is used for the next part
too: so however much is pulled takes one part's memory for each path, and no fresh page of it.
"""

from __future__ import annotations

import mmap
import struct
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.limits import BLOCK_BYTES

MAX_SEGMENT_BYTES: Final = 8 * 1024 * 1024
MIN_SEGMENT_BYTES: Final = 1024 * 1024
MAX_PART_BYTES: Final = BLOCK_BYTES
MAX_KEPT: Final = 8
"""Buffers that wait for their next use."""
REQUEST: Final = struct.Struct("!16sQQ")


class Buffers:
    """Memory of `MAX_PART_BYTES` each, used again and again: fresh memory costs a page fault for every 4 KiB.

    Each begins at a page, so that a disk can read and write it. Any thread may use it.
    """

    def __init__(self) -> None:
        self._idle: list[memoryview] = []

    def take(self) -> memoryview:
        """One, with anything in it."""
        try:
            return self._idle.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, MAX_PART_BYTES))

    def give_back(self, buffer: memoryview) -> None:
        """It is not used any more."""
        if len(self._idle) < MAX_KEPT:
            self._idle.append(buffer)


BUFFERS: Final = Buffers()


class Place(Protocol):
    """Where what one path brings is put."""

    hands_on: bool

    def target(self, start: int, end: int) -> memoryview:
        """Memory for the next of these bytes; they are not none."""

    def filled(self, start: int, num_bytes: int, *, is_full: bool) -> int:
        """So many are in the target, or all that it has room for; gives from where on bytes are owed."""

    def close(self) -> None:
        """Nothing more comes."""


class Memory:
    """Memory of the caller's, in one piece."""

    hands_on = False
    ends: Sequence[int] = ()

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.size = len(view)

    def place(self) -> Place:
        """For any path."""
        return self

    def target(self, start: int, end: int) -> memoryview:
        """A piece of it."""
        return self.view[start:end]

    def filled(self, start: int, num_bytes: int, *, is_full: bool) -> int:
        """What is there is there."""
        return start + num_bytes

    def close(self) -> None:
        """It is the caller's."""


class Parts(ABC):
    """Into what the bytes of a pull fall.

    Attributes:
        ends: of the parts, ascending, each at most `MAX_PART_BYTES` after the one before; at least one.
        num_bytes: that came so far, about: threads count them without a lock.
    """

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends = ends
        self.size = ends[-1]
        self.num_bytes = 0

    @abstractmethod
    def take(self, part: int, data: memoryview) -> None:
        """All of a part is there, until this returns. Called in threads, by several at a time; raises nothing."""

    def place(self) -> Place:
        """For one path."""
        return _PartPlace(self)


class _PartPlace:
    """Memory for one part at a time."""

    hands_on = True

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._buffer = BUFFERS.take()

    def target(self, start: int, end: int) -> memoryview:
        ends = self._parts.ends
        return self._buffer[: ends[bisect_right(ends, start)] - start]

    def filled(self, start: int, num_bytes: int, *, is_full: bool) -> int:
        self._parts.num_bytes += num_bytes
        if not is_full:
            return start  # half a part is none
        part = bisect_right(self._parts.ends, start)
        end = self._parts.ends[part]
        with self._buffer[: end - start] as data:
            self._parts.take(part, data)
        return end

    def close(self) -> None:
        BUFFERS.give_back(self._buffer)


class Pull:
    """One pull: what is still to be fetched. Its queue is shared with threads; single operations on it are atomic.

    Attributes:
        todo: segments that nobody was asked for: start and end.
    """

    def __init__(self, ref_id: bytes, offset: int, into: Memory | Parts, num_lanes: int) -> None:
        self.ref_id = ref_id
        self.offset = offset
        self.into = into
        size = min(max(into.size // (4 * num_lanes), MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)
        if num_lanes == 1:
            size = MAX_SEGMENT_BYTES
        self.todo = deque(_segments(into.size, size, into.ends))
        self.num_failures = 0
        self.refusal: RemoteError | None = None


def _segments(num_bytes: int, size: int, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """What is asked for at once; a part is never in two of them."""
    start = 0
    while True:
        end = min(start + size, num_bytes)
        if ends:
            end = ends[bisect_left(ends, end)]
        yield start, end
        start = end
        if start >= num_bytes:
            return


class Asker:
    """What is said on one path: at most two segments are asked for and owed.

    Attributes:
        target: where the next bytes belong; never empty.
    """

    def __init__(self, pull: Pull, is_wanted: Callable[[], bool]) -> None:
        self._pull = pull
        self._is_wanted = is_wanted  # whether others wait for this path
        self._asked: deque[tuple[int, int]] = deque()
        self._num_done = 0
        self._status = bytearray(1)
        self._in_body = False
        self._place = pull.into.place()
        self.target = memoryview(self._status)

    def next_requests(self) -> bytes:
        """What to send now; empty when all that was asked for is owed no more."""
        requests = b""
        while len(self._asked) < 2 and not (self._num_done and self._is_wanted()):
            try:
                start, end = self._pull.todo.popleft()
            except IndexError:
                break
            self._asked.append((start, end))
            requests += REQUEST.pack(self._pull.ref_id, self._pull.offset + start, end - start)
        return requests

    @property
    def is_done(self) -> bool:
        """Whether nothing is owed."""
        return not self._asked

    def fills_part(self, num_bytes: int) -> bool:
        """Whether `filled` with so many would hand a part on, which takes as long as whoever takes it needs."""
        return self._in_body and self._place.hands_on and num_bytes == len(self.target)

    def filled(self, num_bytes: int) -> bool:
        """So many bytes of the target are there. Gives back whether the segment goes on.

        Raises:
            RemoteError: with the owner's status, if it refuses.
        """
        start, end = self._asked[0]
        if self._in_body:
            self.target = self.target[num_bytes:]
            start = self._place.filled(start, num_bytes, is_full=not self.target)
            self._asked[0] = start, end
        elif self._status[0]:
            raise _refusal(self._status[0])
        else:
            self._in_body = True
            self.target = self.target[1:]
        if start < end:
            if not self.target:
                self.target = self._place.target(start, end)
            return True
        self._asked.popleft()
        self._num_done += 1
        self._in_body = False
        self.target = memoryview(self._status)
        return False

    def close(self) -> None:
        """Give back what is owed, for another path to fetch, and let the memory go."""
        self._pull.todo.extendleft(reversed(self._asked))
        self._asked.clear()
        self.target.release()
        self._place.close()


def _refusal(number: int) -> RemoteError:
    match number:
        case Status.NOT_FOUND:
            return RemoteError(Status.NOT_FOUND, "there is no such offer to this node, or not any more")
        case Status.OUT_OF_RANGE:
            return RemoteError(Status.OUT_OF_RANGE, "the offer has fewer bytes than it said")
        case Status.RESOURCE_EXHAUSTED:
            return RemoteError(Status.RESOURCE_EXHAUSTED, "the owner sends as much as it may; ask again in a while")
        case _:
            return RemoteError(Status.UNKNOWN, f"the owner refused with status {number}")
