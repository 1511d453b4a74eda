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

A Yjs document keeps a trace of every item that was ever in it. So a snapshot (`Document.compacted`) begins a new one.
What is read is kept up to date by update; what was not touched is not read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import pycrdt

from shoal.crdt.snapshots import MAX_SEQ, NAME_BYTES, places, thinned
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError
from shoal.protocol.limits import MAX_NESTING, MAX_OP_BYTES

GROWING: Final = frozenset({"evaluations"})
"""Registers that are maps with one key per entry."""

MAX_UPDATE_BYTES: Final = MAX_OP_BYTES - 1024
"""One update; the rest of an op is its envelope."""

MAX_SNAPSHOT_BYTES: Final = MAX_UPDATE_BYTES - NAME_BYTES * len(places(MAX_SEQ))
"""The update of a snapshot, which carries its trail too."""

MAX_REGISTERS: Final = 1024
"""Registers of one document since its snapshot, entries of growing ones counted each."""

MAX_PLAIN_BYTES: Final = 32 * 1024
"""All registers but the growing ones, as they are written here: they have to fit into a snapshot."""

KEPT_ENTRIES: Final = 256
"""Entries of a growing register that a snapshot keeps at most: the newest half as they are, of the older ones fewer."""

MAX_KEY_BYTES: Final = 96
"""The name of a register."""

_ROOT: Final = "registers"
_CLIENT: Final = 1  # one writer per document, so its Yjs client id can be the same everywhere
_OVERHEAD_BYTES: Final = 64  # of one register in an update, beside its key and value; the most ever needed is 46

_CONTENT_ANY: Final = 8
_HAS_ORIGIN: Final = 0x80
_HAS_KEY: Final = 0x20
_ODD: Final = -1  # in the place of a register's newest item
_ANY_BYTES: Final = 116


@dataclass(frozen=True, slots=True)
class _Changes:
    """What an update does: each new item's register, bytes, and the item that it replaces, by number; what it deletes.

    ``chains`` is how many of the items replace none.
    """

    keys: tuple[str, ...]
    values: tuple[bytes, ...]
    origins: tuple[int | None, ...]
    chains: int
    deleted: tuple[tuple[int, int], ...]


class Document:
    """One author's registers, as far as its updates have been applied."""

    __slots__ = ("_chains", "_doc", "_keys", "_last", "_map", "_plain", "_values")

    def __init__(self, updates: Iterable[bytes] = ()) -> None:
        self._doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=_CLIENT)
        self._map = self._doc.get(_ROOT, type=pycrdt.Map)
        self._keys: list[str] = []  # of each item ever made
        self._last: dict[str, int] = {}  # the newest item of each register, if each has replaced the one before it
        self._chains = 0
        self._plain: dict[str, int] = {}  # bytes by register, of those that do not grow
        self._values: dict[str, Any] = {}
        for update in updates:
            self.apply(update)

    @property
    def num_registers(self) -> int:
        """How many registers it ever had, entries of growing ones counted each."""
        return self._chains

    def apply(self, update: bytes) -> None:
        """Apply the author's next update.

        Raises:
            LimitError: if the update, or the document with it, is too big. Nothing was changed.
            ProtocolError: if it is not an update that `set` could have written after those before. If its cause is
                a failure inside pycrdt, the document must be built anew from the updates that it had.
        """
        changes = _check_update(update, self._keys)
        if self._chains + changes.chains > MAX_REGISTERS:
            raise LimitError(f"a document holds at most {MAX_REGISTERS} registers")
        try:
            self._doc.apply_update(update)
        except BaseException as error:
            # A panic in Rust arrives as a BaseException of a type that cannot be imported.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ProtocolError(f"this Yjs update cannot be applied: {error}") from error
            raise
        self._advance(changes)

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
        plain = self._plain | {key: len(data) for key, data in packed.items() if key.partition("/")[0] not in GROWING}
        if sum(plain.values()) > MAX_PLAIN_BYTES:
            raise TooLargeError(f"the registers of one author hold at most {MAX_PLAIN_BYTES} bytes; write less")
        if self._chains + len(packed.keys() - set(self._keys)) > MAX_REGISTERS:
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
        self._advance(_check_update(update, self._keys))
        return update

    def compacted(self, registers: Mapping[str, Any]) -> tuple[Document, bytes]:
        """A new document of what this one holds and these registers, and the update that makes it of nothing.

        Of a growing register `KEPT_ENTRIES` stay at most, and fewer if that is too much for one update.

        Raises:
            UsageError: if a name or a value is not one that a register can have.
            TooLargeError: if it is too much without any old entry.
        """
        merged = self.values()
        for name, value in registers.items():
            is_grown = name in GROWING and isinstance(value, Mapping)
            merged[name] = merged.get(name, {}) | dict(value) if is_grown else value
        keep = KEPT_ENTRIES
        while True:
            kept = {name: thinned(value, keep) if name in GROWING else value for name, value in merged.items()}
            document, update = Document(), b""
            try:
                update = document.set({name: value for name, value in kept.items() if value or name not in GROWING})
            except TooLargeError:
                if keep <= 2 or not any(merged.get(name) for name in GROWING):
                    raise
            if 0 < len(update) <= MAX_SNAPSHOT_BYTES:
                return document, update
            if keep <= 2:
                raise TooLargeError(f"a snapshot holds at most {MAX_SNAPSHOT_BYTES} bytes; write less")
            keep //= 2

    def values(self) -> dict[str, Any]:
        """Plain data by register, as a copy of its own down to the growing registers; do not change what is deeper.

        What an author wrote that is not plain data is left out.
        """
        return {name: dict(value) if name in GROWING else value for name, value in self._values.items()}

    def view(self) -> Mapping[str, Any]:
        """As `values`, but not a copy: it is never changed, and after an update it is another object.

        What the update did not touch is the same object in both.
        """
        return self._values

    def _advance(self, changes: _Changes) -> None:
        self._chains += changes.chains
        current: dict[str, bytes | None] = {}
        odd: dict[str, None] = {}  # what only Yjs knows the outcome of; `set` writes nothing of the kind
        clock = len(self._keys)
        self._keys += changes.keys
        for at, (key, data, origin) in enumerate(
            zip(changes.keys, changes.values, changes.origins, strict=True), clock
        ):
            current[key] = data
            if self._last.get(key) == origin:
                self._last[key] = at
            else:
                odd[key] = None
        for start, length in changes.deleted:
            for at, key in enumerate(self._keys[start : start + length], start):
                if self._last[key] in (at, _ODD):
                    odd[key] = None
        if odd:
            with self._doc.transaction():
                for key in odd:
                    self._last[key] = _ODD
                    current[key] = self._map.get(key)
        values, copied = dict(self._values), set[str]()
        for key, raw in current.items():
            name, slash, entry = key.partition("/")
            if name in GROWING:
                if not slash:
                    continue
                if name not in copied:
                    values[name] = dict(values.get(name, {}))
                    copied.add(name)
                _put(values[name], entry, raw)
            else:
                _put(values, key, raw)
                self._plain[key] = 0 if raw is None else len(raw)
        for name in copied:
            if not values[name]:
                del values[name]
        self._values = values


