"""Tensors on the wire: an array as a small header and raw attachments, as it is or made smaller.

| codec | what travels, little-endian                             | exact                  | bits per value        |
|-------|---------------------------------------------------------|------------------------|-----------------------|
| raw   | the array's own bytes                                   | yes                    | its own               |
| fp32  | float32                                                 | from float16, float32  | 32                    |
| fp16  | float16                                                 | from float16           | 16                    |
| bf16  | the upper half of a float32 (arXiv 1905.12322)          | no                     | 16                    |
| int8  | per block a float32 scale; int8                         | no                     | 8 + 32 / block size   |
| int4  | per block a float32 scale; two values a byte, low first | no                     | 4 + 32 / block size   |
| topk  | the ``k`` largest magnitudes: indices, float32 values   | those, up to float32   | 64 k / size           |

All round to the nearest, ties to even, so equal arrays give equal bytes on every machine. int8 and int4 are symmetric
and blockwise, as in Dettmers et al. (arXiv 2110.02861): a scale is the block's largest magnitude over 127 or 7, at
least the smallest normal float32, and a value comes back within half a scale. Their codes are evenly spaced, where that
paper and QLoRA (arXiv 2305.14314) space them by quantiles. Of equal magnitudes topk takes the ones with the lower
index. All but raw go through float32, so a float64 is rounded twice (fp16 and fp32: once).

What a lossy codec cannot say is refused, never bent. NaN and infinity pass through raw, fp32, fp16 and bf16, and int8,
int4 and topk refuse them. A finite value beyond the codec's range is refused as well, so a finite array comes back
finite. Values too small for the codec become zero.

Memory beside the result: none for raw, fp32 and fp16; under 2 MiB for bf16, int8 and int4, which work in chunks that
stay in the processor's cache; for topk under 6 MiB, and about 50 bytes for each value that it keeps. An array that is
not C-contiguous is gathered chunk by chunk, too.

NumPy comes with ``shoal[train]`` alone, so nothing that a bare node runs imports this module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.codec import Attachment, Buffer
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError

Array: TypeAlias = npt.NDArray[Any]

DEFAULT_BLOCK_SIZE: Final = 256
"""Values that share a scale: 1.6 % on top of int8, 3.1 % on top of int4."""
MAX_BLOCK_SIZE: Final = 65536
MAX_DIMENSIONS: Final = 32

_DTYPES: Final = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
_MAX_ITEM_BYTES: Final = 8
_CHUNK: Final = 131072  # values; many enough to drown NumPy's cost per call, few enough to stay in the cache
_MAX_INT32_SIZE: Final = 2**31  # of an array whose indices are all int32
_F32: Final = np.dtype("<f4")
_LEVELS: Final = {"int8": 127, "int4": 7}
_MIN_SCALE: Final = np.finfo(np.float32).tiny  # below it a float32 loses digits, and half a scale would not bound

# Both values of a byte, as float32s in one item, so that unpacking is one table look-up.
_NIBBLES: Final = np.array(
    [[(byte & 15) - (byte & 8) * 2, (byte >> 4) - (byte >> 7) * 16] for byte in range(256)], np.float32
).view(np.uint64)[:, 0]


class TensorCodec(StrEnum):
    """How an array's values are written; see the head of this module."""

    RAW = "raw"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    TOPK = "topk"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An encoded array, as a field of a message. One that came from a peer is unchecked until it is decoded.

    Attributes:
        dtype: NumPy's name for the dtype of the original array.
        shape: of the original array.
        codec: how ``parts`` are written.
        block_size: values per scale, for int8 and int4; 0 for the others.
        parts: the values; for int8 and int4, scales and values; for topk, ascending flat indices (C order) and values.
    """

    dtype: str
    shape: tuple[int, ...]
    codec: TensorCodec
    block_size: int
    parts: tuple[Attachment, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts, without the header."""
        return sum(_num_bytes(part) for part in self.parts)


