"""Cooperative navigation (Lowe et al., arXiv 1706.02275), in plain numbers: agents cover landmarks and do not bump.

The particles, rewards and sights are those of ``mpe2:simple_spread_v3`` (https://mpe2.farama.org), and a test holds
every step to it; mpe2's layers of wrappers are left out, which take most of a step's time. Sights are an agent's
motion, its place, where each landmark is, and, where ``sees_others``, where each other agent is; the latter's silence,
which mpe2 shows as zeros, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.base import Discrete, Floats
from shoal.training.tasks.play import Ask, Box, End, Play, Role
from shoal.training.tasks.source import Scenario

MAX_AGENTS: Final = 16
PUSHES: Final = ((0.0, 0.0), (-5.0, 0.0), (5.0, 0.0), (0.0, -5.0), (0.0, 5.0))
"""By act: nothing, left, right, down, up; mpe2 multiplies by a sensitivity of 5."""
_STEP_S: Final = 0.1
_KEPT: Final = 0.75
"""Of the motion, from step to step."""
_SIZE: Final = 0.15
_CONTACT_FORCE: Final = 100.0
_CONTACT_MARGIN: Final = 1e-3
_FAR: Final = 40.0
"""So many margins away, two do not feel each other in float64."""

_Place = tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """One environment.

    Attributes:
        count: agents, and as many landmarks.
        turns: after which a play is cut off.
        local_ratio: the weight of what an agent earns for itself, a bump; the rest is everybody's.
        sees_others: whether agents see each other.
    """

    count: int = 3
    turns: int = 25
    local_ratio: float = 0.5
    sees_others: bool = False
    name = "spread"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_AGENTS or self.turns < 1 or not 0 <= self.local_ratio <= 1:
            raise UsageError(f"spread is for 1 to {MAX_AGENTS} agents, 1 turn or more, and a local_ratio of 0 to 1")

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """``agent_0`` and so on."""
        things = self.count + (self.count - 1 if self.sees_others else 0)
        return {f"agent_{number}": Role(Box(4 + 2 * things), Discrete(len(PUSHES))) for number in range(self.count)}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One episode."""
        drawn = rng.uniform(-1, 1, (2, self.count, 2)).tolist()
        places, landmarks = ([(x, y) for x, y in each] for each in drawn)
        motions = [(0.0, 0.0)] * self.count
        earned = [0.0] * self.count
        for _ in range(self.turns):
            sights = self.sights(places, motions, landmarks)
            acts = yield tuple(map(Ask, self.roles, sights, earned))
            places, motions = moved(places, motions, [PUSHES[int(act)] for act in acts])
            earned = self.rewards(places, landmarks)
        cut = dict(zip(self.roles, self.sights(places, motions, landmarks), strict=True))
        return End(dict(zip(self.roles, earned, strict=True)), cut)

    def sights(self, places: list[_Place], motions: list[_Place], landmarks: list[_Place]) -> list[Floats]:
        """What each agent sees, float32 ``[4 + 2 things]``."""
        found = []
        for number, (x, y) in enumerate(places):
            sight = [*motions[number], x, y]
            for at, to in landmarks:
                sight += (at - x, to - y)
            if self.sees_others:
                for other, (at, to) in enumerate(places):
                    if other != number:
                        sight += (at - x, to - y)
            found.append(np.array(sight, np.float32))
        return found

    def rewards(self, places: list[_Place], landmarks: list[_Place]) -> list[float]:
        """What each agent earns: less, the farther landmarks are from whoever is nearest, and for each bump."""
        uncovered = sum(min(_distance(place, landmark) for place in places) for landmark in landmarks)
        everybodys = -(1 - self.local_ratio) * uncovered
        found = []
        for number, place in enumerate(places):
            near = (_distance(place, other) < 2 * _SIZE for at, other in enumerate(places) if at != number)
            found.append(everybodys - self.local_ratio * sum(near))
        return found


def moved(places: list[_Place], motions: list[_Place], pushes: list[_Place]) -> tuple[list[_Place], list[_Place]]:
    """Places and motions after one step: as they moved; slower, and pushed by themselves and by who is too near."""
    forces = [list(push) for push in pushes]
    for one, place in enumerate(places):
        for other in range(one + 1, len(places)):
            away = (place[0] - places[other][0], place[1] - places[other][1])
            distance = math.hypot(*away)
            inside = (2 * _SIZE - distance) / _CONTACT_MARGIN
            if inside < -_FAR or not distance:
                continue
            depth = _CONTACT_MARGIN * (max(inside, 0.0) + math.log1p(math.exp(-abs(inside))))
            for axis in (0, 1):
                force = _CONTACT_FORCE * away[axis] / distance * depth
                forces[one][axis] += force
                forces[other][axis] -= force
    return (
        [(x + dx * _STEP_S, y + dy * _STEP_S) for (x, y), (dx, dy) in zip(places, motions, strict=True)],
        [
            (dx * _KEPT + fx * _STEP_S, dy * _KEPT + fy * _STEP_S)
            for (dx, dy), (fx, fy) in zip(motions, forces, strict=True)
        ],
    )


def _distance(one: _Place, other: _Place) -> float:
    return math.hypot(one[0] - other[0], one[1] - other[1])
