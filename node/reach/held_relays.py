"""The relays that this node is reached through: it holds reservations on two in different networks, and replaces them.

Asked are the near and the idle first, found among the peers and in the DHT. Who relays, how busy it is and at which
addresses, it says itself when it introduces itself. What a reservation is: `shoal.node.mesh.relay`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from shoal.node.mesh.addresses import CIRCUIT, dialable, full_address, ip_of, network_of
from shoal.node.mesh.circuits import RelayError
from shoal.node.mesh.host import Connected, Host
from shoal.node.signals import Signal
from shoal.node.supervise import Policy
from shoal.node.wire.contracts import Introduction
from shoal.protocol.errors import NoPeersError, UsageError
from shoal.protocol.ids import Cid, PeerId

log = logging.getLogger(__name__)

NUM_RELAYS: Final = 2
RELAY_CID: Final = Cid.of_block(b"shoal: nodes that relay, 1")
"""What relays announce in the DHT that they provide."""
FIND_RELAYS_S: Final = 15.0
FIND_RELAYS_MAX_S: Final = 120.0
"""Between two looks into the DHT: four times as long after each one, for it asks every peer; and short again once peers
came or went, or a relay was lost."""
REFUSED_S: Final = 60.0
"""How long a relay that refused is not asked again."""


@dataclass(slots=True)
class _Held:
    """A relay that this node is reached through; ``renew_at`` in trio time."""

    addresses: tuple[str, ...]
    renew_at: float


class HeldRelays:
    """Those held now.

    Args:
        host: reaches relays, and asks them.
        introduced: what each peer said of itself.
        news: set when something has changed that relays are chosen by; set here when those held have changed.
        addresses_changed: called when this node is reached by other circuits than before.
    """

    def __init__(
        self,
        host: Host,
        introduced: Mapping[PeerId, Introduction],
        news: Signal,
        addresses_changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._introduced = introduced
        self._news = news
        self._addresses_changed = addresses_changed
        self._held: dict[PeerId, _Held] = {}
        self._refused: dict[PeerId, float] = {}
        self._look_again_s = FIND_RELAYS_S
        self._looked_among: frozenset[PeerId] = frozenset()

    def names(self) -> list[PeerId]:
        """The relays."""
        return list(self._held)

    def circuits(self) -> list[str]:
        """By which multiaddrs others reach this node through them."""
        return [
            f"{address}{CIRCUIT}/p2p/{self._host.peer_id}" for held in self._held.values() for address in held.addresses
        ]

    def peer_down(self, peer: PeerId) -> None:
        """A peer has no connection any more."""
        if self._held.pop(peer, None) is not None:
            self._host.unwant(peer, "relay")
            self._addresses_changed()

    async def run(self, are_needed: Callable[[], bool]) -> None:
        """Hold reservations for as long as they are needed; until cancelled."""
        looked_at = -math.inf
        while True:
            now = trio.current_time()
            if not are_needed():
                self._let_all_go()
            else:
                for peer in [peer for peer, held in self._held.items() if held.renew_at <= now]:
                    await self._reserve(peer)
                while (best := self._best()) is not None:
                    await self._reserve(best)
                if len(self._held) < NUM_RELAYS and self._host.connected and self._is_time(now - looked_at):
                    looked_at = now
                    self._host.spawn("finding relays", self._find, policy=Policy.DROP)
            renew_s = min((held.renew_at - now for held in self._held.values()), default=FIND_RELAYS_S)
            with trio.move_on_after(max(0.1, min(renew_s, FIND_RELAYS_S))):
                await self._news.wait()

    def _is_time(self, since_s: float) -> bool:
        """Whether to look into the DHT, so long after the last look."""
        peers = frozenset(self._host.connected)
        if peers != self._looked_among:
            self._look_again_s = FIND_RELAYS_S
        if since_s <= self._look_again_s:
            return False
        self._looked_among = peers
        self._look_again_s = min(4 * self._look_again_s, FIND_RELAYS_MAX_S)
        return True

    def _let_all_go(self) -> None:
        for peer in self._held:
            self._host.unwant(peer, "relay")
        if self._held:
            self._held = {}
            self._addresses_changed()

    def _best(self) -> PeerId | None:
        """The relay to ask next: the nearest and most idle, in another network than those held.

        If none of those held listens on port 443, the one way out of the strictest networks, one that does is held too.
        """
        now = trio.current_time()
        held = [address for each in self._held.values() for address in each.addresses]
        must_be_open = len(self._held) >= NUM_RELAYS
        if must_be_open and any(map(_is_at_443, held)):
            return None
        networks = {network_of(ip_of(address)) for address in held}
        scored = []
        for peer in self._host.relays:
            state, introduction = self._host.connected.get(peer), self._introduced.get(peer)
            if state is None or introduction is None or peer in self._held or self._refused.get(peer, 0) > now:
                continue
            addresses = relay_addresses(peer, introduction, state)
            is_near = any(network_of(ip_of(address)) in networks for address in addresses)
            if must_be_open and not any(map(_is_at_443, addresses)):
                continue
            rtt_ms = 1000.0 if state.rtt_ms is None else state.rtt_ms
            scored.append((is_near, rtt_ms * (1 + 4 * introduction.load), peer))
        return min(scored)[2] if scored else None

    async def _reserve(self, peer: PeerId) -> None:
        try:
            reservation = await self._host.relay.reserve(peer)
        except RelayError as error:
            log.info("no reservation: %s", error)
            self._refused = {each: at for each, at in self._refused.items() if at > trio.current_time()}
            self._refused[peer] = trio.current_time() + REFUSED_S
            if self._held.pop(peer, None) is not None:
                self._host.unwant(peer, "relay")
                self._addresses_changed()
                self._news.set()
            return
        state, introduction = self._host.connected.get(peer), self._introduced.get(peer)
        if state is None or introduction is None:
            return
        is_new = peer not in self._held
        addresses = relay_addresses(peer, introduction, state)
        self._held[peer] = _Held(addresses, trio.current_time() + max(5.0, reservation.expires_s * 2 / 3))
        self._host.want(peer, "relay")
        if is_new:
            log.info("others reach this node through %s", peer)
            self._addresses_changed()
            self._news.set()

    async def _find(self) -> None:
        for addresses in await self._host.find_providers(RELAY_CID):
            peer = PeerId(addresses[0].rpartition("/p2p/")[2])
            if peer in self._host.connected or len(self._host.relays) >= 2 * NUM_RELAYS:
                continue
            try:
                await self._host.connect([address for address in addresses if CIRCUIT not in address], heard=True)
            except (NoPeersError, UsageError, IndexError) as error:
                log.debug("a relay of the DHT: %s", error)


def _is_at_443(address: str) -> bool:
    return "/tcp/443/" in address


def relay_addresses(peer: PeerId, introduction: Introduction, state: Connected) -> tuple[str, ...]:
    """By which addresses others should dial a relay: one of each IP family, and one on port 443."""
    found = [*dialable(introduction.addresses), *dialable(filter(_is_at_443, introduction.addresses))]
    return tuple(dict.fromkeys(found)) or (full_address(state.address, peer),)
