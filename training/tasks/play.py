"""An episode as a generator that asks roles what they do, and what is recorded of it.

A *game* has roles; each says what it sees and how it acts. One *play* of a game is a generator: it yields asks, one for
each role whose turn it is (several at once are simultaneous moves), is sent their acts in the same order, and returns
an `End`. That is enough for an environment of one body, for many bodies, for turns, and for text; everything else, who
sits where, batches, records, horizons, is done around it (`shoal.training.tasks.stage`).

A play is a function of its scenario and of the acts: whatever chance it needs comes from the generator that it is
given, which is seeded from the scenario. So whoever has (scenario, acts) has the play again, bit for bit
(`shoal.training.tasks.playing.replay`).

What a game yields is held to what its roles promise, as what an environment answers is
(`shoal.training.tasks.answers`): it is refused with the game's name, the role's, and what was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ShoalError, UsageError
from shoal.training.tasks.answers import read_reward
from shoal.training.tasks.base import Continuous, Discrete, Floats
from shoal.training.tasks.failures import BadAnswerError

if TYPE_CHECKING:
    from shoal.training.tasks.cast import Seat
    from shoal.training.tasks.source import Scenario

__all__ = [
    "AbsentError",
    "Act",
    "ActSpace",
    "Ask",
    "BadActError",
    "BadPlayError",
    "BadScenarioError",
    "Bools",
    "Box",
    "Continuous",
    "Discrete",
    "End",
    "Game",
    "Play",
    "Role",
    "Sight",
    "SightSpace",
    "Table",
    "Take",
    "Text",
    "newest",
]

MAX_NUMBERS: Final = 2**18
"""In one sight or act."""
MAX_CHARS: Final = 2**20
"""In one sight or act."""
MAX_ASKS: Final = 4096
"""In one turn."""
MAX_SCORES: Final = 64
_MAX_FLOAT: Final = float(np.finfo(np.float32).max)
_FLOAT32: Final = np.dtype(np.float32)

Bools: TypeAlias = npt.NDArray[np.bool_]
Sight: TypeAlias = Floats | str
Act: TypeAlias = int | Floats | str


class BadPlayError(BadAnswerError):
    """A game yields or returns what no game may; its play is of no use."""


class BadScenarioError(ShoalError):
    """A scenario cannot be played: its acts do not fit the game, or end it; a game raises it for params of no use."""


class AbsentError(ShoalError):
    """Who sits here does not answer. No game is to blame for it, and no policy."""


class BadActError(ShoalError):
    """An actor acts as its role cannot act. No game is to blame for it."""


@dataclass(frozen=True, slots=True)
class Box:
    """``size`` finite float32."""

    size: int


@dataclass(frozen=True, slots=True)
class Text:
    """At most so many characters."""

    max_chars: int = 4096


SightSpace: TypeAlias = Box | Text
ActSpace: TypeAlias = Discrete | Continuous | Text


@dataclass(frozen=True, slots=True)
class Role:
    """What a role sees, and how it acts.

    Attributes:
        sights: what an `Ask` shows it.
        acts: what it answers.

    Raises:
        UsageError: if they are no spaces, or of no size that can be learned from.
    """

    sights: SightSpace
    acts: ActSpace

    def __post_init__(self) -> None:
        for noun, space, kinds in (("sights", self.sights, Box | Text), ("acts", self.acts, _ACTS)):
            if not isinstance(space, kinds):
                raise UsageError(
                    f"a role's {noun} are {space!r:.80}, which is no space; say Box(4), Discrete(2), Text()"
                )
            size, most = _size(space)
            if type(size) is not int or not 1 <= size <= most:
                raise UsageError(f"a role's {noun} are {space!r:.80}; a size from 1 to {most} can be learned")


_ACTS: Final = Discrete | Continuous | Text


def _size(space: SightSpace | ActSpace) -> tuple[int, int]:
    """Of a space, and the most that it may be."""
    match space:
        case Text(max_chars):
            return max_chars, MAX_CHARS
        case Discrete(count):
            return count, MAX_NUMBERS
        case Box(size) | Continuous(size):
            return size, MAX_NUMBERS


@dataclass(slots=True)  # one is made in every turn: frozen, that takes 0.9 µs and not 0.2, a tenth of CartPole's step
class Ask:
    """A role is asked what it does. It does not change once it is yielded.

    Attributes:
        role: of the game's.
        sight: ``[size]`` float32 or text, as the role's space says. It is copied; a game may use its array again.
        reward: what the role earned since its last act.
        legal: ``[count]`` bool, of a `Discrete` role, at least one true; none: all are.
        max_tokens: the most that a language model should say.
        central: ``[n]`` float32, what critics may see in training and nobody may act on; always as many.
    """

    role: str
    sight: Sight
    reward: float = 0.0
    legal: Bools | None = None
    max_tokens: int | None = None
    central: Floats | None = None


@dataclass(frozen=True, slots=True)
class End:
    """How a play ended.

    Attributes:
        rewards: by role, what it earned since its last act; none: 0.
        cut: by role, the last sight, where a horizon cut the play off and it is worth what it is worth from there on.
        scores: success, tokens, unsafe, …: what sources and probes count.
    """

    rewards: Mapping[str, float] = field(default_factory=dict)
    cut: Mapping[str, Sight] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


Play: TypeAlias = Generator[tuple[Ask, ...], tuple[Act, ...], End]


class Game(Protocol):
    """What can be played."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """All roles, in the order in which their takes are given; always the same."""
        ...

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """Begin one play. Many go on side by side, so whatever changes belongs to the generator.

        Args:
            scenario: what is played; its ``acts`` are none of the game's business.
            rng: all the chance that it may use, seeded from the scenario.
        """
        ...


@dataclass(slots=True, eq=False, weakref_slot=True)  # so that an actor can keep what it knows of a take with it
class Take:
    """One role's part in one play, in the order of its acts.

    While the play goes on, the last sight is the one that waits for an act. Nobody but the stage writes into it.

    Attributes:
        role: whose.
        spaces: what the role sees and how it acts.
        seat: who acted.
        scenario: of the play.
        play: the play's number.
        version: the epoch in which the play began: no policy in it is older.
        proven: whether every act was made here by a policy whose log-probabilities are known. Acts of other nodes,
            people and foreign programs are not; a policy trains on them only if its recipe says so.
        sights: ``[size]`` float32, read-only, or text.
        acts: numbers, ``[size]`` float32, read-only, or text.
        log_probs: of each act under the policy that made it; NaN where that is not known.
        rewards: what each act earned until the next one or the end.
        legal: of each sight, if the game ever said; None for: all.
        central: of each sight, if the game shows any.
        max_tokens: of the newest ask.
        early: earned before the first act, so by none of them; 0 after replayed acts, which were another's.
        cut: whether the play was cut off: what comes after is not worth nothing.
        final: the last sight of a play that was cut off, if it was shown.
    """

    role: str
    spaces: Role
    seat: Seat
    scenario: Scenario
    play: int
    version: int = 0
    proven: bool = True
    sights: list[Any] = field(default_factory=list)
    acts: list[Any] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    legal: list[Bools | None] = field(default_factory=list)
    central: list[Floats] = field(default_factory=list)
    max_tokens: int | None = None
    early: float = 0.0
    cut: bool = False
    final: Sight | None = None

    def __len__(self) -> int:
        """How many acts."""
        return len(self.acts)

    @property
    def earned(self) -> float:
        """All that the role earned, undiscounted."""
        return self.early + math.fsum(self.rewards)

    @property
    def asked_legal(self) -> Bools | None:
        """Which acts are legal now; none: all."""
        return self.legal[-1] if self.legal else None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What is numbers, for T acts, while no ask waits.

        Returns:
            ``rewards`` and ``log_probs`` ``[T]`` float32; ``sights`` ``[T, size]`` float32, unless they are text;
            ``acts`` ``[T]`` int64 or ``[T, size]`` float32, unless they are text; ``legal`` ``[T, count]`` bool and
            ``central`` ``[T, n]`` float32 if the game says them.
        """
        found: dict[str, npt.NDArray[Any]] = {
            "rewards": np.array(self.rewards, np.float32),
            "log_probs": np.array(self.log_probs, np.float32),
        }
        if isinstance(self.spaces.sights, Box):
            found["sights"] = np.array(self.sights, np.float32).reshape(-1, self.spaces.sights.size)
        match self.spaces.acts:
            case Discrete(count):
                found["acts"] = np.array(self.acts, np.int64)
                if self.legal:
                    everything = np.ones(count, np.bool_)
                    found["legal"] = np.array([everything if each is None else each for each in self.legal])
            case Continuous(size):
                found["acts"] = np.array(self.acts, np.float32).reshape(-1, size)
            case Text():
                pass
        if self.central:
            found["central"] = np.array(self.central, np.float32)
        return found


