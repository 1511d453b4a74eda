"""Named parameters that are views of one flat float32 vector, which NumPy and torch share.

Exchanging, clipping, stepping and comparing parameters is one operation on one array then, and so is what `backward`
leaves: torch computes with views of one leaf tensor, whose gradient is flat as well.

Initial values are the same bits on every machine (`normals`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shoal.training.models.normals import normals, orthogonal
from shoal.training.tasks.base import Floats


@dataclass(frozen=True, slots=True)
class Spec:
    """How a parameter begins.

    Attributes:
        shape: of it.
        deviation: of its initial values, which have the mean 0; 0: all are ``fill``.
        fill: what all are then.
        gain: of a matrix ``[shape[0], the others together]`` that begins orthogonal; 0: it does not.
    """

    shape: tuple[int, ...]
    deviation: float = 0.0
    fill: float = 0.0
    gain: float = 0.0


class FlatParameters:
    """Parameters by name.

    Attributes:
        flat: float32 ``[num_parameters]``: writing to it changes all.
        parameters: by name, views of it.
        tensor: the same memory as torch's leaf, with a gradient.
        tensors: by name, views of that, through which gradients flow.
    """

    def __init__(self, specs: Mapping[str, Spec], seed: int) -> None:
        raw = np.random.PCG64(seed)
        values = [_initial(spec, raw) for spec in specs.values()]
        self.flat: Floats = np.concatenate([value.ravel() for value in values])
        self._shapes = {name: value.shape for name, value in zip(specs, values, strict=True)}
        self.parameters: dict[str, Floats] = self.views_of(self.flat)
        self.tensor = torch.from_numpy(self.flat).requires_grad_()

    def views_of(self, flat: Floats) -> dict[str, Floats]:
        """By name, the parts of another vector ``[num_parameters]``."""
        ends = itertools.accumulate(math.prod(shape) for shape in self._shapes.values())
        return {
            name: flat[end - math.prod(shape) : end].reshape(shape)
            for (name, shape), end in zip(self._shapes.items(), ends, strict=True)
        }

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, views of `tensor` for one pass."""
        return self.tensors_on(None)

    def tensors_on(self, device: torch.device | None) -> dict[str, torch.Tensor]:
        """By name, as `tensors`, of a copy on another device; gradients come back from there."""
        whole = self.tensor if device is None else self.tensor.to(device)
        # One cut into all: the gradient of a slice is as long as the whole, and there may be hundreds.
        parts = whole.split_with_sizes([each.size for each in self.parameters.values()])
        return {name: part.view(each.shape) for (name, each), part in zip(self.parameters.items(), parts, strict=True)}

    def gradient_of(self, loss: torch.Tensor) -> Floats:
        """Of a scalar, ``[num_parameters]``; overwritten by the next."""
        self.tensor.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        grad = self.tensor.grad
        return np.zeros_like(self.flat) if grad is None else grad.numpy()


class OnFlat:
    """A model whose parameters are `FlatParameters`, which its constructor makes."""

    _parameters: FlatParameters

    @property
    def flat(self) -> Floats:
        """``[num_parameters]``: writing to it changes the model."""
        return self._parameters.flat

    @property
    def parameters(self) -> dict[str, Floats]:
        """By name, views of `flat`."""
        return self._parameters.parameters

    def gradient_of(self, loss: torch.Tensor) -> Floats:
        """Of a scalar that came of this model, ``[num_parameters]``; overwritten by the next."""
        return self._parameters.gradient_of(loss)


def _initial(spec: Spec, raw: np.random.PCG64) -> npt.NDArray[np.float32]:
    if spec.gain:
        matrix = orthogonal(spec.shape[0], math.prod(spec.shape[1:]), raw) * spec.gain
        return matrix.astype(np.float32).reshape(spec.shape)
    if not spec.deviation:
        return np.full(spec.shape, spec.fill, np.float32)
    size = int(np.prod(spec.shape, dtype=np.int64))
    return (normals(raw, size) * spec.deviation).astype(np.float32).reshape(spec.shape)
