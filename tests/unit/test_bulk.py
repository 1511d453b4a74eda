"""Offered bytes arrive whole by whatever path is left, only at whom they were offered to, and memory is free again when
its owner goes on."""

from __future__ import annotations

import contextlib
import math
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from shoal.node.wire import bulk
from shoal.node.wire.bulk import Bulk, BulkRef
from shoal.node.wire.channel import ByteStream, SocketByteStream, StreamClosedError
from shoal.node.wire.lanes import LaneDoor, LaneError, LaneKind, TlsByteStream, dial_lane
from shoal.node.wire.pulls import Parts
from shoal.protocol.errors import ProtocolError, RemoteError, Status
from shoal.protocol.ids import PeerId

pytestmark = pytest.mark.trio

ANN, BOB, EVE = (PeerId.of_public_key(bytes([number]) * 32) for number in (1, 2, 3))
GENEROUS_S = 30.0
MIB = 1024 * 1024
REQUEST = struct.Struct("!16sQQ")
DATA = random.randbytes(20 * MIB + 12_345)


@dataclass
class Owner:
    """Ann, who offers, listening on loopback; whoever dials is taken for ``puller``.

    Attributes:
        cut_after: what the path brings of each connection to come, in bytes, before it breaks.
        is_stalling: whether a path stops then instead, and stays open.
    """

    puller: PeerId = BOB
    bulk: Bulk = field(default_factory=lambda: Bulk(Nowhere()))
    door: LaneDoor = field(default_factory=LaneDoor)
    cut_after: list[float] = field(default_factory=list)
    is_stalling: bool = False
    num_lanes_served: int = 0
    port: int = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            inner, outer = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
            with inner, outer:
                self.port = outer.getsockname()[1]
                for listener, take in ((inner, self._serve), (outer, self._relay)):
                    stream = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                    nursery.start_soon(trio.serve_listeners, take, [stream])
                self._inner_port = inner.getsockname()[1]
                await trio.sleep_forever()

    async def _serve(self, stream: trio.SocketStream) -> None:
        arrived = await self.door.accept(stream.socket, "127.0.0.1")
        if arrived is not None:
            self.num_lanes_served += 1
            await self.bulk.serve_lane(self.puller, arrived[2])

    async def _relay(self, near: trio.SocketStream) -> None:
        left = self.cut_after.pop(0) if self.cut_after else math.inf
        far = await trio.open_tcp_stream("127.0.0.1", self._inner_port)

        async def copy(source: trio.SocketStream, target: trio.SocketStream, left: float) -> None:
            try:
                while left > 0 and (data := await source.receive_some(int(min(left, 65536)))):
                    await target.send_all(data)
                    left -= len(data)
                if left <= 0 and self.is_stalling:
                    await trio.sleep_forever()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            await near.aclose()
            await far.aclose()

        async with far, trio.open_nursery() as nursery:
            nursery.start_soon(copy, near, far, math.inf)
            nursery.start_soon(copy, far, near, left)

    async def lane(self) -> ssl.SSLSocket:
        ticket = self.door.ticket(self.puller, LaneKind.BULK)
        return await dial_lane("127.0.0.1", self.port, ticket, LaneKind.BULK, timeout_s=GENEROUS_S)


class Nowhere:
    """Links of somebody who pulls nothing."""

    def num_lanes(self, peer: PeerId) -> int:
        return 1

    async def dial_bulk_lane(self, peer: PeerId) -> ssl.SSLSocket | None:
        return None

    async def open_bulk_stream(self, peer: PeerId) -> ByteStream:
        raise RemoteError(Status.UNAVAILABLE, "not connected")


@dataclass
class Links:
    """The puller's links to one owner; streams are socket pairs."""

    owner: Owner
    nursery: trio.Nursery
    lanes: int = 1
    has_streams: bool = True
    num_dialed: int = 0
    num_streams: int = 0

    def num_lanes(self, peer: PeerId) -> int:
        return self.lanes

    async def dial_bulk_lane(self, peer: PeerId) -> ssl.SSLSocket | None:
        if not self.lanes:
            return None
        self.num_dialed += 1
        try:
            return await self.owner.lane()
        except (LaneError, RemoteError):
            return None

    async def open_bulk_stream(self, peer: PeerId) -> ByteStream:
        if not self.has_streams:
            raise StreamClosedError("not connected")
        self.num_streams += 1
        ours, theirs = stream_pair()
        self.nursery.start_soon(self.owner.bulk.serve_stream, self.owner.puller, theirs)
        return ours


