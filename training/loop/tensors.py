"""What a training loop trains, as arrays by name, and back into it in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.protocol.errors import UsageError

Floats: TypeAlias = npt.NDArray[np.float32]
Shapes: TypeAlias = dict[str, list[int]]
Given: TypeAlias = torch.nn.Module | torch.optim.Optimizer | Mapping[str, torch.Tensor] | Iterable[torch.Tensor]

MAX_NAMED: Final = 3
"""Differences that are told at once."""


class Tensors:
    """Parameters, and the buffers of a module that hold floats, such as the running statistics of batch normalisation.

    Attributes:
        parameters: float32, by name.
        buffers: of any floating type, by name; they travel as float32.
    """

    def __init__(self, given: Given) -> None:
        """Find the tensors of a module, of an optimiser, or those that are given, by name or in order.

        Raises:
            UsageError: if there are none, or they are not what can be averaged.
        """
        self.parameters, self.buffers = _found(given)
        if not self.parameters:
            raise UsageError(
                "there is nothing to average: no parameters were given; model.parameters() gives them once"
            )
        for name, tensor in self.parameters.items():
            if not isinstance(tensor, torch.Tensor):
                raise UsageError(
                    f"{name!r} is a {type(tensor).__name__}, not a tensor; give a module or its parameters"
                )
            if tensor.dtype != torch.float32:
                raise UsageError(
                    f"{name!r} is {str(tensor.dtype).removeprefix('torch.')}, and parameters are averaged as float32: "
                    "keep them so (`model.float()`), and compute in less under torch.autocast"
                )

    @property
    def shapes(self) -> Shapes:
        """Of all, by name."""
        return {name: list(each.shape) for name, each in (self.parameters | self.buffers).items()}

    def read(self) -> tuple[Floats, Floats]:
        """The parameters and the buffers as they are now, each as one vector."""
        return _flat(self.parameters), _flat(self.buffers)

    def write(self, parameters: Floats, buffers: Floats) -> None:
        """Put these in place of what there is: the same tensors, with other values, so no optimiser loses track."""
        with torch.no_grad():
            for tensors, vector in ((self.parameters, parameters), (self.buffers, buffers)):
                for name, part in split(vector, tensors).items():
                    tensors[name].copy_(torch.from_numpy(part))


def split(vector: Floats, tensors: Mapping[str, torch.Tensor]) -> dict[str, Floats]:
    """A vector as arrays in the shapes of some tensors, which are views of it."""
    parts: dict[str, Floats] = {}
    at = 0
    for name, tensor in tensors.items():
        parts[name] = vector[at : at + tensor.numel()].reshape(tuple(tensor.shape))
        at += tensor.numel()
    return parts


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """In words, how the shapes of one loop's tensors differ from those of another; empty if they do not."""
    found = []
    for name in [*here, *(each for each in there if each not in here)]:
        if name not in there:
            found.append(f"{name!r} {list(here[name])} is here and not there")
        elif name not in here:
            found.append(f"{name!r} {list(there[name])} is there and not here")
        elif list(here[name]) != list(there[name]):
            found.append(f"{name!r} is {list(here[name])} here and {list(there[name])} there")
    rest = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + rest


def _found(given: Given) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    match given:
        case torch.nn.Module():
            buffers = {name: each for name, each in given.named_buffers() if each.is_floating_point()}
            return dict(given.named_parameters()), buffers
        case torch.optim.Optimizer():
            groups = [group["params"] for group in given.param_groups]
            return {str(number): each for number, each in enumerate(each for group in groups for each in group)}, {}
        case torch.Tensor():
            return {"0": given}, {}
        case Mapping():
            return dict(given), {}
        case _:
            return {str(number): each for number, each in enumerate(given)}, {}


def _flat(tensors: Mapping[str, torch.Tensor]) -> Floats:
    vector: Floats = np.empty(sum(each.numel() for each in tensors.values()), np.float32)
    for name, part in split(vector, tensors).items():
        torch.from_numpy(part).copy_(tensors[name].detach())
    return vector
