"""A hostile peer against a real node: whatever it sends, the others are answered, and the node neither grows nor falls.

One node process stands for all of these tests, so that nothing of one attack may be left behind for the next. The
attacker is a libp2p host of its own that speaks raw bytes on the node's protocols, or bare sockets on its port, from
another loopback address than the honest peer's, as another machine would be.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID

from shoal.node.mesh.host import Host, open_host
from shoal.node.wire.bulk import MAX_STREAMS as MAX_BULK_STREAMS
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import LaneRequest, LaneService, NodeService
from shoal.node.wire.lanes import LaneKind, LaneTicket, dial_lane
from shoal.node.wire.links import BULK_PROTOCOL, RPC_PROTOCOL, STREAM_PROTOCOL
from shoal.protocol.codec import encode
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.frames import FROM_CALLER, Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.limits import MAX_HELD_BYTES, MAX_STREAMS
from shoal.protocol.rpc import CreditHeader, ErrorHeader, request_header
from shoal.protocol.services import Empty, client

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 30.0
PROMPT_S = 2.0
"""Within which the honest peer is answered, whatever goes on; two cores are shared with the attacker."""
MIB = 1024 * 1024
MAX_GROWTH_BYTES = 2 * MAX_HELD_BYTES + 32 * MIB
"""Of the node's resident memory over all attacks together: what one peer may hold of calls, and of unfinished frames,
and what lies in the windows of its streams."""
GARBAGE = bytes(range(256)) * 256
IDENTIFY_BROKE_OFF = "Error sending identify response"
"""With this and a traceback libp2p itself reports a peer that left while it was told who this node is."""
BROKEN = (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)


class Victim:
    """The node under attack."""

    def __init__(self, home: Path) -> None:
        self._shoal = [sys.executable, "-m", "shoal.cli.main"]
        self._environment = os.environ | {"SHOAL_HOME": str(home)}
        self._log = home / "profiles" / "default" / "node.log"
        command = [*self._shoal, "up", "-d", "--json", "--no-mdns", "--listen", LOOPBACK]
        started = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True, timeout=60)
        self._info = json.loads(started.stdout)
        self.addresses: list[str] = self._info["addresses"]
        self.ip, self.port = self.addresses[0].split("/")[2], int(self.addresses[0].split("/")[4])
        self.rss_at_first = 0

    def rss(self) -> int:
        lines = Path(f"/proc/{self._info['pid']}/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._info['pid']}/fd").iterdir()))

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def confessions(self) -> list[str]:
        """What its log says of failures that nobody had foreseen."""
        lines = [line for line in self.log().splitlines() if line]
        found = [line for line in lines if "crash" in line]
        for before, line in pairwise(lines):
            if "Traceback" in line and not before.endswith(":") and not before.startswith(IDENTIFY_BROKE_OFF):
                found += [before, line]
        return found

    def down(self) -> None:
        subprocess.run([*self._shoal, "down"], env=self._environment, capture_output=True, check=True, timeout=60)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    node = Victim(tmp_path_factory.mktemp("victim"))
    yield node
    node.down()
    assert node.confessions() == []


@asynccontextmanager
async def stranger(victim: Victim) -> AsyncIterator[Host]:
    async with open_host(
        secret=os.urandom(32), listen=[LOOPBACK], bootstrap=(), mdns=False, router=Router(), lanes=False
    ) as opened:
        await opened.connect(victim.addresses)
        yield opened


@dataclass
class Attack:
    """An attacker beside an honest peer."""

    victim: Victim
    host: Host
    honest: Host
    slowest_s: float = 0.0
    grown: int = 0

    @property
    def peer(self) -> Any:
        return next(iter(self.host.connected))

    async def stream(self, protocol: str) -> Any:
        """A raw libp2p stream to the node."""
        peer = ID.from_base58(self.peer)
        return await self.host.libp2p.new_stream(peer, [TProtocol(protocol)])

    async def socket(self) -> trio.SocketStream:
        """A raw connection to the node's port."""
        sock = trio.socket.socket()
        await sock.bind(("127.0.0.2", 0))
        await sock.connect((self.victim.ip, self.victim.port))
        return trio.SocketStream(sock)

    async def check(self) -> None:
        """The honest peer is answered now, and the node did not grow."""
        peer = next(iter(self.honest.connected))
        began = trio.current_time()
        await client(NodeService, self.honest.at(peer), timeout_s=PROMPT_S).ping(Empty())
        self.slowest_s = max(self.slowest_s, trio.current_time() - began)
        self.grown = max(self.grown, self.victim.rss() - self.victim.rss_at_first)
        assert self.grown < MAX_GROWTH_BYTES, f"the node grew by {self.grown / MIB:.0f} MiB"

    async def watch(self) -> None:
        while True:
            await self.check()
            await trio.sleep(0.05)


