"""How large arrays of one contribution lie one after the other, each cut into parts, and what a part must be like.

A contribution whose arrays are small is fetched whole by everybody, who merges it himself. What is large of one is
reduced part by part instead (`shoal.training.exchange.allreduce`): its author offers the SHA-256 of every part, which
so stand in what it signed, and whoever owns a part pulls it from everybody. Large arrays travel as the difference from
their centre, which everybody has, so that a part can be judged and reduced by one that knows no centres.

Reducing is a function of the parts and their authors' weights, to the bit, on any machine: what an owner says came of
them can be done again by anybody. NumPy alone, as in `shoal.training.exchange.spans`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import TensorCodec
from shoal.training.exchange.aggregators import aggregate
from shoal.training.exchange.rules import ROUNDING, Aggregator, Codec, assumed_liars
from shoal.training.exchange.spans import PART_NUMEL, Buffer, Floats, Spans

LARGE_NUMEL: Final = 1024 * 1024
"""From so many values on, in all float arrays together, a contribution is reduced part by part: 4 MiB of float32.
Below, everybody fetches everything, and trusts nobody to reduce."""
ALIGN: Final = 64
"""Bytes; where an array begins."""
HASH_BYTES: Final = 32
MAX_SEGMENTS: Final = 1024
MAX_MAGNITUDE: Final = 1e30
FIXED: Final = {
    Codec.FP32: TensorCodec.FP32,
    Codec.BF16: TensorCodec.BF16,
    Codec.INT8: TensorCodec.INT8,
    Codec.INT4: TensorCodec.INT4,
}
"""Codecs whose size does not depend on the values; what travels by another one is small."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One array.

    Attributes:
        name: of the array, as `shoal.training.exchange.averager` has it.
        numel: values, float32.
        codec: how they are written.
        bound: the largest magnitude that an honest one can hold.
    """

    name: str
    numel: int
    codec: TensorCodec
    bound: float


@dataclass(frozen=True)
class Layout:
    """Arrays one after the other. Parts are numbered through; so are bytes.

    Attributes:
        segments: in order.
        aggregator: by which rule parts become one.
        part_numel: values of a part.
    """

    segments: tuple[Segment, ...]
    aggregator: Aggregator = field(default_factory=Aggregator)
    part_numel: int = PART_NUMEL

    def __post_init__(self) -> None:
        if not 1 <= len(self.segments) <= MAX_SEGMENTS:
            raise UsageError(f"{len(self.segments)} arrays are not reduced part by part")

    @cached_property
    def _spans(self) -> tuple[Spans, ...]:
        return tuple(Spans(each.numel, each.codec, self.part_numel) for each in self.segments)

    @cached_property
    def _first_parts(self) -> list[int]:
        return [0, *accumulate(each.num_parts for each in self._spans)]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(-(-each.num_bytes // ALIGN) * ALIGN for each in self._spans)]

    @property
    def num_parts(self) -> int:
        """Of all arrays."""
        return self._first_parts[-1]

    @property
    def num_bytes(self) -> int:
        """Of all arrays, written."""
        return self._starts[-1]

    def place(self, part: int) -> slice:
        """Which bytes of what is offered a part takes."""
        index, within = self._find(part)
        place = self._spans[index].place(within)
        return slice(self._starts[index] + place.start, self._starts[index] + place.stop)

    def encode(self, arrays: Mapping[str, npt.NDArray[Any]], out: memoryview) -> None:
        """Write arrays of these names and sizes, of any shape.

        Args:
            arrays: float32, by name.
            out: ``num_bytes``.
        """
        for segment, spans, start in zip(self.segments, self._spans, self._starts, strict=False):
            data = spans.encode(arrays[segment.name].reshape(-1))
            out[start : start + spans.num_bytes] = data

    def decode(self, data: memoryview) -> dict[str, Floats]:
        """The arrays of what was written, flat; copies.

        Raises:
            ProtocolError: if a part cannot be what the codec wrote.
        """
        found: dict[str, Floats] = {}
        for segment, spans, start in zip(self.segments, self._spans, self._starts, strict=False):
            found[segment.name] = np.array(spans.decode(data[start : start + spans.num_bytes]))
        return found

    def hashes(self, data: memoryview) -> bytes:
        """SHA-256 of every part, one after the other."""
        return b"".join(hashlib.sha256(data[self.place(part)]).digest() for part in range(self.num_parts))

    def reduce(self, part: int, given: Sequence[Buffer], weights: Sequence[float], out: memoryview) -> list[int]:
        """Reduce one part.

        What no honest member can have offered is left out: bytes that the codec does not write, numbers that are not
        finite or beyond the bound.

        Args:
            part: which.
            given: each member's bytes of it, in the order of the members.
            weights: of each, positive.
            out: where the result goes, as many bytes.

        Returns:
            Indices of those that are in the result. With none, the result is all zeros: nothing changes.
        """
        index, within = self._find(part)
        spans, bound = self._spans[index], min(self.segments[index].bound * ROUNDING, MAX_MAGNITUDE)
        sound: list[int] = []
        rows: list[Floats] = []
        for number, data in enumerate(given):
            try:
                values = spans.decode_part(within, memoryview(data))
            except ProtocolError:
                continue
            if len(values) == 0 or (-bound <= float(values.min()) and float(values.max()) <= bound):  # NaN fails
                sound.append(number)
                rows.append(values)
        have = [weights[number] for number in sound]
        if not rows:
            spans.write_part(within, np.zeros(spans.count(within), np.float32), out)
        elif self.aggregator.is_plain_mean or len(rows) == 1:
            spans.reduce(within, [given[number] for number in sound], have, out)
        else:
            row = aggregate(np.stack(rows), have, self.aggregator, assumed_liars(len(rows)))
            spans.write_part(within, row.astype(np.float32), out)
        return sound

    def _find(self, part: int) -> tuple[int, int]:
        if not 0 <= part < self.num_parts:
            raise UsageError(f"there is no part {part} of {self.num_parts}")
        index = bisect_right(self._first_parts, part) - 1
        return index, part - self._first_parts[index]


def layout_of(
    arrays: Mapping[str, npt.NDArray[Any]], lossy: Mapping[str, float], codec: Codec, aggregator: Aggregator
) -> Layout | None:
    """How the large arrays of contributions of this form are reduced; None if they are small enough to be fetched.

    Args:
        arrays: of that form, by name; their values mean nothing.
        lossy: by name, what travels by the codec, and the largest magnitude of its difference from the centre.
        codec: of the run.
        aggregator: likewise.
    """
    names = [
        name
        for name in sorted(arrays)
        if name.startswith(("mean/", "nonneg/"))
        and arrays[name].dtype == np.float32
        and arrays[name].ndim > 0
        and (name not in lossy or codec in FIXED)
    ]
    if sum(arrays[name].size for name in names) < LARGE_NUMEL:
        return None
    return Layout(
        tuple(
            Segment(
                name,
                arrays[name].size,
                FIXED[codec] if name in lossy else TensorCodec.FP32,
                lossy.get(name, MAX_MAGNITUDE),
            )
            for name in names
            if arrays[name].size
        ),
        aggregator,
    )


def hashes_of(num_parts: int, content: bytes | memoryview) -> tuple[bytes, ...] | None:
    """What the content of a contribution says of its parts; None if it cannot be one."""
    end = num_parts * HASH_BYTES
    if len(content) < end:
        return None
    return tuple(bytes(content[start : start + HASH_BYTES]) for start in range(0, end, HASH_BYTES))
