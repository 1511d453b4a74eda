"""Schemas on the wire: frozen dataclasses to MessagePack and back, strictly.

A message type is a dataclass. It is written as a map from field name to value, so a later version may add
a field with a default: an older reader ignores it, a newer one fills it in. (Where `decode` is told to be strict, an
older reader refuses it.) Encoding is canonical (keys sorted, shortest integers, UTF-8), so the bytes of a value can be
signed and named by CID.

Bulk bytes do not pass through MessagePack: a field of type `Attachment` travels beside the header, raw, and the
header holds its number. Such a message is written by `encode_message` and read by `decode_message`.

Decoding trusts nothing: size is checked first, nesting is bounded, extension types are refused, and every
field is checked against its annotation. Supported annotations: ``None bool int float str bytes``, subclasses
of ``str`` with a ``parse`` class method, ``IntEnum``/``StrEnum``, dataclasses (not recursive ones),
``tuple[T, ...]``, ``list[T]``, ``dict[str, T]``, ``T | None``, ``Attachment`` and ``Any`` (plain data only).
A type's reader is put together once, at its first use.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgpack

from shoal.protocol.errors import LimitError, ProtocolError, ShoalError, UnknownFieldError
from shoal.protocol.limits import MAX_HEADER_BYTES, MAX_NESTING

T = TypeVar("T")

Buffer = bytes | memoryview
Attachment = Annotated[bytes | memoryview, "attachment"]
"""The type of a field whose bytes travel raw, beside the header; what is received may be a view of what came.

