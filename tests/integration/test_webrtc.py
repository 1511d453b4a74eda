"""WebRTC pipes between two ends in one process, over real sockets on loopback; and far ends that break the rules."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.node.reach.webrtc import WebRtc, WebRtcPipe, local_addresses, open_webrtc
from shoal.node.reach.webrtc_pipe import MESSAGE_BYTES, MESSAGE_COST, WINDOW_BYTES, WebRtcError

pytestmark = pytest.mark.trio

GENEROUS_S = 30.0


def loopback() -> list[str]:
    return ["127.0.0.1"]


@asynccontextmanager
async def open_pipes(
    addresses: Callable[[], list[str]] = loopback,
) -> AsyncIterator[tuple[WebRtcPipe, WebRtcPipe]]:
    """Both ends of a pipe, each with a thread of its own."""
    with trio.fail_after(GENEROUS_S):
        async with open_webrtc(addresses) as one, open_webrtc(addresses) as other:
            yield await connect(one, other)


async def connect(one: WebRtc, other: WebRtc) -> tuple[WebRtcPipe, WebRtcPipe]:
    offer = await one.offer([])
    answer = await other.answer(offer.sdp, [])
    await offer.accept(answer.sdp)
    return await offer.connected(GENEROUS_S), await answer.connected(GENEROUS_S)


async def read_exactly(pipe: WebRtcPipe, num_bytes: int) -> bytes:
    taken = bytearray()
    while len(taken) < num_bytes:
        piece = await pipe.read(num_bytes - len(taken))
        assert piece, f"the pipe ended after {len(taken)} of {num_bytes} bytes"
        taken += piece
    return bytes(taken)


async def read_to_end(pipe: WebRtcPipe) -> bytes:
    taken = bytearray()
    while piece := await pipe.read():
        taken += piece
    return bytes(taken)


def num_sockets() -> int:
    links = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return sum(1 for fd in links if str(fd.readlink()).startswith("socket:"))


def webrtc_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "webrtc"]


# --- the pipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_pipe_carries_20_mb_each_way_at_once_and_intact(address: str) -> None:
    num_bytes = 20_000_000 if address == "127.0.0.1" else 1_000_000
    there, back = (random.Random(seed).randbytes(num_bytes) for seed in (1, 2))
    async with open_pipes(lambda: [address]) as (one, other), trio.open_nursery() as nursery:
        assert (one.get_remote_address() or ("", 0))[0] == address

        async def check(pipe: WebRtcPipe, expected: bytes) -> None:
            assert await read_exactly(pipe, num_bytes) == expected

        nursery.start_soon(one.write, there)
        nursery.start_soon(other.write, back)
        nursery.start_soon(check, other, there)
        nursery.start_soon(check, one, back)


async def test_reads_of_any_size_give_the_same_bytes() -> None:
    data = random.Random(3).randbytes(100_000)
    async with open_pipes() as (one, other):
        await one.write(data)
        taken = b""
        for size in (1, 2, 3, MESSAGE_BYTES + 1, 7, len(data)):
            taken += await other.read(size)
        assert await other.read(0) == b""
        taken += await read_exactly(other, len(data) - len(taken))
        assert taken == data


@pytest.mark.parametrize("size", [1, MESSAGE_BYTES])
async def test_a_reader_that_does_not_read_holds_the_writer_within_the_window(size: int) -> None:
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            await one.write(bytes(size))
            written += size

    async with open_pipes() as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()  # the writer waits for credit, and nobody gives it
        held = written
        num_messages = held // size
        assert WINDOW_BYTES - 2 * (size + MESSAGE_COST) < num_messages * (size + MESSAGE_COST) <= WINDOW_BYTES
        await read_exactly(other, held + 1)  # reading lets it go on
        assert sum(map(len, other._unread)) <= WINDOW_BYTES
        nursery.cancel_scope.cancel()


async def test_closing_one_end_ends_the_other_after_all_that_was_written() -> None:
    data = random.Random(4).randbytes(700_000)
    async with open_pipes() as (one, other):
        await one.write(data)
        await one.close()
        assert await read_to_end(other) == data
        assert await other.read() == b""
        for pipe in (one, other):
            with pytest.raises(ConnectionClosedError):
                await pipe.write(b"more")
        assert await one.read() == b""
        await one.close()


async def test_a_close_wakes_a_reader_and_a_writer_that_wait() -> None:
    async with open_pipes() as (one, other):
        ends: list[str] = []

        async def read() -> None:
            assert await one.read() == b""
            ends.append("read")

        async def write() -> None:
            with pytest.raises(ConnectionClosedError):
                await one.write(bytes(2 * WINDOW_BYTES))
            ends.append("write")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            await other.close()
        assert sorted(ends) == ["read", "write"]


async def test_the_end_of_webrtc_ends_its_pipes_on_both_sides() -> None:
    with trio.fail_after(GENEROUS_S):
        async with open_webrtc(loopback) as other:
            async with open_webrtc(loopback) as one:
                near, far = await connect(one, other)
            assert await far.read() == b""
            assert await near.read() == b""
            with pytest.raises(WebRtcError, match="stopping"):
                await one.offer([])


# --- what is left over -----------------------------------------------------------------------------------------------


async def test_an_idle_node_has_no_thread_and_does_not_import_aiortc() -> None:
    async with open_webrtc():
        assert not webrtc_threads()
    code = "import sys, shoal.node.reach.webrtc; print({'aiortc', 'aioice', 'av', 'uvloop'} & set(sys.modules))"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert done.stdout == b"set()\n"


@pytest.mark.parametrize("step", ["gathering", "connecting", "dropped", "given up"])
async def test_a_connection_that_is_given_up_leaves_nothing(step: str, silent_stun: tuple[str, int]) -> None:
    before = num_sockets()
    with trio.fail_after(GENEROUS_S):
        async with open_webrtc(loopback) as one:
            with trio.CancelScope() as scope:
                if step == "gathering":
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(one.offer, [silent_stun])
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
                offer = await one.offer([])
                if step == "connecting":
                    scope.cancel()
                    await offer.connected(GENEROUS_S)
                elif step == "given up":
                    with pytest.raises(WebRtcError, match="within"):
                        await offer.connected(0.01)
                await offer.aclose()
            began = trio.current_time()
        assert trio.current_time() - began < 1
    assert not webrtc_threads()
    assert num_sockets() == before


async def test_connections_given_up_at_any_moment_leave_no_task_behind() -> None:
    async def settled(web_rtc: WebRtc) -> set[str]:
        """The tasks that do not end, of all that there are in the thread."""
        assert web_rtc._thread is not None
        alive = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait({end._closing for end in web_rtc._thread._ends} or alive, timeout=3)
        alive = {task for task in alive if "_serve" not in repr(task)}
        late = (await asyncio.wait(alive, timeout=3))[1] if alive else set()
        return {repr(task) for task in late}

    with trio.fail_after(GENEROUS_S):
        async with open_webrtc(loopback) as one, open_webrtc(loopback) as other:
            await (await one.offer([])).aclose()  # the threads have started
            for moment in range(30):
                async with (
                    aclosing(await one.offer([])) as offer,
                    aclosing(await other.answer(offer.sdp, [])) as answer,
                ):
                    with trio.move_on_after(moment / 1000):
                        await offer.accept(answer.sdp)
                        await (await offer.connected(GENEROUS_S)).close()
            for web_rtc in (one, other):
                assert web_rtc._thread is not None
                future = asyncio.run_coroutine_threadsafe(settled(web_rtc), web_rtc._thread.loop)
                assert await trio.to_thread.run_sync(future.result) == set()
                assert not web_rtc._thread._ends


async def test_a_closed_pipe_frees_its_sockets_while_the_node_goes_on() -> None:
    async with open_pipes() as (one, other):
        (gone,) = one._end._ends
        await one.close()
        assert await other.read() == b""
        await in_thread(one, lambda: gone._closing)
        assert not one._end._ends
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(other.get_remote_address() or ("", 0))


# --- gathering -------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_stun() -> Iterator[tuple[str, int]]:
    """A STUN server that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()


