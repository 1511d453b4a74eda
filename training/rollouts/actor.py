"""What an actor's worker does: acts by the newest copy of the policy, and makes shards of it. No torch.

It stands where a learner stands in a worker (`shoal.training.worker`) and has nothing of it but the environments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.exchange.averager import Arrays
from shoal.training.manifest import Manifest
from shoal.training.rollouts.acting import Acting, ActorShape, Words, copy_of
from shoal.training.rollouts.patches import apply, digest_of
from shoal.training.rollouts.replaying import surroundings
from shoal.training.rollouts.rows import Rows
from shoal.training.rollouts.shard import Head
from shoal.training.rollouts.streams import MAX_LEAD, RowStream
from shoal.training.tasks import Task


@dataclass(frozen=True, slots=True)
class Made:
    """What an actor made, to be sealed.

    Attributes:
        head: of the shard.
        rows: of it.
        episode_returns: of the episodes that ended in it.
    """

    head: Head
    rows: Rows
    episode_returns: tuple[float, ...]


class Actor:
    """Of one run and worker.

    Attributes:
        action_space: of the task.
        shape: of the policy.
        digest: of the copy that it acts by; empty: none yet.
    """

    def __init__(
        self,
        manifest: Manifest,
        task: Task,
        shape: ActorShape,
        num_envs: int,
        *,
        swarm: SwarmId,
        peer: PeerId,
        stream: int,
    ) -> None:
        """Make the environments.

        Args:
            manifest: of the run.
            task: the manifest's.
            shape: of the policy.
            num_envs: that step together.
            swarm: whose run it is.
            peer: this node.
            stream: of its first stream: higher than any that it began in this run before.
        """
        self.action_space = task.action_space
        self.shape, self._num_envs = shape, num_envs
        self._stream = RowStream(
            task,
            num_envs,
            author=peer,
            swarm=swarm,
            surroundings=surroundings(task),
            stream=stream,
            max_lead=MAX_LEAD,
            is_shown=True,
        )
        self.digest = b""
        self._words: Words | None = None
        self._acting: Acting | None = None
        self._version, self._state = 0, Cid("")
        self._is_open = False
        self._returns = [0.0] * num_envs

    def take(self, arrays: Arrays, version: int, state: Cid) -> None:
        """Act by this policy from now on.

        Args:
            arrays: of a whole state of the run.
            version: its epoch.
            state: its name.

        Raises:
            ProtocolError: if it is none of this run. Nothing has changed.
        """
        try:
            words = copy_of(self.shape, arrays)
        except UsageError as error:
            raise ProtocolError(str(error)) from error
        self._act_by(words, version, state)

    def take_copy(self, data: bytes | memoryview, version: int, state: Cid, digest: bytes) -> None:
        """Act by what a keyframe, or a patch of the copy that is here, leads to.

        Raises:
            ProtocolError: if it does not lead to what is wanted. Nothing has changed.
            MissingBaseError: if it is a patch of another copy. Likewise.
        """
        self._act_by(apply(self._words, data, self.shape.num_words, digest=digest), version, state)

    def _act_by(self, words: Words, version: int, state: Cid) -> None:
        self._acting, self._version, self._state = Acting(self.shape, words), version, state
        self._words, self.digest = words, digest_of(words)

    def roll_out(self, samples: int, before: Cid | None) -> Made:
        """Act for so many environment steps.

        Args:
            samples: less those that are no step of all environments, so that as many shards fill an update as are meant
                to; but one step at least.
            before: what the shard before was named; None: it came to nothing, or there was none.

        Raises:
            UsageError: if there is no policy yet.
            TaskFailedError: if too many environments failed.
        """
        if self._acting is None:
            raise UsageError("there is no policy to act by yet; load one")
        if self._is_open:
            if before is None:
                self._stream.drop()
                self._returns = [0.0] * self._num_envs
            else:
                self._stream.sealed(before)
            self._is_open = False
        stream = self._stream.stream
        head, rows = self._stream.collect(self._acting, self._version, self._state, max(1, samples // self._num_envs))
        if self._stream.stream != stream:
            self._returns = [0.0] * self._num_envs
        self._is_open = True
        head = replace(head, copy=self.digest)
        return Made(head, rows, tuple(self._finished(rows)))

    def _finished(self, rows: Rows) -> list[float]:
        found: list[float] = []
        ended = rows.terminated | rows.truncated
        for step in range(rows.steps):
            for env in range(self._num_envs):
                self._returns[env] += float(rows.rewards[step, env])
                if ended[step, env]:
                    found.append(self._returns[env])
                    self._returns[env] = 0.0
        return found
