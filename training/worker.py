"""The worker process of one swarm: the only place where environments run and networks learn.

A shell: it reads calls from a socket, does them one after the other, and answers. The node that started it drives
it (`training.worker_calls`) and replaces it when it dies. It ends when the socket does.

Started by `shoal.training.keeper`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from shoal.dht import blocks
from shoal.protocol.codec import decode_message, encode_message
from shoal.protocol.errors import ProtocolError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import MAX_WORKER_ATTACHMENT_BYTES
from shoal.protocol.rpc import Called, RpcConnection
from shoal.protocol.services import Empty
from shoal.training import watch
from shoal.training.algorithms import DivergedError, Exchange, Learner, UpdateStats, load_algorithm
from shoal.training.algorithms.base import Algorithm, AnyUpdate, Consulting, Hosting, Joint, Parted, Probing, Settled
from shoal.training.algorithms.base import Collected as LearnerCollected
from shoal.training.algorithms.engine import ActedFor, PolicyLearner
from shoal.training.arena import Arena, Region
from shoal.training.effects import Effect, Fetch, Fetched, Give, Latest, Post, Scores, Wanted
from shoal.training.electorate import Delivered, Electorate
from shoal.training.events import Events
from shoal.training.exchange.rules import Aggregator, Codec
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.merging import Answer, Given, Merging, NothingToMergeError
from shoal.training.requirements import check_loaded, requirements
from shoal.training.rollouts.acting import ActorShape
from shoal.training.rollouts.actor import Actor
from shoal.training.rollouts.admitting import Admission, SharesPlays
from shoal.training.rollouts.shard import unsigned
from shoal.training.state import decode_arrays, digest, encode_arrays
from shoal.training.statements import HASH_BYTES, NO_BALLOT
from shoal.training.tasks import Task, load_task
from shoal.training.tasks.failures import FILE, Failures, TaskFailedError, append
from shoal.training.tasks.plain import plain_roles
from shoal.training.tasks.source import Posted
from shoal.training.tasks.wire import encode_takes
from shoal.training.watch import Slot
from shoal.training.worker_calls import (
    ABANDON,
    ACT,
    ADMIT,
    BEGIN,
    COLLECT,
    COLLECT_ON,
    COPY,
    EVALUATE,
    EVALUATE_ON,
    FINISH,
    GO_ON,
    LARGE_STATE_BYTES,
    LOAD,
    LOAD_COPY,
    LOG,
    MAX_COUNT,
    MERGE,
    MERGE_FAILED,
    OPEN,
    ROLL_OUT,
    TASK_FAILED,
    Abandon,
    Act,
    Acted,
    Admit,
    Admitted,
    Begin,
    Collect,
    Collected,
    ConsultAsked,
    CopyAnswer,
    CopyOf,
    Evaluate,
    Evaluated,
    FetchAsked,
    Finish,
    GoOn,
    LargeArray,
    LatestAsked,
    LearnedFrom,
    Load,
    LoadCopy,
    Log,
    Merge,
    MergeAnswer,
    Open,
    PlayOn,
    PostAsked,
    RolledOut,
    RollOut,
    ScoresAsked,
    StateAnswer,
)

log = logging.getLogger(__name__)

MAX_OVERSHOOT_BATCHES: Final = 256 * 8
"""Of environment steps beyond those a run has: what 256 learners, each with a backlog, may bring in its last epoch."""

MAX_IDLE_EPOCHS: Final = 2**20
"""Epochs without an environment step in them; there are hardly any."""


_NOTHING: Final = Collected(0, 0, ())

P = TypeVar("P", Collected, Evaluated)


class Worker:
    """One swarm's learner behind the worker's methods."""

    def __init__(
        self, arena: Arena | None = None, make: Callable[[Open], tuple[Learner, Failures]] | None = None
    ) -> None:
        """Hold no run.

        Args:
            arena: shared with the node; one that nobody shares, if None.
            make: gives the learner of a run; that of what is installed, if None.
        """
        self._make = make_installed if make is None else make
        self._arena = Arena.make() if arena is None else arena
        self._learner: Learner | None = None
        self._failures = Failures("")
        self._actor: Actor | None = None
        self._admission: Admission | None = None
        self._sharing: SharesPlays | None = None
        self._update: AnyUpdate | None = None
        self._ahead = _NOTHING  # while it waited
        self._events: Events | None = None
        self._epoch = 0
        self._next = _Descent()
        self._is_counted = False
        self._asked: Effect | None = None
        self._playing: tuple[Generator[Wanted, Any, Any], float] | None = None  # and when it was begun
        self._play_waits: Wanted | None = None
        self._rejected: tuple[PeerId, ...] = ()  # by the merge before
        self._max_env_steps = 0
        self._merging = Merging(Aggregator(), Codec.FP32, self._arena)
        self._peer: PeerId | None = None
        self.methods: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
            OPEN.name: (OPEN.request, self.open),
            LOAD.name: (LOAD.request, self.load),
            COLLECT.name: (COLLECT.request, self.collect),
            COPY.name: (COPY.request, self.copy),
            LOAD_COPY.name: (LOAD_COPY.request, self.load_copy),
            ROLL_OUT.name: (ROLL_OUT.request, self.roll_out),
            ADMIT.name: (ADMIT.request, self.admit),
            COLLECT_ON.name: (COLLECT_ON.request, self.collect_on),
            ACT.name: (ACT.request, self.act),
            BEGIN.name: (BEGIN.request, self.begin),
            MERGE.name: (MERGE.request, self.merge),
            GO_ON.name: (GO_ON.request, self.go_on),
            ABANDON.name: (ABANDON.request, self.abandon),
            EVALUATE.name: (EVALUATE.request, self.evaluate),
            EVALUATE_ON.name: (EVALUATE_ON.request, self.evaluate_on),
            LOG.name: (LOG.request, self.log),
            FINISH.name: (FINISH.request, self.finish),
        }

    @property
    def learner(self) -> Learner:
        """The learner that `open` made."""
        if self._learner is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "the worker holds no run yet")
        return self._learner

    def open(self, request: Open) -> StateAnswer:
        """Set up the run and give its initial state; an actor has none."""
        manifest = request.manifest
        self._actor = self._admission = self._sharing = None
        self._max_env_steps = manifest.max_env_steps + MAX_OVERSHOOT_BATCHES * max(manifest.batch.largest_share, 1024)
        if request.role is Role.ACTOR:
            self._learner = None
            self._actor, self._failures = make_actor(request)
            return _Descent().answer("")
        self._learner, self._failures = self._make(request)
        if isinstance(self._learner, Settled) and request.folder:
            self._learner.settle_in(Path(request.folder))
        self._update, self._epoch = None, 0
        self.close()
        self._events = Events(Path(request.folder) / "tensorboard") if request.folder else None
        self._peer = request.peer
        self._merging = Merging(Aggregator.parse(manifest.aggregator), manifest.codec, self._arena)
        if manifest.mode is Mode.ROLLOUTS:
            if isinstance(self._learner, SharesPlays) and request.swarm is not None:
                self._learner.share(request.swarm)
                self._sharing = self._learner
            else:
                self._admission = make_admission(request, self._learner)
        return self._state(_Descent())

    def load(self, request: Load) -> StateAnswer:
        """Replace the learner's state."""
        shared = self._arena.view(Region.STATE, request.state_bytes) if request.state_bytes else request.state
        data = bytes(shared or b"")
        arrays, meta = decode_arrays(data)
        epoch, env_steps = _count("epoch", meta.get("epoch")), _count("env_steps", meta.get("env_steps"))
        if env_steps > self._max_env_steps or epoch > env_steps + MAX_IDLE_EPOCHS:
            raise ProtocolError(f"this run cannot have come to epoch {epoch} with {env_steps} environment steps")
        descent = _Descent.read(meta)
        if self._actor is not None:
            if request.cid is None:
                raise UsageError("a state that an actor is to act by has a name; say it")
            self._actor.take(arrays, epoch, request.cid)
            return replace(descent.answer(""), copy=self._actor.digest)
        keep_samples = request.keep_samples and epoch == self._epoch + 1
        self.learner.import_state(arrays, keep_samples=keep_samples)
        if not keep_samples:
            self._merging.forget()
        self._update = None
        self._epoch = epoch
        self._note_policy(data)
        return descent.answer(digest(self.learner.policy_arrays()), epoch_samples=self.learner.samples)

    def collect(self, request: Collect) -> Collected:
        """Collect experience."""
        began = time.monotonic()
        ends = math.inf if request.max_seconds is None else began + request.max_seconds
        learner = self.learner
        if isinstance(learner, Consulting):
            self._playing = learner.collecting(request.num_steps, lambda: time.monotonic() >= ends), began
            return self._play(None, lambda: Collected(0, learner.samples, ()))
        return self._collected(learner.collect(request.num_steps, lambda: time.monotonic() >= ends), began)

    def copy(self, request: CopyOf) -> CopyAnswer:
        """What leads to the acting copy of a policy."""
        if self._admission is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "nobody acts for what is learned here")
        return self._admission.copy(request.epoch)

    def load_copy(self, request: LoadCopy) -> Empty:
        """Act by a copy."""
        if self._actor is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "only an actor acts by a copy")
        self._actor.take_copy(request.copy, request.epoch, request.cid, request.digest)
        return Empty()

    def roll_out(self, request: RollOut) -> RolledOut:
        """Make a shard."""
        if self._actor is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "only an actor makes shards")
        began = time.monotonic()
        made = self._actor.roll_out(request.samples, request.before)
        head, body = unsigned(made.head, made.rows.columns(self._actor.action_space))
        seconds, failed = time.monotonic() - began, self._failures
        counted = (made.rows.samples, made.episode_returns, seconds, failed.count, failed.summary)
        return RolledOut(head, body, *counted, stream=made.head.stream)

    def admit(self, request: Admit) -> Admitted:
        """Learn from what another member made."""
        admission = self._admission or self._sharing
        if admission is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "nothing that others collected is learned from here")
        began = time.monotonic()
        looked = admission.admit(request, self._epoch)
        found = looked.finding
        seconds, lie = time.monotonic() - began, "" if found.lie is None else str(found.lie)
        learner = self.learner
        waiting = learner.num_foreign if isinstance(learner, PolicyLearner | SharesPlays) else 0
        words = (str(found.verdict), found.words, lie, found.step, found.part)
        total = learner.samples
        return Admitted(*words, looked.samples, seconds, total, waiting, looked.proof, looked.is_checked)

    def _note_policy(self, state: bytes) -> None:
        """The learner holds another policy: that of a state."""
        if self._admission is not None:
            self._admission.holds(self._epoch, self.learner.policy_arrays())
        if self._sharing is not None:
            self._sharing.holds(self._epoch, blocks.name(state).cid)

    def collect_on(self, request: PlayOn) -> Collected:
        """Go on collecting, with what was waited for."""
        return self._play(request, lambda: Collected(0, self.learner.samples, ()))

    def act(self, request: Act) -> Acted:
        """Answer another member."""
        learner = self.learner
        if not isinstance(learner, Consulting):
            raise RemoteError(Status.FAILED_PRECONDITION, "what is learned here answers nobody")
        return Acted(learner.answer(request.policy, request.takes))

    def _play(self, reply: PlayOn | None, waiting: Callable[[], P]) -> P:
        """Go on with what is played until it waits for another member or a content, or is done."""
        if self._playing is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "nothing is played that waits for anybody")
        playing, began = self._playing
        try:
            asked = playing.send(None if reply is None else self._as_asked(reply))
        except StopIteration as end:
            self._playing = None
            return cast(P, end.value if isinstance(end.value, Evaluated) else self._collected(end.value, began))
        except BaseException:
            self._playing = None
            raise
        self._play_waits = asked
        if isinstance(asked, Fetch):
            return replace(waiting(), fetch=FetchAsked(asked.cid, asked.max_bytes, asked.waits))
        takes = encode_takes(asked.takes)
        consult = ConsultAsked(asked.part, asked.policy, takes, len(asked.takes), asked.seconds, asked.falls_back)
        return replace(waiting(), consult=consult)

    def _as_asked(self, reply: PlayOn) -> Fetched | bytes | None:
        """What was waited for, as it is sent to what is played."""
        data = None if reply.data is None else bytes(reply.data)
        return Fetched(data, reply.refusal) if isinstance(self._play_waits, Fetch) else data

    def _collected(self, collected: LearnerCollected, began: float) -> Collected:
        returns = tuple(float(value) for value in collected.episode_returns)
        seconds, failed = time.monotonic() - began, self._failures
        return Collected(collected.samples, collected.total, returns, seconds, failed.count, failed.summary)

    def collect_ahead(self, is_over: Callable[[], bool]) -> None:
        """Go on collecting while an update waits for the others; what fails shows when it is collected as usual."""
        if self._learner is None or self._update is None:
            return
        began = time.monotonic()
        try:
            more = self._collected(self._learner.collect_ahead(is_over), began)
        except Exception:  # an environment, an algorithm or a defect of this program: any type
            log.exception("collecting while the others are waited for failed")
            return
        samples = self._ahead.samples + more.samples
        self._ahead = replace(
            more,
            samples=samples,
            epoch_samples=samples,
            episode_returns=self._ahead.episode_returns + more.episode_returns,
            seconds=self._ahead.seconds + more.seconds,
        )

    def begin(self, request: Begin) -> MergeAnswer:
        """Start the update of the policy that the learner holds."""
        if _count("epoch", request.epoch) != self._epoch:
            raise RemoteError(Status.FAILED_PRECONDITION, f"the worker holds epoch {self._epoch}, not {request.epoch}")
        before = _Descent(
            request.epoch,
            _count("env_steps", request.env_steps),
            None,
            NO_BALLOT,
            Electorate.from_plain(request.electorate),
        )
        self._drop_update(keep_samples=True)
        self._update, self._ahead = self.learner.update(), _NOTHING
        self._next = replace(before, epoch=before.epoch + 1, parent=request.parent)
        self._is_counted = False
        return self._go_on(None, ())

    def merge(self, request: Merge) -> MergeAnswer:
        """Send the update the average that it waits for."""
        rejected: list[PeerId] = []
        average = self._average(request, rejected)
        self._merging.settle(arrived=self._peer in request.authors and self._peer not in rejected)
        if not self._is_counted:  # the first exchange of an epoch says who put in what
            self._is_counted = True
            delivered = tuple(
                Delivered(author, weight, seconds)
                for author, weight, seconds in zip(request.authors, request.weights, request.seconds, strict=True)
                if author not in rejected
            )
            self._next = replace(
                self._next,
                ballot=request.ballot,
                env_steps=self._next.env_steps + sum(each.weight for each in delivered),
                electorate=self._next.electorate.after(delivered),
            )
        return self._go_on(average, tuple(rejected), request.authors)

    def go_on(self, request: GoOn) -> MergeAnswer:
        """Give the update what it asked for beside averages."""
        if isinstance(self._asked, Post | Give):
            return self._go_on(request.cid, self._rejected)
        if isinstance(self._asked, Scores):
            return self._go_on(request.scores, self._rejected)
        found = []
        for each in request.posts:
            try:
                arrays, meta = decode_arrays(each.data)
            except ProtocolError as error:
                log.info("what %s posted is of no use: %s", each.author, error)
                continue
            found.append(Posted(each.author, each.cid, each.epoch, arrays, meta))
        return self._go_on(tuple(found), self._rejected)

    def _go_on(self, reply: object, rejected: tuple[PeerId, ...], authors: tuple[PeerId, ...] = ()) -> MergeAnswer:
        """Run the update until it wants something, or is done. What it is sent first is None."""
        try:
            wanted = self._running_update().send(reply)
        except StopIteration as end:
            self._update = None
            self._epoch = self._next.epoch
            stats: UpdateStats = end.value
            state = self._state(self._next)
            values = {f"training/{name}": value for name, value in stats.metrics.items()}
            self._note(values, self._next.env_steps)
            waiting = self.learner.samples
            ahead = replace(self._ahead, epoch_samples=waiting) if self._ahead.samples or waiting else None
            done = MergeAnswer(state=state, stats=stats.metrics, rejected=rejected, ahead=ahead)
            if not isinstance(self.learner, PolicyLearner | SharesPlays):
                return done
            used = tuple(LearnedFrom(*each) for each in self.learner.learned_from)
            return replace(done, learned_from=used, waiting=self.learner.num_foreign)
        except DivergedError as error:
            self._update = None
            merged = [author for author in authors if author not in rejected]
            raise RemoteError(MERGE_FAILED, f"{error}; merged were {', '.join(merged)}") from error
        except BaseException:
            self._update = None
            raise
        self._rejected = rejected
        match wanted:
            case Post(topic, arrays, meta):
                self._asked = wanted
                data = encode_arrays(arrays, meta)
                return MergeAnswer(rejected=rejected, is_last=False, post=PostAsked(topic, data))
            case Latest(topic, count, max_age):
                self._asked = wanted
                return MergeAnswer(rejected=rejected, is_last=False, latest=LatestAsked(topic, count, max_age))
            case Scores(probes, since):
                self._asked = wanted
                return MergeAnswer(rejected=rejected, is_last=False, scores=ScoresAsked(probes, since))
            case Give(head, columns):
                self._asked = wanted
                made = RolledOut(*unsigned(head, columns), head.samples)
                return MergeAnswer(rejected=rejected, is_last=False, given=made)
            case _:
                return self._offer(wanted, rejected)

    def _offer(self, wanted: Exchange | Joint, rejected: tuple[PeerId, ...]) -> MergeAnswer:
        """Something is to be averaged."""
        contribution = self._merging.offer(wanted)
        layout = self._merging.layout
        large = (
            ()
            if layout is None
            else tuple(LargeArray(each.name, each.numel, each.codec, each.bound) for each in layout.segments)
        )
        answer = MergeAnswer(wanted.weight, contribution, None, {}, rejected, wanted.is_last, large)
        if layout is None and contribution is not None and self._lend(Region.OFFERED, contribution):
            return replace(answer, contribution=None, contribution_bytes=len(contribution))
        return answer

    def _running_update(self) -> AnyUpdate:
        if self._update is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "no update is under way")
        return self._update

    def _average(self, request: Merge, rejected: list[PeerId]) -> Answer:
        """What was contributed, merged; who is left out is put into ``rejected``."""
        self._running_update()
        numbers = {len(each) for each in (request.authors, request.weights, request.seconds, request.contributions)}
        if len(numbers) > 1:
            raise ProtocolError("what is to be merged is not of one number")
        given = []
        for author, weight, data in zip(request.authors, request.weights, request.contributions, strict=True):
            if author in request.absent:
                log.warning("the large arrays of %s did not come", author)
                rejected.append(author)
            else:
                given.append(Given(author, weight, bytes(data)))
        try:
            return self._merging.merge(given, rejected)
        except NothingToMergeError as error:
            raise RemoteError(Status.FAILED_PRECONDITION, str(error)) from error

    def abandon(self, request: Abandon) -> Empty:
        """Drop any half-done update, and what was collected unless it is to be kept."""
        self._drop_update(keep_samples=request.keep_samples)
        return Empty()

    def _drop_update(self, *, keep_samples: bool = False) -> None:
        if self._update is not None:
            self._update.close()
            self._update = None
        if not keep_samples:
            self.learner.abandon()

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Evaluate the present policy."""
        learner = self.learner
        if isinstance(learner, Consulting):

            def evaluating() -> Generator[Wanted, Any, Evaluated]:
                return self._evaluated((yield from learner.evaluating(request.episodes, request.seed)))

            self._playing = evaluating(), time.monotonic()
            return self._play(None, lambda: Evaluated(()))
        return self._evaluated(learner.evaluate(request.episodes, request.seed))

    def evaluate_on(self, request: PlayOn) -> Evaluated:
        """Go on evaluating, with what was waited for."""
        return self._play(request, lambda: Evaluated(()))

    def _evaluated(self, returns: Sequence[float]) -> Evaluated:
        failed = self._failures
        scores = self.learner.scores if isinstance(self.learner, Probing) else {}
        sound = {name: float(score) for name, score in scores.items() if math.isfinite(score)}
        return Evaluated(tuple(float(value) for value in returns), failed.count, failed.summary, sound)

    def log(self, request: Log) -> Empty:
        """Note numbers of the node."""
        self._note(request.values, _count("env_steps", request.env_steps))
        return Empty()

    def close(self) -> None:
        """Close the files that are open."""
        if self._events is not None:
            self._events.close()

    def _note(self, values: Mapping[str, float], env_steps: int) -> None:
        if self._events is not None:
            self._events.write(values, env_steps=env_steps, at=time.time())

    def finish(self, request: Finish) -> Empty:
        """Write the results of the run."""
        folder = Path(request.folder)
        folder.mkdir(parents=True, exist_ok=True)
        policy = encode_arrays(self.learner.policy_arrays(), request.result)
        _write(folder / "policy.safetensors", policy)
        _write(folder / "result.json", (json.dumps(request.result, indent=2) + "\n").encode())
        _draw_curve(folder / "curve.png", request)
        return Empty()

    def _state(self, descent: _Descent) -> StateAnswer:
        learner = self.learner
        data = encode_arrays(learner.export_state(), descent.meta())
        self._note_policy(data)
        policy = digest(learner.policy_arrays())
        part = learner.part if isinstance(learner, Parted) else ""
        roles = plain_roles(learner.seats_for_people) if isinstance(learner, Hosting) else ()
        if self._lend(Region.STATE, data):
            return replace(descent.answer(policy), state_bytes=len(data), part=part, roles=roles)
        return replace(descent.answer(policy, state=data), part=part, roles=roles)

    def _lend(self, region: Region, data: bytes) -> bool:
        """Put something into the arena, if it is large."""
        is_large = len(data) >= LARGE_STATE_BYTES
        if is_large:
            self._arena.view(region, len(data))[:] = data
        return is_large


def make_actor(request: Open) -> tuple[Actor, Failures]:
    """What acts in a run, and where it notes what fails in environments.

    Raises:
        UsageError: if the task and the algorithm that are installed are not those that the run needs, or nobody can act
            for such a policy.
    """
    manifest = request.manifest
    if request.swarm is None or manifest.mode is not Mode.ROLLOUTS:
        raise UsageError("there are actors in mode rollouts alone; take the role learner or storage")
    task, algorithm = load_task(manifest.task, manifest.env_arguments), load_algorithm(manifest.algorithm)
    check_loaded(manifest, requirements(manifest.algorithm, algorithm.version, manifest.task, task.version))
    if request.folder:
        task.failures.keep_in(Path(request.folder))
    shape, num_envs, _ = _acted_for(algorithm, manifest, task)
    actor = Actor(manifest, task, shape, num_envs, swarm=request.swarm, peer=request.peer, stream=request.stream)
    return actor, task.failures


def make_admission(request: Open, learner: Learner) -> Admission:
    """What lets a learner learn from others.

    Raises:
        UsageError: if nobody can act for such a policy.
    """
    manifest = request.manifest
    if request.swarm is None or not isinstance(learner, PolicyLearner):
        raise UsageError(f"what {manifest.algorithm} learns from, others cannot collect; take the mode local")
    task, algorithm = load_task(manifest.task, manifest.env_arguments), load_algorithm(manifest.algorithm)
    shape, num_envs, gamma = _acted_for(algorithm, manifest, task)
    return Admission(learner, manifest, task, shape, num_envs=num_envs, gamma=gamma, swarm=request.swarm)


def _acted_for(algorithm: Algorithm, manifest: Manifest, task: Task) -> tuple[ActorShape, int, float]:
    """The shape of a run's policy, how many environments step together, and the discount."""
    if not isinstance(algorithm, ActedFor):
        raise UsageError(f"nobody can act for what {manifest.algorithm} learns; take the mode local")
    settings = algorithm.configured(manifest, task)
    return algorithm.actor_shape(manifest, task), settings.num_envs, settings.gamma


