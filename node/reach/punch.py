"""Hole punching by TCP simultaneous open, coordinated over a relayed path: libp2p's DCUtR.

Source: https://github.com/libp2p/specs/blob/master/relay/DCUtR.md. Both sides tell each other where their NATs put the
port that they listen on, and dial from that port at the same moment, so that each NAT has seen a packet go out before
one comes in. On a connection that both have opened at once neither is the dialer, so the roles in the handshake are
fixed: whoever began the exchange is the responder.

    beginner                                     other side
    CONNECT(addresses)  ─────────────────────▶
                        ◀─────────────────────   CONNECT(addresses)
    SYNC                ─────────────────────▶   dials at once, as the handshake's initiator
    waits half a round trip, dials as responder

Unlike libp2p's own implementation this one asks a relay where the NAT puts the port just before (`Door.seen_by`),
rather than hoping that NATs keep port numbers, and keeps that mapping in use meanwhile.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from shoal.node.mesh.circuits import BROKEN, end_stream, read_message, write_message
from shoal.node.mesh.host import Host
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

DCUTR_PROTOCOL: Final = TProtocol("/libp2p/dcutr")
EXCHANGE_S: Final = 5.0
PUNCH_S: Final = 3.0
"""How long both sides dial."""
AGAIN_S: Final = 0.2
"""Between two tries to dial the same address."""
MAX_PUNCHING: Final = 32
"""Peers with which holes are punched at a time, since whoever asks names the addresses to dial."""
LABEL_S: Final = 1.0
"""How much longer a connection of the peer's counts as punched, since both sides do not end at the same moment."""
ASK_S: Final = 1.0
MAX_OBSERVERS: Final = 2
MAX_ADDRESSES: Final = 4

IpPort = tuple[str, int]


class PunchError(ShoalError):
    """No hole was punched; the message says why."""


