"""One swarm's shared state on this node: documents and presence, kept in step with the other members.

New ops and presence are pushed at once to every connected member and forwarded the first time they are seen, so they
reach members that are not connected to their author. What a push loses, sync repairs: on connect, and at random
intervals with a random member. An op is on disk before it is acknowledged, forwarded or acted on.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import trio

from shoal.crdt.presence import PresenceTable
from shoal.crdt.sync import SwarmDocs
from shoal.crdt.views import members
from shoal.node.mesh.host import Host
from shoal.node.signals import Signal
from shoal.node.store.database import Storage, StorageError
from shoal.node.wire.contracts import (
    OpsPush,
    PresencePush,
    SwarmService,
    SyncAnswer,
    SyncRequest,
    typed_version,
)
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import NoPeersError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import client
from shoal.protocol.signing import Signed, Signer
from shoal.training.facts import Facts, read_facts

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 1.0
MIN_ANNOUNCE_GAP_S: Final = 0.02
SYNC_INTERVAL_S: Final = 5.0
DIAL_INTERVAL_S: Final = 1.0
DIAL_AGAIN_MAX_S: Final = 5.0
MISSED_S: Final = 600.0
"""How long a member is dialed again and again after it was lost."""
CALL_TIMEOUT_S: Final = 5.0
SYNC_BYTES: Final = 200 * 1024
SEAL_BYTES: Final = 160
"""What an author's name, a signature and MessagePack add to a payload, rounded up."""
MAX_QUEUED_OPS: Final = 1024


@dataclass(slots=True)
class _Missed:
    """A member that is not connected; in trio time."""

    since: float
    next_at: float = 0.0
    num_tries: int = 0


class _Neighbour:
    """What waits to be sent to one connected member; presence is only ever the newest of each author."""

    def __init__(self) -> None:
        self.presence: dict[PeerId, Signed] = {}
        self.ops: list[Signed] = []
        self.wake = trio.Event()

    def clear(self) -> tuple[tuple[Signed, ...], tuple[Signed, ...]]:
        """Take all that waits."""
        presence, ops = tuple(self.presence.values()), tuple(self.ops)
        self.presence, self.ops, self.wake = {}, [], trio.Event()
        return presence, ops


def in_parts(records: Sequence[Signed]) -> Iterator[tuple[Signed, ...]]:
    """Records as many as go into one call, in order."""
    part: list[Signed] = []
    num_bytes = 0
    for record in records:
        size = len(record.payload) + SEAL_BYTES
        if part and num_bytes + size > SYNC_BYTES:
            yield tuple(part)
            part, num_bytes = [], 0
        part.append(record)
        num_bytes += size
    if part:
        yield tuple(part)


