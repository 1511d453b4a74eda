"""Initial values of networks that are the same bits on every machine: like normal numbers, and orthogonal matrices."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

_UNIFORMS: Final = 12
_CACHED: Final = 2**16  # numbers on which a step is taken at once


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


def orthogonal(rows: int, columns: int, raw: np.random.PCG64) -> npt.NDArray[np.float64]:
    """A matrix ``[rows, columns]`` with orthonormal rows, or columns where there are fewer; the same on any machine.

    By the modified Gram-Schmidt process: LAPACK's QR promises no bits.
    """
    short, long = sorted((rows, columns))
    matrix = normals(raw, short * long).reshape(short, long)
    rows_at_once = max(1, _CACHED // long)
    for index, row in enumerate(matrix):
        row /= math.sqrt(_sums(row * row))
        for start in range(index + 1, short, rows_at_once):
            rest = matrix[start : start + rows_at_once]
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
