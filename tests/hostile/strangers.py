"""Real nodes that train, and strangers without a ticket: what these spend, and what the honest lose.

``python tests/hostile/strangers.py [--seconds 8] [--only NAME,…]``

Each attack runs in this process, from loopback addresses other than the nodes', against the first of two nodes that
train together; a third joins meanwhile. Printed is, of each: what the attacker spent (CPU seconds, bytes where they
matter), how far the node's memory and descriptors grew, how long a join took, and epochs per second before and
meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import varint
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile.run import Nodes

from shoal.node.mesh.circuits import write_message
from shoal.node.mesh.host import Host, open_host
from shoal.node.mesh.relay import STOP_PROTOCOL
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import Introduction, ReachService
from shoal.node.wire.links import STREAM_PROTOCOL
from shoal.protocol.errors import RemoteError, ShoalError
from shoal.protocol.frames import FrameType
from shoal.protocol.ids import PeerId
from shoal.protocol.services import client

BROKEN = (ShoalError, BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)
MIB = 1024 * 1024
NUM_NAMES = 60
SET_UP_S = 60


@dataclass
class Target:
    """The node, as strangers see it, and a bystander who counts whoever dials it."""

    peer: PeerId
    addresses: list[str]
    bystander_port: int = 0
    num_dialed: int = 0

    @property
    def ip_port(self) -> tuple[str, int]:
        _, _, ip, _, port, *_ = self.addresses[0].split("/")
        return ip, int(port)


@dataclass
class Spent:
    """What an attack cost whoever made it, beside CPU."""

    num: int = 0
    num_bytes: int = 0
    is_set_up: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def a_name(target: Target) -> AsyncIterator[Host]:
    """One more stranger, connected."""
    async with open_host(
        secret=os.urandom(32),
        listen=["/ip4/127.0.0.2/tcp/0"],
        bootstrap=(),
        mdns=False,
        router=Router(),
        lanes=False,
    ) as host:
        await host.connect(target.addresses)
        yield host


async def raw_stream(host: Host, target: Target, protocol: str) -> Any:
    return await host.libp2p.new_stream(ID.from_base58(str(target.peer)), [TProtocol(protocol)])


@asynccontextmanager
async def names(target: Target, num: int = NUM_NAMES) -> AsyncIterator[list[Host]]:
    """As many strangers as are let in of so many."""
    found: list[Host] = []
    num_tried = 0

    async def live() -> None:
        nonlocal num_tried
        try:
            async with a_name(target) as host:
                found.append(host)
                num_tried += 1
                await trio.sleep_forever()
        except BROKEN:
            num_tried += 1

    async with trio.open_nursery() as nursery:
        for number in range(num):
            nursery.start_soon(live)
            while num_tried < number - 8:  # noqa: ASYNC110  a few at a time
                await trio.sleep(0.02)
        with trio.move_on_after(SET_UP_S):
            while num_tried < num:  # noqa: ASYNC110  likewise
                await trio.sleep(0.02)
        yield found
        nursery.cancel_scope.cancel()


async def does_nothing(target: Target, spent: Spent) -> None:
    """To compare with."""
    spent.is_set_up.set()
    await trio.sleep_forever()


async def holds_half_frames(target: Target, spent: Spent) -> None:
    """Row 22: sixty names, and of each as many unfinished frames as it may have, held as long as it likes."""
    head = struct.pack("!IBBIIHI", 12 + 4 + 16 * MIB, FrameType.REQUEST, 0, 1, 0, 1, 16 * MIB)
    async with names(target) as hosts:

        async def hold(host: Host) -> None:
            while True:
                with suppress(*BROKEN), trio.move_on_after(2):
                    stream = await raw_stream(host, target, STREAM_PROTOCOL)
                    for start in range(0, 4 * MIB, 32 * 1024):
                        await stream.write(head + bytes(32 * 1024) if not start else bytes(32 * 1024))
                        spent.num_bytes += 32 * 1024
                    spent.num += 1
                if spent.num_bytes > 600 * MIB:
                    return
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(hold, host)
            spent.is_set_up.set()
        await trio.sleep_forever()


async def leaves_streams_unread(target: Target, spent: Spent) -> None:
    """The same with streams that never agree on a protocol: each holds a window."""
    async with names(target) as hosts:
        spent.is_set_up.set()
        for host in hosts:
            connections = host.libp2p.get_network().get_connections(ID.from_base58(str(target.peer)))
            for _ in range(100):
                with suppress(*BROKEN, IndexError), trio.move_on_after(1):
                    stream = await connections[0].new_stream()
                    spent.num += 1
                    for _ in range(6):
                        await stream.write(b"\x13/multistream/1.0.0\n" + bytes(40_000))
                        spent.num_bytes += 40_020
        await trio.sleep_forever()


async def fills_the_dht(target: Target, spent: Spent) -> None:
    """Row 18: provider records of 590,000 addresses, and as many short ones as fit."""
    address = Multiaddr("/ip4/192.0.2.1/tcp/1").to_bytes()
    async with names(target, 10) as hosts:
        spent.is_set_up.set()
        long = True
        while True:
            for host in hosts:
                name = ID.from_base58(str(host.peer_id))
                message = Message(type=Message.MessageType.ADD_PROVIDER, key=os.urandom(34))
                message.providerPeers.add(id=name.to_bytes(), addrs=[address] * (590_000 if long else 1000))
                raw = message.SerializeToString()
                with suppress(*BROKEN), trio.move_on_after(5):
                    stream = await raw_stream(host, target, PROTOCOL_ID)
                    for start in range(0, len(raw), 65536):
                        piece = raw[start : start + 65536]
                        await stream.write(piece if start else varint.encode(len(raw)) + piece)
                        spent.num_bytes += len(piece)
                    await stream.close()
                spent.num += 1
            long = not long
            await trio.sleep(0.2)


async def never_finishes_handshakes(target: Target, spent: Spent) -> None:
    """Row 21: connections that agree on noise, send a random first message, and stop; from eight IPs."""
    hello = b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\x00\x20" + os.urandom(32)

    async def one(number: int) -> None:
        with suppress(OSError), trio.move_on_after(5), trio.socket.socket() as sock:
            await sock.bind((f"127.0.0.{10 + number % 8}", 0))
            await sock.connect(target.ip_port)
            await sock.send(hello)
            spent.num_bytes += len(hello)
            while await sock.recv(4096):
                pass

    spent.is_set_up.set()
    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(one, spent.num)
            spent.num += 1
            await trio.sleep(1 / 124)


async def comes_and_goes(target: Target, spent: Spent) -> None:
    """Row 21: whole handshakes, each of a new name."""
    spent.is_set_up.set()
    while True:
        with suppress(*BROKEN), trio.move_on_after(5):
            async with a_name(target):
                spent.num += 1


async def makes_up_circuits(target: Target, spent: Spent) -> None:
    """Row 17: circuits of twelve made-up peers, unasked, and introductions with sixteen new addresses at a time."""
    async with a_name(target) as host:
        spent.is_set_up.set()
        while True:
            for _ in range(12):
                made_up = ID.from_base58(str(PeerId.of_public_key(os.urandom(32))))
                with suppress(*BROKEN), trio.move_on_after(1):
                    stream = await raw_stream(host, target, STOP_PROTOCOL)
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
            await trio.sleep(0.5)


async def misleads_in_the_dht(target: Target, spent: Spent) -> None:
    """Ten names that answer every question of the DHT with twenty made-up peers that live at a bystander's."""
    port = target.bystander_port

    async def lie(stream: Any) -> None:
        answer = Message(type=Message.MessageType.FIND_NODE)
        for _ in range(20):
            name = ID.from_base58(str(PeerId.of_public_key(os.urandom(32))))
            addresses = [Multiaddr(f"/ip4/127.0.0.{n}/tcp/{port}").to_bytes() for n in range(1, 100)]
            answer.closerPeers.add(id=name.to_bytes(), addrs=addresses)
        raw = answer.SerializeToString()
        with suppress(*BROKEN):
            await stream.read(1)
            await stream.write(varint.encode(len(raw)) + raw)
            spent.num += 1
            spent.num_bytes += len(raw)

    async with names(target, 10) as hosts:
        for host in hosts:
            host.libp2p.set_stream_handler(TProtocol(PROTOCOL_ID), lie)
        spent.is_set_up.set()
        await trio.sleep_forever()


