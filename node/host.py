"""The libp2p host of a node: who it is connected to, and calls to them.

Owns the swarm (TCP, noise, yamux, identify), Kademlia, bootstrap with retry and mDNS. Everything above it speaks in
`PeerId`, text multiaddrs and typed methods; nothing above it imports libp2p.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import ifaddr
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INetworkService, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.discovery.events.peerDiscovery import peerDiscovery
from libp2p.discovery.mdns.mdns import MDNSDiscovery
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.node.lanes import TLS_HANDSHAKE, peek_first_byte
from shoal.node.libp2p_repairs import apply_repairs
from shoal.node.links import BULK_PROTOCOL, DRAIN_S, RPC_PROTOCOL, STREAM_PROTOCOL, Links
from shoal.node.rpc import ByteStream, Router, StreamClosedError
from shoal.node.services import NodeService
from shoal.protocol.codec import Buffer
from shoal.protocol.errors import NoPeersError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import Caller, Empty, client

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 10.0
KEEPALIVE_INTERVAL_S: Final = 5.0
KEEPALIVE_TIMEOUT_S: Final = 5.0
BOOTSTRAP_RETRY_MAX_S: Final = 30.0
MAX_EVENTS: Final = 1024
FIRST_BYTE_S: Final = 10.0
MAX_SILENT: Final = 512
MAX_SILENT_PER_IP: Final = 32
"""Connections that have not sent a byte yet; over that, a new one is closed."""
WRITE_BYTES: Final = 1024 * 1024


class ListenError(ShoalError):
    """An address to listen on cannot be had."""


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A first connection to this peer stands."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The last connection to this peer is gone."""

    peer: PeerId


HostEvent = PeerUp | PeerDown


@dataclass(slots=True)
class Connected:
    """What is known of a connected peer.

    Attributes:
        address: the far end of the connection.
        since: trio time at which it came.
        rtt_ms: the last measured round trip of a small call; None before the first.
        outbound: whether this node dialed.
    """

    address: str
    since: float
    outbound: bool
    rtt_ms: float | None = None


