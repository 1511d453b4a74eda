"""Channels over a real pair of sockets: whatever a handler or a peer does, a call has its outcome, memory stays within
its bounds, and nobody else is harmed."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import pytest
import trio
import trio.testing

from shoal.node.metrics import Metrics
from shoal.node.rpc import TICK_S, Account, Channel, Router, SocketByteStream
from shoal.protocol.codec import Attachment, Buffer, decode, encode, encode_message
from shoal.protocol.errors import LimitError, RefusedError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.frames import FROM_CALLER, Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import (
    MAX_ANSWER_BYTES,
    MAX_ATTACHMENT_BYTES,
    MAX_CALLS_IN_FLIGHT,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_REFUSED_BYTES,
    STREAM_WINDOW_BYTES,
)
from shoal.protocol.rpc import MESSAGE_OVERHEAD_BYTES, ErrorHeader, request_header
from shoal.protocol.services import (
    Call,
    Empty,
    Service,
    bidirectional,
    client,
    client_streaming,
    current_call,
    server_streaming,
    unary,
)

T = TypeVar("T")
pytestmark = pytest.mark.trio

ANN, BOB = (PeerId.of_public_key(bytes([number]) * 32) for number in (1, 2))
GENEROUS_S = 30.0
KIB, MIB = 1024, 1024 * 1024
SEED = random.randrange(2**32)
PARCEL_BYTES = 64 * KIB
AHEAD = STREAM_WINDOW_BYTES // (PARCEL_BYTES + MESSAGE_OVERHEAD_BYTES) + 2
"""Parcels that a stream may have made and not yet given to a reader: a window, the one that overdraws it, and the one
that its sender holds and waits with."""


@dataclass(frozen=True, slots=True)
class Question:
    number: int


@dataclass(frozen=True, slots=True)
class Reply:
    number: int


@dataclass(frozen=True, slots=True)
class Other:
    words: str


@dataclass(frozen=True, slots=True)
class Parcel:
    content: Attachment


class Probe(Service, name="probe"):
    """Calls of all kinds; a test overrides those that it is about."""

    @unary(idempotent=True)
    async def double(self, request: Question) -> Reply:
        return Reply(2 * request.number)

    @unary(timeout_s=GENEROUS_S, max_answer_bytes=KIB)
    async def ask(self, request: Empty) -> Empty:
        raise NotImplementedError

    @unary(max_answer_bytes=MAX_ATTACHMENT_BYTES + KIB)
    async def echo(self, request: Parcel) -> Parcel:
        return request

    @unary(max_calls_per_s=2)
    async def seldom(self, request: Empty) -> Empty:
        return request

    @unary(max_answer_bytes=MIB)
    async def bulky(self, request: Parcel) -> Empty:
        raise NotImplementedError

    @server_streaming()
    async def send(self, request: Question) -> AsyncIterator[Parcel]:
        """As many parcels as asked for."""
        for parcel in parcels(request.number):
            yield parcel

    @client_streaming()
    async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
        """How many bytes came."""
        return Reply(sum([len(parcel.content) async for parcel in requests]))

    @bidirectional()
    async def pass_back(self, requests: AsyncIterator[Parcel]) -> AsyncIterator[Parcel]:
        async for parcel in requests:
            yield Parcel(bytes(parcel.content))


class Asked(Probe):
    """Whose `ask` does what a test says."""

    def __init__(self, handler: Callable[[], Awaitable[None]]) -> None:
        self._handler = handler

    async def ask(self, request: Empty) -> Empty:
        await self._handler()
        return Empty()


class Gate(Probe):
    """Whose `ask` waits until it is released, or cancelled.

    Attributes:
        num_started: handlers so far.
        num_waiting: handlers now.
    """

    def __init__(self, *, is_stubborn: bool = False) -> None:
        self.release = trio.Event()
        self.started = trio.Event()
        self.stopped = trio.Event()
        self.num_started = self.num_waiting = 0
        self._is_stubborn = is_stubborn

    async def ask(self, request: Empty) -> Empty:
        await self._wait()
        return request

    async def bulky(self, request: Parcel) -> Empty:
        await self._wait()
        return Empty()

    async def _wait(self) -> None:
        self.num_started += 1
        self.num_waiting += 1
        self.started.set()
        try:
            with trio.CancelScope(shield=self._is_stubborn):
                await self.release.wait()
        finally:
            self.num_waiting -= 1
            self.stopped.set()


class CountingByteStream(SocketByteStream):
    """Counts how often it is written to; told to be eager, takes short writes at once, as a lane does."""

    def __init__(self, sock: socket.socket, *, is_eager: bool = False) -> None:
        super().__init__(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        self.num_writes = 0
        self._sock = sock
        self._is_eager = is_eager

    async def write(self, data: Buffer) -> None:
        self.num_writes += 1
        await super().write(data)

    def try_write(self, data: Buffer) -> bool:
        if not self._is_eager:
            return False
        try:
            num_bytes = self._sock.send(data)
        except OSError:
            return False
        assert num_bytes == len(data), "a Unix socket takes a short write whole or not at all"
        self.num_writes += 1
        return True


class Pair:
    """Ann, who calls, and Bob, who serves and may call as well."""

    def __init__(self, service: Service, account: Account | None, *, is_eager: bool, compress: bool) -> None:
        self.streams = tuple(CountingByteStream(end, is_eager=is_eager) for end in socket.socketpair())
        self.account = account or Account()
        self.metrics = Metrics()
        ours, theirs = self.streams
        self.ann = Channel(ours, BOB, Router(Probe()), metrics=self.metrics, compress=compress)
        self.bob = Channel(theirs, ANN, Router(service), account=self.account, metrics=self.metrics, compress=compress)
        self.to_bob = client(Probe, self.ann)
        self.to_ann = client(Probe, self.bob)


@asynccontextmanager
async def pair_of_channels(
    service: Service | None = None, *, account: Account | None = None, is_eager: bool = False, compress: bool = False
) -> AsyncIterator[Pair]:
    pair = Pair(service or Probe(), account, is_eager=is_eager, compress=compress)
    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.ann.run)
            nursery.start_soon(pair.bob.run)
            yield pair
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def channel_to_a_stranger(
    service: Service | None = None, *, account: Account | None = None
) -> AsyncIterator[tuple[Channel, trio.SocketStream]]:
    """Bob's channel, and the bare socket of whoever is at its other end."""
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    bob = Channel(SocketByteStream(ours), ANN, Router(service or Probe()), account=account)
    with trio.fail_after(GENEROUS_S):
        async with theirs, trio.open_nursery() as nursery:
            nursery.start_soon(bob.run)
            yield bob, theirs
            nursery.cancel_scope.cancel()