def encode_tensor(
    array: npt.NDArray[np.generic],
    codec: TensorCodec = TensorCodec.RAW,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    k: int | None = None,
) -> Tensor:
    """Write an array of any shape.

    Args:
        array: booleans, integers or floats up to 64 bits, of either byte order; floats alone for all codecs but raw.
            Where its bytes are what travels (raw; fp32 from float32; fp16 from float16; C-contiguous and
            little-endian) the tensor is a view of it: leave the array alone until the tensor has been sent.
        codec: how to write it.
        block_size: values per scale, 1 to `MAX_BLOCK_SIZE`; read by int8 and int4 only.
        k: values that topk keeps, at least 1; all of them if the array is smaller.

    Raises:
        UsageError: if the codec cannot write this dtype, or one of the values: a finite value beyond its range, or for
            int8, int4 and topk NaN or infinity; or if ``block_size`` or ``k`` makes no sense.
    """
    array = np.asarray(array)
    dtype = _check_dtype(array.dtype.name, codec, UsageError)
    k = _check_options(array.size, codec, block_size, k)
    name = f"a {dtype.name} array of shape {list(array.shape)}"
    parts: tuple[Array, ...]
    # Casts report overflow as a floating-point error, at no cost; signalling NaNs would be reported too.
    with np.errstate(over="raise", invalid="ignore", under="ignore"):
        try:
            match codec:
                case TensorCodec.RAW | TensorCodec.FP32 | TensorCodec.FP16:
                    ((target, _),) = _layout(array.size, dtype, codec, block_size, k)
                    parts = (np.asarray(array, target, order="C"),)
                case TensorCodec.BF16:
                    parts = (_to_bf16(array),)
                case TensorCodec.INT8 | TensorCodec.INT4:
                    parts = _to_blocks(array, codec, block_size)
                case TensorCodec.TOPK:
                    parts = _to_top_k(array, k)
        except FloatingPointError as error:
            reach = "fp16 ends at 65504, bf16 and fp32 at 3.4e38; scale it down or send it raw"
            raise UsageError(f"{name} has values beyond the range of {codec}: {reach}") from error
        except _NonFiniteError as error:
            raise UsageError(
                f"{name} holds NaN or infinity, which {codec} cannot say; send it as bf16 or raw"
            ) from error
    block_size = block_size if codec in _LEVELS else 0
    return Tensor(dtype.name, array.shape, codec, block_size, tuple(_as_part(part) for part in parts))


def decode_tensor(tensor: Tensor, *, max_bytes: int) -> Array:
    """The array of a tensor, in native byte order.

    Where the parts are the array's bytes (raw; fp32 for float32; fp16 for float16) the result is a read-only view of
    them, which need not be aligned: `decode_tensor_into` or ``copy()`` gives an array of one's own. Otherwise it is a
    new array.

    NaN and infinity come back if they were sent by raw, fp32, fp16 or bf16: check before averaging them into anything.

    Args:
        tensor: from anybody; everything about it is checked before an array is made.
        max_bytes: the largest array to accept.

    Raises:
        LimitError: if the array would be larger than ``max_bytes``, or has more than `MAX_DIMENSIONS` dimensions.
        ProtocolError: if this is no tensor, or a value is beyond the range of its dtype.
    """
    parts = _check_tensor(tensor, max_bytes)
    if len(parts) == 1 and parts[0].dtype.name == tensor.dtype:
        view = parts[0].reshape(tensor.shape)
        view.flags.writeable = False
        return view.astype(view.dtype.newbyteorder("="), copy=False)
    array = np.empty(tensor.shape, tensor.dtype)
    _fill(array.reshape(-1), tensor, parts)
    return array


def decode_tensor_into(tensor: Tensor, out: Array) -> None:
    """Write a tensor's values into an array that is there already.

    Args:
        tensor: from anybody.
        out: of the tensor's dtype and shape, C-contiguous, writable and in native byte order.

    Raises:
        ProtocolError: as `decode_tensor`; also if dtype or shape is another than that of ``out``. Nothing was written,
            unless the error is that a value is beyond the range of the dtype.
        UsageError: if ``out`` cannot be written to in place.
    """
    check_target(tensor.dtype, tensor.shape, out)
    _fill(out.reshape(-1), tensor, _check_tensor(tensor, out.nbytes))