class Table(list[Take]):
    """Takes that are asked in one call.

    Attributes:
        sights: their newest sights side by side, ``[n, size]`` float32, where all are of one size.
    """

    __slots__ = ("sights",)

    def __init__(self, takes: Sequence[Take] = (), sights: Floats | None = None) -> None:
        super().__init__(takes)
        self.sights = sights


def newest(takes: Sequence[Take]) -> Floats:
    """The sights that wait for acts, ``[n, size]`` float32; at no cost for what a stage asks."""
    if isinstance(takes, Table) and takes.sights is not None:
        return takes.sights
    return np.stack([take.sights[-1] for take in takes])


# --- what games yield, held to what they promise ---------------------------------------------------------------------


def read_sight(space: SightSpace, sight: object) -> Sight:
    """A sight, copied.

    Raises:
        BadPlayError: if it is none of the space.
    """
    if isinstance(space, Text):
        if type(sight) is not str:
            raise BadPlayError(f"a sight is {kind_of(sight)} and not text")
        if len(sight) > space.max_chars:
            raise BadPlayError(f"a sight has {len(sight)} characters, more than {space.max_chars}")
        return sight
    return _numbers("a sight", sight, space.size, BadPlayError)


def check_legal(space: ActSpace, legal: object) -> None:
    """Check which acts a game says are legal.

    Raises:
        BadPlayError: if that cannot be.
    """
    if not isinstance(space, Discrete):
        raise BadPlayError("only acts of a Discrete role can be illegal")
    if type(legal) is not np.ndarray or legal.dtype != np.bool_ or legal.shape != (space.count,):
        raise BadPlayError(f"legal is {kind_of(legal)} and not {space.count} bool")
    if not legal.any():
        raise BadPlayError("no act is legal; a role that cannot act is not asked")


