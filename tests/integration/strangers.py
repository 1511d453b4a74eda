"""A stranger's ways: what whoever has no ticket can do to a node over libp2p, for tests and for `tests/hostile`."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import trio
import varint
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from shoal.node.mesh.host import Host
from shoal.node.mesh.libp2p_host import Libp2pHost
from shoal.protocol.frames import FrameType
from shoal.protocol.ids import PeerId

BROKEN: Final = (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)
MIB: Final = 1024 * 1024
GREETING: Final = b"\x13/multistream/1.0.0\n"
PIECE_BYTES: Final = 32 * 1024
HALF_FRAME: Final = struct.pack("!IBBIIHI", 12 + 4 + 1 + 16 * MIB, FrameType.REQUEST, 0, 1, 1, 1, 16 * MIB)
"""The head of the longest request that there may be."""


async def raw_stream(host: Host | Libp2pHost, peer: PeerId, protocol: str) -> Any:
    """A stream to a connected peer that has agreed on a protocol, and said nothing by it."""
    return await host.libp2p.new_stream(ID.from_base58(str(peer)), [TProtocol(protocol)])


async def socket_from(ip: str, to: tuple[str, int]) -> Any:
    """A TCP connection that comes from an IP of this machine, as from another one."""
    sock = trio.socket.socket()
    try:
        await sock.bind((ip, 0))
        await sock.connect(to)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_from(ip: str, host: Host | Libp2pHost, peer: PeerId, to: tuple[str, int]) -> None:
    """Connect a host to a node from an IP of this machine."""
    stream = trio.SocketStream(await socket_from(ip, to))
    await host.upgrade(RawConnection(TrioTCPStream(stream), initiator=True), peer)


def connection_to(host: Host | Libp2pHost, peer: PeerId) -> Any:
    """Libp2p's connection to a peer; None if it is gone."""
    return next(iter(host.libp2p.get_network().get_connections(ID.from_base58(str(peer)))), None)


async def send_and_say_no_more(stream: Any, data: bytes) -> None:
    """Write in pieces, so that what a far side does not take can be given up in between."""
    for start in range(0, len(data), PIECE_BYTES):
        await stream.write(data[start : start + PIECE_BYTES])


async def leave_unread(connection: Any, num_bytes: int) -> Any:
    """A stream that never agrees on a protocol, with so much behind its greeting, which lies in the node's window."""
    stream = await connection.new_stream()
    await send_and_say_no_more(stream, GREETING + bytes(num_bytes))
    return stream


def misled(port: int) -> Callable[[Any], Awaitable[None]]:
    """What answers every question of the DHT with twenty made-up peers, each at 99 addresses with this port."""

    async def answer(stream: Any) -> None:
        told = Message(type=Message.MessageType.FIND_NODE)
        for _ in range(20):
            name = ID.from_base58(str(PeerId.of_public_key(os.urandom(32))))
            addresses = [Multiaddr(f"/ip4/127.0.0.{last}/tcp/{port}").to_bytes() for last in range(1, 100)]
            told.closerPeers.add(id=name.to_bytes(), addrs=addresses)
        raw = told.SerializeToString()
        with suppress(*BROKEN):
            await stream.read(1)
            await stream.write(varint.encode(len(raw)) + raw)

    return answer


@asynccontextmanager
async def bystander() -> AsyncIterator[tuple[int, list[int]]]:
    """Somebody who listens on a port, and how often it was dialed."""
    dialed: list[int] = []

    async def count(stream: trio.SocketStream) -> None:
        dialed.append(1)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, count, 0)
        yield listeners[0].socket.getsockname()[1], dialed
        nursery.cancel_scope.cancel()
