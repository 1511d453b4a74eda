"""RLCCF, collective feedback (arXiv 2508.12338): models that differ improve each other by voting, without labels.

Every node has a policy of its own, and answers the same prompts several times. What crosses the wire are the answers,
as hashes of 26 bits, two to a number: 1.5 kB for 48 prompts of 8 plays. Every node then computes, from the same
ballots, the answer of the crowd: each policy votes for what it said, by how much its own answers agree (its
self-consistency). GRPO on that answer as the label follows, each by itself. Averaging the policies would end the
diversity that the method lives of.

Deviations: a small transformer from scratch in place of pretrained models, which is taught to sort digits until it is
right now and then; answers of no form count for nobody. Ballots carry the samples and no weights, so nobody can claim
confidence. How good models are at first decides whether it holds, and the learning rate does: taught until 0.3 of what
they sample is right, and at 1e-4, one seed of three held, as wrong labels were too many.
"""

from __future__ import annotations

from typing import Any, Final

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict, Warm
from shoal.training.tasks.cast import Everyone
from shoal.training.tasks.games.text import TextTask, sort_digits, sorted_digits
from shoal.training.tasks.source import SharedPrompts

PROMPTS: Final = 48
PLAYS: Final = 8
"""These are the defaults of `shoal.training.recipes.crowd.CrowdSettings`, too."""
HELD_OUT: Final = 256


def objectives() -> tuple[type[Any], ...]:
    """Of this recipe."""
    from shoal.training.recipes.crowd import CrowdGRPO, OwnVote  # torch; see `Recipe`

    return CrowdGRPO, OwnVote


def judge(run: Report, baseline: Report) -> Verdict:
    """Each gains by the crowd's labels, and so does the vote, and more than by its own vote."""
    gain, alone = (each.last("accuracy", of=2) - each.first("accuracy") for each in (run, baseline))
    before, vote, own = _told(run, "vote_first"), _told(run, "vote"), _told(baseline, "vote")
    text = (
        f"greedy accuracy on held-out prompts, the mean of {run.peers} policies, rose by {gain:+.3f} to "
        f"{run.last('accuracy', of=2):.3f} with the crowd's labels (the bar is +0.08) and by {alone:+.3f} with each "
        f"one's own; the vote on new prompts rose by {vote - before:+.3f} to {vote:.3f} (the bar is +0.05), and each "
        f"one's own came to {own:.3f}"
    )
    return Verdict(gain >= 0.08 and gain > alone and vote - before >= 0.05 and vote > own, gain, alone, text)


def _told(report: Report, metric: str) -> float:
    """A metric of the policies; 0, where nothing was voted on yet."""
    name = f"own.{metric}"
    return report.last(name) if report.scores.get(name) else 0.0


RECIPE: Final = Recipe(
    name="rlccf",
    version=2,
    summary="models that differ improve each other by voting, without labels",
    paper="arXiv 2508.12338",
    claim="three models that vote improve each other without labels, more than each does by its own vote",
    game=TextTask(sort_digits, max_tokens=8),
    source=SharedPrompts(PROMPTS, PLAYS),
    cast=Everyone("own"),
    policies={
        "own": Policy(
            model="tokens",
            sizes={"width": 128, "layers": 3, "context": 24},
            objective="crowd-grpo",
            settings={"learning_rate": 5e-5},
            owner="own",
            is_varied=True,
            warm=Warm(sorted_digits, until=0.45, settings={"learning_rate": 1e-3}),
        )
    },
    probes=(Probe("accuracy", SharedPrompts(HELD_OUT, seed=1, is_fixed=True)),),
    verdict=judge,
    baseline={"policies.own.objective": "own-vote-grpo"},
    objectives=objectives,
    epochs=40,
    turns=PROMPTS * PLAYS,
    plays=PROMPTS * PLAYS,
)
