"""Running moments of observations and of discounted returns, over the whole run and all peers.

They are merged exactly with an update's exchanges, by the increments of each peer, and stand still within it. Reward
scaling is that of "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.rollouts import Source
from shoal.training.algorithms.settings import Settings
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.exchange.outliers import Scale, root_mean_square
from shoal.training.tasks.base import Box, Floats, Observations

MOMENTS_FACTOR: Final = 1000.0
CLIP: Final = 10.0  # normalised observations and rewards beyond this are outliers


class Normalizers:
    """Both, as all peers hold them."""

    def __init__(self, space: Box, settings: Settings) -> None:
        """Begin with the moments of nothing.

        Raises:
            UsageError: if bytes are to be normalised.
        """
        if settings.normalize_observations and space.dtype == "uint8":
            raise UsageError("bytes are seen as 0 to 1 and not normalised; leave normalize_observations out")
        # An image has many numbers: where nobody normalises them, nobody keeps or sends moments of nothing.
        is_counted = settings.normalize_observations or not space.is_image
        self._shape = space.shape if is_counted else ()
        self.is_normalized = {
            "observation": settings.normalize_observations,
            "return": settings.normalize_returns,
        }
        self._set(Moments.none(self._shape), Moments.none())

    def observations(self, shown: Observations) -> Observations:
        """As the networks are to see what the environments show, ``[..., *shape]``."""
        if not self._observation.count:
            return shown
        return normal(shown, *self._scale)

    def rewards(self, earned: Floats) -> Floats:
        """On the scale that values have."""
        if not self.is_normalized["return"]:
            return earned
        scale = np.float32(1 / max(float(self._return.std), 1e-4))
        scaled: Floats = np.clip(earned * scale, -CLIP, CLIP)
        return scaled

    def increments(self, streams: Sequence[Source]) -> Arrays:
        """The moments of what was collected since the last update; of nothing, where there is nothing to normalise."""
        observations, returns = Moments.none(self._shape), Moments.none()
        for stream in streams:
            if not stream.samples:
                continue
            rollout = stream.rollout()
            if self.is_normalized["observation"]:
                shown = rollout.observations[:-1].reshape(-1, *self._shape)
                observations = observations.merge(Moments.of(shown.astype(np.float32, copy=False)))
            if self.is_normalized["return"]:
                returns = returns.merge(Moments.of(rollout.discounted_returns.ravel()))
        return observations.to_arrays("observation") | returns.to_arrays("return")

    def scales(self) -> dict[str, Scale]:
        """How the moments of honest peers compare: with each other, and with all that the run has seen."""
        return {
            f"moments/{name}": Scale(MOMENTS_FACTOR, MOMENTS_FACTOR * root_mean_square(moments))
            for name, moments in (("observation", self._observation), ("return", self._return))
        }

    def merge(self, merged: Arrays) -> None:
        """Count in what all have seen."""
        self._set(
            self._observation.merge(Moments.from_arrays(merged, "observation")),
            self._return.merge(Moments.from_arrays(merged, "return")),
        )

    def to_arrays(self) -> Arrays:
        """As part of the state that all share."""
        return self._observation.to_arrays("observation") | self._return.to_arrays("return")

    def load(self, arrays: Arrays) -> None:
        """The inverse of `to_arrays`."""
        self._set(Moments.from_arrays(arrays, "observation"), Moments.from_arrays(arrays, "return"))

    def _set(self, observation: Moments, returns: Moments) -> None:
        self._observation, self._return = observation, returns
        self._scale = mean_and_scale(observation)


def mean_and_scale(seen: Moments) -> tuple[Floats, Floats]:
    """What observations are normalised by, each ``[observation_size]``."""
    scale = 1 / np.sqrt(np.square(seen.std) + 1e-8)
    return seen.mean.astype(np.float32), scale.astype(np.float32)


def normal(shown: Observations, mean: Floats, scale: Floats) -> Floats:
    """As the networks are to see ``[..., observation_size]``: the same bits on every machine."""
    found: Floats = ((shown - mean) * scale).clip(-CLIP, CLIP)
    return found
