"""Tensors: whatever a header claims and its parts hold, an array comes out that is as promised, or a refusal.

An input is a list of steps: the header in MessagePack, then the parts. What a step is, says how many times over its
bytes are taken, so that a few of them make a tensor of several chunks.
"""

from __future__ import annotations

import math
import sys
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.codec import Attachment, decode_message, encode_message
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import (
    MAX_DIMENSIONS,
    Tensor,
    TensorCodec,
    check_parts,
    decode_tensor,
    decode_tensor_into,
    encode_tensor,
    encoded_num_bytes,
)

from .harness import (
    BASE_BYTES,
    BYTES_PER_BYTE,
    FindingError,
    MutateBytes,
    Target,
    allocating_at_most,
    refusing,
    require,
    unless_refused,
)
from .mutators import mutate_packed, mutate_steps, pack_steps, read_steps

Array = npt.NDArray[Any]

_MAX_BYTES: Final = 1024 * 1024
"""Of an array; smaller than usual, so that a little too much is seen."""
_MAX_PARTS_BYTES: Final = 1024 * 1024
_TIMES: Final = (1, 2, 3, 16, 331, 1024, 3331, 4096)
"""How many times over a step's bytes may be taken."""
_MARGIN: Final = 64  # values on either side of what is decoded into
_MAX_FRESH: Final = 200  # values

_PARTS_PER_ARRAY: Final = 4
"""How much larger than the array its parts may be together, by `check_parts`."""
_FEW_BYTES: Final = 64 * 1024
"""What "no memory beside the result" leaves to Python's own objects."""
_CODEC_BYTES: Final = 2 * 1024 * 1024
"""What bf16, int8 and int4 take beside the result, by the head of the module."""
_BYTES_PER_KEPT: Final = 50
"""The same of each value that topk keeps."""

_INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES: Final = ("bool", *_INTEGERS, "float16", "float32", "float64")
_OTHER_FLOATS: Final = ("float16", "float64")
_LEVELS: Final = {TensorCodec.INT8: 127, TensorCodec.INT4: 7}
_ALWAYS_FINITE: Final = (*_LEVELS, TensorCodec.TOPK)
_VALUES: Final = (
    *(np.array(value, "<f4").tobytes() for value in (np.nan, np.inf, -np.inf, -1.0, 0.0, 3.4e38, 1e38, 1e-45, 65520.0)),
    *(np.array(value, "<f2").tobytes() for value in (np.nan, np.inf, 65504.0, 6e-8)),
    *(np.array(value, "<i4").tobytes() for value in (-1, 0, 1, 2**31 - 1, -(2**31))),
    *(b"\x80", b"\x7f", b"\x88", b"\xff", b"\x7f\x7f", b"\x80\xff"),
)
"""At which floats, codes and indices turn."""


def _run(data: bytes) -> None:
    tensor = _read(data)
    if tensor is None:
        return
    array = _decoded(tensor)
    _check_parts(tensor, array)
    _check_in_place(tensor, array)
    if array is not None:
        _check_array(tensor, array)
        _check_again(tensor, array)


