"""The settings of PPO, and their defaults in mode ``gradient``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shoal.training.algorithms.on_policy import OnPolicySettings
from shoal.training.algorithms.settings import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig(OnPolicySettings):
    """How PPO learns. The defaults are those for discrete actions in mode ``local``; see `settings` for the others."""

    clip_range: float = setting(
        0.2,
        "how far the ratio of an action's new probability to its old may leave 1 before its gradient stops",
        1e-6,
        100.0,
    )


# In mode gradient every optimiser step is a round over the network, so a tenth as many, three times as long.
IN_GRADIENT: Final[dict[str, Any]] = {"update_epochs": 8, "num_minibatches": 4, "learning_rate": 3e-3}
