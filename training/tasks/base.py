"""What a task is to an algorithm: spaces, and environments that step together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shoal.training.tasks.failures import Failures

Floats: TypeAlias = npt.NDArray[np.float32]
Observations: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.uint8]
Actions: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, init=False)
class Box:
    """An array of finite float32, or of bytes, which networks see as numbers from 0 to 1.

    Attributes:
        shape: of one observation. A whole number is one axis; two axes or three are an image (`is_image`).
        dtype: as which observations are kept: bytes take a quarter of the memory.
    """

    shape: tuple[int, ...]
    dtype: Literal["float32", "uint8"]

    def __init__(self, shape: int | tuple[int, ...], dtype: Literal["float32", "uint8"] = "float32") -> None:
        object.__setattr__(self, "shape", shape if isinstance(shape, tuple) else (shape,))
        object.__setattr__(self, "dtype", dtype)

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def is_vector(self) -> bool:
        """Whether it is one axis of float32."""
        return not self.is_image and self.dtype == "float32"

    @property
    def is_image(self) -> bool:
        """Whether what is near in it belongs together: rows and columns, with channels first, last, or only one."""
        return len(self.shape) > 1


@dataclass(frozen=True, slots=True)
class Discrete:
    """One of ``count`` actions, numbered from 0."""

    count: int


@dataclass(frozen=True, slots=True)
class Continuous:
    """A vector of ``size`` numbers. Where the task bounds them, -1 to 1 spans its range and the rest is clipped."""

    size: int


@dataclass(frozen=True, slots=True)
class MultiDiscrete:
    """Several choices at once, each independent of the others: one of ``counts[i]``, numbered from 0, for each i."""

    counts: tuple[int, ...]


ActionSpace: TypeAlias = Discrete | Continuous | MultiDiscrete


@dataclass(frozen=True, slots=True)
class Transition:
    """What one step of N environments brought.

    Attributes:
        observations: ``[N, *shape]``; of the next episode's start where one ended.
        rewards: ``[N]``.
        terminated: ``[N]``, whether an episode ended in a state that is worth nothing from here on.
        truncated: ``[N]``, whether it was cut off, by a time limit, in a state that is worth what it is worth.
        final_observations: by environment, what was seen last in an episode that ended.
        failed: environments that failed in this step, or in the reset before it, and were replaced by new ones. Their
            episodes are cut off where they were seen last, with a reward of 0, and are not to be counted as episodes.
    """

    observations: Observations
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    final_observations: dict[int, Observations]
    failed: frozenset[int] = frozenset()


class VectorEnv(Protocol):
    """N environments that step together. One whose episode ends is reset within the same step.

    One that fails is told to `Task.failures` and replaced, so that the others go on.
    """

    num_envs: int

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start all anew, each from its own seed, and so repeatably.

        Returns:
            Observations ``[N, *shape]`` of the dtype that the task's space says.
        """
        ...

    def step(self, actions: Actions) -> Transition:
        """Act: ``[N]`` int64 for `Discrete`, ``[N, size]`` float32 for `Continuous`.

        ``[N, len(counts)]`` int64 for `MultiDiscrete`.
        """
        ...

    def close(self) -> None:
        """Let go of what the environments hold."""
        ...


@runtime_checkable
class Following(Protocol):
    """A `VectorEnv` that can be led through many steps at once."""

    def follow(self, actions: Actions) -> None:
        """Step all by ``[T, N]`` actions, or ``[T, N, size]``, and tell nothing of it; `step` goes on from there.

        What environments give on the way was read when these actions were first taken, and is not read again.

        Raises:
            TaskFailedError: if an environment fails; then they are good for nothing but to be closed.
        """
        ...


class Task(Protocol):
    """Something to be learned."""

    name: str
    version: int
    """Of all tasks of its scheme: raised when one of the same name shows, rewards or ends otherwise than before."""
    observation_space: Box
    action_space: ActionSpace
    target_return: float | None
    """The mean return at which the task counts as solved, where it says so itself."""
    failures: Failures
    """What went wrong in its environments."""

    def make(self, num_envs: int) -> VectorEnv:
        """Environments of this task; `VectorEnv.reset` comes first."""
        ...


@runtime_checkable
class Lenient(Protocol):
    """A task that makes learning easier than the task is: rewards are cut, episodes are short."""

    def make_plain(self, num_envs: int) -> VectorEnv:
        """Environments as `Task.make` makes them, without that: a policy is judged by these."""
        ...