class Replica:
    """Documents and presence of one swarm."""

    def __init__(
        self,
        swarm: SwarmId,
        signer: Signer,
        docs: SwarmDocs,
        presence: PresenceTable,
        storage: Storage,
        host: Host,
        facts: Facts,
    ) -> None:
        self.swarm = swarm
        self.changed = Signal()
        self.facts = facts
        self._signer = signer
        self._docs = docs
        self._presence = presence
        self._storage = storage
        self._host = host
        self._neighbours: dict[PeerId, _Neighbour] = {}
        self._missed: dict[PeerId, _Missed] = {}
        self._announce = trio.Event()
        self._store_lock = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._live: dict[PeerId, Facts] = {}
        self._documents: dict[PeerId, dict[str, Any]] | None = None
        self._rng = random.Random()  # noqa: S311  picks whom to sync with

    # What the rest of the node reads.

    @property
    def neighbours(self) -> frozenset[PeerId]:
        """Connected members."""
        return frozenset(self._neighbours)

    @property
    def live(self) -> dict[PeerId, Facts]:
        """The facts of every other member that was heard of lately."""
        return self._live

    def documents(self) -> dict[PeerId, dict[str, Any]]:
        """Every author's registers."""
        if self._documents is None:
            self._documents = self._docs.documents()
        return self._documents

    def version(self) -> dict[PeerId, int]:
        """The newest sequence number held of each author."""
        return self._docs.version()

    # What the rest of the node says.

    def announce(self, **changes: Any) -> None:
        """Change what this node's presence says, and say it soon."""
        self.facts = replace(self.facts, **changes)
        self._announce.set()
        self.changed.set()

    async def write(self, **registers: Any) -> None:
        """Set registers of this node's document; returns when they are on disk."""
        async with self._store_lock:
            op = self._docs.write(self._signer, **registers)
            self._documents = None
            await self._store([op])
        self._spread_ops([op], but=None)
        self.changed.set()

    async def run(self, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep in step with the others until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._announce_loop)
                nursery.start_soon(self._sync_loop)
                nursery.start_soon(self._dial_loop)
                nursery.start_soon(self._expire_loop)
                task_status.started()
        finally:
            for peer in {*self._neighbours, *self._missed}:
                self._forget(peer)
            self._nursery = None
            self._neighbours.clear()

    # Peers come and go.

    async def peer_up(self, peer: PeerId) -> None:
        """A connection stands; find out whether the peer is a member, and catch up with it if so."""
        for _ in range(3):
            try:
                await self.sync_with(peer)
            except RemoteError as error:
                if error.status in (Status.NOT_FOUND, Status.UNIMPLEMENTED):
                    return  # not a member
                await trio.sleep(0.2)
            except ShoalError as error:
                log.warning("catching up with %s failed: %s", peer, error)
                return
            else:
                return

    def peer_down(self, peer: PeerId) -> None:
        """The last connection to a peer is gone."""
        if self._neighbours.pop(peer, None) is not None:
            self._missed[peer] = _Missed(trio.current_time())
            self._presence.drop(peer)
            self._refresh_live()

    async def sync_with(self, peer: PeerId) -> None:
        """Take what a peer has and give it what it lacks.

        Raises:
            RemoteError: if it cannot be asked, NOT_FOUND if it is not in this swarm.
            ProtocolError: if its answer breaks the protocol.
        """
        while True:
            async with self._store_lock:  # nothing is told that is not on disk yet
                version = {str(author): seq for author, seq in self._docs.version().items()}
            answer = await self._service_of(peer).sync(SyncRequest(self.swarm, version))
            self._meet(peer)
            took = await self._take_ops(answer.ops, peer)
            if not took:
                break
        async with self._store_lock:
            lacks = self._docs.missing(typed_version(answer.version), SYNC_BYTES)
        self._queue(peer, ops=lacks)

    def _service_of(self, peer: PeerId) -> SwarmService:
        return client(SwarmService, self._host.at(peer), timeout_s=CALL_TIMEOUT_S)

    def _meet(self, peer: PeerId) -> None:
        if peer in self._neighbours or self._nursery is None:
            return
        neighbour = self._neighbours[peer] = _Neighbour()
        self._missed.pop(peer, None)
        self._host.want(peer, self.swarm)
        self._spawn(self._push_loop, peer, neighbour)
        self._queue(peer, presence=self._presence.newest())
        self._announce.set()

    # What peers call.

    async def serve_sync(self, peer: PeerId, request: SyncRequest) -> SyncAnswer:
        """A member asks for what it lacks."""
        theirs = typed_version(request.version)
        if peer not in self._neighbours:
            self._meet(peer)
        async with self._store_lock:  # nothing is told that is not on disk yet
            ours = self._docs.version()
            ops = self._docs.missing(theirs, SYNC_BYTES)
            is_behind = self._docs.is_behind(theirs)
        if is_behind:
            self._spawn(self._sync_quietly, peer)
        return SyncAnswer(tuple(ops), {str(author): seq for author, seq in ours.items()})

    async def serve_ops(self, peer: PeerId, push: OpsPush) -> None:
        """A member pushes new ops."""
        await self._take_ops(push.ops, peer)

    async def serve_presence(self, peer: PeerId, push: PresencePush) -> None:
        """A member pushes presence, its own and others'."""
        news = [record for record in push.records if self._is_news(record)]
        if news:
            for other in self._neighbours:
                self._queue(other, presence=[record for record in news if other not in (peer, record.author)])
            self._refresh_live()

    def _is_news(self, record: Signed) -> bool:
        # The own records too: from them the table learns of an earlier life of this node under a later clock.
        return self._presence.receive(record, trio.current_time()) is not None

    # Inside.

    def _spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        if self._nursery is not None:
            with suppress(RuntimeError):  # the nursery closes an instant before `run` ends
                self._nursery.start_soon(function, *arguments)

    async def _take_ops(self, ops: Sequence[Signed], source: PeerId) -> int:
        async with self._store_lock:
            received = self._docs.receive(ops)
            self._documents = None
            if received.accepted:
                await self._store(received.accepted)
        for rejected in received.rejected:
            log.warning("an op that %s sent is refused: %s", source, rejected.reason)
        if received.accepted:
            self._spread_ops(received.accepted, but=source)
            self.changed.set()
        return len(received.accepted)

    async def _store(self, ops: Sequence[Signed]) -> None:
        try:
            await trio.to_thread.run_sync(self._storage.append_ops, self.swarm, ops)
        except StorageError:
            # What is not on disk must not be known either, or this node could sign two ops with one number.
            stored = await trio.to_thread.run_sync(self._storage.load_ops, self.swarm)
            self._docs = SwarmDocs(self.swarm, self._signer.peer_id, stored)
            self._documents = None
            raise

    def _spread_ops(self, ops: Sequence[Signed], but: PeerId | None) -> None:
        for other in self._neighbours:
            if other != but:
                self._queue(other, ops=ops)

    def _queue(self, peer: PeerId, *, ops: Sequence[Signed] = (), presence: Sequence[Signed] = ()) -> None:
        neighbour = self._neighbours.get(peer)
        if neighbour is None or not (ops or presence):
            return
        room = MAX_QUEUED_OPS - len(neighbour.ops)  # what does not fit, sync brings
        neighbour.ops += ops[:room]
        for record in presence:
            neighbour.presence[record.author] = record
        neighbour.wake.set()

    async def _push_loop(self, peer: PeerId, neighbour: _Neighbour) -> None:
        while self._neighbours.get(peer) is neighbour:
            await neighbour.wake.wait()
            presence, ops = neighbour.clear()
            try:
                for records in in_parts(presence):
                    await self._service_of(peer).push_presence(PresencePush(self.swarm, records))
                for part in in_parts(ops):
                    await self._service_of(peer).push_ops(OpsPush(self.swarm, part))
            except RemoteError as error:
                if error.status is Status.NOT_FOUND:
                    self.peer_down(peer)  # it left the swarm
                    self._forget(peer)
                    return
                log.debug("a push to %s failed: %s", peer, error)
                await trio.sleep(0.1)

    async def _announce_loop(self) -> None:
        while True:
            self._announce = trio.Event()
            facts = replace(self.facts, addresses=self._host.addresses())
            record = self._presence.announce(self._signer, to_plain(facts))
            for peer in self._neighbours:
                self._queue(peer, presence=[record])
            await trio.sleep(MIN_ANNOUNCE_GAP_S)
            with trio.move_on_after(HEARTBEAT_S):
                await self._announce.wait()

    async def _sync_loop(self) -> None:
        while True:
            await trio.sleep(SYNC_INTERVAL_S * self._rng.uniform(0.5, 1.5))
            if self._neighbours:
                await self._sync_quietly(self._rng.choice(sorted(self._neighbours)))

    async def _sync_quietly(self, peer: PeerId) -> None:
        try:
            await self.sync_with(peer)
        except ShoalError as error:
            log.debug("sync with %s failed: %s", peer, error)

    async def _dial_loop(self) -> None:
        """Be connected to every live member, and to those that were lost lately."""
        while True:
            now = trio.current_time()
            known = members(self.documents()) if self._missed else {}
            for peer, missed in list(self._missed.items()):
                if now - missed.since > MISSED_S or (peer in known and known[peer].left):
                    self._forget(peer)
            for peer in {*self._live, *self._missed}:
                if peer not in self._host.connected:
                    missed = self._missed.setdefault(peer, _Missed(now))
                    if missed.next_at <= now:
                        missed.next_at = math.inf  # until this try is over
                        self._host.spawn(self._dial, peer, missed)
                elif peer not in self._neighbours:
                    await self._sync_quietly(peer)
            with trio.move_on_after(DIAL_INTERVAL_S):
                await self._host.wait_for_change()

    async def _dial(self, peer: PeerId, missed: _Missed) -> None:
        facts = self._live.get(peer)
        told = [] if facts is None else [each for each in facts.addresses if each.endswith(f"/p2p/{peer}")]
        addresses = [*told, *self._host.known_addresses(peer)]
        try:
            if addresses:
                await self._host.connect(list(dict.fromkeys(addresses)))
        except (NoPeersError, UsageError) as error:
            log.debug("dialing a member failed: %s", error)
        missed.num_tries += 1
        missed.next_at = trio.current_time() + min(DIAL_INTERVAL_S * 2**missed.num_tries, DIAL_AGAIN_MAX_S)

    def _forget(self, peer: PeerId) -> None:
        self._missed.pop(peer, None)
        self._host.unwant(peer, self.swarm)

    async def _expire_loop(self) -> None:
        while True:
            await trio.sleep(0.25)
            if self._presence.expire(trio.current_time()):
                self._refresh_live()

    def _refresh_live(self) -> None:
        live = {}
        for peer, presence in self._presence.live(trio.current_time()).items():
            facts = read_facts(presence.facts) if peer != self._signer.peer_id else None
            if facts is not None:
                live[peer] = facts
        self._live = live
        self.changed.set()
