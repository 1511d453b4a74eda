"""Arrays as bytes that can be named by CID, and as a digest that peers can compare.

The bytes are a safetensors file (https://huggingface.co/docs/safetensors): an eight-byte length, a JSON header,
raw little-endian arrays. It runs nothing when read. Safetensors orders arrays by dtype and name whatever order
they come in, but keeps its metadata in a hash map, whose order changes from process to process; so everything
that describes the arrays goes under one key, as canonical JSON. Equal arrays and equal metadata give equal
bytes on every machine, and so the same CID.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from shoal.protocol.errors import ProtocolError
from shoal.training.exchange.averager import Arrays

_META_KEY: Final = "shoal"
_LENGTH_BYTES: Final = 8
_DTYPES: Final = frozenset(
    np.dtype(name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
)


def encode_arrays(arrays: Mapping[str, npt.NDArray[np.generic]], meta: dict[str, Any]) -> bytes:
    """The canonical bytes of named arrays and what describes them.

    Args:
        arrays: of booleans, integers or floats, of any shape.
        meta: plain data that JSON can say exactly: text keys, no NaN.

    Raises:
        TypeError: if an array or the metadata has no such form.
        ValueError: if the metadata holds NaN or infinity.
    """
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.numpy.save({name: _canonical(name, arrays[name]) for name in sorted(arrays)}, {_META_KEY: text})


def decode_arrays(data: bytes | memoryview) -> tuple[Arrays, dict[str, Any]]:
    """Read what `encode_arrays` wrote.

    Returns:
        The arrays by name, and the metadata.

    Raises:
        ProtocolError: if these bytes are anything else.
    """
    data = bytes(data)
    try:
        loaded = safetensors.numpy.load(data)
        length = int.from_bytes(data[:_LENGTH_BYTES], "little")
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        meta = json.loads(header["__metadata__"][_META_KEY])
        json.dumps(meta, allow_nan=False)  # Python also reads NaN, and 1e999 as infinity
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(
            f"these {len(data)} bytes are not a Shoal state ({error!r:.200}); fetch it from another peer"
        ) from error
    if not isinstance(meta, dict):
        raise ProtocolError("the metadata of this state is not a map; fetch it from another peer")
    arrays: Arrays = dict(loaded)
    for name, array in arrays.items():
        if array.dtype not in _DTYPES:
            raise ProtocolError(f"{name[:80]!r} in this state is {array.dtype}; fetch it from another peer")
    return arrays, meta


def digest(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """Hex sha256 over the names, dtypes, shapes and raw bytes of the arrays, in the order of their names."""
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        array = _canonical(name, arrays[name])
        hasher.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode() + b"\n")
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def check_fit(arrays: Mapping[str, npt.NDArray[np.generic]], template: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Check arrays that came from elsewhere against what they are to replace.

    Raises:
        ProtocolError: if names, shapes or dtypes differ, or a value is NaN or infinite.
    """
    if arrays.keys() != template.keys():
        odd = min(arrays.keys() ^ template.keys())
        raise ProtocolError(f"{odd[:80]!r} is {'missing' if odd in template else 'not asked for'}; take another state")
    for name, array in arrays.items():
        expected = template[name]
        if (array.dtype, array.shape) != (expected.dtype, expected.shape):
            raise ProtocolError(
                f"{name!r} is {array.dtype}{list(array.shape)}, not {expected.dtype}{list(expected.shape)};"
                " take another state"
            )
        if not np.isfinite(array).all():
            raise ProtocolError(f"{name!r} holds NaN or infinity; take another state")


def _canonical(name: str, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    if array.dtype.newbyteorder("=") not in _DTYPES:
        raise TypeError(f"{name!r} is {array.dtype}; a state holds booleans, integers and floats up to 64 bits")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