@pytest.fixture
async def attack(victim: Victim, request: pytest.FixtureRequest) -> AsyncIterator[Attack]:
    """All the while and afterwards the honest peer is answered in time and the node does not grow."""
    with trio.fail_after(GENEROUS_S):
        async with stranger(victim) as honest:
            async with stranger(victim) as host, trio.open_nursery() as nursery:
                going_on = Attack(victim, host, honest)
                peer = next(iter(honest.connected))
                await client(NodeService, honest.at(peer)).ping(Empty())
                victim.rss_at_first = victim.rss_at_first or victim.rss()
                nursery.start_soon(going_on.watch)
                yield going_on
                nursery.cancel_scope.cancel()
            await going_on.check()
            async with stranger(victim) as newcomer:
                await client(NodeService, newcomer.at(peer), timeout_s=PROMPT_S).ping(Empty())
            slowest_ms, grown_mib = 1000 * going_on.slowest_s, going_on.grown / MIB
            print(f"\n{request.node.name}: slowest {slowest_ms:.0f} ms, grown {grown_mib:.1f} MiB at most")


def frame(kind: FrameType, call_id: int, header: bytes = b"", *, flags: int = 0) -> bytes:
    return b"".join(bytes(part) for part in encode_frame(Frame(kind, call_id, header, (), flags)))


def call(call_id: int, method: str = "node.ping", *, body: bytes = b"\x80", kind: int = 0) -> bytes:
    return frame(FrameType.REQUEST, call_id, request_header(method, 60_000, body, kind))


async def answers(stream: Any, num: int) -> list[Frame]:
    decoder, frames = FrameDecoder(), list[Frame]()
    while len(frames) < num:
        frames += decoder.receive_data(await stream.read(64 * 1024))
    return frames


async def send(stream: Any, data: bytes) -> bool:
    """Write as far as it is taken; gives back whether all was."""
    try:
        for start in range(0, len(data), 32 * 1024):
            await stream.write(data[start : start + 32 * 1024])
    except BROKEN:
        return False
    return True


async def is_ended(stream: Any) -> bool:
    """Read until the node has closed it."""
    with suppress(*BROKEN):
        while await stream.read(64 * 1024):
            pass
    return True


async def is_shut(sock: trio.SocketStream) -> bool:
    with suppress(trio.BrokenResourceError):
        while await sock.receive_some():
            pass
    return True


# --- bytes that are no calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [RPC_PROTOCOL, STREAM_PROTOCOL])
async def test_an_oversized_length_ends_the_stream_and_nothing_is_set_aside_for_it(
    attack: Attack, protocol: str
) -> None:
    for head in (
        struct.pack("!IBBIIH", 2**32 - 1, FrameType.REQUEST, 0, 1, 0, 0),
        struct.pack("!IBBIIH", 2**24, FrameType.REQUEST, 0, 1, 2**24, 0),
        struct.pack("!IBBIIHI", 2**31 - 1, FrameType.REQUEST, 0, 1, 0, 1, 2**31 - 1),
        struct.pack("!IBBIIH", 2**20, FrameType.REQUEST, 0, 1, 0, 2**16 - 1),
    ):
        stream = await attack.stream(protocol)
        await send(stream, head + bytes(64))
        assert await is_ended(stream)


@pytest.mark.parametrize("protocol", [RPC_PROTOCOL, STREAM_PROTOCOL])
async def test_garbage_ends_the_stream(attack: Attack, protocol: str) -> None:
    for garbage in (GARBAGE, b"\xff" * 65536, os.urandom(65536), b"GET / HTTP/1.1\r\n\r\n" * 100):
        stream = await attack.stream(protocol)
        await send(stream, garbage)
        assert await is_ended(stream)
    header_of_nonsense = frame(FrameType.REQUEST, 1, b"\xc1" * 100)
    stream = await attack.stream(protocol)
    await send(stream, header_of_nonsense)
    assert await is_ended(stream)


