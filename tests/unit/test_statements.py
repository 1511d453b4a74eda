"""What a member says is taken from strangers only if it can be true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.protocol.codec import decode, encode, to_plain
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import MAX_PRESENCE_BYTES
from shoal.training.manifest import Role
from shoal.training.statements import (
    HASH_BYTES,
    MAX_EPOCH,
    MAX_OFFERS,
    MAX_RATE,
    MAX_SAMPLES,
    MAX_STEPS,
    MAX_UPLINK,
    NO_BALLOT,
    TOPIC_OF,
    TOPIC_RULES,
    Addresses,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    RoundKey,
    Statement,
    Vote,
    ballot_name,
    first_after,
    read_statement,
    turn_rank,
)

CID = Cid.of_block(b"bytes")
KEY = RoundKey(3, 1, first_after(CID))
HASHES = tuple(sorted(bytes([n]) * HASH_BYTES for n in range(1, 4)))
FACTS = Facts(role=Role.LEARNER, phase=Phase.COLLECTING, epoch=3, step=1, samples=64, env_steps=640, speed=100.0)
STATEMENTS: tuple[Statement, ...] = (
    FACTS,
    Addresses(addresses=("/ip4/127.0.0.1/tcp/4001",)),
    Offer(key=KEY, cid=CID, weight=64, seconds=0.5),
    Proposal(key=KEY, attempt=2, offers=HASHES),
    Vote(key=KEY, ballot=HASHES[0], attempt=3, cast=1),
    Result(epoch=4, cid=CID, parent=None, ballot=NO_BALLOT, env_steps=1),
)


def heard(topic: str, statement: Statement) -> Statement | None:
    return read_statement(topic, decode(dict[str, Any], encode(statement)))


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda each: type(each).__name__)
def test_what_was_said_is_what_is_heard(statement: Statement) -> None:
    assert heard(TOPIC_OF[type(statement)], statement) == statement


def test_a_statement_under_a_topic_that_is_not_its_own_is_passed_over() -> None:
    assert heard("vote", FACTS) is None
    assert heard("weather", FACTS) is None


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert read_statement("facts", {**to_plain(FACTS), "mood": "good"}) == FACTS


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 2**53},
        {"samples": MAX_SAMPLES + 1},
        {"samples": -1},
        {"epoch": MAX_EPOCH + 1},
        {"env_steps": MAX_STEPS + 1},
        {"speed": 1e300},
        {"speed": float("nan")},
        {"speed": float("inf")},
        {"steps_per_s": MAX_RATE * 1.01},
        {"phase": "dreaming"},
    ],
    ids=str,
)
def test_numbers_that_no_honest_member_reaches_are_not_heard(changes: dict[str, Any]) -> None:
    """Item 3 of the issue, ATTACKS row 2."""
    assert read_statement("facts", {**to_plain(FACTS), **changes}) is None


@pytest.mark.parametrize("changes", [{"epoch": 2**53}, {"env_steps": 2**53}, {"env_steps": 2**70}], ids=str)
def test_a_policy_of_an_epoch_without_end_is_not_heard(changes: dict[str, Any]) -> None:
    """Item 9, ATTACKS rows 5 and 5b."""
    assert read_statement("result", {**to_plain(STATEMENTS[-1]), **changes}) is None


@pytest.mark.parametrize("weight", [0, -1, 2**53])
def test_an_offer_weighs_something_and_not_everything(weight: int) -> None:
    with pytest.raises(ProtocolError):
        Offer(key=KEY, cid=CID, weight=weight)


@pytest.mark.parametrize(
    "uplink",
    [-1, MAX_UPLINK + 1, 2**70, float("nan"), float("inf"), float("-inf"), 1.5, 1e300, "fast", None, True],
    ids=str,
)
def test_an_uplink_that_no_member_can_have_is_not_heard(uplink: object) -> None:
    assert read_statement("offer", {**to_plain(STATEMENTS[2]), "uplink": uplink}) is None


def test_an_offer_that_names_no_uplink_does_not_know_it() -> None:
    plain = {**to_plain(STATEMENTS[2]), "uplink": 1_250_000}
    heard_offer = read_statement("offer", plain)
    assert isinstance(heard_offer, Offer)
    assert heard_offer.uplink == 1_250_000
    del plain["uplink"]
    heard_offer = read_statement("offer", plain)
    assert isinstance(heard_offer, Offer)
    assert heard_offer.uplink == 0


def test_a_vote_is_not_cast_in_an_attempt_that_is_still_to_come() -> None:
    with pytest.raises(ProtocolError):
        Vote(key=KEY, ballot=HASHES[0], attempt=1, cast=2)


@pytest.mark.parametrize("offers", [(), HASHES[::-1], HASHES[:1] * 2, (b"short",)], ids=str)
def test_a_proposal_lists_hashes_once_each_and_in_order(offers: tuple[bytes, ...]) -> None:
    with pytest.raises(ProtocolError):
        Proposal(key=KEY, attempt=0, offers=offers)


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda each: type(each).__name__)
def test_the_largest_of_each_kind_fits_into_its_record(statement: Statement) -> None:
    """Items 1 and 2, ATTACKS rows 3 and 3b: a proposal of everybody is hashes, and nobody repeats it."""
    largest: Statement
    match statement:
        case Facts():
            largest = replace(
                statement,
                epoch=MAX_EPOCH,
                step=MAX_EPOCH,
                samples=MAX_SAMPLES,
                env_steps=MAX_STEPS,
                speed=MAX_RATE,
                steps_per_s=MAX_RATE,
            )
        case Proposal():
            every = tuple(sorted(n.to_bytes(HASH_BYTES, "big") for n in range(1, MAX_OFFERS + 1)))
            largest = replace(statement, offers=every)
        case Offer():
            key = RoundKey(MAX_EPOCH, MAX_EPOCH, KEY.after)
            largest = replace(statement, key=key, weight=MAX_SAMPLES, uplink=MAX_UPLINK)
        case Result():
            largest = replace(statement, epoch=MAX_EPOCH, env_steps=MAX_STEPS, parent=CID)
        case _:
            largest = statement
    rule = TOPIC_RULES[TOPIC_OF[type(statement)]]
    assert len(encode(largest)) <= rule.max_bytes <= MAX_PRESENCE_BYTES


def test_a_ballot_has_one_name_whoever_proposes_it_and_whenever() -> None:
    first, again = Proposal(key=KEY, attempt=0, offers=HASHES), Proposal(key=KEY, attempt=5, offers=HASHES)
    assert first.ballot == again.ballot == ballot_name(KEY, HASHES)
    assert first.ballot != ballot_name(RoundKey(3, 2, KEY.after), HASHES)


def test_turns_differ_from_round_to_round() -> None:
    peers = [PeerId.of_public_key(bytes([n]) * 32) for n in range(8)]
    keys = [RoundKey(epoch, 0, first_after(Cid.of_block(b"%d" % epoch))) for epoch in range(64)]
    first = {min(peers, key=lambda peer: turn_rank("round", key, 0, peer)) for key in keys}
    assert first == set(peers)
