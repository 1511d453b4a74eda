"""Keeps a worker: starts it, writes down what it prints, and lets nothing that it started outlive it.

    python -P -m shoal.training.keeper SOCKET PAGE ARENA LIFE FOLDER

The arguments are file descriptors: the worker's end of the socket to the node, the page of `shoal.training.watch`, the
memory of `shoal.training.arena`, and a pipe that closes when the node wants the worker to end, or ends itself. Then
there is the folder of the run.

Environments start processes of their own: simulators, games, helpers that outlive who began them. A process whose
parent dies becomes the child of the next reaper above it (PR_SET_CHILD_SUBREAPER, prctl(2)), and that is this process,
whatever session or group it has gone to. So when the worker has ended, or has to, all descendants are killed until none
is left. The worker dies with this process (PR_SET_PDEATHSIG). It is forked before anything heavy is imported, so this
process stays small; whatever the worker and its environments print comes here, into a log that is no longer than
`MAX_LOG_BYTES`, twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

WORKER_LOG: Final = "worker.log"
MAX_LOG_BYTES: Final = 4 * 1024 * 1024
KILL_S: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What NumPy's BLAS, PyTorch and simulators read when they are loaded."""
_SIGNALLED: Final = 128
"""Exit code of this process, less the number of the signal that ended the worker; as shells have it."""


def main() -> None:
    """Start the worker and stay until it is gone, with all that it started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node
    socket_fd, page_fd, arena_fd, life_fd = (int(word) for word in sys.argv[1:5])
    for given in (socket_fd, page_fd, arena_fd, life_fd):
        os.set_inheritable(given, False)  # not for what environments start
    folder = Path(sys.argv[5])
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reader, writer = os.pipe()
    _give_threads()
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        for stream in (1, 2):
            os.dup2(writer, stream)
        for end in (reader, writer, life_fd):
            os.close(end)
        _work(socket_fd, page_fd, arena_fd, folder)
        return
    for end in (writer, socket_fd, page_fd, arena_fd):
        os.close(end)
    sys.exit(_keep(worker, life_fd, reader, _Log(folder / WORKER_LOG)))


def alone(work: Callable[[], None], *, closing: int) -> None:
    """Do something in a process of its own that this one waits for, and let nothing that it starts outlive it.

    Args:
        work: what to do.
        closing: a descriptor that only that process is to hold.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            work()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(closing)
    signal.signal(signal.SIGTERM, lambda *_: None)  # it wakes this process, as the end of the other one does
    waker, wakened = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    ended: list[Any] = [os.pidfd_open(worker), wakened]
    select.select(ended, [], [])
    _kill_all()


def _work(socket_fd: int, page_fd: int, arena_fd: int, folder: Path) -> None:
    import mmap

    from shoal.training import arena, watch, worker  # heavy

    watch.use(memoryview(mmap.mmap(page_fd, watch.PAGE_BYTES)))
    os.close(page_fd)
    worker.main(socket.socket(fileno=socket_fd), arena.Arena(arena_fd), folder)


def _give_threads() -> None:
    """Say how many threads there are to compute with: one, as arrays are small and workers share a machine.

    A person who sets ``OMP_NUM_THREADS`` says it for all of them.
    """
    budget = os.environ.get(THREADS[0], "1")
    for name in THREADS:
        os.environ.setdefault(name, budget)


def _keep(worker: int, life_fd: int, output: int, log: _Log) -> int:
    """Wait for the worker's end, or the node's word; gives the exit code."""
    ended = os.pidfd_open(worker)
    os.set_blocking(output, False)
    waiting = select.poll()
    for descriptor in (ended, life_fd, output):
        waiting.register(descriptor, select.POLLIN)
    is_over = False
    while not is_over:
        for descriptor, _ in waiting.poll():
            if descriptor == output:
                if not log.copy(output):
                    waiting.unregister(output)
            else:
                is_over = True
    codes = _kill_all()
    log.copy(output)
    code = codes.get(worker, 1)
    return _SIGNALLED - code if code < 0 else code


def _kill_all() -> dict[int, int]:
    """Kill all descendants of this process; gives the exit codes of its children, minus the signal that ended them."""
    codes: dict[int, int] = {}
    until = time.monotonic() + KILL_S
    while time.monotonic() < until:
        if not _reap(codes):
            break
        for victim in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(victim, signal.SIGKILL)
        time.sleep(0.005)
    return codes


def _reap(codes: dict[int, int]) -> bool:
    """Take note of children that have ended; whether there are others."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if child == 0:
            return True
        codes[child] = os.waitstatus_to_exitcode(status)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:  # that thread has just ended
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


class _Log:
    """A file that is begun anew when it is full; the one before is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open()

    def copy(self, source: int) -> bool:
        """Write what is there to be read; whether more may come."""
        for _ in range(64):
            try:
                data = os.read(source, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            with contextlib.suppress(OSError):  # a full disk costs the log, not the worker
                os.write(self._file, data)
                if os.fstat(self._file).st_size > MAX_LOG_BYTES:
                    self._path.replace(self._path.with_suffix(".log.1"))
                    os.close(self._file)
                    self._file = self._open()
        return True

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


if __name__ == "__main__":
    main()