@pytest.mark.parametrize("protocol", [RPC_PROTOCOL, STREAM_PROTOCOL, BULK_PROTOCOL])
async def test_a_stream_without_end_fills_nothing(attack: Attack, protocol: str) -> None:
    stream = await attack.stream(protocol)
    piece = frame(FrameType.ANSWER, 77, bytes(30_000)) if protocol != BULK_PROTOCOL else bytes(30_016)
    with trio.move_on_after(2):  # a stream of bulk requests is served one by one
        for _ in range(1000):
            if not await send(stream, piece):
                break


async def test_a_peer_that_ignores_the_window_of_a_stream_fills_nothing(attack: Attack) -> None:
    stream = await attack.stream(BULK_PROTOCOL)
    stream.muxed_stream.send_window = 1 << 40
    for _ in range(10_000):  # 300 MB
        if not await send(stream, bytes(30_016)):
            return
    pytest.fail("all of it was taken")


# --- calls, as many as it likes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["node.ping", "no.such.method", "swarm.sync"])
async def test_a_hundred_thousand_calls_at_once_whose_answers_are_not_read(attack: Attack, method: str) -> None:
    stream = await attack.stream(RPC_PROTOCOL)
    is_taken = True
    for first in range(1, 100_001, 1000):
        is_taken = is_taken and await send(stream, b"".join(call(first + n, method) for n in range(1000)))
    assert not is_taken, "the node goes on with a peer that does not read"


async def test_far_too_many_calls_at_once_are_each_answered_or_refused(attack: Attack) -> None:
    stream = await attack.stream(RPC_PROTOCOL)
    for first in range(1, 30_001, 1000):
        assert await send(stream, b"".join(call(first + n) for n in range(1000)))
        frames = await answers(stream, 1000)
        assert {each.call_id for each in frames} == set(range(first, first + 1000))
        assert {each.type for each in frames} <= {FrameType.ANSWER, FrameType.ERROR}


# --- ids -------------------------------------------------------------------------------------------------------------


async def test_frames_of_calls_that_nobody_made_change_nothing(attack: Attack) -> None:
    stream = await attack.stream(RPC_PROTOCOL)
    for call_id in (0, 1, 77, 2**32 - 1):
        for flags in (0, FROM_CALLER):
            await send(stream, frame(FrameType.MESSAGE, call_id, b"\x80", flags=flags))
            await send(stream, frame(FrameType.CREDIT, call_id, encode(CreditHeader(2**30)), flags=flags))
            await send(stream, frame(FrameType.END, call_id, flags=flags))
        await send(stream, frame(FrameType.ANSWER, call_id, b"\x80"))
        await send(stream, frame(FrameType.ERROR, call_id, encode(ErrorHeader(Status.INTERNAL, "x"))))
        await send(stream, frame(FrameType.CANCEL, call_id))
    await send(stream, call(5))
    assert (await answers(stream, 1))[0][:2] == (FrameType.ANSWER, 5)


async def test_an_id_may_be_used_again_only_when_its_call_is_over(attack: Attack) -> None:
    stream = await attack.stream(RPC_PROTOCOL)
    for _ in range(3):
        await send(stream, call(5))
        assert (await answers(stream, 1))[0][:2] == (FrameType.ANSWER, 5)
    await send(stream, 2 * call(5, "content.block"))
    assert await is_ended(stream)


# --- half of everything ----------------------------------------------------------------------------------------------


async def test_silent_connections_are_closed_above_a_number_and_the_others_still_come_in(attack: Attack) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(200):
            await stack.enter_async_context(await attack.socket())
        await attack.check()
        async with stranger(attack.victim) as newcomer:
            assert newcomer.connected


@pytest.mark.parametrize("begin", [b"\x16", b"\x16\x03\x01\x02\x00\x01\x00", b"\x13", b"\x13/multistream/1"])
async def test_half_a_handshake_holds_nobody_up(attack: Attack, begin: bytes) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(150):
            sock = await stack.enter_async_context(await attack.socket())
            with suppress(trio.BrokenResourceError):  # there are too many of them already
                await sock.send_all(begin)
        await attack.check()
        async with stranger(attack.victim) as newcomer:
            assert newcomer.connected


async def test_garbage_on_the_port_is_shut(attack: Attack) -> None:
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16" + GARBAGE, b"\x13" + GARBAGE, b"\x00" * 65536):
        async with await attack.socket() as sock:
            with suppress(trio.BrokenResourceError):
                await sock.send_all(garbage)
                await sock.send_eof()
            assert await is_shut(sock)


