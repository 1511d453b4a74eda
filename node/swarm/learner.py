"""A swarm's run on this node: drives the worker through epochs and rounds, and ends when the run is solved.

The shell around `training.exchange.rounds` and `crdt.views`: those decide, this does. Nothing here is agreed on with
anybody but through presence (who is where, what is offered and proposed) and documents (who holds which policy,
which evaluation reached the target).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from shoal.crdt.views import Evaluation, Policy, best_policy, evaluations, first_solved
from shoal.node.store.database import StorageError
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.replica import Replica
from shoal.node.swarm.workers import open_worker
from shoal.node.wire.channel import Channel
from shoal.protocol.errors import RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import Empty
from shoal.training.exchange.rounds import (
    Decide,
    Fetch,
    LearnerView,
    Offer,
    Patience,
    Proposal,
    Propose,
    Round,
    RoundKey,
    choose,
)
from shoal.training.facts import Facts, Phase
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.worker_calls import (
    ABANDON,
    COLLECT,
    EVALUATE,
    FINISH,
    LOAD,
    MERGE,
    OPEN,
    Collect,
    Evaluate,
    Finish,
    Load,
    Merge,
    MergeAnswer,
    Open,
    StateAnswer,
)

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

WORKER_TIMEOUT_S: Final = 300.0
CHUNKS_PER_EPOCH: Final = 8
RESTART_MAX_S: Final = 30.0
EVALUATION_TOLERANCE: Final = 0.1
SHARE_MARGIN: Final = 1.1
SHARE_WAIT_S: Final = 0.05
RECENT_EPISODES: Final = 20


class _OvertakenError(Exception):
    """The others have gone on without this node; it takes their policy."""


@dataclass(slots=True)
class RunStatus:
    """What a person may ask about the run on this node; presence and documents hold the rest.

    Attributes:
        epoch: of the policy held.
        env_steps: by all learners together, that went into it.
        cid: of its state.
        digest: of its parameters.
        rounds: merged, and how many of those with others.
        error: what went wrong last, while it lasts.
    """

    epoch: int = 0
    env_steps: int = 0
    cid: Cid | None = None
    digest: str | None = None
    rounds: int = 0
    shared_rounds: int = 0
    own_env_steps: int = 0
    error: str | None = None
    results: Path | None = None
    solved: bool = False
    final: Evaluation | None = None
    alone_since: float | None = None
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    recent_returns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_EPISODES))

    @property
    def training_return(self) -> float | None:
        """Mean return of the newest training episodes."""
        return sum(self.recent_returns) / len(self.recent_returns) if self.recent_returns else None

    @property
    def trained_alone(self) -> bool:
        """Whether there were rounds and nobody else was in any."""
        return self.rounds > 0 and self.shared_rounds == 0


class Run:
    """This node's part in one swarm."""

    def __init__(
        self,
        manifest: Manifest,
        swarm: SwarmId,
        me: PeerId,
        role: Role,
        replica: Replica,
        content: ContentStore,
        folder: Path,
    ) -> None:
        self.manifest = manifest
        self.swarm = swarm
        self.role = role
        self.replica = replica
        self.status = RunStatus()
        self._me = me
        self._content = content
        self._folder = folder
        self._patience = Patience()
        self._refused: set[str] = set()
        self._rate_since = 0.0
        self._rate_steps = 0
        self._speed = 0.0

    # Who is there.

    def learners(self) -> dict[PeerId, Facts]:
        """Other live learners that still learn."""
        idle = (Phase.DONE, Phase.FAILED, Phase.STARTING)
        return {
            peer: facts
            for peer, facts in self.replica.live.items()
            if facts.role is Role.LEARNER and facts.phase not in idle
        }

    def _best(self) -> Policy | None:
        """The newest policy of those that somebody alive, or this node, holds."""
        alive = {*self.replica.live, self._me}
        documents = {author: values for author, values in self.replica.documents().items() if author in alive}
        return best_policy(documents, self._refused)

    def _newer(self) -> Policy | None:
        """The best policy, if this node should take it instead of its own."""
        best = self._best()
        return best if best is not None and best.cid != self.status.cid and best.epoch >= self.status.epoch else None

    def solved(self) -> Evaluation | None:
        """The evaluation that ended the run."""
        return first_solved(self.replica.documents(), self.manifest.target_return, self._refused)

    # The life of a run.

    async def run(self, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Started once the manifest turns out to be one that this node can run.

        Raises:
            UsageError: before it is started, if it is not.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_for_company)
            if self.role is Role.STORAGE:
                task_status.started()
                await self._store()
                return
            started = False
            wait_s = 0.5
            while True:
                began = trio.current_time()
                try:
                    async with open_worker(nursery, self._me, self._folder / "worker.log") as worker:
                        initial = await self._open(worker)
                        if not started:
                            started = True
                            task_status.started()
                        self.status.error = None
                        await self._take_part(worker, initial)
                    await self._wait_for_another_end()
                    continue
                except UsageError:
                    if not started:
                        raise
                    log.exception("the run cannot go on")
                except (RemoteError, ShoalError) as error:
                    if not started and not isinstance(error, RemoteError):
                        raise
                    self.status.error = str(error)
                    if isinstance(error, RemoteError):
                        self.status.error = f"the worker failed ({error}); see {self._folder / 'worker.log'}"
                    log.warning("swarm %s: %s; next try in %.1f s", self.swarm, self.status.error, wait_s)
                self.replica.announce(phase=Phase.STARTING, offer_cid=None, proposal=None)
                await trio.sleep(wait_s)
                wait_s = 0.5 if trio.current_time() - began > 60 else min(2 * wait_s, RESTART_MAX_S)

    async def _open(self, worker: Channel) -> tuple[StateAnswer, bytes]:
        try:
            answer = await worker.call(OPEN, Open(self.manifest, self._me), timeout_s=WORKER_TIMEOUT_S)
        except RemoteError as error:
            if error.status is Status.INVALID_ARGUMENT:
                raise UsageError(error.message) from error
            raise
        return answer, bytes(answer.state or b"")

    async def _take_part(self, worker: Channel, initial: tuple[StateAnswer, bytes]) -> None:
        """Learn until the run has ended and its results are written."""
        state, data = initial
        self._hold(state, await self._content.put(data, keep=False))
        await self._take_newer(worker, at_start=True)
        while True:
            try:
                if await self._maybe_finish(worker):
                    return
                await self._wait_for_learners()
                await self._take_newer(worker)
                await self._maybe_evaluate(worker)
                if await self._collect(worker):
                    await self._update(worker)
            except _OvertakenError:
                log.info("swarm %s: the others went on to another epoch; following", self.swarm)
                await worker.call(ABANDON, Empty(), timeout_s=WORKER_TIMEOUT_S)
                await self._take_newer(worker)

    async def _wait_for_learners(self) -> None:
        """The first epoch waits until as many learners are there as the manifest asks for."""
        while self.status.epoch == 0 and len(self.learners()) + 1 < self.manifest.min_learners:
            self._say(Phase.WAITING)
            await self.replica.changed.wait()
            if self._newer() is not None:
                return

    # Policies.

    async def _take_newer(self, worker: Channel, *, at_start: bool = False) -> None:
        """If somebody holds a newer policy, or this node's disk does, load that."""
        while (policy := self._newer()) is not None:
            if not at_start:
                self._say(Phase.FETCHING)
            try:
                await self._load(worker, policy.cid, policy.holders, epoch=policy.epoch)
            except (UnavailableError, UsageError) as error:
                log.warning("swarm %s: epoch %d cannot be had: %s", self.swarm, policy.epoch, error)
                self._refused.add(policy.cid)
        if self.status.epoch > 0:
            await self._write_policy()

    async def _load(self, worker: Channel, cid: Cid, holders: Sequence[PeerId], *, epoch: int) -> None:
        sources = [
            peer for peer in (*holders, *self.replica.live) if peer != self._me and peer in self.replica.neighbours
        ]
        data = await self._content.get(cid, tuple(dict.fromkeys(sources)), keep=True)
        try:
            state = await worker.call(LOAD, Load(data), timeout_s=WORKER_TIMEOUT_S)
        except RemoteError as error:
            if error.status is Status.INVALID_ARGUMENT:
                raise UsageError(error.message) from error
            raise
        if state.epoch != epoch:
            raise UsageError(f"the state {cid} is of epoch {state.epoch}, not {epoch} as was claimed")
        self._hold(state, cid)

    def _hold(self, state: StateAnswer, cid: Cid) -> None:
        self.status.epoch, self.status.env_steps = state.epoch, state.env_steps
        self.status.cid, self.status.digest = cid, state.digest
        self._say(self.replica.facts.phase, samples=0, step=0)

    async def _write_policy(self) -> None:
        status = self.status
        register = {"epoch": status.epoch, "cid": status.cid, "env_steps": status.env_steps, "digest": status.digest}
        if self.replica.documents().get(self._me, {}).get("policy") != register:
            await self.replica.write(policy=register)

    # One epoch.

    async def _collect(self, worker: Channel) -> bool:
        """Collect until all learners together have a batch; False if there is something better to do."""
        self._say(Phase.COLLECTING)
        began = trio.current_time()
        samples = 0
        while not self._enough(samples):
            if self._newer() is not None or self.solved() is not None:
                await worker.call(ABANDON, Empty(), timeout_s=WORKER_TIMEOUT_S)
                return False
            if samples >= self._share() and trio.current_time() - began < self._patience.seconds:
                with trio.move_on_after(SHARE_WAIT_S):
                    await self.replica.changed.wait()
                continue
            chunk = max(1, self.manifest.batch_size // (CHUNKS_PER_EPOCH * (len(self.learners()) + 1)))
            started = trio.current_time()
            collected = await worker.call(COLLECT, Collect(chunk), timeout_s=WORKER_TIMEOUT_S)
            speed = collected.samples / (trio.current_time() - started)
            self._speed = speed if self._speed == 0 else 0.9 * self._speed + 0.1 * speed
            samples = collected.epoch_samples
            self.status.own_env_steps += collected.samples
            self.status.recent_returns.extend(collected.episode_returns)
            rate = self._measure_rate(collected.samples)
            self._say(Phase.COLLECTING, samples=samples, steps_per_s=rate, speed=round(self._speed, 1))
        return True

    def _share(self) -> float:
        """How much of the batch to collect before slower learners get the time to add theirs.

        By measured speed, and a little more. Without it, whoever is first in an epoch would collect it all.
        """
        peers = [facts.speed or self._speed for facts in self.learners().values()]
        mine = self._speed or 1.0
        return SHARE_MARGIN * self.manifest.batch_size * mine / (mine + sum(peers))

    def _enough(self, samples: int) -> bool:
        peers = [facts for facts in self.learners().values() if facts.epoch == self.status.epoch]
        if self.manifest.mode is Mode.GRADIENT:  # equal shares, so that minibatches are of one size
            return samples * (len(peers) + 1) >= self.manifest.batch_size
        if any(facts.phase in (Phase.UPDATING, Phase.EXCHANGING) for facts in peers):
            return True
        return samples + sum(facts.samples for facts in peers) >= self.manifest.batch_size

    def _measure_rate(self, samples: int) -> float:
        """Environment steps per second over the last seconds, pauses between collections included."""
        now = trio.current_time()
        if now - self._rate_since > 30:
            self._rate_since, self._rate_steps = now - 0.5, 0
        self._rate_steps += samples
        elapsed = now - self._rate_since
        if elapsed > 6:
            self._rate_since, self._rate_steps = now - 3, int(self._rate_steps * 3 / elapsed)
        return round(self._rate_steps / max(elapsed, 0.5), 1)

    async def _update(self, worker: Channel) -> None:
        """Run the algorithm's update, averaging whatever it yields, and hold the new policy."""
        self._say(Phase.UPDATING)
        epoch, env_steps = self.status.epoch + 1, self.status.env_steps
        answer = await self._merge(worker, Merge(epoch, env_steps))
        step = 0
        shared = False
        while answer.state is None:
            own = None
            if answer.contribution is not None:
                cid = await self._content.put(bytes(answer.contribution), keep=False)
                own = Offer(self._me, cid, int(answer.weight))
            proposal = await self._round(RoundKey(self.status.epoch, step), own)
            if step == 0:
                env_steps += sum(offer.weight for offer in proposal.offers)
                shared = any(offer.author != self._me for offer in proposal.offers)
            contributions = [await self._content.get(offer.cid, (), keep=False) for offer in proposal.offers]
            authors = tuple(offer.author for offer in proposal.offers)
            weights = tuple(float(offer.weight) for offer in proposal.offers)
            request = Merge(epoch, env_steps, authors, weights, tuple(contributions))
            answer = await self._merge(worker, request)
            step += 1
        self.status.rounds += 1
        self.status.shared_rounds += shared
        cid = await self._content.put(bytes(answer.state.state or b""), keep=True)
        self._say(Phase.COLLECTING, offer_cid=None, offer_weight=0)
        self._hold(answer.state, cid)
        contributed = {"env_steps": self.status.own_env_steps, "rounds": self.status.rounds}
        policy = {"epoch": epoch, "cid": cid, "env_steps": answer.state.env_steps, "digest": answer.state.digest}
        await self.replica.write(policy=policy, contributions=contributed)

    async def _merge(self, worker: Channel, request: Merge) -> MergeAnswer:
        answer = await worker.call(MERGE, request, timeout_s=WORKER_TIMEOUT_S)
        for author in answer.rejected:
            log.warning("swarm %s: the contribution of %s is malformed and left out", self.swarm, author)
        return answer

    async def _round(self, key: RoundKey, own: Offer | None) -> Proposal:
        """Settle with the others what is averaged; all of it is here when this returns.

        Raises:
            _OvertakenError: if the others went on without this node.
        """
        began = trio.current_time()
        current = Round(self.swarm, self._me, key, own, self._patience.seconds, began)
        self._say(
            Phase.EXCHANGING, step=key.step, offer_cid=own.cid if own else None, offer_weight=own.weight if own else 0
        )
        async with trio.open_nursery() as nursery:
            while True:
                for output in current.update(self._views(), trio.current_time()):
                    match output:
                        case Fetch(offer, sources):
                            nursery.start_soon(self._fetch_offer, current, offer, sources)
                        case Propose(proposal):
                            self._say(Phase.EXCHANGING, proposal=proposal)
                        case Decide(proposal):
                            nursery.cancel_scope.cancel()
                            if any(offer.author != self._me for offer in proposal.offers):
                                self._patience.learn(trio.current_time() - began)
                            return proposal
                newer = self._newer()
                if newer is not None and trio.current_time() - began > current.patience_s:
                    nursery.cancel_scope.cancel()
                    break
                with trio.move_on_at(max(current.next_wake, trio.current_time() + 0.01)):
                    await self.replica.changed.wait()
        raise _OvertakenError

    def _views(self) -> dict[PeerId, LearnerView]:
        """The other learners, less those who claim weights that no learner could have collected."""
        most = 4 * self.manifest.batch_size
        views = {peer: facts.view(peer) for peer, facts in self.learners().items()}

        def is_sane(view: LearnerView) -> bool:
            offers = (view.offer, *(view.proposal.offers if view.proposal else ()))
            return all(offer is None or offer.weight <= most for offer in offers)

        return {peer: view for peer, view in views.items() if is_sane(view)}

    async def _fetch_offer(self, current: Round, offer: Offer, sources: tuple[PeerId, ...]) -> None:
        wanted = tuple(dict.fromkeys(peer for peer in (offer.author, *sources) if peer in self.replica.neighbours))
        try:
            await self._content.get(offer.cid, wanted, keep=False, timeout_s=current.patience_s)
            current.hold(offer.cid)
        except UnavailableError as error:
            log.info("swarm %s: an offer of %s cannot be had: %s", self.swarm, offer.author, error)
            await trio.sleep(0.05)
            current.spoil(offer.cid)
        self.replica.changed.set()

    # Evaluation and the end.

    async def _maybe_evaluate(self, worker: Channel) -> None:
        """Evaluate the policy held, if it is this node's turn."""
        epoch, cid = self.status.epoch, self.status.cid
        if epoch % self.manifest.eval_interval or epoch == 0:
            return
        if choose(self.swarm, "evaluate", epoch, [self._me, *self.learners()]) != self._me:
            return
        if any(e.cid == cid for e in evaluations(self.replica.documents())):
            return
        self._say(Phase.EVALUATING)
        mean = await self._evaluate(worker)
        entry = {
            "cid": cid,
            "return": mean,
            "env_steps": self.status.env_steps,
            "episodes": self.manifest.eval_episodes,
        }
        await self.replica.write(evaluations={str(epoch): entry})

    async def _evaluate(self, worker: Channel) -> float:
        request = Evaluate(self.manifest.eval_episodes, (self.manifest.seed + 1_000_003) % 2**32)
        evaluated = await worker.call(EVALUATE, request, timeout_s=WORKER_TIMEOUT_S)
        return sum(evaluated.returns) / len(evaluated.returns)

    async def _maybe_finish(self, worker: Channel) -> bool:
        """If the run has ended, take its final policy and write the results."""
        final = self.solved()
        if final is None:
            if self.status.env_steps >= self.manifest.max_env_steps:
                await self._finish(worker, None)
                return True
            return False
        if final.cid != self.status.cid:
            self._say(Phase.FETCHING)
            try:
                await self._load(worker, final.cid, (final.author,), epoch=final.epoch)
            except (UnavailableError, UsageError) as error:
                log.warning("swarm %s: the solved policy cannot be had: %s", self.swarm, error)
                self._refused.add(final.cid)
                return False
        if final.author != self._me and not await self._confirm(worker, final):
            self._refused.add(final.cid)
            await self._take_newer(worker)
            return False
        await self._finish(worker, final)
        return True

    async def _confirm(self, worker: Channel, claim: Evaluation) -> bool:
        """Evaluate a policy that another member says is the solution; machines differ a little, lies a lot."""
        self._say(Phase.EVALUATING)
        target = self.manifest.target_return
        if target is None:
            return False
        mean = await self._evaluate(worker)
        if mean >= target - EVALUATION_TOLERANCE * abs(target):
            return True
        log.warning(
            "swarm %s: %s claims a return of %.1f, but it is %.1f here; going on",
            self.swarm,
            claim.author,
            claim.mean_return,
            mean,
        )
        return False

    async def _finish(self, worker: Channel, final: Evaluation | None) -> None:
        status = self.status
        status.solved = final is not None
        status.final = final
        if status.ended_at is None:
            status.ended_at = time.time()
        points = self.curve()
        result = {
            "swarm": self.swarm,
            "task": self.manifest.task,
            "algorithm": self.manifest.algorithm,
            "solved": status.solved,
            "return": final.mean_return if final else (points[-1][2] if points else None),
            "target_return": self.manifest.target_return,
            "epoch": status.epoch,
            "env_steps": status.env_steps,
            "digest": status.digest,
            "policy": status.cid,
            "trained_alone": status.trained_alone,
            "seconds": round(status.ended_at - status.started_at, 3),
            "curve": [{"epoch": int(p[0]), "env_steps": int(p[1]), "return": p[2]} for p in points],
        }
        await worker.call(FINISH, Finish(str(self._folder), points, result), timeout_s=WORKER_TIMEOUT_S)
        status.results = self._folder
        await self._write_policy()
        self._say(Phase.DONE, samples=0, steps_per_s=0.0, offer_cid=None, proposal=None)
        log.info("swarm %s: done after %d environment steps, solved: %s", self.swarm, status.env_steps, status.solved)

    async def _wait_for_another_end(self) -> None:
        """Rest, unless it turns out that the run was solved by an earlier policy: then end with that one."""
        while True:
            final = self.solved()
            if final is not None and (self.status.final is None or final.cid != self.status.final.cid):
                return
            await self.replica.changed.wait()

    def curve(self) -> tuple[tuple[float, ...], ...]:
        """(epoch, environment steps, return), one point per evaluated epoch."""
        points: dict[int, tuple[float, ...]] = {}
        for evaluation in evaluations(self.replica.documents()):
            points.setdefault(
                evaluation.epoch, (float(evaluation.epoch), float(evaluation.env_steps), evaluation.mean_return)
            )
        return tuple(points[epoch] for epoch in sorted(points))

    # Storage, and being alone.

    async def _store(self) -> None:
        """Hold and serve whatever policy is newest."""
        self._say(Phase.STORING)
        while True:
            policy = self._newer()
            if policy is not None:
                sources = [peer for peer in policy.holders if peer in self.replica.neighbours]
                try:
                    await self._content.get(policy.cid, sources, keep=True)
                    self.status.epoch, self.status.env_steps = policy.epoch, policy.env_steps
                    self.status.cid, self.status.digest = policy.cid, policy.digest
                    self._say(Phase.STORING)
                    self.status.error = None
                except (UnavailableError, StorageError) as error:
                    self.status.error = str(error)
                    log.warning("swarm %s: epoch %d cannot be kept yet: %s", self.swarm, policy.epoch, error)
            await self.replica.changed.wait()
            await trio.sleep(0.2)  # the newest of several in a row is enough

    async def _watch_for_company(self) -> None:
        """Be loud about being alone."""
        await trio.sleep(2)
        while True:
            alone = not self.replica.live
            if alone and self.status.alone_since is None:
                self.status.alone_since = time.time()
                log.warning(
                    "swarm %s: ALONE: no other member can be heard; what is trained now, is trained alone", self.swarm
                )
            elif not alone and self.status.alone_since is not None:
                self.status.alone_since = None
                log.info("swarm %s: no longer alone", self.swarm)
            await self.replica.changed.wait()

    def _say(self, phase: Phase, **changes: Any) -> None:
        self.replica.announce(phase=phase, epoch=self.status.epoch, env_steps=self.status.own_env_steps, **changes)
