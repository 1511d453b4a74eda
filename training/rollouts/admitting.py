"""What others collected, on its way into a learner: opened, held to the task, looked into now and then, handed over.

A learner's worker keeps the acting copies of the last policies of the run, as many as shards may be old, so that a
shard can be judged by the policy that it names. Which name a policy has, its node knows; a shard that names another one
is of another line of the run and is not used.

A shard with rewards beyond all that were found true before is always looked into, there: one such lie bends a run more
than a hundred others, and few honest shards set a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np

from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.algorithms.rollouts import Rollout
from shoal.training.exchange.averager import Arrays
from shoal.training.manifest import Manifest
from shoal.training.rollouts.acting import Acting, ActorShape, Words, copy_of
from shoal.training.rollouts.checking import check_rows
from shoal.training.rollouts.evidence import Finding, Lie, Verdict
from shoal.training.rollouts.patches import digest_of, key_of, patch_of
from shoal.training.rollouts.replaying import CannotReplayError, surroundings, with_sights
from shoal.training.rollouts.rows import DoesNotFitError, Rows, rows_of
from shoal.training.rollouts.shard import Shard, open_shard
from shoal.training.rollouts.streams import MAX_LEAD
from shoal.training.tasks import Task
from shoal.training.tasks.base import Floats
from shoal.training.worker_calls import Admit, CopyAnswer

MAX_REWARD: Final = 1e9
"""Sums of such rewards, and squares of these sums, are numbers still."""
_FINE: Final = Finding(Verdict.TRUE)


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of a shard that was given.

    Attributes:
        finding: what is found of it.
        samples: that are learned from.
        proof: its author's signed head, if it is false.
        is_checked: whether it was looked into, as it was to be or because of what it says.
    """

    finding: Finding
    samples: int = 0
    proof: bytes = b""
    is_checked: bool = False


def refused(finding: Finding, shard: Shard, is_checked: bool) -> Looked:
    """What was opened, and is not learned from."""
    return Looked(finding, proof=shard.proof if finding.verdict is Verdict.FALSE else b"", is_checked=is_checked)


class Admits(Protocol):
    """A learner that learns from what others collected."""

    def admit(self, author: PeerId, rollout: Rollout, log_probs: Floats, version: int) -> None:
        """See `shoal.training.algorithms.engine.PolicyLearner.admit`."""
        ...

    def holds(self, version: int, oldest: int) -> int:
        """See `shoal.training.algorithms.engine.PolicyLearner.holds`."""
        ...


@runtime_checkable
class SharesPlays(Protocol):
    """A learner that gives what it plays, and learns from what others play; see `shoal.training.recipes.sharing`."""

    @property
    def learned_from(self) -> Sequence[tuple[PeerId, int, int]]:
        """What of others' the last update was made from: whose, of the policy of which epoch, and how many acts."""
        ...

    @property
    def num_foreign(self) -> int:
        """Acts of others that wait for an update."""
        ...

    def share(self, swarm: SwarmId) -> None:
        """Begin with it.

        Raises:
            UsageError: if what it plays cannot be shared.
        """
        ...

    def holds(self, epoch: int, state: Cid) -> None:
        """The policy that it holds has this name."""
        ...

    def admit(self, given: Admit, epoch: int) -> Looked:
        """As `Admission.admit`."""
        ...