def make_installed(request: Open) -> tuple[Learner, Failures]:
    """The learner of the task and the algorithm that are installed, and where it notes what fails in environments.

    Raises:
        UsageError: if they are not those that the run needs.
    """
    manifest = request.manifest
    task, algorithm = load_task(manifest.task, manifest.env_arguments), load_algorithm(manifest.algorithm)
    check_loaded(manifest, requirements(manifest.algorithm, algorithm.version, manifest.task, task.version))
    if request.folder:
        task.failures.keep_in(Path(request.folder))
    made = algorithm.learner(manifest, task, peer=request.peer, life=request.life, part=request.part)
    return made, task.failures


@dataclass(frozen=True, slots=True)
class _Descent:
    """What a state says of itself beside its arrays: where it comes from, and who counts in what follows."""

    epoch: int = 0
    env_steps: int = 0
    parent: Cid | None = None
    ballot: bytes = NO_BALLOT
    electorate: Electorate = field(default_factory=Electorate)

    def meta(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "env_steps": self.env_steps,
            "parent": self.parent,
            "ballot": self.ballot.hex(),
            "electorate": self.electorate.to_plain(),
        }

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> _Descent:
        """The inverse of `meta`; `ProtocolError` if it is not that."""
        parent, ballot = meta.get("parent"), meta.get("ballot")
        try:
            parent_cid = None if parent is None else Cid.parse(parent)
            name = bytes.fromhex(ballot if isinstance(ballot, str) else "")
        except (UsageError, ValueError, TypeError) as error:
            raise ProtocolError(f"the state does not say what it was made from: {error}") from error
        if len(name) != HASH_BYTES:
            raise ProtocolError("the state does not say by which ballot it was made")
        electorate = Electorate.from_plain(meta.get("electorate"))
        return cls(
            _count("epoch", meta.get("epoch")), _count("env_steps", meta.get("env_steps")), parent_cid, name, electorate
        )

    def answer(self, policy_digest: str, *, state: bytes | None = None, epoch_samples: int = 0) -> StateAnswer:
        return StateAnswer(
            self.epoch,
            self.env_steps,
            policy_digest,
            self.parent,
            self.ballot,
            self.electorate.to_plain(),
            state,
            epoch_samples,
        )


