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

import gc
import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Final

from shoal.crdt.gossip_messages import ContactDown
from shoal.protocol.codec import encode
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signed
from shoal.protocol.sim import Links, Network
from shoal.training.electorate import Delivered, Electorate
from shoal.training.exchange.ballots import Ballot
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.run_events import Policy
from shoal.training.sim_liars import KINDS
from shoal.training.sim_member import (
    Machine,
    Member,
    Notary,
    SimSigner,
)
from shoal.training.statements import NO_BALLOT

FULL_MESH: Final = 32
"""Members up to which all are connected, as in `shoal.node.swarm.replica`."""
FIRST_CONTACTS: Final = 3
RESEND_RTTS: Final = 2.0
"""Round trips after which what was lost is sent again: TCP's tail loss probe (RFC 8985)."""
MIN_RESEND_S: Final = 0.02
SETTLE_S: Final = 20.0
"""Within which a member that is started must have come to where the others are."""
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
        samples_per_peer: that the fastest learner collects for an epoch.
        speed: median environment steps per second; machines differ by a factor of four.
        update_s: what the median machine needs for an update.
        contribution_bytes: of what each learner offers.
        uplink_bytes_per_s: of each member.
        exchanges: of one update; more than one in mode ``gradient``.
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
    exchanges: int = 1

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
        wait_ratio: the longest mean wait in rounds of an honest learner, to the mean wait of all in the clean run: of
            the same machines and links, without kills, late members and liars.
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
            resend_s=max(MIN_RESEND_S, RESEND_RTTS * 2 * half_s) if config.loss else None,
        )
        self.network = Network(config.seed, links)
        self.rng = Random(config.seed)  # noqa: S311
        self.notary = Notary()
        self.num_learners = min(config.peers, MAX_LEARNERS)
        owner = SimSigner("owner")
        self.manifest = Manifest(
            owner=owner.peer_id,
            task="gym:Simulated",
            algorithm="ppo",
            batch_per_learner=config.samples_per_peer,
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
        config, network = self.config, self.network
        num_liars = round(config.liars * config.peers)
        for number in range(config.peers):
            signer = SimSigner(f"{config.seed} {number}")
            self.notary.add(signer)
            network.add(signer.peer_id, uplink_bytes_per_s=config.uplink_bytes_per_s)
            factor = 2 ** self.rng.uniform(-1, 1)
            machine = Machine(config.speed * factor, config.update_s / factor)
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

    def merge(self, parent: Policy, ballots: Sequence[Ballot]) -> Policy:
        """What averaging one ballot after the other gives: named by all that goes into it."""
        offers = ballots[0].offers
        given = [f"{each.author} {each.offer.cid} {each.offer.weight}" for ballot in ballots for each in ballot.offers]
        text = "\n".join([parent.cid, *given])
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
            ballots[0].name,
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
        was_enabled = gc.isenabled()
        gc.disable()  # a quarter of the time would go into looking for circles, of which hardly any are made
        try:
            while self.median_epoch() < self.config.epochs and self.network.now < max_s:
                self.network.run(self.network.now + 0.5)
        finally:
            if was_enabled:
                gc.enable()

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
    faults = {"kills_per_hour": 0.0, "late": 0, "liars": 0.0}
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
