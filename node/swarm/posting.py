"""What the members of a run post for each other: a few contents each, named in what they say of themselves.

A post is a content like any other, and signed by being named in its author's statement (`Postings`). Whoever asks for
the newest of a topic gets those of all live members, fetched from whoever has them; what cannot be had in a moment is
left out. However much one member posts, the newest of each other one has its place; what says that it is of an epoch
that this node is far from yet is not taken.

What members sign of their probes lies in the shared documents, and is found here too, as updates ask for both.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Set
from typing import Final

import trio

from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.holding import NoRoomError
from shoal.node.swarm.replica import Replica
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.manifest import Role
from shoal.training.scored import Scored, medians
from shoal.training.statements import MAX_POST_BYTES, MAX_POSTED, TOPIC_OF, Posting, Postings, read_statement
from shoal.training.worker_calls import FoundPost, GoOn, LatestAsked, MergeAnswer, PostAsked, ScoresAsked

log = logging.getLogger(__name__)

FIND_S: Final = 10.0
"""In which what was posted has to come."""
MAX_COUNT: Final = 64
"""Posts of one answer."""
MAX_AHEAD: Final = 2
"""Epochs that the author of a post may be ahead of who reads it."""
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

    async def reply(self, answer: MergeAnswer, epoch: int, out: Set[PeerId]) -> GoOn | None:
        """What an update asks for that is not an average; None, if it asks for nothing such.

        Args:
            answer: of the worker.
            epoch: of the policy that the update begins with.
            out: members that were found to lie, whose scores do not count.
        """
        if answer.post is not None:
            return GoOn(cid=await self.post(answer.post, epoch))
        if answer.latest is not None:
            return GoOn(posts=await self.latest(answer.latest, epoch))
        return None if answer.scores is None else GoOn(scores=self.scores(answer.scores, epoch, out))

    def scores(self, asked: ScoresAsked, epoch: int, out: Set[PeerId]) -> tuple[Scored, ...]:
        """What learners have signed of probes, up to this epoch."""
        views = self._replica.views
        learners = {peer for peer, each in views.members.items() if each.role == Role.LEARNER and not each.left}
        return medians(views.evaluations, asked.probes, asked.since, epoch, learners - out)

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
        if asked.max_age is not None:
            wanted = [each for each in wanted if epoch - each[0].epoch <= asked.max_age]
        found: dict[int, FoundPost] = {}
        with trio.move_on_after(FIND_S):
            async with trio.open_nursery() as nursery:
                for index, (posting, author) in enumerate(newest(wanted, min(asked.count, MAX_COUNT), epoch)):
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


def newest(posted: Iterable[tuple[Posting, PeerId]], count: int, epoch: int) -> list[tuple[Posting, PeerId]]:
    """So many of what members posted, newest first: the newest of each member, then the next of each, as far as it goes.

    Args:
        posted: with their authors.
        count: at most so many.
        epoch: that this node is in.
    """
    in_order = sorted(posted, key=lambda each: (-each[0].epoch, each[1], each[0].cid))
    before: Counter[PeerId] = Counter()
    turns = []
    for place, each in enumerate(in_order):
        if each[0].epoch <= epoch + MAX_AHEAD:
            turns.append((before[each[1]], place))
            before[each[1]] += 1
    return [in_order[place] for place in sorted(place for _, place in sorted(turns)[:count])]
