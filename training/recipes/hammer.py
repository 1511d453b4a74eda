"""HAMMER, learned messages (arXiv 2102.00824): one that sees everything learns what to tell many that see little.

In cooperative navigation (Lowe et al., arXiv 1706.02275) three agents are to cover three landmarks and not to bump into
each other. Each sees its own place, its motion and the landmarks, and nobody sees the others; but a messenger sees what
all see, and tells each agent four numbers in every step, before they act. Both are policies of the swarm's, learned by
PPO and averaged each among its own kind: the messenger's earns the mean of what the agents earn, the agents' is one for
all of them.

Held against the same without a word: the messenger speaks, and what arrives are zeros. A messenger that says anything
is ``--set policies.messenger.is_frozen=true``.

Deviations: agents share one policy, as in the paper, but every node plays and trains both; in the paper the messenger
is the strong node's. Messages are numbers from -1 to 1. Shorter training than the paper's half million episodes.
"""

from __future__ import annotations

from typing import Final

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict
from shoal.training.tasks.cast import ByRole

from shoal.training.tasks.games.messenger import Messenger
from shoal.training.tasks.games.spread import Spread
from shoal.training.tasks.source import FreshSeeds, SharedPrompts

BAR: Final = 0.03
"""Of what the silent ones lose, what messages have to save."""

def judge(run: Report, baseline: Report) -> Verdict:
    """Agents that are told something earn more than those that are told nothing."""
    told, silent = (each.last("return", of=3) for each in (run, baseline))
    text = (
        f"with messages an agent earns {told:.2f} an episode, greedily, and {silent:.2f} without (the mean of the last "
        f"three probes; the bar is {BAR:.0%} less lost)"
    )
    return Verdict(told >= silent + BAR * abs(silent), told, silent, text)

RECIPE: Final = Recipe(
    name="hammer",
    summary="one that sees everything learns what to tell many that see little",
    paper="arXiv 2102.00824",
    claim="learned messages beat no messages in cooperative navigation with local sight",
    game=Messenger(Spread(), size=4, local=10),
    source=FreshSeeds(),
    cast=ByRole(messenger="messenger", agent="local"),
    policies={
        "messenger": Policy(
            model="mlp",
            sizes={"hidden_sizes": (64, 64), "initial_log_std": -1.0},
            objective="ppo",
            settings={"gamma": 0.95, "learning_rate": 2e-3, "reward_scale": 0.1, "entropy_coefficient": 0.0},
        ),
        "local": Policy(
            model="mlp",
            sizes={"hidden_sizes": (64, 64)},
            objective="ppo",
            settings={"gamma": 0.95, "learning_rate": 2e-3, "reward_scale": 0.1},
        ),
    },
    probes=(Probe("return", SharedPrompts(64, seed=1, is_fixed=True)),),
    verdict=judge,
    baseline={"game.is_mute": True},
    epochs=100,
    turns=3200,
    plays=64,
)
