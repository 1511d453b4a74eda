"""Plays that wait for another member: asking a live one that plays the part, and answering by this node's worker.

One member is asked, drawn among those who say that they play the part; if it does not answer, one other is. Nothing but
the plays waits for that. Whoever asks this node is answered if it is a live member: by a policy, as soon as the worker
is between two of its jobs (which policies a part answers by is the recipe's), or by the person who sits here.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from shoal.node.mesh.host import Host
from shoal.node.swarm.replica import Replica
from shoal.node.swarm.sitting import Sitting
from shoal.node.wire.channel import Channel
from shoal.node.wire.contracts import CONSULT_S, ConsultRequest, SwarmService
from shoal.protocol.errors import ProtocolError, RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import client
from shoal.training.statements import TOPIC_OF, Facts
from shoal.training.worker_calls import ACT, Act, ConsultAsked

log = logging.getLogger(__name__)

TRIES: Final = 2
"""Members that are asked before nobody answers."""
A_PERSON: Final = ""
"""In place of a policy's name: whoever sits there."""
_TOPIC: Final = TOPIC_OF[Facts]


@dataclass(slots=True)
class Tally:
    """What came of this node's asks of one part.

    Attributes:
        asked: acts that were asked for.
        answered: of them, those that came.
        unanswered: those that did not.
        fell_back: of these, those where the seat's ``otherwise`` played on; the other plays were dropped.
        seconds: of waiting, by this node's plays.
    """

    asked: int = 0
    answered: int = 0
    unanswered: int = 0
    fell_back: int = 0
    seconds: float = 0.0


class Consulting:
    """Of one run.

    Attributes:
        worker: that answers; None while there is none.
        sitting: where a person answers.
        asked: what came of this node's asks, by part; the recipe's parts, so few.
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
        self.sitting = Sitting()
        self.asked: dict[str, Tally] = {}
        self.num_answered = 0
        self._silent: set[PeerId] = set()  # who were asked last in vain, of the members
        self._swarm = swarm
        self._host = host
        self._replica = replica
        self._connect = connect
        self._is_live = is_live

    async def ask(self, asked: ConsultAsked) -> bytes | None:
        """What a member that plays a part does; None if nobody answers."""
        tally = self.asked.setdefault(asked.part, Tally())
        began = trio.current_time()
        answer, count = await self._ask(asked)
        tally.asked += asked.num_takes
        tally.answered += count
        tally.unanswered += asked.num_takes - count
        tally.fell_back += (asked.num_takes - count) * asked.falls_back
        tally.seconds += trio.current_time() - began
        return answer

    async def _ask(self, asked: ConsultAsked) -> tuple[bytes | None, int]:
        """An answer, and how many acts are in it. Who does not answer leaves the rest of the time to another one."""
        from shoal.training.tasks.wire import count_acts  # with NumPy, which an idle node does not load

        players = [peer for peer in self._replica.live if self._is_live(peer) and self._part_of(peer) == asked.part]
        each_s = CONSULT_S if asked.seconds is None else asked.seconds
        ends = trio.current_time() + (TRIES * each_s if asked.seconds is None else each_s)
        request = ConsultRequest(self._swarm, A_PERSON if asked.policy is None else asked.policy, bytes(asked.takes))
        for _ in range(min(TRIES, len(players))):
            peer = players.pop(secrets.randbelow(len(players)))
            left_s = min(each_s, ends - trio.current_time())
            if left_s <= 0:
                break
            try:
                await self._connect(peer)
                answer = await client(SwarmService, self._host.at(peer), timeout_s=left_s).consult(request)
                count = count_acts(answer.acts, asked.num_takes)
            except (RemoteError, ShoalError) as error:
                level = logging.DEBUG if peer in self._silent else logging.INFO
                log.log(level, "swarm %s: %s plays %s and does not answer: %s", self._swarm, peer, asked.part, error)
                self._silent.add(peer)
            else:
                self._silent.discard(peer)
                return bytes(answer.acts), count
        return None, 0

    def _part_of(self, peer: PeerId) -> str:
        for facts, _ in self._replica.statements(peer, _TOPIC)[-1:]:
            return str(facts.get("part", ""))
        return ""

    async def answer(self, peer: PeerId, policy: str, takes: bytes, deadline: float) -> bytes:
        """What this node does where a member's takes stand: its worker by a policy, or the person who sits here.

        Raises:
            RemoteError: if it answers nobody, or not this member, or not by this policy.
        """
        if not self._is_live(peer):
            raise RemoteError(Status.FAILED_PRECONDITION, "only members that are there are answered")
        if policy == A_PERSON:
            acts = await self._by_person(peer, takes, deadline)
        elif self.worker is None:
            raise RemoteError(Status.UNAVAILABLE, "this node's worker is not there; ask another member")
        else:
            acts = bytes((await self.worker.call(ACT, Act(policy, takes))).acts)
        self.num_answered += 1
        return acts

    async def _by_person(self, peer: PeerId, takes: bytes, deadline: float) -> bytes:
        try:
            return await self.sitting.ask(peer, takes, deadline)
        except ProtocolError as error:
            raise RemoteError(Status.INVALID_ARGUMENT, str(error)) from error
