"""One member of a simulated swarm: its real cores, and the shell around them.

`shoal.training.sim` says what is real here and what is a model. What many members would find out alike about a record
(that it is signed, what it says) is found out once, by the notary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final

from shoal.crdt.gossip import Gossip
from shoal.crdt.gossip_messages import (
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Item,
    Known,
    Published,
    Push,
    Pushed,
    Tell,
    Told,
)
from shoal.crdt.gossip_messages import Tick as GossipTick
from shoal.crdt.gossip_messages import Wake as GossipWake
from shoal.crdt.meeting import BUCKET_BYTES, Differing, differing, lacking, summary
from shoal.crdt.presence import Fresh, Opened, Outdone, PresenceTable, Stale, open_record
from shoal.crdt.presence import Known as Heard_before
from shoal.crdt.sync import SwarmDocs, Version
from shoal.crdt.views import evaluations
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import ProtocolError, SignatureError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import SIGNATURE_BYTES, Signed, Signer
from shoal.training import run_events as events
from shoal.training.exchange.ballots import Ballot
from shoal.training.exchange.direct import Part
from shoal.training.manifest import Role
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.statements import TOPIC_OF, TOPIC_RULES, Facts, Result, RoundKey, Statement, read_statement

if TYPE_CHECKING:
    from shoal.training.sim import Swarm

HEARTBEAT_PEERS: Final = 64
"""As `shoal.node.swarm.speaking.HEARTBEAT_MEMBERS`."""
LOOK_S: Final = 2.0
"""How often it is noticed at least who is gone."""
MERGE_S: Final = 0.02
"""What an average takes, and loading a state."""
MESSAGE_BYTES: Final = 120
"""What a call adds to its content."""
HEAD_BYTES: Final = 120
"""One author and how far somebody is with it."""
PUSH_BYTES: Final = 200 * 1024
"""As `shoal.node.swarm.waiting.PUSH_BYTES`."""
FETCH_TIMEOUT_S: Final = 2.0
MAX_ASKED: Final = 4
"""Members that are asked for the same bytes before they count as not to be had."""
RESTART_S: Final = 2.0
GOSSIP_TICK: Final = GossipTick()
RUN_TICK: Final = events.Tick()
MAX_REMEMBERED: Final = 100_000
"""Records of which what every member would find out is remembered."""


class SimSigner:
    """Signs presence as a node's key would, by a hash that nobody else in the simulation can make."""

    __slots__ = ("_secret", "key", "peer_id")

    def __init__(self, name: str) -> None:
        self._secret = hashlib.sha256(name.encode()).digest()
        self.key = Signer(self._secret)
        self.peer_id = self.key.peer_id

    def sign(self, kind: str, payload: bytes) -> bytes:
        """As `shoal.protocol.signing.Signer.sign`."""
        return hashlib.blake2b(kind.encode() + payload, key=self._secret, digest_size=SIGNATURE_BYTES).digest()

    def seal(self, kind: str, payload: bytes) -> Signed:
        """As `shoal.protocol.signing.Signer.seal`."""
        return Signed(self.peer_id, payload, self.sign(kind, payload))


class Notary:
    """What every member would find out for itself about a record, found out once."""

    def __init__(self) -> None:
        self._keys: dict[PeerId, SimSigner] = {}
        self._checked: dict[bytes, Signed] = {}
        self._opened: dict[bytes, Opened] = {}
        self._news: dict[bytes, tuple[Item, events.Heard | None]] = {}

    def add(self, signer: SimSigner) -> None:
        """One more member."""
        self._keys[signer.peer_id] = signer

    def check(self, sealed: Signed, kind: str) -> None:
        """As `shoal.protocol.signing.Signed.check`."""
        if self._checked.get(sealed.signature) is sealed:
            return
        signer = self._keys.get(sealed.author)
        if signer is None or signer.sign(kind, sealed.payload) != sealed.signature:
            raise SignatureError(f"a {kind} that claims to be by {sealed.author} is not signed by it")
        _remember(self._checked, sealed.signature, sealed)

    def read(self, sealed: Signed) -> Opened:
        """As `shoal.crdt.presence.open_record`."""
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
class Machine:
    """How fast a member is."""

    speed: float
    update_s: float
    late_s: float = 0.0
    eval_s: float = 0.5


