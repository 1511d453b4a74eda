"""A whole swarm in one process: the real cores of every member, on a seeded network, with models of machines and liars.

Each member is `shoal.training.run` (rounds, shares, lineage, claims), `shoal.crdt.gossip`, `shoal.crdt.presence` and
`shoal.crdt.sync`, driven as the node drives them. Three things are models: the worker (collecting, updating and
evaluating take time by the machine's speed; what comes out is named by the hash of what went in, so that two policies
are equal where and only where their bytes would be), the transfer of contents (what one member gives goes out one after
the other, beside its messages), and the signatures of presence (a keyed hash in place of Ed25519, so that forging is as
impossible and a run takes minutes, not hours).

Messages travel as in streams: what the network loses comes later, and what follows waits for it.

``simulate(config)`` gives what a swarm of such machines and links would do; `shoal sim` prints it.
"""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from shoal.crdt.gossip import (
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Gossip,
    Item,
    Known,
    Published,
    Push,
    Pushed,
    Tell,
    Told,
)
from shoal.crdt.gossip import Tick as GossipTick
from shoal.crdt.gossip import Wake as GossipWake
from shoal.crdt.presence import Fresh, Opened, Outdone, PresenceTable, Stale, open_record
from shoal.crdt.presence import Known as Heard_before
from shoal.crdt.sync import SwarmDocs
from shoal.crdt.views import evaluations
from shoal.protocol.codec import encode, to_plain
from shoal.protocol.errors import ProtocolError, SignatureError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import SIGNATURE_BYTES, Signed, Signer
from shoal.protocol.sim import Links, Network
from shoal.training import run_events as events
from shoal.training.electorate import Delivered, Electorate
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.statements import NO_BALLOT, TOPIC_OF, TOPIC_RULES, Facts, Result, Statement, read_statement

FULL_MESH: Final = 32
"""Members up to which all are connected, as in `shoal.node.swarm.replica`."""
FIRST_CONTACTS: Final = 3
HEARTBEAT_PEERS: Final = 64
MESSAGE_BYTES: Final = 120
"""What a call adds to its content."""
STATE_FACTOR: Final = 1.0
FETCH_TIMEOUT_S: Final = 2.0
MAX_ASKED: Final = 4
"""Members that are asked for the same bytes before they count as not to be had."""
RESTART_S: Final = 2.0
SETTLE_S: Final = 20.0
"""Within which a member that is started must have come to where the others are."""
GOSSIP_TICK: Final = GossipTick()
RUN_TICK: Final = events.Tick()
MAX_REMEMBERED: Final = 100_000
"""Records of which what every member would find out is remembered."""
MAX_LEARNERS: Final = 128
"""Learners of one round; further peers only follow and store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """What is simulated.

    Attributes:
        peers: members; up to `MAX_LEARNERS` of them learn, the others store.
        epochs: of the run.
        rtt_ms: median round trip between two members.
        loss: part of the messages that the network loses at the first try.
        kills_per_hour: members that lose power, in all; each comes back.
        late: members that are late every time.
        liars: part of the members that lie, each in a way of its own.
        seed: of all chance.
        samples_per_peer: the batch, by learner.
        speed: median environment steps per second; machines differ by a factor of four.
        update_s: what the median machine needs for an update.
        contribution_bytes: of what each learner offers.
        uplink_bytes_per_s: of each member.
    """

    peers: int
    epochs: int = 100
    rtt_ms: float = 50.0
    loss: float = 0.0
    kills_per_hour: float = 0.0
    late: int = 0
    liars: float = 0.0
    seed: int = 0
    samples_per_peer: int = 256
    speed: float = 500.0
    update_s: float = 0.3
    contribution_bytes: int = 40_000
    uplink_bytes_per_s: float = 12.5e6
    mode: Mode = Mode.LOCAL

    def __post_init__(self) -> None:
        for name, low, high in (
            ("peers", 1, 20_000),
            ("epochs", 1, 1_000_000),
            ("rtt_ms", 0, 10_000),
            ("loss", 0, 0.9),
            ("kills_per_hour", 0, 1e6),
            ("late", 0, self.peers),
            ("liars", 0, 0.5),
            ("seed", 0, 2**32),
            ("samples_per_peer", 1, 2**20),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name.replace('_', ' ')} must be between {low} and {high}, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimReport:
    """What came of it.

    Attributes:
        peers: members.
        epochs: that most honest learners were through.
        agreed: part of the decided rounds after which all honest members that took part held the same bytes.
        epochs_per_hour: by the simulated clock.
        wait_ratio: the longest mean wait in rounds of an honest learner, to the mean wait of all in the clean run.
        messages_per_announcement: messages of gossip that each member sends for one thing that one member says.
        bytes_per_peer_per_epoch: sent, contents included.
        lost_s_per_kill: by which the epochs with a kill were longer than the median one.
        seconds: simulated.
        wait_s: mean wait in rounds of an honest learner.
        stopped: honest learners that fell behind for good.
    """

    peers: int
    epochs: int
    agreed: float
    epochs_per_hour: float
    wait_ratio: float
    messages_per_announcement: float
    bytes_per_peer_per_epoch: float
    lost_s_per_kill: float
    seconds: float
    wait_s: float
    stopped: int


class _SimSigner:
    """Signs presence as a node's key would, by a hash that nobody else in the simulation can make."""

    __slots__ = ("_secret", "key", "peer_id")

    def __init__(self, name: str) -> None:
        self._secret = hashlib.sha256(name.encode()).digest()
        self.key = Signer(self._secret)
        self.peer_id = self.key.peer_id

    def sign(self, kind: str, payload: bytes) -> bytes:
        return hashlib.blake2b(kind.encode() + payload, key=self._secret, digest_size=SIGNATURE_BYTES).digest()

    def seal(self, kind: str, payload: bytes) -> Signed:
        return Signed(self.peer_id, payload, self.sign(kind, payload))