def stream_pair() -> tuple[ByteStream, ByteStream]:
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    return SocketByteStream(one), SocketByteStream(other)


@asynccontextmanager
async def offered(lanes: int = 1, **owner: object) -> AsyncIterator[tuple[BulkRef, Bulk, Links]]:
    """`DATA` is offered to a puller."""
    async with owner_and_puller(lanes, **owner) as (there, here, links), there.bulk.offer(BOB, DATA) as ref:
        yield ref, here, links


@asynccontextmanager
async def owner_and_puller(lanes: int = 1, **owner: object) -> AsyncIterator[tuple[Owner, Bulk, Links]]:
    async with trio.open_nursery() as nursery:
        there = Owner(**owner)  # type: ignore[arg-type]
        nursery.start_soon(there.run)
        await trio.testing.wait_all_tasks_blocked()
        links = Links(there, nursery, lanes)
        here = Bulk(links)
        nursery.start_soon(here.reap)
        with trio.fail_after(GENEROUS_S):
            yield there, here, links
            await here.aclose()
            await there.bulk.aclose()
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def read_to_the_end(stream: ByteStream) -> None:
    while True:
        await stream.read()


async def refused(act: Callable[..., object], *arguments: object, **options: object) -> Status:
    with pytest.raises(RemoteError) as caught:
        await act(*arguments, **options)
    return caught.value.status


@dataclass
class Read:
    """`DATA` as something that is read, a kibibyte more than half a mebibyte at a time.

    Attributes:
        refusals: of what is opened next, one after the other: after how many pieces.
    """

    refusals: list[int] = field(default_factory=list)
    peers: list[PeerId] = field(default_factory=list)

    async def open(self, peer: PeerId, offset: int, length: int) -> Iterator[memoryview]:
        self.peers.append(peer)
        await trio.lowlevel.checkpoint()
        return self.pieces(offset, offset + length, self.refusals.pop(0) if self.refusals else None)

    def pieces(self, start: int, end: int, refused_after: int | None) -> Iterator[memoryview]:
        buffer = bytearray(MIB // 2 + 1024)  # one for all
        for number, at in enumerate(range(start, end, len(buffer))):
            if number == refused_after:
                raise RemoteError(Status.NOT_FOUND, "it is not there any more")
            piece = DATA[at : min(end, at + len(buffer))]
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]


class Kept(Parts):
    """Keeps what it is handed, and how often."""

    def __init__(self, ends: Sequence[int]) -> None:
        super().__init__(ends)
        self.parts: dict[int, bytes] = {}

    def take(self, part: int, data: memoryview) -> None:
        assert part not in self.parts
        self.parts[part] = bytes(data)

    @property
    def data(self) -> bytes:
        return b"".join(self.parts[part] for part in sorted(self.parts))


ENDS = [*range(700_000, len(DATA), 700_000), len(DATA)]


# --- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lanes", "path"), [(1, "lane"), (2, "lane"), (4, "lane"), (0, "libp2p")])
async def test_all_bytes_arrive_in_place(lanes: int, path: str) -> None:
    async with offered(lanes) as (ref, puller, links):
        into = bytearray(len(DATA))
        assert await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S) == path
        assert into == DATA
        assert links.num_dialed == lanes
        assert links.num_streams == (not lanes)


async def test_libp2p_alone_when_asked_to() -> None:
    async with owner_and_puller() as (owner, puller, links), owner.bulk.offer(BOB, memoryview(DATA)) as ref:
        into = bytearray(len(DATA))
        assert await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S, transport="libp2p") == "libp2p"
        assert into == DATA
        assert links.num_dialed == 0


@pytest.mark.parametrize("lanes", [0, 1])
async def test_a_part_is_pulled_into_a_part_and_nothing_around_it_changes(lanes: int) -> None:
    async with offered(lanes) as (ref, puller, _):
        for offset, length in ((0, 1), (7, 100_000), (9 * MIB, 9 * MIB), (len(DATA), 0), (0, 0)):
            into = bytearray(b"\xaa" * (length + 20))
            await puller.pull(ANN, ref, memoryview(into)[10 : 10 + length], offset=offset, timeout_s=GENEROUS_S)
            assert into == b"\xaa" * 10 + DATA[offset : offset + length] + b"\xaa" * 10


