"""Experience on its way from environments to an update: streams of environment steps, and their advantages.

A stream is what one peer contributes: a few environments, and one random generator for actions and shuffling, all
seeded from the run's seed and the stream's name. So a process that owns the streams of two peers sees exactly what
the two peers see. A stream that is begun again has another name: the same episodes once more would teach nothing, and
lead to the same failure if there was one.

When the policy changes while steps wait for an update, they may be kept once (`Stream.keep`), with the
log-probabilities that the policy that acted gave to its actions; and what is collected while an update waits for the
others, by the policy that it has made so far (`Stream.know`), is there for the next one.

Advantages are GAE (arXiv 1506.02438). An episode that was cut off by a time limit is worth the value of its final
observation from there on (Pardo et al., arXiv 1712.00378), and so is one that still runs when the update comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shoal.training.algorithms.base import DivergedError
from shoal.training.tasks import Task
from shoal.training.tasks.base import Actions, ActionSpace, Continuous, Discrete, Floats, MultiDiscrete, Observations
from shoal.training.tasks.source import seed_of

Policy = Callable[[Observations, np.random.Generator, Floats], Actions]
"""Acts on what is shown, and overwrites what is remembered, ``[N, memory_size]``."""
IsOver = Callable[[], bool]


def never() -> bool:
    """No reason to stop early."""
    return False


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of N environments, side by side.

    Attributes:
        observations: ``[T + 1, N, *shape]`` as the environments gave them; the last were not yet acted on. This and
            all that follows are views of what a stream writes into when it collects again.
        actions: ``[T, N]`` or ``[T, N, size]``.
        rewards: ``[T, N]``.
        terminated: ``[T, N]``.
        truncated: ``[T, N]``.
        discounted_returns: ``[T, N]``, what the running episode has earned so far, older rewards discounted.
        final_observations: ``[K, *shape]`` of the K truncated episodes, in the order of ``truncated``.
        memories: ``[T, N, memory_size]``, what a policy that remembers did before each step.
    """

    observations: Observations
    actions: Actions
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    discounted_returns: Floats
    final_observations: Observations
    memories: Floats = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))

    @property
    def samples(self) -> int:
        """T times N."""
        return self.rewards.size


class Source(Protocol):
    """What an update is made from: an own stream, or what another member collected."""

    @property
    def rng(self) -> np.random.Generator:
        """For shuffling and drawing."""
        ...

    @property
    def samples(self) -> int:
        """Environment steps."""
        ...

    @property
    def log_probs(self) -> Floats:
        """``[T, N]``, what the policy that acted gave to its actions; NaN where that is the present one."""
        ...

    @property
    def age(self) -> int:
        """By how many versions the policy that acted is older than the present one, where it is another."""
        ...

    def rollout(self) -> Rollout:
        """All of them."""
        ...

    def shuffled(self, parts: int) -> list[npt.NDArray[np.int64]]:
        """The indices of the samples in random order, in ``parts`` parts whose sizes differ by one at most."""
        ...


