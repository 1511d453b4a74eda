"""What a node writes of a run: to its disk, to start from it again, and into its document, for the others.

What the core says is to be written waits here until the task that writes comes to it. Of the policy the newest stands
for those before, so a slow disk is never far behind; writing it takes no more than a part of the time (`Sparing`), and
what that puts off is written later, and on the way out at once.
"""

from __future__ import annotations

import base64
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.needs import Needs
from shoal.node.swarm.replica import Replica
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, ShoalError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.training import run_events as events
from shoal.training.manifest import Manifest
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.saving import Sparing
from shoal.training.statements import Phase
from shoal.training.stored_run import StoredRun

log = logging.getLogger(__name__)

MAX_LIARS: Final = 256
MAX_LIES: Final = 16
"""That this node shows of others, the first of each."""


def read_stored(storage: Storage, swarm: SwarmId) -> StoredRun:
    """What an earlier life kept of a run; nothing, if that cannot be read.

    Raises:
        StorageError: if the disk fails.
    """
    data = storage.get_fact(_fact_name(swarm))
    if data is None:
        return StoredRun()
    try:
        return decode(StoredRun, data)
    except ProtocolError as error:
        log.warning("swarm %s: what was kept of the run cannot be read (%s); beginning anew", swarm, error)
        return StoredRun()


class Records:
    """Of one life of a run on one node."""

    def __init__(
        self,
        manifest: Manifest,
        swarm: SwarmId,
        me: PeerId,
        core: Run,
        needs: Needs,
        replica: Replica,
        content: ContentStore,
        storage: Storage,
        on_error: Callable[[str], None],
    ) -> None:
        """Begin with nothing to write.

        Args:
            manifest: of the run.
            swarm: its name.
            me: this node.
            core: decides what is written.
            needs: what the run needs of its contents.
            replica: has this node's document.
            content: keeps states on disk.
            storage: keeps which one to start from.
            on_error: told what cannot be written.
        """
        self._manifest = manifest
        self._swarm = swarm
        self._me = me
        self._core = core
        self._needs = needs
        self._replica = replica
        self._content = content
        self._storage = storage
        self._on_error = on_error
        self._waiting: deque[events.Write | events.WriteEvaluation | events.WriteLie] = deque()
        self._newest: Policy | None = None  # to be kept on disk
        self._arrived = trio.Event()
        self._sparing = Sparing()

    def add(self, output: events.Keep | events.Write | events.WriteEvaluation | events.WriteLie) -> None:
        """Write this soon."""
        if isinstance(output, events.Keep):
            self._newest = output.policy
        else:
            if isinstance(output, events.Write):  # the newest stands for those before
                for older in [each for each in self._waiting if isinstance(each, events.Write)]:
                    self._waiting.remove(older)
            self._waiting.append(output)
        self._arrived.set()

    async def write(self) -> None:
        """What waits, for ever."""
        while True:
            with trio.move_on_at(self._keep_at):
                await self._arrived.wait()
            self._arrived = trio.Event()
            await self._write_waiting()
            if trio.current_time() >= self._keep_at:
                await self._keep_newest()

    async def write_last(self) -> None:
        """On the way out: the newest policy, however long that takes, and what still waits; so no work is lost."""
        policy = self._core.policy
        if policy is not None and policy.epoch > 0:
            self._newest = policy
        await self._keep_newest()
        await self._write_waiting()

    @property
    def _keep_at(self) -> float:
        if self._newest is None:
            return float("inf")
        return -float("inf") if self._core.progress.phase is Phase.DONE else self._sparing.next_at

    async def _write_waiting(self) -> None:
        while self._waiting:
            first = self._waiting[0]  # it stays until it is written, should this be cancelled
            await self._write(first)
            if self._waiting and self._waiting[0] is first:
                self._waiting.popleft()

    async def _keep_newest(self) -> None:
        policy = self._newest
        if policy is None:
            return
        began = trio.current_time()
        try:
            await self._keep(policy)
        except ShoalError as error:
            self._fail("a policy", error)
        if self._newest is policy:
            self._newest = None
        self._sparing.wrote(began, trio.current_time())

    async def _write(self, output: events.Write | events.WriteEvaluation | events.WriteLie) -> None:
        try:
            match output:
                case events.Write(policy, env_steps, rounds):
                    register = {
                        "epoch": policy.epoch,
                        "cid": policy.cid,
                        "env_steps": policy.env_steps,
                        "digest": policy.digest,
                    }
                    contributed = {"env_steps": env_steps, "rounds": rounds}
                    own = self._replica.documents().get(self._me, {})
                    if (own.get("policy"), own.get("contributions")) != (register, contributed):
                        await self._replica.write(policy=register, contributions=contributed)
                case events.WriteEvaluation(policy, mean_return, scores):
                    target = self._manifest.target_return
                    if target is not None and mean_return >= target:
                        self._needs.claim(policy.cid)
                        await self._content.keep(self._swarm, self._needs.on_disk())
                    entry = {
                        "cid": policy.cid,
                        "return": mean_return,
                        "env_steps": policy.env_steps,
                        "episodes": self._manifest.eval_episodes,
                    }
                    if scores:
                        entry["scores"] = dict(scores)
                    await self._replica.write(evaluations={str(policy.epoch): entry})
                case events.WriteLie(owner, epoch, said):
                    known = dict(self._replica.documents().get(self._me, {}).get("lies") or {})
                    if owner not in known and len(known) < MAX_LIES:
                        await self._replica.write(
                            lies=known | {owner: {"epoch": epoch, "said": base64.b64encode(said).decode()}}
                        )
        except ShoalError as error:
            self._fail(type(output).__name__, error)

    def _fail(self, what: str, error: ShoalError) -> None:
        self._on_error(str(error))
        log.warning("swarm %s: %s could not be written: %s", self._swarm, what, error)

    async def _keep(self, policy: Policy) -> None:
        """To disk, first the state and then that it is the one to start from."""
        try:
            await self._content.keep(self._swarm, self._needs.on_disk(policy.cid))
        except UnavailableError as error:
            log.info("swarm %s: epoch %d is not kept: %s", self._swarm, policy.epoch, error)
            return
        progress = self._core.progress
        liars = tuple(sorted(self._core.claims.liars))[:MAX_LIARS]
        shunned = tuple(sorted(self._core.shunned))[:MAX_LIARS]
        kept = StoredRun(policy.result, progress.own_env_steps, progress.rounds, liars, shunned)
        await trio.to_thread.run_sync(self._storage.put_fact, _fact_name(self._swarm), encode(kept))
        self._needs.write(policy.cid)


def _fact_name(swarm: SwarmId) -> str:
    return f"run/{swarm}"