async def serve_stun(sock: trio.socket.SocketType, seen_as: tuple[str, int], *, broken: bool = False) -> None:
    """Answer Binding requests (RFC 5389) with one and the same address."""
    cookie = 0x2112A442
    while True:
        question, asker = await sock.recvfrom(1500)
        port = seen_as[1] ^ cookie >> 16
        ip = int.from_bytes(socket.inet_aton(seen_as[0])) ^ cookie
        mapped = b"" if broken else struct.pack("!HHBBHI", 0x0020, 8, 0, 1, port, ip)
        await sock.sendto(struct.pack("!HHI", 0x0101, len(mapped), cookie) + question[8:20] + mapped, asker)


@asynccontextmanager
async def open_stun(seen_as: tuple[str, int], *, broken: bool = False) -> AsyncIterator[tuple[str, int]]:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve_stun(sock, seen_as, broken=broken))
            yield sock.getsockname()
            nursery.cancel_scope.cancel()


async def test_a_stun_server_that_does_not_answer_delays_no_longer_than_allowed(silent_stun: tuple[str, int]) -> None:
    async with open_webrtc(loopback) as one:
        await (await one.offer([])).aclose()  # the thread has started
        began = trio.current_time()
        offer = await one.offer([silent_stun], gather_s=0.2)
        assert 0.2 <= trio.current_time() - began < 1.5  # aioice's own patience is 5 s
        assert "typ host" in offer.sdp
        assert "typ srflx" not in offer.sdp