def parcels(count: int) -> list[Parcel]:
    """Random ones, the same at every call."""
    rng = random.Random(SEED)
    return [Parcel(rng.randbytes(PARCEL_BYTES)) for _ in range(count)]


def contents(received: list[Parcel]) -> list[bytes]:
    return [bytes(parcel.content) for parcel in received]


async def still_works(probe: Probe) -> None:
    assert await probe.double(Question(4)) == Reply(8)


async def failure(call: Awaitable[object]) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await call
    return caught.value


async def ask(probe: Probe, statuses: list[Status] | None = None) -> None:
    """Ask, and note how it went."""
    try:
        await probe.ask(Empty())
        status = Status.OK
    except RemoteError as error:
        status = error.status
    if statuses is not None:
        statuses.append(status)


def wire(*frames: Frame) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in encode_frame(frame))


def request(call_id: int, method: str = "probe.double", timeout_ms: int = 60_000, kind: int = 0) -> Frame:
    body = encode(Question(1)) if method == "probe.double" else encode(Empty())
    return Frame(FrameType.REQUEST, call_id, request_header(method, timeout_ms, body, kind))


async def read_all(stream: trio.SocketStream) -> bytes:
    """All that comes until the far side hangs up."""
    received = b""
    try:
        async for piece in stream:
            received += piece
    except trio.BrokenResourceError:
        pass
    return received


async def read_frames(stream: trio.SocketStream, count: int) -> list[Frame]:
    decoder = FrameDecoder()
    frames: list[Frame] = []
    while len(frames) < count:
        frames += decoder.receive_data(bytes(await stream.receive_some()))
    return frames


async def until_gone(channel: Channel) -> None:
    """Return once the channel takes no calls any more."""
    while channel.is_open:
        await trio.testing.wait_all_tasks_blocked()


