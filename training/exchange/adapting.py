"""Codec ``auto``: what the next exchange travels as, by how much of its members' time the last one took.

A run's members may have links of any kind, and nobody knows them when it is started. So it begins with all bits, and
each member says with its contribution how it fared with the last exchange: it took more than `TOO_LONG` of its time
since the one before, or less than `SHORT`. What more than half of them say moves all of them a step along `STEPS`.
Votes are summed as the rest is merged, so everybody counts the same ones, and has the same codec in the next round; the
step is part of the state that all share.

Nobody votes on an exchange of another codec than the one that is next. `SHORT` is further below `TOO_LONG` than a step
makes smaller, so what a step saved does not lead back. An exchange of less than `LEAST_BYTES` takes its time for other
reasons than its size, and stays as it is. Sparser codecs are no steps: they want another outer optimiser, and what is
large of theirs is not reduced part by part.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.training.exchange.rules import Codec

STEPS: Final = (Codec.FP32, Codec.INT8, Codec.INT4)
"""Each is two to four times smaller than the one before."""
TOO_LONG: Final = 1 / 4
SHORT: Final = 1 / 50
LEAST_BYTES: Final = 64 * 1024
"""Of float32."""

Votes = npt.NDArray[np.int64]


def vote(exchanged_s: float | None, worked_s: float, num_bytes: int) -> Votes:
    """What one member says.

    Args:
        exchanged_s: what its last exchange took; None if that travelled as something else, or there was none.
        worked_s: from the end of that until now.
        num_bytes: of what is exchanged, as float32.

    Returns:
        int64 ``[3]``, one of them 1: smaller, as it is, larger.
    """
    index = 1
    if exchanged_s is not None and num_bytes >= LEAST_BYTES:
        part = exchanged_s / max(exchanged_s + worked_s, 1e-9)
        index = 0 if part > TOO_LONG else 2 if part < SHORT else 1
    votes: Votes = np.zeros(3, np.int64)
    votes[index] = 1
    return votes


def is_vote(given: npt.NDArray[Any]) -> bool:
    """Whether this is one member's."""
    return sorted(given.tolist()) == [0, 0, 1]


def next_step(step: int, votes: npt.NDArray[Any]) -> int:
    """The index in `STEPS` after a round, from that before it and the sum of the votes."""
    smaller, same, larger = votes.tolist()
    half = (smaller + same + larger) / 2
    if smaller > half:
        return min(step + 1, len(STEPS) - 1)
    return max(step - 1, 0) if larger > half else step
