"""Two channels over a real pair of sockets: whatever a handler or a peer does, a call has its outcome and nobody else
is harmed."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from shoal.node.rpc import Channel, Router, SocketByteStream
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, RefusedError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.frames import Frame, FrameType, encode_frame
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES
from shoal.protocol.rpc import AnswerHeader, Attachments, RequestHeader
from shoal.protocol.services import Empty, Method


@dataclass(frozen=True, slots=True)
class Question:
    number: int


@dataclass(frozen=True, slots=True)
class Reply:
    number: int
    asked_by: str = ""


@dataclass(frozen=True, slots=True)
class Other:
    words: str


DOUBLE = Method("test.double", Question, Reply)
ASK = Method("test.ask", Empty, Empty)
ANN, BOB = PeerId.of_public_key(b"\x01" * 32), PeerId.of_public_key(b"\x02" * 32)
GENEROUS_S = 30.0
pytestmark = pytest.mark.trio

Handler = Callable[[PeerId, Empty, Attachments], Awaitable[tuple[Empty, Attachments]]]


async def double(peer: PeerId, question: Question, attachments: Attachments) -> tuple[Reply, Attachments]:
    return Reply(2 * question.number, str(peer)), tuple(reversed(attachments))


def router_with(handler: Handler | None = None) -> Router:
    router = Router()
    router.serve(DOUBLE, double)
    if handler is not None:
        router.serve(ASK, handler)
    return router


def trio_sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    return one, other


@asynccontextmanager
async def channels(handler: Handler | None = None) -> AsyncIterator[tuple[Channel, Channel]]:
    """Ann's channel to Bob, who serves, and Bob's to Ann."""
    ours, theirs = trio_sockets()
    ann = Channel(SocketByteStream(ours), BOB, router_with())
    bob = Channel(SocketByteStream(theirs), ANN, router_with(handler))
    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ann.run)
            nursery.start_soon(bob.run)
            yield ann, bob
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def channel_to_a_stranger() -> AsyncIterator[tuple[Channel, trio.SocketStream]]:
    """Ann's channel, and the bare socket of whoever is at its other end."""
    ours, theirs = trio_sockets()
    ann = Channel(SocketByteStream(ours), BOB, router_with())
    with trio.fail_after(GENEROUS_S):
        async with theirs, trio.open_nursery() as nursery:
            nursery.start_soon(ann.run)
            yield ann, theirs
            nursery.cancel_scope.cancel()


async def still_works(channel: Channel) -> None:
    reply, _ = await channel.call(DOUBLE, Question(4), timeout_s=GENEROUS_S)
    assert reply.number == 8


async def failure(channel: Channel, timeout_s: float = GENEROUS_S) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await channel.call(ASK, Empty(), timeout_s=timeout_s)
    return caught.value


async def test_a_typed_call_is_answered_in_either_direction() -> None:
    async with channels() as (ann, bob):
        reply, attachments = await ann.call(DOUBLE, Question(21), [b"a", b"b"], timeout_s=GENEROUS_S)
        assert reply == Reply(42, str(ANN))
        assert attachments == (b"b", b"a")
        reply, _ = await bob.call(DOUBLE, Question(5), timeout_s=GENEROUS_S)
        assert reply == Reply(10, str(BOB))


async def test_many_calls_at_once_get_each_its_own_answer() -> None:
    replies: dict[int, int] = {}

    async def ask(channel: Channel, number: int) -> None:
        reply, _ = await channel.call(DOUBLE, Question(number), [bytes(10_000)], timeout_s=GENEROUS_S)
        replies[number] = reply.number

    async with channels() as (ann, bob), trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(ask, ann if number % 2 else bob, number)
    assert replies == {number: 2 * number for number in range(200)}


async def test_a_method_that_nobody_serves_is_unimplemented() -> None:
    async with channels() as (ann, _):
        error = await failure(ann)
        assert error.status is Status.UNIMPLEMENTED
        assert "test.ask" in error.message
        await still_works(ann)


