"""Folders that this node has published or fetched: named, fetched from many peers at once, given to others meanwhile.

What is known of each is a record in the node's file. Their blocks are in a store of their own (``models``), from which
they are given to whoever asks (`tree_blocks`); an index is a content that is kept on disk. So a fetch that was broken
off, by whatever, begins with the blocks that are there, and is a source for others before it is whole.

A block that came is checked, and in a file, before it is told of: a kill takes none of them. They are made durable in
groups, and all are before a fetch is over; what a power cut takes of them is noticed, and fetched again.

A tree that is pinned stays. Others go, the least recently used first, when a new one needs their room.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import trio

from shoal.dht.fetch import SILENCE_S, Done, Drop, Failed, SourceFound, SourceLost, Tick, Wake
from shoal.dht.tree_fetch import (
    MAX_OPEN_BLOCKS,
    Answered,
    AskHave,
    CallOff,
    Event,
    HaveArrived,
    HaveFailed,
    Request,
    TreeFetch,
)
from shoal.dht.trees import MAX_INDEX_BYTES, Tree, read_index
from shoal.node.mesh.host import Host
from shoal.node.store.database import Storage
from shoal.node.store.errors import StorageError
from shoal.node.store.folders import DamagedError, check_target, pack, scan, unpack
from shoal.node.supervise import open_plain_nursery
from shoal.node.swarm.content import LOOK_S, ContentStore, UnavailableError
from shoal.node.swarm.holders import Holders
from shoal.node.swarm.tree_blocks import Arrivals, OpenTree, TreeSource
from shoal.node.wire.bulk import BulkRef
from shoal.node.wire.contracts import TreeAsked, TreeHeld, TreeService
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import (
    NoPeersError,
    ProtocolError,
    RemoteError,
    ResourceError,
    ShoalError,
    Status,
    UsageError,
)
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import BLOCK_BYTES
from shoal.protocol.services import client

log = logging.getLogger(__name__)

T = TypeVar("T")

SOURCES_S: Final = 1.0
"""How often it is looked who is connected: whoever is may have it."""
LOOK_AGAIN_S: Final = 30.0
"""How often it is looked in the DHT for others."""
ANSWER_S: Final = 120.0
MAX_ROUNDS: Final = 4
"""Of fetching what was found damaged."""
GROUP_BLOCKS: Final = 64
"""Made durable together."""
MAX_OPEN_TREES: Final = 8
"""Whose indexes are in memory because peers asked for them."""
MAX_TREES: Final = 10_000
_RECORD: Final = "tree/"


@dataclass(frozen=True, slots=True)
class TreeRecord:
    """What is known of a tree.

    Attributes:
        cid: its name everywhere.
        name: what it is called here; may be empty.
        known_as: the name and version by which it was published here, or fetched: ``OWNER/NAME@VERSION``.
        tags: words by which it is sorted.
        size: of its files, in bytes; 0 before its index is here.
        num_files: likewise.
        is_pinned: whether it stays.
        is_whole: whether all of it was here.
        used_at: Unix seconds.
    """

    cid: Cid
    name: str = ""
    known_as: str = ""
    tags: tuple[str, ...] = ()
    size: int = 0
    num_files: int = 0
    is_pinned: bool = False
    is_whole: bool = False
    used_at: float = 0.0

    def owners_words(self) -> tuple[str, str]:
        """What its owner calls it, without and with its version."""
        name = self.known_as.partition("/")[2]
        return name.partition("@")[0], name


@dataclass(slots=True, eq=False)
class Progress:
    """A fetch that is on, or how it went.

    Attributes:
        num_bytes: that are here of ``size``.
        sources: bytes that came of each peer.
    """

    cid: Cid
    size: int = 0
    num_bytes: int = 0
    began_at: float = 0.0
    ended_at: float | None = None
    sources: dict[PeerId, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """So far, or in all."""
        return (self.ended_at or trio.current_time()) - self.began_at


@dataclass(slots=True, eq=False)
class _Flight:
    """A fetch and its requests."""

    opened: OpenTree
    fetch: TreeFetch
    progress: Progress
    send: trio.MemorySendChannel[Event]
    receive: trio.MemoryReceiveChannel[Event]
    refs: dict[PeerId, BulkRef] = field(default_factory=dict)
    requests: dict[tuple[PeerId, int], _Asked] = field(default_factory=dict)
    unsynced: list[Cid] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Asked:
    """A request under way, and what ends it.

    Attributes:
        since: when it was seen last that more had come; infinity while this node lets it wait.
        num_bytes: what had come then.
    """

    arrivals: Arrivals
    since: float
    num_bytes: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Trees(TreeService):
    """All of this node.

    Attributes:
        fetching: what is on its way.
        on_gone: told of a tree that is not here any more.
    """

    def __init__(self, storage: Storage, host: Host, content: ContentStore, holders: Holders) -> None:
        """Read the records; the indexes are read when they are needed."""
        self.on_gone: Callable[[Cid], None] = lambda _: None
        self.fetching: dict[Cid, Progress] = {}
        self._storage = storage
        self._blocks = storage.trees
        self._host = host
        self._content = content
        self._holders = holders
        self._flights: dict[Cid, _Flight] = {}
        self._open: dict[Cid, OpenTree] = {}
        self._records: dict[Cid, TreeRecord] = {}
        self._refs: dict[Cid, BulkRef] = {}
        self._threads = trio.CapacityLimiter(2)
        for name, data in storage.list_facts(_RECORD).items():
            try:
                record = decode(TreeRecord, data)
            except ProtocolError as error:
                log.warning("what is known of %s cannot be read (%s)", name, error)
                continue
            self._records[record.cid] = record

    # --- what is here ---

    def records(self) -> list[TreeRecord]:
        """Every one, by name."""
        return sorted(self._records.values(), key=lambda record: (record.name, record.cid))

    def resolve(self, text: str) -> Cid:
        """The tree that somebody means: a CID, or a name, one by its owner or the beginning of a CID, of one here.

        Raises:
            UsageError: if it is none, or could be several.
        """
        named = [cid for cid, record in self._records.items() if text and text in (record.name, cid)]
        named = named or [cid for cid, record in self._records.items() if text and text in record.owners_words()]
        named = named or [cid for cid in self._records if len(text) > 8 and cid.startswith(text)]
        if len(named) == 1:
            return named[0]
        if named:
            raise UsageError(f"{text[:80]!r} could be any of {len(named)}; write its CID (`shoal model ls`)")
        try:
            return Cid.parse(text)
        except UsageError:
            raise UsageError(
                f"nothing here is called {text[:80]!r}; `shoal model ls` lists what is; else give OWNER/NAME or a CID"
            ) from None

    def called(self, name: str) -> TreeRecord | None:
        """The tree that has a name here."""
        return next((each for each in self._records.values() if name and each.name == name), None)

    def find(self, cid: Cid) -> TreeRecord | None:
        """What is known of one, if anything is."""
        return self._records.get(cid)

    def record(self, cid: Cid) -> TreeRecord:
        """What is known of one; `UsageError` if nothing is."""
        found = self.find(cid)
        if found is None:
            raise UsageError(f"{cid} is not here; `shoal model get {cid}` fetches it")
        return found

    async def tree(self, cid: Cid) -> Tree:
        """Its index; `UsageError` if it is not here."""
        self.record(cid)
        opened = await self._opened(cid)
        if opened is None:
            raise UsageError(f"the list of files of {cid} is not here yet; fetch it")
        return opened.tree

    async def set_pinned(self, cid: Cid, is_pinned: bool) -> TreeRecord:
        """Let it stay, or not."""
        return await self._write(replace(self.record(cid), is_pinned=is_pinned))

    async def remove(self, cid: Cid) -> int:
        """Forget it, pinned or not; gives how many bytes that freed.

        Raises:
            UsageError: if it is on its way.
        """
        self.record(cid)
        if cid in self._flights:
            raise UsageError(f"{cid} is being fetched; stop that first")
        opened = await self._opened(cid)
        await self._in_thread(partial(self._storage.delete_fact, f"{_RECORD}{cid}"))
        del self._records[cid]
        self._holders.withdraw(cid)
        self.on_gone(cid)
        self._open.pop(cid, None)
        if cid in self._refs:
            self._host.links.bulk.withdraw(self._refs.pop(cid))
        await self._content.keep(f"{_RECORD}{cid}", ())
        gone = set() if opened is None else set(opened.cids)
        for other in list(self._records):
            shared = await self._opened(other)
            gone.difference_update(() if shared is None else shared.cids)
        for flight in self._flights.values():
            gone.difference_update(flight.opened.cids)
        return await self._in_thread(partial(self._blocks.forget, gone))

    async def collect(self) -> int:
        """Forget all that are not pinned nor on their way; gives how many bytes that freed."""
        doomed = [cid for cid, record in self._records.items() if not record.is_pinned and cid not in self._flights]
        return sum([await self.remove(cid) for cid in doomed])

    # --- publishing ---

    async def publish(self, path: Path, name: str, tags: Sequence[str]) -> TreeRecord:
        """Take a folder or a file in. It is pinned, since its files may change or go.

        Raises:
            UsageError: if it cannot be read, or the name is taken by another tree.
            ResourceError: if there is no room for it.
        """
        entries = await self._in_thread(partial(scan, path))
        await self._make_room(sum(entry.size for entry in entries))
        index = await self._in_thread(partial(pack, path, entries, self._blocks))
        cid = await self._content.put(index, owner=_RECORD)
        await self._keep_index(cid)
        size = sum(entry.size for entry in entries)
        before = self._records.get(cid, TreeRecord(cid))
        record = TreeRecord(
            cid,
            name or before.name,
            before.known_as,
            tuple(tags) or before.tags,
            size,
            len(entries),
            is_pinned=True,
            is_whole=True,
            used_at=time.time(),
        )
        return await self._write(record)

    async def title(self, cid: Cid, name: str, known_as: str, tags: Sequence[str]) -> TreeRecord:
        """Call a tree this here, and no other one any more."""
        before = self.called(name)
        if before is not None and before.cid != cid:
            await self._write(replace(before, name=""))
        return await self._write(replace(self.record(cid), name=name, known_as=known_as, tags=tuple(tags)))

    # --- giving ---

    async def held(self, request: TreeAsked) -> TreeHeld:
        """Answer a peer."""
        cid = request.cid
        opened = await self._opened(cid)
        if opened is None:
            raise RemoteError(Status.NOT_FOUND, f"this node has nothing of {cid}")
        if cid not in self._refs:
            source = TreeSource(cid, self._opened, self._blocks, self._host)
            self._refs[cid] = self._host.links.bulk.offer_source(source, opened.num_bytes)
        flight, record = self._flights.get(cid), self._records.get(cid)
        if flight is not None:
            here = flight.fetch.here
        elif record is not None and record.is_whole:
            return TreeHeld(is_whole=True, ref=self._refs[cid])
        else:
            here = self._here(opened)
        is_whole = here == (1 << len(opened.cids)) - 1
        return TreeHeld(is_whole, here.to_bytes(len(opened.cids) // 8 + 1, "little"), self._refs[cid])

    # --- fetching ---

    async def get(
        self, cid: Cid, out: Path | None, *, name: str = "", known_as: str = "", is_pinned: bool = False
    ) -> Progress:
        """Have all of a tree here, and make a folder of it if one is named.

        Raises:
            UsageError: if the folder cannot be made, or what the CID names is no tree, or it is on its way already.
            NoPeersError: if it is not here and nobody is connected.
            UnavailableError: if it cannot be had; what came of it is kept, and the next try goes on from there.
            ResourceError: if there is no room for it.
        """
        if out is not None:
            await self._in_thread(partial(check_target, out))
        if cid in self.fetching:
            raise UsageError(f"{cid} is being fetched already; `shoal model du` shows how far it is")
        progress = self.fetching[cid] = Progress(cid, began_at=trio.current_time())
        try:
            opened = await self._opened(cid) or await self._fetch_index(cid)
            progress.size = opened.num_bytes
            await self._make_room(
                sum(opened.sizes[each] for each in opened.cids if not self._blocks.has(each)), but=cid
            )
            before = self._records.get(cid, TreeRecord(cid))
            record = replace(
                before,
                name=name or before.name,
                known_as=known_as or before.known_as,
                size=opened.tree.size,
                num_files=opened.tree.num_entries,
                is_pinned=is_pinned or before.is_pinned,
                used_at=time.time(),
            )
            await self._write(record)
            await self._fly(opened, progress, out)
            progress.ended_at = trio.current_time()
            if not self._records[cid].is_whole:
                await self._write(replace(self._records[cid], is_whole=True))
                self._holders.keep_saying([cid])
        finally:
            del self.fetching[cid]
        return progress

    async def _fetch_index(self, cid: Cid) -> OpenTree:
        """From whoever says first that it has it and does; the others are asked meanwhile."""
        index: memoryview | None = None
        failure: UnavailableError | None = None

        async def fetch(source: PeerId) -> None:
            nonlocal index, failure
            try:
                index = await self._content.get(cid, [source], max_bytes=MAX_INDEX_BYTES, owner=_RECORD)
            except UnavailableError as error:
                failure = error
            else:
                nursery.cancel_scope.cancel()

        if not self._host.connected:
            raise NoPeersError(
                "this node is connected to nobody; connect it with `shoal ping ADDRESS`, or start it with --bootstrap"
            )
        async with open_plain_nursery() as nursery:
            await self._holders.look(cid, lambda source: nursery.start_soon(fetch, source))
        if index is None:
            raise failure or UnavailableError(f"{cid} cannot be had: nobody who can be reached has it")
        opened = await self._read(index)
        await self._keep_index(cid)
        return opened

    async def _keep_index(self, cid: Cid) -> None:
        await self._content.keep(f"{_RECORD}{cid}", (cid,))
        self._content.hold(_RECORD, ())

    async def _read(self, index: memoryview) -> OpenTree:
        try:
            return await self._in_thread(
                lambda: OpenTree(read_index(bytes(index) if len(index) <= BLOCK_BYTES else index))
            )
        except ProtocolError as error:
            raise UsageError(f"this CID does not name a folder that can be taken: {error}") from error

    async def _fly(self, opened: OpenTree, progress: Progress, out: Path | None) -> None:
        """Fetch what is not here, and make the folder; again, if blocks turn out to be damaged: then they are gone."""
        rng = Random(str(self._host.peer_id))  # noqa: S311  it draws where to begin
        try:
            for _ in range(MAX_ROUNDS):
                fetch = TreeFetch(len(opened.cids), self._here(opened), (), rng)
                flight = _Flight(opened, fetch, progress, *trio.open_memory_channel[Event](256))
                self._flights[progress.cid] = flight
                if fetch.num_wanted:
                    for other in self._flights.values():
                        other.fetch.max_open_blocks = max(2, MAX_OPEN_BLOCKS // len(self._flights))
                    async with open_plain_nursery() as nursery:
                        nursery.start_soon(self._find_sources, flight)
                        nursery.start_soon(self._find_more, flight)
                        nursery.start_soon(self._watch, flight)
                        await self._carry_out(flight, nursery)
                        nursery.cancel_scope.cancel()
                    await self._make_durable(flight)
                try:
                    if out is not None:
                        await self._in_thread(partial(unpack, opened.tree, out, self._blocks))
                except DamagedError as error:
                    log.warning("%s: %s", progress.cid, error)
                else:
                    return
        finally:
            self._flights.pop(progress.cid, None)
        raise StorageError(f"{self._blocks.folder}: blocks are damaged again and again; check the disk")

    async def _carry_out(self, flight: _Flight, nursery: trio.Nursery) -> None:
        fetch = flight.fetch
        event: Event = Tick()
        while True:
            wake_at = trio.current_time()
            for output in fetch.handle(event, trio.current_time()):
                match output:
                    case AskHave(source):
                        nursery.start_soon(self._ask_held, flight, source)
                    case Request():
                        nursery.start_soon(self._ask, flight, output)
                    case CallOff(source, start):
                        asked = flight.requests.get((source, start))
                        if asked is not None:
                            asked.scope.cancel()
                    case Drop(source, reason):
                        log.warning("%s is not asked for %s any more: %s", source, flight.progress.cid, reason)
                    case Wake(at):
                        wake_at = at
                    case Done():
                        return
                    case Failed(reason, lack):
                        raise UnavailableError(f"{flight.progress.cid} cannot be had: {reason}", lack)
            event = Tick()
            with trio.move_on_at(wake_at):
                event = await flight.receive.receive()

    async def _find_sources(self, flight: _Flight) -> None:
        known: set[PeerId] = set()
        while True:
            connected = set(self._host.connected)
            for peer in known - connected:
                await flight.send.send(SourceLost(peer))
            for peer in connected:  # one that was given up may have some of it by now
                await flight.send.send(SourceFound(peer))
            known = connected
            await trio.sleep(SOURCES_S)

    async def _find_more(self, flight: _Flight) -> None:
        """Be connected to others that have it, who then are among those that it is looked for."""
        while True:
            await self._holders.look(flight.progress.cid, lambda _: None)
            await trio.sleep(LOOK_AGAIN_S)

    async def _ask_held(self, flight: _Flight, source: PeerId) -> None:
        event: Event
        try:
            answer = await client(TreeService, self._host.at(source), timeout_s=SILENCE_S).held(
                TreeAsked(flight.progress.cid)
            )
            blocks = (
                -1 if answer.is_whole else int.from_bytes(answer.blocks[: len(flight.opened.cids) // 8 + 1], "little")
            )
            if answer.ref is None:
                event = HaveFailed(source, "it says that it has blocks, and not where")
            else:
                flight.refs[source] = answer.ref
                event = HaveArrived(source, blocks & ((1 << len(flight.opened.cids)) - 1))
        except ShoalError as error:
            event = HaveFailed(source, str(error))
        await flight.send.send(event)

    async def _ask(self, flight: _Flight, request: Request) -> None:
        """Pull a run of blocks; each is checked and written as it comes."""
        source = request.source
        arrivals = Arrivals(flight.opened, request.start, request.count, self._blocks)
        asked = flight.requests[source, request.start] = _Asked(arrivals, math.inf)
        failure, download, has_turn = "", self._host.download, False
        try:
            with asked.scope:
                has_turn = await download.turn(arrivals.size, is_member=True, is_patient=True)
                asked.since = trio.current_time()
                await self._host.links.bulk.pull(
                    source,
                    flight.refs[source],
                    arrivals,
                    offset=arrivals.offset,
                    timeout_s=ANSWER_S,
                )
            if asked.scope.cancelled_caught:
                failure = f"nothing came of it for {SILENCE_S:g} s"
        except RemoteError as error:
            failure = str(error)
        finally:
            self._count(flight, source, arrivals)
            if has_turn:
                download.correct(arrivals.num_bytes - arrivals.size)
            if flight.requests.get((source, request.start)) is asked:
                del flight.requests[source, request.start]
        if arrivals.failure is not None:
            raise arrivals.failure
        if len(flight.unsynced) >= GROUP_BLOCKS:
            await self._make_durable(flight)
        await flight.send.send(Answered(source, request.start, tuple(arrivals.came), failure, arrivals.is_lie))

    async def _make_durable(self, flight: _Flight) -> None:
        group, flight.unsynced = flight.unsynced, []
        await self._in_thread(partial(self._blocks.make_durable, group))

    def _count(self, flight: _Flight, source: PeerId, arrivals: Arrivals) -> None:
        cids = [flight.opened.cids[number] for number in arrivals.came]
        num_bytes = sum(flight.opened.sizes[cid] for cid in cids)
        if num_bytes:
            progress = flight.progress
            progress.num_bytes += num_bytes
            progress.sources[source] = progress.sources.get(source, 0) + num_bytes
            flight.unsynced += cids

    async def _watch(self, flight: _Flight) -> None:
        """End requests to sources of which nothing comes any more."""
        while True:
            await trio.sleep(LOOK_S)
            now = trio.current_time()
            for asked in list(flight.requests.values()):
                if asked.arrivals.num_bytes != asked.num_bytes:
                    asked.num_bytes, asked.since = asked.arrivals.num_bytes, now
                elif asked.since < now - SILENCE_S:
                    asked.scope.cancel()

    # --- the rest ---

    async def _make_room(self, num_bytes: int, *, but: Cid | None = None) -> None:
        limit = self._content.max_disk_bytes
        while True:
            if self._content.disk_bytes + num_bytes <= limit:
                return
            idle = [
                record
                for cid, record in self._records.items()
                if not record.is_pinned and cid not in self._flights and cid != but
            ]
            if not idle:
                raise ResourceError(
                    f"no room for {num_bytes} bytes: this node has {self._content.disk_bytes} and may have {limit}; "
                    "remove something (`shoal model rm`), or start it with a higher --max-disk"
                )
            await self.remove(min(idle, key=lambda record: record.used_at).cid)

    async def _opened(self, cid: Cid) -> OpenTree | None:
        """The index of a tree that is here."""
        flight = self._flights.get(cid)
        opened = self._open.get(cid) if flight is None else flight.opened
        if opened is not None or cid not in self._records:
            return opened
        try:
            index = await self._content.get(cid, (), max_bytes=MAX_INDEX_BYTES, owner=_RECORD)
        except UnavailableError:
            return None
        opened = await self._read(index)
        self._content.hold(_RECORD, ())
        self._open[cid] = opened
        while len(self._open) > MAX_OPEN_TREES:
            del self._open[next(iter(self._open))]
        return opened

    def _here(self, opened: OpenTree) -> int:
        here = bytearray(len(opened.cids) // 8 + 1)
        for number, cid in enumerate(opened.cids):
            if self._blocks.size(cid) == opened.sizes[cid] and self._blocks.has(cid):
                here[number // 8] |= 1 << number % 8
        return int.from_bytes(here, "little")

    async def _write(self, record: TreeRecord) -> TreeRecord:
        taken = [each.cid for each in self._records.values() if record.name and each.name == record.name]
        if any(cid != record.cid for cid in taken):
            raise UsageError(f"{record.name!r} is the name of {taken[0]} here; remove that first, or take another name")
        if record.cid not in self._records and len(self._records) >= MAX_TREES:
            raise ResourceError(f"this node knows {MAX_TREES} models; remove some")
        await self._in_thread(partial(self._storage.put_fact, f"{_RECORD}{record.cid}", encode(record)))
        self._records[record.cid] = record
        return record

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._threads)
