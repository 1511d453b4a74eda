"""REINFORCE (Williams, Machine Learning 8, 1992): what was followed by much is made likelier.

The gradient of the mean of A log π, with A the discounted rewards that came after an act in its take. Their mean over
the batch is the baseline, and they are divided by their deviation: a batch's scale is of no consequence then. There is
no critic; a model's values are left as they are.

Deviation: what a play that was cut off would have earned after it counts as nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.bodies import BodyBatch, BodySettings, batch_of
from shoal.training.exchange.averager import Arrays
from shoal.training.models.bodies import BodyModel
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News


class ReinforceTakes:
    """The objective called ``reinforce``."""

    name = "reinforce"
    version = 1
    num_exchanges = 0
    summary = "the policy gradient by what came after each act, without a critic; for bodies"
    paper = "Williams, Machine Learning 8, 1992"
    settings_type: type[BodySettings] = BodySettings

    def __init__(self, settings: BodySettings) -> None:
        self.settings = settings

    def prepare(
        self, takes: Sequence[Take], model: BodyModel, news: News
    ) -> Generator[Exchange, Arrays, BodyBatch | None]:
        """Advantages by the rewards alone."""
        yield from ()
        return batch_of(takes, model, self.settings, gae_lambda=1.0, has_values=False)

    def loss(self, model: BodyModel, batch: BodyBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean over the acts, and what is worth knowing."""
        judged = model.evaluate(batch.turns)
        policy = -batch.mean(judged.log_probs * batch.advantages)
        entropy = batch.mean(judged.entropy)
        loss = policy - self.settings.entropy_coefficient * entropy
        return loss, {"policy_loss": float(policy.detach()), "entropy": float(entropy.detach())}
