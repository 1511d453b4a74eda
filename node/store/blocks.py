"""Blocks on disk: each a file, ``blocks/ab/CID``, whose name says what is in it.

The folder is the index: it is read once at the start, and what is there is held in memory from then on (a name, a size,
a time), so that nothing can be in one and not in the other. ``ab`` are the last two characters of the name: the first
ones are the same for all.

A batch is written to files of other names, renamed, and made durable by one fsync: the kernel is told to write the
others (``sync_file_range``), and the last one's fsync commits what the journal holds of all of them and empties the
disk's cache, as git does (``core.fsyncMethod=batch``). A file system that does otherwise, or a power cut in between,
leaves a block that is short or not there; and every block is checked against its name whenever it is read, so that such
a one is forgotten, and fetched again. What was not made durable on purpose is as safe from a kill, and not from a power
cut.

All methods block, except where it is said that they do not; any thread may call them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.node.store.errors import told
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES

log = logging.getLogger(__name__)

TOUCH_S: Final = 60.0
"""The time of a block's last use is on disk as old as this at most."""
LEFT_OVER_S: Final = 3600.0
"""A file that a killed node was writing goes when it is so old."""
CHECK_S: Final = 600.0
"""A block is checked when it is read, unless it was within this time and its file is the same: a disk seldom loses what
it has just been given, and who asks checks it again."""
_NEW: Final = ".new-"
_NEW_FILE: Final = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # of Linux's sync_file_range


_Stamp = tuple[int, int, int]


def _stamp(status: os.stat_result) -> _Stamp:
    """Changes when a file is written to, or another is put in its place."""
    return status.st_ino, status.st_mtime_ns, status.st_size


@dataclass(slots=True)
class _Entry:
    """A block that is here; times are Unix seconds.

    Attributes:
        told_at: up to when the file tells of its last use.
        checked_at: when its bytes were last compared with its name; the file was as ``stamp`` says.
    """

    num_bytes: int
    used_at: float
    told_at: float
    checked_at: float = float("-inf")
    stamp: _Stamp | None = None


