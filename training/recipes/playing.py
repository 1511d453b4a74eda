"""Playing without company, and what a play is worth."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np

from shoal.training.recipes.recipe import EARNED
from shoal.training.tasks.playing import Played
from shoal.training.tasks.stage import Collecting, Staged

T = TypeVar("T")


def run_out(asking: Generator[Any, Any, T]) -> T:
    """Run something to its end; whatever it asks, nobody answers."""
    try:
        while True:
            asking.send(None)
    except StopIteration as end:
        found: T = end.value
        return found


def play_out(collecting: Collecting) -> Staged:
    """Play on to the end; whoever sits at another node does not answer."""
    return run_out(collecting)


def score_of(played: Played, score: str) -> float:
    """A score of a play, or the mean of what its roles earned; 0 where the game gave none of this name."""
    if score == EARNED:
        return float(np.mean(list(played.returns.values()))) if played.returns else 0.0
    return float(played.scores.get(score, 0.0))
