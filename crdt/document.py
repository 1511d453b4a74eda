"""One author's Yjs document: a map of registers, each set as a whole.

The Yjs document (https://github.com/yjs/yjs, through pycrdt) has one root map, ``registers``. A register's value is
plain data (what JSON can say), held as its canonical MessagePack bytes. As a Yjs value it would come back
changed: Yjs has JavaScript's numbers, so every int below 2**53 returns as a float, and pycrdt panics above 2**63. A
register that only ever grows (`GROWING`) has one key per entry, ``evaluations/12``, so that an op carries one entry
and not all.

Updates come from strangers. The Yjs decoder in pycrdt recurses without a bound, and 60 kB of nested arrays end the
whole process with a segmentation fault. So an update is first read here, and handed on only if it is in the
dialect that `Document.set` writes: one client, no gaps in its clock, nothing but bytes set in the root map, and
deletions of what was there (update format, version 1:
https://github.com/yjs/yjs/blob/main/INTERNALS.md). A document is used from one thread only; pycrdt demands it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

import pycrdt

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError
from shoal.protocol.limits import MAX_NESTING, MAX_OP_BYTES

GROWING: Final = frozenset({"evaluations"})
"""Registers that are maps with one key per entry."""

MAX_UPDATE_BYTES: Final = MAX_OP_BYTES - 1024
"""One update; the rest of an op is its envelope."""

MAX_REGISTERS: Final = 16_384
"""Registers of one document, entries of growing ones counted each."""

MAX_KEY_BYTES: Final = 96
"""The name of a register."""

_ROOT: Final = "registers"
_CLIENT: Final = 1  # one writer per document, so its Yjs client id can be the same everywhere
_OVERHEAD_BYTES: Final = 64  # of one register in an update, beside its key and value; the most ever needed is 46

_CONTENT_ANY: Final = 8
_HAS_ORIGIN: Final = 0x80
_HAS_KEY: Final = 0x20
_ANY_BYTES: Final = 116


class Document:
    """One author's registers, as far as its updates have been applied."""

    __slots__ = ("_chains", "_clock", "_decoded", "_doc", "_map", "_values")

    def __init__(self, updates: Iterable[bytes] = ()) -> None:
        self._doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=_CLIENT)
        self._map = self._doc.get(_ROOT, type=pycrdt.Map)
        self._clock = 0
        self._chains = 0
        self._decoded: dict[str, tuple[bytes, Any]] = {}
        self._values: dict[str, Any] | None = None
        for update in updates:
            self.apply(update)

    def apply(self, update: bytes) -> None:
        """Apply the author's next update.

        Raises:
            LimitError: if the update, or the document with it, is too big. Nothing was changed.
            ProtocolError: if it is not an update that `set` could have written after those before. If its cause is
                a failure inside pycrdt, the document must be built anew from the updates that it had.
        """
        items, chains = _check_update(update, self._clock)
        if self._chains + chains > MAX_REGISTERS:
            raise LimitError(f"a document holds at most {MAX_REGISTERS} registers")
        try:
            self._doc.apply_update(update)
        except BaseException as error:
            # A panic in Rust arrives as a BaseException of a type that cannot be imported.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ProtocolError(f"this Yjs update cannot be applied: {error}") from error
            raise
        self._advance(items, chains)

    def set(self, registers: Mapping[str, Any]) -> bytes:
        """Set registers, in one update.

        Args:
            registers: plain data by register; for one of `GROWING`, only the entries that are new or changed, by key.

        Returns:
            The update, for others to `apply`.

        Raises:
            UsageError: if a name or a value is not one that a register can have. Nothing was changed.
            TooLargeError: if it is too much for one update, or for the document. Nothing was changed.
        """
        packed = {key: _pack(key, value) for key, value in _flatten(registers)}
        if not packed:
            raise UsageError("there is nothing to write; name a register")
        num_bytes = sum(len(key.encode()) + len(data) + _OVERHEAD_BYTES for key, data in packed.items())
        if num_bytes + _OVERHEAD_BYTES > MAX_UPDATE_BYTES:
            raise TooLargeError(
                f"{num_bytes} bytes of registers exceed the {MAX_UPDATE_BYTES} of one update; write less"
            )
        if self._chains + len(packed) > MAX_REGISTERS and self._chains + len(packed.keys() - set(self._map)) > (
            MAX_REGISTERS
        ):
            raise TooLargeError(f"a document holds at most {MAX_REGISTERS} registers; this one is full")
        # What the transaction itself reports: `get_update` would repeat every deletion since the first.
        updates: list[bytes] = []
        subscription = self._doc.observe(lambda event: updates.append(event.update))
        try:
            with self._doc.transaction():
                for key, data in packed.items():
                    self._map[key] = data
        finally:
            self._doc.unobserve(subscription)
        (update,) = updates
        self._advance(*_check_update(update, self._clock))
        return update

    def values(self) -> dict[str, Any]:
        """Plain data by register, as a copy of its own down to the growing registers; do not change what is deeper.

        What an author wrote that is not plain data is left out.
        """
        if self._values is None:
            self._values = self._read()
        return {name: dict(value) if name in GROWING else value for name, value in self._values.items()}

    def _advance(self, items: int, chains: int) -> None:
        self._clock += items
        self._chains += chains
        self._values = None

    def _read(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: {} for name in GROWING}
        decoded: dict[str, tuple[bytes, Any]] = {}
        for key, raw in self._map.items():
            data = bytes(raw)
            held = self._decoded.get(key)
            if held is None or held[0] != data:
                try:
                    held = data, _unpack(data)
                except ProtocolError:
                    continue
            decoded[key] = held
            name, slash, entry = key.partition("/")
            if name not in GROWING:
                values[key] = held[1]
            elif slash:
                values[name][entry] = held[1]
        self._decoded = decoded
        return {name: value for name, value in values.items() if name not in GROWING or value}


