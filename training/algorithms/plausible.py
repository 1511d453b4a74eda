"""What an honest learner can have made: the limits that states and contributions from elsewhere are held to.

A number may be finite and still end a run: one average of 10³⁰, and the next update is no number; a step count of 2⁶³,
and the next step overflows. So everything that is taken over is bounded by what honest learners can reach, whatever
their samples were. The bounds are those that one honest update cannot leave: who starts from a state that fits and
merges contributions that fit, ends with a state that fits. So nothing that is let in makes a later state unacceptable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.protocol.errors import ProtocolError
from shoal.training.algorithms.adam import check_adam, check_adam_step
from shoal.training.algorithms.extrapolation import travel
from shoal.training.exchange.averager import Arrays, Contribution, Moments
from shoal.training.tasks.base import Floats

MAX_PARAMETER: Final = 1e9
"""Values computed from such parameters, and their squares, are still finite in float32."""

MAX_COUNT: Final = 2**53
"""Integers up to here are exact in float64."""

MAX_SEEN: Final = 1e15
"""Of observations and returns, where they are normalised."""

TRAVEL_FACTOR: Final = 1.1
"""Parameters that were rounded on their way are no longer quite as far from the start as their author said."""
COARSE_TRAVEL_FACTOR: Final = 16.0
"""The same of those of which a few bits or values came, with what was left out before."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one learner and all that are like it keep to.

    Attributes:
        max_norm: of a gradient that Adam is given.
        max_change: of a parameter in one epoch.
        normalized: by name, whether moments are taken of it; of what is not, nobody counts any samples.
        travel_factor: by which what a contribution says of its way may differ from what came.
    """

    max_norm: float
    max_change: float
    normalized: Mapping[str, bool]
    travel_factor: float = TRAVEL_FACTOR

    def check_contribution(self, contribution: Contribution, start: Floats) -> None:
        """Refuse what no honest learner can contribute to an epoch that began from the parameters ``start``.

        Raises:
            ProtocolError: the message names the author.
        """
        try:
            self._check_arrays(contribution.arrays, contribution.weight, start)
        except ProtocolError as error:
            raise ProtocolError(f"the contribution of {contribution.author} cannot be honest: {error}") from error

    def _check_arrays(self, arrays: Arrays, weight: float, start: Floats) -> None:
        for name, is_normalized in (*self.normalized.items(), ("advantage", True)):
            if f"moments/{name}/count" in arrays:
                moments = Moments.from_arrays(arrays, name)
                if moments.count != (weight if is_normalized else 0):
                    raise ProtocolError(f"moments/{name} count {moments.count:g} samples of {weight:g}")
                _check_moments(name, moments)
        if "sum/samples" in arrays and int(arrays["sum/samples"]) != weight:
            raise ProtocolError(f"it counts {int(arrays['sum/samples'])} samples of {weight:g}")
        if "mean/delta" in arrays:
            change = float(np.abs(arrays["mean/delta"].astype(np.float64)).max(initial=0.0))
            if not change <= self.max_change:
                raise ProtocolError(f"a parameter moved by {change:.3g}, further than the optimiser's steps reach")
        if "mean/travel" in arrays and "mean/parameters" not in arrays:  # these came part by part
            said, most = float(arrays["mean/travel"]), self.max_change * math.sqrt(start.size)
            if not 0 <= said <= most:
                raise ProtocolError(f"its parameters travelled {said:.3g}, further than the optimiser's steps reach")
        if "mean/parameters" in arrays:
            change = float(np.abs(arrays["mean/parameters"].astype(np.float64) - start).max())
            if not change <= self.max_change:
                raise ProtocolError(f"a parameter moved by {change:.3g}, further than the optimiser's steps reach")
            check_adam(
                as_floats(arrays["mean/adam/first"]), as_floats(arrays["nonneg/adam/second"]), max_norm=self.max_norm
            )
            made, said = travel(start, as_floats(arrays["mean/parameters"])), float(arrays["mean/travel"])
            if not made / self.travel_factor <= said <= made * self.travel_factor:
                raise ProtocolError(f"its parameters travelled {made:.3g}, not {said:.3g}")

    def check_state(self, arrays: Arrays) -> None:
        """Refuse a state of the right form that no peer would export, or that an update could not go on from.

        Raises:
            ProtocolError: if it is one.
        """
        for name, array in arrays.items():
            if name.startswith("parameters/") and not (np.abs(array) <= MAX_PARAMETER).all():
                raise ProtocolError(f"{name!r} holds numbers beyond {MAX_PARAMETER:g}; take another state")
        if "adam/step" in arrays:  # in mode diloco Adam is each peer's own
            check_adam_step(int(arrays["adam/step"]))
            check_adam(as_floats(arrays["adam/first"]), as_floats(arrays["adam/second"]), max_norm=self.max_norm)
        for name, is_normalized in self.normalized.items():
            moments = Moments.from_arrays(arrays, name)
            if moments.count and not is_normalized:
                raise ProtocolError(f"this run takes no moments of {name}s; take another state")
            _check_moments(name, moments)


def _check_moments(name: str, moments: Moments) -> None:
    if not 0 <= moments.count <= MAX_COUNT:
        raise ProtocolError(f"moments/{name} cannot be of {moments.count:g} samples")
    seen = MAX_SEEN * (1 + 1e-9)  # merging rounds
    if not (np.abs(moments.mean) <= seen).all():
        raise ProtocolError(f"moments/{name} are of numbers beyond {MAX_SEEN:g}")
    if not ((moments.m2 >= 0) & (moments.m2 <= moments.count * seen**2)).all():
        raise ProtocolError(f"moments/{name} are negative, or of numbers beyond {MAX_SEEN:g}")


def as_floats(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Floats:
    """As float32; the array itself if it is that."""
    return array.astype(np.float32, copy=False)
