"""libp2p's Kademlia as this node uses it: finding peers by name, and who holds what.

What counts of the answers, and when to announce, is decided by `shoal.dht.providers`; what is kept for others, by
`shoal.node.mesh.provider_store`. Values, which libp2p's table keeps too, are none of this node's business: it takes
none. Streams of the table are read by few tasks at once, so a peer gets few of them, each for a while.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

import trio
from libp2p.abc import IHost, INetStream
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.dht.providers import (
    MAX_PROVIDERS,
    Announce,
    Announced,
    Announcer,
    PeerCame,
    ProviderRecord,
    Tick,
    Wake,
    providers_of,
)
from shoal.node.mesh.circuits import end_stream
from shoal.node.mesh.provider_store import BoundedProviders
from shoal.node.signals import Signal
from shoal.protocol.ids import Cid, PeerId

log = logging.getLogger(__name__)

ADD_AFTER_S: Final = (0.0, 0.5, 2.0)
"""Kademlia takes a peer once identify has told that it speaks Kademlia, which may take a round trip yet."""

STREAM_S: Final = 15.0
"""How long a peer's stream is read; whoever asks well opens one for each question."""
MAX_STREAMS: Final = 12
MAX_STREAMS_PER_PEER: Final = 3
MAX_STRANGERS_STREAMS: Final = 8
"""Of all peers together that this node does not want; the rest is for those that it wants."""


class Kademlia:
    """The distributed hash table. Made by `open_kademlia`."""

    def __init__(self, dht: KadDHT, me: PeerId, is_wanted: Callable[[PeerId], bool]) -> None:
        self.libp2p = dht
        self._me = me
        self._is_wanted = is_wanted
        self._streams: Counter[PeerId] = Counter()
        self.num_refused_streams = 0

    async def serve(self, stream: INetStream) -> None:
        """Answer what a peer asks by a stream."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        num_of_strangers = sum(num for each, num in self._streams.items() if not self._is_wanted(each))
        if (
            self._streams[peer] >= MAX_STREAMS_PER_PEER
            or self._streams.total() >= MAX_STREAMS
            or (num_of_strangers >= MAX_STRANGERS_STREAMS and not self._is_wanted(peer))
        ):
            self.num_refused_streams += 1
            await end_stream(stream)
            return
        self._streams[peer] += 1
        try:
            with trio.move_on_after(STREAM_S) as scope:
                await self.libp2p.handle_stream(stream)
            if scope.cancelled_caught:
                await end_stream(stream)
        finally:
            self._streams -= Counter([peer])

    async def add_peer(self, peer: PeerId) -> None:
        """Ask a connected peer from now on, if it takes part."""
        for wait_s in ADD_AFTER_S:
            await trio.sleep(wait_s)
            if await self.libp2p.add_peer(ID.from_base58(str(peer))):
                return

    async def find_peer(self, peer: PeerId) -> tuple[str, ...]:
        """The full multiaddrs of a peer; none if nobody knows any."""
        info = await self.libp2p.find_peer(ID.from_base58(str(peer)))
        if info is None:
            return ()
        return providers_of([ProviderRecord(str(peer), _texts(info.addrs))], self._me).get(peer, ())

    async def provide(self, cid: Cid) -> bool:
        """Announce that this node holds a CID; False if no other node took the record."""
        return await self.libp2p.provide(str(cid))

    async def find_providers(self, cid: Cid) -> dict[PeerId, tuple[str, ...]]:
        """The peers that are named as holders of a CID, each with its full multiaddrs."""
        infos = await self.libp2p.find_providers(str(cid), count=MAX_PROVIDERS)
        return providers_of((ProviderRecord(str(info.peer_id), _texts(info.addrs)) for info in infos), self._me)


@asynccontextmanager
async def open_kademlia(host: IHost, me: PeerId, is_wanted: Callable[[PeerId], bool]) -> AsyncIterator[Kademlia]:
    """Take part in the table inside the block, which must not raise: libp2p would lose the error."""
    nothing = NamespacedValidator({}, strict_validation=True)
    dht = KadDHT(host, DHTMode.SERVER, validator=nothing, validator_changed=True, strict_validation=True)
    dht.provider_store = BoundedProviders(host, dht.peer_routing)
    kademlia = Kademlia(dht, me, is_wanted)
    host.set_stream_handler(PROTOCOL_ID, kademlia.serve)
    async with background_trio_service(dht):
        yield kademlia


async def keep_announced(cid: Cid, provide: Callable[[Cid], Awaitable[bool]], peer_came: Signal) -> None:
    """Announce for ever that this node holds a CID, when `Announcer` says so.

    Args:
        cid: what is held.
        provide: announces it; whether another node took the record.
        peer_came: set when a peer is connected that was not before.
    """
    announcer = Announcer()
    event: PeerCame | Announced | Tick = Tick()
    while True:
        match announcer.handle(event, trio.current_time()):
            case Announce():
                event = Announced(is_taken=await _announce(cid, provide))
            case Wake(at):
                event = Tick()
                with trio.move_on_at(at):
                    await peer_came.wait()
                    event = PeerCame()


async def _announce(cid: Cid, provide: Callable[[Cid], Awaitable[bool]]) -> bool:
    try:
        return await provide(cid)
    except Exception as error:  # of libp2p, whose errors have no root of their own; the next try is due anyway
        log.info("announcing %s in the DHT failed: %s", cid, error)
        return False


def _texts(addresses: Iterable[Multiaddr]) -> list[str]:
    """Multiaddrs as text, but for those that are none: they came as bytes, and are read only here."""
    found = []
    for address in addresses:
        try:
            found.append(str(address))
        except ValueError as error:
            log.debug("a malformed address in the DHT: %s", error)
    return found
