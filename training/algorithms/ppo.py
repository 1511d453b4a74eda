"""Proximal policy optimisation with a clipped objective (Schulman et al., arXiv 1707.06347), by one peer or by many.

An update is ``update_epochs`` passes of ``num_minibatches`` Adam steps on the clipped loss (`ppo_loss`), with A the
normalised advantage (GAE) and R = A + V the return. All else is the engine's (`engine`).

Deviations from the paper and its usual implementations: advantages are normalised over the joint batch, not per
minibatch; the value loss isn't clipped; nothing is annealed and no update stopped early. Each of these is a setting
(`ppo_config`). An episode that hits a time limit is worth the value of its final observation. The early stop looks at
the minibatch that is about to be stepped by, as Stable-Baselines3 does. Samples of earlier policies keep the
log-probabilities of the policy that acted, so r is the ratio that the paper means; ``correction`` makes more of them
(`ppo_corrected`), in mode ``rollouts`` by default. Their advantages are GAE with the values of the new critic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.on_policy import Batch, OnPolicy, actor_critic
from shoal.training.algorithms.ppo_config import (
    IN_GRADIENT,
    IN_ROLLOUTS,
    MIN_CLIP_RANGE,
    ON_IMAGES,
    ON_TASKS,
    Correction,
    Over,
    PPOConfig,
)
from shoal.training.algorithms.ppo_corrected import CorrectedLoss
from shoal.training.algorithms.ppo_loss import ClippedLoss
from shoal.training.exchange.averager import Moments
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.policy import Policy
from shoal.training.tasks import Task
from shoal.training.tasks.base import Floats

_KL_FACTOR: Final = 1.5  # OpenAI Baselines', Spinning Up's and Stable-Baselines3's


class PPO(OnEngine[PPOConfig]):
    """The algorithm called ``ppo``."""

    name = "ppo"
    version = 5
    summary = "proximal policy optimisation with a clipped objective"
    paper = "https://arxiv.org/abs/1707.06347"
    settings = PPOConfig
    in_gradient = IN_GRADIENT
    in_rollouts = IN_ROLLOUTS
    on_images = ON_IMAGES
    on_tasks = ON_TASKS

    def objective(self, settings: PPOConfig, manifest: Manifest, task: Task) -> Clipped:
        """A learner's own."""
        if manifest.mode is Mode.GRADIENT and settings.target_kl is not None:
            raise UsageError(
                "target_kl ends an update by one's own samples, and in mode gradient all take the same steps; "
                "leave it out, or take the mode local or diloco"
            )
        if manifest.mode is Mode.GRADIENT and settings.normalize_advantages is Over.MINIBATCH:
            raise UsageError(
                "in mode gradient nobody has a whole minibatch to normalise advantages over; take "
                "normalize_advantages=batch, or the mode local or diloco"
            )
        return Clipped(settings, actor_critic(settings, manifest, task))


class Clipped(OnPolicy[PPOConfig]):
    """The objective."""

    def __init__(self, settings: PPOConfig, model: Policy) -> None:
        super().__init__(settings, model)
        self._config = settings  # with the clip ranges of the update under way

    def begin(self, progress: float) -> None:
        """Narrow the clip ranges, if they are to be."""
        if not self.settings.anneal_clip_range:
            return
        left, most = max(1 - progress, MIN_CLIP_RANGE), self.settings.value_clip_range
        self._config = replace(
            self.settings,
            clip_range=max(left * self.settings.clip_range, MIN_CLIP_RANGE),
            value_clip_range=None if most is None else max(left * most, MIN_CLIP_RANGE),
        )
        self._losses.clear()

    def make_loss(self, size: int) -> ClippedLoss:
        """The loss on minibatches of ``size`` samples."""
        if self.settings.correction is not Correction.NONE:
            return CorrectedLoss(self.model, self._config, size)
        return ClippedLoss(self.model, self._config, size)

    def with_moments(self, batch: Batch, moments: Moments) -> Batch:
        """Normalised, if over the whole batch."""
        return batch.normalized(moments) if self.settings.normalize_advantages is Over.BATCH else batch

    def gradient(self, batch: Batch) -> Floats:
        """See `Objective.gradient`."""
        if self.settings.normalize_advantages is Over.MINIBATCH and len(batch) > 1:
            batch = batch.normalized(Moments.of(batch.advantages))
        return super().gradient(batch)

    def is_enough(self) -> bool:
        """Whether the policy is too far from the one that acted."""
        most = self.settings.target_kl
        return most is not None and self.measures()["approx_kl"] > _KL_FACTOR * most
