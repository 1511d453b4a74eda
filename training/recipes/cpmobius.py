"""CPMöbius (arXiv 2602.02979): a coach writes tasks and is paid for the player's progress; the player has no labels.

The coach's nodes see a profile, how often the player is right by kind of task, and write tasks, which are posted. The
player's nodes play each task several times; what most of these plays answer is the label (GRPO). They post how many
agreed: the solve rate. The coach's reward for a task is the change of the player's accuracy on held-out tasks over the
update that the task went into, times its solve rate. So it comes late: a task written in epoch e is played in e + 1 and
paid for in the update of e + 2, by what members signed of the player of e + 1 and of e + 2 (`News.evaluations`). What
was written and is not paid for yet, the coach's objective remembers in its node's own file.

Deviations: small transformers from scratch, and exercises on digits, in place of pretrained models and mathematics. The
coach is taught to write tasks of all kinds alike before it begins, and has that many of every epoch's tasks written by
chance that `Tasks.share` leaves; its rewards are compared with those of the last epochs, and tasks of no form count as
the worst of these. With ``is_by_kind`` the change of accuracy is that of the task's own kind, not of all.

Whom one has to believe: a post is its author's word. At most `MAX_TASKS` tasks of `MAX_CHARS` are read of one, those
that are no tasks are passed over, and each of several coaches has as many tasks as every other. So a coach that lies
has its part of ``share`` of the player's samples, and nothing else. An evaluator that lies moves a median; a player
that lies moves the median of solve rates, between 0 and 1. Both reach the coach alone, which changes by its learning
rate whatever it is paid.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from shoal.training.recipes.exercises import EXERCISE, KINDS, LONGEST, SOLVED, TASKS, Coaching, Profiles, Quiz, Tasks
from shoal.training.recipes.recipe import Part, Policy, Probe, Recipe, Report, Verdict, Warm
from shoal.training.tasks.cast import Everyone
from shoal.training.tasks.games.text import TextTask
from shoal.training.tasks.play import Take

HELD_OUT: Final = 96


def write_any(take: Take) -> str:
    """What a coach is taught: tasks of all kinds and lengths alike."""
    return EXERCISE.question(np.random.default_rng(take.scenario.seed))


def solve(take: Take) -> str:
    """What a player is taught: right answers."""
    return EXERCISE.solve(take.sights[-1]) or ""


def objectives() -> tuple[type[Any], ...]:
    """Of this recipe."""
    from shoal.training.recipes.coaching import CoachObjective, OwnMajority  # torch; see `Recipe`

    return CoachObjective, OwnMajority


def judge(run: Report, baseline: Report) -> Verdict:
    """It gains, and more than by tasks of chance."""
    gained, by_chance = (each.last("test", of=5) - each.first("test") for each in (run, baseline))
    text = (
        f"the player's greedy accuracy on held-out tasks went from {run.first('test'):.3f} by {gained:+.3f} with a "
        f"coach, and by {by_chance:+.3f} with as many tasks drawn evenly"
    )
    return Verdict(gained > max(by_chance, 0.0), gained, by_chance, text)


RECIPE: Final = Recipe(
    name="cpmobius",
    summary="a coach writes tasks, and is paid for the player's progress; no labels",
    paper="arXiv 2602.02979",
    claim="a coach that is paid for the player's progress beats tasks that are drawn evenly, at equal player samples",
    game=TextTask(EXERCISE, max_tokens=LONGEST),
    source=Tasks(32, 8),
    cast=Everyone("player"),
    policies={
        "coach": Policy(
            model="tokens",
            sizes={"width": 48, "layers": 2, "context": 32},
            objective="coach",
            settings={"learning_rate": 1.5e-3},
            warm=Warm(write_any, until=0.95, settings={"learning_rate": 3e-3}, score="valid"),
        ),
        "player": Policy(
            model="tokens",
            sizes={"width": 64, "layers": 2, "context": 24},
            objective="own-majority",
            settings={"learning_rate": 1e-4},
            warm=Warm(solve, until=0.4, settings={"learning_rate": 2e-3}, takes=128),
        ),
    },
    parts={
        "player": Part(trains=("player",), share=2),
        "coach": Part(trains=("coach",), game=Coaching(), source=Profiles(32), cast=Everyone("coach")),
    },
    topics=(TASKS, SOLVED),
    heard=("accuracy", *(name for name, _ in KINDS.values())),
    probes=(
        Probe("accuracy", Quiz(HELD_OUT, seed=1)),
        Probe("test", Quiz(2 * HELD_OUT, seed=2)),
        *(Probe(name, Quiz(24, seed=3, kinds=kind)) for kind, (name, _) in KINDS.items()),
    ),
    verdict=judge,
    baseline={"source.share": 0.0},
    objectives=objectives,
    epochs=80,
    turns=256,
    plays=256,
    eval_interval=1,
)
