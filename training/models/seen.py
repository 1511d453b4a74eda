"""What networks see of observations: vectors, whatever their shape, and bytes from 0 to 1."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from shoal.training.tasks.base import Floats, Observations

_FLOAT32: Final = np.dtype(np.float32)
_BYTE: Final = np.float32(1 / 255)


def as_vectors(observations: Observations) -> Floats:
    """``[N, *shape]`` as float32 ``[N, size]``; the array itself, if it is that."""
    if observations.dtype is _FLOAT32 and observations.ndim == 2:
        return observations  # type: ignore[return-value]  # the dtype says so
    flat = observations.reshape(len(observations), math.prod(observations.shape[1:]))  # -1 is refused where N is 0
    if flat.dtype == np.uint8:
        return flat * _BYTE
    return flat  # type: ignore[return-value]  # it is the other dtype of the two
