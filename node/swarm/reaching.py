"""Being connected to the members of a swarm: dialing them, finding them after a restart, keeping where they are.

The shell of `shoal.node.swarm.members`, which says whom to dial where and when. Here are the dialing itself, the
look-ups in the DHT while no member is connected, and the disk: where members were reached last is kept, so that a swarm
in which all had stopped comes together again without anybody who never stops.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

import trio

from shoal.node.mesh.host import Host
from shoal.node.signals import Signal, about
from shoal.node.store.database import Storage
from shoal.node.store.errors import StorageError
from shoal.node.supervise import Domain, Policy
from shoal.node.swarm import members as core
from shoal.protocol.errors import NoPeersError, UsageError
from shoal.protocol.ids import PeerId, SwarmId

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
LOOK_UP_S: Final = 1.0
LOOK_UP_MAX_S: Final = 60.0
"""Between two look-ups in the DHT, while no member is connected."""
KEEP_S: Final = 5.0
"""Between two writes of where members are."""


@dataclass(frozen=True, slots=True)
class Company:
    """What the rest of the swarm's state says of its members, each time it is asked, and where tasks run.

    Attributes:
        domain: of the tasks.
        live: of whom something was heard lately.
        contacts: members that are connected.
        left: who said in its document that it left.
        sync: finds out whether somebody who was reached is a member, and catches up with it; does not raise.
    """

    domain: Domain
    live: Callable[[], AbstractSet[PeerId]]
    contacts: Callable[[], AbstractSet[PeerId]]
    left: Callable[[], AbstractSet[PeerId]]
    sync: Callable[[PeerId], Awaitable[None]]


class Reaching:
    """For one swarm."""

    def __init__(self, swarm: SwarmId, own: PeerId, host: Host, storage: Storage, known: Sequence[str] = ()) -> None:
        """Begin with what an earlier life or a ticket knows.

        Args:
            swarm: whose members are reached.
            own: this node.
            host: dials.
            storage: keeps where members are; the swarm was added to it.
            known: full multiaddrs of members, the newest first.
        """
        self._swarm = swarm
        self._host = host
        self._storage = storage
        self._core = core.Members(own)
        self._kept: tuple[str, ...] = tuple(known)
        self._changed = Signal()
        self.tell(core.Known(tuple(known)))

    def begin(self, company: Company) -> None:
        """Reach members from now on."""
        domain = company.domain
        domain.start_soon("dialing members", self._dial_loop, company, policy=Policy.RESTART)
        domain.start_soon("looking for members", self._look_up_loop, company, policy=Policy.RESTART)
        domain.start_soon("keeping where members are", self._keep_loop, policy=Policy.RESTART)

    def tell(self, event: core.Told | core.Known | core.Back | core.Lost | core.Left) -> None:
        """Something is known of a member."""
        self._core.handle(event, trio.current_time())
        self._changed.set()

    def told(self, peer: PeerId, facts: Mapping[str, Any], carrier: PeerId) -> None:
        """A member signed where it is reached, and a peer passed that on."""
        self.tell(core.Told(peer, facts.get("addresses"), carrier))

    def look_for(self, addresses: Sequence[str]) -> None:
        """Somebody says that members are to be found there: full multiaddrs."""
        self.tell(core.Known(tuple(addresses)))

    def back(self, peer: PeerId) -> None:
        """A member is connected."""
        state = self._host.connected.get(peer)
        if state is not None:
            self.tell(core.Back(peer, state.address, state.outbound))

    def lost(self, peer: PeerId) -> None:
        """A member is gone; it is dialed again and again."""
        self.tell(core.Lost(peer))

    def forget(self, peer: PeerId) -> None:
        """It is not to be dialed any more, nor kept."""
        self.tell(core.Left(peer))
        self._host.unwant(peer, self._swarm)

    def end(self) -> None:
        """The swarm is left, or ends."""
        for peer, reasons in list(self._host.wanted.items()):
            if self._swarm in reasons:
                self._host.unwant(peer, self._swarm)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a member is reached, the best first."""
        return self._core.addresses(peer)

    def worth_keeping(self) -> tuple[str, ...]:
        """Full multiaddrs by which members are found, those connected last first."""
        return self._core.worth_keeping()

    @property
    def counters(self) -> core.MembersStatistics:
        """What was left out."""
        return self._core.counters

    async def connect(self, peer: PeerId, addresses: Sequence[str] = ()) -> bool:
        """Dial a member by these, or else by all that it said; whether it is connected."""
        if peer in self._host.connected:
            return True
        addresses = addresses or self.addresses(peer)[: core.MAX_DIALED]
        try:
            if addresses:
                await self._host.connect(list(addresses), heard=True)
        except (NoPeersError, UsageError) as error:
            log.debug("dialing a member failed: %s", error)
        return peer in self._host.connected

    async def _dial_loop(self, company: Company) -> None:
        """Be connected to every live member of a small swarm, and to those that were lost."""

        async def dial(output: core.Dial) -> None:
            try:
                if await self.connect(output.peer, output.addresses) and output.peer not in company.contacts():
                    await company.sync(output.peer)
            finally:  # the core waits for the outcome, whatever it is
                self._core.handle(core.Tried(output.peer), trio.current_time())

        while True:
            if self._core.sought:
                for peer in company.left() & set(self._core.sought):
                    self.forget(peer)
            look = core.Look(company.live(), company.contacts(), self._host.addresses())
            for output in self._core.handle(look, trio.current_time()):
                company.domain.start_soon("reaching a member", dial, output, policy=Policy.DROP)
            with trio.move_on_at(about(LOOK_S)):
                await self._host.wait_for_change()

    async def _look_up_loop(self, company: Company) -> None:
        """Ask the DHT for members while none is connected."""
        wait_s = LOOK_UP_S
        while True:
            while company.contacts():
                wait_s = LOOK_UP_S
                await self._changed.wait()  # as when one is lost
            await trio.sleep(wait_s)
            if self._host.connected and not company.contacts():
                wait_s = min(2 * wait_s, LOOK_UP_MAX_S)
                for addresses in await self._host.find_providers(self._swarm):
                    self.tell(core.Known(tuple(addresses)))

    async def _keep_loop(self) -> None:
        while True:
            found = self.worth_keeping()
            if found and found != self._kept:
                try:
                    await trio.to_thread.run_sync(self._storage.set_addresses, self._swarm, found)
                    self._kept = found
                except StorageError as error:
                    log.warning("where members of %s are cannot be kept now: %s", self._swarm, error)
            await trio.sleep(KEEP_S if self._kept else LOOK_S)
            if self.worth_keeping() == self._kept:
                await self._changed.wait()
