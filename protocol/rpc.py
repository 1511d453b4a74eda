"""The RPC core: both sides of the calls that share one stream, as a state machine on bytes.

A call is a REQUEST, multiplexed by call id, that ends in one ANSWER or ERROR, in any order; CANCEL withdraws it. The
remaining time travels with the request, so that the far side stops when nobody waits any more. Where a side of the
call is a stream, its messages are MESSAGE frames and END is the last of them; each direction has a credit in bytes,
which CREDIT renews as the reader consumes, so a slow reader stops the sender after `limits.STREAM_WINDOW_BYTES`.
DRAIN says that its sender takes no new calls on this stream. Each side of a stream may call the other.

    connection.call(...)          →  bytes appear in data_to_send()
    connection.receive_data(...)  →  Called / Answered / Failed / Cancelled / Message / Ended / Writable / Draining
    connection.expire(now)        →  Failed(DEADLINE_EXCEEDED) and Cancelled for what was not answered in time
    connection.close(...)         →  Failed(UNAVAILABLE) for all that is open

Bodies are MessagePack that the core does not look into (`codec.encode_message`, `codec.decode_message`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shoal.protocol.codec import Buffer, decode, encode, pack, unpack
from shoal.protocol.errors import LimitError, ProtocolError, RemoteError, Status, TooLargeError
from shoal.protocol.frames import FROM_CALLER, Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.limits import (
    MAX_ATTACHMENT_BYTES,
    MAX_ERROR_CHARS,
    MAX_MESSAGE_BYTES,
    MAX_REFUSED_BYTES,
    STREAM_WINDOW_BYTES,
)
from shoal.protocol.services import CallKind

Attachments = Sequence[Buffer]

MESSAGE_OVERHEAD_BYTES = 64
"""What a message costs beside its bytes, so that empty ones are not free."""

# Enum members are looked up slowly (CPython 3.11), and these once a call.
_REQUEST, _ANSWER, _ERROR, _CANCEL = FrameType.REQUEST, FrameType.ANSWER, FrameType.ERROR, FrameType.CANCEL
_UNARY = CallKind.UNARY
_KINDS = {int(kind): kind for kind in CallKind}


def request_header(method: str, timeout_ms: int, body: bytes = b"", kind: int = 0) -> bytes:
    """What stands before a request's attachments.

    Written and read by hand, not by the codec, because every call does it.

    Args:
        method: ``service.method``.
        timeout_ms: how long the caller will still wait; 0: for ever.
        body: the request message in MessagePack; empty if the requests come as a stream.
        kind: a `CallKind`: which sides are streams.
    """
    return pack({"body": body, "kind": kind, "method": method, "timeout_ms": timeout_ms})


def read_request_header(header: Buffer) -> tuple[str, int, bytes, CallKind]:
    """Method, timeout in milliseconds, body and kind.

    Raises:
        ProtocolError: if it is not such a header.
    """
    fields = unpack(header, "request header")
    if type(fields) is dict:
        method, timeout_ms, body = fields.get("method"), fields.get("timeout_ms"), fields.get("body", b"")
        kind = _KINDS.get(fields.get("kind", 0)) if type(fields.get("kind", 0)) is int else None
        if (
            type(method) is str
            and type(timeout_ms) is int
            and timeout_ms >= 0
            and type(body) is bytes
            and kind is not None
        ):
            return method, timeout_ms, body, kind
    raise ProtocolError("this is not a request header")


@dataclass(frozen=True, slots=True)
class ErrorHeader:
    """Why a call failed."""

    status: Status
    message: str


@dataclass(frozen=True, slots=True)
class CreditHeader:
    """How many more bytes of messages may come."""

    num_bytes: int


class Called(NamedTuple):
    """The far side calls a method of ours and waits until ``deadline`` (by the clock given as ``now``).

    Has to be answered, failed or ended, also if it is withdrawn.
    """

    call_id: int
    method: str
    kind: CallKind
    body: Buffer
    attachments: Attachments
    deadline: float
    num_bytes: int


class Cancelled(NamedTuple):
    """The far side does not want the answer any more, or has waited for it long enough."""

    call_id: int


class Answered(NamedTuple):
    """A call of ours succeeded."""

    call_id: int
    body: Buffer
    attachments: Attachments


class Failed(NamedTuple):
    """A call of ours failed."""

    call_id: int
    error: RemoteError


class Message(NamedTuple):
    """The next message of a stream; once it is used, say so with `RpcConnection.consumed`."""

    call_id: int
    is_ours: bool
    body: Buffer
    attachments: Attachments
    num_bytes: int


class Ended(NamedTuple):
    """The far side's stream of messages is complete; if the call is ours, it has succeeded."""

    call_id: int
    is_ours: bool


class Writable(NamedTuple):
    """Messages may be sent again."""

    call_id: int
    is_ours: bool


