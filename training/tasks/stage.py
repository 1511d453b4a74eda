"""Many plays side by side: what they ask goes to each actor in one call, and what came of them is given back.

A step of the stage answers every ask that can be answered here: each actor is called once, for all its asks. Then every
play that has all its answers goes on. A play that ends makes room for the next scenario that the source draws.

A `shoal.training.tasks.cast.Foreign` seat is here, and may not answer; then it is as with others, next.

Asks to others, `shoal.training.tasks.cast.Away` and ``Person``, are parked, and the play with them. Other plays go on.
When nothing else can, or the first that is parked has waited for ``PATIENCE`` steps, all that are parked are asked for
at once, one `shoal.training.effects.Consult` per part and policy. Where nobody answers, or with acts that cannot be,
the seat's ``otherwise`` plays on for the rest of that play; if there is none, the play is dropped. No play hangs.

A play that raises, or yields what it may not, is dropped and told to the game's failures
(`shoal.training.tasks.failures`), which give the game up when there are too many. The others go on. Every resume of a
play is announced to the watchdog (`shoal.training.watch`) like a step of an environment.

Scenarios and casts are drawn by a generator of their own, one after the other; actors draw from another. So, where
actors do not draw, N plays side by side give the same takes as one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training import watch
from shoal.training.effects import Consult
from shoal.training.tasks.cast import Actor, Acts, Away, Cast, Foreign, Person, Scripted, Seat, scripted, seated
from shoal.training.tasks.desk import Desk, read_acts, read_log_probs
from shoal.training.tasks.failures import Failures, Place
from shoal.training.tasks.play import (
    AbsentError,
    Act,
    BadActError,
    BadPlayError,
    BadScenarioError,
    Game,
    Role,
    Table,
    Take,
    read_act,
)
from shoal.training.tasks.playing import MAX_TURNS, Played, Playing, name_of
from shoal.training.tasks.source import News, Scenario, Source, seed_of
from shoal.training.watch import Act as Doing
from shoal.training.watch import Slot

log = logging.getLogger(__name__)

PATIENCE: Final = 16
"""Steps of the others that a parked play waits for more company."""
MAX_CONSULT: Final = 256
"""Takes in one `Consult`."""
MAX_PLAYS: Final = 4096
TRIES: Final = 16
"""Scenarios in a row that may fail to begin before the source is given up."""
_GONE: Final = -1
"""What a play that was dropped misses."""
_NAN: Final = float("nan")

T = TypeVar("T")
Answer: TypeAlias = Sequence[Act | None] | None
Collecting: TypeAlias = Generator[Consult, Answer, "Staged"]


def never() -> bool:
    """No reason to stop early."""
    return False


@dataclass(frozen=True, slots=True)
class Staged:
    """What one call of `Stage.collect` brought.

    Attributes:
        plays: that ended in it, in the order in which they were begun.
        turns: that were taken, replayed ones included: what counts as environment steps.
        replayed: how many of them were replayed.
        dropped: how many plays were lost, by reason: ``failed`` (the game's fault), ``scenario`` (its acts do not fit),
            ``unanswered`` (nobody played a part, and its seat names nobody else).
        unanswered: how many asks others did not answer, or not as the role can act.
        is_exhausted: whether the source had no more, or nothing that can be played, and no play is under way.
    """

    plays: tuple[Played, ...]
    turns: int
    replayed: int
    dropped: Mapping[str, int]
    unanswered: int
    is_exhausted: bool

    @property
    def takes(self) -> tuple[Take, ...]:
        """Of all plays, in their order and that of their roles."""
        return tuple(take for played in self.plays for take in played.takes)


class _Tally:
    """What one collect has brought so far."""

    __slots__ = ("dropped", "is_over", "plays", "replayed", "turns", "unanswered")

    def __init__(self) -> None:
        self.plays: list[Played] = []
        self.turns = self.replayed = self.unanswered = 0
        self.dropped: dict[str, int] = {}
        self.is_over = False  # the source has no more

    def drop(self, reason: str) -> None:
        """One play is lost."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Stage:
    """N plays of one game, which keep running from one collect to the next.

    Attributes:
        failures: what went wrong in the game.
    """

    def __init__(
        self,
        game: Game,
        source: Source,
        cast: Cast,
        actors: Mapping[Seat, Actor],
        plays: int,
        *,
        seed: int = 0,
        max_turns: int = MAX_TURNS,
        failures: Failures | None = None,
    ) -> None:
        """Set it up; nothing is played yet.

        Args:
            game: what is played.
            source: what scenarios come from.
            cast: who sits where.
            actors: by seat, all that may sit here; it may find them when it is asked. Scripts need not be among them.
            plays: how many go on side by side.
            seed: of what is drawn, and of the generator that actors get.
            max_turns: after which a play is cut off, replayed turns included.
            failures: told what goes wrong in the game; none: new ones.

        Raises:
            UsageError: if there are too few or too many plays, or the game has no roles.
        """
        if not 1 <= plays <= MAX_PLAYS:
            raise UsageError(f"{plays} plays side by side; 1 to {MAX_PLAYS} can be")
        if max_turns < 1 or not game.roles or not all(isinstance(role, Role) for role in game.roles.values()):
            raise UsageError(f"the game {name_of(game)} needs roles, each a Role(sights, acts), and at least 1 turn")
        self.failures = failures or Failures(name_of(game))
        self._game, self._source, self._cast, self._actors = game, source, cast, actors
        self._max_turns = max_turns
        self._draws = np.random.default_rng(seed_of(seed, "scenarios"))
        self._rng = np.random.default_rng(seed_of(seed, "actors"))
        self._seats: dict[Seat, Desk] = {}
        self._local: dict[int, Desk] = {}  # by the identity of its actor
        self._remote: list[Desk] = []
        self._places = range(plays - 1, -1, -1)
        self._free = list(self._places)
        self._fresh: list[Playing] = []  # whose asks nobody has seen
        self._waiting: list[Playing] = []  # for others
        self._ready: list[Playing] = []  # to go on: all their asks are answered
        self._number = 0
        self._epoch = -1
        self._drawn = 0
        self._step = 0
        self._is_collecting = False

    @property
    def running(self) -> int:
        """How many plays are under way."""
        return len(self._fresh) + len(self._waiting) + len(self._ready)

    def collect(
        self,
        news: News,
        turns: int | None = None,
        *,
        greedy: bool = False,
        is_over: Callable[[], bool] = never,
    ) -> Collecting:
        """Play on until so many turns were taken, or the source has no more and all plays ended.

        Every yield asks others, and is sent their acts, or None if nobody answered in time. Where it yields, it may be
        closed; what ended in it is lost then, and the other plays go on with the next collect.

        Args:
            news: what the source and the cast know, and the epoch whose policies act.
            turns: after which to stop, with plays under way; none: only the source ends it.
            greedy: whether actors take the likeliest act.
            is_over: asked after every step whether to stop early.

        Raises:
            TaskFailedError: if the game failed too often.
            BadActError: if an actor acts as its role cannot.
            UsageError: if the cast gives seats that nobody can take, or a collect is still going on.
                After any of these, all plays are gone.
        """
        if self._is_collecting:
            raise UsageError("this stage is collecting already; end that first")
        self._is_collecting = True
        tally = _Tally()
        try:
            self._seat_all()
            if news.epoch != self._epoch:
                self._epoch, self._drawn = news.epoch, 0
            while True:
                self._fill(news, tally)
                if not self.running or (turns is not None and tally.turns >= turns) or (tally.turns and is_over()):
                    break
                self._step += 1
                self._hand_out(tally)
                self._answer_all(tally, greedy)
                self._sort_out()
                for desk in self._due():
                    yield from self._consult(desk, tally, greedy)
                self._go_on(tally)
        except GeneratorExit:
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self._is_collecting = False
        plays = tuple(sorted(tally.plays, key=lambda each: each.number))
        is_exhausted = tally.is_over and not self.running
        return Staged(plays, tally.turns, tally.replayed, tally.dropped, tally.unanswered, is_exhausted)

    def close(self) -> None:
        """End all plays without a result."""
        for play in self._fresh + self._waiting + self._ready:
            play.close()
        self._fresh, self._waiting, self._ready, self._free = [], [], [], list(self._places)
        for desk in [*self._local.values(), *self._remote]:
            desk.pop(len(desk.plays))

    # --- who sits where ---

    def _seat_all(self) -> None:
        """Find the actors anew: policies may have changed since, and with them what acts for them."""
        self._local = {}
        self._seats = {desk.seat: desk for desk in self._remote}
        for play in self._fresh + self._waiting + self._ready:
            self._sit(play)

    def _sit(self, play: Playing) -> None:
        for chair in play.chairs.values():
            chair.desk = desk = self._desk(chair.seat)
            desk.admit(chair.take)

    def _desk(self, seat: Seat) -> Desk:
        """Where the asks of a seat go: one desk for each actor, whatever the seats that it has."""
        desk = self._seats.get(seat)
        if desk is None:
            if isinstance(seat, Away | Person):
                desk = Desk(seat, None)
                self._remote.append(desk)
            else:
                actor = self._actor(seat)
                desk = self._local.setdefault(id(actor), Desk(seat, actor))
            self._seats[seat] = desk
        return desk

    def _actor(self, seat: Seat) -> Actor:
        try:
            return self._actors[seat]
        except KeyError as error:
            if isinstance(seat, Scripted):
                return scripted(seat.name)
            here = ", ".join(sorted(str(each) for each in self._actors))[:300]
            raise UsageError(f"nobody here can take the seat {seat}; there are actors for {here or 'none'}") from error

    # --- a step ---

    def _fill(self, news: News, tally: _Tally) -> None:
        """Begin a play in every place that is free."""
        if not self._free or tally.is_over:
            return
        tries = 0
        while self._free and tries < TRIES:
            scenario = self._source.draw(_with_drawn(news, self._drawn), self._draws)
            if scenario is None:
                tally.is_over = True
                break
            self._drawn += 1
            seats = seated(self._game.roles, self._cast(news, scenario, self._draws))
            begun = self._begin(scenario, seats, news.epoch, tally)
            tries = 0 if begun else tries + 1
        if tries == TRIES:
            log.warning("%d scenarios in a row cannot be played; the source is not asked again for now", TRIES)
            tally.is_over = True
        self._fresh.sort(key=_by_index)

    def _begin(self, scenario: Scenario, seats: Mapping[str, Seat], epoch: int, tally: _Tally) -> bool:
        """Begin a play; from its beginning, if the acts that its scenario has replayed are not the game's.

        Returns:
            Whether it began.
        """
        index, number = self._free.pop(), self._number
        self._number += 1
        play = Playing(
            self._game, scenario, seats, number=number, index=index, version=epoch, max_turns=self._max_turns
        )
        self._sit(play)
        reason = None
        try:
            play.begin()
        except BaseException as error:  # other people's code
            reason = error
        tally.turns += play.turns
        tally.replayed += play.turns
        if reason is not None:
            self._fail(play, reason, tally, Doing.RESET)
            is_acts_fault = bool(scenario.acts) and isinstance(reason, BadScenarioError)
            return is_acts_fault and self._begin(replace(scenario, acts=()), seats, epoch, tally)
        self._fresh.append(play)
        return True

    def _hand_out(self, tally: _Tally) -> None:
        """Bring every new ask to the desk that it is for, and take down what it shows."""
        for play in self._fresh:
            asks, chairs = play.asks, play.chairs
            play.missing = len(asks)
            play.answers = [None] * play.missing
            for position, ask in enumerate(asks):  # the loop that every turn goes through: no call in it but of lists
                chair = chairs[ask.role]
                desk = chair.desk
                desk.plays.append(play)
                desk.positions.append(position)
                desk.takes.append(chair.take)
                desk.sights.append(ask.sight)
                if ask.legal is not None:
                    desk.has_legal = True
        # All are checked before anybody is asked: a play that shows what it may not has no act to be asked for.
        bad: list[tuple[Playing, BadPlayError]] = []
        for desk in [*self._local.values(), *self._remote]:
            if desk.recorded < len(desk.plays):
                if not desk.recorded:
                    desk.since = self._step
                bad += desk.record()
        for play, error in bad:
            if play.missing != _GONE:
                self._fail(play, error, tally, Doing.STEP)

    def _answer_all(self, tally: _Tally, greedy: bool) -> None:
        """Have all answer who are here; and who stands in for one that does not, which may come to sit here by that."""
        asked = True
        while asked:
            asked = False
            for desk in list(self._local.values()):
                if desk.plays:
                    asked = asked or isinstance(desk.seat, Foreign)
                    self._answer(desk, tally, greedy)

    def _answer(self, desk: Desk, tally: _Tally, greedy: bool) -> None:
        """Have one actor answer all that waits for it.

        Raises:
            BadActError: if it does so as it may not.
        """
        plays, positions, takes, rows = desk.take_all()
        actor = desk.actor
        if actor is None:
            raise UsageError(f"nobody here answers for the seat {desk.seat}")
        if isinstance(desk.seat, Foreign):
            given: Acts | None = None
            with suppress(AbsentError):
                given, _ = actor.act(Table(takes, rows), self._rng, greedy)
            self._settle(list(zip(plays, positions, takes, strict=True)), given, tally)
            return
        acts, log_probs = actor.act(Table(takes, rows), self._rng, greedy)
        checked = read_acts(desk, takes, acts)
        numbers = read_log_probs(desk, takes, log_probs)
        for play, position, take, act, log_prob in zip(plays, positions, takes, checked, numbers, strict=True):
            take.acts.append(act)
            take.log_probs.append(log_prob)
            play.answers[position] = act
            play.missing -= 1

    def _sort_out(self) -> None:
        """Tell plays that can go on from those that wait for others."""
        fresh, self._fresh = self._fresh, []
        self._ready += [play for play in fresh if play.missing == 0]
        if self._remote:
            self._waiting += [play for play in fresh if play.missing > 0]

    def _due(self) -> list[Desk]:
        """The seats of others that are to be asked now."""
        asked = [desk for desk in self._remote if desk.plays]
        is_time = not self._ready or any(self._step - desk.since >= PATIENCE for desk in asked)
        return asked if is_time else []

    def _consult(
        self, desk: Desk, tally: _Tally, greedy: bool
    ) -> Generator[Consult, Sequence[Act | None] | None, None]:
        """Ask others for all that waits for one seat, and see to what they leave unanswered."""
        seat = desk.seat
        if not isinstance(seat, Away | Person):
            raise UsageError(f"the seat {seat} is here; it is not asked of others")
        policy, seconds = (seat.policy, None) if isinstance(seat, Away) else (None, seat.seconds)
        while desk.plays:
            takes = tuple(desk.takes[:MAX_CONSULT])
            given = yield Consult(seat.part, policy, takes, seconds, falls_back=seat.otherwise is not None)
            self._settle(desk.pop(MAX_CONSULT), given, tally)
            self._answer_all(tally, greedy)
        self._ready += [play for play in self._waiting if play.missing == 0]
        self._waiting = [play for play in self._waiting if play.missing > 0]

    def _settle(self, entries: Sequence[tuple[Playing, int, Take]], given: Acts | None, tally: _Tally) -> None:
        """Take what somebody answered who is not of this process, and see to what is left unanswered.

        An act that cannot be is as good as none: no play of the others is to be lost by it.
        """
        acts: Acts = [None] * len(entries)
        if given is not None and len(given) == len(entries):
            acts = given
        for (play, position, take), act in zip(entries, acts, strict=True):
            if play.missing == _GONE:
                continue
            checked = None
            if act is not None:
                with suppress(BadActError):
                    checked = read_act(take.spaces.acts, act, take.asked_legal)
            if checked is None:
                tally.unanswered += 1
                self._fall_back(play, position, take, tally)
                continue
            take.acts.append(checked)
            take.log_probs.append(_NAN)
            play.answers[position] = checked
            play.missing -= 1

    def _fall_back(self, play: Playing, position: int, take: Take, tally: _Tally) -> None:
        """Let somebody here go on for one that did not answer, to the play's end; or drop the play."""
        chair = play.chairs[take.role]
        otherwise = chair.seat.otherwise if isinstance(chair.seat, Away | Person | Foreign) else None
        if otherwise is None:
            self._drop(play, "unanswered", tally)
            return
        chair.seat = otherwise
        chair.desk = desk = self._desk(otherwise)
        desk.admit(take)
        desk.add(play, position, take)

    def _go_on(self, tally: _Tally) -> None:
        """Send their answers to all that have them."""
        ready = self._ready
        if self._remote:
            ready.sort(key=_by_index)
        failed = 0
        watch.page[Slot.CALLS] += 1
        for play in ready:
            try:
                if play.resume(play.answers):
                    self._fresh.append(play)
                    continue
            except BaseException as error:  # other people's code
                failed += 1
                self._fail(play, error, tally, Doing.STEP)
                continue
            self._end(play, tally)
        watch.page[Slot.PLACE] = 0
        self._ready = []
        tally.turns += len(ready)
        self.failures.stepped(len(ready) - failed)

    # --- endings ---

    def _end(self, play: Playing, tally: _Tally) -> None:
        self._free.append(play.index)
        if play.played is not None:
            tally.plays.append(play.played)

    def _fail(self, play: Playing, error: BaseException, tally: _Tally, doing: Doing) -> None:
        """A play raised, or did what it may not.

        Raises:
            TaskFailedError: if that is too much.
        """
        if isinstance(error, KeyboardInterrupt):
            raise error
        if isinstance(error, BadScenarioError):
            log.info("a scenario cannot be played: %s", error)
            self._drop(play, "scenario", tally)
            return
        self._drop(play, "failed", tally)
        self.failures.add(Place(play.index, doing, play.scenario.seed, play.turns), error)

    def _drop(self, play: Playing, reason: str, tally: _Tally) -> None:
        for desk in [*self._local.values(), *self._remote]:
            desk.forget(play)
        play.missing = _GONE
        play.close()
        self._free.append(play.index)
        tally.drop(reason)


def alone(asking: Generator[Any, Any, T]) -> T:
    """Run a collect, or whatever else asks, to its end where there are no others: nobody answers."""
    try:
        while True:
            asking.send(None)
    except StopIteration as stop:
        found: T = stop.value
        return found


def _with_drawn(news: News, drawn: int) -> News:
    """By hand, since `replace` costs as much as a step and a short play has few."""
    return News(news.epoch, news.env_steps, news.outcomes, news.evaluations, news.posts, drawn, news.own, news.place)


def _by_index(play: Playing) -> int:
    return play.index
