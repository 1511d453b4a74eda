"""Streams of messages between two connections: their order, their credit, and who breaks their rules."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from shoal.protocol.codec import Buffer, encode
from shoal.protocol.errors import LimitError, ProtocolError, Status, TooLargeError
from shoal.protocol.frames import FROM_CALLER, Frame, FrameType, encode_frame
from shoal.protocol.limits import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, MAX_STREAM_HELD_BYTES, STREAM_WINDOW_BYTES
from shoal.protocol.rpc import MESSAGE_OVERHEAD_BYTES, Answered, Ended, Message, RpcConnection, Writable
from shoal.protocol.services import CallKind

from .connections import (
    BOTH,
    DOWN,
    HALF_WINDOW,
    UNARY,
    UP,
    bodies,
    call,
    carry,
    credit,
    failure,
    message,
    request,
    wire,
)


@pytest.fixture
def caller() -> RpcConnection:
    return RpcConnection()


@pytest.fixture
def server() -> RpcConnection:
    return RpcConnection()


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
@pytest.mark.parametrize("amounts", [(1,), (-1,), (2**63,), (0, STREAM_WINDOW_BYTES)])
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
    with pytest.raises(TooLargeError, match="in bulk"):
        caller.send_message(call_id, b"", [bytes(over)], is_ours=True)
    with pytest.raises(TooLargeError, match="in bulk"):
        caller.send_message(call_id, b"", [array("d", [0.0] * (over // 8 + 1))], is_ours=True)  # type: ignore[list-item]
    with pytest.raises(TooLargeError, match="header"):
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


@pytest.mark.parametrize("header", [b"", encode({}), encode({"num_bytes": "1"}), encode({"num_bytes": True})])
def test_a_credit_that_cannot_be_read_breaks_the_protocol(connection_in: Any, header: bytes) -> None:
    connection, call_id = connection_in(BOTH, is_ours=True)
    with pytest.raises(ProtocolError):
        connection.receive_data(wire(Frame(FrameType.CREDIT, call_id, header)), now=0.0)
