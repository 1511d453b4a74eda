"""What an objective is to the engine: it says what is better, and the engine does all else.

An objective turns what was collected into a batch, and a minibatch of it into a gradient. Streams, minibatch steps,
Adam, clipping, normalisers, exchanges, rollback, plausibility, evaluation and the state that peers share are the
engine's (`engine`), the same for all.

The gradient is what is asked for, rather than a loss: PPO's of a small network is written out in NumPy and takes an
eighth of what autograd takes (`training/models/passes.py`). An objective whose model is torch's has ``loss(model,
batch) -> (tensor, metrics)`` and gives what ``backward`` writes into its one flat vector; for the engine it is the
same. For the model, the engine asks for little: one flat vector, and to act and to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from shoal.training.algorithms.normalizers import Normalizers
from shoal.training.algorithms.rollouts import Rollout, Source
from shoal.training.algorithms.settings import Settings
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.tasks.base import Actions, Floats, Observations


class Model(Protocol):
    """Networks whose parameters are one float32 vector."""

    @property
    def flat(self) -> Floats:
        """``[num_parameters]``: writing to it changes the networks."""
        ...

    @property
    def parameters(self) -> Mapping[str, Floats]:
        """By name, views of `flat`."""
        ...

    def act(self, observations: Observations, rng: np.random.Generator) -> Actions:
        """Sample: ``[N]`` int64 or ``[N, size]`` float32 for observations ``[N, *shape]``."""
        ...

    def act_greedily(self, observations: Observations) -> Actions:
        """The likeliest or best."""
        ...

    def judge(self, observations: Observations, actions: Actions) -> tuple[Floats, ...]:
        """What it makes of ``[S, *shape]`` and ``[S]`` or ``[size, S]``: arrays of ``S`` finite numbers.

        Log-probabilities come first, where an objective has use for them (`Objective.has_log_probs`).
        """
        ...


@dataclass(frozen=True, slots=True)
class Experience:
    """What one stream brought since the last update, T steps of N environments, as the networks are to see it.

    Attributes:
        rollout: as the environments gave it.
        observations: ``[T * N, *shape]``, normalised.
        last: ``[N, *shape]``, normalised: not yet acted on.
        finals: ``[K, *shape]``, normalised, of the K truncated episodes.
        actions: ``[T * N]``, or ``[size, T * N]`` of a continuous policy.
        acted: ``[T * N]``, the log-probabilities that the policy that acted gave to its actions; NaN where it is the
            present one.
        rewards: ``[T, N]``, scaled.
        normalizers: by which that was done, of this state: for who keeps the rollout as it is, and looks at it later.
        age: by how many versions the policy that acted is older than the present one, where it is another.
    """

    rollout: Rollout
    observations: Observations
    last: Observations
    finals: Observations
    actions: Actions
    acted: Floats
    rewards: Floats
    normalizers: Normalizers
    age: int = 1


class Samples(Protocol):
    """A batch or a minibatch: what an objective makes of experience, and what the engine knows of it."""

    @property
    def observations(self) -> Observations:
        """``[S, *shape]``, normalised."""
        ...

    @property
    def actions(self) -> Actions:
        """``[S]``, or ``[size, S]`` of a continuous policy."""
        ...

    def __len__(self) -> int: ...


B = TypeVar("B")


class StepSettings(Protocol):
    """What the steps of an update follow."""

    @property
    def num_steps(self) -> int:
        """Of the optimiser, per update."""
        ...

    @property
    def max_grad_norm(self) -> float:
        """Longer gradients are scaled down to this."""
        ...


class Flat(Protocol):
    """Parameters in one vector."""

    @property
    def flat(self) -> Floats:
        """``[num_parameters]``: writing to it changes them."""
        ...


class Steps(Protocol[B]):
    """What the modes of exchange (`shoal.training.algorithms.modes`) step by, whatever batches are made of."""

    @property
    def settings(self) -> StepSettings:
        """The run's."""
        ...

    @property
    def model(self) -> Flat:
        """What is trained."""
        ...

    @property
    def has_advantages(self) -> bool:
        """Whether there are any, which are normalised before the first step; else nobody asks for their moments."""
        ...

    @property
    def steps_now(self) -> int:
        """Of the optimiser, in the update under way: `StepSettings.num_steps`, or none.

        It follows from the state that all share, so it is the same for all.
        """
        ...

    def moments(self, batch: B) -> Moments:
        """Of the advantages, which are merged with those of the others in mode ``gradient`` before the first step."""
        ...

    def with_moments(self, batch: B, moments: Moments) -> B:
        """The batch that the moments of all make of it."""
        ...

    def minibatches(self, batch: B | None, streams: Sequence[Source]) -> Iterator[tuple[B | None, bool]]:
        """The minibatch of each step, and whether the step is measured: `steps_now` of them.

        The k-th of a process that owns several streams is the union of what the k-th would be of each stream alone.
        None where there are no samples in it. Each may be overwritten by the next.
        """
        ...

    def gradient(self, batch: B) -> Floats:
        """Of the loss, the mean over the samples of a minibatch: ``[num_parameters]``, overwritten by the next."""
        ...

    def measures(self) -> dict[str, float]:
        """What is worth knowing of the minibatch that `gradient` was given last, before anything is stepped by it."""
        ...

    def is_enough(self) -> bool:
        """Whether an update on own samples ends before it is stepped by what `gradient` gave last."""
        ...

    def stepped(self) -> None:
        """The optimiser has taken a step: on own samples, or in mode ``gradient`` the joint one."""
        ...

    def settle(self, *, is_merged: bool) -> None:
        """The steps on own samples became a joint change of the parameters, or none if nobody had samples.

        What followed the own steps (`stepped`) is put where all put it, by the parameters as they are now.
        """
        ...


class Objective(Steps[B], Protocol[B]):
    """How a policy learns from streams. One object serves one learner, update after update."""

    @property
    def settings(self) -> Settings:
        """The run's."""
        ...

    @property
    def model(self) -> Model:
        """What is trained."""
        ...

    @property
    def has_log_probs(self) -> bool:
        """Whether it asks what the policy that acted gave to its actions (`Experience.acted`)."""
        ...

    def own(self) -> Arrays:
        """What all peers share beside the model, by name; views, into which a state is loaded."""
        ...

    def check(self, own: Arrays) -> None:
        """Refuse what cannot be `own` of any peer, of the right form though it is.

        Raises:
            ProtocolError: if it cannot.
        """
        ...

    def at(self, env_steps: int) -> None:
        """The state is another one: all together have taken so many steps up to it; 0 unless `Settings.is_annealed`."""
        ...

    def begin(self, progress: float) -> None:
        """An update begins.

        Args:
            progress: from 0 to 1, how much of the run's environment steps all have taken; 0 unless
                `Settings.is_annealed`.
        """
        ...

    def prepare(self, experience: Sequence[Experience]) -> B:
        """What an update is made from, stream after stream."""
        ...

    def explained(self, batch: B) -> dict[str, float]:
        """What is worth knowing of a batch before the first step."""
        ...

    def used(self) -> None:
        """The update for which `prepare` was called last is done; of one that failed, nothing is to be kept."""
        ...


class Measures:
    """Weighted means of numbers by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float], weight: float) -> None:
        """Count these."""
        for name, value in values.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + weight * value, weights + weight

    def means(self) -> dict[str, float]:
        """Of all that were counted."""
        return {name: total / weights for name, (total, weights) in self._sums.items()}
