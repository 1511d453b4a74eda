"""The blocks of one tree as one range of bytes: given from the disk, and taken onto it, by bulk transfers.

Both sides know the index, so both know where in that range each block lies: one after the other, equal ones once. A
run of blocks is one pull. The giver reads a block in the thread that sends it; the taker checks a block and writes it
in the thread that brought it, before it takes the next. So what a kill can lose of a lane is the block that was on it.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from shoal.dht.trees import Tree
from shoal.node.mesh.host import Host
from shoal.node.store.blocks import BlockStore
from shoal.node.wire.pulls import BUFFERS, MAX_SEGMENT_BYTES, Parts
from shoal.protocol.errors import ProtocolError, RemoteError, ShoalError, Status
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import BLOCK_BYTES

MAX_READ_BYTES: Final = MAX_SEGMENT_BYTES + BLOCK_BYTES
"""What is given of a tree at a time."""


@dataclass(slots=True, eq=False)
class OpenTree:
    """A tree whose index is in memory.

    Attributes:
        tree: its index.
        cids: of its blocks, equal ones once: block n of a fetch is the n-th of these.
        sizes: of each of those.
        offsets: where each begins in the range of all; one more, where that ends.
    """

    tree: Tree
    cids: list[Cid] = field(default_factory=list)
    sizes: dict[Cid, int] = field(default_factory=dict)
    offsets: array[int] = field(default_factory=lambda: array("Q"))

    def __post_init__(self) -> None:
        for block in range(self.tree.num_blocks):
            cid = self.tree.cid(block)
            if self.sizes.setdefault(cid, self.tree.block_sizes[block]) != self.tree.block_sizes[block]:
                raise ProtocolError(f"the index gives block {cid} two sizes")
        self.cids = list(self.sizes)
        self.offsets = array("Q", itertools.accumulate(self.sizes.values(), initial=0))

    @property
    def num_bytes(self) -> int:
        """Of all blocks, equal ones once."""
        return self.offsets[-1]


class TreeSource:
    """What this node has of a tree, for `shoal.node.wire.bulk`."""

    def __init__(
        self, cid: Cid, find: Callable[[Cid], Awaitable[OpenTree | None]], blocks: BlockStore, host: Host
    ) -> None:
        """Give a tree that ``find`` opens, for as long as it does."""
        self._cid = cid
        self._find = find
        self._blocks = blocks
        self._host = host

    async def open(self, peer: PeerId, offset: int, length: int) -> Iterator[memoryview]:
        """Some of its bytes."""
        opened = await self._find(self._cid)
        if opened is None:
            raise RemoteError(Status.NOT_FOUND, f"this node has nothing of {self._cid} any more")
        if not 0 < length <= MAX_READ_BYTES or offset + length > opened.num_bytes:
            raise RemoteError(Status.OUT_OF_RANGE, f"up to {MAX_READ_BYTES} bytes of a tree are given at a time")
        first = bisect_right(opened.offsets, offset) - 1
        end = bisect_right(opened.offsets, offset + length - 1)
        if not all(self._blocks.has(opened.cids[block]) for block in range(first, end)):
            raise RemoteError(Status.NOT_FOUND, "this node does not have all of these blocks")
        if not await self._host.upload.turn(length, is_member=peer in self._host.wanted):
            raise RemoteError(Status.RESOURCE_EXHAUSTED, "this node sends as much as it is allowed to")
        return self._read(opened, offset, offset + length, range(first, end))

    def _read(self, opened: OpenTree, start: int, stop: int, blocks: range) -> Iterator[memoryview]:
        buffer = BUFFERS.take()
        try:
            for block in blocks:
                cid, begins = opened.cids[block], opened.offsets[block]
                try:
                    num_bytes = self._blocks.read_into(cid, buffer)
                except ShoalError as error:
                    raise RemoteError(Status.INTERNAL, f"block {cid} cannot be read") from error
                if num_bytes is None or num_bytes != opened.sizes[cid]:
                    raise RemoteError(Status.NOT_FOUND, f"block {cid} was damaged on this node's disk")
                with buffer[:num_bytes] as data:
                    yield data[max(start - begins, 0) : stop - begins]
        finally:
            BUFFERS.give_back(buffer)


class Arrivals(Parts):
    """A run of blocks on its way here: each is checked and written as it comes.

    Attributes:
        came: those that are in the store now.
        is_lie: whether one was not what its name says.
        failure: what the store said.
    """

    def __init__(self, opened: OpenTree, first: int, count: int, store: BlockStore) -> None:
        """Expect so many blocks from the first on."""
        self.offset = opened.offsets[first]
        super().__init__([end - self.offset for end in opened.offsets[first + 1 : first + count + 1]])
        self.came: list[int] = []
        self.is_lie = False
        self.failure: ShoalError | None = None
        self._opened = opened
        self._first = first
        self._store = store

    def take(self, part: int, data: memoryview) -> None:
        """A block is there."""
        number = self._first + part
        cid = self._opened.cids[number]
        if not cid.matches(data):
            self.is_lie = True
            return
        try:
            self._store.put({cid: data}, is_checked=True, is_durable=False, is_direct=True)
        except ShoalError as error:
            self.failure = error
        else:
            self.came.append(number)
