"""What people at a node are asked, and how they answer: the queue behind a `shoal.training.tasks.cast.Person` seat.

A question of another member is some takes that wait for acts (`shoal.training.tasks.wire`); each is one *ask*, in plain
data, until it is answered or its time is over. An answer is held to what the role can do: one that is not legal is
refused with the reason, and can be given again. What nobody answered in time is left out of the question's answer.

Somebody is there while a reader waits for asks, for ``ABSENT_S`` after one has looked, and while an ask that was shown
can be answered still. Where nobody is, a question is refused at once, so that no play waits for an empty chair.

Whoever asks is a peer, and may be a liar: all asks together, and those of each peer, have a bound, and so has what one
shows. What does not fit is left unanswered. A core: the time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ShoalError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.plain_roles import PlainSpace
from shoal.training.tasks.base import Continuous, Discrete
from shoal.training.tasks.cast import Person
from shoal.training.tasks.plain import plain_space
from shoal.training.tasks.play import Act, BadActError, Role, Take, Text, read_act
from shoal.training.tasks.wire import decode_takes, encode_acts

MAX_ASKS: Final = 64
"""That wait at a time."""
MAX_OF_PEER: Final = 16
"""Of them, those of one peer."""
MAX_CHARS: Final = 16_384
"""Of a text that is shown."""
MAX_NUMBERS: Final = 1024
"""Of a sight that is shown, and of acts to choose from."""
MAX_BYTES: Final = 256 * 1024
"""Of one question; it is read on the node's loop."""
MIN_S: Final = 1.0
"""What nobody waits for as long as this is not read: no person is as quick."""
ABSENT_S: Final = 15.0
"""After the last look, if nothing was there to be shown."""


class NobodyThereError(ShoalError):
    """Nobody sits at this node, or there is no seat for anybody."""


class TooMuchError(ShoalError):
    """So much waits already, or this is so large, that nobody is shown it."""


@dataclass(slots=True, eq=False)
class Question:
    """What one member asked at once.

    Attributes:
        acts: for each of its takes, as far as they are there.
        missing: how many of those that are asked are not there.
    """

    acts: list[Act | None]
    missing: int = 0

    def encoded(self) -> bytes:
        """The answer, as far as it is there."""
        return encode_acts(self.acts)


@dataclass(slots=True, eq=False)
class PersonAsk:
    """One take that waits for somebody's act.

    Attributes:
        number: by which it is answered; never used twice.
        peer: who asks.
        take: whose last sight waits.
        until: when nobody waits for the answer any more.
        is_shown: whether somebody has seen it.
        refused: answers that were not legal.
    """

    number: int
    peer: PeerId
    take: Take
    until: float
    question: Question
    place: int
    is_shown: bool = False
    refused: int = 0

    @property
    def sight(self) -> str | list[float]:
        """What it shows."""
        shown = self.take.sights[-1]
        return shown if isinstance(shown, str) else [float(each) for each in shown]

    @property
    def acts(self) -> PlainSpace:
        """How the role acts."""
        return plain_space(self.take.spaces.acts)

    @property
    def legal(self) -> list[int] | None:
        """The numbers of the acts that are legal; none, where an act is no number."""
        space, legal = self.take.spaces.acts, self.take.asked_legal
        if not isinstance(space, Discrete):
            return None
        return list(range(space.count)) if legal is None else [int(each) for each in np.flatnonzero(legal)]


