"""What one peer may hold of a node: so many calls, so many bytes, so many calls a second, and never more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.budget import BURST_S, Budget
from shoal.protocol.limits import MAX_CALLS_IN_FLIGHT, MAX_HELD_BYTES, MAX_MESSAGE_STREAMS, MAX_STREAM_HELD_BYTES


def times_let_in(budget: Budget, *, calls_per_s: float, now: float, method: str = "a.b", tries: int = 1000) -> int:
    return sum(budget.spend(method, calls_per_s, now) is None for _ in range(tries))


# --- calls at once ---------------------------------------------------------------------------------------------------


def test_one_call_too_many_is_told_why_and_the_next_comes_in_when_one_has_left() -> None:
    budget = Budget(max_calls=2)
    assert budget.enter(10) is None
    assert budget.enter(20) is None
    refusal = budget.enter(30)
    assert refusal is not None
    assert "more than 2 calls" in refusal
    assert (budget.num_calls, budget.held_bytes) == (2, 30), "what was refused holds nothing"
    budget.leave(10)
    assert budget.enter(30) is None
    assert (budget.num_calls, budget.held_bytes) == (2, 50)


def test_the_usual_bounds_are_those_of_the_limits() -> None:
    budget = Budget()
    assert [budget.enter(0) for _ in range(MAX_CALLS_IN_FLIGHT)] == [None] * MAX_CALLS_IN_FLIGHT
    assert budget.enter(0) is not None
    budget.leave(0)
    assert budget.enter(MAX_HELD_BYTES + 1) is not None
    assert budget.enter(MAX_HELD_BYTES) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def test_requests_are_let_in_up_to_the_last_byte() -> None:
    budget = Budget(max_bytes=100)
    assert budget.enter(60) is None
    assert budget.enter(40) is None
    refusal = budget.enter(1)
    assert refusal is not None
    assert "more than 100 bytes" in refusal


def test_an_answer_waits_until_others_have_been_written() -> None:
    budget = Budget(max_bytes=100)
    budget.enter(10)
    assert budget.reserve(50)
    budget.enter(10)
    assert not budget.reserve(50)
    assert budget.held_bytes == 70, "what has to wait holds nothing yet"
    budget.leave(60)
    assert budget.reserve(50)
    budget.leave(60)
    assert (budget.num_calls, budget.held_bytes) == (0, 0)


def test_a_reserved_answer_leaves_no_room_for_a_request() -> None:
    budget = Budget(max_bytes=100)
    budget.enter(10)
    budget.reserve(90)
    assert budget.enter(1) is not None
    budget.leave(100)
    assert budget.enter(1) is None


def test_a_lone_call_gets_in_however_big_and_is_alone_until_it_leaves() -> None:
    budget = Budget(max_bytes=100)
    assert budget.enter(500) is None
    assert budget.reserve(1000)
    assert budget.enter(0) is not None
    budget.leave(1500)
    assert budget.enter(0) is None


def test_a_call_beside_others_is_never_too_big_for_them() -> None:
    budget = Budget(max_bytes=100)
    budget.enter(0)
    assert budget.enter(101) is not None
    assert budget.reserve(0)
    budget.enter(0)
    assert not budget.reserve(101)


def test_when_all_calls_wait_one_may_run_for_else_none_would_ever_make_room() -> None:
    budget = Budget(max_bytes=100)
    budget.enter(50)
    budget.enter(50)
    assert budget.reserve(40)
    assert not budget.reserve(40)
    budget.leave(90)
    assert budget.reserve(40)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 60)), max_size=60))
def test_no_more_is_ever_held_than_the_bound_and_one_answer(steps: list[tuple[bool, int, int]]) -> None:
    budget = Budget(max_calls=5, max_bytes=100)
    running: list[int] = []
    waiting: list[tuple[int, int]] = []
    for is_coming, request_bytes, answer_bytes in steps:
        if is_coming and budget.enter(request_bytes) is None:
            waiting.append((request_bytes, answer_bytes))
        elif not is_coming and running:
            budget.leave(running.pop(request_bytes % len(running)))
        while waiting and budget.reserve(waiting[0][1]):
            running.append(sum(waiting.pop(0)))
        held = sum(running) + sum(request for request, _ in waiting)
        assert (budget.num_calls, budget.held_bytes) == (len(running) + len(waiting), held)
        assert budget.num_calls <= 5
        assert held <= 100 + 60
        assert running or not waiting
    for num_bytes in running:
        budget.leave(num_bytes)
    for request_bytes, _ in waiting:
        budget.leave(request_bytes, was_running=False)
    assert (budget.num_calls, budget.num_running, budget.held_bytes) == (0, 0, 0)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_streams_leave_room_for_the_other_calls_of_their_peer() -> None:
    budget = Budget()
    for _ in range(MAX_MESSAGE_STREAMS // 2):
        assert budget.enter(MAX_STREAM_HELD_BYTES, 2) is None
        assert budget.reserve(MAX_STREAM_HELD_BYTES)
    refusal = budget.enter(MAX_STREAM_HELD_BYTES, 1)
    assert refusal is not None
    assert "streams of messages" in refusal
    assert budget.enter(MAX_HELD_BYTES // 4) is None
    budget.leave(2 * MAX_STREAM_HELD_BYTES, 2)
    assert budget.enter(MAX_STREAM_HELD_BYTES, 1) is None


# --- unfinished frames -----------------------------------------------------------------------------------------------


def test_unfinished_frames_of_all_streams_together_have_a_bound() -> None:
    budget = Budget(max_bytes=100)
    assert budget.buffer(60) is None  # of one stream
    assert budget.buffer(40) is None  # of another
    refusal = budget.buffer(1)
    assert refusal is not None
    assert "more than 100 bytes of unfinished frames" in refusal


def test_frames_that_became_whole_or_whose_stream_is_gone_do_not_count_any_more() -> None:
    budget = Budget(max_bytes=100)
    budget.buffer(101)
    assert budget.buffer(-41) is None
    assert budget.buffer(40) is None
    assert budget.buffered_bytes == 100
    budget.buffer(-100)
    assert budget.buffered_bytes == 0


def test_unfinished_frames_and_calls_are_counted_apart() -> None:
    budget = Budget(max_bytes=100)
    assert budget.enter(100) is None
    assert budget.buffer(100) is None
    budget.leave(100)
    assert budget.enter(100) is None
    assert (budget.buffered_bytes, budget.held_bytes) == (100, 100)


# --- calls a second --------------------------------------------------------------------------------------------------


def test_a_burst_is_let_in_and_then_the_rate() -> None:
    budget = Budget()
    assert times_let_in(budget, calls_per_s=8, now=100.0) == 8 * BURST_S
    assert times_let_in(budget, calls_per_s=8, now=100.0) == 0
    assert times_let_in(budget, calls_per_s=8, now=100.5) == 4
    assert times_let_in(budget, calls_per_s=8, now=101.5) == 8


def test_what_is_not_used_does_not_gather_beyond_a_burst() -> None:
    budget = Budget()
    times_let_in(budget, calls_per_s=8, now=0.0)
    assert times_let_in(budget, calls_per_s=8, now=1e6) == 8 * BURST_S


def test_parts_of_a_call_gather_though_there_were_tries_in_between() -> None:
    budget = Budget()
    times_let_in(budget, calls_per_s=1, now=0.0)
    assert times_let_in(budget, calls_per_s=1, now=0.25, tries=1) == 0
    assert times_let_in(budget, calls_per_s=1, now=0.5, tries=1) == 0
    assert times_let_in(budget, calls_per_s=1, now=0.75, tries=1) == 0
    assert times_let_in(budget, calls_per_s=1, now=1.0) == 1


@pytest.mark.parametrize("calls_per_s", [0.25, 0.5])
def test_a_method_that_may_be_called_less_than_once_in_a_burst_may_be_called_once(calls_per_s: float) -> None:
    budget = Budget()
    assert times_let_in(budget, calls_per_s=calls_per_s, now=0.0) == 1
    assert times_let_in(budget, calls_per_s=calls_per_s, now=0.5 / calls_per_s) == 0
    assert times_let_in(budget, calls_per_s=calls_per_s, now=1 / calls_per_s) == 1


def test_each_method_has_a_rate_of_its_own() -> None:
    budget = Budget()
    assert times_let_in(budget, method="a.b", calls_per_s=1, now=0.0) == 2
    assert times_let_in(budget, method="a.c", calls_per_s=4, now=0.0) == 8


def test_who_comes_too_soon_is_told_of_which_method_and_when_to_come_again() -> None:
    budget = Budget()
    times_let_in(budget, calls_per_s=0.5, now=0.0)
    assert budget.spend("a.b", 0.5, 0.5) == "more than 0.5 calls of a.b a second; try again in 1.5 s"
    assert budget.spend("a.b", 0.5, 2.0) is None


@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=200),
    st.sampled_from([0.1, 1.0, 3.0, 50.0]),
)
def test_over_any_time_no_more_is_let_in_than_the_rate_and_one_burst(waits_s: list[float], calls_per_s: float) -> None:
    budget = Budget()
    now, num_let_in = 1000.0, 0
    for wait_s in waits_s:
        now += wait_s
        num_let_in += budget.spend("a.b", calls_per_s, now) is None
        most = max(1.0, calls_per_s * BURST_S) + calls_per_s * (now - 1000.0)
        assert num_let_in <= most + 1e-6
