"""Serving the calls of a peer: who is let in, in what memory, and by which task.

A call enters its peer's `Account`, waits there until the memory for its answer is free, and is run by a worker. A
worker takes call after call as long as handlers do not wait, so a short handler costs no task of its own; as soon
as one waits, another worker goes on with the rest.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext
from contextvars import copy_context
from typing import Any, Final

import trio

from shoal.node.metrics import Metrics
from shoal.node.wire.outbox import ENOUGH_BYTES, Outbox, total_bytes
from shoal.protocol.budget import Budget, Purse
from shoal.protocol.codec import decode_message, encode_message
from shoal.protocol.errors import (
    LimitError,
    ProtocolError,
    RefusedError,
    RemoteError,
    ResourceError,
    ShoalError,
    Status,
    TooLargeError,
    UsageError,
    unwrap,
)
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_HELD_BYTES, MAX_STREAM_HELD_BYTES
from shoal.protocol.rpc import MESSAGE_OVERHEAD_BYTES, Called, Message, RpcConnection
from shoal.protocol.services import Call, CallKind, Method, Service, set_current_call, unimplemented

log = logging.getLogger(__name__)

MAX_IDLE_WORKERS: Final = 4
HOG_S: Final = 0.002
"""Other tasks run after this time, whether the handlers wait or not."""

_OK, _CANCELLED = Status.OK, Status.CANCELLED  # enum members are looked up slowly (CPython 3.11), and these once a call


class Router:
    """Which service answers which method."""

    def __init__(self, *services: Service) -> None:
        self._routes: dict[str, tuple[Method[Any, Any], Callable[[Any], Any]]] = {}
        for service in services:
            self.add(service)

    def add(self, service: Service) -> None:
        """Let a service answer its methods."""
        for attribute, method in service.methods.items():
            self._routes[method.name] = (method, getattr(service, attribute))

    def find(self, name: str) -> tuple[Method[Any, Any], Callable[[Any], Any]] | None:
        """The method of this name and what to call; None if nobody serves it."""
        return self._routes.get(name)


class Incoming:
    """The far side's messages in one call, as the iterator that a handler or a caller reads.

    Reading a message lets the far side send as much again.
    """

    def __init__(
        self, kind: type[Any], connection: RpcConnection, outbox: Outbox, call_id: int, *, is_ours: bool
    ) -> None:
        self._kind = kind
        self._connection = connection
        self._outbox = outbox
        self._call_id = call_id
        self._is_ours = is_ours
        self.num_bytes = 0  # of all messages that were read
        self._messages: deque[Message] = deque()
        self._end: BaseException | None = None
        self._arrived = trio.lowlevel.ParkingLot()

    def put(self, message: Message) -> None:
        """The next message is here."""
        self._messages.append(message)
        self._arrived.unpark_all()

    def end(self, error: BaseException | None = None) -> None:
        """No more will come; after those that are here the reader gets the error, if there is one."""
        if self._end is None:
            self._end = error or StopAsyncIteration()
            self._arrived.unpark_all()

    def __aiter__(self) -> Incoming:
        """Itself."""
        return self

    async def __anext__(self) -> Any:
        """The next message.

        Raises:
            ProtocolError: if it is not of the method's type.
        """
        await trio.lowlevel.checkpoint()
        while not self._messages:
            if isinstance(self._end, StopAsyncIteration):
                raise StopAsyncIteration  # a fresh one: its traceback leads to the reader, and so to the last message
            if self._end is not None:
                raise self._end
            await self._arrived.park()
        message = self._messages.popleft()
        self.num_bytes += message.num_bytes - MESSAGE_OVERHEAD_BYTES
        self._connection.consumed(self._call_id, message.num_bytes, is_ours=self._is_ours)
        if self._connection.unsent_bytes:
            self._outbox.flush_soon()
        return decode_message(self._kind, message.body, message.attachments)


_UNARY = CallKind.UNARY
_NOBODY = trio.lowlevel.ParkingLot()  # who waits to send in a unary call


class Serving:
    """A call of the far side, from its arrival until its answer is written."""

    __slots__ = (
        "call",
        "function",
        "held_bytes",
        "incoming",
        "is_cancelled",
        "method",
        "num_streams",
        "since",
        "worker",
        "writable",
    )

    def __init__(self, call: Called, method: Method[Any, Any], function: Callable[[Any], Any]) -> None:
        self.call = call
        self.method = method
        self.function = function
        self.num_streams = method.kind.num_streams if method.kind else 0
        self.held_bytes = call.num_bytes + (MAX_STREAM_HELD_BYTES if method.kind.streams_requests else 0)
        self.is_cancelled = False
        self.incoming: Incoming | None = None
        self.since = trio.current_time()
        self.worker: _Worker | None = None
        self.writable = _NOBODY if method.kind is _UNARY else trio.lowlevel.ParkingLot()


class Account:
    """What one peer holds of this node over all of its streams, and which of its calls wait for room in that."""

    def __init__(self, *, max_bytes: int = MAX_HELD_BYTES, purse: Purse | None = None) -> None:
        self.budget = Budget(max_bytes=max_bytes, purse=purse)
        self._waiting: deque[tuple[Server, Serving]] = deque()

    def reserve(self, server: Server, serving: Serving) -> None:
        """Set the memory for an answer aside and let the call start, now or in its turn."""
        if self._waiting or not self.budget.reserve(serving.method.max_answer_bytes):
            self._waiting.append((server, serving))
        else:
            server.start(serving)

    def leave(self, serving: Serving) -> None:
        """A call that was started is over; give back what it held, and let start who waited for that."""
        self.budget.leave(serving.held_bytes, serving.num_streams)
        if self._waiting:
            self._start_waiting()

    def forget(self, server: Server) -> None:
        """A stream is gone: its calls do not wait any more."""
        gone = [serving for waiting, serving in self._waiting if waiting is server]
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not server)
        for serving in gone:
            self.budget.leave(serving.held_bytes, serving.num_streams, was_running=False)
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and self.budget.reserve(self._waiting[0][1].method.max_answer_bytes):
            server, serving = self._waiting.popleft()
            server.start(serving)


class _Worker:
    """A task that runs handlers.

    Attributes:
        scope: around the handler that it runs now.
        task: it.
        is_stained: whether a handler left context variables behind, which no other call may see.
    """

    __slots__ = ("is_stained", "scope", "task")

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.scope = trio.CancelScope()
        self.task = task
        self.is_stained = False


class Server:
    """The far side's calls on one stream.

    Args:
        peer: who calls.
        router: who serves.
        connection: the core of the stream.
        outbox: its writing side.
        account: the peer's.
        metrics: where calls are counted.
        spawn: starts a task that lives as long as the stream.
    """

    def __init__(
        self,
        *,
        peer: PeerId,
        router: Router,
        connection: RpcConnection,
        outbox: Outbox,
        account: Account,
        metrics: Metrics,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self.calls: dict[int, Serving] = {}
        self.is_draining = False
        self._peer = peer
        self._router = router
        self._connection = connection
        self._outbox = outbox
        self._account = account
        self._metrics = metrics
        self._spawn = spawn
        self._context = copy_context()  # of every worker, whoever's task starts it
        self._ready: deque[Serving] = deque()
        self._idle_workers: list[_Worker] = []
        self._is_worker_coming = False

    def admit(self, call: Called) -> None:
        """Let a call in, or let it fail.

        Raises:
            ProtocolError: if the far side calls and calls and does not read that it is refused.
        """
        found = self._router.find(call.method)
        if found is None:
            error = unimplemented(call.method)
            self._connection.refuse(call.call_id, error.status, error.message)
            return
        method, function = found
        if call.kind is not method.kind:
            self._connection.refuse(call.call_id, Status.INVALID_ARGUMENT, f"{method.name} is {method.kind.name}")
            return
        if self.is_draining:
            self._connection.refuse(call.call_id, Status.UNAVAILABLE, "the node is stopping")
            return
        budget = self._account.budget
        refusal = None
        if method.max_calls_per_s is not None:
            refusal = budget.spend(method.name, method.max_calls_per_s, trio.current_time())
        serving = Serving(call, method, function)
        refusal = refusal or budget.enter(serving.held_bytes, serving.num_streams)
        if refusal is not None:
            self._connection.refuse(call.call_id, Status.RESOURCE_EXHAUSTED, refusal)
            return
        self.calls[call.call_id] = serving
        if method.kind and method.kind.streams_requests:
            serving.incoming = Incoming(method.request, self._connection, self._outbox, call.call_id, is_ours=False)
        self._account.reserve(self, serving)

    def start(self, serving: Serving) -> None:
        """Run a call; the memory for its answer has been set aside."""
        serving.held_bytes += serving.method.max_answer_bytes
        self._ready.append(serving)
        self._call_worker()

    def withdraw(self, call_id: int) -> None:
        """Nobody waits for this call any more."""
        serving = self.calls.get(call_id)
        if serving is not None:
            serving.is_cancelled = True
            serving.writable.unpark_all()
            if serving.worker is not None:
                serving.worker.scope.cancel()

    def stop_waiting(self) -> None:
        """The stream is gone: no call is started any more."""
        self._account.forget(self)

    def close(self) -> None:
        """The workers are gone too: forget all calls."""
        for serving in self._ready:
            self._account.leave(serving)
        self._ready.clear()
        self.calls.clear()

    def _call_worker(self) -> None:
        """See to it that a worker comes, if none is on its way."""
        if self._is_worker_coming:
            return
        self._is_worker_coming = True
        if self._idle_workers:
            trio.lowlevel.reschedule(self._idle_workers.pop().task)
        else:
            self._context.run(self._spawn, self._work)

    async def _work(self) -> None:
        worker = _Worker(trio.lowlevel.current_task())
        while True:
            with worker.scope:
                await self._work_until_cancelled(worker)
            if worker.is_stained or not worker.scope.cancelled_caught:
                return
            worker.scope = trio.CancelScope()  # only a call was cancelled

    async def _work_until_cancelled(self, worker: _Worker) -> None:
        while True:
            self._is_worker_coming = False
            since = trio.current_time()
            is_hurried, lag_s = not self._ready, 0.0
            while self._ready:
                serving = self._ready.popleft()
                if self._ready:
                    self._call_worker()  # it goes on with the others if this handler waits
                serving.worker = worker
                try:
                    lag_s = await self._serve(serving, worker)
                    is_hurried = is_hurried or not lag_s
                finally:
                    serving.worker = None
                    del serving  # else an idle worker would keep a request that is on no account any more
                if self._connection.unsent_bytes >= ENOUGH_BYTES:
                    self._outbox.flush_now()
                if worker.scope.cancel_called:
                    self._outbox.flush_soon()
                    await trio.lowlevel.checkpoint()
                if worker.is_stained or trio.current_time() - since > HOG_S:
                    break  # the next worker, which is called for, goes on after all tasks that are ready now
            if self._ready:
                self._call_worker()
            if is_hurried or self.is_draining:
                self._outbox.flush_now()
            else:
                self._outbox.flush_within(lag_s)
            if worker.is_stained or len(self._idle_workers) >= MAX_IDLE_WORKERS:
                return
            self._idle_workers.append(worker)

            def stop(_: Any) -> trio.lowlevel.Abort:
                self._idle_workers.remove(worker)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(stop)

    async def _serve(self, serving: Serving, worker: _Worker) -> float:
        """Run a call and answer it; gives for how long what is to be written of it may wait."""
        call, method = serving.call, serving.method
        status, answer_bytes = _CANCELLED, 0
        set_current_call(Call(self._peer, method.name, call.deadline))
        context = copy_context()
        try:
            if not serving.is_cancelled:
                answer_bytes = await self._run_handler(serving)
                status = _OK
        except Exception as error:  # whatever it is, it is this one call that failed
            first = unwrap(error) if isinstance(error, BaseExceptionGroup) else error
            status, message = _failure(first, method.name)
            self._connection.fail(call.call_id, status, message)
        except BaseExceptionGroup as group:  # it was cancelled, and failed besides
            failures, cancelled = group.split(Exception)
            log.exception("the handler of %s failed when it was cancelled", method.name, exc_info=failures)
            raise cancelled or group from None
        finally:
            worker.is_stained = copy_context() != context  # cheap: both share what was not changed
            if status is _CANCELLED:
                self._connection.fail(call.call_id, status, "the call was withdrawn")
            self.calls.pop(call.call_id, None)
            self._outbox.when_written(self._account.leave, serving)
            seconds = trio.current_time() - serving.since
            request_bytes = call.num_bytes + (serving.incoming.num_bytes if serving.incoming is not None else 0)
            self._metrics.of_served(method.name).count(status, seconds, request_bytes, answer_bytes)
        return method.answer_lag_s if status is _OK else 0.0

    async def _run_handler(self, serving: Serving) -> int:
        call, method = serving.call, serving.method
        request = serving.incoming or decode_message(method.request, call.body, call.attachments)
        if method.kind and method.kind.streams_answers:
            num_bytes = 0
            answers = serving.function(request)
            async with aclosing(answers) if hasattr(answers, "aclose") else nullcontext():
                async for answer in answers:
                    num_bytes += await self._outbox.send_message(call.call_id, answer, serving.writable, is_ours=False)
            self._connection.end(call.call_id, is_ours=False)
            return num_bytes
        body, attachments = encode_message(await serving.function(request))
        num_bytes = total_bytes(body, attachments)
        if num_bytes > method.max_answer_bytes:
            limit = f"the {method.max_answer_bytes} of {method.name}"
            raise RemoteError(Status.INTERNAL, f"an answer of {num_bytes} bytes exceeds {limit}")
        self._connection.answer(call.call_id, body, attachments)
        return num_bytes


def _failure(error: BaseException, method: str) -> tuple[Status, str]:
    """What the far side is told of an exception of a handler."""
    match error:
        case RemoteError():
            return error.status, error.message
        case LimitError() | TooLargeError() | ResourceError():
            return Status.RESOURCE_EXHAUSTED, str(error)
        case RefusedError():
            return Status.PERMISSION_DENIED, str(error)
        case ProtocolError() | UsageError():
            return Status.INVALID_ARGUMENT, str(error)
        case ShoalError():
            return Status.INTERNAL, str(error)
    # One peer's call must not take the node down; the details stay here, the peer learns that it failed.
    log.error("the handler of %s failed", method, exc_info=error)
    return Status.INTERNAL, "the handler failed; see the log of that node"
