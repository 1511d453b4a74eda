"""The libp2p host of a node: who it is connected to, by which paths, and calls to them.

Owns the swarm (TCP, noise, yamux, identify), Kademlia, bootstrap with retry and mDNS. Everything above it speaks in
`PeerId`, text multiaddrs and typed methods. How a better path is come by is `shoal.node.reach.reach`'s business; here
is what every path has in common: it is a libp2p connection, and the best one carries what begins now.
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import ifaddr
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.protocol_muxer.exceptions import MultiselectError, ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.node.mesh.addresses import CIRCUIT, full_address, ip_of, ip_port, is_loopback
from shoal.node.mesh.circuits import BROKEN, closed_on_failure, parse_circuit
from shoal.node.mesh.door import Door
from shoal.node.mesh.libp2p_repairs import announce_as_told, apply_repairs
from shoal.node.mesh.libp2p_stream import Libp2pByteStream
from shoal.node.mesh.mdns import run_mdns
from shoal.node.mesh.paths import Candidate, Ladder, PathKind, kind_of, surplus
from shoal.node.mesh.relay import Relay
from shoal.node.mesh.relay_limits import RelayLimits
from shoal.node.wire.channel import ByteStream, Router, StreamClosedError, UnknownProtocolError
from shoal.node.wire.contracts import NodeService
from shoal.node.wire.links import BULK_PROTOCOL, DRAIN_S, RPC_PROTOCOL, STREAM_PROTOCOL, Links
from shoal.protocol.errors import NoPeersError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import Caller, Empty, client

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 10.0
CIRCUIT_HEAD_START_S: Final = 0.3
"""How long the direct addresses of a peer are tried before a relay is troubled too."""
NEGOTIATE_S: Final = 10.0
KEEPALIVE_INTERVAL_S: Final = 5.0
KEEPALIVE_TIMEOUT_S: Final = 5.0
BOOTSTRAP_RETRY_MAX_S: Final = 10.0
RETIRE_S: Final = 10.0
"""How long a path stays at least after a better one has come."""
RETIRE_MAX_S: Final = 600.0
MAX_EVENTS: Final = 1024
COME_BACK_S: Final = 10.0
"""How long calls wait for a peer whose relay is gone to be reached by another."""
RELAY_ENDS_S: Final = 1.0
"""How long after its circuits a relay may end, as it does in good order, to count as the reason for their end."""
COME_BACK_AGAIN_S: Final = 0.2
MAX_CIRCUITS_TRIED: Final = 4
"""Relays of this node's that are asked for a circuit to a peer that did not name them."""
MAX_PROVIDERS: Final = 100
"""That a look-up in the DHT gives, the same ones named by several nodes among them."""
MAX_KNOWN_PEERS: Final = 1024
MAX_KNOWN_ADDRESSES: Final = 16
"""Addresses kept of a peer, to reach it again."""
MAX_PEERS: Final = 256
WRITE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A first connection to this peer stands."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The last connection to this peer is gone."""

    peer: PeerId


HostEvent = PeerUp | PeerDown


@dataclass(slots=True, eq=False)
class Path:
    """One connection to a peer.

    Attributes:
        address: the full multiaddr of the far end, empty if it has none.
        outbound: whether this node dialed.
        since: trio time at which it came.
    """

    connection: INetConn
    kind: PathKind
    address: str
    outbound: bool
    since: float


@dataclass(slots=True)
class Connected:
    """What is known of a connected peer.

    Attributes:
        since: trio time at which it came.
        paths: the best first; never empty.
        ladder: what was tried to reach it better.
        rtt_ms: the last measured round trip of a small call; None before the first.
        used_at: trio time at which this node last wanted to call it.
    """

    since: float
    paths: list[Path]
    ladder: Ladder = field(default_factory=Ladder)
    rtt_ms: float | None = None
    used_at: float = 0.0

    @property
    def best(self) -> Path:
        """The path that carries what begins now."""
        return self.paths[0]

    @property
    def kind(self) -> PathKind:
        """How it is reached."""
        return self.best.kind

    @property
    def address(self) -> str:
        """The far end of the best path."""
        return self.best.address

    @property
    def outbound(self) -> bool:
        """Whether this node dialed the best path."""
        return self.best.outbound


@dataclass(slots=True)
class _Lost:
    """A peer that is gone since a circuit through a relay ended, in trio time."""

    relay: PeerId
    at: float
    is_dialing: trio.Lock = field(default_factory=trio.Lock)


