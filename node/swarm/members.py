"""Which members to dial, where, and when again: those that are live, and those that were lost."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

import trio

from shoal.crdt.views import Documents, members
from shoal.node.mesh.host import Host
from shoal.protocol.errors import NoPeersError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS

log = logging.getLogger(__name__)

SMALL: Final = 32
"""Up to so many live members are all connected to each other."""
DIAL_INTERVAL_S: Final = 1.0
DIAL_AGAIN_MAX_S: Final = 60.0
MAX_ADDRESSES: Final = 16
MAX_ADDRESS_CHARS: Final = 512


@dataclass(slots=True)
class _Missed:
    """A member that should be connected and is not; in trio time."""

    next_at: float = 0.0
    num_tries: int = 0
    was_lost: bool = False


class Members:
    """Where members are reached, and the back-off of those that are not connected."""

    def __init__(self, swarm: SwarmId, own: PeerId, host: Host) -> None:
        self._swarm = swarm
        self._own = own
        self._host = host
        self._told: dict[PeerId, tuple[str, ...]] = {}
        self._missed: dict[PeerId, _Missed] = {}

    def told(self, peer: PeerId, facts: Mapping[str, Any]) -> None:
        """A member says where it is reached; what is not an address of its own is left out."""
        addresses = facts.get("addresses")
        found = [
            address
            for address in (addresses if isinstance(addresses, list) else [])[: 4 * MAX_ADDRESSES]
            if isinstance(address, str) and len(address) <= MAX_ADDRESS_CHARS and address.endswith(f"/p2p/{peer}")
        ]
        self._told.pop(peer, None)
        self._told[peer] = tuple(dict.fromkeys(found))[:MAX_ADDRESSES]
        while len(self._told) > MAX_MEMBERS:
            del self._told[next(iter(self._told))]

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """What it said."""
        return self._told.get(peer, ())

    @staticmethod
    def is_small(num_live: int) -> bool:
        """Whether a swarm of so many other live members is one in which all are connected."""
        return num_live <= SMALL

    def lost(self, peer: PeerId, now: float) -> None:
        """A connected member is gone; it is dialed again and again."""
        self._missed[peer] = _Missed(next_at=now, was_lost=True)
        while len(self._missed) > MAX_MEMBERS:
            self.forget(next(iter(self._missed)))

    def back(self, peer: PeerId) -> None:
        """It is connected."""
        self._missed.pop(peer, None)

    def forget(self, peer: PeerId) -> None:
        """It is not to be dialed any more, nor kept."""
        self._missed.pop(peer, None)
        self._host.unwant(peer, self._swarm)

    def forget_all(self) -> None:
        """The swarm is left."""
        for peer, reasons in list(self._host.wanted.items()):
            if self._swarm in reasons:
                self._host.unwant(peer, self._swarm)
        self._missed.clear()

    def due(
        self, live: Mapping[PeerId, object], contacts: AbstractSet[PeerId], documents: Documents, now: float
    ) -> list[PeerId]:
        """Whom to dial now; each is not due again before `tried`."""
        if self._missed:
            for peer, membership in members(documents).items():
                if membership.left and peer in self._missed:
                    self.forget(peer)
        if self.is_small(len(live)):
            for peer in live:
                if peer not in contacts and peer not in self._missed and len(self._missed) < 2 * MAX_MEMBERS:
                    self._missed[peer] = _Missed(next_at=now)
        for peer, missed in list(self._missed.items()):
            if peer not in live and not missed.was_lost and missed.next_at < math.inf:
                del self._missed[peer]
        if not self.is_small(len(live)) and contacts:
            return []  # gossip says whom it wants
        found = [peer for peer, missed in self._missed.items() if missed.next_at <= now and peer != self._own]
        for peer in found:
            self._missed[peer].next_at = math.inf
        return found

    def tried(self, peer: PeerId, now: float) -> None:
        """A try is over; the next comes after twice the wait, unless it is `back`."""
        missed = self._missed.get(peer)
        if missed is not None:
            missed.next_at = now + min(DIAL_INTERVAL_S * 2**missed.num_tries, DIAL_AGAIN_MAX_S)
            missed.num_tries += 1

    async def connect(self, peer: PeerId) -> bool:
        """Dial a member where it says that it is, and where it was before; whether it is connected."""
        if peer in self._host.connected:
            return True
        addresses = dict.fromkeys((*self.addresses(peer), *self._host.known_addresses(peer)))
        try:
            if addresses:
                await self._host.connect(list(addresses), heard=True)
        except (NoPeersError, UsageError) as error:
            log.debug("dialing a member failed: %s", error)
        return peer in self._host.connected

    async def wait(self) -> None:
        """Until it is worth asking who is `due`."""
        with trio.move_on_after(DIAL_INTERVAL_S):
            await self._host.wait_for_change()
