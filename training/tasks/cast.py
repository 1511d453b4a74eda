"""Who plays a role: seats, the casts that give them out, and the actors that sit in them.

A *cast* is a function of what the member knows, of the scenario and of a seeded generator; so all that it depends on
can be had again. It gives seats by role, or in the order of the game's roles; one seat alone is everybody's. Roles that
differ by a number alone (``agent_0``, ``agent_1``) are one kind, and may be given their seat by the kind's name.

An *actor* is what sits in a seat that is here: it sees whole takes, so recurrent and text policies need nothing more.
Seats of others (`Away`, `Person`) have none; what they do is asked of the swarm (`shoal.training.effects.Consult`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid
from shoal.training.plugins import suggest
from shoal.training.tasks.base import Actions, Continuous, Discrete, Floats
from shoal.training.tasks.play import Act, Role, Take, Text
from shoal.training.tasks.source import News, Scenario

MAX_AGE: Final = 2**20
"""Epochs that a `Past` policy may lie back."""
MAX_FOREIGN_S: Final = 120.0
"""For an answer of a `Foreign` seat: its worker, which waits for it, is given up after twice as long and more."""
MIN_PERSON_S: Final = 2.0
MAX_PERSON_S: Final = 600.0
"""For an answer of a `Person`: the plays of a whole node wait for it."""
MAX_POOL: Final = 16
"""Ages that `AgainstPast` may draw from: each has a model of its own in memory."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A policy of the recipe, as it is now."""

    policy: str


@dataclass(frozen=True, slots=True)
class Past:
    """A policy of the recipe, as it was ``age`` epochs ago; see `shoal.training.recipes.past` for how exactly."""

    policy: str
    age: int

    def __post_init__(self) -> None:
        if not 0 <= self.age <= MAX_AGE:
            raise UsageError(f"a past policy's age is {self.age}; take 0 to {MAX_AGE} epochs")


@dataclass(frozen=True, slots=True)
class Fixed:
    """A policy that never changes, by the CID of its weights; see `shoal.training.recipes.fixed`.

    Attributes:
        policy: of the recipe, whose model it is.
        cid: of a state of a run, or of the ``policy.safetensors`` of one.
        otherwise: who plays in its place while nobody gives the weights; none: nothing is played until they are here.
    """

    policy: str
    cid: Cid
    otherwise: Learned | Past | Fixed | Scripted | None = None

    def __post_init__(self) -> None:
        if self.otherwise is not None and not isinstance(self.otherwise, OF_POLICIES):
            raise UsageError(
                "only a policy or a script plays in place of fixed weights; take Learned, Past or Scripted"
            )


@dataclass(frozen=True, slots=True)
class Scripted:
    """What a few lines of code decide; see `SCRIPTS`."""

    name: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """Another framework, in a process of its own; see `shoal.training.tasks.foreign`.

    Attributes:
        name: of an entry point of the group ``shoal.seats``.
        otherwise: who goes on for the rest of a play if it does not answer; none: the play is dropped.
        seconds: that it has for what it is asked at once.
    """

    name: str
    otherwise: Here | None = None
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_FOREIGN_S:
            raise UsageError(f"a foreign seat has {self.seconds} s for an answer; give it up to {MAX_FOREIGN_S:g}")


Here: TypeAlias = Learned | Past | Fixed | Scripted | Foreign


@dataclass(frozen=True, slots=True)
class Away:
    """A policy that another member plays.

    Attributes:
        part: which part of the swarm that member plays.
        policy: by which of its policies.
        otherwise: who goes on for the rest of a play if nobody answers; none: the play is dropped.
    """

    part: str
    policy: str
    otherwise: Here | None = None


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who sits at a node that plays this part; ``otherwise`` as in `Away`.

    Attributes:
        seconds: that a person has for what is asked at once.
    """

    part: str
    otherwise: Here | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not MIN_PERSON_S <= self.seconds <= MAX_PERSON_S:
            raise UsageError(f"a person has {self.seconds} s for an answer; give {MIN_PERSON_S:g} to {MAX_PERSON_S:g}")


Acts: TypeAlias = Sequence[Act | None] | Actions
"""One act for each of some takes; an array, ``[n]`` int64 or ``[n, size]`` float32, where they are of one kind.