async def test_any_contiguous_memory_will_do_and_no_other() -> None:
    numbers = memoryview(bytearray(8 * 600_000)).cast("d", (600, 1000))
    for row in range(600):
        numbers[row, row] = row / 7
    async with owner_and_puller() as (owner, puller, _), owner.bulk.offer(BOB, numbers) as ref:
        into = memoryview(bytearray(8 * 600_000)).cast("d", (1000, 600))
        await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S)
        assert into.tobytes() == numbers.tobytes()
        with pytest.raises(ValueError, match="write"):
            await puller.pull(ANN, ref, bytes(10), timeout_s=GENEROUS_S)
        with pytest.raises(TypeError):
            await puller.pull(ANN, ref, memoryview(bytearray(10))[::2], timeout_s=GENEROUS_S)


async def test_one_lane_serves_many_pulls_and_goes_when_idle(mock_clock: trio.testing.MockClock) -> None:
    async with owner_and_puller() as (owner, puller, links), owner.bulk.offer(BOB, DATA) as ref:
        for _ in range(3):
            await puller.pull(ANN, ref, bytearray(3 * MIB), timeout_s=GENEROUS_S)
        assert links.num_dialed == 1
        state = owner.bulk._peers[BOB]
        assert len(state.served_lanes) == 1
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(bulk.IDLE_S)
        await until(lambda: not state.served_lanes)
        await puller.pull(ANN, ref, bytearray(3 * MIB), timeout_s=GENEROUS_S)
        assert links.num_dialed == 2


async def test_many_pulls_at_once_share_the_lanes() -> None:
    async with offered(4) as (ref, puller, links):
        memories = [bytearray(len(DATA)) for _ in range(6)]
        paths: list[str] = []

        async def pull(into: bytearray) -> None:
            paths.append(await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S))

        async with trio.open_nursery() as nursery:
            for into in memories:
                nursery.start_soon(pull, into)
        assert all(into == DATA for into in memories)
        assert paths == ["lane"] * 6
        assert links.num_dialed == 4


async def test_both_sides_pull_from_each_other_at_once() -> None:
    async with owner_and_puller(2) as (ann, bobs, _), trio.open_nursery() as nursery:
        back = Owner(puller=ANN, bulk=bobs)
        nursery.start_soon(back.run)
        await trio.testing.wait_all_tasks_blocked()
        ann.bulk._links = Links(back, nursery, 2)
        async with ann.bulk.offer(BOB, DATA) as of_ann, bobs.offer(ANN, DATA[::-1]) as of_bob:
            to_bob, to_ann = bytearray(len(DATA)), bytearray(len(DATA))
            async with trio.open_nursery() as pulls:
                for who, ref, into in ((bobs, of_ann, to_bob), (ann.bulk, of_bob, to_ann)):
                    peer = ANN if who is bobs else BOB
                    pulls.start_soon(lambda w=who, p=peer, r=ref, i=into: w.pull(p, r, i, timeout_s=GENEROUS_S))
            assert to_bob == DATA
            assert to_ann == DATA[::-1]
        nursery.cancel_scope.cancel()


# --- paths that break ------------------------------------------------------------------------------------------------


async def test_what_a_broken_lane_still_owed_comes_by_others() -> None:
    async with offered(2, cut_after=[3 * MIB]) as (ref, puller, links):
        into = bytearray(len(DATA))
        assert await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S) == "lane"
        assert into == DATA
        assert links.num_streams == 0


@pytest.mark.parametrize("lanes", [1, 4])
async def test_when_all_lanes_break_the_rest_comes_by_libp2p(lanes: int) -> None:
    cuts = [random.randrange(3 * MIB) for _ in range(100)]
    async with offered(lanes, cut_after=cuts) as (ref, puller, _):
        into = bytearray(len(DATA))
        assert await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S) == "libp2p"
        assert into == DATA, cuts[:10]


async def test_when_every_path_breaks_the_pull_is_unavailable_and_the_memory_free() -> None:
    async with offered(2, cut_after=[MIB] * 100) as (ref, puller, links):
        links.has_streams = False
        into = bytearray(len(DATA))
        status = await refused(puller.pull, ANN, ref, into, timeout_s=GENEROUS_S)
        assert status is Status.UNAVAILABLE
        into.clear()


