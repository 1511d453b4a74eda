"""Folders of this machine as trees (`shoal.dht.trees`), and trees as folders. All of it blocks; for threads."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from shoal.dht.trees import Entry, Piece, Tree, ordered, pieces_of, write_index
from shoal.node.store.blocks import BlockStore
from shoal.node.store.errors import told
from shoal.protocol.errors import ProtocolError, ShoalError, UsageError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES

BATCH_BLOCKS: Final = 8
"""Made durable together."""


class DamagedError(ShoalError):
    """Blocks that were here cannot be read.

    Attributes:
        blocks: which, by their place in the tree.
    """

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(f"{len(blocks)} blocks are damaged or gone; they have to be fetched again")
        self.blocks = tuple(blocks)


# --- in ---


def scan(path: Path) -> list[Entry]:
    """What a tree of this folder has, or of this one file. A link to a file counts as that file.

    Raises:
        UsageError: if something in it cannot be part of a tree; says what.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}; name a folder or a file")
    if path.is_file():
        found = [Entry(path.name, path.stat().st_size)]
    else:
        try:
            found = list(_scan_folder(path, ""))
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error
    try:
        return ordered(found)
    except ProtocolError as error:
        raise UsageError(f"{path} cannot be published: {error}") from error


def _scan_folder(folder: Path, prefix: str) -> Iterator[Entry]:
    is_empty = True
    for item in os.scandir(folder):
        is_empty = False
        name = f"{prefix}{item.name}"
        if item.is_dir(follow_symlinks=False):
            yield from _scan_folder(Path(item.path), f"{name}/")
        elif item.is_file():
            yield Entry(name, item.stat().st_size)
        else:
            raise UsageError(f"{item.path} is neither a file nor a folder (a link to a folder, say); take it out")
    if is_empty and prefix:
        yield Entry(prefix, 0)


def pack(path: Path, entries: Sequence[Entry], store: BlockStore) -> bytes:
    """Put all blocks of a folder into the store; gives the index.

    Raises:
        UsageError: if the folder cannot be read, or changed meanwhile.
        StorageError: if the store cannot be written.
    """
    digests: list[bytes] = []
    batch: dict[Cid, bytes] = {}
    for data in _blocks(path, entries):
        cid = Cid.of_block(data)
        digests.append(cid.to_bytes()[-32:])
        batch[cid] = data
        if len(batch) == BATCH_BLOCKS:
            store.put(batch, is_checked=True)
            batch = {}
    store.put(batch, is_checked=True)
    try:
        return write_index(entries, digests)
    except ProtocolError as error:
        raise UsageError(f"{path} cannot be published: {error}") from error


def _blocks(path: Path, entries: Sequence[Entry]) -> Iterator[bytes]:
    open_block, data = 0, bytearray()
    descriptor = -1
    try:
        for piece in pieces_of(entries):
            if not piece.length:
                continue
            if piece.block != open_block:
                yield bytes(data)
                open_block, data = piece.block, bytearray()
            if not piece.offset:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor = os.open(path / piece.entry.path if path.is_dir() else path, os.O_RDONLY | os.O_CLOEXEC)
            read = os.pread(descriptor, piece.length, piece.offset)
            if len(read) != piece.length or os.fstat(descriptor).st_size != piece.entry.size:
                raise UsageError(
                    f"{piece.entry.path} changed while it was read; publish again when nothing writes there"
                )
            data += read
    except OSError as error:
        raise UsageError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if data:
        yield bytes(data)


# --- out ---


def check_target(out: Path) -> None:
    """Check that a folder can be put here.

    Raises:
        UsageError: if something is there, or the folder that it would be in is not.
    """
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}; make it first")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UsageError(f"{out} is there already; name a folder that is not")


def unpack(tree: Tree, out: Path, store: BlockStore) -> None:
    """Make a folder of a tree; under its name is all of it or nothing.

    Raises:
        DamagedError: if blocks are not in the store.
        UsageError: as `check_target`.
        StorageError: if it cannot be written.
    """
    check_target(out)
    new = out.parent / f".{out.name}.new-{secrets.token_hex(4)}"
    try:
        try:
            new.mkdir()
            _write_files(tree, new, store)
            new.replace(out)
        except OSError as error:
            raise told(out, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(new)


def _write_files(tree: Tree, folder: Path, store: BlockStore) -> None:
    block, data = -1, b""
    damaged: list[int] = []
    descriptor: int | None = None
    try:
        for piece in tree.pieces():
            if not piece.offset:
                if descriptor is not None:
                    os.close(descriptor)
                descriptor = None
                if not damaged:
                    descriptor = _open_new(folder, piece)
            if not piece.length:
                continue
            if piece.block != block:
                block, data = piece.block, store.get(tree.cid(piece.block)) or b""
                if len(data) != tree.block_sizes[block]:
                    damaged.append(block)  # go on, to find the others too
            if descriptor is None or damaged:
                continue
            part = memoryview(data)[piece.start : piece.start + piece.length]
            if piece.length == BLOCK_BYTES and not any(part[:64]) and bytes(part) == bytes(BLOCK_BYTES):
                continue  # a hole
            while part:
                done = os.pwrite(descriptor, part, piece.offset + piece.length - len(part))
                part = part[done:]
    finally:
        if descriptor is not None:
            os.close(descriptor)
    if damaged:
        raise DamagedError(damaged)


def _open_new(folder: Path, piece: Piece) -> int | None:
    path = folder / piece.entry.path
    if piece.entry.path.endswith("/"):
        path.mkdir(parents=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    os.ftruncate(descriptor, piece.entry.size)
    return descriptor