class Member:
    """One simulated node: its cores, and the shell around them."""

    def __init__(self, swarm: Swarm, number: int, signer: SimSigner, role: Role, machine: Machine) -> None:
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
        self.gossip = Gossip(self.peer, Random(f"{swarm.config.seed} {self.number} {now}"))  # noqa: S311
        self.run = Run(swarm.manifest, swarm.id, self.peer, self.role, now, stored=self.stored)
        self.docs = SwarmDocs(swarm.id, self.peer, self.fixed_ops)
        self.ops: dict[bytes, Signed] = {swarm.op_id(op): op for op in self.fixed_ops}
        self.contacts: dict[PeerId, int] = {}  # and in which life of theirs
        self.samples = 0
        self.samples_epoch = 0
        self.waits_since = 0.0  # its update waits for an average
        self.in_worker: Policy | None = None
        self.update_of: Policy | None = None
        self.ballots: list[Ballot] = []  # merged in this update
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
        self.ask_what_differs(other)

    def ask_what_differs(self, other: PeerId) -> None:
        """As the node's shell does when it meets somebody: what it says to this, it is given."""
        ours, version = summary(self.table), self.docs.version()
        num_bytes = MESSAGE_BYTES + len(ours) + HEAD_BYTES * len(version.heads)
        self.swarm.num_controls += 1
        self.network.send(
            self.peer, other, num_bytes, self.swarm.members[other].say_what_differs, self.peer, ours, version
        )

    def say_what_differs(self, other: PeerId, theirs: bytes, version: Version) -> None:
        """The answer."""
        answer, ours = differing(self.table, theirs), self.docs.version()
        num_bytes = MESSAGE_BYTES + len(answer.buckets) + len(answer.rows) + HEAD_BYTES * len(ours.heads)
        self.swarm.num_controls += 1
        asker = self.swarm.members[other]
        self.network.send(self.peer, other, num_bytes, asker.give, self.peer, len(theirs) // BUCKET_BYTES, answer, ours)

    def give(self, other: PeerId, num_buckets: int, answer: Differing, version: Version) -> None:
        """What the other lacks."""
        lacks = [*lacking(self.table, num_buckets, answer), *self.docs.missing(version, PUSH_BYTES)]
        if lacks:
            self.send(other, lacks, None)

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
            sample = network.rng.sample(list(live), min(8, len(live)))
            self.to_gossip(Known(tuple(sample)))
        network.at(min(every_s, LOOK_S), self.heartbeat, of=self.peer)

    # Saying.

    def say(self, statement: Statement) -> None:
        """Sign it and tell everybody."""
        name = self.publish(TOPIC_OF[type(statement)], to_plain(statement))
        self.step(events.Said(statement, name))

    def publish(self, topic: str, facts: dict[str, Any]) -> bytes:
        """One presence record."""
        self.swarm.num_announcements += 1
        self.said_at = self.swarm.network.now
        record = self.table.announce(self.signer, topic, facts, self.every_s)  # type: ignore[arg-type]
        self.spread(record)
        return record.record_hash

    def spread(self, record: Opened) -> None:
        """An own record to the members."""
        self.to_gossip(Published((Item(record.item, self.table.key_of(record.presence), self.peer),)))

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
            self.spread(again)

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
                case events.Give(part, members):
                    self.give_part(part, members)
                case events.Update(policy):
                    self.update_of = policy
                    self.ballots = []
                    self.job(self.machine.update_s + self.machine.late_s, self.yielded)
                case events.Merge(ballot):
                    self.note_decision()
                    self.job(MERGE_S, self.merged, ballot)
                case events.Load(result, keep_samples):
                    self.job(MERGE_S, self.loaded, result, keep_samples)
                case events.Evaluate():
                    self.job(self.machine.eval_s, self.evaluated)
                case events.Finish(_):
                    self.job(0.1, self.step, events.Finished())
                case events.Abandon(keep_samples):
                    self.samples = self.samples if keep_samples else 0
                case events.Keep(policy):
                    self.stored = policy.result
                case events.WriteEvaluation(policy, mean_return, _):
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
        policy, self.waits_since = self.update_of, self.swarm.network.now
        text = f"{self.peer} {policy.cid if policy else ''} {self.samples}" + " again" * len(self.ballots)
        cid = Cid.of_block(text.encode())
        self.contents[cid] = None
        is_last = len(self.ballots) + 1 >= self.swarm.config.exchanges
        self.step(events.Yielded(cid, self.samples, is_last=is_last))

    def merged(self, ballot: Ballot) -> None:
        """A ballot is averaged."""
        parent = self.update_of
        if parent is None:
            return
        self.ballots.append(ballot)
        if len(self.ballots) < self.swarm.config.exchanges:
            self.yielded()
            return
        policy = self.swarm.merge(parent, self.ballots)
        ahead = self.collected_ahead()
        self.in_worker, self.samples_epoch = policy, policy.epoch
        self.samples = 0 if ahead is None else ahead.samples
        self.contents[policy.cid] = None
        self.epoch_at.setdefault(policy.epoch, self.swarm.network.now)
        self.swarm.decided(self, policy)
        self.step(events.Updated(policy, ahead=ahead))

    def collected_ahead(self) -> events.Collected | None:
        """While the update waited, where it is done after that."""
        waited_s, speed = self.swarm.network.now - MERGE_S - self.waits_since, self.machine.speed
        number = min(int(waited_s * speed), self.swarm.manifest.batch.largest_share)
        if self.swarm.config.exchanges > 1 or number < 1:
            return None
        return events.Collected(number, number, number / speed)

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

    # Parts that go directly.

    def give_part(self, part: Part, members: Iterable[PeerId]) -> None:
        """One call to each."""
        num_bytes = MESSAGE_BYTES + self.swarm.config.contribution_bytes
        for peer in members:
            self.network.send(self.peer, peer, num_bytes, self.swarm.members[peer].take_part, self.peer, part)

    def take_part(self, author: PeerId, part: Part) -> None:
        """A call of a member."""
        if author in self.run.live:
            self.step(events.Given(author, part))

    def not_given(self, peer: PeerId, key: RoundKey) -> None:
        """A call failed at once."""
        self.network.at(0.0, self.step, events.NotGiven(peer, key, "there is no connection"), of=self.peer)

    # Contents, a model.

    def fetch(self, cid: Cid, sources: Iterable[PeerId]) -> None:
        """Ask one after the other."""
        if cid in self.contents:
            self.swarm.network.at(0.0, self.step, events.Fetched(cid), of=self.peer)
            return
        asked = [peer for peer in sources if peer != self.peer]
        if len(asked) > MAX_ASKED:  # of many that have it, each member begins with another
            first = self.number % len(asked)
            asked = [*asked[first:], *asked[:first]]
        self.ask(cid, asked, 0)

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
