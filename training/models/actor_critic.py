"""A small actor and a critic of the same shape, in one flat vector of parameters.

Two separate tanh networks with orthogonal initialisation (gain √2 in hidden layers, 0.01 before the actions, 1 before
the value), as "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022) found to matter. Discrete
actions have a categorical head; continuous ones a diagonal Gaussian with a state-independent log standard deviation.

- All parameters are views of one float32 vector that torch and NumPy share, so that exchanging, clipping, stepping
  and comparing them is one operation on one array, and autograd gives the gradient in the same form.
- Acting runs in NumPy: for eight observations torch's overhead made it four times slower (27 µs against 7 µs).
- Initial values must be the same bits on every machine, and LAPACK's QR, which the usual orthogonal initialisation
  calls, promises no such thing. So they come from PCG64's raw integers through exactly rounded operations only, in a
  fixed order: sums of twelve uniforms in place of normals, and the modified Gram-Schmidt process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from shoal.training.tasks.base import Actions, ActionSpace, Continuous, Discrete, Floats

_HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)


class ActorCritic:
    """The policy and value networks.

    Attributes:
        flat: float32 ``[num_parameters]``, shared with torch: writing to it changes the networks.
        parameters: by name, views of ``flat``.
        tensor: ``flat`` as the leaf that gradients are taken for.
    """

    def __init__(
        self,
        observation_size: int,
        action_space: ActionSpace,
        hidden_sizes: Sequence[int],
        *,
        initial_log_std: float,
        seed: int,
    ) -> None:
        self.action_space = action_space
        outputs = action_space.count if isinstance(action_space, Discrete) else action_space.size
        raw = np.random.PCG64(seed)
        values: dict[str, npt.NDArray[np.float64]] = {}
        for network, width, gain in (("actor", outputs, 0.01), ("critic", 1, 1.0)):
            sizes = [observation_size, *hidden_sizes, width]
            for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
                layer_gain = gain if layer == len(hidden_sizes) else math.sqrt(2)
                values[f"{network}/{layer}/weight"] = layer_gain * _orthogonal(fan_out, fan_in, raw)
                values[f"{network}/{layer}/bias"] = np.zeros(fan_out)
        if isinstance(action_space, Continuous):
            values["actor/log_std"] = np.full(action_space.size, initial_log_std)
        self._num_layers = len(hidden_sizes) + 1
        self._sizes = [value.size for value in values.values()]
        self._shapes = {name: value.shape for name, value in values.items()}
        self.flat: Floats = np.concatenate([value.ravel() for value in values.values()]).astype(np.float32)
        self.tensor = torch.from_numpy(self.flat).requires_grad_()
        ends = list(itertools.accumulate(self._sizes))
        self.parameters: dict[str, Floats] = {
            name: self.flat[end - value.size : end].reshape(value.shape)
            for (name, value), end in zip(values.items(), ends, strict=True)
        }
        self._acting = [
            (self.parameters[f"actor/{layer}/weight"].T, self.parameters[f"actor/{layer}/bias"])
            for layer in range(self._num_layers)
        ]

    def act(self, observations: Floats, rng: np.random.Generator) -> Actions:
        """Sample actions.

        Args:
            observations: ``[N, observation_size]``.
            rng: whose state advances by the same amount whatever the observations.

        Returns:
            ``[N]`` int64 for `Discrete`, ``[N, size]`` float32 for `Continuous`.
        """
        outputs = self._actor(observations)
        if isinstance(self.action_space, Discrete):
            # The Gumbel-max trick: the argmax is distributed as the softmax.
            noise = np.log(rng.standard_exponential(outputs.shape, np.float32))
            chosen: npt.NDArray[np.int64] = np.argmax(outputs - noise, axis=1)
            return chosen
        noise = rng.standard_normal(outputs.shape, np.float32)
        std: Floats = np.exp(self.parameters["actor/log_std"])
        return outputs + std * noise

    def act_greedily(self, observations: Floats) -> Actions:
        """The likeliest actions, as `act` would shape them."""
        outputs = self._actor(observations)
        return np.argmax(outputs, axis=1) if isinstance(self.action_space, Discrete) else outputs

    def evaluate(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge actions; differentiable in ``tensor``.

        Returns:
            The log-probability of the actions, the policy's entropy and the observations' value, each ``[N]``.
        """
        parts = self._parts()
        values = self._forward("critic", parts, observations).squeeze(1)
        outputs = self._forward("actor", parts, observations)
        if isinstance(self.action_space, Discrete):
            log_p = functional.log_softmax(outputs, dim=1)
            return log_p.gather(1, actions[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1), values
        log_std = parts["actor/log_std"]
        distance = (actions - outputs) * torch.exp(-log_std)
        log_prob = -(0.5 * distance.square() + log_std + _HALF_LOG_TAU).sum(1)
        return log_prob, (log_std + 0.5 + _HALF_LOG_TAU).sum().expand(len(outputs)), values

    def values(self, observations: torch.Tensor) -> torch.Tensor:
        """The value ``[N]`` of observations ``[N, observation_size]``, differentiable in ``tensor``."""
        return self._forward("critic", self._parts(), observations).squeeze(1)

    def _parts(self) -> dict[str, torch.Tensor]:
        parts = torch.split(self.tensor, self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _forward(self, network: str, parts: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        for layer in range(self._num_layers):
            if layer:
                hidden = torch.tanh(hidden)
            hidden = functional.linear(hidden, parts[f"{network}/{layer}/weight"], parts[f"{network}/{layer}/bias"])
        return hidden

    def _actor(self, hidden: Floats) -> Floats:
        weight, bias = self._acting[0]
        hidden = hidden @ weight + bias
        for weight, bias in self._acting[1:]:
            hidden = np.tanh(hidden) @ weight + bias
        return hidden


def _orthogonal(rows: int, columns: int, raw: np.random.PCG64) -> npt.NDArray[np.float64]:
    """A matrix ``[rows, columns]`` with orthonormal rows, or columns where there are fewer; the same on any machine."""
    short, long = sorted((rows, columns))
    integers = raw.random_raw(short * long * 12).reshape(12, short, long) >> np.uint64(11)
    uniforms = integers.astype(np.float64) * 2.0**-53
    matrix = np.zeros((short, long))
    for each in uniforms:  # Irwin-Hall: twelve uniforms less six have mean 0 and variance 1
        matrix += each
    matrix -= 6.0
    for index, row in enumerate(matrix):
        row /= math.sqrt(_sums(row * row))
        rest = matrix[index + 1 :]
        rest -= _sums(rest * row)[:, None] * row
    return matrix if rows <= columns else matrix.T


def _sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis, by halving it: elementwise additions in an order that no machine chooses."""
    while (width := values.shape[-1]) > 1:
        half = width // 2
        added = values[..., :half] + values[..., half : 2 * half]
        if width % 2:
            added[..., 0] += values[..., -1]
        values = added
    return values[..., 0]
