"""What this node keeps for the DHT of who holds what, within bounds, and whom it asks in a look-up of its own.

libp2p's own store keeps whatever comes for 48 hours, and answers a look-up of this node's with what it holds itself,
so that one made-up record hides every true one for as long. Here a record costs at most `MAX_ADDRESSES` addresses of
`MAX_ADDRESS_BYTES`, lives for `RECORD_S`, and names a peer as nodes are named (Ed25519). If the store is full, the
peer that has most records in it loses its oldest: filling it takes very many names. A look-up asks the others whatever
is held here, and keeps nothing of their answers.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.common import ALPHA, BUCKET_SIZE, QUERY_TIMEOUT
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

RECORD_S: Final = 3600.0
MAX_RECORDS: Final = 4096
MAX_RECORDS_OF_ONE_PEER: Final = 128
MAX_ADDRESSES: Final = 8
MAX_ADDRESS_BYTES: Final = 128
MAX_ASKED: Final = 32
"""Peers that one look-up asks, so that none leads it around for ever."""


@dataclass(frozen=True, slots=True)
class _Record:
    addresses: tuple[bytes, ...]
    kept_at: float


class BoundedProviders(ProviderStore):
    """In the place of libp2p's.

    Attributes:
        num_refused: records that were not taken.
        num_evicted: records that made room for others.
    """

    def __init__(self, host: IHost, peer_routing: Any) -> None:
        super().__init__(host, peer_routing)
        self.num_refused = 0
        self.num_evicted = 0
        self._records: dict[tuple[bytes, ID], _Record] = {}  # the oldest first
        self._of_key: dict[bytes, set[ID]] = {}
        self._num_of: Counter[ID] = Counter()

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Keep a record, if it is one that a node can have sent."""
        name = provider.peer_id
        addresses = tuple(raw for each in provider.addrs if len(raw := each.to_bytes()) <= MAX_ADDRESS_BYTES)
        if not addresses or not _is_node(name):
            self.num_refused += 1
            return
        self.cleanup_expired()
        self._drop((key, name))
        if len(self._of_key.get(key, ())) >= BUCKET_SIZE:
            self.num_refused += 1
            return
        if self._num_of[name] >= MAX_RECORDS_OF_ONE_PEER:
            self._evict(name)
        if len(self._records) >= MAX_RECORDS:
            self._evict(self._num_of.most_common(1)[0][0])
        self._records[key, name] = _Record(addresses[:MAX_ADDRESSES], time.monotonic())
        self._of_key.setdefault(key, set()).add(name)
        self._num_of[name] += 1

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """What is kept for a key."""
        self.cleanup_expired()
        return [
            PeerInfo(name, [Multiaddr(raw) for raw in self._records[key, name].addresses])
            for name in self._of_key.get(key, ())
        ]

    async def find_providers(self, key: bytes, count: int = BUCKET_SIZE) -> list[PeerInfo]:
        """Who holds something, as those say who are nearest to it in the DHT; and then as this node was told."""
        found: list[PeerInfo] = []
        asked = {self.local_peer_id}
        nearest = list(await self.peer_routing.find_closest_peers_network(key))

        async def ask(peer: ID) -> None:
            with trio.move_on_after(QUERY_TIMEOUT):
                providers, closer = await self._get_providers_from_peer_with_closers(peer, key)
                found.extend(providers[:BUCKET_SIZE])
                nearest.extend(each for each in closer[:BUCKET_SIZE] if _is_node(each))

        while len(asked) <= MAX_ASKED and len(found) < count:
            left = sort_peer_ids_by_distance(key, list({each for each in nearest if each not in asked}))
            if not left:
                break
            async with trio.open_nursery() as nursery:
                for peer in left[:ALPHA]:
                    asked.add(peer)
                    nursery.start_soon(ask, peer)
        return (found + self.get_providers(key))[:count]

    def cleanup_expired(self) -> None:
        """Forget what is too old."""
        too_old = time.monotonic() - RECORD_S
        while self._records:
            place = next(iter(self._records))
            if self._records[place].kept_at > too_old:
                return
            self._drop(place)

    def size(self) -> int:
        """Records that are kept."""
        return len(self._records)

    def _evict(self, name: ID) -> None:
        self.num_evicted += 1
        self._drop(next(place for place in self._records if place[1] == name))

    def _drop(self, place: tuple[bytes, ID]) -> None:
        if self._records.pop(place, None) is None:
            return
        key, name = place
        self._of_key[key].discard(name)
        if not self._of_key[key]:
            del self._of_key[key]
        self._num_of[name] -= 1
        if not self._num_of[name]:
            del self._num_of[name]


def _is_node(name: ID) -> bool:
    try:
        PeerId.parse(str(name))
    except UsageError:
        return False
    return True
