"""Asking peers how they see this node, so that it knows what it is behind. Judged by `shoal.node.reach.nat`.

A round asks, side by side: every peer to dial back on a fresh connection; several peers in different networks how they
see the TCP port that this node listens on (`Door.seen_by`); and, one after the other, how they see its UDP socket
(STUN), with two pokes in between, by a stranger and from another port, that tell what the NAT lets in (RFC 5780).
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Final

import trio

from shoal.node.mesh.addresses import endpoint, ip_of, ip_port, is_global, network_of
from shoal.node.mesh.endpoint import Endpoint
from shoal.node.mesh.host import Host
from shoal.node.mesh.paths import PathKind
from shoal.node.reach.nat import DialedBack, Event, NatKnowledge, NatReport, Poked, PokeSource, Seen, Silent
from shoal.node.reach.stun import TOKEN_BYTES, Stun, StunError
from shoal.node.wire.contracts import DialBack, Introduction, Poke, ReachService
from shoal.protocol.errors import RemoteError
from shoal.protocol.ids import PeerId
from shoal.protocol.services import client

log = logging.getLogger(__name__)

CALL_S: Final = 5.0
ANSWER_S: Final = 2.0
KNOCK_S: Final = 0.2
"""How long a knock may come after the peer has said that it has knocked."""
POKE_S: Final = 0.7
MAX_OBSERVERS: Final = 4
MAX_OBSERVERS_PER_NETWORK: Final = 2
MAX_DIALING_BACK: Final = 8


@dataclass(frozen=True, slots=True)
class Observer:
    """A directly connected peer that can say how it sees this node."""

    peer: PeerId
    ip: str
    tcp_port: int
    stun_port: int


class Probe:
    """What this node knows of its NAT, and the rounds that it learns it by."""

    def __init__(self, host: Host, stun: Stun | None, introduced: dict[PeerId, Introduction]) -> None:
        self._host = host
        self._stun = stun
        self._introduced = introduced
        self._knowledge = NatKnowledge()
        self.forwarded: Endpoint | None = None
        """What the router says that it forwards to this node's port."""

    def handle(self, event: Event) -> None:
        """Something was learned."""
        self._knowledge.handle(event, trio.current_time())

    def report(self) -> NatReport:
        """What is known now."""
        return self._knowledge.report(trio.current_time())

    def observers(self) -> list[Observer]:
        """Whom to ask: those on the internet first, relays first, of several networks."""
        found = []
        for peer, introduction in self._introduced.items():
            state = self._host.connected.get(peer)
            far = None if state is None else ip_port(state.address)
            if state is None or far is None or state.kind is not PathKind.DIRECT or not introduction.stun_port:
                continue
            ip, port = far
            if not state.outbound:  # it dialed, by some port of its own
                port = next((port for ip_, port in map(_listened, introduction.addresses) if ip_ == ip), 0)
            if port:
                found.append(Observer(peer, ip, port, introduction.stun_port))
        found.sort(key=lambda each: (not is_global(each.ip), not self._introduced[each.peer].relays))
        num_of: dict[str, int] = {}
        chosen: list[Observer] = []
        for observer in found:
            network = network_of(observer.ip)
            num_of[network] = num_of.get(network, 0) + 1
            if num_of[network] <= MAX_OBSERVERS_PER_NETWORK and len(chosen) < MAX_OBSERVERS:
                chosen.append(observer)
        return chosen

    async def round(self) -> None:
        """Ask everybody once."""
        observers = self.observers()
        direct = {
            peer: state
            for peer, state in self._host.connected.items()
            if peer in self._introduced and state.kind is PathKind.DIRECT and ip_of(state.address)
        }
        dialed = {ip_of(state.address) for state in self._host.connected.values() if state.outbound}
        async with trio.open_nursery() as nursery:
            for observer in observers:
                nursery.start_soon(self._ask_tcp, observer)
            nursery.start_soon(self._ask_udp, observers)
            for peer, state in list(direct.items())[:MAX_DIALING_BACK]:
                ip = ip_of(state.address)
                nursery.start_soon(self._ask_dial_back, peer, ip, ip not in dialed)

    async def _ask_dial_back(self, peer: PeerId, ip: str, is_stranger: bool) -> None:
        port = self._host.door.port(ip)
        if port is None:
            return
        forwarded = self.forwarded
        if forwarded is not None and (":" in forwarded.ip) == (":" in ip):
            port, is_stranger = forwarded.port, True  # it comes in by a rule, not by what went out before
        with self._host.door.expect_knock() as (nonce, came):
            try:
                reach = client(ReachService, self._host.links.at(peer), timeout_s=CALL_S)
                seen = await reach.dial_back(DialBack(port, nonce, is_ipv6=":" in ip))
            except RemoteError as error:
                log.debug("%s does not dial back: %s", peer, error)
                return
            with trio.move_on_after(KNOCK_S):
                await came.wait()
            target = endpoint(seen.ip, port)
            if target is not None:
                arrived = came.is_set()
                self.handle(DialedBack(by=peer, observer_ip=ip, endpoint=target, arrived=arrived, stranger=is_stranger))

    async def _ask_tcp(self, observer: Observer) -> None:
        with trio.move_on_after(ANSWER_S):
            try:
                async with self._host.door.seen_by(observer.ip, observer.tcp_port) as (local, seen):
                    ends = endpoint(*local), endpoint(*seen)
            except OSError as error:
                log.debug("%s does not say how it sees this node: %s", observer.peer, error)
                return
            if ends[0] is not None and ends[1] is not None:
                self.handle(
                    Seen(protocol="tcp", by=observer.peer, observer_ip=observer.ip, local=ends[0], seen=ends[1])
                )

    async def _ask_udp(self, observers: list[Observer]) -> None:
        """One after the other, since what a NAT lets in depends on who was asked before."""
        if self._stun is None:
            return
        for number, observer in enumerate(observers):
            server = endpoint(observer.ip, observer.stun_port)
            if server is None:
                continue
            try:
                seen = await self._stun.ask(server)
                local = self._stun.local(server.family)
                if seen is None or local is None:
                    self.handle(Silent(by=observer.peer, observer_ip=observer.ip))
                    continue
                self.handle(Seen(protocol="udp", by=observer.peer, observer_ip=observer.ip, local=local, seen=seen))
                if number == 0:
                    strangers = [each for each in observers[1:] if self._stun.is_stranger(each.ip)]
                    for stranger in strangers[-1:]:
                        await self._ask_poke(self._stun, stranger, seen, PokeSource.STRANGER)
                    await self._ask_poke(self._stun, observer, seen, PokeSource.OTHER_PORT)
            except StunError as error:
                log.debug("asking %s by STUN: %s", observer.peer, error)

    async def _ask_poke(self, stun: Stun, observer: Observer, target: Endpoint, source: PokeSource) -> None:
        token = secrets.token_bytes(TOKEN_BYTES)
        with stun.expect(token, observer.ip) as arrival:
            try:
                request = Poke(target.port, token, source is PokeSource.OTHER_PORT, is_ipv6=":" in target.ip)
                await client(ReachService, self._host.links.at(observer.peer), timeout_s=CALL_S).poke(request)
            except RemoteError as error:
                log.debug("%s does not poke: %s", observer.peer, error)
                return
            arrived = await arrival.wait(POKE_S) is not None
        self.handle(Poked(by=observer.peer, observer_ip=observer.ip, source=source, target=target, arrived=arrived))


def _listened(address: str) -> tuple[str, int]:
    return ip_port(address) or ("", 0)
