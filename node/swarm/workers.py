"""Worker processes: started, called, watched, and never left behind.

A worker is a fresh Python process (no fork of this one) at the other end of a socket pair, kept by another
(`shoal.training.keeper`), which ends it and all that it started when the node wants so, or is gone itself. Torch lives
there and only there. Nothing of the folder that the node was started in is ever imported: Python is told to look in
safe places only, and stands in the root folder.

No call has a time to end in. What there is instead is a page of memory on which the worker says what it does: one whose
beats stop, or that does nothing for long, is killed, and what it was about is told.
"""

from __future__ import annotations

import importlib.util
import logging
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from shoal.node.signals import about
from shoal.node.store.files import make_own_folder
from shoal.node.wire.channel import Channel, Router, SocketByteStream
from shoal.protocol.errors import RemoteError, ResourceError, ShoalError, Status, resource_error
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_WORKER_ATTACHMENT_BYTES
from shoal.training import watch
from shoal.training.arena import Arena
from shoal.training.keeper import WORKER_LOG
from shoal.training.watch import Slot

log = logging.getLogger(__name__)

STOP_S: Final = 0.5
LOST_S: Final = 5.0
"""For a worker whose socket is closed already to end, so that it can be told how it did."""
KEEPER_S: Final = 2.0
LOOK_S: Final = 1.0
STILL_S: Final = 10.0
"""Without a sign of life."""
START_S: Final = 120.0
"""Until the first one: PyTorch is large, and disks are slow."""
IDLE_S: Final = 300.0
"""Without an environment step, a minibatch or an end of what it works on; what hangs in an environment is seen to
within seconds by the worker itself."""
MARK: Final = "SHOAL_WORKER"
ENVIRONMENTS_LOG: Final = "environments.log"
"""`shoal.training.tasks.failures.FILE`, which cannot be imported without NumPy."""
TRAINING_MODULES: Final = ("torch", "gymnasium", "numpy", "safetensors", "matplotlib", "tensorboardX")

ACTING_MODULES: Final = ("gymnasium", "numpy", "safetensors")


class MissingTrainingError(ShoalError):
    """The packages that learning needs are not installed."""


def can_train() -> bool:
    """Whether the packages that a learner needs are installed."""
    return _are_installed(TRAINING_MODULES)


def can_act() -> bool:
    """Whether the packages that an actor needs are installed: no torch among them."""
    return _are_installed(ACTING_MODULES)


def _are_installed(names: Iterable[str]) -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ModuleNotFoundError:
        return False


def require_training() -> None:
    """Check that a worker could run.

    Raises:
        MissingTrainingError: if it could not.
    """
    if not can_train():
        raise MissingTrainingError(
            "this installation cannot learn: install it with  pip install 'shoal[train]'  or take --role storage"
        )


class WorkerLostError(ShoalError):
    """A worker is gone in the middle of its work.

    Attributes:
        is_task: whether it went in an environment, so that the task is to blame.
    """

    def __init__(self, message: str, *, is_task: bool) -> None:
        super().__init__(message)
        self.is_task = is_task


def child_environment() -> dict[str, str]:
    """For Python processes whose imports this user has chosen, and not the folder in which a node was started."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    chosen = os.pathsep.join(str(Path(each).absolute()) for each in named if each)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": chosen} if chosen else {})


class _Page:
    """What a worker says of itself, as `shoal.training.watch` writes it."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("shoal-worker")
        os.ftruncate(self.descriptor, watch.PAGE_BYTES)
        self._map = mmap.mmap(self.descriptor, watch.PAGE_BYTES)
        self._numbers = memoryview(self._map).cast("Q")

    def __getitem__(self, slot: Slot) -> int:
        return int(self._numbers[slot])

    @property
    def words(self) -> str:
        """In which environment it is; empty if in none."""
        act, index = watch.place_of(self[Slot.PLACE])
        return "" if act is watch.Act.NOTHING else f"environment {index} in {act.words}"

    def close(self) -> None:
        self._numbers.release()
        self._map.close()
        os.close(self.descriptor)


