"""Who has a tree: connected peers are asked, and those that the distributed hash table names are connected to.

Whoever has said in the table that it holds something may have lied, or gone. So each is dialed within what is dialed at
the word of others, only where an address ends in its own name, a few at a time and only until enough have said by a
call that they have some of it. Whether they give it, shows when they are asked for blocks.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import trio

from shoal.dht.providers import ProviderRecord, providers_of
from shoal.dht.records import Kind
from shoal.node.mesh.host import Host
from shoal.node.supervise import open_plain_nursery
from shoal.node.wire.contracts import TreeAsked, TreeService
from shoal.protocol.errors import NoPeersError, ShoalError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import client

log = logging.getLogger(__name__)

ENOUGH: Final = 4
"""Peers that have it, beyond which nobody is connected to for it."""
MAX_AT_ONCE: Final = 8
MAX_TRIED: Final = 64
"""Peers that one look dials."""
CONNECT_S: Final = 5.0
"""To one of them: 64 that are nowhere take 40 s."""
HELD_S: Final = 4.0
"""To say whether it has it."""
FIND_S: Final = 10.0
SAY_S: Final = 15.0
MAX_SAID: Final = 128
"""Contents that this node says that it holds; the newest of more."""


class Holders:
    """Finds them, and says what this node holds."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._said: dict[Cid, None] = {}

    # --- what this node holds ---

    async def provide(self, cid: Cid) -> None:
        """Say that it is here, from now on; until others have taken that, or for a while."""
        self._note(cid)
        with trio.move_on_after(SAY_S):
            await self._host.table.provide(cid)

    def keep_saying(self, cids: Iterable[Cid]) -> None:
        """Say it of several, each when its turn comes."""
        for cid in cids:
            self._note(cid)
            self._host.table.keep_saying(Kind.PROVIDER, str(cid))

    def _note(self, cid: Cid) -> None:
        self._said.pop(cid, None)
        self._said[cid] = None
        while len(self._said) > MAX_SAID:
            self.withdraw(next(iter(self._said)))

    def withdraw(self, cid: Cid) -> None:
        """It is not here any more."""
        self._said.pop(cid, None)
        self._host.table.withdraw(Kind.PROVIDER, str(cid))

    # --- who else does ---

    async def named(self, cid: Cid) -> dict[PeerId, tuple[str, ...]]:
        """Those that say in the DHT that they hold it, with their full multiaddrs."""
        found: dict[PeerId, tuple[str, ...]] = {}
        with trio.move_on_after(FIND_S):
            found = await self._host.table.find(cid)
        return providers_of([ProviderRecord(str(peer), each) for peer, each in found.items()], self._host.peer_id)

    async def look(self, cid: Cid, tell: Callable[[PeerId], None]) -> None:
        """Tell of each connected peer that says that it has some; connect to others until `ENOUGH` do."""
        num_found = 0

        async def ask(peer: PeerId) -> None:
            nonlocal num_found
            try:
                await client(TreeService, self._host.at(peer), timeout_s=HELD_S).held(TreeAsked(cid))
            except ShoalError as error:
                log.debug("%s has nothing of %s: %s", peer, cid, error)
            else:
                num_found += 1
                tell(peer)

        async def reach(peer: PeerId, addresses: tuple[str, ...]) -> None:
            async with room:
                if num_found >= ENOUGH:
                    return
                with trio.move_on_after(CONNECT_S), suppress(NoPeersError, UsageError):
                    await self._host.connect(addresses, heard=True)
                if peer in self._host.connected:
                    await ask(peer)

        room = trio.CapacityLimiter(MAX_AT_ONCE)
        connected = set(self._host.connected)
        async with open_plain_nursery() as nursery:
            for peer in connected:
                nursery.start_soon(ask, peer)
            others = [each for each in (await self.named(cid)).items() if each[0] not in connected]
            random.SystemRandom().shuffle(others)  # so that no order of names puts somebody first
            for peer, addresses in others[:MAX_TRIED]:
                nursery.start_soon(reach, peer, addresses)
