"""V-trace: the actor-critic of IMPALA (Espeholt et al., arXiv 1802.01561), which corrects for policies of before.

With r the ratio of an action's probability under the present policy to that under the one that acted, w = min(max_rho,
r), c = gae_lambda min(max_c, r), and s' the state that reward R led to from s, a state's value is to be

    v(s) = V(s) + d + gamma c (v(s') - V(s')),    d = w (R + gamma V(s') - V(s))

and an action's advantage is R + gamma v(s') - V(s), weighted by w (`policy_gradient`). So samples that another policy
made, one that is a version old or the one before this update's steps, count for what they are worth to the present one.

Deviations from the paper: the values and ratios in v are those at the beginning of each pass over the samples, not of
each step; the weight of an action is that of the step. An episode that hits a time limit is worth the value of its
final observation. Adam, not RMSProp. Advantages are normalised by the moments of those of the first pass over the joint
batch, unless ``normalize_advantages`` says not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.training.algorithms.a2c import ON_IMAGES, A2CSettings, ActorCriticObjective
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.objective import Experience
from shoal.training.algorithms.on_policy import Batch, Judged, actor_critic
from shoal.training.algorithms.policy_gradient import PolicyGradientLoss
from shoal.training.algorithms.settings import setting
from shoal.training.exchange.averager import Moments
from shoal.training.manifest import Manifest
from shoal.training.models.policy import Policy
from shoal.training.rollouts.staleness import v_trace
from shoal.training.tasks import Task
from shoal.training.tasks.base import Floats

# In mode gradient every optimiser step is a round over the network.
IN_GRADIENT: Final[dict[str, Any]] = {"num_minibatches": 4, "learning_rate": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class VTraceSettings(A2CSettings):
    """How V-trace learns."""

    update_epochs: int = setting(4, "passes over the samples per update, each with new targets", 1, 1000)
    num_minibatches: int = setting(8, "optimiser steps per pass, however many the samples", 1, 65536)
    max_rho: float = setting(1.0, "how much a sample counts at most; it decides whose values are found", 1e-6, 1e6)
    max_c: float = setting(1.0, "how much of what came later a step passes on at most", 1e-6, 1e6)


class VTrace(OnEngine[VTraceSettings]):
    """The algorithm called ``vtrace``."""

    name = "vtrace"
    version = 1
    summary = "actor-critic that corrects for samples of earlier policies (IMPALA)"
    paper = "https://arxiv.org/abs/1802.01561"
    settings = VTraceSettings
    in_gradient = IN_GRADIENT
    on_images = ON_IMAGES

    def objective(self, settings: VTraceSettings, manifest: Manifest, task: Task) -> VTraceObjective:
        """A learner's own."""
        return VTraceObjective(settings, actor_critic(settings, manifest, task))


class VTraceObjective(ActorCriticObjective[VTraceSettings]):
    """The objective."""

    def __init__(self, settings: VTraceSettings, model: Policy) -> None:
        super().__init__(settings, model)
        self._experience: Sequence[Experience] = ()  # of the update under way
        self._moments: Moments | None = None

    def make_loss(self, size: int) -> PolicyGradientLoss:
        """The loss on minibatches of ``size`` samples."""
        return PolicyGradientLoss(self.model, self.settings, size, max_weight=self.settings.max_rho)

    def prepare(self, experience: Sequence[Experience]) -> Batch:
        """Judge and estimate."""
        self._experience, self._moments = experience, None
        return super().prepare(experience)

    def with_moments(self, batch: Batch, moments: Moments) -> Batch:
        """Normalised, if they are to be, in this pass and in those that follow."""
        self._moments = moments if self.settings.normalize_advantages else None
        return super().with_moments(batch, moments)

    def refresh(self, batch: Batch) -> None:
        """Targets by the policy and the values that the last pass led to."""
        start = 0
        for each in self._experience:
            end = start + each.rewards.size
            judged = Judged.by(self.model, each)
            estimates = self.estimate(each, judged, batch.log_probs[start:end])
            batch.advantages[start:end], batch.returns[start:end] = estimates
            if self._sequences is not None:
                self._sequences.memory[start:end] = judged.memory
            start = end
        if self._moments is not None:
            batch.advantages[:] = batch.normalized(self._moments).advantages

    def estimate(self, experience: Experience, judged: Judged, acted: Floats) -> tuple[Floats, Floats]:
        """Advantages, yet to be weighted, and what the values are to be, each ``[T * N]``."""
        settings, rollout, shape = self.settings, experience.rollout, experience.rewards.shape
        targets, advantages = v_trace(
            judged.log_probs.reshape(shape),
            acted.reshape(shape),
            experience.rewards,
            judged.values,
            judged.final_values,
            rollout.terminated,
            rollout.truncated,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            max_rho=settings.max_rho,
            max_c=settings.max_c,
        )
        return advantages.ravel(), targets.ravel()
