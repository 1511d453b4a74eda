"""Waiting for a peer that is gone only because the relay in between is, so that calls to it need not fail.

When that is worth it, `shoal.node.mesh.connections` knows; here it is waited and dialed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakKeyDictionary

import trio

from shoal.node.mesh.connections import COME_BACK_S, Connections, Loss, PathsBroken
from shoal.node.mesh.dialing import Dialer
from shoal.node.mesh.libp2p_host import Libp2pHost
from shoal.protocol.ids import PeerId

COME_BACK_AGAIN_S: Final = 0.2


class Comebacks:
    """Of all peers.

    Args:
        addresses: gives those of a peer that may be dialed now.
    """

    def __init__(
        self,
        connections: Connections,
        libp2p: Libp2pHost,
        dialer: Dialer,
        addresses: Callable[[PeerId], Sequence[str]],
    ) -> None:
        self._connections = connections
        self._libp2p = libp2p
        self._dialer = dialer
        self._addresses = addresses
        self._dialing: WeakKeyDictionary[Loss, trio.Lock] = WeakKeyDictionary()

    def is_expected(self, peer: PeerId) -> bool:
        """Whether a peer is gone only because the relay in between is, so that it is worth waiting for."""
        state = self._connections.peers.get(peer)
        if state is not None:  # the news of the end may still be on its way
            if any(self._libp2p.is_open(path.id) for path in state.paths):
                return False
            self._connections.handle(PathsBroken(peer), trio.current_time())
        loss = self._connections.loss(peer)
        return loss is not None and self._may_come(loss)

    async def come_back(self, peer: PeerId, deadline: float) -> bool:
        """Reach such a peer again, in any way that there is; whether it is back by the deadline, in trio time."""
        loss = self._connections.loss(peer)
        if loss is not None:
            is_dialing = self._dialing.setdefault(loss, trio.Lock())
            with trio.move_on_at(min(deadline, loss.at + COME_BACK_S)):
                async with is_dialing:
                    while self._libp2p.is_alive(loss.relay):  # it may be about to end
                        if not self._may_come(loss):
                            return self._libp2p.is_alive(peer)
                        await trio.sleep(COME_BACK_AGAIN_S)
                    while not self._libp2p.is_alive(peer) and not await self._reach(peer):  # noqa: ASYNC110  it dials
                        await trio.sleep(COME_BACK_AGAIN_S)
        return self._libp2p.is_alive(peer)

    async def _reach(self, peer: PeerId) -> bool:
        return await self._dialer.reach(peer, self._addresses(peer))

    def _may_come(self, loss: Loss) -> bool:
        return loss.may_be_made_good(trio.current_time(), is_relay_there=self._libp2p.is_alive(loss.relay))
