"""Faults that come over a swarm, or over a synchronous world: planned, played, and what they cost.

A fault waits until its victim is in the phase of a round that it is meant for, as far as that can be heard, lasts for
as long as it is to, and is over: the killed one is started anew, the stopped one goes on, the cable is back. Then the
victim has some time to become *whole*: to have done its part in what others hold.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from .company import Company
from .ground import SLOWED_TO, Ground, Kind
from .hearing import Curve, Hearing, Loss, Place

IN_A_ROUND: Final = (
    *(Place.COLLECTING, Place.UPDATING, Place.OFFERING, Place.FETCHING),
    *(Place.PROPOSING, Place.VOTING, Place.MERGING),
)
"""Phases that every peer comes through in every epoch, or in every few."""
OUT_OF_IT: Final = (Place.EVALUATING, Place.STARTING, Place.LOADING)
AIM_S: Final = 20.0
"""So long a fault waits for the phase that it is meant for."""
WHOLE_S: Final = 90.0
LEAST_WELL: Final = 2


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault to come: ``at_s`` after the beginning, to this machine or, if it is not well, to the next that is."""

    at_s: float
    number: int
    kind: Kind
    place: Place | None


@dataclass(slots=True)
class Fault:
    """One that came.

    Attributes:
        place: what the victim was at.
        meant: what it was to be at.
        over_at: when the fault was over.
        whole_at: when the victim had contributed again; None if it has not.
        loss: of the others; None if it cannot be told.
    """

    number: int
    kind: Kind
    place: Place | None
    meant: Place | None
    at: float
    over_at: float = float("inf")
    whole_at: float | None = None
    loss: Loss | None = None

    @property
    def ended_at(self) -> float:
        """When nothing of it was left."""
        return self.over_at + WHOLE_S if self.whole_at is None else self.whole_at

    @property
    def whole_s(self) -> float:
        """From its end until the victim was whole."""
        return float("inf") if self.whole_at is None else self.whole_at - self.over_at


class Side(Protocol):
    """What is struck: a swarm, or a synchronous world."""

    ground: Ground
    env_steps: Curve

    def up(self, number: int) -> None:
        """Start the machine's process anew."""
        ...

    def place(self, number: int) -> Place | None:
        """What it is at; None if that is not known."""
        ...

    def wait(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Until something holds; whether it came to that in time."""
        ...

    def whole_at(self, number: int, since: float) -> float | None:
        """When it first did its part in something after ``since``."""
        ...


class Swarm:
    """Shoal's side."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self.ground = company.ground
        self.hearing: Hearing = company.hearing
        self.env_steps = company.hearing.env_steps

    def up(self, number: int) -> None:
        self.company.up(number)

    def place(self, number: int) -> Place | None:
        return self.hearing.place(self.company.names[number])

    def wait(self, holds: Callable[[], bool], limit_s: float) -> bool:
        return self.hearing.wait(holds, limit_s)

    def whole_at(self, number: int, since: float) -> float | None:
        return self.hearing.contributed_at(self.company.names[number], since)

    def judge(self, faults: Sequence[Fault]) -> None:
        """See what the others lost to each: those that nothing was wrong with from its beginning to its end."""
        for fault in faults:
            others = [
                name
                for number, name in enumerate(self.company.names)
                if number != fault.number
                and not any(f.number == number and f.at < fault.ended_at and f.ended_at > fault.at for f in faults)
            ]
            fault.loss = self.hearing.loss(others, fault.at, fault.ended_at) if others else None


def plan(seconds: float, count: int, kinds: Sequence[Kind], peers: int, seed: int) -> list[Planned]:
    """So many faults, evenly over so many seconds."""
    rng = random.Random(f"faults/{seed}/{seconds}/{count}")
    aims = zip(itertools.cycle(kinds), itertools.cycle(IN_A_ROUND), strict=False)
    gap_s = seconds / max(count, 1)
    victims: list[int] = []
    while len(victims) < count:
        victims += rng.sample(range(peers), peers)
    return [
        Planned(gap_s * (number + 0.25 + 0.5 * rng.random()), victims[number], *next(aims)) for number in range(count)
    ]


class Player:
    """Lets faults come over one side."""

    def __init__(self, side: Side, outage_s: float) -> None:
        self.faults: list[Fault] = []
        self._side = side
        self._outage_s = outage_s
        self._ill: set[int] = set()
        self._choosing = threading.Lock()

    def play(self, planned: Sequence[Planned]) -> None:
        """All of them, each at its time; returns when all victims are whole again, or should have been."""
        began = time.monotonic()
        threads = [threading.Thread(target=self._play_at, args=(each, began), daemon=True) for each in planned]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _play_at(self, planned: Planned, began: float) -> None:
        time.sleep(max(0.0, began + planned.at_s - time.monotonic()))
        number = self._choose(planned.number)
        if number is not None:
            try:
                self.strike(number, planned.kind, planned.place)
            finally:
                self._ill.discard(number)

    def _choose(self, wanted: int) -> int | None:
        """A machine that is well, if enough others are."""
        count = len(self._side.ground.machines)
        with self._choosing:
            well = [number for number in range(count) if number not in self._ill]
            if len(well) <= LEAST_WELL:
                return None
            number = min(well, key=lambda each: (each - wanted) % count)
            self._ill.add(number)
            return number

    def strike(self, number: int, kind: Kind, meant: Place | None) -> Fault:
        """One fault, from its beginning until the victim is whole."""
        side = self._side
        if meant in (Place.STARTING, Place.LOADING):  # which nobody is at who is well
            side.ground.strike(number, Kind.KILL)
            side.ground.mend(number)
            side.up(number)
        if meant is not None and side.place(number) is not None:
            side.wait(lambda: side.place(number) is meant, AIM_S)
        fault = Fault(number, kind, side.place(number), meant, time.monotonic())
        self.faults.append(fault)
        side.ground.strike(number, kind)
        time.sleep(self._outage_s)
        side.ground.mend(number)
        fault.over_at = time.monotonic()
        if kind is Kind.KILL:
            side.up(number)
        side.wait(lambda: side.whole_at(number, fault.over_at) is not None, WHOLE_S)
        fault.whole_at = side.whole_at(number, fault.over_at)
        return fault


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some time with so many faults in it.

    Attributes:
        steps_per_s: environment steps into the policy.
        there: the part of the processors that the faults left to the peers.
    """

    seconds: float
    faults: tuple[Fault, ...]
    steps_per_s: float
    there: float


def stretch(side: Side, seconds: float, planned: Sequence[Planned], outage_s: float) -> Stretch:
    """Play faults for so long, and measure what it did to the throughput."""
    player, began = Player(side, outage_s), time.monotonic()
    player.play(planned)
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    until = time.monotonic()
    side.wait(lambda: side.env_steps.amount(float("inf")) > side.env_steps.amount(until), AIM_S)
    gone_s = sum(
        (min(each.over_at, until) - each.at) * (1 - SLOWED_TO if each.kind is Kind.SLOW else 1)
        for each in player.faults
    )
    took_s = until - began
    there = 1 - gone_s / (took_s * len(side.ground.machines))
    return Stretch(took_s, tuple(player.faults), side.env_steps.per_s(began, until), there)
