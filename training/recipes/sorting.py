"""GRPO (arXiv 2402.03300) on one policy of everybody's: the plainest way to train a language model together.

Every node plays prompts of its own, each several times, and learns from how its answers compare; then the parameters
are averaged. A small transformer from scratch, which is taught to sort digits until it is right now and then.
"""

from __future__ import annotations

from typing import Final

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict, Warm
from shoal.training.tasks.cast import Everyone
from shoal.training.tasks.games.text import TextTask, sort_digits, sorted_digits
from shoal.training.tasks.source import OwnPrompts, SharedPrompts

PROMPTS: Final = 32
PLAYS: Final = 8


def judge(run: Report, baseline: Report) -> Verdict:
    """It learns, and what is only taught does not."""
    gain, still = (each.last("sampled", of=2) - each.first("sampled") for each in (run, baseline))
    text = (
        f"sampled accuracy on held-out prompts rose by {gain:+.3f} (the bar is +0.1), without learning by {still:+.3f}"
    )
    return Verdict(gain >= 0.1 and gain > still, gain, still, text)


RECIPE: Final = Recipe(
    name="sorting",
    summary="one language model of everybody's, by GRPO",
    paper="arXiv 2402.03300",
    claim="a transformer that was taught a little improves by its own answers, averaged over the nodes",
    game=TextTask(sort_digits, max_tokens=8),
    source=OwnPrompts(PROMPTS, PLAYS),
    cast=Everyone("solver"),
    policies={
        "solver": Policy(
            model="tokens",
            sizes={"width": 128, "layers": 3, "context": 24},
            objective="grpo",
            settings={"learning_rate": 2e-4},
            warm=Warm(sorted_digits, until=0.2, settings={"learning_rate": 1e-3}),
        )
    },
    probes=(
        Probe("sampled", SharedPrompts(256, seed=1, is_fixed=True), greedy=False),
        Probe("greedy", SharedPrompts(256, seed=1, is_fixed=True)),
    ),
    verdict=judge,
    baseline={"policies.solver.is_frozen": True},
    epochs=80,
    baseline_epochs=10,
    turns=PROMPTS * PLAYS,
    plays=PROMPTS * PLAYS,
)