None where there is none, which only what sits in a `Foreign` seat may say."""
Seat: TypeAlias = Here | Away | Person
Seats: TypeAlias = Mapping[str, Seat] | tuple[Seat, ...]

OF_POLICIES: Final = Learned | Past | Fixed | Scripted
"""Seats whose acts are proven: made here, by what has log-probabilities."""


class Cast(Protocol):
    """Who sits where in a play. A plain function is one."""

    def __call__(self, news: News, scenario: Scenario, rng: np.random.Generator) -> Seats:
        """Seats by role or kind of role, or in the order of the roles; one alone: everybody's."""
        ...


class Actor(Protocol):
    """What acts for the seats that it is given."""

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[Acts, Floats]:
        """What to do where these takes stand; `shoal.training.tasks.play.newest` gives their newest sights.

        Args:
            takes: that wait, of one or several roles; they are not to be changed.
            rng: for sampling.
            greedy: the likeliest act, for evaluations.

        Returns:
            An act for each take, and ``[n]`` float32 log-probabilities.
        """
        ...


# --- casts -----------------------------------------------------------------------------------------------------------


def as_seat(seat: Seat | str) -> Seat:
    """A seat, or a policy's name for its `Learned` seat."""
    return Learned(seat) if isinstance(seat, str) else seat


@dataclass(frozen=True, slots=True)
class Everyone:
    """All roles are played by one."""

    policy: str | Seat

    def __call__(self, news: News, scenario: Scenario, rng: np.random.Generator) -> Seats:
        """The one."""
        return (as_seat(self.policy),)


class ByRole:
    """Each role, or kind of role, by one of its own."""

    def __init__(self, **seats: str | Seat) -> None:
        self._seats = {role: as_seat(seat) for role, seat in seats.items()}

    def __call__(self, news: News, scenario: Scenario, rng: np.random.Generator) -> Seats:
        """As it was told."""
        return self._seats


def pair(first: str | Seat, second: str | Seat) -> Cast:
    """The two roles of a game by these two, in the order of its roles: one cell of an evaluation matrix."""
    seats = (as_seat(first), as_seat(second))
    return lambda news, scenario, rng: seats


@dataclass(frozen=True, slots=True)
class AgainstPast:
    """One role, drawn evenly, is played by a policy as it is, and the others by it as it was: fictitious self-play.

    Playing the average of what all have been so far, and not the last of them, is what keeps self-play from going round
    in circles (Heinrich et al., arXiv 1603.01121). Deviation: the average is over a pool of ages, evenly, in place of a
    policy that imitates all of them; and a share of plays is against the present one, as AlphaStar has it (Vinyals et
    al. 2019).

    Attributes:
        policy: that learns, from the one role.
        ages: in epochs, the pool.
        share: of plays that are against the past; in the others everybody is the present policy.
        players: roles of the game.

    Raises:
        UsageError: if the pool is empty, the share is none, or there is nobody to play against.
    """

    policy: str
    ages: tuple[int, ...] = (1, 2, 4, 8, 16)
    share: float = 0.8
    players: int = 2

    def __post_init__(self) -> None:
        if not 1 <= len(self.ages) <= MAX_POOL or not 0.0 <= self.share <= 1.0 or self.players < 2:
            raise UsageError(f"AgainstPast takes 1 to {MAX_POOL} ages, a share from 0 to 1, and 2 players or more")

    @property
    def named(self) -> tuple[Seat, ...]:
        """See `named`."""
        return Learned(self.policy), *(Past(self.policy, age) for age in self.ages)

    def __call__(self, news: News, scenario: Scenario, rng: np.random.Generator) -> Seats:
        """One age for all who are of the past."""
        now, then = Learned(self.policy), Past(self.policy, self.ages[int(rng.integers(len(self.ages)))])
        place, is_against = int(rng.integers(self.players)), bool(rng.random() < self.share)
        others = then if is_against else now
        return tuple(now if number == place else others for number in range(self.players))


