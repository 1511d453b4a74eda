"""Content of this node and from others: fetched, held in memory (`holding`), kept on disk, served by CID to any peer.

A run says what it holds (`hold`: the contributions of its rounds, its newest policies) and what is to be on disk
(`keep`: to start from again). Both are said anew whenever they change, so nothing has to be counted, and what nobody
names any more goes: from memory a moment later, from the disk with the next sweep. Manifests of runs are pinned.

A fetch (`shoal.dht.fetch` plans it) lasts as long as blocks come. What came before it failed is served, and is not
fetched again. Two that want the same content at once are one fetch. Hashes, files and the database are done in threads,
a few at a time; small things are hashed where they are, since that is quicker than to hand them over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import trio

from shoal.dht.blocks import Named, name
from shoal.dht.fetch import (
    PATIENCE_S,
    BlockArrived,
    BlockFailed,
    Done,
    Drop,
    Event,
    Failed,
    Fetch,
    Lack,
    Look,
    Looked,
    Planned,
    Request,
    SourceFound,
    Store,
    Tick,
    Wake,
)
from shoal.dht.manifests import open_content_manifest
from shoal.node.mesh.host import Host
from shoal.node.store.database import KEPT, Storage
from shoal.node.supervise import open_plain_nursery
from shoal.node.swarm.holding import FILE_BYTES, MEMORY_BYTES, Held, Holding, NoRoomError, open_file, open_memory
from shoal.node.wire.contracts import Block, BlockRequest, ContentService
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import Fault, ProtocolError, RemoteError, ShoalError, Status
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES
from shoal.protocol.services import client, current_call

log = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_S: Final = 10.0
"""Between two sweeps of the disk."""
GRACE_S: Final = 20.0
"""A block on disk that nobody keeps stays for so long after its last use."""
BATCH_BLOCKS: Final = 4
"""Written in one transaction, between which others have their turn."""
INLINE_BYTES: Final = 256 * 1024
"""Up to this is hashed on the loop: for less than it takes to hand it to a thread, and be woken by that."""
LARGE_BYTES: Final = 16 * 1024 * 1024
"""From here on what is copied or fetched lies in a file, if there is room: the system may take its pages."""
LOOK_S: Final = 1.0
"""How often a request that is open is looked at for signs of life."""
MAX_WAITING: Final = 256
"""Peers' requests that wait for the disk; more are refused."""
MAX_UNFIT: Final = 1024
"""Names of what is no content that are remembered."""


class UnavailableError(ShoalError):
    """A content was not had.

    Attributes:
        lack: why, which says whether a later try makes sense.
    """

    fault = Fault.REMOTE

    def __init__(self, message: str, lack: Lack = Lack.UNAVAILABLE) -> None:
        super().__init__(message)
        self.lack = lack


@dataclass(slots=True, eq=False)
class _Open:
    """A request under way, since some time; not yet, if that is never."""

    source: PeerId
    since: float
    silence_s: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(slots=True, eq=False)
class _Flight:
    """A content on its way here.

    Attributes:
        send: hands the fetch what happens.
        is_over: set when it ended, or whoever drove it was cancelled.
        failure: why it failed.
    """

    fetch: Fetch
    send: trio.MemorySendChannel[Event]
    receive: trio.MemoryReceiveChannel[Event]
    tell: list[Callable[[], None]]
    is_over: trio.Event = field(default_factory=trio.Event)
    held: Held | None = None
    failure: UnavailableError | None = None
    requests: set[_Open] = field(default_factory=set)

    def tell_progress(self) -> None:
        """Some of it came."""
        for tell in self.tell:
            tell()


