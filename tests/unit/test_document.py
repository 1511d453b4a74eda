"""What is set is read, exactly and everywhere; an update by a stranger changes registers or nothing."""

from __future__ import annotations

from typing import Any

import pycrdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.crdt import document as module
from shoal.crdt.document import MAX_KEY_BYTES, MAX_UPDATE_BYTES, Document
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError

texts = st.text(st.sampled_from("aZ0 /.é鱼😀\0\u2028"), max_size=6)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(["member", "policy", "contributions", "größe", "鱼群", "😀"])
writes = st.lists(
    st.dictionaries(names, plain, min_size=1, max_size=3)
    | st.fixed_dictionaries(
        {"evaluations": st.dictionaries(st.sampled_from(["1", "2", "é"]), plain, min_size=1, max_size=2)}
    ),
    max_size=8,
)


def var(number: int) -> bytes:
    out = b""
    while number >= 128:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def text(value: str) -> bytes:
    return var(len(value.encode())) + value.encode()


def an_update(
    content: bytes,
    *,
    client: int = 1,
    clock: int = 0,
    root: str = "registers",
    info: int = 0x28,
    deleted: bytes = b"\0",
) -> bytes:
    return var(1) + var(1) + var(client) + var(clock) + bytes([info, 1]) + text(root) + text("x") + content + deleted


GOOD = var(1) + bytes([116]) + var(1) + encode(7)


@given(writes)
def test_another_node_reads_what_was_set(history: list[dict[str, Any]]) -> None:
    mine, theirs, expected = Document(), Document(), dict[str, Any]()
    updates = []
    for registers in history:
        updates.append(mine.set(registers))
        theirs.apply(updates[-1])
        for name, value in registers.items():
            expected[name] = {**expected.get(name, {}), **value} if name == "evaluations" else value
    for document in (mine, theirs, Document(updates)):
        assert document.values() == expected
        assert encode(document.values()) == encode(expected)  # 1 is not 1.0 and not True


@pytest.mark.parametrize("value", [0, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 1.0, 0.1, 1e300, True, None, "é😀\0", ""])
def test_numbers_and_texts_keep_their_type(value: Any) -> None:
    document = Document([Document().set({"policy": {"x": value}})])
    read = document.values()["policy"]["x"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "registers",
    [
        {},
        {"": 1},
        {"a/b": 1},
        {"x": b"bytes"},
        {"x": object()},
        {"x": 2**64},
        {"x": float("nan")},
        {"x": [float("inf")]},
        {"x": "\ud800"},
        {"\ud800": 1},
        {"evaluations": 3},
        {"evaluations": {}},
        {"k" * (MAX_KEY_BYTES + 1): 1},
    ],
)
def test_what_is_not_plain_data_is_not_written(registers: dict[str, Any]) -> None:
    document = Document()
    with pytest.raises(UsageError):
        document.set(registers)
    assert document.values() == {}
    Document([document.set({"x": 1})])


def test_an_update_that_is_too_big_is_not_written() -> None:
    document = Document()
    with pytest.raises(TooLargeError):
        document.set({"x": "x" * MAX_UPDATE_BYTES})
    assert document.values() == {}
    Document([document.set({"x": 1})])


def test_nesting_is_bounded() -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    with pytest.raises(TooLargeError):
        Document().set({"x": value})


def test_registers_of_one_document_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    author, free, bounded = Document(), [], Document()
    free = [author.set({"evaluations": {str(epoch): 1}}) for epoch in range(4)]
    monkeypatch.setattr(module, "MAX_REGISTERS", 3)
    for update in free[:3]:
        bounded.apply(update)
    with pytest.raises(LimitError):
        bounded.apply(free[3])
    with pytest.raises(TooLargeError):
        bounded.set({"new": 1})
    bounded.set({"evaluations": {"0": 2}})
    assert bounded.values()["evaluations"] == {"0": 2, "1": 1, "2": 1}


def test_an_update_does_not_grow_with_the_history() -> None:
    document = Document()
    sizes = [
        len(document.set({"policy": {"epoch": epoch}, "evaluations": {str(epoch): {"return": 1.0}}}))
        for epoch in range(1000)
    ]
    assert max(sizes) < sizes[0] + 40


def test_the_dialect_that_the_attacks_below_are_built_on_is_right() -> None:
    assert Document([an_update(GOOD)]).values() == {"x": 7}


