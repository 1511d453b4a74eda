"""Every type that is read from a peer, by the codec: what is taken can be written, and read again to the same bytes.

The types are those of all methods that nodes and workers have for each other, of what is signed or stored, and all that
these consist of. Beside them there is the header of a request, which is read by hand. An input is the name of a type, a
line feed, and MessagePack.
"""

from __future__ import annotations

import dataclasses
import typing
from random import Random
from typing import Any, Final

import shoal.node.wire.bench
import shoal.node.wire.contracts
import shoal.protocol.rpc
import shoal.training.worker_calls
from shoal.crdt.oplog import Op
from shoal.crdt.presence import Presence
from shoal.dht.manifests import ContentManifest
from shoal.node.wire.bulk_tensors import OfferedTensor
from shoal.protocol.codec import decode_message, encode_message, from_plain, to_plain
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.rpc import read_request_header, request_header
from shoal.protocol.services import CallKind, Method, Service
from shoal.protocol.signing import Signed
from shoal.training.manifest import Manifest
from shoal.training.statements import TOPICS
from shoal.training.ticket import Ticket

from .harness import FindingError, MutateBytes, Target, refusing, require
from .mutators import mutate_packed
from .samples import sample

_MODULES: Final = (shoal.node.wire.bench, shoal.node.wire.contracts, shoal.protocol.rpc, shoal.training.worker_calls)
"""Where services, methods and what stands in the headers of frames are defined."""


def _kinds() -> dict[str, type[Any]]:
    """All types by their names: those signed or stored, those of the modules, and what these are made of."""
    found: dict[str, type[Any]] = {}
    kinds: list[object] = [Signed, Op, Presence, Manifest, ContentManifest, Ticket, OfferedTensor]
    kinds += TOPICS.values()
    for module in _MODULES:
        for name, value in vars(module).items():
            methods = value.methods.values() if isinstance(value, type) and issubclass(value, Service) else ()
            kinds += [kind for method in (*methods, value) if isinstance(method, Method) for kind in _messages(method)]
            kinds += [value] if name.endswith("Header") else []
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if found.setdefault(kind.__name__, kind) is not kind:
                raise TypeError(f"two types are called {kind.__name__}")
            kinds += typing.get_type_hints(kind).values()
        else:
            kinds += typing.get_args(kind)
    return dict(sorted(found.items()))


def _messages(method: Method[Any, Any]) -> tuple[type[Any], type[Any]]:
    return method.request, method.answer


KINDS: Final = _kinds()

_REQUEST_HEADER: Final = "request_header"
"""Names the one thing that is read by hand, not by the codec."""

_ATTACHMENTS: Final = tuple(memoryview(data) for data in (b"", b"one", bytes(64)))
"""What is said to have come beside each header."""


def _run(data: bytes) -> None:
    name, _, packed = data.partition(b"\n")
    if name == _REQUEST_HEADER.encode():
        _run_request_header(packed)
        return
    kind = KINDS.get(name.decode(errors="replace"))
    if kind is None:
        return
    with refusing(ProtocolError):
        value = decode_message(kind, packed, _ATTACHMENTS)
        require(type(value) is kind, f"a {kind.__name__} was read as a {type(value).__name__}")
        _check_round_trip(kind, value)


def _run_request_header(packed: bytes) -> None:
    with refusing(ProtocolError):
        read = read_request_header(packed)
        method, timeout_ms, body, kind = read
        require(isinstance(kind, CallKind) and timeout_ms >= 0, "a request header has a kind or a timeout of no call")
        again = read_request_header(request_header(method, timeout_ms, body, kind))
        require(again == read, "a request header that is read, written and read again differs")


def _check_round_trip(kind: type[Any], value: Any) -> None:
    # Compared as bytes: they tell 1 from True and 1.0, and a NaN in plain data equals itself.
    written, attachments = encode_message(value)
    try:
        again = decode_message(kind, written, attachments, max_bytes=2**26)  # longer, maybe: defaults, and 1 as 1.0
        from_maps = value if attachments else from_plain(kind, to_plain(value))
    except ProtocolError as error:
        raise FindingError(f"what was read cannot be read again: {error}") from error
    require(encode_message(again) == (written, attachments), "what is read, written and read again differs")
    require(encode_message(from_maps) == (written, attachments), "what is read from plain data differs")
    for name in (PeerId, Cid, SwarmId):
        _check_names(name, value)


def _check_names(kind: type[PeerId | Cid], value: object) -> None:
    """Check that a name inside of a value is one that its own type takes."""
    if not dataclasses.is_dataclass(value):
        return
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if type(inner) is kind:
            try:
                require(kind.parse(inner) == inner, f"{inner!r} has two spellings")
            except UsageError as error:
                raise FindingError(f"a {kind.__name__} was taken that is none") from error


def _seeds() -> list[bytes]:
    claims = b"Manifest\n" + b"\xdc\x0b\xb8" * 1000  # arrays within arrays that are said to be long
    calls = [request_header("test.call", 1000, b"\x80", kind) for kind in CallKind]
    return [
        *(name.encode() + b"\n" + encode_message(sample(kind))[0] for name, kind in KINDS.items()),
        *(_REQUEST_HEADER.encode() + b"\n" + header for header in calls),
        claims,
    ]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    name, line_feed, packed = data.partition(b"\n")
    if rng.random() < 0.03:
        name, line_feed = rng.choice((*KINDS, _REQUEST_HEADER)).encode(), b"\n"
    room = max(1, max_bytes - len(name) - 1)
    if rng.random() < 0.7:
        return name + line_feed + mutate_packed(packed, room, rng, mutate_bytes)
    return name + line_feed + mutate_bytes(packed, room)


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate)