# --- what a call brings ---


async def test_a_typed_call_is_answered_in_either_direction() -> None:
    async with pair_of_channels() as pair:
        assert await pair.to_bob.double(Question(21)) == Reply(42)
        assert await pair.to_ann.double(Question(5)) == Reply(10)


@pytest.mark.parametrize("is_eager", [False, True], ids=["queued writes", "eager writes"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
async def test_many_calls_at_once_get_each_its_own_answer(is_eager: bool, compress: bool) -> None:
    echoes: dict[int, bytes] = {}

    async def echo(probe: Probe, number: int) -> None:
        parcel = await probe.echo(Parcel(number.to_bytes(2, "big") * 5_000))
        echoes[number] = bytes(parcel.content)

    async with (
        pair_of_channels(is_eager=is_eager, compress=compress) as pair,
        trio.open_nursery() as nursery,
    ):
        for number in range(200):
            nursery.start_soon(echo, pair.to_bob if number % 2 else pair.to_ann, number)
    assert echoes == {number: number.to_bytes(2, "big") * 5_000 for number in range(200)}


async def test_a_caller_waits_for_its_turn_rather_than_have_more_calls_open_than_are_let_in() -> None:
    statuses: list[Status] = []
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(MAX_CALLS_IN_FLIGHT + 50):
            nursery.start_soon(ask, pair.to_bob, statuses)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.num_waiting == pair.ann.num_calls == MAX_CALLS_IN_FLIGHT
        gate.release.set()
    assert statuses == [Status.OK] * (MAX_CALLS_IN_FLIGHT + 50)


async def test_a_caller_whose_turn_does_not_come_in_time_is_told_so(autojump_clock: trio.testing.MockClock) -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(MAX_CALLS_IN_FLIGHT):
            nursery.start_soon(ask, pair.to_bob)
        await trio.testing.wait_all_tasks_blocked()
        error = await failure(client(Probe, pair.ann, timeout_s=1).double(Question(1)))
        assert error.status is Status.DEADLINE_EXCEEDED
        assert gate.num_started == MAX_CALLS_IN_FLIGHT
        gate.release.set()


async def test_calls_made_at_once_leave_in_few_writes_and_so_do_their_answers() -> None:
    async with pair_of_channels() as pair:
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(still_works, pair.to_bob)
        asked, answered = (stream.num_writes for stream in pair.streams)
        assert asked <= 4
        assert answered <= 10


async def test_a_big_answer_and_small_calls_arrive_whole_beside_each_other() -> None:
    content = random.Random(SEED).randbytes(8 * MIB)
    async with pair_of_channels() as pair:

        async def fetch() -> None:
            assert (await pair.to_bob.echo(Parcel(content))).content == content, f"seed {SEED}"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            nursery.start_soon(fetch)
            for _ in range(100):
                await still_works(pair.to_bob)
                await still_works(pair.to_ann)


async def test_each_side_counts_the_calls_that_it_made_or_served() -> None:
    async def fail() -> None:
        raise RefusedError("no")

    async with pair_of_channels(Asked(fail)) as pair:
        await pair.to_bob.echo(Parcel(bytes(1000)))
        await ask(pair.to_bob)
        await pair.to_bob.collect(aiter_of(parcels(1)))
        assert [parcel async for parcel in pair.to_bob.send(Question(2))]
        for side in (pair.metrics.called, pair.metrics.served):
            assert {name: method.calls for name, method in side.items()} == dict.fromkeys(
                ["probe.echo", "probe.ask", "probe.collect", "probe.send"], 1
            )
            assert side["probe.ask"].errors == {Status.PERMISSION_DENIED: 1}
            assert side["probe.send"].errors == side["probe.echo"].errors == {}
            assert side["probe.echo"].request_bytes >= 1000
            assert side["probe.echo"].answer_bytes >= 1000


# --- how a call fails ---


class Unserved(Service, name="unserved"):
    @unary()
    async def ask(self, request: Empty) -> Empty:
        raise NotImplementedError


class Misasked(Service, name="probe"):
    """What somebody takes Probe for who has another version of it."""

    @unary()
    async def double(self, request: Empty) -> Reply:
        raise NotImplementedError

    @bidirectional()
    def pass_back(self, requests: AsyncIterator[Question]) -> AsyncIterator[Parcel]:
        raise NotImplementedError


class Misanswered(Service, name="probe"):
    @unary()
    async def double(self, request: Question) -> Other:
        raise NotImplementedError

    @server_streaming()
    def send(self, request: Question) -> AsyncIterator[Other]:
        raise NotImplementedError


class OtherKind(Service, name="probe"):
    @server_streaming()
    def double(self, request: Question) -> AsyncIterator[Reply]:
        raise NotImplementedError


async def test_a_method_that_nobody_serves_is_unimplemented() -> None:
    async with pair_of_channels() as pair:
        error = await failure(client(Unserved, pair.ann).ask(Empty()))
        assert error.status is Status.UNIMPLEMENTED
        assert "unserved.ask" in error.message
        assert "unserved.ask" not in pair.metrics.served, "a stranger could grow it"
        await still_works(pair.to_bob)


async def test_a_method_of_another_kind_is_an_invalid_argument() -> None:
    async with pair_of_channels() as pair:
        with pytest.raises(RemoteError, match="UNARY") as caught:
            await anext(aiter(client(OtherKind, pair.ann).double(Question(1))))
        assert caught.value.status is Status.INVALID_ARGUMENT
        await still_works(pair.to_bob)


async def test_a_request_of_the_wrong_type_is_an_invalid_argument() -> None:
    async with pair_of_channels() as pair:
        error = await failure(client(Misasked, pair.ann).double(Empty()))
        assert error.status is Status.INVALID_ARGUMENT
        assert "Question.number is missing" in error.message
        with pytest.raises(RemoteError, match=r"Parcel\.content is missing") as caught:
            await anext(aiter(client(Misasked, pair.ann).pass_back(aiter_of([Question(1)]))))
        assert caught.value.status is Status.INVALID_ARGUMENT
        await still_works(pair.to_bob)


async def test_an_answer_of_the_wrong_type_fails_the_call_and_nothing_else() -> None:
    async with pair_of_channels() as pair:
        stub = client(Misanswered, pair.ann)
        error = await failure(stub.double(Question(1)))
        assert error.status is Status.INTERNAL
        assert "nonsense" in error.message
        with pytest.raises(RemoteError, match="nonsense") as caught:
            await anext(aiter(stub.send(Question(1))))
        assert caught.value.status is Status.INTERNAL
        await still_works(pair.to_bob)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RemoteError(Status.NOT_FOUND, "its words"), Status.NOT_FOUND),
        (LimitError("its words"), Status.RESOURCE_EXHAUSTED),
        (RefusedError("its words"), Status.PERMISSION_DENIED),
        (UsageError("its words"), Status.INVALID_ARGUMENT),
        (ShoalError("its words"), Status.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_on_purpose_tells_the_caller_its_status_and_words_once(error: Exception, status: Status) -> None:
    class Failing(Probe):
        async def ask(self, request: Empty) -> Empty:
            raise error

        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            yield Parcel(b"the first")
            raise error

        async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
            raise error

        async def pass_back(self, requests: AsyncIterator[Parcel]) -> AsyncIterator[Parcel]:
            yield await anext(requests)
            raise error

    async with pair_of_channels(Failing()) as pair:
        told = await failure(pair.to_bob.ask(Empty()))
        assert (told.status, told.message) == (status, "its words")
        told = await failure(pair.to_bob.collect(endless()))
        assert (told.status, told.message) == (status, "its words")
        for stream in (pair.to_bob.send(Question(1)), pair.to_bob.pass_back(endless())):
            answers = aiter(stream)
            await anext(answers)
            told = await failure(anext(answers))
            assert (told.status, told.message) == (status, "its words")
        await still_works(pair.to_bob)


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("secret path"), ExceptionGroup("secret", [OSError("secret")])],
    ids=["exception", "group"],
)
async def test_a_handler_that_breaks_is_an_internal_error_without_details_and_the_node_lives_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise error

    async with pair_of_channels(Asked(fail)) as pair:
        told = await failure(pair.to_bob.ask(Empty()))
        assert told.status is Status.INTERNAL
        assert "secret" not in told.message
        assert "the handler of probe.ask failed" in caplog.text
        await still_works(pair.to_bob)
        await still_works(pair.to_ann)


