"""REINFORCE with a learned baseline: the policy gradient by the rewards that came.

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", Machine Learning
8, 1992; with a state's value as the baseline: Sutton and Barto, "Reinforcement Learning", 2nd edition, section 13.4.

An action counts by all that was earned after it, discounted, less what its state is worth. No value stands in for
rewards that came, so the estimate has no bias and much variance. It is A2C's loss with gae_lambda = 1.

Deviations: episodes are cut where an update comes, or a time limit does, and are worth the baseline's value from there
on; waiting for their ends would let members with long episodes bring nothing. The book's discount by the time since an
episode's start is left out, as nearly everybody does. Minibatches, Adam and normalised advantages are A2C's (`a2c`).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.training.algorithms.a2c import IN_GRADIENT, ON_IMAGES, A2CSettings, ActorCriticObjective
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.on_policy import actor_critic
from shoal.training.algorithms.settings import setting
from shoal.training.manifest import Manifest
from shoal.training.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforceSettings(A2CSettings):
    """How REINFORCE learns."""

    gae_lambda: float = setting(1.0, "1: of no value instead of rewards; anything else is A2C", 1.0, 1.0)


class Reinforce(OnEngine[ReinforceSettings]):
    """The algorithm called ``reinforce``."""

    name = "reinforce"
    version = 1
    summary = "policy gradient by the rewards that came, with a learned baseline"
    paper = "https://doi.org/10.1007/BF00992696"
    settings = ReinforceSettings
    in_gradient = IN_GRADIENT
    on_images = ON_IMAGES

    def objective(
        self, settings: ReinforceSettings, manifest: Manifest, task: Task
    ) -> ActorCriticObjective[ReinforceSettings]:
        """A learner's own."""
        return ActorCriticObjective(settings, actor_critic(settings, manifest, task))
