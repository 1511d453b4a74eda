"""The documents of one swarm, kept in step with those of others: syncing with a peer, and taking in what comes.

The shell of `shoal.crdt.sync`; `journal` keeps it in step with the disk. What is new here is told on, by name, to
whoever gossips it; the newest ops can be found again by that name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import trio

from shoal.crdt.gossip_messages import ITEM_ID_BYTES, ItemId
from shoal.crdt.oplog import op_hash
from shoal.crdt.sync import Received, Version
from shoal.node.store.errors import StorageError
from shoal.node.supervise import Domain, Policy
from shoal.node.swarm.counters import ReplicaStatistics
from shoal.node.swarm.journal import Journal
from shoal.node.swarm.own_log import OwnLog
from shoal.node.swarm.telling import Telling
from shoal.node.swarm.waiting import PUSH_BYTES
from shoal.node.wire.contracts import SyncAnswer, SyncRequest, plain_version, typed_version
from shoal.protocol.errors import RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed

log = logging.getLogger(__name__)

PEER_TRIES: Final = 3
PEER_AGAIN_S: Final = 0.2
MAX_RECENT_OPS: Final = 2048
"""Ops that can be passed on by name; who is asked for an older one leaves it to sync."""


class Syncing:
    """Of one swarm on one node."""

    def __init__(
        self,
        swarm: SwarmId,
        own: PeerId,
        journal: Journal,
        own_log: OwnLog,
        met: Telling,
        counters: ReplicaStatistics,
        *,
        domain_of: Callable[[PeerId], Domain],
        on_met: Callable[[PeerId], None],
        on_left: Callable[[PeerId], None],
        on_refused: Callable[[PeerId, str], None],
        on_ops: Callable[[Sequence[Signed], PeerId | None, Sequence[ItemId]], None],
    ) -> None:
        """Begin.

        Args:
            swarm: whose documents they are.
            own: this node.
            journal: keeps them.
            own_log: told of what comes in this node's own name.
            met: calls peers, and tells them what they lack.
            counters: of what goes wrong.
            domain_of: where what fails with a peer ends.
            on_met: told of a peer that has shown that it knows the swarm.
            on_left: told of a peer that says that it is not in the swarm.
            on_refused: told of a peer that sent what cannot be taken, and why.
            on_ops: told of ops that are on disk, of who sent them (None: this node has written them), and by name of
                those which came with them and were known.
        """
        self._swarm = swarm
        self._own = own
        self._journal = journal
        self._own_log = own_log
        self._met = met
        self._counters = counters
        self._domain_of = domain_of
        self._on_met = on_met
        self._on_left = on_left
        self._on_refused = on_refused
        self._on_ops = on_ops
        self._under_way: set[PeerId] = set()
        self._recent: dict[ItemId, Signed] = {}

    # With a peer.

    async def sync_with(self, peer: PeerId) -> None:
        """Take what a peer has and give it what it lacks.

        Raises:
            RemoteError: if it cannot be asked, NOT_FOUND if it is not in this swarm.
            ProtocolError: if its answer breaks the protocol.
            StorageError: if what it has cannot be stored.
        """
        with self._own_log.asking():
            theirs = await self._catch_up_with(peer)
        lacks = await self._journal.missing(theirs, PUSH_BYTES)
        if lacks:
            self._met.tell(peer, ops=[(op_id(op), op) for op in lacks])

    async def _catch_up_with(self, peer: PeerId) -> Version:
        while True:
            ours = await self._journal.version()
            request = SyncRequest(self._swarm, plain_version(ours), ours.is_full)
            answer = await self._met.service_of(peer).sync(request)
            theirs = typed_version(answer)
            self._on_met(peer)
            received = await self.take(answer.ops, peer)
            if not received.accepted and not received.forks:
                return theirs

    async def greet(self, peer: PeerId) -> None:
        """A connection stands; find out whether the peer is in the swarm, and catch up with it if so."""
        for attempt in range(PEER_TRIES):
            try:
                await self.sync_with(peer)
            except RemoteError as error:
                if error.status in (Status.NOT_FOUND, Status.UNIMPLEMENTED):
                    self._on_left(peer)
                    return
                await trio.sleep(PEER_AGAIN_S * 2**attempt)
            except ShoalError as error:
                log.warning("catching up with %s failed: %s", peer, error)
                return
            else:
                return

    async def sync_quietly(self, peer: PeerId) -> None:
        """Sync with a peer unless that is under way; what goes wrong is logged."""
        if peer in self._under_way or peer == self._own:
            return
        self._under_way.add(peer)
        try:
            await self.sync_with(peer)
        except RemoteError as error:
            if error.status is Status.NOT_FOUND:
                self._on_left(peer)
            log.debug("sync with %s failed: %s", peer, error)
        except ShoalError as error:
            log.info("sync with %s failed: %s", peer, error)
        finally:
            self._under_way.discard(peer)

    def sync_soon(self, peer: PeerId) -> None:
        """The same, beside whatever the caller does."""
        self._domain_of(peer).start_soon("syncing with a peer", self.sync_quietly, peer, policy=Policy.DROP)

    async def serve(self, peer: PeerId, request: SyncRequest) -> SyncAnswer:
        """A peer asks for what it lacks.

        Raises:
            ProtocolError: if its version is none.
            RemoteError: UNAVAILABLE if this node cannot read its own state.
        """
        theirs = typed_version(request)
        self._on_met(peer)
        try:
            # In this order: what comes in between is sent, and not told of, rather than the other way round.
            ours = await self._journal.version()
            ops = await self._journal.missing(theirs, PUSH_BYTES)
            is_behind = await self._journal.is_behind(theirs)
        except StorageError as error:
            raise RemoteError(Status.UNAVAILABLE, "the state of this swarm cannot be read now") from error
        if is_behind:
            self.sync_soon(peer)
        return SyncAnswer(tuple(ops), plain_version(ours), ours.is_full)

    # Ops.

    def find(self, name: ItemId) -> Signed | None:
        """A recent op by its name."""
        return self._recent.get(name)

    async def take_pushed(self, ops: Sequence[Signed], source: PeerId) -> None:
        """Take in what a peer pushes; if something before it is missing, or it cannot be stored now, sync brings it."""
        names = {op_id(op): op for op in ops}
        held = [name for name in names if name in self._recent]
        unknown = [op for name, op in names.items() if name not in self._recent]
        try:
            received = await self.take(unknown, source, also_known=held)
        except StorageError:
            self._counters.not_stored += 1
            log.exception("ops from %s cannot be stored now", source)
        else:
            if received.missing:
                self.sync_soon(source)

    async def take(self, ops: Sequence[Signed], source: PeerId, also_known: Sequence[ItemId] = ()) -> Received:
        """Take in ops of a peer; returns when what is new is on disk, and told on.

        Raises:
            StorageError: if the disk fails. Nothing was changed then.
        """
        received = await self._journal.receive(ops) if ops else Received()
        for rejected in received.rejected:
            self._counters.refused_ops += 1
            self._on_refused(source, rejected.reason)
        for fork in received.forks:
            log.error("%s has signed two logs: nothing is taken of it from op %d on", fork.author, fork.seq)
            if fork.author == self._own:
                self._own_log.forked()
        own = [op for op in received.accepted if op.author == self._own]
        if own:
            self._own_log.came(len(own), source)
        not_known = {*received.accepted, *(rejected.sealed for rejected in received.rejected)}
        known = [op_id(op) for op in ops if op not in not_known and op.author not in received.missing]
        shown = [op for fork in received.forks for op in (fork.one, fork.other)]
        self._tell_on([*shown, *received.accepted], source, [*also_known, *known])
        return received

    def written(self, op: Signed) -> None:
        """This node has written an op, and it is on disk."""
        self._tell_on([op], None, [])

    def _tell_on(self, ops: Sequence[Signed], source: PeerId | None, known: Sequence[ItemId]) -> None:
        for op in ops:
            self._recent[op_id(op)] = op
        while len(self._recent) > MAX_RECENT_OPS:
            del self._recent[next(iter(self._recent))]
        self._on_ops(ops, source, known)


def op_id(op: Signed) -> ItemId:
    """By which it is gossiped."""
    return op_hash(op)[:ITEM_ID_BYTES]
