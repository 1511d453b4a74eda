"""A folder as content: which files it has, and of which blocks their bytes are.

The *index* of a tree is a content like any other: bytes, cut into blocks if they are many. Its CID is the tree's name,
and it is fetched, kept and served as contents are. It lists digests of blocks, then files, each with its size; where
which bytes lie follows from that:

- Files are in the order of their names, each part folded (Unicode NFC and case), and compared part by part.
- A file that fits into what is left of the open block goes there. Else a block begins with it, and its end leaves that
  block open for the next ones. So small files share blocks, and a large one has the same blocks in every tree.

    magic 13 | entries u32 | size u64 | blocks u32 | 32 bytes for each block | length u16, size u64, path for each entry

A path that ends in a slash is an empty folder. There are no links, rights or times: what is fetched is plain files.

Whoever names a tree may have made it, so an index is checked before anything is made of it. In the order of folded
names it takes no memory to see that no two names are one on a disk that ignores case, and that no file is a folder too.
Names that some system reads in another way are refused everywhere: ``..``, absolute ones, Windows' devices and
separators, what cannot be printed. Files that take a directory entry and no bytes are free for the first
`FREE_FILES` only.
"""

from __future__ import annotations

import struct
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES

MAX_TREE_BYTES: Final = 1024**4
MAX_FILES: Final = 2**20
MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
FREE_FILES: Final = 65_536
"""A tree may have so many files, and one more for each `BYTES_PER_FILE` bytes."""
BYTES_PER_FILE: Final = 64
MAX_PATH_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 255
MAX_DEPTH: Final = 64
DIGEST_BYTES: Final = 32

_MAGIC: Final = b"shoal tree 1\n"
_HEAD: Final = struct.Struct("!13sIQI")
_ENTRY: Final = struct.Struct("!HQ")
_FORBIDDEN: Final = frozenset('<>:"|?*\\')
_DEVICES: Final = frozenset(
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"]
    + [f"{name}{n}" for name in ("COM", "LPT") for n in "0123456789¹²³"]
)

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file; or an empty folder, whose path ends in a slash.

    Attributes:
        path: its parts, with slashes between them.
        size: in bytes.
    """

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a file, as a part of a block.

    Attributes:
        entry: whose.
        offset: in the file.
        block: which one of the tree's.
        start: in the block.
        length: of the piece.
    """

    entry: Entry
    offset: int
    block: int
    start: int
    length: int


# --- names ---


def key_of(path: str) -> Key:
    """By what entries are ordered, and equal for names that some disk takes for one.

    Raises:
        ProtocolError: if no file may be called so.
    """
    bare = path.removesuffix("/")
    if not bare or len(bare) > MAX_PATH_BYTES or len(bare.encode(errors="replace")) > MAX_PATH_BYTES:
        raise ProtocolError(f"a path has 1 to {MAX_PATH_BYTES} bytes, not {len(bare.encode(errors='replace'))}")
    parts = bare.split("/")
    if len(parts) > MAX_DEPTH:
        raise ProtocolError(f"{_shown(path)} is deeper than {MAX_DEPTH} folders")
    for part in parts:
        _check_name(part, path)
    if bare.isascii():
        return tuple(bare.lower().split("/"))
    return tuple(unicodedata.normalize("NFC", unicodedata.normalize("NFD", part).casefold()) for part in parts)


def _check_name(part: str, path: str) -> None:
    if part in ("", ".", ".."):
        raise ProtocolError(f"{_shown(path)} leads out of its folder, or nowhere; paths are like folder/file")
    if not part.isprintable() or not _FORBIDDEN.isdisjoint(part):
        raise ProtocolError(f"{_shown(path)} has characters that some systems cannot write; rename it")
    if part[-1] in ". " or part.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        raise ProtocolError(f"{_shown(path)} is a name that Windows keeps for itself; rename it")
    if len(part.encode()) > MAX_NAME_BYTES:
        raise ProtocolError(f"{_shown(path)} has a name of more than {MAX_NAME_BYTES} bytes")


def _shown(path: str) -> str:
    return f"the path {path[:80]!r}"


class _Order:
    """Checks that entries come in order, and that no two of them are in each other's way."""

    def __init__(self) -> None:
        self._key: Key = ()
        self._parts: list[str] = []
        self._path = ""

    def check(self, path: str) -> None:
        """The next one.

        Raises:
            ProtocolError: if it may not come here.
        """
        key, parts = key_of(path), path.removesuffix("/").split("/")
        before, was = self._key, self._path
        if key == before:
            raise ProtocolError(f"{_shown(was)} and {path[:80]!r} are one name on a disk that ignores case; rename one")
        if key < before:
            raise ProtocolError(f"{_shown(path)} is not in its place; the tree is not in order")
        if before and key[: len(before)] == before:
            raise ProtocolError(f"{_shown(was)} is an entry, and has {path[:80]!r} in it")
        for folded, other, part, spelled in zip(key, before, parts, self._parts, strict=False):
            if folded != other:
                break
            if part != spelled:
                raise ProtocolError(f"{_shown(was)} and {path[:80]!r} spell one folder in two ways; rename one")
        self._key, self._parts, self._path = key, parts, path


# --- where bytes lie ---


