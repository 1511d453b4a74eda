"""What is made of many contributions is bounded by what the honest ones say, whatever the others do and weigh."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import UsageError
from shoal.training.exchange import aggregators
from shoal.training.exchange.aggregators import aggregate, votes
from shoal.training.exchange.rules import Aggregator, Rule, assumed_liars, withstood

ALL = [Aggregator(rule, mixes, clips) for rule in Rule for mixes in (False, True) for clips in (False, True)]
BY_COORDINATE = (Rule.MEDIAN, Rule.TRIMMED_MEAN)
BY_DISTANCE = (Rule.MULTI_KRUM, Rule.CENTERED_CLIPPING)

seeds = st.integers(0, 2**32 - 1)
rules = st.sampled_from(ALL)


def honest_rows(rng: np.random.Generator, number: int, size: int) -> np.ndarray:
    return rng.normal(rng.normal(size=size), 10.0 ** rng.integers(-3, 3), (number, size))


# --- what a manifest says --------------------------------------------------------------------------------------------


def test_every_aggregator_is_read_as_it_is_written() -> None:
    assert [Aggregator.parse(str(each)) for each in ALL] == ALL
    assert [str(each) for each in ALL[:4]] == ["mean", "arc+mean", "nnm+mean", "arc+nnm+mean"]


@pytest.mark.parametrize(
    "text", ["", "avg", "Mean", "mean ", "nnm", "nnm+", "+mean", "nnm+nnm+mean", "nnm+arc+mean", "mean+nnm", "krum"]
)
def test_what_is_no_aggregator_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(UsageError, match=r"choose one of mean, median, .*nnm\+trimmed_mean"):
        Aggregator.parse(text)


def test_without_evidence_under_a_third_are_assumed_to_lie_and_one_of_three() -> None:
    assert [assumed_liars(number) for number in range(11)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    assert all(withstood(number, number) * 2 < number for number in range(1, 50))


# --- votes -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(weights=st.lists(st.floats(1e-3, 2.0**53), min_size=1, max_size=40), liars=st.integers(0, 40))
def test_so_many_liars_never_have_half_of_the_votes(weights: list[float], liars: int) -> None:
    liars = withstood(len(weights), liars)
    have = np.sort(votes(weights, liars))[::-1]
    assert (have == np.rint(have)).all()
    assert have.min() >= 1
    share = (liars / len(weights) + 0.5) / 2 if liars else 1
    assert have[:liars].sum() <= share * have.sum() * (1 + 1e-9)
    assert have[:liars].sum() * 2 < have.sum()


def test_weights_that_give_nobody_too_much_are_votes_as_they_are() -> None:
    np.testing.assert_allclose(
        votes([1, 2, 4, 3, 2, 1, 2, 2, 2, 2], 1) / 2**40, np.array([1, 2, 4, 3, 2, 1, 2, 2, 2, 2]) / 4
    )
    have = votes([1.0] * 9 + [1e15], 1)
    assert have[-1] / have.sum() == pytest.approx((1 / 10 + 1 / 2) / 2)


# --- properties ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=seeds, number=st.integers(1, 9), liars=st.integers(0, 4), rule=rules, is_wide=st.booleans())
def test_equal_rows_give_that_row(seed: int, number: int, liars: int, rule: Aggregator, is_wide: bool) -> None:
    rng = np.random.default_rng(seed)
    dtype = np.float64 if is_wide else np.float32
    row = rng.normal(0, 10.0 ** rng.integers(-6, 6), 7).astype(dtype)
    result = aggregate(np.stack([row] * number), rng.uniform(1, 1000, number).tolist(), rule, liars)
    assert result.dtype == dtype
    if rule.is_plain_mean or rule.clips:
        np.testing.assert_allclose(result, row, rtol=1e-6)
    else:
        np.testing.assert_array_equal(result, row)


@settings(deadline=None)
@given(
    seed=seeds, number=st.integers(1, 9), liars=st.integers(0, 4), rule=rules, order=st.randoms(use_true_random=False)
)
def test_the_order_of_the_rows_means_nothing(
    seed: int, number: int, liars: int, rule: Aggregator, order: random.Random
) -> None:
    if rule.mixes and rule.rule is Rule.MULTI_KRUM:
        return  # mixed rows may be equally near to others, and then the first counts
    rng = np.random.default_rng(seed)
    rows, weights = honest_rows(rng, number, 11), rng.uniform(1, 1000, number)
    shuffled = order.sample(range(number), number)
    first = aggregate(rows, weights.tolist(), rule, liars)
    second = aggregate(rows[shuffled], weights[shuffled].tolist(), rule, liars)
    np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-9 * np.abs(rows).max())


@settings(deadline=None)
@given(
    seed=seeds,
    number=st.integers(3, 12),
    rule=st.sampled_from([each for each in ALL if each.rule is not Rule.MEAN and not each.clips]),
    far=st.sampled_from([1.0, 1e3, 1e12]),
    claims=st.sampled_from([1e-3, 1.0, 2.0**53]),
)
def test_liars_move_the_result_no_further_than_the_honest_are_apart(
    seed: int, number: int, rule: Aggregator, far: float, claims: float
) -> None:
    rng = np.random.default_rng(seed)
    liars = int(rng.integers(1, (number - 1) // 2 + 1))
    honest = honest_rows(rng, number - liars, 6)
    lies = rng.normal(size=(liars, 6)) * far + rng.normal(size=6) * far
    rows = np.concatenate([honest, lies])
    weights = [*rng.uniform(1, 50, number - liars), *([claims] * liars)]
    order = rng.permutation(number)
    result = aggregate(rows[order], [weights[each] for each in order], rule, liars)
    if rule.rule in BY_COORDINATE and not rule.mixes:
        assert (result >= honest.min(axis=0)).all()
        assert (result <= honest.max(axis=0)).all()
    apart = max(np.linalg.norm(one - other) for one in honest for other in honest)
    assert np.linalg.norm(result - honest.mean(axis=0)) <= 20 * number * apart


@settings(deadline=None)
@given(seed=seeds, number=st.integers(3, 12), far=st.sampled_from([1.0, 1e6, 1e12]))
def test_adaptive_clipping_leaves_nobody_longer_than_the_longest_honest_one(seed: int, number: int, far: float) -> None:
    rng = np.random.default_rng(seed)
    liars = int(rng.integers(1, (number - 1) // 2 + 1))
    centre = rng.normal(size=5) * 10
    rows = np.concatenate([honest_rows(rng, number - liars, 5), rng.normal(size=(liars, 5)) * far])
    longest = max(np.linalg.norm(row - centre) for row in rows[: number - liars])
    result = aggregate(rows, [1.0] * number, Aggregator.parse("arc+mean"), liars, centre=centre)
    assert np.linalg.norm(result - centre) <= longest * (1 + 1e-9)


def test_the_mean_is_what_its_largest_liar_wants() -> None:
    rows = np.array([[1.0], [1.0], [1.0], [1e9]])
    assert aggregate(rows, [1.0, 1.0, 1.0, 1e6], Aggregator(), 1)[0] > 1e8


def test_a_zero_with_a_sign_changes_no_bit() -> None:
    rows = np.array([[0.0, -0.0], [-0.0, 0.0], [0.0, -0.0]], np.float32)
    for rule in (each for each in ALL if not each.is_plain_mean):
        assert aggregate(rows, [1.0] * 3, rule, 1).tobytes() == bytes(8)


@settings(deadline=None)
@given(seed=seeds, number=st.integers(2, 8), rule=st.sampled_from([each for each in ALL if each.rule in BY_COORDINATE]))
def test_a_rule_by_coordinate_does_not_know_in_which_spans_it_works(seed: int, number: int, rule: Aggregator) -> None:
    if rule.mixes or rule.clips:
        return
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 3 * aggregators._WIDTH))
    rows, weights = rng.normal(size=(number, size)).astype(np.float32), rng.uniform(1, 100, number).tolist()
    cut = int(rng.integers(1, size))
    whole = aggregate(rows, weights, rule, 2)
    parts = np.concatenate([aggregate(each, weights, rule, 2) for each in (rows[:, :cut], rows[:, cut:])])
    assert whole.tobytes() == parts.tobytes()


def test_distances_are_right_whatever_the_width() -> None:
    rng = np.random.default_rng(5)
    for size in (1, 2, 3, 4095, 4096, 4097, 9000):
        rows = rng.normal(size=(4, size))
        expected = np.square(rows[:, None] - rows[None]).sum(axis=-1)
        np.testing.assert_allclose(aggregators.squared_distances(rows), expected, rtol=1e-12)
        np.testing.assert_allclose(aggregators.squared_norms(rows), np.square(rows).sum(axis=1), rtol=1e-12)


# --- against byzfl ---------------------------------------------------------------------------------------------------


@functools.cache
def oracle():
    return pytest.importorskip(
        "byzfl.aggregators", reason="byzfl is not installed; pip install 'shoal[oracle]' brings it"
    )


@pytest.mark.parametrize("seed", range(20))
def test_with_equal_weights_the_rules_are_those_of_byzfl(seed: int) -> None:
    byzfl = oracle()
    rng = np.random.default_rng(seed)
    number = int(rng.integers(3, 12))
    liars = int(rng.integers(1, (number - 1) // 2 + 1))
    rows = rng.normal(rng.normal(size=20), 1.0, (number, 20))
    rows[:liars] += rng.normal(size=20) * 3
    named = {
        "mean": byzfl.Average(),
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(liars),
        "multi_krum": byzfl.MultiKrum(liars),
    }
    before = {"": list, "nnm+": byzfl.NNM(liars), "arc+": byzfl.ARC(liars)}
    for prefix, prepare in before.items():
        for name, rule in named.items():
            expected = rule(np.asarray(prepare(rows.copy())))
            result = aggregate(rows, [7.0] * number, Aggregator.parse(prefix + name), liars)
            np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12, err_msg=f"{prefix}{name}, seed {seed}")


@pytest.mark.parametrize("seed", range(5))
def test_one_pass_of_centered_clipping_is_that_of_byzfl(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, radius = rng.normal(size=(6, 9)), 2.5
    expected = oracle().CenteredClipping(L=1, tau=radius)(rows)
    lengths = np.linalg.norm(rows, axis=1)
    result = aggregators.clip_once(rows, np.ones(6), np.zeros(9), lengths, radius)
    np.testing.assert_allclose(result, expected, rtol=1e-9)
