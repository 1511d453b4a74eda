"""Corrections for stale samples, on cases reckoned by hand and against what they are special cases of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.training.rollouts.staleness import decoupled, group_expectation, interpolated, v_trace

log = math.log
small = hnp.arrays(np.float32, 6, elements=st.floats(-3, 0, width=32))


def f(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_decoupled_by_hand() -> None:
    # Behaviour 0.5, proximal 0.25, now 0.375: weight 0.5, u = 1.5, clipped to 1.2.
    found = decoupled(f(log(0.375)), f(log(0.25)), f(log(0.5)), f(2.0), clip_range=0.2)
    assert found.weights == pytest.approx([0.5])
    assert found.values == pytest.approx([0.5 * 1.2 * 2])
    assert found.slopes == pytest.approx([0.0])
    assert found.is_held.tolist() == [True]
    # The same with a bad action: what is smaller counts, and that depends on θ.
    found = decoupled(f(log(0.375)), f(log(0.25)), f(log(0.5)), f(-2.0), clip_range=0.2)
    assert found.values == pytest.approx([0.5 * 1.5 * -2])
    assert found.slopes == pytest.approx([0.5 * 1.5 * -2])


def test_decoupled_may_rise_further_than_it_may_fall() -> None:
    found = decoupled(f(log(1.25)), f(0.0), f(0.0), f(1.0), clip_range=0.1, clip_range_high=0.28)
    assert found.values == pytest.approx([1.25])
    assert not found.is_held[0]


def test_weights_are_cut_or_left_out() -> None:
    given_ = (f(0.0, 0.0), f(log(6.0), log(2.0)), f(0.0, 0.0), f(1.0, 1.0))
    assert decoupled(*given_, clip_range=0.2, max_weight=5).weights == pytest.approx([5, 2])
    found = decoupled(*given_, clip_range=0.2, max_weight=5, is_masked=True)
    assert found.weights == pytest.approx([0, 2])
    assert found.slopes[0] == 0


@given(small, small, hnp.arrays(np.float32, 6, elements=st.floats(-2, 2, width=32)))
def test_with_the_policy_that_acted_as_proximal_one_it_is_ppo(
    log_probs: np.ndarray, acted: np.ndarray, advantages: np.ndarray
) -> None:
    found = decoupled(log_probs, acted, acted, advantages, clip_range=0.2)
    ratio = np.exp(log_probs - acted)
    expected = np.minimum(ratio * advantages, np.clip(ratio, np.float32(0.8), np.float32(1.2)) * advantages)
    assert (found.weights == 1).all()
    assert found.values == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(small, small, small, hnp.arrays(np.float32, 6, elements=st.floats(-2, 2, width=32)))
def test_slopes_are_the_derivatives_of_the_values(
    log_probs: np.ndarray, proximal: np.ndarray, acted: np.ndarray, advantages: np.ndarray
) -> None:
    ratio = np.exp(log_probs - proximal)
    smooth = (np.abs(ratio - 0.8) > 0.01) & (np.abs(ratio - 1.2) > 0.01)
    step = np.float32(1e-3)
    low, mid, high = (
        decoupled(log_probs + shift, proximal, acted, advantages, clip_range=0.2)
        for shift in (-step, np.float32(0), step)
    )
    slopes = (high.values.astype(np.float64) - low.values) / (2e-3)
    assert mid.slopes[smooth] == pytest.approx(slopes[smooth], rel=0.02, abs=0.02)


def test_interpolated_by_hand() -> None:
    now, acted = f(-1.0, -1.0, -1.0, -1.0), f(-3.0, -3.0, -3.0, -3.0)
    found = interpolated(now, acted, np.array([0, 1, 2, 4]))
    # Not old: θ itself. One version old: the policy that acted. Then as much nearer to θ as there were versions.
    assert found == pytest.approx([-1.0, -3.0, -2.0, -1.5])


def test_of_the_newest_version_the_interpolated_objective_is_the_plain_policy_gradient() -> None:
    now, acted = f(-1.0, -0.5), f(-1.5, -0.25)
    proximal = interpolated(now, acted, np.array([0, 0]))
    found = decoupled(now, proximal, acted, f(1.0, -1.0), clip_range=0.2)
    assert found.values == pytest.approx(np.exp(now - acted) * f(1.0, -1.0))


def test_group_expectation_by_hand() -> None:
    # q = (0.5, 0.25, 0.25): Ê = (0.25 + 0.0625 + 0.0625) / 1 = 0.375.
    acted = np.log(f(0.5, 0.25, 0.25))
    log_probs = np.log(f(0.6, 0.3, 0.1))
    assert group_expectation(log_probs, acted, np.array([7, 7, 7])) == pytest.approx([1.6, 0.8, 0.1 / 0.375])
    # Alone in its group, Ê is its own q: the plain ratio.
    alone = group_expectation(log_probs, acted, np.array([1, 2, 3]))
    assert alone == pytest.approx(np.exp(log_probs - acted))


def test_group_expectation_of_long_sequences_does_not_vanish() -> None:
    acted, log_probs = f(-2000.0, -1000.0), f(-1990.0, -1010.0)
    by_token = group_expectation(log_probs, acted, np.array([0, 0]), lengths=np.array([1000, 1000]))
    q = np.exp(np.array([-2.0, -1.0]))
    assert by_token == pytest.approx(np.exp(np.array([-1.99, -1.01])) / ((q**2).sum() / q.sum()), rel=1e-4)
    assert np.isfinite(group_expectation(log_probs, acted, np.array([0, 0]))).all()


def test_no_single_unlikely_sequence_explodes() -> None:
    acted, log_probs = np.log(f(0.4, 1e-6)), np.log(f(0.4, 0.1))
    assert np.exp(log_probs - acted)[1] == pytest.approx(1e5, rel=1e-3)
    assert group_expectation(log_probs, acted, np.array([0, 0]))[1] == pytest.approx(0.25, rel=1e-3)


def test_v_trace_by_hand() -> None:
    # Two steps of one environment, a discount of 0.5, then cut off before a state that is worth 4.
    rewards, values, finals = f(1, 2)[:, None], f(1, 2, 9)[:, None], f(4)
    ends = np.zeros((2, 1), np.bool_), np.array([[False], [True]])
    acted = np.log(f(0.5, 0.5))[:, None]
    log_probs = np.log(f(0.25, 1.0))[:, None]  # ratios 0.5 and 2, cut at 1
    targets, advantages = v_trace(log_probs, acted, rewards, values, finals, *ends, gamma=0.5)
    last = 2 + (2 + 0.5 * 4 - 2)
    first = 1 + 0.5 * (1 + 0.5 * 2 - 1) + 0.5 * 0.5 * (last - 2)
    assert targets[:, 0] == pytest.approx([first, last])
    assert advantages[:, 0] == pytest.approx([1 + 0.5 * last - 1, 2 + 0.5 * 4 - 2])