async def opens_sockets(target: Target, spent: Spent) -> None:
    """Row 16, from outside: a thousand connections of eight IPs, each of which sends one byte."""
    with_socket: list[Any] = []
    try:
        while len(with_socket) < 900:
            sock = trio.socket.socket()
            with_socket.append(sock)
            with suppress(OSError):
                await sock.bind((f"127.0.0.{10 + len(with_socket) % 8}", 0))
                await sock.connect(target.ip_port)
                await sock.send(b"\x13")
            spent.num += 1
        spent.is_set_up.set()
        await trio.sleep_forever()
    finally:
        for sock in with_socket:
            sock.close()


ATTACKS: dict[str, Callable[[Target, Spent], Awaitable[None]]] = {
    attack.__name__: attack
    for attack in (
        does_nothing,
        holds_half_frames,
        leaves_streams_unread,
        fills_the_dht,
        never_finishes_handshakes,
        comes_and_goes,
        makes_up_circuits,
        misleads_in_the_dht,
        opens_sockets,
    )
}


class Process:
    """What the node under attack takes of the machine."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.max_rss = self.max_descriptors = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            with suppress(OSError, StopIteration):
                lines = (self._folder / "status").read_text(encoding="ascii").splitlines()
                rss = 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])
                self.max_rss = max(self.max_rss, rss)
                self.max_descriptors = max(self.max_descriptors, len(list((self._folder / "fd").iterdir())))

    def stop(self) -> None:
        self._stopped.set()


async def play(nodes: Nodes, swarm: str, ticket: str, name: str, seconds: float) -> list[str]:
    """One attack; the cells of its row."""
    info = nodes.infos[0]
    target = Target(PeerId.parse(info["peer_id"]), info["addresses"])
    before = await trio.to_thread.run_sync(nodes.rate, swarm, seconds)

    async def count(stream: trio.SocketStream) -> None:
        target.num_dialed += 1
        await stream.aclose()

    spent, cpu = Spent(), time.process_time()
    watched = Process(info["pid"])
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, count, 0)
        target.bystander_port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(ATTACKS[name], target, spent)
        with trio.move_on_after(SET_UP_S):
            await spent.is_set_up.wait()
        await trio.sleep(seconds / 4)
        began = time.monotonic()
        joiner = nodes.number
        with suppress(Exception):
            await trio.to_thread.run_sync(lambda: nodes.ask(joiner, "join", ticket, "--detach"))
        join_s = time.monotonic() - began
        meanwhile = await trio.to_thread.run_sync(nodes.rate, swarm, seconds)
        num_dialed = target.num_dialed
        nursery.cancel_scope.cancel()
    await trio.to_thread.run_sync(lambda: nodes.ask(joiner, "leave", swarm))
    watched.stop()
    return [
        name,
        f"{spent.num}",
        f"{spent.num_bytes / 1e6:.1f}",
        f"{time.process_time() - cpu:.1f}",
        f"{watched.max_rss / MIB:.0f}",
        f"{watched.max_descriptors}",
        f"{num_dialed}",
        f"{join_s:.1f}",
        f"{before:.2f}",
        f"{meanwhile:.2f}",
    ]


def main() -> int:
    """Play the attacks, print a table; 1 if a node ended or the swarm stood still."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--only", default=",".join(ATTACKS))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what libp2p says at the attackers' end
    is_bad = False
    with tempfile.TemporaryDirectory() as home:
        nodes = Nodes(Path(home), 2)
        try:
            for number in range(3):
                nodes.infos.append(nodes.ask(number, "up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"))
            created = nodes.ask(
                0, "swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo", "--target-return", "100000"
            )
            nodes.ask(1, "join", created["ticket"], "--detach")
            time.sleep(5)
            head = ("attack", "acts", "MB", "CPU s", "node MiB", "fds", "dialed", "join s", "epochs/s", "meanwhile")
            print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
            for name in arguments.only.split(","):
                row = trio.run(play, nodes, created["swarm"], created["ticket"], name, arguments.seconds)
                is_bad |= float(row[-1]) <= 0
                print("| " + " | ".join(row) + " |", flush=True)
        finally:
            nodes.number = 3
            nodes.stop()
    return int(is_bad)


if __name__ == "__main__":
    raise SystemExit(main())
