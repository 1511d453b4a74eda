"""What members give each other directly, step by step, in one run: the shell of `shoal.training.exchange.direct`.

The bytes of the steps that are on are held here, and nowhere else: the two newest parts of each member that this node
learns with, so that nobody can make it hold more.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from shoal.dht.blocks import name
from shoal.node.mesh.host import Host
from shoal.node.supervise import Domain, Policy
from shoal.node.wire.contracts import StepPart, SwarmService
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import client
from shoal.training.exchange.direct import MAX_DIRECT, MAX_PART_BYTES, Part
from shoal.training.run_events import Given, NotGiven
from shoal.training.statements import RoundKey

log = logging.getLogger(__name__)

GIVE_S: Final = 10.0
"""For one part to be taken; that it does not come is noticed earlier by who waits for it."""
KEPT: Final = 2
"""Parts of one member: of the step that is on, and of the next one."""


class Giving:
    """Parts of others, held; and own parts, given."""

    def __init__(
        self, swarm: SwarmId, host: Host, post: Callable[[Given | NotGiven], None], is_there: Callable[[PeerId], bool]
    ) -> None:
        """Hold none.

        Args:
            swarm: of which.
            host: carries the calls.
            post: is told what came, and what was not taken.
            is_there: whether this node learns with a member.
        """
        self._swarm = swarm
        self._host = host
        self._post = post
        self._is_there = is_there
        self._held: dict[PeerId, deque[tuple[Cid, bytes | memoryview]]] = {}

    def take(self, author: PeerId, given: StepPart) -> None:
        """A member gives its part.

        Raises:
            ProtocolError: if it makes no sense.
            RemoteError: FAILED_PRECONDITION if this node learns nothing with that peer.
        """
        if not self._is_there(author):
            raise RemoteError(Status.FAILED_PRECONDITION, "this node learns nothing with the caller")
        key, data = RoundKey(given.epoch, given.step, given.after), given.data
        cid = None
        if data is not None:
            if len(data) > MAX_PART_BYTES:
                raise RemoteError(Status.INVALID_ARGUMENT, f"a part has up to {MAX_PART_BYTES} bytes")
            cid = name(data).cid
        part = Part(key, cid, given.weight)
        if cid is not None and data is not None:
            if author not in self._held and len(self._held) >= MAX_DIRECT:
                gone = [peer for peer in self._held if not self._is_there(peer)]
                del self._held[gone[0] if gone else next(iter(self._held))]
            self._held.setdefault(author, deque(maxlen=KEPT)).append((cid, data))
        self._post(Given(author, part))

    def find(self, author: PeerId, cid: Cid) -> bytes | memoryview | None:
        """What a member gave, if it is here."""
        return next((data for each, data in self._held.get(author, ()) if each == cid), None)

    def give(self, part: Part, data: bytes | memoryview | None, members: tuple[PeerId, ...], domain: Domain) -> None:
        """Give an own part to each of these members."""
        if data is not None and len(data) > MAX_PART_BYTES:
            self._post(NotGiven(members[0], part.key, "the parts of this run are too large; they go as content"))
            return
        key = part.key
        request = StepPart(self._swarm, key.epoch, key.step, key.after, part.weight, data)
        for member in members:
            domain.start_soon("giving a part", self._give_to, member, request, part, policy=Policy.DROP)

    async def _give_to(self, member: PeerId, request: StepPart, part: Part) -> None:
        reason = "giving it failed on this node; its log says why"
        try:
            if member in self._host.connected:
                await client(SwarmService, self._host.at(member), timeout_s=GIVE_S).give(request)
                reason = ""
            else:
                reason = "it is not connected to this node"
        except RemoteError as error:
            reason = str(error)
        finally:
            if reason:
                self._post(NotGiven(member, part.key, reason))