def _write(path: Path, data: bytes) -> None:
    half = path.with_name(path.name + ".part")
    half.write_bytes(data)
    half.replace(path)


def _draw_curve(path: Path, request: Finish) -> None:
    import matplotlib as mpl  # a second's import that only the end of a run needs

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [point[1] for point in request.curve]
    axes.plot(steps, [point[2] for point in request.curve], marker="o", markersize=3, label="mean evaluation return")
    target = request.result.get("target_return")
    if isinstance(target, int | float):
        axes.axhline(target, linestyle="--", linewidth=1, color="tab:green", label=f"target {target:g}")
    axes.set_xlabel("environment steps, all peers together")
    axes.set_ylabel("return")
    axes.set_title(str(request.result.get("task", "")))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    half = path.with_name("." + path.name)
    figure.savefig(half, dpi=120)
    plt.close(figure)
    half.replace(path)


def serve(connection_socket: socket.socket, worker: Worker) -> None:
    """Do calls until the far side closes the socket, and collect while an update waits for the next one."""
    connection = RpcConnection(max_attachment_bytes=MAX_WORKER_ATTACHMENT_BYTES)
    calls = select.poll()
    calls.register(connection_socket, select.POLLIN)
    try:
        while True:
            watch.page[Slot.BUSY] = 1
            worker.collect_ahead(lambda: bool(calls.poll(0)))
            watch.page[Slot.BUSY] = 0
            data = connection_socket.recv(1 << 20)
            if not data:
                return
            for event in connection.receive_data(data, time.monotonic()):
                if isinstance(event, Called):
                    watch.page[Slot.BUSY] = 1
                    _do(worker, connection, event)
                    watch.page[Slot.BUSY] = 0
                    for piece in connection.data_to_send():
                        connection_socket.sendall(piece)
    finally:
        worker.close()