def encoded_num_bytes(
    shape: Sequence[int],
    dtype: str,
    codec: TensorCodec = TensorCodec.RAW,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    k: int | None = None,
) -> int:
    """What `Tensor.num_bytes` will be for an array of this shape and dtype.

    Raises:
        UsageError: if `encode_tensor` would refuse the arguments.
    """
    if any(length < 0 for length in shape):
        raise UsageError(f"{list(shape)} is no shape: lengths are 0 or more")
    size = math.prod(shape)
    kept = _check_options(size, codec, block_size, k)
    layout = _layout(size, _check_dtype(dtype, codec, UsageError), codec, block_size, kept)
    return sum(part.itemsize * length for part, length in layout)


def check_target(dtype: str, shape: tuple[int, ...], out: Array) -> None:
    """Check that an array can be filled in place with a tensor of this dtype and shape.

    Raises:
        ProtocolError: if dtype or shape is another than that of ``out``.
        UsageError: if ``out`` cannot be written to in place.
    """
    if not (out.flags.c_contiguous and out.flags.writeable and out.dtype.isnative):
        raise UsageError("a tensor is decoded into an array that is C-contiguous, writable and of native byte order")
    if (dtype, shape) != (out.dtype.name, out.shape):
        raise ProtocolError(
            f"expected a {out.dtype.name} tensor of shape {list(out.shape)},"
            f" not {dtype[:40]!r} of shape {list(shape[:MAX_DIMENSIONS])}"
        )


def check_parts(
    dtype: str, shape: Sequence[int], codec: TensorCodec, block_size: int, part_bytes: Sequence[int], *, max_bytes: int
) -> None:
    """Check what somebody says of a tensor whose parts are not here yet, so that room may be made for them.

    Args:
        dtype: as in `Tensor`; so are ``shape``, ``codec`` and ``block_size``.
        shape: as above.
        codec: as above.
        block_size: as above.
        part_bytes: how long each part is.
        max_bytes: the largest array to accept. Its parts together have at most four times as many bytes, for topk of
            float16; six times beyond 2**31 values.

    Raises:
        LimitError: as `decode_tensor`.
        ProtocolError: if parts of these lengths make no such tensor.
    """
    known = _check_dtype(dtype, codec, ProtocolError)
    size = _check_shape(tuple(shape), known.itemsize, max_bytes)
    if codec in _LEVELS and not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ProtocolError(f"a {codec} tensor has blocks of 1 to {MAX_BLOCK_SIZE}, not {block_size}")
    kept = part_bytes[-1] // _F32.itemsize if part_bytes else 0
    if codec is TensorCodec.TOPK and kept > size:
        raise ProtocolError(f"a topk tensor of {size} values cannot keep {kept}")
    expected = [part.itemsize * length for part, length in _layout(size, known, codec, block_size, kept)]
    if list(part_bytes) != expected:
        raise ProtocolError(
            f"a {codec} tensor of {size} {known.name} has parts of {expected} bytes, not {list(part_bytes[:4])}"
        )


# --- error feedback --------------------------------------------------------------------------------------------------


