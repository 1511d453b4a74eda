"""Forward and backward through the actor and the critic, written out, on arrays that are made once per batch size.

Autograd's cost per operation is what a small network costs: a minibatch of 64 through two networks of 64 by 64 took it
970 µs, of which 120 are arithmetic. Written out it is some forty calls into NumPy, each with a place for its result.
`benchmarks/results/training.md` has the figures; a test holds it to what autograd gives.

- The hidden layers of the two networks are of one shape and lie in the vector of parameters at one distance from each
  other. So a view ``[2, out, in]`` holds both without a copy, and one call does both.
- What comes out is kept by column, ``[actions, batch]``: there are few actions, and sums over so short an axis would
  cost as much as the layers below.
- NumPy rather than torch without autograd: products take as long (both call a BLAS), tanh a sixth.

The gradient of two machines need not be of the same bits, and isn't: a BLAS adds in the order that suits a processor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.training.models.heads import head_of
from shoal.training.models.policy import Course
from shoal.training.models.seen import as_vectors
from shoal.training.tasks.base import Actions, Floats, Observations

if TYPE_CHECKING:
    from shoal.training.models.actor_critic import ActorCritic


class Layers:
    """The layers of both networks as views of one vector: of parameters, or of their gradient.

    Attributes:
        hidden: weight ``[2, out, in]`` and bias ``[2, 1, out]`` of each hidden layer; the actor's, then the critic's.
        actions: the actor's last weight ``[actions, in]`` and bias ``[actions]``.
        value: the critic's last weight ``[1, in]`` and bias ``[1]``.
        log_std: ``[actions]``, of a continuous policy.
    """

    def __init__(self, flat: Floats, shapes: dict[str, tuple[int, ...]]) -> None:
        offsets, offset = dict[str, int](), 0
        for name, shape in shapes.items():
            offsets[name] = offset
            offset += math.prod(shape)
        apart = offsets["critic/0/weight"]

        def view(name: str) -> Floats:
            return flat[offsets[name] : offsets[name] + math.prod(shapes[name])].reshape(shapes[name])

        def both(name: str, rows: int, columns: int) -> Floats:
            item = flat.itemsize
            strides = (apart * item, columns * item, item)
            return np.ndarray((2, rows, columns), flat.dtype, flat, offsets[name] * item, strides)

        last = sum(name.startswith("critic/") and name.endswith("/bias") for name in shapes) - 1
        self.hidden = [
            (
                both(f"actor/{layer}/weight", *shapes[f"actor/{layer}/weight"]),
                both(f"actor/{layer}/bias", 1, *shapes[f"actor/{layer}/bias"]),
            )
            for layer in range(last)
        ]
        self.actions = view(f"actor/{last}/weight"), view(f"actor/{last}/bias")
        self.value = view(f"critic/{last}/weight"), view(f"critic/{last}/bias")
        self.log_std = view("actor/log_std") if "actor/log_std" in shapes else None


class Passes:
    """Both networks on batches of B observations; `ActorCritic.passes` gives one.

    Attributes:
        values: ``[B]``, the critic's of what `judge` was given last. Overwritten by the next.
    """

    def __init__(self, model: ActorCritic, size: int) -> None:
        self._parameters, self._gradient = model.layers, model.gradient_layers
        self._size = size
        outputs = len(self._parameters.actions[1])
        self._head = head_of(model.action_space, size, self._parameters.log_std, self._gradient.log_std)
        widths = [weight.shape[1] for weight, _ in self._parameters.hidden]
        self._hidden, self._d_hidden, self._slopes = (
            [np.empty((2, size, width), np.float32) for width in widths] for _ in range(3)
        )
        self._outputs, self._d_outputs = (np.empty((outputs, size), np.float32) for _ in range(2))
        self._value_row: Floats = np.empty((1, size), np.float32)
        self.values: Floats = self._value_row[0]
        self._ones: Floats = np.ones((1, size), np.float32)
        self._observations: Floats = np.empty((size, 0), np.float32)
        self._d_values: Floats = self.values  # of the loss that came last

    def judge(self, observations: Observations, actions: Actions, course: Course | None = None) -> Floats:
        """Log-probabilities ``[B]`` of actions; they and `values` are overwritten by the next call.

        Args:
            observations: ``[B, *shape]``.
            actions: ``[B]``, or ``[size, B]`` of a policy that gives several numbers.
            course: nothing to networks without memory.
        """
        self._forward(as_vectors(observations))
        self._head.judge(self._outputs, actions)
        return self._head.log_probs

    @property
    def entropy(self) -> float:
        """The policy's, the mean over what `judge` was given last."""
        return self._head.entropy

    def backward(self, d_log_probs: Floats, d_values: Floats, d_entropy: float) -> None:
        """Write the gradient of a loss of what `judge` was given last into `ActorCritic.gradient`, all of it.

        Args:
            d_log_probs: ``[B]``, the loss's derivative by each log-probability.
            d_values: ``[B]``, likewise by each value.
            d_entropy: by the entropy at each observation, the same for all.
        """
        self._head.backward(d_log_probs, d_entropy, self._d_outputs)
        self._d_values, d_value_row = d_values, d_values[None]
        of_actor, of_critic = self._hidden[-1] if self._hidden else (self._observations, self._observations)
        (actions, _), (d_actions, d_actions_bias) = self._parameters.actions, self._gradient.actions
        (value, _), (d_value, d_value_bias) = self._parameters.value, self._gradient.value
        np.matmul(self._d_outputs, of_actor, out=d_actions)
        np.add.reduce(self._d_outputs, axis=1, out=d_actions_bias)
        np.matmul(d_value_row, of_critic, out=d_value)
        np.add.reduce(d_value_row, axis=1, out=d_value_bias)
        if not self._hidden:
            return
        np.matmul(self._d_outputs.T, actions, out=self._d_hidden[-1][0])
        np.multiply(d_values[:, None], value, out=self._d_hidden[-1][1])
        for layer in range(len(self._hidden) - 1, -1, -1):
            hidden, d_hidden, slope = self._hidden[layer], self._d_hidden[layer], self._slopes[layer]
            np.multiply(hidden, hidden, out=slope)
            np.subtract(1, slope, out=slope)
            np.multiply(d_hidden, slope, out=d_hidden)
            (weight, _), (d_weight, d_bias) = self._parameters.hidden[layer], self._gradient.hidden[layer]
            below = self._hidden[layer - 1] if layer else self._observations
            np.matmul(d_hidden.transpose(0, 2, 1), below, out=d_weight)
            np.matmul(self._ones, d_hidden, out=d_bias)
            if layer:
                np.matmul(d_hidden, weight, out=self._d_hidden[layer - 1])

    def d_observations(self) -> Floats:
        """By the observations ``[B, size]``: the derivative of the loss that `backward` was given last."""
        if not self._hidden:
            of_actions: Floats = self._d_outputs.T @ self._parameters.actions[0]
            return of_actions + self._d_values[:, None] * self._parameters.value[0]
        d_both = np.matmul(self._d_hidden[0], self._parameters.hidden[0][0])
        return d_both[0] + d_both[1]  # type: ignore[no-any-return]  # NumPy's

    def _forward(self, observations: Floats) -> None:
        self._observations = observations
        below: npt.NDArray[np.float32] = observations
        for hidden, (weight, bias) in zip(self._hidden, self._parameters.hidden, strict=True):
            np.matmul(below, weight.transpose(0, 2, 1), out=hidden)
            np.add(hidden, bias, out=hidden)
            np.tanh(hidden, out=hidden)
            below = hidden
        of_actor, of_critic = below if self._hidden else (observations, observations)
        weight, bias = self._parameters.actions
        np.matmul(weight, of_actor.T, out=self._outputs)
        np.add(self._outputs, bias[:, None], out=self._outputs)
        weight, bias = self._parameters.value
        np.matmul(weight, of_critic.T, out=self._value_row)
        np.add(self._value_row, bias, out=self._value_row)
