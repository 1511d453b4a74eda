"""Whatever a peer does: what it holds of a node stays within bounds, and what is not the protocol closes its stream."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shoal.node.wire.channel import Account, Channel
from shoal.protocol.codec import encode, encode_message
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.frames import FROM_CALLER, Frame, FrameType
from shoal.protocol.limits import MAX_CALLS_IN_FLIGHT, MAX_HEADER_BYTES, MAX_REFUSED_BYTES
from shoal.protocol.rpc import ErrorHeader, request_header
from shoal.protocol.services import Empty, client

from .channels import (
    KIB,
    MIB,
    Gate,
    Parcel,
    Probe,
    Question,
    Reply,
    ask,
    channel_to_a_stranger,
    failure,
    never,
    pair_of_channels,
    read_all,
    read_frames,
    request,
    send_all_or_break,
    still_works,
    wire,
)

pytestmark = pytest.mark.trio


async def until_gone(channel: Channel) -> None:
    """Return once the channel takes no calls any more."""
    while channel.is_open:
        await trio.testing.wait_all_tasks_blocked()


async def is_settled(account: Account) -> None:
    """All has been given back, once what is under way is over."""
    await trio.testing.wait_all_tasks_blocked()
    budget = account.budget
    assert (budget.num_calls, budget.held_bytes, budget.buffered_bytes) == (0, 0, 0)


# --- what a peer may have at once ---


async def test_more_calls_over_all_streams_than_one_peer_may_have_are_refused_until_some_are_answered() -> None:
    account, gate = Account(), Gate()
    statuses: list[Status] = []
    async with pair_of_channels(gate, account=account) as one, pair_of_channels(gate, account=account) as other:
        async with trio.open_nursery() as nursery:
            for number in range(MAX_CALLS_IN_FLIGHT):
                nursery.start_soon(ask, (one, other)[number % 2].to_bob, statuses)
            await trio.testing.wait_all_tasks_blocked()
            error = await failure(other.to_bob.double(Question(1)))
            assert error.status is Status.RESOURCE_EXHAUSTED
            gate.release.set()
        assert statuses == [Status.OK] * MAX_CALLS_IN_FLIGHT
        await still_works(other.to_bob)
        await is_settled(account)


async def test_calls_wait_for_the_memory_of_their_answers_and_do_not_fail() -> None:
    account, gate = Account(max_bytes=4 * MIB + MIB // 2), Gate()
    async with pair_of_channels(gate, account=account) as pair:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(pair.to_bob.bulky, Parcel(bytes(1000)))
            await trio.testing.wait_all_tasks_blocked()
            assert gate.num_waiting == 4
            assert account.budget.held_bytes <= 4 * MIB + MIB // 2
            gate.release.set()
        assert gate.num_started == 20
        await is_settled(account)


async def test_calls_whose_requests_leave_no_room_for_an_answer_are_served_one_by_one() -> None:
    account, gate = Account(max_bytes=2 * MIB), Gate()
    async with pair_of_channels(gate, account=account) as pair:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, pair.to_bob)
            await gate.started.wait()
            nursery.start_soon(pair.to_bob.bulky, Parcel(bytes(1100 * KIB)))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(pair.to_bob.bulky, Parcel(bytes(900 * KIB)))
            await trio.testing.wait_all_tasks_blocked()
            assert gate.num_started == 1
            gate.release.set()
        assert gate.num_started == 3
        await is_settled(account)


async def test_requests_of_more_memory_than_a_peer_may_hold_are_refused() -> None:
    account, gate = Account(max_bytes=2 * MIB), Gate()
    async with pair_of_channels(gate, account=account) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pair.to_bob)
        await gate.started.wait()
        error = await failure(pair.to_bob.echo(Parcel(bytes(2 * MIB))))
        assert error.status is Status.RESOURCE_EXHAUSTED
        await still_works(pair.to_bob)
        gate.release.set()


async def test_a_call_that_waits_for_memory_leaves_with_its_stream_and_others_get_its_place() -> None:
    account, gate = Account(max_bytes=2 * MIB), Gate()
    async with pair_of_channels(gate, account=account) as one, trio.open_nursery() as nursery:
        nursery.start_soon(one.to_bob.bulky, Parcel(bytes(KIB)))
        await gate.started.wait()
        async with pair_of_channels(gate, account=account) as other, trio.open_nursery() as waiting:
            waiting.start_soon(failure, other.to_bob.bulky(Parcel(bytes(MIB // 2))))
            waiting.start_soon(failure, other.to_bob.bulky(Parcel(bytes(MIB // 4))))
            await trio.testing.wait_all_tasks_blocked()
            assert account.budget.num_calls == 3
            nursery.start_soon(one.to_bob.bulky, Parcel(bytes(KIB)))
            await trio.testing.wait_all_tasks_blocked()
            assert gate.num_waiting == 1
            other.bob.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert account.budget.num_calls == 2
        gate.release.set()
    assert gate.num_started == 2
    assert account.budget.held_bytes == account.budget.num_calls == 0


async def test_calls_of_a_rare_method_are_refused_above_its_rate(autojump_clock: trio.testing.MockClock) -> None:
    async with pair_of_channels() as pair:
        for _ in range(4):  # two seconds of two calls each, ahead
            await pair.to_bob.seldom(Empty())
        error = await failure(pair.to_bob.seldom(Empty()))
        assert error.status is Status.RESOURCE_EXHAUSTED
        assert "2 calls of probe.seldom a second" in error.message
        await still_works(pair.to_bob)
        await trio.sleep(0.6)
        await pair.to_bob.seldom(Empty())
        assert (await failure(pair.to_bob.seldom(Empty()))).status is Status.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["probe.double", "probe.unknown", "probe.ask"])
async def test_a_peer_that_calls_100_000_times_and_reads_nothing_is_hung_up_on_in_bounded_memory(method: str) -> None:
    account, gate = Account(), Gate()
    calls = b"".join(wire(request(call_id, method)) for call_id in range(1, 100_001))
    most_unsent = most_open = 0
    async with channel_to_a_stranger(gate, account=account) as (bob, stranger):
        for start in range(0, len(calls), 16 * KIB):
            if not await send_all_or_break(stranger, calls[start : start + 16 * KIB]):
                break
            await trio.lowlevel.checkpoint()
            most_unsent = max(most_unsent, bob.unsent_bytes)
            most_open = max(most_open, bob.num_calls)
        await until_gone(bob)
        assert 0 < most_unsent <= MAX_REFUSED_BYTES + 64 * KIB
        assert most_open <= MAX_CALLS_IN_FLIGHT
        await is_settled(account)


async def test_memory_is_given_back_when_a_peer_vanishes_while_its_answer_is_being_written() -> None:
    account = Account()
    body, attachments = encode_message(Parcel(bytes(8 * MIB)))
    echo = Frame(FrameType.REQUEST, 1, request_header("probe.echo", 60_000, body), tuple(attachments))
    async with channel_to_a_stranger(account=account) as (bob, stranger):
        await stranger.send_all(wire(echo))
        await trio.testing.wait_all_tasks_blocked()
        assert account.budget.num_calls == 1, "the answer is larger than what the sockets hold"
        await stranger.aclose()
        await until_gone(bob)
        await is_settled(account)


# --- peers that break the protocol, or break off ---


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        bytes(100),
        (2**32 - 1).to_bytes(4, "big") + bytes([FrameType.REQUEST, 0]) + bytes(10),
        (MAX_HEADER_BYTES + 13).to_bytes(4, "big")
        + bytes([FrameType.REQUEST, 0, 0, 0, 0, 1])
        + (MAX_HEADER_BYTES + 1).to_bytes(4, "big")
        + bytes(2),
        wire(Frame(FrameType.REQUEST, 1, b"\xc1")),
        wire(Frame(FrameType.REQUEST, 1, encode(Question(1)))),
        wire(Frame(FrameType.REQUEST, 1, request_header("probe.double", 1000, b"", 9))),
    ],
    ids=["HTTP", "ones", "zeros", "oversized frame", "oversized header", "no MessagePack", "other header", "kind"],
)
async def test_what_is_not_the_protocol_closes_the_channel_and_says_why(data: bytes) -> None:
    async with channel_to_a_stranger() as (bob, stranger):
        await stranger.send_all(data)
        assert await read_all(stranger) == b""
        error = await failure(client(Probe, bob).double(Question(1)))
        assert error.status is Status.UNAVAILABLE
        assert "protocol error" in error.message


async def test_ids_that_nobody_knows_are_ignored_since_they_may_have_crossed() -> None:
    strays = [Frame(kind, 77, encode(Reply(1))) for kind in (FrameType.ANSWER, FrameType.MESSAGE)]
    strays += [Frame(kind, 78) for kind in (FrameType.CANCEL, FrameType.END)]
    strays += [Frame(FrameType.ERROR, 79, encode(ErrorHeader(Status.INTERNAL, "stray")))]
    async with channel_to_a_stranger() as (bob, stranger):
        await stranger.send_all(wire(*strays, request(80)))
        (answer,) = await read_frames(stranger, 1)
        assert (answer.type, answer.call_id, answer.header) == (FrameType.ANSWER, 80, encode(Reply(2)))
        assert bob.is_open


@pytest.mark.parametrize("again", [request(7, "probe.ask"), Frame(FrameType.MESSAGE, 7, flags=FROM_CALLER)])
async def test_a_peer_that_misuses_the_id_of_an_open_call_is_hung_up_on(again: Frame) -> None:
    gate = Gate()
    async with channel_to_a_stranger(gate) as (bob, stranger):
        await stranger.send_all(wire(request(7, "probe.ask"), again))
        assert await read_all(stranger) == b""
        assert not bob.is_open
        assert gate.num_waiting == 0


async def test_a_peer_that_reuses_the_id_of_a_withdrawn_call_is_hung_up_on_and_the_node_lives_on() -> None:
    async with channel_to_a_stranger() as (bob, stranger):
        await stranger.send_all(wire(request(7), Frame(FrameType.CANCEL, 7), request(7)))
        assert await read_all(stranger) == b""
        assert not bob.is_open


async def test_an_answer_followed_by_garbage_is_still_an_answer() -> None:
    async with channel_to_a_stranger() as (bob, stranger), trio.open_nursery() as nursery:
        nursery.start_soon(still_works, client(Probe, bob))
        (called,) = await read_frames(stranger, 1)
        await stranger.send_all(
            wire(Frame(FrameType.ANSWER, called.call_id, encode(Reply(8))), Frame(FrameType.ERROR, 99, b"\xc1"))
        )
        await until_gone(bob)


async def test_half_a_frame_and_then_silence_hold_up_nothing_and_are_counted() -> None:
    account = Account()
    frame = wire(Frame(FrameType.REQUEST, 1, request_header("probe.echo", 1000), (bytes(MIB),)))
    async with channel_to_a_stranger(account=account) as (bob, stranger):
        await stranger.send_all(frame[: MIB // 2])
        async with trio.open_nursery() as nursery:
            statuses: list[Status] = []
            nursery.start_soon(ask, client(Probe, bob, timeout_s=0.2), statuses)
            (called,) = await read_frames(stranger, 1)
            assert called.type is FrameType.REQUEST
        assert statuses == [Status.DEADLINE_EXCEEDED]
        assert account.budget.buffered_bytes == MIB // 2
        assert bob.num_calls == 0
        await stranger.aclose()
        await until_gone(bob)
        await is_settled(account)


async def test_unfinished_frames_over_many_channels_close_the_one_that_exceeds_the_peers_budget() -> None:
    account = Account(max_bytes=MIB)
    part = wire(Frame(FrameType.REQUEST, 1, request_header("probe.echo", 1000), (bytes(MIB),)))[: 400 * KIB]
    async with (
        channel_to_a_stranger(account=account) as (one, to_one),
        channel_to_a_stranger(account=account) as (two, to_two),
        channel_to_a_stranger(account=account) as (three, to_three),
    ):
        for stranger in (to_one, to_two, to_three):
            await send_all_or_break(stranger, part)
            await trio.testing.wait_all_tasks_blocked()
        assert [channel.is_open for channel in (one, two, three)] == [True, True, False]
        assert account.budget.buffered_bytes == 2 * len(part)
        error = await failure(client(Probe, three).double(Question(1)))
        assert "unfinished frames" in error.message
    assert account.budget.buffered_bytes == 0


async def test_a_peer_that_is_gone_in_mid_call_makes_it_unavailable_at_once() -> None:
    statuses: list[Status] = []
    async with channel_to_a_stranger() as (bob, stranger):
        stub = client(Probe, bob)
        streamed: list[RemoteError] = []

        async def receive() -> None:
            streamed.append(await failure(anext(aiter(stub.send(Question(1))))))
            streamed.append(await failure(stub.collect(never())))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, stub, statuses)
            nursery.start_soon(receive)
            await read_frames(stranger, 4)
            began = trio.current_time()
            await stranger.aclose()
        assert statuses == [Status.UNAVAILABLE] * 3
        assert [error.status for error in streamed] == [Status.UNAVAILABLE] * 2, "the second on a closed channel"
        assert trio.current_time() - began < 5  # of 30 that the calls would have waited


async def test_callers_learn_that_the_peer_is_gone_though_a_handler_is_slow_to_stop() -> None:
    gate = Gate(is_stubborn=True)
    async with channel_to_a_stranger(gate) as (bob, stranger):
        await stranger.send_all(wire(request(1, "probe.ask")))
        await gate.started.wait()
        async with trio.open_nursery() as callers:
            callers.start_soon(failure, client(Probe, bob).double(Question(1)))
            await stranger.receive_some()
            await stranger.aclose()
        assert not bob.is_open
        gate.release.set()