async def test_the_first_stun_server_that_answers_is_believed(silent_stun: tuple[str, int]) -> None:
    async with (
        open_stun(("203.0.113.7", 4007)) as stun,
        open_stun(("0.0.0.0", 0), broken=True) as broken,
        open_stun(("0.0.0.0", 0)) as lying,
        open_webrtc(loopback) as one,
    ):
        began = trio.current_time()
        offer = await one.offer([silent_stun, broken, ("stun.example", 3478), lying, stun], gather_s=GENEROUS_S)
        assert trio.current_time() - began < GENEROUS_S / 2
        assert re.search(r"203\.0\.113\.7 4007 typ srflx raddr 127\.0\.0\.1 rport \d+", offer.sdp), offer.sdp


async def test_a_machine_without_an_address_says_so_at_once() -> None:
    async with open_webrtc(list) as one:
        with pytest.raises(WebRtcError, match="no IP address"):
            await one.offer([])


async def test_what_only_this_machine_or_link_can_reach_is_not_offered() -> None:
    addresses = local_addresses()
    assert not {"127.0.0.1", "::1"} & set(addresses)
    assert not [one for one in addresses if one.startswith(("fe80:", "169.254."))]


# --- hostile session descriptions ------------------------------------------------------------------------------------


def add(line: str, times: int = 1) -> Callable[[str], str]:
    return lambda sdp: sdp + f"{line}\r\n" * times


def replace(pattern: str, by: str) -> Callable[[str], str]:
    return lambda sdp: re.sub(pattern, by, sdp)


