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

A dial that nobody answered leaves its mark in the NAT that it left by, which waits two minutes (Linux) for the answer
to this very SYN. If the next try is between the same two ports and the peer's SYN comes first, it is let in, and the
listener answers it, but with a sequence number that the NAT takes for nonsense and drops; as long as that hangs,
nothing else can be dialed between those ports. So whoever has dialed a peer in vain uses another port of its own the
next time, and nobody dials a peer that cannot be told where to dial.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
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
from shoal.node.mesh.interfaces import local_ips
from shoal.node.signals import Signal
from shoal.node.supervise import Policy
from shoal.protocol.errors import Fault, ShoalError
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
MARKED_S: Final = 130.0
"""How long a NAT may wait for the answer to a dial; Linux does for 120 s."""
MAX_MARKS: Final = 256

IpPort = tuple[str, int]


class PunchError(ShoalError):
    """No hole was punched; the message says why."""

    fault = Fault.REMOTE


class Marks:
    """Which peers were dialed in vain lately, so that NATs wait for what will not come. Pure; times in seconds."""

    def __init__(self) -> None:
        self._until: dict[PeerId, float] = {}

    def leave(self, peer: PeerId, now: float) -> None:
        """A peer was dialed in vain until now."""
        self._until.pop(peer, None)
        self._until[peer] = now + MARKED_S
        while len(self._until) > MAX_MARKS:
            del self._until[next(iter(self._until))]

    def has(self, peer: PeerId, now: float) -> bool:
        """Whether the last such dial may still be waited for."""
        return self._until.get(peer, now) > now


@dataclass(frozen=True, slots=True)
class _OwnEnd:
    """From where this node dials, and where others have to dial it.

    Attributes:
        spare_port: None for the port that it listens on.
    """

    spare_port: int | None
    endpoints: list[IpPort]


