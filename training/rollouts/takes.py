"""Shards of takes: whole plays of a game, every role's part in them (`shoal.training.tasks.play.Take`), as columns.

===============  =============  ====================================================================================
column           shape          what
===============  =============  ====================================================================================
``scenarios``    bytes          of P plays, each its scenario in MessagePack
``scenario_ends``  ``[P]``      int32, where each ends
``roles``        ``[S]``        uint8, of S takes: which of the game's roles, ascending within a play
``plays``        ``[S]``        uint32, ascending: which play
``lengths``      ``[S]``        int32, how many acts
``early``        ``[S]``        float32, what was earned before the first act
``flags``        ``[S]``        uint8: 1 cut off, 2 proven, 4 a final sight was shown
``rewards``      ``[A]``        float32, of all A acts of all takes, one take after the other
``log_probs``    ``[A]``        float32; 0 where an act is not proven
``acts``         bytes          texts in UTF-8, or numbers in the order of the takes: float32, or int32 each
``act_ends``     ``[A]``        int32, where each ends
``sights``       bytes          likewise, with final sights in their places; left out where they are to be replayed
``sight_ends``   ``[A + F]``    int32, likewise
``tokens``       ``[X]``        int32, of all texts that were drawn token by token, ends of acts among them
``token_counts``  ``[A]``       int32, of each act; 0: not drawn token by token
``draws``        ``[X]``        float32, the log-probability of each token
===============  =============  ====================================================================================

A play replays from its scenario and from what its roles did, so sights are optional, as in rows. Tokens are what was
drawn; a text says which they were for a tokenizer of characters alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.training.rollouts.packed import Array
from shoal.training.rollouts.rows import DoesNotFitError
from shoal.training.rollouts.shard import MAX_SAMPLES, Shard, ShardKind
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.play import (
    Act,
    ActSpace,
    BadActError,
    BadPlayError,
    Discrete,
    Role,
    SightSpace,
    Take,
    Text,
    read_act,
    read_sight,
)
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import Scenario

MAX_PLAYS: Final = 2**14
MAX_SCENARIO_BYTES: Final = 1024 * 1024
"""Of one."""
MAX_SCENARIOS_BYTES: Final = 4 * 1024 * 1024
"""Of all: plain data is many times larger in memory than as bytes."""
MAX_TOKENS: Final = 2**22
_CUT: Final = 1
_PROVEN: Final = 2
_FINAL: Final = 4
_INT: Final = np.dtype("<i4")
_FLOAT: Final = np.dtype("<f4")
_REPLAYED: Final = Learned("shard")
_REQUIRED: Final = {
    "scenarios": "uint8",
    "scenario_ends": "int32",
    "roles": "uint8",
    "plays": "uint32",
    "lengths": "int32",
    "early": "float32",
    "flags": "uint8",
    "rewards": "float32",
    "log_probs": "float32",
    "acts": "uint8",
    "act_ends": "int32",
}
_TOGETHER: Final = (
    {"sights": "uint8", "sight_ends": "int32"},
    {"tokens": "int32", "token_counts": "int32", "draws": "float32"},
)


@dataclass(frozen=True, slots=True)
class _Scenario:
    seed: int
    params: dict[str, Any]
    acts: tuple[Any, ...]  # bytes, text or a number
    max_turns: int | None
    tag: str


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """How an act was drawn token by token.

    Attributes:
        tokens: int32 ``[n]``, its end among them.
        log_probs: float32 ``[n]``.
    """

    tokens: Array
    log_probs: Array


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One role's part in one play.

    Attributes:
        take: with the sights only if the shard has them; its seat is of no meaning.
        drawn: of each act; None: not drawn token by token.
    """

    take: Take
    drawn: tuple[Drawn | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PlayOf:
    """One play of a shard.

    Attributes:
        scenario: that was played.
        parts: of the roles that acted, in the order of the game's roles.
    """

    scenario: Scenario
    parts: tuple[Part, ...]


def play_of(played: Played, drawn: Mapping[str, Sequence[Drawn | None]] | None = None) -> PlayOf:
    """A play that is over, to be written.

    Args:
        played: by a stage.
        drawn: by role, how each of its acts was drawn; none: not token by token.
    """
    parts = []
    for take in played.takes:
        told = None if drawn is None else drawn.get(take.role)
        parts.append(Part(take, (None,) * len(take) if told is None else tuple(told)))
    return PlayOf(played.scenario, tuple(parts))


def groups_of(plays: Sequence[PlayOf]) -> tuple[tuple[int, ...], ...]:
    """The numbers of the plays of each scenario, in the order of their first: what an update draws by itself."""
    found: dict[tuple[int, str], list[int]] = {}
    for number, play in enumerate(plays):
        found.setdefault((play.scenario.seed, play.scenario.tag), []).append(number)
    return tuple(tuple(numbers) for numbers in found.values())


def columns_of(plays: Sequence[PlayOf], roles: Mapping[str, Role], *, with_sights: bool) -> dict[str, Array]:
    """Plays as they are written.

    Args:
        plays: with takes that are over, all roles of the game's.
        roles: the game's.
        with_sights: whether what was shown is written.

    Raises:
        UsageError: if the game has more roles than a shard can name, or the plays are too many.
    """
    names = list(roles)
    parts = [(number, part) for number, play in enumerate(plays) for part in play.parts]
    takes = [part.take for _, part in parts]
    if len(names) > 256 or len(plays) > MAX_PLAYS:
        raise UsageError(f"a shard has at most {MAX_PLAYS} plays of a game of at most 256 roles; make several")
    acts, act_ends = _joined([_act_bytes(act) for take in takes for act in take.acts])
    scenarios, scenario_ends = _joined([_scenario_bytes(play.scenario) for play in plays])
    log_probs = np.array([each for take in takes for each in take.log_probs], np.float32)
    found: dict[str, Array] = {
        "scenarios": scenarios,
        "scenario_ends": scenario_ends,
        "roles": np.array([names.index(take.role) for take in takes], np.uint8),
        "plays": np.array([number for number, _ in parts], np.uint32),
        "lengths": np.array([len(take) for take in takes], np.int32),
        "early": np.array([take.early for take in takes], np.float32),
        "flags": np.array([_flags(take) for take in takes], np.uint8),
        "rewards": np.array([each for take in takes for each in take.rewards], np.float32),
        "log_probs": np.where(np.isnan(log_probs), np.float32(0), log_probs),
        "acts": acts,
        "act_ends": act_ends,
    }
    if with_sights:
        shown = [sight for take in takes for sight in [*take.sights, *([] if take.final is None else [take.final])]]
        found["sights"], found["sight_ends"] = _joined([_act_bytes(sight) for sight in shown])
    drawn = [each for _, part in parts for each in part.drawn]
    if any(each is not None for each in drawn):
        found["token_counts"] = np.array([0 if each is None else len(each.tokens) for each in drawn], np.int32)
        told = [each for each in drawn if each is not None]
        found["tokens"] = np.concatenate([each.tokens for each in told]).astype(np.int32)
        found["draws"] = np.concatenate([each.log_probs for each in told]).astype(np.float32)
    return found


def plays_of(shard: Shard, roles: Mapping[str, Role]) -> list[PlayOf]:
    """The plays of a shard, held to what the game's roles see and do.

    Raises:
        DoesNotFitError: if it is of another kind, or its columns are others than this version knows.
        LimitError: if it has more plays or acts than may be.
        ProtocolError: if it holds what no play of these roles can.
    """
    if shard.head.kind is not ShardKind.TAKES:
        raise DoesNotFitError(f"a shard of {shard.head.kind} is none of takes; use it for what it is")
    columns = shard.columns
    _check_columns(columns)
    total, count = len(columns["rewards"]), len(columns["lengths"])
    lengths = columns["lengths"].tolist()
    is_large = total > MAX_SAMPLES or len(columns["scenario_ends"]) > MAX_PLAYS
    if is_large or len(columns["scenarios"]) > MAX_SCENARIOS_BYTES or len(columns.get("tokens", ())) > MAX_TOKENS:
        raise LimitError("a shard of takes has more plays, acts or tokens than may be; refuse it")
    if any(each < 1 for each in lengths) or sum(lengths) != total or shard.head.samples != total:
        raise ProtocolError(f"a shard's takes are not of {total} acts together; refuse it")
    scenarios = [_read_scenario(each) for each in _parted(columns["scenarios"], columns["scenario_ends"])]
    plays, numbers = columns["plays"].tolist(), columns["roles"].tolist()
    order = list(zip(plays, numbers, strict=True))
    if order != sorted(set(order)) or set(plays) != set(range(len(scenarios))):
        raise ProtocolError("a shard's takes are not in the order of their plays and roles; refuse it")
    names = list(roles)
    if count and max(numbers) >= len(names):
        raise ProtocolError(f"a shard names role {max(numbers)} of a game that has {len(names)}; refuse it")
    reader = _Reader(columns)
    found: list[list[Part]] = [[] for _ in scenarios]
    for index in range(count):
        role = names[numbers[index]]
        part = reader.part(index, role, roles[role], scenarios[plays[index]], plays[index], shard.head.version)
        found[plays[index]].append(part)
    reader.require_end()
    return [PlayOf(scenario, tuple(parts)) for scenario, parts in zip(scenarios, found, strict=True)]


def _check_columns(columns: Mapping[str, Array]) -> None:
    expected = dict(_REQUIRED)
    for group in _TOGETHER:
        if group.keys() & columns.keys():
            expected |= group
    if columns.keys() != expected.keys():
        raise DoesNotFitError("a shard of takes has other columns than this version knows; update Shoal to use it")
    for name, array in columns.items():
        if array.dtype.name != expected[name] or array.ndim != 1:
            raise DoesNotFitError(
                f"a shard's {name} are {array.dtype.name} {list(array.shape)}; use shards of this game"
            )
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise ProtocolError(f"a shard's {name} are not finite; refuse it")
    takes, acts = len(columns["lengths"]), len(columns["rewards"])
    for names, length in (
        (("roles", "plays", "early", "flags"), takes),
        (("log_probs", "act_ends"), acts),
        (("token_counts",), acts),
        (("draws",), len(columns.get("tokens", ()))),
    ):
        for name in names:
            if name in columns and len(columns[name]) != length:
                raise ProtocolError(f"a shard's {name} are {len(columns[name])} and not {length}; refuse it")


class _Reader:
    """Takes one after the other what columns hold for it."""

    def __init__(self, columns: Mapping[str, Array]) -> None:
        self._columns = columns
        self._acts = _parted(columns["acts"], columns["act_ends"])
        self._sights = _parted(columns["sights"], columns["sight_ends"]) if "sights" in columns else None
        self._act = self._sight = self._token = 0

    def part(self, index: int, role: str, spaces: Role, scenario: Scenario, play: int, version: int) -> Part:
        columns = self._columns
        length, flags = int(columns["lengths"][index]), int(columns["flags"][index])
        place = slice(self._act, self._act + length)
        is_proven = bool(flags & _PROVEN)
        take = Take(role, spaces, _REPLAYED, scenario, play, version, is_proven)
        take.acts += [_read_act(spaces.acts, each) for each in self._acts[place]]
        take.rewards += columns["rewards"][place].tolist()
        log_probs = columns["log_probs"][place].tolist()
        if isinstance(spaces.acts, Text) and any(each > 0 for each in log_probs):
            raise ProtocolError("a shard has texts of probabilities above 1; refuse it")
        take.log_probs += log_probs if is_proven else [float("nan")] * length
        take.early, take.cut = float(columns["early"][index]), bool(flags & _CUT)
        if self._sights is not None:
            take.sights += [self._next_sight(spaces.sights) for _ in range(length)]
            if flags & _FINAL:
                take.final = self._next_sight(spaces.sights)
        self._act += length
        return Part(take, tuple(self._drawn(number) for number in range(place.start, place.stop)))

    def require_end(self) -> None:
        """Check that nothing is left over."""
        if self._sights is not None and self._sight != len(self._sights):
            raise ProtocolError("a shard has more sights than its takes saw; refuse it")
        if self._token != len(self._columns.get("tokens", ())):
            raise ProtocolError("a shard has more tokens than its acts; refuse it")

    def _next_sight(self, space: SightSpace) -> Any:
        if self._sights is None or self._sight >= len(self._sights):
            raise ProtocolError("a shard has fewer sights than its takes saw; refuse it")
        raw = self._sights[self._sight]
        self._sight += 1
        try:
            return read_sight(space, _text(raw) if isinstance(space, Text) else _floats(raw))
        except BadPlayError as error:
            raise ProtocolError(f"a shard shows what no game may: {error}; refuse it") from error

    def _drawn(self, act: int) -> Drawn | None:
        if "tokens" not in self._columns:
            return None
        count = int(self._columns["token_counts"][act])
        end = self._token + count
        if count < 0 or end > len(self._columns["tokens"]):
            raise ProtocolError("a shard has fewer tokens than its acts say; refuse it")
        place = slice(self._token, end)
        self._token = end
        return Drawn(self._columns["tokens"][place], self._columns["draws"][place]) if count else None


def _flags(take: Take) -> int:
    return _CUT * take.cut | _PROVEN * take.proven | _FINAL * (take.final is not None)


def _joined(parts: Sequence[bytes]) -> tuple[Array, Array]:
    """Byte strings one after the other, and where each ends."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    if len(ends) and ends[-1] >= 2**31:
        raise UsageError("these plays are more than 2 GiB; make several shards of them")
    return np.frombuffer(b"".join(parts), np.uint8), ends.astype(np.int32)


def _parted(joined: Array, ends: Array) -> list[bytes]:
    """The inverse of `_joined`, of anybody's."""
    places = [0, *ends.tolist()]
    if places != sorted(places) or places[-1] != len(joined):
        raise ProtocolError("a shard's parts do not end where they should; refuse it")
    raw = joined.tobytes()
    return [raw[start:end] for start, end in itertools.pairwise(places)]


def _act_bytes(act: Any) -> bytes:
    if isinstance(act, str):
        return act.encode()
    if isinstance(act, np.ndarray):
        return act.astype(_FLOAT).tobytes()
    return int(act).to_bytes(4, "little", signed=True)


def _read_act(space: ActSpace, raw: bytes) -> Act:
    try:
        if isinstance(space, Text):
            return read_act(space, _text(raw), None)
        if len(raw) == _INT.itemsize and isinstance(space, Discrete):
            return read_act(space, int.from_bytes(raw, "little", signed=True), None)
        return read_act(space, _floats(raw), None)
    except BadActError as error:
        raise ProtocolError(f"a shard acts as no role can: {error}; refuse it") from error


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a shard's text is not UTF-8; refuse it") from error


def _floats(raw: bytes) -> Array:
    if len(raw) % _FLOAT.itemsize:
        raise ProtocolError("a shard's numbers are cut in the middle; refuse it")
    return np.frombuffer(raw, _FLOAT).astype(np.float32)


def _scenario_bytes(scenario: Scenario) -> bytes:
    acts = tuple(act.astype(_FLOAT).tobytes() if isinstance(act, np.ndarray) else act for act in scenario.acts)
    return encode(_Scenario(scenario.seed, dict(scenario.params), acts, scenario.max_turns, scenario.tag))


def _read_scenario(raw: bytes) -> Scenario:
    plain = decode(_Scenario, raw, max_bytes=MAX_SCENARIO_BYTES, strict=True)
    acts: list[Act] = []
    for act in plain.acts:
        if isinstance(act, bool) or not isinstance(act, int | str | bytes):
            raise ProtocolError("a scenario has acts that are neither numbers nor texts; refuse the shard")
        acts.append(_floats(act) if isinstance(act, bytes) else act)
    try:
        return Scenario(plain.seed, plain.params, tuple(acts), plain.max_turns, plain.tag)
    except UsageError as error:
        raise ProtocolError(f"a shard's scenario cannot be: {error}; refuse it") from error
