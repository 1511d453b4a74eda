"""What the tests of channels share: a service that is called, two channels back to back, and a stranger with a bare
socket."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import trio
import trio.testing

from shoal.node.metrics import Metrics
from shoal.node.wire.channel import Account, Channel, Router, SocketByteStream
from shoal.protocol.codec import Attachment, Buffer, encode
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.frames import Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES
from shoal.protocol.rpc import request_header
from shoal.protocol.services import Empty, Service, bidirectional, client, client_streaming, server_streaming, unary

T = TypeVar("T")

ANN, BOB = (PeerId.of_public_key(bytes([number]) * 32) for number in (1, 2))
GENEROUS_S = 30.0
KIB, MIB = 1024, 1024 * 1024
SEED = random.randrange(2**32)
PARCEL_BYTES = 64 * KIB


@dataclass(frozen=True, slots=True)
class Question:
    number: int


@dataclass(frozen=True, slots=True)
class Reply:
    number: int


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


async def cancelled_once(started: trio.Event, function: Callable[[Probe], Awaitable[None]], probe: Probe) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function, probe)
        await started.wait()
        nursery.cancel_scope.cancel()


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


async def aiter_of(items: list[T]) -> AsyncGenerator[T]:
    for item in items:
        yield item


async def never() -> AsyncGenerator[Parcel]:
    await trio.Event().wait()
    yield Parcel(b"")


async def send_all_or_break(stream: trio.SocketStream, data: bytes) -> bool:
    """Whether the far side still took it."""
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        return False
    return True
