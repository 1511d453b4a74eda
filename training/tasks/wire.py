"""Takes and acts on their way between nodes that play together: what an actor sees, and what it does.

MessagePack of plain data; numbers are little-endian float32. What comes from another node is held to the role's spaces,
as what a game yields is, and bounded before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.training.tasks.cast import Seat
from shoal.training.tasks.play import (
    Act,
    ActSpace,
    BadActError,
    BadPlayError,
    Role,
    Take,
    check_legal,
    read_act,
    read_sight,
)
from shoal.training.tasks.source import Scenario

MAX_BYTES: Final = 4 * 1024 * 1024
"""Of all takes of one question, or of all acts of one answer."""
MAX_TAKES: Final = 256


@dataclass(frozen=True, slots=True)
class _Take:
    role: str
    seed: int
    tag: str
    sights: tuple[Any, ...]  # bytes or text
    acts: tuple[Any, ...]  # bytes, text or a number
    legal: bytes | None
    max_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Takes:
    takes: tuple[_Take, ...]


@dataclass(frozen=True, slots=True)
class _Acts:
    acts: tuple[Any, ...]  # likewise


def encode_takes(takes: Sequence[Take]) -> bytes:
    """Takes that wait for acts.

    Raises:
        UsageError: if they are too many or too large for one question.
    """
    plain = tuple(
        _Take(
            take.role,
            take.scenario.seed,
            take.scenario.tag,
            tuple(_out(sight) for sight in take.sights),
            tuple(_out(act) for act in take.acts),
            None if take.asked_legal is None else take.asked_legal.tobytes(),
            take.max_tokens,
        )
        for take in takes
    )
    data = encode(_Takes(plain))
    if len(takes) > MAX_TAKES or len(data) > MAX_BYTES:
        raise UsageError(f"{len(takes)} takes of {len(data)} bytes are too much for one question; play fewer at once")
    return data


def decode_takes(data: bytes | memoryview, roles: Mapping[str, Role], seat: Seat) -> tuple[Take, ...]:
    """Takes from another node, to be answered by what sits in ``seat``.

    Raises:
        ProtocolError: if they are none of this game, or none that wait for an act.
    """
    said = _read(_Takes, data).takes
    if len(said) > MAX_TAKES:
        raise ProtocolError(f"{len(said)} takes are too many for one question")
    takes = []
    for number, each in enumerate(said):
        if each.role not in roles:
            raise ProtocolError(f"this game has no role {each.role[:80]!r}")
        role = roles[each.role]
        if len(each.sights) != len(each.acts) + 1:
            raise ProtocolError(f"take {number} waits for no act")
        try:
            take = Take(each.role, role, seat, Scenario(each.seed, tag=each.tag), number, proven=False)
            take.sights = [read_sight(role.sights, _in(sight)) for sight in each.sights]
            take.acts = [read_act(role.acts, _in(act), None) for act in each.acts]
            if each.legal is not None:
                legal = np.frombuffer(each.legal, np.bool_)
                check_legal(role.acts, legal)
                take.legal = [None] * len(each.acts) + [legal]
        except (BadPlayError, BadActError, UsageError) as error:
            raise ProtocolError(f"take {number} cannot be of this game: {error}") from error
        take.max_tokens = each.max_tokens
        takes.append(take)
    return tuple(takes)


def encode_acts(acts: Sequence[Act | None]) -> bytes:
    """The answer to as many takes; None where there is none."""
    return encode(_Acts(tuple(None if act is None else _out(act) for act in acts)))


def decode_acts(data: bytes | memoryview, spaces: Sequence[ActSpace]) -> tuple[Act | None, ...]:
    """Acts from another node, or None for those that are left out. Whether they are legal now, the stage sees.

    Raises:
        ProtocolError: if they are not one for each take, of its space.
    """
    said = _read(_Acts, data).acts
    if len(said) != len(spaces):
        raise ProtocolError(f"{len(said)} acts answer {len(spaces)} takes")
    try:
        return tuple(
            None if act is None else read_act(space, _in(act), None) for space, act in zip(spaces, said, strict=True)
        )
    except BadActError as error:
        raise ProtocolError(f"an answer is no act: {error}") from error


def count_acts(data: bytes | memoryview, num_takes: int) -> int:
    """How many of so many takes an answer has acts for; whether these are acts of the game, `decode_acts` sees.

    Raises:
        ProtocolError: if it is no answer to so many.
    """
    said = _read(_Acts, data).acts
    if len(said) != num_takes:
        raise ProtocolError(f"{len(said)} acts answer {num_takes} takes")
    return sum(act is not None for act in said)


def _read(kind: type[Any], data: bytes | memoryview) -> Any:
    try:
        return decode(kind, data, max_bytes=MAX_BYTES, strict=True)
    except LimitError as error:
        raise ProtocolError(f"what another node sent is too much: {error}") from error


def _out(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<f4").tobytes()
    return value if isinstance(value, str) else int(value)


def _in(value: Any) -> Any:
    """As it was; a number of bytes that is none of float32 is refused by whoever reads it."""
    if not isinstance(value, bytes):
        return value
    return np.frombuffer(value, "<f4") if len(value) % 4 == 0 else np.zeros(0, np.float32)
