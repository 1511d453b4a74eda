"""The settings of PPO, and their defaults in the modes ``gradient`` and ``rollouts``.

Those that are off by default are for published settings: "The 37 Implementation Details of PPO" (Huang et al., ICLR
blog track 2022) has value clipping, annealing and normalisation per minibatch from OpenAI Baselines' PPO2, and the
early stop from Spinning Up. "What Matters In On-Policy Reinforcement Learning?" (Andrychowicz et al., arXiv 2006.05990)
finds that value clipping harms, and that it hardly matters where advantages are normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from shoal.training.algorithms.on_policy import OnPolicySettings
from shoal.training.algorithms.settings import setting

MIN_CLIP_RANGE: Final = 1e-6


class Over(StrEnum):
    """Over which samples advantages are given mean 0 and deviation 1."""

    BATCH = "batch"
    MINIBATCH = "minibatch"
    NOTHING = "nothing"


class Correction(StrEnum):
    """For samples that an earlier policy made."""

    NONE = "none"
    DECOUPLED = "decoupled"
    A3PO = "a3po"


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig(OnPolicySettings):
    """How PPO learns. The defaults are those for discrete actions in mode ``local``; see `settings` for the others."""

    clip_range: float = setting(
        0.2,
        "how far the ratio of an action's new probability to its old may leave 1 before its gradient stops",
        MIN_CLIP_RANGE,
        100.0,
    )
    value_clip_range: float | None = setting(
        None, "how far a value may leave its old before its gradient stops; None: as far as it likes", 1e-6, 1e6
    )
    anneal_clip_range: bool = setting(False, "let both clip ranges fall as anneal_learning_rate does")
    target_kl: float | None = setting(
        None,
        "end an update at 1.5 times this KL divergence from the policy that acted; None: never",
        1e-6,
        1e3,
    )
    normalize_advantages: Over = setting(
        Over.BATCH, "over which samples advantages get mean 0 and deviation 1: batch (of all), minibatch or nothing"
    )
    correction: Correction = setting(
        Correction.NONE, "for samples of earlier policies: none, decoupled (2505.24298) or a3po (2512.06547)"
    )

    @property
    def is_annealed(self) -> bool:
        """Whether anything depends on how far the run is."""
        return self.anneal_learning_rate or self.anneal_clip_range


# In mode gradient every optimiser step is a round over the network, so a tenth as many, three times as long.
IN_GRADIENT: Final[dict[str, Any]] = {"update_epochs": 8, "num_minibatches": 4, "learning_rate": 3e-3}

# Nearly all samples are several versions old; see docs/rollouts.md.
IN_ROLLOUTS: Final[dict[str, Any]] = {"correction": "decoupled"}

# OpenAI Baselines' for Atari: a pass over images costs far more than one over vectors.
ON_IMAGES: Final[dict[str, Any]] = {"update_epochs": 4, "num_minibatches": 4, "learning_rate": 2.5e-4}

# A landing is worth what it is at its end, hundreds of steps on (RL Baselines3 Zoo has the same discount and lambda).
# At the usual ones and the usual rate one seed of five had forgotten by 300 k steps what it could at 100 k; with
# all three of these none has (benchmarks/results/published.md).
ON_TASKS: Final[dict[str, dict[str, Any]]] = {
    "gym:LunarLander-v3": {"gamma": 0.999, "gae_lambda": 0.98, "learning_rate": 5e-4}
}
