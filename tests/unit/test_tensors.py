"""What a tensor's codec promises about its values holds for every array; what no encoder wrote is refused."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.protocol.codec import decode_message, encode_message
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError
from shoal.protocol.tensors import (
    DEFAULT_BLOCK_SIZE,
    MAX_BLOCK_SIZE,
    MAX_DIMENSIONS,
    ErrorFeedback,
    Tensor,
    TensorCodec,
    decode_tensor,
    decode_tensor_into,
    encode_tensor,
    encoded_num_bytes,
)

Array = npt.NDArray[Any]

RAW, FP32, FP16, BF16, INT8, INT4, TOPK = TensorCodec
LOSSY = [FP32, FP16, BF16, INT8, INT4, TOPK]
LEVELS = {INT8: 127, INT4: 7}
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64"]
ENOUGH = 1 << 30
MANY = 300_001  # values: several chunks, and a rest that is neither a block nor a pair


@dataclass(frozen=True, slots=True)
class Push:
    name: str
    tensor: Tensor


def over_the_wire(tensor: Tensor, *, offset: int = 0) -> Tensor:
    """The tensor as the far side gets it: each attachment a view, perhaps unaligned, of what was received."""
    header, attachments = encode_message(Push("w", tensor))
    received = [memoryview(bytes(offset) + bytes(attachment))[offset:] for attachment in attachments]
    return decode_message(Push, header, received).tensor


def decode(tensor: Tensor) -> Array:
    return decode_tensor(tensor, max_bytes=ENOUGH)


def options(codec: TensorCodec, array: Array, *, k: int | None = None) -> dict[str, Any]:
    return {"k": k or max(1, array.size // 10)} if codec is TOPK else {}


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(actual: Array, expected: Array) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype.newbyteorder("="), expected.shape)
    np.testing.assert_array_equal(bits(actual), bits(expected.astype(actual.dtype)))


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)


@st.composite
def arrays(draw: st.DrawFn, /, dtypes: list[str], **elements: Any) -> Array:
    """Of every shape; contiguous, transposed or strided; of either byte order."""
    dtype = np.dtype(draw(st.sampled_from(dtypes))).newbyteorder(draw(st.sampled_from("<>")))
    array: Array = draw(hnp.arrays(dtype, shapes, elements=elements or None))
    if draw(st.booleans()):
        array = array.T
    if array.ndim and draw(st.booleans()):
        array = array[:: draw(st.sampled_from([-1, 2, 3]))]
    return array


def floats(dtypes: list[str], bound: float) -> st.SearchStrategy[Array]:
    """Finite arrays of magnitudes up to a bound that float16 can say."""
    return arrays(dtypes, min_value=-bound, max_value=bound, allow_nan=False, allow_infinity=False)


anything = arrays(DTYPES)
any_floats = arrays(["float16", "float32", "float64"])
tame = floats(["float16", "float32", "float64"], 1024.0)


# --- values ----------------------------------------------------------------------------------------------------------


@given(anything)
def test_raw_gives_every_bit_back(array: Array) -> None:
    assert_same(decode(over_the_wire(encode_tensor(array))), array)


@given(arrays(["float16", "float32"]))
def test_fp32_gives_everything_up_to_float32_back(array: Array) -> None:
    result = decode(encode_tensor(array, FP32))
    np.testing.assert_array_equal(result, array)
    assert result.dtype == array.dtype.newbyteorder("=")


@given(arrays(["float16"]))
def test_fp16_gives_float16_back(array: Array) -> None:
    assert_same(decode(encode_tensor(array, FP16)), array)


@given(floats(["float32", "float64"], 65504.0))
def test_fp16_rounds_as_numpy_does(array: Array) -> None:
    assert_same(decode(encode_tensor(array, FP16)), array.astype(np.float16).astype(array.dtype))


def bf16(value: float) -> float:
    """The bfloat16 nearest to a float32, in exact arithmetic."""
    (number,) = struct.unpack("<I", struct.pack("<f", value))
    below = number >> 16 << 16
    rest = number - below
    rounded = below + (0x10000 if rest > 0x8000 or (rest == 0x8000 and below >> 16 & 1) else 0)
    return float(struct.unpack("<f", struct.pack("<I", rounded))[0])


@given(hnp.arrays(np.uint32, 20))
def test_bf16_rounds_to_the_nearest_and_ties_to_even(numbers: Array) -> None:
    halves = np.concatenate([numbers, numbers & 0xFFFF0000 | 0x8000])
    array = halves.view(np.float32)
    array = array[np.abs(array) < 3.38e38]  # this drops NaN, too
    np.testing.assert_array_equal(decode(encode_tensor(array, BF16)), [bf16(value) for value in array])


@given(tame, st.sampled_from([BF16, FP16, FP32]))
def test_a_float_codec_errs_by_half_a_unit_in_the_last_place(array: Array, codec: TensorCodec) -> None:
    relative, smallest = {BF16: (2.0**-8, 2.0**-133), FP16: (2.0**-11, 2.0**-24), FP32: (2.0**-24, 2.0**-149)}[codec]
    error = np.abs(decode(encode_tensor(array, codec)).astype(np.float64) - array.astype(np.float64))
    # Twice rounded, and float16 adds its own last place where it is what comes back.
    own = np.finfo(array.dtype).eps / 2 * np.abs(array).astype(np.float64) + float(np.finfo(array.dtype).tiny)
    assert (error <= np.maximum(relative * 1.001 * np.abs(array).astype(np.float64), smallest) + own).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("codec", [RAW, FP32, FP16, BF16])
def test_nan_infinity_and_signs_pass_through_the_float_codecs(codec: TensorCodec, dtype: str) -> None:
    array = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], dtype)
    result = decode(encode_tensor(array, codec))
    np.testing.assert_array_equal(result, array)
    np.testing.assert_array_equal(np.signbit(result), np.signbit(array))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_no_nan_is_rounded_into_a_number(dtype: TensorCodec) -> None:
    mantissas = np.array([1, 0xFFFF, 0x10000, 0x3FFFFF, 0x400000, 0x7FFFFF], np.uint32)
    nans = np.concatenate([mantissas | 0x7F800000, mantissas | 0xFF800000]).view(np.float32)
    assert np.isnan(decode(encode_tensor(nans, dtype))).all()


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (FP16, np.float32(65520)),
        (FP16, np.float64(-1e5)),
        (FP32, np.float64(1e39)),
        (BF16, np.float64(-1e39)),
        (BF16, np.finfo(np.float32).max),
        (BF16, -np.finfo(np.float16).max),
        (INT8, np.float64(1e39)),
        (INT4, np.float64(1e39)),
        (TOPK, np.float64(1e39)),
    ],
)
def test_a_value_beyond_the_range_of_a_codec_is_refused(codec: TensorCodec, value: np.floating[Any]) -> None:
    for array in (np.array([1, value], value.dtype), np.array([[1, value]] * 2, value.dtype).T):
        with pytest.raises(UsageError, match="beyond the range"):
            encode_tensor(array, codec, **options(codec, array))


@given(tame, st.sampled_from([INT8, INT4]), st.integers(1, 40))
def test_a_blockwise_codec_errs_by_half_a_scale(array: Array, codec: TensorCodec, block_size: int) -> None:
    tensor = encode_tensor(array, codec, block_size=block_size)
    scales = np.frombuffer(tensor.parts[0], np.float32).astype(np.float64)
    flat = np.ravel(array).astype(np.float64)
    peaks = [np.abs(flat[start : start + block_size]).max() for start in range(0, flat.size, block_size)]
    np.testing.assert_allclose(scales, np.maximum(np.divide(peaks, LEVELS[codec]), 2.0**-126), rtol=1e-6)
    error = np.abs(np.ravel(decode(over_the_wire(tensor, offset=3))).astype(np.float64) - flat)
    own = np.finfo(array.dtype).eps * np.abs(flat) + float(np.finfo(array.dtype).smallest_subnormal)
    assert (error <= np.repeat(scales, block_size)[: flat.size] * 0.5001 + own).all()


@pytest.mark.parametrize("codec", [INT8, INT4])
@pytest.mark.parametrize("value", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45, 0.0])
def test_a_blockwise_codec_stands_the_ends_of_float32(codec: TensorCodec, value: float) -> None:
    array = np.array([value, -value, value / 2], np.float32)
    tensor = encode_tensor(array, codec)
    (scale,) = np.frombuffer(tensor.parts[0], np.float32).astype(np.float64)
    assert np.abs(decode(tensor).astype(np.float64) - array).max() <= scale * 0.5001
    np.testing.assert_allclose(decode(tensor), array, rtol=1 / 7, atol=2.0**-126)


@pytest.mark.parametrize("codec", [INT8, INT4, TOPK])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("at", [0, MANY - 1])
def test_nan_and_infinity_are_refused_by_codecs_that_cannot_say_them(codec: TensorCodec, value: float, at: int) -> None:
    array = np.zeros(MANY, np.float32)
    array[at] = value
    with pytest.raises(UsageError, match="NaN or infinity"):
        encode_tensor(array, codec, **options(codec, array, k=1))


@given(floats(["float16", "float32"], 8.0), st.integers(1, 30))
def test_topk_keeps_the_largest_magnitudes_exactly_and_the_first_of_equals(array: Array, k: int) -> None:
    array = np.round(array)  # so that there are many equals
    flat = np.ravel(array)
    best = sorted(sorted(range(flat.size), key=lambda index: (-abs(flat[index]), index))[:k])
    expected = np.zeros_like(flat)
    expected[best] = flat[best]
    tensor = encode_tensor(array, TOPK, k=k)
    assert np.frombuffer(tensor.parts[0], np.int32).tolist() == best
    np.testing.assert_array_equal(decode(over_the_wire(tensor, offset=1)), expected.reshape(array.shape))


@pytest.mark.parametrize("k", [1, 1000, MANY - 1, MANY + 1])
@pytest.mark.parametrize("order", ["any", "rising", "falling", "equal"])
def test_topk_finds_the_largest_of_many_in_whatever_order(k: int, order: str) -> None:
    array = np.round(normal(MANY), 2)
    if order != "any":
        array = array[np.argsort(np.abs(array) * {"rising": 1, "falling": -1, "equal": 0}[order], kind="stable")]
    best = np.sort(np.argsort(-np.abs(array), kind="stable")[:k])
    tensor = encode_tensor(array, TOPK, k=k)
    np.testing.assert_array_equal(np.frombuffer(tensor.parts[0], np.int32), best)
    np.testing.assert_array_equal(np.frombuffer(tensor.parts[1], np.float32), array[best])


@pytest.mark.parametrize("codec", [BF16, INT8, INT4])
@pytest.mark.parametrize("block_size", [1, 3, 64, 1000, MAX_BLOCK_SIZE])
def test_working_in_chunks_does_not_show(codec: TensorCodec, block_size: int) -> None:
    array = normal(MANY)
    tensor = encode_tensor(array, codec, block_size=block_size)
    decoded = decode(over_the_wire(tensor, offset=1))
    for start in (0, 120_000 // block_size * block_size, MANY // block_size * block_size):
        end = start + 2 * block_size
        piece = decode(encode_tensor(array[start:end], codec, block_size=block_size))
        np.testing.assert_array_equal(decoded[start:end], piece)


@given(any_floats.filter(lambda array: bool(np.isfinite(array).all())), st.sampled_from([RAW, *LOSSY]))
def test_layout_and_byte_order_change_no_byte(array: Array, codec: TensorCodec) -> None:
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    try:
        tensor = encode_tensor(array, codec, **options(codec, array), block_size=5)
    except UsageError:
        with pytest.raises(UsageError, match="beyond the range"):
            encode_tensor(plain, codec, **options(codec, array), block_size=5)
        return
    assert encode_tensor(plain, codec, **options(codec, array), block_size=5) == tensor


def test_known_arrays_have_these_bytes() -> None:
    array = np.array([[1.0, -7.0, 3.5], [0.5, 0.0, 2.0]], np.float32)

    def parts(codec: TensorCodec, **changes: int) -> list[str]:
        return [bytes(part).hex() for part in encode_tensor(array, codec, **changes).parts]

    assert parts(FP16) == ["003c00c70043003800000040"]
    assert parts(BF16) == ["803fe0c06040003f00000040"]
    assert parts(INT4) == ["0000803f", "910420"]
    assert parts(INT4, block_size=3) == ["0000803f" + "2549923e", "912470"]
    assert parts(INT8)[1] == "128140090024"
    assert parts(TOPK, k=2) == ["0100000002000000", "0000e0c000006040"]


# --- sizes, copies, memory -------------------------------------------------------------------------------------------


@given(tame, st.sampled_from([RAW, *LOSSY]), st.integers(1, 300), st.integers(1, 50))
def test_the_size_is_known_beforehand(array: Array, codec: TensorCodec, block_size: int, k: int) -> None:
    more = options(codec, array, k=k)
    tensor = encode_tensor(array, codec, block_size=block_size, **more)
    expected = encoded_num_bytes(array.shape, array.dtype.name, codec, block_size=block_size, **more)
    assert tensor.num_bytes == expected == sum(len(bytes(part)) for part in tensor.parts)


def test_indices_of_a_huge_array_have_64_bits() -> None:
    assert encoded_num_bytes((2**16, 2**15), "float32", TOPK, k=10) == 80
    assert encoded_num_bytes((2**16, 2**15 + 1), "float32", TOPK, k=10) == 120


@pytest.mark.parametrize(("codec", "dtype"), [(RAW, "float64"), (RAW, "bool"), (FP32, "float32"), (FP16, "float16")])
def test_an_array_that_is_its_own_encoding_is_not_copied(codec: TensorCodec, dtype: str) -> None:
    array = normal(3, 5).astype(dtype)
    tensor = encode_tensor(array, codec)
    (part,) = tensor.parts
    assert np.shares_memory(np.frombuffer(part, np.uint8), array)
    assert memoryview(part).readonly
    header, attachments = encode_message(Push("w", tensor))
    assert np.shares_memory(np.frombuffer(attachments[0], np.uint8), array)
    result = decode(decode_message(Push, header, attachments).tensor)
    assert np.shares_memory(result, array)
    assert not result.flags.writeable


@pytest.mark.parametrize("codec", [RAW, *LOSSY])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_tensor_crosses_the_wire_as_it_is(codec: TensorCodec, dtype: str) -> None:
    array = normal(7, 11, dtype=dtype)
    tensor = encode_tensor(array, codec, **options(codec, array))
    assert over_the_wire(tensor) == tensor
    for offset in range(9):
        assert_same(decode(over_the_wire(tensor, offset=offset)), decode(tensor))


@given(tame, st.sampled_from([RAW, *LOSSY]))
def test_decoding_into_an_array_gives_what_decoding_gives(array: Array, codec: TensorCodec) -> None:
    tensor = encode_tensor(array, codec, **options(codec, array), block_size=7)
    buffer = np.full(array.size + 1, np.nan, array.dtype.newbyteorder("="))
    out = buffer[1:].reshape(array.shape)  # not aligned to more than an item
    decode_tensor_into(tensor, out)
    assert_same(out, decode(tensor))
    assert np.isnan(buffer[0])


def test_an_array_of_integers_is_decoded_into_an_array() -> None:
    array = np.arange(12).reshape(3, 4)
    out = np.zeros_like(array)
    decode_tensor_into(encode_tensor(array), out)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("layout", [lambda array: array, lambda array: array.T, lambda array: array.astype(">f4")])
@pytest.mark.parametrize("block_size", [1, MAX_BLOCK_SIZE])
def test_the_memory_beside_the_result_is_bounded(
    codec: TensorCodec, layout: Callable[[Array], Array], block_size: int
) -> None:
    array = layout(np.ones((1024, 2048), np.float32))  # 8 MiB
    out = np.empty(array.shape, np.float32)
    tracemalloc.start()
    try:
        tensor = encode_tensor(array, codec, **options(codec, array, k=1000), block_size=block_size)
        encoding = tracemalloc.get_traced_memory()[1] - tensor.num_bytes
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        decode_tensor_into(tensor, out)
        decoding = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert max(encoding, decoding) < (6 if codec is TOPK else 2) * 2**20


# --- what callers may not ask for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "U3", "O", "V4", "float128", "i4,f4"])
def test_an_array_of_another_dtype_is_refused(dtype: str) -> None:
    if dtype == "float128" and np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long double is double here")
    with pytest.raises(UsageError, match="no dtype that tensors have"):
        encode_tensor(np.zeros(2, np.longdouble if dtype == "float128" else dtype))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8"])
def test_a_lossy_codec_takes_floats_only(codec: TensorCodec, dtype: str) -> None:
    with pytest.raises(UsageError, match="use raw"):
        encode_tensor(np.zeros(2, dtype), codec, **options(codec, np.zeros(2)))
    with pytest.raises(UsageError, match="use raw"):
        encoded_num_bytes((2,), dtype, codec, **options(codec, np.zeros(2)))


@pytest.mark.parametrize(
    ("codec", "wrong"),
    [
        (INT8, {"block_size": 0}),
        (INT4, {"block_size": -1}),
        (INT4, {"block_size": MAX_BLOCK_SIZE + 1}),
        (TOPK, {}),
        (TOPK, {"k": 0}),
        (BF16, {"k": 3}),
    ],
)
def test_options_that_make_no_sense_are_refused(codec: TensorCodec, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        encode_tensor(np.zeros(9, np.float32), codec, **wrong)
    with pytest.raises(UsageError):
        encoded_num_bytes((9,), "float32", codec, **wrong)


def test_a_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="no shape"):
        encoded_num_bytes((3, -1), "float32")
    with pytest.raises(UsageError, match="bfloat16"):
        encoded_num_bytes((3,), "bfloat16")


def test_an_array_that_cannot_be_written_in_place_is_refused() -> None:
    tensor = encode_tensor(np.ones((4, 3), np.float32), BF16)
    read_only = np.zeros((4, 3), np.float32)
    read_only.flags.writeable = False
    for out in (np.zeros((3, 4), np.float32).T, np.zeros((4, 3), ">f4"), read_only):
        with pytest.raises(UsageError, match="C-contiguous"):
            decode_tensor_into(tensor, out)
        assert not out.any()


# --- what peers may send ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [np.zeros((4, 3), np.float64), np.zeros((3, 4), np.float32), np.zeros(12, np.float32), np.zeros((4, 3), np.int32)],
)
def test_a_tensor_of_another_dtype_or_shape_than_expected_is_refused(out: Array) -> None:
    for codec in (RAW, INT8):
        with pytest.raises(ProtocolError, match="expected a"):
            decode_tensor_into(encode_tensor(np.ones((4, 3), np.float32), codec), out)
    assert not out.any()


def hostile(codec: TensorCodec, **changes: Any) -> Tensor:
    """A good tensor of 8 values in blocks of 4, but for the changes."""
    array = np.arange(1, 9, dtype=np.float32)
    return dataclasses.replace(encode_tensor(array, codec, block_size=4, **options(codec, array, k=3)), **changes)


def f32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def i32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


CODES = bytes(8)
VALUES = f32(1, 2, 3)

REFUSED: list[tuple[Tensor, type[ProtocolError]]] = [
    *(
        (hostile(codec, dtype=dtype), ProtocolError)
        for codec in (RAW, FP16)
        for dtype in ("bfloat16", "object", "", "f4")
    ),
    *((hostile(codec, dtype="int32"), ProtocolError) for codec in LOSSY),
    *((hostile(codec, shape=(-8,)), ProtocolError) for codec in TensorCodec),
    *((hostile(codec, shape=(-2, -4)), ProtocolError) for codec in TensorCodec),
    *((hostile(codec, shape=(7,)), ProtocolError) for codec in (RAW, FP32, FP16, BF16, INT8)),
    *((hostile(codec, shape=(9,)), ProtocolError) for codec in (RAW, FP32, FP16, BF16, INT8, INT4)),
    *((hostile(codec, shape=(2**20,)), LimitError) for codec in TensorCodec),
    *((hostile(codec, shape=(2**63, 2**63)), LimitError) for codec in TensorCodec),
    *((hostile(codec, shape=(2**32, 2**32)), LimitError) for codec in TensorCodec),
    *((hostile(codec, shape=(2**64 - 1,) * MAX_DIMENSIONS), LimitError) for codec in TensorCodec),
    *((hostile(codec, shape=(0, 2**62)), LimitError) for codec in TensorCodec),
    (Tensor("float16", (2**61, 0), FP32, 0, (b"",)), LimitError),  # as float32, NumPy would not have it
    *((hostile(codec, shape=(1,) * (MAX_DIMENSIONS + 1)), LimitError) for codec in TensorCodec),
    *((hostile(codec, shape=()), ProtocolError) for codec in TensorCodec),
    *((hostile(codec, parts=()), ProtocolError) for codec in TensorCodec),
    *((hostile(codec, parts=(b"", b"")), ProtocolError) for codec in (RAW, FP32, FP16, BF16, INT8, INT4)),
    *((hostile(codec, parts=hostile(codec).parts[:1]), ProtocolError) for codec in (INT8, INT4, TOPK)),
    *((hostile(codec, parts=(*hostile(codec).parts, b"")), ProtocolError) for codec in TensorCodec),
    *((hostile(codec, parts=(*hostile(codec).parts[:-1], b"x")), ProtocolError) for codec in TensorCodec),
    *((hostile(codec, block_size=size), ProtocolError) for codec in (INT8, INT4) for size in (0, -4, 3, 8, 2**64 - 1)),
    *((hostile(INT8, parts=(f32(1, scale), CODES)), ProtocolError) for scale in (np.nan, np.inf, -1.0, -1e-45)),
    *((hostile(INT4, parts=(f32(scale, 1), CODES[:4])), ProtocolError) for scale in (np.nan, np.inf, -1.0)),
    *((hostile(TOPK, parts=(i32(*at), VALUES)), ProtocolError) for at in ((2, 1, 3), (1, 1, 2), (-1, 1, 2), (6, 7, 8))),
    (hostile(TOPK, parts=(i32(0, 2**31 - 1, -(2**31)), VALUES)), ProtocolError),
    (hostile(TOPK, parts=(i32(0, 1), VALUES)), ProtocolError),
    (hostile(TOPK, parts=(np.array([0, 1, 2], "<i8").tobytes(), VALUES)), ProtocolError),
    (hostile(TOPK, parts=(i32(*range(9)), f32(*range(9)))), ProtocolError),
    (hostile(TOPK, parts=(i32(0, 1, 2), f32(1, np.nan, 2))), ProtocolError),
    (hostile(TOPK, parts=(i32(0, 1, 2), f32(1, 2, -np.inf))), ProtocolError),
    (Tensor("bool", (3,), RAW, 0, (b"\0\1\2",)), ProtocolError),
]


@pytest.mark.parametrize(("tensor", "error"), REFUSED)
def test_a_tensor_that_no_encoder_wrote_is_refused(tensor: Tensor, error: type[ProtocolError]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(error) as raised:
            decode_tensor(tensor, max_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert raised.type is error
    out = np.full(8, 5, np.float32)
    with pytest.raises(ProtocolError):
        decode_tensor_into(tensor, out)
    assert (out == 5).all()


@pytest.mark.parametrize("codec", [*TensorCodec])
def test_the_limit_is_on_the_array_that_would_be_made(codec: TensorCodec) -> None:
    tensor = hostile(codec)
    assert decode_tensor(tensor, max_bytes=32).size == 8
    with pytest.raises(LimitError, match="limit of 31 bytes"):
        decode_tensor(tensor, max_bytes=31)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("float16", (1,), FP32, 0, (f32(1e5),)),
        Tensor("float16", (1,), BF16, 0, (b"\x80\x47",)),
        Tensor("float16", (1,), TOPK, 0, (i32(0), f32(-7e4))),
        Tensor("float16", (1,), INT8, 1, (f32(1000), b"\x7f")),
        Tensor("float32", (1,), INT8, 1, (f32(3e38), b"\x02")),
        Tensor("float32", (1,), INT4, 1, (f32(3e38), b"\x02")),
    ],
)
def test_a_value_that_its_own_dtype_cannot_hold_is_refused(tensor: Tensor) -> None:
    with pytest.raises(ProtocolError, match="beyond the range"):
        decode(tensor)


def test_codes_below_the_range_of_an_encoder_are_numbers_all_the_same() -> None:
    assert decode(Tensor("float32", (1,), INT8, 1, (f32(2), b"\x80"))).tolist() == [-256]
    assert decode(Tensor("float32", (3,), INT4, 4, (f32(2), b"\x78\xf1"))).tolist() == [-16, 14, 2]


@given(
    dtype=st.sampled_from([*DTYPES, "bfloat16", ""]),
    shape=st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**64 - 1]), max_size=4).map(tuple),
    codec=st.sampled_from(TensorCodec),
    block_size=st.integers(-1, 5) | st.sampled_from([2**31, 2**64 - 1]),
    parts=st.lists(st.binary(max_size=40), max_size=3).map(tuple),
)
def test_garbage_raises_nothing_else_than_a_protocol_error(**fields: Any) -> None:
    tensor = Tensor(**fields)
    try:
        array = decode_tensor(tensor, max_bytes=1000)
    except ProtocolError:
        return
    assert (array.dtype.name, array.shape) == (tensor.dtype, tensor.shape)
    assert array.nbytes <= 1000


@given(tame, st.sampled_from([*TensorCodec]), st.data())
def test_damage_raises_nothing_else_than_a_protocol_error(
    array: Array, codec: TensorCodec, data: st.DataObject
) -> None:
    tensor = encode_tensor(array, codec, **options(codec, array), block_size=5)
    number = data.draw(st.integers(0, len(tensor.parts) - 1))
    part = bytearray(tensor.parts[number])
    if part:
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    parts = (*tensor.parts[:number], bytes(part), *tensor.parts[number + 1 :])
    try:
        result = decode(dataclasses.replace(tensor, parts=parts))
    except ProtocolError:
        return
    assert result.shape == array.shape


# --- error feedback --------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(LOSSY),
    st.sampled_from(["float32", "float64"]),
    st.lists(hnp.arrays(np.float64, 12, elements=st.floats(-100, 100)), min_size=1, max_size=8),
)
def test_all_that_was_sent_and_the_residual_are_all_that_was_given(
    codec: TensorCodec, dtype: str, rows: list[Array]
) -> None:
    given = [row.reshape(3, 4).astype(dtype) for row in rows]
    feedback = ErrorFeedback(max_bytes=1000)
    sent = [decode(feedback.encode("w", array, codec, block_size=5, **options(codec, array, k=2))) for array in given]
    residual = feedback.residual("w")
    assert residual is not None
    assert residual.dtype == sent[0].dtype == dtype
    np.testing.assert_allclose(
        np.sum(sent, axis=0, dtype=np.float64) + residual, np.sum(given, axis=0, dtype=np.float64), atol=1e-3
    )


def test_without_loss_there_is_nothing_to_make_up_for() -> None:
    feedback = ErrorFeedback(max_bytes=1000)
    array = normal(10)
    for codec in (INT4, RAW, FP32):
        feedback.encode("w", array, codec)
    residual = feedback.residual("w")
    assert residual is not None
    assert not residual.any()


def descend(send: Callable[[Array], Array]) -> float:
    """How far from the minimum of a quadratic plain descent ends, with gradients as they arrive."""
    curvature = np.linspace(0.2, 1.0, 50)
    target = normal(50, dtype="float64")
    point = np.zeros(50)
    for _ in range(1000):
        point -= 0.05 * send(curvature * (point - target))
    return float(np.abs(point - target).max())


def test_topk_with_error_feedback_goes_on_to_the_minimum_and_without_it_lags() -> None:
    feedback = ErrorFeedback(max_bytes=1000)
    with_feedback = descend(lambda gradient: decode(feedback.encode("w", gradient, TOPK, k=5)))
    without = descend(lambda gradient: decode(encode_tensor(gradient, TOPK, k=5)))
    assert with_feedback < 1e-3
    assert with_feedback < without / 10


def test_int4_with_error_feedback_delivers_a_small_constant_that_int4_alone_loses() -> None:
    array = np.array([1.0, 0.01], np.float32)
    feedback = ErrorFeedback(max_bytes=1000)
    sums = np.sum([decode(feedback.encode("w", array, INT4)) for _ in range(100)], axis=0)
    np.testing.assert_allclose(sums, 100 * array, atol=0.2)
    assert decode(encode_tensor(array, INT4))[1] == 0


def test_error_feedback_is_bounded_and_counts() -> None:
    feedback = ErrorFeedback(max_bytes=100)
    feedback.encode("a", normal(10), INT8)
    feedback.encode("b", normal(15), INT8)
    assert feedback.num_bytes == 100
    with pytest.raises(TooLargeError, match="max_bytes"):
        feedback.encode("c", normal(1), INT8)
    feedback.encode("a", normal(10), INT8)
    assert feedback.num_bytes == 100
    feedback.drop("a")
    feedback.drop("a")
    assert feedback.num_bytes == 60
    assert feedback.residual("a") is None
    feedback.encode("c", normal(10), INT8)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_an_array_that_is_refused_leaves_the_residual_alone(codec: TensorCodec, value: float) -> None:
    feedback = ErrorFeedback(max_bytes=1000)
    more = options(codec, np.zeros(3), k=1)
    big = np.array([3.3e38, 1, 1], np.float32)
    if codec is not FP16:
        feedback.encode("w", big, TOPK, k=1)
        feedback.encode("w", np.array([0, 3.3e38, 3.4e38], np.float32), TOPK, k=1)  # so that adding overflows
    before = feedback.residual("w")
    kept = None if before is None else before.copy()
    with pytest.raises(UsageError):
        feedback.encode("w", np.array([value, value, value], np.float32), codec, **more)
    after = feedback.residual("w")
    if kept is None:
        assert after is None
        assert feedback.num_bytes == 0
    else:
        assert after is not None
        np.testing.assert_array_equal(after, kept)


def test_a_name_has_one_dtype_and_shape() -> None:
    feedback = ErrorFeedback(max_bytes=1000)
    feedback.encode("w", normal(10), INT8)
    for other in (normal(5, 2), normal(10, dtype="float64")):
        with pytest.raises(UsageError, match="drop it first"):
            feedback.encode("w", other, INT8)
    for dtype in ("float16", "int32"):
        with pytest.raises(UsageError, match="as float32"):
            feedback.encode("v", np.zeros(3, dtype), FP32)
    feedback.drop("w")
    feedback.encode("w", normal(5, 2), INT8)


def test_error_feedback_takes_any_layout_and_changes_no_input() -> None:
    feedback, plain = ErrorFeedback(max_bytes=10_000), ErrorFeedback(max_bytes=10_000)
    for seed in range(3):
        array = normal(20, 30, seed=seed).T.astype(">f4")
        before = array.copy()
        native = np.ascontiguousarray(array, "<f4")
        assert feedback.encode("w", array, INT8) == plain.encode("w", native, INT8)
        np.testing.assert_array_equal(array, before)


def test_what_was_encoded_stays_as_it_was_while_the_series_goes_on() -> None:
    feedback = ErrorFeedback(max_bytes=10_000)
    feedback.encode("w", normal(10), INT4)
    tensor = feedback.encode("w", normal(10), RAW)
    before = decode(tensor).copy()
    feedback.encode("w", normal(10), INT4)
    np.testing.assert_array_equal(decode(tensor), before)


def test_the_default_block_is_worth_its_scale() -> None:
    assert encoded_num_bytes((2**20,), "float32", INT8) == 2**20 + 4 * 2**20 // DEFAULT_BLOCK_SIZE
    assert encoded_num_bytes((2**20,), "float32", INT4) < 0.13 * encoded_num_bytes((2**20,), "float32")
