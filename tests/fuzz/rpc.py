"""The RPC core, driven as a shell drives it, against a far side that says anything at all.

An input is a list of steps: what the far side sends (frames with any content, or any bytes) and what happens here in
between (calls, answers, messages, time). A model beside the connection holds it to its contract: every call has one
outcome, told once here and at most once there; a withdrawn one is told once; a stream stays within its credit; what is
held for the far side fits into its budget; what we send can be read; and nothing is left after `close`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Final

from shoal.protocol.budget import Budget
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, Status, TooLargeError
from shoal.protocol.frames import FROM_CALLER, Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.limits import (
    MAX_ATTACHMENTS,
    MAX_CALLS_IN_FLIGHT,
    MAX_ERROR_CHARS,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_REFUSED_BYTES,
    MAX_STREAM_HELD_BYTES,
    STREAM_WINDOW_BYTES,
)
from shoal.protocol.rpc import (
    MESSAGE_OVERHEAD_BYTES,
    Answered,
    Called,
    Cancelled,
    CreditHeader,
    Draining,
    Ended,
    ErrorHeader,
    Event,
    Failed,
    Message,
    RpcConnection,
    Writable,
    read_request_header,
    request_header,
)
from shoal.protocol.services import CallKind, unimplemented

from .harness import BASE_BYTES, BYTES_PER_BYTE, MutateBytes, Target, check_text, refusing, require
from .mutators import Step, mutate_packed, mutate_steps, pack_steps, read_steps

_LARGE_BYTES: Final = 600 * 1024
_MAX_ATTACHMENT_BYTES: Final = 4 * _LARGE_BYTES  # of one frame; more than a message may have
_MAX_FRAME_BYTES: Final = MAX_HEADER_BYTES + _MAX_ATTACHMENT_BYTES + 4 * MAX_ATTACHMENTS + 64
_MAX_HELD_BYTES: Final = 8 * 1024 * 1024  # by the far side's calls; less than usual, so that it is reached
_MAX_OUR_STREAMS: Final = 4
_MAX_FLOOD: Final = 2500  # frames, by one input; refusing them all is more than `MAX_REFUSED_BYTES`
_MAX_FLOOD_BYTES: Final = 1024 * 1024
_KNOWN: Final = "test."
"""How the methods begin that this side knows."""
_UNKNOWN: Final = "\U000e0001" * 80  # what makes the longest refusal
_ZEROS: Final = memoryview(bytes(MAX_MESSAGE_BYTES + 1))
_BY_CALLER: Final = 1
_COMPRESSED: Final = 2
_TOGETHER: Final = 4  # it arrives with what comes next
_TYPES: Final = tuple(FrameType)
_KINDS: Final = tuple(CallKind)


class _Shell:
    """What runs a connection, and remembers what it was told."""

    def __init__(self) -> None:
        self.connection = RpcConnection(compress=True, max_attachment_bytes=_MAX_ATTACHMENT_BYTES)
        self.budget = Budget(max_bytes=_MAX_HELD_BYTES)
        self.now = 0.0
        self.is_open = True
        self.ours: dict[int, CallKind] = {}  # without an outcome
        self.theirs: dict[int, Called] = {}  # until we are done
        self.withdrawn: set[int] = set()  # of theirs
        self.ended: set[int] = set()  # of theirs, the stream of requests
        self.finished: set[int] = set()  # of ours, our own stream
        self.refused_now: set[int] = set()  # of theirs, by what came last
        self.refused_bytes = 0  # that the far side has not read
        self.unconsumed: list[Message] = []
        self.flood_left = _MAX_FLOOD
        self.incoming = b""  # sent by the far side, not yet here
        self.incoming_bytes = 0  # the same, decompressed
        self.far_side = FrameDecoder(max_attachment_bytes=_MAX_ATTACHMENT_BYTES)
        self.num_called: Counter[int] = Counter()  # by the far side, by call id
        self.num_told: Counter[int] = Counter()  # outcomes that went there

    def receive(self, data: bytes) -> None:
        """Give bytes of the far side to the connection; a violation ends it, once all that came before is told."""
        if not self.is_open:
            return
        data, self.incoming, self.incoming_bytes = self.incoming + data, b"", 0
        self.refused_now.clear()
        self.is_open = False
        events: list[Event] = []
        with refusing(ProtocolError):
            events = self.connection.receive_data(data, self.now)
            self.is_open = True
        for event in events:
            self.learn(event)
        if not self.is_open:
            self.close()

    def learn(self, event: Event, *, is_closing: bool = False) -> None:
        """Check that an event may come now."""
        match event:
            case Called(call_id):
                require(call_id not in self.theirs, "a call came with the id of an open one")
                require(not is_closing, "a closed connection receives a call")
                if self.is_open:
                    self.admit(event)
            case Cancelled(call_id) | Message(call_id, False) | Ended(call_id, False) | Writable(call_id, False) if (
                call_id in self.refused_now
            ):
                pass  # it came together with the call
            case Cancelled(call_id):
                require(call_id in self.theirs or is_closing, "a call that is not open was withdrawn")
                require(call_id not in self.withdrawn, "a call was withdrawn twice")
                self.withdrawn.add(call_id)
            case Answered(call_id) | Failed(call_id):
                require(call_id in self.ours, "a call that is not open has an outcome")
                kind = self.ours.pop(call_id)
                require(isinstance(event, Failed) or not kind.streams_answers, "a stream was answered by one message")
                if isinstance(event, Failed):
                    require(len(event.error.message) <= MAX_ERROR_CHARS, "a long error")
                    require(event.error.message.isprintable(), "a stranger's words reach a terminal as they are")
                    require(event.error.status is not Status.OK, "a failure that says OK")
            case Message(call_id, is_ours, body, attachments, num_bytes):
                kind = self.open_kind(call_id, is_ours=is_ours)
                require(kind.streams_answers if is_ours else kind.streams_requests, "a message outside of a stream")
                require(is_ours or call_id not in self.ended, "a message after the end")
                size = MESSAGE_OVERHEAD_BYTES + len(body) + sum(map(len, attachments))
                require(size == num_bytes <= MAX_MESSAGE_BYTES, "a message costs more, or less, than it has")
                self.unconsumed.append(event)
                held = sum(one.num_bytes for one in self.unconsumed if one[:2] == event[:2])
                require(held - num_bytes < STREAM_WINDOW_BYTES, "a stream is beyond its credit")
            case Ended(call_id, is_ours):
                kind = self.open_kind(call_id, is_ours=is_ours)
                require(kind.streams_answers if is_ours else kind.streams_requests, "the end of what is no stream")
                require(is_ours or call_id not in self.ended, "a stream ended twice")
                if is_ours:
                    del self.ours[call_id]
                else:
                    self.ended.add(call_id)
            case Writable(call_id, is_ours):
                self.open_kind(call_id, is_ours=is_ours)
            case Draining():
                pass

    def admit(self, call: Called) -> None:
        """Let a call in, or refuse it; if too many refusals gather, the far side has broken the protocol."""
        size = len(call.body) + sum(map(len, call.attachments))
        require(call.num_bytes == size and call.deadline >= self.now, "a call is not as long as it says, or too late")
        self.num_called[call.call_id] += 1
        refusal: tuple[Status, str] | None = None
        if not call.method.startswith(_KNOWN):
            error = unimplemented(call.method)
            refusal = error.status, error.message
        elif reason := self.budget.enter(_held_bytes(call)):
            refusal = Status.RESOURCE_EXHAUSTED, reason
        if refusal is None:
            self.theirs[call.call_id] = call
            self.ended.discard(call.call_id)
            return
        check_text(refusal[1])
        self.refused_now.add(call.call_id)
        unsent = self.connection.unsent_bytes
        is_open, self.is_open = self.is_open, False
        with refusing(ProtocolError):
            self.connection.refuse(call.call_id, *refusal)
            self.is_open = is_open
            self.refused_bytes += self.connection.unsent_bytes - unsent
            require(self.refused_bytes <= MAX_REFUSED_BYTES, "more refusals wait to be read than may")

    def open_kind(self, call_id: int, *, is_ours: bool) -> CallKind:
        """The kind of a call, which must be open."""
        require(call_id in (self.ours if is_ours else self.theirs), "something happened in a call that is not open")
        require(is_ours or call_id not in self.withdrawn, "something happened in a withdrawn call")
        return self.ours[call_id] if is_ours else self.theirs[call_id].kind

    def done(self, call_id: int) -> None:
        """A call of theirs is over on our side."""
        self.budget.leave(_held_bytes(self.theirs.pop(call_id)))
        self.withdrawn.discard(call_id)
        self.ended.discard(call_id)
        self.forget(call_id, is_ours=False)

    def forget(self, call_id: int, *, is_ours: bool) -> None:
        """Its messages need not be consumed any more."""
        self.unconsumed = [one for one in self.unconsumed if (one.call_id, one.is_ours) != (call_id, is_ours)]

    def check(self) -> None:
        """What holds at any time."""
        require(self.connection.num_open_calls == len(self.ours), "a call is open on one side of the interface only")
        require(self.connection.next_deadline() >= 0, "a deadline before the beginning")
        require(self.connection.buffered_bytes <= _MAX_FRAME_BYTES, "more is here than one frame that is not whole")
        require(len(self.theirs) <= MAX_CALLS_IN_FLIGHT, "more calls are open than may")
        held = sum(call.num_bytes for call in self.theirs.values())
        held += sum(message.num_bytes for message in self.unconsumed if not message.is_ours)
        require(held <= self.budget.held_bytes, "the far side holds more than it is accounted for")

    def flush(self) -> None:
        """Let the far side read what there is to send."""
        unsent = self.connection.unsent_bytes
        pieces = self.connection.data_to_send()
        require(sum(map(len, pieces)) == unsent, "what waits to be sent is counted wrongly")
        require(not self.connection.data_to_send(), "something is sent twice")
        self.refused_bytes = 0
        for piece in pieces:
            for frame in self.far_side.receive_data(piece):
                self.check_sent(frame)
        require(self.far_side.buffered_bytes == 0, "a frame is not sent whole")

    def check_sent(self, frame: Frame) -> None:
        """Check that the far side can read what it gets, and hears of each call's outcome no more than once."""
        if frame.type is FrameType.REQUEST:
            read_request_header(frame.header)
        elif frame.type is FrameType.CREDIT:
            decode(CreditHeader, frame.header)
        elif frame.type in (FrameType.ANSWER, FrameType.ERROR, FrameType.END) and not frame.flags & FROM_CALLER:
            if frame.type is FrameType.ERROR:
                decode(ErrorHeader, frame.header)
            self.num_told[frame.call_id] += 1
            told, called = self.num_told[frame.call_id], self.num_called[frame.call_id]
            require(told <= called, "the far side hears of an outcome twice")

    def close(self) -> None:
        """The stream is gone."""
        self.is_open = False
        for event in self.connection.close("the stream is gone"):
            self.learn(event, is_closing=True)
        require(not self.ours, "a call of ours has no outcome")
        require(self.theirs.keys() <= self.withdrawn, "a call of theirs does not learn that the stream is gone")
        require(not self.connection.data_to_send(), "a closed connection wants to send")
        require(self.connection.num_open_calls == 0, "a closed connection has open calls")
        for call_id in list(self.theirs):
            self.done(call_id)
        require(self.budget.num_calls == self.budget.held_bytes == 0, "something is held when all is over")


