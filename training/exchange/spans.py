"""How a flat float32 array is cut into parts, written by a codec, and how the parts of several become one.

Every part has the same number of values but the last, and takes the same number of bytes at every member, so that a
part is a range of bytes of what a member offers. NumPy alone; the values of equal bytes are equal on every machine, and
so is what is reduced of them: sums go over the members in order, one elementwise float32 operation after the other.

Bounds, for members' values x and weights w that sum to 1: a reduced value differs from the exact mean by at most
(N + 1) 2⁻²⁴ sum(w |x|) for fp32; a codec's own error comes on top, once for what each member offers and once for the
result (`shoal.protocol.tensors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import (
    DEFAULT_BLOCK_SIZE,
    Tensor,
    TensorCodec,
    decode_tensor_into,
    encode_tensor,
    encoded_num_bytes,
)

Floats = npt.NDArray[np.float32]
Buffer = bytes | bytearray | memoryview

PART_NUMEL: Final = 512 * 1024
"""Values of a part: 2 MiB of float32, which a link of 100 Mbit/s carries in 0.17 s."""
CHUNK: Final = 32 * 1024
"""Values that are summed at a time, which stay in the processor's cache."""
FIXED: Final = (TensorCodec.FP32, TensorCodec.FP16, TensorCodec.BF16, TensorCodec.INT8, TensorCodec.INT4)


@dataclass(frozen=True, slots=True)
class Spans:
    """The layout of an array of ``numel`` values.

    Attributes:
        numel: values in all.
        codec: how they are written; one whose size does not depend on the values.
        part_numel: values of a part.
    """

    numel: int
    codec: TensorCodec = TensorCodec.FP32
    part_numel: int = PART_NUMEL

    def __post_init__(self) -> None:
        if self.numel < 1 or self.part_numel < 1 or self.part_numel % DEFAULT_BLOCK_SIZE:
            raise UsageError(f"an array of {self.numel} values is not cut into parts of {self.part_numel}")
        if self.codec not in FIXED:
            raise UsageError(f"an all-reduce takes a codec of {', '.join(FIXED)}, not {self.codec}")

    @property
    def num_parts(self) -> int:
        """How many there are."""
        return -(-self.numel // self.part_numel)

    def values(self, part: int) -> slice:
        """Which values a part has."""
        return slice(part * self.part_numel, min((part + 1) * self.part_numel, self.numel))

    def place(self, part: int) -> slice:
        """Which bytes of what is offered it takes."""
        start = part * self._bytes_of(self.part_numel)
        return slice(start, start + self._bytes_of(self.count(part)))

    @property
    def num_bytes(self) -> int:
        """Of the whole, written."""
        last = self.num_parts - 1
        return last * self._bytes_of(self.part_numel) + self._bytes_of(self.count(last))

    def encode(self, array: Floats) -> memoryview:
        """Write an array; for fp32 a view of it, which is to stay as it is."""
        if array.dtype != np.float32 or array.shape != (self.numel,):
            raise UsageError(f"an array of {self.numel} float32 is to be reduced, not {array.dtype}{list(array.shape)}")
        if self.codec is TensorCodec.FP32:
            return np.ascontiguousarray(array).view(np.uint8).data
        data = memoryview(bytearray(self.num_bytes))
        for part in range(self.num_parts):
            self._write(array[self.values(part)], data[self.place(part)])
        return data

    def decode(self, data: Buffer) -> Floats:
        """The array of what was written; for fp32 a view.

        Raises:
            ProtocolError: if a part cannot be what the codec wrote.
        """
        if self.codec is TensorCodec.FP32:
            return np.frombuffer(data, np.float32)
        array = np.empty(self.numel, np.float32)
        view = memoryview(data)
        for part in range(self.num_parts):
            self._read(part, view[self.place(part)], array[self.values(part)])
        return array

    def decode_part(self, part: int, data: memoryview) -> Floats:
        """The values of one part; for fp32 a view.

        Raises:
            ProtocolError: if they cannot be what the codec wrote.
        """
        if len(data) != self._bytes_of(self.count(part)):
            raise ProtocolError(f"part {part} has {len(data)} bytes, not {self._bytes_of(self.count(part))}")
        if self.codec is TensorCodec.FP32:
            return np.frombuffer(data, np.float32)
        values = np.empty(self.count(part), np.float32)
        self._read(part, data, values)
        return values

    def write_part(self, part: int, values: Floats, out: memoryview) -> None:
        """Write the values of one part to where they belong, ``out``."""
        self._write(values, out)

    def reduce(self, part: int, given: Sequence[Buffer], weights: Sequence[float], out: memoryview) -> list[int]:
        """Write the weighted mean of one part.

        Args:
            part: which.
            given: what each member's bytes of it are, in order.
            weights: of each, positive.
            out: where the result goes; of the same length.

        Returns:
            Indices of those that are in it: all.

        Raises:
            ProtocolError: if one cannot be what the codec wrote.
        """
        total = float(sum(weights))
        shares = [np.float32(weight / total) for weight in weights]
        columns = [self.decode_part(part, memoryview(data)) for data in given]
        if self.codec is TensorCodec.FP32:
            _weighted_sum(columns, shares, np.frombuffer(out, np.float32))
        else:
            result = np.empty(self.count(part), np.float32)
            _weighted_sum(columns, shares, result)
            self._write(result, out)
        return list(range(len(given)))

    def count(self, part: int) -> int:
        """How many values a part has."""
        return min(self.part_numel, self.numel - part * self.part_numel)

    def _bytes_of(self, count: int) -> int:
        return encoded_num_bytes((count,), "float32", self.codec)

    def _write(self, values: Floats, out: memoryview) -> None:
        tensor = encode_tensor(values, self.codec)
        start = 0
        for piece in tensor.parts:
            view = memoryview(piece).cast("B")
            out[start : start + len(view)] = view
            start += len(view)

    def _read(self, part: int, data: memoryview, out: Floats) -> None:
        count = self.count(part)
        pieces: tuple[memoryview, ...] = (data,)
        if self.codec in (TensorCodec.INT8, TensorCodec.INT4):
            scales = 4 * -(-count // DEFAULT_BLOCK_SIZE)
            pieces = data[:scales], data[scales:]
        block_size = DEFAULT_BLOCK_SIZE if len(pieces) > 1 else 0
        decode_tensor_into(Tensor("float32", (count,), self.codec, block_size, pieces), out)


def _weighted_sum(columns: Sequence[Floats], shares: Sequence[np.float32], out: Floats) -> None:
    scratch = np.empty(min(CHUNK, len(out)), np.float32)
    for start in range(0, len(out), CHUNK):
        into = out[start : start + CHUNK]
        np.multiply(columns[0][start : start + CHUNK], shares[0], out=into)
        for column, share in zip(columns[1:], shares[1:], strict=True):
            piece = scratch[: len(into)]
            np.multiply(column[start : start + CHUNK], share, out=piece)
            into += piece
