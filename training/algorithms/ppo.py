"""Proximal policy optimisation with a clipped objective (Schulman et al., arXiv 1707.06347), by one peer or by many.

Every epoch each peer collects steps from its own environments; then come ``update_epochs`` passes of
``num_minibatches`` Adam steps on the clipped loss (`ppo_loss`), with A the normalised advantage (GAE) and R = A + V the
return. What is exchanged (DESIGN §8):

- Mode ``local``: each peer takes these steps on its own samples alone. One exchange then averages the parameters and
  Adam's moments, weighted by samples, and everybody goes on in the direction of the average as far as one peer went
  (`extrapolation`), by the same operations, so all hold the same bits.
- Mode ``diloco``: the same steps, but what is exchanged is how far they led, as an outer gradient
  (`shoal.training.exchange.outer`): a third of the bytes, and fewer by a lossy codec. Adam's moments stay with their
  peer: a newcomer, and a worker that was started anew, begins with zeros, as everybody did.
- Mode ``gradient``: a first exchange merges the moments of the advantages, so that they are normalised over the
  joint batch; then one exchange per minibatch averages its gradient, weighted by samples. The k-th minibatch of the
  joint batch is the union of the peers' k-th minibatches, so N peers take the steps of one process.

Deviations from the paper and its usual implementations: advantages are normalised over the batch, not per minibatch;
the value loss isn't clipped; an episode that hits a time limit is worth the value of its final observation. The
normalisers of observations and rewards are running moments that are merged exactly with the exchanges of the epoch,
and stand still within it. Old log-probabilities and values are computed when the update starts, from the parameters
that acted, so collecting needs the actor alone.

Stale samples: a learner that the others did not wait for may keep what it collected when it takes their policy, so that
it counts in the next epoch; and in modes ``local`` and ``diloco``, one that waits for the others goes on collecting for
the next epoch, with the parameters that its own steps led to (`PPOLearner.collect_ahead`). These samples are then one
policy version old, never more. Their old log-probabilities are of the policy that acted, computed with its parameters
and normaliser before these are replaced, so r is the ratio that the paper means; there is no other correction (V-trace,
a decoupled objective) at this age. Their advantages are GAE with the values of the new critic. An update without such
samples is the same, bit for bit, as if they did not exist.

What other peers contribute, and every state, is held to what honest ones can make (`plausible`): parameters no further
from the epoch's than Adam's steps reach, moments of Adam that clipped gradients lead to, as many samples in the
normalisers as the weight says. What was merged is tried on own samples before it becomes the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training import watch
from shoal.training.algorithms.adam import Adam, clip_by_norm, fit_first, shorten
from shoal.training.algorithms.base import Collected, DivergedError, Exchange, Update, UpdateStats
from shoal.training.algorithms.extrapolation import extrapolate, travel
from shoal.training.algorithms.plausible import COARSE_TRAVEL_FACTOR, TRAVEL_FACTOR, Limits, as_floats
from shoal.training.algorithms.ppo_config import PPOConfig, ppo_config
from shoal.training.algorithms.ppo_loss import Batch, ClippedLoss, Measures
from shoal.training.algorithms.rollouts import Stream, advantages, derive_seed, never
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.outliers import Scale, root_mean_square
from shoal.training.exchange.rules import ROUNDING, Codec
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.state import check_fit
from shoal.training.tasks import Task, VectorEnv
from shoal.training.tasks.base import Actions, Floats
from shoal.training.tasks.failures import TaskFailedError
from shoal.training.watch import Slot

_MAX_BACKLOG: Final = 8  # batches that may wait for an update
_MAX_EVAL_ENVS: Final = 32
_MAX_EVAL_STEPS: Final = 100_000  # of one episode; one that goes on is counted with what it has earned by then
_GRADIENT_FACTOR: Final = 100.0  # gradients of few samples are tens of times as long as those of many, now and then
_MOMENTS_FACTOR: Final = 1000.0
_CLIP: Final = 10.0  # normalised observations and rewards beyond this are outliers
_MAX_SIZES: Final = 8  # of minibatches, whose arrays are kept


class PPO:
    """The algorithm called ``ppo``."""

    name = "ppo"
    version = 3

    def learner(
        self, manifest: Manifest, task: Task, *, peer: PeerId, life: str = "", streams: Sequence[str] | None = None
    ) -> PPOLearner:
        """A learner in its initial state.

        Args:
            manifest: what is trained.
            task: the manifest's.
            peer: whose learner it is.
            life: tells this learner's stream from those of its earlier lives.
            streams: the names of the rollout streams that it owns; one, named after the peer, by default. A process
                that owns the streams of several peers makes, in mode ``gradient``, the update they make together.

        Raises:
            UsageError: if the manifest's hyperparameters are unknown or out of range.
        """
        return PPOLearner(ppo_config(manifest, task), manifest, task, streams or [f"{peer}/{life}" if life else peer])


class PPOLearner:
    """One peer's part in learning by PPO; see `shoal.training.algorithms.Learner`."""

    def __init__(self, config: PPOConfig, manifest: Manifest, task: Task, streams: Sequence[str]) -> None:
        self.config = config
        self._mode = manifest.mode
        self._largest_share = len(streams) * max(manifest.batch.largest_share, config.num_envs)
        self._max_samples = _MAX_BACKLOG * self._largest_share
        self._task = task
        self._model = ActorCritic(
            task.observation_size,
            task.action_space,
            config.hidden_sizes,
            initial_log_std=config.initial_log_std,
            seed=manifest.seed,
        )
        self._adam = Adam(self._model.flat.size, learning_rate=config.learning_rate, epsilon=config.adam_epsilon)
        self._streams = [
            Stream(task, num_envs=config.num_envs, gamma=config.gamma, seed=manifest.seed, name=name)
            for name in streams
        ]
        self._set_normalizers(Moments.none((task.observation_size,)), Moments.none())
        self._max_change = self._adam.max_change(config.update_epochs * config.num_minibatches)
        self._limits = Limits(
            config.max_grad_norm,
            self._max_change if manifest.codec is Codec.FP32 else ROUNDING * self._max_change,
            {"observation": config.normalize_observations, "return": config.normalize_returns},
            TRAVEL_FACTOR if manifest.codec in (Codec.FP32, Codec.BF16, Codec.INT8) else COARSE_TRAVEL_FACTOR,
        )
        self._outer = Outer(
            self._model.flat.size,
            learning_rate=config.outer_learning_rate,
            momentum=config.outer_momentum,
            max_gradient=ROUNDING * self._max_change,
        )
        self._losses: dict[int, ClippedLoss] = {}  # by size of the minibatch
        self._running: Update | None = None
        self._num_ahead = 0  # samples that may be collected while the update under way waits
        self._eval_envs: dict[int, VectorEnv] = {}

    @property
    def samples(self) -> int:
        """Environment steps that wait for the next update."""
        return sum(stream.samples for stream in self._streams)

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
        before, finished, size = self.samples, list[float](), self.config.num_envs
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
        if self._running is not None:
            self._running.close()
            self._running = None
        for stream in self._streams:
            stream.drop()

    def export_state(self) -> Arrays:
        """Parameters, both normalisers, and Adam's state or (mode ``diloco``) the outer momentum, copied."""
        self._require_idle()
        return {name: array.copy() for name, array in self._state().items()}

    def import_state(self, arrays: Arrays, *, keep_samples: bool = False) -> None:
        """Take a state that some peer exported; see `Learner.import_state` and the head of this module."""
        self._check_state(arrays)
        if not self._acts_sanely(arrays):
            raise ProtocolError("this policy acts or judges in numbers that are not finite; take another state")
        if not keep_samples:
            self.abandon()
        if self._running is not None:
            self._running.close()
            self._running = None
        for stream in self._streams:
            if stream.samples:
                stream.keep(self._log_probs(stream))
        self._load(arrays)

    def _acts_sanely(self, arrays: Arrays) -> bool:
        """Whether what the policy of a state makes of what the environments show now is finite. Nothing has changed."""
        before = {name: array.copy() for name, array in self._state().items()}
        self._load(arrays)
        try:
            return all(self._is_sane_for(stream.observations) for stream in self._streams)
        finally:
            self._load(before)

    def _is_sane_for(self, shown: Floats) -> bool:
        observations = self._normalize(shown)
        with np.errstate(all="ignore"):
            actions = self._model.act(observations, np.random.default_rng(0))
            judged = self._model.judge(observations, actions.T)
        return all(bool(np.isfinite(each).all()) for each in judged)

    def _log_probs(self, stream: Stream, first: int = 0) -> Floats:
        """``[S, N]``, of the actions in a stream from the ``first`` step on, under the present policy."""
        rollout = stream.rollout()
        observations = _flat(self._normalize(rollout.observations[first:-1]))
        log_probs, _ = self._model.judge(observations, _by_column(rollout.actions[first:]))
        return log_probs.reshape(rollout.rewards[first:].shape)

    def policy_arrays(self) -> Arrays:
        """The parameters and, where observations are normalised, their moments, copied."""
        state = self._state()
        kept = ("parameters/", "moments/observation/") if self.config.normalize_observations else ("parameters/",)
        return {name: array.copy() for name, array in state.items() if name.startswith(kept)}

    def evaluate(self, episodes: int, seed: int) -> list[float]:
        """Undiscounted returns of greedy episodes; an episode is cut after 100,000 steps, left out if it fails."""
        returns: list[float] = []
        begun = 0
        while begun < episodes:
            count = min(episodes - begun, _MAX_EVAL_ENVS)
            if count not in self._eval_envs:
                self._eval_envs[count] = self._task.make(count)
            env = self._eval_envs[count]
            observations = env.reset([derive_seed(seed, "evaluation", begun + i) for i in range(count)])
            totals, live = np.zeros(count), np.ones(count, np.bool_)
            failed: set[int] = set()
            for _ in range(_MAX_EVAL_STEPS):
                step = env.step(self._model.act_greedily(self._normalize(observations)))
                observations = step.observations
                totals += step.rewards * live
                failed |= {index for index in step.failed if live[index]}
                live &= ~(step.terminated | step.truncated)
                live[list(failed)] = False
                if not live.any():
                    break
            begun += count
            returns += [float(total) for index, total in enumerate(totals) if index not in failed]
        if not returns:
            raise TaskFailedError(f"every episode of an evaluation failed: {self._task.failures.summary}")
        return returns

    def _guarded_update(self) -> Update:
        """Run the update; put everything back if it is closed or fails."""
        before = {name: array.copy() for name, array in (self._state() | self._inner_state()).items()}
        for stream in self._streams:
            stream.use()
        try:
            stats = yield from self._update()
        except BaseException:
            self._load(before)
            raise
        finally:
            self._running = None
        for stream in self._streams:
            stream.used()
        return stats

    def _update(self) -> Update:
        samples = self.samples
        increments = self._normalizer_increments()
        batch, explained = self._batch() if samples else (None, 0.0)
        measures = Measures()
        match self._mode:
            case Mode.LOCAL:
                merged = yield from self._optimise_locally(batch, increments, measures)
            case Mode.DILOCO:
                merged = yield from self._optimise_apart(batch, increments, measures)
            case Mode.GRADIENT:
                merged = yield from self._optimise_together(batch, increments, measures)
        if merged:
            self._set_normalizers(
                self._observation_moments.merge(Moments.from_arrays(merged, "observation")),
                self._return_moments.merge(Moments.from_arrays(merged, "return")),
            )
        self._require_sane(batch)
        steps = self.config.update_epochs * self.config.num_minibatches
        if batch is None:
            return UpdateStats(samples, steps)
        return UpdateStats(samples, steps, measures.means() | {"explained_variance": explained})

    def _optimise_locally(
        self, batch: Batch | None, increments: Arrays, measures: Measures
    ) -> Generator[Exchange, Arrays, Arrays]:
        """Optimise on own samples, then average the outcome."""
        before = {name: array.copy() for name, array in self._state().items()}
        model, adam, config = self._model, self._adam, self.config
        start = model.flat.copy()
        self._step_alone(batch, measures)
        template = {
            "mean/parameters": model.flat,
            "mean/adam/first": adam.first,
            "nonneg/adam/second": adam.second,
            "mean/travel": np.asarray(travel(start, model.flat)),
        } | increments
        arrays = {name: array.copy() for name, array in template.items()}
        steps = config.update_epochs * config.num_minibatches
        check = partial(self._limits.check_contribution, start=start)
        scales = self._moment_scales()
        centres = {
            "mean/parameters": start,
            "mean/adam/first": before["adam/first"],
            "nonneg/adam/second": before["adam/second"],
        }
        own = arrays if batch is not None else {}
        lossy = {"mean/parameters": self._max_change}
        merged = yield from self._wait(Exchange(own, self.samples, arrays, check, scales, centres, lossy))
        if not merged:  # nobody had any samples
            self._load(before)
            return {}
        _check_merged(merged, arrays)
        model.flat[:] = extrapolate(start, as_floats(merged["mean/parameters"]), float(merged["mean/travel"]))
        adam.second[:] = merged["nonneg/adam/second"]
        adam.first[:] = fit_first(as_floats(merged["mean/adam/first"]), adam.second)
        adam.step = int(before["adam/step"]) + steps
        return merged

    def _optimise_apart(
        self, batch: Batch | None, increments: Arrays, measures: Measures
    ) -> Generator[Exchange, Arrays, Arrays]:
        """Optimise on own samples, then step by the average of how far everybody came."""
        start = self._model.flat.copy()
        self._step_alone(batch, measures)
        arrays: Arrays = {"mean/delta": start - self._model.flat} | increments
        check = partial(self._limits.check_contribution, start=start)
        lossy = {"mean/delta": self._max_change}
        own = arrays if batch is not None else {}
        exchange = Exchange(own, self.samples, arrays, check, self._moment_scales(), lossy=lossy)
        merged = yield from self._wait(exchange)
        self._model.flat[:] = start
        if merged:
            _check_merged(merged, arrays)
            self._outer.apply(self._model.flat, as_floats(merged["mean/delta"]))
        return merged

    def _wait(self, exchange: Exchange) -> Generator[Exchange, Arrays, Arrays]:
        """The one exchange of an update, during which this learner may go on collecting."""
        most = self._largest_share
        self._num_ahead = max(0, min(most, 2 * most - self.samples))
        try:
            return (yield exchange)
        finally:
            self._num_ahead = 0

    def _step_alone(self, batch: Batch | None, measures: Measures) -> None:
        """All steps of an update on own samples, if there are any."""
        if batch is None:
            return
        batch = batch.normalized(Moments.of(batch.advantages))
        for minibatch, is_measured in self._minibatches(batch):
            if minibatch is not None:
                gradient = self._gradient(minibatch, measures if is_measured else None)
                norm = shorten(gradient, self.config.max_grad_norm)
                self._adam.apply(self._model.flat, gradient)
                if is_measured:
                    measures.add({"gradient_norm": norm}, len(minibatch))

    def _optimise_together(
        self, batch: Batch | None, increments: Arrays, measures: Measures
    ) -> Generator[Exchange, Arrays, Arrays]:
        """Normalise advantages over the joint batch, then average the gradient of every minibatch."""
        own = Moments.none() if batch is None else Moments.of(batch.advantages)
        arrays = own.to_arrays("advantage") | increments
        scales = self._moment_scales() | {"moments/advantage": Scale(_MOMENTS_FACTOR)}
        check = partial(self._limits.check_contribution, start=self._model.flat)
        merged = yield Exchange(arrays if batch is not None else {}, self.samples, arrays, check, scales, is_last=False)
        if merged:
            _check_merged(merged, arrays)
            if batch is not None:
                batch = batch.normalized(Moments.from_arrays(merged, "advantage"))
        template: Arrays = {"mean/gradient": np.zeros_like(self._model.flat)}
        scales = {"mean/gradient": Scale(_GRADIENT_FACTOR)}
        num_steps = self.config.update_epochs * self.config.num_minibatches
        for number, (minibatch, is_measured) in enumerate(self._minibatches(batch), 1):
            gradient: Arrays = {}
            if minibatch is not None:
                own_gradient = self._gradient(minibatch, measures if is_measured else None)
                gradient = {"mean/gradient": own_gradient.copy()}
            joint = yield Exchange(
                gradient,
                0 if minibatch is None else len(minibatch),
                template,
                scales=scales,
                lossy={"mean/gradient": math.inf},
                is_last=number == num_steps,
            )
            if joint:
                _check_merged(joint, template)
                clipped, norm = clip_by_norm(as_floats(joint["mean/gradient"]), self.config.max_grad_norm)
                self._adam.apply(self._model.flat, clipped)
                if is_measured:
                    measures.add({"gradient_norm": norm}, 1)
        return merged

    def _minibatches(self, batch: Batch | None) -> Iterator[tuple[Batch | None, bool]]:
        """The k-th minibatch of a pass, which is the union of the streams' k-th; and whether the pass is the last one.

        None where there are no samples in it. Each is overwritten by the next pass.
        """
        parts, passes = self.config.num_minibatches, self.config.update_epochs
        if batch is None:
            yield from ((None, number == passes) for number in range(1, passes + 1) for _ in range(parts))
            return
        offsets = np.cumsum([0, *(stream.samples for stream in self._streams)])
        mixed = batch.empty()
        for number in range(1, passes + 1):
            shuffled = [stream.shuffled(parts) for stream in self._streams]
            order = [own[part] + offsets[i] for part in range(parts) for i, own in enumerate(shuffled)]
            batch.reorder(np.concatenate(order), mixed)
            start = 0
            for part in range(parts):
                end = start + sum(len(own[part]) for own in shuffled)
                yield mixed.part(start, end) if end > start else None, number == passes
                start = end

    def _gradient(self, batch: Batch, measures: Measures | None) -> Floats:
        """Of the loss on one minibatch, float32 ``[num_parameters]``; overwritten by the next one."""
        watch.page[Slot.CALLS] += 1
        size = len(batch)
        if size not in self._losses:
            if len(self._losses) >= _MAX_SIZES:
                self._losses.clear()
            self._losses[size] = ClippedLoss(self._model, self.config, size)
        loss = self._losses[size]
        gradient = loss.gradient(batch)
        if measures is not None:
            measures.add(loss.measures(), size)
        return gradient

    def _batch(self) -> tuple[Batch, float]:
        """Everything collected since the last update, stream after stream, and how much of the returns was foreseen."""
        columns: list[tuple[Floats, Actions, Floats, Floats, Floats]] = []
        for stream in self._streams:
            rollout = stream.rollout()
            shape = rollout.rewards.shape
            observations = _flat(self._normalize(rollout.observations[:-1]))
            actions = _by_column(rollout.actions)
            log_probs, judged = self._model.judge(observations, actions)
            known = stream.log_probs.ravel()
            np.copyto(log_probs, known, where=~np.isnan(known))
            values = np.empty((shape[0] + 1, shape[1]), np.float32)
            values[:-1] = judged.reshape(shape)
            values[-1] = self._model.values(self._normalize(rollout.observations[-1]))
            final_values = self._model.values(self._normalize(rollout.final_observations))
            rewards = rollout.rewards
            if self.config.normalize_returns:
                scale = np.float32(1 / max(float(self._return_moments.std), 1e-4))
                rewards = np.clip(rewards * scale, -_CLIP, _CLIP)
            gamma, gae_lambda = self.config.gamma, self.config.gae_lambda
            advantage = advantages(rollout, rewards, values, final_values, gamma=gamma, gae_lambda=gae_lambda).ravel()
            columns.append((observations, actions, log_probs, advantage, advantage + judged))
        observations, actions, log_probs, advantage, returns = (
            np.concatenate(column, axis=0 if number == 0 else -1)
            for number, column in enumerate(zip(*columns, strict=True))
        )
        variance = float(returns.var())
        explained = 1 - float(advantage.var()) / variance if variance > 0 else 0.0
        return Batch(observations, actions, log_probs, advantage, returns), explained

    def _check_state(self, arrays: Arrays) -> None:
        check_fit(arrays, self._state())
        self._limits.check_state(arrays)
        if self._mode is Mode.DILOCO:
            self._outer.check(arrays["outer/momentum"])

    def _require_sane(self, batch: Batch | None) -> None:
        """Check the state that was merged, and what it makes of own samples, before anybody gets it.

        Raises:
            DivergedError: if it is of no use.
        """
        try:
            self._check_state(self._state())
        except ProtocolError as error:
            raise DivergedError(f"what was merged leads to a state that nobody would take: {error}") from error
        if batch is None:
            return
        with np.errstate(all="ignore"):
            judged = self._model.judge(batch.observations, batch.actions)
        if not all(bool(np.isfinite(each).all()) for each in judged):
            raise DivergedError("what was merged leads to probabilities or values that are not finite")

    def _moment_scales(self) -> dict[str, Scale]:
        """How the moments of honest peers compare: with each other, and with all that the run has seen."""
        seen = {"observation": self._observation_moments, "return": self._return_moments}
        return {
            f"moments/{name}": Scale(_MOMENTS_FACTOR, _MOMENTS_FACTOR * root_mean_square(moments))
            for name, moments in seen.items()
        }

    def _normalizer_increments(self) -> Arrays:
        """The moments of what was collected since the last update; of nothing, where there is nothing to normalise."""
        observations, returns = Moments.none((self._task.observation_size,)), Moments.none()
        for stream in self._streams:
            if not stream.samples:
                continue
            rollout = stream.rollout()
            if self.config.normalize_observations:
                seen = rollout.observations[:-1].reshape(-1, self._task.observation_size)
                observations = observations.merge(Moments.of(seen))
            if self.config.normalize_returns:
                returns = returns.merge(Moments.of(rollout.discounted_returns.ravel()))
        return observations.to_arrays("observation") | returns.to_arrays("return")

    def _normalize(self, observations: Floats) -> Floats:
        if not self._observation_moments.count:
            return observations
        mean, scale = self._observation_scale
        normal: Floats = ((observations - mean) * scale).clip(-_CLIP, _CLIP)
        return normal

    def _act(self, observations: Floats, rng: np.random.Generator) -> Actions:
        return self._model.act(self._normalize(observations), rng)

    def _state(self) -> Arrays:
        """What all peers share; some of it are views."""
        return (
            {f"parameters/{name}": array for name, array in self._model.parameters.items()}
            | ({"outer/momentum": self._outer.momentum} if self._mode is Mode.DILOCO else self._inner_state())
            | self._observation_moments.to_arrays("observation")
            | self._return_moments.to_arrays("return")
        )

    def _inner_state(self) -> Arrays:
        """Adam's, as views: shared, but for mode ``diloco``."""
        adam = self._adam
        return {"adam/first": adam.first, "adam/second": adam.second, "adam/step": np.asarray(adam.step, np.int64)}

    def _load(self, arrays: Arrays) -> None:
        """Take what is there of `_state` and `_inner_state`."""
        for name, view in self._model.parameters.items():
            view[...] = arrays[f"parameters/{name}"]
        if "adam/step" in arrays:
            self._adam.first[:], self._adam.second[:] = arrays["adam/first"], arrays["adam/second"]
            self._adam.step = int(arrays["adam/step"])
        if "outer/momentum" in arrays:
            self._outer.momentum[:] = arrays["outer/momentum"]
        self._set_normalizers(Moments.from_arrays(arrays, "observation"), Moments.from_arrays(arrays, "return"))

    def _set_normalizers(self, observation: Moments, returns: Moments) -> None:
        self._observation_moments, self._return_moments = observation, returns
        scale = 1 / np.sqrt(np.square(observation.std) + 1e-8)
        self._observation_scale = observation.mean.astype(np.float32), scale.astype(np.float32)

    def _require_idle(self) -> None:
        if self._running is not None:
            raise UsageError("an update is under way; finish it or call abandon() first")


def _flat(rows: Floats) -> Floats:
    """``[T, N, size]`` as ``[T * N, size]``."""
    return rows.reshape(-1, rows.shape[2])


def _by_column(actions: Actions) -> Actions:
    """``[T, N]`` as ``[T * N]``, ``[T, N, size]`` as ``[size, T * N]``."""
    return actions.ravel() if actions.ndim == 2 else actions.transpose(2, 0, 1).reshape(actions.shape[2], -1)


def _check_merged(merged: Arrays, template: Arrays) -> None:
    check_fit(merged, template)
    for name, array in merged.items():
        if name.startswith("nonneg/") and (array.astype(np.float64) < 0).any():
            raise ProtocolError(f"{name!r} is negative; leave out who contributed it")