class ContentStore(ContentService):
    """Blocks by CID, for this node and, as a service, for its peers.

    Attributes:
        holding: what is in memory.
        num_refused: requests of peers that were too many for the disk.
        max_disk_bytes: what this node's things may take on it.
    """

    def __init__(
        self,
        storage: Storage,
        host: Host,
        *,
        memory_bytes: int = MEMORY_BYTES,
        file_bytes: int = FILE_BYTES,
        disk_bytes: int | None = None,
    ) -> None:
        """Hold at most so much in memory, and in files beside it.

        On disk all together have ``disk_bytes``, by default the node's: its file with blocks and logs, and the files
        beside it. What is kept or pinned may come to more; what is not, goes first, and contents in files have the
        rest.
        """
        self.holding = Holding(memory_bytes, file_bytes)
        self.max_disk_bytes = host.budgets.limits.max_disk_bytes if disk_bytes is None else disk_bytes
        self._max_file_bytes = file_bytes
        self.num_refused = 0
        self._storage = storage
        self._blocks = storage.blocks
        self._host = host
        self._flights: dict[Cid, _Flight] = {}
        self._unfit: OrderedDict[Cid, tuple[int, str]] = OrderedDict()
        self._hashing = trio.CapacityLimiter(2)
        self._disk = trio.CapacityLimiter(2)
        self._writing = trio.Lock()
        self._kept = {fact[len(KEPT) :]: _read_kept(data) for fact, data in storage.list_facts(KEPT).items()}
        self._next_sweep = 0.0

    @property
    def disk_bytes(self) -> int:
        """What they take."""
        return self._storage.disk_bytes() + self.holding.file_bytes

    # --- what this node has ---

    async def put(self, data: bytes | memoryview, *, owner: str | None = None, is_lent: bool = False) -> Cid:
        """Hold content.

        Args:
            data: all of it; left as it is from now on, or until this returns if it is lent.
            owner: who holds it, until the next `hold`. Without one it stays for a moment only.
            is_lent: others will write there: it is copied.

        Raises:
            NoRoomError: if there is no room for it.
        """
        named = await self._hash(partial(name, data), len(data))
        num_bytes = len(data) + len(named.manifest_bytes)
        in_memory = self._take_room(num_bytes, is_better_in_file=is_lent and num_bytes >= LARGE_BYTES)
        view = memoryview(data)
        if is_lent or not in_memory:
            copy = partial(_copied, data) if in_memory else partial(_copy_to_file, self._storage, data)
            try:
                view = await self._in_thread(copy, self._disk)
            except BaseException:
                self.holding.give_room_back(num_bytes, in_file=not in_memory)
                raise
        now = trio.current_time()
        self.holding.add(named, view, now, in_file=not in_memory, is_whole=True, owner=owner)
        self.holding.trim(now)
        return named.cid

    def _take_room(self, num_bytes: int, *, is_better_in_file: bool = False) -> bool:
        left = self.max_disk_bytes - self._storage.disk_bytes()
        self.holding.max_file_bytes = max(0, min(self._max_file_bytes, left))
        return self.holding.take_room(num_bytes, trio.current_time(), is_better_in_file=is_better_in_file)

    async def pin(self, data: bytes) -> Cid:
        """Keep one block on disk for ever that is not cut up, though it is MessagePack: a run's manifest.

        Raises:
            StorageError: if the disk cannot be written.
        """
        cid = Cid.of_manifest(data)
        await self._in_thread(partial(self._blocks.put, {cid: data}), self._disk)
        await self.keep(f"pinned/{cid}", (cid,))
        return cid

    def hold(self, owner: str, cids: Iterable[Cid]) -> None:
        """From now on ``owner`` holds these contents in memory, here or yet to come, and no others."""
        self.holding.hold(owner, cids, trio.current_time())

    async def keep(self, owner: str, cids: Sequence[Cid]) -> None:
        """From now on ``owner`` keeps these contents on disk, and no others; those that are in memory are written.

        Raises:
            UnavailableError: if one is not here whole; then nothing changes.
            StorageError: if the disk cannot be written.
        """
        for cid in cids:
            held = self.holding.get(cid)
            if held is not None and not held.missing:
                await self._write(held)
            elif await self._in_thread(partial(_names_on_disk, self._storage, cid), self._disk) is None:
                raise UnavailableError(f"{cid} is not here, so it cannot be kept")
        kept = tuple(cids)
        if self._kept.get(owner) != kept:
            await self._in_thread(partial(self._storage.put_fact, KEPT + owner, encode(kept)), self._disk)
            self._kept[owner] = kept
        await self._sweep()

    async def _write(self, held: Held) -> None:
        """Onto disk, in pieces; the manifest last, so that what it names is there."""
        async with self._writing:
            todo = [cid for cid in [*held.places, held.cid] if not self._blocks.has(cid)]
            for start in range(0, len(todo), BATCH_BLOCKS):
                blocks = {cid: block for cid in todo[start : start + BATCH_BLOCKS] if (block := held.block(cid))}
                write = partial(self._blocks.put, blocks, is_checked=True)
                await self._in_thread(write, self._disk)

    async def _sweep(self) -> None:
        """Forget what is on disk and nobody keeps, if the last time is a while ago."""
        now = trio.current_time()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_S
        roots = {cid for cids in self._kept.values() for cid in cids}
        left = self.max_disk_bytes - self.holding.file_bytes
        await self._in_thread(partial(_sweep, self._storage, roots, left), self._disk)

    def find(self, cid: Cid) -> bytes | memoryview | None:
        """A block that is here. Reads the disk."""
        block = self.holding.find(cid)
        return self._blocks.get(cid) if block is None else block

    async def block(self, request: BlockRequest) -> Block:
        """Answer a peer that asks for a block."""
        cid = request.cid
        block = self.holding.find(cid)
        if block is not None:
            self.holding.lease(cid, trio.current_time())
            return await self._give(block)
        store = self._blocks if self._blocks.has(cid) else self._storage.trees
        if store.has(cid):
            if self._disk.statistics().tasks_waiting >= MAX_WAITING:
                self.num_refused += 1
                raise RemoteError(Status.RESOURCE_EXHAUSTED, "this node's disk is busy; ask again in a while")
            block = await self._in_thread(partial(store.get, cid), self._disk)
        if block is None:
            raise RemoteError(Status.NOT_FOUND, f"this node does not hold {cid}")
        return await self._give(block)

    async def _give(self, block: bytes | memoryview) -> Block:
        is_member = current_call().peer in self._host.wanted
        if not await self._host.upload.turn(len(block), is_member=is_member):
            raise RemoteError(
                Status.RESOURCE_EXHAUSTED,
                "this node sends as much as it is allowed to; ask again in a while, or somebody else",
            )
        return Block(block)

    # --- what it gets ---

    async def get(
        self,
        cid: Cid,
        sources: Sequence[PeerId],
        *,
        max_bytes: int = MAX_CONTENT_BYTES,
        patience_s: float = PATIENCE_S,
        is_plain: bool = False,
        owner: str | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> memoryview:
        """Content from here, or else from peers.

        Args:
            cid: names it.
            sources: who may hold it.
            max_bytes: a bigger one is refused, before any of it is fetched.
            patience_s: how long nothing may come before this gives up.
            is_plain: the CID names one block that is not cut up, though it is MessagePack: a run's manifest.
            owner: who holds it, until the next `hold`.
            on_progress: told whenever some of it came.

        Raises:
            UnavailableError: if it was not had; its ``lack`` says why.
            StorageError: if the disk cannot be read or written.
        """
        if owner is not None:
            self.holding.add_holder(owner, cid)
        held = self.holding.get(cid)
        while held is None or held.missing:
            self._check_fit(cid, max_bytes)
            flight = self._flights.get(cid)
            if flight is None or flight.is_over.is_set():
                fetch = Fetch(
                    cid, sources, patience_s=patience_s if sources else 0.0, is_plain=is_plain, max_bytes=max_bytes
                )
                flight = self._flights[cid] = _Flight(fetch, *trio.open_memory_channel[Event](256), [on_progress])
                await self._fly(flight, held)
            else:
                flight.tell.append(on_progress)
                with contextlib.suppress(trio.WouldBlock):  # it is busy enough with those that it has
                    for source in sources:
                        flight.send.send_nowait(SourceFound(source))
                await flight.is_over.wait()
            if flight.failure is not None:
                raise flight.failure
            held = flight.held  # None, or a part of it, if whoever drove it was cancelled: then this one goes on
        if len(held.data) > max_bytes:
            raise UnavailableError(f"{cid} has {len(held.data)} bytes; {max_bytes} are allowed", Lack.UNFIT)
        return held.data

    def _check_fit(self, cid: Cid, max_bytes: int) -> None:
        known = self._unfit.get(cid)
        if known is not None and max_bytes <= known[0]:
            raise UnavailableError(known[1], Lack.UNFIT)

    async def _fly(self, flight: _Flight, held: Held | None) -> None:
        """Fetch a content to its end, or until cancelled."""
        cid = flight.fetch.cid
        if held is not None:
            self._fill_now(flight, held)
        try:
            async with open_plain_nursery() as nursery:
                nursery.start_soon(self._watch, flight)
                try:
                    await self._carry_out(flight, nursery)
                except NoRoomError as error:
                    flight.failure = UnavailableError(f"{cid} cannot be had now: {error}")
                nursery.cancel_scope.cancel()
        finally:
            flight.is_over.set()
            if self._flights.get(cid) is flight:
                del self._flights[cid]
            if flight.held is not None:
                self.holding.unuse(flight.held, trio.current_time())

    async def _carry_out(self, flight: _Flight, nursery: trio.Nursery) -> None:
        fetch = flight.fetch
        event: Event = Tick()
        while True:
            wake_at = trio.current_time()
            looked: Looked | None = None
            for output in fetch.handle(event, trio.current_time()):
                match output:
                    case Look(cids):
                        looked = await self._look(flight, cids)
                    case Planned(manifest, data):
                        if flight.held is None:
                            await self._make_room(flight, Named(fetch.cid, manifest, data), manifest.size)
                        flight.tell_progress()
                    case Request():
                        nursery.start_soon(self._ask, output, flight)
                    case Store(cid, data):
                        await self._store(flight, cid, data)
                    case Drop(source, reason):
                        log.warning("%s is not asked for %s any more: %s", source, fetch.cid, reason)
                    case Wake(at):
                        wake_at = at
                    case Done():
                        return
                    case Failed(reason, lack):
                        self._remember_failure(flight, reason, lack)
                        return
            if looked is not None:
                event = looked
                continue
            event = Tick()
            with trio.move_on_at(wake_at):
                event = await flight.receive.receive()

    def _remember_failure(self, flight: _Flight, reason: str, lack: Lack) -> None:
        cid = flight.fetch.cid
        text = f"{cid} cannot be had: {reason}"
        flight.failure = UnavailableError(text, lack)
        if lack is Lack.UNFIT:
            self._unfit[cid] = (flight.fetch.max_bytes, text)
            self._unfit.move_to_end(cid)
            if len(self._unfit) > MAX_UNFIT:
                self._unfit.popitem(last=False)

    async def _look(self, flight: _Flight, cids: Sequence[Cid]) -> Looked:
        """Which of these blocks are here; they are put where the content has its place, if it has one yet."""
        here: dict[Cid, int] = {}
        held, whole = flight.held, flight.fetch.cid
        for cid in cids:
            if held is not None and cid not in held.missing:
                block = held.block(cid)
                here[cid] = 0 if block is None else len(block)
                continue
            found = self.holding.find(cid)
            if found is None and self._blocks.has(cid):
                found = await self._in_thread(partial(self._blocks.get, cid), self._disk)
            if found is None:
                continue
            if flight.fetch.is_manifest(cid):
                return Looked({cid: len(found)}, bytes(found))
            if held is None:
                await self._make_room(flight, Named(whole), len(found))
                held = flight.held
            if held is not None and sum(size for _, size in held.places[cid][:1]) == len(found):
                await self._store(flight, cid, found)
                here[cid] = len(found)
        if held is not None and held.manifest_bytes and whole in cids:
            return Looked({}, held.manifest_bytes)
        return Looked(here)

    async def _make_room(self, flight: _Flight, named: Named, size: int) -> None:
        num_bytes = size + len(named.manifest_bytes)
        in_memory = self._take_room(num_bytes, is_better_in_file=num_bytes >= LARGE_BYTES)
        try:
            if in_memory:
                data = open_memory(size)
            else:
                data = await self._in_thread(partial(open_file, self._storage.path.parent, size), self._disk)
        except BaseException:
            self.holding.give_room_back(num_bytes, in_file=not in_memory)
            raise
        held = self.holding.add(named, data, trio.current_time(), in_file=not in_memory, is_whole=False)
        self._fill_now(flight, held)

    def _fill_now(self, flight: _Flight, held: Held) -> None:
        flight.held = held
        self.holding.use(held)

    async def _store(self, flight: _Flight, cid: Cid, data: bytes | memoryview) -> None:
        if flight.held is None:  # one block
            await self._make_room(flight, Named(flight.fetch.cid), len(data))
        held = flight.held
        if held is None:
            return
        if cid not in held.missing:  # this node made the same content itself meanwhile
            flight.tell_progress()
            return
        if held.in_file:
            await self._in_thread(partial(held.fill, cid, data), self._disk)
        else:
            held.fill(cid, data)
        held.missing.discard(cid)
        flight.tell_progress()

    async def _ask(self, request: Request, flight: _Flight) -> None:
        source, cid = request.source, request.cid
        result: BlockArrived | BlockFailed = BlockFailed(
            source, cid, f"nothing came of it for {request.silence_s:g} s", is_grave=True
        )
        asked = _Open(source, math.inf, request.silence_s)
        flight.requests.add(asked)
        download, has_turn, came = self._host.download, False, 0
        try:
            with asked.scope:
                has_turn = await download.turn(BLOCK_BYTES, is_member=True, is_patient=True)
                asked.since = trio.current_time()
                service = client(ContentService, self._host.at(source), timeout_s=PATIENCE_S)
                data = (await service.block(BlockRequest(cid))).data
                came = len(data)
                is_right = await self._hash(partial(cid.matches, data), len(data))
                result = BlockArrived(source, cid, data, is_right)
        except ShoalError as error:
            is_grave = isinstance(error, RemoteError) and error.status is Status.NOT_FOUND
            result = BlockFailed(source, cid, str(error), is_grave=is_grave)
        finally:
            flight.requests.discard(asked)
            if has_turn:
                download.correct(came - BLOCK_BYTES)
        await flight.send.send(result)

    async def _watch(self, flight: _Flight) -> None:
        """End requests to sources of which nothing comes any more."""
        while True:
            await trio.sleep(LOOK_S)
            now = trio.current_time()
            for asked in flight.requests:
                since = now - asked.silence_s
                if asked.since < since and not self._host.links.is_moving(asked.source, since):
                    asked.scope.cancel()

    # --- threads ---

    async def _hash(self, function: Callable[[], T], num_bytes: int) -> T:
        return function() if num_bytes <= INLINE_BYTES else await self._in_thread(function, self._hashing)

    async def _in_thread(self, function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        return await trio.to_thread.run_sync(function, limiter=limiter)


def _copied(data: bytes | memoryview) -> memoryview:
    into = open_memory(len(data))
    into[:] = data
    return into


def _copy_to_file(storage: Storage, data: bytes | memoryview) -> memoryview:
    into = open_file(storage.path.parent, len(data))
    into[:] = data
    return into


def _names_on_disk(storage: Storage, cid: Cid) -> set[Cid] | None:
    """The blocks of a content that is whole on disk."""
    data = storage.blocks.get(cid)
    if data is None:
        return None
    names = {cid}
    if cid.is_manifest:
        with contextlib.suppress(ProtocolError):  # the manifest of a run, which is one block
            names |= set(open_content_manifest(cid, data).blocks)
    return names if all(storage.blocks.has(each) for each in names) else None


def _sweep(storage: Storage, roots: Iterable[Cid], max_bytes: int) -> None:
    kept: set[Cid] = set()
    for cid in roots:
        kept |= _names_on_disk(storage, cid) or {cid}
    storage.blocks.forget_unused(kept, before=time.time() - GRACE_S)
    storage.blocks.evict(max(0, max_bytes - storage.log_bytes() - storage.trees.num_bytes), kept)


def _read_kept(data: bytes) -> tuple[Cid, ...]:
    try:
        return decode(tuple[Cid, ...], data)
    except ProtocolError as error:
        log.warning("what was kept on disk cannot be read (%s); it may be forgotten", error)
        return ()
