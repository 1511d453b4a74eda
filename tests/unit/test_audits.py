"""Whether a result follows from what its authors signed: of honest owners always, of a lying one never."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer
from shoal.protocol.tensors import TensorCodec
from shoal.training.exchange.allreduce import Outcome
from shoal.training.exchange.audits import SignedOutcome, audited_by, follows, sign_outcome
from shoal.training.exchange.layout import Layout, Segment
from shoal.training.exchange.rules import Aggregator, Rule

SIGNERS = [Signer(bytes([number]) * 32) for number in range(1, 5)]
PEERS = sorted(signer.peer_id for signer in SIGNERS)
OWNER = next(signer for signer in SIGNERS if signer.peer_id == PEERS[0])
KEY = bytes(16)
WEIGHTS = {peer: 10.0 * number for number, peer in enumerate(PEERS, 1)}


def a_layout(rule: Rule, codec: TensorCodec) -> Layout:
    return Layout((Segment("mean/x", 2000, codec, 2.0),), Aggregator(rule), 1024)


def parts_of(layout: Layout, seed: int, part: int) -> dict[PeerId, memoryview]:
    found = {}
    for number, peer in enumerate(PEERS):
        data = memoryview(bytearray(layout.num_bytes))
        values = np.random.default_rng(seed + number).uniform(-1, 1, 2000).astype(np.float32)
        layout.encode({"mean/x": values}, data)
        found[peer] = data[layout.place(part)]
    return found


def honest(layout: Layout, given: dict[PeerId, memoryview], part: int, authors: list[PeerId]) -> SignedOutcome:
    out = memoryview(bytearray(len(given[PEERS[0]])))
    used = layout.reduce(part, [given[peer] for peer in authors], [WEIGHTS[peer] for peer in authors], out)
    outcome = Outcome(OWNER.peer_id, tuple(authors[index] for index in used), hashlib.sha256(out).digest())
    return sign_outcome(OWNER, KEY, part, outcome)


@given(
    st.sampled_from(list(Rule)),
    st.sampled_from([TensorCodec.FP32, TensorCodec.INT8]),
    st.integers(0, 1),
    st.sets(st.sampled_from(PEERS), min_size=1),
    st.integers(0, 1000),
)
def test_an_honest_owner_is_never_accused(
    rule: Rule, codec: TensorCodec, part: int, authors: set[PeerId], seed: int
) -> None:
    layout = a_layout(rule, codec)
    given_ = parts_of(layout, seed, part)
    said = honest(layout, given_, part, sorted(authors))
    assert said.is_signed()
    assert follows(layout, said, given_, WEIGHTS)


@pytest.mark.parametrize("rule", list(Rule))
def test_a_bit_that_does_not_follow_is_a_lie(rule: Rule) -> None:
    layout = a_layout(rule, TensorCodec.FP32)
    given_ = parts_of(layout, 5, 0)
    said = honest(layout, given_, 0, PEERS)
    assert not follows(layout, replace(said, digest=hashlib.sha256(b"else").digest()), given_, WEIGHTS)
    assert not follows(layout, replace(said, authors=()), given_, WEIGHTS)


def test_who_says_that_somebody_is_in_it_who_is_not_has_lied() -> None:
    layout = a_layout(Rule.MEAN, TensorCodec.FP32)
    given_ = parts_of(layout, 5, 0)
    said = honest(layout, given_, 0, PEERS[:3])
    assert follows(layout, said, given_, WEIGHTS)
    assert not follows(layout, replace(said, authors=tuple(PEERS)), given_, WEIGHTS)


@given(st.binary(min_size=32, max_size=32), st.integers(2, 4))
def test_every_member_is_looked_into_by_exactly_one_other(digest: bytes, count: int) -> None:
    members = PEERS[:count]
    looked_into = [audited_by(peer, members, digest) for peer in members]
    assert sorted(looked_into) == members
    assert all(one != other for one, other in zip(members, looked_into, strict=True))


def test_a_signature_holds_for_nothing_else() -> None:
    layout = a_layout(Rule.MEAN, TensorCodec.FP32)
    said = honest(layout, parts_of(layout, 5, 0), 0, PEERS)
    for other in (
        replace(said, part=1),
        replace(said, key=bytes([1]) * 16),
        replace(said, owner=PEERS[1]),
        replace(said, authors=said.authors[1:]),
        replace(said, digest=bytes(32)),
    ):
        assert not other.is_signed()
