"""One play under way, held to its game's promises and recorded; and any play again, from its scenario and acts.

Two drive plays: the stage (`shoal.training.tasks.stage`), which has many and batches what they ask, and `replay`, which
knows all answers beforehand. What a play is, is here, once: so the two cannot differ, and a replay is the verifier of
every game.

Whatever a game raises comes out of `begin` and `resume` as it is; the play is of no use then.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training import watch
from shoal.training.tasks.answers import read_reward
from shoal.training.tasks.cast import OF_POLICIES, Learned, Seat
from shoal.training.tasks.failures import BadAnswerError
from shoal.training.tasks.play import (
    MAX_ASKS,
    Act,
    Ask,
    BadActError,
    BadPlayError,
    BadScenarioError,
    Box,
    Game,
    Role,
    Sight,
    Take,
    check_end,
    check_legal,
    is_reward,
    kind_of,
    read_act,
    read_central,
    read_sight,
)
from shoal.training.tasks.source import Scenario

MAX_TURNS: Final = 10_000
"""After which a play is cut off that nobody bounded otherwise."""
_STEP: Final = int(watch.Act.STEP)
_MAKE: Final = int(watch.Act.MAKE)
_NAN: Final = float("nan")
_FLOAT32: Final = np.dtype(np.float32)
_ARRAY: Final = np.ndarray
_LIMIT: Final = 3e38
"""float32 holds it, and what is beyond is looked at closely."""


@dataclass(frozen=True, slots=True)
class Played:
    """A play that is over.

    Attributes:
        number: of the play, in the order in which they were begun.
        scenario: that was played.
        takes: of the roles that acted, in the order of the game's roles.
        returns: by role, all that it earned; after replayed acts, what it earned since.
        scores: as the game says.
        acts: of all roles in the order in which they were asked, the replayed ones not among them. With the scenario's
            own, these are all that the play depends on.
        turns: how many there were, replayed ones included.
        replayed: how many of them were.
    """

    number: int
    scenario: Scenario
    takes: tuple[Take, ...]
    returns: Mapping[str, float]
    scores: Mapping[str, float]
    acts: tuple[Act, ...]
    turns: int
    replayed: int


class Chair:
    """A role in one play.

    Attributes:
        take: what is recorded of it.
        seat: who sits there now.
        desk: where its asks go; the stage's.
        shape: of its sights; none: text.
    """

    __slots__ = ("desk", "seat", "shape", "take")

    def __init__(self, take: Take) -> None:
        self.take, self.seat = take, take.seat
        self.desk: Any = None
        sights = take.spaces.sights
        self.shape = (sights.size,) if isinstance(sights, Box) else None


class Playing:
    """One play under way.

    Attributes:
        index: its place among those side by side.
        number: see `Played`.
        asks: that wait for acts, as the game yielded them; none before it began and when it is over.
        answers: to them, as far as they are there; the driver's.
        missing: how many are not there; the driver's.
        turns: that were answered.
        played: what came of it, when it is over.
    """

    __slots__ = (
        "_acts",
        "_game",
        "_generator",
        "_last_turn",
        "_max_turns",
        "_name",
        "_replayed",
        "answers",
        "asks",
        "chairs",
        "index",
        "missing",
        "number",
        "played",
        "scenario",
        "turns",
    )

    def __init__(
        self,
        game: Game,
        scenario: Scenario,
        seats: Mapping[str, Seat],
        *,
        number: int = 0,
        index: int = 0,
        version: int = 0,
        max_turns: int = MAX_TURNS,
    ) -> None:
        self.index, self.number, self.scenario = index, number, scenario
        self.asks: tuple[Ask, ...] = ()
        self.answers: list[Any] = []
        self.missing = 0
        self.turns = 0
        self.played: Played | None = None
        self.chairs = {
            role: Chair(Take(role, spaces, seat, scenario, number, version, isinstance(seat, OF_POLICIES)))
            for (role, spaces), seat in zip(game.roles.items(), map(seats.__getitem__, game.roles), strict=True)
        }
        self._acts: list[Act] = []
        self._replayed = 0
        self._max_turns = max_turns
        self._last_turn = min(max_turns, scenario.max_turns or max_turns)
        self._name = name_of(game)
        self._game = game
        self._generator: Generator[Any, Any, Any] | None = None

    def begin(self) -> None:
        """Go to the first ask that is not replayed.

        Raises:
            BadScenarioError: if the scenario's acts do not lead to one.
        """
        acts = self.scenario.acts
        generator = self._game.play(self.scenario, np.random.default_rng(self.scenario.seed))
        if type(generator) is not GeneratorType and not isinstance(generator, Generator):
            raise self.bad(f"its play() gave {kind_of(generator)} and not a generator; say yield in it")
        self._generator = generator
        watch.page[2] += 1
        self._resume(None, _MAKE)
        used = 0
        while used < len(acts) and self.asks:
            asks = self.asks
            if used + len(asks) > len(acts):
                raise BadScenarioError(
                    f"{self._name}: the scenario's acts end in the middle of a turn; give whole turns"
                )
            if self.turns + 1 >= self._max_turns:
                raise BadScenarioError(f"{self._name}: {self._max_turns} turns or more are to be replayed")
            answers = tuple(
                self._read_act(ask, act) for ask, act in zip(asks, acts[used : used + len(asks)], strict=True)
            )
            used += len(asks)
            self.turns += 1
            watch.page[2] += 1
            self._resume(answers, _STEP)
        if acts and not self.asks:
            raise BadScenarioError(f"{self._name}: the play ends within the scenario's {len(acts)} acts; give fewer")
        self._replayed = self.turns
        self._last_turn = min(self._max_turns, self.turns + (self.scenario.max_turns or self._max_turns))
        if not self.asks:
            raise self.bad("it ended before it asked anybody")
        self._note(self.asks)
        watch.page[1] = 0

    def resume(self, answers: Sequence[Act]) -> bool:
        """Go on with an act for each ask; they have been checked and recorded.

        The driver counts what it does on the watchdog's page, once for a step of all plays, and says there when it is
        over: both cost as much as all else that is done here.

        Returns:
            Whether there are new asks; the play is over if not.
        """
        self._acts += answers
        self.turns += 1
        self._resume(tuple(answers), _STEP)
        asks = self.asks
        if not asks:
            return False
        self._note(asks)
        if self.turns < self._last_turn:
            return True
        self.cut()
        return False

    def record(self, position: int) -> Take:
        """Take down what an ask showed, now that it will be answered.

        Raises:
            BadPlayError: if it may not show that.
        """
        ask = self.asks[position]
        take = self.chairs[ask.role].take
        try:
            take.sights.append(read_sight(take.spaces.sights, ask.sight))
        except BadPlayError as error:
            raise self.bad(str(error), ask.role) from error
        return take

    def answer(self, position: int, act: Act, log_prob: float = _NAN) -> Act:
        """Record what an ask showed, and an act for it, which is given back as it is to be sent.

        Raises:
            BadActError: if the role cannot act so.
            BadPlayError: if the game may not show that.
        """
        ask = self.asks[position]
        take = self.chairs[ask.role].take
        checked = read_act(take.spaces.acts, act, ask.legal)
        self.record(position)
        take.acts.append(checked)
        take.log_probs.append(log_prob)
        return checked

    def cut(self) -> None:
        """End it where it stands, as a horizon does."""
        cut: dict[str, Sight] = {}
        for ask in self.asks:
            take = self.chairs[ask.role].take
            try:
                cut[ask.role] = read_sight(take.spaces.sights, ask.sight)
            except BadPlayError as error:
                raise self.bad(str(error), ask.role) from error
        self.close()
        self._finish({}, cut, {}, is_cut=True)

    def close(self) -> None:
        """Let go of what the game holds. Whatever goes wrong then does not matter."""
        if self._generator is None:
            return
        page = watch.page
        page[2] += 1
        page[1] = _STEP | self.index
        try:
            self._generator.close()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException:  # noqa: S110  it is of no use any more, and its failure was told before
            pass
        finally:
            page[1] = 0

    def bad(self, what: str, role: str | None = None) -> BadPlayError:
        """What is wrong with the game, with its name."""
        where = f"{self._name}, role {role!r:.80}" if role is not None else self._name
        return BadPlayError(f"the game {where}: {what}")

    def _resume(self, answers: tuple[Act, ...] | None, doing: int) -> None:
        watch.page[1] = doing | self.index
        generator = self._generator
        if generator is None:
            raise UsageError("this play has not begun; call begin() first")
        try:
            asks = generator.send(answers)
        except StopIteration as stop:
            self.asks = ()
            self._end(stop.value)
            return
        if type(asks) is not tuple or not asks:
            raise self.bad(f"it yielded {kind_of(asks) if asks != () else 'no asks'} and not a tuple of asks")
        self.asks = asks

    def _note(self, asks: tuple[Ask, ...]) -> None:
        """Check the asks, but for whether their sights are finite, and give out what acts earned."""
        chairs = self.chairs
        for ask in asks:
            if type(ask) is not Ask:
                raise self.bad(f"it yielded {kind_of(ask)} among its asks")
            chair = chairs.get(ask.role)
            if chair is None:
                raise self.bad(f"it asked {ask.role!r:.80}, which is no role of it; it has {', '.join(chairs)[:200]}")
            take, sight, reward = chair.take, ask.sight, ask.reward
            if type(sight) is not _ARRAY or sight.shape != chair.shape or sight.dtype is not _FLOAT32:
                self._check_sight(take, sight)
            if type(reward) is not float or not -_LIMIT < reward < _LIMIT:
                reward = self._read_reward(ask)
            if take.acts:
                take.rewards.append(reward)
            elif not self._replayed:
                take.early += reward
            if ask.legal is not None or take.legal:
                self._note_legal(take, ask)
            if ask.central is not None or take.central:
                self._note_central(take, ask)
            take.max_tokens = ask.max_tokens
        if len(asks) > 1 and (len(asks) > MAX_ASKS or len({ask.role for ask in asks}) < len(asks)):
            raise self.bad(f"it asked {len(asks)} at once; at most {MAX_ASKS}, and every role once")

    def _check_sight(self, take: Take, sight: object) -> None:
        try:
            read_sight(take.spaces.sights, sight)
        except BadPlayError as error:
            raise self.bad(str(error), take.role) from error

    def _read_reward(self, ask: Ask) -> float:
        if is_reward(ask.reward):
            return ask.reward
        try:
            return read_reward(ask.reward)
        except BadAnswerError as error:
            raise self.bad(str(error), ask.role) from error

    def _note_legal(self, take: Take, ask: Ask) -> None:
        take.legal += [None] * (len(take.acts) - len(take.legal))
        if ask.legal is None:
            take.legal.append(None)
            return
        try:
            check_legal(take.spaces.acts, ask.legal)
        except BadPlayError as error:
            raise self.bad(str(error), ask.role) from error
        legal = ask.legal.copy()
        legal.flags.writeable = False
        take.legal.append(legal)

    def _note_central(self, take: Take, ask: Ask) -> None:
        if ask.central is None or (take.acts and not take.central):
            raise self.bad("central was shown with some asks and not with others", ask.role)
        try:
            size = len(take.central[0]) if take.central else np.size(ask.central)
            take.central.append(read_central(ask.central, size))
        except BadPlayError as error:
            raise self.bad(str(error), ask.role) from error

    def _read_act(self, ask: Ask, act: Act) -> Act:
        """An act of the scenario's."""
        if type(ask) is not Ask or ask.role not in self.chairs:
            raise self.bad(f"it yielded {kind_of(ask)} that asks no role of it")
        try:
            return read_act(self.chairs[ask.role].take.spaces.acts, act, ask.legal)
        except BadActError as error:
            raise BadScenarioError(f"{self._name}: of the scenario's acts, role {ask.role!r:.80}: {error}") from error

    def _end(self, end: object) -> None:
        roles: dict[str, Role] = {role: chair.take.spaces for role, chair in self.chairs.items()}
        try:
            rewards, cut, scores = check_end(roles, end)
        except BadPlayError as error:
            raise self.bad(str(error)) from error
        self._finish(rewards, cut, scores, is_cut=False)

    def _finish(
        self, rewards: Mapping[str, float], cut: Mapping[str, Sight], scores: Mapping[str, float], *, is_cut: bool
    ) -> None:
        takes, returns = [], {}
        for role, chair in self.chairs.items():
            take = chair.take
            if not take.acts:
                returns[role] = take.early + rewards.get(role, 0.0)
                continue
            if len(take.rewards) < len(take.acts):
                take.rewards.append(rewards.get(role, 0.0))
            del take.legal[len(take.acts) :], take.central[len(take.acts) :]  # of asks that nobody answered
            take.cut, take.final = is_cut or role in cut, cut.get(role)
            returns[role] = take.earned
            takes.append(take)
        self.asks = ()
        self.played = Played(
            self.number, self.scenario, tuple(takes), returns, scores, tuple(self._acts), self.turns, self._replayed
        )


