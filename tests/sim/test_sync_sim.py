"""Thirty nodes that write, lose messages and are parted: pairwise sync with random others brings them together.

So it does though some of them keep two logs, by a restored backup or on purpose.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from shoal.crdt import oplog
from shoal.crdt.document import Document
from shoal.crdt.oplog import KIND, NO_OP, Fork, Op, open_op
from shoal.crdt.snapshots import NAME_BYTES, places
from shoal.crdt.sync import Received, SwarmDocs
from shoal.crdt.views import best_policy, contributions
from shoal.protocol.codec import encode
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer

NODES = 30
SWARM = SwarmId.of_manifest(b"simulated")
SIGNERS = [Signer(bytes([n]) * 32) for n in range(1, NODES + 1)]


class Swarm:
    """Nodes, a network between them that is parted and loses messages, and what they stored."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nodes = [SwarmDocs(SWARM, signer.peer_id) for signer in SIGNERS]
        self.disks: list[list[Signed]] = [[] for _ in SIGNERS]
        self.forks: list[dict[PeerId, Fork]] = [{} for _ in SIGNERS]
        self.parts = [0] * NODES
        self.loss = 0.0
        self.delivered = 0

    def write(self, at: int, epoch: int) -> None:
        if SIGNERS[at].peer_id in self.nodes[at].frozen:
            return
        op = self.nodes[at].write(
            SIGNERS[at],
            member={"role": "learner", "left": False},
            policy={"epoch": epoch, "cid": Cid.of_block(bytes([epoch])), "env_steps": epoch, "digest": ""},
            contributions={"env_steps": epoch * 100 + at, "rounds": epoch},
        )
        self.disks[at].append(op)

    def restart(self, at: int) -> None:
        self.nodes[at] = SwarmDocs(SWARM, SIGNERS[at].peer_id, self.disks[at], self.forks[at].values())

    def restore(self, at: int) -> None:
        """Put a backup of a node in its place, in which the newest of its own ops are missing."""
        own = [op for op in self.disks[at] if op.author == SIGNERS[at].peer_id]
        lost = {op.signature for op in own[self.rng.randint(0, len(own)) :]}
        self.disks[at] = [op for op in self.disks[at] if op.signature not in lost]
        self.restart(at)

    def lie(self, at: int) -> None:
        """Sign any op for a place in the own log, and show it to somebody."""
        own = [open_op(op) for op in self.disks[at] if op.author == SIGNERS[at].peer_id]
        like = self.rng.choice(own) if own else None
        seq = 1 if like is None else self.rng.choice((like.seq, own[-1].seq + 1))
        fits = like is not None and seq == like.seq and self.rng.random() < 0.7
        trail = self.rng.randbytes(NAME_BYTES * len(places(seq))) if self.rng.random() < 0.3 else None
        op = Op(
            swarm=SWARM,
            author=SIGNERS[at].peer_id,
            seq=seq,
            prev=NO_OP if seq == 1 else like.prev if fits and like else self.rng.randbytes(32),
            lamport=self.rng.choice((1, 2**40)),
            update=Document().set({"lie": self.rng.random()}),
            trail=trail,
        )
        self.receive(self.rng.randrange(NODES), [SIGNERS[at].seal(KIND, encode(op))])

    def receive(self, at: int, ops: list[Signed]) -> Received:
        received = self.nodes[at].receive(ops)
        for fork in received.forks:
            self.forks[at][fork.author] = fork
            self.disks[at] = [op for op in self.disks[at] if op.author != fork.author or open_op(op).seq < fork.seq]
        self.disks[at] += received.accepted
        return received

    def round(self) -> None:
        """Every node asks one random other."""
        for at in self.rng.sample(range(NODES), NODES):
            other = self.rng.randrange(NODES)
            lost = self.rng.random() < self.loss or self.rng.random() < self.loss
            if other == at or lost or self.parts[at] != self.parts[other]:
                continue
            ops = self.nodes[other].missing(self.nodes[at].version(), 20_000)
            self.rng.shuffle(ops)
            received = self.receive(at, ops)
            assert received.rejected == () or self.frozen
            self.delivered += len(ops)

    @property
    def frozen(self) -> set[PeerId]:
        return {author for node in self.nodes for author in node.frozen}

    @property
    def is_agreed(self) -> bool:
        return all(one.version() == other.version() for one, other in pairwise(self.nodes))


