"""One swarm's shared state on this node: documents, presence and gossip, kept in step with the other members.

The shell of three cores. `shoal.crdt.presence` judges what is news of who is there, `shoal.crdt.sync` keeps the
documents, `shoal.crdt.gossip` says who is told what.

A peer is *met* when it has shown that it knows the swarm, by a sync in either direction, and a *member* once there is
something signed by it, presence or an op: only then is it gossiped with and kept connected. What gossip loses, sync
repairs: when a peer is met, at random intervals with a random member, and when something does not fit what is held.
An op is on disk before it is acknowledged, passed on or acted on.

While a swarm is small every live member is dialed; in a larger one, whom gossip wants as neighbours.

This is the whole of it, and who is a member. Its parts are what this node says (`speaking`), the documents (`syncing`)
with this node's own log (`own_log`), whom it has met and what each is told (`telling`), and being connected to members
(`reaching`).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import trio

from shoal.crdt.gossip import GossipStatistics
from shoal.crdt.gossip_messages import (
    ITEM_ID_BYTES,
    ContactDown,
    ContactUp,
    Item,
    ItemId,
    Known,
    Published,
    Told,
)
from shoal.crdt.meeting import Differing, differing
from shoal.crdt.oplog import Fork
from shoal.crdt.presence import Excess, Fresh, Opened, Outdone, Presence, PresenceTable, Stale, record_hash
from shoal.crdt.presence import Known as Heard
from shoal.crdt.sync import SwarmDocs
from shoal.crdt.views import Views, members
from shoal.node.mesh.host import Host
from shoal.node.signals import Signal
from shoal.node.store.database import Storage
from shoal.node.supervise import Domain, Policy
from shoal.node.swarm.counters import ReplicaStatistics
from shoal.node.swarm.gossiping import Gossiping
from shoal.node.swarm.journal import Journal
from shoal.node.swarm.members import SMALL
from shoal.node.swarm.own_log import OwnLog
from shoal.node.swarm.reaching import Company, Reaching
from shoal.node.swarm.speaking import ADDRESSES, Speaking
from shoal.node.swarm.syncing import Syncing, op_id
from shoal.node.swarm.telling import Telling
from shoal.node.wire.contracts import (
    GossipPush,
    PresenceSummary,
    SyncAnswer,
    SyncRequest,
)
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer

log = logging.getLogger(__name__)

SYNC_INTERVAL_S: Final = 5.0
EXPIRE_LEAST_S: Final = 0.25
EXPIRE_MOST_S: Final = 2.0
"""Between two looks at who is gone: when somebody may be, and otherwise, for one who speaks more often may come."""


class Replica:
    """Documents and presence of one swarm.

    Attributes:
        changed: set at every change of presence, documents or neighbours.
        on_heard: told of every news by another member: (author, topic, facts, hash of the record).
        on_gone: told of every member of whom nothing was heard for too long, or whose connection is gone.
        on_outdone: told of the incarnation as which this node speaks from now on.
        on_documents: told when documents have changed, and are on disk.
        counters: what went wrong.
        signer: this node's.
    """

    def __init__(
        self,
        swarm: SwarmId,
        signer: Signer,
        docs: SwarmDocs,
        presence: PresenceTable,
        storage: Storage,
        host: Host,
        domain: Domain,
        *,
        rng: random.Random | None = None,
        known: Sequence[str] = (),
        is_new: bool = False,
        target_return: float | None = None,
    ) -> None:
        """Take over what is stored; `begin` does the rest.

        Args:
            swarm: whose state it is.
            signer: of this node.
            docs: made of what is stored.
            presence: empty; its topics are those that `Speaking` needs.
            storage: where ops are kept.
            host: carries the calls.
            domain: where its tasks may fail; `end` when it ends.
            rng: for whom to sync with, and for gossip.
            known: full multiaddrs of members, the newest first.
            is_new: nobody else can hold ops of this node, because it has just created the swarm.
            target_return: of the run; which evaluations matter depends on it.
        """
        self.swarm = swarm
        self.changed = Signal()
        self.counters = ReplicaStatistics()
        self.on_heard: Callable[[PeerId, str, Mapping[str, Any], bytes], None] = lambda *_: None
        self.on_gone: Callable[[PeerId], None] = lambda _: None
        self.on_outdone: Callable[[int], object] = lambda _: None
        self.on_documents: Callable[[], None] = lambda: None
        self.signer = signer
        self._own = signer.peer_id
        self._journal = Journal(swarm, signer, docs, storage)
        self._presence = presence
        self._host = host
        self._rng = rng or random.Random()  # noqa: S311  picks whom to talk to
        self._speaking = Speaking(signer, presence, on_said=self._say, on_reannounced=self._say_outdone)
        self._own_log = OwnLog(
            *(swarm, signer.peer_id, self._journal),
            on_held=self._documents_changed,
            on_written=self._written,
            is_new=is_new,
        )
        self._met = Telling(
            *(swarm, host, presence, self.counters),
            on_left=self._left,
            on_lost=self._lost,
            on_refused=self._refuse,
        )
        self._syncing = Syncing(
            *(swarm, signer.peer_id, self._journal, self._own_log, self._met, self.counters),
            domain_of=self._of,
            on_met=self._meet,
            on_left=self._left,
            on_refused=self._refuse,
            on_ops=self._spread_ops,
        )
        self._contacts: set[PeerId] = set()
        self._gossip = Gossiping(
            *(signer.peer_id, self._rng, self._met, self._contacts, domain),
            find_op=self._syncing.find,
            reach=self._reach,
        )
        self._members = Reaching(swarm, signer.peer_id, host, storage, known)
        self._up: set[PeerId] = set()  # of whose connection this knows
        self._differed: set[PeerId] = set()  # of whose connection it knew otherwise than the host, at the last look
        self._refusals: dict[PeerId, int] = {}
        self._domain = domain
        self._views = Views(target_return)

    # What the rest of the node reads.

    @property
    def neighbours(self) -> frozenset[PeerId]:
        """Connected members."""
        return frozenset(self._contacts)

    @property
    def live(self) -> Mapping[PeerId, Mapping[str, Mapping[str, Any]]]:
        """What every other member that was heard of lately said last, by topic. Not a copy."""
        return self._presence.live(trio.current_time())

    @property
    def own_facts(self) -> Mapping[str, Mapping[str, Any]]:
        """What this node said last, by topic."""
        return self._speaking.own_facts

    @property
    def every_s(self) -> float:
        """How often this node speaks at least: less often in a swarm of very many."""
        return self._speaking.every_s

    @property
    def is_frozen(self) -> bool:
        """Whether two logs were signed with this node's key, so that nobody takes its ops any more."""
        return self._own_log.is_frozen

    @property
    def problem(self) -> str | None:
        """What is wrong with this node's identity in this swarm, and what to do about it, if something is."""
        return self._own_log.problem

    @property
    def frozen(self) -> dict[PeerId, Fork]:
        """The members who were shown to keep two logs, by what shows it."""
        return self._journal.frozen

    def statements(self, author: PeerId, topic: str) -> list[tuple[Mapping[str, Any], bytes]]:
        """What is held of a live member on a topic, oldest first: the facts, and the record's hash."""
        return self._presence.statements(author, topic)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """The full multiaddrs at which a member says that it is reached."""
        return self._members.addresses(peer)

    def members_addresses(self) -> tuple[str, ...]:
        """Full multiaddrs by which members are found, those connected last first."""
        return self._members.worth_keeping()

    def look_for(self, addresses: Sequence[str]) -> None:
        """Somebody says that members are to be found there: full multiaddrs."""
        self._members.look_for(addresses)

    @property
    def views(self) -> Views:
        """What the documents say together, up to date."""
        self._views.update(self._journal.documents())
        return self._views

    def documents(self) -> Mapping[PeerId, Mapping[str, Any]]:
        """Every author's registers. Never changed."""
        return self._journal.documents()

    def version(self) -> dict[PeerId, int]:
        """The newest sequence number held of each author."""
        return self._journal.seqs()

    def gossip_statistics(self) -> GossipStatistics:
        """Counters of the gossip."""
        return self._gossip.statistics()

    # What the rest of the node says.

    def publish(self, topic: str, facts: Mapping[str, Any]) -> bytes:
        """Say something to all members, signed.

        Returns:
            The record's hash, by which others may refer to it.

        Raises:
            UsageError: if the topic is unknown, or the facts are not plain data or too much for it.
        """
        return self._speaking.publish(topic, facts)

    def together(self) -> AbstractContextManager[None]:
        """What is published inside the block goes out at its end, to each neighbour in one message. Not nested."""
        return self._speaking.together()

    async def write(self, **registers: Any) -> bool:
        """Set registers of this node's document; returns when they are on disk, or held back at the start.

        Returns:
            Whether they were written: not if two logs were signed with this node's key, see `is_frozen`.

        Raises:
            UsageError: if a register is not plain data.
            LimitError: if it is too much.
            StorageError: if the disk fails. Nothing was changed then, as after any error.
        """
        return await self._own_log.write(registers)

    async def write_held(self) -> None:
        """Write what was held back, whether anybody was asked for the head of the own log or not. Raises as `write`."""
        await self._own_log.write_held()

    def begin(self) -> None:
        """Keep in step with the others from now on."""
        domain = self._domain
        domain.start_soon("asking for the own log", self._own_log.ask, policy=Policy.RESTART)
        domain.start_soon("speaking", self._speak_loop, policy=Policy.RESTART)
        domain.start_soon("timing gossip", self._gossip.keep_time, policy=Policy.RESTART)
        domain.start_soon("syncing", self._sync_loop, policy=Policy.RESTART)
        self._members.begin(
            Company(
                domain=domain,
                live=lambda: self.live.keys(),
                contacts=lambda: self._contacts,
                left=self._who_left,
                sync=self._syncing.sync_quietly,
            )
        )
        domain.start_soon("noticing who is gone", self._expire_loop, policy=Policy.RESTART)

    def end(self) -> None:
        """Forget the members, now that the tasks have ended."""
        for peer in list(self._met):
            self._unmeet(peer)
        self._members.end()

    # Peers come and go.

    async def peer_up(self, peer: PeerId) -> None:
        """A connection stands; find out whether the peer is in the swarm, and catch up with it if so."""
        self._up.add(peer)
        await self._syncing.greet(peer)

    def peer_down(self, peer: PeerId) -> None:
        """The last connection to a peer is gone."""
        self._up.discard(peer)
        self._refusals.pop(peer, None)
        was_member = peer in self._contacts
        self._unmeet(peer)
        self._gossip.handle(ContactDown(peer))
        if was_member:
            self._members.lost(peer)
            if len(self.live) <= SMALL and self._presence.drop(peer):
                self._say_gone(peer)
            self.changed.set()

    async def sync_with(self, peer: PeerId) -> None:
        """Take what a peer has and give it what it lacks.

        Raises:
            RemoteError: if it cannot be asked, NOT_FOUND if it is not in this swarm.
            ProtocolError: if its answer breaks the protocol.
            StorageError: if what it has cannot be stored.
        """
        await self._syncing.sync_with(peer)

    def _meet(self, peer: PeerId) -> None:
        """It knows the swarm: it hears what is known, and is a member once it has said something itself."""
        if peer in self._met or peer == self._own or self._domain.is_over:
            return
        self._met.meet(peer, self._of(peer))
        if self._presence.knows(peer) or peer in self._journal.seqs():
            self._welcome(peer)
        self._speaking.repeat_soon()

    def _welcome(self, peer: PeerId) -> None:
        """It has signed something in this swarm; if it is met, it is a member that is connected."""
        if peer in self._contacts or peer not in self._met:
            return
        self._contacts.add(peer)
        self._members.back(peer)
        self._host.want(peer, self.swarm)
        self._gossip.handle(ContactUp(peer))
        self.changed.set()

    def _unmeet(self, peer: PeerId) -> None:
        self._met.unmeet(peer)
        self._contacts.discard(peer)

    def _lost(self, peer: PeerId) -> None:
        """A peer takes no pushes: if it was a member, it counts as lost until it is met again."""
        was_member = peer in self._contacts
        self._unmeet(peer)
        self._gossip.handle(ContactDown(peer))
        if was_member:
            self._members.lost(peer)
        self.changed.set()

    def _left(self, peer: PeerId) -> None:
        """A peer says that it is not in the swarm, or not any more."""
        was_met = peer in self._met
        self._unmeet(peer)
        self._gossip.handle(ContactDown(peer))
        self._members.forget(peer)
        if was_met and self._presence.drop(peer):  # else it may be about to join
            self._say_gone(peer)
        self.changed.set()

    # What peers call.

    async def serve_sync(self, peer: PeerId, request: SyncRequest) -> SyncAnswer:
        """A peer asks for what it lacks.

        Raises:
            ProtocolError: if its version is none.
            RemoteError: UNAVAILABLE if this node cannot read its own state.
        """
        return await self._syncing.serve(peer, request)

    def serve_compare(self, request: PresenceSummary) -> Differing:
        """A peer asks what of presence it should give.

        Raises:
            ProtocolError: if it sends no summary.
        """
        return differing(self._presence, request.buckets)

    async def serve_gossip(self, peer: PeerId, push: GossipPush) -> None:
        """A peer pushes news. What is bad in it is refused, and the rest is taken and passed on."""
        if peer not in self._met:
            self._syncing.sync_soon(peer)
        now = trio.current_time()
        fresh: list[Item] = []
        known: list[ItemId] = []
        for sealed in push.records:
            self._hear(peer, sealed, now, fresh, known)
        self._gossip.came(peer, fresh, known)
        if peer in self._contacts:
            for control in push.control:
                self._gossip.handle(Told(peer, control))
        if push.ops:
            await self._syncing.take_pushed(push.ops, peer)

    def _hear(self, peer: PeerId, sealed: Signed, now: float, fresh: list[Item], known: list[ItemId]) -> None:
        try:
            heard = self._presence.receive(sealed, now)
        except ProtocolError as error:
            self.counters.refused_records += 1
            self._refuse(peer, str(error))
            return
        match heard:
            case Fresh(presence, name):
                fresh.append(self._item(presence, name))
                if presence.topic == ADDRESSES:
                    self._members.told(presence.author, presence.facts, peer)
                self._welcome(presence.author)
                news = (presence.author, presence.topic, presence.facts, name)
                self._domain.call("telling news", self.on_heard, *news)
                self.changed.set()
            case Heard(name):
                known.append(name[:ITEM_ID_BYTES])
            case Stale(_, newest):
                self.counters.stale += 1
                if sealed.author == peer:
                    self._met.tell(peer, records=[record_hash(record)[:ITEM_ID_BYTES] for record in newest])
            case Excess():
                pass  # the table counts it
            case Outdone():
                self._own_log.outdone()
                self._speaking.reannounce_soon()

    def _refuse(self, peer: PeerId, reason: str) -> None:
        count = self._refusals[peer] = self._refusals.get(peer, 0) + 1
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th…: it may be very many
            log.warning("what %s sent is refused, for the %d. time: %s", peer, count, reason)

    # Documents.

    def _written(self, op: Signed) -> None:
        self._syncing.written(op)

    def _spread_ops(self, ops: Sequence[Signed], source: PeerId | None, known: Sequence[ItemId]) -> None:
        """These are on disk: act on them, and pass them on."""
        items = []
        for op in ops:
            name = op_id(op)
            items.append(Item(name, f"op/{name.hex()}", op.author))
            self._welcome(op.author)
        if source is None:
            self._gossip.handle(Published(tuple(items)))
        else:
            self._gossip.came(source, items, known)
        if ops:
            self._documents_changed()

    def _documents_changed(self) -> None:
        self._domain.call("telling of documents", self.on_documents)
        self.changed.set()

    # Gossip.

    def _say(self, records: Iterable[Opened]) -> None:
        """Own records: to the members by gossip, and to those who have yet to hear who this is."""
        items = [self._item(record.presence, record.record_hash) for record in records]
        for peer in self._met:
            if peer not in self._contacts:
                self._met.tell(peer, records=[item.id for item in items])
        self._gossip.handle(Published(tuple(items)))
        self.changed.set()

    def _say_outdone(self, incarnation: int) -> None:
        self._domain.call("noting that it was outdone", self.on_outdone, incarnation)

    def _item(self, presence: Presence, name: bytes) -> Item:
        return Item(name[:ITEM_ID_BYTES], self._presence.key_of(presence), presence.author)

    async def _reach(self, peer: PeerId) -> None:
        if await self._members.connect(peer) and peer not in self._contacts:
            await self._syncing.sync_quietly(peer)

    # Loops.

    async def _speak_loop(self) -> None:
        while True:
            look_at = self._speaking.look(self._host.addresses())
            self._gossip.handle(Known(tuple(peer for peer in self.live if self._members.addresses(peer))))
            await self._speaking.wait_until(look_at)

    async def _sync_loop(self) -> None:
        while True:
            await trio.sleep(SYNC_INTERVAL_S * self._rng.uniform(0.5, 1.5))
            if self._contacts:  # who does not answer holds up nobody else
                self._syncing.sync_soon(self._rng.choice(sorted(self._contacts)))

    def _who_left(self) -> set[PeerId]:
        return {peer for peer, membership in members(self.documents()).items() if membership.left}

    async def _expire_loop(self) -> None:
        while True:
            due_s = (self._presence.next_expiry() or math.inf) - trio.current_time()
            await trio.sleep(min(max(due_s, EXPIRE_LEAST_S), EXPIRE_MOST_S))
            self._compare()
            gone = self._presence.expire(trio.current_time())
            for peer in gone:
                self._say_gone(peer)
            if gone:
                self.changed.set()

    def _compare(self) -> None:
        """News of a connection can be lost, when too many come at once: whom the host has, is what counts.

        What differs at two looks in a row is no news that is still on its way.
        """
        differs = self._up ^ self._host.connected.keys()
        for peer in differs & self._differed:
            self.counters.unheard += 1
            if peer in self._up:
                self.peer_down(peer)
            else:
                self._up.add(peer)
                self._of(peer).start_soon("catching up", self.peer_up, peer, policy=Policy.DROP)
        self._differed = differs

    def _of(self, peer: PeerId) -> Domain:
        """Where what fails with one peer ends."""
        return self._domain.inside("peer", f"{peer} in {self.swarm}")

    def _say_gone(self, peer: PeerId) -> None:
        self._domain.call("telling who is gone", self.on_gone, peer)
