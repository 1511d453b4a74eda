"""A game of four roles, and a recipe in which each is played by a policy that is somebody else's."""

import numpy as np

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Verdict
from shoal.training.tasks.base import Discrete
from shoal.training.tasks.cast import ByRole
from shoal.training.tasks.play import Ask, Box, End, Role
from shoal.training.tasks.source import FreshSeeds, SharedPrompts

KINDS = ("common", "partly", "own", "frozen")
"""Everybody's, everybody's in part, each node's own, and nobody's to change."""


class Echo:
    """Each role is shown one of four lights, and is to say which."""

    roles = dict.fromkeys(KINDS, Role(Box(4), Discrete(4)))

    def play(self, scenario, rng):
        lights = rng.integers(4, size=len(KINDS))
        sights = np.eye(4, dtype=np.float32)[lights]
        acts = yield tuple(Ask(kind, sight) for kind, sight in zip(KINDS, sights, strict=True))
        rewards = {kind: float(act == light) for kind, act, light in zip(KINDS, acts, lights, strict=True)}
        return End(rewards, scores=rewards)


def _policy(**whose):
    sizes = {"hidden_sizes": (16,)}
    return Policy(model="mlp", sizes=sizes, objective="ppo", settings={"learning_rate": 1e-2}, **whose)


RECIPE = Recipe(
    name="population",
    summary="a policy for each way of owning one",
    paper="none",
    claim="each policy is whose it is said to be",
    game=Echo(),
    source=FreshSeeds(),
    cast=ByRole(**{kind: kind for kind in KINDS}),
    policies={
        "common": _policy(),
        "partly": _policy(shared=("decide/*",)),
        "own": _policy(owner="own", is_varied=True),
        "frozen": _policy(is_frozen=True),
    },
    probes=tuple(Probe(kind, SharedPrompts(64, seed=1, is_fixed=True), score=kind) for kind in KINDS),
    verdict=lambda run, baseline: Verdict(True, 0.0, 0.0, ""),
    turns=64,
    plays=64,
    eval_interval=5,
)
