"""Two rooms and a hatch between them: one carries things from a store to the hatch, the other from there to a door.

A small relative of the kitchens of Overcooked (Carroll et al., arXiv 1910.05789), of the layout there called forced
coordination: neither can do it alone, and nobody can leave its room. Both are squares of ``size`` by ``size`` cells.
The carrier of the first room, ``agent_0``, has something as soon as it stands in the store, and lays it down where it
stands before the hatch, if that is empty; ``agent_1`` takes it from there, and brings it to the door, which earns both
of them 1. They begin anywhere with empty hands, and now and then slip: go another way than they meant to.

Both see all there is, as ones and zeros: where they are themselves, where the other is, who carries something, and
whether the hatch is full. `Carrier` is a script that plays it as well as can be done cell by cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import UsageError
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Acts
from shoal.training.tasks.play import Ask, Bools, Box, Discrete, End, Play, Role, Take, newest
from shoal.training.tasks.source import Scenario

_Ints: TypeAlias = npt.NDArray[np.int64]

MOVES: Final = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))
"""What the acts do, rows first: stay, up, right, down, left."""
ACTS: Final = len(MOVES)
MAX_SIZE: Final = 32
_FLAGS: Final = 3


@dataclass(frozen=True)
class Handover:
    """The game.

    Attributes:
        size: of each room.
        slip: how often a step goes where chance leads.
        turns: of a play, after which it is cut off.
    """

    size: int = 5
    slip: float = 0.1
    turns: int = 40
    name = "handover"

    def __post_init__(self) -> None:
        if not 2 <= self.size <= MAX_SIZE or not 0 <= self.slip <= 1 or self.turns < 1:
            raise UsageError(f"rooms of {self.name} are 2 to {MAX_SIZE} cells wide, slip is 0 to 1, turns at least 1")

    @property
    def roles(self) -> dict[str, Role]:
        """Who fetches, and who delivers."""
        role = Role(Box(2 * self.size**2 + _FLAGS), Discrete(ACTS))
        return {"agent_0": role, "agent_1": role}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play, cut off after its turns."""
        cells = rng.integers(self.size, size=(2, 2))
        carries = np.zeros(2, np.bool_)
        is_full, earned, delivered = False, 0.0, 0
        for _ in range(self.turns):
            acts = yield tuple(
                Ask(role, self._sight(number, cells, carries, is_full), earned)
                for number, role in enumerate(self.roles)
            )
            for number, act in enumerate(acts):
                way = int(rng.integers(ACTS)) if rng.random() < self.slip else int(act)
                cells[number] = np.clip(cells[number] + MOVES[way], 0, self.size - 1)
            earned = 0.0
            for number in (1, 0):
                if not self._is_there(number, cells[number], carries[number]):
                    continue
                if number == 1 and not carries[1]:
                    carries[1], is_full = is_full, False
                elif number == 1:
                    carries[1], earned, delivered = False, 1.0, delivered + 1
                elif not carries[0]:
                    carries[0] = True
                elif not is_full:
                    carries[0], is_full = False, True
        last = {role: self._sight(number, cells, carries, is_full) for number, role in enumerate(self.roles)}
        return End(dict.fromkeys(self.roles, earned), last, {"delivered": float(delivered)})

    def goal(self, number: int, *, carries: bool) -> tuple[int, int]:
        """Where the store, the hatch or the door is for who has its hands full or empty."""
        last, middle = self.size - 1, self.size // 2
        if number == 0:
            return (middle, last) if carries else (0, 0)
        return (last, last) if carries else (middle, 0)

    def _is_there(self, number: int, cell: _Ints, carries: bool) -> bool:
        return tuple(cell) == self.goal(number, carries=bool(carries))

    def _sight(self, number: int, cells: _Ints, carries: Bools, is_full: bool) -> Floats:
        sight = np.zeros(2 * self.size**2 + _FLAGS, np.float32)
        for place, who in enumerate((number, 1 - number)):
            row, column = cells[who]
            sight[place * self.size**2 + int(row) * self.size + int(column)] = 1
        sight[-_FLAGS:] = carries[number], carries[1 - number], is_full
        return sight


class Carrier:
    """A script that goes straight to where it has to be, the longer way first."""

    def __init__(self, game: Handover) -> None:
        self._game = game

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[Acts, Floats]:
        """One step nearer; it never hesitates, so log-probabilities are 0."""
        size = self._game.size
        acts = []
        for take, sight in zip(takes, newest(takes), strict=True):
            row, column = divmod(int(sight[: size**2].argmax()), size)
            goal = self._game.goal(list(self._game.roles).index(take.role), carries=bool(sight[-_FLAGS]))
            down, right = goal[0] - row, goal[1] - column
            if abs(down) > abs(right):
                acts.append(MOVES.index((int(np.sign(down)), 0)))
            else:
                acts.append(MOVES.index((0, int(np.sign(right)))))
        return acts, np.zeros(len(takes), np.float32)
