"""A network that values each of a few actions, and acts by the best one, or now and then by any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.training.models.dense import Dense, FlatArrays, initial
from shoal.training.tasks.base import Actions, Floats


class QNetwork:
    """See the head.

    Attributes:
        flat: float32 ``[num_parameters]``: writing to it changes the network.
        gradient: likewise, what `Dense.backward` of ``values`` wrote last.
        parameters: by name, views of ``flat``.
        values: the network, ``[1, S, actions]`` of observations.
        epsilon: how often it acts by chance.
    """

    def __init__(self, observation_size: int, num_actions: int, hidden_sizes: Sequence[int], *, seed: int) -> None:
        sizes = [observation_size, *hidden_sizes, num_actions]
        self._arrays = FlatArrays(initial("q", sizes, np.random.PCG64(seed)))
        self.flat, self.gradient, self.parameters = self._arrays.flat, self._arrays.gradient, self._arrays.parameters
        self.values = Dense(self.parameters, self._arrays.views(self.gradient), "q")
        self.epsilon = 1.0
        self._num_actions = num_actions

    def with_parameters(self, flat: Floats) -> Dense:
        """The same network with other parameters, ``[num_parameters]``."""
        return Dense(self._arrays.views(flat), {}, "q")

    def act(self, observations: Floats, rng: np.random.Generator) -> Actions:
        """The best actions ``[N]``, or any, by chance; ``rng`` advances by as much whatever the observations."""
        is_any = rng.random(len(observations)) < self.epsilon
        anything = rng.integers(self._num_actions, size=len(observations))
        return np.where(is_any, anything, self.act_greedily(observations))

    def act_greedily(self, observations: Floats) -> npt.NDArray[np.int64]:
        """The best actions ``[N]``."""
        best: npt.NDArray[np.int64] = np.argmax(self.values.of_one(observations), axis=1)
        return best

    def judge(self, observations: Floats, actions: Actions) -> tuple[Floats]:
        """The values ``[S]`` of actions ``[S]``."""
        values = self.values.of_one(observations)
        return (values[np.arange(len(values)), actions],)