@dataclass(slots=True, eq=False)
class _Attempt:
    """Addresses of a peer that are being dialed now; ``was_cut_short`` if whoever began it gave up."""

    addresses: frozenset[str]
    is_over: trio.Event = field(default_factory=trio.Event)
    was_cut_short: bool = True


class Host:
    """Connections and calls. Made by `open_host`."""

    def __init__(
        self,
        host: IHost,
        peer_id: PeerId,
        router: Router,
        nursery: trio.Nursery,
        *,
        lanes: bool = True,
        relay_limits: RelayLimits,
        max_peers: int,
    ) -> None:
        self.peer_id = peer_id
        self.connected: dict[PeerId, Connected] = {}
        self.links = Links(self, router, nursery, lanes=lanes)
        self.door = Door(self.links.accept_lane)
        self.relay = Relay(host, relay_limits, self.own_addresses)
        self.announced: tuple[str, ...] = ()
        """Further full multiaddrs at which others reach this node: forwarded ones and circuits."""
        self.relays: dict[PeerId, str] = {}
        """Connected peers that relay, with an address of each."""
        self.punching: set[PeerId] = set()
        """Peers with which holes are being punched now."""
        self.wanted: dict[PeerId, set[str]] = {}
        """Peers that must not be let go to make room, and by whom they are wanted."""
        self.on_path: Callable[[PeerId], None] = lambda peer: None
        """Told when a peer's best path is another one."""
        self.libp2p = host
        self._nursery = nursery
        self._max_peers = max_peers
        self._dht: KadDHT | None = None
        self._known: dict[PeerId, dict[str, None]] = {}  # addresses, newest last; the peer last learned of last
        self._lost: dict[PeerId, _Lost] = {}
        self._attempts: dict[PeerId, _Attempt] = {}
        self._came_or_went = trio.Event()
        self._events_in, self.events = trio.open_memory_channel[HostEvent](MAX_EVENTS)

    def listened(self) -> list[str]:
        """The multiaddrs that this node listens on."""
        return [str(address) for listener in self._network.listeners.values() for address in listener.get_addrs()]

    def own_addresses(self) -> tuple[str, ...]:
        """The full multiaddrs of this node's own interfaces, at which it listens."""
        return tuple(f"{found}/p2p/{self.peer_id}" for address in self.listened() for found in _reachable(address))

    def addresses(self) -> tuple[str, ...]:
        """The full multiaddrs under which others can reach this node: its own, forwarded ones, circuits."""
        return tuple(dict.fromkeys((*self.announced, *self.own_addresses())))

    @property
    def _network(self) -> Any:
        return self.libp2p.get_network()

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        """Connect to the one peer that these full multiaddrs name, by one of them or through a relay.

        Raises:
            NoPeersError: if it cannot be reached by any of them.
            UsageError: if they name no peer that could be a node.
        """
        try:
            infos = [info_from_p2p_addr(Multiaddr(address)) for address in addresses]
        except ValueError as error:
            raise UsageError(f"{', '.join(addresses)[:200]} names no peer: {error}") from error
        peer = PeerId.parse(str(infos[0].peer_id))
        named = [address for address, info in zip(addresses, infos, strict=True) if info.peer_id == infos[0].peer_id]
        if peer == self.peer_id:
            return peer
        self.remember(peer, named)
        if peer not in self.connected and not await self._reach(peer, named):
            raise NoPeersError(f"cannot reach {peer} at {', '.join(addresses)}")
        return peer

    async def find(self, peer: PeerId) -> PeerId:
        """Connect to a peer by its name alone: by addresses known from before, relays, or the DHT.

        Raises:
            NoPeersError: if it cannot be found or reached.
        """
        if peer == self.peer_id or peer in self.connected:
            return peer
        if await self._reach(peer, self.known_addresses(peer)):
            return peer
        if self._dht is not None:
            info = await self._dht.find_peer(ID.from_base58(str(peer)))
            found = [] if info is None else [full_address(str(address), peer) for address in info.addrs]
            if found and await self._reach(peer, found):
                return peer
        raise NoPeersError(f"cannot find {peer}: neither the DHT nor a relay leads to it now")

    async def _reach(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        """Dial a peer, unless others do so just now; whether a connection stands.

        A peer that is gone may have many callers; what comes of one attempt holds for all whose addresses are in it.
        """
        wanted = frozenset(addresses)
        while (running := self._attempts.get(peer)) is not None:
            await running.is_over.wait()
            if self.is_connected(peer):
                return True
            if wanted <= running.addresses and not running.was_cut_short:
                return False
        attempt = self._attempts[peer] = _Attempt(wanted)
        try:
            is_there = await self._dial_all(peer, addresses)
            attempt.was_cut_short = False
        finally:
            del self._attempts[peer]
            attempt.is_over.set()
        return is_there

    async def _dial_all(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        """Dial all of it side by side, circuits a little later; whether a connection stands."""
        direct = [address for address in addresses if CIRCUIT not in address]
        circuits = [address for address in addresses if CIRCUIT in address]
        # Whoever relays for this node may relay for the peer too.
        relays = [address for relay, address in self.relays.items() if relay != peer][:MAX_CIRCUITS_TRIED]
        circuits += [f"{address}{CIRCUIT}/p2p/{peer}" for address in relays]
        with trio.move_on_after(DIAL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for number, address in enumerate(dict.fromkeys(direct + circuits)):
                    wait_s = CIRCUIT_HEAD_START_S if direct and number >= len(direct) else 0.0
                    nursery.start_soon(self._dial_one_of_many, peer, address, wait_s, nursery.cancel_scope)
        return peer in self.connected or self.is_connected(peer)

    async def _dial_one_of_many(self, peer: PeerId, address: str, wait_s: float, others: trio.CancelScope) -> None:
        await trio.sleep(wait_s)
        try:
            await self.dial(peer, address)
        except (ShoalError, *BROKEN) as error:
            log.debug("dialing %s failed: %s", address, error)
        else:
            others.cancel()

    async def dial(self, peer: PeerId, address: str) -> None:
        """Open one more connection to a peer, by this address.

        Raises:
            ShoalError: if a relay refuses.
            OSError: if nobody is there.
            BaseLibp2pError: if somebody else is there.
        """
        if CIRCUIT in address:
            relay, _ = parse_circuit(address)
            if relay not in self.connected:
                await self.connect([address.partition(CIRCUIT)[0]])
            await self.relay.dial(address)
            return
        target = ip_port(address)
        if target is not None and address.count("/") == 6:
            stream = await self.door.dial(*target)
            await self.upgrade(RawConnection(TrioTCPStream(stream), initiator=True), peer)
        else:  # a name, or another transport
            await self._network.dial_addr(Multiaddr(address), ID.from_base58(str(peer)))

    async def upgrade(self, raw: RawConnection, peer: PeerId) -> None:
        """Make a byte pipe a connection to a peer, who proves that it is that.

        Raises:
            BaseLibp2pError: if it is not, or the pipe broke; the pipe is closed then.
        """
        if raw.is_initiator:
            async with closed_on_failure(raw):
                await self._network.upgrade_outbound_raw_conn(raw, ID.from_base58(str(peer)))
            return
        muxed = await self._network.upgrade_inbound_raw_conn(raw, Multiaddr(f"/p2p/{peer}"))
        if str(muxed.peer_id) != peer:
            await muxed.close()
            raise BaseLibp2pError(f"{muxed.peer_id} came instead of {peer}")

    def remember(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Keep addresses of a peer, to reach it again by them."""
        known = self._known.pop(peer, {})
        for address in addresses:
            known.pop(address, None)
            known[address] = None
        while len(known) > MAX_KNOWN_ADDRESSES:
            del known[next(iter(known))]
        self._known[peer] = known
        while len(self._known) > MAX_KNOWN_PEERS:
            del self._known[next(iter(self._known))]

    def known_addresses(self, peer: PeerId) -> list[str]:
        """What is remembered of it, newest first."""
        return list(reversed(self._known.get(peer, {})))

    def want(self, peer: PeerId, why: str) -> None:
        """Never let this peer go to make room."""
        self.wanted.setdefault(peer, set()).add(why)

    def unwant(self, peer: PeerId, why: str) -> None:
        """This reason to keep a peer is gone."""
        reasons = self.wanted.get(peer, set())
        reasons.discard(why)
        if not reasons:
            self.wanted.pop(peer, None)

    def at(self, peer: PeerId) -> Caller:
        """What carries calls to a peer, for `shoal.protocol.services.client`.

        A call of a peer that cannot be reached fails with UNAVAILABLE.
        """
        state = self.connected.get(peer)
        if state is not None:
            state.used_at = trio.current_time()
        return self.links.at(peer)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        await self.libp2p.disconnect(ID.from_base58(str(peer)))

    async def provide(self, cid: Cid) -> bool:
        """Announce in the DHT that this node holds a CID; False if no other node took the record."""
        return self._dht is not None and await self._dht.provide(str(cid))

    async def find_providers(self, cid: Cid) -> list[tuple[str, ...]]:
        """The full multiaddrs of each peer that the DHT names as holder of a CID."""
        if self._dht is None:
            return []
        found: dict[PeerId, dict[str, None]] = {}  # each is named once by every node that knows of it
        for info in await self._dht.find_providers(str(cid), count=MAX_PROVIDERS):
            peer = PeerId(str(info.peer_id))
            if peer != self.peer_id and info.addrs:
                found.setdefault(peer, {}).update((full_address(str(each), peer), None) for each in info.addrs)
        return [tuple(addresses) for addresses in found.values()]

    # What the links ask.

    def is_connected(self, peer: PeerId) -> bool:
        """Whether any connection stands; a peer's first stream may be here before the news of its connection."""
        return peer in self.connected or bool(self.libp2p.get_network().get_connections(ID.from_base58(str(peer))))

    def dialed_address(self, peer: PeerId) -> tuple[str, int] | None:
        """IP and TCP port that this node dialed to reach a peer; None if the peer dialed."""
        state = self.connected.get(peer)
        if state is None or not state.outbound or state.kind is not PathKind.DIRECT:
            return None
        return ip_port(state.address)

    def is_local(self, peer: PeerId) -> bool:
        """Whether the peer is on this machine."""
        state = self.connected.get(peer)
        return state is not None and is_loopback(ip_of(state.address))

    def rtt_s(self, peer: PeerId) -> float | None:
        """The last measured round trip."""
        state = self.connected.get(peer)
        return None if state is None or state.rtt_ms is None else state.rtt_ms / 1000

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        """A new libp2p stream on the best path, or `StreamClosedError`."""
        state = self.connected.get(peer)
        if state is not None:
            connection: INetConn | None = state.best.connection
        else:  # a peer's first stream may be here before the news of its connection
            connection = next(iter(self._network.get_connections(ID.from_base58(str(peer)))), None)
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

    async def _serve_stream(self, protocol: str, stream: INetStream) -> None:
        peer = PeerId(str(stream.muxed_conn.peer_id))
        await self.links.serve_stream(peer, protocol, Libp2pByteStream(stream))

    # What libp2p tells.

    def _connection_up(self, connection: INetConn) -> None:
        peer = PeerId(str(connection.muxed_conn.peer_id))
        address, outbound = _far_end(connection)
        now = trio.current_time()
        kind = kind_of(address, is_punching=peer in self.punching)
        path = Path(connection, kind, address, outbound, since=now)
        self._lost.pop(peer, None)
        state = self.connected.get(peer)
        if state is not None:
            before = state.best
            state.paths = sorted([*state.paths, path], key=lambda each: each.kind.rank)
            if state.best is not before:
                self._path_changed(peer, state)
            self._wake_waiters()
            return
        self.connected[peer] = Connected(since=now, paths=[path], used_at=now)
        self.links.peer_up(peer)
        self._tell(PeerUp(peer))
        self._nursery.start_soon(self._keep_alive, peer)
        if self._dht is not None:
            self._nursery.start_soon(self._add_to_dht, connection.muxed_conn.peer_id)
        self._wake_waiters()
        self.on_path(peer)
        self._make_room(peer)

    async def _add_to_dht(self, peer: ID) -> None:
        """Kademlia takes a peer once identify has told that it speaks Kademlia, which may take a round trip yet."""
        for wait_s in (0.0, 0.5, 2.0):
            await trio.sleep(wait_s)
            if self._dht is None or await self._dht.add_peer(peer):
                return

    def _connection_down(self, connection: INetConn) -> None:
        peer = PeerId(str(connection.muxed_conn.peer_id))
        state = self.connected.get(peer)
        if state is None:
            return
        before = state.best
        left = [path for path in state.paths if path.connection is not connection]
        if left:
            state.paths = left
            if state.best is not before:
                self._path_changed(peer, state)
            return
        self._note_loss(peer, before)
        del self.connected[peer]
        self.relays.pop(peer, None)
        self.relay.peer_down(peer)
        self.links.peer_down(peer)
        self._tell(PeerDown(peer))
        self._wake_waiters()
        self.on_path(peer)

    def _path_changed(self, peer: PeerId, state: Connected) -> None:
        log.info("%s is reached by another path now: %s (%s)", peer, state.kind, state.address)
        self.links.path_changed(peer)
        for path in state.paths[1:]:
            self._nursery.start_soon(self._retire, peer, path)
        self.on_path(peer)

    async def _retire(self, peer: PeerId, path: Path) -> None:
        """Close a path that a better one has replaced, when what it carries has ended."""
        deadline = trio.current_time() + RETIRE_MAX_S
        while trio.current_time() < deadline:
            await trio.sleep(RETIRE_S)
            state = self.connected.get(peer)
            if state is None or path not in state.paths or state.best.kind.rank >= path.kind.rank:
                return
            if not any(str(stream.get_protocol()).startswith("/shoal/") for stream in path.connection.get_streams()):
                break
        await path.connection.close()

    def _make_room(self, newcomer: PeerId) -> None:
        if len(self.connected) <= self._max_peers:
            return
        candidates = [
            Candidate(peer, state.kind, peer in self.wanted, state.used_at)
            for peer, state in self.connected.items()
            if peer != newcomer
        ]
        for peer in surplus(candidates, self._max_peers - 1, trio.current_time()):
            log.info("letting %s go: more than %d peers are connected", peer, self._max_peers)
            self._nursery.start_soon(self.disconnect, peer)

    def _wake_waiters(self) -> None:
        self._came_or_went.set()
        self._came_or_went = trio.Event()

    async def wait_for_change(self) -> None:
        """Until a peer comes or goes, or a better path to one comes."""
        await self._came_or_went.wait()

    def spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run something for as long as the host stands."""
        self._nursery.start_soon(function, *arguments)

    def lost_by_its_relay(self, peer: PeerId) -> bool:
        """Whether a peer is gone only because the relay in between is, so that it is worth waiting for."""
        state = self.connected.get(peer)
        if state is not None:  # the news of the end may still be on its way
            if any(_is_open(path.connection) for path in state.paths):
                return False
            self._note_loss(peer, state.best)
        lost = self._lost.get(peer)
        return lost is not None and self._may_come_back(lost)

    def _may_come_back(self, lost: _Lost) -> bool:
        is_relay_there = self._is_alive(lost.relay)
        return trio.current_time() - lost.at < (RELAY_ENDS_S if is_relay_there else COME_BACK_S)

    async def come_back(self, peer: PeerId, deadline: float) -> bool:
        """Reach a peer again whose relay is gone, in any way that there is; whether it is back."""
        lost = self._lost.get(peer)
        if lost is not None:
            with trio.move_on_at(min(deadline, lost.at + COME_BACK_S)):
                async with lost.is_dialing:
                    while self._is_alive(lost.relay):  # it may be about to end
                        if not self._may_come_back(lost):
                            return self._is_alive(peer)
                        await trio.sleep(COME_BACK_AGAIN_S)
                    while not self._is_alive(peer) and not await self._reach(peer, self.known_addresses(peer)):  # noqa: ASYNC110  it dials
                        await trio.sleep(COME_BACK_AGAIN_S)
        return self._is_alive(peer)

    def _is_alive(self, peer: PeerId) -> bool:
        return any(map(_is_open, self._network.get_connections(ID.from_base58(str(peer)))))

    def _note_loss(self, peer: PeerId, path: Path) -> None:
        if path.kind is PathKind.RELAYED and peer not in self._lost:
            self._lost[peer] = _Lost(parse_circuit(path.address)[0], trio.current_time())
            while len(self._lost) > MAX_KNOWN_PEERS:
                del self._lost[next(iter(self._lost))]

    async def wait_connected(self, peer: PeerId) -> None:
        """Until a peer is connected."""
        while peer not in self.connected:
            await self._came_or_went.wait()

    def _tell(self, event: HostEvent) -> None:
        try:
            self._events_in.send_nowait(event)
        except trio.WouldBlock:
            log.error("more than %d host events wait; %s is lost", MAX_EVENTS, event)  # noqa: TRY400

    async def _keep_alive(self, peer: PeerId) -> None:
        """Measure the round trip, and close a path on which two calls in a row stay without answer."""
        misses = 0
        ping = client(NodeService, self.links.at(peer), timeout_s=KEEPALIVE_TIMEOUT_S).ping
        state = self.connected.get(peer)
        while state is not None and self.connected.get(peer) is state:
            started, path = trio.current_time(), state.best
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
            if path not in state.paths or path is not state.best:
                misses = 0  # another path has its own two calls
            if misses >= 2 and self.connected.get(peer) is state:
                log.info("%s does not answer; closing the path (%s)", peer, path.kind)
                await path.connection.close()
                misses = 0
            is_settled = state.rtt_ms is not None and not misses
            await trio.sleep(KEEPALIVE_INTERVAL_S if is_settled else 0.5)

    async def stay_connected(self, addresses: Sequence[str]) -> None:
        """Be connected to the peer that these full multiaddrs name for ever, with back-off."""
        peer = PeerId(addresses[0].rpartition("/p2p/")[2])
        if peer == self.peer_id:
            return
        self.want(peer, "bootstrap")
        wait_s = 0.5
        while True:
            if peer in self.connected:
                wait_s = 0.5
                await self.wait_for_change()
                continue
            try:
                await self.connect(addresses)
            except NoPeersError as error:
                log.warning("bootstrap: %s; next try in %.0f s", error, wait_s)
                with trio.move_on_after(wait_s * random.uniform(0.8, 1.2)):  # noqa: S311  jitter, not a secret
                    await self.wait_connected(peer)
                wait_s = min(wait_s * 2, BOOTSTRAP_RETRY_MAX_S)


def _is_open(connection: INetConn) -> bool:
    """Whether streams can be opened on a connection; not so for some moments before it counts as closed."""
    muxed: Any = connection.muxed_conn
    return not (connection.is_closed or muxed.is_closed or muxed.event_shutting_down.is_set())


def _far_end(connection: INetConn) -> tuple[str, bool]:
    """The full multiaddr of a connection's far end, empty if it has none, and whether this node dialed it."""
    addresses = connection.get_transport_addresses()
    address = full_address(str(addresses[0]), PeerId(str(connection.muxed_conn.peer_id))) if addresses else ""
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
    relay_limits: RelayLimits | None = None,
    max_peers: int = MAX_PEERS,
) -> AsyncIterator[Host]:
    """Stand up a host, listening; tears it down at the end.

    Args:
        secret: raw 32-byte Ed25519 secret key.
        listen: multiaddrs to listen on.
        bootstrap: full multiaddrs of nodes to stay connected to.
        mdns: whether to find and be found on the local network.
        router: who serves the calls of peers.
        lanes: whether to use connections beside libp2p's own where a peer is reached directly.
        relay_limits: of what this node relays, once it does.
        max_peers: how many are kept connected, unless more are wanted.

    Raises:
        ListenError: if an address cannot be listened on.
    """
    apply_repairs()
    key_pair = create_new_key_pair(secret)
    # Noise alone: libp2p's own list ends in plain text, to which whoever is in the middle could talk both sides down.
    noise = NoiseTransport(key_pair, noise_privkey=create_new_x25519_key_pair().private_key)
    # Several paths may lead to a peer; how many peers there may be is decided here and not by libp2p.
    limits = ConnectionConfig(
        max_connections=3 * max_peers + 256, high_watermark=3 * max_peers + 256, max_connections_per_peer=8
    )
    libp2p_host = new_host(
        key_pair=key_pair,
        sec_opt={NOISE_PROTOCOL_ID: noise},
        negotiate_timeout=int(NEGOTIATE_S),
        connection_config=limits,
        disable_identify_address_discovery=True,
    )
    network: Any = libp2p_host.get_network()
    failure: Exception | None = None
    async with background_trio_service(network), trio.open_nursery() as nursery:
        try:
            router.add(_NodeCalls())
            host = Host(
                libp2p_host,
                PeerId.parse(str(libp2p_host.get_id())),
                router,
                nursery,
                lanes=lanes,
                relay_limits=relay_limits or RelayLimits(),
                max_peers=max_peers,
            )
            announce_as_told(libp2p_host, host.addresses)
            for protocol in (RPC_PROTOCOL, STREAM_PROTOCOL, BULK_PROTOCOL):
                libp2p_host.set_stream_handler(TProtocol(protocol), partial(host._serve_stream, protocol))
            network.register_notifee(_Notifee(host))
            for address in listen:
                await host.door.listen(network, address)
            host.door.open(network)
            nursery.start_soon(host.relay.run)
            dht = KadDHT(libp2p_host, DHTMode.SERVER)
            async with background_trio_service(dht):
                host._dht = dht
                for address in bootstrap:
                    nursery.start_soon(host.stay_connected, [address])
                if mdns:
                    nursery.start_soon(run_mdns, host)
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


class _NodeCalls(NodeService):
    """What every node answers."""

    async def ping(self, request: Empty) -> Empty:
        return request


class _Notifee(INotifee):
    """Turns libp2p's notifications into the host's events."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._host._connection_up(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._host._connection_down(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass
