"""Merging gives the same bytes in whatever order contributions arrive, and moments are those of the joint data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.exchange.aggregators import aggregate
from shoal.training.exchange.averager import Arrays, Contribution, Moments, merge, validate
from shoal.training.exchange.rules import Aggregator, Rule

AGGREGATORS = [Aggregator(rule, mixes, clips) for rule in Rule for mixes in (False, True) for clips in (False, True)]
ALICE, BOB, CAROL = (PeerId.of_public_key(bytes([n]) * 32) for n in (1, 2, 3))


def test_what_is_not_merged_is_as_the_first_author_has_it() -> None:
    offered = [
        Contribution(author, weight, {"first/start": np.full(3, weight, np.float32)})
        for author, weight in zip((ALICE, BOB, CAROL), (1.0, 1000.0, 10.0), strict=True)
    ]
    first = min(offered, key=lambda each: each.author)
    for rule in (Aggregator(), Aggregator(Rule.MEDIAN, mixes=True)):
        np.testing.assert_array_equal(merge(reversed(offered), rule)["first/start"], first.arrays["first/start"])


def contributions(seed: int, peers: int) -> list[Contribution]:
    rng = np.random.default_rng(seed)
    result = []
    for index in range(peers):
        samples = rng.normal(3.0, 10.0 ** rng.integers(-3, 4), (int(rng.integers(1, 40)), 5))
        arrays: Arrays = {
            "mean/weights": rng.normal(size=(4, 3)).astype(np.float32),
            "mean/wide": rng.normal(size=7),
            "nonneg/squares": rng.exponential(size=3).astype(np.float32),
            "sum/steps": np.asarray(rng.integers(0, 1000)),
            "sum/rewards": rng.normal(size=2).astype(np.float32),
        } | Moments.of(samples).to_arrays("observation")
        result.append(Contribution(PeerId.of_public_key(bytes([index]) * 32), float(rng.integers(1, 5000)), arrays))
    return result


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    peers=st.integers(1, 8),
    aggregator=st.sampled_from(AGGREGATORS),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_order_of_arrival_changes_no_bit(
    seed: int, peers: int, aggregator: Aggregator, shuffle: random.Random
) -> None:
    given_order = contributions(seed, peers)
    other_order = shuffle.sample(given_order, len(given_order))
    first, second = merge(given_order, aggregator), merge(other_order, aggregator)
    assert first.keys() == second.keys() == given_order[0].arrays.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes()
        assert (array.dtype, array.shape) == (given_order[0].arrays[name].dtype, given_order[0].arrays[name].shape)


@given(seed=st.integers(0, 2**32), aggregator=st.sampled_from(AGGREGATORS))
def test_a_lone_contribution_comes_back_unchanged(seed: int, aggregator: Aggregator) -> None:
    (alone,) = contributions(seed, 1)
    assert {name: a.tobytes() for name, a in merge([alone], aggregator).items()} == {
        n: a.tobytes() for n, a in alone.arrays.items()
    }


@given(seed=st.integers(0, 2**32), peers=st.integers(2, 6))
def test_means_are_weighted_and_sums_are_sums(seed: int, peers: int) -> None:
    given_order = contributions(seed, peers)
    merged = merge(given_order)
    weights = [each.weight for each in given_order]
    for name in ("mean/weights", "mean/wide", "nonneg/squares"):
        expected = np.average([each.arrays[name].astype(np.float64) for each in given_order], axis=0, weights=weights)
        np.testing.assert_allclose(merged[name].astype(np.float64), expected, rtol=1e-6, atol=1e-7)
    assert int(merged["sum/steps"]) == sum(int(each.arrays["sum/steps"]) for each in given_order)


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), max_size=30), min_size=1, max_size=6),
    st.floats(-1e6, 1e6),
)
def test_merged_moments_are_those_of_the_joint_data(parts: list[list[float]], offset: float) -> None:
    samples = [np.asarray(part, dtype=np.float64) + offset for part in parts]
    merged = merge(
        Contribution(PeerId.of_public_key(bytes([index]) * 32), 1.0, Moments.of(part).to_arrays("x"))
        for index, part in enumerate(samples)
    )
    joint = Moments.of(np.concatenate(samples))
    result = Moments.from_arrays(merged, "x")
    assert result.count == joint.count
    np.testing.assert_allclose(result.mean, joint.mean, rtol=1e-12, atol=1e-6)
    np.testing.assert_allclose(result.m2, joint.m2, rtol=1e-9, atol=1e-3)


def test_nothing_merges_to_nothing() -> None:
    assert merge([]) == {}


def honest() -> Arrays:
    return {"mean/x": np.ones(3, np.float32), "nonneg/v": np.ones(3)} | Moments.of(np.ones((4, 2))).to_arrays("o")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mean/x": np.ones(4, np.float32)}, "not float32"),
        ({"mean/x": np.ones(3, np.float64)}, "not float32"),
        ({"mean/x": np.array([1, np.nan, 1], np.float32)}, "NaN"),
        ({"mean/x": np.array([1, np.inf, 1], np.float32)}, "NaN"),
        ({"mean/x": np.array([1, 3e38, 1], np.float32)}, "NaN"),
        ({"nonneg/v": np.array([1.0, -1.0, 1.0])}, "negative"),
        ({"moments/o/count": np.asarray(-1.0)}, "negative"),
        ({"moments/o/count": np.asarray(1e20)}, "counts more"),
        ({"moments/o/m2": np.array([-1.0, 0.0])}, "negative"),
        ({"mean/x": None}, "missing"),
        ({"mean/y": np.ones(1)}, "not asked for"),
    ],
)
def test_a_lie_is_refused_by_name(change: dict[str, Any], complaint: str) -> None:
    arrays = {name: array for name, array in (honest() | change).items() if array is not None}
    liar = Contribution(BOB, 10.0, arrays)
    with pytest.raises(ProtocolError, match=complaint) as caught:
        validate(liar, honest())
    assert BOB in str(caught.value)
    with pytest.raises(ProtocolError, match=complaint):
        merge([Contribution(ALICE, 10.0, honest()), liar])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_weight_that_no_honest_peer_has_is_refused(weight: float) -> None:
    with pytest.raises(ProtocolError, match=BOB):
        validate(Contribution(BOB, weight, honest()), honest())


@pytest.mark.parametrize(
    "arrays",
    [
        {"gradient": np.ones(2)},
        {"median/x": np.ones(2)},
        {"mean/": np.ones(2)},
        {"mean/x": np.ones(2, np.int64)},
        {"mean/x": np.array(["a"])},
        {"moments/x/mean": np.ones(2)},
        {"moments/x/count": np.ones(2), "moments/x/mean": np.ones(2), "moments/x/m2": np.ones(2)},
        {"moments/x/count": np.ones(()), "moments/x/mean": np.ones(2), "moments/x/m2": np.ones(3)},
        Moments.of(np.ones(3)).to_arrays("x") | {"moments/x/skew": np.ones(())},
    ],
)
def test_a_name_that_says_no_way_to_merge_is_refused(arrays: Arrays) -> None:
    with pytest.raises(ProtocolError, match=ALICE):
        merge([Contribution(ALICE, 1.0, arrays)])


def test_an_author_counts_once() -> None:
    with pytest.raises(ProtocolError, match=CAROL):
        merge([Contribution(CAROL, 1.0, honest()), Contribution(CAROL, 2.0, honest())])


# --- other rules than the mean ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    peers=st.integers(1, 8),
    liars=st.integers(0, 3),
    aggregator=st.sampled_from(AGGREGATORS),
)
def test_arrays_merge_as_the_rule_makes_one_of_their_rows(
    seed: int, peers: int, liars: int, aggregator: Aggregator
) -> None:
    given_order = sorted(contributions(seed, peers), key=lambda each: each.author)
    weights = [each.weight for each in given_order]
    merged = merge(given_order, aggregator, liars=liars)
    for name in ("mean/weights", "mean/wide", "nonneg/squares"):
        rows = np.stack([each.arrays[name].ravel() for each in given_order])
        if peers > 1:
            assert merged[name].tobytes() == aggregate(rows, weights, aggregator, liars).tobytes()
    assert (merged["nonneg/squares"] >= 0).all()


@given(seed=st.integers(0, 2**32), peers=st.integers(3, 8), size=st.sampled_from([-1e12, 0.0, 1e12]))
def test_a_liar_says_nothing_in_sums_and_moments_that_no_honest_one_does(seed: int, peers: int, size: float) -> None:
    given_order = contributions(seed, peers)
    *honest, last = given_order
    lies: Arrays = {name: np.full_like(array, size, dtype=array.dtype) for name, array in last.arrays.items()}
    lies |= {"nonneg/squares": np.full(3, abs(size), np.float32), "sum/steps": np.asarray(int(size))}
    lies |= Moments(2.0**52, np.full(5, size), np.full(5, abs(size))).to_arrays("observation")
    merged = merge([*honest, Contribution(last.author, 1e6, lies)], Aggregator(Rule.MEDIAN), liars=1)
    for name in ("sum/steps", "sum/rewards"):
        said = [each.arrays[name].astype(np.float64) for each in honest]
        low, high = np.min(said, axis=0), np.max(said, axis=0)
        assert (merged[name] >= peers * low - 1e-3 * abs(low)).all()
        assert (merged[name] <= peers * high + 1e-3 * abs(high)).all()
    result = Moments.from_arrays(merged, "observation")
    parts = [Moments.from_arrays(each.arrays, "observation") for each in honest]
    low, high = (bound([each.mean for each in parts], axis=0) for bound in (np.min, np.max))
    assert ((result.mean >= low - 1e-9 * abs(low)) & (result.mean <= high + 1e-9 * abs(high))).all()
    assert result.count <= peers * max(each.count for each in parts)
    assert (result.std <= np.max([each.std for each in parts], axis=0) + (high - low) + 1e-9).all()


def test_of_two_there_is_no_telling_which_one_lies() -> None:
    both = contributions(3, 2)
    trimmed = merge(both, Aggregator(Rule.TRIMMED_MEAN))
    for name, array in merge(both).items():
        np.testing.assert_allclose(trimmed[name], array, rtol=1e-6)


def test_what_is_not_merged_comes_from_everybody_in_the_order_of_the_authors() -> None:
    """Ballots: each author's array, one after the other; of one author, too."""
    offered = [
        Contribution(author, weight, {"each/answers": np.full((2, 3), weight, np.int64)})
        for author, weight in zip(sorted((ALICE, BOB, CAROL)), (1, 2, 3), strict=True)
    ]
    merged = merge(reversed(offered))["each/answers"]
    np.testing.assert_array_equal(merged, np.stack([each.arrays["each/answers"] for each in offered]))
    assert merge(offered[:1])["each/answers"].shape == (1, 2, 3)
