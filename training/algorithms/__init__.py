"""How it is learned: one short file per algorithm, found through the ``shoal.algorithms`` entry points."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from shoal.training.algorithms.base import Algorithm, Collected, DivergedError, Exchange, Learner, Update, UpdateStats
from shoal.training.plugins import load_plugin

__all__ = ["Algorithm", "Collected", "DivergedError", "Exchange", "Learner", "Update", "UpdateStats", "load_algorithm"]


def load_algorithm(name: str) -> Algorithm:
    """The algorithm of this name, for example ``ppo``.

    Raises:
        UsageError: if nobody offers it, or what it needs is not installed.
    """
    return cast(Callable[[], Algorithm], load_plugin("shoal.algorithms", "algorithm", name))()
