"""What objectives share that learn from what the policy itself just did: judged samples, batches, shuffled passes.

Old log-probabilities and values are computed when the update starts, from the parameters that acted, so collecting
needs the actor alone; of samples that an earlier policy made, the log-probabilities are what that one gave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Final, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.objective import Experience
from shoal.training.algorithms.rollouts import Source, advantages
from shoal.training.algorithms.sequences import Ids, Runs, Sequences, remembered
from shoal.training.algorithms.settings import Settings, setting
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.manifest import Manifest
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.models.policy import Course, Policy, Recurrent
from shoal.training.models.recurrent import RecurrentActorCritic
from shoal.training.tasks import Task
from shoal.training.tasks.base import Actions, Floats, Observations

Ints = npt.NDArray[np.int64]

_MAX_SIZES: Final = 8  # of minibatches, whose arrays are kept


class Network(StrEnum):
    """What acts and values."""

    AUTO = "auto"
    MLP = "mlp"
    NATURE = "nature"
    IMPALA = "impala"


class Memory(StrEnum):
    """What is remembered in an episode."""

    NONE = "none"
    GRU = "gru"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicySettings(Settings):
    """Those of an actor and a critic."""

    update_epochs: int = setting(10, "passes over the samples per update", 1, 1000)
    num_minibatches: int = setting(
        32,
        "optimiser steps per pass, however many the samples: a peer with few takes as many",
        1,
        65536,
    )
    gae_lambda: float = setting(
        0.95, "of the advantage estimate; 0 trusts the values alone, 1 the rewards alone", 0.0, 1.0
    )
    value_coefficient: float = setting(0.5, "weight of the value loss", 0.0, 1e6)
    entropy_coefficient: float = setting(0.01, "weight of the entropy bonus; 0 for continuous actions", 0.0, 1e6)
    initial_log_std: float = setting(
        0.0, "of a continuous policy; 0 where 1 is half the range of an action", -20.0, 5.0
    )
    network: Network = setting(
        Network.AUTO,
        "mlp (of hidden_sizes), nature or impala (of images); auto: mlp for vectors, nature for images, or impala for "
        "those that are too small for it",
    )
    memory: Memory = setting(
        Memory.NONE,
        "gru: a gated recurrent unit below both networks, for tasks that do not show all that matters; of vectors",
    )
    memory_size: int = setting(64, "units of a memory", 1, 4096)
    sequence_length: int = setting(
        16, "steps through which gradients go back at most, where there is a memory", 1, 65536
    )

    @property
    def num_steps(self) -> int:
        """Of the optimiser, per update."""
        return self.update_epochs * self.num_minibatches

    @property
    def is_recurrent(self) -> bool:
        """Whether the policy remembers."""
        return self.memory is not Memory.NONE


@dataclass(frozen=True, slots=True)
class Batch:
    """What an update or one step of it is made from.

    Attributes:
        observations: ``[S, *shape]``, normalised.
        actions: ``[S]``, or ``[size, S]`` of a continuous policy.
        log_probs: ``[S]``, what the policy that acted gave to its actions.
        advantages: ``[S]``.
        returns: ``[S]``, what the values are to be.
        values: ``[S]``, what they were when the update began.
        proximal: ``[S]``, the log-probabilities that the policy gave then.
        ages: int64 ``[S]``, by how many versions the policy that acted is older than that one.
        course: in which the samples follow each other, in a minibatch of a policy that remembers.
    """

    observations: Observations
    actions: Actions
    log_probs: Floats
    advantages: Floats
    returns: Floats
    values: Floats
    proximal: Floats
    ages: Ints
    course: Course | None = None

    def __len__(self) -> int:
        return len(self.log_probs)

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """The samples of all, one after the other."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._columns() for part in parts), strict=True)
        joined: list[Any] = [np.concatenate(each, axis=0 if number == 0 else -1) for number, each in enumerate(columns)]
        return cls(*joined)

    def normalized(self, moments: Moments) -> Batch:
        """With advantages of mean 0 and deviation 1, by the moments of those of all learners."""
        normal = (self.advantages - np.float32(moments.mean)) / np.float32(float(moments.std) + 1e-8)
        return replace(self, advantages=normal)

    def part(self, start: int, end: int) -> Batch:
        """The samples from ``start`` to ``end``, as views."""
        return Batch(
            self.observations[start:end],
            self.actions[..., start:end],
            self.log_probs[start:end],
            self.advantages[start:end],
            self.returns[start:end],
            self.values[start:end],
            self.proximal[start:end],
            self.ages[start:end],
        )

    def empty(self) -> Batch:
        """Room for as many samples."""
        return Batch(*map(np.empty_like, self._columns()))

    def reorder(self, order: npt.NDArray[np.int64], out: Batch) -> None:
        """Put the samples into ``out`` in this order."""
        for column, place in zip(self._columns(), out._columns(), strict=True):
            axis = 0 if column is self.observations else -1
            np.take(column, order, axis=axis, out=place, mode="clip")  # the default, "raise", goes by way of a copy

    def _columns(self) -> tuple[Any, ...]:
        return tuple(getattr(self, each.name) for each in fields(self) if each.name != "course")


