"""A game of two, with seats for a person, for another framework and for fixed weights; `test_seats` installs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.protocol.ids import Cid
from shoal.training.recipes.recipe import Part, Policy, Probe, Recipe, Verdict
from shoal.training.tasks.cast import Fixed, Foreign, Learned, Person, Scripted, Seat
from shoal.training.tasks.play import Ask, Box, Discrete, End, Play, Role
from shoal.training.tasks.source import OwnPrompts, Scenario, SharedPrompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shoal.training.tasks.play import Take
    from shoal.training.tasks.source import News

THREE = 3


class Duel:
    """Both name a number, three times; who named the lower one wins. Two are legal for the second at a time."""

    name = "duel"
    roles = {name: Role(Box(2), Discrete(5)) for name in ("player_0", "player_1")}  # noqa: RUF012  a game's are fixed

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """Three turns."""
        won, said = 0.0, 0.0
        legal = np.array([False, False, True, True, False])
        for turn in range(3):
            sight = np.array([turn, rng.random()], np.float32)
            acts: Any = yield Ask("player_0", sight, won), Ask("player_1", sight, -won, legal)
            won = float(np.sign(acts[1] - acts[0]))
            said += acts[1] / 3
        return End({"player_0": won, "player_1": -won}, scores={"said": said})


@dataclass(frozen=True)
class Against:
    """The policy, against somebody."""

    seat: Seat

    def __call__(self, news: News, scenario: Scenario, rng: np.random.Generator) -> dict[str, Seat]:
        """As it was told."""
        return {"player_0": Learned("agent"), "player_1": self.seat}


class Threes:
    """What another framework does: always the same."""

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[int], np.ndarray]:
        """Three."""
        return [THREE] * len(takes), np.zeros(len(takes), np.float32)


def threes(roles: Mapping[str, Role], seed: int) -> Threes:
    """What makes one."""
    return Threes()


def _recipe(name: str, seat: Seat, probed: Seat, **more: Any) -> Recipe:
    return Recipe(
        name=name,
        summary="a duel",
        paper="none",
        claim="it is played",
        game=Duel(),
        source=OwnPrompts(4),
        cast=Against(seat),
        policies={"agent": Policy(model="mlp", objective="ppo", sizes={"hidden_sizes": (8,)})},
        probes=(Probe("said", SharedPrompts(2, seed=1, is_fixed=True), Against(probed), score="said"),),
        verdict=lambda run, baseline: Verdict(True, 0, 0, ""),
        turns=12,
        plays=2,
        **more,
    )


GUEST = Person("guest", otherwise=Scripted("first"), seconds=4.0)
WITH_PERSON = _recipe(
    "duel-person",
    GUEST,
    Scripted("first"),
    parts={"peer": Part(), "guest": Part(trains=(), acts=False, share=0)},
)
WITH_FOREIGN = _recipe("duel-foreign", Foreign("threes", otherwise=Scripted("first")), Foreign("threes"))
NOWHERE = Cid.of_block(b"weights that nobody has")
WITH_FIXED = _recipe("duel-fixed", Fixed("agent", NOWHERE), Fixed("agent", NOWHERE))
