"""The door by which a training loop of the user comes in, to be a run's worker (`shoal.training.loop`).

One Unix socket per run, which none but the same user can open. One loop at a time: it is greeted by a line, with which
comes the memory that both share (`shoal.training.arena`), and from then on called as a worker of this node's own would
be. Another one that comes meanwhile is told who is there, and sent away. When the loop goes, however that happens, the
next may come: the node neither starts nor ends what is not its own.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from shoal.node.store import sockets
from shoal.node.supervise import open_plain_nursery
from shoal.node.wire.channel import Channel, Router, SocketByteStream
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_WORKER_ATTACHMENT_BYTES
from shoal.training.arena import Arena

log = logging.getLogger(__name__)

WELCOME: Final = b"welcome\n"
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
LEAVING_S: Final = 1.0
"""For a loop that has ended to be done with, when the next one is there at once."""


class Door:
    """Of one run.

    Attributes:
        path: of its socket.
        num_refused: loops that came while another one was there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_refused = 0
        self._place = trio.Lock()  # for one loop
        self._inside = ""
        self._arrivals, self._arrived = trio.open_memory_channel[tuple[trio.SocketStream, Arena]](1)
        self._has_gone = trio.Event()

    @asynccontextmanager
    async def next_loop(self, peer: PeerId, on_gone: Callable[[], None]) -> AsyncIterator[tuple[Channel, Arena]]:
        """Wait for a loop; it can be called in the context, and shares memory with this node.

        Args:
            peer: this node, as the loop's counterpart.
            on_gone: told when the loop has gone; what it answered before is there.
        """
        stream, arena = await self._arrived.receive()
        channel = Channel(SocketByteStream(stream), peer, Router(), max_attachment_bytes=MAX_WORKER_ATTACHMENT_BYTES)
        try:
            async with open_plain_nursery() as nursery:
                nursery.start_soon(_run_until_gone, channel, on_gone)
                nursery.start_soon(_hang_up_on_the_dead, stream)
                yield channel, arena
                nursery.cancel_scope.cancel()
        finally:
            self._has_gone.set()

    async def greet(self, stream: trio.SocketStream) -> None:
        """Somebody has come."""
        who = f"the process {_pid(stream)}"
        with trio.move_on_after(LEAVING_S):
            await self._place.acquire()
        if self._place.statistics().owner is not trio.lowlevel.current_task():
            self.num_refused += 1
            log.warning("%s is refused: %s is attached to this run", who, self._inside)
            words = f"{self._inside} is attached to this swarm at this node; end it first, or use another profile"
            await stream.send_all(f"{words}\n".encode())
            return
        self._inside, self._has_gone, arena = who, trio.Event(), Arena.make()
        try:
            await stream.socket.sendmsg([WELCOME], _passing(arena.descriptor))
            log.info("%s is attached", who)
            await self._arrivals.send((stream, arena))
            await self._has_gone.wait()
        finally:
            arena.close()
            self._place.release()


@asynccontextmanager
async def open_door(path: Path) -> AsyncIterator[Door]:
    """A door that is open while the context lasts.

    Args:
        path: for its socket; another is taken if that is too long for one.

    Raises:
        ShoalError: if there can be no socket.
    """
    with ExitStack() as stack:
        path = sockets.place(path, stack)
        listener = stack.enter_context(sockets.listen(path))
        stack.callback(path.unlink, missing_ok=True)
        door = Door(path)
        async with open_plain_nursery() as nursery:
            accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))
            nursery.start_soon(_answer, door, accepting)
            try:
                yield door
            finally:
                nursery.cancel_scope.cancel()


async def _answer(door: Door, accepting: trio.SocketListener) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        try:
            await door.greet(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            log.info("a loop came and went")

    await trio.serve_listeners(greet, [accepting])


async def _run_until_gone(channel: Channel, on_gone: Callable[[], None]) -> None:
    await channel.run()
    on_gone()


async def _hang_up_on_the_dead(stream: trio.SocketStream) -> None:
    """End the stream when the process at its other end is gone, although what that forked may hold it open."""
    try:
        descriptor = os.pidfd_open(_pid(stream))
    except OSError:  # it is gone already, or of a container that this node cannot see into: the stream ends by itself
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    with suppress(OSError):
        stream.socket.shutdown(trio.socket.SHUT_RDWR)  # what has come already can still be read


def _passing(descriptor: int) -> list[tuple[int, int, bytes]]:
    """What takes a file along with a message."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]


def _pid(stream: trio.SocketStream) -> int:
    """Of the process that connected; unix(7)."""
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[0])
