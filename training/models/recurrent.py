"""An actor and a critic that remember: a gated recurrent unit (`gated`) below the networks of `actor_critic`.

Both networks see what is shown and what is remembered after it, from one memory. So what needs no memory is learned as
without one, and nothing has to go through gates for that. The unit sees what is shown alone, and not the last action or
reward, as R2D2's and IMPALA's do.

What is remembered is an array ``[N, memory_size]`` of whoever acts, zeros where an episode begins. Judging samples that
follow each other is going through them in order (`shoal.training.models.policy.Course`); where what was remembered
before each is known, it is one step, of all at once.

All parameters are one vector, and initial values the same bits on every machine, as `actor_critic` says; those of the
memory lie behind the others and are called ``memory/*``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from shoal.training.models.actor_critic import ActorCritic
from shoal.training.models.gated import Gated, Trace, initial
from shoal.training.models.policy import Course
from shoal.training.models.seen import as_vectors
from shoal.training.tasks.base import Actions, ActionSpace, Floats, Observations

_MEMORY: Final = 1  # beside the seed of the networks


class RecurrentActorCritic:
    """The policy and the values; see `shoal.training.models.policy.Recurrent`."""

    def __init__(
        self,
        observation_size: int,
        action_space: ActionSpace,
        hidden_sizes: Sequence[int],
        *,
        memory_size: int,
        initial_log_std: float,
        seed: int,
    ) -> None:
        self.memory_size = memory_size
        self._heads = ActorCritic(
            observation_size + memory_size,
            action_space,
            hidden_sizes,
            initial_log_std=initial_log_std,
            seed=seed,
            more=initial(observation_size, memory_size, np.random.PCG64([seed, _MEMORY])),
        )
        self.flat, self.parameters, self.gradient = self._heads.flat, self._heads.parameters, self._heads.gradient
        self._unit = Gated(self.parameters, self._heads.views_of(self.gradient))

    def act(self, observations: Observations, rng: np.random.Generator, memory: Floats | None = None) -> Actions:
        """Draw actions; see `shoal.training.models.heads.sample`. What is remembered after is put into ``memory``."""
        return self._heads.act(self._features(observations, memory, is_kept=True), rng)

    def act_greedily(self, observations: Observations, memory: Floats | None = None) -> Actions:
        """The likeliest actions, likewise."""
        return self._heads.act_greedily(self._features(observations, memory, is_kept=True))

    def remember(self, observations: Observations, course: Course) -> Floats:
        """``[S, memory_size]``, what is remembered after each of samples in the order of a course."""
        return self._unit.through(as_vectors(observations), course).after

    def judge(
        self, observations: Observations, actions: Actions, memory: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """The log-probabilities of actions and the values of observations, each ``[S]``; no gradient can follow.

        ``memory`` ``[S, memory_size]`` is what was remembered before each; none: nothing was.
        """
        return self._heads.judge(self._features(observations, memory), actions)

    def values(self, observations: Observations, memory: Floats | None = None) -> Floats:
        """The values ``[N]`` of observations ``[N, *shape]``, likewise."""
        return self._heads.values(self._features(observations, memory))

    def passes(self, size: int) -> RecurrentPasses:
        """Forward and backward on batches of this size."""
        return RecurrentPasses(self._heads, self._unit, size)

    def _features(self, observations: Observations, memory: Floats | None, *, is_kept: bool = False) -> Floats:
        seen = as_vectors(observations)
        after = self._unit.through(seen, _one_step(len(seen), self.memory_size, memory)).after
        if is_kept and memory is not None:
            memory[:] = after
        return np.concatenate([seen, after], axis=1)


class RecurrentPasses:
    """Forward and backward on batches of one size; see `shoal.training.models.policy.Passes`."""

    def __init__(self, heads: ActorCritic, unit: Gated, size: int) -> None:
        self._heads, self._unit = heads.passes(size), unit
        self.values: Floats = self._heads.values
        self._trace: Trace | None = None

    def judge(self, observations: Observations, actions: Actions, course: Course | None = None) -> Floats:
        """Log-probabilities ``[B]`` of actions; they and `values` are overwritten by the next call.

        Without a course, each sample is a sequence of its own before which nothing was remembered.
        """
        seen = as_vectors(observations)
        self._trace = self._unit.through(seen, course or _one_step(len(seen), self._unit.width, None))
        return self._heads.judge(np.concatenate([seen, self._trace.after], axis=1), actions)

    @property
    def entropy(self) -> float:
        """The policy's, the mean over what `judge` was given last."""
        return self._heads.entropy

    def backward(self, d_log_probs: Floats, d_values: Floats, d_entropy: float) -> None:
        """Write the gradient of a loss of what `judge` was given last, all of it."""
        if self._trace is None:
            raise ValueError("judge comes before backward, once for each")
        trace, self._trace = self._trace, None
        self._heads.backward(d_log_probs, d_values, d_entropy)
        self._unit.backward(trace, self._heads.d_observations()[:, trace.inputs.shape[1] :])


def _one_step(size: int, width: int, memory: Floats | None) -> Course:
    """Of samples that don't follow each other."""
    return Course((size,), np.zeros((size, width), np.float32) if memory is None else memory)
