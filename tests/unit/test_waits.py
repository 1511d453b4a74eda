"""How long learners wait for each other is learned from when others' words came, and never from one's own waiting."""

from __future__ import annotations

from shoal.training.exchange.waits import (
    FIRST_OFFERS_S,
    FIRST_SILENCE_S,
    LEAST_ROUNDS,
    MAX_OFFERS_S,
    MAX_SILENCE_S,
    MIN_OFFERS_S,
    MIN_SILENCE_S,
    PAST_ROUNDS,
    Waits,
)


def waits_after(*rounds: tuple[float, float]) -> Waits:
    waits = Waits()
    for offers_s, silence_s in rounds:
        waits.learn(offers_s, silence_s)
    return waits


def test_before_anything_is_known_others_are_waited_for_patiently() -> None:
    waits = waits_after(*[(0.1, 0.1)] * (LEAST_ROUNDS - 1))
    assert (waits.offers_s, waits.silence_s) == (FIRST_OFFERS_S, FIRST_SILENCE_S)


def test_a_few_rounds_are_enough_to_learn_from() -> None:
    waits = waits_after(*[(0.5, 0.8)] * LEAST_ROUNDS)
    assert (waits.offers_s, waits.silence_s) == (0.5, 0.8)


def test_waits_stay_within_bounds_whatever_the_past_was() -> None:
    fast, slow = waits_after(*[(0.0, 0.0)] * 9), waits_after(*[(1e9, 1e9)] * 9)
    assert (fast.offers_s, fast.silence_s) == (MIN_OFFERS_S, MIN_SILENCE_S)
    assert (slow.offers_s, slow.silence_s) == (MAX_OFFERS_S, MAX_SILENCE_S)


def test_one_slow_round_among_many_changes_nothing() -> None:
    steady = waits_after(*[(0.5, 0.6)] * 20)
    disturbed = waits_after(*[(0.5, 0.6)] * 20, (30.0, 10.0))
    assert (disturbed.offers_s, disturbed.silence_s) == (steady.offers_s, steady.silence_s)


def test_the_more_rounds_differ_the_longer_is_waited() -> None:
    steady = waits_after(*[(0.5, 0.6)] * 9)
    unsteady = waits_after(*[(0.4, 0.5), (0.5, 0.6), (0.6, 0.7)] * 3)
    assert unsteady.offers_s > steady.offers_s
    assert unsteady.silence_s > steady.silence_s


def test_waits_follow_a_network_that_became_fast_again() -> None:
    waits = waits_after(*[(5.0, 5.0)] * PAST_ROUNDS, *[(0.2, 0.5)] * PAST_ROUNDS)
    assert (waits.offers_s, waits.silence_s) == (0.2, 0.5)


def test_an_offer_that_came_before_half_had_offered_counts_as_no_wait() -> None:
    assert waits_after(*[(-3.0, -1.0)] * 5).offers_s == MIN_OFFERS_S