def _held_bytes(call: Called) -> int:
    """What a call is accounted for, as in `shoal.node.wire.serving`."""
    return call.num_bytes + (MAX_STREAM_HELD_BYTES if call.kind.streams_requests else 0)


def _run(data: bytes) -> None:
    shell = _Shell()
    for what, with_bytes in read_steps(data):
        _STEPS[what % len(_STEPS)](shell, with_bytes)
        if not shell.is_open:
            return
        shell.check()
    shell.flush()
    shell.close()


def _byte(data: bytes, at: int) -> int:
    return data[at] if at < len(data) else 0


def _one_of(calls: dict[int, CallKind] | dict[int, Called], data: bytes) -> int | None:
    return list(calls)[_byte(data, 0) % len(calls)] if calls else None


def _step_bytes(shell: _Shell, data: bytes) -> None:
    """The far side sends any bytes, in two pieces."""
    half = len(data) // 2
    shell.receive(data[:half])
    shell.receive(data[half:])


def _step_frame(shell: _Shell, data: bytes) -> None:
    """The far side sends a frame: its type, its call id, flags, how many attachments; then its header."""
    num_bytes = len(data) + _attached_bytes(data)
    if _byte(data, 2) & _TOGETHER and shell.incoming_bytes + num_bytes <= _MAX_FRAME_BYTES:
        shell.incoming += _wire(data)
        shell.incoming_bytes += num_bytes
    else:
        shell.receive(_wire(data))


