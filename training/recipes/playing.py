"""What a play is worth, and which roles a policy can play."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.recipes.recipe import EARNED, Recipe
from shoal.training.tasks.cast import Learned, Past, Seat, named, seated
from shoal.training.tasks.play import Role
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import News, Scenario


def score_of(played: Played, score: str) -> float:
    """A score of a play, or the mean of what its roles earned; 0 where the game gave none of this name."""
    if score == EARNED:
        return float(np.mean(list(played.returns.values()))) if played.returns else 0.0
    return float(played.scores.get(score, 0.0))


def seats_of(recipe: Recipe) -> tuple[Seat, ...]:
    """All that the casts of a recipe and of its probes name, each once."""
    casts = [recipe.cast, *(probe.cast for probe in recipe.probes if probe.cast is not None)]
    return tuple(dict.fromkeys(seat for cast in casts for seat in named(cast)))


def roles_of(recipe: Recipe, policy: str) -> list[Role]:
    """The spaces of the roles that a policy can play, each once: those that it names, or that the cast gives it.

    What a cast gives to whom may depend on the scenario; it is asked for the first of all.

    Raises:
        UsageError: if it names a role that the game has not.
    """
    named = recipe.policies[policy].roles
    if named:
        for pattern in named:
            if not any(fnmatchcase(role, pattern) for role in recipe.game.roles):
                raise UsageError(f"the policy {policy} names the role {pattern!r:.80}, which the game has not")
        found = [spaces for role, spaces in recipe.game.roles.items() if any(fnmatchcase(role, each) for each in named)]
    else:
        seats = seated(recipe.game.roles, recipe.cast(News(0, 0), Scenario(0), np.random.default_rng(0)))
        found = [
            recipe.game.roles[role]
            for role, seat in seats.items()
            if isinstance(seat, Learned | Past) and seat.policy == policy
        ]
    return list(dict.fromkeys(found))
