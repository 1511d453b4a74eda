"""A lane stands between the two who agreed on it and nobody else, whatever strangers send to the door."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import random
import socket
import ssl
import struct
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from shoal.node.wire import lanes
from shoal.node.wire.channel import StreamClosedError
from shoal.node.wire.lanes import (
    LaneDoor,
    LaneError,
    LaneKind,
    LaneTicket,
    TlsByteStream,
    dial_lane,
    peek_first_byte,
)
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId

pytestmark = pytest.mark.trio

ANN, BOB = PeerId.of_public_key(b"\x01" * 32), PeerId.of_public_key(b"\x02" * 32)
GENEROUS_S = 30.0
Accepted = tuple[PeerId, LaneKind, ssl.SSLSocket] | None


class Entrance:
    """A door on a loopback port that lets in one connection after the other, each in a task of its own."""

    def __init__(self, door: LaneDoor, listener: socket.socket) -> None:
        self.door = door
        self.ip, self.port = listener.getsockname()[:2]
        self.ips = itertools.repeat(self.ip)  # where they are said to come from
        self._listener = trio.socket.from_stdlib_socket(listener)
        self._arrive, self.arrivals = trio.open_memory_channel[Accepted](1000)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await self._listener.accept()
                nursery.start_soon(self._take, sock)

    async def _take(self, sock: trio.socket.SocketType) -> None:
        await self._arrive.send(await self.door.accept(sock, next(self.ips)))

    async def dial(self, ticket: LaneTicket, kind: LaneKind = LaneKind.CALLS, timeout_s: float = GENEROUS_S):
        return await dial_lane(self.ip, self.port, ticket, kind, timeout_s=timeout_s)

    async def connect(self) -> trio.SocketStream:
        """A bare connection, for whoever does not play by the rules."""
        return await trio.open_tcp_stream(self.ip, self.port)


@asynccontextmanager
async def entrance(ip: str = "127.0.0.1") -> AsyncIterator[Entrance]:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.create_server((ip, 0), family=family) as listener:
        async with trio.open_nursery() as nursery:
            there = Entrance(LaneDoor(), listener)
            nursery.start_soon(there.run)
            yield there
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def lane() -> AsyncIterator[tuple[TlsByteStream, TlsByteStream]]:
    """Both ends of a lane."""
    async with entrance() as there:
        ours = TlsByteStream(await there.dial(there.door.ticket(ANN, LaneKind.CALLS)))
        arrived = await there.arrivals.receive()
        assert arrived is not None
        theirs = TlsByteStream(arrived[2])
        with trio.fail_after(GENEROUS_S):
            yield ours, theirs
        await ours.close()
        await theirs.close()


async def read_all(stream: TlsByteStream, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += await stream.read()
    return data


# --- who gets in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
async def test_a_ticket_opens_a_lane_that_knows_its_peer_and_kind(ip: str) -> None:
    try:
        socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {ip}")
    async with entrance(ip) as there:
        for peer, kind in ((ANN, LaneKind.CALLS), (BOB, LaneKind.BULK)):
            dialed = await there.dial(there.door.ticket(peer, kind), kind)
            arrived = await there.arrivals.receive()
            assert arrived is not None
            assert arrived[:2] == (peer, kind)
            for tls in (dialed, arrived[2]):
                assert tls.version() == "TLSv1.3"
                assert not tls.getblocking()
                assert tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert tls.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
                tls.close()


async def refused(there: Entrance, ticket: LaneTicket, kind: LaneKind = LaneKind.CALLS) -> str:
    with pytest.raises(LaneError) as caught:
        await there.dial(ticket, kind)
    assert await there.arrivals.receive() is None
    return str(caught.value)


async def test_a_ticket_is_good_once() -> None:
    async with entrance() as there:
        ticket = there.door.ticket(ANN, LaneKind.CALLS)
        (await there.dial(ticket)).close()
        arrived = await there.arrivals.receive()
        assert arrived is not None
        arrived[2].close()
        await refused(there, ticket)


async def test_a_ticket_for_one_kind_opens_no_lane_of_another() -> None:
    async with entrance() as there:
        ticket = there.door.ticket(ANN, LaneKind.CALLS)
        await refused(there, ticket, LaneKind.BULK)
        await refused(there, ticket, LaneKind.CALLS)  # nor the right one after a wrong try


async def test_a_ticket_expires(mock_clock: trio.testing.MockClock) -> None:
    async with entrance() as there:
        ticket = there.door.ticket(ANN, LaneKind.CALLS)
        mock_clock.jump(lanes.TICKET_LIFE_S)
        await refused(there, ticket)


async def test_a_token_is_never_shown_to_the_wrong_certificate() -> None:
    async with entrance() as there:
        stranger = LaneDoor()
        ticket = stranger.ticket(BOB, LaneKind.CALLS)
        there.door._issued.update(stranger._issued)  # so the token would open this door, if it were shown
        assert "somebody is in between" in await refused(there, ticket)
        assert ticket.token in there.door._issued


async def test_a_made_up_or_malformed_ticket_opens_nothing() -> None:
    async with entrance() as there:
        ticket = there.door.ticket(ANN, LaneKind.CALLS)
        await refused(there, dataclasses.replace(ticket, token=bytes(32)))
        for malformed in (dataclasses.replace(ticket, token=b""), dataclasses.replace(ticket, fingerprint=b"short")):
            with pytest.raises(LaneError, match="malformed"):
                await there.dial(malformed)


async def test_tickets_are_bounded_for_one_peer_and_for_all(mock_clock: trio.testing.MockClock) -> None:
    door = LaneDoor()
    for _ in range(lanes.MAX_TICKETS_PER_PEER):
        door.ticket(ANN, LaneKind.CALLS)
    with pytest.raises(RemoteError) as caught:
        door.ticket(ANN, LaneKind.BULK)
    assert caught.value.status is Status.RESOURCE_EXHAUSTED
    for number in range(lanes.MAX_TICKETS - lanes.MAX_TICKETS_PER_PEER):
        door.ticket(PeerId.of_public_key(hashlib.sha256(bytes([number])).digest()), LaneKind.CALLS)
    with pytest.raises(RemoteError):
        door.ticket(BOB, LaneKind.CALLS)
    mock_clock.jump(lanes.TICKET_LIFE_S)
    door.ticket(ANN, LaneKind.CALLS)


async def test_nobody_there_or_a_silent_listener_is_a_lane_error() -> None:
    ticket = LaneTicket(bytes(32), bytes(32))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(LaneError, match="did not stand within"):
            await dial_lane(*silent.getsockname(), ticket, LaneKind.CALLS, timeout_s=0.05)
        address = silent.getsockname()
    with pytest.raises(LaneError, match="refused"):
        await dial_lane(*address, ticket, LaneKind.CALLS, timeout_s=GENEROUS_S)
    with pytest.raises(LaneError):
        await dial_lane("not.an.ip", 1, ticket, LaneKind.CALLS, timeout_s=GENEROUS_S)


# --- strangers at the door -------------------------------------------------------------------------------------------


async def say_and_leave(stranger: trio.SocketStream, words: bytes | bytearray) -> None:
    with contextlib.suppress(trio.BrokenResourceError):  # the door may be shut before all is said
        await stranger.send_all(words)
        await stranger.send_eof()


@pytest.mark.parametrize(
    "garbage",
    [b"\x16" * 1000, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600), b"GET / HTTP/1.1\r\n\r\n", b""],
)
async def test_garbage_is_let_go(garbage: bytes) -> None:
    async with entrance() as there, await there.connect() as stranger:
        await say_and_leave(stranger, garbage)
        assert await there.arrivals.receive() is None


async def test_random_changes_of_a_real_greeting_are_let_go() -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    outgoing = ssl.MemoryBIO()
    client = lanes._client_context().wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    greeting = outgoing.read()
    async with entrance() as there:
        for _ in range(50):
            changed = bytearray(greeting)
            for _ in range(chance.randrange(1, 5)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            async with await there.connect() as stranger:
                await say_and_leave(stranger, changed[: chance.randrange(1, len(changed) + 1)])
            assert await there.arrivals.receive() is None, f"seed {seed}"


async def test_old_tls_is_not_spoken() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with entrance() as there, trio.SSLStream(await there.connect(), old) as stranger:
        with pytest.raises(trio.BrokenResourceError):
            await stranger.do_handshake()
        assert await there.arrivals.receive() is None


@pytest.mark.parametrize("as_server", [True, False])
async def test_who_is_gone_before_the_handshake_leaves_no_socket_behind(as_server: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _ in range(8):
                stranger = socket.create_connection(listener.getsockname())
                met, _ = listener.accept()
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.close()  # by a reset
                await trio.lowlevel.wait_readable(met.fileno())
                if as_server:
                    assert await LaneDoor().accept(met, "127.0.0.1") is None
                else:
                    with pytest.raises(OSError):
                        lanes._client_context().wrap_socket(met, do_handshake_on_connect=False)
        gc.collect()
    assert [str(each.message) for each in caught if issubclass(each.category, ResourceWarning)] == []


async def test_a_slow_handshake_is_cut_off(mock_clock: trio.testing.MockClock) -> None:
    async with entrance() as there, await there.connect() as stranger:
        await stranger.send_all(b"\x16")
        await trio.testing.wait_all_tasks_blocked(0.02)
        mock_clock.jump(lanes.HANDSHAKE_S)
        assert await there.arrivals.receive() is None
        assert await stranger.receive_some() == b""


async def test_half_open_handshakes_are_bounded_and_block_nobody_afterwards(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with entrance() as there:
        there.ips = itertools.cycle(f"10.0.0.{number}" for number in range(lanes.MAX_HANDSHAKES))
        strangers = [await there.connect() for _ in range(lanes.MAX_HANDSHAKES + 1)]
        assert await there.arrivals.receive() is None  # the one too many; the others still wait
        mock_clock.jump(lanes.HANDSHAKE_S)
        for _ in range(lanes.MAX_HANDSHAKES):
            assert await there.arrivals.receive() is None
        for stranger in strangers:
            await stranger.aclose()
        (await there.dial(there.door.ticket(ANN, LaneKind.CALLS))).close()
        arrived = await there.arrivals.receive()
        assert arrived is not None
        arrived[2].close()


async def test_one_address_cannot_hold_all_handshakes() -> None:
    async with entrance() as there:
        strangers = [await there.connect() for _ in range(lanes.MAX_HANDSHAKES_PER_IP + 1)]
        assert await there.arrivals.receive() is None  # the one too many
        there.ips = itertools.repeat("10.0.0.1")
        (await there.dial(there.door.ticket(ANN, LaneKind.CALLS))).close()
        arrived = await there.arrivals.receive()
        assert arrived is not None
        arrived[2].close()
        for stranger in strangers:
            await stranger.aclose()


@pytest.mark.parametrize("of_trio", [True, False])
async def test_the_first_byte_tells_and_stays(of_trio: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        sock = trio.socket.from_stdlib_socket(theirs) if of_trio else theirs
        assert await peek_first_byte(sock, timeout_s=0.01) == b""  # nothing has come
        ours.sendall(b"\x16\x03")
        assert await peek_first_byte(sock, timeout_s=GENEROUS_S) == b"\x16"
        assert theirs.recv(100) == b"\x16\x03"
        ours.shutdown(socket.SHUT_WR)
        assert await peek_first_byte(sock, timeout_s=GENEROUS_S) == b""


# --- bytes on a lane -------------------------------------------------------------------------------------------------


async def test_what_is_written_is_read() -> None:
    async with lane() as (ours, theirs):
        for size in (1, 16 * 1024, 16 * 1024 + 1, 64 * 1024, 200_000):
            data = random.randbytes(size)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.write, memoryview(data))
                assert await read_all(theirs, size) == data
            assert theirs.try_write(b"thanks")
            assert await ours.read() == b"thanks"


async def test_much_both_ways_at_once_past_slow_readers_is_whole_and_in_order() -> None:
    sent = {0: random.randbytes(6_000_000), 1: random.randbytes(6_000_000)}
    received = {0: bytearray(), 1: bytearray()}

    async def write(stream: TlsByteStream, number: int) -> None:
        for start in range(0, len(sent[number]), 300_007):
            await stream.write(sent[number][start : start + 300_007])

    async def read(stream: TlsByteStream, number: int) -> None:
        while len(received[number]) < len(sent[number]):
            await trio.sleep(0.001)
            received[number] += await stream.read()

    async with lane() as ends, trio.open_nursery() as nursery:
        for number in (0, 1):
            nursery.start_soon(write, ends[number], number)
            nursery.start_soon(read, ends[1 - number], number)
    assert received == sent


async def test_a_writer_stops_when_nobody_reads_and_reads_come_in_bounded_pieces() -> None:
    num_written = 0

    async def write(stream: TlsByteStream) -> None:
        nonlocal num_written
        while True:
            await stream.write(bytes(256 * 1024))
            num_written += 256 * 1024

    async with lane() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(write, ours)
        await trio.testing.wait_all_tasks_blocked(0.1)
        held = num_written
        assert held < 64 * 1024 * 1024  # what the kernel takes at most
        while num_written <= held:
            assert len(await theirs.read()) < lanes.READ_BYTES + lanes.RECORD_BYTES
        nursery.cancel_scope.cancel()


async def test_what_could_not_go_at_once_goes_first_afterwards() -> None:
    async with lane() as (ours, theirs):
        expected = bytearray()
        while True:
            piece = random.randbytes(10_000)
            if not ours.try_write(piece):
                break
            expected += piece
        rest = piece + random.randbytes(200_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.write, rest)
            expected += rest
            assert await read_all(theirs, len(expected)) == expected


async def test_after_a_cancelled_write_nothing_more_is_written() -> None:
    async with lane() as (ours, _):
        with trio.move_on_after(0.05) as scope:
            await ours.write(bytes(100_000_000))
        assert scope.cancelled_caught
        with pytest.raises(StreamClosedError):
            await ours.write(b"more")
        with pytest.raises(StreamClosedError):
            ours.try_write(b"more")


async def test_a_cancelled_read_loses_nothing() -> None:
    async with lane() as (ours, theirs):
        with trio.move_on_after(0.01):
            await theirs.read()
        await ours.write(b"here")
        assert await theirs.read() == b"here"


async def test_close_wakes_a_reader_and_a_writer_on_both_sides() -> None:
    async def fails(act, *arguments: object) -> None:
        with pytest.raises(StreamClosedError):
            await act(*arguments)

    async with lane() as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, ours.read)
            nursery.start_soon(fails, ours.write, bytes(100_000_000))
            await trio.testing.wait_all_tasks_blocked(0.05)
            await ours.close()
        with pytest.raises(StreamClosedError):
            await read_all(theirs, 100_000_000)
        await fails(ours.read)
        await fails(ours.write, b"x")
        await ours.close()


async def test_others_run_beside_a_reader_who_never_has_to_wait() -> None:
    async with lane() as (ours, theirs):
        for _ in range(10 * lanes.TURNS):
            assert ours.try_write(b"x")
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await read_all(theirs, 10 * lanes.TURNS)
            nursery.cancel_scope.cancel()
        assert turns >= 8
