"""The policy gradient's loss and its gradient, written out: what A2C, REINFORCE and V-trace share.

With S samples, A the advantage of an action, R what the value V is to be and w the sample's weight,

    L = -mean(w A log p) + value_coefficient ½ mean((V - R)²) - entropy_coefficient mean(H)

w is 1, or the ratio of an action's present probability p to that under the policy that acted, cut at ``max_weight``; as
in V-trace it counts as a number: nothing is derived by it. By the log-probability of an action L is -w A / S, by a
value value_coefficient (V - R) / S.
"""

from __future__ import annotations

import numpy as np

from shoal.training.algorithms.on_policy import Batch, OnPolicySettings
from shoal.training.models.policy import Policy
from shoal.training.tasks.base import Floats


class PolicyGradientLoss:
    """The loss on minibatches of one size."""

    def __init__(
        self, model: Policy, settings: OnPolicySettings, size: int, *, max_weight: float | None = None
    ) -> None:
        """Make room.

        Args:
            model: whose loss it is.
            settings: of the run.
            size: S.
            max_weight: of a sample; None, where each counts as 1.
        """
        self._passes, self._gradient = model.passes(size), model.gradient
        self._settings, self._size, self._max_weight = settings, size, max_weight
        self._weighted, self._losses, self._log_ratios = np.empty((3, size), np.float32)
        self._errors, self._d_log_probs, self._d_values = np.empty((3, size), np.float32)

    def gradient(self, batch: Batch) -> Floats:
        """``[num_parameters]``; overwritten by the next one of the same model, of whatever size."""
        settings, size = self._settings, self._size
        with np.errstate(all="ignore"):  # what is not finite is found when the update is done
            log_probs = self._passes.judge(batch.observations, batch.actions, batch.course)
            np.subtract(log_probs, batch.log_probs, out=self._log_ratios)
            np.copyto(self._weighted, batch.advantages)
            if self._max_weight is not None:
                self._weighted *= np.minimum(np.exp(self._log_ratios), np.float32(self._max_weight))
            np.multiply(self._weighted, log_probs, out=self._losses)
            np.multiply(self._weighted, -1 / size, out=self._d_log_probs)
            np.subtract(self._passes.values, batch.returns, out=self._errors)
            np.multiply(self._errors, settings.value_coefficient / size, out=self._d_values)
            self._passes.backward(self._d_log_probs, self._d_values, -settings.entropy_coefficient / size)
        return self._gradient

    def measures(self) -> dict[str, float]:
        """What is worth knowing of the minibatch that `gradient` was given last, before anything is stepped by it."""
        with np.errstate(all="ignore"):
            return {
                "policy_loss": -float(self._losses.mean()),
                "value_loss": 0.5 * float(np.square(self._errors).mean()),
                "entropy": self._passes.entropy,
                "approx_kl": float((np.exp(self._log_ratios) - 1 - self._log_ratios).mean()),
            }
