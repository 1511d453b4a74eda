"""Blocks on disk: what was acknowledged is there, what is damaged is not, and what the disk refuses is told."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.node.store import blocks as module
from shoal.node.store.blocks import BlockStore
from shoal.node.store.errors import StorageError, StorageFullError
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blocks"


def named(*blocks: bytes) -> dict[Cid, bytes]:
    return {Cid.of_block(data): data for data in blocks}


def file_of(folder: Path, cid: Cid) -> Path:
    return folder / cid[-2:] / cid


def test_blocks_are_files_that_a_new_store_finds(folder: Path) -> None:
    blocks = named(b"one", b"two", b"") | {Cid.of_manifest(b"m"): b"m"}
    store = BlockStore(folder)
    assert store.get(Cid.of_block(b"one")) is None
    store.put(blocks)
    store.put(blocks)
    assert store.num_bytes == 7
    again = BlockStore(folder)
    assert {cid: again.get(cid) for cid in blocks} == blocks
    assert (again.num_bytes, len(again)) == (7, 4)
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*/*")} == {0o600}
    assert {path.name for path in folder.glob("*/*")} == set(blocks)


def test_a_block_is_what_its_name_says(folder: Path) -> None:
    store = BlockStore(folder)
    with pytest.raises(ProtocolError):
        store.put(named(b"x") | {Cid.of_block(b"one"): b"other"})
    with pytest.raises(ProtocolError):
        store.put(named(bytes(BLOCK_BYTES + 1)))
    assert not list(folder.glob("*/*"))


@pytest.mark.parametrize("damage", [b"", b"tw", b"owt", b"two and more", None])
def test_a_damaged_block_is_forgotten_and_can_come_again(folder: Path, damage: bytes | None) -> None:
    (cid,) = blocks = named(b"two")
    store = BlockStore(folder)
    store.put(blocks)
    if damage is None:
        file_of(folder, cid).unlink()
    else:
        file_of(folder, cid).write_bytes(damage)
    assert store.get(cid) is None
    assert (store.has(cid), store.num_bytes, store.num_damaged) == (False, 0, 1)
    store.put(blocks)
    assert store.get(cid) == b"two"


def test_what_was_checked_is_not_checked_again_unless_it_changed_or_that_is_long_ago(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cid,) = blocks = named(b"two")
    clock = Clock()
    checked: list[Cid] = []
    real = Cid.matches
    monkeypatch.setattr(Cid, "matches", lambda self, data: (checked.append(self), real(self, data))[1])
    BlockStore(folder, clock).put(blocks, is_checked=True)
    store = BlockStore(folder, clock)
    buffer = bytearray(BLOCK_BYTES)
    for expected in (1, 1, 1):
        assert store.read_into(cid, buffer) == 3
        assert bytes(buffer[:3]) == b"two"
        assert len(checked) == expected
    clock.now += module.CHECK_S  # so far, the file's time of use was told too, which is no change
    for _ in range(2):
        assert store.get(cid) == b"two"
        assert len(checked) == 2
    file_of(folder, cid).write_bytes(b"owt")
    assert store.read_into(cid, buffer) is None
    assert (store.has(cid), store.num_damaged) == (False, 1)


def test_blocks_that_go_past_the_cache_are_the_same_and_go_the_usual_way_where_that_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    store = BlockStore(folder)
    for number, size in enumerate((BLOCK_BYTES, 3 * mmap.PAGESIZE, 5000, 0, BLOCK_BYTES)):
        if number == 4:  # some file systems refuse it at the first write
            monkeypatch.setattr(os, "write", write_as_usual)
        data = random.randbytes(size)
        memory[:size] = data
        store.put({Cid.of_block(data): memory[:size]}, is_direct=True)
        assert store.get(Cid.of_block(data)) == data
    assert len(BlockStore(folder)) == 5


def write_as_usual(descriptor: int, data: memoryview, real: Callable[[int, memoryview], int] = os.write) -> int:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
        raise OSError(errno.EINVAL, "not here")
    return real(descriptor, data)


def test_what_is_no_block_is_left_alone_and_what_a_killed_node_left_goes_when_it_is_old(folder: Path) -> None:
    BlockStore(folder).put(named(b"one"))
    shelf = next(folder.iterdir())
    mine, old, new = shelf / "notes.txt", shelf / ".new-1-0", shelf / ".new-1-1"
    for path in (mine, old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, time.time() - 2 * module.LEFT_OVER_S))
    assert len(BlockStore(folder)) == 1
    assert (mine.exists(), old.exists(), new.exists()) == (True, False, True)


def test_no_block_is_read_through_a_link(folder: Path, tmp_path: Path) -> None:
    (cid,) = named(b"secret")
    store = BlockStore(folder)
    store.put(named(b"secret"))
    (tmp_path / "elsewhere").write_bytes(b"secret")
    file_of(folder, cid).unlink()
    file_of(folder, cid).symlink_to(tmp_path / "elsewhere")
    assert store.get(cid) is None


def test_the_least_recently_used_goes_first_and_the_spared_never(folder: Path) -> None:
    blocks = named(*(bytes([n]) * 100 for n in range(5)))
    cids = list(blocks)
    store = BlockStore(folder, Clock())
    for cid, data in blocks.items():
        store.put({cid: data})
    store.get(cids[1])
    assert store.evict(500) == 0
    assert store.evict(250, {cids[0]}) == 300
    assert [store.has(cid) for cid in cids] == [True, True, False, False, False]
    assert store.evict(0, {cids[0]}) == 100
    assert store.evict(0, {cids[0]}) == 0
    assert store.forget_unused(frozenset(), before=10**9) == 100
    assert not list(folder.glob("*/*"))


def test_one_fsync_makes_a_batch_durable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    store = BlockStore(folder)
    store.put(named(*(bytes([n]) for n in range(10))), is_durable=False)
    assert not synced
    store.put(named(*(bytes([n]) * 1000 for n in range(10))))
    assert len(synced) == (1 if module._sync_file_range() else 10)
    store.put(named(*(bytes([n]) * 1000 for n in range(10))))  # all here already
    assert len(synced) in (1, 10)


def test_after_a_power_cut_what_was_not_made_durable_is_seen_to_be_gone(folder: Path) -> None:
    safe, unsafe = named(b"safe"), named(b"unsafe", b"as well")
    store = BlockStore(folder)
    store.put(safe)
    store.put(unsafe, is_durable=False)
    for cid in unsafe:  # ext4 leaves a new name without its bytes
        os.truncate(file_of(folder, cid), 0)
    again = BlockStore(folder)
    assert {cid: again.get(cid) for cid in safe | unsafe} == safe | dict.fromkeys(unsafe)
    again.put(unsafe)
    assert {cid: again.get(cid) for cid in unsafe} == unsafe


@pytest.mark.parametrize(
    ("number", "words", "kind"),
    [
        (errno.ENOSPC, "disk is full", StorageFullError),
        (errno.EDQUOT, "disk is full", StorageFullError),
        (errno.EROFS, "cannot be written", StorageError),
        (errno.EIO, "disk failed", StorageError),
    ],
)
def test_what_the_disk_refuses_is_told_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, kind: type[Exception]
) -> None:
    store = BlockStore(folder)
    store.put(named(b"before"))
    real, left = os.write, [1]

    def write(descriptor: int, data: memoryview) -> int:
        if left[0]:
            left[0] -= 1
            return real(descriptor, data)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(kind, match=words):
        store.put(named(b"one", b"two"))
    monkeypatch.undo()
    assert [path.read_bytes() for path in folder.glob("*/*")] == [b"before"]
    assert (len(store), store.num_bytes) == (1, 6)
    store.put(named(b"one", b"two"))
    assert len(BlockStore(folder)) == 3


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/blocks"):
        BlockStore(tmp_path / "file" / "blocks")


def test_many_threads_share_it(folder: Path) -> None:
    store = BlockStore(folder)

    def work(number: int) -> None:
        for step in range(10):
            for block in (f"{number} {step}".encode(), f"shared {step}".encode()):
                store.put({Cid.of_block(block): block}, is_durable=False)
                assert store.get(Cid.of_block(block)) == block

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) == len(BlockStore(folder)) == 50
    assert store.num_bytes == BlockStore(folder).num_bytes
