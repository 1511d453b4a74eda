"""Schemas on the wire: frozen dataclasses to MessagePack and back, strictly.

A message type is a dataclass. It is written as a map from field name to value, so a later version may add
a field with a default: an older reader ignores it, a newer one fills it in. Encoding is canonical (keys
sorted, shortest integers, UTF-8), so the bytes of a value can be signed and named by CID.

Decoding trusts nothing: size is checked first, nesting is bounded, extension types are refused, and every
field is checked against its annotation. Supported annotations: ``None bool int float str bytes``, subclasses
of ``str`` with a ``parse`` class method, ``IntEnum``/``StrEnum``, dataclasses, ``tuple[T, ...]``,
``list[T]``, ``dict[str, T]``, ``T | None`` and ``Any`` (plain data only).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from typing import Any, TypeVar

import msgpack

from shoal.protocol.errors import LimitError, ProtocolError, ShoalError
from shoal.protocol.limits import MAX_HEADER_BYTES, MAX_NESTING

T = TypeVar("T")


def encode(value: object) -> bytes:
    """The canonical MessagePack form of a dataclass or of plain data."""
    packed: bytes = msgpack.packb(_plain(value), use_bin_type=True)
    return packed


def decode(kind: type[T], data: bytes | memoryview, *, max_bytes: int = MAX_HEADER_BYTES) -> T:
    """Read one value of type ``kind``.

    Raises:
        LimitError: if the data is longer than ``max_bytes`` or nested deeper than `limits.MAX_NESTING`.
        ProtocolError: if it is not MessagePack, or a field is missing or of the wrong type.
    """
    if len(data) > max_bytes:
        raise LimitError(f"a {kind.__name__} of {len(data)} bytes exceeds the limit of {max_bytes}")
    try:
        value = msgpack.unpackb(
            data, raw=False, strict_map_key=True, use_list=True, timestamp=0, ext_hook=_refuse_extension
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"this is not a {kind.__name__}: {error or type(error).__name__}") from error
    result = _check(kind, value, kind.__name__, 0)
    return typing.cast(T, result)


def to_plain(value: object) -> Any:
    """The value as maps, lists and scalars, as it would go over the wire."""
    return _plain(value)


def from_plain(kind: type[T], value: object) -> T:
    """Check plain data against a type; the inverse of `to_plain`.

    Raises:
        ProtocolError: if a field is missing or of the wrong type.
    """
    return typing.cast(T, _check(kind, value, kind.__name__, 0))


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} of {len(data)} bytes is not allowed")


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | bytes():
            return value
        case enum.Enum():
            return value.value
        case str():
            return str(value)
        case int() | float():
            return value
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(value[key]) for key in sorted(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = sorted(field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    raise TypeError(f"{type(value).__name__} has no wire form")


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return tuple(
        (field.name, hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    )


def _check(kind: Any, value: Any, where: str, depth: int) -> Any:
    if depth > MAX_NESTING:
        raise LimitError(f"{where} is nested deeper than {MAX_NESTING}")
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _check_union(kind, value, where, depth)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        item_kind = typing.get_args(kind)[0]
        return origin(_check(item_kind, item, f"{where}[]", depth + 1) for item in value)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _wrong(where, "a map with text keys", value)
        item_kind = typing.get_args(kind)[1]
        return {key: _check(item_kind, item, f"{where}.{key[:40]}", depth + 1) for key, item in value.items()}
    if kind is Any:
        return _check_any(value, where, depth)
    if dataclasses.is_dataclass(kind):
        return _check_dataclass(typing.cast(type, kind), value, where, depth)
    return _check_scalar(kind, value, where)


def _check_union(kind: Any, value: Any, where: str, depth: int) -> Any:
    arms = typing.get_args(kind)
    if value is None and type(None) in arms:
        return None
    (arm,) = (arm for arm in arms if arm is not type(None))
    return _check(arm, value, where, depth)


def _check_any(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, dict):
        return _check(dict[str, Any], value, where, depth)
    if isinstance(value, list):
        return _check(list[Any], value, where, depth)
    if not isinstance(value, types.NoneType | bool | int | float | str | bytes):
        raise _wrong(where, "plain data", value)  # msgpack reads timestamps without asking the extension hook
    return value


def _check_dataclass(kind: type, value: Any, where: str, depth: int) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "a map", value)
    taken: dict[str, Any] = {}
    for name, hint, required in _fields(kind):
        if name in value:
            taken[name] = _check(hint, value[name], f"{where}.{name}", depth + 1)
        elif required:
            raise ProtocolError(f"{where}.{name} is missing")
    try:
        return kind(**taken)
    except ShoalError as error:
        raise ProtocolError(f"{where}: {error}") from error


def _check_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(where, "a number", value)
        if not math.isfinite(value):
            raise ProtocolError(f"{where} is not a finite number")
        return float(value)
    if kind in (bool, bytes, str, int, type(None)):
        if type(value) is not kind:
            raise _wrong(where, kind.__name__, value)
        return value
    if issubclass(kind, enum.Enum):
        if type(value) not in (int, str):  # True and 1.0 equal 1, but are not written so
            raise _wrong(where, f"a {kind.__name__}", value)
        try:
            return kind(value)
        except ValueError as error:
            raise ProtocolError(f"{where}: {value!r:.80} is not a {kind.__name__}") from error
    if issubclass(kind, str) and hasattr(kind, "parse"):
        if not isinstance(value, str):
            raise _wrong(where, "text", value)
        try:
            return kind.parse(value)
        except ShoalError as error:
            raise ProtocolError(f"{where}: {error}") from error
    raise TypeError(f"{kind!r} is not a type that the codec supports")


def _wrong(where: str, expected: str, value: Any) -> ProtocolError:
    return ProtocolError(f"{where} should be {expected}, not {type(value).__name__}")