class Puncher:
    """Punches holes, and takes part when a peer begins.

    Args:
        known: where this node's port was seen before, for when nobody can be asked just now.
    """

    def __init__(self, host: Host, known: Callable[[], Sequence[IpPort]] = tuple) -> None:
        self._host = host
        self._known = known
        self._marks = Marks()
        self._dialing: set[PeerId] = set()
        self._dialed = Signal()  # with one of them it is over
        self._labels: Counter[PeerId] = Counter()  # punches with a peer that go on or are just over
        host.libp2p.set_stream_handler(DCUTR_PROTOCOL, self._serve_safely)

    async def punch(self, peer: PeerId) -> None:
        """Begin, with a peer that is connected by a relay.

        Raises:
            PunchError: if no direct connection came of it.
        """
        peer_id = ID.from_base58(str(peer))
        while peer in self._dialing:  # since the peer began
            await self._dialed.wait()
        try:
            async with self._own_end(peer) as own:
                if not own.endpoints:
                    raise PunchError("no relay could say where this node's NAT puts its port")
                with trio.fail_after(EXCHANGE_S):
                    stream = await self._host.libp2p.new_stream(peer_id, [DCUTR_PROTOCOL])
                    try:
                        began = trio.current_time()
                        await write_message(stream, _connect(own.endpoints))
                        theirs = _endpoints(await read_message(stream, HolePunch))
                        rtt_s = trio.current_time() - began
                        await write_message(stream, HolePunch(type=HolePunch.SYNC))
                    finally:
                        await end_stream(stream)
                state = self._host.connected.get(peer)
                if state is not None and state.rtt_ms is not None:  # without the time that the peer took to answer
                    rtt_s = min(rtt_s, state.rtt_ms / 1000)
                await trio.sleep(rtt_s / 2)
                await self._dial_all(peer, theirs, own.spare_port, is_initiator=False)
        except trio.TooSlowError as error:
            raise PunchError("the peer did not answer in time") from error
        except (DecodeError, *BROKEN) as error:
            raise PunchError(f"the exchange with the peer broke ({type(error).__name__})") from error

    async def _serve_safely(self, stream: INetStream) -> None:
        if not await self._host.domain.serve("answering a punch", self._serve, stream):
            await end_stream(stream)

    async def _serve(self, stream: INetStream) -> None:
        peer = PeerId(str(stream.muxed_conn.peer_id))
        if self._is_direct(peer) or peer in self._dialing or len(self._dialing) >= MAX_PUNCHING:
            await end_stream(stream)
            return
        try:
            async with self._own_end(peer) as own:
                with trio.fail_after(EXCHANGE_S):
                    theirs = _endpoints(await read_message(stream, HolePunch))
                    await write_message(stream, _connect(own.endpoints))
                    if (await read_message(stream, HolePunch)).type != HolePunch.SYNC or not own.endpoints:
                        return
                await self._dial_all(peer, theirs, own.spare_port, is_initiator=True)
        except (PunchError, trio.TooSlowError, DecodeError, *BROKEN) as error:
            log.debug("no hole was punched with %s: %s", peer, error)
        finally:
            await end_stream(stream)

    @asynccontextmanager
    async def _own_end(self, peer: PeerId) -> AsyncIterator[_OwnEnd]:
        """As relays see the port, and this node's own public addresses."""
        found: dict[IpPort, None] = {}
        async with AsyncExitStack() as stack:
            spare: int | None = None
            if self._marks.has(peer, trio.current_time()):
                try:
                    spare = stack.enter_context(self._host.door.spare_port())
                except OSError as error:
                    log.debug("no other port to punch from: %s", error)
            observers = [
                endpoint for each in self._host.relays if (endpoint := self._host.dialed_address(each)) is not None
            ]
            for observer in observers[:MAX_OBSERVERS]:
                with trio.move_on_after(ASK_S):
                    try:
                        seeing = self._host.door.seen_by(*observer, spare_port=spare)
                        _, seen = await stack.enter_async_context(seeing)
                        found[seen] = None
                    except OSError as error:
                        log.debug("%s does not say how it sees this node: %s", observer, error)
            if spare is None:
                found |= dict.fromkeys(self._public_endpoints() or ([] if found else self._known()))
            else:  # a port is only where its NAT puts it, or where there is none
                found |= {(ip, spare): None for ip, _ in self._public_endpoints() if ip in local_ips()}
            yield _OwnEnd(spare, list(found)[:MAX_ADDRESSES])

    def _public_endpoints(self) -> list[IpPort]:
        found: list[IpPort] = []
        for address in self._host.addresses():
            match address.split("/")[1:5]:
                case ["ip4" | "ip6", ip, "tcp", port] if ipaddress.ip_address(ip).is_global:
                    if "/p2p-circuit" not in address:
                        found.append((ip, int(port)))
        return found

    async def _dial_all(
        self, peer: PeerId, endpoints: list[IpPort], spare_port: int | None, *, is_initiator: bool
    ) -> None:
        if not endpoints:
            raise PunchError("the peer does not know where its NAT puts its port")
        if peer in self._dialing:
            raise PunchError("another punch with the peer has begun meanwhile")
        self._dialing.add(peer)
        self._labels[peer] += 1
        self._host.punch_began(peer)
        try:
            with trio.move_on_after(PUNCH_S):
                async with trio.open_nursery() as nursery:
                    for ip, port in endpoints:
                        nursery.start_soon(self._dial, peer, (ip, port), spare_port, is_initiator)
                    while not self._is_direct(peer):
                        await self._host.wait_for_change()
                    nursery.cancel_scope.cancel()
            if not self._is_direct(peer):
                where = ", ".join(f"[{ip}]:{port}" for ip, port in endpoints)
                raise PunchError(f"nothing came through to or from {where} within {PUNCH_S:.0f} s")
        finally:
            if not self._is_direct(peer):
                self._marks.leave(peer, trio.current_time())
            self._dialing.discard(peer)
            self._dialed.set()
            self._host.spawn("ending a punch", self._stop_labelling, peer, policy=Policy.RESTART)

    async def _stop_labelling(self, peer: PeerId) -> None:
        await trio.sleep(LABEL_S)
        self._labels[peer] -= 1
        if not self._labels[peer]:
            del self._labels[peer]
            self._host.punch_over(peer)

    async def _dial(self, peer: PeerId, far: IpPort, spare_port: int | None, is_initiator: bool) -> None:
        while True:
            try:
                stream = await self._host.door.dial(*far, from_port=spare_port is None, spare_port=spare_port)
                await self._host.upgrade(RawConnection(TrioTCPStream(stream), initiator=is_initiator), peer)
            except BROKEN as error:
                log.debug("punching to [%s]:%d: %s", *far, error)
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
