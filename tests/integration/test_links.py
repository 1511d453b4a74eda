"""Two nodes over real sockets: the same calls by libp2p and by lanes, whatever happens to the path on the way."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.node.mesh import keepalive
from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.wire import links as links_module
from shoal.node.wire.bulk import BulkRef, Transport
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import LaneRequest, LaneService, NodeService
from shoal.node.wire.lanes import LaneError, LaneKind, LaneTicket, dial_lane
from shoal.node.wire.links import Links
from shoal.protocol.codec import Attachment
from shoal.protocol.errors import NoPeersError, RemoteError, Status, UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_STREAMS, STREAM_WINDOW_BYTES
from shoal.protocol.services import (
    Empty,
    Service,
    bidirectional,
    client,
    client_streaming,
    current_call,
    server_streaming,
    unary,
)

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 30.0
MIB = 1024 * 1024
PIECE_BYTES = 64 * 1024
WINDOW_PIECES = STREAM_WINDOW_BYTES // PIECE_BYTES + 1
"""By how many pieces the sender of a stream may be ahead of its reader: the window, and one message more."""


@dataclass(frozen=True, slots=True)
class Word:
    text: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    number: int
    data: Attachment


class Talk(Service, name="talk"):
    """What both nodes of these tests serve."""

    @unary()
    async def once(self, request: Word) -> Word:
        raise NotImplementedError

    @unary(idempotent=True)
    async def again(self, request: Word) -> Word:
        raise NotImplementedError

    @server_streaming()
    def count_to(self, request: Piece) -> AsyncIterator[Piece]:
        raise NotImplementedError

    @client_streaming()
    async def add(self, requests: AsyncIterator[Piece]) -> Piece:
        raise NotImplementedError

    @bidirectional()
    def echo(self, requests: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        raise NotImplementedError


class Talker(Talk):
    """Answers at once, or once it may; what it sends and takes is counted."""

    def __init__(self) -> None:
        self.may_answer = trio.Event()
        self.may_answer.set()
        self.may_read = trio.Event()
        self.may_read.set()
        self.reached = trio.Event()
        self.num_calls = self.num_sent = self.num_read = 0

    async def once(self, request: Word) -> Word:
        self.num_calls += 1
        self.reached.set()
        await self.may_answer.wait()
        match request.text:
            case "not found":
                raise RemoteError(Status.NOT_FOUND, "there is no such word")
            case "usage":
                raise UsageError("say something else")
            case "bug":
                raise KeyError("a secret of this node")
        return Word(f"{request.text} of {current_call().peer}")

    async def again(self, request: Word) -> Word:
        return await self.once(request)

    async def count_to(self, request: Piece) -> AsyncIterator[Piece]:
        for number in range(request.number):
            yield piece(number)
            self.num_sent += 1

    async def add(self, requests: AsyncIterator[Piece]) -> Piece:
        self.reached.set()
        await self.may_read.wait()
        total = 0
        async for request in requests:
            assert request.number == self.num_read
            assert request.data == piece(request.number).data
            self.num_read += 1
            total += request.number
        return Piece(total, b"")

    async def echo(self, requests: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        async for request in requests:
            yield request


def piece(number: int) -> Piece:
    return Piece(number, number.to_bytes(4) * (PIECE_BYTES // 4))


def secret(number: int) -> bytes:
    return bytes([number]) * 32


@asynccontextmanager
async def node(number: int, *, lanes: bool = True) -> AsyncIterator[tuple[Host, Talker]]:
    talker = Talker()
    async with open_host(
        secret=secret(number), listen=[LOOPBACK], bootstrap=(), mdns=False, router=Router(talker), lanes=lanes
    ) as opened:
        yield opened, talker


@dataclass(frozen=True, slots=True)
class Side:
    """One of two connected nodes, and how it reaches the other."""

    host: Host
    talker: Talker
    far: PeerId

    @property
    def links(self) -> Links:
        return self.host.links

    @property
    def calls(self) -> Talk:
        return client(Talk, self.host.at(self.far))

    @property
    def transport(self) -> str:
        return self.links.transport(self.far)


@asynccontextmanager
async def two(*, lanes: bool = True) -> AsyncIterator[tuple[Side, Side]]:
    """The first dialed the second. With lanes, they have one."""
    with trio.fail_after(GENEROUS_S):
        async with node(1, lanes=lanes) as (one, talker), node(2, lanes=lanes) as (other, other_talker):
            await one.connect(other.addresses())
            assert await one.events.receive() == PeerUp(other.peer_id)
            assert await other.events.receive() == PeerUp(one.peer_id)
            sides = Side(one, talker, other.peer_id), Side(other, other_talker, one.peer_id)
            if lanes:
                for side in sides:
                    await until(lambda side=side: side.transport == "lane")  # type: ignore[misc]
            yield sides


async def until(holds: Callable[[], bool]) -> None:
    """Return when it holds; for what no event tells. The caller bounds it."""
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.005)


def cut_lane(side: Side) -> None:
    """The path of the calls lane breaks, as a router that forgets it would do."""
    lane = side.links._links[side.far].lane
    assert lane is not None
    socket.socket.shutdown(lane._stream._sock, socket.SHUT_RDWR)  # type: ignore[attr-defined]


async def failure(call: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await call
    return caught.value


# --- which stream carries the calls ----------------------------------------------------------------------------------


async def test_calls_go_by_libp2p_until_the_lane_stands_and_then_by_the_lane_from_either_side() -> None:
    with trio.fail_after(GENEROUS_S):
        async with node(1) as (one, _), node(2) as (other, other_talker):
            await one.connect(other.addresses())
            await one.events.receive()
            await other.events.receive()
            sides = Side(one, Talker(), other.peer_id), Side(other, other_talker, one.peer_id)
            answers = [await side.calls.once(Word("hello")) for side in sides]
            assert answers == [Word(f"hello of {one.peer_id}"), Word(f"hello of {other.peer_id}")]
            for side in sides:
                await until(lambda side=side: side.transport == "lane")  # type: ignore[misc]
            answers = [await side.calls.once(Word("again")) for side in sides]
            assert answers == [Word(f"again of {one.peer_id}"), Word(f"again of {other.peer_id}")]


async def test_the_first_calls_do_not_wait_for_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane's ticket cannot be asked for without a libp2p stream, so that is what there is at first."""
    seen: list[str] = []
    run = Links._run_calls_lane

    async def noted(links: Links, peer: PeerId, *args: Any) -> None:
        seen.append(links.transport(peer))
        await run(links, peer, *args)

    monkeypatch.setattr(Links, "_run_calls_lane", noted)
    async with two() as (one, _):
        assert set(seen) == {"libp2p"}
        assert one.transport == "lane"