async def test_a_handler_that_breaks_while_it_is_cancelled_leaves_the_node_alive(
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = trio.Event()

    async def break_when_cancelled() -> None:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError("in its cleanup")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
            started.set()

    async with pair_of_channels(Asked(break_when_cancelled)) as pair:
        for _ in range(2):
            await cancelled_once(started, ask, pair.to_bob)
            await still_works(pair.to_bob)
            started = trio.Event()
        assert "failed when it was cancelled" in caplog.text
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, pair.to_bob)
            await started.wait()
            pair.bob.stop()


async def test_an_answer_that_cannot_be_sent_is_an_error_not_a_silence() -> None:
    class TooMuch(Probe):
        async def echo(self, request: Parcel) -> Parcel:
            return Parcel(bytes(MAX_ATTACHMENT_BYTES + 1))

        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            yield Parcel(bytes(MAX_MESSAGE_BYTES))

    async with pair_of_channels(TooMuch()) as pair:
        error = await failure(pair.to_bob.echo(Parcel(b"")))
        assert error.status is Status.RESOURCE_EXHAUSTED
        error = await failure(anext(aiter(pair.to_bob.send(Question(1)))))
        assert error.status is Status.RESOURCE_EXHAUSTED


async def test_an_answer_is_not_larger_than_its_method_says() -> None:
    class Talker(Probe, name="talker"):
        @unary()
        async def talk(self, request: Question) -> Parcel:
            return Parcel(bytes(request.number))

        @client_streaming(max_answer_bytes=1000)
        async def sum_up(self, requests: AsyncIterator[Question]) -> Parcel:
            return Parcel(bytes((await anext(requests)).number))

    async with pair_of_channels(Talker()) as pair:
        stub = client(Talker, pair.ann)
        assert len((await stub.talk(Question(MAX_ANSWER_BYTES - 100))).content) == MAX_ANSWER_BYTES - 100
        error = await failure(stub.talk(Question(MAX_ANSWER_BYTES + 1)))
        assert error.status is Status.RESOURCE_EXHAUSTED
        assert "talker.talk" in error.message
        assert len((await stub.sum_up(aiter_of([Question(900)]))).content) == 900
        error = await failure(stub.sum_up(aiter_of([Question(1001)])))
        assert error.status is Status.RESOURCE_EXHAUSTED


