"""Numbers that are spread like normal ones and are the same bits on every machine."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_UNIFORMS: Final = 12


def normals(raw: np.random.PCG64, count: int) -> npt.NDArray[np.float64]:
    """``[count]`` of mean 0 and variance 1: sums of twelve uniforms, less six (Irwin and Hall).

    From PCG64's raw integers through exactly rounded operations only, in a fixed order.
    """
    integers = raw.random_raw(_UNIFORMS * count).reshape(_UNIFORMS, count) >> np.uint64(11)
    uniforms = integers.astype(np.float64) * 2.0**-53
    total = np.zeros(count)
    for each in uniforms:
        total += each
    total -= _UNIFORMS / 2
    return total