class Draining(NamedTuple):
    """The far side takes no new calls on this stream; those under way go on."""


Event = Called | Cancelled | Answered | Failed | Message | Ended | Writable | Draining


class _Call:
    """One open call, of either side."""

    __slots__ = ("deadline", "is_wanted")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.is_wanted = True  # theirs: whether an answer will be read


class _StreamCall(_Call):
    """One of which a side is a stream."""

    __slots__ = ("credit", "may_receive", "may_send", "owed", "window")

    def __init__(self, deadline: float, kind: CallKind, *, is_ours: bool) -> None:
        super().__init__(deadline)
        self.credit = STREAM_WINDOW_BYTES  # that we may still send
        self.window = STREAM_WINDOW_BYTES  # that they may still send
        self.owed = 0  # consumed, not yet granted anew
        # Whether a side is a stream that has not ended.
        self.may_send = kind.streams_requests if is_ours else kind.streams_answers
        self.may_receive = kind.streams_answers if is_ours else kind.streams_requests


class RpcConnection:
    """Both sides' calls on one stream.

    Args:
        compress: whether to compress what shrinks.
        max_attachment_bytes: of one message, in either direction.
    """

    def __init__(self, *, compress: bool = False, max_attachment_bytes: int = MAX_ATTACHMENT_BYTES) -> None:
        self._compress = compress
        self._max_attachment_bytes = max_attachment_bytes
        self._decoder = FrameDecoder(max_attachment_bytes=max_attachment_bytes)
        self._outgoing: list[Buffer] = []
        self._refused_bytes = 0
        self._next_call_id = 1
        self._ours: dict[int, _Call] = {}
        self._theirs: dict[int, _Call] = {}  # until we are done with them
        self._untold: list[Event] = []
        self.unsent_bytes = 0
        """What waits in `data_to_send`."""

    @property
    def num_open_calls(self) -> int:
        """Calls of ours that wait for their outcome."""
        return len(self._ours)

    @property
    def buffered_bytes(self) -> int:
        """What is here of a frame that is not whole yet."""
        return self._decoder.buffered_bytes

    # --- our calls ---

    def call(
        self,
        method: str,
        body: bytes,
        attachments: Attachments = (),
        *,
        timeout_s: float,
        now: float,
        kind: CallKind = _UNARY,
    ) -> int:
        """Start a call; returns its id, by which the outcome is told. An infinite ``timeout_s`` waits for ever.

        Raises:
            TooLargeError: if the request is too big.
        """
        call_id = self._next_call_id
        while call_id in self._ours:  # after 2**32 calls, an old one may still be open
            call_id = call_id % (2**32 - 1) + 1
        timeout_ms = 0 if timeout_s == math.inf else max(1, int(timeout_s * 1000))
        header = request_header(method, timeout_ms, body, int(kind))
        self._send(_REQUEST, call_id, header, tuple(attachments))
        self._next_call_id = call_id % (2**32 - 1) + 1
        self._ours[call_id] = (
            _Call(now + timeout_s) if kind is _UNARY else _StreamCall(now + timeout_s, kind, is_ours=True)
        )
        return call_id

    def cancel(self, call_id: int) -> None:
        """Withdraw a call; its outcome will not be told."""
        if self._ours.pop(call_id, None) is not None:
            self._send(_CANCEL, call_id)

    # --- their calls ---

    def answer(self, call_id: int, body: bytes, attachments: Attachments = ()) -> int:
        """Answer a call of the far side; nothing is sent if it was withdrawn. Returns the bytes to be written.

        Raises:
            TooLargeError: if the answer is too big; the call stays open, to be failed.
        """
        call = self._theirs.get(call_id)
        num_bytes = 0
        if call is not None and call.is_wanted:
            num_bytes = self._send(_ANSWER, call_id, body, tuple(attachments))
        self._theirs.pop(call_id, None)
        return num_bytes

    def fail(self, call_id: int, status: Status, message: str) -> None:
        """Let a call of the far side fail; nothing is sent if it was withdrawn."""
        call = self._theirs.pop(call_id, None)
        if call is not None and call.is_wanted:
            text = message[:MAX_ERROR_CHARS].encode(errors="replace").decode()  # names of files need not be Unicode
            self._send(_ERROR, call_id, encode(ErrorHeader(status, text)))

    def refuse(self, call_id: int, status: Status, message: str) -> None:
        """Let a call fail that was not let in, and so is counted nowhere else.

        Raises:
            ProtocolError: if the far side lets more than `limits.MAX_REFUSED_BYTES` of refusals gather, unread.
        """
        before = self.unsent_bytes
        self.fail(call_id, status, message)
        self._refused_bytes += self.unsent_bytes - before
        if self._refused_bytes > MAX_REFUSED_BYTES:
            raise ProtocolError("calls are made without end and their refusals not read")

    # --- streams of messages, in calls of either side ---

    def is_stopped(self, call_id: int, *, is_ours: bool) -> bool:
        """Whether the next message has to wait for its reader; `Writable` tells when it need not any more."""
        call = self._open_stream(call_id, is_ours=is_ours)
        return call is not None and call.credit <= 0

    def send_message(self, call_id: int, body: bytes, attachments: Attachments = (), *, is_ours: bool) -> None:
        """Send the next message of our side's stream; without effect if the call is over.

        Raises:
            TooLargeError: if the message is too big.
        """
        call = self._open_stream(call_id, is_ours=is_ours)
        if call is None:
            return
        if not call.may_send or call.credit <= 0:
            raise ValueError("there is no credit for a message; wait for Writable")
        cost = _message_cost(body, attachments)
        if cost > MAX_MESSAGE_BYTES:
            raise TooLargeError(f"a message of {cost} bytes exceeds the limit of {MAX_MESSAGE_BYTES}; send it in bulk")
        self._send(FrameType.MESSAGE, call_id, body, tuple(attachments), FROM_CALLER if is_ours else 0)
        call.credit -= cost

    def end(self, call_id: int, *, is_ours: bool) -> None:
        """Our side's stream is complete; if the call is theirs, it has succeeded and is over."""
        call = self._open_stream(call_id, is_ours=is_ours)
        if call is not None and call.may_send:
            call.may_send = False
            self._send(FrameType.END, call_id, flags=FROM_CALLER if is_ours else 0)
        if not is_ours:
            self._theirs.pop(call_id, None)

    def consumed(self, call_id: int, num_bytes: int, *, is_ours: bool) -> None:
        """A `Message` was used up: let as much follow."""
        call = self._open_stream(call_id, is_ours=is_ours)
        if call is None or not call.may_receive:
            return
        call.owed += num_bytes
        if call.owed >= STREAM_WINDOW_BYTES // 4:
            flags = FROM_CALLER if is_ours else 0
            self._send(FrameType.CREDIT, call_id, encode(CreditHeader(call.owed)), flags=flags)
            call.window += call.owed
            call.owed = 0

    def _open_stream(self, call_id: int, *, is_ours: bool) -> _StreamCall | None:
        """The call of this id if a side of it is a stream and it is still wanted."""
        call = (self._ours if is_ours else self._theirs).get(call_id)
        return call if isinstance(call, _StreamCall) and call.is_wanted else None

    # --- the stream ---

    def drain(self) -> None:
        """Tell the far side that no new calls will be taken here."""
        self._send(FrameType.DRAIN, 0)

    def receive_data(self, data: Buffer | bytearray, now: float) -> list[Event]:
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

    def data_to_send(self) -> list[Buffer]:
        """All that waits to be written, in order; it is handed over, not kept."""
        pieces, self._outgoing = self._outgoing, []
        self.unsent_bytes = 0
        self._refused_bytes = 0
        return pieces

    def put_back(self, data: Buffer) -> None:
        """What was handed over could not be written yet."""
        self._outgoing.insert(0, data)
        self.unsent_bytes += len(data)

    def next_deadline(self) -> float:
        """When `expire` has something to do next; infinite if never."""
        ours = min((call.deadline for call in self._ours.values()), default=math.inf)
        return min(ours, min((call.deadline for call in self._theirs.values() if call.is_wanted), default=math.inf))

    def expire(self, now: float) -> list[Event]:
        """Give up the calls of both sides whose deadline has passed, and tell the far side."""
        events: list[Event] = []
        for call_id in [call_id for call_id, call in self._ours.items() if call.deadline <= now]:
            self.cancel(call_id)
            events.append(Failed(call_id, RemoteError(Status.DEADLINE_EXCEEDED, "no answer in time")))
        for call_id, call in self._theirs.items():
            if call.is_wanted and call.deadline <= now:
                header = encode(ErrorHeader(Status.DEADLINE_EXCEEDED, "the deadline passed at the far side"))
                self._send(_ERROR, call_id, header)
                call.is_wanted = False
                events.append(Cancelled(call_id))
        return events

    def close(self, reason: str) -> list[Event]:
        """The stream is gone: everything open fails, in both directions."""
        events: list[Event] = [
            event
            for event in self._untold
            if isinstance(event, Answered | Failed | Cancelled)
            or (isinstance(event, Message | Ended) and event.is_ours)
        ]
        events += [Failed(call_id, RemoteError(Status.UNAVAILABLE, reason)) for call_id in self._ours]
        events += [Cancelled(call_id) for call_id, call in self._theirs.items() if call.is_wanted]
        self._untold.clear()
        self._ours.clear()
        self._theirs.clear()
        self.data_to_send()
        self._decoder = FrameDecoder(max_attachment_bytes=self._max_attachment_bytes)  # lets go of an unfinished frame
        return events

    def _send(
        self,
        kind: FrameType,
        call_id: int,
        header: bytes = b"",
        attachments: tuple[Buffer, ...] = (),
        flags: int = 0,
    ) -> int:
        pieces = encode_frame(
            (kind, call_id, header, attachments, flags),
            compress=self._compress,
            max_attachment_bytes=self._max_attachment_bytes,
        )
        num_bytes = len(pieces[0]) if len(pieces) == 1 else sum(memoryview(piece).nbytes for piece in pieces)
        self._outgoing += pieces
        self.unsent_bytes += num_bytes
        return num_bytes

    # --- what arrives ---

    def _handle(self, frame: Frame, now: float) -> Event | None:
        kind, call_id = frame.type, frame.call_id
        if kind is _REQUEST:
            return self._handle_request(frame, now)
        if kind is _ANSWER:
            return self._handle_answer(frame)
        if kind is _ERROR:
            error = decode(ErrorHeader, frame.header)
            if self._ours.pop(call_id, None) is None:
                return None  # it crossed our cancel
            return Failed(call_id, _remote_error(error))
        if kind is _CANCEL:
            call = self._theirs.get(call_id)
            if call is None or not call.is_wanted:
                return None  # it crossed our answer
            call.is_wanted = False
            return Cancelled(call_id)
        if kind is FrameType.DRAIN:
            return Draining()
        return self._handle_stream(frame)

    def _handle_request(self, frame: Frame, now: float) -> Event:
        call_id = frame.call_id
        if call_id in self._theirs:
            raise ProtocolError(f"call id {call_id} is already in use")
        method, timeout_ms, body, kind = read_request_header(frame.header)
        deadline = now + timeout_ms / 1000 if timeout_ms else math.inf
        self._theirs[call_id] = _Call(deadline) if kind is _UNARY else _StreamCall(deadline, kind, is_ours=False)
        num_bytes = len(body)
        for attachment in frame.attachments:
            num_bytes += len(attachment)
        return Called(call_id, method, kind, body, frame.attachments, deadline, num_bytes)

    def _handle_answer(self, frame: Frame) -> Event | None:
        call = self._ours.get(frame.call_id)
        if call is None:
            return None  # it crossed our cancel
        if isinstance(call, _StreamCall) and call.may_receive:
            raise ProtocolError("one answer to a call that is answered by a stream")
        del self._ours[frame.call_id]
        return Answered(frame.call_id, frame.header, frame.attachments)

    def _handle_stream(self, frame: Frame) -> Event | None:
        call_id, is_ours = frame.call_id, not frame.flags & FROM_CALLER
        table = self._ours if is_ours else self._theirs
        call = table.get(call_id)
        if call is None or not call.is_wanted:
            return None  # the call was over before this came
        if not isinstance(call, _StreamCall):
            raise ProtocolError("a message in a call without streams")
        if frame.type is FrameType.CREDIT:
            return self._handle_credit(call, frame, is_ours=is_ours)
        if not call.may_receive:
            raise ProtocolError("a message after the end of its stream, or from a side that has none")
        if frame.type is FrameType.END:
            call.may_receive = False
            if is_ours:
                del table[call_id]
            return Ended(call_id, is_ours)
        if call.window <= 0:
            raise ProtocolError("a message beyond the credit of its stream")
        cost = _message_cost(frame.header, frame.attachments)
        if cost > MAX_MESSAGE_BYTES:
            raise LimitError(f"a message of {cost} bytes exceeds the limit of {MAX_MESSAGE_BYTES}; send it in bulk")
        call.window -= cost
        return Message(call_id, is_ours, frame.header, frame.attachments, cost)

    def _handle_credit(self, call: _StreamCall, frame: Frame, *, is_ours: bool) -> Event | None:
        num_bytes = decode(CreditHeader, frame.header).num_bytes
        if num_bytes < 0 or call.credit + num_bytes > STREAM_WINDOW_BYTES:
            raise LimitError(f"a credit of {num_bytes} bytes is more than was used up")
        was_stopped = call.credit <= 0
        call.credit += num_bytes
        return Writable(frame.call_id, is_ours) if was_stopped and call.credit > 0 else None


def _remote_error(header: ErrorHeader) -> RemoteError:
    """What a stranger says of a failure, fit for a log and a terminal."""
    status = Status.UNKNOWN if header.status is Status.OK else header.status  # an error that says OK is still one
    text = "".join(char if char.isprintable() else "?" for char in header.message[:MAX_ERROR_CHARS])
    return RemoteError(status, text)


def _message_cost(body: Buffer, attachments: Attachments) -> int:
    return MESSAGE_OVERHEAD_BYTES + len(body) + sum(memoryview(attachment).nbytes for attachment in attachments)