@asynccontextmanager
async def open_worker(
    nursery: trio.Nursery, peer: PeerId, folder: Path, arena: Arena | None = None
) -> AsyncIterator[Channel]:
    """A running worker, to be called through the channel; it is gone when the context ends, with all that it started.

    Args:
        nursery: runs the channel.
        peer: this node, as the worker's counterpart.
        folder: of the run; gets the logs of the worker and of its environments.
        arena: that it shares with this node; if None, one that this node has no more to do with.

    Raises:
        MissingTrainingError: if none could run here.
        ResourceError: if this machine lacks what a process needs; later it may have it.
        WorkerLostError: if it is gone before the context ends.
        ShoalError: if it cannot be started for another reason.
    """
    try:
        require_training()
        started = await _start_process(folder, arena)
    except OSError as error:
        scarce = resource_error(error)
        if scarce is None:
            where = f"{folder} and {sys.executable}"
            raise ShoalError(f"a worker cannot be started: {error}; check {where}") from error
        raise ResourceError(f"a worker cannot be started: {scarce}") from error
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(started.socket))
    channel = Channel(SocketByteStream(stream), peer, Router(), max_attachment_bytes=MAX_WORKER_ATTACHMENT_BYTES)
    nursery.start_soon(channel.run)
    looking = trio.CancelScope()
    nursery.start_soon(_look_after, started, looking)
    lost: RemoteError | None = None
    try:
        yield channel
    except RemoteError as error:
        if error.status is not Status.UNAVAILABLE:
            raise
        lost = error
    finally:
        looking.cancel()
        with trio.CancelScope(shield=True):
            await stream.aclose()
            await _end(started, patience_s=STOP_S if lost is None else LOST_S)
        how = _how_it_ended(started, folder)
        started.page.close()
    if lost is not None:
        raise WorkerLostError(how[0], is_task=how[1]) from lost


@dataclass(slots=True)
class _Started:
    """A worker's keeper.

    Attributes:
        mark: in the environment of all that it started.
        killed_for: why this node killed it, if it did.
    """

    process: trio.Process
    socket: socket.socket
    life: int
    page: _Page
    mark: str
    killed_for: str = ""


async def _look_after(started: _Started, scope: trio.CancelScope) -> None:
    """Kill a worker that hangs as a whole, or does nothing for long, and end the channel to one that is gone."""
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_kill_when_still, started)
            # What its environments forked may hold the other end of the socket for ever.
            await started.process.wait()
            with suppress(OSError):
                started.socket.shutdown(socket.SHUT_RDWR)  # what has come already can still be read
            nursery.cancel_scope.cancel()


async def _kill_when_still(started: _Started) -> None:
    beats, calls, num_still, num_idle, has_begun = 0, 0, 0, 0, False
    while True:
        await trio.sleep_until(about(LOOK_S))
        # The looks are counted, not the time: this process may have been stopped too.
        page, is_busy = started.page, bool(started.page[Slot.BUSY])
        has_begun = has_begun or page[Slot.BEATS] > 0
        num_still = num_still + 1 if page[Slot.BEATS] == beats else 0
        num_idle = num_idle + 1 if is_busy and page[Slot.CALLS] == calls else 0
        beats, calls = page[Slot.BEATS], page[Slot.CALLS]
        if num_still * LOOK_S >= (STILL_S if has_begun else START_S):
            started.killed_for = f"it gave no sign of life for {num_still * LOOK_S:.0f} s"
        elif num_idle * LOOK_S >= IDLE_S:
            started.killed_for = f"it came no further for {num_idle * LOOK_S:.0f} s"
        else:
            continue
        _kill_group(started.process)
        return


async def _end(started: _Started, *, patience_s: float) -> None:
    """See to it that the worker is gone, and all that it started."""
    process = started.process
    with trio.move_on_after(patience_s):
        await process.wait()
    os.close(started.life)
    with trio.move_on_after(KEEPER_S):
        await process.wait()
    if process.returncode is None:
        _kill_group(process)
        await process.wait()
    if (process.returncode or 0) < 0:  # its keeper is not there to end what it started
        _kill_group(process)
        await trio.to_thread.run_sync(_kill_marked, started.mark)


def _kill_group(process: trio.Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill_marked(mark: str) -> None:
    """Kill what a worker started that has left its group."""
    wanted = f"{MARK}={mark}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _how_it_ended(started: _Started, folder: Path) -> tuple[str, bool]:
    """In words, and whether the task is to blame."""
    code, place = started.process.returncode or 0, started.page.words
    number = -code if code < 0 else code - 128
    if started.killed_for:
        how = started.killed_for
    elif code == watch.EXIT_HUNG:
        how = "an environment did not come back"
    elif number in set(signal.Signals):
        how = f"it was ended by {signal.Signals(number).name}"
    else:
        how = f"it ended with code {code}"
    is_task = bool(place) and (bool(started.killed_for) or number != signal.SIGKILL)
    where = f"{place}; see {folder / ENVIRONMENTS_LOG}" if place else f"see {folder / WORKER_LOG}"
    return f"the worker is gone: {how}{', ' if place else '; '}{where}", is_task


async def _start_process(folder: Path, arena: Arena | None) -> _Started:
    """A new worker, and what leads to it."""
    make_own_folder(folder)
    page, mark = _Page(), secrets.token_hex(8)
    with ExitStack() as stack:
        stack.callback(page.close)
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        shared = Arena.make() if arena is None else arena
        try:
            given = (theirs.fileno(), page.descriptor, shared.descriptor, reader)
            process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", "shoal.training.keeper", *map(str, given), str(folder)],
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env=child_environment() | {MARK: mark},
            )
        finally:
            theirs.close()
            os.close(reader)
            if arena is None:
                shared.close()
        stack.pop_all()
    return _Started(process, ours, writer, page, mark)
