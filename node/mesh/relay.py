"""Circuits: connections between two nodes by way of a third, after libp2p's circuit relay v2.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md (vouchers and the reservation proof are left
out; they are optional there). The three parts:

- **hop**: this node relays. A peer reserves, and others may then be connected to it through this node, which passes
  bytes on that it cannot read, within `RelayLimits` and with fair turns (`shoal.node.mesh.relay_limits`).
- **stop**: this node is the far end of a circuit that another one opened; through a relay that it has asked for that,
  since any other may make up whom it brings.
- **client**: `reserve` and `dial`.

What the three share, down to how their messages lie on a stream, is `shoal.node.mesh.circuits`.

A circuit is a byte stream; libp2p's ordinary upgrade (noise, then yamux) makes it a connection like any other, so both
ends prove who they are to each other, and everything works over it. libp2p's own implementation is not used: it keeps
one circuit per peer and closes the first when there is a second, and has neither fairness nor renewal in time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, IMuxedConn, INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

from shoal.node.mesh.addresses import CIRCUIT, full_address
from shoal.node.mesh.circuits import (
    BROKEN,
    RelayError,
    close_stream,
    closed_on_failure,
    end_stream,
    parse_circuit,
    raw_connection,
    read_message,
    write_message,
)
from shoal.node.mesh.relay_limits import MAX_PIECE_BYTES, FairShare, RelayLedger, RelayLimits, RelayRefusedError
from shoal.node.supervise import Domain
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

HOP_PROTOCOL: Final = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP_PROTOCOL: Final = TProtocol("/libp2p/circuit/relay/0.2.0/stop")

MESSAGE_TIMEOUT_S: Final = 10.0
MAX_HANDSHAKES_PER_PEER: Final = 16
DIAL_TIMEOUT_S: Final = 10.0
EXPIRED_S: Final = 60.0
"""How long after its end a reservation may still bring circuits, since clocks differ."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a relay granted.

    Attributes:
        expires_s: seconds from now until it must have been renewed.
        addresses: the relay's own, full multiaddrs.
        circuit_s: how long a circuit through it may last; 0 if there is no limit.
        circuit_bytes: how much one may carry; 0 if there is no limit.
    """

    expires_s: float
    addresses: tuple[str, ...]
    circuit_s: int
    circuit_bytes: int


class Relay:
    """All three parts, for one libp2p host. `run` must run while circuits are relayed.

    Args:
        host: of libp2p; it need not listen yet.
        limits: of what this node relays.
        addresses: gives the full multiaddrs that a client may hand out to reach this relay.
        domain: where what fails in serving a peer ends.
    """

    def __init__(self, host: IHost, limits: RelayLimits, addresses: Any, domain: Domain) -> None:
        self.ledger = RelayLedger(limits)
        self.num_bytes = 0
        """Relayed so far."""
        self._host = host
        self._addresses = addresses
        self._domain = domain
        self._share = FairShare(limits.bytes_per_s)
        self._asked = trio.Event()
        self._is_open = False
        self._handshakes: Counter[PeerId] = Counter()
        self._reserved: dict[PeerId, float] = {}  # the relays that this node may be reached through, and until when
        self.num_unasked = 0
        """Circuits that came from where this node had asked for none."""
        host.set_stream_handler(STOP_PROTOCOL, self._take_stop)

    @property
    def is_open(self) -> bool:
        """Whether this node relays for others."""
        return self._is_open

    def open(self) -> None:
        """Relay for others from now on."""
        self._is_open = True
        self._host.set_stream_handler(HOP_PROTOCOL, self._take_hop)

    def close(self) -> None:
        """Take no new reservations and circuits; those that stand go on."""
        if self._is_open:
            self._is_open = False
            self._host.remove_stream_handler(HOP_PROTOCOL)

    async def run(self) -> None:
        """Wake those whose turn has come."""
        while True:
            at = self._share.next_at(trio.current_time())
            if at is None:
                self._asked = trio.Event()
                await self._asked.wait()
            else:
                await trio.sleep_until(at)
                self._let_pass()

    def peer_down(self, peer: PeerId) -> None:
        """A peer has no connection any more."""
        self.ledger.release(peer)
        self._reserved.pop(peer, None)

    # --- client ---

    async def reserve(self, relay: PeerId) -> Reservation:
        """Ask a connected peer to let others reach this node through it; ask again before it expires.

        Raises:
            RelayError: if it does not.
        """
        self._reserved = {each: until for each, until in self._reserved.items() if until > trio.current_time()}
        self._reserved.setdefault(relay, trio.current_time() + MESSAGE_TIMEOUT_S)  # it may be used before it is known
        answer = await self._ask(relay, pb.HopMessage(type=pb.HopMessage.RESERVE))
        try:
            addresses = tuple(str(Multiaddr(raw)) for raw in answer.reservation.addrs[:16])
        except ValueError:
            addresses = ()
        expires_s = max(0.0, answer.reservation.expire - time.time())
        self._reserved[relay] = trio.current_time() + expires_s + EXPIRED_S
        return Reservation(
            expires_s=expires_s,
            addresses=tuple(address for address in addresses if CIRCUIT not in address),
            circuit_s=answer.limit.duration,
            circuit_bytes=answer.limit.data,
        )

    async def dial(self, address: str) -> INetConn:
        """Open a circuit, and make it a connection.

        Args:
            address: ``RELAY/p2p-circuit/p2p/PEER``, where ``RELAY`` ends in the name of a connected peer.

        Raises:
            RelayError: if the relay refuses, or the peer is not who it should be.
        """
        relay, target = parse_circuit(address)
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                request = pb.HopMessage(
                    type=pb.HopMessage.CONNECT, peer=pb.PeerId(id=ID.from_base58(str(target)).to_bytes())
                )
                stream, _ = await self._exchange(relay, request)
                raw = raw_connection(stream, address, is_initiator=True)
                network = self._host.get_network()
                async with closed_on_failure(raw):
                    return await network.upgrade_outbound_raw_conn(raw, ID.from_base58(str(target)))
        except trio.TooSlowError as error:
            raise RelayError(f"no circuit to {target} through {relay} within {DIAL_TIMEOUT_S:.0f} s") from error
        except BROKEN as error:
            raise RelayError(f"the circuit to {target} through {relay} broke ({type(error).__name__})") from error

    async def _ask(self, relay: PeerId, request: pb.HopMessage) -> pb.HopMessage:
        try:
            with trio.fail_after(MESSAGE_TIMEOUT_S):
                stream, answer = await self._exchange(relay, request)
                await end_stream(stream)
                return answer
        except trio.TooSlowError as error:
            raise RelayError(f"{relay} does not answer as a relay") from error
        except BROKEN as error:
            raise RelayError(f"asking {relay} to relay failed ({type(error).__name__})") from error

    async def _exchange(self, relay: PeerId, request: pb.HopMessage) -> tuple[INetStream, pb.HopMessage]:
        peer = ID.from_base58(str(relay))
        if not self._host.get_network().get_connections(peer):
            raise RelayError(f"the relay {relay} is not connected")
        stream = await self._host.new_stream(peer, [HOP_PROTOCOL])
        is_welcome = False
        try:
            await write_message(stream, request)
            answer = await read_message(stream, pb.HopMessage)
            if answer.type != pb.HopMessage.STATUS or answer.status != pb.OK:
                raise RelayError(f"the relay {relay} says {_status_name(answer.status)}")
            is_welcome = True
            return stream, answer
        finally:
            if not is_welcome:
                await end_stream(stream)

    # --- stop ---

    async def _take_stop(self, stream: INetStream) -> None:
        if not await self._domain.serve("taking a circuit", self._serve_stop, stream):
            await end_stream(stream)

    async def _serve_stop(self, stream: INetStream) -> None:
        relay = PeerId(str(stream.muxed_conn.peer_id))
        muxed = None
        if self._reserved.get(relay, 0) < trio.current_time():
            self.num_unasked += 1
            log.info("%s brings a circuit and was not asked to relay for this node; it is refused", relay)
            await end_stream(stream)
            return
        with self._handshake(relay) as is_allowed:
            if is_allowed:
                muxed = await self._accept_circuit(stream, relay)
        if muxed is None:
            await end_stream(stream)
            return
        for connection in self._connections(PeerId(str(muxed.peer_id))):
            if connection.muxed_conn is muxed:
                await connection.event_closed.wait()  # type: ignore[attr-defined]  # of SwarmConn

    async def _accept_circuit(self, stream: INetStream, relay: PeerId) -> IMuxedConn | None:
        try:
            with trio.fail_after(MESSAGE_TIMEOUT_S):
                request = await read_message(stream, pb.StopMessage)
                if request.type != pb.StopMessage.CONNECT:
                    status = pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.UNEXPECTED_MESSAGE)
                    await write_message(stream, status)
                    return None
                source = PeerId.parse(str(ID(request.peer.id)))
                await write_message(stream, pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.OK))
            seen = [str(a) for c in self._connections(relay) for a in c.get_transport_addresses()]
            via = next((address for address in seen if CIRCUIT not in address), "")
            address = f"{full_address(via, relay)}{CIRCUIT}/p2p/{source}"
            raw = raw_connection(stream, address, is_initiator=False)
            network: Any = self._host.get_network()
            muxed: IMuxedConn = await network.upgrade_inbound_raw_conn(raw, Multiaddr(address))
        except (trio.TooSlowError, ShoalError, DecodeError, *BROKEN) as error:
            log.debug("a circuit through %s did not come to be: %s", relay, error)
            return None
        else:
            return muxed

    @contextmanager
    def _handshake(self, peer: PeerId) -> Iterator[bool]:
        """Whether a peer may begin one more exchange; they are bounded, since each may take its time."""
        is_allowed = self._handshakes[peer] < MAX_HANDSHAKES_PER_PEER
        self._handshakes[peer] += 1
        try:
            yield is_allowed
        finally:
            self._handshakes[peer] -= 1
            if not self._handshakes[peer]:
                del self._handshakes[peer]

    def _connections(self, peer: PeerId) -> list[INetConn]:
        return self._host.get_network().get_connections(ID.from_base58(str(peer)))

    # --- hop ---

    async def _take_hop(self, stream: INetStream) -> None:
        if not await self._domain.serve("relaying", self._serve_hop, stream):
            await end_stream(stream)

    async def _serve_hop(self, stream: INetStream) -> None:
        source = PeerId(str(stream.muxed_conn.peer_id))
        try:
            with self._handshake(source) as is_allowed:
                if not is_allowed:
                    await end_stream(stream)
                    return
                with trio.fail_after(MESSAGE_TIMEOUT_S):
                    request = await read_message(stream, pb.HopMessage)
            ip = (stream.get_remote_address() or ("", 0))[0]
            if any(CIRCUIT in str(address) for address in _addresses_of(stream)):
                await _refuse(stream, pb.PERMISSION_DENIED)
            elif request.type == pb.HopMessage.RESERVE:
                await self._grant_reservation(stream, source, ip)
            elif request.type == pb.HopMessage.CONNECT:
                await self._connect(stream, source, ip, PeerId.parse(str(ID(request.peer.id))))
            else:
                await _refuse(stream, pb.UNEXPECTED_MESSAGE)
        except (trio.TooSlowError, ShoalError, DecodeError, *BROKEN) as error:
            log.debug("a hop request of %s failed: %s", source, error)
            await end_stream(stream)

    async def _grant_reservation(self, stream: INetStream, source: PeerId, ip: str) -> None:
        limits = self.ledger.limits
        now = trio.current_time()
        try:
            expires_at = self.ledger.reserve(source, ip, now)
        except RelayRefusedError as error:
            log.info("no reservation for %s: %s", source, error)
            await _refuse(stream, pb.RESERVATION_REFUSED)
            return
        reservation = pb.Reservation(
            expire=int(time.time() + expires_at - now),
            addrs=[Multiaddr(address).to_bytes() for address in self._addresses()],
        )
        limit = pb.Limit(duration=limits.circuit_s, data=limits.circuit_bytes)
        status = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK, reservation=reservation, limit=limit)
        await write_message(stream, status)
        await close_stream(stream)

    async def _connect(self, stream: INetStream, source: PeerId, ip: str, target: PeerId) -> None:
        if not self.ledger.has_reservation(target, trio.current_time()) or not self._connections(target):
            await _refuse(stream, pb.NO_RESERVATION)
            return
        try:
            number = self.ledger.open_circuit(source, target)
        except RelayRefusedError as error:
            log.info("no circuit from %s to %s: %s", source, target, error)
            await _refuse(stream, pb.RESOURCE_LIMIT_EXCEEDED)
            return
        try:
            limits = self.ledger.limits
            limit = pb.Limit(duration=limits.circuit_s, data=limits.circuit_bytes)
            try:
                far = await self._reach(source, target, limit)
            except (RelayError, trio.TooSlowError, DecodeError, *BROKEN) as error:
                log.debug("the far end of a circuit, %s, cannot be had: %s", target, error)
                await _refuse(stream, pb.CONNECTION_FAILED)
                return
            try:
                await write_message(stream, pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK, limit=limit))
                far_ip = (far.get_remote_address() or ("", 0))[0]
                with trio.move_on_after(limits.circuit_s):
                    await _Passage(self, limits.circuit_bytes).run((stream, ip), (far, far_ip))
            finally:
                with trio.CancelScope(shield=True):
                    await end_stream(far)
                    await end_stream(stream)
        finally:
            self.ledger.close_circuit(number)

    async def _reach(self, source: PeerId, target: PeerId, limit: pb.Limit) -> INetStream:
        with trio.fail_after(MESSAGE_TIMEOUT_S):
            far = await self._host.new_stream(ID.from_base58(str(target)), [STOP_PROTOCOL])
            is_welcome = False
            try:
                peer = pb.PeerId(id=ID.from_base58(str(source)).to_bytes())
                await write_message(far, pb.StopMessage(type=pb.StopMessage.CONNECT, peer=peer, limit=limit))
                answer = await read_message(far, pb.StopMessage)
                if answer.status != pb.OK:
                    raise RelayError(f"it says {_status_name(answer.status)}")
                is_welcome = True
            finally:
                if not is_welcome:
                    await end_stream(far)
            return far

    async def passage(self, user: str, num_bytes: int) -> None:
        """Wait until this user may pass so many bytes on, at most `MAX_PIECE_BYTES`."""
        turn = trio.Event()
        self._share.ask(user, num_bytes, turn)
        self._let_pass()
        if not turn.is_set():
            self._asked.set()
            try:
                await turn.wait()
            except trio.Cancelled:
                self._share.forget(user, turn)
                raise
        self.num_bytes += num_bytes

    def _let_pass(self) -> None:
        for turn in self._share.granted(trio.current_time()):
            turn.set()  # type: ignore[attr-defined]  # a ticket of `passage`


class _Passage:
    """The bytes of one circuit, both ways."""

    def __init__(self, relay: Relay, max_bytes: int) -> None:
        self._relay = relay
        self._left = max_bytes

    async def run(self, near: tuple[INetStream, str], far: tuple[INetStream, str]) -> None:
        """Until both ends have closed, one broke, or the limit is reached."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, near, far, nursery.cancel_scope)
            nursery.start_soon(self._pass_on, far, near, nursery.cancel_scope)

    async def _pass_on(
        self, source: tuple[INetStream, str], sink: tuple[INetStream, str], both: trio.CancelScope
    ) -> None:
        try:
            while self._left > 0:
                data = await source[0].read(MAX_PIECE_BYTES)
                if not data:
                    break
                self._left -= len(data)
                await self._relay.passage(source[1], len(data))
                await sink[0].write(data)
            else:
                log.info("a circuit has carried all that it may")
                both.cancel()
        except StreamEOF:
            pass
        except BROKEN as error:
            log.debug("a circuit broke: %s", error)
            both.cancel()
            return
        try:
            await sink[0].close_write()  # type: ignore[attr-defined]  # of NetStream
        except BROKEN:
            both.cancel()


def _addresses_of(stream: INetStream) -> list[Multiaddr]:
    connection: Any = stream.muxed_conn
    addresses: list[Multiaddr] = connection.get_transport_addresses()
    return addresses


def _status_name(status: int) -> str:
    try:
        return str(pb.Status.Name(status))  # type: ignore[arg-type]  # any number may have come
    except ValueError:
        return f"status {status}"


async def _refuse(stream: INetStream, status: pb.Status.ValueType) -> None:
    await write_message(stream, pb.HopMessage(type=pb.HopMessage.STATUS, status=status))
    await close_stream(stream)
