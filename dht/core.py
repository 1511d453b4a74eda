"""The distributed hash table, as one node takes part in it: put, get, renewing, repairing, and serving others.

`handle` takes what happened and the time, in Unix seconds; it gives what to ask of whom, what came of what was wanted,
and when to be woken. `serve_find` and `serve_store` answer what others ask.

- **Put** asks for the `K` nearest to the record's key and has each keep it. Whoever is as near as the `K` nearest
  should be, by an estimate of how many peers there are, is told on the way (Optimistic Provide, Trautwein et al.,
  2024). It is over when `WRITE_QUORUM` keep it, or all that there are were asked; how many keep it is counted, not
  assumed. The rest is told behind the caller's back.
- **Get** asks the `READ_WIDTH` nearest, which with the quorum above are more than `K`: so whoever asks meets somebody
  who has the newest. Records are checked, the best of each slot wins, and forks are shown. Of those asked, whoever had
  less is told what is newest. That nobody had anything is remembered for `NOTHING_S`.
- **Own** records are renewed before they expire, sooner if nobody took them or this node's addresses changed; records
  of others that anyone may hand on are handed on by those that keep them, as their author may be away.
- A node that cannot be reached by others is a client: it asks, and nobody asks it.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Final, assert_never

from shoal.dht.keyspace import BITS, Key, key_from_bytes, key_of_peer, key_to_bytes
from shoal.dht.lookup import Lookup
from shoal.dht.messages import (
    MAX_CONTACTS,
    MAX_RECORDS,
    FindAnswer,
    FindRequest,
    StoreAnswer,
    StoreRequest,
)
from shoal.dht.record_store import RecordStore
from shoal.dht.records import (
    MAX_ADDRESS_CHARS,
    MAX_ADDRESSES,
    RULES,
    Addresses,
    Kind,
    Model,
    Profile,
    Record,
    Slot,
    key_of,
    open_record,
    sign_record,
)
from shoal.dht.routing import Contact, K, RoutingTable, direct, usable
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signed, Signer

WRITE_QUORUM: Final = 11
READ_WIDTH: Final = 10
ENOUGH: Final = 20
"""Records of a key at which everybody may write; who finds so many looks no further."""
ENOUGH_FROM: Final = 3
"""Peers that must have answered before that counts."""
NEAR: Final = 1.0
"""Whoever is within this part of the distance in which `K` peers are expected is told on the way."""
NOTHING_S: Final = 5.0
MAX_NOTHING: Final = 1024
RENEW_S: Final = 1200.0
RETRY_S: Final = 5.0
HAND_ON_S: Final = 3600.0
REFRESH_S: Final = 240.0
FIRST_REFRESH_S: Final = 0.2
NUM_EARLY: Final = 3
"""So often a newcomer looks around itself, `EARLY_S` apart."""
EARLY_S: Final = 2.0
NUM_ESTIMATES: Final = 16
MIN_ESTIMATES: Final = 4
MIN_PATIENCE_S: Final = 0.15
MAX_PATIENCE_S: Final = 1.5
MAX_HANDED_ON: Final = 4
"""Records of others that are handed on at a time."""
MAX_PUTS_AT_ONCE: Final = 8
"""Puts under way at which no own record is said again by itself."""
ROOM_S: Final = 0.1
"""How soon it is looked again then."""
MAX_OPERATIONS: Final = 256

_ADDRESS_KINDS: Final = frozenset(kind for kind, rule in RULES.items() if rule.body is Addresses)


# --- events and outputs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Here:
    """This node is at these full multiaddrs, and is a server or a client of the table.

    It can be a server only if it is at one of them without a relay. ``Publish`` says all of them.
    """

    addresses: tuple[str, ...]
    is_server: bool


@dataclass(frozen=True, slots=True)
class Met:
    """A peer is connected; it may take part, which it is asked by that connection."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Publish:
    """Say something, and again before it expires, until `Withdraw`.

    Attributes:
        op: names what comes of it first; 0: nobody asks, and it is said when its turn comes.
        kind: of the record.
        topic: that it is about.
        item: which of several things about it.
        seq: its number; None: by the time.
        body: what it says; None: this node's addresses, for the kinds that say these.
    """

    op: int
    kind: Kind
    topic: str
    item: str = ""
    seq: int | None = None
    body: Model | Profile | None = None


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Say it no more: what was said is not taken back, but expires."""

    kind: Kind
    topic: str
    item: str = ""


@dataclass(frozen=True, slots=True)
class Get:
    """Ask for what is said about a topic; by one author, if the kind is owned."""

    op: int
    kind: Kind
    topic: str
    owner: PeerId | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """What `Ask` asked for is here."""

    query: int
    answer: FindAnswer | StoreAnswer


@dataclass(frozen=True, slots=True)
class Failed:
    """The peer that was asked cannot be reached, or did not answer in time, or with an error.

    Attributes:
        query: of `Ask`.
        was_tried: whether that says something of the peer; else this node only had no leave to dial it.
    """

    query: int
    was_tried: bool = True


@dataclass(frozen=True, slots=True)
class Tick:
    """It is time that `Wake` asked for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a peer, and tell what comes of it; it may have to be dialed."""

    query: int
    contact: Contact
    request: FindRequest | StoreRequest


@dataclass(frozen=True, slots=True)
class PutDone:
    """A record was handed to others.

    Attributes:
        op: of `Publish`.
        num_kept: peers that said that they keep it, so far.
        num_asked: peers that were asked to.
        better: what a peer keeps in its place.
    """

    op: int
    num_kept: int
    num_asked: int
    better: Record | None = None


@dataclass(frozen=True, slots=True)
class GetDone:
    """What is said.

    Attributes:
        op: of `Get`.
        records: the best of each slot.
        forks: pairs of records that contradict each other.
        num_answered: peers that answered.
    """

    op: int
    records: tuple[Record, ...]
    forks: tuple[tuple[Record, Record], ...]
    num_answered: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Tell `Tick` then, at the latest; what was asked before is void."""

    at: float


