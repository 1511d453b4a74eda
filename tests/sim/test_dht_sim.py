"""The real cores of the distributed hash table on the seeded network: found, soon, with churn and with liars."""

from __future__ import annotations

import pytest

from shoal.dht.sim import DhtSimConfig, simulate


@pytest.mark.parametrize(("liars", "most_s"), [(0.0, 1.0), (0.2, 2.0)])
def test_what_is_published_is_found_soon(liars: float, most_s: float) -> None:
    config = DhtSimConfig(nodes=120, seconds=16, warm_s=10, liars=liars, latency_s=0.025, seed=1)
    report = simulate(config)
    for measured in (report.put, report.get, report.provide, report.find):
        assert len(measured.seconds) >= 25
        assert measured.success >= 0.99
        assert measured.median_s <= most_s


def test_one_seed_gives_one_run() -> None:
    config = DhtSimConfig(nodes=30, seconds=5, warm_s=5, liars=0.2, seed=3)
    assert simulate(config) == simulate(config)
