"""Two hosts in one process, over real sockets on loopback: who is connected, calls, the DHT, and a clean end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libp2p.kad_dht.kad_dht
import pytest
import trio
import trio.testing
from libp2p.abc import INetConn, INetwork
from libp2p.bitswap.cid import parse_cid
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from shoal.node.mesh import door, keepalive, libp2p_repairs
from shoal.node.mesh.door import ListenError
from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.mesh.libp2p_host import ConnectionNotifee
from shoal.node.mesh.mdns import found_on_lan
from shoal.node.metrics import MethodMetrics
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import NodeService
from shoal.protocol.codec import Attachment
from shoal.protocol.errors import NoPeersError, RemoteError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import MAX_CALLS_IN_FLIGHT
from shoal.protocol.services import Empty, Service, client, current_call, unary
from shoal.protocol.signing import Signer

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 30.0


@dataclass(frozen=True, slots=True)
class Parcel:
    data: tuple[Attachment, ...] = ()
    sender: str = ""


class Post(Service, name="test"):
    @unary(max_answer_bytes=2_000_000)
    async def who(self, request: Parcel) -> Parcel:
        return Parcel(request.data, current_call().peer)

    @unary()
    async def slow(self, request: Empty) -> Empty:
        raise NotImplementedError


def post(one: Host, peer: PeerId) -> Post:
    return client(Post, one.at(peer))


def secret(number: int) -> bytes:
    return bytes([number]) * 32


def id_of(number: int) -> PeerId:
    return Signer(secret(number)).peer_id


@asynccontextmanager
async def host(
    number: int, *services: Service, listen: str = LOOPBACK, bootstrap: Sequence[str] = (), lanes: bool = True
) -> AsyncIterator[Host]:
    router = Router(Post())
    async with open_host(
        secret=secret(number), listen=[listen], bootstrap=bootstrap, mdns=False, router=router, lanes=lanes
    ) as opened:
        for service in services:
            router.add(service)
        yield opened


@asynccontextmanager
async def two_connected() -> AsyncIterator[tuple[Host, Host]]:
    """The first dialed the second; both have told so."""
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2) as other:
            await one.connect(other.addresses())
            assert await one.events.receive() == PeerUp(other.peer_id)
            assert await other.events.receive() == PeerUp(one.peer_id)
            yield one, other


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_a_host_goes_by_the_name_of_its_key_and_says_where_it_listens() -> None:
    async with host(1) as one:
        assert one.peer_id == id_of(1)
        (address,) = one.addresses()
        assert address.startswith("/ip4/127.0.0.1/tcp/")
        assert address.endswith(f"/p2p/{one.peer_id}")
        assert "/tcp/0/" not in address


async def test_both_sides_learn_of_a_connection_and_of_its_end() -> None:
    async with two_connected() as (one, other):
        assert one.connected[other.peer_id].outbound
        assert not other.connected[one.peer_id].outbound
        await one.disconnect(other.peer_id)
        assert await one.events.receive() == PeerDown(other.peer_id)
        assert await other.events.receive() == PeerDown(one.peer_id)
        assert (one.connected, other.connected) == ({}, {})


class Redials(ConnectionNotifee):
    """Connects again while the end of a connection is told; once."""

    def __init__(self, one: Host, other: Host) -> None:
        self._one, self._other = one, other
        self.num_ended = 0

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self.num_ended += 1
        if self.num_ended == 1:
            await self._one.dial(self._other.peer_id, self._other.addresses()[0])


async def test_a_connection_that_comes_while_those_before_it_are_closed_is_not_forgotten() -> None:
    async with two_connected() as (one, other):
        redials = Redials(one, other)
        one.libp2p.get_network().register_notifee(redials)
        await one.disconnect(other.peer_id)
        assert redials.num_ended == 1
        await one.wait_connected(other.peer_id)
        assert one._libp2p.is_alive(other.peer_id)
        assert (await post(one, other.peer_id).who(Parcel())).sender == one.peer_id
        await one.disconnect(other.peer_id)
        assert redials.num_ended == 2
        assert other.peer_id not in one.connected


async def test_a_node_that_ends_is_down_for_the_others() -> None:
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one:
            async with host(2) as other:
                await other.connect(one.addresses())
                assert await one.events.receive() == PeerUp(other.peer_id)
            assert await one.events.receive() == PeerDown(id_of(2))


async def test_calls_go_both_ways_and_say_who_calls() -> None:
    async with two_connected() as (one, other):
        assert await post(one, other.peer_id).who(Parcel((b"bulk",))) == Parcel((b"bulk",), one.peer_id)
        assert await post(other, one.peer_id).who(Parcel()) == Parcel((), other.peer_id)


async def test_a_block_of_a_megabyte_arrives_whole() -> None:
    block = os.urandom(1024 * 1024)
    async with two_connected() as (one, other):
        answer = await post(one, other.peer_id).who(Parcel((block,)))
        assert bytes(answer.data[0]) == block


async def test_calls_made_at_once_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_connected() as (one, other):
        opened = []
        new_stream = one.libp2p.new_stream

        async def counted(*args: Any) -> Any:
            opened.append(args)
            return await new_stream(*args)

        monkeypatch.setattr(one.libp2p, "new_stream", counted)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(post(one, other.peer_id).who, Parcel())
        assert len(opened) <= 1


async def test_a_call_to_one_who_is_not_connected_is_unavailable() -> None:
    async with host(1) as one:
        with pytest.raises(RemoteError, match="not connected") as caught:
            await post(one, id_of(2)).who(Parcel())
        assert caught.value.status is Status.UNAVAILABLE


async def test_a_call_in_progress_fails_at_once_when_the_peer_ends() -> None:
    reached = trio.Event()

    class Never(Post):
        async def slow(self, request: Empty) -> Empty:
            reached.set()
            await trio.sleep_forever()
            return request

    caught: list[RemoteError] = []

    async def ask(one: Host, peer: PeerId) -> None:
        with pytest.raises(RemoteError) as error:
            await client(Post, one.at(peer), timeout_s=2 * GENEROUS_S).slow(Empty())
        caught.append(error.value)

    with trio.fail_after(GENEROUS_S):
        async with (
            host(1) as one,
            trio.open_nursery() as nursery,
            host(2, Never()) as other,
        ):
            await one.connect(other.addresses())
            await one.events.receive()
            nursery.start_soon(ask, one, other.peer_id)
            await reached.wait()
    assert [error.status for error in caught] == [Status.UNAVAILABLE]


async def test_nobody_there_is_one_line_that_names_the_address() -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{id_of(2)}"
    async with host(1) as one:
        with pytest.raises(NoPeersError) as caught:
            await one.connect([address])
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_another_node_at_the_address_is_not_taken_for_the_one_that_was_asked_for() -> None:
    async with host(1) as one, host(2) as other:
        address = other.addresses()[0].replace(other.peer_id, id_of(3))
        with pytest.raises(NoPeersError):
            await one.connect([address])
        assert id_of(3) not in one.connected


RSA_PEER = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"


@pytest.mark.parametrize(
    ("peer", "address"),
    [(RSA_PEER, "/ip4/127.0.0.1/tcp/1"), (id_of(2), "/unix/tmp/nobody"), (id_of(2), "/ip4/127.0.0.1/udp/1/quic-v1")],
    ids=["RSA", "Unix", "QUIC"],
)
async def test_what_is_on_the_local_network_and_no_node_is_left_alone(peer: str, address: str) -> None:
    async with host(1) as one:
        await found_on_lan(one, PeerInfo(ID.from_base58(peer), [Multiaddr(address)]))
        with pytest.raises((NoPeersError, UsageError)):
            await one.connect([f"{address}/p2p/{peer}"])
        assert one.connected == {}


async def test_a_connection_that_says_nothing_is_closed_before_it_is_told_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "FIRST_BYTE_S", 0.05)
    async with host(1) as one:
        port = int(one.addresses()[0].split("/")[4])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
            with trio.fail_after(GENEROUS_S):
                assert await stranger.receive_some() == b""


async def test_connecting_to_oneself_is_no_connection() -> None:
    async with host(1) as one:
        assert await one.connect(one.addresses()) == one.peer_id
        assert one.connected == {}


async def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    async with host(1) as one:
        taken = one.addresses()[0].rpartition("/p2p/")[0]
        with pytest.raises(ListenError) as caught:
            async with host(2, listen=taken):
                pytest.fail("two nodes listen at one address")
    assert taken in str(caught.value)
    assert "--listen" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_failure_of_what_runs_on_a_host_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        async with host(1):
            raise KeyError("this")


async def test_a_bootstrap_node_that_comes_up_later_is_found() -> None:
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    with trio.fail_after(GENEROUS_S):
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(host(1, bootstrap=[f"{listen}/p2p/{id_of(2)}"]))
            with trio.move_on_after(0.1):
                pytest.fail(f"connected to nobody: {await one.events.receive()}")
            await stack.enter_async_context(host(2, listen=listen))
            assert await one.events.receive() == PeerUp(id_of(2))


async def test_a_bootstrap_node_that_went_away_is_found_again() -> None:
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    with trio.fail_after(GENEROUS_S):
        async with host(1, bootstrap=[f"{listen}/p2p/{id_of(2)}"]) as one:
            for _ in range(2):
                async with host(2, listen=listen):
                    assert await one.events.receive() == PeerUp(id_of(2))
                assert await one.events.receive() == PeerDown(id_of(2))


async def test_the_dht_finds_who_said_that_it_holds_something() -> None:
    cid = Cid.of_block(b"weights")
    async with two_connected() as (one, other):
        assert await one.provide(cid)
        assert await other.find_providers(cid) == [one.addresses()]
        assert await other.find_providers(Cid.of_block(b"something else")) == []


async def test_a_provider_that_can_be_no_node_costs_a_lookup_nothing() -> None:
    cid = Cid.of_block(b"weights")
    secp256k1 = ID(bytes([0x00, 0x25, 0x08, 0x02, 0x12, 0x21, 0x02]) + bytes(32))
    async with two_connected() as (one, other):
        assert one.kademlia is not None
        assert other.kademlia is not None
        other.kademlia.libp2p.provider_store = ProviderStore(other.libp2p, other.kademlia.libp2p.peer_routing)
        assert await other.provide(cid)
        liar = PeerInfo(secp256k1, [Multiaddr("/ip4/127.0.0.1/tcp/1")])
        other.kademlia.libp2p.provider_store.add_provider(parse_cid(str(cid)).multihash, liar)
        while (found := await one.find_providers(cid)) == []:  # noqa: ASYNC110  it asks
            await trio.sleep(0.05)
        assert found == [other.addresses()]
        assert secp256k1 in {info.peer_id for info in await one.kademlia.libp2p.find_providers(str(cid))}


async def test_what_is_held_is_announced_as_soon_as_somebody_can_take_it() -> None:
    cid = Cid.of_block(b"weights")
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2) as other, trio.open_nursery() as nursery:
            nursery.start_soon(one.keep_provided, cid)
            await trio.testing.wait_all_tasks_blocked()
            await other.connect(one.addresses())
            while not await other.find_providers(cid):  # noqa: ASYNC110  it asks
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()


async def test_alone_there_is_nobody_to_tell_the_dht() -> None:
    async with host(1) as one:
        assert not await one.provide(Cid.of_block(b"weights"))


async def test_round_trips_are_measured() -> None:
    async with two_connected() as (one, other):
        state = one.connected[other.peer_id]
        while state.rtt_ms is None:  # noqa: ASYNC110  a measurement is no event that anybody but a person waits for
            await trio.sleep(0.01)
        assert 0 < state.rtt_ms < 1000 * GENEROUS_S


@pytest.fixture
def _short_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "KEEPALIVE_INTERVAL_S", 0.25)
    monkeypatch.setattr(keepalive, "KEEPALIVE_TIMEOUT_S", 0.5)


async def until_called(method: MethodMetrics, times: int) -> None:
    while method.calls < times:  # noqa: ASYNC110  no event tells of it
        await trio.sleep(0.01)


@pytest.mark.usefixtures("_short_keepalive")
async def test_a_path_stays_while_as_many_calls_wait_as_may_be_open() -> None:
    may_answer = trio.Event()

    class Slow(Post):
        async def slow(self, request: Empty) -> Empty:
            await may_answer.wait()
            return request

    with trio.fail_after(GENEROUS_S):
        async with (
            host(1, lanes=False) as one,
            host(2, Slow(), lanes=False) as other,
            trio.open_nursery() as nursery,
        ):
            await one.connect(other.addresses())
            pings = one.links.metrics.of_called("node.ping")
            await until_called(pings, 1)
            for _ in range(MAX_CALLS_IN_FLIGHT):
                nursery.start_soon(post(one, other.peer_id).slow, Empty())
            await until_called(pings, 4)
            assert other.peer_id in one.connected
            assert set(pings.errors) == {Status.RESOURCE_EXHAUSTED}, "the far side said so at once, and lives"
            may_answer.set()


async def throttle(source: trio.SocketStream, sink: trio.SocketStream, bytes_per_s: float) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await trio.sleep(len(data) / bytes_per_s)
            await sink.send_all(data)


@pytest.mark.usefixtures("_short_keepalive")
async def test_a_path_stays_that_is_slow_and_full() -> None:
    """By a proxy that passes on a few megabytes a second, so that pings queue behind a large request."""
    parcel = Parcel((os.urandom(12_000_000),))

    class Sink(Post):
        async def who(self, request: Parcel) -> Parcel:
            return Parcel(sender=str(len(request.data[0])))

    async with host(1, lanes=False) as one, host(2, Sink(), lanes=False) as other, trio.open_nursery() as nursery:
        port = int(other.addresses()[0].split("/")[4])

        async def carry(near: trio.SocketStream) -> None:
            async with near, await trio.open_tcp_stream("127.0.0.1", port) as far, trio.open_nursery() as both:
                both.start_soon(throttle, near, far, 6_000_000)
                both.start_soon(throttle, far, near, math.inf)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        nursery.start_soon(trio.serve_listeners, carry, listeners)
        with trio.fail_after(GENEROUS_S):
            proxy = listeners[0].socket.getsockname()[1]
            await one.connect([f"/ip4/127.0.0.1/tcp/{proxy}/p2p/{other.peer_id}"])
            pings = one.links.metrics.of_called("node.ping")
            answer = await client(Post, one.at(other.peer_id), timeout_s=GENEROUS_S).who(parcel)
            assert answer.sender == "12000000"
            assert pings.errors[Status.DEADLINE_EXCEEDED] >= 2, "else this shows nothing"
        nursery.cancel_scope.cancel()


async def test_a_peer_that_answers_nonsense_does_not_bring_the_node_down() -> None:
    asked = trio.Event()

    class Nonsense(NodeService):
        async def ping(self, request: Empty) -> Empty:
            asked.set()
            return 5  # type: ignore[return-value]

    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2, Nonsense()) as other:
            await one.connect(other.addresses())
            await asked.wait()
            with pytest.raises(RemoteError, match="nonsense"):
                await client(NodeService, one.at(other.peer_id)).ping(Empty())
            await post(one, other.peer_id).who(Parcel())


def open_sockets() -> set[str]:
    targets = [_target(link) for link in Path("/proc/self/fd").iterdir()]
    return {target for target in targets if target.startswith("socket:")}


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # it was the descriptor that listed the folder
        return ""


async def test_nothing_is_left_running_or_open() -> None:
    tasks, sockets = trio.lowlevel.current_statistics().tasks_living, open_sockets()
    async with two_connected() as (one, other):
        await post(one, other.peer_id).who(Parcel())
        assert trio.lowlevel.current_statistics().tasks_living > tasks
        assert open_sockets() > sockets
        port = int(one.addresses()[0].split("/")[4])
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert open_sockets() == sockets
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


async def test_a_goodbye_that_does_not_come_to_an_end_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def close(_: SwarmConn) -> None:
        await trio.sleep_forever()

    sockets = open_sockets()
    async with two_connected():
        monkeypatch.setattr(SwarmConn, "close", close)
    assert open_sockets() == sockets


async def test_a_version_of_libp2p_that_the_repairs_were_not_made_for_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(libp2p.kad_dht.kad_dht, "MAX_DHT_MESSAGE_SIZE", 123)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    with caplog.at_level(logging.WARNING):
        libp2p_repairs.apply_repairs()
    assert libp2p.kad_dht.kad_dht.MAX_DHT_MESSAGE_SIZE == 123
    assert "libp2p is 99.0, not 0.8.1" in caplog.text


async def test_the_installed_libp2p_is_the_one_that_the_repairs_were_made_for() -> None:
    assert importlib.metadata.version("libp2p") == libp2p_repairs.REPAIRED_VERSION


@pytest.mark.parametrize("is_initiator", [True, False])
async def test_a_pipe_whose_upgrade_is_cut_off_is_closed(is_initiator: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with open_host(secret=b"a" * 32, listen=[LOOPBACK], bootstrap=[], mdns=False, router=Router()) as host:
            stream = await host.door.dial(*silent.getsockname())
            raw = RawConnection(TrioTCPStream(stream), initiator=is_initiator)
            with trio.move_on_after(0.1) as scope:
                await host.upgrade(raw, Signer(b"b" * 32).peer_id)
            assert scope.cancelled_caught
            assert stream.socket.fileno() == -1


async def talk(one: Host, other: Host) -> None:
    for _ in range(100):
        await post(one, other.peer_id).who(Parcel())


async def test_among_peers_that_are_wanted_a_node_seldom_looks_at_what_is_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.node.mesh.host.LOOK_AT_UNREAD_S", 0.0005)
    monkeypatch.setattr("shoal.node.mesh.host.LOOK_AT_WANTED_S", math.inf)
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2) as member, host(3) as stranger:
            looks = 0
            look = one._libp2p.cut_greedy

            async def counted(*arguments: Any) -> None:
                nonlocal looks
                looks += 1
                await look(*arguments)

            monkeypatch.setattr(one._libp2p, "cut_greedy", counted)
            one.want(member.peer_id, "a swarm")
            await one.connect(member.addresses())
            await talk(member, one)
            before = looks
            await talk(member, one)
            assert looks == before
            await stranger.connect(one.addresses())
            await talk(stranger, one)
            assert looks > before