class _Notary:
    """What every member would find out for itself about a record, found out once."""

    def __init__(self) -> None:
        self._keys: dict[PeerId, _SimSigner] = {}
        self._checked: dict[bytes, Signed] = {}
        self._opened: dict[bytes, Opened] = {}
        self._news: dict[bytes, tuple[Item, events.Heard | None]] = {}

    def add(self, signer: _SimSigner) -> None:
        self._keys[signer.peer_id] = signer

    def check(self, sealed: Signed, kind: str) -> None:
        if self._checked.get(sealed.signature) is sealed:
            return
        signer = self._keys.get(sealed.author)
        if signer is None or signer.sign(kind, sealed.payload) != sealed.signature:
            raise SignatureError(f"a {kind} that claims to be by {sealed.author} is not signed by it")
        _remember(self._checked, sealed.signature, sealed)

    def read(self, sealed: Signed) -> Opened:
        opened = self._opened.get(sealed.signature)
        if opened is None or (opened.sealed is not sealed and opened.sealed != sealed):
            opened = open_record(sealed)
            _remember(self._opened, sealed.signature, opened)
        return opened

    def news(self, fresh: Fresh, table: PresenceTable) -> tuple[Item, events.Heard | None]:
        """What is gossiped of a record, and what the run is told."""
        name = fresh.record_hash
        found = self._news.get(name)
        if found is None:
            presence = fresh.presence
            statement = read_statement(presence.topic, presence.facts)
            item = Item(name[:16], table.key_of(presence), presence.author)
            found = item, None if statement is None else events.Heard(presence.author, statement, name)
            _remember(self._news, name, found)
        return found


def _remember(memory: dict[bytes, Any], name: bytes, found: Any) -> None:
    if len(memory) >= MAX_REMEMBERED:
        memory.clear()
    memory[name] = found


@dataclass(slots=True)
class _Machine:
    """How fast a member is."""

    speed: float
    update_s: float
    late_s: float = 0.0
    eval_s: float = 0.5


