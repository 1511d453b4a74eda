"""How calls and channels end: at a deadline, when cancelled, when a node drains; nothing is left behind."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

from shoal.node.wire.channel import Account, Channel, Router
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import Status
from shoal.protocol.frames import Frame, FrameType
from shoal.protocol.rpc import ErrorHeader, request_header
from shoal.protocol.services import Empty, Service, client, current_call, unary

from .channels import (
    ANN,
    BOB,
    GENEROUS_S,
    KIB,
    MIB,
    Asked,
    CountingByteStream,
    Gate,
    Pair,
    Parcel,
    Probe,
    Question,
    Reply,
    Source,
    ask,
    cancelled_once,
    channel_to_a_stranger,
    failure,
    never,
    pair_of_channels,
    read_frames,
    request,
    still_works,
    wire,
)

pytestmark = pytest.mark.trio


# --- deadlines and cancelling ---


async def test_the_deadline_reaches_the_handler(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    stopped_after_s: list[float] = []

    async def slow() -> None:
        assert current_call().deadline == pytest.approx(began + 1.5, abs=0.01)
        try:
            await trio.sleep_forever()
        finally:
            stopped_after_s.append(trio.current_time() - began)

    async with pair_of_channels(Asked(slow)) as pair:
        error = await failure(client(Probe, pair.ann, timeout_s=1.5).ask(Empty()))
        assert error.status is Status.DEADLINE_EXCEEDED
        assert trio.current_time() - began == pytest.approx(1.5, abs=0.01)
        await trio.testing.wait_all_tasks_blocked()
        assert stopped_after_s == [pytest.approx(1.5, abs=0.01)]
        assert pair.metrics.called["probe.ask"].errors == {Status.DEADLINE_EXCEEDED: 1}
        await still_works(pair.to_bob)


class Brief(Service, name="probe"):
    @unary(timeout_s=3)
    async def ask(self, request: Empty) -> Empty:
        raise NotImplementedError


async def test_a_call_that_says_nothing_waits_as_long_as_its_method_says(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began = trio.current_time()
    async with pair_of_channels(Asked(trio.sleep_forever)) as pair:
        error = await failure(client(Brief, pair.ann).ask(Empty()))
        assert error.status is Status.DEADLINE_EXCEEDED
        assert trio.current_time() - began == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("kind", [1, 2, 3])
async def test_the_deadline_of_a_stream_ends_it_on_both_sides(
    kind: int, autojump_clock: trio.testing.MockClock
) -> None:
    ended: list[float] = []

    class Slow(Probe):
        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            try:
                await trio.Event().wait()
                yield Parcel(b"")
            finally:
                ended.append(trio.current_time() - began)

        async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
            async for _ in self.send(Question(1)):
                pass
            return Reply(0)

        def pass_back(self, requests: AsyncIterator[Parcel]) -> AsyncIterator[Parcel]:
            return self.send(Question(1))

    began = trio.current_time()
    async with pair_of_channels(Slow()) as pair:
        stub = client(Probe, pair.ann, timeout_s=2)
        calls: dict[int, Callable[[], Awaitable[object]]] = {
            1: lambda: anext(aiter(stub.send(Question(1)))),
            2: lambda: stub.collect(never()),
            3: lambda: anext(aiter(stub.pass_back(never()))),
        }
        assert (await failure(calls[kind]())).status is Status.DEADLINE_EXCEEDED
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [pytest.approx(2, abs=0.01)]


async def test_a_handler_is_stopped_at_the_deadline_though_its_caller_does_not_withdraw_the_call(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate = Gate()
    async with channel_to_a_stranger(gate) as (_, stranger):
        await stranger.send_all(wire(request(5, "probe.ask", timeout_ms=1500)))
        (error,) = await read_frames(stranger, 1)
        assert (error.type, error.call_id) == (FrameType.ERROR, 5)
        assert decode(ErrorHeader, error.header).status is Status.DEADLINE_EXCEEDED
        await gate.stopped.wait()


async def test_cancelling_a_call_reaches_its_handler() -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair:
        await cancelled_once(gate.started, ask, pair.to_bob)
        await gate.stopped.wait()
        await still_works(pair.to_bob)


async def test_cancelling_one_call_leaves_those_beside_it_alone() -> None:
    statuses: list[Status] = []
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask, pair.to_bob, statuses)
        await trio.testing.wait_all_tasks_blocked()
        await cancelled_once(gate.started, ask, pair.to_bob)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.num_waiting == 20
        gate.release.set()
    assert statuses == [Status.OK] * 20


async def test_a_handler_that_does_not_stop_when_cancelled_cannot_answer_another_call() -> None:
    gate = Gate(is_stubborn=True)
    async with pair_of_channels(gate) as pair:
        await cancelled_once(gate.started, ask, pair.to_bob)
        gate.release.set()
        await still_works(pair.to_bob)


async def test_a_handler_that_swallows_its_cancellation_harms_no_later_call() -> None:
    started = trio.Event()

    async def swallow() -> None:
        started.set()
        with trio.CancelScope() as scope:
            try:
                await trio.sleep_forever()
            finally:
                scope.cancel()

    async with pair_of_channels(Asked(swallow)) as pair:
        for _ in range(5):
            await cancelled_once(started, ask, pair.to_bob)
            started = trio.Event()
            await still_works(pair.to_bob)


async def test_workers_are_used_again_after_a_cancellation() -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair:
        tasks: list[int] = []
        for _ in range(50):
            gate.started = trio.Event()
            await cancelled_once(gate.started, ask, pair.to_bob)
            await still_works(pair.to_bob)
            tasks.append(trio.lowlevel.current_statistics().tasks_living)
        assert gate.num_started == 50
        assert max(tasks) - tasks[0] <= 4


# --- the end ---


async def test_draining_lets_calls_finish_and_refuses_new_ones() -> None:
    gate, drained, statuses = Gate(), trio.Event(), list[Status]()

    async def drain(channel: Channel) -> None:
        await channel.drain()
        drained.set()

    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pair.to_bob, statuses)
        await gate.started.wait()
        nursery.start_soon(drain, pair.bob)
        await trio.testing.wait_all_tasks_blocked()
        assert not drained.is_set()
        assert not pair.ann.is_open
        error = await failure(pair.to_bob.double(Question(1)))
        assert error.status is Status.UNAVAILABLE
        assert "stopping" in error.message
        await still_works(pair.to_ann)
        gate.release.set()
        await drained.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert statuses == [Status.OK]


async def test_a_call_that_crossed_the_draining_is_refused() -> None:
    async with channel_to_a_stranger() as (bob, stranger):
        await bob.drain()
        await stranger.send_all(wire(request(1)))
        draining, refused = await read_frames(stranger, 2)
        assert draining.type is FrameType.DRAIN
        assert decode(ErrorHeader, refused.header).status is Status.UNAVAILABLE


async def test_two_that_drain_at_once_both_wait_for_the_calls_of_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    at_ann, at_bob = Gate(), Gate()
    statuses: list[Status] = []
    drained: list[Channel] = []
    ours, theirs = socket.socketpair()
    ann = Channel(CountingByteStream(ours), BOB, Router(at_ann))
    bob = Channel(CountingByteStream(theirs), ANN, Router(at_bob))

    async def drain(channel: Channel) -> None:
        await channel.drain()
        drained.append(channel)

    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ann.run)
            nursery.start_soon(bob.run)
            nursery.start_soon(ask, client(Probe, ann), statuses)
            nursery.start_soon(ask, client(Probe, bob), statuses)
            await at_ann.started.wait()
            await at_bob.started.wait()
            async with trio.open_nursery() as draining:
                draining.start_soon(drain, ann)
                draining.start_soon(drain, bob)
                await trio.sleep(5)
                assert drained == []
                at_bob.release.set()
                await trio.sleep(1)
                assert drained == [bob]
                at_ann.release.set()
            assert statuses == [Status.OK] * 2
            ann.stop()


async def test_an_outcome_that_is_lost_with_what_ends_the_stream_still_settles_its_caller() -> None:
    account = Account(max_bytes=64 * KIB)
    unfinished = wire(Frame(FrameType.REQUEST, 1, request_header("probe.echo", 1000, b""), (bytes(MIB),)))[: 100 * KIB]
    statuses: list[Status] = []
    async with channel_to_a_stranger(account=account) as (bob, stranger), trio.open_nursery() as nursery:
        to_stranger = client(Probe, bob)

        async def receive() -> None:
            statuses.append((await failure(anext(aiter(to_stranger.send(Question(1)))))).status)

        nursery.start_soon(ask, to_stranger, statuses)
        (asked,) = await read_frames(stranger, 1)
        nursery.start_soon(receive)
        (streamed,) = await read_frames(stranger, 1)
        outcomes = Frame(FrameType.ANSWER, asked.call_id, encode(Empty())), Frame(FrameType.END, streamed.call_id)
        await stranger.send_all(wire(*outcomes) + unfinished)  # which is read in one piece
    assert statuses == [Status.UNAVAILABLE] * 2


async def test_a_channel_may_be_stopped_before_it_runs() -> None:
    ours, theirs = socket.socketpair()
    with theirs, trio.fail_after(GENEROUS_S):
        channel = Channel(CountingByteStream(ours), BOB, Router())
        channel.stop()
        await channel.run()
        assert (await failure(client(Probe, channel).double(Question(1)))).status is Status.UNAVAILABLE
        assert theirs.recv(1) == b"", "its stream is closed"


@pytest.mark.parametrize("side", ["caller", "server"])
async def test_nothing_is_left_when_a_channel_ends(side: str) -> None:
    class Busy(Gate):
        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            yield Parcel(b"")
            await self._wait()

        async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
            await self._wait()
            return Reply(0)

    gate, source, account = Busy(), Source(100), Account(max_bytes=16 * MIB)
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    statuses: list[Status] = []
    pair = Pair(gate, account, is_eager=False, compress=False)

    async def run(channel: Channel, others: trio.Nursery) -> None:
        await channel.run()
        others.cancel_scope.deadline = trio.current_time() + GENEROUS_S

    async def swallow(call: Awaitable[object]) -> None:
        statuses.append((await failure(call)).status)

    async def receive_all() -> None:
        async for _ in pair.to_bob.send(Question(1)):
            pass

    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pair.ann, nursery)
            nursery.start_soon(run, pair.bob, nursery)
            nursery.start_soon(swallow, pair.to_bob.collect(source.run()))
            nursery.start_soon(swallow, receive_all())
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(20):
                nursery.start_soon(swallow, pair.to_bob.ask(Empty()))
                nursery.start_soon(swallow, pair.to_bob.bulky(Parcel(b"")))
            await trio.testing.wait_all_tasks_blocked()
            assert 0 < gate.num_waiting < account.budget.num_calls == 42, "some wait for memory"
            (pair.ann if side == "caller" else pair.bob).stop()
        assert statuses == [Status.UNAVAILABLE] * 42
        assert trio.lowlevel.current_statistics().tasks_living == tasks_before
        assert gate.num_waiting == 0
        assert pair.ann.num_calls == pair.bob.num_calls == 0
        assert (account.budget.num_calls, account.budget.held_bytes, account.budget.buffered_bytes) == (0, 0, 0)
