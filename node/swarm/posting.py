"""What the members of a run post for each other: a few contents each, named in what they say of themselves.

A post is a content like any other, and signed by being named in its author's statement (`Postings`). Whoever asks for
the newest of a topic gets those of all live members, fetched from whoever has them; what cannot be had in a moment is
left out.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.holding import NoRoomError
from shoal.node.swarm.replica import Replica
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.statements import MAX_POST_BYTES, MAX_POSTED, TOPIC_OF, Posting, Postings, read_statement
from shoal.training.worker_calls import FoundPost, LatestAsked, PostAsked

log = logging.getLogger(__name__)

FIND_S: Final = 10.0
"""In which what was posted has to come."""
MAX_COUNT: Final = 64
"""Posts of one answer."""
_TOPIC: Final = TOPIC_OF[Postings]


class Posts:
    """Those of one run, as this node makes and reads them."""

    def __init__(
        self,
        swarm: SwarmId,
        me: PeerId,
        replica: Replica,
        content: ContentStore,
        reachable: Callable[[tuple[PeerId, ...]], Awaitable[tuple[PeerId, ...]]],
    ) -> None:
        """Have posted nothing.

        Args:
            swarm: the run.
            me: this node.
            replica: by which members say things.
            content: where they lie.
            reachable: those of some members who can be asked.
        """
        self._me = me
        self._replica = replica
        self._content = content
        self._reachable = reachable
        self._owner = f"{swarm}/posts"
        self._own: list[Posting] = []
        self._read: list[Cid] = []

    async def post(self, asked: PostAsked, epoch: int) -> Cid | None:
        """Let the others have something; None if there is no room for it, or it is too large."""
        if len(asked.data) > MAX_POST_BYTES:
            log.warning("%d bytes are too many to be posted; the most is %d", len(asked.data), MAX_POST_BYTES)
            return None
        try:
            cid = await self._content.put(bytes(asked.data), owner=self._owner)
        except NoRoomError as error:
            log.warning("what was to be posted under %s is not: %s", asked.topic, error)
            return None
        new = Posting(asked.topic, cid, epoch, len(asked.data))
        self._own = [new, *(each for each in self._own if each.cid != cid)][:MAX_POSTED]
        self._hold()
        self._replica.publish(_TOPIC, to_plain(Postings(posted=tuple(self._own))))
        return cid

    async def latest(self, asked: LatestAsked, epoch: int) -> tuple[FoundPost, ...]:
        """The newest of a topic, of all members."""
        wanted = [(each, self._me) for each in self._own if each.topic == asked.topic]
        for author in list(self._replica.live):
            for facts, _ in self._replica.statements(author, _TOPIC)[-1:]:
                said = read_statement(_TOPIC, dict(facts))
                if isinstance(said, Postings):
                    wanted += [(each, author) for each in said.posted if each.topic == asked.topic]
        wanted = [each for each in wanted if asked.max_age is None or epoch - each[0].epoch <= asked.max_age]
        wanted.sort(key=lambda each: (-each[0].epoch, each[1], each[0].cid))
        found: dict[int, FoundPost] = {}
        with trio.move_on_after(FIND_S):
            async with trio.open_nursery() as nursery:
                for index, (posting, author) in enumerate(wanted[: min(asked.count, MAX_COUNT)]):
                    nursery.start_soon(self._find, index, posting, author, found)
        self._read = [each.cid for each in found.values()]
        self._hold()
        return tuple(found[index] for index in sorted(found))

    async def _find(self, index: int, posting: Posting, author: PeerId, found: dict[int, FoundPost]) -> None:
        try:
            sources = await self._reachable((author,))
            data = await self._content.get(
                posting.cid, sources, max_bytes=posting.num_bytes, patience_s=FIND_S, owner=self._owner
            )
        except ShoalError as error:
            log.info("what %s posted under %s is not to be had: %s", author, posting.topic, error)
            return
        found[index] = FoundPost(author, posting.cid, posting.epoch, data)

    def _hold(self) -> None:
        """Own posts, and those that were read last, so that others can have them from here."""
        self._content.hold(self._owner, dict.fromkeys([*(each.cid for each in self._own), *self._read]))

    def close(self) -> None:
        """Hold nothing."""
        self._content.hold(self._owner, ())
