"""What a node tells of its calls is what happened: how many, how fast to within a fifth, how much, and what failed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from shoal.node.metrics import Latencies, MethodMetrics, Metrics
from shoal.protocol.errors import Status

WITHIN = 0.2
SEED = random.randrange(2**32)


def latencies_of(durations: list[float]) -> Latencies:
    latencies = Latencies()
    for seconds in durations:
        latencies.add(seconds)
    return latencies


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.uniform(0.001, 0.1),
        lambda rng: rng.expovariate(1 / 0.02) + 2e-6,
        lambda rng: 10 ** rng.uniform(-5.5, 2.9),
    ],
    ids=["uniform", "exponential", "over all octaves"],
)
def test_every_quantile_is_right_to_within_a_fifth(draw: Callable[[random.Random], float]) -> None:
    rng = random.Random(SEED)
    durations = sorted(draw(rng) for _ in range(2000))
    latencies = latencies_of(durations)
    assert latencies.count == 2000
    for part in (0.001, 0.01, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0):
        exact = durations[math.ceil(part * 2000) - 1]
        assert latencies.quantile(part) == pytest.approx(exact, rel=WITHIN), f"seed {SEED}, quantile {part}"


@pytest.mark.parametrize("seconds", [1e-6, 2**-20, 0.5, 1.0, math.nextafter(1.0, 0), 1000.0])
def test_one_duration_is_every_quantile(seconds: float) -> None:
    latencies = latencies_of([seconds])
    for part in (0.0, 0.5, 1.0):
        assert latencies.quantile(part) == pytest.approx(seconds, rel=WITHIN)


def test_quantiles_never_fall_as_their_part_grows() -> None:
    rng = random.Random(SEED)
    latencies = latencies_of([rng.lognormvariate(-5, 2) for _ in range(500)])
    quantiles = [latencies.quantile(part / 100) for part in range(101)]
    assert quantiles == sorted(quantiles), f"seed {SEED}"


def test_without_durations_there_is_no_quantile_but_zero() -> None:
    assert Latencies().quantile(0.0) == Latencies().quantile(0.99) == 0.0


def test_what_took_no_time_that_the_clock_could_tell_counts_among_the_shortest() -> None:
    latencies = latencies_of([0.0, 1e-9])
    assert latencies.count == 2
    assert latencies.quantile(1.0) < 2e-6


def test_what_took_longer_than_the_last_bucket_counts_in_it() -> None:
    latencies = latencies_of([100_000.0])
    assert latencies.count == 1
    assert latencies.quantile(0.5) == pytest.approx(1024, rel=WITHIN)


def test_calls_bytes_and_errors_add_up() -> None:
    metrics = MethodMetrics()
    metrics.count(Status.OK, 0.010, 100, 1000)
    metrics.count(Status.OK, 0.010, 1, 10)
    metrics.count(Status.NOT_FOUND, 0.010, 5, 0)
    metrics.count(Status.NOT_FOUND, 0.010, 5, 0)
    metrics.count(Status.CANCELLED, 0.010, 0, 0)
    assert metrics.calls == metrics.latencies.count == 5
    assert (metrics.request_bytes, metrics.answer_bytes) == (111, 1010)
    assert metrics.errors == {Status.NOT_FOUND: 2, Status.CANCELLED: 1}, "success is no error"


def test_a_method_is_counted_apart_from_others_and_apart_for_each_side() -> None:
    metrics = Metrics()
    metrics.of_served("a.x").count(Status.OK, 0.1, 0, 0)
    metrics.of_served("a.x").count(Status.OK, 0.1, 0, 0)
    metrics.of_served("a.y").count(Status.OK, 0.1, 0, 0)
    metrics.of_called("a.x").count(Status.INTERNAL, 0.1, 0, 0)
    assert {name: method.calls for name, method in metrics.served.items()} == {"a.x": 2, "a.y": 1}
    assert {name: method.calls for name, method in metrics.called.items()} == {"a.x": 1}
    assert metrics.called["a.x"].errors == {Status.INTERNAL: 1}
    assert metrics.served["a.x"].errors == {}
