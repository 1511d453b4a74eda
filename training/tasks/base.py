"""What a task is to an algorithm: spaces, and environments that step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shoal.training.tasks.failures import Failures

Floats: TypeAlias = npt.NDArray[np.float32]
Actions: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Discrete:
    """One of ``count`` actions, numbered from 0."""

    count: int


@dataclass(frozen=True, slots=True)
class Continuous:
    """A vector of ``size`` numbers. Where the task bounds them, -1 to 1 spans its range and the rest is clipped."""

    size: int


ActionSpace: TypeAlias = Discrete | Continuous


@dataclass(frozen=True, slots=True)
class Transition:
    """What one step of N environments brought.

    Attributes:
        observations: ``[N, observation_size]``; of the next episode's start where one ended.
        rewards: ``[N]``.
        terminated: ``[N]``, whether an episode ended in a state that is worth nothing from here on.
        truncated: ``[N]``, whether it was cut off, by a time limit, in a state that is worth what it is worth.
        final_observations: by environment, what was seen last in an episode that ended.
        failed: environments that failed in this step, or in the reset before it, and were replaced by new ones. Their
            episodes are cut off where they were seen last, with a reward of 0, and are not to be counted as episodes.
    """

    observations: Floats
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    final_observations: dict[int, Floats]
    failed: frozenset[int] = frozenset()


class VectorEnv(Protocol):
    """N environments that step together. One whose episode ends is reset within the same step.

    One that fails is told to `Task.failures` and replaced, so that the others go on.
    """

    num_envs: int

    def reset(self, seeds: Sequence[int]) -> Floats:
        """Start all anew, each from its own seed, and so repeatably.

        Returns:
            Observations ``[N, observation_size]``.
        """
        ...

    def step(self, actions: Actions) -> Transition:
        """Act: ``[N]`` int64 for `Discrete`, ``[N, size]`` float32 for `Continuous`."""
        ...

    def close(self) -> None:
        """Let go of what the environments hold."""
        ...


class Task(Protocol):
    """Something to be learned."""

    name: str
    version: int
    """Of all tasks of its scheme: raised when one of the same name shows, rewards or ends otherwise than before."""
    observation_size: int
    action_space: ActionSpace
    target_return: float | None
    """The mean return at which the task counts as solved, where it says so itself."""
    failures: Failures
    """What went wrong in its environments."""

    def make(self, num_envs: int) -> VectorEnv:
        """Environments of this task; `VectorEnv.reset` comes first."""
        ...
