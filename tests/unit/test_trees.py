"""A folder and its index: what goes in comes out, and what no folder should hold is refused before it is made."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht import trees
from shoal.dht.trees import Entry, ordered, pieces_of, read_index, write_index
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES

NAMES = st.text(st.sampled_from("abcÄßé中 -_1"), min_size=1, max_size=6).filter(lambda name: name[-1] != " ")
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
SIZES = st.one_of(st.integers(0, 200), st.integers(0, 5 * BLOCK_BYTES), st.sampled_from([BLOCK_BYTES, BLOCK_BYTES + 1]))


def number_of_blocks(entries: list[Entry]) -> int:
    return max((piece.block + 1 for piece in pieces_of(entries) if piece.length), default=0)


def index_of(entries: list[Entry]) -> bytes:
    return write_index(entries, [struct.pack("!32s", str(n).encode()) for n in range(number_of_blocks(entries))])


def raw(entries: list[tuple[str, int]], num_blocks: int = 0, **head: int) -> bytes:
    """An index as a liar writes it."""
    size = head.get("size", sum(size for _, size in entries))
    data = struct.pack("!13sIQI", b"shoal tree 1\n", head.get("count", len(entries)), size, num_blocks)
    data += bytes(32 * min(num_blocks, 100))
    for path, length in entries:
        name = path.encode("utf-8", "surrogatepass")
        data += struct.pack("!HQ", len(name), length) + name
    return data


@given(st.dictionaries(PATHS, SIZES, max_size=12))
def test_what_goes_in_comes_out(sizes: dict[str, int]) -> None:
    try:
        entries = ordered(Entry(path, size) for path, size in sizes.items())
    except ProtocolError:
        return  # two of them in each other's way
    tree = read_index(index_of(entries))
    assert list(tree.entries()) == entries
    assert tree.size == sum(sizes.values()) == sum(tree.block_sizes)
    assert all(0 < size <= BLOCK_BYTES for size in tree.block_sizes)
    assert [tree.digest(n).rstrip(b"\0") for n in range(tree.num_blocks)] == [
        str(n).encode() for n in range(tree.num_blocks)
    ]


@given(st.lists(SIZES, max_size=40))
def test_every_byte_has_one_place_and_small_files_share_blocks(sizes: list[int]) -> None:
    entries = [Entry(f"{number:04d}", size) for number, size in enumerate(sizes)]
    done: dict[str, int] = {}
    end = (0, 0)
    for piece in pieces_of(entries):
        assert piece.offset == done.get(piece.entry.path, 0)
        assert piece.start + piece.length <= BLOCK_BYTES
        if piece.length:
            assert (piece.block, piece.start) in (end, (end[0] + 1, 0), (0, 0))
            end = (piece.block, piece.start + piece.length)
        done[piece.entry.path] = piece.offset + piece.length
        if 0 < piece.entry.size <= BLOCK_BYTES:
            assert piece.length == piece.entry.size  # it is in one block
        elif piece.entry.size and not piece.offset:
            assert not piece.start  # it begins with one
    assert done == {entry.path: entry.size for entry in entries}
    assert number_of_blocks(entries) <= 2 * sum(sizes) // BLOCK_BYTES + 1


@given(st.dictionaries(PATHS, st.integers(0, 100), max_size=6), st.data())
def test_an_index_that_was_tampered_with_is_refused_or_another_tree(sizes: dict[str, int], data: st.DataObject) -> None:
    try:
        index = bytearray(index_of(ordered(Entry(path, size) for path, size in sizes.items())))
    except ProtocolError:
        return
    place = data.draw(st.integers(0, len(index) - 1))
    index[place] ^= data.draw(st.integers(1, 255))
    try:
        tree = read_index(bytes(index))
    except ProtocolError:
        return
    assert len(list(tree.pieces())) >= tree.num_entries
    for path in (entry.path for entry in tree.entries()):
        trees.key_of(path)


@pytest.mark.parametrize(
    "path",
    [
        *("..", "../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "", "/", "a/", "a//"),
        *("a\\b", "C:x", "a:b", "a\0b", "a\nb", "a\x1b[2Jb", "a\u202eb", "a\ud800b", "a|b", "a*", 'a"b', "<a>"),
        *("con", "CON.txt", "a/nul", "LPT1", "com9.tar.gz", "aux .x", "COM¹", "x.", "x ", "a /b"),
        *("x" * 256, "ä" * 128, "/".join(["d"] * 65), "x/" * 600 + "x"),
    ],
)
def test_a_name_that_leads_elsewhere_or_that_some_system_cannot_write_is_refused(path: str) -> None:
    with pytest.raises(ProtocolError):
        read_index(raw([(path, 3)], 1))
    if not path.endswith("/"):
        with pytest.raises(ProtocolError):
            ordered([Entry(path, 3)])


@pytest.mark.parametrize(
    "paths",
    [
        *(["a", "A"], ["a/b", "A/c"], ["é", "e\u0301"], ["ß", "ss"], ["straße/x", "STRASSE/y"], ["a", "a/b"]),
        *(["a/", "a/b"], ["a", "A/b"], ["a/", "a"], ["x/y/a", "x/Y/b"]),
    ],
)
def test_names_that_are_one_on_some_disk_are_refused(paths: list[str]) -> None:
    with pytest.raises(ProtocolError):
        ordered(Entry(path, 0) for path in paths)
    for given_paths in (paths, paths[::-1]):
        with pytest.raises(ProtocolError):
            read_index(raw([(path, 0) for path in given_paths]))


def test_names_that_differ_are_allowed() -> None:
    paths = ["a", "a b", "a-b", "a.b", "ab/", "b/c/d", "b/e", "con1", "конь", "模型.safetensors", ".git/config"]
    entries = ordered(Entry(path, 1 if path[-1] != "/" else 0) for path in paths)
    assert {entry.path for entry in read_index(index_of(entries)).entries()} == set(paths)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"no index at all, but long enough to have a head",
        raw([("a", 1)], 1)[:-1],
        raw([("a", 1)], 1) + b"x",
        raw([("a", 1)], 0),
        raw([("a", 1)], 2),
        raw([("a", 0)], 1),
        raw([("a", 1)], 1, size=2),
        raw([("a", 2)], 1, size=1),
        raw([("a", 1)], 1, count=2),
        raw([("b", 1), ("a", 1)], 1),
        raw([("a", 2**63), ("b", 2**63)], 1, size=0),
        raw([("folder/", 1)], 1),
        raw([], 10**9, size=10**15),
        raw([("a", 10**12)], 2**32 - 1, size=10**12),
        raw([], 0, count=2**32 - 1, size=2**40),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(index: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            read_index(index)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_what_is_too_much_is_refused_by_its_head() -> None:
    with pytest.raises(LimitError, match="allowed"):
        read_index(index_of([Entry("a", 1000)]), max_bytes=999)
    with pytest.raises(LimitError, match="too many"):
        read_index(raw([], 0, count=10**6, size=10))
    with pytest.raises(LimitError, match="too large"):
        read_index(raw([], 0, size=2**41))


def test_a_large_model_has_a_small_index() -> None:
    entries = ordered([Entry("config.json", 700), *(Entry(f"model-{n}.safetensors", 5 * 10**9) for n in range(3))])
    index = index_of(entries)
    assert len(index) < 500_000
    tree = read_index(index)
    assert tree.size == 15_000_000_700
    assert tree.cid(3) == Cid.of_digest(tree.digest(3))


def test_the_name_of_a_digest() -> None:
    data = b"data"
    cid = Cid.of_block(data)
    assert Cid.of_digest(cid.to_bytes()[-32:]) == cid
