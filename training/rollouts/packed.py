"""Columns of numbers as few bytes, and back, at a cost that is known before anything is unpacked.

A column is an array. All columns of a thing lie one after the other in one *body*, which is compressed as one zstd
frame (RFC 8878). Bytes of equal weight lie side by side (all first bytes of a column's numbers, then all second ones),
which HDF5 and Blosc call a shuffle filter: exponents of neighbours are alike and mantissas are not, and a compressor
that sees them mixed finds neither.

What is unpacked came from anybody. Its columns say how long they are (`Column`), so the body's length is known; the
frame says it as well, and both must agree before a byte is decompressed. Nobody makes room for more than
`FREE_BYTES`, or `MAX_EXPANSION` times what was sent. The decompressor writes no further than that and reads one frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = Mapping[str, Array]

MAX_EXPANSION: Final = 256
"""How many times longer than what was sent a body may be."""
FREE_BYTES: Final = 1024 * 1024
"""A body may be so long however few bytes were sent."""
MAX_COLUMNS: Final = 32
MAX_DIMENSIONS: Final = 3
MAX_NAME_CHARS: Final = 32
_LEVEL: Final = 3

DTYPES: Final = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "uint8", "uint16", "uint32", "int32", "int64", "float32")
}
"""What columns may hold, by name."""


@dataclass(frozen=True, slots=True)
class Column:
    """What is said of a column before it is there.

    Attributes:
        name: by which it is asked for.
        dtype: one of `DTYPES`.
        shape: at most `MAX_DIMENSIONS` lengths.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME_CHARS or not self.name.isascii() or not self.name.isprintable():
            raise ProtocolError(f"a column's name has 1 to {MAX_NAME_CHARS} printable ASCII characters; rename it")
        if self.dtype not in DTYPES:
            raise ProtocolError(f"a column holds {', '.join(DTYPES)}, not {self.dtype[:40]!r}; convert it")
        if len(self.shape) > MAX_DIMENSIONS or any(not 0 <= length < 2**40 for length in self.shape):
            raise ProtocolError(f"a column has at most {MAX_DIMENSIONS} dimensions of 0 or more; reshape it")

    @property
    def num_bytes(self) -> int:
        """Unpacked."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def describe(columns: Columns) -> tuple[Column, ...]:
    """What is to be said of columns, in the order in which `write_body` takes them.

    Raises:
        UsageError: if one cannot be a column.
    """
    if len(columns) > MAX_COLUMNS:
        raise UsageError(f"{len(columns)} columns are more than {MAX_COLUMNS}; join some")
    try:
        return tuple(Column(name, columns[name].dtype.name, columns[name].shape) for name in sorted(columns))
    except ProtocolError as error:
        raise UsageError(str(error)) from error


def write_body(columns: Columns) -> bytes:
    """All columns as one compressed body; the same bytes for the same columns and the same zstd.

    Raises:
        UsageError: if one cannot be a column.
    """
    parts = [_planes(columns[each.name], DTYPES[each.dtype]) for each in describe(columns)]
    return compress(b"".join(parts))


def read_body(described: Sequence[Column], body: bytes | memoryview, *, max_bytes: int) -> dict[str, Array]:
    """The columns of a body.

    Args:
        described: what is said of them, by anybody.
        body: the compressed bytes, likewise.
        max_bytes: that they may take unpacked, all together; as much again is used while they are read.

    Returns:
        Arrays of one's own, in native byte order, read-only.

    Raises:
        LimitError: if they would take more.
        ProtocolError: if the body does not hold what is said of it.
    """
    size = body_bytes(described)
    plain = decompress(body, size, max_bytes=max_bytes)
    found: dict[str, Array] = {}
    start = 0
    for each in described:
        found[each.name] = _from_planes(plain[start : start + each.num_bytes], each)
        start += each.num_bytes
    return found


def body_bytes(described: Sequence[Column]) -> int:
    """How long the body of such columns is, unpacked.

    Raises:
        ProtocolError: if nobody writes such columns.
    """
    names = [each.name for each in described]
    if len(names) > MAX_COLUMNS:
        raise LimitError(f"{len(names)} columns exceed the limit of {MAX_COLUMNS}; take another shard")
    if names != sorted(set(names)):
        raise ProtocolError("columns are named once each, in the order of their names; take another shard")
    return sum(each.num_bytes for each in described)


def compress(plain: bytes | memoryview, level: int = _LEVEL) -> bytes:
    """One zstd frame that says how long it will be.

    Bytes that would shrink beyond `MAX_EXPANSION` (of nothing but zeros, say) follow an empty frame of the kind that
    decoders skip, so that nobody has to take a bomb for a shard.
    """
    frame: bytes = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(bytes(plain))
    if len(plain) <= FREE_BYTES or len(plain) <= MAX_EXPANSION * len(frame):
        return frame
    missing = -(-len(plain) // MAX_EXPANSION) - len(frame)
    return _skipped(max(0, missing - _SKIPPED_HEADER)) + frame


_SKIPPABLE: Final = b"\x50\x2a\x4d\x18"
_SKIPPED_HEADER: Final = 8


def _skipped(num_bytes: int) -> bytes:
    return _SKIPPABLE + num_bytes.to_bytes(4, "little") + bytes(num_bytes)


def decompress(packed: bytes | memoryview, size: int, *, max_bytes: int) -> memoryview:
    """What one zstd frame holds, if that is ``size`` bytes.

    Raises:
        LimitError: if that is more than ``max_bytes``, or out of proportion to what was sent. Nothing is unpacked.
        ProtocolError: if the frame is none, is longer or shorter than ``size``, or more follows it.
    """
    if size > max_bytes:
        raise LimitError(f"{size} bytes unpacked exceed the limit of {max_bytes}; ask for a smaller one")
    if size > max(FREE_BYTES, MAX_EXPANSION * len(packed)):
        raise LimitError(
            f"{size} bytes, compressed to {len(packed)}, exceed {MAX_EXPANSION} times as many; refuse them"
        )
    frame = memoryview(packed)
    if len(frame) >= _SKIPPED_HEADER and bytes(frame[:4]) == _SKIPPABLE:
        frame = frame[_SKIPPED_HEADER + int.from_bytes(frame[4:8], "little") :]
    try:
        says = zstandard.frame_content_size(frame)
        if says != size:
            raise ProtocolError(f"a body of {size} bytes is said to have {says}; fetch it from another peer")
        plain: bytes = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=max(1, size), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ProtocolError(f"compressed bytes cannot be read ({error}); fetch them from another peer") from error
    if len(plain) != size:
        raise ProtocolError(f"a body of {size} bytes has {len(plain)}; fetch it from another peer")
    return memoryview(plain)


def _planes(array: Array, dtype: np.dtype[Any]) -> bytes:
    """The first bytes of all numbers, then all second ones, and so on."""
    numbers = np.ascontiguousarray(array, dtype)
    if dtype.itemsize == 1:
        return numbers.tobytes()
    return numbers.reshape(-1).view(np.uint8).reshape(-1, dtype.itemsize).T.tobytes()


def _from_planes(plain: memoryview, column: Column) -> Array:
    dtype = DTYPES[column.dtype]
    planes = np.frombuffer(plain, np.uint8)
    if column.dtype == "bool" and planes.size and planes.max() > 1:
        raise ProtocolError(f"{column.name!r} holds what is neither true nor false; take another shard")
    if dtype.itemsize > 1:
        planes = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1)
    array = planes.view(dtype).reshape(column.shape).astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array


def check_room(num_bytes: int, max_bytes: int, noun: str) -> None:
    """Check that what this side is about to send may be sent.

    Raises:
        TooLargeError: if not.
    """
    if num_bytes > max_bytes:
        raise TooLargeError(f"a {noun} of {num_bytes} bytes exceeds the limit of {max_bytes}; make it of fewer steps")