async def test_a_kept_lane_that_died_meanwhile_is_not_used() -> None:
    async with owner_and_puller() as (owner, puller, links), owner.bulk.offer(BOB, DATA) as ref:
        await puller.pull(ANN, ref, bytearray(100), timeout_s=GENEROUS_S)
        state = owner.bulk._peers[BOB]
        owner.bulk.drop_peer(BOB)
        await until(lambda: not state.served_lanes)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert await puller.pull(ANN, ref, bytearray(MIB), timeout_s=GENEROUS_S) == "lane"
        assert links.num_dialed == 2


async def test_a_path_that_stalls_ends_at_the_deadline_and_the_memory_is_free() -> None:
    async with offered(cut_after=[3 * MIB], is_stalling=True) as (ref, puller, _):
        into = bytearray(len(DATA))
        status = await refused(puller.pull, ANN, ref, into, timeout_s=0.3)
        assert status is Status.DEADLINE_EXCEEDED
        assert into[:MIB] == DATA[:MIB]
        into.clear()


async def test_a_path_that_stalls_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PROGRESS_S", 0.2)
    async with offered(cut_after=[3 * MIB], is_stalling=True) as (ref, puller, links):
        into = bytearray(len(DATA))
        assert await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S) == "lane"
        assert into == DATA
        assert links.num_dialed == 2


async def test_without_a_direct_path_dials_are_not_tried_again_and_again() -> None:
    async with offered(0) as (ref, puller, links):
        await puller.pull(ANN, ref, bytearray(100), timeout_s=GENEROUS_S)
        links.lanes = 1
        assert await puller.pull(ANN, ref, bytearray(100), timeout_s=GENEROUS_S) == "libp2p"
        assert links.num_dialed == 0


# --- ends and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [0, 1, 4])
async def test_what_is_not_offered_to_the_asker_is_not_found(lanes: int) -> None:
    async with owner_and_puller(lanes) as (owner, puller, _):
        into = bytearray(10 * MIB)
        async with owner.bulk.offer(EVE, DATA) as not_his, owner.bulk.offer(BOB, DATA) as his:
            made_up = BulkRef(bytes(16), len(DATA))
            for ref in (not_his, made_up):
                assert await refused(puller.pull, ANN, ref, into, timeout_s=GENEROUS_S) is Status.NOT_FOUND
            await puller.pull(ANN, his, into, timeout_s=GENEROUS_S)
        assert await refused(puller.pull, ANN, his, into, timeout_s=GENEROUS_S) is Status.NOT_FOUND
        into.clear()


@pytest.mark.parametrize("lanes", [0, 1])
async def test_more_than_was_offered_is_out_of_range_whoever_notices(lanes: int) -> None:
    async with offered(lanes) as (ref, puller, _):
        lie = BulkRef(ref.id, 2 * len(DATA))
        for asked, offset in ((ref, len(DATA)), (ref, -1), (lie, len(DATA)), (lie, len(DATA) - 1)):
            status = await refused(puller.pull, ANN, asked, bytearray(2), offset=offset, timeout_s=GENEROUS_S)
            assert status is Status.OUT_OF_RANGE


async def test_a_reference_has_a_proper_form() -> None:
    for ref_id, num_bytes in ((b"short", 1), (bytes(16), -1)):
        with pytest.raises(ProtocolError):
            BulkRef(ref_id, num_bytes)


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
async def test_a_cancelled_pull_leaves_the_memory_at_once_and_the_next_works(transport: bulk.Transport) -> None:
    async with owner_and_puller(2) as (owner, puller, _), owner.bulk.offer(BOB, DATA * 3) as ref:
        for wait_s in (0, 0.001, 0.005, 0.01, 0.02):
            into = bytearray(ref.num_bytes)
            with trio.move_on_after(wait_s):
                await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S, transport=transport)
            into.clear()
        into = bytearray(len(DATA))
        await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S, transport=transport)
        assert into == DATA


@pytest.mark.parametrize("lanes", [0, 1])
async def test_a_withdrawn_offer_is_free_at_once_though_its_reader_is_stuck(lanes: int) -> None:
    async with owner_and_puller() as (owner, _, links):
        data = bytearray(64 * MIB)
        async with owner.bulk.offer(BOB, data) as ref:
            stuck = TlsByteStream(await owner.lane()) if lanes else await links.open_bulk_stream(ANN)
            await stuck.write(REQUEST.pack(ref.id, 0, len(data)))
            await until(lambda: owner.bulk._offers[ref.id].senders)
            await trio.testing.wait_all_tasks_blocked(0.05)
        data.clear()
        with pytest.raises(StreamClosedError):
            await read_to_the_end(stuck)
        await stuck.close()


