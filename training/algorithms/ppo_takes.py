"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347) of takes: the objective called ``ppo``.

The clipped loss with A the normalised advantage (GAE) and R = A + V the return, as `ppo` has it for streams, by
autograd and for any model of a body: one that remembers is trained on whole takes, with the states that its present
parameters lead to.

Deviations: as there. Observations are not normalised and returns not scaled by what was seen, since what all would
have to agree on for that differs from role to role; ``reward_scale`` is for whoever knows a game's rewards.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.bodies import BodyBatch, BodySettings, batch_of
from shoal.training.algorithms.settings import setting
from shoal.training.exchange.averager import Arrays
from shoal.training.models.bodies import BodyModel
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOTakesSettings(BodySettings):
    """What can be set of it."""

    update_epochs: int = setting(4, "passes over the takes per update", 1, 1000)
    num_minibatches: int = setting(4, "optimiser steps per pass", 1, 65536)
    gae_lambda: float = setting(
        0.95, "of the advantage estimate; 0 trusts the values alone, 1 the rewards alone", 0.0, 1.0
    )
    clip_range: float = setting(0.2, "how far the ratio of an act's probabilities may leave 1", 1e-6, 100.0)
    value_coefficient: float = setting(0.5, "weight of the value loss", 0.0, 1e6)


class PPOTakes:
    """The objective called ``ppo``."""

    name = "ppo"
    version = 1
    num_exchanges = 0
    summary = "a clipped objective with an actor and a critic; for bodies"
    paper = "arXiv 1707.06347"
    settings_type: type[PPOTakesSettings] = PPOTakesSettings

    def __init__(self, settings: PPOTakesSettings) -> None:
        self.settings = settings

    def prepare(
        self, takes: Sequence[Take], model: BodyModel, news: News
    ) -> Generator[Exchange, Arrays, BodyBatch | None]:
        """Advantages by the critic as it is."""
        yield from ()
        return batch_of(takes, model, self.settings, gae_lambda=self.settings.gae_lambda, has_values=True)

    def loss(self, model: BodyModel, batch: BodyBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean over the acts, and what is worth knowing."""
        settings = self.settings
        judged = model.evaluate(batch.turns)
        away = (judged.log_probs - batch.old).where(batch.turns.is_act, torch.zeros(()))
        ratio = torch.exp(away)
        clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
        policy = -batch.mean(torch.minimum(ratio * batch.advantages, clipped * batch.advantages))
        value = 0.5 * batch.mean((judged.values - batch.returns).square())
        entropy = batch.mean(judged.entropy)
        loss = policy + settings.value_coefficient * value - settings.entropy_coefficient * entropy
        with torch.no_grad():
            measures = {
                "policy_loss": float(policy.detach()),
                "value_loss": float(value.detach()),
                "entropy": float(entropy.detach()),
                "approx_kl": float(batch.mean(ratio - 1 - away)),
                "clip_fraction": float(batch.mean((ratio != clipped).float())),
            }
        return loss, measures
