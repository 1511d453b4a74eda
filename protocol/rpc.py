"""The RPC core: both sides of the calls that share one stream, as a state machine on bytes.

First form: unary calls, pipelined and multiplexed by call id. A call is a REQUEST that is answered by one ANSWER
or ERROR, in any order; CANCEL withdraws it. The remaining time travels with the request, so that the far side
stops when nobody waits any more. Each side of a stream may call the other.

    connection.call(...)          →  bytes appear in data_to_send()
    connection.receive_data(...)  →  Called / Answered / Failed / Cancelled
    connection.expire(now)        →  Failed(DEADLINE_EXCEEDED) for what nobody answered in time
    connection.close(...)         →  Failed(UNAVAILABLE) for all that is open
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, RemoteError, Status
from shoal.protocol.frames import Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.limits import MAX_CALLS_IN_FLIGHT, MAX_ERROR_CHARS

Attachments = tuple[bytes | memoryview, ...]


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """What stands before a request's attachments.

    Attributes:
        method: ``service.method``.
        timeout_ms: how long the caller will still wait.
        body: the request message, as plain data.
    """

    method: str
    timeout_ms: int
    body: Any = None


@dataclass(frozen=True, slots=True)
class AnswerHeader:
    """What stands before an answer's attachments."""

    body: Any = None


@dataclass(frozen=True, slots=True)
class ErrorHeader:
    """Why a call failed."""

    status: Status
    message: str


@dataclass(frozen=True, slots=True)
class Called:
    """The far side calls a method of ours and waits until ``deadline`` (by the clock given as ``now``)."""

    call_id: int
    method: str
    body: Any
    attachments: Attachments
    deadline: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The far side does not want the answer any more."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A call of ours succeeded."""

    call_id: int
    body: Any
    attachments: Attachments


@dataclass(frozen=True, slots=True)
class Failed:
    """A call of ours failed."""

    call_id: int
    error: RemoteError


Event = Called | Cancelled | Answered | Failed


class RpcConnection:
    """Both sides' calls on one stream."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._outgoing: list[bytes | memoryview] = []
        self._next_call_id = 1
        self._deadlines: dict[int, float] = {}  # ours, by call id
        self._serving: dict[int, bool] = {}  # theirs, by call id, until we are done: whether the answer is still wanted
        self._untold: list[Event] = []

    @property
    def num_open_calls(self) -> int:
        """Calls of ours that wait for their answer."""
        return len(self._deadlines)

    def call(
        self, method: str, body: object, attachments: Sequence[bytes | memoryview], timeout_s: float, now: float
    ) -> int:
        """Start a call; returns its id, by which the outcome is told.

        Raises:
            LimitError: if the request is too big.
        """
        call_id = self._next_call_id
        header = encode(RequestHeader(method, max(1, int(timeout_s * 1000)), body))
        self._send(Frame(FrameType.REQUEST, call_id, header, tuple(attachments)))
        self._next_call_id = call_id % (2**32 - 1) + 1
        self._deadlines[call_id] = now + timeout_s
        return call_id

    def cancel(self, call_id: int) -> None:
        """Withdraw a call; its outcome will not be told."""
        if self._deadlines.pop(call_id, None) is not None:
            self._send(Frame(FrameType.CANCEL, call_id))

    def answer(self, call_id: int, body: object, attachments: Sequence[bytes | memoryview] = ()) -> None:
        """Answer a call of the far side; nothing is sent if it was withdrawn.

        Every call has to be answered or failed, also a withdrawn one: until then it counts as one in flight.

        Raises:
            LimitError: if the answer is too big; the call stays open, to be failed.
        """
        if self._serving.get(call_id):
            self._send(Frame(FrameType.ANSWER, call_id, encode(AnswerHeader(body)), tuple(attachments)))
        self._serving.pop(call_id, None)

    def fail(self, call_id: int, status: Status, message: str) -> None:
        """Let a call of the far side fail; nothing is sent if it was withdrawn."""
        if self._serving.pop(call_id, False):
            self._send(Frame(FrameType.ERROR, call_id, encode(ErrorHeader(status, message[:MAX_ERROR_CHARS]))))

    def receive_data(self, data: bytes | memoryview, now: float) -> list[Event]:
        """Take what arrived.

        Raises:
            ProtocolError: if the far side breaks the protocol; close the stream. `close` tells what came before.
        """
        for frame in self._decoder.receive_data(data):
            event = self._handle(frame, now)
            if event is not None:
                self._untold.append(event)
        events, self._untold = self._untold, []
        return events

    def data_to_send(self) -> list[bytes | memoryview]:
        """All that waits to be written, in order; it is handed over, not kept."""
        pieces, self._outgoing = self._outgoing, []
        return pieces

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        return min(self._deadlines.values(), default=None)

    def expire(self, now: float) -> list[Event]:
        """Give up calls of ours whose deadline has passed, and tell the far side."""
        late = [call_id for call_id, deadline in self._deadlines.items() if deadline <= now]
        for call_id in late:
            self.cancel(call_id)
        return [Failed(call_id, RemoteError(Status.DEADLINE_EXCEEDED, "no answer in time")) for call_id in late]

    def close(self, reason: str) -> list[Event]:
        """The stream is gone: everything open fails, in both directions."""
        events: list[Event] = [event for event in self._untold if isinstance(event, Answered | Failed)]
        events += [Failed(call_id, RemoteError(Status.UNAVAILABLE, reason)) for call_id in self._deadlines]
        events += [Cancelled(call_id) for call_id, is_wanted in self._serving.items() if is_wanted]
        self._untold.clear()
        self._deadlines.clear()
        self._serving.clear()
        self._outgoing.clear()
        return events

    def _send(self, frame: Frame) -> None:
        self._outgoing += encode_frame(frame)

    def _handle(self, frame: Frame, now: float) -> Event | None:
        match frame.type:
            case FrameType.REQUEST:
                return self._handle_request(frame, now)
            case FrameType.CANCEL:
                if not self._serving.get(frame.call_id):
                    return None  # it crossed our answer
                self._serving[frame.call_id] = False
                return Cancelled(frame.call_id)
            case FrameType.ANSWER:
                header = decode(AnswerHeader, frame.header)
                if self._deadlines.pop(frame.call_id, None) is None:
                    return None  # it crossed our cancel
                return Answered(frame.call_id, header.body, frame.attachments)
            case FrameType.ERROR:
                error = decode(ErrorHeader, frame.header)
                if self._deadlines.pop(frame.call_id, None) is None:
                    return None
                return Failed(frame.call_id, RemoteError(error.status, error.message[:MAX_ERROR_CHARS]))

    def _handle_request(self, frame: Frame, now: float) -> Event | None:
        if frame.call_id in self._serving:
            raise ProtocolError(f"call id {frame.call_id} is already in use")
        header = decode(RequestHeader, frame.header)
        self._serving[frame.call_id] = True
        if len(self._serving) > MAX_CALLS_IN_FLIGHT:
            self.fail(frame.call_id, Status.RESOURCE_EXHAUSTED, f"more than {MAX_CALLS_IN_FLIGHT} calls in flight")
            return None
        deadline = now + header.timeout_ms / 1000
        return Called(frame.call_id, header.method, header.body, frame.attachments, deadline)
