"""Experience on its way from environments to an update: streams of environment steps, and their advantages.

A stream is what one peer contributes: a few environments, and one random generator for actions and shuffling, all
seeded from the run's seed and the stream's name. So a process that owns the streams of two peers sees exactly what
the two peers see. A stream that is begun again has another name: the same episodes once more would teach nothing, and
lead to the same failure if there was one.

When the policy changes while steps wait for an update, they may be kept once (`Stream.keep`), with the
log-probabilities that the policy that acted gave to its actions.

Advantages are GAE (arXiv 1506.02438). An episode that was cut off by a time limit is worth the value of its final
observation from there on (Pardo et al., arXiv 1712.00378), and so is one that still runs when the update comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.training.algorithms.base import DivergedError
from shoal.training.tasks import Task
from shoal.training.tasks.base import Actions, Floats

Policy = Callable[[Floats, np.random.Generator], Actions]
IsOver = Callable[[], bool]


def never() -> bool:
    """No reason to stop early."""
    return False


def derive_seed(*parts: object) -> int:
    """A 32-bit seed that differs with every part, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:4], "big")


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of N environments, side by side.

    Attributes:
        observations: ``[T + 1, N, observation_size]`` as the environments gave them; the last were not yet acted on.
        actions: ``[T, N]`` or ``[T, N, size]``.
        rewards: ``[T, N]``.
        terminated: ``[T, N]``.
        truncated: ``[T, N]``.
        discounted_returns: ``[T, N]``, what the running episode has earned so far, older rewards discounted.
        final_observations: ``[K, observation_size]`` of the K truncated episodes, in the order of ``truncated``.
    """

    observations: Floats
    actions: Actions
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    discounted_returns: Floats
    final_observations: Floats

    @property
    def samples(self) -> int:
        """T times N."""
        return self.rewards.size


class Stream:
    """Environments that keep running from one collect to the next, and what they brought since the last update.

    Attributes:
        rng: for actions and for shuffling.
        samples: environment steps since the last update.
        kept_log_probs: ``[S, N]``, what the policy before gave to the actions of the first S steps, which it made; the
            present one made the rest. None if there are no such steps.
    """

    def __init__(self, task: Task, *, num_envs: int, gamma: float, seed: int, name: str) -> None:
        self.rng = np.random.default_rng(derive_seed(seed, name, "actions"))
        self.samples = 0
        self.kept_log_probs: Floats | None = None
        self._num_envs = num_envs
        self._gamma = np.float32(gamma)
        self._env = task.make(num_envs)
        self._observations = self._env.reset([derive_seed(seed, name, "env", index) for index in range(num_envs)])
        self._episode_returns = np.zeros(num_envs)
        self._discounted = np.zeros(num_envs, np.float32)
        self._finals: list[Floats] = []
        self._steps: list[tuple[Floats, Actions, Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_], Floats]] = []

    def collect(self, num_steps: int, policy: Policy, is_over: IsOver = never) -> tuple[int, list[float]]:
        """Take at least ``num_steps`` steps, or fewer if ``is_over`` says so after a step of all environments.

        Returns:
            How many it took, and the returns of the episodes that ended.
        """
        vector_steps = -(-num_steps // self._num_envs)
        before, finished = self.samples, list[float]()
        for _ in range(vector_steps):
            actions = policy(self._observations, self.rng)
            if actions.dtype == np.float32 and not np.isfinite(actions).all():
                raise DivergedError("the policy acts in numbers that are not finite; no environment is to blame for it")
            step = self._env.step(actions)
            self._discounted = self._discounted * self._gamma + step.rewards
            self._episode_returns += step.rewards
            self._steps.append(
                (self._observations, actions, step.rewards, step.terminated, step.truncated, self._discounted)
            )
            self._observations = step.observations
            if step.final_observations:
                self._discounted = self._discounted.copy()  # the list above holds this array
                for index, observation in sorted(step.final_observations.items()):
                    if index not in step.failed:
                        finished.append(float(self._episode_returns[index]))
                    self._episode_returns[index] = 0.0
                    self._discounted[index] = 0.0
                    if step.truncated[index]:
                        self._finals.append(observation)
            self.samples += self._num_envs
            if is_over():
                break
        return self.samples - before, finished

    @property
    def observations(self) -> Floats:
        """``[N, observation_size]``, what the environments show now."""
        return self._observations

    def rollout(self) -> Rollout:
        """All steps since the last update, of which there must be some."""
        observations, actions, rewards, terminated, truncated, discounted = zip(*self._steps, strict=True)
        size = self._observations.shape[1]
        return Rollout(
            np.stack([*observations, self._observations]),
            np.stack(actions),
            np.stack(rewards),
            np.stack(terminated),
            np.stack(truncated),
            np.stack(discounted),
            np.stack(self._finals) if self._finals else np.zeros((0, size), np.float32),
        )

    def keep(self, log_probs: Floats) -> None:
        """The policy changes. Keep the steps that the present one made, and drop those of the one before it.

        Args:
            log_probs: ``[T, N]`` of all actions since the last update, under the present policy.
        """
        old = 0 if self.kept_log_probs is None else len(self.kept_log_probs)
        num_truncated = sum(int(truncated.sum()) for _, _, _, _, truncated, _ in self._steps[:old])
        del self._steps[:old], self._finals[:num_truncated]
        self.samples = len(self._steps) * self._num_envs
        self.kept_log_probs = log_probs[old:].copy() if self._steps else None

    def drop(self) -> None:
        """Forget the steps since the last update; running episodes go on."""
        self._steps.clear()
        self._finals.clear()
        self.kept_log_probs = None
        self.samples = 0

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
    next_values = values[1:] * ~(rollout.terminated | rollout.truncated)
    next_values[rollout.truncated] = final_values
    deltas = rewards + np.float32(gamma) * next_values - values[:-1]
    decay = np.float32(gamma * gae_lambda) * ~(rollout.terminated | rollout.truncated)
    result = np.empty_like(deltas)
    running = np.zeros_like(deltas[0])
    for step in range(len(deltas) - 1, -1, -1):
        running = deltas[step] + decay[step] * running
        result[step] = running
    return result