async def test_a_call_is_really_on_the_lane_that_is_named() -> None:
    async with two() as sides, trio.open_nursery() as nursery:
        for side, far in (sides, sides[::-1]):
            far.talker.may_answer = trio.Event()
            nursery.start_soon(side.calls.once, Word("there"))
            await far.talker.reached.wait()
            lane = side.links._links[side.far].lane
            assert lane is not None
            assert lane.num_calls == 1
            far.talker.may_answer.set()
            await until(lambda lane=lane: lane.num_calls == 0)  # type: ignore[misc]


async def test_when_the_lane_dies_idempotent_calls_are_made_again_and_the_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links_module, "LANE_RETRY_MIN_S", 0.05)
    async with two() as sides:
        for side, far in (sides, sides[::-1]):
            far.talker.may_answer, far.talker.num_calls = trio.Event(), 0
            answers: list[Word] = []
            failures: list[RemoteError] = []

            async def ask_again(side: Side, answers: list[Word]) -> None:
                answers.append(await side.calls.again(Word("again")))

            async def ask_once(side: Side, failures: list[RemoteError]) -> None:
                failures.append(await failure(side.calls.once(Word("once"))))

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask_again, side, answers)
                    nursery.start_soon(ask_once, side, failures)
                await until(lambda far=far: far.talker.num_calls == 40)  # type: ignore[misc]
                cut_lane(side)
                far.talker.may_answer.set()
            assert answers == 20 * [Word(f"again of {far.far}")]
            assert {error.status for error in failures} == {Status.UNAVAILABLE}
            assert len(failures) == 20
            assert far.talker.num_calls == 60, "what is not idempotent was done once"
            for each in sides:
                await until(lambda each=each: each.transport == "lane")  # type: ignore[misc]
            assert await side.calls.once(Word("new")) == Word(f"new of {far.far}")


