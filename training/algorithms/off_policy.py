"""What objectives share that learn from whatever policy: replay buffers, target networks, and chance that fades.

An update stages what was collected in its stream's replay (`replay`) and takes ``gradient_steps`` steps, each on
``minibatch_size`` transitions drawn from there. Before all together have taken ``learning_starts`` steps in their
environments it takes none. A contribution weighs what it brought, in new samples; what is drawn from the replay adds
nothing to that.

Target networks are shared by all (`Targets`) and cross no wire. They follow the parameters by ``target_tau`` every
``target_interval`` steps of an update. In mode ``gradient`` these are the joint steps. In the other modes each peer's
follow its own steps while it takes them, and are then put where as many steps lead from where they were
towards the parameters that came of the merge: by operations that give the same bits everywhere.

A replay does not care how old a sample is, so those that were kept or collected ahead (`engine`) are samples as any.
Observations are not normalised unless a run says so; then the raw ones are kept, and normalised when they are drawn. So
are rewards: with ``normalize_returns`` they are scaled, and cut at ±10, as they are drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Generic, TypeVar

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.normalizers import Normalizers
from shoal.training.algorithms.objective import Experience, Model
from shoal.training.algorithms.plausible import MAX_PARAMETER
from shoal.training.algorithms.replay import Replay, Transitions
from shoal.training.algorithms.rollouts import Source
from shoal.training.algorithms.settings import Settings, setting
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.manifest import Manifest
from shoal.training.models.seen import as_vectors
from shoal.training.rollouts.acting import ActorShape
from shoal.training.tasks import Task
from shoal.training.tasks.base import Actions, Floats

_MEASURED: Final = 16  # the last so many steps of an update


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicySettings(Settings):
    """Those of a replay and target networks."""

    continuous: ClassVar[Mapping[str, Any]] = {}

    max_grad_norm: float = setting(10.0, "longer gradients are scaled down to this", 1e-6, 1e9)
    normalize_returns: bool = setting(
        False, "scale rewards so that discounted returns have deviation 1 over the whole run, of all peers"
    )
    gradient_steps: int | None = setting(
        None, "optimiser steps per update; one per environment step of the learner that takes most, if null", 1, 65536
    )
    minibatch_size: int = setting(64, "transitions per step, from the replay of each peer", 1, 65536)
    learning_starts: int = setting(1000, "environment steps of all together before anything is learned", 0, 2**40)
    replay_steps: int = setting(100_000, "the newest transitions that each peer keeps", 1, 2**40)
    replay_bytes: int = setting(2**30, "memory that they take at most, on each peer", 1, 2**50)
    target_tau: float = setting(0.005, "how far the target networks follow: 1 is all the way", 1e-6, 1.0)
    target_interval: int = setting(1, "optimiser steps between two times that they follow", 1, 65536)
    n_steps: int = setting(1, "steps whose rewards count as they came, before a state is valued", 1, 1000)

    @property
    def num_steps(self) -> int:
        """Of the optimiser, per update."""
        return self.gradient_steps or 1

    @property
    def is_annealed(self) -> bool:
        """Always: when learning starts follows from how far the run is."""
        return True


S = TypeVar("S", bound=OffPolicySettings)


class OffPolicyOnEngine(OnEngine[S]):
    """An `OnEngine` with such settings.

    Its epochs are short: an update takes a step for each environment step of one learner, by samples that the policy of
    before collected, and several learners average what that many steps made of each. See `docs/algorithms.md`.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {"batch_per_learner": 256}

    def actor_shape(self, manifest: Manifest, task: Task) -> ActorShape:
        """None: how these explore, actors do not know."""
        raise UsageError(f"nobody can act for what {self.name} learns; take the mode local, diloco or gradient")

    def configured(self, manifest: Manifest, task: Task) -> S:
        """The settings of a run; see `OnEngine.configured`."""
        settings = super().configured(manifest, task)
        if settings.gradient_steps is None:
            settings = replace(settings, gradient_steps=manifest.batch.largest_share)
        if settings.target_interval > settings.num_steps:
            raise UsageError(
                f"target networks that follow every {settings.target_interval} steps never do in updates of "
                f"{settings.num_steps}; choose a target_interval that is no longer than gradient_steps"
            )
        return settings


@dataclass(frozen=True, slots=True)
class Minibatch(Transitions):
    """Transitions as the networks are to see them.

    Attributes:
        noise: ``[S, n]``, normal numbers for what an objective samples.
    """

    noise: Floats


@dataclass(frozen=True, slots=True)
class News:
    """What an update is made from: what it brought to the replays.

    Attributes:
        observations: ``[S, ...]``, normalised.
        actions: ``[S]``, or ``[size, S]`` of a continuous policy.
        normalizers: of the state that the update begins with.
    """

    observations: Floats
    actions: Actions
    normalizers: Normalizers

    def __len__(self) -> int:
        return len(self.observations)


def vector_size(task: Task) -> int:
    """How many numbers a task shows.

    Raises:
        UsageError: if it shows something else.
    """
    if not task.observation_space.is_vector:
        raise UsageError(f"{task.name} shows images or bytes, and this algorithm sees vectors of numbers; take ppo")
    return task.observation_space.size


