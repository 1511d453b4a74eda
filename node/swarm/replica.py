"""One swarm's shared state on this node: documents, presence and gossip, kept in step with the other members.

The shell of three cores. `shoal.crdt.presence` judges what is news of who is there, `shoal.crdt.sync` keeps the
documents, `shoal.crdt.gossip` says who is told what. Here are the calls, the queues, the clock and the disk.

A peer is *met* when it has shown that it knows the swarm, by a sync in either direction, and a *member* once there is
something signed by it, presence or an op: only then is it gossiped with and kept connected. What gossip loses, sync
repairs: when a peer is met, at random intervals with a random member, and when something does not fit what is held.
An op is on disk before it is acknowledged, passed on or acted on.

A node whose disk was put back to an earlier state would sign other ops at places that it has used. So nothing of its
own is written before a member was asked how far this node's own log is, or nobody could be asked for a while; until
then it is held back.

While a swarm is small every live member is dialed; in a larger one, whom gossip wants as neighbours.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import trio

from shoal.crdt.gossip import Gossip, GossipStatistics
from shoal.crdt.gossip_messages import (
    ITEM_ID_BYTES,
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Event,
    Item,
    ItemId,
    Known,
    Published,
    Push,
    Pushed,
    Tell,
    Tick,
    Told,
    Wake,
)
from shoal.crdt.meeting import BUCKET_BYTES, Differing, differing, lacking, summary
from shoal.crdt.oplog import Fork, FrozenLogError, op_hash
from shoal.crdt.presence import Excess, Fresh, Opened, Outdone, Presence, PresenceTable, Stale, record_hash
from shoal.crdt.presence import Known as Heard
from shoal.crdt.sync import Received, SwarmDocs, Version
from shoal.crdt.views import Views, members
from shoal.node.mesh.host import Host
from shoal.node.signals import Signal
from shoal.node.store.database import Storage, StorageError
from shoal.node.supervise import Domain, Policy
from shoal.node.swarm.counters import ReplicaStatistics
from shoal.node.swarm.journal import Journal
from shoal.node.swarm.members import SMALL
from shoal.node.swarm.reaching import Reaching
from shoal.node.swarm.waiting import PUSH_BYTES, Waiting, in_parts
from shoal.node.wire.contracts import (
    GossipPush,
    PresenceSummary,
    SwarmService,
    SyncAnswer,
    SyncRequest,
    plain_version,
    typed_version,
)
from shoal.protocol.errors import ProtocolError, RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import client
from shoal.protocol.signing import Signed, Signer

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

FACTS: Final = "facts"
"""The topic that is repeated when a node has said nothing for a while."""
ADDRESSES: Final = "addresses"
"""The topic on which this node says where it is reached: ``{"addresses": [full multiaddrs]}``."""

HEARTBEAT_S: Final = 1.0
HEARTBEAT_MEMBERS: Final = 64
"""With more live members than this, each speaks less often, so that all together say as much."""
REANNOUNCE_S: Final = 1.0
REPEAT_S: Final = 0.2
"""After what was said last, and a newcomer may have missed."""
SYNC_INTERVAL_S: Final = 5.0
EXPIRE_LEAST_S: Final = 0.25
EXPIRE_MOST_S: Final = 2.0
"""Between two looks at who is gone: when somebody may be, and otherwise, for one who speaks more often may come."""
CALL_TIMEOUT_S: Final = 5.0
PUSH_TRIES: Final = 3
PUSH_AGAIN_S: Final = 0.2
PEER_TRIES: Final = 3
MAX_RECENT_OPS: Final = 2048
"""Ops that can be passed on by name; who is asked for an older one leaves it to sync."""
MAX_ADDRESSES: Final = 16
OWN_HEAD_S: Final = 60.0
"""How long a node with other members waits for one that tells the head of its own log, before it writes."""
OWN_HEAD_ALONE_S: Final = 5.0
"""The same, if it knows of no other author."""
OTHERS_S: Final = 1.0
"""How long those who answer later are waited for: one of them may know more."""
TWICE_FROM_S: Final = 10.0
"""Newer words in one's own name after so long were not left over from one's own life before."""
TWICE_FOR_S: Final = 60.0


class Replica:
    """Documents and presence of one swarm.

    Attributes:
        changed: set at every change of presence, documents or neighbours.
        on_heard: told of every news by another member: (author, topic, facts, hash of the record).
        on_gone: told of every member of whom nothing was heard for too long, or whose connection is gone.
        on_outdone: told of the incarnation as which this node speaks from now on.
        on_documents: told when documents have changed, and are on disk.
        counters: what went wrong.
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
            presence: empty; its topics must have `ADDRESSES`, and `FACTS` if anything is published on it.
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
        self.on_outdone: Callable[[int], None] = lambda _: None
        self.on_documents: Callable[[], None] = lambda: None
        self._signer = signer
        self._journal = Journal(swarm, signer, docs, storage)
        self._presence = presence
        self._host = host
        self._rng = rng or random.Random()  # noqa: S311  picks whom to talk to
        self._gossip = Gossip(signer.peer_id, self._rng)
        self._met: dict[PeerId, Waiting] = {}
        self._contacts: set[PeerId] = set()
        self._members = Reaching(swarm, signer.peer_id, host, storage, known)
        self._up: set[PeerId] = set()  # of whose connection this knows
        self._differed: set[PeerId] = set()  # of whose connection it knew otherwise than the host, at the last look
        self._syncing: set[PeerId] = set()
        self._refusals: dict[PeerId, int] = {}
        self._recent_ops: dict[ItemId, Signed] = {}
        self._domain = domain
        self._published_at = -math.inf
        self._must_reannounce = False
        self._must_repeat = False
        self._to_say: list[Opened] | None = None
        self._speak = Signal()
        self._tick_at = math.inf
        self._retime = Signal()
        self._said_frozen = False
        self._views = Views(target_return)
        self._knows_own_head = is_new
        self._num_syncing = 0
        self._has_synced = False
        self._synced = Signal()
        self._first_outdone_at = math.inf
        self._last_outdone_at = -math.inf
        self._written_elsewhere_at = -math.inf

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
        return self._presence.own_facts

    @property
    def every_s(self) -> float:
        """How often this node speaks at least: less often in a swarm of very many."""
        return HEARTBEAT_S * max(1.0, (1 + len(self.live)) / HEARTBEAT_MEMBERS)

    @property
    def is_frozen(self) -> bool:
        """Whether two logs were signed with this node's key, so that nobody takes its ops any more."""
        return self._signer.peer_id in self._journal.frozen

    @property
    def problem(self) -> str | None:
        """What is wrong with this node's identity in this swarm, and what to do about it, if something is."""
        if self.is_frozen:
            return (
                "this node's identity has written two logs: two nodes have used its profile, or it was restored from a "
                "backup. Nobody takes what it writes any more; leave this swarm, and join it again with a new profile "
                "(another SHOAL_HOME)"
            )
        now = trio.current_time()
        is_outdone = self._last_outdone_at - self._first_outdone_at > TWICE_FROM_S
        if (is_outdone and now < self._last_outdone_at + TWICE_FOR_S) or now < self._written_elsewhere_at + TWICE_FOR_S:
            return (
                "another node speaks with this node's identity: its profile was copied. Stop one of the two and give "
                "it a new profile (another SHOAL_HOME), before both write and neither is believed"
            )
        return None

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
        record = self._presence.announce(self._signer, topic, facts, self.every_s)
        if self._to_say is None:
            self._say([record])
        else:
            self._to_say.append(record)
        self.changed.set()
        return record.record_hash

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is published inside the block goes out at its end, to each neighbour in one message. Not nested."""
        to_say: list[Opened] = []
        self._to_say = to_say
        try:
            yield
        finally:
            self._to_say = None
            if to_say:
                self._say(to_say)

    async def write(self, **registers: Any) -> bool:
        """Set registers of this node's document; returns when they are on disk, or held back at the start.

        Returns:
            Whether they were written: not if two logs were signed with this node's key, see `is_frozen`.

        Raises:
            UsageError: if a register is not plain data.
            LimitError: if it is too much.
            StorageError: if the disk fails. Nothing was changed then, as after any error.
        """
        if not self._knows_own_head and not self.is_frozen:
            self._journal.hold(registers)
            self._domain.call("telling of documents", self.on_documents)
            self.changed.set()
            return True
        return await self._written(self._journal.write(registers))

    async def write_held(self) -> None:
        """Write what was held back, whether anybody was asked for the head of the own log or not. Raises as `write`."""
        while self._journal.is_holding:
            await self._written(self._journal.write_held())
        self._knows_own_head = True

    async def _written(self, writing: Awaitable[Signed | None]) -> bool:
        try:
            op = await writing
        except FrozenLogError as error:
            self._say_frozen(error)
            return False
        if op is not None:
            self._spread_ops([op], source=None)
        return True

    def begin(self) -> None:
        """Keep in step with the others from now on."""
        domain = self._domain
        domain.start_soon("asking for the own log", self._ask_for_own_log, policy=Policy.RESTART)
        domain.start_soon("speaking", self._speak_loop, policy=Policy.RESTART)
        domain.start_soon("timing gossip", self._tick_loop, policy=Policy.RESTART)
        domain.start_soon("syncing", self._sync_loop, policy=Policy.RESTART)
        self._members.begin(
            domain, lambda: self.live.keys(), lambda: self._contacts, self._who_left, self._sync_quietly
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
        for attempt in range(PEER_TRIES):
            try:
                await self.sync_with(peer)
            except RemoteError as error:
                if error.status in (Status.NOT_FOUND, Status.UNIMPLEMENTED):
                    self._left(peer)
                    return
                await trio.sleep(PUSH_AGAIN_S * 2**attempt)
            except ShoalError as error:
                log.warning("catching up with %s failed: %s", peer, error)
                return
            else:
                return

    def peer_down(self, peer: PeerId) -> None:
        """The last connection to a peer is gone."""
        self._up.discard(peer)
        self._refusals.pop(peer, None)
        was_member = peer in self._contacts
        self._unmeet(peer)
        self._handle(ContactDown(peer))
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
        self._num_syncing += 1
        try:
            theirs = await self._catch_up_with(peer)
            self._has_synced = True
        finally:
            self._num_syncing -= 1
            self._synced.set()
        lacks = await self._journal.missing(theirs, PUSH_BYTES)
        waiting = self._met.get(peer)
        if waiting is not None and lacks:
            waiting.add(ops=[(_op_id(op), op) for op in lacks])

    async def _catch_up_with(self, peer: PeerId) -> Version:
        while True:
            ours = await self._journal.version()
            answer = await self._service_of(peer).sync(SyncRequest(self.swarm, plain_version(ours), ours.is_full))
            theirs = typed_version(answer)
            self._meet(peer)
            received = await self._take_ops(answer.ops, peer)
            if not received.accepted and not received.forks:
                return theirs

    async def _ask_for_own_log(self) -> None:
        """Let nothing be written before this node knows how far its own log is; then write what was held back."""
        if self._knows_own_head:
            return
        has_others = any(author != self._signer.peer_id for author in self._journal.seqs())
        with trio.move_on_after(OWN_HEAD_S if has_others else OWN_HEAD_ALONE_S) as asking:
            while not self._has_synced:
                await self._synced.wait()
            with trio.move_on_after(OTHERS_S):
                while self._num_syncing:
                    await self._synced.wait()
        if has_others and asking.cancelled_caught:
            log.warning(
                "%s: no member can be asked how far this node's own log is, so it goes on from what is on its disk; if "
                "that was restored from a backup, the others will not believe it",
                self.swarm,
            )
        await self.write_held()

    def _service_of(self, peer: PeerId) -> SwarmService:
        return client(SwarmService, self._host.at(peer), timeout_s=CALL_TIMEOUT_S)

    def _meet(self, peer: PeerId) -> None:
        """It knows the swarm: it hears what is known, and is a member once it has said something itself."""
        if peer in self._met or peer == self._signer.peer_id or self._domain.is_over:
            return
        waiting = self._met[peer] = Waiting()
        self._of(peer).start_soon("pushing to a peer", self._push_loop, peer, waiting, policy=Policy.RESTART)
        if self._presence.knows(peer) or peer in self._journal.seqs():
            self._welcome(peer)
        self._must_repeat = True  # if it took this node for gone, only something new changes its mind
        self._speak.set()

    def _welcome(self, peer: PeerId) -> None:
        """It has signed something in this swarm; if it is met, it is a member that is connected."""
        if peer in self._contacts or peer not in self._met:
            return
        self._contacts.add(peer)
        self._members.back(peer)
        self._host.want(peer, self.swarm)
        self._handle(ContactUp(peer))
        self.changed.set()

    def _unmeet(self, peer: PeerId) -> None:
        waiting = self._met.pop(peer, None)
        if waiting is not None:
            waiting.close()
            self.counters.dropped += waiting.num_dropped
        self._contacts.discard(peer)

    def _left(self, peer: PeerId) -> None:
        """A peer says that it is not in the swarm, or not any more."""
        was_met = peer in self._met
        self._unmeet(peer)
        self._handle(ContactDown(peer))
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
        theirs = typed_version(request)
        self._meet(peer)
        try:
            # In this order: what comes in between is sent, and not told of, rather than the other way round.
            ours = await self._journal.version()
            ops = await self._journal.missing(theirs, PUSH_BYTES)
            is_behind = await self._journal.is_behind(theirs)
        except StorageError as error:
            raise RemoteError(Status.UNAVAILABLE, "the state of this swarm cannot be read now") from error
        if is_behind:
            self._sync_soon(peer)
        return SyncAnswer(tuple(ops), plain_version(ours), ours.is_full)

    def serve_compare(self, request: PresenceSummary) -> Differing:
        """A peer asks what of presence it should give.

        Raises:
            ProtocolError: if it sends no summary.
        """
        return differing(self._presence, request.buckets)

    async def serve_gossip(self, peer: PeerId, push: GossipPush) -> None:
        """A peer pushes news. What is bad in it is refused, and the rest is taken and passed on."""
        if peer not in self._met:
            self._sync_soon(peer)
        now = trio.current_time()
        fresh: list[Item] = []
        known: list[ItemId] = []
        for sealed in push.records:
            self._hear(peer, sealed, now, fresh, known)
        self._pushed(peer, fresh, known)
        if peer in self._contacts:
            for control in push.control:
                self._handle(Told(peer, control))
        if not push.ops:
            return
        names = {_op_id(op): op for op in push.ops}
        held = [name for name in names if name in self._recent_ops]
        unknown = [op for name, op in names.items() if name not in self._recent_ops]
        try:
            received = await self._take_ops(unknown, peer, also_known=held)
        except StorageError:
            self.counters.not_stored += 1
            log.exception("ops from %s cannot be stored now", peer)
        else:
            if received.missing:
                self._sync_soon(peer)

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
                waiting = self._met.get(peer)
                if sealed.author == peer and waiting is not None:
                    waiting.add(records=[record_hash(record)[:ITEM_ID_BYTES] for record in newest])
            case Excess():
                pass  # the table counts it
            case Outdone():
                self._first_outdone_at = min(self._first_outdone_at, now)
                self._last_outdone_at = now
                self._must_reannounce = True
                self._speak.set()

    def _pushed(self, peer: PeerId, fresh: Sequence[Item], known: Sequence[ItemId]) -> None:
        if peer in self._contacts:
            if fresh or known:
                self._handle(Pushed(peer, tuple(fresh), tuple(known)))
        elif fresh:
            self._handle(Published(tuple(fresh)))

    def _refuse(self, peer: PeerId, reason: str) -> None:
        count = self._refusals[peer] = self._refusals.get(peer, 0) + 1
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th…: it may be very many
            log.warning("what %s sent is refused, for the %d. time: %s", peer, count, reason)

    # Documents.

    async def _take_ops(self, ops: Sequence[Signed], source: PeerId, also_known: Sequence[ItemId] = ()) -> Received:
        received = await self._journal.receive(ops) if ops else Received()
        for rejected in received.rejected:
            self.counters.refused_ops += 1
            self._refuse(source, rejected.reason)
        for fork in received.forks:
            log.error("%s has signed two logs: nothing is taken of it from op %d on", fork.author, fork.seq)
            if fork.author == self._signer.peer_id:
                self._say_frozen(None)
        own = [op for op in received.accepted if op.author == self._signer.peer_id]
        if own:
            self._say_own(len(own), source)
        not_known = {*received.accepted, *(rejected.sealed for rejected in received.rejected)}
        known = [_op_id(op) for op in ops if op not in not_known and op.author not in received.missing]
        shown = [op for fork in received.forks for op in (fork.one, fork.other)]
        self._spread_ops([*shown, *received.accepted], source, known=[*also_known, *known])
        return received

    def _spread_ops(self, ops: Sequence[Signed], source: PeerId | None, known: Sequence[ItemId] = ()) -> None:
        """These are on disk: act on them, and pass them on."""
        items = []
        for op in ops:
            name = _op_id(op)
            self._recent_ops[name] = op
            items.append(Item(name, f"op/{name.hex()}", op.author))
            self._welcome(op.author)
        while len(self._recent_ops) > MAX_RECENT_OPS:
            del self._recent_ops[next(iter(self._recent_ops))]
        if source is None:
            self._handle(Published(tuple(items)))
        else:
            self._pushed(source, items, known)
        if ops:
            self._domain.call("telling of documents", self.on_documents)
            self.changed.set()

    def _say_own(self, count: int, source: PeerId) -> None:
        if self._knows_own_head:
            self._written_elsewhere_at = trio.current_time()
            log.error(
                "%s has %d ops in the name of this node that it did not write since it started: its profile was copied "
                "or restored; stop the other node that uses it, if there is one",
                *(source, count),
            )
        else:
            log.warning("%d ops of this node's own, which its disk had lost, came back from %s", count, source)

    def _say_frozen(self, error: FrozenLogError | None) -> None:
        if not self._said_frozen:
            self._said_frozen = True
            log.error(
                "%s: what this node writes is not taken by anybody any more. Two nodes have used this profile, or it "
                "was restored from a backup; leave the swarm %s and join it again with a new profile%s",
                *(self._signer.peer_id, self.swarm, f" ({error})" if error else ""),
            )

    # Gossip.

    def _say(self, records: Iterable[Opened]) -> None:
        """Own records: to the members by gossip, and to those who have yet to hear who this is."""
        items = [self._item(record.presence, record.record_hash) for record in records]
        for peer, waiting in self._met.items():
            if peer not in self._contacts:
                waiting.add(records=[item.id for item in items])
        self._published_at = trio.current_time()
        self._handle(Published(tuple(items)))

    def _item(self, presence: Presence, name: bytes) -> Item:
        return Item(name[:ITEM_ID_BYTES], self._presence.key_of(presence), presence.author)

    def _handle(self, event: Event) -> None:
        """Tell the gossip of an event, and do what it wants."""
        for output in self._gossip.handle(event, trio.current_time()):
            match output:
                case Push(peer, ids):
                    waiting = self._met.get(peer)
                    if waiting is not None:
                        ops = [(name, self._recent_ops[name]) for name in ids if name in self._recent_ops]
                        waiting.add(records=[name for name in ids if name not in self._recent_ops], ops=ops)
                case Tell(peer, message):
                    waiting = self._met.get(peer)
                    if waiting is not None:
                        waiting.add(controls=[message])
                case Dial(peer):
                    self._domain.start_soon("reaching a neighbour", self._dial_for_gossip, peer, policy=Policy.DROP)
                case Wake(at):
                    self._tick_at = at
                    self._retime.set()

    async def _dial_for_gossip(self, peer: PeerId) -> None:
        try:
            if await self._members.connect(peer) and peer not in self._contacts:
                await self._sync_quietly(peer)
        finally:  # gossip waits for the outcome, whatever it is
            self._handle(ContactUp(peer) if peer in self._contacts else ContactDown(peer))

    async def _push_loop(self, peer: PeerId, waiting: Waiting) -> None:
        """Send what it lacks of who is there, and then what waits."""
        records = await self._lacked_by(peer, waiting)
        ops: list[Signed] = []
        controls: list[Control] = []
        while self._met.get(peer) is waiting:
            for part in in_parts(self.swarm, records, ops, controls):
                if not await self._push(peer, part, waiting):
                    return
            names, ops, controls = await waiting.take()
            records = [sealed for name in names if (sealed := self._presence.find(name)) is not None]

    async def _lacked_by(self, peer: PeerId, waiting: Waiting) -> list[Signed]:
        """The presence that a peer says that it lacks; none if it does not say so rightly, or at all."""
        ours = summary(self._presence)
        request = PresenceSummary(self.swarm, ours)
        try:
            theirs = await self._patiently(peer, waiting, lambda: self._service_of(peer).compare(request))
            return [] if theirs is None else lacking(self._presence, len(ours) // BUCKET_BYTES, theirs)
        except ProtocolError as error:
            self._refuse(peer, str(error))
            return []

    async def _push(self, peer: PeerId, part: GossipPush, waiting: Waiting) -> bool:
        """Whether this queue goes on."""
        await self._patiently(peer, waiting, lambda: self._service_of(peer).gossip(part))
        return self._met.get(peer) is waiting

    async def _patiently(
        self, peer: PeerId, waiting: Waiting, call: Callable[[], Awaitable[_Answer]]
    ) -> _Answer | None:
        """A call, with retries; None if the peer refuses it, or is not met any more."""
        for attempt in range(PUSH_TRIES):
            if self._met.get(peer) is not waiting:
                return None
            try:
                return await call()
            except RemoteError as error:
                self.counters.failed_pushes += 1
                log.debug("a push to %s failed: %s", peer, error)
                if error.status is Status.NOT_FOUND:
                    self._left(peer)
                    return None
                if error.status in (Status.INVALID_ARGUMENT, Status.UNIMPLEMENTED):
                    return None  # it refuses this, and would refuse it again
                await trio.sleep(PUSH_AGAIN_S * 2**attempt)
        if self._met.get(peer) is waiting:
            self._give_up(peer)
        return None

    def _give_up(self, peer: PeerId) -> None:
        """A member takes no pushes: it counts as lost until it is met again."""
        log.info("%s takes no news of %s any more; it is met again when it answers", peer, self.swarm)
        self.counters.lost += 1
        was_member = peer in self._contacts
        self._unmeet(peer)
        self._handle(ContactDown(peer))
        if was_member:
            self._members.lost(peer)
        self.changed.set()

    # Loops.

    async def _speak_loop(self) -> None:
        """Say where this node is reached when that changes, and repeat oneself before one is forgotten."""
        reannounced_at = -math.inf
        said: list[str] | None = None
        while True:
            now = trio.current_time()
            if self._must_reannounce and now - reannounced_at >= REANNOUNCE_S:
                reannounced_at = now
                self._reannounce()
            addresses = list(self._host.addresses()[:MAX_ADDRESSES])
            if addresses != said:
                said = addresses
                self.publish(ADDRESSES, {"addresses": addresses})
            repeat_at = self._published_at + (min(REPEAT_S, self.every_s) if self._must_repeat else self.every_s)
            if now >= repeat_at:
                self._must_repeat = False
                topic = FACTS if FACTS in self.own_facts else ADDRESSES
                self.publish(topic, self.own_facts[topic])
                repeat_at = now + self.every_s
            self._handle(Known(tuple(peer for peer in self.live if self._members.addresses(peer))))
            with trio.move_on_at(min(now + HEARTBEAT_S, repeat_at)):
                await self._speak.wait()

    def _reannounce(self) -> None:
        self._must_reannounce = False
        say = log.warning if self._presence.num_outdone == 1 else log.error
        say(
            "others have heard newer things in the name of this node than it has said (%d times): its clock was set "
            "back, or another node uses the same profile; stop that one if there is one",
            self._presence.num_outdone,
        )
        self._say(self._presence.reannounce(self._signer, self.every_s))
        self._domain.call("noting that it was outdone", self.on_outdone, self._presence.incarnation)

    async def _tick_loop(self) -> None:
        while True:
            with trio.move_on_at(self._tick_at):
                await self._retime.wait()
            if trio.current_time() >= self._tick_at:
                self._tick_at = math.inf
                self._handle(Tick())

    async def _sync_loop(self) -> None:
        while True:
            await trio.sleep(SYNC_INTERVAL_S * self._rng.uniform(0.5, 1.5))
            if self._contacts:  # who does not answer holds up nobody else
                self._sync_soon(self._rng.choice(sorted(self._contacts)))

    async def _sync_quietly(self, peer: PeerId) -> None:
        if peer in self._syncing or peer == self._signer.peer_id:
            return
        self._syncing.add(peer)
        try:
            await self.sync_with(peer)
        except RemoteError as error:
            if error.status is Status.NOT_FOUND:
                self._left(peer)
            log.debug("sync with %s failed: %s", peer, error)
        except ShoalError as error:
            log.info("sync with %s failed: %s", peer, error)
        finally:
            self._syncing.discard(peer)

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

    def _sync_soon(self, peer: PeerId) -> None:
        self._of(peer).start_soon("syncing with a peer", self._sync_quietly, peer, policy=Policy.DROP)

    def _say_gone(self, peer: PeerId) -> None:
        self._domain.call("telling who is gone", self.on_gone, peer)


def _op_id(op: Signed) -> ItemId:
    return op_hash(op)[:ITEM_ID_BYTES]
