"""How this node is reached, and how it comes to better paths: NAT knowledge, relays, and the climb up the ladder.

Nodes help each other with `ReachService`; there is no server in it that is not a node:

- Peers introduce themselves: addresses, circuits, what NAT they are behind, whether they relay.
- A node finds out what it is behind by asking peers: to dial back, how they see its ports, to poke
  (`shoal.node.reach.nat` judges the answers).
- A node that nobody can dial holds reservations on relays (`shoal.node.reach.held_relays`). One that everybody can dial
  relays.
- To a peer that is reached worse than directly it climbs: the peer's addresses, hole punching, WebRTC
  (`shoal.node.reach.climb`).
- When the network changes or the machine wakes up, paths are checked at once and all of this is found out anew.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

import trio

from shoal.node.mesh.addresses import (
    endpoint,
    ip_of,
    is_global,
    is_loopback,
    tcp_address,
)
from shoal.node.mesh.door import NONCE_BYTES, knock
from shoal.node.mesh.host import Connected, Host
from shoal.node.mesh.interfaces import local_ips
from shoal.node.mesh.paths import PathKind
from shoal.node.reach.climb import Climber
from shoal.node.reach.gateway import PortMapping
from shoal.node.reach.held_relays import RELAY_CID, HeldRelays, relay_addresses
from shoal.node.reach.nat import AddressesChanged, FamilyReport, Mapping, NatReport, NatType, Reachability
from shoal.node.reach.portmap import MapAttempt, keep_port_mapped
from shoal.node.reach.probing import MAX_OBSERVERS, Probe
from shoal.node.reach.punch import Puncher
from shoal.node.reach.settings import ReachConfig
from shoal.node.reach.stun import TOKEN_BYTES, Stun, StunError, open_stun
from shoal.node.reach.webrtc import WebRtc, open_webrtc
from shoal.node.signals import Signal, about
from shoal.node.supervise import Domain, Policy
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import (
    DialBack,
    Introduction,
    NodeService,
    Poke,
    ReachService,
    SeenAt,
    SessionDescription,
)
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty, client, current_call

log = logging.getLogger(__name__)

CALL_S: Final = 5.0
SETTLE_S: Final = 0.2
"""Several things often change at the same moment."""
MAX_INTRODUCED_ADDRESSES: Final = 16
MAX_ADDRESS_CHARS: Final = 300

PROVIDE_S: Final = 600.0
PROBE_AGAIN_S: Final = 600.0
KNOCK_S: Final = 2.0

WATCH_S: Final = 2.0
ASLEEP_S: Final = 4.0
"""A pause of this process that long means that others may have given up on it."""
CHECK_S: Final = 2.0


@dataclass(slots=True)
class ReachReport:
    """What this node knows of how it is reached, for people.

    Attributes:
        mapping: what the router forwards; None if nothing.
        map_attempts: what came of asking the router.
        held_relays: those that this node is reached through.
    """

    nat: NatReport
    is_relaying: bool
    num_reservations: int
    num_circuits: int
    relayed_bytes: int
    held_relays: list[PeerId] = field(default_factory=list)
    mapping: PortMapping | None = None
    map_attempts: list[MapAttempt] = field(default_factory=list)


@asynccontextmanager
async def open_reach(host: Host, router: Router, config: ReachConfig) -> AsyncIterator[Reach]:
    """Be reached, and reach others better, inside the block."""
    ports = [host.door.port(family) for family in ("0.0.0.0", "::")]  # noqa: S104  names of families
    async with AsyncExitStack() as stack:
        bound = {family: ip for _, family, ip, *_ in (address.split("/") for address in host.listened())}
        stun: Stun | None = None
        try:
            stun = await stack.enter_async_context(
                open_stun(
                    *ports,
                    answers=True,
                    ip_v4=bound.get("ip4", "0.0.0.0"),  # noqa: S104  as for TCP
                    ip_v6=bound.get("ip6", "::"),
                    domain=host.domain,
                )
            )
        except StunError as error:
            log.warning("no UDP: %s", error)
        webrtc = await stack.enter_async_context(open_webrtc()) if config.webrtc else None
        reach = Reach(host, config, stun=stun, webrtc=webrtc)
        router.add(_ReachCalls(host, reach))
        domain = host.domain.inside("node", "reach")
        reach.begin(domain)
        try:
            yield reach
        finally:
            domain.cancel()
            with trio.CancelScope(shield=True):
                await domain.wait_gone()


class Reach:
    """Made by `open_reach`."""

    def __init__(self, host: Host, config: ReachConfig, *, stun: Stun | None, webrtc: WebRtc | None) -> None:
        self._host = host
        self._config = config
        self._stun = stun
        self._introduced: dict[PeerId, Introduction] = {}
        self._news = Signal()  # for the tasks below: something that they decide by has changed
        self.probe = Probe(host, stun, self._introduced)
        puncher = Puncher(host, self._seen_before) if config.punch else None
        self._climber = Climber(host, self.probe, puncher, webrtc, _servers(config), self._introduced, self._news)
        self.answer_webrtc = self._climber.answer_webrtc
        self._held = HeldRelays(host, self._introduced, self._news, self._announce_addresses)
        self._mapping: PortMapping | None = None
        self._map_attempts: list[MapAttempt] = []
        self._mapping_scope = trio.CancelScope()
        self._told: Introduction | None = None
        self._local_ips = local_ips()
        self._must_probe = False
        host.follow_paths(self._on_path)

    def begin(self, domain: Domain) -> None:
        """Find out, tell and climb from now on, by tasks in this domain."""
        if self._config.relay == "on":
            self._host.relay.open()
        self.probe.handle(AddressesChanged(self._local_ips))
        self._announce_addresses()
        for peer in list(self._host.connected):
            self._on_path(peer)
        domain.start_soon("probing", self._keep_probing, policy=Policy.RESTART)
        domain.start_soon("holding relays", self._held.run, self._needs_relays, policy=Policy.RESTART)
        domain.start_soon("introducing this node", self._keep_telling, policy=Policy.RESTART)
        domain.start_soon("providing the relay", self._keep_provided, policy=Policy.RESTART)
        domain.start_soon("watching the network", self._watch, policy=Policy.RESTART)
        port = self._host.door.port("0.0.0.0")  # noqa: S104  names a family
        if self._config.port_mapping and port is not None and not all(map(_is_loopback, self._host.listened())):
            domain.start_soon("mapping the port", self._keep_mapped, port, policy=Policy.RESTART)

    def report(self) -> ReachReport:
        """What is known now."""
        relay = self._host.relay
        return ReachReport(
            nat=self.nat(),
            is_relaying=relay.is_open,
            num_reservations=relay.ledger.num_reservations,
            num_circuits=relay.ledger.num_circuits,
            relayed_bytes=relay.num_bytes,
            held_relays=self._held.names(),
            mapping=self._mapping,
            map_attempts=list(self._map_attempts),
        )

    def nat(self) -> NatReport:
        """What this node is behind."""
        return self.probe.report()

    def _seen_before(self) -> list[tuple[str, int]]:
        """Where peers saw the port that this node listens on, if all saw it there."""
        return [(each.ip, each.port) for each in self.nat().public_addresses]

    def introduction(self, peer: PeerId) -> Introduction | None:
        """What a peer said of itself."""
        return self._introduced.get(peer)

    async def _wait_for_news(self, at_most_s: float) -> None:
        with trio.move_on_after(at_most_s):
            await self._news.wait()

    # --- who is there ---

    def _on_path(self, peer: PeerId) -> None:
        state = self._host.connected.get(peer)
        if state is None:
            self._introduced.pop(peer, None)
            self._held.peer_down(peer)
            self._news.set()
            return
        if peer not in self._introduced:
            if state.outbound:
                self._host.spawn("meeting a peer", self._meet, peer, policy=Policy.DROP)
        else:
            self._note_relay(peer)
        self._climber.path_changed(peer, state)
        self._news.set()

    async def _meet(self, peer: PeerId) -> None:
        try:
            introduction = await client(ReachService, self._host.links.at(peer), timeout_s=CALL_S).hello(self.me())
        except RemoteError as error:  # it may be a libp2p node of another kind
            log.debug("%s does not introduce itself: %s", peer, error)
        else:
            self.take_introduction(peer, introduction)

    def take_introduction(self, peer: PeerId, introduction: Introduction) -> None:
        """A peer said how it is reached."""
        state = self._host.connected.get(peer)
        if state is None:
            return
        introduction = replace(
            introduction,
            addresses=tuple(_checked(introduction.addresses, peer)),
            load=min(1.0, max(0.0, introduction.load)),
            reachability=_word(Reachability, introduction.reachability),
            udp=_word(NatType, introduction.udp),
            tcp_mapping=_word(Mapping, introduction.tcp_mapping),
            stun_port=introduction.stun_port if 0 < introduction.stun_port < 65536 else 0,
        )
        before = self._introduced.get(peer)
        self._introduced[peer] = introduction
        self._host.remember(peer, reversed(introduction.addresses))
        self._note_relay(peer)
        if before is not None and (before.addresses, before.udp) != (introduction.addresses, introduction.udp):
            state.ladder.something_changed()
        self._climber.path_changed(peer, state)
        self._news.set()

    def _note_relay(self, peer: PeerId) -> None:
        state, introduction = self._host.connected.get(peer), self._introduced.get(peer)
        if introduction is None or state is None:
            return
        if introduction.relays and state.kind is not PathKind.RELAYED:
            self._host.note_relay(peer, relay_addresses(peer, introduction, state)[0])
        else:
            self._host.note_relay(peer, None)

    def me(self) -> Introduction:
        """What this node says of itself."""
        report = self.nat()
        relay = self._host.relay
        return Introduction(
            addresses=self._host.addresses()[:MAX_INTRODUCED_ADDRESSES],
            relays=relay.is_open,
            load=round(relay.ledger.load(), 1),
            stun_port=0 if self._stun is None else self._stun.port,
            reachability=str(report.reachability),
            udp=str(report.udp),
            tcp_mapping=str(report.tcp_mapping),
        )

    async def _keep_telling(self) -> None:
        """Tell the peers whenever what this node says of itself has changed."""
        while True:
            await self._wait_for_news(10.0)
            await trio.sleep(SETTLE_S)
            self._host.table.note_reach(is_reachable=self._is_open())
            now = self.me()
            if now == self._told:
                continue
            self._told = now
            async with trio.open_nursery() as nursery:
                for peer in list(self._introduced):
                    nursery.start_soon(self._meet, peer)

    def _announce_addresses(self) -> None:
        """Work out the addresses beside those of this node's interfaces."""
        found = list(self._config.announce)
        if self._mapping is not None and is_global(self._mapping.external_ip):
            found.append(tcp_address(self._mapping.external_ip, self._mapping.external_port))
        for report in self.nat().families:
            if report.reachability is Reachability.PUBLIC:
                found += [tcp_address(each.ip, each.port) for each in report.public_addresses]
        full = [f"{address}/p2p/{self._host.peer_id}" for address in found]
        self._host.announce(full + self._held.circuits())

    # --- what this node is behind ---

    async def _keep_probing(self) -> None:
        probed: frozenset[PeerId] = frozenset()
        probed_at = -PROBE_AGAIN_S
        while True:
            names = frozenset(observer.peer for observer in self.probe.observers()) or frozenset(self._introduced)
            is_due = trio.current_time() - probed_at > PROBE_AGAIN_S
            if names and (is_due or self._must_probe or (not names <= probed and len(probed) < MAX_OBSERVERS)):
                self._must_probe = False
                await trio.sleep(SETTLE_S)  # others may come at the same moment
                names = frozenset(observer.peer for observer in self.probe.observers()) or names
                probed = names if is_due else probed | names
                probed_at = trio.current_time()
                await self.probe.round()
                self._announce_addresses()
                self._open_or_close_relay()
                self._news.set()
                log.info("reachability: %s, UDP: %s", self.nat().reachability, self.nat().udp)
            else:
                await self._wait_for_news(PROBE_AGAIN_S)

    async def _keep_mapped(self, port: int) -> None:
        """Have the port forwarded, by the router of the network that this node is in now."""
        while True:
            with trio.CancelScope() as self._mapping_scope:
                await keep_port_mapped("tcp", port, self._port_mapped)
            self._port_mapped(None, [])

    def _port_mapped(self, mapping: PortMapping | None, attempts: list[MapAttempt]) -> None:
        if mapping != self._mapping:
            log.info("the router forwards %s", "nothing" if mapping is None else mapping)
            self._must_probe = True
        self._mapping, self._map_attempts = mapping, attempts
        self.probe.forwarded = None if mapping is None else endpoint(mapping.external_ip, mapping.external_port)
        self._announce_addresses()
        self._open_or_close_relay()
        self._news.set()

    # --- relays ---

    def _is_public(self) -> bool:
        """Whether everybody can dial this node, by some IP."""
        return any(map(self._is_public_by, self.nat().families))

    def _is_public_by(self, report: FamilyReport) -> bool:
        """Whether whoever has this IP can dial this node, and not only because a NAT happens to let it."""
        return report.reachability is Reachability.PUBLIC and any(
            each.ip in self._local_ips or each == self.probe.forwarded for each in report.public_addresses
        )

    def _is_open(self) -> bool:
        """Whether others can connect to this node without help; where nobody relays, no NAT is expected in between."""
        if self._is_public() or self._host.relay.is_open:
            return True
        is_unknown = self.nat().reachability is Reachability.UNKNOWN
        return is_unknown and bool(self._introduced) and not self._host.relays

    def _needs_relays(self) -> bool:
        """Whether there is an IP by which this node cannot be dialed, since there are peers that have only that."""
        return not all(map(self._is_public_by, self.nat().families))

    def _open_or_close_relay(self) -> None:
        is_public = self._is_public()
        if self._config.relay != "auto" or is_public == self._host.relay.is_open:
            return
        if is_public:
            log.info("everybody can reach this node, so it relays for others")
            self._host.relay.open()
        else:
            log.info("this node cannot be reached by everybody any more, so it stops relaying")
            self._host.relay.close()

    async def _keep_provided(self) -> None:
        """Announce in the DHT that this node relays, as long as it does."""
        while True:
            is_done = False
            if self._host.relay.is_open and self._host.connected:
                is_done = await self._host.provide(RELAY_CID)
            if is_done:
                await trio.sleep(PROVIDE_S)
            else:
                await self._wait_for_news(30.0)
                await trio.sleep(1)

    async def poke(self, ip: str, request: Poke) -> None:
        """Send a packet to a peer who asks for it.

        Raises:
            RemoteError: if this node has no UDP, or the request makes no sense.
        """
        target = endpoint(ip, request.port)
        if target is None or len(request.token) != TOKEN_BYTES:
            raise RemoteError(Status.INVALID_ARGUMENT, "not a port and a token")
        if self._stun is None:
            raise RemoteError(Status.UNIMPLEMENTED, "this node has no UDP")
        try:
            await self._stun.poke(target, request.token, other_port=request.other_port)
        except StunError as error:
            raise RemoteError(Status.UNAVAILABLE, str(error)) from error

    # --- changes ---

    async def _watch(self) -> None:
        """Notice that the network is another one, or that this process did not run for a while."""
        while True:
            before = trio.current_time()
            await trio.sleep_until(about(WATCH_S))
            ips = local_ips()
            slept = trio.current_time() - before > ASLEEP_S
            if slept or ips != self._local_ips:
                log.info("%s; checking all paths", "this node was asleep" if slept else "this node's addresses changed")
                self._local_ips = ips
                self.probe.handle(AddressesChanged(ips))
                self._must_probe = True
                self._mapping_scope.cancel()
                self._announce_addresses()
                for peer, state in self._host.connected.items():
                    state.ladder.something_changed()
                    self._climber.path_changed(peer, state)
                self._news.set()
                self._host.spawn("checking paths", self._check_paths, policy=Policy.DROP)

    async def _check_paths(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer, state in list(self._host.connected.items()):
                nursery.start_soon(self._check_path, peer, state)

    async def _check_path(self, peer: PeerId, state: Connected) -> None:
        path = state.best
        try:
            await client(NodeService, self._host.links.at(peer), timeout_s=CHECK_S).ping(Empty())
        except RemoteError as error:
            if error.status in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE):
                log.info("%s does not answer any more by its path (%s)", peer, path.kind)
                await self._host.close_path(path)


