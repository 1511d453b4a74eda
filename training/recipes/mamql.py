"""MAMQL (arXiv 2503.04679): from few demonstrations of all agents, each agent's owner learns what that agent wants.

Two carry things from a store through a hatch to a door, each in a room of its own (`Handover`). One node has a script
that can do it, and shows two plays: they are posted, and the others have them by their CID. Two nodes own a policy
each. They play the game, with their own policy and with the other's as it is, and see no reward: what an act is worth
follows from what was shown (`softq`), and the rewards so recovered are held against the game's.

Held against behaviour cloning of the same demonstrations, with as many steps of the same optimiser; what is greedy or
sampled of it counts, whichever is better.

Deviations: a game of our own in place of gems, kitchens and crossroads, as the paper's environments are not installed
with ours; the rest is said at the top of `shoal.training.algorithms.softq`. Without plays of the learners' own
(``--set parts.carrier.acts=false --set parts.porter.acts=false``) it is offline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shoal.training.recipes.recipe import Part, Policy, Probe, Recipe, Report, Verdict
from shoal.training.tasks.cast import ByRole, Everyone, Learned, Scripted
from shoal.training.tasks.games.handover import ACTS, Carrier, Handover
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import FreshSeeds, SharedPrompts

if TYPE_CHECKING:
    from shoal.training.algorithms.takes import Trainee

BAR: Final = 2.0
"""How many times as much as by cloning has to be delivered."""
_AGENT: Final = Policy(
    model="mlp",
    sizes={"hidden_sizes": (64, 64), "others": ACTS},
    objective="softq",
    settings={"learning_rate": 2e-3, "adam_epsilon": 1e-5, "num_minibatches": 20, "max_grad_norm": 5.0},
)
"""Cloning has the same settings."""


def correlation(plays: Sequence[Played], trainees: Mapping[str, Trainee]) -> float:
    """Of the rewards that critics imply with the game's, over all turns of the policies; 0 where nothing is implied."""
    from shoal.training.algorithms.softq import SoftQ  # torch; see `Recipe`

    implied, earned = [], []
    models: dict[str, Any] = {name: trainee.model for name, trainee in trainees.items()}
    for name, trainee in trainees.items():
        objective = trainee.objective
        takes = [take for played in plays for take in played.takes if take.seat == Learned(name) and len(take)]
        if isinstance(objective, SoftQ) and takes:
            objective.meet([take for played in plays for take in played.takes], models)
            steps = objective.steps(models[name], takes)
            implied.append(objective.rewards(models[name], steps))
            earned.append(steps.earned.numpy())
    if not implied or not np.std(np.concatenate(earned)) or not np.std(np.concatenate(implied)):
        return 0.0
    return float(np.corrcoef(np.concatenate(implied), np.concatenate(earned))[0, 1])


def judge(run: Report, baseline: Report) -> Verdict:
    """More is delivered than by cloning."""
    learned = run.last("delivered", of=3)
    cloned = max(baseline.last(probe, of=3) for probe in ("delivered", "sampled"))
    text = (
        f"{learned:.2f} deliveries a play, greedily, and {cloned:.2f} by cloning the same demonstrations, at its best "
        f"(the means of the last three probes; the bar is {BAR:g} times as many); implied rewards correlate with the "
        f"game's by {run.last('correlation', of=3):.2f}"
    )
    return Verdict(learned >= BAR * cloned, learned, cloned, text)


_PROBED: Final = SharedPrompts(64, seed=1, is_fixed=True)

RECIPE: Final = Recipe(
    name="mamql",
    summary="rewards and policies of two agents from few demonstrations, each by its own node",
    paper="arXiv 2503.04679",
    claim="critics that are marginal over the other agents earn twice what cloning does, by the same demonstrations",
    game=Handover(size=7, turns=60),
    source=FreshSeeds(),
    cast=ByRole(agent_0="agent_0", agent_1="agent_1"),
    policies={"agent_0": _AGENT, "agent_1": _AGENT},
    parts={
        "carrier": Part(trains=("agent_0",)),
        "porter": Part(trains=("agent_1",)),
        "expert": Part(
            trains=(),
            shows=True,
            cast=Everyone(Scripted("expert")),
            source=SharedPrompts(2, seed=2, is_fixed=True),
        ),
    },
    scripts={"expert": Carrier},
    probes=(
        Probe("delivered", _PROBED),
        Probe("sampled", _PROBED, greedy=False),
        Probe("correlation", _PROBED, greedy=False, measure=correlation),
    ),
    verdict=judge,
    baseline={
        "policies.agent_0.objective": "clone",
        "policies.agent_1.objective": "clone",
        "parts.carrier.acts": False,
        "parts.porter.acts": False,
    },
    epochs=60,
    turns=480,
    plays=8,
)
