"""libp2p as the mesh uses it: set up, and its connections, streams and upgrades in this node's words.

Connections have numbers here (`PathId`), peers are `PeerId`, addresses are text. What is repaired in the package stands
in `shoal.node.mesh.libp2p_repairs`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.peer.peerstore import PeerStoreError
from libp2p.protocol_muxer.exceptions import MultiselectError, ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.io import NoisePacketReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from shoal.node.budgets import NodeBudgets, user_of
from shoal.node.mesh.addresses import CIRCUIT, full_address, ip_of
from shoal.node.mesh.circuits import BROKEN, RelayError, closed_on_failure, parse_circuit
from shoal.node.mesh.connections import PathDown, PathId, PathUp
from shoal.node.mesh.libp2p_repairs import announce_as_told, apply_repairs, let_windows_grow
from shoal.node.mesh.libp2p_stream import Libp2pByteStream
from shoal.node.mesh.turns import Reader, Reading
from shoal.node.wire.channel import ByteStream, StreamClosedError, UnknownProtocolError
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

NEGOTIATE_S: Final = 10.0
CUT_S: Final = 2.0
GOODBYE_S: Final = 0.5
"""For all connections together, when the node ends."""
CLOSE_S: Final = 1.0
"""For everything else."""
STREAM_BYTES: Final = 16 * 1024
"""What a stream takes by itself, with the tasks that serve it."""


class TakesPaths(Protocol):
    """Hears of connections, in their order."""

    def __call__(self, event: PathUp | PathDown) -> None:
        """A connection came or went."""


class Libp2pHost:
    """A host of libp2p. Made by `make_libp2p_host`; its network must run, see `network`."""

    def __init__(self, host: IHost, noise: _NoiseOfNodes) -> None:
        self.libp2p = host
        self.network: Any = host.get_network()
        """The service that must run for as long as anything else here does."""
        self.peer_id = PeerId.parse(str(host.get_id()))
        self._noise = noise
        self._is_wanted: Callable[[PeerId], bool] = lambda _: False
        self._numbers = map(PathId, count(1))
        self._paths: dict[PathId, INetConn] = {}  # those that stand, and libp2p bounds how many do

    # --- what is told ---

    def follow(self, take: TakesPaths) -> None:
        """Tell of every connection that comes or goes from now on."""
        self.network.register_notifee(_Notifee(self, take))

    def serve(self, protocol: str, serve: Callable[[PeerId, str, ByteStream], Awaitable[None]]) -> None:
        """Have the streams served that peers open for a protocol."""
        self.libp2p.set_stream_handler(TProtocol(protocol), partial(_serve_stream, serve, protocol))

    def let_streams_in(self, turn: Callable[[PeerId], Awaitable[bool]]) -> None:
        """Have the streams that peers open wait, before anything is done about them.

        Args:
            turn: returns when it is the turn of a stream of this peer; False if the stream is to be ended.
        """
        agree_and_serve = self.network.common_stream_handler

        async def let_in(stream: INetStream) -> None:
            if await turn(_peer_of(stream)):
                await agree_and_serve(stream)
            else:
                await stream.reset()

        self.network.set_stream_handler(let_in)

    def pace(self, reading: Reading, is_wanted: Callable[[PeerId], bool]) -> None:
        """Have what strangers send read as it is their turn, and hold them to windows that do not grow.

        Args:
            reading: whose turn it is.
            is_wanted: who is no stranger.
        """
        self._noise.reading = reading
        self._is_wanted = is_wanted

    def announce(self, addresses: Callable[[], Iterable[str]]) -> None:
        """Tell peers these full multiaddrs as this node's, and none that libp2p finds by itself."""
        announce_as_told(self.libp2p, addresses)

    def dial_by(self, reach: Callable[[PeerId, Sequence[str]], Awaitable[bool | None]]) -> None:
        """Have peers reached by this, instead of by libp2p, which dials whatever it has heard in the DHT.

        Args:
            reach: reaches a peer whose full multiaddrs are given; whether it is connected.
        """

        async def dial_peer(name: ID) -> list[INetConn]:
            peer = PeerId(str(name))
            if not self.is_alive(peer):
                try:
                    PeerId.parse(peer)
                    known = [full_address(str(address), peer) for address in self.network.peerstore.addrs(name)]
                except (PeerStoreError, UsageError, ValueError) as error:
                    raise SwarmException(f"no address of {peer} is known") from error
                if not await reach(peer, known):
                    raise SwarmException(f"{peer} cannot be reached")
            return [each for each in self._connections(peer) if _is_open(each)]

        self.network.dial_peer = dial_peer

    # --- what is there ---

    def listened(self) -> list[str]:
        """The multiaddrs that this node listens on."""
        return [str(address) for listener in self.network.listeners.values() for address in listener.get_addrs()]

    def has_connection(self, peer: PeerId) -> bool:
        """Whether libp2p knows any connection to a peer."""
        return bool(self._connections(peer))

    def is_alive(self, peer: PeerId) -> bool:
        """Whether streams can be opened on any connection to a peer."""
        return any(map(_is_open, self._connections(peer)))

    def is_open(self, path: PathId) -> bool:
        """Whether streams can be opened on a connection; not so for some moments before it counts as closed."""
        connection = self._paths.get(path)
        return connection is not None and _is_open(connection)

    def is_busy(self, path: PathId) -> bool:
        """Whether a connection carries calls or transfers."""
        connection = self._paths.get(path)
        if connection is None:
            return False
        return any(str(stream.get_protocol()).startswith("/shoal/") for stream in connection.get_streams())

    # --- what is done ---

    async def open_stream(self, peer: PeerId, path: PathId | None, protocol: str) -> ByteStream:
        """A new stream on a path, or with None on any: a peer's first stream may be here before the news of its path.

        Raises:
            StreamClosedError: if there is no connection, or it broke.
            UnknownProtocolError: if the peer does not speak it.
        """
        connection = next(iter(self._connections(peer)), None) if path is None else self._paths.get(path)
        if connection is None:
            raise StreamClosedError(f"{peer} is not connected")
        try:
            stream = await connection.new_stream()
        except BROKEN as error:
            raise StreamClosedError(str(error)) from error
        negotiated = False
        try:
            multiselect: Any = self.libp2p
            chosen = await multiselect.multiselect_client.select_one_of(
                [TProtocol(protocol)], MultiselectCommunicator(stream), NEGOTIATE_S
            )
            stream.set_protocol(chosen)
            negotiated = True
        except ProtocolNotSupportedError as error:
            raise UnknownProtocolError(f"{peer} does not know {protocol}") from error
        except (MultiselectError, *BROKEN) as error:
            raise StreamClosedError(str(error)) from error
        finally:
            if not negotiated:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        return Libp2pByteStream(stream)

    async def dial(self, peer: PeerId, address: str) -> None:
        """Connect by a transport and an address that libp2p knows.

        Raises:
            OSError: if nobody is there.
            BaseLibp2pError: if somebody else is there.
        """
        await self.network.dial_addr(Multiaddr(address), ID.from_base58(str(peer)))

    async def upgrade(self, raw: RawConnection, peer: PeerId) -> None:
        """Make a byte pipe a connection to a peer, who proves that it is that.

        Raises:
            BaseLibp2pError: if it is not, or the pipe broke; the pipe is closed then.
        """
        async with closed_on_failure(raw):
            if raw.is_initiator:
                await self.network.upgrade_outbound_raw_conn(raw, ID.from_base58(str(peer)))
                return
            muxed = await self.network.upgrade_inbound_raw_conn(raw, Multiaddr(f"/p2p/{peer}"))
            if str(muxed.peer_id) != peer:
                await muxed.close()
                raise BaseLibp2pError(f"{muxed.peer_id} came instead of {peer}")

    async def close_path(self, path: PathId) -> None:
        """Close one connection, if it still stands."""
        connection = self._paths.get(path)
        if connection is not None:
            await connection.close()

    async def cut_greedy(self, budgets: NodeBudgets) -> None:
        """Cut the connections of peers that are not wanted and hold more than their share.

        What comes by a stream lies in its window until it is read, a quarter of a megabyte at least; streams are opened
        without asking, and libp2p bounds neither.
        """
        most = budgets.limits.strangers_bytes
        held: dict[PathId, int] = {}
        for path, connection in self._paths.items():
            if not self._is_wanted(_peer_of(connection)):
                muxed = _muxed(connection)
                held[path] = sum(map(len, muxed.stream_buffers.values())) + STREAM_BYTES * len(muxed.streams)
                if len(muxed.streams) > budgets.limits.max_streams:
                    held[path] += most  # as if it held all
        total, greedy = sum(held.values()), list[PathId]()
        for path in sorted(held, key=lambda each: held[each], reverse=True):
            if total <= most // 2:
                break
            total -= held[path]
            greedy.append(path)
        for path in greedy:
            connection = self._paths[path]
            budgets.cut(_user_of(connection), trio.current_time())
            words = f"{len(_muxed(connection).streams)} streams and with them {held[path] % most} bytes unread"
            log.warning("%s has %s; its connection is cut", _peer_of(connection), words)
        await self._cut([self._paths[path] for path in greedy])

    async def cut_off(self, peer: PeerId, budgets: NodeBudgets) -> None:
        """End every connection to a peer that stands now, without a goodbye."""
        connections = self._connections(peer)
        for connection in connections:
            budgets.cut(_user_of(connection), trio.current_time())
        await self._cut(connections)

    async def _cut(self, connections: Sequence[INetConn]) -> None:
        """End connections at once. A goodbye would wait for whoever does not read, and what it holds stay here."""
        if not connections:
            return
        async with trio.open_nursery() as nursery:
            for connection in connections:
                nursery.start_soon(_cut_one, connection)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer that stands now.

        libp2p's own way forgets, after it has closed those, also whatever came in the meantime.
        """
        for connection in self._connections(peer):
            await connection.close()

    async def close(self) -> None:
        """Close everything, also while this is cancelled: connections with a goodbye, where that comes to an end.

        libp2p's own way says goodbye to one after the other, and leaves open what it has not come to when cancelled.
        """
        with trio.CancelScope(shield=True):
            with trio.move_on_after(GOODBYE_S):
                async with trio.open_nursery() as nursery:
                    for connection in self._paths.values():
                        nursery.start_soon(_say_goodbye, connection)
            await self._cut(list(self._paths.values()))
            self.network.connections.clear()
            with trio.move_on_after(CLOSE_S):
                await self.libp2p.close()

    def _connections(self, peer: PeerId) -> list[INetConn]:
        found: list[INetConn] = self.network.get_connections(ID.from_base58(str(peer)))
        return found

    def _added(self, connection: INetConn) -> PathUp:
        path = next(self._numbers)
        self._paths[path] = connection
        peer = _peer_of(connection)
        let_windows_grow(_muxed(connection), partial(self._is_wanted, peer))
        addresses = connection.get_transport_addresses()
        address = full_address(str(addresses[0]), peer) if addresses else ""
        return PathUp(peer, path, address, bool(_muxed(connection).is_initiator), _relay_of(address))

    def _removed(self, connection: INetConn) -> PathDown | None:
        path = next((path for path, each in self._paths.items() if each is connection), None)
        if path is None:
            return None
        del self._paths[path]
        return PathDown(_peer_of(connection), path)


def make_libp2p_host(secret: bytes, max_peers: int) -> Libp2pHost:
    """A host that runs and listens nowhere yet.

    Args:
        secret: raw 32-byte Ed25519 secret key.
        max_peers: how many are kept connected.
    """
    apply_repairs()
    key_pair = create_new_key_pair(secret)
    # Noise alone: libp2p's own list ends in plain text, to which whoever is in the middle could talk both sides down.
    noise = _NoiseOfNodes(key_pair, noise_privkey=create_new_x25519_key_pair().private_key)
    # Several paths may lead to a peer; how many peers there may be is decided by this node and not by libp2p.
    limits = ConnectionConfig(
        max_connections=3 * max_peers + 256,
        high_watermark=3 * max_peers + 256,
        max_connections_per_peer=8,
        inbound_upgrade_timeout=NEGOTIATE_S,
    )
    host = new_host(
        key_pair=key_pair,
        sec_opt={NOISE_PROTOCOL_ID: noise},
        negotiate_timeout=int(NEGOTIATE_S),
        connection_config=limits,
        disable_identify_address_discovery=True,
    )
    return Libp2pHost(host, noise)


class _NoiseOfNodes(NoiseTransport):
    """Lets nobody in whose key is none that a node has: its name would mean nothing to the rest of the node.

    Attributes:
        reading: when each message of the others is read; None: as it comes.
    """

    reading: Reading | None = None

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        secured = await super().secure_inbound(conn)
        try:
            PeerId.parse(str(secured.get_remote_peer()))
        except UsageError as error:
            raise HandshakeFailure("the key of that peer is not Ed25519") from error
        return self._paced(secured, conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return self._paced(await super().secure_outbound(conn, peer_id), conn)

    def _paced(self, secured: Any, raw: Any) -> ISecureConn:
        if self.reading is not None:
            peer = PeerId(str(secured.get_remote_peer()))
            address = next(iter(raw.get_transport_addresses()), None)
            user = peer if address is None else user_of(ip_of(str(address)))
            secured.conn.read_writer = _PacedPackets(raw, self.reading.reader(peer, user))
        paced: ISecureConn = secured
        return paced


class _PacedPackets(NoisePacketReadWriter):
    """Noise's messages, each of which is read when it is its turn: until then the system holds it."""

    def __init__(self, raw: ReadWriteCloser, reader: Reader) -> None:
        super().__init__(raw)
        self._reader = reader

    async def next_msg_len(self) -> int:
        num_bytes = await super().next_msg_len()
        await self._reader.turn(num_bytes)
        return num_bytes


