"""Weights that a recipe names by CID (`shoal.training.tasks.cast.Fixed`): fetched from whoever has them, then kept.

Asked are the live members first, and then whoever else this node is connected to. While nobody gives them, the node
says so, and asks again every ``RETRY_S``. What came is kept on disk with the run, so that a restart, and other members,
have it from here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from shoal.dht.fetch import Lack
from shoal.node.mesh.host import Host
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.replica import Replica
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.worker_calls import FetchAsked, PlayOn

log = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""For some of it to come."""
RETRY_S: Final = 15.0
"""Between two tries."""
PAUSE_S: Final = 1.0
"""In which plays that cannot go on without it do not ask again."""
MAX_SOURCES: Final = 32


class Weights:
    """Of one run.

    Attributes:
        problem: what is lacking, in words, while it is.
    """

    def __init__(
        self,
        swarm: SwarmId,
        host: Host,
        replica: Replica,
        content: ContentStore,
        reachable: Callable[[tuple[PeerId, ...]], Awaitable[tuple[PeerId, ...]]],
    ) -> None:
        self.problem: str | None = None
        self._owner = f"{swarm}/fixed"
        self._host, self._replica, self._content, self._reachable = host, replica, content, reachable
        self._kept: list[Cid] = []
        self._failed: dict[Cid, float] = {}  # and when

    async def fetch(self, asked: FetchAsked) -> PlayOn:
        """What plays wait for, or that nobody gives it."""
        now = trio.current_time()
        if now < self._failed.get(asked.cid, -RETRY_S) + RETRY_S:
            if asked.waits:
                await trio.sleep(PAUSE_S)
            return PlayOn(None)
        try:
            data = await self._content.get(
                asked.cid, await self._sources(), max_bytes=asked.max_bytes, patience_s=PATIENCE_S, owner=self._owner
            )
        except UnavailableError as error:
            if error.lack is Lack.UNFIT:
                return PlayOn(None, str(error))
            return self._lack(asked, error)
        except ShoalError as error:  # no room, or a disk that cannot be read
            return self._lack(asked, error)
        self._failed.pop(asked.cid, None)
        if not self._failed:
            self.problem = None
        await self._keep(asked.cid)
        return PlayOn(data)

    def _lack(self, asked: FetchAsked, error: ShoalError) -> PlayOn:
        self._failed[asked.cid] = trio.current_time()
        meanwhile = (
            "nothing is played until it is here" if asked.waits else "somebody else plays in its place meanwhile"
        )
        problem = f"the recipe names the weights {asked.cid}, which nobody gives ({error}); {meanwhile}"
        if self.problem is None:
            log.warning("%s", problem)
        self.problem = problem
        return PlayOn(None)

    async def _sources(self) -> tuple[PeerId, ...]:
        members = await self._reachable(tuple(self._replica.live))
        return tuple(dict.fromkeys((*members, *self._host.connected)))[:MAX_SOURCES]

    async def _keep(self, cid: Cid) -> None:
        self._kept = list(dict.fromkeys((*self._kept, cid)))
        try:
            await self._content.keep(self._owner, self._kept)
        except ShoalError as error:
            log.warning("the weights %s are not kept on disk, and are fetched again after a restart: %s", cid, error)
        else:
            self._content.hold(self._owner, ())

    def close(self) -> None:
        """Hold nothing in memory."""
        self._content.hold(self._owner, ())
