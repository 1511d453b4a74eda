"""Two connections back to back, without a network or a clock: every call has one outcome, every stream its order."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.codec import Buffer, encode
from shoal.protocol.errors import LimitError, ProtocolError, RemoteError, Status
from shoal.protocol.frames import FROM_CALLER, Frame, FrameType, encode_frame
from shoal.protocol.limits import (
    MAX_ATTACHMENT_BYTES,
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
    Attachments,
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
from shoal.protocol.services import CallKind

UNARY, DOWN, UP, BOTH = CallKind
HALF_WINDOW = bytes(STREAM_WINDOW_BYTES // 2 - MESSAGE_OVERHEAD_BYTES)
"""The attachment of an otherwise empty message that uses up half of a fresh credit."""


def carry(source: RpcConnection, target: RpcConnection, now: float = 0.0) -> list[Event]:
    """Take all that ``source`` has to send to ``target``."""
    return target.receive_data(b"".join(source.data_to_send()), now)


def wire(*frames: Frame) -> bytes:
    return b"".join(piece for frame in frames for piece in encode_frame(frame))


def request(call_id: int, kind: CallKind = UNARY, timeout_ms: int = 1000) -> Frame:
    return Frame(FrameType.REQUEST, call_id, request_header("test.echo", timeout_ms, b"", kind))


def message(call_id: int, *attachments: bytes, body: bytes = b"", by_caller: bool = True) -> Frame:
    return Frame(FrameType.MESSAGE, call_id, body, attachments, FROM_CALLER if by_caller else 0)


def credit(call_id: int, num_bytes: int, *, by_caller: bool = True) -> Frame:
    return Frame(FrameType.CREDIT, call_id, encode(CreditHeader(num_bytes)), (), FROM_CALLER if by_caller else 0)


def call(
    connection: RpcConnection,
    body: bytes = b"",
    attachments: Attachments = (),
    *,
    timeout_s: float = 1.0,
    kind: CallKind = UNARY,
) -> int:
    return connection.call("test.echo", body, attachments, timeout_s=timeout_s, now=0.0, kind=kind)


def failure(event: Event) -> tuple[int, Status]:
    assert isinstance(event, Failed)
    return event.call_id, event.error.status


def bodies(events: list[Event]) -> list[Buffer]:
    """Of the messages among some events, of which there are no others."""
    assert all(isinstance(event, Message) for event in events)
    return [event.body for event in events if isinstance(event, Message)]


@pytest.fixture
def caller() -> RpcConnection:
    return RpcConnection()


@pytest.fixture
def server() -> RpcConnection:
    return RpcConnection()


# --- unary calls -----------------------------------------------------------------------------------------------------


def test_a_call_arrives_with_what_it_carries_and_its_deadline(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, b"question", [b"bulk", b"more"], timeout_s=2.5)
    (event,) = carry(caller, server, now=100.0)
    assert event == Called(call_id, "test.echo", UNARY, b"question", (b"bulk", b"more"), 102.5, num_bytes=16)
    server.answer(call_id, b"reply", [b"back"])
    assert carry(server, caller) == [Answered(call_id, b"reply", (b"back",))]
    assert caller.num_open_calls == 0


def test_pipelined_calls_may_be_answered_in_any_order(caller: RpcConnection, server: RpcConnection) -> None:
    ids = [call(caller, bytes([n])) for n in range(5)]
    asked = carry(caller, server)
    assert [event.body for event in asked if isinstance(event, Called)] == [bytes([n]) for n in range(5)]
    for n in (3, 0, 4, 2, 1):
        server.answer(ids[n], bytes([n]))
    assert carry(server, caller) == [Answered(ids[n], bytes([n]), ()) for n in (3, 0, 4, 2, 1)]


def test_both_sides_call_with_the_same_id_and_neither_confuses_them(
    caller: RpcConnection, server: RpcConnection
) -> None:
    there, back = call(caller, b"there"), call(server, b"back")
    assert there == back
    (at_server,), (at_caller,) = carry(caller, server), carry(server, caller)
    assert isinstance(at_server, Called)
    assert isinstance(at_caller, Called)
    assert (at_server.body, at_caller.body) == (b"there", b"back")
    caller.answer(back, b"here you are")
    server.fail(there, Status.NOT_FOUND, "no")
    assert [failure(event) for event in carry(server, caller)] == [(there, Status.NOT_FOUND)]
    assert carry(caller, server) == [Answered(back, b"here you are", ())]


def test_both_sides_stream_in_calls_of_the_same_id_and_neither_confuses_them(
    caller: RpcConnection, server: RpcConnection
) -> None:
    there, back = call(caller, kind=BOTH), call(server, kind=BOTH)
    assert there == back
    carry(caller, server)
    carry(server, caller)
    caller.send_message(there, b"request there", is_ours=True)
    caller.send_message(back, b"answer back", is_ours=False)
    first, second = carry(caller, server)
    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert (first.body, first.is_ours) == (b"request there", False)
    assert (second.body, second.is_ours) == (b"answer back", True)
    caller.end(back, is_ours=False)
    assert carry(caller, server) == [Ended(back, is_ours=True)]
    assert (caller.num_open_calls, server.num_open_calls) == (1, 0)


@pytest.mark.parametrize("kind", CallKind)
def test_the_kind_of_a_call_travels_with_it(caller: RpcConnection, server: RpcConnection, kind: CallKind) -> None:
    call(caller, b"asked", kind=kind)
    (event,) = carry(caller, server)
    assert isinstance(event, Called)
    assert (event.kind, event.body) == (kind, b"asked")


def test_the_answerer_learns_how_much_is_to_be_written(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    num_bytes = server.answer(call_id, b"reply", [bytes(100_000), b"back"])
    assert num_bytes == server.unsent_bytes == sum(len(piece) for piece in server.data_to_send())
    assert server.answer(call_id, b"again") == 0


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancelled_call_is_told_to_the_far_side_and_its_answer_goes_nowhere(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller)
    carry(caller, server)
    caller.cancel(call_id)
    assert caller.num_open_calls == 0
    assert carry(caller, server) == [Cancelled(call_id)]
    assert server.answer(call_id, b"too late") == 0
    assert server.data_to_send() == []


def test_a_withdrawn_stream_is_told_once_and_takes_and_gives_nothing_more(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller, kind=BOTH)
    carry(caller, server)
    caller.send_message(call_id, b"said before", is_ours=True)
    caller.cancel(call_id)
    caller.send_message(call_id, b"said after", is_ours=True)
    caller.end(call_id, is_ours=True)
    said, withdrawn = carry(caller, server)
    assert bodies([said]) == [b"said before"]
    assert withdrawn == Cancelled(call_id)
    assert not server.is_stopped(call_id, is_ours=False)
    server.consumed(call_id, STREAM_WINDOW_BYTES, is_ours=False)
    server.send_message(call_id, b"too late", is_ours=False)
    server.end(call_id, is_ours=False)
    assert server.data_to_send() == []


def test_an_answer_that_crossed_the_cancel_is_ignored_by_either_side(
    caller: RpcConnection, server: RpcConnection
) -> None:
    answered, failed, ended = call(caller), call(caller), call(caller, kind=DOWN)
    carry(caller, server)
    server.answer(answered, b"late")
    server.fail(failed, Status.INTERNAL, "late")
    server.send_message(ended, b"late", is_ours=False)
    server.end(ended, is_ours=False)
    for call_id in (answered, failed, ended):
        caller.cancel(call_id)
    assert carry(server, caller) == []
    assert carry(caller, server) == []


def test_cancelling_what_is_done_says_nothing(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.answer(call_id, b"")
    carry(server, caller)
    caller.cancel(call_id)
    caller.cancel(999)
    assert caller.data_to_send() == []


def test_a_call_withdrawn_in_the_same_breath_is_still_told_and_its_refusal_is_not_sent(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller)
    caller.cancel(call_id)
    called, cancelled = carry(caller, server)
    assert isinstance(called, Called)
    assert cancelled == Cancelled(call_id)
    server.refuse(call_id, Status.RESOURCE_EXHAUSTED, "no room")
    assert server.data_to_send() == []


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_call_fails_at_its_deadline_and_the_far_side_is_told(caller: RpcConnection, server: RpcConnection) -> None:
    soon, later = call(caller, timeout_s=1.0), call(caller, timeout_s=3.0)
    carry(caller, server)
    assert caller.next_deadline() == 1.0
    assert caller.expire(now=0.9) == []
    assert [failure(event) for event in caller.expire(now=1.0)] == [(soon, Status.DEADLINE_EXCEEDED)]
    assert carry(caller, server) == [Cancelled(soon)]
    assert caller.next_deadline() == 3.0
    server.answer(later, b"")
    carry(server, caller)
    assert caller.next_deadline() == math.inf


def test_the_server_stops_at_the_deadline_and_the_caller_learns_why(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller, timeout_s=1.0)
    carry(caller, server, now=50.0)
    assert server.next_deadline() == 51.0
    assert server.expire(now=51.0) == [Cancelled(call_id)]
    assert server.expire(now=52.0) == [], "told once"
    assert server.next_deadline() == math.inf
    assert server.answer(call_id, b"late") == 0
    assert [failure(event) for event in carry(server, caller)] == [(call_id, Status.DEADLINE_EXCEEDED)]


def test_a_deadline_that_both_sides_notice_is_one_outcome(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, timeout_s=1.0)
    carry(caller, server)
    assert [failure(event) for event in caller.expire(now=1.0)] == [(call_id, Status.DEADLINE_EXCEEDED)]
    assert server.expire(now=1.0) == [Cancelled(call_id)]
    assert carry(server, caller) == []
    assert carry(caller, server) == []


def test_a_stream_ends_at_its_deadline_however_lively(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, timeout_s=1.0, kind=DOWN)
    carry(caller, server)
    server.send_message(call_id, b"lively", is_ours=False)
    assert bodies(carry(server, caller)) == [b"lively"]
    assert [failure(event) for event in caller.expire(now=1.0)] == [(call_id, Status.DEADLINE_EXCEEDED)]
    assert carry(caller, server) == [Cancelled(call_id)]


def test_a_call_without_a_deadline_waits_for_ever_on_both_sides(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, timeout_s=math.inf)
    (event,) = carry(caller, server, now=5.0)
    assert isinstance(event, Called)
    assert event.deadline == math.inf
    assert caller.next_deadline() == server.next_deadline() == math.inf
    assert caller.expire(now=1e12) == server.expire(now=1e12) == []
    server.answer(call_id, b"at last")
    assert carry(server, caller) == [Answered(call_id, b"at last", ())]


@pytest.mark.parametrize("timeout_s", [0.0001, 0.0, -1.0])
def test_a_time_too_short_to_measure_is_still_a_time(
    caller: RpcConnection, server: RpcConnection, timeout_s: float
) -> None:
    call(caller, timeout_s=timeout_s)
    (event,) = carry(caller, server, now=5.0)
    assert isinstance(event, Called)
    assert 5.0 < event.deadline < 5.1


@pytest.mark.parametrize("timeout_ms", [1, 2**31, 2**64 - 1])
def test_any_time_that_a_stranger_names_is_only_a_time(server: RpcConnection, timeout_ms: int) -> None:
    (event,) = server.receive_data(wire(request(1, timeout_ms=timeout_ms)), now=10.0)
    assert isinstance(event, Called)
    assert event.deadline == 10.0 + timeout_ms / 1000


# --- call ids --------------------------------------------------------------------------------------------------------


def test_a_call_id_that_is_in_use_breaks_the_protocol(server: RpcConnection) -> None:
    with pytest.raises(ProtocolError, match="already in use"):
        server.receive_data(wire(request(7), request(7)), now=0.0)


def test_a_withdrawn_call_keeps_its_id_until_its_handler_is_done(server: RpcConnection) -> None:
    cancel = Frame(FrameType.CANCEL, 7)
    server.receive_data(wire(request(7), cancel), now=0.0)
    assert server.receive_data(wire(cancel), now=0.0) == [], "told once"
    server.answer(7, b"")
    assert len(server.receive_data(wire(request(7)), now=0.0)) == 1
    with pytest.raises(ProtocolError, match="already in use"):
        server.receive_data(wire(cancel, request(7)), now=0.0)


def test_an_answered_call_gives_its_id_back(server: RpcConnection) -> None:
    for _ in range(3):
        (event,) = server.receive_data(wire(request(7)), now=0.0)
        assert isinstance(event, Called)
        server.answer(7, b"")


def test_call_ids_start_over_and_pass_by_those_that_are_still_open(
    caller: RpcConnection, server: RpcConnection
) -> None:
    old = [call(caller, b"old", timeout_s=math.inf) for _ in range(2)]
    assert old == [1, 2]
    caller._next_call_id = 2**32 - 2  # as after so many calls
    new = [call(caller, b"new") for _ in range(3)]
    assert new == [2**32 - 2, 2**32 - 1, 3]
    assert len(carry(caller, server)) == 5
    server.answer(1, b"old")
    server.answer(3, b"new")
    assert carry(server, caller) == [Answered(1, b"old", ()), Answered(3, b"new", ())]
    assert call(caller) == 4, "an id that was just given back is not the next one to be used"


# --- answers of all sorts --------------------------------------------------------------------------------------------


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


def test_an_error_message_that_names_a_file_whose_name_is_no_text_still_arrives(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.fail(call_id, Status.NOT_FOUND, "there is no \udcff.bin")  # as os.fsdecode gives it
    (event,) = carry(server, caller)
    assert isinstance(event, Failed)
    assert event.error.message == "there is no ?.bin"


@pytest.mark.parametrize("kind", [FrameType.ANSWER, FrameType.ERROR, FrameType.CANCEL])
def test_what_is_said_of_a_call_that_was_never_made_is_ignored(caller: RpcConnection, kind: FrameType) -> None:
    header = encode(ErrorHeader(Status.UNKNOWN, "?")) if kind is FrameType.ERROR else b""
    assert caller.receive_data(wire(Frame(kind, 12345, header)), now=0.0) == []


def test_a_second_answer_is_ignored(caller: RpcConnection) -> None:
    call_id = call(caller)
    answer = Frame(FrameType.ANSWER, call_id, b"1")
    assert caller.receive_data(wire(answer, answer), now=0.0) == [Answered(call_id, b"1", ())]


def test_answering_twice_sends_once(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.answer(call_id, b"1")
    server.answer(call_id, b"2")
    server.fail(call_id, Status.INTERNAL, "no")
    assert carry(server, caller) == [Answered(call_id, b"1", ())]


def test_a_request_that_is_too_big_is_no_call(caller: RpcConnection) -> None:
    with pytest.raises(LimitError):
        call(caller, b"", [bytes(MAX_ATTACHMENT_BYTES + 1)])
    with pytest.raises(LimitError):
        call(caller, bytes(MAX_HEADER_BYTES))
    assert caller.num_open_calls == 0
    assert caller.unsent_bytes == 0
    assert caller.data_to_send() == []
    assert caller.next_deadline() == math.inf


def test_an_answer_that_is_too_big_leaves_the_call_to_be_failed(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    with pytest.raises(LimitError):
        server.answer(call_id, b"", [bytes(MAX_ATTACHMENT_BYTES + 1)])
    server.fail(call_id, Status.RESOURCE_EXHAUSTED, "too big")
    assert [failure(event) for event in carry(server, caller)] == [(call_id, Status.RESOURCE_EXHAUSTED)]


def test_more_than_this_streams_attachments_may_have_is_refused_by_both_sides() -> None:
    small, usual = RpcConnection(max_attachment_bytes=100_000), RpcConnection()
    with pytest.raises(LimitError):
        call(small, b"", [bytes(100_001)])
    call(usual, b"", [bytes(100_001)])
    with pytest.raises(LimitError):
        carry(usual, small)


def test_a_remote_error_names_its_status() -> None:
    assert str(RemoteError(Status.NOT_FOUND, "no such block")) == "NOT_FOUND: no such block"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_refused_call_fails_and_the_others_go_on(caller: RpcConnection, server: RpcConnection) -> None:
    refused, served = call(caller), call(caller)
    carry(caller, server)
    server.refuse(refused, Status.RESOURCE_EXHAUSTED, "come again")
    server.answer(served, b"")
    first, second = carry(server, caller)
    assert failure(first) == (refused, Status.RESOURCE_EXHAUSTED)
    assert second == Answered(served, b"", ())


def refuse_until_it_is_too_much(server: RpcConnection, call_ids: itertools.count[int]) -> int:
    """How many bytes of refusals gather until the server has had enough."""
    before = server.unsent_bytes
    while True:
        call_id = next(call_ids)
        server.receive_data(wire(request(call_id)), now=0.0)
        try:
            server.refuse(call_id, Status.RESOURCE_EXHAUSTED, "no room" * 100)
        except ProtocolError:
            return server.unsent_bytes - before


def test_who_calls_without_end_and_does_not_read_the_refusals_breaks_the_protocol(server: RpcConnection) -> None:
    gathered = refuse_until_it_is_too_much(server, itertools.count(1))
    assert MAX_REFUSED_BYTES < gathered < MAX_REFUSED_BYTES + 1000


def test_refusals_that_are_read_and_other_answers_do_not_count(server: RpcConnection) -> None:
    call_ids = itertools.count(1)
    call_id = next(call_ids)
    server.receive_data(wire(request(call_id)), now=0.0)
    server.answer(call_id, b"", [bytes(2 * MAX_REFUSED_BYTES)])
    for _ in range(100):
        call_id = next(call_ids)
        server.receive_data(wire(request(call_id)), now=0.0)
        server.refuse(call_id, Status.RESOURCE_EXHAUSTED, "no room" * 100)
    server.data_to_send()
    assert refuse_until_it_is_too_much(server, call_ids) > MAX_REFUSED_BYTES


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_of_answers(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, b"which", kind=DOWN)
    carry(caller, server)
    for n in range(3):
        server.send_message(call_id, bytes([n]), [b"bulk"], is_ours=False)
    cost = MESSAGE_OVERHEAD_BYTES + 5
    assert carry(server, caller) == [Message(call_id, True, bytes([n]), (b"bulk",), cost) for n in range(3)]
    server.end(call_id, is_ours=False)
    assert caller.num_open_calls == 1
    assert carry(server, caller) == [Ended(call_id, is_ours=True)]
    assert caller.num_open_calls == 0


def test_a_stream_of_requests(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=UP)
    carry(caller, server)
    for n in range(3):
        caller.send_message(call_id, bytes([n]), is_ours=True)
    assert carry(caller, server) == [
        Message(call_id, False, bytes([n]), (), MESSAGE_OVERHEAD_BYTES + 1) for n in range(3)
    ]
    caller.end(call_id, is_ours=True)
    caller.end(call_id, is_ours=True)
    assert carry(caller, server) == [Ended(call_id, is_ours=False)]
    server.answer(call_id, b"3 came")
    assert carry(server, caller) == [Answered(call_id, b"3 came", ())]


def test_streams_both_ways_at_the_same_time(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=BOTH)
    carry(caller, server)
    caller.send_message(call_id, b"ping", is_ours=True)
    assert bodies(carry(caller, server)) == [b"ping"]
    server.send_message(call_id, b"pong", is_ours=False)
    caller.end(call_id, is_ours=True)
    assert bodies(carry(server, caller)) == [b"pong"]
    assert carry(caller, server) == [Ended(call_id, is_ours=False)]
    server.send_message(call_id, b"after your end", is_ours=False)
    server.end(call_id, is_ours=False)
    last, ended = carry(server, caller)
    assert bodies([last]) == [b"after your end"]
    assert ended == Ended(call_id, is_ours=True)


@pytest.mark.parametrize("kind", [UP, BOTH])
def test_a_server_that_has_heard_enough_may_end_the_call_while_requests_are_on_their_way(
    caller: RpcConnection, server: RpcConnection, kind: CallKind
) -> None:
    call_id = call(caller, kind=kind)
    carry(caller, server)
    caller.send_message(call_id, b"under way", is_ours=True)
    caller.end(call_id, is_ours=True)
    if kind is UP:
        server.answer(call_id, b"enough")
    else:
        server.end(call_id, is_ours=False)
    assert carry(caller, server) == []
    (outcome,) = carry(server, caller)
    assert outcome == (Answered(call_id, b"enough", ()) if kind is UP else Ended(call_id, is_ours=True))
    caller.send_message(call_id, b"into the void", is_ours=True)
    assert caller.data_to_send() == []


def test_a_stream_may_fail_after_some_messages(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=DOWN)
    carry(caller, server)
    server.send_message(call_id, b"so far", is_ours=False)
    server.fail(call_id, Status.ABORTED, "and no further")
    said, failed = carry(server, caller)
    assert bodies([said]) == [b"so far"]
    assert failure(failed) == (call_id, Status.ABORTED)


# --- credit ----------------------------------------------------------------------------------------------------------


def test_a_sender_stops_when_its_reader_does_not_read(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=DOWN)
    carry(caller, server)
    for _ in range(2):
        assert not server.is_stopped(call_id, is_ours=False)
        server.send_message(call_id, b"", [HALF_WINDOW], is_ours=False)
    assert server.is_stopped(call_id, is_ours=False)
    with pytest.raises(ValueError, match="wait for Writable"):
        server.send_message(call_id, b"", is_ours=False)
    assert len(carry(server, caller)) == 2


def test_reading_lets_the_sender_go_on(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=DOWN)
    carry(caller, server)
    for _ in range(2):
        server.send_message(call_id, b"", [HALF_WINDOW], is_ours=False)
    first, _ = carry(server, caller)
    assert isinstance(first, Message)
    caller.consumed(call_id, first.num_bytes, is_ours=True)
    assert carry(caller, server) == [Writable(call_id, is_ours=False)]
    assert not server.is_stopped(call_id, is_ours=False)
    server.send_message(call_id, b"on", is_ours=False)
    assert bodies(carry(server, caller)) == [b"on"]


def test_one_message_may_take_a_stream_below_its_credit_and_it_pays_that_back(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller, kind=UP)
    carry(caller, server)
    largest = bytes(MAX_MESSAGE_BYTES - MESSAGE_OVERHEAD_BYTES)
    caller.send_message(call_id, b"", [bytes(STREAM_WINDOW_BYTES - MESSAGE_OVERHEAD_BYTES - 1)], is_ours=True)
    caller.send_message(call_id, b"", [largest], is_ours=True)
    first, second = carry(caller, server)
    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert first.num_bytes + second.num_bytes == MAX_STREAM_HELD_BYTES - 1
    server.consumed(call_id, first.num_bytes, is_ours=False)
    assert carry(server, caller) == [], "it still owes"
    assert caller.is_stopped(call_id, is_ours=True)
    server.consumed(call_id, second.num_bytes, is_ours=False)
    assert carry(server, caller) == [Writable(call_id, is_ours=True)]


def test_empty_messages_are_not_free(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=UP)
    num_sent = 0
    while not caller.is_stopped(call_id, is_ours=True):
        caller.send_message(call_id, b"", is_ours=True)
        num_sent += 1
    assert num_sent == STREAM_WINDOW_BYTES // MESSAGE_OVERHEAD_BYTES


def test_small_messages_cost_few_credits(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=UP)
    carry(caller, server)
    num_credits = 0
    for _ in range(1000):
        caller.send_message(call_id, bytes(1000), is_ours=True)
        for event in carry(caller, server):
            assert isinstance(event, Message)
            server.consumed(call_id, event.num_bytes, is_ours=False)
        num_credits += server.unsent_bytes > 0
        assert carry(server, caller) == [], "it was never stopped"
    assert num_credits == 1000 * (1000 + MESSAGE_OVERHEAD_BYTES) // (STREAM_WINDOW_BYTES // 4)


def test_the_two_directions_of_a_call_have_a_credit_each(caller: RpcConnection, server: RpcConnection) -> None:
    call_id, other = call(caller, kind=BOTH), call(caller, kind=BOTH)
    carry(caller, server)
    for _ in range(2):
        caller.send_message(call_id, b"", [HALF_WINDOW], is_ours=True)
    assert caller.is_stopped(call_id, is_ours=True)
    assert not caller.is_stopped(other, is_ours=True)
    assert not server.is_stopped(call_id, is_ours=False)
    server.send_message(call_id, b"still here", is_ours=False)
    assert bodies(carry(server, caller)) == [b"still here"]


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_message_beyond_the_credit_breaks_the_protocol(connection_in: Any, is_ours: bool) -> None:
    connection, call_id = connection_in(BOTH, is_ours=is_ours)
    full = [message(call_id, HALF_WINDOW, by_caller=not is_ours)] * 2
    assert len(connection.receive_data(wire(*full), now=0.0)) == 2
    with pytest.raises(ProtocolError, match="beyond the credit"):
        connection.receive_data(wire(message(call_id, by_caller=not is_ours)), now=0.0)


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("amounts", [(2**31,), (-1,), (2**63,), (2**30, 2**30)])
def test_a_credit_without_measure_is_refused(connection_in: Any, is_ours: bool, amounts: tuple[int, ...]) -> None:
    connection, call_id = connection_in(BOTH, is_ours=is_ours)
    frames = [credit(call_id, amount, by_caller=not is_ours) for amount in amounts]
    assert connection.receive_data(wire(*frames[:-1]), now=0.0) == []
    with pytest.raises(LimitError, match="credit"):
        connection.receive_data(wire(frames[-1]), now=0.0)


def test_a_message_that_is_too_big_is_not_sent_and_costs_nothing(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller, kind=UP)
    carry(caller, server)
    over = MAX_MESSAGE_BYTES - MESSAGE_OVERHEAD_BYTES + 1
    with pytest.raises(LimitError, match="in bulk"):
        caller.send_message(call_id, b"", [bytes(over)], is_ours=True)
    with pytest.raises(LimitError, match="in bulk"):
        caller.send_message(call_id, b"", [array("d", [0.0] * (over // 8 + 1))], is_ours=True)  # type: ignore[list-item]
    with pytest.raises(LimitError, match="header"):
        caller.send_message(call_id, bytes(MAX_HEADER_BYTES + 1), is_ours=True)
    assert caller.unsent_bytes == 0
    for _ in range(2):
        caller.send_message(call_id, b"", [HALF_WINDOW], is_ours=True)
    assert len(carry(caller, server)) == 2


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_message_that_is_too_big_is_not_taken(connection_in: Any, is_ours: bool) -> None:
    connection, call_id = connection_in(BOTH, is_ours=is_ours)
    over = bytes(MAX_MESSAGE_BYTES - MESSAGE_OVERHEAD_BYTES + 1)
    with pytest.raises(LimitError, match="in bulk"):
        connection.receive_data(wire(message(call_id, over, by_caller=not is_ours)), now=0.0)


def test_a_message_that_is_small_only_while_compressed_is_not_taken(server: RpcConnection) -> None:
    server.receive_data(wire(request(1, UP)), now=0.0)
    pieces = encode_frame(message(1, bytes(2**20), bytes(2**20)), compress=True)
    assert sum(map(len, pieces)) < 10_000
    with pytest.raises(LimitError, match="in bulk"):
        server.receive_data(b"".join(pieces), now=0.0)


def test_nothing_is_lost_or_reordered_between_a_fast_sender_and_a_slow_reader(
    caller: RpcConnection, server: RpcConnection
) -> None:
    call_id = call(caller, kind=DOWN)
    carry(caller, server)
    to_send = [(n.to_bytes(2), bytes(n * 7919 % 300_000)) for n in range(200)]
    waiting, inbox, read = list(reversed(to_send)), list[Message](), list[tuple[Buffer, bytes]]()
    while len(read) < len(to_send):
        while waiting and not server.is_stopped(call_id, is_ours=False):
            body, bulk = waiting.pop()
            server.send_message(call_id, body, [bulk], is_ours=False)
        for event in carry(server, caller):
            assert isinstance(event, Message)
            inbox.append(event)
        assert sum(one.num_bytes for one in inbox) <= MAX_STREAM_HELD_BYTES
        one = inbox.pop(0)
        read.append((one.body, bytes(one.attachments[0])))
        caller.consumed(call_id, one.num_bytes, is_ours=True)
        carry(caller, server)
    assert read == to_send


# --- who breaks the protocol -----------------------------------------------------------------------------------------


@pytest.fixture
def connection_in() -> Any:
    """Makes a connection that is in one call of a kind, its own or the far side's; with the call's id."""

    def make(kind: CallKind, *, is_ours: bool) -> tuple[RpcConnection, int]:
        connection = RpcConnection()
        if is_ours:
            return connection, call(connection, kind=kind)
        connection.receive_data(wire(request(1, kind)), now=0.0)
        return connection, 1

    return make


@pytest.mark.parametrize("frame_type", [FrameType.MESSAGE, FrameType.END])
@pytest.mark.parametrize(
    ("kind", "is_ours"),
    [(UNARY, True), (UNARY, False), (UP, True), (DOWN, False)],
)
def test_a_message_from_a_side_that_has_no_stream_breaks_the_protocol(
    connection_in: Any, kind: CallKind, is_ours: bool, frame_type: FrameType
) -> None:
    connection, call_id = connection_in(kind, is_ours=is_ours)
    with pytest.raises(ProtocolError):
        connection.receive_data(wire(Frame(frame_type, call_id, flags=0 if is_ours else FROM_CALLER)), now=0.0)


@pytest.mark.parametrize("frame_type", [FrameType.MESSAGE, FrameType.END])
def test_a_message_after_the_end_breaks_the_protocol(connection_in: Any, frame_type: FrameType) -> None:
    connection, call_id = connection_in(UP, is_ours=False)
    connection.receive_data(wire(Frame(FrameType.END, call_id, flags=FROM_CALLER)), now=0.0)
    with pytest.raises(ProtocolError, match="after the end"):
        connection.receive_data(wire(Frame(frame_type, call_id, flags=FROM_CALLER)), now=0.0)


def test_one_answer_to_a_call_for_a_stream_breaks_the_protocol(connection_in: Any) -> None:
    connection, call_id = connection_in(DOWN, is_ours=True)
    with pytest.raises(ProtocolError, match="answered by a stream"):
        connection.receive_data(wire(Frame(FrameType.ANSWER, call_id)), now=0.0)
    assert [failure(event) for event in connection.close("broken")] == [(call_id, Status.UNAVAILABLE)]


@pytest.mark.parametrize("frame_type", [FrameType.MESSAGE, FrameType.END, FrameType.CREDIT])
@pytest.mark.parametrize("flags", [0, FROM_CALLER])
def test_messages_of_a_call_that_is_over_are_ignored(caller: RpcConnection, frame_type: FrameType, flags: int) -> None:
    assert caller.receive_data(wire(Frame(frame_type, 5, b"", (), flags)), now=0.0) == []


GOOD_HEADER = {"body": b"", "kind": 0, "method": "a.b", "timeout_ms": 1}


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"\xc1", encode(5), encode({})),
        *(
            msgpack.packb({key: GOOD_HEADER[key] for key in GOOD_HEADER if key != left})
            for left in ("method", "timeout_ms")
        ),
        *(msgpack.packb(GOOD_HEADER | {"method": wrong}) for wrong in (1, b"a.b", None)),
        *(msgpack.packb(GOOD_HEADER | {"timeout_ms": wrong}) for wrong in (-1, 1.0, "1", True, None)),
        *(msgpack.packb(GOOD_HEADER | {"body": wrong}) for wrong in ("text", 1, None, [1])),
        *(msgpack.packb(GOOD_HEADER | {"kind": wrong}) for wrong in (4, -1, True, 1.0, "0", None, [1])),
        msgpack.packb(GOOD_HEADER) + b"\x00",
    ],
)
def test_a_request_that_cannot_be_read_breaks_the_protocol(server: RpcConnection, header: bytes) -> None:
    with pytest.raises(ProtocolError):
        server.receive_data(wire(Frame(FrameType.REQUEST, 1, header)), now=0.0)
    assert server.close("broken") == [], "it was no call"


def test_a_request_header_may_leave_out_what_has_a_default_and_say_more_than_is_known() -> None:
    header = msgpack.packb({"method": "a.b", "timeout_ms": 5, "later": [1, 2]})
    assert read_request_header(header) == ("a.b", 5, b"", UNARY)


@given(st.text(max_size=50), st.integers(0, 2**64 - 1), st.binary(max_size=50), st.sampled_from(CallKind))
def test_a_request_header_is_read_as_it_was_written_and_is_canonical(
    method: str, timeout_ms: int, body: bytes, kind: CallKind
) -> None:
    header = request_header(method, timeout_ms, body, kind)
    assert read_request_header(header) == (method, timeout_ms, body, kind)
    assert header == encode({"method": method, "timeout_ms": timeout_ms, "body": body, "kind": int(kind)})


@pytest.mark.parametrize(
    "header",
    [b"", b"\xc1", encode({"status": 5}), encode({"status": 17, "message": ""}), encode({"status": 5, "message": b""})],
)
def test_an_error_that_cannot_be_read_breaks_the_protocol(caller: RpcConnection, header: bytes) -> None:
    call_id = call(caller)
    with pytest.raises(ProtocolError):
        caller.receive_data(wire(Frame(FrameType.ERROR, call_id, header)), now=0.0)
    assert [failure(event) for event in caller.close("broken")] == [(call_id, Status.UNAVAILABLE)]


@pytest.mark.parametrize("header", [b"", encode({}), encode({"num_bytes": "1"}), encode({"num_bytes": True})])
def test_a_credit_that_cannot_be_read_breaks_the_protocol(connection_in: Any, header: bytes) -> None:
    connection, call_id = connection_in(BOTH, is_ours=True)
    with pytest.raises(ProtocolError):
        connection.receive_data(wire(Frame(FrameType.CREDIT, call_id, header)), now=0.0)


# --- the end of a stream ---------------------------------------------------------------------------------------------


def test_closing_fails_everything_that_is_open_in_both_directions(caller: RpcConnection, server: RpcConnection) -> None:
    ours = [call(caller), call(caller, kind=DOWN), call(caller, kind=UP)]
    theirs = [call(server), call(server, kind=BOTH)]
    carry(server, caller)
    events = caller.close("the cable was cut")
    failed = [event for event in events if isinstance(event, Failed)]
    assert [failure(event) for event in failed] == [(call_id, Status.UNAVAILABLE) for call_id in ours]
    assert all("the cable was cut" in str(event.error) for event in failed)
    assert [event for event in events if event not in failed] == [Cancelled(call_id) for call_id in theirs]
    assert caller.unsent_bytes == 0
    assert caller.data_to_send() == []
    assert caller.next_deadline() == math.inf
    assert caller.close("again") == []


def test_closing_does_not_withdraw_a_call_twice(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    caller.cancel(call_id)
    assert carry(caller, server) == [Cancelled(call_id)]
    assert server.close("gone") == []


UNREADABLE = Frame(FrameType.REQUEST, 99, b"\xc1")


def test_what_came_before_the_bytes_that_broke_the_protocol_still_counts(caller: RpcConnection) -> None:
    answered, refused, open_call = call(caller), call(caller), call(caller)
    ended, cut_short = call(caller, kind=DOWN), call(caller, kind=DOWN)
    came = (
        Frame(FrameType.ANSWER, answered, b"in time"),
        message(ended, body=b"all", by_caller=False),
        Frame(FrameType.END, ended),
        Frame(FrameType.ERROR, refused, encode(ErrorHeader(Status.NOT_FOUND, "no"))),
        message(cut_short, body=b"some", by_caller=False),
    )
    with pytest.raises(ProtocolError):
        caller.receive_data(wire(*came, UNREADABLE), now=0.0)
    told = caller.close("protocol error")
    assert told[0] == Answered(answered, b"in time", ())
    assert bodies(told[1:2]) == [b"all"]
    assert told[2] == Ended(ended, is_ours=True)
    assert failure(told[3]) == (refused, Status.NOT_FOUND)
    assert bodies(told[4:5]) == [b"some"]
    assert [failure(event) for event in told[5:]] == [
        (open_call, Status.UNAVAILABLE),
        (cut_short, Status.UNAVAILABLE),
    ]
    assert caller.close("again") == [], "told once"


def test_a_call_of_which_nobody_was_told_does_not_start_any_more(server: RpcConnection) -> None:
    with pytest.raises(ProtocolError):
        server.receive_data(wire(request(1), UNREADABLE), now=0.0)
    assert not any(isinstance(event, Called) for event in server.close("protocol error"))


def test_a_handler_learns_once_that_it_was_withdrawn_before_the_bytes_that_broke_the_protocol(
    server: RpcConnection,
) -> None:
    server.receive_data(wire(request(1)), now=0.0)
    with pytest.raises(ProtocolError):
        server.receive_data(wire(Frame(FrameType.CANCEL, 1), UNREADABLE), now=0.0)
    assert server.close("protocol error") == [Cancelled(1)]


def test_drain_is_told_and_the_calls_under_way_go_on(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    server.drain()
    assert carry(server, caller) == [Draining()]
    server.answer(call_id, b"the last")
    assert carry(server, caller) == [Answered(call_id, b"the last", ())]


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_unsent_bytes_are_those_that_wait_to_be_written(caller: RpcConnection) -> None:
    assert caller.unsent_bytes == 0
    call(caller, b"small")
    call(caller, b"", [bytes(50_000), bytes(3)])
    call_id = call(caller, kind=UP)
    caller.send_message(call_id, b"", [memoryview(array("d", [1.0] * 1000))], is_ours=True)
    caller.cancel(call_id)
    waiting = caller.unsent_bytes
    pieces = caller.data_to_send()
    assert waiting == sum(memoryview(piece).nbytes for piece in pieces)
    assert caller.unsent_bytes == 0
    assert caller.data_to_send() == []


def test_what_could_not_be_written_goes_out_first(caller: RpcConnection, server: RpcConnection) -> None:
    first = call(caller, b"first")
    data = b"".join(caller.data_to_send())
    second = call(caller, b"second")
    waiting = caller.unsent_bytes
    caller.put_back(data)
    assert caller.unsent_bytes == waiting + len(data)
    assert [event.call_id for event in carry(caller, server) if isinstance(event, Called)] == [first, second]


def test_buffered_bytes_are_those_of_the_frame_that_is_not_whole_yet(server: RpcConnection) -> None:
    data = wire(request(1), request(2))
    half = len(data) // 2
    assert server.buffered_bytes == 0
    assert len(server.receive_data(data[: half + 5], now=0.0)) == 1
    assert server.buffered_bytes == 5
    assert server.receive_data(data[half + 5 : -1], now=0.0) == []
    assert server.buffered_bytes == half - 1
    assert len(server.receive_data(data[-1:], now=0.0)) == 1
    assert server.buffered_bytes == 0


def test_bulk_bytes_pass_through_without_a_copy(caller: RpcConnection, server: RpcConnection) -> None:
    request_bulk, message_bulk = bytes(100_000), memoryview(bytes(100_000))
    call_id = call(caller, b"", [request_bulk], kind=BOTH)
    caller.send_message(call_id, b"", [message_bulk], is_ours=True)
    pieces = caller.data_to_send()
    assert any(piece is request_bulk for piece in pieces)
    assert any(piece is message_bulk for piece in pieces)
    data = b"".join(pieces)
    for event in server.receive_data(data, now=0.0):
        assert isinstance(event, Called | Message)
        (received,) = event.attachments
        assert isinstance(received, memoryview)
        assert received.obj is data
        assert received.readonly


@pytest.mark.parametrize("reader_compresses", [True, False])
def test_compression_makes_less_of_what_shrinks_and_all_arrives_as_it_was(reader_compresses: bool) -> None:
    caller, server = RpcConnection(compress=True), RpcConnection(compress=reader_compresses)
    text, noise = b"to and fro " * 10_000, bytes((n * n * 2654435761 >> 13) % 256 for n in range(5000))
    call_id = call(caller, text, [text, noise, b"short"], kind=UP)
    caller.send_message(call_id, text, [text], is_ours=True)
    assert caller.unsent_bytes < len(text)
    called, said = carry(caller, server)
    assert isinstance(called, Called)
    assert isinstance(said, Message)
    assert (called.body, [bytes(one) for one in called.attachments]) == (text, [text, noise, b"short"])
    assert (said.body, [bytes(one) for one in said.attachments]) == (text, [text])
    assert called.num_bytes == 2 * len(text) + len(noise) + 5, "what it takes here, not on the way"
    assert said.num_bytes == 2 * len(text) + MESSAGE_OVERHEAD_BYTES


def test_both_sides_count_the_credit_of_compressed_messages_alike() -> None:
    caller, server = RpcConnection(compress=True), RpcConnection(compress=True)
    call_id = call(caller, kind=UP)
    carry(caller, server)
    for _ in range(50):
        caller.send_message(call_id, b"", [HALF_WINDOW], is_ours=True)
        for event in carry(caller, server):
            assert isinstance(event, Message)
            server.consumed(call_id, event.num_bytes, is_ours=False)
        carry(server, caller)
        assert not caller.is_stopped(call_id, is_ours=True)


# --- whatever happens, in whatever order -----------------------------------------------------------------------------


@dataclass
class Stream:
    """One direction of a call: what was sent, and what came of it."""

    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    unread: list[Message] = field(default_factory=list)
    is_ended: bool = False  # by its sender
    is_whole: bool = False  # says its reader's side


@dataclass
class Made:
    """One call, as an onlooker sees it who knows both ends."""

    kind: CallKind
    requests: Stream = field(default_factory=Stream)
    answers: Stream = field(default_factory=Stream)
    replied: bytes | Status | None = None  # what the far side let it end in
    is_cancelled: bool = False  # by its caller
    is_withdrawn: bool = False  # says the server's side
    is_done: bool = False  # at the server's side
    outcomes: list[Answered | Failed | Ended] = field(default_factory=list)


class End:
    """One connection, with the calls that a shell would know of."""

    def __init__(self, *, compress: bool) -> None:
        self.connection = RpcConnection(compress=compress)
        self.ours: dict[int, Made] = {}  # until their outcome
        self.theirs: dict[int, Made] = {}  # until we are done
        self.wire = b""  # on its way to the other end

    def streams(self) -> list[tuple[int, bool, Made, Stream, Stream]]:
        """Of each open call: its id, whether it is ours, itself, the stream to the far side and that from it."""
        ours = [(call_id, True, made, made.requests, made.answers) for call_id, made in self.ours.items()]
        return ours + [(call_id, False, made, made.answers, made.requests) for call_id, made in self.theirs.items()]


class Link:
    """Two ends, the bytes between them, and a clock. Each verb is one thing that may happen, if it can."""

    TIMEOUTS_S = (math.inf, 1.0, 2.0, 60.0)
    SIZES = (0, 10, 100_000, 400_000, 1_500_000)
    PORTIONS = (10**9, 1, 50, 1000, 10**9)

    def __init__(self, *, compress: bool = False) -> None:
        self.ends = (End(compress=compress), End(compress=False))
        self.calls: list[Made] = []
        self.now = 0.0
        self.num_messages = 0

    def call(self, who: int, pick: int, choice: int) -> None:
        made = Made(CallKind(pick % 4))
        timeout_s = self.TIMEOUTS_S[choice % 4]
        body = str(len(self.calls)).encode()
        self.calls.append(made)
        call_id = self.ends[who].connection.call("a.b", body, timeout_s=timeout_s, now=self.now, kind=made.kind)
        assert call_id not in self.ends[who].ours
        self.ends[who].ours[call_id] = made

    def cancel(self, who: int, pick: int, _: int) -> None:
        end = self.ends[who]
        if end.ours:
            call_id = list(end.ours)[pick % len(end.ours)]
            end.connection.cancel(call_id)
            end.ours.pop(call_id).is_cancelled = True

    def reply(self, who: int, pick: int, choice: int) -> None:
        end = self.ends[who]
        if not end.theirs:
            return
        call_id = list(end.theirs)[pick % len(end.theirs)]
        made = end.theirs.pop(call_id)
        made.is_done = made.answers.is_ended = True
        if choice % 4 == 3:
            made.replied = Status.NOT_FOUND
            end.connection.fail(call_id, made.replied, "no")
        elif made.kind.streams_answers:
            end.connection.end(call_id, is_ours=False)
        else:
            made.replied = f"reply {call_id}".encode()
            end.connection.answer(call_id, made.replied)

    def send(self, who: int, pick: int, choice: int) -> None:
        end = self.ends[who]
        open_streams = [
            (call_id, is_ours, made, to)
            for call_id, is_ours, made, to, _ in end.streams()
            if (made.kind.streams_requests if is_ours else made.kind.streams_answers)
            and not to.is_ended
            and not end.connection.is_stopped(call_id, is_ours=is_ours)
        ]
        if open_streams:
            call_id, is_ours, made, to = open_streams[pick % len(open_streams)]
            self.num_messages += 1
            bulk = bytes(self.SIZES[choice % len(self.SIZES)])
            end.connection.send_message(call_id, str(self.num_messages).encode(), [bulk], is_ours=is_ours)
            if is_ours or not made.is_withdrawn:
                to.sent.append(self.num_messages)

    def finish(self, who: int, pick: int, _: int) -> None:
        end = self.ends[who]
        unfinished = [
            item for item in end.ours.items() if item[1].kind.streams_requests and not item[1].requests.is_ended
        ]
        if unfinished:
            call_id, made = unfinished[pick % len(unfinished)]
            made.requests.is_ended = True
            end.connection.end(call_id, is_ours=True)

    def read(self, who: int, pick: int, _: int) -> None:
        end = self.ends[who]
        with_messages = [entry for entry in end.streams() if entry[4].unread]
        if with_messages:
            call_id, is_ours, _made, _to, back = with_messages[pick % len(with_messages)]
            one = back.unread.pop(0)
            end.connection.consumed(call_id, one.num_bytes, is_ours=is_ours)

    def carry(self, who: int, _: int, choice: int) -> None:
        source, target = self.ends[who], self.ends[1 - who]
        waiting = source.connection.unsent_bytes
        data = b"".join(source.connection.data_to_send())
        assert len(data) == waiting
        source.wire += data
        num_bytes = self.PORTIONS[choice % len(self.PORTIONS)]
        arrived, source.wire = source.wire[:num_bytes], source.wire[num_bytes:]
        self.learn(target, target.connection.receive_data(arrived, self.now))

    def wait(self, who: int, pick: int, _: int) -> None:
        self.now += pick % 3 / 2
        end = self.ends[who]
        self.learn(end, end.connection.expire(self.now))
        assert end.connection.next_deadline() > self.now

    def learn(self, end: End, events: list[Event]) -> None:
        """Note what an end is told, which must fit to what was done."""
        for event in events:
            match event:
                case Called(call_id, body=body):
                    assert call_id not in end.theirs
                    end.theirs[call_id] = self.calls[int(bytes(body))]
                case Cancelled(call_id):
                    assert not end.theirs[call_id].is_withdrawn, "withdrawn twice"
                    end.theirs[call_id].is_withdrawn = True
                case Answered(call_id, body):
                    made = end.ours.pop(call_id)
                    assert body == made.replied
                    made.outcomes.append(event)
                case Failed(call_id, error):
                    made = end.ours.pop(call_id)
                    assert error.status in (made.replied, Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
                    made.outcomes.append(event)
                case Message(call_id, is_ours, body):
                    stream = end.ours[call_id].answers if is_ours else end.theirs[call_id].requests
                    assert is_ours or not end.theirs[call_id].is_withdrawn
                    stream.received.append(int(bytes(body)))
                    stream.unread.append(event)
                    assert stream.received == stream.sent[: len(stream.received)], "lost, doubled or out of order"
                    assert sum(one.num_bytes for one in stream.unread) <= MAX_STREAM_HELD_BYTES
                case Ended(call_id, is_ours):
                    made = end.ours.pop(call_id) if is_ours else end.theirs[call_id]
                    stream = made.answers if is_ours else made.requests
                    assert stream.is_ended
                    assert stream.received == stream.sent, "ended before all was there"
                    stream.is_whole = True
                    if is_ours:
                        made.outcomes.append(event)
                case Writable(call_id, is_ours):
                    assert call_id in (end.ours if is_ours else end.theirs)
                    assert not end.connection.is_stopped(call_id, is_ours=is_ours)
                case Draining():
                    raise AssertionError("nobody drains here")

    def settle(self) -> None:
        """Let everything come to its end: streams are finished and read, calls answered."""
        is_quiet = False
        while not is_quiet:
            is_quiet = True
            for who, end in enumerate(self.ends):
                for pick in reversed(range(len(end.ours))):
                    self.finish(who, pick, 0)
                while any(entry[4].unread for entry in end.streams()):
                    self.read(who, 0, 0)
                for pick in reversed(range(len(end.theirs))):
                    made = list(end.theirs.values())[pick]
                    if made.requests.is_whole or made.is_withdrawn or not made.kind.streams_requests:
                        self.reply(who, pick, 0)
                is_quiet = is_quiet and not end.connection.unsent_bytes and not end.wire
                self.carry(who, 0, len(self.PORTIONS) - 1)

    def cut(self) -> None:
        """The stream is gone; each end notices for itself."""
        for end in self.ends:
            self.learn(end, end.connection.close("cut"))
            assert all(made.is_withdrawn for made in end.theirs.values()), "a handler goes on for nobody"
            assert end.connection.num_open_calls == 0
            assert end.connection.data_to_send() == []
            assert end.connection.next_deadline() == math.inf


VERBS = (
    *(Link.call, Link.carry, Link.carry, Link.send, Link.send, Link.carry, Link.carry, Link.read, Link.send, Link.call),
    *(Link.finish, Link.reply, Link.cancel, Link.wait),
)
steps = st.lists(
    st.tuples(st.sampled_from(VERBS), st.integers(0, 1), st.integers(0, 7), st.integers(0, 59)),
    min_size=60,
    max_size=200,
)
Steps = list[tuple[Callable[[Link, int, int, int], None], int, int, int]]


def play(steps_taken: Steps, *, compress: bool) -> Link:
    link = Link(compress=compress)
    for verb, who, pick, choice in steps_taken:
        verb(link, who, pick, choice)
        for end in link.ends:
            assert end.connection.num_open_calls == len(end.ours)
    return link


def assert_one_outcome_each(link: Link) -> None:
    for made in link.calls:
        assert len(made.outcomes) == (0 if made.is_cancelled else 1), made


@given(steps, st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_call_has_one_outcome_wherever_the_stream_is_cut(steps_taken: Steps, compress: bool) -> None:
    link = play(steps_taken, compress=compress)
    link.cut()
    assert_one_outcome_each(link)


@given(steps, st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_call_has_the_outcome_it_was_given_and_streams_arrive_whole_if_nothing_is_cut(
    steps_taken: Steps, compress: bool
) -> None:
    link = play(steps_taken, compress=compress)
    link.settle()
    assert_one_outcome_each(link)
    for made in link.calls:
        assert made.is_done
        for outcome in made.outcomes:
            is_late = isinstance(outcome, Failed) and outcome.error.status is Status.DEADLINE_EXCEEDED
            assert is_late or isinstance(outcome, Failed) == (made.replied is Status.NOT_FOUND)
    for end in link.ends:
        assert end.connection.buffered_bytes == 0
        assert end.connection.close("done") == []