class BlockStore:
    """One folder of blocks.

    Attributes:
        folder: in which they are.
        num_bytes: of all of them.
        num_damaged: blocks that were not what their names say.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Find what is there; makes the folder, mode 0700, if there is none.

        Raises:
            StorageError: if it cannot be made or read.
        """
        self.folder = folder
        self.num_bytes = 0
        self.num_damaged = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._here: dict[Cid, _Entry] = {}
        self._numbers = itertools.count()
        self._can_be_direct = _DIRECT != 0
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for shelf in os.scandir(folder):
                if shelf.is_dir(follow_symlinks=False):
                    self._read_shelf(shelf.path)
        except OSError as error:
            raise told(folder, error) from error

    def _read_shelf(self, path: str) -> None:
        for file in os.scandir(path):
            status = file.stat(follow_symlinks=False)
            if file.name.startswith(_NEW):
                if status.st_mtime < time.time() - LEFT_OVER_S:
                    Path(file.path).unlink()
                continue
            try:
                cid = Cid.parse(file.name)
            except UsageError:
                log.warning("%s is no block; it is left alone", file.path)
                continue
            self._here[cid] = _Entry(status.st_size, status.st_mtime, status.st_mtime)
            self.num_bytes += status.st_size

    def __len__(self) -> int:
        """How many blocks are here. Does not block."""
        return len(self._here)

    def has(self, cid: Cid) -> bool:
        """Whether a block is here; not a use of it. Does not block."""
        return cid in self._here

    def size(self, cid: Cid) -> int:
        """Its bytes; 0 if it is not here. Does not block."""
        entry = self._here.get(cid)
        return 0 if entry is None else entry.num_bytes

    def put(
        self,
        blocks: Mapping[Cid, bytes | memoryview],
        *,
        is_checked: bool = False,
        is_durable: bool = True,
        is_direct: bool = False,
    ) -> None:
        """Keep blocks; those that are here already are used.

        Args:
            blocks: by name.
            is_checked: whether it is known that each is what its name says.
            is_durable: whether they are to survive a power cut when this returns; they survive a kill in any case.
            is_direct: whether the memory of each begins at a page, and they go to the disk past the system's cache,
                where that can be: for many, of which none is read soon.

        Raises:
            ProtocolError: if a block is not what its name says, or too big; then none is kept.
            StorageError: if the disk refuses; then none of those that were not here is.
        """
        for cid, data in blocks.items():
            if len(data) > BLOCK_BYTES:
                raise LimitError(f"block {cid} of {len(data)} bytes exceeds the limit of {BLOCK_BYTES}")
            if not is_checked and not cid.matches(data):
                raise ProtocolError(f"these bytes are not block {cid}")
        now = self._clock()
        written: dict[Cid, int] = {}
        stamps: dict[Cid, _Stamp] = {}
        try:
            for cid, data in blocks.items():
                entry = self._here.get(cid)
                if entry is not None:
                    entry.used_at = now
                    continue
                written[cid] = self._write(cid, data, is_direct=is_direct)
                stamps[cid] = _stamp(os.fstat(written[cid]))
            if is_durable:
                _make_durable(list(written.values()))
        except OSError as error:
            for cid in written:
                with suppress(OSError):
                    self._path(cid).unlink()
            raise told(self.folder, error) from error
        finally:
            for descriptor in written.values():
                os.close(descriptor)
        with self._lock:
            for cid, data in blocks.items():
                if cid not in self._here:
                    self._here[cid] = _Entry(len(data), now, now, now, stamps.get(cid))
                    self.num_bytes += len(data)

    def _write(self, cid: Cid, data: bytes | memoryview, *, is_direct: bool) -> int:
        """One file; gives its open descriptor."""
        path = self._path(cid)
        temporary = path.parent / f"{_NEW}{os.getpid()}-{next(self._numbers)}"
        try:
            descriptor = os.open(temporary, _NEW_FILE, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, _NEW_FILE, 0o600)
        try:
            view = memoryview(data)
            if is_direct and self._can_be_direct and len(view) % mmap.PAGESIZE == 0:
                view = self._write_direct(descriptor, view)
            while view:
                view = view[os.write(descriptor, view) :]
            temporary.replace(path)
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                temporary.unlink()
            raise
        return descriptor

    def _write_direct(self, descriptor: int, view: memoryview) -> memoryview:
        """Past the cache, whose fresh pages cost more than the copy; gives what is left to write in the usual way."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT)
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._can_be_direct = False  # this file system cannot
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return view

    def get(self, cid: Cid) -> bytes | None:
        """A block, checked against its name; None if it is not here, or was damaged and is now forgotten.

        Raises:
            StorageError: if this node may not read it.
        """
        buffer = bytearray(self.size(cid) + 1)
        num_bytes = self.read_into(cid, buffer)
        return None if num_bytes is None else bytes(memoryview(buffer)[:num_bytes])

    def read_into(self, cid: Cid, buffer: bytearray | memoryview) -> int | None:
        """As `get`, into memory that has room for a block; gives how many bytes it has.

        What was checked less than `CHECK_S` ago, in a file that was not written to since, is not checked again.
        """
        entry = self._here.get(cid)
        if entry is None:
            return None
        now, num_bytes, is_right = self._clock(), 0, False
        try:
            descriptor = os.open(self._path(cid), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                num_bytes = os.readv(descriptor, [buffer])
                stamp = _stamp(status)
                is_right = num_bytes == status.st_size and entry.stamp == stamp and now < entry.checked_at + CHECK_S
                if not is_right:
                    with memoryview(buffer)[:num_bytes] as data:
                        is_right = cid.matches(data)
                    entry.checked_at = now
                if now - entry.told_at > TOUCH_S:
                    entry.told_at = now
                    with suppress(OSError):  # a disk that cannot be written can be read
                        os.utime(descriptor, (now, now))
                        stamp = _stamp(os.fstat(descriptor))
                entry.stamp = stamp if is_right else None
            finally:
                os.close(descriptor)
        except PermissionError as error:
            raise told(self._path(cid), error) from error
        except OSError as error:  # it is gone, or the disk lost it
            log.warning("block %s cannot be read (%s); it is forgotten", cid, error.strerror)
        else:
            entry.used_at = now
        if not is_right:
            self.num_damaged += 1
            log.warning("block %s is damaged on disk; it is forgotten, and fetched again when it is needed", cid)
            self.forget([cid])
            return None
        return num_bytes

    def make_durable(self, cids: Iterable[Cid]) -> None:
        """These survive a power cut when it returns, if they were `put` before.

        Raises:
            StorageError: if the disk refuses.
        """
        descriptors: list[int] = []
        try:
            for cid in cids:
                with suppress(FileNotFoundError):  # one was forgotten meanwhile
                    descriptors.append(os.open(self._path(cid), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
            _make_durable(descriptors)
        except OSError as error:
            raise told(self.folder, error) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def forget(self, cids: Iterable[Cid]) -> int:
        """Remove blocks, pinned or not; gives how many bytes they had."""
        freed = 0
        for cid in cids:
            with self._lock:
                entry = self._here.pop(cid, None)
                if entry is None:
                    continue
                self.num_bytes -= entry.num_bytes
                freed += entry.num_bytes
            try:
                self._path(cid).unlink(missing_ok=True)
            except OSError as error:
                raise told(self._path(cid), error) from error
        return freed

    def evict(self, max_bytes: int, spared: AbstractSet[Cid] = frozenset()) -> int:
        """Forget blocks until all have at most ``max_bytes``: the least recently used first, those spared never.

        Returns:
            How many bytes were forgotten; the rest over the limit is to stay.
        """
        excess = self.num_bytes - max_bytes
        if excess <= 0:
            return 0
        doomed: list[Cid] = []
        for _, cid, num_bytes in sorted((e.used_at, cid, e.num_bytes) for cid, e in self._entries()):
            if excess <= 0:
                break
            if cid not in spared:
                doomed.append(cid)
                excess -= num_bytes
        return self.forget(doomed)

    def forget_unused(self, spared: AbstractSet[Cid], before: float) -> int:
        """Forget blocks that were last used before a time (Unix seconds), except those to be spared.

        Returns:
            How many bytes were forgotten.
        """
        return self.forget([cid for cid, entry in self._entries() if entry.used_at < before and cid not in spared])

    def _entries(self) -> list[tuple[Cid, _Entry]]:
        with self._lock:
            return list(self._here.items())

    def _path(self, cid: Cid) -> Path:
        return self.folder / cid[-2:] / cid


def _make_durable(descriptors: list[int]) -> None:
    """One fsync for all of them."""
    if not descriptors:
        return
    *others, last = descriptors
    flush = _sync_file_range()
    for flags in (_WRITE, _WAIT_BEFORE | _WRITE | _WAIT_AFTER):
        for descriptor in others:
            if flush is None or flush(descriptor, 0, 0, flags):
                os.fsync(descriptor)
    os.fsync(last)


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int

    def flush(descriptor: int, start: int, num_bytes: int, flags: int) -> int:
        return int(function(descriptor, start, num_bytes, flags))

    return flush