async def test_more_streams_than_it_may_open(attack: Attack) -> None:
    descriptors = attack.victim.num_descriptors()
    answered = 0
    for _ in range(2 * MAX_STREAMS):
        with suppress(*BROKEN):
            stream = await attack.stream(STREAM_PROTOCOL)
            await stream.write(call(1))
            answered += (await answers(stream, 1))[0].type is FrameType.ANSWER
    # The honest part of the attacker's host has one of them, for its keepalive.
    assert MAX_STREAMS - 1 <= answered <= MAX_STREAMS
    assert attack.victim.num_descriptors() <= descriptors + 10


# --- bulk ------------------------------------------------------------------------------------------------------------


async def test_bulk_requests_for_what_was_never_offered_are_refused(attack: Attack) -> None:
    stream = await attack.stream(BULK_PROTOCOL)
    for offset, length in ((0, 0), (0, 1), (2**64 - 1, 2**64 - 1), (2**63, 2**63), (1, 2**64 - 1)):
        await send(stream, struct.pack("!16sQQ", os.urandom(16), offset, length))
        assert await stream.read(100) == bytes([Status.NOT_FOUND])


async def test_more_bulk_streams_than_are_served(attack: Attack) -> None:
    refused = 0
    for _ in range(MAX_STREAMS):
        with suppress(*BROKEN):
            stream = await attack.stream(BULK_PROTOCOL)
            await stream.write(struct.pack("!16sQQ", os.urandom(16), 0, 2**40))
            refused += await stream.read(100) == bytes([Status.NOT_FOUND])
    assert refused == MAX_BULK_STREAMS


# --- lanes -----------------------------------------------------------------------------------------------------------


async def test_junk_tokens_open_nothing(attack: Attack) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for hello in (bytes(33), os.urandom(33), b"\x01", os.urandom(10_000), b"\x02" + os.urandom(32)):
        async with await attack.socket() as sock:
            tls = trio.SSLStream(sock, context, https_compatible=True)
            with suppress(trio.BrokenResourceError):
                await tls.send_all(hello)
                if len(hello) < 33:
                    await sock.send_eof()
                assert await tls.receive_some(1) == b""


async def test_lanes_without_end_are_not_let_in(attack: Attack) -> None:
    service = client(LaneService, attack.host.at(attack.peer))
    sold: list[LaneTicket] = []

    async def buy_all() -> None:
        while True:
            sold.append(await service.ticket(LaneRequest(LaneKind.CALLS)))

    with pytest.raises(RemoteError) as caught:
        await buy_all()
    assert caught.value.status is Status.RESOURCE_EXHAUSTED
    lanes = [
        await dial_lane(attack.victim.ip, attack.victim.port, ticket, LaneKind.CALLS, timeout_s=GENEROUS_S)
        for ticket in sold
    ]
    for lane in lanes:
        lane.setblocking(True)
        with suppress(OSError):
            lane.sendall(GARBAGE)
        with suppress(OSError):
            while lane.recv(65536):
                pass
        lane.close()


async def test_a_flood_of_tickets_is_limited(attack: Attack) -> None:
    stream = await attack.stream(RPC_PROTOCOL)
    request = encode(LaneRequest(LaneKind.BULK))
    await send(stream, b"".join(call(n, "lane.ticket", body=request) for n in range(1, 201)))
    frames = await answers(stream, 200)
    assert sum(each.type is FrameType.ANSWER for each in frames) <= 8


@pytest.mark.parametrize("time", ["once", "again"])
async def test_half_a_frame_on_every_stream_that_it_may_open(attack: Attack, time: str) -> None:
    head = struct.pack("!IBBIIHI", 12 + 4 + 16 * MIB, FrameType.REQUEST, 0, 1, 0, 1, 16 * MIB)
    # The attacker's own host has a few for its keepalive.
    streams = [await attack.stream(STREAM_PROTOCOL) for _ in range(MAX_STREAMS - 4)]
    num_taken = 0

    async def send_half(stream: Any) -> None:
        nonlocal num_taken
        num_taken += await send(stream, head + bytes(4 * MIB))

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(send_half, stream)
    assert num_taken <= MAX_HELD_BYTES // (4 * MIB) + 1, f"{time}: of 240 MiB in all, more is held than a peer may have"


async def test_the_node_is_alive_and_has_nothing_to_confess(victim: Victim) -> None:
    with socket.create_connection((victim.ip, victim.port)):
        assert victim.confessions() == []
    assert victim.rss() - victim.rss_at_first < MAX_GROWTH_BYTES
