"""What a policy with values is to losses: it acts, judges, and takes a loss's derivatives back to its parameters.

A loss knows derivatives by log-probabilities, values and the entropy; what lies below them is the network's. So a loss
is written once, for networks whose gradient is written out (`shoal.training.models.passes`) and for those of torch
(`shoal.training.models.networks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from shoal.training.tasks.base import Actions, Floats, Observations


@dataclass(frozen=True, slots=True)
class Course:
    """How samples follow each other, for a policy that remembers: sequences side by side, the longest first.

    The samples are the first ones of all sequences, then the second ones of those that have one, and so on.

    Attributes:
        counts: how many sequences have a first sample, a second one, and so on; they never rise.
        memory: ``[counts[0], memory_size]``, what is remembered before the first of each.
    """

    counts: tuple[int, ...]
    memory: Floats


class Passes(Protocol):
    """Forward and backward on batches of B observations.

    Attributes:
        values: ``[B]``, of what `judge` was given last. Overwritten by the next.
    """

    values: Floats

    def judge(self, observations: Observations, actions: Actions, course: Course | None = None) -> Floats:
        """Log-probabilities ``[B]`` of actions; they and `values` are overwritten by the next call.

        Args:
            observations: ``[B, *shape]``.
            actions: ``[B]``, or ``[size, B]`` of a policy that gives several numbers.
            course: in which they follow each other, for a policy that remembers.
        """
        ...

    @property
    def entropy(self) -> float:
        """The policy's, the mean over what `judge` was given last."""
        ...

    def backward(self, d_log_probs: Floats, d_values: Floats, d_entropy: float) -> None:
        """Write the gradient of a loss of what `judge` was given last into `Policy.gradient`, all of it.

        Args:
            d_log_probs: ``[B]``, the loss's derivative by each log-probability.
            d_values: ``[B]``, likewise by each value.
            d_entropy: by the entropy at each observation, the same for all.
        """
        ...


def judge_in_parts(policy: Policy, observations: Observations, actions: Actions, size: int) -> tuple[Floats, Floats]:
    """`Policy.judge`, by passes of ``size`` observations at a time."""
    log_probs, values = (np.empty(len(observations), np.float32) for _ in range(2))
    for start in range(0, len(observations), size):
        part = slice(start, start + size)
        passes = policy.passes(len(log_probs[part]))
        log_probs[part] = passes.judge(observations[part], actions[..., part])
        values[part] = passes.values
    return log_probs, values


class Policy(Protocol):
    """A policy and values, in one vector of parameters.

    Attributes:
        gradient: float32 ``[num_parameters]``, what `Passes.backward` wrote last.
    """

    gradient: Floats

    @property
    def flat(self) -> Floats:
        """``[num_parameters]``: writing to it changes the networks."""
        ...

    @property
    def parameters(self) -> Mapping[str, Floats]:
        """By name, views of `flat`."""
        ...

    def act(self, observations: Observations, rng: np.random.Generator) -> Actions:
        """Draw actions; see `shoal.training.models.heads.sample`."""
        ...

    def act_greedily(self, observations: Observations) -> Actions:
        """The likeliest actions, as `act` would shape them."""
        ...

    def judge(self, observations: Observations, actions: Actions) -> tuple[Floats, Floats]:
        """The log-probabilities of actions and the values of observations, each ``[S]``; no gradient can follow."""
        ...

    def values(self, observations: Observations) -> Floats:
        """The values ``[N]`` of a few observations ``[N, *shape]``."""
        ...

    def passes(self, size: int) -> Passes:
        """Forward and backward on batches of this size, with arrays that serve again."""
        ...


@runtime_checkable
class Recurrent(Policy, Protocol):
    """A policy that remembers. Where no memory is given, an episode begins.

    Attributes:
        memory_size: how many numbers it remembers; zeros, where an episode begins.
    """

    memory_size: int

    def act(self, observations: Observations, rng: np.random.Generator, memory: Floats | None = None) -> Actions:
        """Draw actions. What is remembered after is put into ``memory`` ``[N, memory_size]``."""
        ...

    def act_greedily(self, observations: Observations, memory: Floats | None = None) -> Actions:
        """The likeliest actions, likewise."""
        ...

    def remember(self, observations: Observations, course: Course) -> Floats:
        """``[S, memory_size]``, what is remembered after each of samples in the order of a course."""
        ...

    def judge(
        self, observations: Observations, actions: Actions, memory: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """As `Policy.judge`, given what was remembered before each, ``[S, memory_size]``."""
        ...

    def values(self, observations: Observations, memory: Floats | None = None) -> Floats:
        """As `Policy.values`, likewise."""
        ...
