"""An actor whose actions lie between -1 and 1, the two critics that value them, and a temperature, in one flat vector.

An action is tanh(u) with u of a normal whose mean and log standard deviation the actor gives for each observation, the
latter held between -20 and 2. Greedily it is tanh of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.training.models.dense import Dense, FlatArrays, initial
from shoal.training.tasks.base import Actions, Floats

_LOG_STD_RANGE: Final = (-20.0, 2.0)
_HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)
_CRITICS: Final = "critics"
_TEMPERATURE: Final = "temperature/log"


@dataclass(frozen=True, slots=True)
class Sampled:
    """Actions that the actor chose with given chance.

    Attributes:
        actions: ``[S, size]``.
        log_probs: ``[S]``.
        spreads: ``[S, size]``, how far chance led away from the mean of u.
        is_free: ``[S, size]``, whether the log standard deviation is within its range.
    """

    actions: Floats
    log_probs: Floats
    spreads: Floats
    is_free: npt.NDArray[np.bool_]


class SoftActorCritics:
    """See the head.

    Attributes:
        flat: float32 ``[num_parameters]``: writing to it changes all.
        gradient: likewise: what `Dense.backward` wrote last, and what is written to `d_log_temperature`.
        parameters: by name, views of ``flat``.
        actor: ``[1, S, 2 size]`` of observations: means, then log standard deviations.
        critics: ``[2, S, 1]`` of observations beside actions.
        followed: the part of ``flat`` that the critics are.
        is_exploring: whether it acts by chance alone.
    """

    def __init__(
        self, observation_size: int, size: int, hidden_sizes: Sequence[int], *, temperature: float, seed: int
    ) -> None:
        raw = np.random.PCG64(seed)
        self._arrays = FlatArrays(
            initial("actor", [observation_size, *hidden_sizes, 2 * size], raw, gain=0.1)
            | {_TEMPERATURE: np.array([math.log(temperature)])}
            | initial(_CRITICS, [observation_size + size, *hidden_sizes, 1], raw, copies=2)
        )
        self.flat, self.gradient, self.parameters = self._arrays.flat, self._arrays.gradient, self._arrays.parameters
        gradients = self._arrays.views(self.gradient)
        self.actor = Dense(self.parameters, gradients, "actor")
        self.critics = Dense(self.parameters, gradients, _CRITICS)
        self.d_log_temperature = gradients[_TEMPERATURE]
        self.followed = self.flat[self._arrays.extent(_CRITICS)]
        self.is_exploring = True
        self._size = size

    @property
    def temperature(self) -> float:
        """How much chance is worth."""
        return float(np.exp(self.parameters[_TEMPERATURE][0]))

    def critics_with(self, flat: Floats) -> Dense:
        """The critics with other parameters, in place of `followed`."""
        return Dense(self._arrays.views(flat, _CRITICS), {}, _CRITICS)

    def sample(self, outputs: Floats, noise: Floats) -> Sampled:
        """Choose actions.

        Args:
            outputs: of the actor, ``[S, 2 size]``.
            noise: normal, ``[S, size]``.
        """
        means, raw = outputs[:, : self._size], outputs[:, self._size :]
        log_std = raw.clip(*_LOG_STD_RANGE)
        spreads = np.exp(log_std) * noise
        u = means + spreads
        # log(1 - tanh²u) without loss where tanh u rounds to 1
        slopes = 2 * (math.log(2) - u - np.logaddexp(np.float32(0), -2 * u))
        log_probs = (-0.5 * np.square(noise) - log_std - np.float32(_HALF_LOG_TAU) - slopes).sum(axis=1)
        return Sampled(np.tanh(u), log_probs, spreads, raw == log_std)

    def act(self, observations: Floats, rng: np.random.Generator) -> Actions:
        """Sample: ``[N, size]``; ``rng`` advances by the same amount whatever the observations."""
        if self.is_exploring:
            return 2 * rng.random((len(observations), self._size), np.float32) - 1
        noise = rng.standard_normal((len(observations), self._size), np.float32)
        return self.sample(self.actor.of_one(observations), noise).actions

    def act_greedily(self, observations: Floats) -> Floats:
        """What is done without chance: ``[N, size]``."""
        return np.tanh(self.actor.of_one(observations)[:, : self._size])

    def judge(self, observations: Floats, actions: Actions) -> tuple[Floats, Floats, Floats]:
        """What the critics value actions ``[size, S]`` at, each ``[S]``, and the first of what the actor gives."""
        values = self.critics.forward(np.concatenate([observations, actions.T], axis=1))
        return values[0, :, 0], values[1, :, 0], self.actor.of_one(observations)[:, 0]
