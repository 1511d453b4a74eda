"""What is learned: environments with rewards, found by name through the ``shoal.tasks`` entry points.

A task is called ``scheme:name``. The entry point of the scheme is a callable that takes the name and gives a `Task`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from shoal.protocol.errors import UsageError
from shoal.training.plugins import load_plugin
from shoal.training.tasks.base import (
    ActionSpace,
    Box,
    Continuous,
    Discrete,
    MultiDiscrete,
    Task,
    Transition,
    VectorEnv,
)

__all__ = [
    "ActionSpace",
    "Box",
    "Continuous",
    "Discrete",
    "MultiDiscrete",
    "Task",
    "Transition",
    "VectorEnv",
    "load_task",
]


def load_task(name: str) -> Task:
    """The task of this name, for example ``gym:CartPole-v1``.

    Raises:
        UsageError: if it is unknown, cannot be learned by what is here, or needs what is not installed.
    """
    scheme, colon, rest = name.partition(":")
    if not (scheme and colon and rest):
        raise UsageError(f"task {name[:80]!r} needs a scheme and a name, for example gym:CartPole-v1")
    # `cast` alone would be the module of that name, once something has imported it.
    factory = typing.cast(Callable[[str], Task], load_plugin("shoal.tasks", "task scheme", scheme))
    return factory(rest)
