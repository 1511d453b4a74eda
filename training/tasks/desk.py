"""Where asks wait for whoever answers them, and what comes back, held to what the roles can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from shoal.training.tasks.base import Continuous, Discrete, Floats
from shoal.training.tasks.cast import Actor, Acts, Seat
from shoal.training.tasks.play import Act, BadActError, BadPlayError, Box, Role, Take, read_act
from shoal.training.tasks.playing import Playing

MAX_SHARED: Final = 256
"""Numbers of a sight up to which takes share the array of a whole batch: what a long play keeps alive of short ones."""
_LIMIT: Final = 1e30
_NAN: Final = float("nan")


class Desk:
    """What waits for one actor, or for one seat of others.

    Attributes:
        seat: whose asks come here; the first of several for one actor.
        actor: who answers; none: others.
        spaces: of the roles that sit here, if all have the same.
        is_mixed: whether they have not.
        is_proven: whether the acts of all are made here by policies.
        has_legal: whether some acts may not be legal for some of those that wait.
        since: the step in which the first that waits was parked.
        plays: that wait; for each, what follows.
        positions: of the ask in its turn.
        takes: of the role.
        sights: that it was shown.
        recorded: of how many the takes have what was shown.
        rows: what was shown, side by side, if all were recorded together.
    """

    __slots__ = (
        *(
            "actor",
            "has_legal",
            "is_mixed",
            "is_proven",
            "plays",
            "positions",
            "recorded",
            "rows",
            "seat",
            "sights",
            "since",
            "spaces",
            "takes",
        ),
    )

    def __init__(self, seat: Seat, actor: Actor | None) -> None:
        self.seat, self.actor = seat, actor
        self.spaces: Role | None = None
        self.is_mixed = self.has_legal = False
        self.is_proven = True
        self.since = self.recorded = 0
        self.rows: Floats | None = None
        self.plays: list[Playing] = []
        self.positions: list[int] = []
        self.takes: list[Take] = []
        self.sights: list[Any] = []

    def admit(self, take: Take) -> None:
        """A role sits here."""
        spaces = take.spaces
        self.is_proven &= take.proven
        if self.spaces is None:
            self.spaces = spaces
        elif self.spaces is not spaces and self.spaces != spaces:
            self.is_mixed = True

    def add(self, play: Playing, position: int, take: Take) -> None:
        """One more waits, whose take holds what it was shown."""
        self.plays.append(play)
        self.positions.append(position)
        self.takes.append(take)
        self.sights.append(None)
        self.recorded += 1
        self.has_legal |= take.asked_legal is not None

    def record(self) -> list[tuple[Playing, BadPlayError]]:
        """Have the takes hold what was shown and is not recorded yet; gives the plays that may not show that."""
        first, self.recorded = self.recorded, len(self.plays)
        sights = None if self.is_mixed or self.actor is None or first or self.spaces is None else self.spaces.sights
        if isinstance(sights, Box):
            rows = np.concatenate(self.sights).reshape(-1, sights.size)
            if np.isfinite(rows).all():
                rows.flags.writeable = False
                self.rows = rows
                is_small = sights.size <= MAX_SHARED
                for take, row in zip(self.takes, rows, strict=True):
                    take.sights.append(row if is_small else _apart(row))
                return []
        bad = []
        for play, position in zip(self.plays[first:], self.positions[first:], strict=True):
            try:
                play.record(position)
            except BadPlayError as error:
                bad.append((play, error))
        return bad

    def take_all(self) -> tuple[list[Playing], list[int], list[Take], Floats | None]:
        """All that waits, which waits no more: plays, positions, takes, rows."""
        taken = self.plays, self.positions, self.takes, self.rows
        self.plays, self.positions, self.takes, self.sights = [], [], [], []
        self.rows, self.recorded = None, 0
        return taken

    def pop(self, count: int) -> list[tuple[Playing, int, Take]]:
        """The first so many, which wait no more."""
        taken = list(zip(self.plays[:count], self.positions[:count], self.takes[:count], strict=True))
        del self.plays[:count], self.positions[:count], self.takes[:count], self.sights[:count]
        self.rows, self.recorded = None, self.recorded - len(taken)
        return taken

    def forget(self, play: Playing) -> None:
        """One play waits no more."""
        gone = [index for index, each in enumerate(self.plays) if each is play]
        for index in reversed(gone):
            del self.plays[index], self.positions[index], self.takes[index], self.sights[index]
            self.rows, self.recorded = None, self.recorded - (index < self.recorded)


def _apart(row: Floats) -> Floats:
    kept: Floats = row.copy()
    kept.flags.writeable = False
    return kept


def read_acts(desk: Desk, takes: Sequence[Take], acts: Acts) -> Sequence[Act]:
    """What an actor answered, as plays are sent it.

    Raises:
        BadActError: if a role cannot act so.
    """
    if len(acts) != len(takes):
        raise BadActError(f"the seat {desk.seat} gave {len(acts)} acts for {len(takes)} asks")
    spaces = None if desk.is_mixed or desk.spaces is None else desk.spaces.acts
    if isinstance(acts, np.ndarray):
        if isinstance(spaces, Discrete) and acts.ndim == 1 and acts.dtype.kind in "iu":
            numbers: list[int] = acts.tolist()
            are_legal = not desk.has_legal or all(
                not take.legal or _is_legal(take, act) for take, act in zip(takes, numbers, strict=True)
            )
            if are_legal and min(numbers) >= 0 and max(numbers) < spaces.count:
                return numbers
        elif isinstance(spaces, Continuous) and acts.dtype == np.float32 and acts.shape == (len(takes), spaces.size):
            rows: Floats = np.array(acts, np.float32)
            rows.flags.writeable = False
            if np.isfinite(rows).all():
                return list(rows)
    try:
        return [read_act(take.spaces.acts, act, take.asked_legal) for take, act in zip(takes, acts, strict=True)]
    except BadActError as error:
        raise BadActError(f"the seat {desk.seat}: {error}; its policy is of no use, and no game is to blame") from error


def _is_legal(take: Take, act: int) -> bool:
    legal = take.legal[-1]
    return legal is None or (0 <= act < len(legal) and bool(legal[act]))


def read_log_probs(desk: Desk, takes: Sequence[Take], log_probs: Floats) -> list[float]:
    """Log-probabilities as numbers; NaN where an act is not proven.

    Raises:
        BadActError: if a policy does not know them.
    """
    given = np.asarray(log_probs, np.float32)
    if given.shape != (len(takes),):
        raise BadActError(f"the seat {desk.seat} gave log-probabilities {given.shape} for {len(takes)} asks")
    numbers: list[float] = given.tolist()
    if desk.is_proven and np.isfinite(given).all():
        return numbers
    for index, (take, number) in enumerate(zip(takes, numbers, strict=True)):
        if not take.proven:
            numbers[index] = _NAN
        elif not -_LIMIT < number < _LIMIT:
            raise BadActError(f"the seat {desk.seat} gave a log-probability of {number}; its policy is of no use")
    return numbers
