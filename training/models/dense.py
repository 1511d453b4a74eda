"""Networks of rectified units in NumPy, forward and backward written out: what values actions, or acts softly.

Several of one shape lie side by side in one array and go through in one call: the twin critics of SAC. What comes back
is the gradient of the parameters, of the inputs, or of both: an actor learns through what values its actions.

Initial values are the same bits on every machine (`normals`): deviation √(2 / inputs) before rectified units (He et
al., arXiv 1502.01852), 1 / √inputs before what comes out, times a gain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shoal.training.models.normals import normals
from shoal.training.tasks.base import Floats


class FlatArrays:
    """Parameters that are views of one float32 vector, and their gradient, which is another.

    Attributes:
        flat: ``[num_parameters]``: writing to it changes all.
        gradient: likewise.
        parameters: by name, views of ``flat``.
    """

    def __init__(self, values: Mapping[str, npt.NDArray[np.float64]]) -> None:
        self.flat: Floats = np.concatenate([value.ravel() for value in values.values()]).astype(np.float32)
        self.gradient: Floats = np.zeros_like(self.flat)
        self._shapes = {name: value.shape for name, value in values.items()}
        self.parameters = self.views(self.flat)

    def views(self, vector: Floats, prefix: str = "") -> dict[str, Floats]:
        """By name, views of a vector ``[n]`` that begins with the first parameter whose name begins with ``prefix``."""
        found: dict[str, Floats] = {}
        offset = 0
        for name, shape in self._shapes.items():
            if name.startswith(prefix):
                size = math.prod(shape)
                found[name] = vector[offset : offset + size].reshape(shape)
                offset += size
        return found

    def extent(self, prefix: str) -> slice:
        """Where in the vector those are whose names begin with ``prefix``, which lie next to each other."""
        sizes = [(name, math.prod(shape)) for name, shape in self._shapes.items()]
        first = next(place for place, (name, _) in enumerate(sizes) if name.startswith(prefix))
        start = sum(size for _, size in sizes[:first])
        return slice(start, start + sum(size for name, size in sizes if name.startswith(prefix)))


def initial(
    prefix: str, sizes: Sequence[int], raw: np.random.PCG64, *, copies: int = 1, gain: float = 1.0
) -> dict[str, npt.NDArray[np.float64]]:
    """The parameters of ``copies`` networks: weights ``[copies, in, out]``, biases ``[copies, 1, out]``.

    Args:
        prefix: of their names.
        sizes: of what goes in, of each hidden layer, and of what comes out.
        raw: whence they come.
        copies: how many networks.
        gain: of the last layer.
    """
    values: dict[str, npt.NDArray[np.float64]] = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        deviation = gain / math.sqrt(fan_in) if layer == len(sizes) - 2 else math.sqrt(2 / fan_in)
        weights = deviation * normals(raw, copies * fan_in * fan_out)
        values[f"{prefix}/{layer}/weight"] = weights.reshape(copies, fan_in, fan_out)
        values[f"{prefix}/{layer}/bias"] = np.zeros((copies, 1, fan_out))
    return values


class Dense:
    """K networks of one shape."""

    def __init__(self, parameters: Mapping[str, Floats], gradient: Mapping[str, Floats], prefix: str) -> None:
        """Look at parameters, by name as `initial` gives them, and at where their gradient belongs."""
        count = sum(name.startswith(f"{prefix}/") and name.endswith("/bias") for name in parameters)
        names = [(f"{prefix}/{layer}/weight", f"{prefix}/{layer}/bias") for layer in range(count)]
        self._layers = [(parameters[weight], parameters[bias]) for weight, bias in names]
        self._gradients = [(gradient[weight], gradient[bias]) for weight, bias in names] if gradient else []
        self._inputs: list[Floats] = []

    def forward(self, inputs: Floats) -> Floats:
        """``[K, S, out]`` of ``[S, in]``."""
        self._inputs = []
        below = inputs
        for number, (weight, bias) in enumerate(self._layers):
            if number:
                np.maximum(below, 0, out=below)
            self._inputs.append(below)
            below = np.matmul(below, weight)
            below += bias
        return below

    def of_one(self, inputs: Floats) -> Floats:
        """``[S, out]`` of ``[S, in]`` by the first network, and nothing to go backward from."""
        below = inputs
        for number, (weight, bias) in enumerate(self._layers):
            if number:
                np.maximum(below, 0, out=below)
            below = below @ weight[0]
            below += bias[0]
        return below

    def backward(self, d_outputs: Floats) -> None:
        """The gradient of the parameters, by that of what `forward` gave last, ``[K, S, out]``."""
        self._backward(d_outputs, is_for_parameters=True)

    def backward_to_inputs(self, d_outputs: Floats) -> Floats:
        """``[K, S, in]``: the gradient of the inputs alone, likewise."""
        return self._backward(d_outputs, is_for_parameters=False)

    def _backward(self, d_below: Floats, *, is_for_parameters: bool) -> Floats:
        for number in reversed(range(len(self._layers))):
            inputs = self._inputs[number]
            if is_for_parameters:
                d_weight, d_bias = self._gradients[number]
                np.matmul(np.swapaxes(inputs, -1, -2), d_below, out=d_weight)
                np.sum(d_below, axis=1, keepdims=True, out=d_bias)
                if not number:
                    break
            d_below = np.matmul(d_below, self._layers[number][0].transpose(0, 2, 1))
            if number:
                d_below *= inputs > 0
        return d_below
