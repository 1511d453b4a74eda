"""What the others are told of how far a node is: at once what they act by, the rest now and then."""

from __future__ import annotations

import pytest

from shoal.training.manifest import Role
from shoal.training.progress import FACTS_GAP_S, FACTS_PEERS, FEW, Progress
from shoal.training.run_events import Collected
from shoal.training.statements import Facts, Phase


def tell(progress: Progress, num_live: int, now: float) -> Facts | None:
    return progress.to_tell(Role.LEARNER, 0, num_live, now)


@pytest.mark.parametrize("num_live", [FEW + 1, 128])
def test_whoever_begins_to_learn_or_ceases_to_is_told_of_at_once_in_a_large_swarm(num_live: int) -> None:
    """In one of 128, the others took the first epoch for a swarm of seven, for what was said next came 16 s later."""
    progress = Progress()
    assert tell(progress, num_live, 0.0) is not None  # starting
    progress.phase = Phase.COLLECTING
    begun = tell(progress, num_live, 0.1)
    assert begun is not None
    assert begun.phase is Phase.COLLECTING
    progress.phase = Phase.DONE
    assert tell(progress, num_live, 0.2) is not None


def test_what_nobody_waits_for_in_a_large_swarm_is_told_as_seldom_as_it_is_large() -> None:
    progress, num_live = Progress(phase=Phase.COLLECTING), 128
    gap_s = FACTS_GAP_S * num_live / FACTS_PEERS
    assert tell(progress, num_live, 0.0) is not None
    for number in range(1, 100):
        progress.samples = number
        progress.phase = Phase.UPDATING if number % 2 else Phase.COLLECTING
        assert tell(progress, num_live, number * gap_s / 100) is None
    progress.samples = 100
    assert tell(progress, num_live, gap_s) is not None
    assert tell(progress, num_live, 3 * gap_s) is None  # nothing is new


def test_the_others_are_told_at_once_that_an_update_begins_and_not_that_what_was_exchanged_is_merged() -> None:
    progress = Progress(phase=Phase.COLLECTING)
    assert tell(progress, 5, 0.0) is not None
    progress.phase = Phase.UPDATING
    begun = tell(progress, 5, 0.1)
    assert begun is not None
    assert begun.phase is Phase.UPDATING
    progress.phase = Phase.EXCHANGING
    assert tell(progress, 5, 0.2) is None  # an offer says so
    assert tell(progress, 5, 0.1 + FACTS_GAP_S) is not None
    progress.phase = Phase.UPDATING
    assert tell(progress, 5, 0.2 + FACTS_GAP_S) is None


def test_a_step_that_is_longer_than_a_call_is_as_slow_as_it_is() -> None:
    progress = Progress()
    for _ in range(19):
        progress.collected(Collected(0, 0, 0.25), 1.0)
    assert progress.speed == 0.0
    progress.collected(Collected(32, 32, 0.25), 1.0)
    assert progress.speed == 32 / 5.0