@pytest.mark.parametrize("with_lanes", [0, 1])
async def test_where_one_side_has_no_lanes_all_goes_by_libp2p(with_lanes: int) -> None:
    with trio.fail_after(GENEROUS_S):
        async with node(1, lanes=with_lanes == 0) as (one, _), node(2, lanes=with_lanes == 1) as (other, talker):
            await one.connect(other.addresses())
            await one.events.receive()
            await other.events.receive()
            data = os.urandom(3 * MIB)
            for side in Side(one, Talker(), other.peer_id), Side(other, talker, one.peer_id):
                for _ in range(50):
                    await side.calls.again(Word("hello"))
                into = bytearray(len(data))
                async with side.links.bulk.offer(side.far, data) as ref:
                    far = other if side.host is one else one
                    assert await far.links.bulk.pull(side.host.peer_id, ref, into, timeout_s=GENEROUS_S) == "libp2p"
                assert into == data
                assert side.transport == "libp2p"


async def test_a_node_without_lanes_is_not_asked_for_them_again_and_again() -> None:
    with trio.fail_after(GENEROUS_S):
        async with node(1) as (one, _), node(2, lanes=False) as (other, _):
            await one.connect(other.addresses())
            served = other.links.metrics.of_served("lane.ticket")
            await until(lambda: served.calls == 1)
            assert served.errors == {Status.UNIMPLEMENTED: 1}
            await until(lambda: one.links.metrics.of_called("lane.ticket").calls == 1)
            tasks = [task.name for task in _tasks_below(trio.lowlevel.current_root_task())]
            await until(lambda: not any("_keep_calls_lane" in name for name in tasks))


def _tasks_below(task: trio.lowlevel.Task | None) -> list[trio.lowlevel.Task]:
    found: list[trio.lowlevel.Task] = []
    todo = [] if task is None else [task]
    while todo:
        for nursery in todo.pop().child_nurseries:
            todo += nursery.child_tasks
            found += nursery.child_tasks
    return found


# --- streams ---------------------------------------------------------------------------------------------------------


async def pieces(num: int) -> AsyncIterator[Piece]:
    for number in range(num):
        yield piece(number)


@pytest.mark.parametrize("lanes", [True, False])
async def test_all_four_kinds_of_calls_from_either_side(lanes: bool) -> None:
    async with two(lanes=lanes) as sides:
        for side, far in (sides, sides[::-1]):
            assert (await side.calls.once(Word("hello"))).text == f"hello of {side.host.peer_id}"
            standing = [set(each.links._links[each.far].channels) for each in sides]
            assert [answer async for answer in side.calls.count_to(Piece(50, b""))] == [piece(n) for n in range(50)]
            assert await side.calls.add(pieces(50)) == Piece(sum(range(50)), b"")
            assert far.talker.num_read == 50
            assert [answer async for answer in side.calls.echo(pieces(50))] == [piece(n) for n in range(50)]
            # The streams of these calls are gone with them.
            await until(lambda standing=standing: standing == [each.links._links[each.far].channels for each in sides])  # type: ignore[misc]


