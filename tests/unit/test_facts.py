"""What a member says of itself is taken from strangers only if it can be true."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.protocol.codec import decode, encode, to_plain
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.rounds import LearnerView, Offer, Proposal, RoundKey
from shoal.training.facts import Facts, Phase, read_facts
from shoal.training.manifest import Role

PEER = PeerId.of_public_key(b"\x05" * 32)
CID = Cid.of_block(b"gradient")
PROPOSAL = Proposal(3, 1, 0, (Offer(PEER, CID, 64),))
FACTS = Facts(
    role=Role.LEARNER,
    phase=Phase.EXCHANGING,
    addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}",),
    epoch=3,
    step=1,
    samples=64,
    env_steps=640,
    steps_per_s=12.5,
    speed=100.0,
    offer_cid=CID,
    offer_weight=64,
    proposal=PROPOSAL,
)


def test_facts_come_back_as_they_were_said() -> None:
    assert read_facts(decode(dict[str, Any], encode(FACTS))) == FACTS


def test_facts_of_a_later_version_are_understood_as_far_as_they_are_known() -> None:
    assert read_facts({**to_plain(FACTS), "mood": "good"}) == FACTS


def test_a_role_is_enough() -> None:
    assert read_facts({"role": "learner"}) == Facts(role=Role.LEARNER)


def test_rounds_see_the_offer_and_the_proposal() -> None:
    assert FACTS.view(PEER) == LearnerView(RoundKey(3, 1), True, Offer(PEER, CID, 64), PROPOSAL)


@pytest.mark.parametrize("lacking", [{"offer_cid": None}, {"offer_weight": 0}])
def test_an_offer_needs_bytes_and_a_weight(lacking: dict[str, Any]) -> None:
    facts = read_facts({**to_plain(FACTS), **lacking})
    assert facts is not None
    assert facts.view(PEER).offer is None


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.EXCHANGING])
def test_who_does_something_else_has_not_arrived_at_the_round(phase: Phase) -> None:
    facts = read_facts({**to_plain(FACTS), "phase": str(phase)})
    assert facts is not None
    assert not facts.view(PEER).is_ready


@pytest.mark.parametrize(
    "lie",
    [
        {"role": "king"},
        {"phase": "sleeping"},
        {"epoch": -1},
        {"step": -1},
        {"samples": -1},
        {"env_steps": -1},
        {"env_steps": 2**60},
        {"offer_weight": -5},
        {"offer_weight": 2.5},
        {"steps_per_s": -0.1},
        {"steps_per_s": float("nan")},
        {"speed": -100.0},
        {"speed": float("inf")},
        {"addresses": "/ip4/127.0.0.1"},
        {"offer_cid": "bafk"},
        {"proposal": {"epoch": 1}},
        {"proposal": {**to_plain(PROPOSAL), "offers": []}},
        {"proposal": {**to_plain(PROPOSAL), "attempt": -1}},
        {"proposal": {**to_plain(PROPOSAL), "offers": [{**to_plain(PROPOSAL.offers[0]), "weight": -1}]}},
        {"proposal": {**to_plain(PROPOSAL), "offers": [to_plain(PROPOSAL.offers[0])] * 2}},
    ],
    ids=repr,
)
def test_facts_that_cannot_be_true_are_no_facts(lie: dict[str, Any]) -> None:
    assert read_facts({**to_plain(FACTS), **lie}) is None


def test_facts_without_a_role_are_no_facts() -> None:
    assert read_facts({}) is None


def test_a_node_cannot_say_such_things_itself() -> None:
    with pytest.raises(ProtocolError):
        Facts(role=Role.LEARNER, samples=-1)