async def test_a_request_that_is_too_big_is_the_callers_own_error_and_reaches_nobody() -> None:
    async with pair_of_channels() as pair:
        with pytest.raises(LimitError):
            await pair.to_bob.echo(Parcel(bytes(MAX_ATTACHMENT_BYTES + 1)))
        with pytest.raises(LimitError):
            await pair.to_bob.collect(aiter_of([Parcel(bytes(MAX_MESSAGE_BYTES))]))
        with pytest.raises(LimitError):
            await anext(aiter(pair.to_bob.pass_back(aiter_of([Parcel(bytes(MAX_MESSAGE_BYTES))]))))
        assert pair.ann.num_calls == 0
        await still_works(pair.to_bob)


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
        assert trio.current_time() - began == pytest.approx(1.5, abs=2 * TICK_S)
        await trio.testing.wait_all_tasks_blocked()
        assert stopped_after_s == [pytest.approx(1.5, abs=2 * TICK_S)]
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
        assert trio.current_time() - began == pytest.approx(3, abs=2 * TICK_S)


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
        assert ended == [pytest.approx(2, abs=2 * TICK_S)]


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


async def cancelled_once(started: trio.Event, function: Callable[[Probe], Awaitable[None]], probe: Probe) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function, probe)
        await started.wait()
        nursery.cancel_scope.cancel()


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


# --- what a handler knows ---


