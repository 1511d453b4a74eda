"""Whom this node has met in a swarm, and the calls by which each is told what waits for it.

A peer that is met is asked at first what it lacks of who is there, and given that. Its answers to gossip say nothing
but that it took it, so they may come late (`shoal.protocol.services.Method`), and the next call does not wait for them.
A call that fails is tried again; who takes none is given up, and is met again when it answers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

import trio

from shoal.crdt.gossip_messages import Control, ItemId
from shoal.crdt.meeting import BUCKET_BYTES, lacking, summary
from shoal.crdt.presence import PresenceTable
from shoal.node.mesh.host import Host
from shoal.node.supervise import Domain, Policy, open_plain_nursery
from shoal.node.swarm.counters import ReplicaStatistics
from shoal.node.swarm.waiting import Waiting, in_parts
from shoal.node.wire.contracts import GossipPush, PresenceSummary, SwarmService
from shoal.protocol.errors import ProtocolError, RemoteError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import client
from shoal.protocol.signing import Signed

log = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 5.0
PUSH_TRIES: Final = 3
MAX_UNANSWERED: Final = 8
"""Pushes to one peer that are under way; what comes then goes into the next, together."""
PUSH_AGAIN_S: Final = 0.2

_Answer = TypeVar("_Answer")


class Telling:
    """The peers of one swarm that were met, each with what waits for it."""

    def __init__(
        self,
        swarm: SwarmId,
        host: Host,
        presence: PresenceTable,
        counters: ReplicaStatistics,
        *,
        on_left: Callable[[PeerId], None],
        on_lost: Callable[[PeerId], None],
        on_refused: Callable[[PeerId, str], None],
    ) -> None:
        """Begin with nobody.

        Args:
            swarm: what it is about.
            host: carries the calls.
            presence: what is known of who is there.
            counters: of what goes wrong.
            on_left: told of a peer that says that it is not in the swarm.
            on_lost: told of a peer that takes nothing any more; it is not met any more then.
            on_refused: told of a peer that says what cannot be, and why.
        """
        self._swarm = swarm
        self._host = host
        self._presence = presence
        self._counters = counters
        self._on_left = on_left
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._met: dict[PeerId, Waiting] = {}

    def __contains__(self, peer: PeerId) -> bool:
        """Whether it was met."""
        return peer in self._met

    def __iter__(self) -> Iterator[PeerId]:
        """Over those who were met."""
        return iter(self._met)

    def service_of(self, peer: PeerId) -> SwarmService:
        """To call it."""
        return client(SwarmService, self._host.at(peer), timeout_s=CALL_TIMEOUT_S)

    def meet(self, peer: PeerId, domain: Domain) -> None:
        """Tell it all from now on; ``domain`` is where what fails with it ends. It was not met before."""
        waiting = self._met[peer] = Waiting()
        domain.start_soon("pushing to a peer", self._push_loop, peer, waiting, policy=Policy.RESTART)

    def unmeet(self, peer: PeerId) -> None:
        """Tell it nothing more."""
        waiting = self._met.pop(peer, None)
        if waiting is not None:
            waiting.close()
            self._counters.dropped += waiting.num_dropped

    def tell(
        self,
        peer: PeerId,
        *,
        records: Sequence[ItemId] = (),
        ops: Sequence[tuple[ItemId, Signed]] = (),
        controls: Sequence[Control] = (),
    ) -> None:
        """Tell it these soon, if it was met."""
        waiting = self._met.get(peer)
        if waiting is not None:
            waiting.add(records=records, ops=ops, controls=controls)

    async def _push_loop(self, peer: PeerId, waiting: Waiting) -> None:
        """Send what it lacks of who is there, and then what waits."""
        records = await self._lacked_by(peer, waiting)
        ops: list[Signed] = []
        controls: list[Control] = []
        unanswered = trio.Semaphore(MAX_UNANSWERED)
        async with open_plain_nursery() as nursery:
            await unanswered.acquire()
            while self._met.get(peer) is waiting:
                parts = list(in_parts(self._swarm, records, ops, controls))
                for part in parts[:-1]:  # one after another, as what is in them
                    await self._patiently(peer, waiting, partial(self.service_of(peer).gossip, part))
                if parts:
                    nursery.start_soon(self._push, peer, waiting, parts[-1], unanswered)
                    await unanswered.acquire()
                names, ops, controls = await waiting.take()
                records = [sealed for name in names if (sealed := self._presence.find(name)) is not None]

    async def _push(self, peer: PeerId, waiting: Waiting, part: GossipPush, unanswered: trio.Semaphore) -> None:
        try:
            await self._patiently(peer, waiting, partial(self.service_of(peer).gossip, part))
        finally:
            unanswered.release()

    async def _lacked_by(self, peer: PeerId, waiting: Waiting) -> list[Signed]:
        """The presence that a peer says that it lacks; none if it does not say so rightly, or at all."""
        ours = summary(self._presence)
        compare = partial(self.service_of(peer).compare, PresenceSummary(self._swarm, ours))
        try:
            theirs = await self._patiently(peer, waiting, compare)
            return [] if theirs is None else lacking(self._presence, len(ours) // BUCKET_BYTES, theirs)
        except ProtocolError as error:
            self._counters.refused_answers += 1
            self._on_refused(peer, str(error))
            return []

    async def _patiently(
        self, peer: PeerId, waiting: Waiting, call: Callable[[], Awaitable[_Answer]]
    ) -> _Answer | None:
        """A call, with retries; None if the peer refuses it, or is not met any more."""
        for attempt in range(PUSH_TRIES):
            if self._met.get(peer) is not waiting:
                return None
            try:
                return await call()
            except RemoteError as error:
                self._counters.failed_pushes += 1
                log.debug("a push to %s failed: %s", peer, error)
                if error.status is Status.NOT_FOUND:
                    self._on_left(peer)
                    return None
                if error.status in (Status.INVALID_ARGUMENT, Status.UNIMPLEMENTED):
                    return None  # it refuses this, and would refuse it again
                await trio.sleep(PUSH_AGAIN_S * 2**attempt)
        if self._met.get(peer) is waiting:
            log.info("%s takes no news of %s any more; it is met again when it answers", peer, self._swarm)
            self._counters.lost += 1
            self.unmeet(peer)
            self._on_lost(peer)
        return None