class Host:
    """Connections and calls. Made by `open_host`."""

    def __init__(
        self, host: IHost, peer_id: PeerId, router: Router, nursery: trio.Nursery, *, lanes: bool = True
    ) -> None:
        self.peer_id = peer_id
        self.connected: dict[PeerId, Connected] = {}
        self.links = Links(self, router, nursery, lanes=lanes)
        self._host = host
        self._nursery = nursery
        self._dht: KadDHT | None = None
        self._events_in, self.events = trio.open_memory_channel[HostEvent](MAX_EVENTS)

    def addresses(self) -> tuple[str, ...]:
        """The full multiaddrs under which this node listens, ``/p2p/`` included."""
        return tuple(address for listened in self._host.get_addrs() for address in _reachable(str(listened)))

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        """Connect to the one peer that these full multiaddrs name.

        Raises:
            NoPeersError: if none of them answers.
            UsageError: if they name no peer that could be a node.
        """
        try:
            infos = [info_from_p2p_addr(Multiaddr(address)) for address in addresses]
        except ValueError as error:
            raise UsageError(f"{', '.join(addresses)[:200]} names no peer: {error}") from error
        peer_id = infos[0].peer_id
        peer = PeerId.parse(str(peer_id))
        if peer == self.peer_id or peer in self.connected:
            return peer
        self._forget_failed_dials(peer_id)
        # One by one side by side, because libp2p's own dial tries only one address of each transport.
        with trio.move_on_after(DIAL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for known in dict.fromkeys(
                    address for info in infos if info.peer_id == peer_id for address in info.addrs
                ):
                    nursery.start_soon(self._dial, peer_id, known, nursery.cancel_scope)
        if not self._host.get_network().get_connections(peer_id):
            raise NoPeersError(f"cannot reach {peer} at {', '.join(addresses)}")
        return peer

    async def _dial(self, peer_id: ID, address: Multiaddr, others: trio.CancelScope) -> None:
        try:
            await self._host.get_network().dial_addr(address, peer_id)
        except (BaseLibp2pError, OSError) as error:
            log.debug("dialing %s failed: %s", address, error)
        else:
            others.cancel()

    def _forget_failed_dials(self, peer: ID) -> None:
        # The swarm refuses for a minute to dial a peer that once failed; whoever asks here has a reason to try again.
        unblock = getattr(self._host.get_network(), "unblock_peer", None)
        if unblock is not None:
            unblock(peer)

    def at(self, peer: PeerId) -> Caller:
        """What carries calls to a peer, for `shoal.protocol.services.client`.

        A call of a peer that cannot be reached fails with UNAVAILABLE.
        """
        return self.links.at(peer)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        await self._host.disconnect(ID.from_base58(str(peer)))

    async def provide(self, cid: Cid) -> bool:
        """Announce in the DHT that this node holds a CID; False if no other node took the record."""
        return self._dht is not None and await self._dht.provide(str(cid))

    async def find_providers(self, cid: Cid) -> list[tuple[str, ...]]:
        """The full multiaddrs of each peer that the DHT names as holder of a CID."""
        if self._dht is None:
            return []
        found = await self._dht.find_providers(str(cid))
        return [
            tuple(f"{str(address).partition('/p2p/')[0]}/p2p/{info.peer_id}" for address in info.addrs)
            for info in found
            if info.addrs and str(info.peer_id) != self.peer_id
        ]

    # What the links ask.

    def is_connected(self, peer: PeerId) -> bool:
        """Whether any connection stands; a peer's first stream may be here before the news of its connection."""
        return peer in self.connected or bool(self._host.get_network().get_connections(ID.from_base58(str(peer))))

    def dialed_address(self, peer: PeerId) -> tuple[str, int] | None:
        """IP and TCP port that this node dialed to reach a peer; None if the peer dialed."""
        state = self.connected.get(peer)
        if state is None or not state.outbound:
            return None
        match state.address.split("/")[1:5]:
            case ["ip4" | "ip6", ip, "tcp", port]:
                return ip, int(port)
        return None

    def is_local(self, peer: PeerId) -> bool:
        """Whether the peer is on this machine."""
        state = self.connected.get(peer)
        return state is not None and state.address.startswith(("/ip4/127.", "/ip6/::1/"))

    def rtt_s(self, peer: PeerId) -> float | None:
        """The last measured round trip."""
        state = self.connected.get(peer)
        return None if state is None or state.rtt_ms is None else state.rtt_ms / 1000

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        """A new libp2p stream, or `StreamClosedError`."""
        peer_id = ID.from_base58(str(peer))
        if not self._host.get_network().get_connections(peer_id):  # libp2p would dial; whom to dial is decided here
            raise StreamClosedError(f"{peer} is not connected")
        try:
            stream = await self._host.new_stream(peer_id, [TProtocol(protocol)])
        except (BaseLibp2pError, OSError) as error:
            raise StreamClosedError(str(error)) from error
        return _Libp2pByteStream(stream)

    async def _serve_stream(self, protocol: str, stream: INetStream) -> None:
        peer = PeerId(str(stream.muxed_conn.peer_id))
        await self.links.serve_stream(peer, protocol, _Libp2pByteStream(stream))

    # What libp2p tells.

    def _peer_up(self, connection: INetConn) -> None:
        peer = PeerId(str(connection.muxed_conn.peer_id))
        if peer in self.connected:
            return
        address, outbound = _far_end(connection)
        self.connected[peer] = Connected(address=address, since=trio.current_time(), outbound=outbound)
        self.links.peer_up(peer)
        self._tell(PeerUp(peer))
        self._nursery.start_soon(self._keep_alive, peer)
        if self._dht is not None:
            self._nursery.start_soon(self._dht.add_peer, connection.muxed_conn.peer_id)

    def _peer_down(self, connection: INetConn) -> None:
        peer = PeerId(str(connection.muxed_conn.peer_id))
        others = [
            c for c in self._host.get_network().get_connections(connection.muxed_conn.peer_id) if c is not connection
        ]
        state = self.connected.get(peer)
        if state is None:
            return
        if others:
            state.address, state.outbound = _far_end(others[0])
            return
        del self.connected[peer]
        self.links.peer_down(peer)
        self._tell(PeerDown(peer))

    def _tell(self, event: HostEvent) -> None:
        try:
            self._events_in.send_nowait(event)
        except trio.WouldBlock:
            log.error("more than %d host events wait; %s is lost", MAX_EVENTS, event)  # noqa: TRY400

    async def _keep_alive(self, peer: PeerId) -> None:
        """Measure the round trip, and close a path on which two calls in a row stay without answer."""
        misses = 0
        ping = client(NodeService, self.at(peer), timeout_s=KEEPALIVE_TIMEOUT_S).ping
        state = self.connected.get(peer)
        while state is not None and self.connected.get(peer) is state:
            started = trio.current_time()
            try:
                await ping(Empty())
                state.rtt_ms = (trio.current_time() - started) * 1000
                misses = 0
            except RemoteError as error:
                if error.status is Status.UNIMPLEMENTED:
                    return  # a libp2p node of another kind
                is_silent = error.status in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
                # A refusal is a sign of life, and so is whatever else came or is still being taken.
                misses = misses + 1 if is_silent and not self.links.is_moving(peer, started) else 0
            if misses >= 2 and self.connected.get(peer) is state:
                log.info("%s does not answer; closing the path", peer)
                await self.disconnect(peer)
                return
            is_settled = state.rtt_ms is not None and not misses
            await trio.sleep(KEEPALIVE_INTERVAL_S if is_settled else 0.5)

    async def _bootstrap(self, address: str) -> None:
        """Be connected to one bootstrap node for ever, with back-off."""
        wait_s = 0.5
        while True:
            peer = PeerId(address.rpartition("/p2p/")[2])
            if peer not in self.connected and peer != self.peer_id:
                try:
                    await self.connect([address])
                    wait_s = 0.5
                except NoPeersError as error:
                    log.warning("bootstrap: %s; next try in %.0f s", error, wait_s)
            await trio.sleep(wait_s * random.uniform(0.8, 1.2))  # noqa: S311  jitter, not a secret
            wait_s = min(wait_s * 2, BOOTSTRAP_RETRY_MAX_S)

    async def _found_on_lan(self, info: PeerInfo) -> None:
        try:
            peer = PeerId.parse(str(info.peer_id))
            if peer in self.connected or peer == self.peer_id:
                return
            await self.connect([f"{address}/p2p/{peer}" for address in info.addrs])
            log.info("found %s on the local network", peer)
        except (NoPeersError, UsageError) as error:  # anything may call itself libp2p there
            log.info("mDNS: %s", error)


def _far_end(connection: INetConn) -> tuple[str, bool]:
    """The full multiaddr of a connection's far end, empty if it has none, and whether this node dialed it."""
    addresses = connection.get_transport_addresses()
    address = f"{addresses[0]}/p2p/{connection.muxed_conn.peer_id}" if addresses else ""
    return address, bool(connection.muxed_conn.is_initiator)


@asynccontextmanager
async def open_host(
    *,
    secret: bytes,
    listen: Sequence[str],
    bootstrap: Sequence[str],
    mdns: bool,
    router: Router,
    lanes: bool = True,
) -> AsyncIterator[Host]:
    """Stand up a host, listening; tears it down at the end.

    Args:
        secret: raw 32-byte Ed25519 secret key.
        listen: multiaddrs to listen on.
        bootstrap: full multiaddrs of nodes to stay connected to.
        mdns: whether to find and be found on the local network.
        router: who serves the calls of peers.
        lanes: whether to use connections beside libp2p's own where a peer is reached directly.

    Raises:
        ListenError: if an address cannot be listened on.
    """
    apply_repairs()
    key_pair = create_new_key_pair(secret)
    # Noise alone: libp2p's own list ends in plain text, to which whoever is in the middle could talk both sides down.
    noise = NoiseTransport(key_pair, noise_privkey=create_new_x25519_key_pair().private_key)
    libp2p_host = new_host(key_pair=key_pair, sec_opt={NOISE_PROTOCOL_ID: noise}, negotiate_timeout=10)
    network = libp2p_host.get_network()
    failure: Exception | None = None
    async with background_trio_service(network), trio.open_nursery() as nursery:
        try:
            router.add(_NodeCalls())
            host = Host(libp2p_host, PeerId.parse(str(libp2p_host.get_id())), router, nursery, lanes=lanes)
            for protocol in (RPC_PROTOCOL, STREAM_PROTOCOL, BULK_PROTOCOL):
                libp2p_host.set_stream_handler(TProtocol(protocol), partial(host._serve_stream, protocol))
            network.register_notifee(_Notifee(host))
            for address in listen:
                await _listen(network, address)
            for listener in network.listeners.values():
                _share_port(listener, host.links)
            dht = KadDHT(libp2p_host, DHTMode.SERVER)
            async with background_trio_service(dht):
                host._dht = dht
                for address in bootstrap:
                    nursery.start_soon(host._bootstrap, address)
                if mdns:
                    nursery.start_soon(_run_mdns, host, libp2p_host)
                try:
                    yield host
                except Exception as error:  # raised again below: libp2p's service contexts lose it
                    failure = error
                with trio.CancelScope(deadline=trio.current_time() + DRAIN_S + 1, shield=True):
                    await host.links.close()
                with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                    await libp2p_host.close()
        except Exception as error:  # as above
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _reachable(address: str) -> list[str]:
    """An address that stands for every interface, as the addresses of the interfaces; loopback last."""
    _, family, ip, rest = address.split("/", 3)
    if ip not in ("0.0.0.0", "::"):  # noqa: S104  compared with, not bound to
        return [address]
    found = []
    for adapter in ifaddr.get_adapters():
        for known in adapter.ips:
            if family == "ip4" and isinstance(known.ip, str):
                found.append(ipaddress.ip_address(known.ip))
            elif family == "ip6" and not isinstance(known.ip, str) and not known.ip[2]:  # no link-local scope
                found.append(ipaddress.ip_address(known.ip[0]))
    found.sort(key=lambda known: (known.is_loopback, known.is_private))
    return [f"/{family}/{known}/{rest}" for known in found if not known.is_link_local]


async def _listen(network: INetworkService, address: str) -> None:
    _check_free(address)
    if not await network.listen(Multiaddr(address)):
        raise ListenError(f"cannot listen on {address}; choose another address with --listen")


def _share_port(listener: Any, links: Links) -> None:
    """Let TLS connections to libp2p's port be lanes; what begins otherwise is libp2p's."""
    handle = listener.handler
    silent: Counter[str] = Counter()  # by IP

    async def take(stream: Any) -> None:
        sock = stream.stream.socket
        try:
            ip = sock.getpeername()[0]
        except OSError:
            ip = ""  # it is gone already
        if not ip or silent[ip] >= MAX_SILENT_PER_IP or silent.total() >= MAX_SILENT:
            await stream.close()
            return
        silent[ip] += 1
        try:
            first = await peek_first_byte(sock, timeout_s=FIRST_BYTE_S)
        finally:
            silent[ip] -= 1
            if not silent[ip]:
                del silent[ip]
        if not first:
            await stream.close()
        elif first == TLS_HANDSHAKE:
            await links.accept_lane(sock, ip)
        else:
            await handle(stream)

    listener.handler = take


def _check_free(address: str) -> None:
    """Libp2p shares ports (SO_REUSEPORT), so it would listen beside another node and get half of its connections."""
    _, family, ip, _, port = address.split("/")
    try:
        with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((ip, int(port)))
            probe.listen()
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror}; choose another with --listen, "
            f"for example /{family}/{ip}/tcp/0 for any free port"
        ) from error


