"""What is written is read; what nobody wrote is refused, whatever it is."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.codec import Attachment, decode, decode_message, encode, encode_message, from_plain, to_plain
from shoal.protocol.errors import LimitError, ProtocolError, UnknownFieldError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import MAX_NESTING
from shoal.protocol.signing import Signed, Signer
from shoal.training.manifest import Manifest

ANN = Signer(b"a" * 32).peer_id
CID = Cid.of_block(b"x")


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.ratio > 1e9:
            raise UsageError("too much")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    flag: bool
    count: int
    data: bytes
    author: PeerId
    cid: Cid | None = None
    colour: Colour = Colour.RED
    level: Level = Level.LOW
    inners: tuple[Inner, ...] = ()
    numbers: list[int] = field(default_factory=list)
    table: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None


texts = st.text(st.sampled_from("aZ0 é鱼😀\0\u2028"), max_size=6)
inners = st.builds(Inner, texts, st.floats(-1e9, 1e9))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | texts
    | st.binary(max_size=4)
    | st.floats(allow_nan=False)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
things = st.builds(
    Thing,
    flag=st.booleans(),
    count=st.integers(-(2**63), 2**64 - 1),
    data=st.binary(max_size=8),
    author=st.just(ANN),
    cid=st.none() | st.just(CID),
    colour=st.sampled_from(Colour),
    level=st.sampled_from(Level),
    inners=st.lists(inners, max_size=2).map(tuple),
    numbers=st.lists(st.integers(-5, 5), max_size=3),
    table=st.dictionaries(texts, inners, max_size=2),
    anything=anything,
)


def plain_thing(**changes: Any) -> dict[str, Any]:
    return {"flag": True, "count": 1, "data": b"", "author": str(ANN)} | changes


@given(things)
def test_what_is_written_is_read(thing: Thing) -> None:
    read = decode(Thing, encode(thing))
    assert read == thing
    assert (type(read.author), type(read.colour), type(read.level)) == (PeerId, Colour, Level)
    assert encode(read) == encode(thing)
    assert from_plain(Thing, to_plain(thing)) == thing


@given(st.dictionaries(texts, scalars, max_size=5), st.randoms(use_true_random=False))
def test_equal_values_have_equal_bytes(value: dict[str, Any], rng: Any) -> None:
    keys = list(value)
    rng.shuffle(keys)
    assert encode({key: value[key] for key in keys}) == encode(value)


KINDS: list[Any] = [Thing, Inner, Signed, Manifest, int, str, bytes, list[int], dict[str, Any], Any]


@given(st.binary(max_size=64), st.sampled_from(KINDS))
def test_garbage_raises_nothing_else_than_a_protocol_error(data: bytes, kind: Any) -> None:
    with contextlib.suppress(ProtocolError):
        decode(kind, data)


@given(things, st.data())
def test_damage_raises_nothing_else_than_a_protocol_error(thing: Thing, data: st.DataObject) -> None:
    damaged = bytearray(encode(thing))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        decode(Thing, bytes(damaged))


keys = st.sampled_from(["flag", "count", "data", "author", "cid", "colour", "level", "inners", "table", "name", "x"])
odd_leaves = scalars | st.sampled_from([str(ANN), str(CID), "é" * 60, "1" * 40, float("nan"), float("inf")])
odd = st.recursive(odd_leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=8))


@given(odd, st.sampled_from(KINDS))
def test_wrong_types_raise_nothing_else_than_a_protocol_error(value: Any, kind: Any) -> None:
    try:
        from_plain(kind, value)
        decode(kind, encode(value))
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"flag": 1},
        {"count": True},
        {"count": 1.0},
        {"data": "text"},
        {"author": "no peer"},
        {"author": "é"},
        {"cid": "no cid"},
        {"cid": "bé"},
        {"cid": b"bytes"},
        {"colour": "green"},
        {"colour": ["red"]},
        {"colour": {}},
        {"level": 3},
        {"level": "low"},
        {"inners": {}},
        {"inners": [{"ratio": 0.5}]},
        {"inners": [{"name": "x", "ratio": float("inf")}]},
        {"inners": [{"name": "x", "ratio": 1e10}]},
        {"inners": [{"name": "x", "ratio": 2**70}]},
        {"numbers": [None]},
        {"table": []},
        {"table": {"x": 1}},
    ],
)
def test_a_field_of_the_wrong_type_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=rf"Thing\.{next(iter(changes))}"):
        from_plain(Thing, plain_thing(**changes))


@pytest.mark.parametrize("level", [True, 1.0])
def test_an_enum_takes_its_own_values_only(level: Any) -> None:
    with pytest.raises(ProtocolError):
        from_plain(Thing, plain_thing(level=level))


def test_a_newer_writer_may_add_fields_and_an_older_one_may_lack_them() -> None:
    assert from_plain(Thing, plain_thing(new_field=[1])) == from_plain(Thing, plain_thing())
    with pytest.raises(ProtocolError, match="count is missing"):
        from_plain(Thing, {"flag": True, "data": b"", "author": str(ANN)})


def test_size_is_checked_first() -> None:
    with pytest.raises(LimitError):
        decode(bytes, b"\xc1" * 11, max_bytes=10)


@pytest.mark.parametrize("depth", [MAX_NESTING + 2, 500, 5000, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x"])
def test_nesting_is_bounded(depth: int, opening: bytes) -> None:
    for kind in (Any, dict[str, Any], list[Any]):
        with pytest.raises(ProtocolError):
            decode(kind, opening * depth + b"\xc0", max_bytes=1_000_000)


def test_what_an_error_says_of_plain_data_reaches_no_terminal_as_it_is() -> None:
    value: Any = None
    for _ in range(MAX_NESTING + 1):
        value = {"\x1b[2J" * 100: value}
    with pytest.raises(LimitError, match="nested") as refused:
        from_plain(dict[str, Any], {"x": value})
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("num_bytes", [500, 5_000, 50_000])
@pytest.mark.parametrize("opening", ["!BH", "!BI"])
def test_arrays_that_claim_to_be_long_cost_no_memory(num_bytes: int, opening: str) -> None:
    claim = struct.pack(opening, 0xDC if opening == "!BH" else 0xDD, min(num_bytes, 10_000))
    data = (claim * min(1000, num_bytes // len(claim))).ljust(num_bytes, b"\xc0")
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=r"this is not a list: [A-Z]"):
            decode(list[Any], data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xa1\xff",
        b"\x81\x01\x01",
        b"\x81\xc4\x01x\x01",
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1, 2)),
        msgpack.packb({"x": msgpack.Timestamp(1, 2)}),
        b"\xd6\xff" + bytes(3),
    ],
)
def test_what_is_not_plain_data_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(dict[str, Any], data)
    with pytest.raises(ProtocolError):
        decode(list[Any], data)


def test_what_has_no_wire_form_is_not_written() -> None:
    with pytest.raises(TypeError, match="object has no wire form"):
        encode({"x": object()})


# --- attachments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    label: str
    data: Attachment


@dataclass(frozen=True, slots=True)
class Parcel:
    parts: tuple[Part, ...]
    more: tuple[Attachment, ...] = ()
    extra: Attachment | None = None


@given(st.lists(st.binary()), st.lists(st.binary()), st.none() | st.binary())
def test_a_message_with_attachments_comes_back(parts: list[bytes], more: list[bytes], extra: bytes | None) -> None:
    parcel = Parcel(tuple(Part(str(i), data) for i, data in enumerate(parts)), tuple(more), extra)
    header, attachments = encode_message(parcel)
    assert decode_message(Parcel, header, attachments) == parcel


def test_an_attachment_is_passed_on_and_not_copied() -> None:
    data = b"x" * 1000
    header, attachments = encode_message(Part("a", data))
    assert attachments[0] is data
    assert len(header) < 50
    assert decode_message(Part, header, attachments).data is data


def test_a_message_with_attachments_needs_a_way_for_them() -> None:
    with pytest.raises(TypeError, match="encode_message"):
        encode(Part("a", b"x"))


@pytest.mark.parametrize("number", [1, -1, 2**40, "0", None, True])
def test_a_header_that_names_no_attachment_of_its_frame_is_refused(number: object) -> None:
    with pytest.raises(ProtocolError):
        decode_message(Part, encode({"label": "a", "data": number}), [b"x"])


def test_an_attachment_named_twice_is_refused() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        decode_message(Parcel, encode({"parts": [], "more": [0, 0]}), [b"x"])


def test_an_attachment_that_no_field_names_is_a_newer_versions() -> None:
    assert decode_message(Part, encode({"label": "a", "data": 1}), [b"new", b"x"]) == Part("a", b"x")


@pytest.mark.parametrize(
    "changes",
    [
        {"newer": 1},
        {"inners": [{"name": "a"}, {"name": "b", "newer": 1}]},
        {"table": {"a": {"name": "a", "newer": 1}}},
    ],
)
def test_a_strict_reader_refuses_what_others_ignore(changes: dict[str, Any]) -> None:
    data = msgpack.packb(plain_thing(**changes))
    decode(Thing, data)
    with pytest.raises(UnknownFieldError, match="unknown field 'newer'"):
        decode(Thing, data, strict=True)
    decode(Thing, data)


@given(things)
def test_a_strict_reader_reads_all_that_is_known(thing: Thing) -> None:
    assert decode(Thing, encode(thing), strict=True) == thing
