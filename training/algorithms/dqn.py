"""Deep Q-learning (Mnih et al., arXiv 1312.5602 and Nature 518, 2015), with double Q-learning (arXiv 1509.06461).

A network values the actions, Q(s, a), and is led towards what came of one, with the Huber loss of

    Q(s, a) - (R + gamma Q'(s', a')),    a' the action that Q values most in s' (``double``), or Q' does

where Q' is the target network. It acts by the best action, and by any with a probability that falls in a line from
``epsilon_start`` to ``epsilon_end`` while all together take their first ``epsilon_steps`` environment steps.

Deviations from the papers: observations are what the task shows, without frames stacked; rewards are not cut to ±1.
Several environments are stepped, and then as many optimiser steps taken, rather than one after four. The target network
follows by ``target_tau`` with every step rather than all at once now and then, which ``target_tau=1`` and a long
``target_interval`` make it do; in modes ``local`` and ``diloco`` it is put, when all have been averaged, where as many
steps lead towards the average (`off_policy`). The optimiser is Adam, not RMSProp, and long gradients are scaled down.
R are the rewards of ``n_steps`` steps as they came, whatever policy acted (as in Rainbow, arXiv 1710.02298), fewer at
the end of an episode and of what was collected for an update; 1 makes it as published. Learning starts with the first
update before which ``learning_starts`` steps were taken. The replay is each peer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.off_policy import Minibatch, OffPolicy, OffPolicyOnEngine, OffPolicySettings
from shoal.training.algorithms.settings import setting
from shoal.training.manifest import Manifest
from shoal.training.models.q_network import QNetwork
from shoal.training.tasks import Discrete, Task
from shoal.training.tasks.base import Floats

# In mode gradient every optimiser step is a round over the network.
IN_GRADIENT: Final[dict[str, Any]] = {"gradient_steps": 64, "learning_rate": 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class DQNSettings(OffPolicySettings):
    """How DQN learns."""

    n_steps: int = setting(10, "steps whose rewards count as they came, before a state is valued", 1, 1000)
    double: bool = setting(True, "value the action that the network itself likes best, not the target network")
    epsilon_start: float = setting(1.0, "how often it acts by chance at first", 0.0, 1.0)
    epsilon_end: float = setting(0.05, "how often in the end", 0.0, 1.0)
    epsilon_steps: int = setting(10_000, "environment steps of all together until then", 1, 2**40)


class DQN(OffPolicyOnEngine[DQNSettings]):
    """The algorithm called ``dqn``."""

    name = "dqn"
    version = 1
    summary = "deep Q-learning from a replay, for a few discrete actions"
    paper = "https://arxiv.org/abs/1312.5602"
    settings = DQNSettings
    in_gradient = IN_GRADIENT

    def objective(self, settings: DQNSettings, manifest: Manifest, task: Task) -> DQNObjective:
        """A learner's own."""
        if not isinstance(task.action_space, Discrete):
            raise UsageError(f"dqn chooses among a few actions, and {task.name} takes numbers; take sac or ppo")
        count, sizes = task.action_space.count, settings.hidden_sizes
        return DQNObjective(settings, QNetwork(task.observation_size, count, sizes, seed=manifest.seed))


class DQNObjective(OffPolicy[DQNSettings]):
    """The objective."""

    def __init__(self, settings: DQNSettings, model: QNetwork) -> None:
        self._model = model
        super().__init__(settings, model, model.flat)
        self._target = model.with_parameters(self._targets.flat)

    @property
    def model(self) -> QNetwork:
        """What is trained."""
        return self._model

    def at(self, env_steps: int) -> None:
        """See `OffPolicy.at`."""
        super().at(env_steps)
        settings = self.settings
        left = max(0.0, 1 - env_steps / settings.epsilon_steps)
        self._model.epsilon = settings.epsilon_end + left * (settings.epsilon_start - settings.epsilon_end)

    def gradient(self, batch: Minibatch) -> Floats:
        """See `Objective.gradient`."""
        network, rows = self._model.values, np.arange(len(batch))
        with np.errstate(all="ignore"):  # what is not finite is found when the update is done
            after = self._target.of_one(batch.following)
            chosen = (network.of_one(batch.following) if self.settings.double else after).argmax(axis=1)
            wanted = batch.rewards + batch.discounts * after[rows, chosen]
            values = network.forward(batch.observations)
            errors = values[0, rows, batch.actions] - wanted
            pulls = np.clip(errors, -1, 1)  # the Huber loss, by the value
            d_values = np.zeros_like(values)
            d_values[0, rows, batch.actions] = pulls / len(batch)
            network.backward(d_values)
            loss = float((pulls * (errors - 0.5 * pulls)).mean())
        self._measures = {
            "value_loss": loss,
            "mean_value": float(wanted.mean()),
            "exploration": self._model.epsilon,
        }
        return self._model.gradient