AUDIO = "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\nc=IN IP4 0.0.0.0\r\na=mid:1\r\na=rtpmap:0 PCMU/8000"
HOSTILE = {
    "empty": lambda _: "",
    "huge": add("a=x", 100_000),
    "garbage": lambda _: random.Random(5).randbytes(2000).decode("latin-1"),
    "ascii garbage": lambda _: "".join(chr(random.Random(6).randrange(128)) for _ in range(2000)),
    "cut": lambda sdp: sdp[: len(sdp) // 2],
    "with audio": add(AUDIO),
    "audio alone": lambda sdp: sdp[: sdp.index("m=")] + AUDIO + "\r\n",
    "two channels": lambda sdp: sdp + sdp[sdp.index("m=") :],
    "other profile": replace("UDP/DTLS/SCTP", "TCP/DTLS/SCTP"),
    "too many candidates": add("a=candidate:1 1 udp 1 127.0.0.1 9 typ host", 40),
    "a name for an address": add("a=candidate:1 1 udp 1 host.local 9 typ host"),
    "a multicast address": add("a=candidate:1 1 udp 1 224.0.0.1 9 typ host"),
    "no port": add("a=candidate:1 1 udp 1 127.0.0.1 0 typ host"),
    "an endless number": add("a=sctp-port:" + "9" * 6000),
    "no such port": replace(r"sctp-port:\d+", "sctp-port:70000"),
    "tiny messages": replace(r"max-message-size:\d+", "max-message-size:1"),
    "no fingerprint": replace(r"a=fingerprint:.*\r\n", ""),
    "no password": replace(r"a=ice-pwd:.*\r\n", ""),
    "a bad password": replace(r"a=ice-pwd:.*\r\n", "a=ice-pwd:x\r\n"),
    "no role": replace(r"a=setup:.*\r\n", ""),
    "bundled with nothing": replace(r"BUNDLE 0", "BUNDLE 7 0"),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_session_description_is_an_error_and_no_more(hostile: Callable[[str], str]) -> None:
    before = num_sockets()
    with trio.fail_after(GENEROUS_S):
        async with open_webrtc(loopback) as one, open_webrtc(loopback) as other:
            offer = await one.offer([])
            with pytest.raises(WebRtcError):
                await other.answer(hostile(offer.sdp), [])
            answer = await other.answer(offer.sdp, [])
            with pytest.raises(WebRtcError):
                await offer.accept(hostile(answer.sdp))
            with pytest.raises(WebRtcError):
                await offer.connected(GENEROUS_S)
            near, far = await connect(one, other)  # all works on
            await near.write(b"still here")
            assert await read_exactly(far, 10) == b"still here"
    assert num_sockets() == before


# --- hostile far ends ------------------------------------------------------------------------------------------------


async def in_thread(pipe: WebRtcPipe, act: Callable[[], Awaitable[object]]) -> None:
    """Let a far end do something in its asyncio thread."""

    async def run() -> None:
        await act()

    future = asyncio.run_coroutine_threadsafe(run(), pipe._end.loop)
    await trio.to_thread.run_sync(future.result)


async def flood(pipe: WebRtcPipe) -> None:
    for _ in range(WINDOW_BYTES // MESSAGE_BYTES + 1):
        pipe._end._channel.send(bytes(MESSAGE_BYTES))


async def flood_small(pipe: WebRtcPipe) -> None:
    for _ in range(WINDOW_BYTES // MESSAGE_COST + 1):
        pipe._end._channel.send(b"x")


def say(text: str) -> Callable[[WebRtcPipe], Awaitable[None]]:
    async def grant(pipe: WebRtcPipe) -> None:
        pipe._end._channel.send(text)

    return grant


async def send_endless_message(pipe: WebRtcPipe) -> None:
    from aiortc.rtcsctptransport import WEBRTC_BINARY

    await pipe._end._sctp._send(0, WEBRTC_BINARY, bytes(2 * WINDOW_BYTES))


async def send_crumbs(pipe: WebRtcPipe) -> None:
    from aiortc.rtcsctptransport import SCTP_DATA_FIRST_FRAG, WEBRTC_BINARY, DataChunk

    chunk = DataChunk(flags=SCTP_DATA_FIRST_FRAG)
    chunk.tsn, chunk.protocol, chunk.user_data = pipe._end._sctp._local_tsn, WEBRTC_BINARY, b"x"
    await pipe._end._sctp._send_chunk(chunk)


async def send_all_but_the_first_message(pipe: WebRtcPipe) -> None:
    sctp = pipe._end._sctp
    sctp._outbound_stream_seq[0] += 1
    await send_small(pipe, 3000)


async def send_all_but_the_first_chunk(pipe: WebRtcPipe) -> None:
    from aiortc.rtcsctptransport import tsn_plus_one

    sctp = pipe._end._sctp
    sctp._local_tsn = tsn_plus_one(sctp._local_tsn)
    await send_small(pipe, 3000)


async def send_small(pipe: WebRtcPipe, count: int) -> None:
    from aiortc.rtcsctptransport import WEBRTC_BINARY

    del pipe._end._sctp._receive_chunk  # its own guard would end this
    pipe._end._sent = 2**60
    for _ in range(count):
        await pipe._end._sctp._send(0, WEBRTC_BINARY, b"x")


async def send_to_another_stream(pipe: WebRtcPipe) -> None:
    from aiortc.rtcsctptransport import WEBRTC_BINARY

    await pipe._end._sctp._send(77, WEBRTC_BINARY, b"x")


async def send_skip(pipe: WebRtcPipe) -> None:
    from aiortc.rtcsctptransport import ForwardTsnChunk

    skip = ForwardTsnChunk()
    skip.cumulative_tsn = pipe._end._sctp._local_tsn + 1000
    skip.streams = [(stream, 0) for stream in range(200)]
    await pipe._end._sctp._send_chunk(skip)


async def send_gaps(pipe: WebRtcPipe) -> None:
    from aiortc.rtcsctptransport import SackChunk

    sack = SackChunk()
    sack.cumulative_tsn = pipe._end._sctp._last_received_tsn or 0
    sack.gaps = [(1, 0xFFFF)] * 250
    await pipe._end._sctp._send_chunk(sack)


@pytest.mark.parametrize(
    ("misbehave", "named"),
    [
        (flood, "more bytes than granted"),
        (flood_small, "more bytes than granted"),
        (say(str(10 * WINDOW_BYTES)), "a grant that cannot be"),
        (say(str(WINDOW_BYTES + 1)), "a grant that cannot be"),
        (say("-1"), "a grant that cannot be"),
        (say("9" * 5000), "a grant that cannot be"),
        (say("١٢"), "a grant that cannot be"),
        (send_endless_message, "more than its window"),
        (send_all_but_the_first_message, "more than its window"),
        (send_all_but_the_first_chunk, "more than its window"),
        (send_crumbs, "crumbs of a message"),
        (send_to_another_stream, "a channel that was not agreed on"),
        (send_skip, "a skip on a reliable channel"),
        (send_gaps, "acknowledgements that cannot be"),
    ],
)
async def test_a_far_end_that_breaks_the_rules_is_cut_off(
    misbehave: Callable[[WebRtcPipe], Awaitable[None]], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_pipes() as (one, other):
        await one.write(b"hello")
        assert await read_exactly(other, 5) == b"hello"
        await in_thread(one, lambda: misbehave(one))
        if misbehave is send_all_but_the_first_chunk:
            await read_to_end(other)
        while other._ended is None:  # and nobody reads
            await other._changed.park()
        with pytest.raises(ConnectionClosedError, match=named):
            await other.write(b"x")
        assert named in caplog.text


async def test_stray_datagrams_do_not_end_a_pipe() -> None:
    async with open_pipes() as (one, other):
        address = one.get_remote_address()
        assert address is not None
        bad_stun = struct.pack("!HHI12s HHI", 0x0001, 8, 0x2112A442, bytes(12), 0x20, 1, 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for stray in (
                b"",
                b"x",
                bytes(1400),
                b"\x16" * 100,
                b"\x80" * 100,
                bad_stun,
            ):
                stranger.sendto(stray, address)
        await one.write(b"after them")
        assert await read_exactly(other, 10) == b"after them"


async def test_there_is_a_limit_to_connections_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_webrtc(loopback) as one:
        first = await one.offer([])
        from shoal.node.reach import webrtc_end

        monkeypatch.setattr(webrtc_end, "MAX_ENDS", 1)
        with pytest.raises(WebRtcError, match="more than 1"):
            await one.offer([])
        (closing,) = first._pipe._end._ends
        await first.aclose()
        await in_thread(first._pipe, lambda: closing._closing)
        await one.offer([])


async def test_a_pipe_that_nobody_takes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.node.reach import webrtc_end

    monkeypatch.setattr(webrtc_end, "MAX_PENDING_S", 1.0)
    with trio.fail_after(GENEROUS_S):
        async with open_webrtc(loopback) as one:
            offer = await one.offer([])
            with pytest.raises(WebRtcError, match="nobody took"):
                await offer.connected(GENEROUS_S)


async def test_where_aiortc_cannot_be_loaded_webrtc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    async with open_webrtc(loopback) as one:
        with pytest.raises(WebRtcError, match="does not work here"):
            await one.offer([])


# --- libp2p over it --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_libp2p() -> AsyncIterator[IHost]:
    key_pair = create_new_key_pair()
    noise = NoiseTransport(key_pair, noise_privkey=create_new_x25519_key_pair().private_key)
    host = new_host(key_pair=key_pair, sec_opt={NOISE_PROTOCOL_ID: noise})
    async with background_trio_service(host.get_network()):
        yield host
        await host.close()


async def test_libp2p_upgrades_a_pipe_and_streams_run_both_ways() -> None:
    echo = TProtocol("/test/echo/1")
    data = random.Random(7).randbytes(1_000_000)

    async def serve(stream: INetStream) -> None:
        taken = b""
        while len(taken) < len(data):
            taken += await stream.read(len(data) - len(taken))
        await stream.write(taken[::-1])
        await stream.close()

    async with open_pipes() as (one, other), open_libp2p() as dialer, open_libp2p() as listener:
        for host in (dialer, listener):
            host.set_stream_handler(echo, serve)
        async with trio.open_nursery() as nursery:
            address = Multiaddr("/ip4/127.0.0.1/udp/1/webrtc-direct")
            nursery.start_soon(
                listener.get_network().upgrade_inbound_raw_conn, RawConnection(other, initiator=False), address
            )
            await dialer.get_network().upgrade_outbound_raw_conn(RawConnection(one, initiator=True), listener.get_id())
        for asker, asked in ((dialer, listener), (listener, dialer)):
            stream = await asker.new_stream(asked.get_id(), [echo])
            await stream.write(data)
            taken = b""
            while len(taken) < len(data):
                taken += await stream.read(len(data) - len(taken))
            assert taken == data[::-1]
            await stream.close()
