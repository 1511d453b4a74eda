"""Greedy episodes in environments of their own: what a policy is worth, repeatably."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from shoal.training.tasks import Task, VectorEnv
from shoal.training.tasks.base import Actions, Lenient, Observations
from shoal.training.tasks.failures import TaskFailedError
from shoal.training.tasks.source import seed_of

_MAX_ENVS: Final = 32
_MAX_STEPS: Final = 100_000  # of one episode; one that goes on is counted with what it has earned by then


class Evaluation:
    """A task's environments, kept from one evaluation to the next."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._make = task.make_plain if isinstance(task, Lenient) else task.make
        self._envs: dict[int, VectorEnv] = {}

    def returns(
        self, acting: Callable[[int], Callable[[Observations], Actions]], episodes: int, seed: int
    ) -> list[float]:
        """Undiscounted returns; an episode is cut after 100,000 steps, left out if it fails.

        Args:
            acting: who acts in so many environments, of which each begins an episode.
            episodes: how many.
            seed: of all of them.

        Raises:
            TaskFailedError: if all failed, or too many environments did.
        """
        returns: list[float] = []
        begun = 0
        while begun < episodes:
            count = min(episodes - begun, _MAX_ENVS)
            if count not in self._envs:
                self._envs[count] = self._make(count)
            env = self._envs[count]
            observations = env.reset([seed_of(seed, "evaluation", begun + i) for i in range(count)])
            act = acting(count)
            totals, live = np.zeros(count), np.ones(count, np.bool_)
            failed: set[int] = set()
            for _ in range(_MAX_STEPS):
                step = env.step(act(observations))
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