def peer_named(addresses: Sequence[str]) -> tuple[PeerId, list[str]]:
    """The peer that the first of some full multiaddrs names, and those of them that name it.

    Raises:
        UsageError: if one names no peer, or the first names none that could be a node.
    """
    try:
        names = [str(info_from_p2p_addr(Multiaddr(address)).peer_id) for address in addresses]
    except ValueError as error:
        raise UsageError(f"{', '.join(addresses)[:200]} names no peer: {error}") from error
    peer = PeerId.parse(names[0])
    return peer, [address for address, name in zip(addresses, names, strict=True) if name == peer]


async def _serve_stream(
    serve: Callable[[PeerId, str, ByteStream], Awaitable[None]], protocol: str, stream: INetStream
) -> None:
    await serve(PeerId(str(stream.muxed_conn.peer_id)), protocol, Libp2pByteStream(stream))


async def _say_goodbye(connection: INetConn) -> None:
    with contextlib.suppress(*BROKEN):
        await connection.close()


async def _cut_one(connection: INetConn) -> None:
    with trio.move_on_after(CUT_S):
        muxed = _muxed(connection)
        with contextlib.suppress(*BROKEN):
            await muxed.secured_conn.close()  # ends what is being read and written, and what waits for that
        with contextlib.suppress(*BROKEN):
            await connection.close()


