"""Strangers without a ticket, each a way to be a burden; `strangers.py` starts them as a process of their own.

``python tests/hostile/attackers.py NAME TARGET`` attacks until its standard input ends. It prints a line once all that
it needs is set up, and at the end what it spent. Strangers come from loopback addresses on which no honest node dials,
as from other machines; what is cut off comes again, as fast as the rate says that stands with each attack.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import trio
import varint
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.integration.strangers import (
    BROKEN,
    GREETING,
    HALF_FRAME,
    MIB,
    bystander,
    connect_from,
    connection_to,
    leave_unread,
    misled,
    raw_stream,
    send_and_say_no_more,
    socket_from,
)

from shoal.node.mesh.circuits import write_message
from shoal.node.mesh.host import Host, open_host
from shoal.node.mesh.libp2p_host import Libp2pHost, make_libp2p_host
from shoal.node.mesh.relay import STOP_PROTOCOL
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import Introduction, ReachService
from shoal.node.wire.links import STREAM_PROTOCOL
from shoal.protocol.errors import RemoteError, ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.services import client

FAILED: Final = (*BROKEN, ShoalError)
NUM_NAMES: Final = 60
NUM_IPS: Final = 8
AT_ONCE: Final = 8
"""Names that come at the same time while an attack is set up."""
SET_UP_S: Final = 60
AGAIN_S: Final = 1.0
"""After which whoever was cut off or refused tries again."""
SETTLE_S: Final = 6.0
"""In which names find out how much each may hold."""
SMALLEST_BYTES: Final = 64 * 1024
UNREAD_STREAMS: Final = 100
UNREAD_BYTES: Final = 240_000


@dataclass(frozen=True)
class Target:
    """The node, as strangers see it, and a bystander who counts whoever dials it."""

    peer: PeerId
    ip: str
    port: int
    bystander_port: int = 0

    async def socket(self, number: int) -> Any:
        """A connection from one of the strangers' IPs."""
        return await socket_from(ip_of(number), (self.ip, self.port))


@dataclass
class Spent:
    """What an attack cost whoever made it, beside CPU."""

    num: int = 0
    num_bytes: int = 0
    is_set_up: trio.Event = field(default_factory=trio.Event)


def ip_of(number: int) -> str:
    """Where a stranger lives."""
    return f"127.0.0.{10 + number % NUM_IPS}"


async def every(seconds: float) -> AsyncIterator[int]:
    """Numbers, one in so many seconds on average: what came late is made up for."""
    at = trio.current_time()
    for number in count():
        yield number
        at += seconds
        await trio.sleep_until(at)


async def again() -> AsyncIterator[None]:
    """For ever, but for `AGAIN_S` from one time to the next at least."""
    while True:
        at = trio.current_time() + AGAIN_S
        yield
        await trio.sleep_until(at)


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass
class Name:
    """A stranger: a key, a place, and libp2p."""

    host: Libp2pHost
    target: Target
    number: int

    async def connect(self) -> None:
        place = self.target.ip, self.target.port
        await connect_from(ip_of(self.number), self.host, self.target.peer, place)

    async def connection(self) -> Any:
        """That to the node, which is made anew if it was cut."""
        found = connection_to(self.host, self.target.peer)
        if found is None or not self.host.is_alive(self.target.peer):
            await self.connect()
            found = connection_to(self.host, self.target.peer)
        return found


@asynccontextmanager
async def a_name(target: Target, number: int, prepare: Callable[[Name], None] = lambda _: None) -> AsyncIterator[Name]:
    """One more stranger, connected."""
    host = make_libp2p_host(os.urandom(32), max_peers=8)
    async with background_trio_service(host.network):
        name = Name(host, target, number)
        prepare(name)
        await name.connect()
        yield name


@asynccontextmanager
async def names(
    target: Target, num: int = NUM_NAMES, prepare: Callable[[Name], None] = lambda _: None
) -> AsyncIterator[list[Name]]:
    """As many strangers as are let in of so many."""
    found: list[Name] = []
    few, num_tried, are_all = trio.CapacityLimiter(AT_ONCE), 0, trio.Event()

    async def live(number: int) -> None:
        nonlocal num_tried
        async with AsyncExitStack() as stack:
            async with few:
                with suppress(*FAILED):
                    found.append(await stack.enter_async_context(a_name(target, number, prepare)))
                num_tried += 1
                if num_tried == num:
                    are_all.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for number in range(num):
            nursery.start_soon(live, number)
        with trio.move_on_after(SET_UP_S):
            await are_all.wait()
        yield found
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def a_node(target: Target) -> AsyncIterator[Host]:
    """A stranger that has all that a node has."""
    async with open_host(
        secret=os.urandom(32),
        listen=["/ip4/127.0.0.2/tcp/0"],
        bootstrap=(),
        mdns=False,
        router=Router(),
        lanes=False,
    ) as host:
        await connect_from(ip_of(0), host, target.peer, (target.ip, target.port))
        await host.wait_connected(target.peer)
        yield host