class Puncher:
    """Punches holes, and takes part when a peer begins."""

    def __init__(self, host: Host) -> None:
        self._host = host
        host.libp2p.set_stream_handler(DCUTR_PROTOCOL, self._serve)

    async def punch(self, peer: PeerId) -> None:
        """Begin, with a peer that is connected by a relay.

        Raises:
            PunchError: if no direct connection came of it.
        """
        peer_id = ID.from_base58(str(peer))
        try:
            async with self._own_endpoints() as own:
                if not own:
                    raise PunchError("no relay could say where this node's NAT puts its port")
                with trio.fail_after(EXCHANGE_S):
                    stream = await self._host.libp2p.new_stream(peer_id, [DCUTR_PROTOCOL])
                    try:
                        began = trio.current_time()
                        await write_message(stream, _connect(own))
                        theirs = _endpoints(await read_message(stream, HolePunch))
                        rtt_s = trio.current_time() - began
                        await write_message(stream, HolePunch(type=HolePunch.SYNC))
                    finally:
                        await end_stream(stream)
                state = self._host.connected.get(peer)
                if state is not None and state.rtt_ms is not None:  # without the time that the peer took to answer
                    rtt_s = min(rtt_s, state.rtt_ms / 1000)
                await trio.sleep(rtt_s / 2)
                await self._dial_all(peer, theirs, is_initiator=False)
        except trio.TooSlowError as error:
            raise PunchError("the peer did not answer in time") from error
        except (DecodeError, *BROKEN) as error:
            raise PunchError(f"the exchange with the peer broke ({type(error).__name__})") from error

    async def _serve(self, stream: INetStream) -> None:
        peer = PeerId(str(stream.muxed_conn.peer_id))
        if self._is_direct(peer) or peer in self._host.punching or len(self._host.punching) >= MAX_PUNCHING:
            await end_stream(stream)
            return
        try:
            async with self._own_endpoints() as own:
                with trio.fail_after(EXCHANGE_S):
                    theirs = _endpoints(await read_message(stream, HolePunch))
                    await write_message(stream, _connect(own))
                    if (await read_message(stream, HolePunch)).type != HolePunch.SYNC:
                        return
                await self._dial_all(peer, theirs, is_initiator=True)
        except (PunchError, trio.TooSlowError, DecodeError, *BROKEN) as error:
            log.debug("no hole was punched with %s: %s", peer, error)
        finally:
            await end_stream(stream)

    @asynccontextmanager
    async def _own_endpoints(self) -> AsyncIterator[list[IpPort]]:
        """Where others have to dial this node: as relays see its port, and its own public addresses."""
        found: dict[IpPort, None] = {}
        async with AsyncExitStack() as stack:
            observers = [
                endpoint for peer in self._host.relays if (endpoint := self._host.dialed_address(peer)) is not None
            ]
            for observer in observers[:MAX_OBSERVERS]:
                with trio.move_on_after(ASK_S):
                    try:
                        _, seen = await stack.enter_async_context(self._host.door.seen_by(*observer))
                        found[seen] = None
                    except OSError as error:
                        log.debug("%s does not say how it sees this node: %s", observer, error)
            for address in self._host.addresses():
                match address.split("/")[1:5]:
                    case ["ip4" | "ip6", ip, "tcp", port] if ipaddress.ip_address(ip).is_global:
                        if "/p2p-circuit" not in address:
                            found[ip, int(port)] = None
            yield list(found)[:MAX_ADDRESSES]

    async def _dial_all(self, peer: PeerId, endpoints: list[IpPort], *, is_initiator: bool) -> None:
        if not endpoints:
            raise PunchError("the peer does not know where its NAT puts its port")
        self._host.punch_began(peer)
        try:
            with trio.move_on_after(PUNCH_S):
                async with trio.open_nursery() as nursery:
                    for ip, port in endpoints:
                        nursery.start_soon(self._dial, peer, ip, port, is_initiator)
                    while not self._is_direct(peer):
                        await self._host.wait_for_change()
                    nursery.cancel_scope.cancel()
            if not self._is_direct(peer):
                where = ", ".join(f"[{ip}]:{port}" for ip, port in endpoints)
                raise PunchError(f"nothing came through to or from {where} within {PUNCH_S:.0f} s")
        finally:
            self._host.spawn(self._stop_labelling, peer)

    async def _stop_labelling(self, peer: PeerId) -> None:
        await trio.sleep(LABEL_S)
        self._host.punch_over(peer)

    async def _dial(self, peer: PeerId, ip: str, port: int, is_initiator: bool) -> None:
        while True:
            try:
                stream = await self._host.door.dial(ip, port, from_port=True)
                await self._host.upgrade(RawConnection(TrioTCPStream(stream), initiator=is_initiator), peer)
            except BROKEN as error:
                log.debug("punching to [%s]:%d: %s", ip, port, error)
            await trio.sleep(AGAIN_S)

    def _is_direct(self, peer: PeerId) -> bool:
        state = self._host.connected.get(peer)
        return state is not None and state.kind.is_tcp_between_both


def _connect(endpoints: list[IpPort]) -> HolePunch:
    addresses = [Multiaddr(f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}").to_bytes() for ip, port in endpoints]
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=addresses)


def _endpoints(message: HolePunch) -> list[IpPort]:
    """The addresses of a CONNECT that can be dialed."""
    if message.type != HolePunch.CONNECT:
        raise DecodeError("not a CONNECT")
    found: dict[IpPort, None] = {}
    for raw in message.ObsAddrs[:MAX_ADDRESSES]:
        match str(Multiaddr(raw)).split("/")[1:]:
            case ["ip4" | "ip6", ip, "tcp", port, *rest] if "p2p-circuit" not in rest:
                address = ipaddress.ip_address(ip)
                if not (address.is_loopback or address.is_multicast or address.is_unspecified):
                    found[ip, int(port)] = None
    return list(found)
