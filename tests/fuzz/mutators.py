"""Mutations that keep the shape of what they mutate, so that the fuzzer gets past the first check.

Two shapes cover all that Shoal reads. *Packed* is MessagePack: it is unpacked, one place in it is changed, and it is
packed again; byte strings inside it are tried as MessagePack too, as signed payloads are. *Steps* are how a target with
state writes down what happens: a list of (what, with which bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import msgpack

from shoal.protocol.ids import Cid
from shoal.protocol.signing import Signer

from .harness import MutateBytes

Step = tuple[int, bytes]

MAX_STEPS: Final = 64

_STEP: Final = struct.Struct("!BH")

_PLACES: Final = 2000
"""So many places of a packed value are looked at."""

_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, b"", "", [], {}, {"": None}, [[]]),
    *(0, 1, -1, 2, 16, 17, 127, 128, 255, 256, 257, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 1),
    *(-(2**31), -(2**63), 0.0, -0.0, 0.5, 1e300, 1e309, float("-inf"), float("nan")),
    *("\0", "\n", "\x1b[2J", "\u202e", "é鱼😀", "a" * 97, "a/b", "..", "1" * 70, b"\xff", bytes(32), bytes(64)),
    *(str(Cid.of_block(b"")), str(Cid.of_manifest(b"")), str(Signer(b"a" * 32).peer_id)),
    msgpack.Timestamp(0, 1),
    msgpack.ExtType(5, b"x"),
)


def mutate_packed(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change one place of a MessagePack value; bytes that are none are mutated as bytes.

    Now and then, let it be followed by arrays within arrays that claim to be longer than they are.
    """
    if rng.random() < 0.01:
        return data[: rng.randrange(len(data) + 1)][: max_bytes // 4] + _claims(max_bytes // 2, rng)
    try:
        plain = msgpack.unpackb(data, raw=False, strict_map_key=False, unicode_errors="surrogateescape")
        plain = mutate_plain(plain, rng, mutate_bytes)
        changed: bytes = msgpack.packb(plain, use_bin_type=True, unicode_errors="surrogateescape")
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return mutate_bytes(data, max_bytes)
    return changed if len(changed) <= max_bytes else mutate_bytes(data, max_bytes)


def mutate_plain(value: Any, rng: Random, mutate_bytes: MutateBytes) -> Any:
    """Change one place of plain data; it is changed itself, where it is a list or a map."""
    root = [value]
    _mutate_place(root, rng, mutate_bytes)
    return root[0]


def _mutate_place(root: list[Any], rng: Random, mutate_bytes: MutateBytes) -> None:
    places: list[tuple[Any, Any]] = [(root, 0)]
    for container, key in places:
        inner = container[key]
        if isinstance(inner, dict | list) and len(places) < _PLACES:
            places += [(inner, place) for place in (inner if isinstance(inner, dict) else range(len(inner)))]
    container, key = rng.choice(places)
    other, other_key = rng.choice(places)
    value = container[key]
    match rng.randrange(9):
        case 0 | 1:
            container[key] = rng.choice(_VALUES)
        case 2 | 3 | 4:
            container[key] = _tweaked(value, rng, mutate_bytes)
        case 5:
            container[key] = [value] * rng.choice((1, 2, 3, 40))
        case 6:
            container[key] = other[other_key] if not isinstance(other[other_key], dict | list) else None
        case 7 if container is not root:
            del container[key]
        case _ if isinstance(container, dict):
            container[rng.choice(_VALUES[-4:-1]) if rng.random() < 0.3 else f"{key}"[: rng.randrange(9)]] = value
        case _ if container is not root:
            container.insert(rng.randrange(len(container) + 1), value)


def _claims(max_bytes: int, rng: Random) -> bytes:
    length = rng.choice((16, 1000, max_bytes))
    return (b"\xdd" + length.to_bytes(4, "big")) * min(rng.choice((2, 40, 400)), max_bytes // 5)


def _tweaked(value: Any, rng: Random, mutate_bytes: MutateBytes) -> Any:
    match value:
        case bool() | None:
            return rng.choice(_VALUES)
        case int():
            number = rng.choice((value + 1, value - 1, -value, value * 2, rng.getrandbits(64)))
            return max(-(2**63), min(2**64 - 1, number))
        case float():
            return rng.choice((-value, value * 1e300, int(value) if abs(value) < 2**63 else 0, float("nan")))
        case bytes() if rng.random() < 0.7:
            return mutate_packed(value, len(value) + 64, rng, mutate_bytes)
        case bytes():
            return mutate_bytes(value, len(value) + 64)
        case str():
            return mutate_bytes(value.encode(errors="surrogateescape"), len(value) * 4 + 16).decode(errors="replace")
        case list():
            rng.shuffle(value)
            return value
        case dict():
            return dict(reversed(value.items()))
    return value


def pack_steps(steps: Sequence[Step]) -> bytes:
    """The steps as one input."""
    return b"".join(_STEP.pack(what, len(with_bytes)) + with_bytes for what, with_bytes in steps)


def read_steps(data: bytes) -> list[Step]:
    """The steps of an input; every input is some steps, at most `MAX_STEPS`."""
    steps: list[Step] = []
    at = 0
    while at + _STEP.size <= len(data) and len(steps) < MAX_STEPS:
        what, length = _STEP.unpack_from(data, at)
        at += _STEP.size
        steps.append((what, data[at : at + length]))
        at += length
    return steps


def mutate_steps(
    data: bytes,
    max_bytes: int,
    rng: Random,
    mutate_bytes: MutateBytes,
    mutate_step: Callable[[Step], Step],
) -> bytes:
    """Repeat, drop, move or change one step; now and then, any bytes."""
    steps = read_steps(data)
    if not steps or rng.random() < 0.1:
        return mutate_bytes(data, max_bytes)
    at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
    match rng.randrange(8):
        case 0:
            steps.insert(other, steps[at])
        case 1:
            del steps[at]
        case 2:
            steps[at], steps[other] = steps[other], steps[at]
        case 3:
            steps[at] = rng.randrange(16), steps[at][1]
        case _:
            what, with_bytes = mutate_step(steps[at])
            steps[at] = what, with_bytes[: 2**16 - 1]
    changed = pack_steps(steps)
    return changed if len(changed) <= max_bytes else mutate_bytes(data, max_bytes)