def _read(data: bytes) -> Tensor | None:
    """The tensor of an input, or None if the codec refuses its header."""
    steps = read_steps(data)
    if not steps:
        return None
    parts: list[Attachment] = []
    room = _MAX_PARTS_BYTES
    for what, part in steps[1:]:
        times = min(_TIMES[what % len(_TIMES)], room // max(1, len(part)))
        parts.append(memoryview(b"\0" + part * times)[1:])  # unaligned, as it may come
        room -= len(parts[-1])
    return unless_refused(lambda: decode_message(Tensor, steps[0][1], parts), ProtocolError)


def _decoded(tensor: Tensor) -> Array | None:
    """The array, or None if it is refused."""
    with allocating_at_most(_MAX_BYTES + _overhead_bytes(tensor)):
        return unless_refused(lambda: decode_tensor(tensor, max_bytes=_MAX_BYTES), ProtocolError)


def _overhead_bytes(tensor: Tensor) -> int:
    match tensor.codec:
        case TensorCodec.BF16 | TensorCodec.INT8 | TensorCodec.INT4:
            return _CODEC_BYTES
        case TensorCodec.TOPK:
            return _FEW_BYTES + _BYTES_PER_KEPT * _num_kept(tensor)
    return _FEW_BYTES


def _check_parts(tensor: Tensor, array: Array | None) -> None:
    """Check that room is made for parts that are to come if, and only if, they can be a tensor's."""
    sizes = [memoryview(part).nbytes for part in tensor.parts]
    is_taken = False
    with refusing(ProtocolError):
        check_parts(tensor.dtype, tensor.shape, tensor.codec, tensor.block_size, sizes, max_bytes=_MAX_BYTES)
        is_taken = True
    require(is_taken or array is None, "a tensor was taken whose parts alone are refused")
    if is_taken:
        num_bytes = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        require(num_bytes <= _MAX_BYTES, "parts are taken of an array over the limit")
        require(sum(sizes) <= _PARTS_PER_ARRAY * num_bytes, "parts take more room than stated")


def _check_in_place(tensor: Tensor, expected: Array | None) -> None:
    """Check that decoding into memory gives the same, and leaves what lies around it alone."""
    claimed = _claimed(tensor)
    require(claimed is not None or expected is None, "a tensor was taken whose header claims too much")
    dtype, shape = claimed or (np.dtype("float32"), (3,))
    size = math.prod(shape)
    memory = np.frombuffer(bytearray(b"\xa5") * (dtype.itemsize * (size + 2 * _MARGIN)), np.uint8)
    margin = dtype.itemsize * _MARGIN
    out = memory[margin : len(memory) - margin].view(dtype).reshape(shape)
    is_taken = False
    with refusing(ProtocolError), allocating_at_most(_overhead_bytes(tensor)):
        decode_tensor_into(tensor, out)
        is_taken = True
    require(is_taken == (expected is not None), "one way of decoding takes a tensor that the other one refuses")
    require((memory[:margin] == 0xA5).all() and (memory[-margin:] == 0xA5).all(), "decoding writes beside the array")
    require(expected is None or _same_bits(out, expected), "decoding in place gives other values")


def _claimed(tensor: Tensor) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Dtype and shape as the header has them, if an array of that kind may be made."""
    if tensor.dtype not in _DTYPES or len(tensor.shape) > MAX_DIMENSIONS or min(tensor.shape, default=0) < 0:
        return None
    dtype = np.dtype(tensor.dtype)
    addressed = math.prod(max(length, 1) for length in tensor.shape) * dtype.itemsize
    if addressed > sys.maxsize or math.prod(tensor.shape) * dtype.itemsize > _MAX_BYTES:
        return None
    return dtype, tensor.shape


def _check_array(tensor: Tensor, array: Array) -> None:
    require((array.dtype.name, array.shape) == (tensor.dtype, tensor.shape), "an array is not as the header says")
    require(array.dtype.isnative and array.nbytes <= _MAX_BYTES, "an array is of another byte order, or over the limit")
    num_bytes = encoded_num_bytes(tensor.shape, tensor.dtype, tensor.codec, **_options(tensor))
    empty = tensor.codec is TensorCodec.TOPK and _num_kept(tensor) == 0  # legal, if useless
    require(empty or num_bytes == tensor.num_bytes, "a tensor was taken that is longer or shorter than we write it")
    if array.dtype.kind != "f":
        return
    if tensor.codec in _ALWAYS_FINITE:
        require(np.isfinite(array).all(), f"{tensor.codec} came back as NaN or infinity")
    else:
        sent = _as_sent(tensor)
        require(
            np.array_equal(np.isfinite(array).reshape(-1), np.isfinite(sent)),
            f"a finite value came back by {tensor.codec} as NaN or infinity, or the other way round",
        )


def _as_sent(tensor: Tensor) -> Array:
    """The values of raw, fp32, fp16 or bf16, as they travelled."""
    (part,) = tensor.parts
    match tensor.codec:
        case TensorCodec.RAW:
            return np.frombuffer(part, np.dtype(tensor.dtype).newbyteorder("<"))
        case TensorCodec.BF16:
            return (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
        case _:
            return np.frombuffer(part, "<f2" if tensor.codec is TensorCodec.FP16 else "<f4")


def _check_again(tensor: Tensor, array: Array) -> None:
    """Check that what was taken can be written, and comes back as near as the codec promises."""
    try:
        written = encode_tensor(array, tensor.codec, **_options(tensor))
        header, parts = encode_message(written)
        again = decode_tensor(decode_message(Tensor, header, parts), max_bytes=_MAX_BYTES)
    except (ProtocolError, UsageError) as error:
        raise FindingError(f"an array that was taken cannot be sent again: {error}") from error
    if tensor.codec is TensorCodec.RAW:
        require(_same_bits(again, array), "an array does not come back bit by bit")
    elif tensor.codec in _LEVELS:
        _check_near(array, again, written)
    else:
        require(np.array_equal(again, array, equal_nan=True), f"what came by {tensor.codec} does not go by it again")


def _check_near(array: Array, again: Array, written: Tensor) -> None:
    """Check that every value is within half a scale, beside what rounding to the array's own dtype may add."""
    scales = np.frombuffer(written.parts[0], "<f4").astype(np.float64)
    bound = np.repeat(scales, written.block_size)[: array.size] * 0.5 * (1 + 1e-5)
    with np.errstate(over="ignore"):
        bound += np.spacing(np.abs(again.reshape(-1))).astype(np.float64)
    lost = np.abs(again.astype(np.float64) - array.astype(np.float64)).reshape(-1)
    require((lost <= bound).all(), f"{written.codec} loses more than half a scale")


def _options(tensor: Tensor) -> dict[str, Any]:
    """As `encode_tensor` takes them."""
    if tensor.codec in _LEVELS:
        return {"block_size": tensor.block_size}
    return {"k": max(1, _num_kept(tensor))} if tensor.codec is TensorCodec.TOPK else {}


def _num_kept(tensor: Tensor) -> int:
    return memoryview(tensor.parts[-1]).nbytes // 4 if tensor.parts else 0


def _same_bits(one: Array, other: Array) -> bool:
    return one.tobytes() == other.tobytes()


def _pack(tensor: Tensor, *times: int) -> bytes:
    """A tensor as an input; its parts, as given, so many times over each (an index into `_TIMES`)."""
    header, parts = encode_message(tensor)
    return pack_steps([(0, header), *zip(times or (0,) * len(parts), map(bytes, parts), strict=True)])


def _seeds() -> list[bytes]:
    values = np.linspace(-3, 3, 120, dtype=np.float32).reshape(4, 30)
    tensors = [encode_tensor(values, codec, **_usual_options(codec)) for codec in TensorCodec]
    for codec in (TensorCodec.BF16, TensorCodec.INT8, TensorCodec.INT4, TensorCodec.TOPK):
        tensors += [encode_tensor(values.astype(dtype), codec, **_usual_options(codec)) for dtype in _OTHER_FLOATS]
    tensors += [encode_tensor(values.astype("float16"), TensorCodec.FP32), encode_tensor(values > 0)]
    tensors += [encode_tensor(np.arange(5, dtype=dtype)) for dtype in ("int8", "uint16", "int64")]
    tensors += [encode_tensor(np.zeros(shape, np.float32)) for shape in ((), (0, 3))]
    tensors += [encode_tensor(np.array([np.nan, np.inf, -0.0], np.float32), TensorCodec.BF16)]
    # A chunk has 131072 values; these have some more, and the last block, byte and chunk are not full.
    count = 41 * 3331
    scales = np.linspace(0.1, 1, -(-count // 331), dtype="<f4").tobytes()
    long = [
        _pack(Tensor("float32", (count,), TensorCodec.BF16, 0, (b"\x80\x3f" * 41,)), 6),
        _pack(Tensor("float16", (count,), TensorCodec.INT8, 331, (scales, bytes(range(41)))), 0, 6),
        _pack(Tensor("float32", (21 * 2 * 3331 - 1,), TensorCodec.INT4, 1, (bytes(84), bytes(range(21)))), 6, 6),
        _pack(Tensor("float16", (4,), TensorCodec.TOPK, 0, (np.arange(4, dtype="<i4").tobytes(), bytes(16)))),
        _pack(Tensor("float32", (2**18,), TensorCodec.TOPK, 0, (b"\x00\x02\x03\x00", b"\x00\x00\x80\x3f"))),
    ]
    return [*map(_pack, tensors), *long]


def _usual_options(codec: TensorCodec) -> dict[str, Any]:
    return {"k": 9} if codec is TensorCodec.TOPK else {"block_size": 16}


def _fresh(rng: Random) -> bytes:
    """A small tensor of a random dtype, shape and codec."""
    shape = tuple(rng.choice((0, 1, 2, 3, 7)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 32))))
    shape = shape if math.prod(shape) < _MAX_FRESH else (7,)
    values = np.array([rng.choice((0.0, -0.0, 1.0, 1e-8, 60000.0)) * rng.random() for _ in range(math.prod(shape))])
    array = values.astype(rng.choice(("float16", "float32", "float64"))).reshape(shape)
    codec = rng.choice(list(TensorCodec))
    options = {"k": rng.randrange(1, 9)} if codec is TensorCodec.TOPK else {"block_size": rng.choice((1, 2, 3, 256))}
    return _pack(encode_tensor(array, codec, **options))


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    if rng.random() < 0.05:
        return _fresh(rng)
    steps = read_steps(data)
    if not steps or rng.random() < 0.1:
        return mutate_steps(data, max_bytes, rng, mutate_bytes, lambda step: (step[0], mutate_bytes(step[1], 64)))
    at = 0 if rng.random() < 0.5 else rng.randrange(len(steps))
    what, held = steps[at]
    if at == 0:
        steps[0] = what, mutate_packed(held, len(held) + 64, rng, mutate_bytes)
    elif rng.random() < 0.2:
        steps[at] = rng.randrange(len(_TIMES)), held
    elif rng.random() < 0.5 and held:
        # Values that floats and indices turn on, in place.
        place = rng.randrange(len(held))
        value = rng.choice(_VALUES)
        steps[at] = what, (held[:place] + value + held[place + len(value) :])[: len(held)]
    else:
        steps[at] = what, mutate_bytes(held, len(held) + (8 if rng.random() < 0.2 else 0))
    changed = pack_steps(steps)
    return changed if len(changed) <= max_bytes else mutate_bytes(data, max_bytes)


def _max_peak_bytes(length: int) -> int:
    # What decoding takes is measured more closely, above. Here several copies are made, in float64, to compare.
    return BASE_BYTES + BYTES_PER_BYTE * length + 24 * _MAX_BYTES


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=_max_peak_bytes)