@pytest.mark.parametrize("seed", range(3))
def test_a_parted_and_lossy_swarm_comes_together(seed: int) -> None:
    print(f"seed {seed}")  # pytest shows it when the test fails
    swarm = Swarm(seed)
    swarm.loss = 0.3
    for epoch in range(1, 9):
        swarm.parts = [swarm.rng.randrange(3) for _ in range(NODES)]
        for at in range(NODES):
            if swarm.rng.random() < 0.7:
                swarm.write(at, epoch)
        swarm.round()
        swarm.restart(swarm.rng.randrange(NODES))
    assert not swarm.is_agreed

    swarm.parts = [0] * NODES
    rounds = 0
    while not swarm.is_agreed:
        swarm.round()
        rounds += 1
        assert rounds < 60, f"seed {seed}: not agreed after {rounds} rounds"
    documents = swarm.nodes[0].documents()
    assert all(node.documents() == documents for node in swarm.nodes)
    best = best_policy(documents)
    assert best is not None
    assert best.epoch == 8
    assert len(contributions(documents)) == NODES
    # An op reaches each node once; what a node already has is not sent to it again.
    assert swarm.delivered == swarm.nodes[0].num_ops * (NODES - 1), f"seed {seed}: {swarm.delivered} ops were sent"


@pytest.mark.parametrize("seed", range(3))
def test_one_fact_reaches_everybody_in_a_logarithmic_number_of_rounds(seed: int) -> None:
    print(f"seed {seed}")
    swarm = Swarm(seed)
    swarm.write(0, 1)
    rounds = 0
    while not swarm.is_agreed:
        swarm.round()
        rounds += 1
    assert rounds <= 4 * math.log2(NODES), f"seed {seed}: {rounds} rounds"


@pytest.mark.parametrize(("seed", "compact_ops"), [(0, 4), (1, 4), (2, 4), (3, 4), (4, 256), (5, 256)])
def test_whoever_keeps_two_logs_ends_the_same_everywhere_and_nobody_else_is_held_up(
    seed: int, compact_ops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {seed}")
    monkeypatch.setattr(oplog, "COMPACT_OPS", compact_ops)
    swarm = Swarm(seed)
    swarm.loss = 0.3
    suspects = range(8)
    for epoch in range(1, 13):
        swarm.parts = [swarm.rng.randrange(3) for _ in range(NODES)]
        for at in range(NODES):
            if swarm.rng.random() < 0.7:
                swarm.write(at, epoch)
        swarm.restore(swarm.rng.choice(suspects[:4]))
        swarm.lie(swarm.rng.choice(suspects[4:]))
        swarm.round()
        swarm.restart(swarm.rng.randrange(NODES))

    swarm.parts = [0] * NODES
    rounds = 0
    while not swarm.is_agreed:
        swarm.round()
        rounds += 1
        assert rounds < 100, f"seed {seed}: not agreed after {rounds} rounds"
    assert swarm.frozen
    assert swarm.frozen <= {SIGNERS[at].peer_id for at in suspects}
    assert all(node.frozen.keys() == swarm.frozen for node in swarm.nodes)
    assert all(node.documents() == swarm.nodes[0].documents() for node in swarm.nodes)
    swarm.delivered = 0
    for _ in range(3):
        swarm.round()
        swarm.restart(swarm.rng.randrange(NODES))
    assert swarm.delivered == 0, f"seed {seed}: {swarm.delivered} ops were sent that nobody takes"
    swarm.write(29, 20)
    while not swarm.is_agreed:
        swarm.round()
    assert best_policy(swarm.nodes[0].documents()).epoch == 20  # type: ignore[union-attr]  # None would fail as well