def named(cast: Cast) -> tuple[Seat, ...]:
    """The seats that a cast may give, each once, with those that stand in for others.

    A cast whose seats depend on what it is asked says them itself, in an attribute ``named``; of any other it is what
    it gives for the first scenario of all.
    """
    said = getattr(cast, "named", None)
    if said is None:
        said = cast(News(), Scenario(0), np.random.default_rng(0))
        said = said if isinstance(said, tuple) else said.values()
    found: dict[Seat, None] = {}
    for seat in said:
        each: Seat | None = seat
        while each is not None and each not in found:
            found[each] = None
            each = getattr(each, "otherwise", None)
    return tuple(found)


def seated(roles: Mapping[str, Role], seats: Seats) -> dict[str, Seat]:
    """A seat for every role.

    Raises:
        UsageError: if a role has none, or a seat no role.
    """
    if isinstance(seats, tuple):
        if len(seats) not in (1, len(roles)):
            raise UsageError(f"a cast gives {len(seats)} seats for {len(roles)} roles; give 1, or one for each")
        return dict(zip(roles, seats * len(roles) if len(seats) == 1 else seats, strict=True))
    found: dict[str, Seat] = {}
    used = set()
    for role in roles:
        name = role if role in seats else kind_of_role(role)
        if name not in seats:
            raise UsageError(f"a cast has no seat for the role {role!r:.80}; it has some for {', '.join(seats)[:300]}")
        found[role] = seats[name]
        used.add(name)
    if len(used) < len(seats):
        name = next(each for each in seats if each not in used)
        raise UsageError(f"a cast has a seat for {name!r:.80}, which the game has no role for; {suggest(name, roles)}")
    return found


def kind_of_role(role: str) -> str:
    """A role's name without its number: ``agent`` for ``agent_2``."""
    kind, line, number = role.rpartition("_")
    return kind if line and number.isdecimal() else role


# --- scripts ---------------------------------------------------------------------------------------------------------


class Chance:
    """Any legal act, all as likely; of numbers -1 to 1. It cannot talk."""

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[Acts, Floats]:
        """Draw, greedy or not."""
        acts: list[Act] = []
        log_probs = np.empty(len(takes), np.float32)
        for index, take in enumerate(takes):
            match take.spaces.acts:
                case Discrete(count):
                    legal = take.asked_legal
                    choices = np.arange(count) if legal is None else np.flatnonzero(legal)
                    acts.append(int(choices[rng.integers(len(choices))]))
                    log_probs[index] = -math.log(len(choices))
                case Continuous(size):
                    acts.append(rng.uniform(-1, 1, size).astype(np.float32))
                    log_probs[index] = -size * math.log(2)
                case Text():
                    raise UsageError(f"the script random cannot talk, as the role {take.role!r:.80} has to")
        return acts, log_probs


class First:
    """The first legal act; zeros; no word. It always does the same, so log-probabilities are 0."""

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[Acts, Floats]:
        """What comes first."""
        acts: list[Act] = []
        for take in takes:
            match take.spaces.acts:
                case Discrete():
                    legal = take.asked_legal
                    acts.append(0 if legal is None else int(legal.argmax()))
                case Continuous(size):
                    acts.append(np.zeros(size, np.float32))
                case Text():
                    acts.append("")
        return acts, np.zeros(len(takes), np.float32)


SCRIPTS: Final[Mapping[str, Callable[[], Actor]]] = {"first": First, "random": Chance}
"""What `Scripted` seats may name; a recipe brings others among its actors."""


def scripted(name: str) -> Actor:
    """A script by its name.

    Raises:
        UsageError: if there is none.
    """
    if name not in SCRIPTS:
        raise UsageError(f"no script is called {name!r:.80}; {suggest(name, SCRIPTS)}")
    return SCRIPTS[name]()