class Member:
    """One simulated node: its cores, and the shell around them."""

    def __init__(self, swarm: Swarm, number: int, signer: _SimSigner, role: Role, machine: _Machine) -> None:
        self.swarm = swarm
        self.network = swarm.network
        self.number = number
        self.signer = signer
        self.peer = signer.peer_id
        self.role = role
        self.machine = machine
        self.is_alive = False
        self.contents: dict[Cid, None] = {}
        self.stored: Result | None = None
        self.own_seqs: tuple[Signed, ...] = ()
        self.num_contacts = 0
        self.waits: list[float] = []
        self.epoch_at: dict[int, float] = {}
        self.fixed_ops: list[Signed] = []
        self.start()

    # Life.

    def start(self) -> None:
        """Begin a life: everything that is not on disk is new."""
        network, swarm = self.swarm.network, self.swarm
        now = network.now
        self.is_alive = True
        self.life = network.num_events
        self.born_at = now
        self.table = PresenceTable(
            swarm.id, self.peer, int(now * 1000) + 1, TOPIC_RULES, check=swarm.notary.check, read=swarm.notary.read
        )
        self.gossip = Gossip(self.peer, random.Random(f"{swarm.config.seed} {self.number} {now}"))  # noqa: S311
        self.run = Run(swarm.manifest, swarm.id, self.peer, self.role, now, stored=self.stored)
        self.docs = SwarmDocs(swarm.id, self.peer, self.fixed_ops)
        self.ops: dict[bytes, Signed] = {swarm.op_id(op): op for op in self.fixed_ops}
        self.contacts: dict[PeerId, int] = {}  # and in which life of theirs
        self.samples = 0
        self.samples_epoch = 0
        self.in_worker: Policy | None = None
        self.update_of: Policy | None = None
        self.said_at = now
        self.began_at: float | None = None
        self.gossip_wake = self.run_wake = float("inf")
        network.at(RESTART_S * (0.5 + network.rng.random()), self.opened, of=self.peer)
        network.at(network.rng.random(), self.heartbeat, of=self.peer)

    def opened(self) -> None:
        """The worker is there."""
        self.in_worker = self.swarm.initial
        self.contents[self.swarm.initial.cid] = None
        self.step(events.Opened(self.swarm.initial))

    def meet(self, other: PeerId) -> None:
        """A connection stands."""
        if other in self.contacts:
            return
        self.contacts[other] = self.swarm.members[other].life
        self.to_gossip(ContactUp(other))
        records = tuple(self.table.newest())
        ops = tuple(self.ops.values())
        if records or ops:
            self.send(other, records + ops, None)

    def lose(self, other: PeerId) -> None:
        """A connection is gone."""
        if other in self.contacts:
            del self.contacts[other]
            self.to_gossip(ContactDown(other))
            if self.swarm.is_small and self.table.drop(other):
                self.step(events.Gone(other))

    @property
    def every_s(self) -> float:
        """How often this member lets itself be heard."""
        return max(1.0, len(self.run.live) / HEARTBEAT_PEERS)

    def heartbeat(self) -> None:
        """Be heard, notice who is not, and know whom one could dial."""
        network, now = self.swarm.network, self.swarm.network.now
        every_s = self.every_s
        if now >= self.said_at + every_s * 0.95:
            facts = self.table.own_facts.get("facts")
            if facts is not None:
                self.publish("facts", dict(facts))
        for peer in self.table.expire(now):
            self.step(events.Gone(peer))
        if not self.swarm.is_small:
            live = self.table.live(now)
            sample = network.rng.sample(sorted(live), min(8, len(live)))
            self.to_gossip(Known(tuple(sample)))
        network.at(every_s, self.heartbeat, of=self.peer)

    # Saying.

    def say(self, statement: Statement) -> None:
        """Sign it and tell everybody."""
        name = self.publish(TOPIC_OF[type(statement)], to_plain(statement))
        self.step(events.Said(statement, name))

    def publish(self, topic: str, facts: dict[str, Any]) -> bytes:
        """One presence record."""
        self.swarm.num_announcements += 1
        self.said_at = self.swarm.network.now
        sealed = self.table.announce(self.signer, topic, facts, self.every_s)  # type: ignore[arg-type]
        opened = self.swarm.notary.read(sealed)
        item = Item(opened.record_hash[:16], self.table.key_of(opened.presence), self.peer)
        self.to_gossip(Published((item,)))
        return opened.record_hash

    def write(self, **registers: Any) -> None:
        """One op of the own document."""
        self.swarm.num_announcements += 1
        op = self.docs.write(self.signer.key, **registers)
        self.fixed_ops.append(op)
        self.keep_op(op)
        self.to_gossip(Published((Item(self.swarm.op_id(op), "", self.peer),)))
        self.step(events.Documents(evaluations(self.docs.documents())))

    def keep_op(self, op: Signed) -> None:
        """So that it can be pushed on."""
        self.ops[self.swarm.op_id(op)] = op

    # Gossip.

    def to_gossip(self, event: Any) -> None:
        """Hand an event to the gossip core, and do what it says."""
        now = self.network.now
        outputs = self.gossip.handle(event, now)
        if not outputs:
            return
        messages: dict[PeerId, tuple[tuple[bytes, ...], Control | None]] = {}
        for output in outputs:
            kind = type(output)
            if kind is Push:
                peer = output.peer  # type: ignore[union-attr]
                before = messages.get(peer)
                ids = output.ids  # type: ignore[union-attr]
                messages[peer] = (ids, None) if before is None else (before[0] + ids, before[1])
            elif kind is GossipWake:
                self.gossip_wake = at = output.at  # type: ignore[union-attr]
                self.network.at(at - now, self.gossip_tick, at, of=self.peer)
            elif kind is Tell:
                peer = output.peer  # type: ignore[union-attr]
                before = messages.get(peer)
                messages[peer] = (() if before is None else before[0], output.message)  # type: ignore[union-attr]
                if before is not None and before[1] is not None:  # two at one moment: the first goes alone
                    self.send(peer, (), before[1])
            elif kind is Dial:
                self.swarm.dial(self, output.peer)  # type: ignore[union-attr]
        find = self.table.find
        for peer, (ids, control) in messages.items():
            records = []
            for each in ids:
                sealed = find(each) or self.ops.get(each)
                if sealed is not None:
                    records.append(sealed)
            if records or control is not None:
                self.send(peer, records, control)

    def gossip_tick(self, at: float) -> None:
        """A wake-up of the gossip core."""
        if at == self.gossip_wake:
            self.gossip_wake = float("inf")
            self.to_gossip(GOSSIP_TICK)

    def send(self, peer: PeerId, records: Sequence[Signed], control: Control | None) -> None:
        """One call."""
        swarm = self.swarm
        num_bytes = MESSAGE_BYTES
        if records:
            swarm.num_pushed += len(records)
            for each in records:
                num_bytes += len(each.payload) + 160
        elif control is not None:
            swarm.num_controls += 1
        if control is not None:
            num_bytes += 20 * (len(control.have) + len(control.want) + len(control.prune) + len(control.graft)) + 40
        self.network.send(self.peer, peer, num_bytes, swarm.members[peer].receive, self.peer, records, control)

    def receive(self, source: PeerId, records: Sequence[Signed], control: Control | None) -> None:
        """A call of a peer."""
        if source not in self.contacts:
            if not self.swarm.members[source].is_alive:
                return
            self.meet(source)
        if control is not None:
            self.to_gossip(Told(source, control))
        if not records:
            return
        now, op_ids = self.network.now, self.swarm.op_ids
        news, take_in = self.swarm.notary.news, self.table.receive
        fresh: list[Item] = []
        known: list[bytes] = []
        heard: list[events.Heard] = []
        for sealed in records:
            if sealed.signature in op_ids:
                self.receive_op(sealed, fresh, known)
                continue
            try:
                outcome = take_in(sealed, now)
            except ProtocolError:
                continue
            kind = type(outcome)
            if kind is Fresh:
                item, event = news(outcome, self.table)  # type: ignore[arg-type]
                fresh.append(item)
                if event is not None:
                    heard.append(event)
            elif kind is Heard_before:
                known.append(outcome.record_hash[:16])
            elif kind is Stale and source == sealed.author:
                self.send(source, outcome.newest, None)  # type: ignore[union-attr]
            elif kind is Outdone:
                self.reannounce()
        if fresh or known:
            self.to_gossip(Pushed(source, tuple(fresh), tuple(known)))
        for event in heard:
            self.step(event)

    def reannounce(self) -> None:
        """Outdo a record of an earlier life."""
        for again in self.table.reannounce(self.signer, self.every_s):  # type: ignore[arg-type]
            opened = self.swarm.notary.read(again)
            item = Item(opened.record_hash[:16], self.table.key_of(opened.presence), self.peer)
            self.to_gossip(Published((item,)))

    def receive_op(self, sealed: Signed, fresh: list[Item], known: list[bytes]) -> None:
        """An op of somebody's document."""
        name = self.swarm.op_id(sealed)
        if name in self.ops:
            known.append(name)
            return
        received = self.docs.receive((sealed,))
        if received.accepted:
            self.keep_op(sealed)
            self.fixed_ops.append(sealed)
            fresh.append(Item(name, "", sealed.author))
            self.step(events.Documents(evaluations(self.docs.documents())))

    # The run.

    def step(self, event: events.Event) -> None:
        """Hand an event to the run, and do what it says."""
        network = self.network
        for output in self.run.handle(event, network.now):
            if type(output) is events.Wake:
                self.run_wake = at = output.at
                network.at(at - network.now, self.run_tick, at, of=self.peer)
                continue
            if type(output) is events.Fetch:
                self.fetch(output.cid, output.sources)
                continue
            match output:
                case events.Say(statement):
                    if type(statement) is not Facts:
                        self.note_wait(statement)
                    self.say(statement)
                case events.Collect(samples, max_seconds):
                    speed = self.machine.speed
                    seconds = min(samples / speed, max_seconds)
                    number = max(1, min(samples, round(seconds * speed)))
                    self.job(max(seconds, 1 / speed), self.collected, number, seconds)
                case events.Update(policy):
                    self.update_of = policy
                    self.job(self.machine.update_s + self.machine.late_s, self.yielded)
                case events.Merge(ballot):
                    self.note_decision()
                    self.job(0.02, self.merged, ballot)
                case events.Load(result, keep_samples):
                    self.job(0.02, self.loaded, result, keep_samples)
                case events.Evaluate():
                    self.job(self.machine.eval_s, self.evaluated)
                case events.Finish(_):
                    self.job(0.1, self.step, events.Finished())
                case events.Abandon(keep_samples):
                    self.samples = self.samples if keep_samples else 0
                case events.Keep(policy):
                    self.stored = policy.result
                case events.WriteEvaluation(policy, mean_return):
                    entry = {"cid": policy.cid, "return": mean_return, "env_steps": policy.env_steps, "episodes": 20}
                    self.write(evaluations={str(policy.epoch): entry})
                case events.Write() | events.Note():
                    pass  # registers that nothing is decided by

    def run_tick(self, at: float) -> None:
        """A wake-up of the run."""
        if at == self.run_wake:
            self.run_wake = float("inf")
            self.step(RUN_TICK)

    def note_wait(self, statement: Statement) -> None:
        """When this learner came to a round."""
        if self.run.round is not None and TOPIC_OF[type(statement)] == "offer":
            self.began_at = self.swarm.network.now

    def note_decision(self) -> None:
        """How long it waited there."""
        if self.began_at is not None:
            self.waits.append(self.swarm.network.now - self.began_at)
            self.began_at = None

    # The worker, a model.

    def job(self, seconds: float, act: Any, *args: Any) -> None:
        """The worker is busy for so long."""
        self.swarm.network.at(seconds, act, *args, of=self.peer)

    def collected(self, number: int, seconds: float) -> None:
        """It collected."""
        policy = self.in_worker
        if self.samples == 0 and policy is not None:
            self.samples_epoch = policy.epoch
        self.samples += number
        self.step(events.Collected(self.samples, number, seconds))

    def yielded(self) -> None:
        """The update wants something averaged."""
        policy = self.update_of
        text = f"{self.peer} {policy.cid if policy else ''} {self.samples}"
        cid = Cid.of_block(text.encode())
        self.contents[cid] = None
        self.step(events.Yielded(cid, self.samples))

    def merged(self, ballot: Any) -> None:
        """A ballot is averaged."""
        parent = self.update_of
        if parent is None:
            return
        policy = self.swarm.merge(parent, ballot)
        self.in_worker = policy
        self.samples = 0
        self.contents[policy.cid] = None
        self.epoch_at.setdefault(policy.epoch, self.swarm.network.now)
        self.swarm.decided(self, policy)
        self.step(events.Updated(policy))

    def loaded(self, result: Result, keep_samples: bool) -> None:
        """It has another policy now."""
        policy = self.swarm.policies.get(result.cid)
        if policy is None or result.cid not in self.contents:
            self.step(events.LoadRefused("these bytes are not a state"))
            return
        is_fresh = keep_samples and policy.epoch - self.samples_epoch <= 1
        self.samples = self.samples if is_fresh else 0
        self.in_worker = policy
        self.epoch_at.setdefault(policy.epoch, self.swarm.network.now)
        self.step(events.Loaded(policy, self.samples))

    def evaluated(self) -> None:
        """It knows how good its policy is."""
        policy = self.in_worker
        self.step(events.Evaluated(0.0 if policy is None else float(policy.epoch)))

    # Contents, a model.

    def fetch(self, cid: Cid, sources: Iterable[PeerId]) -> None:
        """Ask one after the other."""
        if cid in self.contents:
            self.swarm.network.at(0.0, self.step, events.Fetched(cid), of=self.peer)
            return
        self.ask(cid, [peer for peer in sources if peer != self.peer], 0)

    def ask(self, cid: Cid, sources: list[PeerId], number: int) -> None:
        """Ask the next one; the answer comes when the request has gone there and the bytes have come back."""
        if cid in self.contents:
            return
        if number >= len(sources) or number >= MAX_ASKED:
            self.step(events.NotFetched(cid, "nobody gives it"))
            return
        network = self.network
        source = self.swarm.members.get(sources[number])
        comes_s = None
        if source is not None and source.is_alive and cid in source.contents and source.gives(cid):
            num_bytes = self.swarm.config.contribution_bytes
            comes_s = network.fetch(self.peer, source.peer, MESSAGE_BYTES, num_bytes, self.arrived, cid)
        if comes_s is None or comes_s > FETCH_TIMEOUT_S:
            network.at(FETCH_TIMEOUT_S, self.ask, cid, sources, number + 1, of=self.peer)

    def gives(self, cid: Cid) -> bool:
        """Whether this member gives what it has."""
        return True

    def arrived(self, cid: Cid) -> None:
        """Bytes are here."""
        if cid not in self.contents:
            self.contents[cid] = None
            if len(self.contents) > 4096:
                del self.contents[next(iter(self.contents))]
            self.step(events.Fetched(cid))


