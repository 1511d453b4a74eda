"""Who of several contributors is absurd against the others: the same names on every peer.

`averager.validate` refuses what no honest peer sends whatever it trains; an algorithm refuses what its own optimiser
cannot have made (`Exchange.check`). What is left can still be far out of scale: a gradient of 10²⁹ among gradients of
1 would be all that is left of the average. So the contributions are compared with each other. The size of an array is
its largest magnitude, of moments it is the largest root mean square. A contribution with a size of more than ``factor``
times the lower median of the sizes is left out, all of it, not just this array.

- A size of 0 says nothing about scale, so the median is of those that are not.
- Between two there is no majority; there the larger is left out if it is more than `PAIR_FACTOR` times the smaller,
  as the harm that a number can do grows with it. One alone has nobody to be compared with.
- Where the algorithm knows what size is usual (``usual``), nothing up to it is left out: among several members who
  had the time for a step or two, the fast one is no outlier. What parameters may do in an epoch is bounded by the
  optimiser and not compared at all, for the same reason: after few steps they have moved a tenth as far.

Sizes are maxima, square roots and quotients in float64, which are exact or rounded the same everywhere, in any order.
This bounds the harm of numbers, not that of a lie that looks like a contribution: what it does to a run is for those
to bound who decide whose contributions are merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.protocol.ids import PeerId
from shoal.training.exchange.averager import Contribution, Moments

PAIR_FACTOR: Final = 1000.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How large honest contributions of one name are, against each other.

    Attributes:
        factor: how many times the lower median is too large.
        usual: a size up to this is never too large.
    """

    factor: float
    usual: float = 0.0


def outliers(contributions: Sequence[Contribution], scales: Mapping[str, Scale]) -> dict[PeerId, str]:
    """Whose contributions are to be left out, and why.

    Args:
        contributions: that `averager.validate` let through.
        scales: by the name of an array, or ``moments/<name>`` for the three of these moments.

    Returns:
        By author; the same whatever the order of the contributions.
    """
    found: dict[PeerId, str] = {}
    for name, scale in sorted(scales.items()):
        sizes = {each.author: _size(each, name) for each in contributions}
        known = sorted(size for size in sizes.values() if size > 0)
        if len(known) < 2:
            continue
        median = known[(len(known) - 1) // 2]
        factor = max(scale.factor, PAIR_FACTOR) if len(known) == 2 else scale.factor
        most = max(factor * median, scale.usual)
        for author in sorted(author for author, size in sizes.items() if size > most):
            found.setdefault(author, f"{name!r} is of size {sizes[author]:.3g} where the others' is {median:.3g}")
    return found


def _size(contribution: Contribution, name: str) -> float:
    if name.startswith("moments/"):
        return root_mean_square(Moments.from_arrays(contribution.arrays, name.removeprefix("moments/")))
    return float(np.abs(contribution.arrays[name].astype(np.float64)).max(initial=0.0))


def root_mean_square(moments: Moments) -> float:
    """Of the samples, in the direction where it is largest; 0 where none were seen."""
    if not moments.count:
        return 0.0
    return math.sqrt(float((moments.mean * moments.mean + moments.m2 / moments.count).max(initial=0.0)))
