"""Measuring round trips, and closing a path on which two calls in a row stay without answer.

If nothing came by any path of a peer meanwhile, its other paths have one call each to answer: most likely they are as
dead as the one that was closed, and only when the last of them is closed is the peer dialed anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from shoal.node.mesh.connections import Connections, Measured, PathId
from shoal.node.wire.contracts import NodeService
from shoal.node.wire.links import Links
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty, client

log = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_S: Final = 5.0
KEEPALIVE_TIMEOUT_S: Final = 5.0
SOON_S: Final = 0.5
"""Until the next call where nothing is measured yet, or the last stayed unanswered."""
MAX_MISSES: Final = 2


async def keep_alive(
    peer: PeerId, connections: Connections, links: Links, close_soon: Callable[[PathId], None]
) -> None:
    """For as long as a peer stays connected.

    Args:
        peer: who is called.
        connections: told of each round trip.
        links: carry the calls.
        close_soon: has a path closed by somebody else, since this task ends with the last path.
    """
    misses, allowed = 0, MAX_MISSES
    ping = client(NodeService, links.at(peer), timeout_s=KEEPALIVE_TIMEOUT_S).ping
    state = connections.peers.get(peer)
    while state is not None and connections.peers.get(peer) is state:
        started, path = trio.current_time(), state.best
        try:
            await ping(Empty())
            if connections.peers.get(peer) is state:
                rtt_ms = (trio.current_time() - started) * 1000
                connections.handle(Measured(peer, rtt_ms), trio.current_time())
            misses, allowed = 0, MAX_MISSES
        except RemoteError as error:
            if error.status is Status.UNIMPLEMENTED:
                return  # a libp2p node of another kind
            is_silent = error.status in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
            # A refusal is a sign of life, and so is whatever else came or is still being taken.
            if is_silent and not links.is_moving(peer, started):
                misses += 1
            else:
                misses, allowed = 0, MAX_MISSES
        if path is not state.best:
            misses = 0  # another path has its own calls
        if misses >= allowed and connections.peers.get(peer) is state:
            log.info("%s does not answer; closing the path (%s)", peer, path.kind)
            close_soon(path.id)
            misses, allowed = 0, 1
        is_settled = state.rtt_ms is not None and not misses and allowed == MAX_MISSES
        await trio.sleep(KEEPALIVE_INTERVAL_S if is_settled else SOON_S)