def name_of(game: Game) -> str:
    """What a game is called in messages."""
    return str(getattr(game, "name", type(game).__name__))[:80]


def replay(game: Game, scenario: Scenario, acts: Sequence[Act], *, number: int = 0) -> Played:
    """The same play again, bit for bit but for its log-probabilities, seats and versions, which are no part of it.

    Where the acts end and the play does not, it was cut off there.

    Args:
        game: that was played.
        scenario: that was played.
        acts: `Played.acts`.
        number: that the play is to have.

    Raises:
        BadScenarioError: if these acts do not fit this scenario of this game.
        BadPlayError: if the game yields what it may not; what else it raises comes through.
    """
    most = len(scenario.acts) + len(acts) + 2
    seats = dict.fromkeys(game.roles, _REPLAYED)
    playing = Playing(game, scenario, seats, number=number, max_turns=most)
    used = 0
    try:
        playing.begin()
        goes_on = True
        while goes_on and used < len(acts):
            given = acts[used : used + len(playing.asks)]
            if len(given) < len(playing.asks):
                raise BadScenarioError(f"{name_of(game)}: the acts end in the middle of a turn; give whole turns")
            try:
                answers = [playing.answer(position, act) for position, act in enumerate(given)]
            except BadActError as error:
                raise BadScenarioError(f"{name_of(game)}, turn {playing.turns}: {error}") from error
            used += len(answers)
            watch.page[2] += 1
            goes_on = playing.resume(answers)
        if goes_on:
            playing.cut()
    finally:
        playing.close()
    if playing.played is None or used < len(acts):
        raise BadScenarioError(f"{name_of(game)}: the play ends after {used} of {len(acts)} acts; they are of another")
    return playing.played


def difference(claimed: Take, replayed: Take) -> str:
    """Where a take is not what its replay gave, in words; empty: nowhere.

    Log-probabilities, seats and versions are no part of it.
    """
    for noun in ("role", "early", "cut"):
        if getattr(claimed, noun) != getattr(replayed, noun):
            return f"{noun} is {getattr(claimed, noun)!r:.80} and not {getattr(replayed, noun)!r:.80}"
    for noun in ("acts", "sights", "rewards", "legal", "central"):
        ours, theirs = getattr(replayed, noun), getattr(claimed, noun)
        if len(ours) != len(theirs):
            return f"there are {len(theirs)} {noun} and not {len(ours)}"
        for turn, (left, right) in enumerate(zip(theirs, ours, strict=True)):
            if not _is_same(left, right):
                return f"{noun} differ at act {turn}"
    return "" if _is_same(claimed.final, replayed.final) else "the last sight differs"


def _is_same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return type(left) is type(right) and bool(left == right)


_REPLAYED: Final = Learned("replayed")
