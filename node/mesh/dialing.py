"""Dialing a peer by all that is known of it at once: its addresses, and a little later circuits.

As "Happy Eyeballs" (RFC 8305) does with IP families: what answers first is kept, and a relay, which lends its line, is
troubled only where nothing direct answers soon. Many callers may want a peer that is gone; they share one attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from shoal.node.budgets import Dials
from shoal.node.mesh.addresses import CIRCUIT
from shoal.node.mesh.circuits import BROKEN
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 10.0
CIRCUIT_HEAD_START_S: Final = 0.3
"""How long the direct addresses of a peer are tried before a relay is troubled too."""
MAX_CIRCUITS_TRIED: Final = 4
"""Relays of this node's that are asked for a circuit to a peer that did not name them."""


def dialing_order(peer: PeerId, addresses: Sequence[str], relays: Mapping[PeerId, str]) -> list[tuple[str, float]]:
    """What to dial to reach a peer, each with the seconds to wait before.

    Args:
        peer: to reach.
        addresses: full multiaddrs of it.
        relays: connected ones, with an address of each: whoever relays for this node may relay for the peer too.
    """
    direct = [address for address in addresses if CIRCUIT not in address]
    circuits = [address for address in addresses if CIRCUIT in address]
    usable = [address for relay, address in relays.items() if relay != peer][:MAX_CIRCUITS_TRIED]
    circuits += [f"{address}{CIRCUIT}/p2p/{peer}" for address in usable]
    wait_s = CIRCUIT_HEAD_START_S if direct else 0.0
    return [(address, 0.0) for address in dict.fromkeys(direct)] + [
        (address, wait_s) for address in dict.fromkeys(circuits)
    ]


@dataclass(slots=True, eq=False)
class _SharedAttempt:
    """Addresses of a peer that are being dialed now; ``was_cut_short`` if whoever began it gave up."""

    addresses: frozenset[str]
    is_over: trio.Event = field(default_factory=trio.Event)
    was_cut_short: bool = True


class Dialer:
    """Reaches peers.

    Args:
        dial: opens a connection to a peer by one address; raises what `BROKEN` holds or a `ShoalError`.
        is_connected: whether any connection to a peer stands.
        relays: connected peers that relay, with an address of each.
        budget: of what is dialed at the word of others; whoever is there gives back what the try cost.
    """

    def __init__(
        self,
        dial: Callable[[PeerId, str], Awaitable[None]],
        is_connected: Callable[[PeerId], bool],
        relays: Mapping[PeerId, str],
        budget: Dials,
    ) -> None:
        self._dial = dial
        self._is_connected = is_connected
        self._relays = relays
        self._budget = budget
        self._attempts: dict[PeerId, _SharedAttempt] = {}  # as many as there are callers

    async def reach(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        """Dial a peer, unless others do so just now; whether a connection stands.

        What comes of one attempt holds for all whose addresses are in it.

        Args:
            peer: to reach.
            addresses: full multiaddrs of it.
        """
        wanted = frozenset(addresses)
        while (running := self._attempts.get(peer)) is not None:
            await running.is_over.wait()
            if self._is_connected(peer):
                return True
            if wanted <= running.addresses and not running.was_cut_short:
                return False
        attempt = self._attempts[peer] = _SharedAttempt(wanted)
        try:
            is_there = await self._dial_all(peer, addresses)
            attempt.was_cut_short = False
        finally:
            del self._attempts[peer]
            attempt.is_over.set()
        return is_there

    async def _dial_all(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        with trio.move_on_after(DIAL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for address, wait_s in dialing_order(peer, addresses, self._relays):
                    nursery.start_soon(self._dial_one_of_many, peer, address, wait_s, nursery.cancel_scope)
        return self._is_connected(peer)

    async def _dial_one_of_many(self, peer: PeerId, address: str, wait_s: float, others: trio.CancelScope) -> None:
        if wait_s:
            await trio.sleep(wait_s)
        try:
            await self._dial(peer, address)
        except (ShoalError, *BROKEN) as error:
            log.debug("dialing %s failed: %s", address, error)
        else:
            if CIRCUIT not in address:  # of those, not all were counted
                self._budget.give_back(peer, address)
            others.cancel()
