"""Content of this node and from others: blocks kept on disk or, for a round, in memory.

What a run needs for long (manifests, policy states) goes to the store. What is needed for one round (contributions)
stays in a bounded memory cache, oldest out first. Either is served to any peer that asks for it by CID.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import trio

from shoal.dht.blocks import split
from shoal.dht.fetch import BlockArrived, BlockFailed, Done, Drop, Failed, Fetch, Request, Store, Tick, Wake
from shoal.node.mesh.host import Host
from shoal.node.store.database import Storage
from shoal.node.supervise import open_plain_nursery
from shoal.node.wire.contracts import Block, BlockRequest, ContentService
from shoal.protocol.errors import Fault, RemoteError, ShoalError, Status
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import client

log = logging.getLogger(__name__)

MEMORY_BYTES: Final = 256 * 1024 * 1024
DISK_BYTES: Final = 2 * 1024 * 1024 * 1024
EVICT_AFTER: Final = 1 / 16
"""Room is made on disk whenever this part of it has been written anew."""


class UnavailableError(ShoalError):
    """Nobody who could be asked gave the content."""

    fault = Fault.REMOTE


class ContentStore(ContentService):
    """Blocks by CID, for this node and, as a service, for its peers."""

    def __init__(
        self, storage: Storage, host: Host, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        """Hold at most so much; on disk, what is pinned (the manifests of runs) comes on top."""
        self._storage = storage
        self._host = host
        self._max_memory_bytes = memory_bytes
        self._max_disk_bytes = disk_bytes
        self._written = 0
        self._memory: OrderedDict[Cid, bytes] = OrderedDict()
        self._memory_bytes = 0

    async def put(self, data: bytes, *, keep: bool, is_plain: bool = False) -> Cid:
        """Hold content: on disk if it is to be kept, else for as long as the memory cache does."""
        if is_plain:
            await self._hold({Cid.of_manifest(data): data}, keep=keep, pinned=True)
            return Cid.of_manifest(data)
        content = split(data)
        await self._hold(dict(content.blocks), keep=keep)
        return content.cid

    async def get(
        self, cid: Cid, sources: Sequence[PeerId], *, keep: bool, timeout_s: float = 30.0, is_plain: bool = False
    ) -> bytes:
        """Content from here, or else from peers.

        Args:
            cid: names it.
            sources: who may hold it.
            keep: whether it is to stay on disk.
            timeout_s: when to give up.
            is_plain: the CID names one block that is not cut up, though it is MessagePack: a run's manifest.

        Raises:
            UnavailableError: if no source gave it in time.
            StorageError: if the disk cannot be read or written.
        """
        held = self._memory.get(cid)
        if held is not None and not keep and (is_plain or not cid.is_manifest):
            return held  # one block, checked when it came: what a round merges, each time
        deadline = trio.current_time() + timeout_s
        # What is needed for one round only was never on disk, and asking the disk would hold up the whole node.
        here = _Here(self) if keep or not sources else self._memory
        fetch = Fetch(cid, sources, deadline=deadline, have=here, is_plain=is_plain)
        arrivals_in, arrivals = trio.open_memory_channel[BlockArrived | BlockFailed](64)
        received: dict[Cid, bytes] = {}
        event: BlockArrived | BlockFailed | Tick = Tick()
        result: bytes | str | None = None
        async with open_plain_nursery() as nursery:
            while result is None:
                wake_at = deadline
                for output in fetch.handle(event, trio.current_time()):
                    match output:
                        case Request():
                            nursery.start_soon(self._ask, output, arrivals_in)
                        case Store(block_cid, data):
                            received[block_cid] = data
                        case Drop(source, reason):
                            log.warning("%s is not asked for %s any more: %s", source, cid, reason)
                        case Wake(at):
                            wake_at = at
                        case Done(data):
                            result = data
                        case Failed(reason):
                            result = reason
                if result is None and not sources:
                    result = "it is not here, and nobody is known to hold it"
                if result is None:
                    event = Tick()
                    with trio.move_on_at(wake_at):
                        event = await arrivals.receive()
            nursery.cancel_scope.cancel()
        if isinstance(result, str):
            raise UnavailableError(f"{cid} cannot be had: {result}")
        await self._hold(received, keep=keep)
        return result

    async def _ask(self, request: Request, arrivals: trio.MemorySendChannel[BlockArrived | BlockFailed]) -> None:
        result: BlockArrived | BlockFailed
        try:
            source = client(ContentService, self._host.at(request.source), timeout_s=request.timeout_s)
            block = await source.block(BlockRequest(request.cid))
            result = BlockArrived(request.source, request.cid, bytes(block.data))
        except ShoalError as error:
            result = BlockFailed(request.source, request.cid, str(error))
        await arrivals.send(result)

    async def _hold(self, blocks: dict[Cid, bytes], *, keep: bool, pinned: bool = False) -> None:
        if keep and blocks:
            await trio.to_thread.run_sync(lambda: self._storage.put_blocks(blocks, pinned=pinned))
            self._written += sum(len(block) for block in blocks.values())
            if self._written > EVICT_AFTER * self._max_disk_bytes:
                self._written = 0
                await trio.to_thread.run_sync(self._storage.evict, self._max_disk_bytes)
        for cid, block in blocks.items():
            if cid not in self._memory:
                self._memory[cid] = block
                self._memory_bytes += len(block)
            self._memory.move_to_end(cid)
        while self._memory_bytes > self._max_memory_bytes:
            _, oldest = self._memory.popitem(last=False)
            self._memory_bytes -= len(oldest)

    def find(self, cid: Cid) -> bytes | None:
        """A block that is here."""
        held = self._memory.get(cid)
        return self._storage.get_block(cid) if held is None else held

    async def block(self, request: BlockRequest) -> Block:
        """Answer a peer that asks for a block."""
        block = self._memory.get(request.cid)
        if block is None:
            block = await trio.to_thread.run_sync(self._storage.get_block, request.cid)
        if block is None:
            raise RemoteError(Status.NOT_FOUND, f"this node does not hold {request.cid}")
        return Block(block)


class _Here(Mapping[Cid, bytes]):
    """The blocks that are here, as the fetch planner looks them up."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store

    def __getitem__(self, cid: Cid) -> bytes:
        block = self._store.find(cid)
        if block is None:
            raise KeyError(cid)
        return block

    def __iter__(self) -> Iterator[Cid]:
        raise TypeError("the blocks of a node are not listed")

    def __len__(self) -> int:
        raise TypeError("the blocks of a node are not counted")
