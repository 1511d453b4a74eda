"""Advantage actor-critic: A3C (Mnih et al., arXiv 1602.01783) with learners that wait for each other.

One pass of ``num_minibatches`` steps on -A log π, the squared error of the value and an entropy bonus, with A the
advantage and R = A + V the return (`policy_gradient`).

Deviations from the paper: learners are synchronous, as in OpenAI Baselines' A2C. Advantages are GAE over all that was
collected, not returns of five steps; ``gae_lambda=1`` makes them as long as the rollout. They are normalised over the
joint batch, unless ``normalize_advantages`` says not. The optimiser is Adam, not RMSProp. One epoch's samples make
several steps, and the policy leaves the one that acted by as many: ``num_minibatches=1`` makes it exact. Samples that
are one policy version old are taken as if they were the present policy's; V-trace (`vtrace`) corrects for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.on_policy import Batch, OnPolicy, OnPolicySettings, actor_critic
from shoal.training.algorithms.policy_gradient import PolicyGradientLoss
from shoal.training.algorithms.settings import setting
from shoal.training.exchange.averager import Moments
from shoal.training.manifest import Manifest
from shoal.training.tasks import Task

# In mode gradient every optimiser step is a round over the network.
IN_GRADIENT: Final[dict[str, Any]] = {"num_minibatches": 8, "learning_rate": 1e-3}
# A pass over images costs far more than one over vectors, and these networks take smaller steps.
ON_IMAGES: Final[dict[str, Any]] = {"num_minibatches": 4, "learning_rate": 2.5e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class A2CSettings(OnPolicySettings):
    """How A2C learns."""

    learning_rate: float = setting(5e-4, "Adam's", 1e-9, 1.0)
    update_epochs: int = setting(1, "passes over the samples per update; a second one is further off-policy", 1, 1000)
    entropy_coefficient: float = setting(0.03, "weight of the entropy bonus; 0 for continuous actions", 0.0, 1e6)
    normalize_advantages: bool = setting(True, "give advantages mean 0 and deviation 1 over the batch of all")


S = TypeVar("S", bound=A2CSettings)


class A2C(OnEngine[A2CSettings]):
    """The algorithm called ``a2c``."""

    name = "a2c"
    version = 1
    summary = "advantage actor-critic, synchronous"
    paper = "https://arxiv.org/abs/1602.01783"
    settings = A2CSettings
    in_gradient = IN_GRADIENT
    on_images = ON_IMAGES

    def objective(self, settings: A2CSettings, manifest: Manifest, task: Task) -> ActorCriticObjective[A2CSettings]:
        """A learner's own."""
        return ActorCriticObjective(settings, actor_critic(settings, manifest, task))


class ActorCriticObjective(OnPolicy[S]):
    """The objective."""

    def make_loss(self, size: int) -> PolicyGradientLoss:
        """The loss on minibatches of ``size`` samples."""
        return PolicyGradientLoss(self.model, self.settings, size)

    def with_moments(self, batch: Batch, moments: Moments) -> Batch:
        """Normalised, if they are to be."""
        return batch.normalized(moments) if self.settings.normalize_advantages else batch