class ErrorFeedback:
    """Encodes a series of arrays per name and makes up in each for what was lost in the ones before.

    What a codec loses of an array is kept and added to the next array of that name, so that the sum of what was sent
    stays within one loss of the sum of what was given. Seide et al., "1-Bit Stochastic Gradient Descent" (Interspeech
    2014); convergence: Stich et al. (arXiv 1809.07599), Karimireddy et al. (arXiv 1901.09847). For topk this is the
    local accumulation of Lin et al. (Deep Gradient Compression, arXiv 1712.01887) without momentum correction.

    The residual has the array's own dtype. It holds one array per name and, during `encode`, one more of that size.

    Args:
        max_bytes: of all residuals together.
    """

    __slots__ = ("_max_bytes", "_num_bytes", "_residuals")

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._residuals: dict[str, Array] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all residuals together."""
        return self._num_bytes

    def encode(
        self,
        name: str,
        array: npt.NDArray[np.floating[Any]],
        codec: TensorCodec,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        k: int | None = None,
    ) -> Tensor:
        """Encode an array plus what was lost of this name so far, and keep what is lost now.

        Args:
            name: of the series; its arrays have one shape and dtype.
            array: finite float32 or float64 values; it is not changed.
            codec: as for `encode_tensor`; it may change from one array to the next.
            block_size: as for `encode_tensor`.
            k: as for `encode_tensor`.

        Raises:
            UsageError: as `encode_tensor`; also if a value is NaN or infinite, or the dtype or shape is not this
                name's. The residual stays as it was.
            TooLargeError: if one more residual would exceed ``max_bytes``; likewise.
        """
        array = np.asarray(array)
        if array.dtype.name not in ("float32", "float64"):
            raise UsageError(f"{array.dtype.name} would round its own residual away: hand {name!r} over as float32")
        residual = self._residuals.get(name)
        if residual is None:
            if self._num_bytes + array.nbytes > self._max_bytes:
                raise TooLargeError(
                    f"the residual of {name!r}, {array.nbytes} bytes, does not fit beside {self._num_bytes} others'"
                    f" under {self._max_bytes}: raise max_bytes, or drop what is no longer sent"
                )
            residual = np.zeros(array.shape, array.dtype.newbyteorder("="))
        elif (residual.dtype.name, residual.shape) != (array.dtype.name, array.shape):
            raise UsageError(
                f"{name!r} was {residual.dtype.name}{list(residual.shape)} and is now {array.dtype.name}"
                f"{list(array.shape)}: drop it first, or use another name"
            )
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            wanted = np.add(array, residual, out=np.empty_like(residual))
        flat = wanted.reshape(-1)
        if not all(np.isfinite(flat[at]).all() for at in _chunks(flat.size, _CHUNK)):
            raise UsageError(f"{name!r} holds NaN or infinity, which would stay in its residual; skip this array")
        tensor = encode_tensor(wanted, codec, block_size=block_size, k=k)
        if name not in self._residuals:
            self._num_bytes += residual.nbytes
            self._residuals[name] = residual
        decode_tensor_into(tensor, residual)
        np.subtract(wanted, residual, out=residual)
        return tensor

    def residual(self, name: str) -> Array | None:
        """What has been lost of a name and not been made up for, as a read-only view; None for an unknown name."""
        if name not in self._residuals:
            return None
        view = self._residuals[name].view()
        view.flags.writeable = False
        return view

    def drop(self, name: str) -> None:
        """Forget a name and what was lost of it, if it is there."""
        residual = self._residuals.pop(name, None)
        self._num_bytes -= 0 if residual is None else residual.nbytes


# --- checks ----------------------------------------------------------------------------------------------------------


class _NonFiniteError(Exception):
    """A codec that cannot say NaN or infinity met one."""


def _check_dtype(name: str, codec: TensorCodec, error: type[UsageError | ProtocolError]) -> np.dtype[Any]:
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise error(f"{name[:40]!r} is no dtype that tensors have; they have {', '.join(_DTYPES)}")
    if codec is not TensorCodec.RAW and dtype.kind != "f":
        raise error(f"{codec} writes floats, not {name}: use raw")
    return dtype


def _check_options(size: int, codec: TensorCodec, block_size: int, k: int | None) -> int:
    """How many values topk keeps of ``size``; 0 for the other codecs."""
    if codec in _LEVELS and not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise UsageError(f"a block holds 1 to {MAX_BLOCK_SIZE} values, not {block_size}")
    if codec is not TensorCodec.TOPK:
        if k is not None:
            raise UsageError(f"k is for topk; leave it out for {codec}")
        return 0
    if k is None or k < 1:
        raise UsageError(f"say how many values topk is to keep, at least 1: k={k}")
    return min(k, size)


def _layout(
    size: int, dtype: np.dtype[Any], codec: TensorCodec, block_size: int, k: int
) -> tuple[tuple[np.dtype[Any], int], ...]:
    """The dtype and length of each part."""
    match codec:
        case TensorCodec.RAW:
            return ((dtype.newbyteorder("<"), size),)
        case TensorCodec.FP32:
            return ((_F32, size),)
        case TensorCodec.FP16:
            return ((np.dtype("<f2"), size),)
        case TensorCodec.BF16:
            return ((np.dtype("<u2"), size),)
        case TensorCodec.INT8:
            return ((_F32, -(-size // block_size)), (np.dtype("i1"), size))
        case TensorCodec.INT4:
            return ((_F32, -(-size // block_size)), (np.dtype("u1"), -(-size // 2)))
        case TensorCodec.TOPK:
            return ((np.dtype("<i4" if size <= _MAX_INT32_SIZE else "<i8"), k), (_F32, k))


def _check_tensor(tensor: Tensor, max_bytes: int) -> list[Array]:
    """Check all there is to check about a tensor from anybody, and view its parts as flat arrays."""
    sizes = [_num_bytes(part) for part in tensor.parts]
    check_parts(tensor.dtype, tensor.shape, tensor.codec, tensor.block_size, sizes, max_bytes=max_bytes)
    dtype, size = _DTYPES[tensor.dtype], math.prod(tensor.shape)
    kept = sizes[-1] // _F32.itemsize
    layout = _layout(size, dtype, tensor.codec, tensor.block_size, kept)
    parts = [np.frombuffer(data, part) for data, (part, _) in zip(tensor.parts, layout, strict=True)]
    match tensor.codec:
        case TensorCodec.RAW if dtype.kind == "b" and size:
            if parts[0].view(np.uint8).max() > 1:
                raise ProtocolError("a bool tensor has a byte that is neither 0 nor 1")
        case TensorCodec.INT8 | TensorCodec.INT4 if size:
            # A mask would take memory, of which blocks of one value make much; NaN becomes the minimum and fails.
            if not (parts[0].min() >= 0 and parts[0].max() < np.inf):
                raise ProtocolError(f"a scale of a {tensor.codec} tensor is negative, NaN or infinite")
        case TensorCodec.TOPK if kept:
            _check_indices(parts[0], size)
            if not np.isfinite(parts[1]).all():
                raise ProtocolError("a value of a topk tensor is NaN or infinite")
    return parts


def _check_shape(shape: tuple[int, ...], itemsize: int, max_bytes: int) -> int:
    """The number of values."""
    if len(shape) > MAX_DIMENSIONS:
        raise LimitError(f"a tensor has at most {MAX_DIMENSIONS} dimensions, not {len(shape)}")
    if any(length < 0 for length in shape):
        raise ProtocolError(f"a tensor of shape {list(shape)} has a negative length")
    size = math.prod(shape)
    # NumPy holds even an empty array to what it could address, were the zeros ones, and of any dtype it is turned into.
    addressed = math.prod(max(length, 1) for length in shape) * _MAX_ITEM_BYTES
    if size * itemsize > max_bytes or addressed > sys.maxsize:
        raise LimitError(f"a tensor of shape {list(shape)} exceeds the limit of {max_bytes} bytes")
    return size


def _check_indices(indices: Array, size: int) -> None:
    if indices[0] < 0 or indices[-1] >= size or not (indices[1:] > indices[:-1]).all():
        raise ProtocolError(f"the indices of a topk tensor of {size} values are not ascending from 0 to {size - 1}")


def _num_bytes(part: Buffer) -> int:
    return memoryview(part).nbytes


def _as_part(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data.toreadonly()


# --- chunks ----------------------------------------------------------------------------------------------------------


def _chunks(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _chunk_size(size: int, block_size: int = 1) -> int:
    """Values per chunk: whole blocks and whole bytes of two, and no more than it takes."""
    unit = 2 * block_size
    return unit * max(1, min(_CHUNK // unit, -(-size // unit)))


class _Float32Chunks:
    """Slices of an array's values in C order, as float32: views where they are that already."""

    __slots__ = ("_scratch", "_source")

    def __init__(self, array: Array, step: int) -> None:
        self._source = array.reshape(-1) if array.flags.c_contiguous else array.flat
        is_view = array.flags.c_contiguous and array.dtype == np.float32
        self._scratch = None if is_view else np.empty(step, np.float32)

    def __getitem__(self, at: slice) -> Array:
        chunk: Array = self._source[at]
        if self._scratch is None:
            return chunk
        target = self._scratch[: chunk.size]
        np.copyto(target, chunk, casting="same_kind")
        return target

    def take(self, indices: Array) -> Array:
        """The values at some flat indices, little-endian."""
        return self._source[indices].astype(_F32)