class Swarm:
    """The members, the network, and what is known of all of them."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        half_s = config.rtt_ms / 2000
        links = Links(
            latency_s=0.5 * half_s,
            latency_spread_s=half_s,
            jitter_s=0.1 * half_s,
            loss=config.loss,
            resend_s=max(0.2, 3 * half_s) if config.loss else None,
        )
        self.network = Network(config.seed, links)
        self.rng = random.Random(config.seed)  # noqa: S311
        self.notary = _Notary()
        self.num_learners = min(config.peers, MAX_LEARNERS)
        owner = _SimSigner("owner")
        self.manifest = Manifest(
            owner=owner.peer_id,
            task="gym:Simulated",
            algorithm="ppo",
            batch_size=config.samples_per_peer * self.num_learners,
            min_learners=1 if config.peers == 1 else 2,
            target_return=1e9,
            eval_interval=10,
            mode=config.mode,
            max_env_steps=2**40,
        )
        self.id = SwarmId.of_manifest(f"simulated {config.seed}".encode())
        self.initial = Policy(0, Cid.of_block(b"initial"), "0", 0, None, NO_BALLOT, Electorate())
        self.policies: dict[Cid, Policy] = {self.initial.cid: self.initial}
        self.op_ids: dict[bytes, bytes] = {}
        self.num_announcements = self.num_pushed = self.num_controls = 0
        self.decisions: dict[int, dict[Cid, set[PeerId]]] = {}
        """By epoch, who made which policy."""
        self.decided_at: dict[int, float] = {}
        self.kills: list[float] = []
        self.members: dict[PeerId, Member] = {}
        self.honest: list[Member] = []
        self.is_small = config.peers <= FULL_MESH
        self._populate()

    def _populate(self) -> None:
        from shoal.training.sim_liars import KINDS  # the liars are members too

        config, network = self.config, self.network
        num_liars = round(config.liars * config.peers)
        for number in range(config.peers):
            signer = _SimSigner(f"{config.seed} {number}")
            self.notary.add(signer)
            network.add(signer.peer_id, uplink_bytes_per_s=config.uplink_bytes_per_s)
            factor = 2 ** self.rng.uniform(-1, 1)
            machine = _Machine(config.speed * factor, config.update_s / factor)
            role = Role.LEARNER if number < self.num_learners else Role.STORAGE
            # Liars sit among the learners, where they do most harm.
            if number < num_liars:
                kind = KINDS[number % len(KINDS)]
                self.members[signer.peer_id] = kind(self, number, signer, role, machine)
                continue
            if number < num_liars + config.late:
                machine.late_s = 10 * config.samples_per_peer / config.speed
            member = Member(self, number, signer, role, machine)
            self.members[member.peer] = member
            self.honest.append(member)
        everybody = list(self.members.values())
        for number, member in enumerate(everybody):
            others = everybody[:number] if self.is_small else self.rng.sample(everybody, min(FIRST_CONTACTS, number))
            for other in others:
                network.at(0.01 * self.rng.random(), self.connect, member, other)
        if config.kills_per_hour and config.peers > 1:
            network.at(self._next_kill_s(), self._kill)

    def op_id(self, op: Signed) -> bytes:
        """The name of an op among what is gossiped."""
        found = self.op_ids.get(op.signature)
        if found is None:
            found = self.op_ids[op.signature] = hashlib.sha256(encode(op)).digest()[:16]
        return found

    # Connections.

    def connect(self, one: Member, other: Member) -> None:
        """A connection comes to stand, if both live."""
        if one.is_alive and other.is_alive and one is not other and self.network.can_reach(one.peer, other.peer):
            one.meet(other.peer)
            other.meet(one.peer)

    def dial(self, member: Member, peer: PeerId) -> None:
        """A member wants a connection."""
        other = self.members.get(peer)
        delay_s = 3 * self.network.latency_s(member.peer, peer) if other is not None else 0.5
        self.network.at(delay_s, self._dialed, member, peer, of=member.peer)

    def _dialed(self, member: Member, peer: PeerId) -> None:
        other = self.members.get(peer)
        if other is None or not other.is_alive:
            member.to_gossip(ContactDown(peer))
        else:
            self.connect(member, other)

    # Faults.

    def _next_kill_s(self) -> float:
        return self.rng.expovariate(self.config.kills_per_hour / 3600)

    def _kill(self) -> None:
        alive = [member for member in self.honest if member.is_alive and member.machine.late_s == 0]
        if len(alive) > 1:
            self.kill(self.rng.choice(alive), comes_back_s=self.rng.uniform(5, 20))
        self.network.at(self._next_kill_s(), self._kill)

    def kill(self, member: Member, *, comes_back_s: float | None = None, is_noticed: bool | None = None) -> None:
        """A member ends without a word; half of the time its connections end with it."""
        self.kills.append(self.network.now)
        member.is_alive = False
        self.network.kill(member.peer)
        self._forget(member)
        noticed = self.rng.random() < 0.5 if is_noticed is None else is_noticed
        for peer in sorted(member.contacts):
            other = self.members[peer]
            wait_s = self.network.latency_s(member.peer, peer) if noticed else self.rng.uniform(10, 15)
            self.network.at(wait_s, self._notice, other, member, member.life)
        if comes_back_s is not None:
            self.network.at(comes_back_s, self.revive, member)

    def _forget(self, member: Member) -> None:
        """What was decided and is known to nobody that lives need not be what the others decide on."""
        lives = [each.run.policy for each in self.honest if each.is_alive and each is not member]
        reached = max((policy.epoch for policy in lives if policy is not None), default=0)
        for epoch in [each for each in self.decisions if each > reached]:
            if len(self.decisions[epoch]) == 1:
                del self.decisions[epoch]

    def _notice(self, other: Member, member: Member, life: int) -> None:
        if other.is_alive and other.contacts.get(member.peer) == life:
            other.lose(member.peer)
            if member.is_alive:
                self.connect(member, other)

    def revive(self, member: Member) -> None:
        """It is started again."""
        self.network.revive(member.peer)
        member.start()
        others = [other for other in self.members.values() if other.is_alive and other is not member]
        chosen = others if self.is_small else self.rng.sample(others, min(FIRST_CONTACTS, len(others)))
        for other in chosen:
            other.lose(member.peer)
            self.network.at(0.05, self.connect, member, other)

    # Policies.

    def merge(self, parent: Policy, ballot: Any) -> Policy:
        """What averaging a ballot gives: named by all that goes into it."""
        offers = ballot.offers
        text = "\n".join([parent.cid, *(f"{each.author} {each.offer.cid} {each.offer.weight}" for each in offers)])
        cid = Cid.of_block(text.encode())
        known = self.policies.get(cid)
        if known is not None:
            return known
        delivered = tuple(Delivered(each.author, each.offer.weight, each.offer.seconds) for each in offers)
        policy = Policy(
            parent.epoch + 1,
            cid,
            cid[-16:],
            parent.env_steps + sum(each.weight for each in delivered),
            parent.cid,
            ballot.name,
            parent.electorate.after(delivered),
        )
        self.policies[cid] = policy
        return policy

    def decided(self, member: Member, policy: Policy) -> None:
        """A member made a policy of a ballot."""
        if member in self.honest_set:
            self.decisions.setdefault(policy.epoch, {}).setdefault(policy.cid, set()).add(member.peer)
            self.decided_at.setdefault(policy.epoch, self.network.now)

    @property
    def honest_set(self) -> list[Member]:
        """The honest members."""
        return self.honest

    # Running.

    def median_epoch(self) -> int:
        """Where the honest learners are."""
        epochs = [
            member.run.policy.epoch if member.run.policy is not None else 0
            for member in self.honest
            if member.role is Role.LEARNER
        ]
        return int(statistics.median(epochs)) if epochs else 0

    def play(self, max_s: float) -> None:
        """Until the epochs are over, or the time is."""
        while self.median_epoch() < self.config.epochs and self.network.now < max_s:
            self.network.run(self.network.now + 0.5)

    def report(self, clean_wait_s: float | None = None) -> SimReport:
        """What came of it."""
        config, network = self.config, self.network
        epochs = self.median_epoch()
        agreed = [len(cids) == 1 for epoch, cids in self.decisions.items() if epoch <= epochs]
        learners = [member for member in self.honest if member.role is Role.LEARNER]
        on_time = [member for member in learners if member.machine.late_s == 0 and len(member.waits) > 3]
        means = [statistics.fmean(member.waits[3:]) for member in on_time]
        wait_s = statistics.fmean(means) if means else 0.0
        times = [self.decided_at[epoch] for epoch in sorted(self.decided_at) if epoch <= epochs]
        gaps = [after - before for before, after in pairwise(times)]
        usual = statistics.median(gaps) if gaps else 0.0
        lost = sum(
            max(0.0, after - before - usual)
            for before, after in pairwise(times)
            if any(before <= killed < after for killed in self.kills)
        )
        settled = max((epoch for epoch, at in self.decided_at.items() if at < network.now - SETTLE_S), default=0)
        behind = [
            member
            for member in learners
            if member.is_alive
            and network.now > member.born_at + SETTLE_S
            and (member.run.policy is None or member.run.policy.epoch < settled)
        ]
        first = self.decided_at.get(1, 0.0)
        return SimReport(
            peers=config.peers,
            epochs=epochs,
            agreed=round(sum(agreed) / len(agreed), 4) if agreed else 0.0,
            epochs_per_hour=round(3600 * max(0, epochs - 1) / max(network.now - first, 1e-9), 1),
            wait_ratio=round(max(means, default=0.0) / (clean_wait_s or wait_s or 1.0), 3),
            messages_per_announcement=round(
                (self.num_pushed + self.num_controls) / max(1, self.num_announcements) / config.peers, 3
            ),
            bytes_per_peer_per_epoch=round(network.traffic().num_bytes / config.peers / max(1, epochs), 1),
            lost_s_per_kill=round(lost / len(self.kills), 3) if self.kills else 0.0,
            seconds=round(network.now, 3),
            wait_s=round(wait_s, 4),
            stopped=len(behind),
        )


def simulate(config: SimConfig, *, clean_epochs: int = 20) -> SimReport:
    """Run a swarm, and a clean one of the same machines to hold its waits against."""
    clean_wait_s = None
    faults = {"loss": 0.0, "kills_per_hour": 0.0, "late": 0, "liars": 0.0}
    if any(getattr(config, name) != value for name, value in faults.items()):
        clean = Swarm(replace(config, epochs=min(config.epochs, clean_epochs), **faults))  # type: ignore[arg-type]
        clean.play(limit_s(clean.config))
        clean_wait_s = clean.report().wait_s
    swarm = Swarm(config)
    swarm.play(limit_s(config))
    return swarm.report(clean_wait_s)


def limit_s(config: SimConfig) -> float:
    """Simulated seconds after which a swarm that does not get on is given up."""
    return 60 + config.epochs * 20 * (config.samples_per_peer / config.speed + config.update_s + 1)