Event = Here | Met | Publish | Withdraw | Get | Answered | Failed | Tick
Output = Ask | PutDone | GetDone | Wake


# --- what is under way -----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Operation:
    """A look-up for nothing but contacts."""

    op: int
    lookup: Lookup
    is_for_records: bool = False
    is_found: bool = False


@dataclass(slots=True, eq=False)
class _Put(_Operation):
    record: Record = field(kw_only=True)
    is_done: bool = False
    told_at: dict[PeerId, float] = field(default_factory=dict)  # those that did not answer yet
    kept: set[PeerId] = field(default_factory=set)
    refused: set[PeerId] = field(default_factory=set)
    better: Record | None = None

    @property
    def num_told(self) -> int:
        return len(self.told_at) + len(self.kept) + len(self.refused)

    def was_told(self, peer: PeerId) -> bool:
        return peer in self.told_at or peer in self.kept or peer in self.refused


@dataclass(slots=True, eq=False)
class _Get(_Operation):
    key: Key = field(kw_only=True)
    is_owned: bool = field(kw_only=True)
    best: dict[Slot, Record] = field(default_factory=dict)
    forks: dict[Slot, tuple[Record, Record]] = field(default_factory=dict)
    had: dict[PeerId, frozenset[bytes]] = field(default_factory=dict)  # digests, by who answered

    def take(self, record: Record) -> None:
        known = self.best.get(record.slot)
        if known is None:
            self.best[record.slot] = record
            return
        if record.contradicts(known):
            self.forks.setdefault(record.slot, (known, record))
        if record.beats(known):
            self.best[record.slot] = record


@dataclass(slots=True)
class _Query:
    operation: _Operation | None
    contact: Contact
    asked_at: float
    is_store: bool


@dataclass(slots=True)
class _Own:
    """Something that this node says."""

    event: Publish
    due_at: float
    seq: int = 0


# --- the core --------------------------------------------------------------------------------------------------------


