"""Copies of policies on their way: a learner's worker makes them, an actor fetches what it needs, and gives it on.

What is taken, and from whom, is decided by `shoal.training.rollouts.copies`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Final

import trio

from shoal.node.supervise import Domain
from shoal.node.supervise import Policy as Task
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.holding import NoRoomError
from shoal.node.swarm.replica import Replica
from shoal.node.wire.channel import Channel
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.rollouts.copies import WORDS_S, Way, is_keeper, turn_s, way_to
from shoal.training.run_events import Policy
from shoal.training.statements import TOPIC_OF, GivenCopy
from shoal.training.worker_calls import COPY, LOAD_COPY, CopyOf, LoadCopy

log = logging.getLogger(__name__)

WHOLE_S: Final = 60.0
"""So often a keeper takes the whole state, if that takes no more than a twentieth of the time."""
WHOLE_PART: Final = 1 / 20
PATIENCE_S: Final = 10.0
"""For a copy whose bytes do not come."""
MOST_TURN_S: Final = 30.0
_TOPIC: Final = TOPIC_OF[GivenCopy]


class Copying:
    """Of one run, as this node gives and takes them.

    Attributes:
        num_taken: copies that an actor acted by, and how many bytes they were.
        num_whole: whole states that it took.
    """

    def __init__(
        self,
        swarm: SwarmId,
        me: PeerId,
        replica: Replica,
        content: ContentStore,
        reachable: Callable[[tuple[PeerId, ...]], Awaitable[tuple[PeerId, ...]]],
    ) -> None:
        """Hold nothing.

        Args:
            swarm: the run's name.
            me: this node.
            replica: by which members say things.
            content: where copies lie.
            reachable: those of some members who can be asked.
        """
        self.num_taken = self.num_bytes = self.num_whole = 0
        self._me = me
        self._replica = replica
        self._content = content
        self._reachable = reachable
        self._owner = f"{swarm}/copies"
        self._said: dict[PeerId, GivenCopy] = {}
        self._heard = trio.Event()
        self._last_s = 0.0
        self._whole_at = self._whole_began = -math.inf
        self._whole_s = 0.0
        self._held: bytes | None = None  # digest of the copy that the worker has
        self._here: tuple[Cid, Way, bytes] | None = None
        self._given: Cid | None = None

    def heard(self, author: PeerId, said: GivenCopy) -> None:
        """A member says which copy it has."""
        self._said[author] = said
        self._heard.set()
        self._heard = trio.Event()

    def gone(self, author: PeerId) -> None:
        """A member is no longer heard of."""
        self._said.pop(author, None)

    # A learner's.

    def give(self, worker: Channel, policy: Policy, domain: Domain) -> None:
        """Let actors have the copy of what this node's worker holds, once."""
        if self._given != policy.cid:
            self._given = policy.cid
            domain.start_soon("giving a copy", self._give, worker, policy, policy=Task.DROP)

    async def _give(self, worker: Channel, policy: Policy) -> None:
        try:
            made = await worker.call(COPY, CopyOf(policy.epoch))
            key = await self._content.put(bytes(made.key), owner=self._owner)
            patch = None if made.patch is None else await self._content.put(bytes(made.patch), owner=self._owner)
        except (NoRoomError, RemoteError) as error:
            log.info("the copy of a policy is not given to actors: %s", error)
            return
        self._say(
            GivenCopy(
                version=policy.epoch,
                state=policy.cid,
                digest=bytes(made.digest),
                key=key,
                key_bytes=len(made.key),
                patch=patch,
                patch_bytes=len(made.patch or b""),
                base=bytes(made.base),
            )
        )

    def _say(self, given: GivenCopy) -> None:
        self._content.hold(self._owner, [each for each in (given.key, given.patch) if each is not None])
        self._replica.publish(_TOPIC, to_plain(given))

    # An actor's.

    async def fetch(self, state: Cid, learners: Callable[[], Collection[PeerId]], actors: Collection[PeerId]) -> bool:
        """Have the copy of a state here; False: the state is to be fetched as a whole."""
        began = trio.current_time()
        if is_keeper(self._me, actors) and began >= self._whole_at + max(WHOLE_S, self._whole_s / WHOLE_PART):
            self._whole_began = began
            return False
        mine_at = began + min(MOST_TURN_S, turn_s(self._me, actors, state, self._last_s))
        while True:
            way = way_to(self._said, learners(), state, self._held)
            now = trio.current_time()
            if way is not None and (way.of_actors or now >= mine_at):
                break
            until = mine_at if way is not None else began + WORDS_S
            if now >= until:
                return False
            with trio.move_on_at(until):
                await self._heard.wait()
        holders = way.holders[: way.of_actors] or way.holders
        try:
            asked_at = trio.current_time()
            data = await self._content.get(
                way.cid,
                await self._reachable(holders),
                max_bytes=way.num_bytes,
                patience_s=PATIENCE_S,
                owner=self._owner,
            )
        except UnavailableError as error:
            log.info("the copy of a policy is not taken, but all of it: %s", error)
            return False
        self._last_s = trio.current_time() - (began if way.of_actors else asked_at)
        self._here = state, way, bytes(data)
        what = GivenCopy(version=way.version, state=state, digest=way.digest)
        if way.base is None:
            self._say(replace(what, key=way.cid, key_bytes=len(data)))
        else:
            self._say(replace(what, patch=way.cid, patch_bytes=len(data), base=way.base))
        return True

    async def load(self, worker: Channel, state: Cid, epoch: int) -> bool:
        """Have the worker act by what was fetched; False: the state is to be loaded as a whole."""
        here, self._here = self._here, None
        if here is None or here[0] != state:
            return False
        _, way, data = here
        try:
            await worker.call(LOAD_COPY, LoadCopy(data, epoch, state, way.digest))
        except RemoteError as error:
            if error.status is not Status.INVALID_ARGUMENT:
                raise
            log.warning("the copy of a policy does not fit, so all of it is taken: %s", error.message)
            self._held = None
            return False
        self._held = way.digest
        self.num_taken, self.num_bytes = self.num_taken + 1, self.num_bytes + len(data)
        return True

    def loaded_whole(self, copy: bytes) -> None:
        """The worker holds a state that it was given as a whole, and acts by this copy."""
        now = trio.current_time()
        self._held, self._whole_at = copy or None, now
        self._whole_s = now - self._whole_began if now - self._whole_began < math.inf else 0.0
        self.num_whole += 1

    def forget(self) -> None:
        """The worker is gone, and what it held."""
        self._held = self._here = None

    def close(self) -> None:
        """Hold nothing."""
        self._content.hold(self._owner, ())
