"""Shared layers (arXiv 2312.15674): a task per node; what decides is everybody's, what perceives is each one's own.

Three tasks of MPE (Lowe et al., arXiv 1706.02275), one after the other among the nodes: to cover landmarks, to chase
one that flees at random, to hide from one that searches at random which landmark is meant. Their sights differ, their
acts are the same. Perception (``encode/*``, attention over what is seen) is trained by who has the task and never
leaves the node; what decides and what values (``decide/*``, ``value/*``) is averaged among all.

Held against the same where each node trains all of its policy alone: as many samples of each task, and nothing shared.

Deviations: PPO in place of QMIX and its kin; particles in place of StarCraft and football. A new task that begins with
the layers that others made is not measured here: a node that joins does that.

The claim does not hold here: in the one seed that was run over three nodes, sharing is worse than learning alone.
"""

from __future__ import annotations

import statistics
from typing import Any, Final

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict
from shoal.training.tasks.cast import ByRole, Scripted, Seat
from shoal.training.tasks.games.deferred import Deferred
from shoal.training.tasks.games.oneof import OneOf
from shoal.training.tasks.games.pettingzoo import PettingZooGame
from shoal.training.tasks.games.team import SCORE, Team
from shoal.training.tasks.source import ByPlace, FreshSeeds, SharedPrompts

TASKS: Final = {
    "cover": ("mpe2:simple_spread_v3", "agent", 0.1),
    "chase": ("mpe2:simple_tag_v3", "adversary", 0.1),
    "hide": ("mpe2:simple_adversary_v3", "agent", 0.1),
}
"""The game, who of it learns, and by what its rewards are multiplied."""
BAR: Final = 0.05
"""How much more a play has to bring than alone, in rewards so multiplied, on average over the run."""


def _tasks() -> OneOf:
    made = {name: Team(PettingZooGame(game), member, factor) for name, (game, member, factor) in TASKS.items()}
    return OneOf(**made)


def judge(run: Report, baseline: Report) -> Verdict:
    """With shared layers a run is better, on average over its probes and tasks."""
    shared, alone = (statistics.fmean(score for _, score in each.scores["return"]) for each in (run, baseline))
    text = (
        f"a play brings {shared:.3f} with shared layers and {alone:.3f} alone, greedily, the mean over tasks and over "
        f"the probes of the run; the last are {run.last('return'):.3f} and {baseline.last('return'):.3f} (the bar is "
        f"+{BAR})"
    )
    return Verdict(shared >= alone + BAR, shared, alone, text)


_SEATS: Final[dict[str, str | Seat]] = {
    "cover/agent": "agent",
    "chase/adversary": "agent",
    "chase/agent": Scripted("random"),
    "hide/agent": "agent",
    "hide/adversary": Scripted("random"),
}
_PARAMS: Final[dict[str, dict[str, Any]]] = {name: {"game": name} for name in TASKS}

RECIPE: Final = Recipe(
    name="shared-layers",
    summary="a task per node: decision layers are everybody's, perception is one's own",
    paper="arXiv 2312.15674",
    claim="with the decision layers shared, each task needs fewer samples than alone",
    game=Deferred("three tasks of MPE", _tasks),
    source=ByPlace({name: FreshSeeds(params) for name, params in _PARAMS.items()}),
    cast=ByRole(**_SEATS),
    policies={
        "agent": Policy(
            model="entities",
            sizes={"own": 4, "entity": 2, "width": 32, "has_places": True},
            objective="ppo",
            settings={"gamma": 0.95, "learning_rate": 2e-3},
            shared=("decide/*", "value/*"),
        )
    },
    probes=(
        Probe(
            "return",
            ByPlace({name: SharedPrompts(64, seed=1, is_fixed=True, params=each) for name, each in _PARAMS.items()}),
            score=SCORE,
        ),
    ),
    verdict=judge,
    baseline={"policies.agent.shared": ("*",), "policies.agent.owner": "own"},
    epochs=60,
    turns=1600,
    plays=64,
    eval_interval=5,
    is_placed=True,
)
