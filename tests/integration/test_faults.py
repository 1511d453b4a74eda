"""Peers are killed, stopped, slowed and cut off: the others go on meanwhile, and each of them contributes again after.

Real nodes and workers on machines of their own, real faults. Nothing here depends on how fast this machine is: what is
waited for is progress, for as long as it takes. What faults cost in time, ``benchmarks/faults.py`` measures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from tests.lab import ground
from tests.lab.company import Company, company
from tests.lab.ground import Kind
from tests.lab.striking import Swarm

pytestmark = pytest.mark.skipif(bool(ground.missing()), reason=ground.missing())

PEERS = 3
CORES = 1.0
"""Of each: who is slowed has a tenth of that."""
GENEROUS_S = 120.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Company]:
    """They learn together, in epochs that are short enough for a test."""
    with company(PEERS, CORES, batch_per_learner=256) as opened:
        yield opened


@pytest.mark.parametrize("kind", list(Kind))
def test_the_others_go_on_without_a_peer_and_it_contributes_again(nodes: Company, kind: Kind) -> None:
    swarm, victim = Swarm(nodes), list(Kind).index(kind) % PEERS
    nodes.ground.strike(victim, kind)
    try:
        nodes.wait_epochs(2, GENEROUS_S)  # of those that nothing is wrong with
    finally:
        nodes.ground.mend(victim)
    over_at = time.monotonic()
    if kind is Kind.KILL:
        nodes.up(victim)
    came = swarm.wait(lambda: swarm.whole_at(victim, over_at) is not None, GENEROUS_S)
    assert came, f"{kind}: not in {GENEROUS_S:.0f} s; it is {swarm.place(victim)}\n{nodes.log(victim)}"
