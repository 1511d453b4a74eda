"""Whole swarms of the real cores: with loss, kills, one that is late and liars, all honest members stay together."""

from __future__ import annotations

import pytest

from shoal.training import sim, sim_liars
from shoal.training.sim import SimConfig, SimReport, Swarm, limit_s, simulate

MAX_MESSAGES = 16


def assert_it_held(report: SimReport, epochs: int) -> None:
    """All agree, nobody stops, and gossip stays cheap."""
    assert report.epochs >= epochs, report
    assert report.agreed == 1.0, report
    assert report.stopped == 0, report
    assert report.messages_per_announcement <= MAX_MESSAGES, report


@pytest.mark.parametrize("seed", [1])
def test_a_swarm_with_every_fault_at_once_agrees_on_every_round(seed: int) -> None:
    config = SimConfig(peers=32, epochs=25, loss=0.05, kills_per_hour=200, late=1, liars=0.1, seed=seed)
    report = simulate(config, clean_epochs=10)
    assert_it_held(report, 25)
    assert report.wait_ratio <= 2, report


def test_128_learners_with_every_fault_at_once_agree_and_gossip_no_more_than_a_small_swarm() -> None:
    """A tenth of them liars of each kind, one always late, loss, and one killed every 18 s.

    How long they wait is held against a clean swarm by hand, over 100 rounds; in the first ten the waits are not yet
    learned, and liars whose turn it is cost more: `shoal sim --peers 128 --loss 0.05 --kills-per-hour 200 --late 1
    --liars 0.1`.
    """
    config = SimConfig(peers=128, epochs=9, loss=0.05, kills_per_hour=200, late=1, liars=0.1, seed=1)
    swarm = Swarm(config)
    swarm.play(limit_s(config))
    assert_it_held(swarm.report(), config.epochs)


@pytest.mark.parametrize("seed", range(8))
def test_three_that_die_and_come_back_end_together(seed: int) -> None:
    config = SimConfig(peers=3, epochs=60, kills_per_hour=300, loss=0.05, seed=seed)
    swarm = Swarm(config)
    swarm.play(limit_s(config))
    report = swarm.report()
    # One that was alone, died, and came back when the others had gone on apart gives up what it made: no more differs.
    assert report.agreed >= 0.85, f"seed {seed}: {report}"
    assert report.stopped == 0, f"seed {seed}: {report}"


SEEDS = (3, 4)


def played(kind: type[sim_liars.Liar] | None, monkeypatch: pytest.MonkeyPatch) -> list[SimReport]:
    """Eight honest members, and one of this kind; long enough that what is found out once weighs little."""
    reports = []
    for seed in SEEDS:
        config = SimConfig(peers=9, epochs=40, loss=0.02, seed=seed, liars=0.0 if kind is None else 1 / 9)
        if kind is not None:
            monkeypatch.setattr(sim, "KINDS", (kind,))
        swarm = Swarm(config)
        swarm.play(limit_s(config))
        reports.append(swarm.report())
    return reports


@pytest.fixture(scope="module")
def clean() -> list[SimReport]:
    """The same machines, all honest."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return played(None, monkeypatch)


@pytest.mark.parametrize("kind", sim_liars.KINDS, ids=lambda kind: kind.__name__)
def test_one_liar_of_each_kind_slows_nobody(
    kind: type[sim_liars.Liar], clean: list[SimReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items 2, 3, 7 and 9; ATTACKS rows 2, 4, 5, 7, 15 and 24."""
    reports = played(kind, monkeypatch)
    assert [(report.agreed, report.stopped) for report in reports] == [(1.0, 0)] * len(SEEDS), reports
    assert pace_of(reports) >= 0.8 * pace_of(clean), reports


def pace_of(reports: list[SimReport]) -> float:
    """Epochs per hour, a mean."""
    return sum(report.epochs_per_hour for report in reports) / len(reports)
