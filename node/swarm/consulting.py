"""Plays that wait for another member: asking a live one that plays the part, and answering by this node's worker.

One member is asked, drawn among those who say that they play the part; if it does not answer, one other is. Nothing but
the plays waits for that. Whoever asks this node is answered if it is a live member, as soon as the worker is between
two of its jobs; which policies a part answers by is the recipe's.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from shoal.node.mesh.host import Host
from shoal.node.swarm.replica import Replica
from shoal.node.wire.channel import Channel
from shoal.node.wire.contracts import CONSULT_S, ConsultRequest, SwarmService
from shoal.protocol.errors import RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import client
from shoal.training.statements import TOPIC_OF, Facts
from shoal.training.worker_calls import ACT, Act, ConsultAsked

log = logging.getLogger(__name__)

TRIES: Final = 2
"""Members that are asked before nobody answers."""
_TOPIC: Final = TOPIC_OF[Facts]


class Consulting:
    """Of one run.

    Attributes:
        worker: that answers; None while there is none.
        num_asked: questions that this node had.
        num_unanswered: of them, those that nobody answered.
        num_answered: questions of others that it answered.
    """

    def __init__(
        self,
        swarm: SwarmId,
        host: Host,
        replica: Replica,
        connect: Callable[[PeerId], Awaitable[None]],
        is_live: Callable[[PeerId], bool],
    ) -> None:
        self.worker: Channel | None = None
        self.num_asked = self.num_unanswered = self.num_answered = 0
        self._swarm = swarm
        self._host = host
        self._replica = replica
        self._connect = connect
        self._is_live = is_live

    async def ask(self, asked: ConsultAsked) -> bytes | None:
        """What a member that plays a part does; None if nobody answers."""
        self.num_asked += 1
        players = [peer for peer in self._replica.live if self._is_live(peer) and self._part_of(peer) == asked.part]
        for _ in range(min(TRIES, len(players))):
            peer = players.pop(secrets.randbelow(len(players)))
            try:
                await self._connect(peer)
                request = ConsultRequest(self._swarm, asked.policy or "", bytes(asked.takes))
                answer = await client(SwarmService, self._host.at(peer), timeout_s=CONSULT_S).consult(request)
                return bytes(answer.acts)
            except (RemoteError, ShoalError) as error:
                log.info("swarm %s: %s plays %s and does not answer: %s", self._swarm, peer, asked.part, error)
        self.num_unanswered += 1
        return None

    def _part_of(self, peer: PeerId) -> str:
        for facts, _ in self._replica.statements(peer, _TOPIC)[-1:]:
            return str(facts.get("part", ""))
        return ""

    async def answer(self, peer: PeerId, policy: str, takes: bytes) -> bytes:
        """What this node's worker does where a member's takes stand.

        Raises:
            RemoteError: if it answers nobody, or not this member, or not by this policy.
        """
        if not self._is_live(peer):
            raise RemoteError(Status.FAILED_PRECONDITION, "only members that are there are answered")
        if self.worker is None:
            raise RemoteError(Status.UNAVAILABLE, "this node's worker is not there; ask another member")
        acted = await self.worker.call(ACT, Act(policy, takes))
        self.num_answered += 1
        return bytes(acted.acts)
