"""Views agree on what honest authors wrote and pass over what liars wrote."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.crdt.views import (
    MAX_CLAIMS,
    NUM_NEWEST,
    Contributed,
    Membership,
    Policy,
    Views,
    best_policy,
    contributions,
    evaluations,
    first_solved,
    members,
)
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer

ANN, BOB, CAT = sorted(Signer(bytes([n]) * 32).peer_id for n in (1, 2, 3))
LOW, HIGH = sorted(Cid.of_block(data) for data in (b"x", b"y"))
MEMBER = {"role": "learner", "left": False}


def policy(epoch: int = 1, cid: str = LOW, env_steps: int = 10, digest: str = "d") -> dict[str, Any]:
    return {"epoch": epoch, "cid": cid, "env_steps": env_steps, "digest": digest}


def evaluation(mean_return: float = 1.0, cid: str = LOW) -> dict[str, Any]:
    return {"cid": cid, "return": mean_return, "env_steps": 10, "episodes": 5}


def test_members() -> None:
    docs = {
        BOB: {"member": MEMBER},
        ANN: {"member": {"role": "storage", "left": True}},
        CAT: {"member": {"role": 7, "left": False}},
    }
    assert list(members(docs).items()) == [(ANN, Membership("storage", True)), (BOB, Membership("learner", False))]


@pytest.mark.parametrize(
    ("ours", "theirs", "theirs_is_better"),
    [
        (policy(1), policy(2), True),
        (policy(2, env_steps=1), policy(1, env_steps=99), False),
        (policy(env_steps=10), policy(env_steps=11), True),
        (policy(cid=HIGH), policy(cid=LOW), True),
        (policy(cid=LOW), policy(cid=HIGH), False),
    ],
)
def test_the_best_policy(ours: dict[str, Any], theirs: dict[str, Any], theirs_is_better: bool) -> None:
    docs = {ANN: {"member": MEMBER, "policy": ours}, BOB: {"member": MEMBER, "policy": theirs}}
    best = best_policy(docs)
    assert best is not None
    assert best.holders == ((BOB,) if theirs_is_better else (ANN,))
    assert best_policy(dict(reversed(docs.items()))) == best


def test_all_holders_of_the_best_policy_are_named() -> None:
    docs = {author: {"member": MEMBER, "policy": policy()} for author in (CAT, ANN, BOB)}
    assert best_policy(docs) == Policy(1, LOW, 10, "d", (ANN, BOB, CAT))


def test_who_left_or_never_joined_or_is_refused_does_not_count() -> None:
    docs: dict[PeerId, dict[str, Any]] = {
        ANN: {"member": {"role": "learner", "left": True}, "policy": policy(9)},
        BOB: {"policy": policy(8)},
        CAT: {"member": MEMBER, "policy": policy(7)},
    }
    best = best_policy(docs)
    assert best is not None
    assert best.holders == (CAT,)
    assert best_policy(docs, refused={CAT}) is None
    assert best_policy(docs, refused=frozenset({LOW})) is None
    assert best_policy({}) is None


def test_evaluations_are_sorted() -> None:
    docs = {
        BOB: {"evaluations": {"10": evaluation(), "2": evaluation(cid=HIGH)}},
        ANN: {"evaluations": {"2": evaluation(3), "02": evaluation(), "٣": evaluation(), "-1": evaluation()}},
    }
    found = [(item.epoch, item.cid, item.author) for item in evaluations(docs)]
    assert found == [(2, LOW, ANN), (2, HIGH, BOB), (10, LOW, BOB)]


def test_the_first_that_reached_the_target() -> None:
    docs = {
        ANN: {"evaluations": {"3": evaluation(500.0), "1": evaluation(499.9)}},
        BOB: {"evaluations": {"2": evaluation(500, cid=HIGH)}},
    }
    first = first_solved(docs, 500.0)
    assert first is not None
    assert (first.epoch, first.cid, first.author, first.mean_return) == (2, HIGH, BOB, 500.0)
    for refused in ({HIGH}, {BOB}):
        second = first_solved(docs, 500.0, refused=refused)
        assert second is not None
        assert second.epoch == 3
    assert first_solved(docs, 501.0) is None
    assert first_solved(docs, None) is None


def test_contributions() -> None:
    docs = {
        BOB: {"contributions": {"env_steps": 5, "rounds": 2}},
        ANN: {"contributions": {"env_steps": -5, "rounds": 2}},
        CAT: {"contributions": {"env_steps": 5.0, "rounds": True}},
    }
    assert contributions(docs) == {BOB: Contributed(5, 2)}


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from([LOW, "1", "learner", 10**400])
)
keys = st.sampled_from(
    ["role", "left", "epoch", "cid", "env_steps", "digest", "return", "episodes", "rounds", "1", "²"]
)
junk = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=5))
registers = st.sampled_from(["member", "policy", "evaluations", "contributions"])


@given(st.dictionaries(st.sampled_from([ANN, BOB]), st.dictionaries(registers, junk)))
def test_no_register_of_a_liar_raises_or_hides_an_honest_one(docs: dict[PeerId, dict[str, Any]]) -> None:
    docs[CAT] = {
        "member": MEMBER,
        "policy": policy(1),
        "evaluations": {"1": evaluation(5)},
        "contributions": {"env_steps": 1, "rounds": 1},
    }
    assert CAT in members(docs)
    assert CAT in contributions(docs)
    assert CAT in {item.author for item in evaluations(docs)}
    assert best_policy(docs) is not None
    assert first_solved(docs, 5) is not None


@pytest.mark.parametrize("field", ["epoch", "cid", "env_steps", "digest"])
@pytest.mark.parametrize("value", [None, -1, 2**60, 1.5, True, "no cid", [], {}, b"", "x" * 1000])
def test_a_policy_with_one_wrong_field_is_no_policy(field: str, value: Any) -> None:
    wrong = policy() | {field: value}
    expected = field == "digest" and value == "no cid"
    assert (best_policy({ANN: {"member": MEMBER, "policy": wrong}}) is not None) == expected


def test_views_say_what_the_functions_say_whatever_changes() -> None:
    rng = random.Random(7)
    authors = [Signer(bytes([n]) * 32).peer_id for n in range(1, 5)]
    docs: dict[PeerId, dict[str, Any]] = {}
    views = Views(target_return=0.5)
    for step in range(300):
        author = rng.choice(authors)
        before = docs.get(author, {})
        held = before.get("evaluations")
        held = held if isinstance(held, dict) else {}
        entry = {"cid": Cid.of_block(bytes([rng.randrange(9)])), "return": rng.random(), "env_steps": 1, "episodes": 1}
        change: dict[str, Any] = rng.choice(
            [
                {"member": {"role": rng.choice(["learner", ""]), "left": rng.random() < 0.3}},
                {"contributions": {"env_steps": rng.randrange(9), "rounds": rng.choice([1, None])}},
                {"evaluations": {**held, str(rng.randrange(12)): entry}},
                {"evaluations": dict(list(held.items())[::2])},
                {"evaluations": rng.choice([{"1": "odd"}, 3, {}])},
            ]
        )
        docs = {**docs, author: {**before, **change}}
        if step % 17 == 0:
            docs.pop(author)
        views.update(docs)
        assert views.members == members(docs)
        assert views.contributions == contributions(docs)
        assert views.evaluations == evaluations(docs)
        assert {each for each in views.evaluations if each.mean_return >= 0.5} <= set(views.useful)


def test_sixteen_thousand_evaluations_of_one_author_cost_nothing_when_something_else_changes() -> None:
    liar, other = (Signer(bytes([n]) * 32).peer_id for n in (1, 2))
    entry = {"cid": Cid.of_block(b"x"), "return": 1e9, "env_steps": 1, "episodes": 1}
    docs: dict[PeerId, dict[str, Any]] = {liar: {"evaluations": {str(n): entry for n in range(16_200)}}}
    views = Views(target_return=1.0)
    views.update(docs)
    before, useful, all_of_them = views.num_read, views.useful, views.evaluations
    for epoch in range(100):
        docs = {**docs, other: {"policy": {"epoch": epoch}, "member": {"role": "learner", "left": False}}}
        views.update(docs)
    assert views.num_read == before
    assert views.useful is useful
    assert views.evaluations is all_of_them
    assert len(useful) <= MAX_CLAIMS + NUM_NEWEST
    docs = {**docs, other: {"evaluations": {"3": entry}}}
    views.update(docs)
    assert views.num_read == before + 1
    assert views.evaluations == evaluations(docs)
