"""An actor's stream of shards: environments that keep running, and what is to be signed of them.

A stream begins with environments that are reset from seeds which nobody chose, and goes on from shard to shard and from
version to version; each shard carries the acts that lead to its beginning. It begins anew, under the next number, when
that lead would be too long, or when an environment failed: what a replacement did cannot be replayed.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.rollouts.acting import Acting, Noise
from shoal.training.rollouts.rows import MAX_REPLAYED, Rows
from shoal.training.rollouts.shard import MAX_NUMBER, Head, ShardKind, noise_seed, seeds_of
from shoal.training.tasks import Task
from shoal.training.tasks.base import Actions, Discrete, Floats

MAX_LEAD: Final = 1024
"""Steps of a stream before a shard of it begins: with shards of 256 steps, a check replays three times as many."""


class RowStream:
    """Rows of one actor, shard after shard.

    Attributes:
        stream: its number; the next one that an actor begins, in this life or another, needs a higher one.
    """

    def __init__(
        self,
        task: Task,
        num_envs: int,
        *,
        author: PeerId,
        swarm: SwarmId,
        surroundings: bytes,
        policy: str = "",
        stream: int = 0,
        max_lead: int = MAX_LEAD,
        is_shown: bool = False,
    ) -> None:
        """Make the environments.

        Args:
            task: the manifest's.
            num_envs: that step together.
            author: the actor.
            swarm: whose run it is.
            surroundings: `shoal.training.rollouts.checking.surroundings` here.
            policy: which of the run's policies acts.
            stream: of the first stream; one that this author has not used in this run.
            max_lead: steps after which a stream begins anew.
            is_shown: whether shards hold what was shown.
        """
        if max_lead < 0:
            raise UsageError(f"a stream's lead is 0 steps or more, not {max_lead}")
        self.stream = stream
        self._task, self._num_envs = task, num_envs
        self._author, self._swarm, self._policy = author, swarm, policy
        self._surroundings, self._max_lead, self._is_shown = surroundings, max_lead, is_shown
        self._env = task.make(num_envs)
        self._before: Cid | None = None
        self._number, self._is_open = 0, False
        self._lead: Actions = np.empty(0, np.float32)
        self._begin(stream)

    def collect(self, acting: Acting, version: int, state: Cid, steps: int) -> tuple[Head, Rows]:
        """Act for so many steps of all environments.

        Whoever seals the shard says so (`sealed`) before the next is collected.

        Args:
            acting: the policy's copy.
            version: its epoch.
            state: its name.
            steps: T.

        Raises:
            UsageError: if the shard before was not sealed.
            TaskFailedError: if too many environments failed.
        """
        if self._is_open:
            raise UsageError("the shard before is not sealed; say sealed(cid), or drop() if it is not to be")
        is_long = len(self._lead) > self._max_lead or (len(self._lead) + steps) * self._num_envs > MAX_REPLAYED
        if is_long or self._number >= MAX_NUMBER:
            self._begin(self.stream + 1)
        while True:
            head = Head(
                kind=ShardKind.ROWS,
                swarm=self._swarm,
                task=self._task.name,
                policy=self._policy,
                version=version,
                state=state,
                stream=self.stream,
                number=self._number,
                before=self._before,
                samples=steps * self._num_envs,
                surroundings=self._surroundings,
            )
            rows = self._play(acting, Noise(noise_seed(self._author, head)), steps)
            if rows is not None:
                self._lead = np.concatenate([self._lead, rows.actions])
                self._is_open = True
                return head, rows
            self._begin(self.stream + 1)

    def sealed(self, cid: Cid) -> None:
        """The last shard has a name."""
        self._before, self._number, self._is_open = cid, self._number + 1, False

    def drop(self) -> None:
        """The last shard will have no name; the next one begins a stream of its own."""
        self._begin(self.stream + 1)

    def close(self) -> None:
        """Close the environments."""
        self._env.close()

    def _begin(self, stream: int) -> None:
        self.stream, self._number, self._is_open = stream, 0, False
        self._before = None
        self._seeds = seeds_of(self._swarm, self._author, self._policy, stream, self._num_envs)
        self._shown: Floats = self._env.reset(self._seeds)
        space = self._task.action_space
        one: tuple[int, ...] = () if isinstance(space, Discrete) else (space.size,)
        kind: Any = np.int64 if isinstance(space, Discrete) else np.float32
        self._lead = np.empty((0, self._num_envs, *one), kind)

    def _play(self, acting: Acting, noise: Noise, steps: int) -> Rows | None:
        shape = (steps, self._num_envs)
        rewards, log_probs = (np.empty(shape, np.float32) for _ in range(2))
        terminated, truncated = (np.empty(shape, np.bool_) for _ in range(2))
        sights: list[Floats] = []
        finals: list[Floats] = []
        actions: list[npt.NDArray[Any]] = []
        for index in range(steps):
            acts, log_probs[index] = acting.act(self._shown, noise)
            step = self._env.step(acts)
            if step.failed:
                return None
            sights.append(self._shown)
            actions.append(acts)
            rewards[index], terminated[index], truncated[index] = step.rewards, step.terminated, step.truncated
            finals += [step.final_observations[env] for env in np.flatnonzero(step.truncated).tolist()]
            self._shown = step.observations
        return Rows(
            seeds=np.array(self._seeds, np.int64),
            lead=self._lead,
            actions=np.stack(actions),
            rewards=rewards,
            log_probs=log_probs,
            terminated=terminated,
            truncated=truncated,
            sights=np.stack([*sights, self._shown]) if self._is_shown else None,
            finals=np.array(finals, np.float32).reshape(-1, self._task.observation_size) if self._is_shown else None,
        )
