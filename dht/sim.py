"""A simulated distributed hash table: the real cores on a seeded network, with churn, and liars if wanted.

A question takes one round trip; the first one between two peers that are not connected three more (TCP, the security
handshake, the muxer). A peer holds `MAX_CONNECTED` connections. Whoever died does not answer, and the asker knows it
after `DEAD_S`. Sessions are exponential; whoever leaves is replaced by a newcomer under a new name, who knows three.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Final

from shoal.dht.core import (
    Answered,
    Ask,
    Dht,
    Event,
    Failed,
    Get,
    GetDone,
    Here,
    Met,
    Publish,
    PutDone,
    Tick,
    Wake,
)
from shoal.dht.keyspace import BITS, Key, key_from_bytes, key_of_peer
from shoal.dht.messages import FindAnswer, FindRequest, StoreAnswer, StoreRequest
from shoal.dht.records import Addresses, Kind, Model, sign_record
from shoal.dht.routing import Contact, K
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signed, Signer
from shoal.protocol.sim import Links, Network

DEAD_S: Final = 4.0
DIAL_ROUND_TRIPS: Final = 3
MAX_CONNECTED: Final = 256
ASK_BYTES: Final = 150
ANSWER_BYTES: Final = 2500
NUM_FAKES: Final = 1000
FLOOD_PER_S: Final = 20
LIES: Final = ("silence", "contacts", "records", "flood")


@dataclass(frozen=True, slots=True)
class DhtSimConfig:
    """What is simulated.

    Attributes:
        nodes: alive at any time.
        seconds: that are measured, after `warm_s`.
        warm_s: before.
        latency_s: one way, between any two peers.
        median_session_s: half of the nodes leave within it; infinite: none leaves.
        liars: part of the nodes.
        per_s: publications each second; one look-up of a name and one of providers go with each.
        seed: the same gives the same run.
    """

    nodes: int = 1000
    seconds: float = 120.0
    warm_s: float = 120.0
    latency_s: float = 0.05
    median_session_s: float = 3600.0
    liars: float = 0.0
    per_s: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nodes < 2 or not 0 <= self.liars < 1 or min(self.seconds, self.per_s, self.median_session_s) <= 0:
            raise UsageError("simulate at least 2 nodes for some time, of which a part below 1 lies")


@dataclass(slots=True)
class Measured:
    """Of one kind of operation."""

    seconds: list[float] = field(default_factory=list)
    num_good: int = 0

    @property
    def median_s(self) -> float:
        """Of those that ended."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def success(self) -> float:
        """The part that gave what it should."""
        return self.num_good / len(self.seconds) if self.seconds else 0.0

    def add(self, seconds: float, *, is_good: bool) -> None:
        """One more."""
        self.seconds.append(seconds)
        self.num_good += is_good


@dataclass(slots=True)
class DhtReport:
    """What came of it: putting and getting names, announcing and finding providers; and messages sent in all."""

    put: Measured = field(default_factory=Measured)
    get: Measured = field(default_factory=Measured)
    provide: Measured = field(default_factory=Measured)
    find: Measured = field(default_factory=Measured)
    messages: int = 0


class SimNode:
    """The shell of one core."""

    def __init__(self, sim: DhtSim, signer: Signer, lie: str = "") -> None:
        self.sim = sim
        self.signer = signer
        self.peer = signer.peer_id
        self.contact = Contact(self.peer, (f"/ip4/127.0.0.1/tcp/4001/p2p/{self.peer}",))
        self.lie = lie
        self.core = Dht(signer, sim.network.rng)
        self.connected: dict[PeerId, None] = {}
        self.wake_at = math.inf
        self.done: dict[int, tuple[PutDone | GetDone, float]] = {}
        self.last_op = 0

    def handle(self, event: Event) -> None:
        """Tell the core, and do what it says."""
        network = self.sim.network
        for output in self.core.handle(event, self.sim.unix()):
            match output:
                case Ask():
                    self.sim.carry(self, output)
                case Wake(at):
                    at -= self.sim.EPOCH
                    if at < self.wake_at and at < math.inf:
                        self.wake_at = at
                        network.at(at - network.now, self._tick, at, of=self.peer)
                case PutDone() | GetDone():
                    self.sim.ended(self, output)

    def _tick(self, at: float) -> None:
        if at == self.wake_at:
            self.wake_at = math.inf
            self.handle(Tick())

    def serve(self, caller: PeerId, request: FindRequest | StoreRequest) -> FindAnswer | StoreAnswer | None:
        """Answer, or lie."""
        now = self.sim.unix()
        if self.lie == "silence":
            return None
        if self.lie and isinstance(request, StoreRequest):
            return StoreAnswer(is_kept=True)  # and forgets it
        try:
            if isinstance(request, StoreRequest):
                return self.core.serve_store(caller, caller, request, now)
            if self.lie == "contacts":
                return self.sim.false_contacts(key_from_bytes(request.key))
            answer = self.core.serve_find(caller, request, now)
            if self.lie == "records" and request.is_for_records:
                forged = Signed(caller, b"\x81\xa4kind", bytes(64))
                old = self.sim.old_records.get(request.key)
                return FindAnswer(answer.contacts, (old if old is not None else forged,), answer.addresses)
        except ProtocolError:
            return None
        return answer

    def connect(self, peer: PeerId) -> bool:
        """Note a connection; whether it stood already."""
        stood = self.connected.pop(peer, self) is None
        self.connected[peer] = None
        if len(self.connected) > MAX_CONNECTED:
            del self.connected[next(iter(self.connected))]
        return stood


