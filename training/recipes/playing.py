"""What a play is worth, and which roles a policy can play."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.recipes.recipe import EARNED, Recipe, Scene
from shoal.training.tasks.cast import Learned, Past, Seat, named, seated
from shoal.training.tasks.play import Role
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import News, Scenario


def score_of(played: Played, score: str) -> float:
    """A score of a play, or the mean of what its roles earned; 0 where the game gave none of this name."""
    if score == EARNED:
        return float(np.mean(list(played.returns.values()))) if played.returns else 0.0
    return float(played.scores.get(score, 0.0))


def seats_of(scene: Scene) -> dict[str, Seat]:
    """Who sits where in the first scenario of all; what a cast gives to whom may depend on the scenario."""
    return seated(scene.game.roles, scene.cast(News(0, 0), Scenario(0), np.random.default_rng(0)))


def named_seats(recipe: Recipe) -> tuple[Seat, ...]:
    """All that the casts of a recipe's scenes and of its probes name, each once."""
    casts = [*(scene.cast for scene in recipe.scenes), *(probe.cast for probe in recipe.probes)]
    return tuple(dict.fromkeys(seat for cast in casts if cast is not None for seat in named(cast)))


def scene_of(recipe: Recipe, policy: str) -> Scene:
    """The first of the recipe's scenes in which a policy has a seat; the recipe's own, if it has one nowhere."""
    for scene in recipe.scenes:
        if any(_is_of(seat, policy) for seat in seats_of(scene).values()):
            return scene
    return recipe.scenes[0]


def roles_of(recipe: Recipe, policy: str) -> list[Role]:
    """The spaces of the roles that a policy can play, each once: those that it names, or that casts give it.

    Raises:
        UsageError: if it names a role that no game has.
    """
    named = recipe.policies[policy].roles
    if named:
        roles = recipe.roles
        for pattern in named:
            if not any(fnmatchcase(role, pattern) for role in roles):
                raise UsageError(f"the policy {policy} names the role {pattern!r:.80}, which the game has not")
        found = [spaces for role, spaces in roles.items() if any(fnmatchcase(role, each) for each in named)]
    else:
        found = [
            scene.game.roles[role]
            for scene in recipe.scenes
            for role, seat in seats_of(scene).items()
            if _is_of(seat, policy)
        ]
    return list(dict.fromkeys(found))


def _is_of(seat: Seat, policy: str) -> bool:
    return isinstance(seat, Learned | Past) and seat.policy == policy
