"""The door by which a training loop of the user comes in, to be a run's worker (`shoal.training.loop`).

One Unix socket per run, which none but the same user can open. One loop at a time: it is greeted by a line, and from
then on called as a worker of this node's own would be. Another one that comes meanwhile is told who is there, and sent
away. When the loop goes, however that happens, the next may come: the node neither starts nor ends what is not its own.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from shoal.node.store import sockets
from shoal.node.supervise import open_plain_nursery
from shoal.node.wire.channel import Channel, Router, SocketByteStream
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_WORKER_ATTACHMENT_BYTES

log = logging.getLogger(__name__)

WELCOME: Final = b"welcome\n"


class Door:
    """Of one run.

    Attributes:
        path: of its socket.
        num_refused: loops that came while another one was there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_refused = 0
        self._inside: str | None = None
        self._arrivals, self._arrived = trio.open_memory_channel[trio.SocketStream](1)
        self._has_gone = trio.Event()

    @asynccontextmanager
    async def next_loop(self, peer: PeerId) -> AsyncIterator[Channel]:
        """Wait for a loop; it can be called in the context, which is cut off when it goes.

        Args:
            peer: this node, as the loop's counterpart.
        """
        stream = await self._arrived.receive()
        channel = Channel(SocketByteStream(stream), peer, Router(), max_attachment_bytes=MAX_WORKER_ATTACHMENT_BYTES)
        try:
            async with open_plain_nursery() as nursery:
                nursery.start_soon(_run_until_gone, channel, nursery.cancel_scope)
                yield channel
                nursery.cancel_scope.cancel()
        finally:
            self._has_gone.set()

    async def greet(self, stream: trio.SocketStream) -> None:
        """Somebody has come."""
        who = _who(stream)
        if self._inside is not None:
            self.num_refused += 1
            log.warning("%s is refused: %s is attached to this run", who, self._inside)
            words = f"{self._inside} is attached to this swarm at this node; end it first, or use another profile"
            await stream.send_all(f"{words}\n".encode())
            return
        self._inside, self._has_gone = who, trio.Event()
        try:
            await stream.send_all(WELCOME)
            log.info("%s is attached", who)
            await self._arrivals.send(stream)
            await self._has_gone.wait()
        finally:
            self._inside = None


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
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.info("a loop came and went")

    await trio.serve_listeners(greet, [accepting])


async def _run_until_gone(channel: Channel, scope: trio.CancelScope) -> None:
    await channel.run()
    scope.cancel()


def _who(stream: trio.SocketStream) -> str:
    """The process at the other end, in words; unix(7)."""
    try:
        pid, _, _ = struct.unpack("3i", stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError:
        return "a process"
    return f"the process {pid}"
