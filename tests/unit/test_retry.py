"""A call is made again only after faults that pass, a few times, at uneven intervals, and never past its deadline."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import Status
from shoal.protocol.retry import FIRST_WAIT_S, MAX_TRIES, wait_before_retry

PASSING = {Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED}


def waits(tries: int, *, count: int = 2000, seed: int = 7) -> list[float]:
    """Of many callers whose try failed at the same time."""
    chance = Random(seed)
    found = [wait_before_retry(Status.UNAVAILABLE, tries, math.inf, chance) for _ in range(count)]
    return [wait_s for wait_s in found if wait_s is not None]


@pytest.mark.parametrize("status", Status)
def test_only_faults_that_pass_are_tried_again(status: Status) -> None:
    wait_s = wait_before_retry(status, 1, math.inf, Random(7))
    assert (wait_s is not None) == (status in PASSING)


@pytest.mark.parametrize("status", sorted(PASSING))
def test_after_so_many_tries_it_gives_up(status: Status) -> None:
    chance = Random(7)
    going_on = [wait_before_retry(status, tries, math.inf, chance) is not None for tries in range(1, MAX_TRIES + 3)]
    assert going_on == [tries < MAX_TRIES for tries in range(1, MAX_TRIES + 3)]


@pytest.mark.parametrize("tries", range(1, MAX_TRIES))
def test_waits_are_spread_over_all_of_a_time_that_doubles(tries: int) -> None:
    most_s = FIRST_WAIT_S * 2 ** (tries - 1)
    found = waits(tries)
    assert len(found) == 2000
    assert 0 <= min(found) < 0.02 * most_s
    assert 0.98 * most_s < max(found) <= most_s
    assert sum(found) / len(found) == pytest.approx(most_s / 2, rel=0.05)


def test_callers_that_failed_together_do_not_come_back_together() -> None:
    assert len(set(waits(1))) == 2000


def test_the_same_seed_gives_the_same_waits() -> None:
    assert waits(2, seed=3) == waits(2, seed=3) != waits(2, seed=4)


@given(st.sampled_from(Status), st.integers(1, MAX_TRIES + 1), st.floats(-1, 0.5), st.integers(0, 2**32))
def test_nobody_waits_past_the_deadline(status: Status, tries: int, left_s: float, seed: int) -> None:
    wait_s = wait_before_retry(status, tries, left_s, Random(seed))
    assert wait_s is None or 0 <= wait_s < left_s


@pytest.mark.parametrize("left_s", [0.0, -5.0])
def test_when_the_time_is_over_it_gives_up(left_s: float) -> None:
    assert wait_before_retry(Status.UNAVAILABLE, 1, left_s, Random(7)) is None