class Stream:
    """Environments that keep running from one collect to the next, and what they brought since the last update.

    Attributes:
        rng: for actions and for shuffling.
        samples: environment steps since the last update.
    """

    def __init__(self, task: Task, *, num_envs: int, gamma: float, seed: int, name: str, memory_size: int = 0) -> None:
        self.rng = np.random.default_rng(seed_of(seed, name, "actions"))
        self.samples = 0
        self._num_envs = num_envs
        self._gamma = np.float32(gamma)
        self._env = task.make(num_envs)
        self._observations = self._env.reset([seed_of(seed, name, "env", index) for index in range(num_envs)])
        self._episode_returns = np.zeros(num_envs)
        self._discounted = np.zeros(num_envs, np.float32)
        self._memory = np.zeros((num_envs, memory_size), np.float32)
        self._finals: list[Observations] = []
        self._length = 0
        self._num_old = 0  # of the first steps, that another policy made than the present one
        self._num_used = 0  # of the first steps, by the update under way
        shown, acted = self._observations.shape, _shape_and_type(task.action_space)
        empty = (0, num_envs)
        self._columns: list[npt.NDArray[Any]] = [
            np.empty((0, *shown), self._observations.dtype),
            np.empty((*empty, *acted[0]), acted[1]),
            np.empty(empty, np.float32),
            np.empty(empty, np.bool_),
            np.empty(empty, np.bool_),
            np.empty(empty, np.float32),
            np.empty((*empty, memory_size), np.float32),
            np.empty(empty, np.float32),
        ]

    def collect(self, num_steps: int, policy: Policy, is_over: IsOver = never) -> tuple[int, list[float]]:
        """Take at least ``num_steps`` steps, or fewer if ``is_over`` says so after a step of all environments.

        Returns:
            How many it took, and the returns of the episodes that ended.
        """
        vector_steps = -(-num_steps // self._num_envs)
        observations, acts, rewards, terminated, truncated, discounted, memories, log_probs = self._room(vector_steps)
        before, finished = self.samples, list[float]()
        for index in range(self._length, self._length + vector_steps):
            memories[index] = self._memory
            actions = policy(self._observations, self.rng, self._memory)
            if actions.dtype == np.float32 and not np.isfinite(actions).all():
                raise DivergedError("the policy acts in numbers that are not finite; no environment is to blame for it")
            step = self._env.step(actions)
            self._discounted *= self._gamma
            self._discounted += step.rewards
            self._episode_returns += step.rewards
            observations[index], acts[index], rewards[index] = self._observations, actions, step.rewards
            terminated[index], truncated[index] = step.terminated, step.truncated
            discounted[index] = self._discounted
            log_probs[index] = np.nan
            self._observations = step.observations
            for ended, observation in sorted(step.final_observations.items()):
                if ended not in step.failed:
                    finished.append(float(self._episode_returns[ended]))
                self._episode_returns[ended] = 0.0
                self._discounted[ended] = 0.0
                self._memory[ended] = 0.0
                if step.truncated[ended]:
                    self._finals.append(observation)
            self._length = index + 1
            self.samples += self._num_envs
            if is_over():
                break
        return self.samples - before, finished

    @property
    def observations(self) -> Observations:
        """``[N, *shape]``, what the environments show now."""
        return self._observations

    def rollout(self) -> Rollout:
        """All steps since the last update."""
        end = self._length
        observations, *others = self._room(1)
        observations[end] = self._observations
        finals: Any = np.stack(self._finals) if self._finals else np.zeros_like(self._observations[:0])
        actions, rewards, terminated, truncated, discounted, memories, _ = (column[:end] for column in others)
        return Rollout(observations[: end + 1], actions, rewards, terminated, truncated, discounted, finals, memories)

    @property
    def num_steps(self) -> int:
        """T of what `rollout` gives."""
        return self._length

    @property
    def log_probs(self) -> Floats:
        """``[T, N]``, what the policy that acted gave to its actions; NaN where that is the present one."""
        return self._columns[-1][: self._length]

    @property
    def age(self) -> int:
        """Nothing is kept for longer than one version."""
        return 1

    def know(self, log_probs: Floats) -> None:
        """The policy changes: where it is not known yet what the one that acted gave, it was the present one.

        Args:
            log_probs: ``[S, N]`` of the actions of the last S steps, under the present policy.
        """
        known = self.log_probs[self._length - len(log_probs) :]
        np.copyto(known, log_probs, where=np.isnan(known))

    def keep(self, log_probs: Floats) -> None:
        """Another policy is taken. Keep the steps that the present one made, and drop those of the one before it.

        Args:
            log_probs: ``[T, N]`` of all actions since the last update, under the present policy.
        """
        self.know(log_probs)
        self._cut(self._num_old)
        self._num_old = self._length

    def use(self) -> None:
        """An update of all steps that are here begins."""
        self._num_used = self._length

    def used(self) -> None:
        """It is done: forget what it used; what was collected meanwhile was made by another policy than the new one."""
        self._cut(self._num_used)
        self._num_old, self._num_used = self._length, 0

    def drop(self) -> None:
        """Forget the steps since the last update; running episodes go on."""
        self._cut(self._length)
        self._num_old = self._num_used = 0

    def _cut(self, first: int) -> None:
        """Forget the first steps."""
        if not first:
            return
        truncated = self._columns[4]
        del self._finals[: int(truncated[:first].sum())]
        for column in self._columns:
            column[: self._length - first] = column[first : self._length]
        self._length -= first
        self.samples = self._length * self._num_envs

    def _room(self, more: int) -> list[npt.NDArray[Any]]:
        """The columns, with room for so many steps more and for what is shown after them."""
        needed = self._length + more + 1
        if needed > len(self._columns[0]):
            for number, column in enumerate(self._columns):
                grown = np.empty((needed, *column.shape[1:]), column.dtype)
                grown[: self._length] = column[: self._length]
                self._columns[number] = grown
        return self._columns

    def shuffled(self, parts: int) -> list[npt.NDArray[np.int64]]:
        """The indices of the samples in random order, in ``parts`` parts whose sizes differ by one at most."""
        return [np.asarray(part) for part in np.array_split(self.rng.permutation(self.samples), parts)]


def advantages(
    rollout: Rollout, rewards: Floats, values: Floats, final_values: Floats, *, gamma: float, gae_lambda: float
) -> Floats:
    """Generalised advantage estimates.

    Args:
        rollout: whose episodes' ends count.
        rewards: ``[T, N]``, on the scale that the values have.
        values: ``[T + 1, N]`` of ``rollout.observations``.
        final_values: ``[K]`` of ``rollout.final_observations``.
        gamma: discount per step.
        gae_lambda: 0 trusts the values alone, 1 the rewards alone.

    Returns:
        ``[T, N]`` float32.
    """
    return gae(rollout.terminated, rollout.truncated, rewards, values, final_values, gamma=gamma, gae_lambda=gae_lambda)


def gae(
    terminated: npt.NDArray[np.bool_],
    truncated: npt.NDArray[np.bool_],
    rewards: Floats,
    values: Floats,
    final_values: Floats,
    *,
    gamma: float,
    gae_lambda: float,
) -> Floats:
    """`advantages` of whatever has ends: ``[T, N]`` float32.

    Args:
        terminated: ``[T, N]``, where nothing comes after.
        truncated: ``[T, N]``, where K times what comes after was cut off.
        rewards: ``[T, N]``.
        values: ``[T + 1, N]``; what follows an end in a column may be anything.
        final_values: ``[K]``, what comes after is worth, in the order of ``truncated``.
        gamma: discount per step.
        gae_lambda: 0 trusts the values alone, 1 the rewards alone.
    """
    goes_on = runs_on(terminated, truncated)
    after = following(terminated, truncated, values, final_values)
    result: Floats = rewards + np.float32(gamma) * after - values[:-1]
    decay: Floats = np.float32(gamma * gae_lambda) * goes_on
    accumulate(result, decay)
    return result


def runs_on(terminated: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """``[T, N]``, whether the episode goes on after the step."""
    return ~(terminated | truncated)


def following(
    terminated: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], values: Floats, final_values: Floats
) -> Floats:
    """``[T, N]``, what the state after each step is worth: nothing where an episode ended by itself. As for `gae`."""
    after: Floats = values[1:] * runs_on(terminated, truncated)
    after[truncated] = final_values
    return after


def accumulate(deltas: Floats, decay: Floats) -> None:
    """Add to each of ``deltas`` ``[T, N]`` the next sum times its ``decay`` ``[T, N]``. In place; both are changed."""
    # Each is its own delta and the decayed next one, which is the same of the next: after k rounds each holds the sum
    # of the next 2^k deltas. So a few passes over all, and none by step.
    span = 1
    while span < len(deltas):
        deltas[:-span] += decay[:-span] * deltas[span:]
        decay[:-span] *= decay[span:]
        span *= 2


def _shape_and_type(space: ActionSpace) -> tuple[tuple[int, ...], type[np.generic]]:
    """Of one action."""
    match space:
        case Discrete():
            return (), np.int64
        case MultiDiscrete(counts):
            return (len(counts),), np.int64
        case Continuous(size):
            return (size,), np.float32
