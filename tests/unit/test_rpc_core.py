"""Two connections back to back, without a network or a clock: every call has one outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, RemoteError, Status
from shoal.protocol.frames import Frame, FrameType, encode_frame
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES, MAX_CALLS_IN_FLIGHT, MAX_ERROR_CHARS
from shoal.protocol.rpc import (
    Answered,
    AnswerHeader,
    Called,
    Cancelled,
    ErrorHeader,
    Event,
    Failed,
    RequestHeader,
    RpcConnection,
)


def carry(source: RpcConnection, target: RpcConnection, now: float = 0.0) -> list[Event]:
    """Take all that ``source`` has to send to ``target``."""
    return target.receive_data(b"".join(bytes(piece) for piece in source.data_to_send()), now)


def wire(*frames: Frame) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in encode_frame(frame))


def request(call_id: int, method: str = "test.echo", timeout_ms: int = 1000) -> Frame:
    return Frame(FrameType.REQUEST, call_id, encode(RequestHeader(method, timeout_ms)))


def call(connection: RpcConnection, body: Any = None, attachments: Sequence[bytes] = (), timeout_s: float = 1.0) -> int:
    return connection.call("test.echo", body, attachments, timeout_s, now=0.0)


def failure(event: Event) -> tuple[int, Status]:
    assert isinstance(event, Failed)
    return event.call_id, event.error.status


@pytest.fixture
def caller() -> RpcConnection:
    return RpcConnection()


@pytest.fixture
def server() -> RpcConnection:
    return RpcConnection()


def test_a_call_arrives_with_what_it_carries_and_its_deadline(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, {"x": 1}, [b"bulk"], timeout_s=2.5)
    assert carry(caller, server, now=100.0) == [Called(call_id, "test.echo", {"x": 1}, (b"bulk",), 102.5)]
    server.answer(call_id, {"y": 2}, [b"back"])
    assert carry(server, caller) == [Answered(call_id, {"y": 2}, (b"back",))]
    assert caller.num_open_calls == 0


def test_pipelined_calls_may_be_answered_in_any_order(caller: RpcConnection, server: RpcConnection) -> None:
    ids = [call(caller, n) for n in range(5)]
    assert [event.body for event in carry(caller, server) if isinstance(event, Called)] == [0, 1, 2, 3, 4]
    for n in (3, 0, 4, 2, 1):
        server.answer(ids[n], 10 * n)
    assert carry(server, caller) == [Answered(ids[n], 10 * n, ()) for n in (3, 0, 4, 2, 1)]


def test_both_sides_call_with_the_same_id_and_neither_confuses_them(
    caller: RpcConnection, server: RpcConnection
) -> None:
    there, back = call(caller, "there"), call(server, "back")
    assert there == back
    (at_server,), (at_caller,) = carry(caller, server), carry(server, caller)
    assert isinstance(at_server, Called)
    assert isinstance(at_caller, Called)
    caller.answer(back, at_caller.body)
    server.fail(there, Status.NOT_FOUND, "no")
    assert [failure(event) for event in carry(server, caller)] == [(there, Status.NOT_FOUND)]
    assert carry(caller, server) == [Answered(back, "back", ())]


def test_a_cancelled_call_is_told_to_the_far_side_and_its_answer_goes_nowhere(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller)
    carry(caller, server)
    caller.cancel(call_id)
    assert caller.num_open_calls == 0
    assert carry(caller, server) == [Cancelled(call_id)]
    server.answer(call_id, "too late")
    assert server.data_to_send() == []


def test_an_answer_that_crossed_the_cancel_is_ignored_by_either_side(
    caller: RpcConnection, server: RpcConnection
) -> None:
    answered, failed = call(caller), call(caller)
    carry(caller, server)
    server.answer(answered, "late")
    server.fail(failed, Status.INTERNAL, "late")
    caller.cancel(answered)
    caller.cancel(failed)
    assert carry(server, caller) == []
    assert carry(caller, server) == []


def test_cancelling_what_is_done_says_nothing(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.answer(call_id, None)
    carry(server, caller)
    caller.cancel(call_id)
    caller.cancel(999)
    assert caller.data_to_send() == []


def test_a_call_fails_at_its_deadline_and_the_far_side_is_told(caller: RpcConnection, server: RpcConnection) -> None:
    soon, later = call(caller, timeout_s=1.0), call(caller, timeout_s=3.0)
    carry(caller, server)
    assert caller.next_deadline() == 1.0
    assert caller.expire(now=0.9) == []
    assert [failure(event) for event in caller.expire(now=1.0)] == [(soon, Status.DEADLINE_EXCEEDED)]
    assert carry(caller, server) == [Cancelled(soon)]
    assert caller.next_deadline() == 3.0
    server.answer(later, None)
    carry(server, caller)
    assert caller.next_deadline() is None


def test_a_time_too_short_to_measure_is_still_a_time(caller: RpcConnection, server: RpcConnection) -> None:
    call(caller, timeout_s=0.0001)
    (event,) = carry(caller, server, now=5.0)
    assert isinstance(event, Called)
    assert event.deadline > 5.0


def test_closing_fails_everything_that_is_open_in_both_directions(caller: RpcConnection, server: RpcConnection) -> None:
    ours = [call(caller), call(caller)]
    theirs = call(server)
    carry(server, caller)
    events = caller.close("the cable was cut")
    assert [failure(event) for event in events if isinstance(event, Failed)] == [(n, Status.UNAVAILABLE) for n in ours]
    assert "the cable was cut" in str(next(event.error for event in events if isinstance(event, Failed)))
    assert Cancelled(theirs) in events
    assert caller.data_to_send() == []
    assert caller.close("again") == []


def test_an_answer_before_the_bytes_that_broke_the_protocol_still_counts(
    caller: RpcConnection, server: RpcConnection
) -> None:
    answered, open_call = call(caller), call(caller)
    answer = Frame(FrameType.ANSWER, answered, encode(AnswerHeader("in time")))
    unreadable = Frame(FrameType.ANSWER, open_call, b"\xc1")
    with pytest.raises(ProtocolError):
        caller.receive_data(wire(answer, request(1), unreadable), now=0.0)
    told, lost = caller.close("protocol error")[:2]
    assert told == Answered(answered, "in time", ())
    assert failure(lost) == (open_call, Status.UNAVAILABLE)


def test_a_call_id_that_is_in_use_breaks_the_protocol(server: RpcConnection) -> None:
    with pytest.raises(ProtocolError, match="already in use"):
        server.receive_data(wire(request(7), request(7)), now=0.0)


def test_a_withdrawn_call_keeps_its_id_until_its_handler_is_done(server: RpcConnection) -> None:
    cancel = Frame(FrameType.CANCEL, 7)
    server.receive_data(wire(request(7), cancel), now=0.0)
    assert server.receive_data(wire(cancel), now=0.0) == [], "told once"
    server.answer(7, None)
    assert len(server.receive_data(wire(request(7)), now=0.0)) == 1
    with pytest.raises(ProtocolError, match="already in use"):
        server.receive_data(wire(cancel, request(7)), now=0.0)


def test_one_call_too_many_is_refused_and_the_others_go_on(caller: RpcConnection, server: RpcConnection) -> None:
    ids = [call(caller) for _ in range(MAX_CALLS_IN_FLIGHT + 1)]
    assert len(carry(caller, server)) == MAX_CALLS_IN_FLIGHT
    assert [failure(event) for event in carry(server, caller)] == [(ids[-1], Status.RESOURCE_EXHAUSTED)]
    server.answer(ids[0], None)
    again = call(caller)
    assert [event.call_id for event in carry(caller, server) if isinstance(event, Called)] == [again]


def test_withdrawing_calls_makes_no_room_before_their_handlers_are_done(server: RpcConnection) -> None:
    flood = [frame for n in range(2 * MAX_CALLS_IN_FLIGHT) for frame in (request(n), Frame(FrameType.CANCEL, n))]
    events = server.receive_data(wire(*flood), now=0.0)
    assert sum(isinstance(event, Called) for event in events) == MAX_CALLS_IN_FLIGHT
    for n in range(MAX_CALLS_IN_FLIGHT):
        server.fail(n, Status.CANCELLED, "stopped")
    assert isinstance(server.receive_data(wire(request(9999)), now=0.0)[0], Called)


def test_an_over_long_error_message_is_cut_by_whoever_sends_it(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.fail(call_id, Status.INTERNAL, "x" * 10_000)
    (event,) = carry(server, caller)
    assert isinstance(event, Failed)
    assert event.error.message == "x" * MAX_ERROR_CHARS


def test_an_over_long_error_message_is_cut_by_whoever_gets_it(caller: RpcConnection) -> None:
    call_id = call(caller)
    error = Frame(FrameType.ERROR, call_id, encode(ErrorHeader(Status.INTERNAL, "x" * 10_000)))
    (event,) = caller.receive_data(wire(error), now=0.0)
    assert isinstance(event, Failed)
    assert len(event.error.message) == MAX_ERROR_CHARS


@pytest.mark.parametrize("kind", [FrameType.ANSWER, FrameType.ERROR])
def test_an_answer_to_a_call_that_was_never_made_is_ignored(caller: RpcConnection, kind: FrameType) -> None:
    header = encode(AnswerHeader(1) if kind is FrameType.ANSWER else ErrorHeader(Status.UNKNOWN, "?"))
    assert caller.receive_data(wire(Frame(kind, 12345, header)), now=0.0) == []


def test_a_second_answer_is_ignored(caller: RpcConnection) -> None:
    call_id = call(caller)
    answer = Frame(FrameType.ANSWER, call_id, encode(AnswerHeader(1)))
    assert caller.receive_data(wire(answer, answer), now=0.0) == [Answered(call_id, 1, ())]


def test_answering_twice_sends_once(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.answer(call_id, 1)
    server.answer(call_id, 2)
    server.fail(call_id, Status.INTERNAL, "no")
    assert carry(server, caller) == [Answered(call_id, 1, ())]


def test_a_request_that_is_too_big_is_no_call(caller: RpcConnection) -> None:
    with pytest.raises(LimitError):
        call(caller, None, [bytes(MAX_ATTACHMENT_BYTES + 1)])
    assert caller.num_open_calls == 0
    assert caller.data_to_send() == []


def test_an_answer_that_is_too_big_leaves_the_call_to_be_failed(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    with pytest.raises(LimitError):
        server.answer(call_id, None, [bytes(MAX_ATTACHMENT_BYTES + 1)])
    server.fail(call_id, Status.RESOURCE_EXHAUSTED, "too big")
    assert [failure(event) for event in carry(server, caller)] == [(call_id, Status.RESOURCE_EXHAUSTED)]


@pytest.mark.parametrize("header", [b"", b"\xc1", encode(5), encode({"timeout_ms": 1}), encode({"method": 1})])
def test_a_request_that_cannot_be_read_breaks_the_protocol(server: RpcConnection, header: bytes) -> None:
    with pytest.raises(ProtocolError):
        server.receive_data(wire(Frame(FrameType.REQUEST, 1, header)), now=0.0)


@pytest.mark.parametrize("timeout_ms", [0, -5, 2**62])
def test_any_time_that_a_stranger_names_is_only_a_time(server: RpcConnection, timeout_ms: int) -> None:
    (event,) = server.receive_data(wire(request(1, timeout_ms=timeout_ms)), now=10.0)
    assert isinstance(event, Called)
    assert event.deadline == 10.0 + timeout_ms / 1000


def test_a_remote_error_names_its_status() -> None:
    assert str(RemoteError(Status.NOT_FOUND, "no such block")) == "NOT_FOUND: no such block"