def _put(values: dict[str, Any], key: str, raw: bytes | None) -> None:
    try:
        if raw is not None:
            values[key] = _unpack(bytes(raw))
            return
    except ProtocolError:
        pass
    values.pop(key, None)


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


def _check_update(update: bytes, known: Sequence[str]) -> _Changes:
    """Check that an update is in the dialect of this module and starts after the ``known`` items, given by key."""
    if len(update) > MAX_UPDATE_BYTES:
        raise LimitError(f"an update of {len(update)} bytes exceeds the limit of {MAX_UPDATE_BYTES}")
    clock = len(known)
    reader = _Reader(update)
    reader.expect(1, "a number of clients")
    items = reader.number()
    reader.expect(_CLIENT, "a client")
    reader.expect(clock, "a clock")
    if not 0 < items <= len(update):
        raise ProtocolError("a Yjs update has a number of items that cannot be")
    chains, keys, values, origins = 0, list[str](), list[bytes](), list[int | None]()
    for at in range(clock, clock + items):
        info = reader.byte()
        if info not in (_CONTENT_ANY | _HAS_KEY, _CONTENT_ANY | _HAS_KEY | _HAS_ORIGIN):
            raise ProtocolError("a Yjs update has content other than registers")
        if info & _HAS_ORIGIN:
            reader.expect(_CLIENT, "a client")
            origin = reader.number()
            if origin >= at:
                raise ProtocolError("a Yjs update replaces an item that is not there")
            keys.append(known[origin] if origin < clock else keys[origin - clock])
            origins.append(origin)
        else:
            chains += 1
            origins.append(None)
            reader.expect(1, "a parent")
            if reader.take(len(_ROOT)) != _ROOT.encode():
                raise ProtocolError("a Yjs update writes into another root than the registers")
            try:
                keys.append(reader.take(MAX_KEY_BYTES).decode())
            except UnicodeDecodeError as error:
                raise ProtocolError("a register's name is not UTF-8") from error
        reader.expect(1, "a list of values")
        if reader.byte() != _ANY_BYTES:
            raise ProtocolError("a Yjs update sets a register to something else than bytes")
        values.append(reader.take(MAX_UPDATE_BYTES))
    deleted = _check_deletions(reader, clock + items)
    reader.end()
    return _Changes(tuple(keys), tuple(values), tuple(origins), chains, deleted)


def _check_deletions(reader: _Reader, clock: int) -> tuple[tuple[int, int], ...]:
    clients = reader.number()
    if clients > 1:
        raise ProtocolError("a Yjs update deletes items of several clients")
    if clients == 0:
        return ()
    reader.expect(_CLIENT, "a client")
    deleted, end = list[tuple[int, int]](), 0
    for _ in range(reader.number()):
        start, length = reader.number(), reader.number()
        if length == 0 or start < end or start + length > clock:
            raise ProtocolError("a Yjs update deletes items that are not there")
        end = start + length
        deleted.append((start, length))
    return tuple(deleted)
