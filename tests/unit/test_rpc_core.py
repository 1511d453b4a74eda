"""Two connections back to back, without a network or a clock: calls, and how each comes to its one outcome."""

from __future__ import annotations

import itertools
import math
from array import array

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, RemoteError, Status, TooLargeError
from shoal.protocol.frames import Frame, FrameType
from shoal.protocol.limits import (
    MAX_ATTACHMENT_BYTES,
    MAX_ERROR_CHARS,
    MAX_HEADER_BYTES,
    MAX_REFUSED_BYTES,
    STREAM_WINDOW_BYTES,
)
from shoal.protocol.rpc import (
    MESSAGE_OVERHEAD_BYTES,
    Answered,
    Called,
    Cancelled,
    Draining,
    Ended,
    ErrorHeader,
    Failed,
    Message,
    RpcConnection,
    read_request_header,
    request_header,
)
from shoal.protocol.services import CallKind

from .connections import BOTH, DOWN, HALF_WINDOW, UNARY, UP, bodies, call, carry, failure, message, request, wire


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
    with pytest.raises(TooLargeError):
        call(caller, b"", [bytes(MAX_ATTACHMENT_BYTES + 1)])
    with pytest.raises(TooLargeError):
        call(caller, bytes(MAX_HEADER_BYTES))
    assert caller.num_open_calls == 0
    assert caller.unsent_bytes == 0
    assert caller.data_to_send() == []
    assert caller.next_deadline() == math.inf


def test_an_answer_that_is_too_big_leaves_the_call_to_be_failed(caller: RpcConnection, server: RpcConnection) -> None:
    call_id = call(caller)
    carry(caller, server)
    with pytest.raises(TooLargeError):
        server.answer(call_id, b"", [bytes(MAX_ATTACHMENT_BYTES + 1)])
    server.fail(call_id, Status.RESOURCE_EXHAUSTED, "too big")
    assert [failure(event) for event in carry(server, caller)] == [(call_id, Status.RESOURCE_EXHAUSTED)]


def test_more_than_this_streams_attachments_may_have_is_refused_by_both_sides() -> None:
    small, usual = RpcConnection(max_attachment_bytes=100_000), RpcConnection()
    with pytest.raises(TooLargeError):
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


# --- headers ---------------------------------------------------------------------------------------------------------


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


def test_what_a_stranger_says_of_a_failure_reaches_no_terminal_as_it_is(caller: RpcConnection) -> None:
    call_id = call(caller)
    header = encode(ErrorHeader(Status.OK, "\x1b[2Jgone\nroot: owned"))
    (event,) = caller.receive_data(wire(Frame(FrameType.ERROR, call_id, header)), now=0.0)
    assert failure(event) == (call_id, Status.UNKNOWN)
    assert isinstance(event, Failed)
    assert event.error.message == "?[2Jgone?root: owned"