def _wire(data: bytes) -> bytes:
    kind = _TYPES[_byte(data, 0) % len(_TYPES)]
    flags = FROM_CALLER if _byte(data, 2) & _BY_CALLER else 0
    count, size = _ATTACHED[_byte(data, 3) % len(_ATTACHED)]
    frame = Frame(kind, _byte(data, 1), data[4:], (_ZEROS[:size],) * count, flags)
    compress = bool(_byte(data, 2) & _COMPRESSED)
    return b"".join(encode_frame(frame, compress=compress, max_attachment_bytes=_MAX_ATTACHMENT_BYTES))


_ATTACHED: Final = ((0, 0), (1, 0), (2, 10), (3, 5000), (1, _LARGE_BYTES), (2, _LARGE_BYTES), (4, _LARGE_BYTES))
"""Attachments that a frame of the far side may have: how many, and how long."""


def _attached_bytes(data: bytes) -> int:
    count, size = _ATTACHED[_byte(data, 3) % len(_ATTACHED)]
    return count * size


def _step_flood(shell: _Shell, data: bytes) -> None:
    """The far side makes many calls, or repeats one frame, all at once."""
    what, first, count = _byte(data, 0) % 8, 1000 * _byte(data, 1), _byte(data, 2)
    count = min(_MAX_FLOOD if count == 255 else count, shell.flood_left)
    if len(data) >= 8:
        frame = _wire(data[3:])
        count = min(count, 1 + _MAX_FLOOD_BYTES // (len(frame) + _attached_bytes(data[3:])))
        flood = frame * count
    else:
        header = request_header(_UNKNOWN if what >= len(_KINDS) else "test.flood", 1000, kind=what % len(_KINDS))
        frames = (Frame(FrameType.REQUEST, first + number, header) for number in range(count))
        flood = b"".join(piece for frame in frames for piece in encode_frame(frame))
    shell.flood_left -= count
    shell.receive(flood)


def _step_call(shell: _Shell, data: bytes) -> None:
    kind = _KINDS[_byte(data, 0) % len(_KINDS)]
    if sum(bool(open_kind) for open_kind in shell.ours.values()) >= _MAX_OUR_STREAMS:
        kind = CallKind.UNARY  # each stream may hold some megabytes, which this side has asked for
    timeout_s = float("inf") if _byte(data, 1) == 0 else _byte(data, 1) / 10
    call_id = shell.connection.call("test.call", data[2:], timeout_s=timeout_s, now=shell.now, kind=kind)
    require(call_id not in shell.ours, "a call of ours has the id of an open one")
    shell.ours[call_id] = kind


def _step_cancel(shell: _Shell, data: bytes) -> None:
    call_id = _one_of(shell.ours, data)
    if call_id is not None:
        shell.connection.cancel(call_id)
        del shell.ours[call_id]
        shell.forget(call_id, is_ours=True)


def _step_answer(shell: _Shell, data: bytes) -> None:
    call_id = _one_of(shell.theirs, data)
    if call_id is not None and not shell.theirs[call_id].kind.streams_answers:
        shell.connection.answer(call_id, data[1:])
        shell.done(call_id)


def _step_fail(shell: _Shell, data: bytes) -> None:
    call_id = _one_of(shell.theirs, data)
    if call_id is not None:
        shell.connection.fail(call_id, Status.INTERNAL, data[1:].decode(errors="replace"))
        shell.done(call_id)


def _step_message(shell: _Shell, data: bytes) -> None:
    is_ours = bool(_byte(data, 1) & 1)
    call_id = _one_of(shell.ours if is_ours else shell.theirs, data)
    if call_id is None:
        return
    kind = shell.ours[call_id] if is_ours else shell.theirs[call_id].kind
    is_stream = kind.streams_requests and call_id not in shell.finished if is_ours else kind.streams_answers
    if is_stream and not shell.connection.is_stopped(call_id, is_ours=is_ours):
        with refusing(TooLargeError):
            attachments = [_ZEROS[: 10_000 * _byte(data, 2)]]
            shell.connection.send_message(call_id, data[3:], attachments, is_ours=is_ours)


def _step_end(shell: _Shell, data: bytes) -> None:
    is_ours = bool(_byte(data, 1) & 1)
    call_id = _one_of(shell.ours if is_ours else shell.theirs, data)
    if call_id is None or (not is_ours and not shell.theirs[call_id].kind.streams_answers):
        return
    shell.connection.end(call_id, is_ours=is_ours)
    if is_ours:
        shell.finished.add(call_id)
    else:
        shell.done(call_id)


def _step_consume(shell: _Shell, data: bytes) -> None:
    del shell.unconsumed[1 + _byte(data, 0) :: 1000]  # nothing, mostly: a reader that forgets one
    while shell.unconsumed:
        message = shell.unconsumed.pop(0)
        shell.connection.consumed(message.call_id, message.num_bytes, is_ours=message.is_ours)


def _step_wait(shell: _Shell, data: bytes) -> None:
    shell.now += _byte(data, 0) / 10
    for event in shell.connection.expire(shell.now):
        if isinstance(event, Failed):
            check_text(str(event.error))
        shell.learn(event)
    require(shell.connection.next_deadline() > shell.now, "a deadline that has passed stays")


def _step_flush(shell: _Shell, data: bytes) -> None:
    """What waits is written; or after a DRAIN; or the path does not take it yet."""
    if _byte(data, 0) == 1:
        shell.connection.drain()
    if _byte(data, 0) == 2:
        unsent = shell.connection.unsent_bytes
        shell.connection.put_back(b"".join(shell.connection.data_to_send()))
        require(shell.connection.unsent_bytes == unsent, "what was put back is not what was taken")
        shell.refused_bytes = 0
        return
    shell.flush()


_STEPS: Final[tuple[Callable[[_Shell, bytes], None], ...]] = (
    *(_step_bytes, _step_frame, _step_flood, _step_call, _step_cancel, _step_answer, _step_fail),
    *(_step_message, _step_end, _step_consume, _step_wait, _step_flush),
)
_STEP_NUMBERS: Final = {step: number for number, step in enumerate(_STEPS)}
_FRAME: Final = _STEP_NUMBERS[_step_frame]


def _frame(kind: FrameType, call_id: int, header: bytes = b"", flags: int = 0, attachments: int = 0) -> Step:
    return _FRAME, bytes([_TYPES.index(kind), call_id, flags, attachments]) + header


def _request(call_id: int, kind: CallKind, timeout_ms: int = 1000) -> Step:
    body = b"" if kind.streams_requests else b"\x80"
    return _frame(FrameType.REQUEST, call_id, request_header("test.call", timeout_ms, body, kind), attachments=2)


def _message(call_id: int, flags: int, attached: int) -> Step:
    return _frame(FrameType.MESSAGE, call_id, b"\x80", flags, attached)


def _step(step: Callable[[_Shell, bytes], None], *data: int) -> Step:
    return _STEP_NUMBERS[step], bytes(data)


def _seeds() -> list[bytes]:
    unary, down, up, both = CallKind
    credit = encode(CreditHeader(STREAM_WINDOW_BYTES))
    error = encode(ErrorHeader(Status.NOT_FOUND, "no"))
    wire = b"".join(encode_frame(Frame(FrameType.REQUEST, 9, request_header("test.call", 0, b"\x80"))))
    scenes: list[list[Step]] = [
        [_request(1, unary), _request(2, unary, 0), _step(_step_answer, 1, 128), _step(_step_fail, 0, 65)],
        [_request(1, unary), _frame(FrameType.CANCEL, 1), _step(_step_answer, 0, 128), _request(1, unary)],
        [_step(_step_call, 0, 10), _frame(FrameType.ANSWER, 1, b"\x80", 0, 2), _step(_step_flush)],
        [_step(_step_call, 0, 10), _frame(FrameType.ERROR, 1, error), _step(_step_call, 0, 1), _step(_step_wait, 5)],
        [_step(_step_call, 1, 10), _frame(FrameType.MESSAGE, 1, b"\x80"), _frame(FrameType.END, 1)],
        [_step(_step_call, 2, 0), _step(_step_message, 0, 1, 5), _step(_step_end, 0, 1), _frame(FrameType.ANSWER, 1)],
        [_request(1, down), _step(_step_message, 0, 0, 9), _step(_step_message, 0, 0, 9), _step(_step_end, 0, 0)],
        [_request(1, up), _frame(FrameType.MESSAGE, 1, b"\x80", _BY_CALLER), _frame(FrameType.END, 1, b"", _BY_CALLER)],
        [_request(1, both), _frame(FrameType.MESSAGE, 1, b"", 1), _step(_step_consume), _step(_step_end, 0, 0)],
        [_request(1, down), _step(_step_message, 0, 0, 255), _frame(FrameType.CREDIT, 1, credit, 1)],
        [_request(1, unary), _frame(FrameType.CANCEL, 1, b"", _TOGETHER), _request(2, unary)],
        [_step(_step_call, 3, 0), _step(_step_cancel, 0), _frame(FrameType.MESSAGE, 1, b"\x80")],
        [_request(3, unary), _step(_step_wait, 255), _step(_step_answer, 0), _frame(FrameType.DRAIN, 0)],
        [
            _step(_step_flood, 0, 1, 254),
            _step(_step_flood, 0, 9, 9),
            _step(_step_flush, 1),
            (_STEP_NUMBERS[_step_bytes], wire),
        ],
        [_step(_step_call, 0, 0), _step(_step_flood, 4, 1, 255), _step(_step_flush)],
        [_step(_step_call, 0, 0), _step(_step_flood, 2, 1, 9), _step(_step_flush, 2), _step(_step_flush)],
        [_request(1, up), _message(1, _BY_CALLER, 4), _message(1, _BY_CALLER, 4), _step(_step_consume)],
        [_request(1, up), *(_message(1, _BY_CALLER, 4) for _ in range(4))],
        [_request(1, up), _message(1, _BY_CALLER | _COMPRESSED, 6)],
        [_request(1, up), _frame(FrameType.CANCEL, 1), _message(1, _BY_CALLER, 1), _frame(FrameType.END, 1, b"", 1)],
        [_step(_step_call, 1, 0), _message(1, _COMPRESSED, 5), _step(_step_consume), _message(1, 0, 5)],
        [_request(1, down), _step(_step_message, 0, 0, 200), _step(_step_message, 0, 0, 9), _step(_step_flush)],
    ]
    return [pack_steps(scene) for scene in scenes]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    def mutate_step(step: Step) -> Step:
        what, with_bytes = step
        if what % len(_STEPS) != _FRAME or len(with_bytes) < 4:
            return what, mutate_bytes(with_bytes, len(with_bytes) + 16)
        head, header = bytearray(with_bytes[:4]), with_bytes[4:]
        match rng.randrange(4):
            case 0:
                head[rng.randrange(4)] = rng.randrange(8)
            case 1:
                header = mutate_bytes(header, len(header) + 64)
            case _:
                header = mutate_packed(header, len(header) + 512, rng, mutate_bytes)
        return what, bytes(head) + header

    return mutate_steps(data, max_bytes, rng, mutate_bytes, mutate_step)


def _max_peak_bytes(length: int) -> int:
    # A flood's calls are all here before the first is refused. A frame is made, joined, cut and read.
    held = _MAX_HELD_BYTES + _MAX_OUR_STREAMS * MAX_STREAM_HELD_BYTES
    return 8 * BASE_BYTES + held + 8 * _MAX_FRAME_BYTES + BYTES_PER_BYTE * length


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=_max_peak_bytes)
