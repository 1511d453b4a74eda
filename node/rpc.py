"""The RPC shell: runs an `RpcConnection` on a real byte stream, in trio.

A `Channel` is one stream with calls in both directions. Three kinds of tasks serve it: one reads, one writes (all
that has gathered since the last write goes out in one piece), and one per call of the far side. The stream may be
a libp2p stream to another node or a Unix socket to a worker: anything with the three methods of `ByteStream`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import trio

from shoal.protocol.codec import from_plain
from shoal.protocol.errors import LimitError, ProtocolError, RefusedError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.rpc import Answered, Attachments, Called, Cancelled, Event, Failed, RpcConnection
from shoal.protocol.services import Method

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Handler = Callable[[PeerId, Any, Attachments], Awaitable[tuple[Any, Attachments]]]


class StreamClosedError(Exception):
    """Raised by a `ByteStream` when the far side or the path is gone."""


class ByteStream(Protocol):
    """What a channel needs of a transport."""

    async def read(self) -> bytes:
        """Some bytes, or `StreamClosedError`."""

    async def write(self, data: bytes) -> None:
        """Write all, or `StreamClosedError`."""

    async def close(self) -> None:
        """Close both directions; never raises."""


class Router:
    """Which handler serves which method."""

    def __init__(self) -> None:
        self._routes: dict[str, tuple[type[Any], Handler]] = {}

    def serve(
        self,
        method: Method[Request, Answer],
        handler: Callable[[PeerId, Request, Attachments], Awaitable[tuple[Answer, Attachments]]],
    ) -> None:
        """Let ``handler(peer, request, attachments)`` answer a method."""
        self._routes[method.name] = (method.request, handler)

    async def handle(self, peer: PeerId, call: Called) -> tuple[object, Attachments]:
        """Run the handler of a call.

        Raises:
            RemoteError: UNIMPLEMENTED if nobody serves the method.
            ProtocolError: if the request is not of the method's type.
        """
        route = self._routes.get(call.method)
        if route is None:
            raise RemoteError(Status.UNIMPLEMENTED, f"this node does not know the method {call.method[:80]!r}")
        request_type, handler = route
        return await handler(peer, from_plain(request_type, call.body), call.attachments)


@dataclass(slots=True)
class _Pending:
    """A call of ours; ``done`` is set once ``outcome`` is."""

    done: trio.Event = field(default_factory=trio.Event)
    outcome: Answered | Failed | None = None


class Channel:
    """Calls in both directions over one stream. `run` must be running for anything to move."""

    def __init__(self, stream: ByteStream, peer: PeerId, router: Router) -> None:
        self.peer = peer
        self._stream = stream
        self._router = router
        self._connection = RpcConnection()
        self._pending: dict[int, _Pending] = {}
        self._serving: dict[int, trio.CancelScope] = {}
        self._wake_writer = trio.Event()
        self._closed_because: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls can still be made."""
        return self._closed_because is None

    async def call(
        self,
        method: Method[Request, Answer],
        request: Request,
        attachments: Sequence[bytes | memoryview] = (),
        *,
        timeout_s: float,
    ) -> tuple[Answer, Attachments]:
        """Call a method of the far side. If cancelled, the far side is told.

        Raises:
            RemoteError: with the far side's status; DEADLINE_EXCEEDED after ``timeout_s``; UNAVAILABLE when the
                stream is gone; INTERNAL if the answer is not of the method's type.
            LimitError: if the request is too big.
        """
        if self._closed_because is not None:
            raise RemoteError(Status.UNAVAILABLE, self._closed_because)
        call_id = self._connection.call(method.name, request, attachments, timeout_s, trio.current_time())
        pending = self._pending[call_id] = _Pending()
        self._wake_writer.set()
        try:
            with trio.move_on_after(timeout_s):
                await pending.done.wait()
        finally:
            del self._pending[call_id]
            self._connection.cancel(call_id)  # without effect if it is done
            self._wake_writer.set()
        match pending.outcome:
            case Answered(_, body, received):
                try:
                    return from_plain(method.answer, body), received
                except ProtocolError as error:
                    raise RemoteError(Status.INTERNAL, f"{method.name} was answered with nonsense: {error}") from error
            case Failed(_, error):
                raise error
            case None:
                raise RemoteError(Status.DEADLINE_EXCEEDED, f"{method.name} was not answered in {timeout_s:.1f} s")

    async def run(self) -> None:
        """Serve the stream until it ends; returns, never raises, for whatever the far side does."""
        reason = "the connection was closed"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_loop)
                try:
                    await self._read_loop(nursery)
                except StreamClosedError as error:
                    reason = str(error) or reason
                except ProtocolError as error:
                    reason = f"protocol error: {error}"
                    log.warning("closing the stream with %s: %s", self.peer, error)
                finally:
                    self._closed_because = reason  # callers learn it now, however long a handler takes to stop
                    for event in self._connection.close(reason):
                        self._dispatch(event, None)
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await self._stream.close()

    async def _read_loop(self, nursery: trio.Nursery) -> None:
        while True:
            data = await self._stream.read()
            for event in self._connection.receive_data(data, trio.current_time()):
                self._dispatch(event, nursery)
            self._wake_writer.set()

    async def _write_loop(self) -> None:
        try:
            while True:
                pieces = self._connection.data_to_send()
                if pieces:
                    await self._stream.write(b"".join(pieces))
                else:
                    self._wake_writer = trio.Event()
                    await self._wake_writer.wait()
        except StreamClosedError:
            await self._stream.close()  # the reader notices and ends the channel

    def _dispatch(self, event: Event, nursery: trio.Nursery | None) -> None:
        match event:
            case Called() if nursery is not None:
                scope = self._serving[event.call_id] = trio.CancelScope(deadline=event.deadline)
                nursery.start_soon(self._serve, event, scope)
            case Called():
                raise AssertionError("a closed connection receives no calls")
            case Cancelled(call_id):
                if call_id in self._serving:
                    self._serving[call_id].cancel()
            case Answered(call_id) | Failed(call_id):
                if call_id in self._pending:
                    self._pending[call_id].outcome = event
                    self._pending[call_id].done.set()

    async def _serve(self, call: Called, scope: trio.CancelScope) -> None:
        try:
            with scope:
                body, attachments = await self._router.handle(self.peer, call)
                self._connection.answer(call.call_id, body, attachments)
        except RemoteError as error:
            self._connection.fail(call.call_id, error.status, error.message)
        except LimitError as error:
            self._connection.fail(call.call_id, Status.RESOURCE_EXHAUSTED, str(error))
        except RefusedError as error:
            self._connection.fail(call.call_id, Status.PERMISSION_DENIED, str(error))
        except (ProtocolError, UsageError) as error:
            self._connection.fail(call.call_id, Status.INVALID_ARGUMENT, str(error))
        except ShoalError as error:
            self._connection.fail(call.call_id, Status.INTERNAL, str(error))
        except Exception:
            # One peer's call must not take the node down; the details stay here, the peer learns that it failed.
            log.exception("the handler of %s failed", call.method)
            self._connection.fail(call.call_id, Status.INTERNAL, "the handler failed; see the log of that node")
        finally:
            if scope.cancelled_caught:
                self._connection.fail(call.call_id, Status.DEADLINE_EXCEEDED, "the deadline passed at the far side")
            del self._serving[call.call_id]
            self._wake_writer.set()


class SocketByteStream:
    """A `ByteStream` on a trio socket stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        """Some bytes, or `StreamClosedError`."""
        try:
            data = bytes(await self._stream.receive_some(256 * 1024))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosedError("the socket broke") from error
        if not data:
            raise StreamClosedError("the far side closed the socket")
        return data

    async def write(self, data: bytes) -> None:
        """Write all, or `StreamClosedError`."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosedError("the socket broke") from error

    async def close(self) -> None:
        """Close the socket."""
        await self._stream.aclose()
