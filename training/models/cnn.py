"""Networks that look at images: what lies below a policy, a value or a table of action values.

- `Nature`: three layers of 32, 64 and 64 filters and one of 512 units (Mnih et al., "Human-level control through deep
  reinforcement learning", Nature 518, 2015). For sides of 36 pixels and more.
- `Impala`: the large network of IMPALA (Espeholt et al., arXiv 1802.01561, figure 3): three stages of 16, 32 and 32
  filters with two residual blocks each, and one layer of 256 units. Deviations: no LSTM, and no embedding of what was
  said. For images of any size.

Each says its parameters (`specs`, orthogonal at first, with a gain of √2) and computes features from them (`see`).
Whoever makes a model of one adds its own parameters behind them in one `shoal.training.models.flat.FlatParameters`:

    image = nature_or_impala(Box((4, 84, 84), "uint8"))
    own = FlatParameters({**image.specs, "q/weight": Spec((6, image.features), gain=1.0), …}, seed)
    features = image.see(own.tensors, as_planes(observations, image.layout))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Final, Protocol

import torch
from torch.nn import functional

from shoal.protocol.errors import UsageError
from shoal.training.models.flat import Spec
from shoal.training.tasks.base import Box, Observations

GAIN: Final = math.sqrt(2)
MIN_NATURE: Final = 36
"""Pixels of a side, of which three layers leave one."""
_NATURE: Final = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # filters, kernel, stride
_NATURE_UNITS: Final = 512
_IMPALA: Final = (16, 32, 32)
_IMPALA_UNITS: Final = 256
NATURE_STRIDES: Final = tuple(stride for _, _, stride in _NATURE)
IMPALA_STAGES: Final = len(_IMPALA)
_BYTE: Final = 1 / 255


class Layout(Enum):
    """Where an image has its channels."""

    NONE = "rows, columns"
    FIRST = "channels, rows, columns"
    LAST = "rows, columns, channels"


def layout_of(shape: tuple[int, ...]) -> Layout:
    """Channels are the shorter of the outer axes; the last one, if they are as long.

    Raises:
        UsageError: if this is no image.
    """
    match shape:
        case (_, _):
            return Layout.NONE
        case (first, _, last):
            return Layout.FIRST if first < last else Layout.LAST
        case _:
            raise UsageError(f"observations of shape {shape} are no images; leave network at auto, or take network=mlp")


def as_planes(observations: Observations, layout: Layout) -> torch.Tensor:
    """``[N, *shape]`` as float32 ``[N, channels, rows, columns]``; bytes from 0 to 1.

    In memory the channels come last. So do then those of all layers above: going back through the strided ones takes
    0.6 of the time that it takes where the channels come first.
    """
    images = torch.from_numpy(observations)
    match layout:
        case Layout.NONE:
            images = images[:, None]
        case Layout.LAST:
            images = images.permute(0, 3, 1, 2)
        case Layout.FIRST:
            pass
    planes = torch.empty(images.shape, dtype=torch.float32, memory_format=torch.channels_last).copy_(images)
    return planes.mul_(_BYTE) if images.dtype == torch.uint8 else planes


class Image(Protocol):
    """A network below others.

    Attributes:
        specs: of its parameters.
        features: how many it gives.
        layout: of the images.
    """

    specs: dict[str, Spec]
    features: int
    layout: Layout

    def see(self, own: Mapping[str, torch.Tensor], planes: torch.Tensor) -> torch.Tensor:
        """``[N, features]``, of what `as_planes` makes of N images, by parameters of which some are ``specs``."""
        ...


class Nature:
    """The network of the Nature paper; see the head."""

    def __init__(self, box: Box) -> None:
        """Look at the space.

        Raises:
            UsageError: if it is none of images, or of too small ones.
        """
        self.layout = layout_of(box.shape)
        channels, *sides = _planes(box.shape, self.layout)
        if min(sides) < MIN_NATURE:
            raise UsageError(
                f"images of {sides[0]} by {sides[1]} are too small for network=nature, which needs {MIN_NATURE} pixels "
                "a side; take network=impala"
            )
        self.specs: dict[str, Spec] = {}
        for number, (filters, kernel, stride) in enumerate(_NATURE):
            self.specs |= _layer(f"see/{number}", (filters, channels, kernel, kernel))
            channels, sides = filters, [(side - kernel) // stride + 1 for side in sides]
        self.specs |= _layer("see/units", (_NATURE_UNITS, channels * math.prod(sides)))
        self.features = _NATURE_UNITS

    def see(self, own: Mapping[str, torch.Tensor], planes: torch.Tensor) -> torch.Tensor:
        """Features; see `Image`."""
        for number, (_, _, stride) in enumerate(_NATURE):
            name = f"see/{number}"
            planes = torch.relu(functional.conv2d(planes, own[f"{name}/weight"], own[f"{name}/bias"], stride))
        return _units(own, planes)


class Impala:
    """The network of IMPALA; see the head."""

    def __init__(self, box: Box) -> None:
        """Look at the space.

        Raises:
            UsageError: if it is none of images.
        """
        self.layout = layout_of(box.shape)
        channels, *sides = _planes(box.shape, self.layout)
        self.specs: dict[str, Spec] = {}
        for stage, filters in enumerate(_IMPALA):
            self.specs |= _layer(f"see/{stage}/in", (filters, channels, 3, 3))
            for block in ("0/0", "0/1", "1/0", "1/1"):
                self.specs |= _layer(f"see/{stage}/{block}", (filters, filters, 3, 3))
            channels, sides = filters, [(side + 1) // 2 for side in sides]
        self.specs |= _layer("see/units", (_IMPALA_UNITS, channels * math.prod(sides)))
        self.features = _IMPALA_UNITS

    def see(self, own: Mapping[str, torch.Tensor], planes: torch.Tensor) -> torch.Tensor:
        """Features; see `Image`."""

        def conv(name: str, planes: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(planes, own[f"{name}/weight"], own[f"{name}/bias"], padding=1)

        for stage in range(len(_IMPALA)):
            planes = functional.max_pool2d(conv(f"see/{stage}/in", planes), 3, 2, padding=1)
            for block in (0, 1):
                inner = conv(f"see/{stage}/{block}/0", torch.relu(planes))
                planes = planes + conv(f"see/{stage}/{block}/1", torch.relu(inner))
        return _units(own, torch.relu(planes))


def nature_or_impala(box: Box) -> Image:
    """The smaller one that can see images of this size."""
    layout = layout_of(box.shape)
    return Nature(box) if min(_planes(box.shape, layout)[1:]) >= MIN_NATURE else Impala(box)


def _planes(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Channels, rows, columns."""
    match layout:
        case Layout.NONE:
            return (1, *shape)
        case Layout.FIRST:
            return shape
        case Layout.LAST:
            return (shape[2], *shape[:2])


def _layer(name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    return {f"{name}/weight": Spec(shape, gain=GAIN), f"{name}/bias": Spec(shape[:1])}


def _units(own: Mapping[str, torch.Tensor], planes: torch.Tensor) -> torch.Tensor:
    """The layer on top, of all that the last filters give."""
    return torch.relu(functional.linear(planes.flatten(1), own["see/units/weight"], own["see/units/bias"]))