class Admission:
    """Of one learner."""

    def __init__(
        self,
        learner: Admits,
        manifest: Manifest,
        task: Task,
        shape: ActorShape,
        *,
        num_envs: int,
        gamma: float,
        swarm: SwarmId,
    ) -> None:
        """Hold no policy.

        Args:
            learner: that learns from them.
            manifest: of the run.
            task: the manifest's.
            shape: of the run's policy.
            num_envs: that an actor steps together, at most.
            gamma: the run's discount.
            swarm: its name.
        """
        self._learner, self._task, self._shape, self._gamma = learner, task, shape, np.float32(gamma)
        self._swarm, self._max_staleness = swarm, manifest.max_staleness
        self._most_samples, self._most_envs = manifest.most_foreign, num_envs
        self._is_checking = manifest.check_rate > 0
        self._least, self._most = np.inf, -np.inf  # rewards that were found true
        self._surroundings: bytes | None = None
        self._copies: dict[int, Words] = {}

    def holds(self, epoch: int, policy: Arrays) -> None:
        """The learner holds another policy now: what is too old for it is dropped."""
        self._copies[epoch] = copy_of(self._shape, policy)
        for old in [each for each in self._copies if not epoch - self._max_staleness <= each <= epoch]:
            del self._copies[old]
        self._learner.holds(epoch, epoch - self._max_staleness)

    def copy(self, epoch: int) -> CopyAnswer:
        """What leads to the copy of a policy, for actors.

        Raises:
            UsageError: if that policy is not here.
        """
        words, before = self._copies.get(epoch), self._copies.get(epoch - 1)
        if words is None:
            raise UsageError(f"the policy of epoch {epoch} is not here; ask for the one that is")
        digest, key = digest_of(words), key_of(words, epoch)
        patch = None if before is None else patch_of(before, words, epoch)
        if before is None or patch is None or len(patch) >= len(key):
            return CopyAnswer(digest, key)
        return CopyAnswer(digest, key, patch, digest_of(before))

    def admit(self, given: Admit, epoch: int) -> Looked:
        """Take a shard.

        Args:
            given: the shard, and whether it is to be replayed first. Nobody but this node knows its chance.
            epoch: of the policy that the learner holds.
        """
        try:
            shard = open_shard(given.shard, cid=given.cid, swarm=self._swarm)
            if shard.head.samples > self._most_samples:
                words = f"of {shard.head.samples} samples are more than an update takes, {self._most_samples}"
                return Looked(Finding(Verdict.DOES_NOT_FIT, words))
            rows = rows_of(shard, self._task.observation_space.size, self._task.action_space)
        except (DoesNotFitError, LimitError) as error:
            return Looked(Finding(Verdict.DOES_NOT_FIT, str(error)))
        except ProtocolError as error:  # of whom it is, is not proven
            return Looked(Finding(Verdict.FALSE, str(error), Lie.FORM))
        if rows.num_envs > self._most_envs or len(rows.lead) > MAX_LEAD:  # whoever looks takes all these steps again
            words = (
                f"{len(rows.lead)} steps of {rows.num_envs} environments lead to it; at most {MAX_LEAD} of "
                f"{self._most_envs} are replayed"
            )
            return Looked(Finding(Verdict.DOES_NOT_FIT, words))
        if float(np.abs(rows.rewards).max()) > MAX_REWARD:
            return Looked(Finding(Verdict.DOES_NOT_FIT, f"rewards beyond {MAX_REWARD:g} are not learned from"))
        found = self._of_this_run(shard, given.author, given.state, epoch)
        looks_at = None
        if found is None:
            looks_at = self._place(rows.rewards, given.chance) if given.is_checked else self._record(rows.rewards)
            found = _FINE if looks_at is None else self._check(shard, rows, looks_at)
        is_checked = looks_at is not None
        if found.verdict is not Verdict.TRUE:
            return refused(found, shard, is_checked)
        try:
            rollout = self._rollout(with_sights(rows, self._task.make))
        except CannotReplayError as error:
            return Looked(Finding(Verdict.CANNOT_BE_HAD, str(error)), is_checked=is_checked)
        self._learner.admit(given.author, rollout, rows.log_probs, shard.head.version)
        return Looked(found, rows.samples, is_checked=is_checked)

    def _of_this_run(self, shard: Shard, author: PeerId, state: Cid | None, epoch: int) -> Finding | None:
        """Why it is not to be used, whether it is true or not."""
        head = shard.head
        if shard.author != author:
            return Finding(Verdict.DOES_NOT_FIT, f"it is {shard.author}'s, and was named by another")
        if not epoch - self._max_staleness <= head.version <= epoch:
            return Finding(
                Verdict.DOES_NOT_FIT,
                f"its policy is of epoch {head.version}, which is too old, or none yet, at {epoch}",
            )
        if state is None or head.version not in self._copies:
            return Finding(Verdict.CANNOT_BE_HAD, f"the policy of epoch {head.version} is not here")
        if head.state != state:
            return Finding(Verdict.DOES_NOT_FIT, f"its policy is not this run's of epoch {head.version}")
        if head.copy and head.copy != digest_of(self._copies[head.version]):
            return Finding(Verdict.DOES_NOT_FIT, f"it was acted by another copy of the policy of epoch {head.version}")
        return None

    def _place(self, rewards: Floats, chance: int | None) -> Sequence[int]:
        """Which environments to look at: one by chance, or all."""
        envs = range(rewards.shape[1])
        return envs if chance is None else [envs[chance % len(envs)]]

    def _record(self, rewards: Floats) -> Sequence[int] | None:
        """Those to look at because of what they say was earned in them; None: there are none."""
        if not self._is_checking:
            return None
        odd = np.flatnonzero(((rewards < self._least) | (rewards > self._most)).any(axis=0)).tolist()
        return odd if len(odd) == 1 else range(rewards.shape[1]) if odd else None

    def _check(self, shard: Shard, rows: Rows, envs: Sequence[int]) -> Finding:
        if self._surroundings is None:
            self._surroundings = surroundings(self._task)
        acting = Acting(self._shape, self._copies[shard.head.version])
        env = envs[0] if len(envs) < rows.num_envs else None
        found = check_rows(shard, self._task, self._surroundings, acting, env=env)
        if found.verdict is Verdict.TRUE:
            true = rows.rewards[:, list(envs)]
            self._least, self._most = min(self._least, float(true.min())), max(self._most, float(true.max()))
        return found

    def _rollout(self, rows: Rows) -> Rollout:
        if rows.sights is None or rows.finals is None:
            raise CannotReplayError("what it met is not known")
        discounted = np.empty_like(rows.rewards)
        running = np.zeros(rows.num_envs, np.float32)
        for step in range(rows.steps):  # of the first episodes, what came before is not known
            running = running * self._gamma + rows.rewards[step]
            discounted[step] = running
            running = running * ~(rows.terminated[step] | rows.truncated[step])
        return Rollout(
            rows.sights, rows.actions, rows.rewards, rows.terminated, rows.truncated, discounted, rows.finals
        )
