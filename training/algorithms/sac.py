"""Soft actor-critic (Haarnoja et al., arXiv 1812.05905), with twin critics and a temperature that is tuned.

With a' drawn from the policy π in s', Q' the target networks, t the temperature and H the entropy that is aimed at,
minus the number of actions unless ``target_entropy`` says otherwise, what is made smaller is the sum of

    critics      ½ mean (Q(s, a) - (R + gamma (min Q'(s', a') - t log π(a'|s'))))², of each of the two
    actor        mean (t log π(a|s) - min Q(s, a)),  a drawn from π by way of its own noise
    temperature  -mean (log π(a|s) + H) log t

each by its own parameters alone; the gradients are written out, and a test holds them to autograd's.

Deviations from the paper: critics, actor and temperature take their steps at once, each by what the others were before,
with one Adam and one learning rate, and one norm by which long gradients are scaled down. The temperature is tuned by
its logarithm, as in the authors' code. Several environments are stepped, and then as many optimiser steps taken, rather
than one after one. The target networks follow as the paper says within an update; in modes ``local`` and ``diloco``
they are put, when all have been averaged, where as many steps lead towards the average (`off_policy`). Networks are of
64 by 64 units, not 256 by 256. ``n_steps`` above 1 takes the rewards of several steps as they came, and the entropy
after the last alone. Before ``learning_starts`` actions are uniform. The replay is each peer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.off_policy import Minibatch, OffPolicy, OffPolicyOnEngine, OffPolicySettings
from shoal.training.algorithms.settings import setting
from shoal.training.manifest import Manifest
from shoal.training.models.soft_actor import SoftActorCritics
from shoal.training.tasks import Continuous, Task
from shoal.training.tasks.base import Floats

# In mode gradient every optimiser step is a round over the network.
IN_GRADIENT: Final[dict[str, Any]] = {"gradient_steps": 64, "learning_rate": 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class SACSettings(OffPolicySettings):
    """How SAC learns."""

    minibatch_size: int = setting(256, "transitions per step, from the replay of each peer", 1, 65536)
    max_grad_norm: float = setting(100.0, "longer gradients are scaled down to this", 1e-6, 1e9)
    initial_temperature: float = setting(0.2, "what the entropy is worth at first", 1e-6, 1e6)
    target_entropy: float | None = setting(None, "of the policy; minus the number of actions, if null", -1e6, 1e6)


class SAC(OffPolicyOnEngine[SACSettings]):
    """The algorithm called ``sac``."""

    name = "sac"
    version = 1
    summary = "soft actor-critic from a replay, for continuous actions"
    paper = "https://arxiv.org/abs/1812.05905"
    settings = SACSettings
    in_gradient = IN_GRADIENT

    def objective(self, settings: SACSettings, manifest: Manifest, task: Task) -> SACObjective:
        """A learner's own."""
        if not isinstance(task.action_space, Continuous):
            raise UsageError(f"sac acts in numbers, and {task.name} has a few actions to choose from; take dqn or ppo")
        model = SoftActorCritics(
            task.observation_size,
            task.action_space.size,
            settings.hidden_sizes,
            temperature=settings.initial_temperature,
            seed=manifest.seed,
        )
        return SACObjective(settings, model, task.action_space.size)


class SACObjective(OffPolicy[SACSettings]):
    """The objective."""

    def __init__(self, settings: SACSettings, model: SoftActorCritics, size: int) -> None:
        self._model, self._size = model, size
        self.num_noise = 2 * size
        self._entropy = float(-size) if settings.target_entropy is None else settings.target_entropy
        super().__init__(settings, model, model.followed)
        self._target = model.critics_with(self._targets.flat)

    @property
    def model(self) -> SoftActorCritics:
        """What is trained."""
        return self._model

    def at(self, env_steps: int) -> None:
        """See `OffPolicy.at`."""
        super().at(env_steps)
        self._model.is_exploring = not self.steps_now

    def gradient(self, batch: Minibatch) -> Floats:
        """See `Objective.gradient`."""
        with np.errstate(all="ignore"):  # what is not finite is found when the update is done
            wanted, value_loss = self._critics(batch)
            policy_loss, log_probs = self._actor(batch)
        surplus = float(log_probs.mean()) + self._entropy
        self._model.d_log_temperature[0] = -surplus
        self._measures = {
            "value_loss": value_loss,
            "policy_loss": policy_loss,
            "mean_value": float(wanted.mean()),
            "entropy": self._entropy - surplus,
            "temperature": self._model.temperature,
        }
        return self._model.gradient

    def _critics(self, batch: Minibatch) -> tuple[Floats, float]:
        """Write the critics' gradient; what they are to give ``[S]``, and their loss."""
        model, size = self._model, len(batch)
        after = model.sample(model.actor.of_one(batch.following), batch.noise[:, : self._size])
        values = self._target.forward(np.concatenate([batch.following, after.actions], axis=1))
        worth = values.min(axis=0)[:, 0] - np.float32(model.temperature) * after.log_probs
        wanted = batch.rewards + batch.discounts * worth
        errors = model.critics.forward(np.concatenate([batch.observations, batch.actions], axis=1))
        errors -= wanted[:, None]
        loss = 0.5 * float(np.square(errors).sum() / size)
        model.critics.backward(errors / np.float32(size))
        return wanted, loss

    def _actor(self, batch: Minibatch) -> tuple[float, Floats]:
        """Write the actor's gradient; its loss, and the log-probabilities ``[S]`` of what it does."""
        model, size, alpha = self._model, len(batch), np.float32(self._model.temperature)
        chosen = model.sample(model.actor.forward(batch.observations)[0], batch.noise[:, self._size :])
        values = model.critics.forward(np.concatenate([batch.observations, chosen.actions], axis=1))
        is_less = np.stack([values[0] <= values[1], values[0] > values[1]]).astype(np.float32)
        d_actions = model.critics.backward_to_inputs(is_less).sum(axis=0)[:, -self._size :]
        # By u: of t log π that is 2 t a, since the slope of tanh is 1 - a².
        d_u = 2 * alpha * chosen.actions - d_actions * (1 - np.square(chosen.actions))
        d_log_std = (d_u * chosen.spreads - alpha) * chosen.is_free
        model.actor.backward(np.concatenate([d_u, d_log_std], axis=1)[None].astype(np.float32) / np.float32(size))
        return float((alpha * chosen.log_probs - values.min(axis=0)[:, 0]).mean()), chosen.log_probs