@pytest.mark.parametrize(
    "update",
    [
        b"",
        b"\0\0",
        b"garbage",
        an_update(GOOD)[:-1],
        an_update(GOOD) + b"\0",
        an_update(GOOD, client=2),
        an_update(GOOD, clock=1),
        an_update(GOOD, root="otherroot"),
        an_update(GOOD, info=0x21),
        an_update(GOOD, info=0xE8),
        an_update(var(1) + bytes([117]) * 30_000 + b"\x7e"),
        an_update(var(1) + bytes([118, 1]) * 20_000 + b"\x7e"),
        an_update(var(1) + bytes([116]) + var(2**40)),
        an_update(var(2) + (bytes([116]) + var(1) + b"\7") * 2),
        an_update(GOOD, deleted=var(1) + var(1) + var(1) + var(0) + var(2)),
        an_update(GOOD, deleted=var(1) + var(2) + var(1) + var(0) + var(1)),
        an_update(GOOD, deleted=var(2**32 - 1)),
        an_update(GOOD, deleted=var(1) + var(1) + var(2**31 - 1)),
        var(2**32 - 1),
        var(1) + var(2**31 - 1) + var(1) + var(0),
        b"\xff" * 100,
        b"x" * (MAX_UPDATE_BYTES + 1),
    ],
)
def test_hostile_updates_change_nothing(update: bytes) -> None:
    document = Document()
    with pytest.raises(ProtocolError):
        document.apply(update)
    assert document.values() == {}
    document.apply(an_update(GOOD))
    assert document.values() == {"x": 7}


@given(st.data())
def test_damaged_updates_change_nothing_or_are_valid(data: st.DataObject) -> None:
    author = Document()
    first = author.set({"member": {"role": "learner"}, "policy": 1})
    second = bytearray(author.set({"member": {"role": "storage"}, "evaluations": {"1": 2}}))
    for _ in range(data.draw(st.integers(1, 4))):
        second[data.draw(st.integers(0, len(second) - 1))] = data.draw(st.integers(0, 255))
    document = Document([first])
    before = document.values()
    try:
        document.apply(bytes(second))
    except ProtocolError:
        assert document.values() == before
    else:
        assert document.values() == as_yjs_has_it(document)


def as_yjs_has_it(document: Document) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, raw in document._map.items():
        name, _, entry = key.partition("/")
        try:
            value = module._unpack(bytes(raw))
        except ProtocolError:
            continue
        if name not in module.GROWING:
            found[key] = value
        elif entry:
            found.setdefault(name, {})[entry] = value
    return found


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from("xyz"), st.none() | st.integers(0, 8)), min_size=1, max_size=3),
            st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3)), max_size=2),
        ),
        max_size=6,
    )
)
def test_whatever_replaces_and_deletes_what_the_registers_are_those_of_yjs(
    updates: list[tuple[list[tuple[str, int | None]], list[tuple[int, int]]]],
) -> None:
    document, clock = Document(), 0
    for items, deleted in updates:
        body = b""
        for key, origin in items:
            start = bytes([0x28, 1]) + text("registers") + text(key) if origin is None else b"\xa8\1" + var(origin)
            body += start + var(1) + bytes([116]) + text(str(clock)[:1])
        ranges = b"".join(var(start) + var(length) for start, length in sorted(deleted))
        tail = var(1) + var(1) + var(len(deleted)) + ranges if deleted else b"\0"
        try:
            document.apply(var(1) + var(len(items)) + var(1) + var(clock) + body + tail)
        except ProtocolError:
            continue
        clock += len(items)
        assert document.values() == as_yjs_has_it(document)


@given(st.binary(max_size=200))
def test_garbage_never_crashes(update: bytes) -> None:
    with pytest.raises(ProtocolError):
        Document().apply(update)


@pytest.mark.parametrize("bad", [b"not msgpack\xc1", encode({"x": b"bytes"}), encode(float("nan")), b""])
def test_a_value_that_is_not_plain_data_is_as_good_as_not_written(bad: bytes) -> None:
    document = Document([an_update(var(1) + bytes([116]) + var(len(bad)) + bad)])
    assert document.values() == {}


def test_yjs_types_of_others_are_refused() -> None:
    other: pycrdt.Doc[Any] = pycrdt.Doc(client_id=1)
    registers = other.get("registers", type=pycrdt.Map)
    registers["x"] = pycrdt.Text("text")
    with pytest.raises(ProtocolError):
        Document().apply(other.get_update())


def test_changing_what_was_read_changes_no_register() -> None:
    document = Document([Document().set({"evaluations": {"1": 1}})])
    document.values()["evaluations"]["2"] = 2
    document.values()["new"] = 1
    assert document.values() == {"evaluations": {"1": 1}}
