"""The shell of `shoal.crdt.gossip` in one swarm: what it wants told, waits for its peer, and it is woken in time."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet

import trio

from shoal.crdt.gossip import Gossip, GossipStatistics
from shoal.crdt.gossip_messages import (
    ContactDown,
    ContactUp,
    Dial,
    Event,
    Item,
    ItemId,
    Published,
    Push,
    Pushed,
    Tell,
    Tick,
    Wake,
)
from shoal.node.supervise import Domain, Policy
from shoal.node.swarm.telling import Telling
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signed


class Gossiping:
    """Of one node in one swarm."""

    def __init__(
        self,
        own: PeerId,
        rng: random.Random,
        met: Telling,
        contacts: AbstractSet[PeerId],
        domain: Domain,
        *,
        find_op: Callable[[ItemId], Signed | None],
        reach: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        """Begin.

        Args:
            own: this node.
            rng: for what gossip picks.
            met: tells peers.
            contacts: members that are connected; a view that stays up to date.
            domain: of the tasks.
            find_op: an op by its name, if it is one and recent.
            reach: makes a member a contact, if it can.
        """
        self._core = Gossip(own, rng)
        self._met = met
        self._contacts = contacts
        self._domain = domain
        self._find_op = find_op
        self._reach = reach
        self._tick_at = math.inf
        self._sleep = trio.CancelScope()

    def statistics(self) -> GossipStatistics:
        """Counters."""
        return self._core.statistics()

    def came(self, source: PeerId, fresh: Sequence[Item], known: Sequence[ItemId]) -> None:
        """A peer sent these: what is news, and by name what was known."""
        if source in self._contacts:
            if fresh or known:
                self.handle(Pushed(source, tuple(fresh), tuple(known)))
        elif fresh:
            self.handle(Published(tuple(fresh)))

    def handle(self, event: Event) -> None:
        """Tell it of an event, and do what it wants."""
        for output in self._core.handle(event, trio.current_time()):
            match output:
                case Push(peer, ids):
                    ops = {name: op for name in ids if (op := self._find_op(name)) is not None}
                    records = [name for name in ids if name not in ops]
                    self._met.tell(peer, records=records, ops=list(ops.items()))
                case Tell(peer, message):
                    self._met.tell(peer, controls=[message])
                case Dial(peer):
                    self._domain.start_soon("reaching a neighbour", self._dial, peer, policy=Policy.DROP)
                case Wake(at):
                    self._tick_at = self._sleep.deadline = at

    async def _dial(self, peer: PeerId) -> None:
        try:
            await self._reach(peer)
        finally:  # gossip waits for the outcome, whatever it is
            self.handle(ContactUp(peer) if peer in self._contacts else ContactDown(peer))

    async def keep_time(self) -> None:
        """Wake it when it wants to be, for ever."""
        while True:
            with trio.CancelScope(deadline=self._tick_at) as self._sleep:
                await trio.sleep(math.inf)
            self._tick_at = math.inf
            self.handle(Tick())