async def _run_mdns(host: Host, libp2p_host: IHost) -> None:
    token = trio.lowlevel.current_trio_token()
    # Its own choice would be the listen addresses as they are, and nobody can dial 0.0.0.0.
    addresses = [address for address in host.addresses() if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    if not addresses:
        log.info("mDNS is off: this node listens on loopback alone")
        return
    port = int(addresses[0].split("/")[4])
    nursery = host._nursery

    def discovered(info: PeerInfo) -> None:
        token.run_sync_soon(nursery.start_soon, host._found_on_lan, info)

    try:
        # Zeroconf probes the network for a second, blocking, when it starts.
        discovery = await trio.to_thread.run_sync(
            lambda: MDNSDiscovery(libp2p_host.get_network(), port=port, listen_addrs=addresses)
        )
    except OSError as error:
        log.warning("mDNS is off: %s", error)
        return
    peerDiscovery.register_peer_discovered_handler(discovered)
    try:
        await trio.to_thread.run_sync(discovery.broadcaster.register)
        await trio.sleep_forever()
    finally:
        peerDiscovery.unregister_peer_discovered_handler(discovered)
        with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
            await trio.to_thread.run_sync(discovery.zeroconf.close)


class _NodeCalls(NodeService):
    """What every node answers."""

    async def ping(self, request: Empty) -> Empty:
        return request


class _Notifee(INotifee):
    """Turns libp2p's notifications into the host's events."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._host._peer_up(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._host._peer_down(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


class _Libp2pByteStream:
    """A `ByteStream` on a libp2p stream."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        try:
            data = await self._stream.read(256 * 1024)
        except (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosedError(f"the path is gone ({type(error).__name__})") from error
        if not data:
            raise StreamClosedError("the far side closed the stream")
        return data

    async def write(self, data: Buffer) -> None:
        # A view stands in for the bytes that libp2p asks for: it only slices them and puts them after a header.
        view: Any = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), WRITE_BYTES):
                await self._stream.write(view[start : start + WRITE_BYTES])
        except (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosedError(f"the path is gone ({type(error).__name__})") from error

    def try_write(self, data: Buffer) -> bool:
        return False

    async def close(self) -> None:
        try:
            await self._stream.reset()
        except (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("closing a dead stream: %s", error)
