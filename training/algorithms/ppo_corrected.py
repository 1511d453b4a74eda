"""PPO's loss where samples of earlier policies are corrected for (`shoal.training.rollouts.staleness.decoupled`).

As `ppo_loss`, but for the policy's term, with u = π_θ/π_p and b the policy that acted:

    -mean(π_p/π_b min(u A, clip(u, 1 ± clip_range) A))

p, which a step may not leave, is the policy with which the update began (``decoupled``), or one between b and θ, the
nearer to θ the older the sample is (``a3po``). Where p = b this is PPO.

Deviations: π_p/π_b is cut at `MAX_WEIGHT`, where AReaL leaves such samples out. In ``a3po`` a sample of the newest
policy counts as one version old: θ leaves the policy that acted with the first of an update's many steps, and with
weight 0 (the paper's, of an update of few steps) nothing would hold it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from shoal.training.algorithms.on_policy import Batch
from shoal.training.algorithms.ppo_config import Correction
from shoal.training.algorithms.ppo_loss import ClippedLoss
from shoal.training.rollouts.staleness import decoupled, interpolated
from shoal.training.tasks.base import Floats

MAX_WEIGHT: Final = 5.0
"""Of π_p/π_b; AReaL's own."""


class CorrectedLoss(ClippedLoss):
    """The loss on minibatches of one size."""

    def _hold(self, log_probs: Floats, batch: Batch) -> None:
        """As the clipped loss does, by the corrected objective."""
        proximal, clip_range = batch.proximal, self._config.clip_range
        if self._config.correction is Correction.A3PO:
            proximal = interpolated(log_probs, batch.log_probs, np.maximum(batch.ages, 1))
        found = decoupled(
            log_probs, proximal, batch.log_probs, batch.advantages, clip_range=clip_range, max_weight=MAX_WEIGHT
        )
        np.multiply(found.slopes, -1 / self._size, out=self._d_log_probs)
        self._own[:] = self._held[:] = found.values
        np.subtract(log_probs, proximal, out=self._log_ratios)
        np.exp(self._log_ratios, out=self._ratios)
        np.clip(self._ratios, 1 - clip_range, 1 + clip_range, out=self._clipped)