def pieces_of(entries: Iterable[Entry]) -> Iterator[Piece]:
    """Which bytes of which file make which block, in order; an entry without bytes has one piece of none."""
    block, fill = -1, BLOCK_BYTES
    for entry in entries:
        if entry.size > BLOCK_BYTES - fill:
            block, fill = block + 1, 0
        offset = 0
        while True:
            length = min(entry.size - offset, BLOCK_BYTES - fill)
            yield Piece(entry, offset, max(block, 0), fill if length else 0, length)
            offset, fill = offset + length, fill + length
            if offset == entry.size:
                break
            block, fill = block + 1, 0


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Entries as a tree has them.

    Raises:
        ProtocolError: if one has a name that is not allowed, or two are in each other's way.
    """
    found = sorted(entries, key=lambda entry: key_of(entry.path))
    order = _Order()
    for entry in found:
        order.check(entry.path)
    return found


# --- the index ---


def write_index(entries: Sequence[Entry], digests: Sequence[bytes]) -> bytes:
    """The index of a tree whose entries are `ordered`, and whose blocks have these digests.

    Raises:
        ProtocolError: if there are more of something than a tree may have.
    """
    size = sum(entry.size for entry in entries)
    data = bytearray(_HEAD.pack(_MAGIC, len(entries), size, len(digests)))
    for digest in digests:
        data += digest
    for entry in entries:
        path = entry.path.encode()
        data += _ENTRY.pack(len(path), entry.size)
        data += path
    index = bytes(data)
    read_index(index)
    return index


@dataclass(frozen=True, slots=True)
class Tree:
    """An index that was checked.

    Attributes:
        index: its bytes.
        size: of all files.
        num_entries: files and empty folders.
        block_sizes: of each block, in order, 32 bits each.
    """

    index: memoryview
    size: int
    num_entries: int
    block_sizes: array[int]

    @property
    def num_blocks(self) -> int:
        """How many; equal ones count each time."""
        return len(self.block_sizes)

    def digest(self, block: int) -> bytes:
        """The sha2-256 of a block."""
        start = _HEAD.size + DIGEST_BYTES * block
        return bytes(self.index[start : start + DIGEST_BYTES])

    def cid(self, block: int) -> Cid:
        """The name of a block."""
        return Cid.of_digest(self.digest(block))

    def entries(self) -> Iterator[Entry]:
        """Every one, in order; read from the index each time."""
        return _entries(self.index, _HEAD.size + DIGEST_BYTES * self.num_blocks, self.num_entries)

    def pieces(self) -> Iterator[Piece]:
        """Where which bytes lie, in order."""
        return pieces_of(self.entries())


def read_index(index: bytes | memoryview, *, max_bytes: int = MAX_TREE_BYTES) -> Tree:
    """Check what somebody sent as the index of a tree. It takes time by the entry: for a thread.

    Args:
        index: all of it.
        max_bytes: of the files that it may describe.

    Raises:
        LimitError: if it describes too much.
        ProtocolError: if it is none.
    """
    view = memoryview(index)
    if len(view) < _HEAD.size or bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise ProtocolError("this is not the index of a folder")
    _, num_entries, size, num_blocks = _HEAD.unpack_from(view)
    if len(view) > MAX_INDEX_BYTES or num_entries > MAX_FILES or size > MAX_TREE_BYTES:
        raise LimitError(
            f"a folder of {num_entries} files and {size} bytes is too large; {MAX_FILES} files of "
            f"{MAX_TREE_BYTES} bytes together are the most"
        )
    if size > max_bytes:
        raise LimitError(f"a folder of {size} bytes is more than the {max_bytes} that are allowed")
    if num_entries > FREE_FILES + size // BYTES_PER_FILE:
        raise LimitError(f"{num_entries} files for {size} bytes are too many")
    start = _HEAD.size + DIGEST_BYTES * num_blocks
    if start + _ENTRY.size * num_entries > len(view):
        raise ProtocolError(
            f"the index of {len(view)} bytes ends before its {num_blocks} blocks and {num_entries} files"
        )
    sizes = _block_sizes(_checked(_entries(view, start, num_entries), size), num_blocks)
    return Tree(view, size, num_entries, sizes)


def _entries(view: memoryview, start: int, count: int) -> Iterator[Entry]:
    for _ in range(count):
        if start + _ENTRY.size > len(view):
            raise ProtocolError("the index ends before its files do")
        num_chars, size = _ENTRY.unpack_from(view, start)
        start += _ENTRY.size
        raw = bytes(view[start : start + num_chars])
        start += num_chars
        try:
            path = raw.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError("a path of the index is not UTF-8") from error
        if len(raw) != num_chars:
            raise ProtocolError("the index ends before its files do")
        yield Entry(path, size)
    if start != len(view):
        raise ProtocolError("the index goes on after its last file")


def _checked(entries: Iterable[Entry], size: int) -> Iterator[Entry]:
    order = _Order()
    left = size
    for entry in entries:
        order.check(entry.path)
        left -= entry.size
        if left < 0 or (entry.size and entry.path.endswith("/")):
            raise ProtocolError(f"{_shown(entry.path)} has more bytes than it may have")
        yield entry
    if left:
        raise ProtocolError(f"the files of the index have {size - left} bytes together, not {size}")


def _block_sizes(entries: Iterable[Entry], num_blocks: int) -> array[int]:
    sizes = array("I", bytes(4 * num_blocks))
    for piece in pieces_of(entries):
        if piece.length:
            if piece.block >= num_blocks:
                raise ProtocolError(f"the files of the index have more than its {num_blocks} blocks")
            sizes[piece.block] = piece.start + piece.length
    if num_blocks and not sizes[-1]:
        raise ProtocolError(f"the files of the index have fewer than its {num_blocks} blocks")
    return sizes
