"""The mesh as the rest of the node uses it: who it is connected to, by which paths, and calls to them.

Puts together what stands in files of its own: libp2p (`libp2p_host`), the core that decides about connections and paths
(`connections`), dialing, waiting for those whose relay is gone (`comeback`), the distributed hash table (`kademlia`),
the TCP port (`door`), circuits (`relay`) and mDNS. Everything above it speaks in `PeerId`, text multiaddrs and typed
methods, and changes what is held here by methods alone. How a better path is come by is `shoal.node.reach.reach`'s
business; here is what every path has in common: it is a libp2p connection, and the best one carries what begins now.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, assert_never

import trio
from libp2p.abc import IHost
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.tools.anyio_service import background_trio_service

from shoal.node.budgets import BudgetLimits, NodeBudgets, max_descriptors, user_of
from shoal.node.mesh.address_book import AddressBook
from shoal.node.mesh.addresses import CIRCUIT, ip_of, ip_port, is_loopback, may_be_heard_of
from shoal.node.mesh.circuits import closed_on_failure, parse_circuit
from shoal.node.mesh.comeback import Comebacks
from shoal.node.mesh.connections import (
    BestPathChanged,
    ClosePath,
    Connected,
    Connections,
    Event,
    LetGo,
    Output,
    Path,
    PathAdded,
    PathDown,
    PathId,
    PathUp,
    PeerDown,
    PeerUp,
    PunchBegan,
    PunchOver,
    RelayKnown,
    Tick,
    Unwanted,
    Used,
    Wake,
    Wanted,
)
from shoal.node.mesh.dialing import Dialer
from shoal.node.mesh.door import Door
from shoal.node.mesh.intake import intake
from shoal.node.mesh.interfaces import on_link, reachable_addresses
from shoal.node.mesh.kademlia import Kademlia, keep_announced, open_kademlia
from shoal.node.mesh.keepalive import keep_alive
from shoal.node.mesh.libp2p_host import Libp2pHost, make_libp2p_host, peer_named
from shoal.node.mesh.mdns import run_mdns
from shoal.node.mesh.paths import PathKind
from shoal.node.mesh.relay import Relay
from shoal.node.mesh.relay_limits import RelayLimits
from shoal.node.mesh.table import Table
from shoal.node.mesh.turns import Queue, Reading
from shoal.node.signals import Signal, about
from shoal.node.supervise import Domain, Policy, Supervisor
from shoal.node.traffic import Traffic
from shoal.node.wire.channel import ByteStream, Router
from shoal.node.wire.contracts import NodeService
from shoal.node.wire.lanes import Pace, Socket
from shoal.node.wire.links import BULK_PROTOCOL, DRAIN_S, RPC_PROTOCOL, STREAM_PROTOCOL, Links
from shoal.protocol.errors import NoPeersError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import Caller, Empty
from shoal.protocol.signing import Signer

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

__all__ = ["Connected", "Host", "HostEvent", "Path", "PeerDown", "PeerUp", "open_host"]

log = logging.getLogger(__name__)

MAX_HEARD_ADDRESSES: Final = 8
"""Addresses of one peer that are dialed at a time at the word of others."""
MAX_HEARD_CIRCUITS: Final = 4
MAX_SEEN_FROM: Final = 64
NOT_THERE_S: Final = 30.0
"""How long a peer is not dialed again for the DHT that could not be reached."""
MAX_NOT_THERE: Final = 1024
BOOTSTRAP_RETRY_MAX_S: Final = 10.0
MAX_EVENTS: Final = 1024
MAX_PEERS: Final = 256
LOOK_AT_UNREAD_S: Final = 0.25
"""How often it is looked at what came by the connections and was not read."""
LOOK_AT_WANTED_S: Final = 1.0
"""Likewise while no other peers are connected than those that this node wants."""

STREAM_TURN_S: Final = 5.0
"""How long a stream of a stranger waits for its turn to say what it is for."""

HostEvent = PeerUp | PeerDown


class Host:
    """Connections and calls. Made by `open_host`."""

    def __init__(
        self,
        libp2p: Libp2pHost,
        router: Router,
        domain: Domain,
        signer: Signer,
        *,
        lanes: bool = True,
        relay_limits: RelayLimits,
        max_peers: int,
        budget_limits: BudgetLimits | None = None,
    ) -> None:
        self.peer_id = libp2p.peer_id
        self.domain = domain
        """Of all tasks that the mesh has; it ends before the connections do."""
        self._connections = Connections(max_peers)
        self.budgets = NodeBudgets(self._connections.wanted.__contains__, budget_limits, max_descriptors())
        """From which what every peer may hold is drawn."""
        self.upload = Traffic(self.budgets.limits.upload_bytes_per_s)
        """Of contents, to all peers together; likewise the other way."""
        self.download = Traffic(self.budgets.limits.download_bytes_per_s)
        is_wanted = self._connections.wanted.__contains__
        self._reading = Reading(intake(self.budgets.limits, relay_limits), is_wanted)
        libp2p.pace(self._reading, is_wanted)
        self.links = Links(self, router, domain, lanes=lanes, memory=self.budgets.memory, pace=self._pace)
        self.door = Door(self._accept_lane, self.budgets, self._is_wanted_at)
        self._streams = Queue(self.budgets.streams, STREAM_TURN_S)
        self.relay = Relay(libp2p.libp2p, relay_limits, self.own_addresses, domain)
        self.ports: dict[str, int] = {}
        """By multiaddr that it was told to listen on, the port."""
        self._is_ending = False
        self.table = Table(self, signer, domain)
        """The distributed hash table."""
        self.kademlia: Kademlia | None = None
        """None until it runs."""
        self._libp2p = libp2p
        self._book = AddressBook()
        self._dialer = Dialer(self.dial, self.is_connected, self._connections.relays, self.budgets.dials)
        self._dht_dialer = Dialer(self.dial, self.is_connected, {}, self.budgets.dials)
        self._not_there: dict[PeerId, float] = {}  # peers that the DHT named, until when they are not dialed for it
        self._comebacks = Comebacks(self._connections, libp2p, self._dialer, self._comeback_addresses)
        self._announced: tuple[str, ...] = ()
        self._seen_from: dict[str, None] = {}
        self._followers: list[Callable[[PeerId], None]] = []
        self._came_or_went = Signal()
        self._peer_came = Signal()
        self._wake_at = math.inf
        self._retimed = Signal()
        self._peers: dict[PeerId, Domain] = {}
        self._num_lost_events = 0
        self._events_in, self.events = trio.open_memory_channel[HostEvent](MAX_EVENTS)

    # --- what is there ---

    @property
    def libp2p(self) -> IHost:
        """Libp2p's own host, for protocols of libp2p that this node speaks."""
        return self._libp2p.libp2p

    @property
    def connected(self) -> Mapping[PeerId, Connected]:
        """Who is connected."""
        return self._connections.peers

    @property
    def relays(self) -> Mapping[PeerId, str]:
        """Connected peers that relay, with an address of each."""
        return self._connections.relays

    @property
    def wanted(self) -> Mapping[PeerId, Set[str]]:
        """Peers that must not be let go to make room, and by whom they are wanted."""
        return self._connections.wanted

    @property
    def punching(self) -> Set[PeerId]:
        """Peers with which holes are being punched now."""
        return self._connections.punching

    def listened(self) -> list[str]:
        """The multiaddrs that this node listens on."""
        return self._libp2p.listened()

    def own_addresses(self) -> tuple[str, ...]:
        """The full multiaddrs of this node's own interfaces, at which it listens."""
        found = (each for address in self.listened() for each in reachable_addresses(address))
        return tuple(f"{address}/p2p/{self.peer_id}" for address in found)

    def addresses(self) -> tuple[str, ...]:
        """The full multiaddrs under which others can reach this node: its own, forwarded ones, circuits."""
        return tuple(dict.fromkeys((*self._announced, *self.own_addresses())))

    def known_addresses(self, peer: PeerId) -> list[str]:
        """What is remembered of a peer, newest first."""
        return self._book.addresses(peer)

    def statistics(self) -> dict[str, int]:
        """Counters, and how much is held."""
        waiting = self._events_in.statistics().current_buffer_used
        return {
            **self._connections.statistics(),
            **self.budgets.statistics(),
            **self._reading.statistics(),
            "known_peers": len(self._book),
            "waiting_events": waiting,
            "lost_events": self._num_lost_events,
        }

    # --- what the rest of the node says ---

    def announce(self, addresses: Iterable[str]) -> None:
        """Tell others these full multiaddrs too, beside those of the interfaces: forwarded ones and circuits."""
        self._announced = tuple(dict.fromkeys(addresses))

    def remember(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Keep addresses of a peer, to reach it again by them; the last as the newest."""
        self._book.remember(peer, addresses)

    def want(self, peer: PeerId, why: str) -> None:
        """Never let this peer go to make room, and read what it sends as it comes."""
        self._tell(Wanted(peer, why))
        self._reading.let_go(peer)

    def unwant(self, peer: PeerId, why: str) -> None:
        """This reason to keep a peer is gone."""
        self._tell(Unwanted(peer, why))

    def note_relay(self, peer: PeerId, address: str | None) -> None:
        """A connected peer relays, and others dial it by this address; with None it does not."""
        self._tell(RelayKnown(peer, address))

    def punch_began(self, peer: PeerId) -> None:
        """A direct connection to this peer that comes from now on came by hole punching."""
        self._tell(PunchBegan(peer))

    def punch_over(self, peer: PeerId) -> None:
        """No more."""
        self._tell(PunchOver(peer))

    def follow_paths(self, tell: Callable[[PeerId], None]) -> None:
        """Have it told when a peer's best path is another one: also its first, and that it has none any more."""
        self._followers.append(tell)

    def spawn(self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any, policy: Policy) -> None:
        """Run a task for as long as the host stands; the rest as `Domain.start_soon`."""
        self.domain.start_soon(name, function, *arguments, policy=policy)

    async def wait_for_change(self) -> None:
        """Until a peer comes or goes, or a better path to one comes."""
        await self._came_or_went.wait()

    async def wait_connected(self, peer: PeerId) -> None:
        """Until a peer is connected."""
        while peer not in self.connected:
            await self._came_or_went.wait()

    # --- calls ---

    def at(self, peer: PeerId) -> Caller:
        """What carries calls to a peer, for `shoal.protocol.services.client`.

        A call of a peer that cannot be reached fails with UNAVAILABLE.
        """
        self._tell(Used(peer))
        return self.links.at(peer)

    # --- reaching peers ---

    async def connect(self, addresses: Sequence[str], *, heard: bool = False) -> PeerId:
        """Connect to the one peer that these full multiaddrs name, by one of them or through a relay.

        Args:
            addresses: which.
            heard: whether they are the word of other peers, and so dialed only within what `sift` lets through.

        Raises:
            NoPeersError: if it cannot be reached by any of them.
            UsageError: if they name no peer that could be a node.
        """
        peer, named = peer_named(addresses)
        if peer == self.peer_id:
            return peer
        self.remember(peer, named)
        reach = self.reach_heard if heard else self._dialer.reach
        if peer not in self.connected and not await reach(peer, named):
            raise NoPeersError(f"cannot reach {peer} at {', '.join(addresses)}")
        return peer

    async def find(self, peer: PeerId) -> PeerId:
        """Connect to a peer by its name alone: by addresses known from before, relays, or the DHT.

        Raises:
            NoPeersError: if it cannot be found or reached.
        """
        if peer == self.peer_id or peer in self.connected:
            return peer
        if await self.reach_heard(peer, self.known_addresses(peer)):
            return peer
        found = await self.kademlia.find_peer(peer) if self.kademlia is not None else ()
        if found and await self.reach_heard(peer, found):
            return peer
        raise NoPeersError(f"cannot find {peer}: neither the DHT nor a relay leads to it now")

    async def reach_heard(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        """Dial a peer where others say that it is; whether it is connected."""
        return await self._dialer.reach(peer, self.sift(peer, addresses))

    async def reach_for_dht(self, peer: PeerId, addresses: Sequence[str]) -> bool | None:
        """Dial a peer of which the DHT needs an answer; whether it is connected. No relay is troubled for that.

        Nor is whoever could not be reached, or has gone, a short while ago: it comes by itself if it wants to. None
        says nothing of the peer: this node ends, or has dialed too much.
        """
        if self._is_ending:
            return None
        if self._not_there.get(peer, 0.0) > trio.current_time():
            return False
        direct = [address for address in self._worth_dialing(peer, addresses) if CIRCUIT not in address]
        within = self.sift(peer, direct)
        if direct and not within:
            return None
        if within and await self._dht_dialer.reach(peer, within):
            return True
        self._note_not_there(peer)
        return False

    def _note_not_there(self, peer: PeerId) -> None:
        self._not_there.pop(peer, None)
        self._not_there[peer] = trio.current_time() + NOT_THERE_S
        while len(self._not_there) > MAX_NOT_THERE:
            del self._not_there[next(iter(self._not_there))]

    def sift(self, peer: PeerId, addresses: Iterable[str]) -> list[str]:
        """Those addresses of a peer, as others gave them, that are worth dialing, and that it is not too soon for.

        Whatever is given back counts as dialed, see `shoal.node.budgets.Dials`.
        """
        now = trio.current_time()
        direct: list[str] = []
        circuits: list[str] = []
        for address in self._worth_dialing(peer, addresses):
            group, most = (circuits, MAX_HEARD_CIRCUITS) if CIRCUIT in address else (direct, MAX_HEARD_ADDRESSES)
            is_there = group is circuits and address.partition(CIRCUIT)[0].rpartition("/p2p/")[2] in self.connected
            if len(group) < most and (is_there or self.budgets.dials.may(peer, address, now)):
                group.append(address)
        return direct + circuits

    def _worth_dialing(self, peer: PeerId, addresses: Iterable[str]) -> list[str]:
        own = [state for each, state in self.connected.items() if each == peer or each in self.wanted or state.outbound]
        seen_from = {ip_of(path.address) for state in own for path in state.paths}
        seen_from.update(self._seen_from, map(ip_of, self.listened()))
        ips = {address: ip_of(address) for address in addresses}
        return [address for address, ip in ips.items() if not ip or may_be_heard_of(ip, seen_from, on_link)]

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
            self._refuse_if_ending()
            raw = RawConnection(TrioTCPStream(await self.door.dial(*target)), initiator=True)
            await self.upgrade(raw, peer)
            async with closed_on_failure(raw):
                self._refuse_if_ending()  # the network has closed those that it knew, and knows no others any more
        else:  # a name, or another transport
            await self._libp2p.dial(peer, address)

    async def upgrade(self, raw: RawConnection, peer: PeerId) -> None:
        """Make a byte pipe a connection to a peer, who proves that it is that.

        Raises:
            BaseLibp2pError: if it is not, or the pipe broke; the pipe is closed then.
        """
        await self._libp2p.upgrade(raw, peer)

    async def close_path(self, path: Path) -> None:
        """Close one connection, if it still stands."""
        await self._libp2p.close_path(path.id)

    def _note_where(self, peer: PeerId) -> None:
        """Remember where peers are that this node chose to dial, also for when they are gone."""
        state = self.connected[peer]
        if state.outbound:
            self._seen_from[ip_of(state.address)] = None
            while len(self._seen_from) > MAX_SEEN_FROM:
                del self._seen_from[next(iter(self._seen_from))]

    def _comeback_addresses(self, peer: PeerId) -> list[str]:
        return self.sift(peer, self.known_addresses(peer))

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        await self._libp2p.disconnect(peer)

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

    # --- the distributed hash table ---

    async def provide(self, cid: Cid) -> bool:
        """Announce in the DHT that this node holds a CID; False if no other node took the record."""
        return self.kademlia is not None and await self.kademlia.provide(cid)

    async def keep_provided(self, cid: Cid) -> None:
        """Announce it for ever, as often as it takes."""
        await keep_announced(cid, self._provide_if_connected, self._peer_came)

    async def _provide_if_connected(self, cid: Cid) -> bool:
        return bool(self.connected) and await self.provide(cid)

    async def find_providers(self, cid: Cid) -> list[tuple[str, ...]]:
        """The full multiaddrs of each peer that the DHT names as holder of a CID."""
        return [] if self.kademlia is None else list((await self.kademlia.find_providers(cid)).values())

    # --- what the links ask ---

    def is_connected(self, peer: PeerId) -> bool:
        """Whether any connection stands; a peer's first stream may be here before the news of its connection."""
        return peer in self.connected or self._libp2p.has_connection(peer)

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
        return await self._libp2p.open_stream(peer, None if state is None else state.best.id, protocol)

    def lost_by_its_relay(self, peer: PeerId) -> bool:
        """Whether a peer is gone only because the relay in between is, so that it is worth waiting for."""
        return self._comebacks.is_expected(peer)

    async def come_back(self, peer: PeerId, deadline: float) -> bool:
        """Reach a peer again whose relay is gone, in any way that there is; whether it is back."""
        return await self._comebacks.come_back(peer, deadline)

    # --- what the core says ---

    def _tell(self, event: Event) -> None:
        for output in self._connections.handle(event, trio.current_time()):
            self._carry_out(output)

    def _carry_out(self, output: Output) -> None:
        match output:
            case PeerUp(peer):
                self._note_where(peer)
                self._not_there.pop(peer, None)
                self._peers[peer] = self.domain.inside("peer", peer)
                self.links.peer_up(peer)
                self._pass_on(output)
                self._begin_with(peer)
                self.domain.call("telling the DHT of a peer", self.table.met, peer)
                self._peer_came.set()
                self._came_or_went.set()
                self._tell_followers(peer)
            case PeerDown(peer):
                home = self._peers.pop(peer, None)
                if home is not None:
                    home.cancel()
                self._note_not_there(peer)
                self.relay.peer_down(peer)
                self.links.peer_down(peer)
                self._pass_on(output)
                self._came_or_went.set()
                self._tell_followers(peer)
            case BestPathChanged(peer):
                best = self.connected[peer].best
                log.info("%s is reached by another path now: %s (%s)", peer, best.kind, best.address)
                self.links.path_changed(peer)
                self._tell_followers(peer)
            case PathAdded():
                self._came_or_went.set()
            case ClosePath(path):
                self._close_soon(path)
            case LetGo(peer):
                log.info("letting %s go: more than %d peers are connected", peer, self._connections.max_peers)
                self.spawn("letting a peer go", self.disconnect, peer, policy=Policy.DROP)
            case Wake(at):
                self._wake_at = at
                self._retimed.set()
            case _:
                assert_never(output)

    def _tell_followers(self, peer: PeerId) -> None:
        for tell in self._followers:
            self.domain.call("telling of a path", tell, peer)

    # --- tasks ---

    async def begin(self, bootstrap: Sequence[str], *, mdns: bool) -> None:
        """Begin every task of the mesh, now that it listens; returns once the distributed hash table runs."""
        self.spawn("retiring paths", self._keep_time, policy=Policy.RESTART)
        self.spawn("sharing the relay", self.relay.run, policy=Policy.RESTART)
        self.spawn("letting in", self.door.run, policy=Policy.RESTART)
        self.spawn("letting streams in", self._streams.run, policy=Policy.RESTART)
        self.spawn("reading what strangers send", self._reading.run, policy=Policy.RESTART)
        self.spawn("holding peers to their shares", self._hold_to_shares, policy=Policy.RESTART)
        self.spawn("keeping the DHT's time", self.table.run, policy=Policy.RESTART)
        await self.domain.start("the DHT", self._take_part_in_dht, policy=Policy.RESTART)
        for address in bootstrap:
            self.spawn("staying connected", self.stay_connected, [address], policy=Policy.RESTART)
        if mdns:
            self.spawn("looking around on the LAN", run_mdns, self, policy=Policy.RESTART)

    def begin_end(self) -> None:
        """Nobody is dialed from now on: what came to be once the network is closed would be closed by nobody."""
        self._is_ending = True

    def _refuse_if_ending(self) -> None:
        if self._is_ending:
            raise OSError("this node ends")

    def take(self, event: PathUp | PathDown) -> None:
        """Hear of a connection from libp2p, in whose tasks nothing may fail."""
        self.domain.call("following connections", self._tell, event)

    async def serve(self, peer: PeerId, protocol: str, stream: ByteStream) -> None:
        """Serve a stream that a peer opened, in libp2p's task."""
        home = self._peers.get(peer) or self.domain.inside("peer", peer)
        if not await home.serve("serving a stream", self.links.serve_stream, peer, protocol, stream):
            await stream.close()

    def _is_wanted_at(self, ip: str) -> bool:
        """Whether a peer that this node wants is connected by this IP."""
        return any(
            ip_of(path.address) == ip
            for peer in self.wanted
            if (state := self.connected.get(peer)) is not None
            for path in state.paths
        )

    async def stream_turn(self, peer: PeerId) -> bool:
        """Wait until a stream that a peer opened may cost this node something; False if it is to be ended."""
        if peer in self.wanted:
            return True
        return await self._streams.turn(self._user(peer))

    def group(self, peer: PeerId) -> str:
        """For whom a peer counts, where bounds are shared: the network that it is connected from."""
        return self._user(peer)

    def _user(self, peer: PeerId) -> str:
        """Whom a peer counts for, where turns are taken."""
        state = self.connected.get(peer)
        return peer if state is None else user_of(ip_of(state.address))

    def _pace(self, peer: PeerId) -> Pace:
        """When what comes by one more lane is read."""
        return self._reading.reader(peer, self._user(peer)).turn

    async def _accept_lane(self, sock: Socket, ip: str) -> None:
        if not await self.domain.serve("accepting a lane", self.links.accept_lane, sock, ip):
            sock.close()

    async def _keep_time(self) -> None:
        self._wake_at = trio.current_time()  # if this began anew, a tick was lost
        while True:
            with trio.move_on_at(self._wake_at):
                await self._retimed.wait()
            if trio.current_time() >= self._wake_at:
                self._wake_at = math.inf
                self._tell(Tick(frozenset(filter(self._libp2p.is_busy, self._connections.retiring))))

    async def _wait_to_look(self) -> None:
        if self.connected.keys() <= self.wanted.keys():
            with trio.move_on_at(about(LOOK_AT_WANTED_S)):
                await self._came_or_went.wait()
        else:
            await trio.sleep(LOOK_AT_UNREAD_S)

    async def _hold_to_shares(self) -> None:
        while True:
            await self._wait_to_look()
            await self._libp2p.cut_greedy(self.budgets)
            for shares in (self.budgets.memory.strangers, self.budgets.memory.members):
                while (peer := shares.greediest()) is not None:
                    log.warning("%s holds %d bytes, more than anybody else; it is cut off", peer, shares.held(peer))
                    await self._libp2p.cut_off(peer, self.budgets)
                    if shares.greediest() == peer:
                        break  # what it holds is on its way back

    async def _take_part_in_dht(self, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        failure: Exception | None = None
        try:
            async with open_kademlia(self.libp2p, self.peer_id, self.wanted.__contains__) as self.kademlia:
                try:
                    for peer in self._peers:
                        self._add_soon(peer)
                    task_status.started()
                    await trio.sleep_forever()
                except Exception as error:  # libp2p's service contexts lose it
                    failure = error
        finally:
            self.kademlia = None
        if failure is not None:
            raise failure

    def _begin_with(self, peer: PeerId) -> None:
        ways = (self._connections, self.links, self._close_soon)
        self._peers[peer].start_soon("keeping a peer alive", keep_alive, peer, *ways, policy=Policy.RESTART)
        self._add_soon(peer)

    def _add_soon(self, peer: PeerId) -> None:
        self._peers[peer].start_soon("adding a peer to the DHT", self._add_to_dht, peer, policy=Policy.DROP)

    async def _add_to_dht(self, peer: PeerId) -> None:
        if self.kademlia is not None:
            await self.kademlia.add_peer(peer)

    def _close_soon(self, path: PathId) -> None:
        """Close a path in a task of its own: what closes the last one of a peer ends all tasks of that peer."""
        self.spawn("closing a path", self._libp2p.close_path, path, policy=Policy.DROP)

    def _pass_on(self, event: HostEvent) -> None:
        try:
            self._events_in.send_nowait(event)
        except trio.WouldBlock:
            self._num_lost_events += 1
            log.error("more than %d host events wait; %s is lost", MAX_EVENTS, event)  # noqa: TRY400


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
    domain: Domain | None = None,
    kept_ports: Mapping[str, int] | None = None,
    budget_limits: BudgetLimits | None = None,
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
        domain: in which its tasks may fail; by default one of its own.
        kept_ports: by listening multiaddr with port 0, the port that is to be had rather than any other.
        budget_limits: of what peers may hold and make it do.

    Raises:
        ListenError: if an address cannot be listened on.
    """
    libp2p = make_libp2p_host(secret, max_peers)
    failure: Exception | None = None
    async with AsyncExitStack() as stack:
        if domain is None:
            domain = await stack.enter_async_context(Supervisor().open("node"))
        await stack.enter_async_context(background_trio_service(libp2p.network))
        mesh = domain.inside("node", "mesh")
        try:
            router.add(_NodeCalls())
            limits = relay_limits or RelayLimits()
            host = Host(
                libp2p,
                router,
                mesh,
                Signer(secret),
                lanes=lanes,
                relay_limits=limits,
                max_peers=max_peers,
                budget_limits=budget_limits,
            )
            router.add(host.table.service())
            libp2p.announce(host.addresses)
            for protocol in (RPC_PROTOCOL, STREAM_PROTOCOL, BULK_PROTOCOL):
                libp2p.serve(protocol, host.serve)
            libp2p.follow(host.take)
            libp2p.dial_by(host.reach_for_dht)
            libp2p.let_streams_in(host.stream_turn)
            for address in listen:
                port = await host.door.listen(libp2p.network, address, (kept_ports or {}).get(address, 0))
                host.ports[address] = port
            host.door.open(libp2p.network)
            await host.begin(bootstrap, mdns=mdns)
            try:
                yield host
            except Exception as error:  # raised again below: libp2p's service contexts lose it
                failure = error
            host.begin_end()
            with trio.CancelScope(deadline=trio.current_time() + DRAIN_S + 1, shield=True):
                await host.links.close()
            await libp2p.close()
        except Exception as error:  # as above
            failure = error
        finally:
            mesh.cancel()
            with trio.CancelScope(shield=True):
                await mesh.wait_gone()
    if failure is not None:
        raise failure


class _NodeCalls(NodeService):
    """What every node answers."""

    async def ping(self, request: Empty) -> Empty:
        return request