async def test_a_handler_knows_who_calls_what_until_when_before_and_after_it_waited() -> None:
    seen: list[Call] = []
    arrived = 0
    all_here = trio.Event()

    async def note() -> None:
        nonlocal arrived
        before = current_call()
        arrived += 1
        if arrived == 3:
            all_here.set()
        await all_here.wait()
        assert current_call() is before
        seen.append(before)

    class Noting(Asked):
        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            await note()
            yield Parcel(b"")
            assert current_call().method == "probe.send"

    async with pair_of_channels(Noting(note)) as pair:

        async def receive() -> None:
            assert len([parcel async for parcel in pair.to_bob.send(Question(1))]) == 1

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, client(Probe, pair.ann, timeout_s=5))
            nursery.start_soon(ask, client(Probe, pair.ann, timeout_s=500))
            nursery.start_soon(receive)
    assert {call.peer for call in seen} == {ANN}
    assert sorted(call.method for call in seen) == ["probe.ask", "probe.ask", "probe.send"]
    deadlines = sorted(call.deadline - began for call in seen)
    assert deadlines == [pytest.approx(5, abs=2), pytest.approx(500, abs=2), float("inf")]


_mood: ContextVar[str] = ContextVar("mood", default="none")


@pytest.mark.parametrize("how", ["at once", "waiting", "failing", "cancelled"])
async def test_context_variables_do_not_leak_from_call_to_call(how: str) -> None:
    seen: list[str] = []
    started = trio.Event()

    class Moody(Probe):
        async def ask(self, request: Empty) -> Empty:
            seen.append(_mood.get())
            _mood.set("of an earlier call")
            started.set()
            match how:
                case "waiting":
                    await trio.lowlevel.checkpoint()
                case "failing":
                    raise RefusedError("no")
                case "cancelled":
                    await trio.sleep_forever()
            return request

        async def double(self, request: Question) -> Reply:
            seen.append(_mood.get())
            return Reply(2 * request.number)

    _mood.set("of the caller")
    async with pair_of_channels(Moody()) as pair:
        _mood.set("of a later caller")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask, pair.to_bob)
                nursery.start_soon(still_works, pair.to_bob)
            if how == "cancelled":
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        for _ in range(6):
            await still_works(pair.to_bob)
    assert seen == ["of the caller"] * 26, "that of the task which made the channel"


# --- streams ---


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


class Source:
    """Parcels that a caller sends.

    Attributes:
        num_taken: of them, so far.
        is_closed: whether the call is done with this.
    """

    def __init__(self, count: int) -> None:
        self.num_taken = 0
        self.is_closed = trio.Event()
        self._count = count

    async def run(self) -> AsyncGenerator[Parcel]:
        try:
            for parcel in parcels(self._count):
                self.num_taken += 1
                yield parcel
        finally:
            self.is_closed.set()


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


# --- fairness ---


async def test_a_slow_handler_does_not_hold_up_other_calls() -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask, pair.to_bob)
            await gate.started.wait()
            await still_works(pair.to_bob)
            await still_works(pair.to_ann)
        assert gate.num_waiting == 10
        gate.release.set()


async def test_many_short_calls_let_other_tasks_run_in_between() -> None:
    turns = 0
    in_turn: dict[int, int] = {}

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def work() -> None:
        in_turn[turns] = in_turn.get(turns, 0) + 1
        end = time.perf_counter() + 0.0005
        while time.perf_counter() < end:
            pass

    async with pair_of_channels(Asked(work)) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        async with trio.open_nursery() as callers:
            for _ in range(200):
                callers.start_soon(ask, pair.to_bob)
        nursery.cancel_scope.cancel()
    assert sum(in_turn.values()) == 200
    assert max(in_turn.values()) <= 10, "calls of half a millisecond each in one turn of the loop"


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


# --- helpers of the streams ---


async def aiter_of(items: list[T]) -> AsyncGenerator[T]:
    for item in items:
        yield item


async def endless() -> AsyncGenerator[Parcel]:
    while True:
        yield Parcel(bytes(KIB))


async def never() -> AsyncGenerator[Parcel]:
    await trio.Event().wait()
    yield Parcel(b"")


def to_generator(stream: AsyncIterator[T]) -> AsyncGenerator[T]:
    """The stream as what it is, so that it can be closed."""
    assert isinstance(stream, AsyncGenerator)
    return stream


async def send_all_or_break(stream: trio.SocketStream, data: bytes) -> bool:
    """Whether the far side still took it."""
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        return False
    return True


async def is_settled(account: Account) -> None:
    """All has been given back, once what is under way is over."""
    await trio.testing.wait_all_tasks_blocked()
    budget = account.budget
    assert (budget.num_calls, budget.held_bytes, budget.buffered_bytes) == (0, 0, 0)
