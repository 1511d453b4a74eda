"""Strangers, many of them or with other keys than nodes have, against a real node: what is everybody's stays so.

Each test is one row of the list of attacks that this project was tried with, made small; the same at full size, and
against nodes that train, is `tests/hostile/strangers.py`.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import varint
from libp2p import new_host
from libp2p.bitswap.cid import parse_cid
from libp2p.crypto.rsa import create_new_key_pair as create_rsa
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    FLAG_SYN,
    TYPE_DATA,
    TYPE_PING,
    YAMUX_HEADER_FORMAT,
)
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.node.budgets import BudgetLimits, Turns
from shoal.node.mesh import interfaces
from shoal.node.mesh.circuits import write_message
from shoal.node.mesh.host import Host, open_host
from shoal.node.mesh.interfaces import local_ips
from shoal.node.mesh.kademlia import MAX_STREAMS_PER_PEER
from shoal.node.mesh.provider_store import MAX_ADDRESSES, MAX_RECORDS_OF_ONE_PEER, BoundedProviders
from shoal.node.mesh.relay import STOP_PROTOCOL
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import NodeService
from shoal.node.wire.links import STREAM_PROTOCOL
from shoal.protocol.errors import NoPeersError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import Empty, client

from .strangers import (
    BROKEN,
    HALF_FRAME,
    MIB,
    bystander,
    connect_from,
    connection_to,
    leave_unread,
    misled,
    raw_stream,
    send_and_say_no_more,
)

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 20.0


@asynccontextmanager
async def node(**options: Any) -> AsyncIterator[Host]:
    with trio.fail_after(GENEROUS_S):
        async with open_host(
            secret=os.urandom(32),
            listen=[LOOPBACK],
            bootstrap=(),
            mdns=False,
            router=Router(),
            **{"lanes": False, **options},
        ) as opened:
            yield opened


@asynccontextmanager
async def two() -> AsyncIterator[tuple[Host, Host]]:
    """A node and a stranger that is connected to it."""
    async with node() as one, node() as stranger:
        await stranger.connect(one.addresses())
        await one.wait_connected(stranger.peer_id)
        yield one, stranger


async def dht_stream(stranger: Host, peer: PeerId) -> Any:
    return await raw_stream(stranger, peer, PROTOCOL_ID)


async def tell(stream: Any, message: Any) -> bool:
    """Send a message of the DHT; whether it was answered."""
    raw = message.SerializeToString()
    try:
        await stream.write(varint.encode(len(raw)) + raw)
        return bool(await stream.read(1))
    except BROKEN:
        return False


def provider(key: bytes, name: ID, addresses: list[bytes]) -> Any:
    message = Message(type=Message.MessageType.ADD_PROVIDER, key=key)
    message.providerPeers.add(id=name.to_bytes(), addrs=addresses)
    return message


def store_of(host: Host) -> BoundedProviders:
    assert host.kademlia is not None
    store = host.kademlia.libp2p.provider_store
    assert isinstance(store, BoundedProviders)
    return store


# --- row 18: the DHT -------------------------------------------------------------------------------------------------


async def test_a_provider_record_without_end_is_not_even_read_and_a_long_one_is_kept_short() -> None:
    address = Multiaddr("/ip4/192.0.2.1/tcp/1").to_bytes()
    async with two() as (one, stranger):
        name = ID.from_base58(str(stranger.peer_id))
        long = provider(b"long", name, [address] * 590_000)
        assert not await tell(await dht_stream(stranger, one.peer_id), long)
        many = [Multiaddr(f"/ip4/192.0.2.{n}/tcp/{n}").to_bytes() for n in range(1, 200)]
        assert await tell(await dht_stream(stranger, one.peer_id), provider(b"many", name, many))
        assert store_of(one).get_providers(b"long") == []
        assert [len(info.addrs) for info in store_of(one).get_providers(b"many")] == [MAX_ADDRESSES]
        kept = one.libp2p.get_peerstore().addrs(name)
        assert len(kept) <= 16


async def test_no_node_keeps_values_of_the_dht() -> None:
    async with two() as (one, stranger):
        for key in (b"plain", b"/pk/name", b"/ipns/name", b"/other/name"):
            message = Message(type=Message.MessageType.PUT_VALUE, key=key)
            message.record.key, message.record.value = key, bytes(1000)
            assert not await tell(await dht_stream(stranger, one.peer_id), message)
        assert one.kademlia is not None
        assert one.kademlia.libp2p.get_value_store_size() == 0


async def test_records_of_one_peer_and_of_all_are_bounded_and_the_greediest_loses_its_own() -> None:
    address = Multiaddr("/ip4/192.0.2.1/tcp/1")
    async with node() as one, node() as other:
        store = store_of(one)
        store.add_provider(b"honest", info_from_p2p_addr(Multiaddr(other.addresses()[0])))
        greedy = ID.from_base58(str(one.peer_id))
        for number in range(2 * MAX_RECORDS_OF_ONE_PEER):
            store.add_provider(b"%d" % number, PeerInfo(greedy, [address]))
        assert store.size() == MAX_RECORDS_OF_ONE_PEER + 1
        assert len(store.get_providers(b"honest")) == 1


async def test_silent_streams_of_one_stranger_leave_the_dht_to_others() -> None:
    async with two() as (one, stranger), node() as other:
        await other.connect(one.addresses())
        for _ in range(12):
            with suppress(*BROKEN):
                await dht_stream(stranger, one.peer_id)
        assert one.kademlia is not None
        assert one.kademlia.num_refused_streams >= 12 - MAX_STREAMS_PER_PEER
        assert await other.provide(Cid.of_block(b"weights"))


# --- a look-up that is poisoned --------------------------------------------------------------------------------------


async def test_a_made_up_record_that_a_node_holds_hides_no_true_one_from_it() -> None:
    cid = Cid.of_block(b"weights")
    async with two() as (one, other):
        key, made_up = parse_cid(str(cid)).multihash, PeerId.of_public_key(bytes(31) + bytes([1]))
        store_of(one).add_provider(key, info_from_p2p_addr(Multiaddr(f"/ip4/192.0.2.1/tcp/1/p2p/{made_up}")))
        store_of(other).add_provider(key, info_from_p2p_addr(Multiaddr(other.addresses()[0])))
        found = await one.find_providers(cid)
        assert any(str(other.peer_id) in address for addresses in found for address in addresses)


# --- rows 19 and 20: other keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_key", [create_secp256k1, lambda: create_rsa(2048)])
async def test_whose_key_is_none_of_a_nodes_is_not_let_in(make_key: Callable[[], Any]) -> None:
    key = make_key()
    noise = Transport(key, noise_privkey=create_x25519().private_key)
    stranger = new_host(key_pair=key, sec_opt={NOISE: noise})
    async with node() as one, background_trio_service(stranger.get_network()):
        with suppress(*BROKEN):
            await stranger.connect(info_from_p2p_addr(Multiaddr(one.addresses()[0])))
        while one.budgets.sockets.used:  # noqa: ASYNC110  the node has closed it when its place is free
            await trio.sleep(0.01)
        assert not one.connected
        async with node() as other:
            await other.connect(one.addresses())


async def test_a_record_of_the_dht_that_names_another_kind_of_key_breaks_no_look_up() -> None:
    cid = Cid.of_block(b"weights")
    async with two() as (one, stranger):
        assert stranger.kademlia is not None
        lying = ProviderStore(stranger.libp2p, stranger.kademlia.libp2p.peer_routing)
        stranger.kademlia.libp2p.provider_store = lying
        name = ID.from_pubkey(create_secp256k1().public_key)
        lying.add_provider(
            parse_cid(str(cid)).multihash,
            PeerInfo(name, [Multiaddr("/ip4/127.0.0.1/tcp/1")]),
        )
        assert await one.find_providers(cid) == []


# --- row 21: handshakes ----------------------------------------------------------------------------------------------


async def test_those_that_came_and_went_leave_their_places_to_others() -> None:
    async with node() as one:
        network: Any = one.libp2p.get_network()
        for _ in range(3):
            async with node() as stranger:
                await stranger.connect(one.addresses())
                await one.wait_connected(stranger.peer_id)
        while network._inbound_limiter.borrowed_tokens:  # noqa: ASYNC110  libp2p tells nobody
            await trio.sleep(0.01)
        while one.budgets.sockets.used:  # noqa: ASYNC110  likewise
            await trio.sleep(0.01)


PING = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, 0)


async def stands_still(muxed: Any) -> bool:
    """Whether nothing can be written on a connection, since the far end reads nothing."""
    with trio.move_on_after(0.3):
        await muxed._write_frame(PING)
        return False
    return True


async def nobody_else_waits(one: Host, turns: Turns[str]) -> None:
    """Once so many wait for these turns that others are refused, who comes from elsewhere is let in and answered."""
    while not turns.num_refused:  # noqa: ASYNC110  it fills by itself
        await trio.sleep(0.01)
    began = trio.current_time()
    async with node() as honest:
        await honest.connect(one.addresses())
        await client(NodeService, honest.at(one.peer_id)).ping(Empty())
    assert trio.current_time() - began < 3


async def test_a_flood_of_handshakes_from_one_ip_keeps_nobody_else_waiting() -> None:
    few = BudgetLimits(handshakes_per_s=4, handshakes_burst=2, handshakes_waiting=16)
    async with node(budget_limits=few) as one, AsyncExitStack() as stack, trio.open_nursery() as nursery:
        ip, port = one.addresses()[0].split("/")[2], int(one.addresses()[0].split("/")[4])

        async def flood() -> None:
            while True:
                sock = trio.socket.socket()
                stack.callback(sock.close)
                await sock.bind(("127.0.0.2", 0))
                await sock.connect((ip, port))
                await sock.send(b"\x13/multistream/1.0.0\n")
                await trio.sleep(0.01)

        nursery.start_soon(flood)
        await nobody_else_waits(one, one.budgets.handshakes)
        nursery.cancel_scope.cancel()


# --- row 22: memory --------------------------------------------------------------------------------------------------


async def test_streams_that_nobody_reads_end_their_connection() -> None:
    few = BudgetLimits(strangers_bytes=1024 * 1024, max_streams=32)
    async with node(budget_limits=few) as one, node() as stranger, node() as honest:
        await honest.connect(one.addresses())
        await stranger.connect(one.addresses())
        connection = connection_to(stranger, one.peer_id)
        with suppress(*BROKEN):
            for _ in range(1000):
                await leave_unread(connection, 60_000)
        while one.is_connected(stranger.peer_id):
            await one.wait_for_change()
        assert one.budgets.num_cut
        await client(NodeService, honest.at(one.peer_id)).ping(Empty())
        while stranger.is_connected(one.peer_id):
            await stranger.wait_for_change()
        with pytest.raises(NoPeersError):  # nobody comes back at once
            await stranger.connect(one.addresses())
        one.want(honest.peer_id, "a swarm")
        async with node() as neighbour:  # but a member's neighbours do
            await neighbour.connect(one.addresses())


async def test_streams_that_hold_nothing_are_held_to_the_same_budget_all_together() -> None:
    few = BudgetLimits(strangers_bytes=1024 * 1024)
    async with node(budget_limits=few) as one, node() as two, node() as three:
        for stranger in (two, three):
            await stranger.connect(one.addresses())
            with suppress(*BROKEN):
                for _ in range(25):
                    await leave_unread(connection_to(stranger, one.peer_id), 0)
        while len(one.connected) > 1:
            await one.wait_for_change()
        assert one.budgets.num_cut == 1


async def test_who_reads_nothing_is_cut_off_and_keeps_nobody_else_from_it() -> None:
    few = BudgetLimits(strangers_bytes=1024 * 1024, max_streams=32)
    async with node(budget_limits=few) as one, node() as deaf, node() as other, trio.open_nursery() as nursery:
        for stranger in (deaf, other):
            await stranger.connect(one.addresses())
        one.want(deaf.peer_id, "for now")
        muxed = connection_to(deaf, one.peer_id).muxed_conn
        await muxed.secured_conn.conn.read_writer.read_write_closer.stream.read_lock.acquire()

        for _ in range(40):
            await muxed.open_stream()

        async def ask_and_read_nothing() -> None:
            with suppress(*BROKEN):
                while True:
                    await muxed._write_frame(PING * 1000)

        nursery.start_soon(ask_and_read_nothing)
        while not await stands_still(muxed):
            pass
        one.unwant(deaf.peer_id, "for now")
        with suppress(*BROKEN):
            for _ in range(1000):
                await leave_unread(connection_to(other, one.peer_id), 60_000)
        while one.connected:
            await one.wait_for_change()
        nursery.cancel_scope.cancel()


async def test_a_frame_that_fits_no_window_is_not_waited_for() -> None:
    async with two() as (one, stranger):
        muxed = connection_to(stranger, one.peer_id).muxed_conn
        stream = await muxed.open_stream()
        head = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.stream_id, 8 * MIB)
        await muxed._write_frame(head + bytes(100_000))
        while one.is_connected(stranger.peer_id):
            await one.wait_for_change()


# --- what strangers send ---------------------------------------------------------------------------------------------


async def half_a_frame(stranger: Host, peer: PeerId, num_bytes: int) -> Any:
    """Send so much of a frame; the stream that holds it."""
    stream = await raw_stream(stranger, peer, STREAM_PROTOCOL)
    await send_and_say_no_more(stream, HALF_FRAME + bytes(num_bytes))
    return stream


async def test_what_a_stranger_sends_is_read_at_a_rate_until_it_is_wanted() -> None:
    slow = BudgetLimits(read_bytes_per_s=200_000, read_each_bytes_per_s=100_000)
    async with node(budget_limits=slow) as one, node() as stranger, node() as member, trio.open_nursery() as nursery:
        for each in (stranger, member):
            await each.connect(one.addresses())
            await one.wait_connected(each.peer_id)
        one.want(member.peer_id, "a swarm")
        nursery.start_soon(half_a_frame, stranger, one.peer_id, MIB)
        while not one.statistics()["reads_waiting"]:  # noqa: ASYNC110  it comes to that by itself
            await trio.sleep(0.01)
        began = trio.current_time()
        await half_a_frame(member, one.peer_id, 2 * MIB)
        await client(NodeService, member.at(one.peer_id)).ping(Empty())
        assert trio.current_time() - began < 3, "it would take twenty"
        assert one.budgets.memory.strangers.used < MIB
        began = trio.current_time()
        one.want(stranger.peer_id, "a swarm")
        while one.budgets.memory.strangers.used + one.budgets.memory.members.used < 3 * MIB:  # noqa: ASYNC110  likewise
            await trio.sleep(0.01)
        assert trio.current_time() - began < 2, "it would take ten"
        assert not one.statistics()["reads_waiting"]


async def test_lanes_are_read_at_the_same_rate() -> None:
    slow = BudgetLimits(read_bytes_per_s=50_000, read_each_bytes_per_s=50_000)
    async with node(budget_limits=slow, lanes=True) as one, node(lanes=True) as stranger:
        await stranger.connect(one.addresses())
        while stranger.links.transport(one.peer_id) != "lane":  # noqa: ASYNC110  nobody tells
            await trio.sleep(0.01)
        service = client(NodeService, stranger.at(one.peer_id))
        before = one.statistics()["reads_held_up"]
        for _ in range(12):
            await service.ping(Empty())
        assert one.statistics()["reads_held_up"] > before
        one.want(stranger.peer_id, "a swarm")
        began = trio.current_time()
        for _ in range(50):
            await service.ping(Empty())
        assert trio.current_time() - began < 2, "it would take four"


async def test_the_windows_of_a_stranger_do_not_grow_and_a_members_do() -> None:
    fast = BudgetLimits(read_bytes_per_s=None)
    async with node(budget_limits=fast) as one, node() as stranger, node() as member:
        windows = []
        for each in (stranger, member):
            await each.connect(one.addresses())
            await one.wait_connected(each.peer_id)
            if each is member:
                one.want(each.peer_id, "a swarm")
            await half_a_frame(each, one.peer_id, 6 * MIB)
            muxed = connection_to(one, each.peer_id).muxed_conn
            windows.append(max(stream.target_recv_window for stream in muxed.streams.values()))
        assert windows[0] == DEFAULT_WINDOW_SIZE
        assert windows[1] > DEFAULT_WINDOW_SIZE


async def test_streams_without_end_of_strangers_at_one_ip_keep_nobody_else_waiting() -> None:
    few = BudgetLimits(streams_per_s=4, streams_burst=8, streams_waiting=16)
    async with node(budget_limits=few) as one, node() as stranger, trio.open_nursery() as nursery:
        place = one.addresses()[0].split("/")[2], int(one.addresses()[0].split("/")[4])
        await connect_from("127.0.0.2", stranger, one.peer_id, place)

        async def flood() -> None:
            while True:
                with suppress(*BROKEN):
                    await leave_unread(connection_to(stranger, one.peer_id), 10)
                await trio.sleep(0.01)

        nursery.start_soon(flood)
        await nobody_else_waits(one, one.budgets.streams)
        nursery.cancel_scope.cancel()


# --- rows 16 and 17: dials at the word of others ---------------------------------------------------------------------


async def test_addresses_without_end_that_a_stranger_names_make_few_dials_at_a_bystander() -> None:
    async with two() as (one, stranger), bystander() as (port, dialed):
        began = trio.current_time()
        for number in range(40):
            name = PeerId.of_public_key(bytes(28) + number.to_bytes(4))
            named = [f"/ip4/127.0.0.{last}/tcp/{port}/p2p/{name}" for last in range(1, 50)]
            with suppress(NoPeersError):
                await one.connect(named, heard=True)
        limits = one.budgets.limits
        assert len(dialed) <= limits.dials_burst + (trio.current_time() - began) * limits.dials_per_s
        assert one.budgets.dials.num_refused
        assert one.is_connected(stranger.peer_id)


async def test_nearer_peers_that_a_stranger_makes_up_in_the_dht_make_few_dials_at_a_bystander() -> None:
    async with two() as (one, stranger), bystander() as (port, dialed):
        assert one.kademlia is not None
        stranger.libp2p.set_stream_handler(TProtocol(PROTOCOL_ID), misled(port))
        began = trio.current_time()
        with trio.move_on_after(3):
            while True:
                await one.find_providers(Cid.of_block(os.urandom(8)))
                await trio.sleep(0.01)
        limits = one.budgets.limits
        assert len(dialed) <= limits.dials_burst + (trio.current_time() - began) * limits.dials_per_s


async def test_a_circuit_through_whom_nobody_asked_to_relay_is_refused() -> None:
    async with two() as (one, stranger):
        made_up = PeerId.of_public_key(os.urandom(32))
        source = pb.PeerId(id=ID.from_base58(str(made_up)).to_bytes())
        with suppress(*BROKEN):
            stream = await raw_stream(stranger, one.peer_id, STOP_PROTOCOL)
            await write_message(stream, pb.StopMessage(type=pb.StopMessage.CONNECT, peer=source))
            await stream.read(1)
            pytest.fail("it was taken")
        assert one.relay.num_unasked == 1
        assert set(one.connected) == {stranger.peer_id}


async def test_without_a_descriptor_left_a_node_knows_its_addresses_and_lives_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interfaces, "FRESH_S", 0.0)
    async with two() as (one, stranger):
        before, known = one.own_addresses(), local_ips()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                socket.socket()
            assert (one.own_addresses(), local_ips()) == (before, known)
            with pytest.raises(NoPeersError):
                await one.connect([f"/ip4/127.0.0.1/tcp/1/p2p/{PeerId.of_public_key(os.urandom(32))}"])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await client(NodeService, stranger.at(one.peer_id)).ping(Empty())
