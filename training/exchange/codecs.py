"""What the floats of a contribution travel as: all of them, or less, with what was lost made up for in the next.

==========  ==========================================================================================  ==============
codec       what travels                                                                                times smaller
==========  ==========================================================================================  ==============
``fp32``    the arrays as they are                                                                                   1
``bf16``    the upper half of each float32                                                                           2
``int8``    codes of 8 bits, a scale per 256 values                                                                3.9
``int4``    codes of 4 bits, likewise                                                                              7.8
``int2``    of each value its sign and whether it is a small or a large one; both sizes per 256 values            15.1
``topk``    of every 4,096 values the 64 largest: where, and as ``int2``                                           195
==========  ==========================================================================================  ==============

bf16, int8 and int4 are those of `shoal.protocol.tensors`. The two sizes of int2 are the mean magnitudes of what is
below and above the threshold that is best for normal values (Lloyd and Max: 0.98 deviations), without their lower half
of a float32's bits, so a decoded value is never larger than the largest of its block, and what is lost never more than
what was there. topk is SparseLoCo's form
(arXiv 2508.15706: 1.56 % of chunks of 4,096, 2 bits, error feedback that decays by 0.95); positions are written as
Elias and Fano do, 8 bits each instead of 12.

Only the arrays that an algorithm names as ``lossy`` are made smaller: what changes little by little, and is better
a little wrong than late. They travel as the difference from their *centre*, which everybody has, or as they are where
there is none. The rest travels exactly.

**Error feedback** (Seide et al., Interspeech 2014; arXiv 1901.09847): what a codec loses is kept by the sender and
added to its next contribution, so that in the sum nothing is lost. It is the sender's alone: `Sender.memory`, no part
of the state that peers share, and gone with its process, at the cost of one loss. What was sent and not merged was not
sent.

Everybody merges what it decodes from the same bytes, the sender too. Decoding is look-ups and elementwise float32
operations, so all get the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import DEFAULT_BLOCK_SIZE, Tensor, TensorCodec, decode_tensor, encode_tensor
from shoal.training.exchange.averager import Arrays
from shoal.training.exchange.rules import Codec
from shoal.training.state import decode_arrays, encode_arrays

_Array: TypeAlias = npt.NDArray[Any]
_Floats: TypeAlias = npt.NDArray[np.float32]
_Parts: TypeAlias = tuple[_Array, ...]

_BLOCK: Final = DEFAULT_BLOCK_SIZE
_CHUNK: Final = 4096
_KEPT: Final = 64  # of a chunk; with as many positions per high part, Elias and Fano's form is of fixed size
_THRESHOLD: Final = 0.98
_DECAY: Final = {Codec.TOPK: 0.95}
_TENSOR_CODECS: Final = {Codec.BF16: TensorCodec.BF16, Codec.INT8: TensorCodec.INT8, Codec.INT4: TensorCodec.INT4}
_MARK: Final = "packed/"


@dataclass(slots=True)
class Sender:
    """One peer's side of a codec: what it has lost so far.

    Attributes:
        codec: of the next contribution. What one of another codec lost is made up for all the same.
        memory: by name, what was lost and not made up for. May be kept, and given to the next life of this peer.
    """

    codec: Codec
    memory: dict[str, _Array] = field(default_factory=dict)
    _after: dict[str, _Array | None] = field(default_factory=dict)

    def encode(self, arrays: Mapping[str, _Array], lossy: Mapping[str, float], centres: Mapping[str, _Array]) -> bytes:
        """A contribution as bytes. Its loss counts once `settle` says that it arrived.

        Args:
            arrays: float32 or float64 where they are lossy.
            lossy: by name, which may be made smaller, and the largest magnitude that their difference from the centre
                may have; what a memory adds beyond it is dropped.
            centres: by name, what everybody has of these arrays.
        """
        self._after = {}
        if self.codec is Codec.FP32:
            return encode_arrays({**arrays, **self._repaid(arrays, lossy, centres)}, {})
        sent: Arrays = {}
        for name, array in arrays.items():
            if name not in lossy or not np.isfinite(array).all():  # the latter all others will refuse
                sent[name] = array
                continue
            wanted = self.wanted(name, array, lossy, centres)
            parts = _encode(wanted, self.codec)
            sent |= {f"{_MARK}{name}/{index}": part for index, part in enumerate(parts)}
            self.lose(name, wanted - _decode(parts, self.codec, wanted))
        return encode_arrays(sent, {})

    def wanted(self, name: str, array: _Array, lossy: Mapping[str, float], centres: Mapping[str, _Array]) -> _Array:
        """What is to arrive of a lossy array: its difference from the centre, and what was lost before."""
        wanted: _Array = array - centres[name] if name in centres else array
        if name in self.memory and self.memory[name].shape == wanted.shape:
            wanted = wanted + self.memory[name]
        return np.clip(wanted, -lossy[name], lossy[name]).astype(array.dtype)

    def lose(self, name: str, lost: _Array) -> None:
        """So much of it will not arrive; it counts once `settle` says that the rest did."""
        self._after[name] = (lost * _DECAY.get(self.codec, 1.0)).astype(lost.dtype)

    def repay(self, name: str) -> None:
        """What was lost of it arrives."""
        self._after[name] = None

    def _repaid(
        self, arrays: Mapping[str, _Array], lossy: Mapping[str, float], centres: Mapping[str, _Array]
    ) -> dict[str, _Array]:
        """Arrays that go as they are, with what a codec lost before."""
        repaid = {}
        for name in arrays.keys() & lossy.keys() & self.memory.keys():
            if np.isfinite(arrays[name]).all():
                wanted = self.wanted(name, arrays[name], lossy, centres)
                repaid[name] = wanted + centres[name] if name in centres else wanted
                self.repay(name)
        return repaid

    def settle(self, *, arrived: bool) -> None:
        """Say whether what was encoded last was merged."""
        if arrived:
            after = self.memory | self._after
            self.memory = {name: lost for name, lost in after.items() if lost is not None}
        self._after = {}

    def forget(self) -> None:
        """Drop what was lost: it was lost on the way to a state that is no more."""
        self.memory, self._after = {}, {}


def decode_contribution(
    data: bytes | memoryview,
    codec: Codec,
    lossy: Mapping[str, float],
    centres: Mapping[str, _Array],
    template: Mapping[str, _Array],
) -> Arrays:
    """What a contribution says, from anybody.

    Args:
        data: as `Sender.encode` gives it.
        codec: of the run.
        lossy: as for `Sender.encode`; so are ``centres``.
        centres: as above.
        template: arrays of the names, shapes and dtypes that are to be there.

    Raises:
        ProtocolError: if these bytes are no contribution in this codec. What else is wrong with it, the merge finds.
    """
    arrays: dict[str, _Array] = dict(decode_arrays(data)[0])
    if codec is Codec.FP32:
        return arrays
    said: dict[str, _Array] = {}
    for name in sorted(lossy.keys() & template.keys()):
        parts: list[_Array] = []
        while (part := arrays.pop(f"{_MARK}{name}/{len(parts)}", None)) is not None:
            parts.append(part)
        if not parts:
            raise ProtocolError(f"{name[:80]!r} does not travel as {codec}")
        difference = _decode(tuple(parts), codec, template[name])
        with np.errstate(over="ignore"):
            said[name] = difference + centres[name] if name in centres else difference
    if twice := arrays.keys() & said.keys():
        raise ProtocolError(f"{min(twice)[:80]!r} is to travel as {codec}, and travels as it is")
    return dict(arrays | said)


def packed_bytes(size: int, codec: Codec) -> int:
    """Bytes of all parts of a float32 array of so many values."""
    if codec is Codec.FP32:
        return 4 * size
    return sum(part.nbytes for part in _encode(np.zeros(size, np.float32), codec))


# --- arrays ----------------------------------------------------------------------------------------------------------


def _encode(array: _Array, codec: Codec) -> _Parts:
    """Any shape, as parts that a state can hold."""
    match codec:
        case Codec.FP32:
            return (array,)
        case Codec.BF16 | Codec.INT8 | Codec.INT4:
            parts = encode_tensor(array, _TENSOR_CODECS[codec]).parts
            return tuple(np.frombuffer(part, np.uint8) for part in parts)
        case Codec.INT2:
            return _to_two_levels(_rows(array, _BLOCK), array.size)
        case Codec.TOPK:
            chunks = _rows(array, _CHUNK)
            largest = np.argpartition(np.abs(chunks), _CHUNK - _KEPT, axis=1)[:, _CHUNK - _KEPT :]
            positions = np.sort(largest, axis=1)
            values = np.take_along_axis(chunks, positions, axis=1)
            return (*_to_elias_fano(positions), *_to_two_levels(values, values.size))
        case Codec.AUTO:
            raise UsageError("auto is no codec; the exchange says which one")


def _decode(parts: _Parts, codec: Codec, template: _Array) -> _Array:
    """The inverse of `_encode`, of the dtype and shape of the template.

    Raises:
        ProtocolError: if these parts are no such array.
    """
    size, shape, dtype = template.size, template.shape, template.dtype
    match codec:
        case Codec.FP32:
            return parts[0]
        case Codec.BF16 | Codec.INT8 | Codec.INT4:
            block = 0 if codec is Codec.BF16 else _BLOCK
            data = tuple(_bytes(part).tobytes() for part in parts)
            tensor = Tensor(dtype.name, shape, _TENSOR_CODECS[codec], block, data)
            return decode_tensor(tensor, max_bytes=template.nbytes)
        case Codec.INT2:
            flat = _from_two_levels(parts, -(-size // _BLOCK), _BLOCK).ravel()[:size]
        case Codec.TOPK:
            rows = -(-size // _CHUNK)
            positions = _from_elias_fano(parts[:2], rows)
            chunks = np.zeros((rows, _CHUNK), np.float32)
            np.put_along_axis(chunks, positions, _from_two_levels(parts[2:], rows, _KEPT), axis=1)
            flat = chunks.ravel()[:size]
        case Codec.AUTO:
            raise UsageError("auto is no codec; the exchange says which one")
    return flat.astype(dtype).reshape(shape)


def _rows(array: _Array, width: int) -> _Floats:
    """The values as float32 in rows of so many, zeros after them."""
    rows = np.zeros((-(-array.size // width), width), np.float32)
    rows.ravel()[: array.size] = array.ravel()
    return rows


def _to_two_levels(rows: _Floats, size: int) -> _Parts:
    """Two sizes per row, then the signs and which of the sizes, a bit each; ``size`` values of all rows count."""
    magnitudes = np.abs(rows)
    counts = np.arange(rows.size).reshape(rows.shape) < size
    spread = np.sqrt(
        np.square(magnitudes).sum(axis=1, keepdims=True) / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    )
    is_large = magnitudes > np.float32(_THRESHOLD) * spread
    levels = np.zeros((len(rows), 2), "<f4")
    for level, group in enumerate((counts & ~is_large, is_large)):
        sums = np.where(group, magnitudes, 0).sum(axis=1, dtype=np.float64)
        levels[:, level] = sums / np.maximum(group.sum(axis=1), 1)
    upper = levels.view(np.uint8).reshape(len(rows), 2, 4)[..., 2:].reshape(len(rows), 4)
    return upper, np.packbits(rows < 0, axis=1), np.packbits(is_large, axis=1)


def _from_two_levels(parts: _Parts, rows: int, width: int) -> _Floats:
    upper, *bits = _check_parts(parts, ((np.uint8, (rows, 4)), *([(np.uint8, (rows, width // 8))] * 2)))
    levels = np.pad(upper.reshape(rows, 2, 2), ((0, 0), (0, 0), (2, 0))).reshape(rows, 8).view("<f4")
    if not np.isfinite(levels).all() or (levels < 0).any():
        raise ProtocolError("a size of values in a contribution is negative, NaN or infinite")
    is_negative, is_large = (np.unpackbits(each, axis=1).view(np.bool_) for each in bits)
    values: _Floats = np.where(is_large, levels[:, 1:], levels[:, :1])
    return np.where(is_negative, -values, values)


def _to_elias_fano(positions: _Array) -> _Parts:
    """Ascending positions below 4,096, 64 a row: six low bits each, and the high ones as the gaps between ones."""
    high, low = positions // _KEPT, positions % _KEPT
    ones = np.zeros((len(positions), 2 * _KEPT), np.uint8)
    np.put_along_axis(ones, high + np.arange(_KEPT), 1, axis=1)
    bits = np.unpackbits(low.astype(np.uint8)[..., None], axis=2)[..., 2:]
    return np.packbits(ones, axis=1), np.packbits(bits.reshape(len(positions), -1), axis=1)


def _from_elias_fano(parts: _Parts, rows: int) -> npt.NDArray[np.int64]:
    packed_ones, packed_low = _check_parts(parts, ((np.uint8, (rows, 16)), (np.uint8, (rows, 48))))
    ones = np.unpackbits(packed_ones, axis=1)
    if (ones.sum(axis=1) != _KEPT).any():
        raise ProtocolError(f"a chunk of a contribution does not keep {_KEPT} values")
    high = np.nonzero(ones)[1].reshape(rows, _KEPT) - np.arange(_KEPT)
    low = np.packbits(np.unpackbits(packed_low, axis=1).reshape(rows, _KEPT, 6), axis=2)[..., 0] >> 2
    positions: npt.NDArray[np.int64] = high * _KEPT + low
    if (positions >= _CHUNK).any() or (np.diff(positions, axis=1) <= 0).any():
        raise ProtocolError("the positions in a chunk of a contribution do not ascend from 0 to 4095")
    return positions


def _check_parts(parts: _Parts, expected: tuple[tuple[type, tuple[int, int]], ...]) -> _Parts:
    if [(part.dtype, part.shape) for part in parts] != [(np.dtype(dtype), shape) for dtype, shape in expected]:
        raise ProtocolError("an array of a contribution does not have the parts that its codec gives it")
    return parts


def _bytes(part: _Array) -> _Array:
    if part.dtype != np.uint8 or part.ndim != 1:
        raise ProtocolError("an array of a contribution does not have the parts that its codec gives it")
    return part
