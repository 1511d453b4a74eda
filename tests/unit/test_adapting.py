"""What a run's exchanges travel as follows how much of its members' time they take, and does not swing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shoal.training.exchange.adapting import LEAST_BYTES, SHORT, STEPS, TOO_LONG, is_vote, next_step, vote
from shoal.training.exchange.codecs import packed_bytes
from shoal.training.exchange.rules import Codec

SMALLER, SAME, LARGER = [1, 0, 0], [0, 1, 0], [0, 0, 1]
LARGE = LEAST_BYTES


@pytest.mark.parametrize(
    ("exchanged_s", "worked_s", "num_bytes", "expected"),
    [
        (3.0, 7.0, LARGE, SMALLER),
        (1.0, 9.0, LARGE, SAME),
        (0.1, 9.9, LARGE, LARGER),
        (3.0, 7.0, LARGE - 1, SAME),
        (None, 7.0, LARGE, SAME),
        (0.0, 0.0, LARGE, LARGER),
    ],
)
def test_a_vote_says_how_much_of_the_time_went(
    exchanged_s: float | None, worked_s: float, num_bytes: int, expected: list[int]
) -> None:
    found = vote(exchanged_s, worked_s, num_bytes)
    assert found.tolist() == expected
    assert is_vote(found)


def test_what_is_no_vote_of_one_is_none() -> None:
    for given in ([2, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, -1]):
        assert not is_vote(np.array(given))


def test_more_than_half_move_all_of_them_and_no_further_than_there_are_steps() -> None:
    last = len(STEPS) - 1
    assert [next_step(step, np.array([3, 1, 1])) for step in range(len(STEPS))] == [1, 2, last]
    assert [next_step(step, np.array([1, 1, 3])) for step in range(len(STEPS))] == [0, 0, 1]
    for votes in ([2, 0, 2], [1, 3, 0], [0, 0, 0], [2, 1, 1]):
        assert next_step(1, np.array(votes)) == 1


@pytest.mark.parametrize("slow_s", [0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0, 100.0])
def test_whatever_the_link_it_comes_to_rest(slow_s: float) -> None:
    """``slow_s``: what an exchange of all bits takes, of 1 s of work; a codec takes its part of that."""
    size = 1 << 20
    step, steps = 0, []
    for _ in range(10):
        took = slow_s * packed_bytes(size, STEPS[step]) / (4 * size)
        step = next_step(step, 3 * vote(took, 1.0, 4 * size))
        steps.append(step)
    assert len(set(steps[3:])) == 1, steps
    if slow_s < TOO_LONG:
        assert STEPS[step] is Codec.FP32
    if slow_s > 2:
        assert STEPS[step] is Codec.INT4


def test_no_step_leads_back_at_once() -> None:
    for before, after in itertools.pairwise(STEPS):
        assert packed_bytes(1 << 16, before) / packed_bytes(1 << 16, after) < TOO_LONG / SHORT