class Dht:
    """One node's part.

    Attributes:
        table: whom it may ask.
        store: what it keeps for others.
        num_lies: answers that were no such thing, or held a false record.
    """

    def __init__(self, signer: Signer, rng: Random, store: RecordStore | None = None) -> None:
        self.me = signer.peer_id
        self.table = RoutingTable(self.me)
        self.store = store or RecordStore()
        self.num_lies = 0
        self._signer = signer
        self._rng = rng
        self._addresses: tuple[str, ...] = ()
        self._served_at: tuple[str, ...] = ()  # none: a client
        self._own: dict[tuple[Kind, str, str], _Own] = {}
        self._own_at = inf  # when the first of them may be due
        self._operations: dict[_Operation, None] = {}
        self._queries: dict[int, _Query] = {}
        self._last_query = 0
        self._nothing: dict[Key, float] = {}
        self._hand_on_at: dict[Slot, float] = {}
        self._estimates: deque[float] = deque(maxlen=NUM_ESTIMATES)
        self._rtt_s = 0.2
        self._refresh_at = inf
        self._hand_on_look_at = 0.0
        self._touched: dict[_Operation, None] = {}
        self._num_early = 0

    # --- what it knows ---

    @property
    def num_peers(self) -> float | None:
        """How many peers take part, by how near the nearest to a key are; None as long as that says little."""
        if len(self._estimates) < MIN_ESTIMATES or len(self.table) < K:
            return None
        return statistics.median(self._estimates)

    @property
    def is_server(self) -> bool:
        """Whether others may ask it."""
        return bool(self._served_at)

    def statistics(self) -> dict[str, int]:
        """Counters, and how much is held."""
        return {
            "dht_contacts": len(self.table),
            "dht_records": len(self.store),
            "dht_refused_records": self.store.num_refused,
            "dht_evicted_records": self.store.num_evicted,
            "dht_lies": self.num_lies,
            "dht_operations": len(self._operations),
        }

    def begin_as_old(self, now: float) -> None:
        """Take the table as full, as it is some time after the start; for simulations."""
        self._num_early = NUM_EARLY
        self._refresh_at = now + REFRESH_S * self._rng.random()

    # --- what others ask ---

    def serve_find(self, caller: PeerId, request: FindRequest, now: float) -> FindAnswer:
        """Answer it.

        Raises:
            ProtocolError: if it is malformed.
        """
        key = key_from_bytes(request.key)
        self._heard(caller, request.addresses)
        contacts = tuple(self.table.closest(key, MAX_CONTACTS, but=caller))
        found: list[Signed] = []
        if request.is_for_records:
            for kept in self.store.get(key, now):
                found.append(kept.record.signed)
                if kept.fork is not None:
                    found.append(kept.fork.signed)
        return FindAnswer(contacts, tuple(found[:MAX_RECORDS]), self._served_at)

    def serve_store(self, caller: PeerId, group: str, request: StoreRequest, now: float) -> StoreAnswer:
        """Keep a record, or do not.

        Args:
            caller: who hands it in.
            group: the network that the caller is in.
            request: the record.
            now: Unix seconds.

        Raises:
            ProtocolError: if it is no record that anybody may keep.
        """
        record = open_record(request.record)
        rule = RULES[record.statement.kind]
        if not record.is_current(now):
            raise ProtocolError("the record has expired, or would live too long; look at this machine's clock")
        if rule.is_own_only and caller != record.author:
            raise ProtocolError(f"a {record.statement.kind} record is taken from its author alone")
        kept = self.store.put(record, group, now)
        if kept is None:
            return StoreAnswer(is_kept=False)
        self._nothing.pop(record.key, None)
        if not rule.is_own_only:
            self._hand_on_at[record.slot] = now + HAND_ON_S * self._rng.uniform(0.75, 1.25)
        is_kept = kept.record.digest == record.digest
        return StoreAnswer(is_kept, None if is_kept else kept.record.signed)

    # --- what happens ---

    def handle(self, event: Event, now: float) -> list[Output]:
        """Something happened."""
        outputs: list[Output] = []
        match event:
            case Here(addresses, is_server):
                self._move(addresses, is_server, now)
            case Met(peer):
                self._ask_find(outputs, None, Contact(peer, ()), key_of_peer(self.me), False, now)
            case Publish():
                self._publish(outputs, event, now)
            case Withdraw(kind, topic, item):
                self._own.pop((kind, topic, item), None)
            case Get():
                self._get(outputs, event, now)
            case Answered(query, answer):
                self._answered(outputs, query, answer, now)
            case Failed(query, was_tried):
                self._failed(query, was_tried=was_tried)
            case Tick():
                pass
            case _:
                assert_never(event)
        self._keep_up(outputs, now)
        touched = list(self._operations if isinstance(event, Tick) else self._touched)
        self._touched.clear()
        for operation in touched:
            self._advance(outputs, operation, now)
        outputs.append(Wake(self._next_wake(now)))
        return outputs

    def _move(self, addresses: tuple[str, ...], is_server: bool, now: float) -> None:
        addresses = tuple([each for each in addresses if len(each) <= MAX_ADDRESS_CHARS][:MAX_ADDRESSES])
        if set(addresses) != set(self._addresses):
            for (kind, _, _), own in self._own.items():
                if kind in _ADDRESS_KINDS:
                    self._due(own, now)
        self._addresses = addresses
        self._served_at = direct(addresses, self.me) if is_server else ()

    def _publish(self, outputs: list[Output], event: Publish, now: float) -> None:
        own = self._own[event.kind, event.topic, event.item] = _Own(event, inf)
        if event.op:
            self._say(outputs, own, event.op, now)
        else:
            self._due(own, now)

    def _say(self, outputs: list[Output], own: _Own, op: int, now: float) -> None:
        event = own.event
        self._due(own, now + RENEW_S * self._rng.uniform(0.8, 1.0))
        body: Addresses | Model | Profile
        if event.body is not None:
            body = event.body
            seq = own.seq = event.seq if event.seq is not None else own.seq or int(now * 1000)
        elif self._addresses:
            body = Addresses(self._addresses)
            seq = own.seq = max(own.seq + 1, int(now * 1000))
        else:
            self._due(own, now + RETRY_S)
            outputs.append(PutDone(op, 0, 0))
            return
        record = sign_record(self._signer, event.kind, event.topic, body, seq=seq, now=now, item=event.item)
        self._put(outputs, record, op, now)

    def _due(self, own: _Own, at: float) -> None:
        own.due_at = at
        self._own_at = min(self._own_at, at)

    def _put(self, outputs: list[Output], record: Record, op: int, now: float) -> None:
        self._nothing.pop(record.key, None)
        if record.author == self.me and self.is_server:
            self.store.put(record, "", now)
        lookup = self._lookup(record.key, K, now)
        self._begin(_Put(op, lookup, record=record))

    def _get(self, outputs: list[Output], event: Get, now: float) -> None:
        key = key_of(event.kind, event.topic, event.owner)
        until = self._nothing.get(key, -inf)
        if until > now:
            outputs.append(GetDone(event.op, (), (), 0))
            return
        operation = _Get(
            event.op, self._lookup(key, READ_WIDTH, now), True, key=key, is_owned=RULES[event.kind].is_owned
        )
        for kept in self.store.get(key, now):
            operation.take(kept.record)
            if kept.fork is not None:
                operation.take(kept.fork)
        self._begin(operation)

    def _begin(self, operation: _Operation) -> None:
        self._operations[operation] = self._touched[operation] = None

    def _lookup(self, key: Key, width: int, now: float) -> Lookup:
        self.table.touch(key, now)
        return Lookup(key, self.table.closest(key), self.me, self._patience_s, width=width)

    # --- answers ---

    def _answered(self, outputs: list[Output], number: int, answer: FindAnswer | StoreAnswer, now: float) -> None:
        query = self._queries.pop(number, None)
        if query is None:
            return
        operation, peer = query.operation, query.contact.peer
        self._touch(operation)
        self._rtt_s += 0.1 * (min(now - query.asked_at, MAX_PATIENCE_S) - self._rtt_s)
        try:
            if isinstance(answer, StoreAnswer) and query.is_store:
                if isinstance(operation, _Put):
                    self._stored(operation, peer, answer, now)
            elif isinstance(answer, FindAnswer) and not query.is_store:
                records = self._open(operation, answer)
                self._heard(peer, answer.addresses)
                contacts = answer.contacts[:MAX_CONTACTS]
                if operation is None:
                    self._meet(now)
                    return
                if isinstance(operation, _Get):
                    operation.had[peer] = frozenset(record.digest for record in records)
                    for record in records:
                        if record.is_current(now):
                            operation.take(record)
                operation.lookup.answered(peer, contacts)
                if isinstance(operation, _Put):
                    self._tell_if_near(outputs, operation, query.contact, now)
            else:
                self._lied(query)
        except ProtocolError:
            self._lied(query)

    def _lied(self, query: _Query) -> None:
        self.num_lies += 1
        self.table.forget(query.contact.peer)
        self._lost(query.operation, query.contact.peer, is_store=query.is_store)

    def _open(self, operation: _Operation | None, answer: FindAnswer) -> list[Record]:
        if not isinstance(operation, _Get):
            return []
        records = [open_record(signed) for signed in answer.records[:MAX_RECORDS]]
        if any(record.key != operation.key for record in records):
            raise ProtocolError("a record of another key")
        return records

    def _stored(self, operation: _Put, peer: PeerId, answer: StoreAnswer, now: float) -> None:
        operation.told_at.pop(peer, None)
        (operation.kept if answer.is_kept else operation.refused).add(peer)
        if answer.better is None:
            return
        better = open_record(answer.better)
        if better.slot != operation.record.slot:
            raise ProtocolError("a record of another slot")
        if better.is_current(now) and better.beats(operation.better or operation.record):
            operation.better = better

    def _touch(self, operation: _Operation | None) -> None:
        if operation in self._operations and operation is not None:
            self._touched[operation] = None

    def _failed(self, number: int, *, was_tried: bool) -> None:
        query = self._queries.pop(number, None)
        if query is not None:
            if was_tried:
                self.table.failed(query.contact.peer)
            self._touch(query.operation)
            self._lost(query.operation, query.contact.peer, is_store=query.is_store)

    @staticmethod
    def _lost(operation: _Operation | None, peer: PeerId, *, is_store: bool) -> None:
        if operation is None:
            return
        if not is_store:
            operation.lookup.failed(peer)
        elif isinstance(operation, _Put):
            operation.told_at.pop(peer, None)
            operation.kept.discard(peer)
            operation.refused.add(peer)

    def _heard(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        if peer == self.me:
            return
        contact = usable(Contact(peer, addresses))
        if contact is not None:
            self.table.heard(contact)
        else:
            self.table.forget(peer)

    def _meet(self, now: float) -> None:
        """The first answer of a peer that this node met."""
        if self._num_early < NUM_EARLY:
            self._refresh_at = min(self._refresh_at, now + FIRST_REFRESH_S)
        for own in self._own.values():
            if own.due_at > now + 1.0 and own.due_at <= now + RETRY_S:
                self._due(own, now + 1.0)

    # --- going on ---

    def _advance(self, outputs: list[Output], operation: _Operation, now: float) -> None:
        """Ask whom it asks next; end it if it is over."""
        lookup = operation.lookup
        if not operation.is_found:
            for contact in lookup.next(now):
                self._ask_find(outputs, operation, contact, lookup.target, operation.is_for_records, now)
            operation.is_found = lookup.is_over or (isinstance(operation, _Get) and self._has_enough(operation))
            if operation.is_found:
                self._estimate(operation)
        match operation:
            case _Put():
                self._advance_put(outputs, operation, now)
            case _ if not operation.is_found:
                return
            case _Get():
                del self._operations[operation]
                self._end_get(outputs, operation, now)
            case _:
                del self._operations[operation]

    def _advance_put(self, outputs: list[Output], put: _Put, now: float) -> None:
        if put.is_found:
            for contact in put.lookup.closest(K + len(put.refused)):
                if not put.was_told(contact.peer):
                    self._tell(outputs, put, contact, now)
        waits = [at for at in put.told_at.values() if not put.kept or at + self._patience_s > now]
        is_over = put.is_found and not waits
        if not put.is_done and (is_over or len(put.kept) >= WRITE_QUORUM):
            put.is_done = True
            self._end_put(outputs, put, now)
        if is_over:
            del self._operations[put]

    def _end_put(self, outputs: list[Output], put: _Put, now: float) -> None:
        outputs.append(PutDone(put.op, len(put.kept), put.num_told, put.better))
        statement = put.record.statement
        own = self._own.get((statement.kind, statement.topic, statement.item))
        if own is not None and put.record.author == self.me and not put.kept:
            self._due(own, now + RETRY_S)

    def _end_get(self, outputs: list[Output], get: _Get, now: float) -> None:
        if not get.best and get.had:
            self._nothing[get.key] = now + NOTHING_S
            while len(self._nothing) > MAX_NOTHING:
                del self._nothing[next(iter(self._nothing))]
        outputs.append(GetDone(get.op, tuple(get.best.values()), tuple(get.forks.values()), len(get.had)))
        if not get.is_owned:
            return
        for record in get.best.values():
            if RULES[record.statement.kind].is_own_only:
                continue
            for contact in get.lookup.closest(READ_WIDTH):
                if record.digest not in get.had.get(contact.peer, frozenset()):
                    self._ask(outputs, None, contact, StoreRequest(record.signed), now)

    def _has_enough(self, get: _Get) -> bool:
        return not get.is_owned and len(get.best) >= ENOUGH and sum(map(bool, get.had.values())) >= ENOUGH_FROM

    def _tell_if_near(self, outputs: list[Output], put: _Put, contact: Contact, now: float) -> None:
        num_peers = self.num_peers
        if num_peers is None or put.was_told(contact.peer):
            return
        if key_of_peer(contact.peer) ^ put.lookup.target <= NEAR * K / num_peers * 2.0**BITS:
            self._tell(outputs, put, contact, now)

    def _tell(self, outputs: list[Output], put: _Put, contact: Contact, now: float) -> None:
        put.told_at[contact.peer] = now
        self._ask(outputs, put, contact, StoreRequest(put.record.signed), now)

    def _estimate(self, operation: _Operation) -> None:
        found = operation.lookup.closest(READ_WIDTH)
        if len(found) < READ_WIDTH:
            return
        distances = [(key_of_peer(each.peer) ^ operation.lookup.target) / 2.0**BITS for each in found]
        ranks = range(1, len(found) + 1)
        weighted = sum(rank * distance for rank, distance in zip(ranks, distances, strict=True))
        if weighted > 0:
            self._estimates.append(sum(rank * rank for rank in ranks) / weighted)

    # --- asking ---

    def _ask_find(
        self,
        outputs: list[Output],
        operation: _Operation | None,
        contact: Contact,
        key: Key,
        is_for_records: bool,
        now: float,
    ) -> None:
        request = FindRequest(key_to_bytes(key), is_for_records, self._served_at)
        self._ask(outputs, operation, contact, request, now)

    def _ask(
        self,
        outputs: list[Output],
        operation: _Operation | None,
        contact: Contact,
        request: FindRequest | StoreRequest,
        now: float,
    ) -> None:
        self._last_query += 1
        is_store = isinstance(request, StoreRequest)
        self._queries[self._last_query] = _Query(operation, contact, now, is_store)
        outputs.append(Ask(self._last_query, contact, request))

    # --- keeping up ---

    def _keep_up(self, outputs: list[Output], now: float) -> None:
        """What is due by itself."""
        if self._refresh_at <= now:
            is_early = self._num_early < NUM_EARLY
            self._num_early += is_early
            number = None if is_early else self.table.stalest()
            key = key_of_peer(self.me) if number is None else self.table.key_in(number, self._rng.getrandbits(BITS))
            self._refresh_at = now + (EARLY_S if is_early else REFRESH_S * self._rng.uniform(0.8, 1.2))
            if len(self.table):
                self._begin(_Operation(0, self._lookup(key, K, now)))
        if self._own_at <= now:
            self._say_again(outputs, now)
        if self._hand_on_look_at <= now:
            self._hand_on_look_at = now + 60.0
            self._hand_on(outputs, now)

    def _say_again(self, outputs: list[Output], now: float) -> None:
        """What is due of the own records, a few at a time: whoever holds much has much to say at once."""
        room = MAX_PUTS_AT_ONCE - sum(isinstance(each, _Put) for each in self._operations)
        if room > 0:
            for own in [own for own in self._own.values() if own.due_at <= now][:room]:
                self._say(outputs, own, 0, now)
            self._own_at = min([own.due_at for own in self._own.values()], default=inf)

    def _hand_on(self, outputs: list[Output], now: float) -> None:
        self.store.drop_expired(now)
        num = 0
        for slot, due_at in list(self._hand_on_at.items()):
            record = self.store.record(slot)
            if record is None:
                del self._hand_on_at[slot]
            elif due_at <= now and num < MAX_HANDED_ON:
                num += 1
                self._hand_on_at[slot] = now + HAND_ON_S * self._rng.uniform(0.75, 1.25)
                self._put(outputs, record, 0, now)

    def _next_wake(self, now: float) -> float:
        wake_at = min(self._refresh_at, self._hand_on_look_at if self._hand_on_at else inf)
        wake_at = min(wake_at, max(self._own_at, now + ROOM_S))
        for operation in self._operations:
            if not operation.is_found and (at := operation.lookup.wake_at) is not None:
                wake_at = min(wake_at, at)
            if isinstance(operation, _Put):
                patient = [at + self._patience_s for at in operation.told_at.values()]
                wake_at = min([wake_at, *(at for at in patient if at > now)])
        return wake_at

    @property
    def _patience_s(self) -> float:
        return min(max(3 * self._rtt_s, MIN_PATIENCE_S), MAX_PATIENCE_S)
