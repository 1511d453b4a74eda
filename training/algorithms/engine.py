"""The engine: what every way of learning together shares. An objective (`objective`) says what is better.

Every epoch each peer collects steps from its own environments. An update then turns them into a batch, takes
`Settings.num_steps` steps of Adam on the objective's gradient, and exchanges what the mode says (`modes`). The
normalisers of observations and rewards are running moments that are merged exactly with the exchanges of the epoch,
and stand still within it (`normalizers`).

Stale samples: a learner that the others did not wait for may keep what it collected when it takes their policy, so that
it counts in the next epoch; and in modes ``local`` and ``diloco``, one that waits for the others goes on collecting for
the next epoch, with the parameters that its own steps led to (`PolicyLearner.collect_ahead`). These samples are then
one policy version old, never more. Their old log-probabilities are of the policy that acted, computed with its
parameters and normaliser before these are replaced; what to make of that is up to the objective. An update without such
samples is the same, bit for bit, as if they did not exist.

What other peers contribute, and every state, is held to what honest ones can make (`plausible`): parameters no further
from the epoch's than Adam's steps reach, moments of Adam that clipped gradients lead to, as many samples in the
normalisers as the weight says. What was merged is tried on own samples before it becomes the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.algorithms.adam import Adam
from shoal.training.algorithms.base import Collected, DivergedError, Update, UpdateStats
from shoal.training.algorithms.evaluation import Evaluation
from shoal.training.algorithms.foreign import Foreign, Pool
from shoal.training.algorithms.modes import MODES, Given, Stepper
from shoal.training.algorithms.normalizers import Normalizers
from shoal.training.algorithms.objective import Experience, Objective, Samples
from shoal.training.algorithms.plausible import COARSE_TRAVEL_FACTOR, MAX_COUNT, TRAVEL_FACTOR, Limits
from shoal.training.algorithms.rollouts import Rollout, Source, Stream, never
from shoal.training.algorithms.sequences import remembered
from shoal.training.algorithms.settings import Settings, read_settings
from shoal.training.exchange.averager import Arrays
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.rules import ROUNDING, Codec
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.policy import Recurrent
from shoal.training.rollouts.acting import ActorShape, acted_in
from shoal.training.state import check_fit
from shoal.training.tasks import Task
from shoal.training.tasks.base import Actions, Floats, Observations

_MAX_BACKLOG: Final = 8  # batches that may wait for an update
_OWN: Final = "objective/"

S = TypeVar("S", bound=Settings)


class OnEngine(ABC, Generic[S]):
    """An `Algorithm` whose learners are the engine's: a name, settings and an objective.

    Attributes:
        name: by which a manifest names it.
        version: see `shoal.training.algorithms.Algorithm`.
        summary: half a sentence for people.
        paper: its source.
        settings: its own.
        in_gradient: which of them have other defaults in mode ``gradient``,
        in_rollouts: and in mode ``rollouts``.
        on_images: likewise for tasks that show images, in every mode.
        on_tasks: likewise for some tasks, by name.
        run_defaults: of a manifest's fields, where it has others than most, as `shoal swarm create` takes them.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    paper: ClassVar[str]
    settings: type[S]
    in_gradient: ClassVar[Mapping[str, Any]] = {}
    in_rollouts: ClassVar[Mapping[str, Any]] = {}
    on_images: ClassVar[Mapping[str, Any]] = {}
    on_tasks: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    run_defaults: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def objective(self, settings: S, manifest: Manifest, task: Task) -> Objective[Any]:
        """A learner's own, with a model in its initial state, which is the same on every peer.

        Raises:
            UsageError: if it can't learn such a task, or not so.
        """

    @property
    def in_mode(self) -> Mapping[Mode, Mapping[str, Any]]:
        """Defaults that are others in some modes."""
        return {Mode.GRADIENT: self.in_gradient, Mode.ROLLOUTS: self.in_rollouts}

    def configured(self, manifest: Manifest, task: Task) -> S:
        """The settings of a run.

        Raises:
            UsageError: if one is unknown, of the wrong type or out of range, or it doesn't go with the mode.
        """
        settings = read_settings(self.settings, self.name, manifest, task, self.in_mode, self.on_images, self.on_tasks)
        if manifest.mode is Mode.ROLLOUTS and settings.is_recurrent:
            raise UsageError(
                "in mode rollouts nodes act that remember nothing yet; leave memory out, or take the mode local, "
                "diloco or gradient"
            )
        return settings

    def actor_shape(self, manifest: Manifest, task: Task) -> ActorShape:
        """That of `shoal.training.models.actor_critic`."""
        settings, box = self.configured(manifest, task), task.observation_space
        if not box.is_vector:
            raise UsageError(f"{task.name} shows images or bytes, by which actors do not act yet; take the mode local")
        space = acted_in(task.action_space)
        return ActorShape(box.size, space, settings.hidden_sizes, settings.normalize_observations)

    def learner(
        self,
        manifest: Manifest,
        task: Task,
        *,
        peer: PeerId,
        life: str = "",
        part: str = "",
        streams: Sequence[str] | None = None,
    ) -> PolicyLearner:
        """A learner in its initial state.

        Args:
            manifest: what is trained.
            task: the manifest's.
            peer: whose learner it is.
            life: tells this learner's stream from those of its earlier lives.
            part: none: everybody learns alike.
            streams: the names of the rollout streams that it owns; one, named after the peer, by default. A process
                that owns the streams of several peers makes, in mode ``gradient``, the update they make together.

        Raises:
            UsageError: if the manifest's hyperparameters are unknown or out of range, or a part is asked for.
        """
        if part:
            raise UsageError(f"{manifest.task} learned by {self.name} has no part {part[:40]!r}; leave it out")
        objective = self.objective(self.configured(manifest, task), manifest, task)
        return PolicyLearner(objective, manifest, task, streams or [f"{peer}/{life}" if life else peer])