def read_central(central: object, size: int) -> Floats:
    """What critics may see, copied.

    Raises:
        BadPlayError: if it is not so many finite float32.
    """
    return _numbers("central", central, size, BadPlayError)


def read_act(space: ActSpace, act: object, legal: Bools | None) -> Act:
    """An act as a play is sent it, copied.

    Raises:
        BadActError: if a role of this space cannot act so now.
    """
    match space:
        case Text(max_chars):
            if type(act) is not str:
                raise BadActError(f"an act is {kind_of(act)} and not text")
            if len(act) > max_chars:
                raise BadActError(f"an act has {len(act)} characters, more than {max_chars}")
            return act
        case Continuous(size):
            return _numbers("an act", act, size, BadActError)
        case Discrete(count):
            if isinstance(act, np.ndarray) and act.shape == ():
                act = act[()]
            if isinstance(act, bool | np.bool_) or not isinstance(act, int | np.integer):
                raise BadActError(f"an act is {kind_of(act)} and not a whole number")
            number = int(act)
            if not 0 <= number < count:
                raise BadActError(f"an act is {number:.30g}, not 0 to {count - 1}")
            if legal is not None and not legal[number]:
                raise BadActError(f"act {number} is not legal now")
            return number


def check_end(roles: Mapping[str, Role], end: object) -> tuple[dict[str, float], dict[str, Sight], dict[str, float]]:
    """What a play returned: rewards, last sights, scores.

    Raises:
        BadPlayError: if it is no `End`, or one that does not fit.
    """
    if type(end) is not End:
        raise BadPlayError(f"it returned {kind_of(end)} and not an End")
    for noun, part in (("rewards", end.rewards), ("cut", end.cut), ("scores", end.scores)):
        if type(part) is not dict and not isinstance(part, Mapping):
            raise BadPlayError(f"{noun} of its End are {kind_of(part)} and not a mapping")
        for name in part if noun != "scores" else ():
            if name not in roles:
                raise BadPlayError(f"{noun} of its End name {name!r:.80}, which is no role of it")
    if len(end.scores) > MAX_SCORES or not all(type(name) is str and len(name) <= 80 for name in end.scores):
        raise BadPlayError(f"its End has other scores than at most {MAX_SCORES} with names of at most 80 characters")
    place = ""
    try:
        rewards: dict[str, float] = {}
        for place, reward in end.rewards.items():
            rewards[place] = read_reward(reward)
        cut: dict[str, Sight] = {}
        for place, sight in end.cut.items():
            cut[place] = read_sight(roles[place].sights, sight)
        scores: dict[str, float] = {}
        for place, score in end.scores.items():
            scores[place] = read_reward(score)
    except BadAnswerError as error:
        raise BadPlayError(f"of {place!r} in its End {error}") from error
    return rewards, cut, scores


def _numbers(noun: str, given: Any, size: int, error: type[ShoalError]) -> Floats:
    if type(given) is not np.ndarray or given.dtype != _FLOAT32:
        raise error(f"{noun} is {kind_of(given)} and not an array of float32")
    if given.shape != (size,):
        raise error(f"{noun} is of shape {given.shape} and not ({size},)")
    if not np.isfinite(given).all():
        index = int(np.flatnonzero(~np.isfinite(given))[0])
        raise error(f"{noun} is not finite: number {index} of it is {given[index]}")
    kept: Floats = given.copy()
    kept.flags.writeable = False
    return kept


def kind_of(value: object) -> str:
    """What something is, in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def is_reward(reward: object) -> bool:
    """Whether it is a float that float32 holds: what needs no further look."""
    return type(reward) is float and -_MAX_FLOAT <= reward <= _MAX_FLOAT