async def test_who_never_reads_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PROGRESS_S", 0.1)
    async with owner_and_puller() as (owner, _, links), owner.bulk.offer(BOB, bytes(64 * MIB)) as ref:
        lane, stream = TlsByteStream(await owner.lane()), await links.open_bulk_stream(ANN)
        for stuck in (lane, stream):
            await stuck.write(REQUEST.pack(ref.id, 0, ref.num_bytes))
        state = owner.bulk._peers[BOB]
        await until(lambda: state.served_lanes and state.served_streams)
        await until(lambda: not state.served_lanes and not state.served_streams)
        for stuck in (lane, stream):
            await stuck.close()


async def test_an_unused_lane_or_stream_is_closed_in_time(mock_clock: trio.testing.MockClock) -> None:
    async with owner_and_puller() as (owner, _, links):
        paths = TlsByteStream(await owner.lane()), await links.open_bulk_stream(ANN)
        for unused in paths:
            await unused.write(b"half a request")
        await trio.testing.wait_all_tasks_blocked(0.02)
        mock_clock.jump(bulk.SERVED_IDLE_S)
        for unused in paths:
            with pytest.raises(StreamClosedError):
                await unused.read()
            await unused.close()


async def test_hostile_requests_are_refused_one_by_one_and_harm_nobody() -> None:
    async with owner_and_puller() as (owner, puller, links), owner.bulk.offer(BOB, DATA) as ref:
        requests = [
            (REQUEST.pack(random.randbytes(16), 0, 1), Status.NOT_FOUND),
            (REQUEST.pack(ref.id, 2**63, 2**63), Status.OUT_OF_RANGE),
            (REQUEST.pack(ref.id, 0, 2**64 - 1), Status.OUT_OF_RANGE),
            (REQUEST.pack(ref.id, 2**64 - 1, 1), Status.OUT_OF_RANGE),
        ] * 500
        for stream in (TlsByteStream(await owner.lane()), await links.open_bulk_stream(ANN)):
            await stream.write(b"".join(request for request, _ in requests))
            statuses = b""
            while len(statuses) < len(requests):
                statuses += await stream.read()
            assert list(statuses) == [status for _, status in requests]
            await stream.write(REQUEST.pack(ref.id, 5, 3) + random.randbytes(31))
            answer = b""
            while len(answer) < 4:
                answer += await stream.read()
            assert answer == b"\x00" + DATA[5:8]
            await stream.close()
        into = bytearray(len(DATA))
        await puller.pull(ANN, ref, into, timeout_s=GENEROUS_S)
        assert into == DATA


async def test_lanes_and_streams_of_one_peer_are_bounded() -> None:
    async with owner_and_puller() as (owner, _, links):
        lanes = [TlsByteStream(await owner.lane()) for _ in range(bulk.MAX_LANES + 1)]
        streams = [await links.open_bulk_stream(ANN) for _ in range(bulk.MAX_STREAMS + 1)]
        for paths in (lanes, streams):
            closed: list[ByteStream] = []

            async def read(path: ByteStream, closed: list[ByteStream] = closed) -> None:
                with pytest.raises(StreamClosedError):
                    await path.read()
                closed.append(path)

            async with trio.open_nursery() as nursery:
                for path in paths:
                    nursery.start_soon(read, path)
                await until(lambda closed=closed: closed)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert len(closed) == 1
                nursery.cancel_scope.cancel()
            for path in paths:
                await path.close()


@pytest.mark.parametrize("says", [b"\xc8", b"\x00" + bytes(100), b"", b"\x00" + bytes(2 * MIB)])
async def test_an_owner_who_talks_nonsense_fails_the_pull_and_no_more(says: bytes) -> None:
    async def talk(stream: trio.SocketStream, door: LaneDoor) -> None:
        arrived = await door.accept(stream.socket, "127.0.0.1")
        if arrived is not None:
            lane = TlsByteStream(arrived[2])
            try:
                with contextlib.suppress(StreamClosedError):
                    await lane.read()
                    await lane.write(says)
            finally:
                await lane.close()

    async with owner_and_puller() as (owner, puller, links), trio.open_nursery() as nursery:
        links.has_streams = False
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        owner.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, lambda stream: talk(stream, owner.door), listeners)
        into = bytearray(MIB + 5)
        with trio.move_on_after(GENEROUS_S):
            status = Status.OK
            if len(says) <= len(into):
                status = await refused(puller.pull, ANN, BulkRef(bytes(16), 2 * MIB), into, timeout_s=GENEROUS_S)
            else:  # what comes after all that was asked for is nobody's, and its lane is not used again
                memory = memoryview(into)[:MIB]
                await puller.pull(ANN, BulkRef(bytes(16), 2 * MIB), memory, timeout_s=GENEROUS_S)
                assert into[MIB:] == bytes(5)
                assert puller._peers[ANN].take_idle() is None
        assert status is {1: Status.UNKNOWN, 2 * MIB + 1: Status.OK}.get(len(says), Status.UNAVAILABLE)
        nursery.cancel_scope.cancel()


