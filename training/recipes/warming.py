"""Teaching a policy what a role does well before it learns by itself: steps on demonstrations that are made at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from shoal.training.algorithms.takes import Trainee
from shoal.training.recipes.makers import objective_of
from shoal.training.recipes.playing import scene_of, score_of
from shoal.training.recipes.recipe import Recipe, Warm
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Actor, Acts, ByRole, Learned, Scripted, Seat
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import FreshSeeds, News
from shoal.training.tasks.stage import Stage, alone

log = logging.getLogger(__name__)

CHECK_EVERY = 25
"""Steps between two looks at how good the policy is."""
CHECKED = 128
"""Turns of each look."""
_SHOWN = Scripted("what shows it")


class Demonstrator:
    """An actor that does what a function says."""

    def __init__(self, warm: Warm) -> None:
        self._act = warm.act

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[Acts, Floats]:
        """What the function says; as likely as can be."""
        return [self._act(take) for take in takes], np.zeros(len(takes), np.float32)


def teach(warm: Warm, recipe: Recipe, policy: str, trainee: Trainee, rng: np.random.Generator) -> float:
    """Teach until what the policy samples scores ``warm.until``, or for ``warm.max_steps``; how much it scored last."""
    game = scene_of(recipe, policy).game
    seats = {role: Learned(policy) if role in (warm.roles or game.roles) else _SHOWN for role in game.roles}

    def stage(actor: Actor) -> Stage:
        actors: dict[Seat, Actor] = {Learned(policy): actor, _SHOWN: Demonstrator(warm)}
        return Stage(game, FreshSeeds(), ByRole(**seats), actors, warm.takes, seed=int(rng.integers(2**32)))

    shown, tried = stage(Demonstrator(warm)), stage(trainee.actor)
    pupil = trainee.taught_by(objective_of(warm.objective, warm.settings), int(rng.integers(2**32)))
    score = 0.0
    for step in range(warm.max_steps):
        if step % CHECK_EVERY == 0:
            plays = alone(tried.collect(News(step), CHECKED)).plays
            score = float(np.mean([score_of(played, warm.score) for played in plays])) if plays else 0.0
            if score >= warm.until:
                log.info("the policy %s was taught in %d steps, and scores %.2f", policy, step, score)
                return score
        takes = alone(shown.collect(News(step), warm.takes)).takes
        pupil([take for take in takes if take.seat == Learned(policy)], News(step))
    log.warning(
        "the policy %s was taught %d steps and scores %.2f, not %.2f", policy, warm.max_steps, score, warm.until
    )
    return score