class _ReachCalls(ReachService):
    """What peers ask."""

    def __init__(self, host: Host, reach: Reach) -> None:
        self._host = host
        self._reach = reach

    async def hello(self, request: Introduction) -> Introduction:
        self._reach.take_introduction(current_call().peer, request)
        return self._reach.me()

    async def dial_back(self, request: DialBack) -> SeenAt:
        ip = self._far_ip(is_ipv6=request.is_ipv6)
        if len(request.nonce) != NONCE_BYTES or not 0 < request.port < 65536:
            raise RemoteError(Status.INVALID_ARGUMENT, "not a port and a nonce")
        await knock(ip, request.port, request.nonce, timeout_s=KNOCK_S)
        return SeenAt(ip)

    async def poke(self, request: Poke) -> Empty:
        await self._reach.poke(self._far_ip(is_ipv6=request.is_ipv6), request)
        return Empty()

    async def webrtc(self, request: SessionDescription) -> SessionDescription:
        return SessionDescription(await self._reach.answer_webrtc(current_call().peer, request.sdp))

    def _far_ip(self, *, is_ipv6: bool) -> str:
        """Where the caller is connected from: nothing is sent anywhere else for it."""
        state = self._host.connected.get(current_call().peer)
        direct = [] if state is None else [path for path in state.paths if path.kind is PathKind.DIRECT]
        ip = next((ip for path in direct if (ip := ip_of(path.address)) and (":" in ip) == is_ipv6), "")
        if ip:
            return ip
        raise RemoteError(Status.FAILED_PRECONDITION, "you are not connected directly by that IP")


def _word(known: type[StrEnum], word: str) -> str:
    """A word of a peer's; "unknown" if this version does not know it."""
    return word if any(word == each for each in known) else "unknown"


def _servers(config: ReachConfig) -> list[tuple[str, int]]:
    return [(host.strip("[]"), int(port)) for host, _, port in (each.rpartition(":") for each in config.stun_servers)]


def _checked(addresses: Iterable[str], peer: PeerId) -> list[str]:
    """Those of a peer's addresses that could be its own."""
    return [
        address
        for address in list(addresses)[:MAX_INTRODUCED_ADDRESSES]
        if len(address) <= MAX_ADDRESS_CHARS and address.isprintable() and address.endswith(f"/p2p/{peer}")
    ]


def _is_loopback(address: str) -> bool:
    return is_loopback(ip_of(address))
