"""Addresses of peers, to reach them again. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shoal.protocol.ids import PeerId

MAX_KNOWN_PEERS: Final = 1024
MAX_KNOWN_ADDRESSES: Final = 16
"""Addresses kept of a peer."""


class AddressBook:
    """The addresses last learned of the peers last learned of."""

    def __init__(self) -> None:
        self._known: dict[PeerId, dict[str, None]] = {}  # addresses, newest last; the peer last learned of last

    def __len__(self) -> int:
        return len(self._known)

    def remember(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Keep full multiaddrs of a peer, the last of them as the newest."""
        known = self._known.pop(peer, {})
        for address in addresses:
            known.pop(address, None)
            known[address] = None
        while len(known) > MAX_KNOWN_ADDRESSES:
            del known[next(iter(known))]
        self._known[peer] = known
        while len(self._known) > MAX_KNOWN_PEERS:
            del self._known[next(iter(self._known))]

    def addresses(self, peer: PeerId) -> list[str]:
        """What is known of a peer, newest first."""
        return list(reversed(self._known.get(peer, {})))
