"""Worker processes: started, called, and never left behind.

A worker is a fresh Python process (no fork) at the other end of a socket pair. It ends by itself when the node does,
because its socket closes. Torch lives there and only there.
"""

from __future__ import annotations

import importlib.util
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from shoal.node.wire.channel import Channel, Router, SocketByteStream
from shoal.protocol.errors import ResourceError, ShoalError, resource_error
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_WORKER_ATTACHMENT_BYTES

log = logging.getLogger(__name__)

STOP_S: Final = 0.5
TRAINING_MODULES: Final = ("torch", "gymnasium", "numpy", "safetensors", "matplotlib", "tensorboardX")


class MissingTrainingError(ShoalError):
    """The packages that learning needs are not installed."""


def can_train() -> bool:
    """Whether the packages that a learner needs are installed."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in TRAINING_MODULES)
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


@asynccontextmanager
async def open_worker(nursery: trio.Nursery, peer: PeerId, log_path: Path) -> AsyncIterator[Channel]:
    """A running worker, to be called through the channel; it is gone when the context ends.

    A worker that dies makes its calls fail with UNAVAILABLE.

    Args:
        nursery: runs the channel.
        peer: this node, as the worker's counterpart.
        log_path: where the worker's stderr goes.

    Raises:
        MissingTrainingError: if none could run here.
        ResourceError: if this machine lacks what a process needs; later it may have it.
        ShoalError: if it cannot be started for another reason.
    """
    try:
        require_training()
        ours, process = await _start_process(log_path)
    except OSError as error:
        scarce = resource_error(error)
        if scarce is None:
            where = f"{log_path.parent} and {sys.executable}"
            raise ShoalError(f"a worker cannot be started: {error}; check {where}") from error
        raise ResourceError(f"a worker cannot be started: {scarce}") from error
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    channel = Channel(SocketByteStream(stream), peer, Router(), max_attachment_bytes=MAX_WORKER_ATTACHMENT_BYTES)
    nursery.start_soon(channel.run)
    try:
        yield channel
    finally:
        with trio.CancelScope(shield=True):
            await stream.aclose()
            with trio.move_on_after(STOP_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode not in (0, -9):
            log.warning("the worker ended with code %s; see %s", process.returncode, log_path)


async def _start_process(log_path: Path) -> tuple[socket.socket, trio.Process]:
    """A new worker, and the socket to it."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = socket.socketpair()
    try:
        with theirs, log_path.open("ab") as log_file:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "shoal.training.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
            )
    except BaseException:
        ours.close()
        raise
    return ours, process
