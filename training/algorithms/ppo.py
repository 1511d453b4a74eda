"""Proximal policy optimisation with a clipped objective (Schulman et al., arXiv 1707.06347), by one peer or by many.

An update is ``update_epochs`` passes of ``num_minibatches`` Adam steps on the clipped loss (`ppo_loss`), with A the
normalised advantage (GAE) and R = A + V the return. All else is the engine's (`engine`).

Deviations from the paper and its usual implementations: advantages are normalised over the batch, not per minibatch;
the value loss isn't clipped; an episode that hits a time limit is worth the value of its final observation. Samples
that are one policy version old keep the log-probabilities of the policy that acted, so r is the ratio that the paper
means; there is no other correction (V-trace, a decoupled objective) at this age. Their advantages are GAE with the
values of the new critic.
"""

from __future__ import annotations

from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.on_policy import OnPolicy, actor_critic
from shoal.training.algorithms.ppo_config import IN_GRADIENT, PPOConfig
from shoal.training.algorithms.ppo_loss import ClippedLoss
from shoal.training.manifest import Manifest
from shoal.training.tasks import Task


class PPO(OnEngine[PPOConfig]):
    """The algorithm called ``ppo``."""

    name = "ppo"
    version = 3
    summary = "proximal policy optimisation with a clipped objective"
    paper = "https://arxiv.org/abs/1707.06347"
    settings = PPOConfig
    in_gradient = IN_GRADIENT

    def objective(self, settings: PPOConfig, manifest: Manifest, task: Task) -> Clipped:
        """A learner's own."""
        return Clipped(settings, actor_critic(settings, manifest, task))


class Clipped(OnPolicy[PPOConfig]):
    """The objective."""

    def make_loss(self, size: int) -> ClippedLoss:
        """The loss on minibatches of ``size`` samples."""
        return ClippedLoss(self.model, self.settings, size)