async def test_when_a_peer_goes_its_pulls_end_and_its_lanes_close() -> None:
    async with owner_and_puller(2, cut_after=[3 * MIB] * 2, is_stalling=True) as (owner, puller, links):
        links.has_streams = False
        async with owner.bulk.offer(BOB, DATA) as ref, trio.open_nursery() as nursery:
            into = bytearray(len(DATA))

            async def pull() -> None:
                assert await refused(puller.pull, ANN, ref, into, timeout_s=GENEROUS_S) is Status.UNAVAILABLE
                into.clear()

            nursery.start_soon(pull)
            await until(lambda: ANN in puller._peers and len(puller._peers[ANN].pulling) == 2)
            puller.drop_peer(ANN)


async def test_after_the_end_nothing_is_served_or_pulled() -> None:
    async with owner_and_puller() as (owner, puller, _), owner.bulk.offer(BOB, DATA) as ref:
        await puller.pull(ANN, ref, bytearray(100), timeout_s=GENEROUS_S)
        await owner.bulk.aclose()
        await puller.aclose()
        lane = TlsByteStream(await owner.lane())
        with pytest.raises(StreamClosedError):
            await lane.read()
        await lane.close()
        assert await refused(puller.pull, ANN, ref, bytearray(1), timeout_s=GENEROUS_S) is Status.UNAVAILABLE


# --- what is read, and taken in parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [0, 1, 3])
async def test_what_is_read_comes_in_parts_each_once_and_whole(lanes: int) -> None:
    async with owner_and_puller(lanes) as (there, here, _):
        source, kept = Read(), Kept(ENDS)
        ref = there.bulk.offer_source(source, len(DATA))
        assert await here.pull(ANN, ref, kept, timeout_s=GENEROUS_S) == ("lane" if lanes else "libp2p")
        assert [len(kept.parts[part]) for part in range(len(ENDS))] == [700_000] * (len(ENDS) - 1) + [
            len(DATA) % 700_000
        ]
        assert kept.data == DATA
        assert kept.num_bytes == len(DATA)
        assert set(source.peers) == {BOB}
        some = Kept([1000, 5000])
        await here.pull(ANN, ref, some, offset=MIB, timeout_s=GENEROUS_S)
        assert some.data == DATA[MIB : MIB + 5000]
        there.bulk.withdraw(ref)
        assert await refused(here.pull, ANN, ref, Kept([5]), timeout_s=GENEROUS_S) is Status.NOT_FOUND


@pytest.mark.parametrize("lanes", [1, 3])
async def test_of_a_part_that_a_broken_path_began_another_brings_all(lanes: int) -> None:
    async with owner_and_puller(lanes, cut_after=[3 * MIB, 5 * MIB + 17, 100]) as (there, here, _):
        kept = Kept(ENDS)
        await here.pull(ANN, there.bulk.offer_source(Read(), len(DATA)), kept, timeout_s=GENEROUS_S)
        assert kept.data == DATA


@pytest.mark.parametrize("lanes", [0, 1])
async def test_a_source_that_refuses_is_told_before_its_bytes_and_ends_the_path_amidst_them(lanes: int) -> None:
    async with owner_and_puller(lanes) as (there, here, _):
        kept = Kept(ENDS)
        ref = there.bulk.offer_source(Read([0]), len(DATA))
        assert await refused(here.pull, ANN, ref, kept, timeout_s=GENEROUS_S) is Status.NOT_FOUND
        assert not kept.parts
        ref = there.bulk.offer_source(Read([3]), len(DATA))
        await here.pull(ANN, ref, kept, timeout_s=GENEROUS_S)
        assert kept.data == DATA