def _flatten(registers: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in registers.items():
        if not name or "/" in name:
            raise UsageError(f"{name!r:.80} cannot name a register; leave out the slash")
        if name not in GROWING:
            yield name, value
        elif not isinstance(value, Mapping):
            raise UsageError(f"{name} takes a map of entries, not {type(value).__name__}")
        else:
            yield from ((f"{name}/{key}", entry) for key, entry in value.items())


def _pack(key: str, value: Any) -> bytes:
    try:
        key_bytes = len(key.encode())
        data = encode(value)
        _unpack(data)
    except LimitError as error:
        raise TooLargeError(f"register {key!r:.80} is too much: {error}") from error
    except (TypeError, ValueError, OverflowError, RecursionError, ProtocolError) as error:
        raise UsageError(f"register {key!r:.80} can hold only plain data: {error}") from error
    if key_bytes > MAX_KEY_BYTES:
        raise UsageError(f"{key[:80]!r}… is too long for a register's name; {MAX_KEY_BYTES} bytes are allowed")
    return data


def _unpack(data: bytes) -> Any:
    value = decode(cast("type[Any]", Any), data, max_bytes=MAX_OP_BYTES)
    _check_plain(value, 0)
    return value


def _check_plain(value: Any, depth: int) -> None:
    if depth > MAX_NESTING:
        raise LimitError(f"a register is nested at most {MAX_NESTING} deep")
    match value:
        case None | bool() | int() | str():
            pass
        case float():
            if not math.isfinite(value):
                raise ProtocolError(f"{value} is not a number that JSON has")
        case list():
            for item in value:
                _check_plain(item, depth + 1)
        case dict():
            for item in value.values():
                _check_plain(item, depth + 1)
        case _:
            raise ProtocolError(f"{type(value).__name__} is not plain data")


class _Reader:
    """Reads the parts of a Yjs update; whatever is not there is a ProtocolError."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        if self._at >= len(self._data):
            raise ProtocolError("a Yjs update ends too early")
        self._at += 1
        return self._data[self._at - 1]

    def number(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            raise ProtocolError("a number in a Yjs update is too long")
        if value >= 2**31:
            raise ProtocolError("a number in a Yjs update is too big")
        return value

    def take(self, max_bytes: int) -> bytes:
        length = self.number()
        if length > max_bytes or self._at + length > len(self._data):
            raise ProtocolError("a text or value in a Yjs update is too long")
        self._at += length
        return self._data[self._at - length : self._at]

    def expect(self, value: int, what: str) -> None:
        if self.number() != value:
            raise ProtocolError(f"a Yjs update has {what} that no register needs")

    def end(self) -> None:
        if self._at != len(self._data):
            raise ProtocolError("a Yjs update is followed by more bytes")


def _check_update(update: bytes, clock: int) -> tuple[int, int]:
    """Check that an update is in the dialect of this module and starts at ``clock``.

    Returns:
        How many items it adds, and how many of them begin a new key.
    """
    if len(update) > MAX_UPDATE_BYTES:
        raise LimitError(f"an update of {len(update)} bytes exceeds the limit of {MAX_UPDATE_BYTES}")
    reader = _Reader(update)
    reader.expect(1, "a number of clients")
    items = reader.number()
    reader.expect(_CLIENT, "a client")
    reader.expect(clock, "a clock")
    if not 0 < items <= len(update):
        raise ProtocolError("a Yjs update has a number of items that cannot be")
    chains = 0
    for at in range(clock, clock + items):
        info = reader.byte()
        if info not in (_CONTENT_ANY | _HAS_KEY, _CONTENT_ANY | _HAS_KEY | _HAS_ORIGIN):
            raise ProtocolError("a Yjs update has content other than registers")
        if info & _HAS_ORIGIN:
            reader.expect(_CLIENT, "a client")
            if reader.number() >= at:
                raise ProtocolError("a Yjs update replaces an item that is not there")
        else:
            chains += 1
            reader.expect(1, "a parent")
            if reader.take(len(_ROOT)) != _ROOT.encode():
                raise ProtocolError("a Yjs update writes into another root than the registers")
            try:
                reader.take(MAX_KEY_BYTES).decode()
            except UnicodeDecodeError as error:
                raise ProtocolError("a register's name is not UTF-8") from error
        reader.expect(1, "a list of values")
        if reader.byte() != _ANY_BYTES:
            raise ProtocolError("a Yjs update sets a register to something else than bytes")
        reader.take(MAX_UPDATE_BYTES)
    _check_deletions(reader, clock + items)
    reader.end()
    return items, chains


def _check_deletions(reader: _Reader, clock: int) -> None:
    clients = reader.number()
    if clients > 1:
        raise ProtocolError("a Yjs update deletes items of several clients")
    if clients == 0:
        return
    reader.expect(_CLIENT, "a client")
    end = 0
    for _ in range(reader.number()):
        start, length = reader.number(), reader.number()
        if length == 0 or start < end or start + length > clock:
            raise ProtocolError("a Yjs update deletes items that are not there")
        end = start + length