class DhtSim:
    """The network and what is done on it."""

    EPOCH: Final = 1_800_000_000.0

    def __init__(self, config: DhtSimConfig) -> None:
        self.config = config
        self.network = Network(config.seed, Links(latency_s=config.latency_s))
        self.nodes: dict[PeerId, SimNode] = {}
        self.report = DhtReport()
        self.old_records: dict[bytes, Signed] = {}
        self._waiting: dict[tuple[PeerId, int], tuple[str, float, object]] = {}
        self._names: deque[tuple[SimNode, str, Cid]] = deque(maxlen=500)
        self._held: deque[tuple[SimNode, Cid]] = deque(maxlen=500)
        self._secrets = Random(config.seed + 1)  # noqa: S311 - a simulation is to be repeatable, not secret
        self._fakes: list[Contact] = []
        self._number = 0
        for _ in range(config.nodes):
            self._add()
        self._seed_tables()

    def unix(self) -> float:
        """What every clock shows."""
        return self.EPOCH + self.network.now

    def run(self) -> DhtReport:
        """Simulate it all."""
        config, network = self.config, self.network
        for node in list(self.nodes.values()):
            node.core.begin_as_old(self.unix())
            node.handle(Tick())
            self._schedule_end(node)
            if node.lie == "flood":
                network.at(network.rng.random(), self._flood, node, of=node.peer)
        network.run(config.warm_s)
        end = config.warm_s + config.seconds
        at = config.warm_s
        while at < end:
            network.at(at - network.now, self._publish)
            network.at(at - network.now + 0.5 / config.per_s, self._look_up)
            at += 1 / config.per_s
        network.run(end + 10)
        self.report.messages = network.traffic().messages
        return self.report

    # --- peers ---

    def _add(self) -> SimNode:
        self._number += 1
        lie = ""
        if self._secrets.random() < self.config.liars:
            lie = LIES[self._number % len(LIES)]
        node = SimNode(self, Signer(self._secrets.randbytes(32)), lie)
        self.network.add(node.peer)
        self.nodes[node.peer] = node
        node.core.handle(Here(node.contact.addresses, is_server=True), self.unix())
        return node

    def _seed_tables(self) -> None:
        """As tables are after a while: of each bucket, some of those in its range."""
        ring = sorted((key_of_peer(peer), peer) for peer in self.nodes)
        keys = [key for key, _ in ring]
        rng = self.network.rng
        for node in self.nodes.values():
            mine = key_of_peer(node.peer)
            for bit in range(BITS - 1, 0, -1):
                start = ((mine ^ (1 << bit)) >> bit) << bit
                low, high = bisect_left(keys, start), bisect_left(keys, start + (1 << bit))
                chosen = range(low, high) if high - low <= K else rng.sample(range(low, high), K)
                for index in chosen:
                    other = self.nodes[ring[index][1]]
                    node.core.table.heard(other.contact)
                    node.connect(other.peer)
                whole = (mine >> bit) << bit
                if bisect_left(keys, whole + (1 << bit)) - bisect_left(keys, whole) <= 1:
                    break

    def _schedule_end(self, node: SimNode) -> None:
        if self.config.median_session_s < math.inf:
            mean_s = self.config.median_session_s / math.log(2)
            self.network.at(self.network.rng.expovariate(1 / mean_s), self._leave, node)

    def _leave(self, node: SimNode) -> None:
        self.network.kill(node.peer)
        del self.nodes[node.peer]
        new = self._add()
        self._schedule_end(new)
        for peer in self.network.rng.sample(list(self.nodes), min(4, len(self.nodes))):
            if peer != new.peer:
                new.handle(Met(peer))

    # --- messages ---

    def carry(self, node: SimNode, ask: Ask) -> None:
        """A question goes its way."""
        network, target = self.network, ask.contact.peer
        other = self.nodes.get(target)
        if other is None:
            network.at(DEAD_S, node.handle, Failed(ask.query), of=node.peer)
            return
        dial_s = 0.0 if target in node.connected else 2 * DIAL_ROUND_TRIPS * self.config.latency_s
        network.at(dial_s, self._send, node, other, ask, of=node.peer)

    def _send(self, node: SimNode, other: SimNode, ask: Ask) -> None:
        node.connect(other.peer)
        self.network.send(node.peer, other.peer, ASK_BYTES, self._arrive, node, other, ask)
        if other.peer not in self.nodes:
            self.network.at(DEAD_S, node.handle, Failed(ask.query), of=node.peer)

    def _arrive(self, node: SimNode, other: SimNode, ask: Ask) -> None:
        other.connect(node.peer)
        answer = other.serve(node.peer, ask.request)
        if answer is None or node.peer not in self.nodes:
            if node.peer in self.nodes:
                self.network.at(DEAD_S, node.handle, Failed(ask.query), of=node.peer)
            return
        self.network.send(other.peer, node.peer, ANSWER_BYTES, node.handle, Answered(ask.query, answer))

    # --- what is measured ---

    def _honest(self) -> SimNode:
        peers = list(self.nodes.values())
        while True:
            node = peers[self.network.rng.randrange(len(peers))]
            if not node.lie:
                return node

    def _publish(self) -> None:
        node = self._honest()
        number = len(self._waiting) + self._number + int(self.network.now * 1000)
        cid = Cid.of_block(f"{number}".encode())
        self._begin(node, "put", Publish(0, Kind.MODEL, f"m{number}", seq=1, body=Model(cid, 1)), (f"m{number}", cid))
        other = self._honest()
        self._begin(other, "provide", Publish(0, Kind.PROVIDER, str(cid)), cid)

    def _look_up(self) -> None:
        rng = self.network.rng
        names = self._names
        if names:
            owner, name, cid = names[rng.randrange(len(names))]
            self._begin(self._honest(), "get", Get(0, Kind.MODEL, name, owner.peer), cid)
        held = [each for each in self._held if each[0].peer in self.nodes]
        if held:
            holder, cid = held[rng.randrange(len(held))]
            self._begin(self._honest(), "find", Get(0, Kind.PROVIDER, str(cid)), holder.peer)

    def _begin(self, node: SimNode, what: str, event: Publish | Get, about: object) -> None:
        node.last_op += 1
        self._waiting[node.peer, node.last_op] = (what, self.network.now, about)
        if isinstance(event, Publish):
            event = Publish(node.last_op, event.kind, event.topic, event.item, event.seq, event.body)
        else:
            event = Get(node.last_op, event.kind, event.topic, event.owner)
        node.handle(event)

    def ended(self, node: SimNode, output: PutDone | GetDone) -> None:
        """Something that was wanted is over."""
        waited = self._waiting.pop((node.peer, output.op), None)
        if waited is None:
            return
        what, began, about = waited
        took_s = self.network.now - began
        match what, output, about:
            case "put", PutDone(), (str() as name, Cid() as cid):
                self.report.put.add(took_s, is_good=output.num_kept > 0)
                self._names.append((node, name, cid))
            case "provide", PutDone(), Cid() as cid:
                self.report.provide.add(took_s, is_good=output.num_kept > 0)
                self._held.append((node, cid))
            case "get", GetDone(), cid:
                self.report.get.add(took_s, is_good=any(each.body.manifest == cid for each in output.records))
            case "find", GetDone(), holder:
                self.report.find.add(took_s, is_good=any(each.author == holder for each in output.records))

    # --- liars ---

    def false_contacts(self, key: Key) -> FindAnswer:
        """Names of nobody, and of other liars, that are near a key."""
        if not self._fakes:
            for _ in range(NUM_FAKES):
                peer = Signer(self._secrets.randbytes(32)).peer_id
                self._fakes.append(Contact(peer, (f"/ip4/127.0.0.1/tcp/9/p2p/{peer}",)))
        liars = [node.contact for node in self.nodes.values() if node.lie][:NUM_FAKES]
        near = sorted([*self._fakes, *liars], key=lambda each: key_of_peer(each.peer) ^ key)
        return FindAnswer(tuple(near[:K]), (), ())

    def _flood(self, node: SimNode) -> None:
        """Say to hold what others announced, and a thousand things that nobody has."""
        rng = self.network.rng
        topics = [str(cid) for _, cid in self._held] or [str(Cid.of_block(rng.randbytes(8)))]
        targets = list(node.core.table)
        for _ in range(FLOOD_PER_S if targets else 0):
            topic = topics[rng.randrange(len(topics))] if rng.random() < 0.5 else str(Cid.of_block(rng.randbytes(8)))
            body = Addresses(node.contact.addresses)
            record = sign_record(node.signer, Kind.PROVIDER, topic, body, seq=int(self.unix() * 1000), now=self.unix())
            contact = targets[rng.randrange(len(targets))]
            self.carry(node, Ask(-1, contact, StoreRequest(record.signed)))
        self.network.at(1.0, self._flood, node, of=node.peer)


def simulate(config: DhtSimConfig) -> DhtReport:
    """Run a simulated table."""
    return DhtSim(config).run()