What is sent is not copied either: whoever sends memory that can change leaves it as it is until the call is over."""

_CLAIMS_BYTES: Final = 512
"""msgpack makes room for an array as soon as it reads how long that claims to be, so arrays within arrays would cost
80 kB for 3 bytes each. In what is at most this long, they cost 0.7 MB together."""

_Attachments = list[Buffer | None]  # None: already taken
_Reader = Callable[[Any, _Attachments], Any]

pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True, autoreset=True).pack
"""Plain data in MessagePack, as it is: canonical if its maps are in the order of their keys."""


def encode(value: object) -> bytes:
    """The canonical MessagePack form of a dataclass or of plain data without attachments."""
    return pack(_plain(value, None))


def encode_message(value: object) -> tuple[bytes, list[Buffer]]:
    """A message as its header, canonical MessagePack, and its attachments, passed on without a copy."""
    attachments: list[Buffer] = []
    return pack(_plain(value, attachments)), attachments


def decode(kind: type[T], data: Buffer, *, max_bytes: int = MAX_HEADER_BYTES, strict: bool = False) -> T:
    """Read one value of type ``kind``.

    Args:
        kind: a message type, or any other annotation that the codec supports.
        data: MessagePack.
        max_bytes: more is refused unread.
        strict: refuse fields that ``kind`` does not have, at any depth, in place of ignoring them. For what everybody
            must understand in the same way, such as the manifest of a run.

    Raises:
        LimitError: if the data is longer than ``max_bytes`` or nested deeper than `limits.MAX_NESTING`.
        UnknownFieldError: if ``strict`` and there is a field that the type does not have.
        ProtocolError: if it is not MessagePack, or a field is missing or of the wrong type.
    """
    value = unpack(data, kind.__name__, max_bytes=max_bytes)
    return typing.cast(T, _reader_of(kind, strict=strict)(value, []))


def decode_message(
    kind: type[T], header: Buffer, attachments: Sequence[Buffer], *, max_bytes: int = MAX_HEADER_BYTES
) -> T:
    """Read a message; attachments that no field names (a newer version's) are ignored.

    Raises:
        LimitError: as `decode`.
        ProtocolError: as `decode`; also if an attachment is missing or named twice.
    """
    value = unpack(header, kind.__name__, max_bytes=max_bytes)
    return typing.cast(T, _reader_of(kind)(value, list(attachments)))


def unpack(data: Buffer, what: str, *, max_bytes: int = MAX_HEADER_BYTES) -> Any:
    """Plain data that nobody has checked yet; ``what`` it should be is for the errors.

    Raises:
        LimitError: if the data is longer than ``max_bytes``.
        ProtocolError: if it is not MessagePack.
    """
    if len(data) > max_bytes:
        raise LimitError(f"a {what} of {len(data)} bytes exceeds the limit of {max_bytes}")
    try:
        if len(data) > _CLAIMS_BYTES:
            _check_whole(data)
        return msgpack.unpackb(data, ext_hook=_refuse_extension)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"this is not a {what}: {str(error) or type(error).__name__}") from error


def _check_whole(data: Buffer) -> None:
    """Check that what the arrays claim to hold is there, before memory is set aside for it."""
    unpacker = msgpack.Unpacker(read_size=len(data), max_buffer_size=len(data))
    unpacker.feed(data)
    unpacker.skip()


def to_plain(value: object) -> Any:
    """The value as maps, lists and scalars, as it would go over the wire."""
    return _plain(value, None)


def from_plain(kind: type[T], value: object) -> T:
    """Check plain data against a type; the inverse of `to_plain`.

    Raises:
        ProtocolError: if a field is missing or of the wrong type.
    """
    return typing.cast(T, _reader_of(kind)(value, []))


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} of {len(data)} bytes is not allowed")


# --- writing ---------------------------------------------------------------------------------------------------------

_AS_IT_IS = frozenset((type(None), bool, bytes, int, float, str))


def _plain(value: Any, attachments: list[Buffer] | None) -> Any:
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    fields = _fields_to_write.get(kind)
    if fields is not None:
        plain = {}
        for name, is_raw in fields:
            item = getattr(value, name)
            if is_raw:
                plain[name] = _attach(item, attachments)
            else:
                plain[name] = item if type(item) in _AS_IT_IS else _plain(item, attachments)
        return plain
    match value:
        case enum.Enum():
            return value.value
        case str():
            return str(value)
        case int() | float() | bytes():
            return value
        case list() | tuple():
            return [_plain(item, attachments) for item in value]
        case dict():
            return {str(key): _plain(value[key], attachments) for key in sorted(value)}
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind.__name__} has no wire form")
    hints = typing.get_type_hints(kind, include_extras=True)
    names = sorted(field.name for field in dataclasses.fields(kind))
    _fields_to_write[kind] = tuple((name, _is_raw(hints[name])) for name in names)
    return _plain(value, attachments)


_fields_to_write: dict[type, tuple[tuple[str, bool], ...]] = {}
"""Of each message type that was met: its fields in canonical order, and whether they are attachments."""


def _attach(value: Any, attachments: list[Buffer] | None) -> Any:
    if attachments is not None and type(value) is bytes:
        attachments.append(value)
        return len(attachments) - 1
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_attach(item, attachments) for item in value]
    if attachments is None:
        raise TypeError("a message with attachments is written by encode_message")
    view = memoryview(value)
    attachments.append(view.cast("B") if view.nbytes else b"")  # flat, so that its length is that of its bytes
    return len(attachments) - 1


def _is_raw(hint: Any) -> bool:
    return hint == Attachment or any(_is_raw(arm) for arm in typing.get_args(hint) if arm is not Ellipsis)


# --- reading ---------------------------------------------------------------------------------------------------------


_readers: dict[Any, _Reader] = {}
_strict_readers: dict[Any, _Reader] = {}


def _reader_of(kind: Any, *, strict: bool = False) -> _Reader:
    readers = _strict_readers if strict else _readers
    reader = readers.get(kind)
    if reader is None:
        reader = readers[kind] = _reader(kind, kind.__name__, 0, strict)
    return reader


def _reader(kind: Any, where: str, depth: int, strict: bool) -> _Reader:
    """What checks a value against ``kind`` and builds it; ``where`` is its place, for the errors."""
    if depth > MAX_NESTING:
        raise TypeError(f"{where} is nested deeper than {MAX_NESTING}: the codec has no recursive types")
    origin = typing.get_origin(kind)
    if kind == Attachment:
        return _attachment_reader(where)
    if origin in (typing.Union, types.UnionType):
        return _optional_reader(kind, where, depth, strict)
    if origin in (tuple, list):
        return _list_reader(kind, where, depth, strict)
    if origin is dict:
        return _dict_reader(kind, where, depth, strict)
    if kind is Any:
        return lambda value, _: _check_plain(value, where, depth)
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(typing.cast(type, kind), where, depth, strict)
    return _scalar_reader(kind, where)


def _attachment_reader(where: str) -> _Reader:
    def read(value: Any, attachments: _Attachments) -> Any:
        if type(value) is not int:
            raise _wrong(where, "the number of an attachment", value)
        taken = attachments[value] if 0 <= value < len(attachments) else None
        if taken is None:
            raise ProtocolError(f"{where}: there is no attachment {value}, or it was named twice")
        attachments[value] = None
        return taken

    return read


def _optional_reader(kind: Any, where: str, depth: int, strict: bool) -> _Reader:
    (arm,) = (arm for arm in typing.get_args(kind) if arm is not type(None))
    read_arm = _reader(arm, where, depth, strict)

    def read(value: Any, attachments: _Attachments) -> Any:
        return None if value is None else read_arm(value, attachments)

    return read


def _list_reader(kind: Any, where: str, depth: int, strict: bool) -> _Reader:
    make = typing.get_origin(kind)
    read_item = _reader(typing.get_args(kind)[0], f"{where}[]", depth + 1, strict)

    def read(value: Any, attachments: _Attachments) -> Any:
        if type(value) is not list:
            raise _wrong(where, "a list", value)
        return make([read_item(item, attachments) for item in value])

    return read


def _dict_reader(kind: Any, where: str, depth: int, strict: bool) -> _Reader:
    read_item = _reader(typing.get_args(kind)[1], f"{where}{{}}", depth + 1, strict)

    def read(value: Any, attachments: _Attachments) -> Any:
        if type(value) is not dict or not all(type(key) is str for key in value):
            raise _wrong(where, "a map with text keys", value)
        return {key: read_item(item, attachments) for key, item in value.items()}

    return read


def _dataclass_reader(kind: type, where: str, depth: int, strict: bool) -> _Reader:
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    fields = tuple(
        (
            field.name,
            _reader(hints[field.name], f"{where}.{field.name}", depth + 1, strict),
            field.default is missing and field.default_factory is missing,
        )
        for field in dataclasses.fields(kind)
    )
    known = frozenset(name for name, _, _ in fields)

    def read(value: Any, attachments: _Attachments) -> Any:
        if type(value) is not dict:
            raise _wrong(where, "a map", value)
        if strict and not value.keys() <= known:
            unknown = min(str(name) for name in value.keys() - known)
            raise UnknownFieldError(f"{where} has the unknown field {unknown[:80]!r}")
        taken: dict[str, Any] = {}
        for name, read_field, is_required in fields:
            if name in value:
                taken[name] = read_field(value[name], attachments)
            elif is_required:
                raise ProtocolError(f"{where}.{name} is missing")
        try:
            return kind(**taken)
        except ShoalError as error:
            raise ProtocolError(f"{where}: {error}") from error

    return read


def _scalar_reader(kind: Any, where: str) -> _Reader:
    if kind is float:
        return lambda value, _: _check_float(value, where)
    if kind in (bool, bytes, str, int, type(None)):

        def read(value: Any, attachments: _Attachments) -> Any:
            if type(value) is not kind:
                raise _wrong(where, kind.__name__, value)
            return value

        return read
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return lambda value, _: _check_enum(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, str) and hasattr(kind, "parse"):
        return lambda value, _: _check_parsed(kind, value, where)
    raise TypeError(f"{kind!r} is not a type that the codec supports")


def _check_float(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise _wrong(where, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProtocolError(f"{where} is not a finite number")
    return number


def _check_enum(kind: type[enum.Enum], value: Any, where: str) -> enum.Enum:
    if type(value) not in (int, str):  # True and 1.0 equal 1, but are not written so
        raise _wrong(where, f"a {kind.__name__}", value)
    try:
        return kind(value)
    except ValueError as error:
        known = ", ".join(str(each.value) for each in kind)
        raise ProtocolError(f"{where}: {value!r:.80} is none of {known:.200}") from error


def _check_parsed(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not str:
        raise _wrong(where, "text", value)
    try:
        return kind.parse(value)
    except ShoalError as error:
        raise ProtocolError(f"{where}: {error}") from error


def _check_plain(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_NESTING:
        raise LimitError(f"{where} is nested deeper than {MAX_NESTING}")
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise _wrong(where, "a map with text keys", value)
        return {key: _check_plain(item, f"{where}.{key[:40]!r:.40}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_check_plain(item, f"{where}[]", depth + 1) for item in value]
    if not isinstance(value, types.NoneType | bool | int | float | str | bytes):
        raise _wrong(where, "plain data", value)  # msgpack reads timestamps without asking the extension hook
    return value


def _wrong(where: str, expected: str, value: Any) -> ProtocolError:
    return ProtocolError(f"{where} should be {expected}, not {type(value).__name__}")
