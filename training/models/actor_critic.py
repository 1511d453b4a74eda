"""A small actor and a critic of the same shape, in one flat vector of parameters.

Two separate tanh networks with orthogonal initialisation (gain √2 in hidden layers, 0.01 before the actions, 1 before
the value), as "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022) found to matter. Discrete
actions have a categorical head; continuous ones a diagonal Gaussian with a state-independent log standard deviation.

- All parameters are views of one float32 vector, and their gradient is another, so that exchanging, clipping, stepping
  and comparing them is one operation on one array.
- All of it runs in NumPy: torch took four times as long to act for eight observations; for learning see `passes`.
- Initial values must be the same bits on every machine, and LAPACK's QR, which the usual orthogonal initialisation
  calls, promises no such thing. So they come from PCG64's raw integers through exactly rounded operations only, in a
  fixed order: sums of twelve uniforms in place of normals, and the modified Gram-Schmidt process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.training.models.heads import likeliest, num_outputs, sample
from shoal.training.models.normals import orthogonal
from shoal.training.models.passes import Layers, Passes
from shoal.training.models.policy import judge_in_parts
from shoal.training.models.seen import as_vectors
from shoal.training.tasks.base import Actions, ActionSpace, Continuous, Floats, Observations

_CHUNK: Final = 512  # what two networks of 64 by 64 make of so many observations stays in a processor's cache
_MAX_SIZES: Final = 8  # of batches, whose arrays are kept


class ActorCritic:
    """The policy and value networks.

    Attributes:
        flat: float32 ``[num_parameters]``: writing to it changes the networks.
        parameters: by name, views of ``flat``.
        layers: likewise, of both networks together.
        gradient: float32 ``[num_parameters]``, what `Passes.backward` wrote last.
        gradient_layers: of it, like ``layers``.
    """

    def __init__(
        self,
        observation_size: int,
        action_space: ActionSpace,
        hidden_sizes: Sequence[int],
        *,
        initial_log_std: float,
        seed: int,
        more: Mapping[str, npt.NDArray[np.float64]] | None = None,
    ) -> None:
        """Initialise them.

        Args:
            observation_size: how many numbers are seen.
            action_space: how it acts.
            hidden_sizes: of each network.
            initial_log_std: of a continuous policy.
            seed: of both networks.
            more: initial values of what lies below them, of whoever has that in the same vector.
        """
        self.action_space = action_space
        outputs = num_outputs(action_space)
        raw = np.random.PCG64(seed)
        values: dict[str, npt.NDArray[np.float64]] = {}
        for network, width, gain in (("actor", outputs, 0.01), ("critic", 1, 1.0)):
            sizes = [observation_size, *hidden_sizes, width]
            for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
                layer_gain = gain if layer == len(hidden_sizes) else math.sqrt(2)
                values[f"{network}/{layer}/weight"] = layer_gain * orthogonal(fan_out, fan_in, raw)
                values[f"{network}/{layer}/bias"] = np.zeros(fan_out)
        if isinstance(action_space, Continuous):
            values["actor/log_std"] = np.full(action_space.size, initial_log_std)
        values |= more or {}
        self.flat: Floats = np.concatenate([value.ravel() for value in values.values()]).astype(np.float32)
        self.gradient: Floats = np.zeros_like(self.flat)
        shapes = {name: value.shape for name, value in values.items()}
        self.layers, self.gradient_layers = Layers(self.flat, shapes), Layers(self.gradient, shapes)
        self._passes: dict[int, Passes] = {}
        self._shapes = shapes
        self.parameters: dict[str, Floats] = self.views_of(self.flat)
        self._actor, self._critic = (
            [
                (self.parameters[f"{network}/{layer}/weight"].T, self.parameters[f"{network}/{layer}/bias"])
                for layer in range(len(hidden_sizes) + 1)
            ]
            for network in ("actor", "critic")
        )

    def views_of(self, vector: Floats) -> dict[str, Floats]:
        """By name, the parts of a vector ``[num_parameters]``."""
        ends = itertools.accumulate(math.prod(shape) for shape in self._shapes.values())
        return {
            name: vector[end - math.prod(shape) : end].reshape(shape)
            for (name, shape), end in zip(self._shapes.items(), ends, strict=True)
        }

    def act(self, observations: Observations, rng: np.random.Generator) -> Actions:
        """Sample actions.

        Args:
            observations: ``[N, *shape]``.
            rng: whose state advances by the same amount whatever the observations.

        Returns:
            As `shoal.training.models.heads.sample` says.
        """
        outputs = _through(self._actor, as_vectors(observations))
        return sample(self.action_space, outputs, self.parameters.get("actor/log_std"), rng)

    def act_greedily(self, observations: Observations) -> Actions:
        """The likeliest actions, as `act` would shape them."""
        return likeliest(self.action_space, _through(self._actor, as_vectors(observations)))

    def passes(self, size: int) -> Passes:
        """Forward and backward on batches of ``size`` observations, with arrays that serve again."""
        if size not in self._passes:
            if len(self._passes) >= _MAX_SIZES:
                self._passes.clear()
            self._passes[size] = Passes(self, size)
        return self._passes[size]

    def judge(self, observations: Observations, actions: Actions) -> tuple[Floats, Floats]:
        """Judge actions.

        Args:
            observations: ``[S, *shape]``.
            actions: ``[S]``, or ``[size, S]`` of a policy that gives several numbers.

        Returns:
            The log-probabilities of the actions and the values of the observations, each ``[S]``.
        """
        return judge_in_parts(self, observations, actions, _CHUNK)

    def values(self, observations: Observations) -> Floats:
        """The value ``[N]`` of a few observations ``[N, *shape]``."""
        return _through(self._critic, as_vectors(observations))[:, 0]


def _through(layers: Sequence[tuple[Floats, Floats]], hidden: Floats) -> Floats:
    """What a network makes of observations: its weights ``[in, out]`` and biases."""
    weight, bias = layers[0]
    hidden = hidden @ weight
    hidden += bias
    for weight, bias in layers[1:]:
        np.tanh(hidden, out=hidden)
        hidden = hidden @ weight
        hidden += bias
    return hidden
