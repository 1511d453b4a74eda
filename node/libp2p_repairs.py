"""Repairs of the libp2p package, each with its upstream symptom, kept in one place.

They are made for one version of the package and refuse to touch another, so that an upgrade has to look at them.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from typing import Final

import libp2p.network.swarm
import trio
from libp2p.abc import IHost
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.stream_muxer.yamux.yamux import YamuxStream
from multiaddr import Multiaddr

log = logging.getLogger(__name__)

REPAIRED_VERSION: Final = "0.8.1"


def apply_repairs() -> None:
    """Repair the installed libp2p; does nothing, and says so, if its version is another than `REPAIRED_VERSION`."""
    version = importlib.metadata.version("libp2p")
    if version != REPAIRED_VERSION:
        log.warning("libp2p is %s, not %s: its repairs are left out", version, REPAIRED_VERSION)
        return
    _dial_without_waiting_for_the_race()
    _hold_peers_to_their_windows()
    _see_ipv6_addresses()
    _dial_nobody_unasked()


def _dial_without_waiting_for_the_race() -> None:
    # Symptom: every successful dial takes 250 ms longer than it must. The event that ends the happy-eyeballs wait
    # (RFC 8305) is only set when an attempt fails.
    libp2p.network.swarm._HAPPY_EYEBALLS_DELAY = 0.0


def announce_as_told(host: IHost, addresses: Callable[[], Iterable[str]]) -> None:
    """Let a host announce these full multiaddrs, as they are.

    Symptom: an address listened on as 0.0.0.0 is announced as that, and a circuit's address (``RELAY/p2p-circuit``)
    loses its circuit on the way through `get_addrs`, which leaves the relay's address with this node's name on it.
    """
    host.get_addrs = lambda: [Multiaddr(address) for address in addresses()]  # type: ignore[method-assign]


def _see_ipv6_addresses() -> None:
    # Symptom: a connection over IPv6 has no remote address, so identify tells the peer none, and nothing knows how it
    # is reached. The socket names an IPv6 peer with four values, and only two are taken for an address.
    def get_remote_address(stream: TrioTCPStream) -> tuple[str, int] | None:
        if stream._cached_remote_address is None:
            try:
                ip, port = stream.stream.socket.getpeername()[:2]
            except OSError:
                return None
            stream._cached_remote_address = (str(ip).removeprefix("::ffff:"), int(port))
        return stream._cached_remote_address

    TrioTCPStream.get_remote_address = get_remote_address  # type: ignore[method-assign,assignment]


def _dial_nobody_unasked() -> None:
    # Symptom: whenever a peer goes, the swarm dials others that it once heard of, up to 150 of them.
    async def maybe_connect(connector: AutoConnector) -> None:
        pass

    AutoConnector.maybe_connect = maybe_connect  # type: ignore[method-assign,assignment]


class _WindowExceededError(trio.TooSlowError):
    """A peer sent more than it was allowed to; of the class at which libp2p's muxer closes a connection."""


def _hold_peers_to_their_windows() -> None:
    # Symptom: a peer that ignores yamux's flow control fills the memory of this node by a stream that is not read as
    # fast: the muxer logs "peer exceeded receive window", for each frame anew, and keeps the bytes.
    def set_window(stream: YamuxStream, num_bytes: int) -> None:
        if num_bytes < 0:
            log.warning("%s sends more than it may; its connection is closed", stream.conn.peer_id)
            raise _WindowExceededError
        vars(stream)["recv_window"] = num_bytes

    window = property(lambda stream: vars(stream)["recv_window"], set_window)
    YamuxStream.recv_window = window  # type: ignore[assignment]  # an attribute of each stream, seen by this from now on
