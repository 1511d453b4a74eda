"""Learners in one process that update at once, as a swarm would."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from shoal.training.algorithms.local import update_together
from shoal.training.algorithms.ppo import PPO
from shoal.training.manifest import Mode

from .learning import PEERS, assert_close, learners, run_of


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.GRADIENT])
def test_all_hold_the_same_afterwards(mode: Mode) -> None:
    several = learners(PPO(), run_of(PPO(), "gym:CartPole-v1", mode), 3)
    for each in several:
        each.collect(64)
    stats = update_together(dict(zip(PEERS, several, strict=True)))
    assert [each.samples for each in stats] == [64, 64, 64]
    for each in several[1:]:
        assert_close(each.export_state(), several[0].export_state(), 0.0)


class Asking:
    """Wants something of a swarm that is no average."""

    def update(self) -> Generator[Any, Any, None]:
        yield "a seat"


def test_who_asks_for_more_than_averages_is_told() -> None:
    with pytest.raises(TypeError, match="a seat"):
        update_together({PEERS[0]: Asking()})  # type: ignore[dict-item]