@dataclass(frozen=True, slots=True)
class Judged:
    """What the present networks make of a stream's experience.

    Attributes:
        log_probs: ``[T * N]``, of its actions.
        values: ``[T + 1, N]``, of its observations and of the last ones.
        final_values: ``[K]``, of the last observations of the K truncated episodes.
        memory: ``[T * N, memory_size]``, what a policy that remembers does before each observation.
    """

    log_probs: Floats
    values: Floats
    final_values: Floats
    memory: Floats | None = None

    @classmethod
    def by(cls, model: Policy, experience: Experience) -> Self:
        """Judge."""
        shape = experience.rewards.shape
        values = np.empty((shape[0] + 1, shape[1]), np.float32)
        if not isinstance(model, Recurrent):
            log_probs, judged = model.judge(experience.observations, experience.actions)
            values[:-1], values[-1] = judged.reshape(shape), model.values(experience.last)
            return cls(log_probs, values, model.values(experience.finals))
        rollout = experience.rollout
        before, after = remembered(model, rollout, experience.observations)
        memory = before.reshape(-1, model.memory_size)
        log_probs, judged = model.judge(experience.observations, experience.actions, memory)
        ended = rollout.terminated[-1] | rollout.truncated[-1]
        values[:-1] = judged.reshape(shape)
        values[-1] = model.values(experience.last, after[-1] * ~ended[:, None])
        return cls(log_probs, values, model.values(experience.finals, after[rollout.truncated]), memory)


class Loss(Protocol):
    """A loss on minibatches of one size, whose gradient is written out."""

    def gradient(self, batch: Batch) -> Floats:
        """``[num_parameters]``; overwritten by the next one of the same model, of whatever size."""
        ...

    def measures(self) -> dict[str, float]:
        """What is worth knowing of the minibatch that `gradient` was given last, before anything is stepped by it."""
        ...


S = TypeVar("S", bound=OnPolicySettings)


