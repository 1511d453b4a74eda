"""Calls with streams of messages: all arrives in order, a slow reader stops the sender, leaving stops both sides."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest
import trio
import trio.testing

from shoal.protocol.codec import encode_message
from shoal.protocol.errors import RemoteError
from shoal.protocol.frames import FROM_CALLER, Frame, FrameType
from shoal.protocol.limits import STREAM_WINDOW_BYTES
from shoal.protocol.rpc import MESSAGE_OVERHEAD_BYTES

from .channels import (
    PARCEL_BYTES,
    SEED,
    Pair,
    Parcel,
    Probe,
    Question,
    Reply,
    Source,
    aiter_of,
    channel_to_a_stranger,
    pair_of_channels,
    parcels,
    read_all,
    request,
    send_all_or_break,
    still_works,
    wire,
)

pytestmark = pytest.mark.trio

AHEAD = STREAM_WINDOW_BYTES // (PARCEL_BYTES + MESSAGE_OVERHEAD_BYTES) + 2
"""Parcels that a stream may have made and not yet given to a reader: a window, the one that overdraws it, and the one
that its sender holds and waits with."""


class Streams(Probe):
    """Counts what passes through its handlers; they read as fast as they are let.

    Attributes:
        num_sent: parcels that handlers have made.
        may_read: handlers read when this is set.
        started: set when a handler begins to wait for that.
        stopped: set when a handler ends.
    """

    def __init__(self) -> None:
        self.num_sent = 0
        self.may_read = trio.Event()
        self.started = trio.Event()
        self.stopped = trio.Event()
        self.received: list[Parcel] = []

    async def send(self, request: Question) -> AsyncIterator[Parcel]:
        try:
            for parcel in parcels(request.number):
                self.num_sent += 1
                yield parcel
        finally:
            self.stopped.set()

    async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
        try:
            self.started.set()
            await self.may_read.wait()
            self.received = [parcel async for parcel in requests]
        finally:
            self.stopped.set()
        return Reply(len(self.received))


def contents(received: list[Parcel]) -> list[bytes]:
    return [bytes(parcel.content) for parcel in received]


def to_generator(stream: AsyncIterator[Parcel]) -> AsyncGenerator[Parcel]:
    """The stream as what it is, so that it can be closed."""
    assert isinstance(stream, AsyncGenerator)
    return stream


@pytest.mark.parametrize("is_eager", [False, True], ids=["queued writes", "eager writes"])
async def test_streams_of_every_kind_bring_all_in_order(is_eager: bool) -> None:
    sent = contents(parcels(40))
    async with pair_of_channels(is_eager=is_eager) as pair:
        assert contents([parcel async for parcel in pair.to_bob.send(Question(40))]) == sent, f"seed {SEED}"
        assert await pair.to_bob.collect(aiter_of(parcels(40))) == Reply(40 * PARCEL_BYTES)
        back = [parcel async for parcel in pair.to_bob.pass_back(aiter_of(parcels(40)))]
        assert contents(back) == sent, f"seed {SEED}"
        assert pair.ann.num_calls == pair.bob.num_calls == 0


async def test_empty_streams_end() -> None:
    async with pair_of_channels() as pair:
        assert [parcel async for parcel in pair.to_bob.send(Question(0))] == []
        assert await pair.to_bob.collect(aiter_of([])) == Reply(0)
        assert [parcel async for parcel in pair.to_bob.pass_back(aiter_of([]))] == []


async def test_many_streams_and_calls_at_once_do_not_mix() -> None:
    async with pair_of_channels() as pair:

        async def bring_back(number: int) -> None:
            sent = [Parcel(bytes([number, part]) * 20_000) for part in range(10)]
            back = [parcel async for parcel in pair.to_bob.pass_back(aiter_of(sent))]
            assert contents(back) == contents(sent)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(bring_back, number)
                nursery.start_soon(still_works, pair.to_ann)
                nursery.start_soon(still_works, pair.to_bob)


async def test_a_handler_may_give_any_iterator_not_only_one_that_can_be_closed() -> None:
    class Rest:
        def __init__(self, count: int) -> None:
            self._left = parcels(count)

        def __aiter__(self) -> AsyncIterator[Parcel]:
            return self

        async def __anext__(self) -> Parcel:
            if not self._left:
                raise StopAsyncIteration
            return self._left.pop(0)

    class Bare(Probe):
        def send(self, request: Question) -> AsyncIterator[Parcel]:  # type: ignore[override]
            return Rest(request.number)

    async with pair_of_channels(Bare()) as pair:
        received = [parcel async for parcel in pair.to_bob.send(Question(3))]
        assert contents(received) == contents(parcels(3)), f"seed {SEED}"


async def test_a_slow_reader_stops_the_far_handler_and_then_misses_nothing() -> None:
    streams = Streams()
    async with pair_of_channels(streams) as pair, aclosing(to_generator(pair.to_bob.send(Question(100)))) as answers:
        received = [await anext(answers)]
        await trio.testing.wait_all_tasks_blocked()
        assert AHEAD - 1 <= streams.num_sent <= AHEAD + 1
        assert pair.bob.unsent_bytes == 0
        await still_works(pair.to_bob)
        received += [parcel async for parcel in answers]
        assert contents(received) == contents(parcels(100)), f"seed {SEED}"


async def test_a_slow_handler_stops_the_caller_that_streams_to_it_and_then_misses_nothing() -> None:
    streams, source = Streams(), Source(100)
    async with pair_of_channels(streams) as pair, trio.open_nursery() as nursery:

        async def collect() -> None:
            assert await pair.to_bob.collect(source.run()) == Reply(100)

        nursery.start_soon(collect)
        await trio.testing.wait_all_tasks_blocked()
        assert AHEAD - 1 <= source.num_taken <= AHEAD
        assert pair.ann.unsent_bytes == 0
        await still_works(pair.to_bob)
        streams.may_read.set()
    assert contents(streams.received) == contents(parcels(100)), f"seed {SEED}"


async def test_a_slow_reader_of_a_bidirectional_call_stops_both_directions_and_then_misses_nothing() -> None:
    source = Source(100)
    async with pair_of_channels() as pair:
        answers = aiter(pair.to_bob.pass_back(source.run()))
        received = [await anext(answers)]
        await trio.testing.wait_all_tasks_blocked()
        # A window there and one back. Credit comes by quarters of a window, so neither is quite full.
        assert AHEAD <= source.num_taken <= 2 * AHEAD + 1
        await still_works(pair.to_bob)
        received += [parcel async for parcel in answers]
        assert contents(received) == contents(parcels(100)), f"seed {SEED}"


async def test_a_peer_that_streams_beyond_its_credit_is_hung_up_on() -> None:
    body, attachments = encode_message(Parcel(bytes(PARCEL_BYTES)))
    parcel = Frame(FrameType.MESSAGE, 1, body, tuple(attachments), FROM_CALLER)
    async with channel_to_a_stranger(Streams()) as (bob, stranger):
        await stranger.send_all(wire(request(1, "probe.collect", kind=2)))
        await send_all_or_break(stranger, wire(parcel) * (AHEAD + 1))
        await read_all(stranger)
        assert not bob.is_open


async def test_leaving_a_stream_early_cancels_the_far_handler_and_what_feeds_it() -> None:
    streams, source = Streams(), Source(100)
    async with pair_of_channels(streams) as pair:
        async with aclosing(to_generator(pair.to_bob.send(Question(100)))) as answers:
            async for _ in answers:
                break
        await streams.stopped.wait()
        assert streams.num_sent <= AHEAD + 1
        async with aclosing(to_generator(pair.to_bob.pass_back(source.run()))) as answers:
            async for _ in answers:
                break
        await source.is_closed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert pair.ann.num_calls == pair.bob.num_calls == 0
        await still_works(pair.to_bob)


async def test_cancelling_a_call_with_a_stream_cancels_its_handler_and_closes_its_source() -> None:
    streams, source = Streams(), Source(100)
    async with pair_of_channels(streams) as pair:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.to_bob.collect, source.run())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await source.is_closed.wait()
        await streams.stopped.wait()
        await still_works(pair.to_bob)


async def test_a_handler_may_answer_before_it_has_read_all_and_the_source_is_closed() -> None:
    class Hasty(Probe):
        async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
            return Reply(len((await anext(requests)).content))

        async def pass_back(self, requests: AsyncIterator[Parcel]) -> AsyncIterator[Parcel]:
            yield await anext(requests)

    async with pair_of_channels(Hasty()) as pair:
        source = Source(100)
        assert await pair.to_bob.collect(source.run()) == Reply(PARCEL_BYTES)
        await source.is_closed.wait()
        source = Source(100)
        assert len([parcel async for parcel in pair.to_bob.pass_back(source.run())]) == 1
        await source.is_closed.wait()
        await still_works(pair.to_bob)


async def test_a_source_that_fails_fails_the_call_with_its_own_error_and_cancels_the_handler() -> None:
    class BrokenError(Exception):
        pass

    async def breaks() -> AsyncGenerator[Parcel]:
        yield Parcel(b"the first")
        await streams.started.wait()
        raise BrokenError

    streams = Streams()
    async with pair_of_channels(streams) as pair:
        with pytest.raises(BrokenError):
            await pair.to_bob.collect(breaks())
        await streams.stopped.wait()
        with pytest.raises(BrokenError):
            assert [parcel async for parcel in pair.to_bob.pass_back(breaks())]
        await still_works(pair.to_bob)


async def test_a_source_that_fails_when_it_is_closed_harms_nobody() -> None:
    async def breaks() -> AsyncGenerator[Parcel]:
        try:
            while True:
                yield Parcel(bytes(PARCEL_BYTES))
        finally:
            raise ZeroDivisionError

    async with pair_of_channels(Streams()) as pair:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.to_bob.collect, breaks())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await still_works(pair.to_bob)
        await still_works(pair.to_ann)


@pytest.mark.parametrize("side", ["caller", "server"])
async def test_a_source_that_fails_when_its_channel_ends_does_not_bring_the_node_down(side: str) -> None:
    async def breaks() -> AsyncGenerator[Parcel]:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError("in its cleanup")

        async with trio.open_nursery() as nursery:  # so that the failure comes together with the cancellation
            nursery.start_soon(fail)
            await trio.sleep_forever()
        yield Parcel(b"")

    async def collect(pair: Pair) -> None:
        with pytest.raises((RemoteError, ExceptionGroup)):
            await pair.to_bob.collect(breaks())

    async with pair_of_channels(Streams()) as pair:  # whose nursery would raise what `Channel.run` raises
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, pair)
            await trio.testing.wait_all_tasks_blocked()
            (pair.ann if side == "caller" else pair.bob).stop()
        await trio.testing.wait_all_tasks_blocked()
        assert not pair.ann.is_open
