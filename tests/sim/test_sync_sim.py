"""Thirty nodes that write, lose messages and are parted: pairwise sync with random others brings them together."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from shoal.crdt.sync import SwarmDocs
from shoal.crdt.views import best_policy, contributions
from shoal.protocol.ids import Cid, SwarmId
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
        self.parts = [0] * NODES
        self.loss = 0.0
        self.delivered = 0

    def write(self, at: int, epoch: int) -> None:
        op = self.nodes[at].write(
            SIGNERS[at],
            member={"role": "learner", "left": False},
            policy={"epoch": epoch, "cid": Cid.of_block(bytes([epoch])), "env_steps": epoch, "digest": ""},
            contributions={"env_steps": epoch * 100 + at, "rounds": epoch},
        )
        self.disks[at].append(op)

    def restart(self, at: int) -> None:
        self.nodes[at] = SwarmDocs(SWARM, SIGNERS[at].peer_id, self.disks[at])

    def round(self) -> None:
        """Every node asks one random other."""
        for at in self.rng.sample(range(NODES), NODES):
            other = self.rng.randrange(NODES)
            lost = self.rng.random() < self.loss or self.rng.random() < self.loss
            if other == at or lost or self.parts[at] != self.parts[other]:
                continue
            ops = self.nodes[other].missing(self.nodes[at].version(), 20_000)
            self.rng.shuffle(ops)
            received = self.nodes[at].receive(ops)
            assert received.rejected == ()
            self.disks[at] += received.accepted
            self.delivered += len(ops)

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