class OnPolicy(ABC, Generic[S]):
    """An `Objective` of a `Policy`: an algorithm adds its loss, and its own estimates if they are not GAE."""

    has_advantages = True
    has_log_probs = True

    def __init__(self, settings: S, model: Policy) -> None:
        self.settings = settings
        self.model = model
        self._losses: dict[int, Loss] = {}  # by size of the minibatch
        self._last: Loss | None = None
        self._sequences: Sequences | None = None  # of the update under way, by a policy that remembers

    @abstractmethod
    def make_loss(self, size: int) -> Loss:
        """The loss on minibatches of ``size`` samples."""

    def estimate(self, experience: Experience, judged: Judged, acted: Floats) -> tuple[Floats, Floats]:
        """Advantages and returns, each ``[T * N]``: GAE, and what it adds to the values.

        Args:
            experience: of one stream.
            judged: what the present networks make of it.
            acted: ``[T * N]``, the log-probabilities that the policy that acted gave to its actions.
        """
        gamma, gae_lambda = self.settings.gamma, self.settings.gae_lambda
        advantage = advantages(
            experience.rollout,
            experience.rewards,
            judged.values,
            judged.final_values,
            gamma=gamma,
            gae_lambda=gae_lambda,
        ).ravel()
        return advantage, advantage + judged.values[:-1].ravel()

    @property
    def steps_now(self) -> int:
        """As many in every update."""
        return self.settings.num_steps

    def own(self) -> Arrays:
        """Peers share the model alone."""
        return {}

    def check(self, own: Arrays) -> None:
        """There is nothing to check."""

    def at(self, env_steps: int) -> None:
        """Nothing depends on it."""

    def begin(self, progress: float) -> None:
        """Nothing depends on how far the run is, unless an algorithm says so."""

    def stepped(self) -> None:
        """Nothing follows the parameters."""

    def settle(self, *, is_merged: bool) -> None:
        """Likewise."""

    def used(self) -> None:
        """Nothing is kept of the batch."""

    def prepare(self, experience: Sequence[Experience]) -> Batch:
        """Judge and estimate."""
        judged = [Judged.by(self.model, each) for each in experience]
        memories = [each.memory for each in judged if each.memory is not None]
        if memories:
            longest = self.settings.sequence_length
            runs = [Runs.of(each.rollout.terminated | each.rollout.truncated, longest) for each in experience]
            self._sequences = Sequences(runs, np.concatenate(memories))
        return Batch.join([self._samples(*pair) for pair in zip(experience, judged, strict=True)])

    def _samples(self, experience: Experience, judged: Judged) -> Batch:
        is_present = np.isnan(experience.acted)
        acted = np.where(is_present, judged.log_probs, experience.acted)
        advantage, returns = self.estimate(experience, judged, acted)
        values = judged.values[:-1].ravel()
        ages = np.where(is_present, 0, experience.age)
        seen, done = experience.observations, experience.actions
        return Batch(seen, done, acted, advantage, returns, values, judged.log_probs, ages)

    def moments(self, batch: Batch) -> Moments:
        """Of the advantages."""
        return Moments.of(batch.advantages)

    def with_moments(self, batch: Batch, moments: Moments) -> Batch:
        """Normalised."""
        return batch.normalized(moments)

    def minibatches(self, batch: Batch | None, streams: Sequence[Source]) -> Iterator[tuple[Batch | None, bool]]:
        """Shuffled passes; the last one is measured."""
        parts, passes = self.settings.num_minibatches, self.settings.update_epochs
        if batch is None:
            yield from ((None, number == passes) for number in range(1, passes + 1) for _ in range(parts))
            return
        mixed = batch.empty()
        for number in range(1, passes + 1):
            if number > 1:
                self.refresh(batch)
            shuffled = self._shuffled(streams)
            batch.reorder(np.concatenate([order for order, _ in shuffled]), mixed)
            start = 0
            for order, course in shuffled:
                end = start + len(order)
                yield replace(mixed.part(start, end), course=course) if end > start else None, number == passes
                start = end

    def _shuffled(self, streams: Sequence[Source]) -> list[tuple[Ids, Course | None]]:
        """The samples of each minibatch of a pass, and how they follow each other."""
        parts = self.settings.num_minibatches
        if self._sequences is not None:
            return list(self._sequences.shuffled(streams, parts))
        offsets = np.cumsum([0, *(stream.samples for stream in streams)])
        shuffled = [stream.shuffled(parts) for stream in streams]
        return [
            (np.concatenate([own[part] + offset for own, offset in zip(shuffled, offsets[:-1], strict=True)]), None)
            for part in range(parts)
        ]

    def refresh(self, batch: Batch) -> None:
        """Before each pass but the first: write into ``batch`` what has changed since. Nothing, by default."""

    def gradient(self, batch: Batch) -> Floats:
        """See `Objective.gradient`."""
        size = len(batch)
        if size not in self._losses:
            if len(self._losses) >= _MAX_SIZES:
                self._losses.clear()
            self._losses[size] = self.make_loss(size)
        self._last = self._losses[size]
        return self._last.gradient(batch)

    def measures(self) -> dict[str, float]:
        """See `Objective.measures`."""
        return {} if self._last is None else self._last.measures()

    def is_enough(self) -> bool:
        """Never, unless an algorithm says so."""
        return False

    def explained(self, batch: Batch) -> dict[str, float]:
        """How much of the returns was foreseen."""
        variance = float(batch.returns.var())
        return {"explained_variance": 1 - float(batch.advantages.var()) / variance if variance > 0 else 0.0}


def actor_critic(settings: OnPolicySettings, manifest: Manifest, task: Task) -> Policy:
    """The networks of a run, in their initial state.

    Raises:
        UsageError: if the network cannot see what the task shows, or nobody could act or remember so.
    """
    box, network = task.observation_space, settings.network
    if settings.memory is Memory.GRU:
        if network not in (Network.MLP, Network.AUTO) or (network is Network.AUTO and box.is_image):
            raise UsageError("memory=gru is below networks of vectors, not of images; take network=mlp or memory=none")
        return RecurrentActorCritic(
            box.size,
            task.action_space,
            settings.hidden_sizes,
            memory_size=settings.memory_size,
            initial_log_std=settings.initial_log_std,
            seed=manifest.seed,
        )
    if network is Network.MLP or (network is Network.AUTO and not box.is_image):
        return ActorCritic(
            box.size,
            task.action_space,
            settings.hidden_sizes,
            initial_log_std=settings.initial_log_std,
            seed=manifest.seed,
        )
    from shoal.training.models import cnn, networks  # torch, which takes seconds and is needed for nothing else here

    image: cnn.Image
    match network:
        case Network.NATURE:
            image = cnn.Nature(box)
        case Network.IMPALA:
            image = cnn.Impala(box)
        case _:
            image = cnn.nature_or_impala(box)
    return networks.ImagePolicy(image, task.action_space, initial_log_std=settings.initial_log_std, seed=manifest.seed)