def _is_open(connection: INetConn) -> bool:
    muxed = _muxed(connection)
    return not (connection.is_closed or muxed.is_closed or muxed.event_shutting_down.is_set())


def _muxed(connection: INetConn) -> Any:
    return connection.muxed_conn


def _peer_of(connection: INetConn | INetStream) -> PeerId:
    return PeerId(str(connection.muxed_conn.peer_id))


def _user_of(connection: INetConn) -> str:
    """Whom a connection counts for; nobody, if another node relays it."""
    address = str(next(iter(connection.get_transport_addresses()), ""))
    return "" if CIRCUIT in address else user_of(ip_of(address))


def _relay_of(address: str) -> PeerId | None:
    if CIRCUIT not in address:
        return None
    try:
        return parse_circuit(address)[0]
    except RelayError:
        return None


class ConnectionNotifee(INotifee):
    """What libp2p tells, of which connections alone may matter."""

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """A connection stands."""

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """It stands no more."""

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """A stream stands."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """It is over."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """An address is listened at."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """No more."""


class _Notifee(ConnectionNotifee):
    """Passes on what libp2p tells."""

    def __init__(self, host: Libp2pHost, take: TakesPaths) -> None:
        self._host = host
        self._take = take

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._take(self._host._added(conn))

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        event = self._host._removed(conn)
        if event is not None:
            self._take(event)