@runtime_checkable
class ActedFor(Protocol):
    """An algorithm for whose policies nodes can act that do not learn."""

    def configured(self, manifest: Manifest, task: Task) -> Settings:
        """The settings of a run."""
        ...

    def actor_shape(self, manifest: Manifest, task: Task) -> ActorShape:
        """What has to be known of a policy to act by it.

        Raises:
            UsageError: if nobody can act for such a policy.
        """
        ...


class PolicyLearner:
    """One peer's part in learning by an objective; see `shoal.training.algorithms.Learner`.

    Attributes:
        learned_from: what of others' the last update was made from: who collected it, by the policy of which epoch, and
            environment steps.
    """

    def __init__(self, objective: Objective[Any], manifest: Manifest, task: Task, streams: Sequence[str]) -> None:
        config = objective.settings
        self._objective, self._model, self._mode = objective, objective.model, manifest.mode
        self._largest_share = len(streams) * max(manifest.batch.largest_share, config.num_envs)
        self._max_samples = _MAX_BACKLOG * self._largest_share
        self._adam = Adam(self._model.flat.size, learning_rate=config.learning_rate, epsilon=config.adam_epsilon)
        self._recurrent = objective.model if isinstance(objective.model, Recurrent) else None
        self._memory_size = 0 if self._recurrent is None else self._recurrent.memory_size
        self._streams = [
            Stream(
                task,
                num_envs=config.num_envs,
                gamma=config.gamma,
                seed=manifest.seed,
                name=name,
                memory_size=self._memory_size,
            )
            for name in streams
        ]
        self._normalizers = Normalizers(task.observation_space, config)
        max_change = self._adam.max_change(config.num_steps)
        limits = Limits(
            config.max_grad_norm,
            max_change if manifest.codec is Codec.FP32 else ROUNDING * max_change,
            self._normalizers.is_normalized,
            TRAVEL_FACTOR if manifest.codec in (Codec.FP32, Codec.BF16, Codec.INT8) else COARSE_TRAVEL_FACTOR,
        )
        self._outer = Outer(
            self._model.flat.size,
            learning_rate=config.outer_learning_rate,
            momentum=config.outer_momentum,
            max_gradient=ROUNDING * max_change,
        )
        self.learned_from: Sequence[tuple[PeerId, int, int]] = ()
        self._pool = Pool(round(manifest.foreign_ratio * self._largest_share), self._max_samples)
        self._sources: list[Source] = list(self._streams)  # of the update under way
        self._stepper = Stepper(objective, self._adam, self._outer, limits, max_change, self._sources)
        self._max_env_steps = manifest.max_env_steps
        self._env_steps = 0  # by all together, up to this state; counted where something is annealed
        self._running: Update | None = None
        self._num_ahead = 0  # samples that may be collected while the update under way waits
        self._evaluation = Evaluation(task)

    @property
    def config(self) -> Any:
        """The settings of the run, of the algorithm's own type."""
        return self._objective.settings

    @property
    def samples(self) -> int:
        """Environment steps that wait for the next update."""
        return sum(stream.samples for stream in self._streams) + self._pool.samples

    @property
    def num_foreign(self) -> int:
        """Environment steps of others that wait for this update or a later one."""
        return self._pool.waiting

    def admit(self, author: PeerId, rollout: Rollout, log_probs: Floats, version: int) -> None:
        """Take what another member collected, for the next update or one after it.

        Args:
            author: who.
            rollout: what it met and did.
            log_probs: ``[T, N]``, what the policy that acted gave to its actions.
            version: epoch of that policy.
        """
        self._pool.add(Foreign(author, rollout, log_probs, version, self._streams[0].rng))

    def holds(self, version: int, oldest: int) -> int:
        """This is the policy of an epoch: drop what others collected by those before ``oldest``; how much that was.

        Args:
            version: the epoch.
            oldest: the earliest whose samples are learned from.
        """
        return self._pool.at(version, oldest)

    def collect(self, num_steps: int, is_over: Callable[[], bool] = never) -> Collected:
        """Take steps, shared evenly by the streams; see `Learner.collect`."""
        self._require_idle()
        if num_steps < 1:
            raise UsageError(f"{num_steps} steps cannot be taken; ask for one at least")
        if self.samples + num_steps > self._max_samples:
            raise UsageError(f"{self.samples} samples wait for an update; call update() or abandon() first")
        before, finished = self.samples, list[float]()
        for stream in self._streams:
            finished += stream.collect(-(-num_steps // len(self._streams)), self._act, is_over)[1]
        return Collected(self.samples - before, self.samples, tuple(finished))

    def collect_ahead(self, is_over: Callable[[], bool]) -> Collected:
        """Go on collecting while an update waits; see `Learner.collect_ahead` and the head of this module."""
        before, finished, size = self.samples, list[float](), self._objective.settings.num_envs
        number = self._num_ahead // len(self._streams) // size * size
        for stream in self._streams if number else ():
            first = stream.num_steps
            try:
                finished += stream.collect(number, self._act, is_over)[1]
            finally:  # what came before a failure stays
                stream.know(self._log_probs(stream, first))
        self._num_ahead -= min(self.samples - before, self._num_ahead)
        return Collected(self.samples - before, self.samples, tuple(finished))

    def update(self) -> Update:
        """Optimise on what was collected; see `Learner.update` and the head of this module."""
        self._require_idle()
        self._running = self._guarded_update()
        return self._running

    def abandon(self) -> None:
        """Drop what was collected and any half-done update."""
        self._stop_update()
        self._pool.drop()
        for stream in self._streams:
            stream.drop()

    def export_state(self) -> Arrays:
        """Everything that all peers share, copied.

        Parameters, what is the objective's own, both normalisers, and Adam's state or in mode ``diloco`` the outer
        momentum.
        """
        self._require_idle()
        return {name: array.copy() for name, array in self._state().items()}

    def import_state(self, arrays: Arrays, *, keep_samples: bool = False) -> None:
        """Take a state that some peer exported; see `Learner.import_state` and the head of this module."""
        self._check_state(arrays)
        if not self._acts_sanely(arrays):
            raise ProtocolError("this policy acts or judges in numbers that are not finite; take another state")
        if not keep_samples:
            self.abandon()
        self._stop_update()
        for stream in self._streams:
            if stream.samples:
                stream.keep(self._log_probs(stream))
        self._load(arrays)

    def policy_arrays(self) -> Arrays:
        """The parameters and, where observations are normalised, their moments, copied."""
        state = self._state()
        is_normalized = self._normalizers.is_normalized["observation"]
        kept = ("parameters/", "moments/observation/") if is_normalized else ("parameters/",)
        return {name: array.copy() for name, array in state.items() if name.startswith(kept)}

    def evaluate(self, episodes: int, seed: int) -> list[float]:
        """Undiscounted returns of greedy episodes; an episode is cut after 100,000 steps, left out if it fails."""
        return self._evaluation.returns(self._greedy, episodes, seed)

    # --- an update ---------------------------------------------------------------------------------------------------

    def _guarded_update(self) -> Update:
        """Run the update; put everything back if it is closed or fails."""
        before = {name: array.copy() for name, array in (self._state() | self._inner_state()).items()}
        for stream in self._streams:
            stream.use()
        self._sources[:] = [*self._streams, *self._pool.use()]
        try:
            stats = yield from self._update()
        except BaseException as error:
            self._load(before)
            if isinstance(error, DivergedError | ProtocolError):
                self._pool.used()  # what others collected may be why, and would be again
            raise
        finally:
            self._running = None
            self._num_ahead = 0
        if stats.samples:
            self._objective.used()
        for stream in self._streams:
            stream.used()
        self.learned_from = [(each.author, each.version, each.samples) for each in self._pool.used()]
        return stats

    def _update(self) -> Update:
        objective, config = self._objective, self._objective.settings
        samples = sum(source.samples for source in self._sources)
        if config.is_annealed:
            progress = min(1.0, self._env_steps / self._max_env_steps)
            objective.begin(progress)
            if config.anneal_learning_rate:
                self._adam.learning_rate = config.learning_rate * (1 - progress)
        num_steps = objective.steps_now
        increments = self._normalizers.increments(self._sources)
        if config.is_annealed:
            increments["sum/samples"] = np.asarray(samples, np.int64)
        batch = self._batch() if samples else None
        explained = {} if batch is None else objective.explained(batch)
        given = Given(batch, samples, increments, self._normalizers.scales())
        if self._mode is not Mode.GRADIENT:  # there is one exchange, and what comes after it needs no new samples
            self._num_ahead = max(0, min(self._largest_share, 2 * self._largest_share - samples))
        merged = yield from MODES[self._mode](self._stepper, given)
        self._num_ahead = 0
        if merged:
            self._normalizers.merge(merged)
            if config.is_annealed:
                self._env_steps += int(merged["sum/samples"])
                objective.at(self._env_steps)
        self._require_sane(batch)
        if batch is None:
            return UpdateStats(samples, num_steps)
        return UpdateStats(samples, num_steps, given.measures.means() | explained)

    def _batch(self) -> Any:
        """Everything collected since the last update, stream after stream."""
        return self._objective.prepare([self._experience(source) for source in self._sources])

    def _experience(self, source: Source) -> Experience:
        rollout, normal = source.rollout(), self._normalizers.observations
        return Experience(
            rollout,
            _flat(normal(rollout.observations[:-1])),
            normal(rollout.observations[-1]),
            normal(rollout.final_observations),
            _by_column(rollout.actions),
            source.log_probs.ravel(),
            self._normalizers.rewards(rollout.rewards),
            self._normalizers,
            source.age,
        )

    def _log_probs(self, stream: Stream, first: int = 0) -> Floats:
        """``[S, N]``, of the actions in a stream from the ``first`` step on, under the present policy.

        NaN, where the objective has no use for them.
        """
        rollout = stream.rollout()
        if not self._objective.has_log_probs:
            return np.full_like(rollout.rewards[first:], np.nan)
        observations = _flat(self._normalizers.observations(rollout.observations[first:-1]))
        actions = _by_column(rollout.actions[first:])
        if self._recurrent is None:
            log_probs = self._model.judge(observations, actions)[0]
        else:
            memory, _ = remembered(self._recurrent, rollout, observations, first)
            log_probs = self._recurrent.judge(observations, actions, memory.reshape(-1, self._memory_size))[0]
        return log_probs.reshape(rollout.rewards[first:].shape)

    def _act(self, observations: Observations, rng: np.random.Generator, memory: Floats) -> Actions:
        normal = self._normalizers.observations(observations)
        return self._model.act(normal, rng) if self._recurrent is None else self._recurrent.act(normal, rng, memory)

    def _greedy(self, num_envs: int) -> Callable[[Observations], Actions]:
        """Who acts in so many environments, greedily, from the beginnings of their episodes on."""
        normal, recurrent = self._normalizers.observations, self._recurrent
        if recurrent is None:
            return lambda shown: self._model.act_greedily(normal(shown))
        memory = np.zeros((num_envs, self._memory_size), np.float32)
        return lambda shown: recurrent.act_greedily(normal(shown), memory)

    # --- the state ---------------------------------------------------------------------------------------------------

    def _state(self) -> Arrays:
        """What all peers share; some of it are views."""
        counted = {"progress/env_steps": np.asarray(self._env_steps, np.int64)} if self.config.is_annealed else {}
        return (
            {f"parameters/{name}": array for name, array in self._model.parameters.items()}
            | {f"{_OWN}{name}": array for name, array in self._objective.own().items()}
            | ({"outer/momentum": self._outer.momentum} if self._mode is Mode.DILOCO else self._inner_state())
            | self._normalizers.to_arrays()
            | counted
        )

    def _inner_state(self) -> Arrays:
        """Adam's, as views: shared, but for mode ``diloco``."""
        adam = self._adam
        return {"adam/first": adam.first, "adam/second": adam.second, "adam/step": np.asarray(adam.step, np.int64)}

    def _load(self, arrays: Arrays) -> None:
        """Take what is there of `_state` and `_inner_state`."""
        for name, view in self._model.parameters.items():
            view[...] = arrays[f"parameters/{name}"]
        for name, own in self._objective.own().items():
            own[...] = arrays[f"{_OWN}{name}"]
        if "adam/step" in arrays:
            self._adam.first[:], self._adam.second[:] = arrays["adam/first"], arrays["adam/second"]
            self._adam.step = int(arrays["adam/step"])
        if "outer/momentum" in arrays:
            self._outer.momentum[:] = arrays["outer/momentum"]
        if "progress/env_steps" in arrays:
            self._env_steps = int(arrays["progress/env_steps"])
            self._objective.at(self._env_steps)
        self._normalizers.load(arrays)

    def _check_state(self, arrays: Arrays) -> None:
        check_fit(arrays, self._state())
        self._stepper.limits.check_state(arrays)
        if self._mode is Mode.DILOCO:
            self._outer.check(arrays["outer/momentum"])
        self._objective.check({name: arrays[f"{_OWN}{name}"] for name in self._objective.own()})
        if "progress/env_steps" in arrays and not 0 <= int(arrays["progress/env_steps"]) <= MAX_COUNT:
            raise ProtocolError("nobody can have taken so many environment steps; take another state")

    def _require_sane(self, batch: Samples | None) -> None:
        """Check the state that was merged, and what it makes of own samples, before anybody gets it.

        Raises:
            DivergedError: if it is of no use.
        """
        try:
            self._check_state(self._state())
        except ProtocolError as error:
            raise DivergedError(f"what was merged leads to a state that nobody would take: {error}") from error
        if batch is not None and not self._judges_sanely(batch.observations, batch.actions):
            raise DivergedError("what was merged leads to probabilities or values that are not finite")

    def _acts_sanely(self, arrays: Arrays) -> bool:
        """Whether what the policy of a state makes of what the environments show now is finite. Nothing has changed."""
        before = {name: array.copy() for name, array in self._state().items()}
        self._load(arrays)
        try:
            return all(self._is_sane_for(stream.observations) for stream in self._streams)
        finally:
            self._load(before)

    def _is_sane_for(self, shown: Observations) -> bool:
        observations = self._normalizers.observations(shown)
        with np.errstate(all="ignore"):
            actions = self._model.act(observations, np.random.default_rng(0))
        return self._judges_sanely(observations, actions.T)

    def _judges_sanely(self, observations: Observations, actions: Actions) -> bool:
        with np.errstate(all="ignore"):
            judged = self._model.judge(observations, actions)
        return all(bool(np.isfinite(each).all()) for each in judged)

    def _stop_update(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _require_idle(self) -> None:
        if self._running is not None:
            raise UsageError("an update is under way; finish it or call abandon() first")


def _flat(rows: Observations) -> Observations:
    """``[T, N, *shape]`` as ``[T * N, *shape]``."""
    return rows.reshape(-1, *rows.shape[2:])


def _by_column(actions: Actions) -> Actions:
    """``[T, N]`` as ``[T * N]``, ``[T, N, size]`` as ``[size, T * N]``."""
    return actions.ravel() if actions.ndim == 2 else actions.transpose(2, 0, 1).reshape(actions.shape[2], -1)
