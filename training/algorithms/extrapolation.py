"""How far to go with the average of what several learners did from the same start: as far as one of them went.

The way of a learner is part signal, which all share, and part noise of its own samples. Of N learners the average keeps
the signal and a 1/√N of the noise, so it is shorter than the way of any of them: the noisier the samples, the shorter,
and then joining makes a step better and no larger, which is not faster. Optimiser and clip range were chosen for steps
of one learner's length. So the average is stretched from the start to that length, by

    √( mean of |way of a learner|² / |average of the ways|² )

which is 1 for one learner and for learners that agree, and √N where there is nothing but noise. Nothing is to be set.

Source: FedExP (Jhunjhunwala, Wang and Joshi, "Speeding up federated averaging via extrapolation", ICLR 2023,
arXiv 2301.09604), whose factor is half the quotient, and at least 1. Deviations: the root of the quotient, which keeps
the length; and a bound. `benchmarks/joining.py` shows what it brings.

Each step is an elementwise operation, a strictly ordered sum, a quotient or a root of float64 or float32, which IEEE
754 rounds the same everywhere; so all who take the same average hold the same bits.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from shoal.training.tasks.base import Floats

MAX_FACTOR: Final = 4.0
"""That of 16 learners who share nothing but noise. What is left of an average where some work against the others is
not carried further than this."""


def travel(start: Floats, end: Floats) -> float:
    """The squared distance between two vectors of parameters ``[n]``, the same bits on every machine."""
    way = end.astype(np.float64) - start
    return float(np.add.accumulate(way * way)[-1])


def extrapolate(start: Floats, average: Floats, mean_travel: float) -> Floats:
    """Where to go instead of ``average``, in its direction; ``average`` itself where it is no shorter than each way.

    Args:
        start: the parameters ``[n]`` that all learners started from.
        average: of theirs, ``[n]``.
        mean_travel: the mean of their squared distances from the start, with the same weights.
    """
    own = travel(start, average)
    if not mean_travel > own:
        return average
    factor = min(math.sqrt(mean_travel / own), MAX_FACTOR) if own > 0 else 1.0
    stretched: Floats = start + np.float32(factor) * (average - start)
    return stretched