async def test_a_slow_reader_of_answers_stops_their_sender_and_loses_nothing() -> None:
    total = 10 * WINDOW_PIECES
    async with two() as sides:
        for side, far in (sides, sides[::-1]):
            async with aclosing(side.calls.count_to(Piece(total, b""))) as answers:  # type: ignore[type-var]
                num_read = 0
                async for answer in answers:
                    assert answer == piece(num_read)
                    num_read += 1
                    if num_read in (1, 5, total // 2):
                        await until(lambda: far.talker.num_sent >= num_read + WINDOW_PIECES * 3 // 4 - 1)  # noqa: B023
                        for _ in range(20):  # both loops turn, and still no more comes
                            await side.calls.again(Word("hello"))
                    assert far.talker.num_sent - num_read <= WINDOW_PIECES, "bytes pile up somewhere"
            assert num_read == total


async def test_a_slow_reader_of_requests_stops_their_sender_and_loses_nothing() -> None:
    total = 10 * WINDOW_PIECES
    async with two() as sides:
        for side, far in (sides, sides[::-1]):
            num_sent = 0

            async def watched(talker: Talker) -> AsyncIterator[Piece]:
                nonlocal num_sent
                for number in range(total):
                    assert number - talker.num_read <= WINDOW_PIECES, "bytes pile up somewhere"
                    num_sent = number
                    yield piece(number)

            far.talker.may_read = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(side.calls.add, watched(far.talker))
                await until(lambda: num_sent >= WINDOW_PIECES - 1)  # noqa: B023
                for _ in range(20):
                    await side.calls.again(Word("hello"))
                assert num_sent <= WINDOW_PIECES
                far.talker.may_read.set()
            assert far.talker.num_read == total


async def test_a_stream_that_its_caller_leaves_is_left_by_its_sender_too() -> None:
    async with two() as sides:
        for side, far in (sides, sides[::-1]):
            async with aclosing(side.calls.count_to(Piece(10**6, b""))) as answers:  # type: ignore[type-var]
                async for _ in answers:
                    break
            metrics = far.links.metrics.of_served("talk.count_to")
            await until(lambda metrics=metrics: metrics.calls == 1)  # type: ignore[misc]
            assert metrics.errors == {Status.CANCELLED: 1}


# --- bulk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
async def test_either_side_pulls_into_its_own_memory(transport: Transport) -> None:
    size = 20 * MIB + 12_345 if transport == "auto" else 3 * MIB + 12_345
    data = os.urandom(size)
    async with two() as sides:
        for owner, puller in (sides, sides[::-1]):
            memory = bytearray(b"\xaa") * (size + 200)
            async with owner.links.bulk.offer(owner.far, data) as ref:
                with memoryview(memory)[100:-100] as into:
                    came_by = await puller.links.bulk.pull(
                        puller.far, ref, into, timeout_s=GENEROUS_S, transport=transport
                    )
                assert came_by == ("lane" if transport == "auto" else "libp2p")
                assert memory == b"\xaa" * 100 + data + b"\xaa" * 100
                part = bytearray(MIB)
                await puller.links.bulk.pull(
                    puller.far, ref, part, offset=12_345, timeout_s=GENEROUS_S, transport=transport
                )
                assert part == data[12_345 : 12_345 + MIB]


async def test_small_calls_are_answered_while_bulk_flows() -> None:
    data = os.urandom(64 * MIB)
    async with two() as (owner, puller):
        into = bytearray(len(data))
        num_calls = 0
        is_here = trio.Event()
        async with owner.links.bulk.offer(owner.far, data) as ref, trio.open_nursery() as nursery:

            async def pull() -> None:
                await puller.links.bulk.pull(puller.far, ref, into, timeout_s=GENEROUS_S)
                is_here.set()

            nursery.start_soon(pull)
            while not is_here.is_set():
                await puller.calls.again(Word("hello"))
                num_calls += 1
        assert into == data
        assert num_calls >= 5


async def test_an_offer_that_is_over_or_was_never_made_is_not_found_by_either_path() -> None:
    async with two() as sides:
        for owner, puller in (sides, sides[::-1]):
            async with owner.links.bulk.offer(owner.far, b"bytes") as ref:
                into = bytearray(5)
            for gone in ref, BulkRef(bytes(16), 5):
                for transport in ("auto", "libp2p"):
                    pulled = puller.links.bulk.pull(
                        puller.far,
                        gone,
                        into,
                        timeout_s=GENEROUS_S,
                        transport=transport,
                    )
                    assert (await failure(pulled)).status is Status.NOT_FOUND
            assert into == bytes(5)


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
@pytest.mark.parametrize("owner_dialed", [True, False])
async def test_the_owner_ends_in_the_middle_of_a_pull(transport: Transport, owner_dialed: bool) -> None:
    data = b"\x01" * (256 * MIB if transport == "auto" else 64 * MIB)
    into = bytearray(len(data))
    failures: list[RemoteError] = []
    with trio.fail_after(GENEROUS_S):
        async with node(1) as (puller, _), trio.open_nursery() as nursery:
            async with node(2) as (owner, _):
                one, other = (owner, puller) if owner_dialed else (puller, owner)
                await one.connect(other.addresses())
                await puller.events.receive()
                await owner.events.receive()
                owned = owner.links.bulk.offer(puller.peer_id, data)
                ref = await owned.__aenter__()

                async def pull() -> None:
                    pulled = puller.links.bulk.pull(owner.peer_id, ref, into, timeout_s=GENEROUS_S, transport=transport)
                    failures.append(await failure(pulled))

                nursery.start_soon(pull)
                await until(lambda: into[0] == 1)
            assert await puller.events.receive() == PeerDown(owner.peer_id)
            began = trio.current_time()
        assert trio.current_time() - began < 5
        await owned.__aexit__(None, None, None)
    assert [error.status for error in failures] == [Status.UNAVAILABLE]
    assert into[-1] == 0, "it was over before the end came"


# --- how calls fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [True, False])
async def test_a_call_fails_with_the_code_and_words_of_its_handler(lanes: bool) -> None:
    async with two(lanes=lanes) as sides:
        for side in sides:
            error = await failure(side.calls.once(Word("not found")))
            assert (error.status, error.message) == (Status.NOT_FOUND, "there is no such word")
            error = await failure(side.calls.once(Word("usage")))
            assert (error.status, error.message) == (Status.INVALID_ARGUMENT, "say something else")
            error = await failure(side.calls.once(Word("bug")))
            assert error.status is Status.INTERNAL
            assert "secret" not in error.message


@pytest.mark.parametrize("lanes", [True, False])
async def test_a_call_that_is_not_answered_in_time_says_so(lanes: bool) -> None:
    async with two(lanes=lanes) as sides:
        for side, far in (sides, sides[::-1]):
            far.talker.may_answer = trio.Event()
            began = trio.current_time()
            for ask in (client(Talk, side.host.at(side.far), timeout_s=0.2).once, _again_in(side, 0.2)):
                assert (await failure(ask(Word("hello")))).status is Status.DEADLINE_EXCEEDED
            assert trio.current_time() - began < 2
            served = far.links.metrics.of_served("talk.once")
            await until(lambda served=served: served.calls == 1)  # type: ignore[misc]
            assert served.errors == {Status.CANCELLED: 1}, "its handler learns that nobody waits"


def _again_in(side: Side, timeout_s: float) -> Callable[[Word], Any]:
    return client(Talk, side.host.at(side.far), timeout_s=timeout_s).again


@pytest.mark.parametrize("lanes", [True, False])
async def test_a_node_that_stops_answers_what_is_under_way(lanes: bool) -> None:
    answers: list[Word] = []
    with trio.fail_after(GENEROUS_S):
        async with node(1, lanes=lanes) as (one, _), trio.open_nursery() as nursery:
            async with node(2, lanes=lanes) as (other, talker):
                await one.connect(other.addresses())
                await one.events.receive()
                side = Side(one, Talker(), other.peer_id)
                if lanes:
                    await until(lambda: side.transport == "lane")
                talker.may_answer = trio.Event()

                async def ask() -> None:
                    answers.append(await side.calls.once(Word("last")))

                nursery.start_soon(ask)
                await talker.reached.wait()
                channel = one.links.open_channel(other.peer_id)
                assert channel is not None

                async def answer_when_it_stops() -> None:
                    await until(lambda: not channel.is_open)
                    talker.may_answer.set()

                nursery.start_soon(answer_when_it_stops)
            began = trio.current_time()
        assert trio.current_time() - began < 2
    assert answers == [Word(f"last of {one.peer_id}")]


# --- a process that dies ---------------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """Keepalive with shorter times; gives the longest that a silent death may take to be seen."""
    monkeypatch.setattr(keepalive, "KEEPALIVE_INTERVAL_S", 0.5)
    monkeypatch.setattr(keepalive, "KEEPALIVE_TIMEOUT_S", 0.5)
    return 4 * 0.5 + 1.0


@pytest.mark.parametrize("lanes", [True, False])
async def test_calls_of_a_process_that_is_killed_are_unavailable_at_once_and_of_a_frozen_one_soon(
    lanes: bool, make_node: Callable[..., Any], soon: float
) -> None:
    for how, at_most_s in ((signal.SIGSTOP, soon), (signal.SIGKILL, 1.0)):
        process = await trio.to_thread.run_sync(make_node)
        failures: list[RemoteError] = []
        async with node(1, lanes=lanes) as (one, _):
            with trio.fail_after(GENEROUS_S):
                peer = await one.connect(process.info["addresses"])
                await one.events.receive()
                await until(lambda: one.links.transport(peer) == ("lane" if lanes else "libp2p"))  # noqa: B023
                caller = one.at(peer)

                async def ask(call: Any) -> None:
                    failures.append(await failure(call))  # noqa: B023

                # Only a frozen process is surely in the middle of a call when it is killed.
                os.kill(process.info["pid"], signal.SIGSTOP)
                began = trio.current_time()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, client(NodeService, caller, timeout_s=60).ping(Empty()))
                    nursery.start_soon(
                        ask, client(LaneService, caller, timeout_s=60).ticket(LaneRequest(LaneKind.BULK))
                    )
                    if how is signal.SIGKILL:
                        os.kill(process.info["pid"], signal.SIGKILL)
                took_s = trio.current_time() - began
                assert await one.events.receive() == PeerDown(peer)
                os.kill(process.info["pid"], signal.SIGKILL)
        assert [error.status for error in failures] == 2 * [Status.UNAVAILABLE]
        assert took_s < at_most_s
        logging.getLogger(__name__).info("%s was seen after %.2f s", how.name, took_s)


# --- who gets in -----------------------------------------------------------------------------------------------------


async def test_a_stranger_without_a_good_ticket_gets_no_lane() -> None:
    async with two() as (one, other):
        address = one.host.dialed_address(other.host.peer_id)
        assert address is not None
        sell = client(LaneService, one.host.at(one.far)).ticket
        lanes = set(other.links._links[other.far].channels)

        async def refused(ticket: LaneTicket, kind: LaneKind) -> None:
            with pytest.raises(LaneError):
                await dial_lane(*address, ticket, kind, timeout_s=5)

        for kind in LaneKind:
            real = await sell(LaneRequest(kind))
            await refused(dataclasses.replace(real, token=os.urandom(32)), kind)
            await refused(LaneTicket(real.token, os.urandom(32)), kind)
        real = await sell(LaneRequest(LaneKind.CALLS))
        await refused(real, LaneKind.BULK)
        await refused(real, LaneKind.CALLS)  # shown once, it is spent
        assert set(other.links._links[other.far].channels) == lanes
        assert one.transport == other.transport == "lane"


async def test_peers_cannot_open_lanes_without_end() -> None:
    async with two() as (one, other):
        address = one.host.dialed_address(other.host.peer_id)
        assert address is not None
        sell = client(LaneService, one.host.at(one.far)).ticket
        link = other.links._links[other.far]
        link.num_streams += MAX_STREAMS - 5  # as if so many were open already
        tickets = [await sell(LaneRequest(LaneKind.CALLS)) for _ in range(8)]
        dialed = [await dial_lane(*address, ticket, LaneKind.CALLS, timeout_s=5) for ticket in tickets]
        ended = [tls for tls in dialed if await _has_ended(tls)]
        assert 3 <= len(ended) < 8
        link.num_streams -= MAX_STREAMS - 5
        for tls in dialed:
            tls.close()


async def _has_ended(tls: Any) -> bool:
    with trio.move_on_after(0.2) as still_open:
        await trio.lowlevel.wait_readable(tls.fileno())
    return not still_open.cancelled_caught


async def test_plain_text_is_refused_in_either_direction() -> None:
    keys = create_new_key_pair(secret(9))
    plain = new_host(key_pair=keys, sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)})
    network = plain.get_network()
    async with background_trio_service(network), node(1) as (one, _):
        with trio.fail_after(GENEROUS_S):
            await network.listen(Multiaddr(LOOPBACK))
            address = f"{plain.get_addrs()[0]}"
            info = info_from_p2p_addr(Multiaddr(one.addresses()[0]))
            with pytest.raises(BaseLibp2pError):
                await network.dial_addr(info.addrs[0], info.peer_id)
            with pytest.raises(NoPeersError):
                await one.connect([address])
            assert one.connected == {}
            assert not network.get_connections(ID.from_base58(one.peer_id))
        await plain.close()