class Targets:
    """A copy of some parameters that follows them.

    Attributes:
        flat: float32 ``[n]``, the copy.
    """

    def __init__(self, online: Floats, settings: OffPolicySettings) -> None:
        """Begin where the parameters ``online`` ``[n]`` are, of which this is a copy."""
        self.flat = online.copy()
        self._online, self._tau, self._interval = online, settings.target_tau, settings.target_interval
        self._start = online.copy()
        self._taken = 0

    def begin(self) -> None:
        """An update begins."""
        self._start[:], self._taken = self.flat, 0

    def stepped(self) -> None:
        """A step was taken."""
        self._taken += 1
        if self._taken % self._interval == 0:
            self._follow(self._tau)

    def settle(self, num_steps: int) -> None:
        """Follow from where they were when the update began as far as ``num_steps`` steps lead."""
        self.flat[:] = self._start
        self._follow(1 - (1 - self._tau) ** (num_steps // self._interval))

    def _follow(self, part: float) -> None:
        if part == 1:
            self.flat[:] = self._online
        elif part:
            self.flat += np.float32(part) * (self._online - self.flat)


class OffPolicy(ABC, Generic[S]):
    """An `Objective` that learns from replays: an algorithm adds its model, its gradient and how it explores.

    Attributes:
        num_noise: normal numbers per transition that `gradient` needs.
    """

    has_advantages = False
    has_log_probs = False
    num_noise = 0

    def __init__(self, settings: S, model: Model, followed: Floats) -> None:
        """Begin.

        Args:
            settings: of the run.
            model: in its initial state.
            followed: the part of its vector that has target networks, a view.
        """
        self.settings = settings
        self._targets = Targets(followed, settings)
        self._replays: list[Replay] = []
        self._measures: dict[str, float] = {}
        self.at(0)

    @property
    @abstractmethod
    def model(self) -> Any:
        """What is trained."""

    @abstractmethod
    def gradient(self, batch: Minibatch) -> Floats:
        """See `Objective.gradient`; puts into ``_measures`` what is worth knowing."""

    def at(self, env_steps: int) -> None:
        """See `Objective.at`; an algorithm sets how it explores."""
        self._is_learning = env_steps >= self.settings.learning_starts

    @property
    def steps_now(self) -> int:
        """None, before learning starts."""
        return self.settings.num_steps if self._is_learning else 0

    def own(self) -> Arrays:
        """The target networks."""
        return {"targets": self._targets.flat}

    def check(self, own: Arrays) -> None:
        """Targets are means of parameters, and so no larger."""
        if not (np.abs(own["targets"]) <= MAX_PARAMETER).all():
            raise ProtocolError(f"the target networks hold numbers beyond {MAX_PARAMETER:g}; take another state")

    def begin(self, progress: float) -> None:
        """Mark where the targets are."""
        self._targets.begin()

    def stepped(self) -> None:
        """Let the targets follow."""
        self._targets.stepped()

    def settle(self, *, is_merged: bool) -> None:
        """Put the targets where all put them."""
        self._targets.settle(self.steps_now if is_merged else 0)

    def prepare(self, experience: Sequence[Experience]) -> News:
        """Stage what was collected."""
        settings = self.settings
        while len(self._replays) < len(experience):
            self._replays.append(Replay(max_steps=settings.replay_steps, max_bytes=settings.replay_bytes))
        for replay, each in zip(self._replays, experience, strict=True):
            replay.stage(Transitions.of(each.rollout, gamma=settings.gamma, num_steps=settings.n_steps))
        return News(
            np.concatenate([each.observations for each in experience]),
            np.concatenate([each.actions for each in experience], axis=-1),
            experience[0].normalizers,
        )

    def used(self) -> None:
        """Keep what is staged."""
        for replay in self._replays:
            replay.commit()

    def moments(self, batch: News) -> Moments:
        """There are no advantages."""
        return Moments.none()

    def with_moments(self, batch: News, moments: Moments) -> News:
        """As it is."""
        return batch

    def minibatches(self, batch: News | None, streams: Sequence[Source]) -> Iterator[tuple[Minibatch | None, bool]]:
        """From the replay of each stream that brought something; the last ones are measured."""
        count = self.steps_now
        for number in range(1, count + 1):
            drawn = None
            if batch is not None:
                new = [pair for pair in zip(self._replays, streams, strict=True) if pair[1].samples]
                drawn = self._draw(new, batch.normalizers)
            yield drawn, number > count - _MEASURED

    def _draw(self, pairs: Sequence[tuple[Replay, Source]], normal: Normalizers) -> Minibatch:
        """What each stream draws, as the networks are to see it."""
        size = self.settings.minibatch_size
        parts = Transitions.join([replay.draw(size, stream.rng) for replay, stream in pairs])
        noise = [stream.rng.standard_normal((size, self.num_noise), np.float32) for _, stream in pairs]
        return Minibatch(
            as_vectors(normal.observations(parts.observations)),
            parts.actions,
            normal.rewards(parts.rewards),
            as_vectors(normal.observations(parts.following)),
            parts.discounts,
            np.concatenate(noise),
        )

    def measures(self) -> dict[str, float]:
        """See `Objective.measures`."""
        return self._measures

    def is_enough(self) -> bool:
        """Never."""
        return False

    def explained(self, batch: News) -> dict[str, float]:
        """How much there is to learn from."""
        return {"replay_steps": float(sum(len(replay) for replay in self._replays) + len(batch))}
