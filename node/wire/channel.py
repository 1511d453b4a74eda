"""The RPC shell: runs an `RpcConnection` on a real byte stream, in trio.

A `Channel` is one stream with calls in both directions: those of this side, which are here, and those of the far
side, which `serving` runs. One task reads, one writes (`outbox`), one watches deadlines. The stream may be a libp2p
stream or a lane to another node, or a Unix socket to a worker process: anything with the methods of `ByteStream`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar, cast

import trio

from shoal.node.metrics import Metrics
from shoal.node.wire.outbox import ByteStream, Outbox, StreamClosedError, UnknownProtocolError, total_bytes
from shoal.node.wire.serving import Account, Incoming, Router, Server
from shoal.protocol.codec import Buffer, decode_message, encode_message
from shoal.protocol.errors import LimitError, ProtocolError, RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES, MAX_CALLS_IN_FLIGHT, MAX_HELD_BYTES, MAX_UNSENT_BYTES
from shoal.protocol.rpc import (
    Answered,
    Called,
    Cancelled,
    Draining,
    Ended,
    Event,
    Failed,
    Message,
    RpcConnection,
    Writable,
)
from shoal.protocol.services import Method

__all__ = [
    "Account",
    "ByteStream",
    "Channel",
    "Router",
    "SocketByteStream",
    "StreamClosedError",
    "UnknownProtocolError",
]

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")

DRAIN_TICK_S: Final = 0.01
RETIRE_TICK_S: Final = 1.0

# Enum members are looked up slowly (CPython 3.11), and these once a call.
_OK, _CANCELLED = Status.OK, Status.CANCELLED
_ABORTED = trio.lowlevel.Abort.SUCCEEDED

current_time = trio.current_time


class _OurCall:
    """A call of ours: who waits for its outcome, and its streams if it has any."""

    __slots__ = ("incoming", "is_unhurried", "result", "sender", "sent_bytes", "task", "writable")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.result: Answered | BaseException | None = None
        self.incoming: Incoming | None = None
        self.sender: trio.CancelScope | None = None
        self.writable: trio.lowlevel.ParkingLot | None = None
        self.sent_bytes = 0  # of a stream of requests
        self.is_unhurried = False

    def settle(self, result: Answered | BaseException) -> None:
        """Tell the outcome to whoever waits; only the first counts."""
        if self.result is not None:
            return
        self.result = result
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task)
        if self.incoming is not None:
            self.incoming.end(result if isinstance(result, BaseException) else None)
        if self.writable is not None:
            self.writable.unpark_all()
        if self.sender is not None:
            self.sender.cancel()

    def give_up(self, _: Any) -> trio.lowlevel.Abort:
        self.task = None
        return _ABORTED


def _nonsense(method: Method[Any, Any], error: ProtocolError) -> RemoteError:
    return RemoteError(Status.INTERNAL, f"{method.name} was answered with nonsense: {error}")


class Channel:
    """Calls in both directions over one stream. `run` must be running for anything to move.

    Args:
        stream: what carries it; the channel closes it.
        peer: who is at its other end.
        router: who serves the far side's calls.
        account: shared by all channels of the peer.
        metrics: where calls are counted.
        compress: whether to compress what shrinks.
        max_attachment_bytes: of one message, in either direction.

    Attributes:
        read_at: when anything came last; minus infinity if nothing has.
    """

    def __init__(
        self,
        stream: ByteStream,
        peer: PeerId,
        router: Router,
        *,
        account: Account | None = None,
        metrics: Metrics | None = None,
        compress: bool = False,
        max_attachment_bytes: int = MAX_ATTACHMENT_BYTES,
    ) -> None:
        self.peer = peer
        self._account = account or Account(max_bytes=max(MAX_HELD_BYTES, 2 * max_attachment_bytes))
        self._stream = stream
        self._metrics = metrics or Metrics()
        self._connection = RpcConnection(compress=compress, max_attachment_bytes=max_attachment_bytes)
        self._outbox = Outbox(stream, self._connection)
        self._server = Server(
            peer=peer,
            router=router,
            connection=self._connection,
            outbox=self._outbox,
            account=self._account,
            metrics=self._metrics,
            spawn=self._spawn,
        )
        self._ours: dict[int, _OurCall] = {}
        self._num_unhurried = 0  # of them, to whose answers nobody looks forward
        self._our_turn = trio.lowlevel.ParkingLot()  # callers, while too many calls are open
        self._buffered_bytes = 0  # of a frame that is not whole yet, as told to the account
        self.read_at = -math.inf
        self._is_burst = False  # several answers came in one piece, so several requests will follow
        self._closed_because: str | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._to_start: list[tuple[Callable[..., Awaitable[None]], tuple[Any, ...]]] = []
        self._timer: trio.lowlevel.Task | None = None  # asleep until `_timer_at`
        self._timer_at = math.inf

    @property
    def is_open(self) -> bool:
        """Whether new calls can be made."""
        return self._closed_because is None

    def is_moving(self, since: float) -> bool:
        """Whether anything came since then, or what waited then is still being taken."""
        return self.read_at > since or self._outbox.is_moving(since)

    @property
    def num_calls(self) -> int:
        """Open calls of both sides."""
        return len(self._ours) + len(self._server.calls)

    @property
    def unsent_bytes(self) -> int:
        """What waits to be written, beside what is being written."""
        return self._connection.unsent_bytes

    # --- calling ---

    def call(
        self, method: Method[Request, Answer], request: Request, *, timeout_s: float | None = None
    ) -> Coroutine[Any, Any, Answer]:
        """Call a unary method of the far side. If cancelled, the far side is told.

        Args:
            method: which.
            request: its request.
            timeout_s: how long to wait; None: as long as the method says.

        Raises:
            RemoteError: with the far side's status; DEADLINE_EXCEEDED when the time is over; UNAVAILABLE when the
                stream is gone; INTERNAL if the answer is not of the method's type.
            TooLargeError: if the request is too big.
        """
        body, attachments = encode_message(request)
        return self._call(method, body, attachments, timeout_s)

    async def call_with_stream(
        self, method: Method[Request, Answer], requests: AsyncIterator[Request], *, timeout_s: float | None = None
    ) -> Answer:
        """Call a client-streaming method; errors as `call`, and whatever ``requests`` raises."""
        return await self._call(method, b"", [], timeout_s, requests)

    async def call_for_stream(
        self,
        method: Method[Request, Answer],
        request: Request | AsyncIterator[Request],
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Answer]:
        """Call a server-streaming or a bidirectional method; errors as `call`.

        Leaving the iterator early (``aclosing`` does it at once) cancels the call.
        """
        ours = _OurCall()
        body, attachments = (b"", list[Buffer]()) if method.kind.streams_requests else encode_message(request)
        began = trio.current_time()
        if timeout_s is None:
            timeout_s = math.inf if method.timeout_s is None else method.timeout_s
        if self._is_full():
            timeout_s = await self._wait_for_room(method, timeout_s)
        call_id = self._start(ours, method, body, attachments, timeout_s, current_time())
        ours.incoming = Incoming(method.answer, self._connection, self._outbox, call_id, is_ours=True)
        if method.kind.streams_requests:
            self._send_in_background(ours, call_id, cast("AsyncIterator[Request]", request))
        status = Status.CANCELLED
        try:
            async for answer in ours.incoming:
                yield answer
            status = Status.OK
        except RemoteError as error:
            status = error.status
            raise
        except ProtocolError as error:
            if error is ours.result:
                raise  # a request could not be sent
            status = Status.INTERNAL
            raise _nonsense(method, error) from error
        finally:
            self._finish(call_id, ours)
            request_bytes = total_bytes(body, attachments) + ours.sent_bytes
            metrics = self._metrics.of_called(method.name)
            metrics.count(status, trio.current_time() - began, request_bytes, ours.incoming.num_bytes)

    async def _call(
        self,
        method: Method[Any, Answer],
        body: bytes,
        attachments: list[Buffer],
        timeout_s: float | None,
        requests: AsyncIterator[Any] | None = None,
    ) -> Answer:
        began = current_time()
        if timeout_s is None:
            timeout_s = math.inf if method.timeout_s is None else method.timeout_s
        if self._is_full() and not method.is_urgent:
            timeout_s = await self._wait_for_room(method, timeout_s)
            began = current_time()
        ours = _OurCall()
        call_id = self._start(ours, method, body, attachments, timeout_s, began)
        if requests is not None:
            self._send_in_background(ours, call_id, requests)
        status, answer_bytes = _CANCELLED, 0
        try:
            if ours.result is None:
                ours.task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(ours.give_up)
            if not isinstance(ours.result, Answered):
                raise cast("BaseException", ours.result)
            _, received, received_attachments = ours.result
            answer_bytes = total_bytes(received, received_attachments)
            try:
                answer = decode_message(method.answer, received, received_attachments)
            except ProtocolError as error:
                raise _nonsense(method, error) from error
            status = _OK
        except RemoteError as error:
            status = error.status
            raise
        finally:
            self._finish(call_id, ours)
            metrics = self._metrics.of_called(method.name)
            request_bytes = total_bytes(body, attachments) + ours.sent_bytes
            metrics.count(status, current_time() - began, request_bytes, answer_bytes)
        return answer

    def _start(
        self,
        ours: _OurCall,
        method: Method[Any, Any],
        body: bytes,
        attachments: list[Buffer],
        timeout_s: float,
        now: float,
    ) -> int:
        if self._closed_because is not None:
            raise RemoteError(Status.UNAVAILABLE, self._closed_because)
        call_id = self._connection.call(method.name, body, attachments, timeout_s=timeout_s, now=now, kind=method.kind)
        is_lone = len(self._ours) == self._num_unhurried and not self._is_burst
        self._ours[call_id] = ours
        ours.is_unhurried = method.answer_lag_s > 0
        self._num_unhurried += ours.is_unhurried
        if method.kind:
            ours.writable = trio.lowlevel.ParkingLot()
        if now + timeout_s < self._timer_at:
            self._wake_timer()
        if is_lone:
            self._outbox.flush_now()
        else:
            self._outbox.flush()
        return call_id

    def _is_full(self) -> bool:
        return len(self._ours) >= MAX_CALLS_IN_FLIGHT or self._connection.unsent_bytes > MAX_UNSENT_BYTES

    async def _wait_for_room(self, method: Method[Any, Any], timeout_s: float) -> float:
        """Wait until another call may be made; returns how much time it has left."""
        deadline = current_time() + timeout_s
        with trio.move_on_at(deadline):
            while self._is_full() and self._closed_because is None:
                await self._outbox.wait_for_room(MAX_UNSENT_BYTES)
                if len(self._ours) >= MAX_CALLS_IN_FLIGHT:
                    await self._our_turn.park()
        left_s = deadline - current_time()
        if left_s <= 0:
            raise RemoteError(Status.DEADLINE_EXCEEDED, f"{method.name} could not be sent in time")
        return left_s

    def _finish(self, call_id: int, ours: _OurCall) -> None:
        if self._ours.pop(call_id, None) is not None:
            self._num_unhurried -= ours.is_unhurried
        if self._our_turn:
            self._our_turn.unpark(count=MAX_CALLS_IN_FLIGHT - len(self._ours))
        if ours.result is None:
            self._connection.cancel(call_id)
            self._outbox.flush_soon()
        if ours.sender is not None:
            ours.sender.cancel()

    def _send_in_background(self, ours: _OurCall, call_id: int, requests: AsyncIterator[Any]) -> None:
        ours.sender = trio.CancelScope()
        self._spawn(self._send_requests, ours, call_id, requests, ours.sender)

    async def _send_requests(
        self, ours: _OurCall, call_id: int, requests: AsyncIterator[Any], scope: trio.CancelScope
    ) -> None:
        writable = cast("trio.lowlevel.ParkingLot", ours.writable)
        try:
            try:
                with scope:
                    async for request in requests:
                        ours.sent_bytes += await self._outbox.send_message(call_id, request, writable, is_ours=True)
                    self._connection.end(call_id, is_ours=True)
                    self._outbox.flush_soon()
            finally:
                close = getattr(requests, "aclose", None)
                if close is not None:
                    with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                        await close()
        except Exception as error:  # it belongs to the caller, who waits in another task
            self._give_up_sending(ours, call_id, error)
        except BaseExceptionGroup as group:  # it was cancelled, and failed besides
            failures, cancelled = group.split(Exception)
            if failures is not None:
                self._give_up_sending(ours, call_id, failures)
            if cancelled is not None:
                raise cancelled from None

    def _give_up_sending(self, ours: _OurCall, call_id: int, error: Exception) -> None:
        self._connection.cancel(call_id)
        self._outbox.flush_soon()
        ours.settle(error)

    # --- the stream ---

    async def run(self) -> None:
        """Serve the stream until it ends; returns, never raises, for whatever the far side does."""
        reason = "the connection was closed"
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._outbox.run)
                    nursery.start_soon(self._watch_deadlines)
                    for function, arguments in self._to_start:
                        nursery.start_soon(function, *arguments)
                    try:
                        await self._read_loop()
                    except StreamClosedError as error:
                        reason = str(error) or reason
                    except ProtocolError as error:
                        reason = f"protocol error: {error}"
                        log.warning("closing the stream with %s: %s", self.peer, error)
                    finally:
                        self._close(reason)
                        nursery.cancel_scope.cancel()
        finally:
            self._server.close()
            self._outbox.close()
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await self._stream.close()

    async def retire(self) -> None:
        """Ask the far side for no more calls; return when no call is open. Those on their way are still taken."""
        self._connection.drain()
        self._outbox.flush_soon()
        while not self._outbox.is_closed and (self.num_calls or not self._outbox.is_empty):  # noqa: ASYNC110  as below
            await trio.sleep(RETIRE_TICK_S)

    async def drain(self) -> None:
        """Take no new calls, and return when those of the far side are answered and written."""
        self._server.is_draining = True
        self._connection.drain()
        self._outbox.flush_soon()
        while not self._outbox.is_closed and (self._server.calls or not self._outbox.is_empty):  # noqa: ASYNC110  it changes in many places
            await trio.sleep(DRAIN_TICK_S)

    def stop(self) -> None:
        """End `run`, and with it every call."""
        self._scope.cancel()

    def _close(self, reason: str) -> None:
        self._closed_because = reason  # callers learn it now, however long a handler takes to stop
        for event in self._connection.close(reason):
            self._dispatch(event)
        for ours in list(self._ours.values()):  # whose outcome had come, in the very bytes at which this ended
            ours.settle(RemoteError(Status.UNAVAILABLE, reason))
        self._server.stop_waiting()
        self._outbox.close()
        self._our_turn.unpark_all()

    def _spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        if self._nursery is None:
            self._to_start.append((function, arguments))
        else:
            self._nursery.start_soon(function, *arguments)

    async def _read_loop(self) -> None:
        try:
            while True:
                self._receive(await self._stream.read())
        finally:
            self._account.budget.buffer(-self._buffered_bytes)

    def _receive(self, data: bytes) -> None:
        """Handle what came; nothing of it is kept when this returns, however long nothing follows."""
        connection = self._connection
        self.read_at = now = current_time()
        before = connection.unsent_bytes  # what waits already has its own time
        events = connection.receive_data(data, now)
        if connection.buffered_bytes != self._buffered_bytes:
            change = connection.buffered_bytes - self._buffered_bytes
            self._buffered_bytes += change
            excess = self._account.budget.buffer(change)
            if excess is not None:
                raise LimitError(excess)
        self._is_burst = len(events) > 1 and len(events) - sum(map(self._is_unhurried, events)) > 1
        for event in events:
            self._dispatch(event)
        if connection.unsent_bytes > before:
            self._outbox.flush_soon()

    def _is_unhurried(self, event: Event) -> bool:
        ours = self._ours.get(event.call_id) if isinstance(event, Answered) else None
        return ours is not None and ours.is_unhurried

    async def _watch_deadlines(self) -> None:
        while True:
            self._timer_at = self._connection.next_deadline()
            with trio.move_on_at(self._timer_at):
                self._timer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_timer)
            before = self._connection.unsent_bytes
            for event in self._connection.expire(trio.current_time()):
                self._dispatch(event)
            if self._connection.unsent_bytes > before:
                self._outbox.flush_soon()

    def _wake_timer(self) -> None:
        """A call has less time than the timer sleeps for."""
        if self._timer is not None:
            timer, self._timer = self._timer, None
            trio.lowlevel.reschedule(timer)

    def _stop_timer(self, _: Any) -> trio.lowlevel.Abort:
        self._timer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, Answered):
            self._settle(event.call_id, event)
        elif isinstance(event, Called):
            if event.deadline < self._timer_at:
                self._wake_timer()
            self._server.admit(event)
        elif isinstance(event, Failed):
            self._settle(event.call_id, event.error)
        elif isinstance(event, Cancelled):
            self._server.withdraw(event.call_id)
        elif isinstance(event, Draining):
            self._closed_because = self._closed_because or "the node is stopping"
        else:
            self._dispatch_stream(event)

    def _dispatch_stream(self, event: Message | Ended | Writable) -> None:
        calls = self._ours if event.is_ours else self._server.calls
        open_call = calls.get(event.call_id)
        match event:
            case _ if open_call is None:
                return
            case Writable():
                if open_call.writable is not None:
                    open_call.writable.unpark_all()
            case Message():
                if open_call.incoming is not None:
                    open_call.incoming.put(event)
            case Ended(is_ours=True):
                self._settle(event.call_id, Answered(event.call_id, b"", ()))
            case Ended():
                if open_call.incoming is not None:
                    open_call.incoming.end()

    def _settle(self, call_id: int, result: Answered | BaseException) -> None:
        ours = self._ours.get(call_id)
        if ours is not None:
            ours.settle(result)


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

    async def write(self, data: Buffer) -> None:
        """Write all, or `StreamClosedError`."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosedError("the socket broke") from error

    def try_write(self, data: Buffer) -> bool:
        """Never at once."""
        return False

    async def close(self) -> None:
        """Close the socket."""
        await self._stream.aclose()