async def test_a_request_of_the_wrong_type_is_an_invalid_argument() -> None:
    async with channels() as (ann, _):
        with pytest.raises(RemoteError, match=r"Question\.number is missing") as caught:
            await ann.call(Method("test.double", Empty, Reply), Empty(), timeout_s=GENEROUS_S)
        assert caught.value.status is Status.INVALID_ARGUMENT
        await still_works(ann)


async def test_an_answer_of_the_wrong_type_fails_the_call_and_nothing_else() -> None:
    async with channels() as (ann, _):
        with pytest.raises(RemoteError, match="nonsense") as caught:
            await ann.call(Method("test.double", Question, Other), Question(1), timeout_s=GENEROUS_S)
        assert caught.value.status is Status.INTERNAL
        await still_works(ann)


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
async def test_an_error_on_purpose_tells_the_caller_its_status_and_words(error: Exception, status: Status) -> None:
    async def fail(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        raise error

    async with channels(fail) as (ann, _):
        told = await failure(ann)
        assert (told.status, told.message) == (status, "its words")
        await still_works(ann)


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("secret path"), ExceptionGroup("secret", [OSError("secret")])],
    ids=["exception", "group"],
)
async def test_a_handler_that_breaks_is_an_internal_error_without_details_and_the_node_lives_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        raise error

    async with channels(fail) as (ann, bob):
        told = await failure(ann)
        assert told.status is Status.INTERNAL
        assert "secret" not in told.message
        assert "the handler of test.ask failed" in caplog.text
        await still_works(ann)
        await still_works(bob)


async def test_an_answer_that_cannot_be_sent_is_an_error_not_a_silence() -> None:
    async def too_big(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        return Empty(), (bytes(MAX_ATTACHMENT_BYTES + 1),)

    async with channels(too_big) as (ann, _):
        assert (await failure(ann)).status is Status.RESOURCE_EXHAUSTED
        await still_works(ann)


async def test_the_deadline_reaches_the_handler(autojump_clock: trio.testing.MockClock) -> None:
    stopped_after_s: list[float] = []

    async def slow(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        began = trio.current_time()
        assert trio.current_effective_deadline() == pytest.approx(began + 1.5)
        try:
            await trio.sleep_forever()
        finally:
            stopped_after_s.append(trio.current_time() - began)
        raise AssertionError("it was to be cancelled")

    async with memory_channels(slow) as (ann, _):
        assert (await failure(ann, timeout_s=1.5)).status is Status.DEADLINE_EXCEEDED
        await trio.testing.wait_all_tasks_blocked()
        assert stopped_after_s == [pytest.approx(1.5)]


class MemoryByteStream:
    """A `ByteStream` without sockets, so that the clock of a test may jump."""

    def __init__(self, stream: trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]):
        self._stream = stream

    async def read(self) -> bytes:
        return bytes(await self._stream.receive_some(65536))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def memory_channels(handler: Handler) -> AsyncIterator[tuple[Channel, Channel]]:
    ours, theirs = trio.testing.memory_stream_pair()
    ann = Channel(MemoryByteStream(ours), BOB, router_with())
    bob = Channel(MemoryByteStream(theirs), ANN, router_with(handler))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ann.run)
        nursery.start_soon(bob.run)
        yield ann, bob
        nursery.cancel_scope.cancel()


