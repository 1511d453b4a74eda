"""PPO's loss and its gradient, written out.

With S samples, r the probability ratio of an action, A its advantage and R the return,

    L = -mean(min(r A, clip(r, 1 ± clip_range) A)) + value_coefficient ½ mean((V - R)²) - entropy_coefficient mean(H)

By the log-probability of an action this is -r A / S where r A is the smaller of the two, and 0 where the clipped one
is: there nothing depends on r. At the edges themselves, where both are the same, the derivative is that from within, as
autograd has it. By a value it is value_coefficient (V - R) / S.

Where values are clipped, the value loss is ½ mean(max((V - R)², (V' - R)²)), V' being V kept within value_clip_range
of what it was: nothing depends on a value where V' is the further from the return.
"""

from __future__ import annotations

import numpy as np

from shoal.training.algorithms.on_policy import Batch
from shoal.training.algorithms.ppo_config import PPOConfig
from shoal.training.models.policy import Policy
from shoal.training.tasks.base import Floats


class ClippedLoss:
    """The loss on minibatches of one size."""

    def __init__(self, model: Policy, config: PPOConfig, size: int) -> None:
        self._passes, self._gradient = model.passes(size), model.gradient
        self._config, self._size = config, size
        rows = np.empty((8, size), np.float32)
        self._log_ratios, self._ratios, self._clipped, self._own, self._held = rows[:5]
        self._errors, self._d_log_probs, self._d_values = rows[5:]
        self._is_held = np.empty(size, np.bool_)

    def gradient(self, batch: Batch) -> Floats:
        """``[num_parameters]``; overwritten by the next one of the same model, of whatever size."""
        config = self._config
        with np.errstate(all="ignore"):  # what is not finite is found when the update is done
            self._hold(self._passes.judge(batch.observations, batch.actions, batch.course), batch)
            np.subtract(self._passes.values, batch.returns, out=self._errors)
            np.multiply(self._errors, config.value_coefficient / self._size, out=self._d_values)
            if config.value_clip_range is not None:
                self._hold_values(batch, np.float32(config.value_clip_range))
            self._passes.backward(self._d_log_probs, self._d_values, -config.entropy_coefficient / self._size)
        return self._gradient

    def _hold(self, log_probs: Floats, batch: Batch) -> None:
        """Find the derivatives by ``log_probs`` ``[S]``, and stop those of actions that left their old too far."""
        ratios, clipped, clip_range = self._ratios, self._clipped, self._config.clip_range
        np.subtract(log_probs, batch.log_probs, out=self._log_ratios)
        np.exp(self._log_ratios, out=ratios)
        np.maximum(ratios, 1 - clip_range, out=clipped)
        np.minimum(clipped, 1 + clip_range, out=clipped)
        np.multiply(ratios, batch.advantages, out=self._own)
        np.multiply(clipped, batch.advantages, out=self._held)
        np.greater(self._own, self._held, out=self._is_held)
        np.multiply(self._own, -1 / self._size, out=self._d_log_probs)
        np.copyto(self._d_log_probs, 0, where=self._is_held)

    def _hold_values(self, batch: Batch, most: np.float32) -> None:
        """Stop the gradient of values that left their old, where that would be further from the return."""
        near = np.clip(self._passes.values, batch.values - most, batch.values + most) - batch.returns
        is_held = np.square(near) > np.square(self._errors)
        np.copyto(self._errors, near, where=is_held)
        np.copyto(self._d_values, 0, where=is_held)

    def measures(self) -> dict[str, float]:
        """What is worth knowing of the minibatch that `gradient` was given last, before anything is stepped by it."""
        with np.errstate(all="ignore"):
            return {
                "policy_loss": -float(np.minimum(self._own, self._held).mean()),
                "value_loss": 0.5 * float(np.square(self._errors).mean()),
                "entropy": self._passes.entropy,
                "approx_kl": float((self._ratios - 1 - self._log_ratios).mean()),
                "clip_fraction": float((self._ratios != self._clipped).mean()),
            }
