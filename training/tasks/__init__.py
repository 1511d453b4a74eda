"""What is learned: environments with rewards, found by name through the ``shoal.tasks`` entry points.

A task is called ``scheme:name``. The entry point of the scheme is a callable that takes the name and gives a `Task`.
One that takes ``arguments`` beside it, a mapping, can be told what its environments are made with.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from shoal.protocol.errors import UsageError
from shoal.training.env_arguments import check_arguments
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


def load_task(name: str, arguments: Mapping[str, Any] | None = None) -> Task:
    """The task of this name, for example ``gym:CartPole-v1``.

    Args:
        name: ``scheme:name``.
        arguments: what its environments are made with, beside their own defaults; see `shoal.training.env_arguments`.

    Raises:
        UsageError: if it is unknown, cannot be learned by what is here, needs what is not installed, or takes no such
            arguments.
    """
    scheme, colon, rest = name.partition(":")
    if not (scheme and colon and rest):
        raise UsageError(f"task {name[:80]!r} needs a scheme and a name, for example gym:CartPole-v1")
    # `cast` alone would be the module of that name, once something has imported it.
    factory = typing.cast(Callable[[str], Task], load_plugin("shoal.tasks", "task scheme", scheme))
    if not arguments:
        return factory(rest)
    check_arguments(arguments)
    if "arguments" not in inspect.signature(factory).parameters:
        raise UsageError(f"{scheme} tasks take no arguments; leave {', '.join(arguments)[:80]} out")
    return typing.cast(Callable[..., Task], factory)(rest, arguments=dict(arguments))
