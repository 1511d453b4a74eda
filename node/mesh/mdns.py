"""Finding nodes on the local network, and being found there, by libp2p's mDNS discovery."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import Any, Protocol

import trio
from libp2p.abc import IHost
from libp2p.discovery.events.peerDiscovery import peerDiscovery
from libp2p.discovery.mdns.mdns import MDNSDiscovery
from libp2p.peer.peerinfo import PeerInfo

from shoal.node.mesh.addresses import ip_of, ip_port, is_loopback
from shoal.node.supervise import Policy
from shoal.protocol.errors import NoPeersError, UsageError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)


class Neighbour(Protocol):
    """What finding others on the local network needs of the host."""

    @property
    def peer_id(self) -> PeerId:
        """Its name."""

    @property
    def libp2p(self) -> IHost:
        """Libp2p's own host."""

    @property
    def connected(self) -> Container[PeerId]:
        """Who is connected."""

    def own_addresses(self) -> Sequence[str]:
        """The full multiaddrs of this node's own interfaces, at which it listens."""

    def spawn(self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any, policy: Policy) -> None:
        """Run a task for as long as the host stands."""

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        """Connect to the one peer that these full multiaddrs name."""


async def run_mdns(host: Neighbour) -> None:
    """Until cancelled."""
    token = trio.lowlevel.current_trio_token()
    # Its own choice would be the listen addresses as they are, and nobody can dial 0.0.0.0.
    addresses = [address for address in host.own_addresses() if not is_loopback(ip_of(address))]
    ends = [end for end in map(ip_port, addresses) if end is not None]
    if not ends:
        log.info("mDNS is off: this node listens on loopback alone")
        return

    def meet(info: PeerInfo) -> None:
        host.spawn("meeting a neighbour on the LAN", found_on_lan, host, info, policy=Policy.DROP)

    def discovered(info: PeerInfo) -> None:
        token.run_sync_soon(meet, info)

    try:
        # Zeroconf probes the network for a second, blocking, when it starts.
        discovery = await trio.to_thread.run_sync(
            lambda: MDNSDiscovery(host.libp2p.get_network(), port=ends[0][1], listen_addrs=addresses)
        )
    except OSError as error:
        log.warning("mDNS is off: %s", error)
        return
    peerDiscovery.register_peer_discovered_handler(discovered)
    try:
        await trio.to_thread.run_sync(discovery.broadcaster.register)
        await trio.sleep_forever()
    finally:
        peerDiscovery.unregister_peer_discovered_handler(discovered)
        with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
            await trio.to_thread.run_sync(discovery.zeroconf.close)


async def found_on_lan(host: Neighbour, info: PeerInfo) -> None:
    """Connect to what announces itself; anything may call itself libp2p there."""
    try:
        peer = PeerId.parse(str(info.peer_id))
        if peer in host.connected or peer == host.peer_id:
            return
        await host.connect([f"{address}/p2p/{peer}" for address in info.addrs])
        log.info("found %s on the local network", peer)
    except (NoPeersError, UsageError) as error:
        log.info("mDNS: %s", error)