def _do(worker: Worker, connection: RpcConnection, call: Called) -> None:
    """Do one call; whatever it raises is told to the node as what it is, and the worker lives on."""
    if call.method not in worker.methods:
        connection.fail(call.call_id, Status.UNIMPLEMENTED, f"a worker has no method {call.method}")
        return
    try:
        request_type, method = worker.methods[call.method]
        body, attachments = encode_message(method(decode_message(request_type, call.body, call.attachments)))
        connection.answer(call.call_id, body, attachments)
    except RemoteError as error:
        connection.fail(call.call_id, error.status, error.message)
    except TaskFailedError as error:
        log.exception("%s failed", call.method)
        connection.fail(call.call_id, TASK_FAILED, str(error))
    except ShoalError as error:
        connection.fail(call.call_id, Status.INVALID_ARGUMENT, str(error))
    except (OSError, MemoryError) as error:
        log.exception("%s failed", call.method)
        connection.fail(call.call_id, Status.RESOURCE_EXHAUSTED, _in_words(error))
    except Exception as error:  # an environment, an algorithm or a defect of this program: any type
        log.exception("%s failed", call.method)
        connection.fail(call.call_id, Status.INTERNAL, _in_words(error))


def _in_words(error: Exception) -> str:
    match error:
        case OSError(strerror=str(strerror), filename=filename) if filename is not None:
            return f"{strerror}: {filename}"
        case OSError(strerror=str(strerror)):
            return strerror
        case MemoryError():
            return f"out of memory {error}".strip()
    return f"{type(error).__name__}: {error}"


def _count(what: str, value: object) -> int:
    """A number that a state or a node gives, checked."""
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ProtocolError(f"the {what} is not a number from 0 to 2**53")
    return value


def main(connection_socket: socket.socket, arena: Arena, folder: Path) -> None:
    """Serve a socket as this process's only business.

    Args:
        connection_socket: to the node.
        arena: shared with it.
        folder: of the run.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)  # stderr: the worker's log
    os.nice(5)  # the node that this worker belongs to comes first
    report = folder / FILE
    append(report, "")
    watch.begin(report, lambda words: append(report, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {_where()} {words}\n"))
    try:
        serve(connection_socket, Worker(arena))
    except (ConnectionError, BrokenPipeError):
        return


def _where() -> str:
    act, index = watch.place_of(watch.page[Slot.PLACE])
    return f"environment {index}, {act.words}:"