# --- attacks ---------------------------------------------------------------------------------------------------------


async def does_nothing(target: Target, spent: Spent) -> None:
    """To compare with."""
    spent.is_set_up.set()
    await trio.sleep_forever()


async def hold_half_frames(name: Name, spent: Spent) -> None:
    """Hold as much of an unfinished frame as the node lets one, without end; what is refused was too much."""
    num_bytes = 16 * MIB - 1
    async for _ in again():
        with suppress(*FAILED):
            await name.connection()
            stream = await raw_stream(name.host, name.target.peer, STREAM_PROTOCOL)
            spent.num += 1
            spent.num_bytes += num_bytes
            await send_and_say_no_more(stream, HALF_FRAME + bytes(num_bytes))
            await stream.read(1)  # it is held until the node ends the stream
        num_bytes = max(num_bytes // 2, SMALLEST_BYTES)


async def leave_streams_unread(name: Name, spent: Spent) -> None:
    """Have as many streams as one may, with a full window in each that nobody reads, without end."""
    async for _ in again():
        with suppress(*FAILED):
            connection = await name.connection()
            for _ in range(UNREAD_STREAMS):
                await leave_unread(connection, UNREAD_BYTES)
                spent.num += 1
                spent.num_bytes += UNREAD_BYTES


async def _each(target: Target, spent: Spent, *ways: Callable[[Name, Spent], Awaitable[None]]) -> None:
    async with names(target) as found, trio.open_nursery() as nursery:
        for name in found:
            for way in ways:
                nursery.start_soon(way, name, spent)
        await trio.sleep(SETTLE_S)
        spent.is_set_up.set()


async def holds_half_frames(target: Target, spent: Spent) -> None:
    """Row 22: sixty names, and of each as much of an unfinished frame as it may have, held as long as it likes."""
    await _each(target, spent, hold_half_frames)


async def leaves_streams_unread(target: Target, spent: Spent) -> None:
    """The same with streams that never agree on a protocol: each holds a window."""
    await _each(target, spent, leave_streams_unread)


async def holds_all_that_it_may(target: Target, spent: Spent) -> None:
    """Both, of each of sixty names: two unfinished frames, and streams that nobody reads."""
    await _each(target, spent, hold_half_frames, hold_half_frames, leave_streams_unread)


async def fills_the_dht(target: Target, spent: Spent) -> None:
    """Row 18: provider records of 590,000 addresses, and as many short ones as fit; 50 a second."""
    address = Multiaddr("/ip4/192.0.2.1/tcp/1").to_bytes()
    async with names(target, 10) as found:
        spent.is_set_up.set()
        async for number in every(0.02):
            name = found[number % len(found)]
            me = ID.from_base58(str(name.host.peer_id))
            message = Message(type=Message.MessageType.ADD_PROVIDER, key=os.urandom(34))
            message.providerPeers.add(id=me.to_bytes(), addrs=[address] * (590_000 if number // 10 % 2 else 1000))
            raw = message.SerializeToString()
            with suppress(*FAILED), trio.move_on_after(5):
                await name.connection()
                stream = await raw_stream(name.host, target.peer, PROTOCOL_ID)
                await send_and_say_no_more(stream, varint.encode(len(raw)) + raw)
                spent.num_bytes += len(raw)
                await stream.close()
            spent.num += 1


async def never_finishes_handshakes(target: Target, spent: Spent) -> None:
    """Row 21: 124 connections a second that agree on noise, send a random first message, and stop; from eight IPs."""
    hello = GREETING + b"\x07/noise\n" + b"\x00\x20" + os.urandom(32)

    async def one(number: int) -> None:
        with suppress(OSError), trio.move_on_after(5), await target.socket(number) as sock:
            await sock.send(hello)
            spent.num_bytes += len(hello)
            while await sock.recv(4096):
                pass

    spent.is_set_up.set()
    async with trio.open_nursery() as nursery:
        async for number in every(1 / 124):
            nursery.start_soon(one, number)
            spent.num += 1


async def comes_and_goes(target: Target, spent: Spent) -> None:
    """Row 21: 65 whole handshakes a second, each of a new name."""

    async def one(number: int) -> None:
        with suppress(*FAILED), trio.move_on_after(5):
            async with few, a_name(target, number):
                spent.num += 1

    few = trio.CapacityLimiter(64)
    spent.is_set_up.set()
    async with trio.open_nursery() as nursery:
        async for number in every(1 / 65):
            if few.statistics().tasks_waiting < few.total_tokens:
                nursery.start_soon(one, number)


async def makes_up_circuits(target: Target, spent: Spent) -> None:
    """Row 17: circuits of twelve made-up peers, unasked, and introductions with sixteen addresses, twice a second."""
    async with a_node(target) as host:
        spent.is_set_up.set()
        async for _ in every(0.5):
            for _ in range(12):
                made_up = ID.from_base58(str(PeerId.of_public_key(os.urandom(32))))
                with suppress(*FAILED), trio.move_on_after(1):
                    stream = await raw_stream(host, target.peer, STOP_PROTOCOL)
                    source = pb.PeerId(id=made_up.to_bytes())
                    await write_message(stream, pb.StopMessage(type=pb.StopMessage.CONNECT, peer=source))
            addresses = tuple(f"/ip4/127.0.0.{n}/tcp/{target.bystander_port}/p2p/{host.peer_id}" for n in range(20, 36))
            with suppress(RemoteError):
                told = Introduction(
                    addresses=addresses,
                    relays=True,
                    load=0.0,
                    stun_port=0,
                    reachability="public",
                    udp="none",
                    tcp_mapping="none",
                )
                await client(ReachService, host.at(target.peer), timeout_s=2).hello(told)
            spent.num += 1


async def misleads_in_the_dht(target: Target, spent: Spent) -> None:
    """Ten names that answer every question of the DHT with twenty made-up peers that live at a bystander's."""
    lie = misled(target.bystander_port)

    async def answer(stream: Any) -> None:
        spent.num += 1
        await lie(stream)

    def prepare(name: Name) -> None:
        name.host.libp2p.set_stream_handler(PROTOCOL_ID, answer)

    async with names(target, 10, prepare):
        spent.is_set_up.set()
        await trio.sleep_forever()


async def opens_sockets(target: Target, spent: Spent) -> None:
    """Row 16, from outside: 900 connections of eight IPs that say one byte; each that is closed comes again."""
    num_open, are_many = 0, trio.Event()

    async def one(number: int) -> None:
        nonlocal num_open
        async for _ in again():
            with suppress(OSError), await target.socket(number) as sock:
                await sock.send(GREETING[:1])
                spent.num += 1
                num_open += 1
                if num_open == 900:
                    are_many.set()
                while await sock.recv(4096):
                    pass

    async with trio.open_nursery() as nursery:
        for number in range(900):
            nursery.start_soon(one, number)
        await are_many.wait()
        spent.is_set_up.set()


ATTACKS: Final[dict[str, Callable[[Target, Spent], Awaitable[None]]]] = {
    attack.__name__: attack
    for attack in (
        does_nothing,
        holds_half_frames,
        leaves_streams_unread,
        holds_all_that_it_may,
        fills_the_dht,
        never_finishes_handshakes,
        comes_and_goes,
        makes_up_circuits,
        misleads_in_the_dht,
        opens_sockets,
    )
}


async def attack(name: str, peer: str, ip: str, port: int) -> None:
    """Until standard input ends."""
    spent = Spent()
    async with bystander() as (bystander_port, dialed), trio.open_nursery() as nursery:
        nursery.start_soon(ATTACKS[name], Target(PeerId.parse(peer), ip, port, bystander_port), spent)
        with trio.move_on_after(SET_UP_S):
            await spent.is_set_up.wait()
        print(json.dumps({"is_set_up": spent.is_set_up.is_set()}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        print(json.dumps({"num": spent.num, "num_bytes": spent.num_bytes, "num_dialed": len(dialed)}), flush=True)
        os._exit(0)  # strangers do not say goodbye


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # what libp2p says at this end
    trio.run(attack, sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
