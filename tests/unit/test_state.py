"""Equal state gives equal bytes in every process; anything else than a state is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.training.exchange.averager import Arrays
from shoal.training.state import decode_arrays, digest, encode_arrays

META: dict[str, Any] = {"epoch": 3, "task": "gym:CartPole-v1", "nested": {"b": [1, 2.5, None], "a": True}, "ü": "é"}


def arrays() -> Arrays:
    return {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/step": np.asarray(7, dtype=np.int64),
        "a/empty": np.zeros((0, 4), np.float64),
        "mask": np.array([True, False]),
        "strided": np.arange(10, dtype=np.float64)[::2],
    }


def test_what_was_written_is_read() -> None:
    result, meta = decode_arrays(memoryview(encode_arrays(arrays(), META)))
    assert meta == META
    assert result.keys() == arrays().keys()
    for name, array in arrays().items():
        assert (result[name].dtype, result[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(result[name], array)


def test_the_order_of_names_and_keys_changes_no_byte() -> None:
    backwards = dict(reversed(arrays().items()))
    assert encode_arrays(backwards, dict(reversed(META.items()))) == encode_arrays(arrays(), META)
    assert digest(backwards) == digest(arrays())


def test_other_processes_write_the_same_bytes() -> None:
    program = (
        "import hashlib, numpy as np; from shoal.training.state import encode_arrays, digest;"
        "a = {f'p{i}': np.full((3,), i, np.float32) for i in range(20)};"
        "m = {f'k{i}': i for i in range(20)};"
        "print(hashlib.sha256(encode_arrays(a, m)).hexdigest(), digest(a))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
        outputs.add(done.stdout.decode().strip())
    here = {f"p{i}": np.full((3,), i, np.float32) for i in range(20)}
    data = encode_arrays(here, {f"k{i}": i for i in range(20)})
    assert outputs == {f"{hashlib.sha256(data).hexdigest()} {digest(here)}"}


@pytest.mark.parametrize(
    "change",
    [
        {"b": np.arange(6, dtype=np.float32).reshape(3, 2)},
        {"b": np.arange(6, dtype=np.int32).reshape(2, 3)},
        {"b": np.arange(1, 7, dtype=np.float32).reshape(2, 3)},
        {"c": np.zeros(0)},
    ],
)
def test_the_digest_covers_names_dtypes_shapes_and_values(change: Arrays) -> None:
    assert digest(arrays() | change) != digest(arrays())


def test_byte_order_is_no_difference() -> None:
    big = {"x": np.arange(3, dtype=">f4")}
    little = {"x": np.arange(3, dtype="<f4")}
    assert digest(big) == digest(little)
    assert encode_arrays(big, {}) == encode_arrays(little, {})


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_arrays(data)


@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_damage_is_refused_or_harmless(position: int, value: int) -> None:
    data = bytearray(encode_arrays(arrays(), META))
    data[position] = value
    try:
        decode_arrays(bytes(data))
    except ProtocolError:
        return


def test_cut_and_foreign_files_are_refused() -> None:
    import safetensors.numpy

    data = encode_arrays(arrays(), META)
    foreign = safetensors.numpy.save({"x": np.zeros(1)})
    listed = safetensors.numpy.save({"x": np.zeros(1)}, {"shoal": "[]"})
    for bad in (data[:-1], data + b"x", foreign, listed):
        with pytest.raises(ProtocolError):
            decode_arrays(bad)


def test_what_has_no_exact_form_is_not_written() -> None:
    with pytest.raises(TypeError):
        encode_arrays({"x": np.array(["text"])}, {})
    with pytest.raises(ValueError, match="JSON"):
        encode_arrays({}, {"x": float("nan")})


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_metadata_that_nobody_could_write_is_refused(value: str) -> None:
    import safetensors.numpy

    with pytest.raises(ProtocolError, match="not a Shoal state"):
        decode_arrays(safetensors.numpy.save({"x": np.zeros(1)}, {"shoal": f'{{"x": {value}}}'}))