@dataclass(slots=True)
class People:
    """The asks at one node, of one run.

    Attributes:
        roles: that can be played here; none: there is no seat for anybody.
        num_refused: asks that there was no room for, or that are too large to be shown.
        num_readers: who wait for asks now.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    num_refused: int = 0
    num_readers: int = 0
    _asks: dict[int, PersonAsk] = field(default_factory=dict)
    _last: int = 0
    _looked_at: float = -math.inf

    def is_attended(self, now: float) -> bool:
        """Whether somebody is there."""
        return (
            self.num_readers > 0
            or now < self._looked_at + ABSENT_S
            or any(each.is_shown for each in self._waiting(now))
        )

    def ask(self, peer: PeerId, takes: bytes | memoryview, until: float, now: float) -> Question:
        """A member asks; the question holds the answer as it comes.

        Args:
            peer: who asks.
            takes: as `shoal.training.tasks.wire` writes them.
            until: when its answer is of no use any more.
            now: the time.

        Raises:
            NobodyThereError: if nobody would see it.
            TooMuchError: if none of it is shown.
            ProtocolError: if these are no takes of this game.
        """
        if not self.roles:
            raise NobodyThereError("what this node plays has no seat for a person")
        if not self.is_attended(now):
            raise NobodyThereError("nobody sits at this node now; `shoal sit` there takes the seat")
        waiting = self._waiting(now)
        room = min(MAX_ASKS - len(waiting), MAX_OF_PEER - sum(each.peer == peer for each in waiting))
        if room <= 0 or len(takes) > MAX_BYTES or until < now + MIN_S:
            self.num_refused += 1
            raise TooMuchError("so much waits for the person here, or this is so large or urgent, that it is not shown")
        read = decode_takes(takes, self.roles, Person(""))
        question = Question([None] * len(read))
        for place, take in enumerate(read):
            if question.missing >= room or not _can_be_shown(take):
                self.num_refused += 1
                continue
            self._last += 1
            self._asks[self._last] = PersonAsk(self._last, peer, take, until, question, place)
            question.missing += 1
        if read and not question.missing:
            raise TooMuchError("what this shows is too large for a person to see")
        return question

    def look(self, now: float) -> list[PersonAsk]:
        """Somebody looks at what waits, the oldest first."""
        self._looked_at = now
        found = self._waiting(now)
        for each in found:
            each.is_shown = True
        return found

    def answer(self, number: int, act: object, now: float) -> Question:
        """Somebody does something; gives the question that it belongs to.

        Args:
            number: of the ask.
            act: a whole number, a list of numbers or a text, as the role acts.
            now: the time.

        Raises:
            UsageError: if nobody waits for that any more, or the role cannot act so; the ask is still there then.
        """
        self._looked_at = now
        ask = next((each for each in self._waiting(now) if each.number == number), None)
        if ask is None:
            raise UsageError(f"nobody waits for an answer to {number}: it was answered, or its time is over; ask anew")
        try:
            done = read_act(ask.take.spaces.acts, _as_act(ask.take.spaces.acts, act), ask.take.asked_legal)
        except BadActError as error:
            ask.refused += 1
            raise UsageError(f"{error}; {_what_can_be_done(ask)}") from error
        del self._asks[number]
        ask.question.acts[ask.place] = done
        ask.question.missing -= 1
        return ask.question

    def drop(self, question: Question) -> None:
        """Nobody waits for what is left of a question."""
        self._asks = {number: each for number, each in self._asks.items() if each.question is not question}

    def count(self, now: float) -> int:
        """Asks that can be answered."""
        return len(self._waiting(now))

    def _waiting(self, now: float) -> list[PersonAsk]:
        return [each for each in self._asks.values() if now < each.until]


def _can_be_shown(take: Take) -> bool:
    sight, acts = take.sights[-1], take.spaces.acts
    if (
        isinstance(acts, Discrete | Continuous)
        and (acts.count if isinstance(acts, Discrete) else acts.size) > MAX_NUMBERS
    ):
        return False
    return len(sight) <= (MAX_CHARS if isinstance(sight, str) else MAX_NUMBERS)


def _as_act(space: Discrete | Continuous | Text, act: object) -> Any:
    """As an actor would give it; what makes no sense is left for whoever reads it."""
    if isinstance(space, Continuous) and _are_numbers(act):
        with np.errstate(over="ignore"):
            return np.array(act, np.float32)
    return act


def _are_numbers(act: object) -> bool:
    return (
        isinstance(act, Sequence)
        and not isinstance(act, str | bytes)
        and all(type(each) in (int, float) for each in act)
    )


def _what_can_be_done(ask: PersonAsk) -> str:
    match ask.take.spaces.acts:
        case Discrete():
            legal = ask.legal or []
            more = ", …" if len(legal) > 32 else ""
            return f"answer with one of {', '.join(map(str, legal[:32]))}{more}"
        case Continuous(size):
            return f"answer with a list of {size} numbers, most of them from -1 to 1"
        case Text(max_chars):
            return f"answer with a text of up to {max_chars} characters"
