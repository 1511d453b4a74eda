"""Calls to a peer by way of `Links`, where what lies below them is slow, gone or on its way out."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from shoal.node.supervise import Supervisor
from shoal.node.wire.channel import ByteStream, Channel, Router, SocketByteStream
from shoal.node.wire.links import RPC_PROTOCOL, STREAM_PROTOCOL, Links
from shoal.protocol.codec import Attachment, Buffer
from shoal.protocol.errors import Status
from shoal.protocol.frames import FrameType
from shoal.protocol.ids import PeerId
from shoal.protocol.services import CallKind, Empty, Service, client, unary

from .channels import (
    ANN,
    BOB,
    GENEROUS_S,
    KIB,
    MIB,
    Gate,
    Parcel,
    Probe,
    Question,
    failure,
    never,
    read_all,
    read_frames,
    request,
    wire,
)

pytestmark = pytest.mark.trio


class Paths:
    """To peers that are connected as long as a test says so; a stream to one is what it says, or never comes."""

    def __init__(self) -> None:
        self.are_connected = True
        self.streams: list[ByteStream] = []

    def is_connected(self, peer: PeerId) -> bool:
        return self.are_connected

    def dialed_address(self, peer: PeerId) -> None:
        return None

    def rtt_s(self, peer: PeerId) -> None:
        return None

    def is_local(self, peer: PeerId) -> bool:
        return True

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        if not self.streams:
            await trio.sleep_forever()
        return self.streams.pop()


@asynccontextmanager
async def links_over(paths: Paths, service: Service | None = None) -> AsyncIterator[tuple[Links, trio.Nursery]]:
    with trio.fail_after(GENEROUS_S):
        async with Supervisor().open("node", "mesh") as domain, trio.open_nursery() as nursery:
            links = Links(paths, Router(service or Probe()), domain, lanes=False)
            links.peer_up(BOB)
            yield links, nursery
            nursery.cancel_scope.cancel()
            domain.cancel()


def stream_pair() -> tuple[SocketByteStream, trio.SocketStream]:
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    return SocketByteStream(ours), theirs


@pytest.mark.parametrize("kind", CallKind)
async def test_a_call_of_any_kind_keeps_its_deadline_while_its_stream_is_dialed(
    kind: CallKind, autojump_clock: trio.testing.MockClock
) -> None:
    async with links_over(Paths()) as (links, _):
        stub = client(Probe, links.at(BOB), timeout_s=2)
        calls: dict[CallKind, Callable[[], Awaitable[object]]] = {
            CallKind.UNARY: lambda: stub.ask(Empty()),
            CallKind.SERVER_STREAMING: lambda: anext(aiter(stub.send(Question(1)))),
            CallKind.CLIENT_STREAMING: lambda: stub.collect(never()),
            CallKind.BIDIRECTIONAL: lambda: anext(aiter(stub.pass_back(never()))),
        }
        began = trio.current_time()
        assert (await failure(calls[kind]())).status is Status.DEADLINE_EXCEEDED
        assert trio.current_time() - began == pytest.approx(2, abs=0.1)


async def test_a_stream_of_a_peer_that_is_gone_is_closed_and_leaves_nothing_behind() -> None:
    paths = Paths()
    async with links_over(paths) as (links, _):
        paths.are_connected = False
        links.peer_down(BOB)
        stream, stranger = stream_pair()
        async with stranger:
            await links.serve_stream(BOB, RPC_PROTOCOL, stream)
            assert await read_all(stranger) == b""
        assert not links.is_connected(BOB)


@pytest.mark.parametrize("protocol", [RPC_PROTOCOL, STREAM_PROTOCOL])
async def test_a_node_that_stops_takes_no_new_calls_by_a_fresh_stream_and_answers_the_others(protocol: str) -> None:
    gate = Gate()
    async with links_over(Paths(), gate) as (links, nursery):
        stream, stranger = stream_pair()
        fresh, latecomer = stream_pair()
        async with stranger, latecomer:
            nursery.start_soon(links.serve_stream, BOB, RPC_PROTOCOL, stream)
            await stranger.send_all(wire(request(1, "probe.ask")))
            await gate.started.wait()
            nursery.start_soon(links.close)
            await trio.testing.wait_all_tasks_blocked()
            await latecomer.send_all(wire(request(1, "probe.ask")))
            await links.serve_stream(BOB, protocol, fresh)
            assert gate.num_started == 1
            gate.release.set()
            assert [frame.type for frame in await read_frames(stranger, 2)] == [FrameType.DRAIN, FrameType.ANSWER]


class Talker(Probe, name="talker"):
    num_asked = 0

    @unary(idempotent=True, max_answer_bytes=10)
    async def talk(self, request: Empty) -> Parcel:
        self.num_asked += 1
        return Parcel(bytes(KIB))


async def test_an_answer_that_is_too_long_is_not_asked_for_again() -> None:
    paths, talker = Paths(), Talker()
    async with links_over(paths) as (links, nursery):
        ours, theirs = stream_pair()
        paths.streams = [ours]
        nursery.start_soon(Channel(SocketByteStream(theirs), ANN, Router(talker)).run)
        assert (await failure(client(Talker, links.at(BOB)).talk(Empty()))).status is Status.INTERNAL
        assert talker.num_asked == 1


# --- whether a path moves --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Crate:
    contents: tuple[Attachment, ...]


class Storage(Service, name="storage"):
    @unary(timeout_s=None)
    async def put(self, request: Crate) -> Empty:
        raise NotImplementedError


class Narrow:
    """A path that takes a write when it is let, and brings what a test sends."""

    def __init__(self) -> None:
        self.may_write = trio.Semaphore(0)
        self.arrive, self._arrivals = trio.open_memory_channel[bytes](1)

    async def read(self) -> bytes:
        return await self._arrivals.receive()

    async def write(self, data: Buffer) -> None:
        await self.may_write.acquire()

    def try_write(self, data: Buffer) -> bool:
        return False

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def narrow_path() -> AsyncIterator[tuple[Links, Narrow, trio.Nursery]]:
    paths, narrow = Paths(), Narrow()
    paths.streams = [narrow]
    async with links_over(paths) as (links, nursery):
        yield links, narrow, nursery


@pytest.mark.parametrize("sizes", [[8 * MIB], [100 * KIB] * 40], ids=["one long piece", "many shorter ones"])
async def test_a_path_moves_as_long_as_parts_of_what_waits_are_taken_and_not_when_it_froze(
    sizes: list[int], mock_clock: trio.testing.MockClock
) -> None:
    async with narrow_path() as (links, narrow, nursery):
        crate = Crate(tuple(bytes(size) for size in sizes))
        nursery.start_soon(client(Storage, links.at(BOB)).put, crate)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            since = trio.current_time()
            mock_clock.jump(1)
            assert not links.is_moving(BOB, since), "nobody has taken anything"
            for _ in range(2):  # of which the first may be the frame's head alone
                narrow.may_write.release()
                await trio.testing.wait_all_tasks_blocked()
            assert links.is_moving(BOB, since)


async def test_a_path_that_takes_a_new_call_and_brings_nothing_does_not_move(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with narrow_path() as (links, narrow, nursery):
        for _ in range(3):  # each disappears in the buffers of a far side that is frozen
            since = trio.current_time()
            mock_clock.jump(1)
            nursery.start_soon(client(Storage, links.at(BOB)).put, Crate(()))
            narrow.may_write.release()
            await trio.testing.wait_all_tasks_blocked()
            assert not links.is_moving(BOB, since)


async def test_a_path_that_brings_anything_moves(mock_clock: trio.testing.MockClock) -> None:
    async with narrow_path() as (links, narrow, nursery):
        nursery.start_soon(client(Storage, links.at(BOB)).put, Crate(()))
        await trio.testing.wait_all_tasks_blocked()
        since = trio.current_time()
        mock_clock.jump(1)
        await narrow.arrive.send(wire(request(1))[:10])
        await trio.testing.wait_all_tasks_blocked()
        assert links.is_moving(BOB, since)
        assert links.heard_at(BOB) == trio.current_time()
        assert not links.is_moving(BOB, trio.current_time())