# --- encoding --------------------------------------------------------------------------------------------------------


def _to_bf16(array: Array) -> Array:
    """Round to the nearest by adding just under half of the last place that stays, and the bit there, for ties."""
    step = _chunk_size(array.size)
    source = _Float32Chunks(array, step)
    # The first float32, as bits, that rounds up to what the array's dtype cannot hold: the same range, or 65504.
    first_beyond = 0x477F_8000 if array.dtype.itemsize == 2 else 0x7F7F_8000
    infinity = 0x7F80_0000
    out = np.empty(array.size, "<u2")
    scratch = np.empty(step, np.uint32)
    for at in _chunks(array.size, step):
        bits = source[at].view(np.uint32)
        rounded = scratch[: bits.size]
        np.bitwise_and(bits, 0x7FFF_FFFF, out=rounded)
        nans = None
        if rounded.max() >= first_beyond:
            if ((rounded >= first_beyond) & (rounded < infinity)).any():
                raise FloatingPointError
            nans = np.flatnonzero(rounded > infinity)
        np.right_shift(bits, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        np.copyto(out[at], rounded, casting="unsafe")
        if nans is not None:  # rounding could carry one over to infinity or zero
            out[at][nans] = bits[nans] >> 16 | 0x40
    return out


def _to_blocks(array: Array, codec: TensorCodec, block_size: int) -> tuple[Array, Array]:
    """Scales and values; the last block may be short, and is rounded as if zeros filled it up."""
    levels = _LEVELS[codec]
    max_scale = np.nextafter(np.float32(np.finfo(np.float32).max / levels), np.float32(0))  # times levels is finite
    step = _chunk_size(array.size, block_size)
    source = _Float32Chunks(array, step)
    (_, num_scales), (value_dtype, num_values) = _layout(array.size, array.dtype, codec, block_size, 0)
    scales, values = np.empty(num_scales, _F32), np.empty(num_values, value_dtype)
    scratch, codes = np.empty(step, np.float32), np.empty(step, np.int8)
    for at in _chunks(array.size, step):
        chunk = source[at]
        size = chunk.size
        num_blocks = -(-size // block_size)
        padded = num_blocks * block_size
        if padded != size:
            chunk = np.concatenate([chunk, np.zeros(padded - size, np.float32)])
        blocks = scratch[:padded].reshape(num_blocks, block_size)
        np.abs(chunk, out=scratch[:padded])
        scale = blocks.max(axis=1, out=scales[at.start // block_size :][:num_blocks])
        if not np.isfinite(scale).all():
            raise _NonFiniteError
        scale /= np.float32(levels)
        np.clip(scale, _MIN_SCALE, max_scale, out=scale)
        np.divide(chunk.reshape(num_blocks, block_size), scale[:, None], out=blocks)
        np.rint(blocks, out=blocks)
        if codec is TensorCodec.INT8:
            np.copyto(values[at], scratch[:size], casting="unsafe")
        else:
            np.copyto(codes[:size], scratch[:size], casting="unsafe")
            codes[size : size + size % 2] = 0
            _pack_nibbles(codes[: size + size % 2], values[at.start // 2 :][: -(-size // 2)])
    return scales, values


def _pack_nibbles(codes: Array, out: Array) -> None:
    """Pairs of int8 between -8 and 7 as bytes; both of a pair are taken at once, as one 16-bit number."""
    pairs = codes.view("<u2")
    packed = pairs >> 4
    packed &= 0xF0
    packed |= pairs & 0x0F
    np.copyto(out, packed, casting="unsafe")


def _to_top_k(array: Array, k: int) -> tuple[Array, Array]:
    """Indices and values of the ``k`` largest magnitudes.

    One pass keeps candidates that beat the bar, the k-th largest magnitude when last looked at; whenever there are
    twice as many as wanted, half are let go and the bar rises. NumPy's ``argpartition`` would need a full-size index
    array and does not say which of equal values it takes.
    """
    step = _chunk_size(array.size)
    source = _Float32Chunks(array, step)
    (index_dtype, _), _ = _layout(array.size, array.dtype, TensorCodec.TOPK, 1, k)
    scratch = np.empty(step, np.float32)
    indices, magnitudes = [np.empty(0, index_dtype)], [np.empty(0, np.float32)]
    held, bar = 0, np.float32(-1)
    for at in _chunks(array.size, step):
        chunk = np.abs(source[at], out=scratch[: at.stop - at.start])
        peak = chunk.max()
        if not np.isfinite(peak):
            raise _NonFiniteError
        if peak <= bar:
            continue
        found = np.flatnonzero(chunk > bar)
        indices.append((found + at.start).astype(index_dtype))
        magnitudes.append(chunk[found])
        held += found.size
        if held >= max(2 * k, step):
            best, strengths, bar = _best(np.concatenate(indices), np.concatenate(magnitudes), k)
            indices, magnitudes, held = [best], [strengths], best.size
    best, _, _ = _best(np.concatenate(indices), np.concatenate(magnitudes), k)
    return best, source.take(best)


def _best(indices: Array, magnitudes: Array, k: int) -> tuple[Array, Array, np.float32]:
    """The ``k`` largest, in their order, the first of equals, and the smallest magnitude among them."""
    if indices.size <= k:
        return indices, magnitudes, np.float32(-1)
    bar = np.partition(magnitudes, magnitudes.size - k)[-k]
    keep = magnitudes > bar
    keep[np.flatnonzero(magnitudes == bar)[: k - np.count_nonzero(keep)]] = True
    return indices[keep], magnitudes[keep], bar


# --- decoding --------------------------------------------------------------------------------------------------------


def _fill(out: Array, tensor: Tensor, parts: list[Array]) -> None:
    """Write the values into a flat array; the tensor has been checked."""
    with np.errstate(over="raise", invalid="ignore", under="ignore"):
        try:
            match tensor.codec:
                case TensorCodec.RAW | TensorCodec.FP32 | TensorCodec.FP16:
                    np.copyto(out, parts[0], casting="same_kind")
                case TensorCodec.TOPK:
                    out.fill(0)
                    out[parts[0]] = parts[1].astype(out.dtype)
                case TensorCodec.BF16 | TensorCodec.INT8 | TensorCodec.INT4:
                    _fill_chunks(out, tensor, parts)
        except FloatingPointError as error:
            raise ProtocolError(
                f"a value of a {tensor.codec} tensor is beyond the range of {out.dtype.name}"
            ) from error


def _fill_chunks(out: Array, tensor: Tensor, parts: list[Array]) -> None:
    step = _chunk_size(out.size, tensor.block_size if tensor.codec in _LEVELS else 1)
    scratch = None if out.dtype == np.float32 else np.empty(step, np.float32)
    for at in _chunks(out.size, step):
        target = out[at] if scratch is None else scratch[: at.stop - at.start]
        if tensor.codec is TensorCodec.BF16:
            bits = target.view(np.uint32)
            np.copyto(bits, parts[0][at])
            bits <<= 16
        else:
            scales, values = parts
            _from_blocks(target, at.start, scales, values, tensor.block_size)
        if scratch is not None:
            np.copyto(out[at], target, casting="same_kind")


def _from_blocks(target: Array, start: int, scales: Array, values: Array, block_size: int) -> None:
    """Values ``start`` to ``start + target.size``, the first of which begins a block and a byte."""
    size = target.size
    if values.dtype == np.int8:
        np.copyto(target, values[start : start + size])
    else:
        packed = values[start // 2 :]
        # Every byte is a valid index, and "clip" alone writes into the target without a buffer.
        _NIBBLES.take(packed[: size // 2], out=target[: size - size % 2].view(np.uint64), mode="clip")
        if size % 2:
            target[-1] = _NIBBLES[packed[size // 2 :]].view(np.float32)[0]
    whole = size - size % block_size
    blocks = target[:whole].reshape(-1, block_size)
    blocks *= scales[start // block_size :][: len(blocks), None]
    if whole < size:
        target[whole:] *= scales[-1]