async def test_cancelling_a_call_reaches_its_handler() -> None:
    started, stopped = trio.Event(), trio.Event()

    async def slow(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            stopped.set()
        raise AssertionError("it was to be cancelled")

    async with channels(slow) as (ann, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failure, ann)
            await started.wait()
            nursery.cancel_scope.cancel()
        await stopped.wait()
        await still_works(ann)


async def test_a_handler_that_does_not_stop_when_cancelled_cannot_answer_another_call() -> None:
    started, release = trio.Event(), trio.Event()

    async def stubborn(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        started.set()
        with trio.CancelScope(shield=True):
            await release.wait()
        return Empty(), (b"the answer to what was withdrawn",)

    async with channels(stubborn) as (ann, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failure, ann)
            await started.wait()
            nursery.cancel_scope.cancel()
        release.set()
        await still_works(ann)


async def test_a_peer_that_reuses_the_id_of_a_withdrawn_call_is_hung_up_on_and_the_node_lives_on() -> None:
    ask = Frame(FrameType.REQUEST, 7, encode(RequestHeader("test.double", 1000, Question(1))))
    async with channel_to_a_stranger() as (ann, stranger):
        await stranger.send_all(wire(ask, Frame(FrameType.CANCEL, 7), ask))
        assert await read_all(stranger) == b""
        assert not ann.is_open


async def test_a_peer_that_is_gone_in_mid_call_makes_it_unavailable_at_once() -> None:
    async with channel_to_a_stranger() as (ann, stranger):
        errors: list[RemoteError] = []

        async def ask() -> None:
            errors.append(await failure(ann))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            await stranger.receive_some()
            began = trio.current_time()
            await stranger.aclose()
        assert [error.status for error in errors] == [Status.UNAVAILABLE] * 3
        assert trio.current_time() - began < 5  # of 30 that the calls would have waited
        assert (await failure(ann)).status is Status.UNAVAILABLE, "a call on a closed channel"


async def test_callers_learn_that_the_peer_is_gone_though_a_handler_is_slow_to_stop() -> None:
    serving, release = trio.Event(), trio.Event()

    async def stubborn(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        serving.set()
        with trio.CancelScope(shield=True):
            await release.wait()
        return Empty(), ()

    ours, stranger = trio_sockets()
    bob = Channel(SocketByteStream(ours), ANN, router_with(stubborn))
    with trio.fail_after(GENEROUS_S):
        async with stranger, trio.open_nursery() as nursery:
            nursery.start_soon(bob.run)
            await stranger.send_all(
                wire(Frame(FrameType.REQUEST, 1, encode(RequestHeader("test.ask", 60_000, Empty()))))
            )
            await serving.wait()
            async with trio.open_nursery() as callers:
                callers.start_soon(failure, bob)
                await stranger.receive_some()
                await stranger.aclose()
            assert not bob.is_open
            release.set()


async def test_an_answer_followed_by_garbage_is_still_an_answer() -> None:
    async with channel_to_a_stranger() as (ann, stranger):
        replies: list[Reply] = []

        async def ask() -> None:
            reply, _ = await ann.call(DOUBLE, Question(1), timeout_s=GENEROUS_S)
            replies.append(reply)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await stranger.receive_some()
            answer = Frame(FrameType.ANSWER, 1, encode(AnswerHeader(Reply(2))))
            await stranger.send_all(wire(answer, Frame(FrameType.ANSWER, 2, b"\xc1")))
        assert replies == [Reply(2)]


async def test_garbage_closes_the_channel_and_says_why() -> None:
    async with channel_to_a_stranger() as (ann, stranger):
        await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n")
        assert await read_all(stranger) == b""
        error = await failure(ann)
        assert error.status is Status.UNAVAILABLE
        assert "protocol error" in error.message


async def test_a_slow_handler_does_not_hold_up_other_calls() -> None:
    started, release = trio.Event(), trio.Event()

    async def slow(peer: PeerId, request: Empty, attachments: Attachments) -> tuple[Empty, Attachments]:
        started.set()
        await release.wait()
        return Empty(), ()

    async with channels(slow) as (ann, bob), trio.open_nursery() as nursery:
        nursery.start_soon(ask_patiently, ann)
        await started.wait()
        for _ in range(10):
            await still_works(ann)
            await still_works(bob)
        release.set()


async def ask_patiently(channel: Channel) -> None:
    assert await channel.call(ASK, Empty(), timeout_s=GENEROUS_S) == (Empty(), ())


def wire(*frames: Frame) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in encode_frame(frame))


async def read_all(stream: trio.SocketStream) -> bytes:
    """All that comes until the far side hangs up."""
    received = b""
    try:
        async for piece in stream:
            received += piece
    except trio.BrokenResourceError:
        pass
    return received
