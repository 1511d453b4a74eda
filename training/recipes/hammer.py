"""HAMMER, learned messages (arXiv 2102.00824): one that sees everything learns what to tell many that see little.

In cooperative navigation (Lowe et al., arXiv 1706.02275) three agents are to cover three landmarks and not to bump into
each other. Each sees its own place, its motion and the landmarks, and nobody sees the others; but a messenger sees what
all see, and tells each agent two numbers in every step, before they act. Both are policies of the swarm's, learned by
PPO and averaged each among its own kind: the messenger's earns the mean of what the agents earn, the agents' is one for
all of them. What messages can give is who goes where: agents that go to what is nearest lose 16.7 an episode, those of
whom each has a landmark of its own 11.2, the best assignment 7.9 (by hand; who stays where it is loses 25.5).

Messages say something from the first step on (``initial_gain``), and the messenger's steps are smaller than the
agents', so that words keep their meaning. With neither, and larger messages, there was no advantage; which of it
decides was not separated. Held against the same without a word, where zeros arrive, and with words at random, numbers
from -1 to 1. A messenger that never learns is ``--set policies.messenger.is_frozen=true``; agents that see no
landmark, and so need to be told, are ``--set game.local=4``.

Deviations: the messenger learns by its own reward alone, where the authors' code sends the agents' gradients through
the messages. Agents share one policy, and every node plays and trains both; in the paper the messenger is the strong
node's. Messages are numbers from -1 to 1. Half a million steps in place of half a million episodes.
"""

from __future__ import annotations

from typing import Final

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict
from shoal.training.tasks.cast import ByRole
from shoal.training.tasks.games.messenger import Messenger
from shoal.training.tasks.games.spread import Spread
from shoal.training.tasks.source import FreshSeeds, SharedPrompts

LOCAL: Final = 10
"""Numbers that an agent sees: its motion, its place, where the landmarks are."""
BAR: Final = 0.05
"""Of what those lose who are told nothing, or anything, what messages have to save."""


def judge(run: Report, silent: Report, noisy: Report) -> Verdict:
    """Agents that are told something earn more than those that are told nothing, or anything."""
    told, nothing, anything = (each.last("return", of=3) for each in (run, silent, noisy))
    best = max(nothing, anything)
    text = (
        f"with messages an agent earns {told:.2f} an episode, greedily, {nothing:.2f} without and {anything:.2f} with "
        f"messages at random (the mean of the last three probes): {(told - best) / abs(best):+.1%} of the better; the "
        f"bar is {BAR:.0%} less lost"
    )
    return Verdict(told >= best + BAR * abs(best), told, best, text)


RECIPE: Final = Recipe(
    name="hammer",
    version=2,
    summary="one that sees everything learns what to tell many that see little",
    paper="arXiv 2102.00824",
    claim="learned messages beat none, and messages at random, in cooperative navigation with local sight",
    game=Messenger(Spread(), size=2, local=LOCAL),
    source=FreshSeeds(),
    cast=ByRole(messenger="messenger", agent="local"),
    policies={
        "messenger": Policy(
            model="mlp",
            sizes={"hidden_sizes": (64, 64), "initial_log_std": -1.5, "initial_gain": 1.0},
            objective="ppo",
            settings={
                "gamma": 0.95,
                "learning_rate": 5e-4,
                "reward_scale": 0.1,
                "entropy_coefficient": 0.0,
                "num_minibatches": 8,
            },
        ),
        "local": Policy(
            model="mlp",
            sizes={"hidden_sizes": (64, 64)},
            objective="ppo",
            settings={
                "gamma": 0.95,
                "learning_rate": 1.5e-3,
                "reward_scale": 0.1,
                "entropy_coefficient": 0.003,
                "num_minibatches": 8,
            },
        ),
    },
    probes=(Probe("return", SharedPrompts(128, seed=1, is_fixed=True)),),
    verdict=judge,
    baseline={"game.is_mute": True},
    further=({"game.is_random": True},),
    epochs=120,
    turns=3200,
    plays=64,
)
