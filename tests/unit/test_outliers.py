"""Whose numbers are absurd against the others' is left out, by everybody alike; honest differences are not absurd."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.algorithms.adam import Adam, check_adam, clip_by_norm
from shoal.training.exchange.averager import Contribution, Moments
from shoal.training.exchange.outliers import PAIR_FACTOR, Scale, outliers

PEERS = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 9))


def of_sizes(*sizes: float) -> list[Contribution]:
    return [
        Contribution(peer, 1.0, {"mean/x": np.array([0.0, size, size / 3], np.float32)})
        for peer, size in zip(PEERS, sizes, strict=False)
    ]


def left_out(sizes: list[float], *, factor: float = 10.0, usual: float = 0.0) -> list[int]:
    found = outliers(of_sizes(*sizes), {"mean/x": Scale(factor, usual)})
    return sorted(PEERS.index(author) for author in found)


@pytest.mark.parametrize(
    ("sizes", "out"),
    [
        ([], []),
        ([1e29], []),
        ([1, 1, 1], []),
        ([1, 9, 0.2], []),
        ([1, 1e29, 1], [1]),
        ([1, 1, -1e29, 1e29], [2, 3]),
        ([1, 1, 1, 11.5], [3]),
        ([0, 0, 1, 1e29], [3]),
        ([0, 0, 0, 2], []),
        ([1, PAIR_FACTOR * 0.9], []),
        ([1, PAIR_FACTOR * 1.1], [1]),
        ([0, 1e6], []),
    ],
)
def test_more_than_a_multiple_of_the_median_is_too_much(sizes: list[float], out: list[int]) -> None:
    assert left_out(sizes) == out


def test_what_is_usual_is_never_too_much() -> None:
    assert left_out([0.01, 0.01, 0.3]) == [2]
    assert left_out([0.01, 0.01, 0.3], usual=0.32) == []
    assert left_out([0.01, 0.01, 0.35], usual=0.32) == [2]


def test_moments_are_compared_by_their_root_mean_square() -> None:
    rng = np.random.default_rng(0)
    arrays = [Moments.of(scale * rng.normal(size=(50, 3))).to_arrays("o") for scale in (1, 2, 1e9)]
    arrays.append(Moments.none((3,)).to_arrays("o"))
    given_order = [Contribution(peer, 50.0, each) for peer, each in zip(PEERS, arrays, strict=False)]
    assert list(outliers(given_order, {"moments/o": Scale(1000.0)})) == [PEERS[2]]
    assert outliers(given_order, {"moments/o": Scale(1000.0, usual=1e10)}) == {}


@given(
    st.lists(st.floats(-1e29, 1e29), max_size=8),
    st.floats(2, 1000),
    st.randoms(use_true_random=False),
)
def test_the_order_of_arrival_changes_nobody(sizes: list[float], factor: float, shuffle: random.Random) -> None:
    given_order = of_sizes(*sizes)
    other_order = shuffle.sample(given_order, len(given_order))
    scales = {"mean/x": Scale(factor)}
    assert outliers(given_order, scales) == outliers(other_order, scales)


@given(seed=st.integers(0, 2**32), size=st.floats(-12, 3), sparse=st.floats(0, 0.99))
def test_no_gradients_lead_adam_where_it_would_be_refused(seed: int, size: float, sparse: float) -> None:
    """Averages of what two peers come to, epoch after epoch, as in mode local."""
    rng = np.random.default_rng(seed)
    max_norm = 0.5
    states = [Adam(20, learning_rate=1e-2, epsilon=1e-12) for _ in range(2)]
    start = np.zeros(20, np.float32)
    for _ in range(3):
        ends = []
        for adam in states:
            parameters = start.copy()
            for _ in range(15):
                gradient = (10.0**size * rng.standard_cauchy(20) * (rng.random(20) >= sparse)).astype(np.float32)
                adam.apply(parameters, clip_by_norm(gradient, max_norm)[0])
            check_adam(adam.first, adam.second, max_norm=max_norm)
            assert np.abs(parameters - start).max() <= adam.max_change(15)
            ends.append(parameters)
        start = (0.3 * ends[0] + 0.7 * ends[1]).astype(np.float32)
        for one, other in pairwise(states):
            first, second = (
                (0.3 * mine + 0.7 * theirs).astype(np.float32)
                for mine, theirs in ((one.first, other.first), (one.second, other.second))
            )
            one.first[:], one.second[:], other.first[:], other.second[:] = first, second, first, second


@pytest.mark.parametrize(
    ("first", "second"), [(0.6, 1.0), (0.0, 0.26), (0.0, -1e-9), (0.4, 0.0), (0.4, 1e-4), (np.nan, 0.1), (0.1, np.nan)]
)
def test_a_state_of_adam_that_no_gradients_lead_to_is_refused(first: float, second: float) -> None:
    check_adam(np.full(3, 0.1, np.float32), np.full(3, 0.01, np.float32), max_norm=0.5)
    with pytest.raises(ProtocolError):
        check_adam(np.array([0, first], np.float32), np.array([1e-3, second], np.float32), max_norm=0.5)
