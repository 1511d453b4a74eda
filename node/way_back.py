"""The way back into the mesh for a node that nobody dials: relays that it knew in earlier lives.

A relay is public, takes part in the DHT, and lends its line; whoever knows one finds all others. The addresses of a
few are kept, those known last first, and are dialed while nobody at all is connected.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from shoal.node.mesh.host import Host
from shoal.node.store.errors import StorageError
from shoal.node.store.remembered import MAX_RELAYS, Remembered
from shoal.protocol.errors import NoPeersError, UsageError

log = logging.getLogger(__name__)

SETTLE_S: Final = 1.0
"""So long others have to come by themselves, and news to gather."""
DIAL_AGAIN_MAX_S: Final = 60.0


async def keep_way_back(host: Host, remembered: Remembered) -> None:
    """For ever."""
    known = await trio.to_thread.run_sync(remembered.relays)
    kept = known
    wait_s = SETTLE_S
    while True:
        with trio.move_on_after(wait_s):
            await host.wait_for_change()
            await trio.sleep(SETTLE_S)
        if host.connected:
            wait_s = DIAL_AGAIN_MAX_S
            known = tuple(dict.fromkeys((*host.relays.values(), *known)))[:MAX_RELAYS]
            if set(known) != set(kept):
                try:
                    await trio.to_thread.run_sync(remembered.set_relays, known)
                    kept = known
                except StorageError as error:
                    log.warning("relays cannot be kept now: %s", error)
        else:
            wait_s = SETTLE_S if wait_s == DIAL_AGAIN_MAX_S else min(2 * wait_s, DIAL_AGAIN_MAX_S / 2)
            await _dial_any(host, known)


async def _dial_any(host: Host, addresses: Sequence[str]) -> None:
    """One after the other, until anybody is connected."""
    for address in addresses:
        if host.connected:
            return
        try:
            await host.connect([address], heard=True)
        except (NoPeersError, UsageError) as error:
            log.debug("a relay of an earlier life: %s", error)
