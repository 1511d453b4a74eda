"""The shell of one swarm's run: what `shoal.training.run` says is done here, and what happens is told to it.

It calls the worker, fetches, signs by the replica, has things written (`records`) and keeps the time; it decides
nothing. Events are handled one after the other by one task. The worker's jobs, each fetch and the writing have tasks of
their own, so that nothing that is slow holds up what is decided.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from shoal.crdt.snapshots import thinned
from shoal.crdt.views import Evaluation
from shoal.node.mesh.host import Host
from shoal.node.signals import Signal
from shoal.node.store.database import Storage
from shoal.node.store.errors import StorageError
from shoal.node.supervise import Backoff, Domain
from shoal.node.supervise import Policy as Task
from shoal.node.swarm.consulting import Consulting
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.copying import Copying
from shoal.node.swarm.exchanging import Exchanging
from shoal.node.swarm.giving import Giving
from shoal.node.swarm.holding import NoRoomError
from shoal.node.swarm.loops import open_door
from shoal.node.swarm.needs import Needs
from shoal.node.swarm.numbering import Numbering
from shoal.node.swarm.posting import Posts
from shoal.node.swarm.records import Records, read_stored
from shoal.node.swarm.reducing import Reductions
from shoal.node.swarm.replica import Replica
from shoal.node.swarm.shards import Shards
from shoal.node.swarm.weights import Weights
from shoal.node.swarm.workers import WorkerLostError, open_worker
from shoal.node.wire.channel import Channel
from shoal.protocol.codec import encode, to_plain
from shoal.protocol.errors import NoPeersError, ProtocolError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training import run_events as events
from shoal.training.arena import Arena, Region
from shoal.training.electorate import Electorate
from shoal.training.exchange.audits import SignedOutcome
from shoal.training.exchange.ballots import Ballot, SignedOffer
from shoal.training.exchange.rules import Aggregator
from shoal.training.keeper import WORKER_LOG
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.statements import TOPIC_OF, Addresses, GivenCopy, GivenShards, Postings, Result, read_statement
from shoal.training.taking import LOOK_S
from shoal.training.worker_calls import (
    ABANDON,
    BEGIN,
    COLLECT,
    COLLECT_ON,
    EVALUATE,
    EVALUATE_ON,
    FINISH,
    GO_ON,
    LARGE_STATE_BYTES,
    LOAD,
    LOG,
    MERGE,
    MERGE_FAILED,
    OPEN,
    ROLL_OUT,
    TASK_FAILED,
    Abandon,
    Begin,
    Collect,
    Collected,
    Evaluate,
    Evaluated,
    Finish,
    GoOn,
    LargeArray,
    Load,
    Log,
    Merge,
    MergeAnswer,
    Open,
    PlayOn,
    RollOut,
    StateAnswer,
)

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

MAX_LOST: Final = 3
"""Workers in a row that the task may cost before the run is given up; an update between them makes it no row."""
GOODBYE_S: Final = 0.3
TOLD_S: Final = 60.0
"""How long the last failure of an environment is shown, while the run goes on."""
STATE_SLACK_BYTES: Final = 1024 * 1024
"""Two states of one run differ only in what they say of members beside their arrays."""
STORED_STATE_BYTES: Final = 1024 * 1024 * 1024
"""The largest state that a node takes which only stores and cannot know how large one of the run is."""
TELL_S: Final = LOOK_S / 2
"""How often the core is told that a policy is still coming."""
MAX_DIALED: Final = 3
"""Members that are dialed for one content that nobody who is connected was named for."""
MAX_CURVE: Final = 1024
"""Points of the curve that is shown."""
MAX_QUEUED: Final = 65_536
"""Events that wait; what is heard beyond that is dropped, and said again by those who said it."""
EVENTS_AT_ONCE: Final = 64
"""Handled before other tasks have their turn; what they make this node say goes out together."""
CAN_BE_DROPPED: Final = (events.Heard, events.Tick)


class Runner:
    """This node's part in one swarm.

    Attributes:
        core: decides.
        role: what this node does in it.
        is_chosen: whether that is its own choice, which it may change.
        is_new: this node has just created it, and whoever wanted that waits to hear whether it works.
        changed: set when what `core` says of its progress may have changed.
        error: what went wrong last, while it lasts.
        num_dropped: events that did not fit.
        giving: what members give each other directly.
        loop_socket: where a training loop of the user attaches, while one may.
    """

    def __init__(
        self,
        manifest: Manifest,
        swarm: SwarmId,
        me: PeerId,
        role: Role,
        replica: Replica,
        content: ContentStore,
        storage: Storage,
        host: Host,
        reductions: Reductions,
        folder: Path,
        loop_socket: Path,
        domain: Domain,
        *,
        is_new: bool = False,
        is_chosen: bool = False,
    ) -> None:
        self.manifest = manifest
        self.swarm = swarm
        self.role = role
        self.is_new = is_new
        self.is_chosen = is_chosen
        self.replica = replica
        self.changed = Signal()
        self.error: str | None = None
        self.results: Path | None = None
        self.loop_socket: Path | None = None
        self.num_dropped = 0
        self.started_at = time.time()
        self.ended_at: float | None = None
        self.alone_since: float | None = None
        self._me = me
        self._content = content
        self._storage = storage
        self._host = host
        self._folder = folder
        self._wanted_socket = loop_socket
        self._domain = domain
        self._fetches: Domain | None = None
        self._queue: deque[events.Event] = deque()
        self._arrived = trio.Event()
        self._jobs: deque[events.Job | events.Abandon] = deque()
        self._job_arrived = trio.Event()
        self._job: events.Job | events.Abandon | None = None  # the last that was begun in this worker
        self._num_lost = 0
        self._num_failures = 0
        self._failed_at = -math.inf
        self._wake_at = math.inf
        self._retimed = trio.Event()
        self._needs = Needs()
        self._fetching: dict[Cid, trio.CancelScope] = {}  # what others contribute
        self._state_bytes: int | None = None
        self._curve: tuple[object, float, tuple[tuple[float, ...], ...]] = (None, 0.0, ())
        self._told: tuple[object, object] = (None, None)
        self.core = Run(manifest, swarm, me, role, 0.0)
        self.giving = Giving(swarm, host, self.post, lambda peer: self.role is Role.LEARNER and peer in self.core.live)
        self.consulting = Consulting(swarm, host, replica, self._connect, lambda peer: peer in self.core.live)
        self._taken: Role | None = None
        self._in_role = trio.CancelScope()
        self._part = ""
        self._numbering = Numbering(storage, swarm)
        self._posts = Posts(swarm, me, replica, content, self._reachable)
        self.weights = Weights(swarm, host, replica, content, self._reachable)
        self.copying = Copying(swarm, me, replica, content, self._reachable)
        self.shards = Shards(
            *(manifest, swarm, replica.signer, replica, content),
            *(self._reachable, lambda: self.core.learners, self.post),
        )
        self._arena: Arena | None = None
        self._large: tuple[LargeArray, ...] = ()  # of what is exchanged now
        aggregator = Aggregator.parse(manifest.aggregator)
        self._exchanging = Exchanging(swarm, reductions, aggregator, self._connect, self._on_lie, self._on_false)
        self._records = self._new_records()

    # What the rest of the node asks.

    @property
    def policy(self) -> Policy | None:
        """What this node holds."""
        return self.core.policy

    async def held(self) -> bytes:
        """The training state of `policy`.

        Raises:
            UsageError: if there is none here.
        """
        policy = self.policy
        if policy is None:
            raise UsageError("this node holds no policy of that run yet; ask again in a while")
        try:
            return bytes(await self._content.get(policy.cid, ()))
        except UnavailableError as error:
            raise UsageError(f"this node ({self.role}) has no whole policy of that run; ask one that learns") from error

    @property
    def training_return(self) -> float | None:
        """Mean return of the newest training episodes."""
        recent = self.core.progress.recent_returns
        return sum(recent) / len(recent) if recent else None

    def curve(self) -> tuple[tuple[float, ...], ...]:
        """(epoch, environment steps, return), of each epoch that was evaluated up to now; evenly fewer of very many."""
        found = self.replica.views.evaluations
        end = math.inf if self.policy is None else self.policy.epoch + 1
        if self._curve[0] is not found or self._curve[1] != end:
            points: dict[int, tuple[float, ...]] = {}
            for each in found:
                if each.epoch <= end:
                    points.setdefault(each.epoch, (float(each.epoch), float(each.env_steps), each.mean_return))
            self._curve = found, end, tuple(thinned({str(n): points[n] for n in sorted(points)}, MAX_CURVE).values())
        return self._curve[2]

    # Its life.

    async def run(self, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Started once a worker's process is, and if the run is new, once that works.

        What fails in deciding, in keeping the time or in writing leaves nothing that could be gone on with: it fails
        this as a whole, which may be called again and goes on from what is on disk.

        Raises:
            UsageError: before it is started, if a new run is one that this node cannot take part in.
            ShoalError: likewise, if there can be no worker.
        """
        while True:
            with trio.CancelScope() as self._in_role:
                await self._run_in_role(task_status)
            if self._taken is None:
                return
            self.role, self._taken = self._taken, None
            await self.replica.write(member={"role": str(self.role), "left": False})
            task_status = trio.TASK_STATUS_IGNORED

    async def _run_in_role(self, task_status: TaskStatus[None]) -> None:
        stored = await trio.to_thread.run_sync(read_stored, self._storage, self.swarm)
        part = await trio.to_thread.run_sync(self._storage.get_fact, part_fact(self.swarm))
        self._part = "" if part is None else part.decode(errors="replace")
        self.core = Run(
            self.manifest,
            self.swarm,
            self._me,
            self.role,
            trio.current_time(),
            stored=stored.result,
            liars=stored.liars,
            shunned=stored.shunned,
            own_env_steps=stored.env_steps,
            rounds=stored.rounds,
            part=self._part,
            is_chosen=self.is_chosen,
        )
        self._told = (None, None)
        self._queue.clear()
        self._jobs.clear()
        self._wake_at = math.inf
        self._needs = Needs()
        self._records = self._new_records()
        if stored.result is not None:
            self._needs.write(stored.result.cid)
        self._fetches = self._domain.inside("swarm", str(self.swarm))
        self.shards.begin(self._fetches)
        try:
            async with trio.open_nursery() as nursery:
                self._listen()
                nursery.start_soon(self._process)
                nursery.start_soon(self._keep_time)
                nursery.start_soon(self._records.write)
                if self.role is Role.LEARNER and self.manifest.is_loop:
                    await self._work_by_loops(task_status)
                elif self.role is not Role.STORAGE:
                    await self._work(nursery, task_status)
                else:
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._fetches.cancel()
            self.replica.on_heard = lambda *_: None
            self.replica.on_gone = lambda _: None
            self.replica.on_documents = lambda: None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + (1 if self._taken is None else 10)):
                await self._records.write_last()
            self._content.hold(self.swarm, ())
            self._posts.close()
            self.weights.close()
            self.copying.close()
            if self._taken is None:  # else what this node gave while it acted is still learned from
                self.shards.close()

    def _new_records(self) -> Records:
        def say(error: str) -> None:
            self.error = error

        return Records(
            *(self.manifest, self.swarm, self._me, self.core, self._needs),
            *(self.replica, self._content, self._storage, say),
        )

    def _listen(self) -> None:
        """Hear what members say, from what is known of them already."""
        self.replica.on_heard = self._on_heard
        self.replica.on_gone = self._on_gone
        self.replica.on_documents = self._on_documents
        for author, topics in self.replica.live.items():
            for topic in topics:
                for facts, name in self.replica.statements(author, topic):
                    self._on_heard(author, topic, facts, name)
        self._on_documents()
        self.post(events.Tick())

    def _on_heard(self, author: PeerId, topic: str, facts: Mapping[str, Any], name: bytes) -> None:
        statement = read_statement(topic, dict(facts))
        if statement is None:
            log.info("swarm %s: %s says something on %s that makes no sense", self.swarm, author, topic)
        elif isinstance(statement, GivenShards):
            if self.role is Role.LEARNER and self.manifest.mode is Mode.ROLLOUTS:
                self.shards.heard(author, statement)
        elif isinstance(statement, GivenCopy):
            self.copying.heard(author, statement)
        elif not isinstance(statement, Addresses | Postings):
            self.post(events.Heard(author, statement, name))

    def _on_gone(self, author: PeerId) -> None:
        self.shards.gone(author)
        self.copying.gone(author)
        self.post(events.Gone(author))

    def _on_documents(self) -> None:
        if self.manifest.mode is Mode.ROLLOUTS and self.role is Role.LEARNER:
            self.shards.documents()
        views = self.replica.views
        useful, own = views.useful, views.contributions.get(self._me)
        if self._told[0] is not useful or self._told[1] != own:
            self._told = useful, own
            self.post(events.Documents(useful, own))

    # Events and what is done about them.

    def post(self, event: events.Event) -> None:
        """Something happened; it is handled after what happened before."""
        if len(self._queue) >= MAX_QUEUED and isinstance(event, CAN_BE_DROPPED):
            self.num_dropped += 1
            return
        self._queue.append(event)
        self._arrived.set()

    async def _process(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._queue:
                with self.replica.together():
                    for event in self._next_events():
                        for output in self.core.handle(event, trio.current_time()):
                            self._do(output)
                        self._follow()
                if self._queue:
                    await trio.lowlevel.checkpoint()
            self.changed.set()

    def _follow(self) -> None:
        """What is of no round any more goes, and is not fetched any more."""
        policy = self.core.policy
        if policy is not None and self.role is Role.LEARNER and self.manifest.mode is Mode.ROLLOUTS:
            self.shards.holds(policy)
            self._give_copy(policy)
        if self._needs.follow(self.core.epoch.key, None if policy is None else policy.cid):
            for cid, scope in self._fetching.items():
                if self._needs.is_over(cid):
                    scope.cancel()
            self._content.hold(self.swarm, self._needs.in_memory())

    def _give_copy(self, policy: Policy) -> None:
        """Let those have the acting copy that need no more."""
        worker, in_worker = self.shards.worker, self.core.jobs.in_worker
        if worker is None or self._fetches is None or in_worker is None or in_worker.cid != policy.cid:
            return
        if any(facts.role is Role.ACTOR and not facts.stands_by for facts in self.core.live.values()):
            self.copying.give(worker, policy, self._fetches)

    def _next_events(self) -> Iterator[events.Event]:
        for _ in range(EVENTS_AT_ONCE):
            if not self._queue:
                return
            yield self._queue.popleft()

    def _do(self, output: events.Output) -> None:
        match output:
            case events.Say(statement):
                name = self.replica.publish(TOPIC_OF[type(statement)], to_plain(statement))
                self._queue.append(events.Said(statement, name))
            case events.Fetch(cid, sources, keep):
                self._needs.come(cid, is_policy=keep)
                if self._fetches is not None:
                    fetch = self._fetch_copy if keep and self._acts_by_copies else self._fetch
                    self._fetches.start_soon("fetching", fetch, cid, sources, keep, policy=Task.DROP)
            case events.Give(part, members):
                if self._fetches is not None:
                    own = None if part.cid is None else self._content.holding.get(part.cid)
                    self.giving.give(part, None if own is None else own.data, members, self._fetches)
            case events.Keep() | events.Write() | events.WriteEvaluation() | events.WriteLie():
                self._records.add(output)
            case events.Wake(at):
                is_sooner = at < self._wake_at
                self._wake_at = at
                if is_sooner:  # else it is seen when the time comes that was asked for before
                    self._retimed.set()
            case events.TakeRole(role, reason):
                log.warning("swarm %s: from %s to %s, since %s", self.swarm, self.role, role, reason)
                self._taken = role
                self._in_role.cancel()
            case events.Note(text, is_warning):
                log.log(logging.WARNING if is_warning else logging.INFO, "swarm %s: %s", self.swarm, text)
                self._note_company()
            case _:
                self._jobs.append(output)
                self._job_arrived.set()

    def _note_company(self) -> None:
        if self.core.progress.is_alone and self.alone_since is None:
            self.alone_since = time.time()

    async def _keep_time(self) -> None:
        while True:
            self._retimed = trio.Event()
            with trio.move_on_at(self._wake_at):
                await self._retimed.wait()
            if trio.current_time() >= self._wake_at:
                self._wake_at = math.inf
                self.post(events.Tick())
                if self.alone_since is not None and not self.core.progress.is_alone:
                    self.alone_since = None
                    log.info("swarm %s: no longer alone", self.swarm)

    @property
    def _acts_by_copies(self) -> bool:
        """Whether this node needs no more of a policy than what acts; who may come to learn needs all of it."""
        return self.role is Role.ACTOR and not self.is_chosen

    async def _fetch_copy(self, cid: Cid, sources: tuple[PeerId, ...], is_policy: bool) -> None:
        actors = [peer for peer, facts in self.core.live.items() if facts.role is Role.ACTOR and not facts.stands_by]
        if await self.copying.fetch(cid, lambda: self.core.learners, actors):
            self.post(events.Fetched(cid, is_whole=False))
        else:
            await self._fetch(cid, sources, is_policy)

    async def _fetch(self, cid: Cid, sources: tuple[PeerId, ...], is_policy: bool) -> None:
        outcome: events.Event = events.NotFetched(cid, "the fetch failed on this node; its log says why")
        told_at = -math.inf

        def tell() -> None:
            nonlocal told_at
            if is_policy and trio.current_time() >= told_at + TELL_S:
                told_at = trio.current_time()
                self.post(events.Coming(cid))

        try:
            with trio.CancelScope() as scope:
                if not is_policy:
                    self._fetching[cid] = scope
                reachable = await self._reachable(sources)
                await self._content.get(
                    cid, reachable, max_bytes=self._max_bytes(is_policy), owner=self.swarm, on_progress=tell
                )
                outcome = events.Fetched(cid)
            if scope.cancelled_caught:
                outcome = events.NotFetched(cid, "its round is over")
        except UnavailableError as error:
            outcome = events.NotFetched(cid, str(error), error.lack)
        except (NoRoomError, StorageError) as error:
            outcome = events.NotFetched(cid, str(error))
        finally:  # the core waits for the outcome, whatever it is
            if self._fetching.get(cid) is scope:
                del self._fetching[cid]
            self.post(outcome)

    def _max_bytes(self, is_policy: bool) -> int:
        """No content of this run is larger: a state is as large as every other, and a contribution hardly larger."""
        if self._state_bytes is None:
            return STORED_STATE_BYTES
        return (1 if is_policy else 2) * self._state_bytes + STATE_SLACK_BYTES

    async def _reachable(self, sources: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
        """Those of them that are connected; if none is, some are dialed."""
        connected = tuple(peer for peer in sources if peer in self._host.connected)
        if connected:
            return connected
        for peer in sources[:MAX_DIALED]:
            await self._connect(peer)
            if peer in self._host.connected:
                return (peer,)
        return sources

    async def _connect(self, peer: PeerId) -> None:
        """Connect to a member, if that can be done."""
        addresses = () if peer == self._me or peer in self._host.connected else self.replica.addresses(peer)
        try:
            if addresses:
                await self._host.connect(addresses, heard=True)
        except (NoPeersError, UsageError) as error:
            log.debug("dialing %s failed: %s", peer, error)

    def _on_lie(self, said: SignedOutcome) -> None:
        self.post(events.Lied(said.owner, encode(said)))

    def _on_false(self, author: PeerId) -> None:
        self.post(events.Lied(author, b""))

    # The worker.

    async def _work(self, nursery: trio.Nursery, task_status: TaskStatus[None]) -> None:
        """Have a worker do the jobs; when it ends, another one.

        Whoever joins is not kept waiting for what a worker loads, which takes seconds: what it finds wrong with the run
        then ends that as a task that fails does. Whoever creates a run hears of it at once.
        """
        started = has_opened = False
        backoff = Backoff()
        while True:
            began = trio.current_time()
            try:
                async with self._worker(nursery) as worker:
                    if not started and not self.is_new:
                        started = True
                        task_status.started()
                    opened = await self._open(worker)
                    has_opened = True
                    if not started:
                        started = True
                        task_status.started()
                    took_s = trio.current_time() - began
                    log.info("swarm %s: the worker of this %s began after %.1f s", self.swarm, self.role, took_s)
                    self.post(opened)
                    await self._do_jobs(worker)
            except (RemoteError, ShoalError) as error:
                if isinstance(error, RemoteError) and error.status is TASK_FAILED:
                    await self._fail(error.message, started=started)
                may_work = isinstance(error, RemoteError) or (isinstance(error, WorkerLostError) and not error.is_task)
                if not started and not may_work:
                    raise
                if not has_opened and not may_work and isinstance(error, UsageError | WorkerLostError):
                    await self._fail(str(error), started=started)
                self.error = str(error)
                if isinstance(error, RemoteError):
                    self.error = f"the worker failed ({error}); see {self._folder / WORKER_LOG}"
                self._num_lost += self._is_of_task(error)
                if self._num_lost >= MAX_LOST:
                    await self._fail(f"{self.error}; {self._num_lost} in a row", started=started)
            self._jobs.clear()
            wait_s = backoff.after(trio.current_time() - began)
            self.post(events.WorkerGone(f"{self.error}; next try in {wait_s:.1f} s"))
            await trio.sleep(wait_s)

    async def _work_by_loops(self, task_status: TaskStatus[None]) -> None:
        """Have a training loop of the user do the jobs; when it goes, wait for the next."""

        def on_gone() -> None:
            self._job_arrived.set()

        async with open_door(self._wanted_socket) as door:
            self.loop_socket = door.path
            task_status.started()
            try:
                while True:
                    reason = "the training loop has gone"
                    async with door.next_loop(self._me, on_gone) as (loop, arena):
                        self._arena, self._large = arena, ()
                        try:
                            self.post(await self._open(loop))
                            await self._do_jobs(loop)
                        except (RemoteError, ShoalError) as error:
                            reason = f"the training loop has gone: {error}"
                    self._exchanging.forget()
                    self._jobs.clear()
                    self.post(events.WorkerGone(f"{reason}; another may attach"))
            finally:
                self.loop_socket = None

    @asynccontextmanager
    async def _worker(self, nursery: trio.Nursery) -> AsyncIterator[Channel]:
        self._arena, self._large = Arena.make(), ()
        try:
            async with open_worker(nursery, self._me, self._folder, self._arena) as worker:
                yield worker
        finally:
            self.consulting.worker = self.shards.worker = None
            self.copying.forget()
            self._exchanging.forget()
            self._arena.close()

    def _is_of_task(self, error: ShoalError) -> bool:
        """Whether a worker came to its end by what its environments do, so that the next one may as well."""
        if isinstance(error, WorkerLostError):
            return error.is_task
        is_in_them = self._job is None or isinstance(self._job, events.Collect | events.Evaluate)
        return isinstance(error, RemoteError) and error.status is Status.INTERNAL and is_in_them

    async def _fail(self, reason: str, *, started: bool) -> None:
        """Give the run up on this node: it does not work here."""
        if not started:
            raise ShoalError(reason)
        self.error = reason
        self.post(events.TaskFailed(reason))
        self._domain.start_soon("learning the task", self._give_up, reason, policy=Task.END)
        await trio.sleep_forever()

    async def _give_up(self, reason: str) -> None:
        await trio.sleep(GOODBYE_S)  # for the others to hear that this node does not learn any more
        raise ShoalError(reason)

    def _note_failures(self, count: int, last: str) -> None:
        """Show what failed in environments, for a while."""
        now = trio.current_time()
        if count > self._num_failures:
            self._num_failures, self._failed_at, self.error = count, now, last
            log.warning("swarm %s: %s", self.swarm, last)
        elif self.error is not None and now >= self._failed_at + TOLD_S:
            self.error = None

    async def _open(self, worker: Channel) -> events.Opened:
        self._job, self._num_failures = None, 0
        life, stream = secrets.token_hex(8), 0
        if self.role is Role.ACTOR:
            stream = await trio.to_thread.run_sync(self._numbering.begin)
        request = Open(self.manifest, self._me, str(self._folder), life, self._part, self.role, self.swarm, stream)
        try:
            answer = await worker.call(OPEN, request)
        except RemoteError as error:
            if error.status is Status.INVALID_ARGUMENT:
                raise UsageError(error.message) from error
            raise
        if self.role is Role.ACTOR:
            return events.Opened(None)
        self._state_bytes = answer.state_bytes or len(answer.state or b"")
        self.consulting.sitting.seat(answer.roles)
        return events.Opened(_policy(answer, await self._put_state(answer)), answer.part, self._state_bytes)

    async def _put(self, data: bytes | memoryview | None, region: Region, num_bytes: int) -> Cid:
        """Hold what the worker gives: as many bytes of the arena, or, if that is none, the data."""
        if num_bytes and self._arena is not None:
            return await self._content.put(self._arena.view(region, num_bytes), owner=self.swarm, is_lent=True)
        return await self._content.put(data or b"", owner=self.swarm)

    async def _put_state(self, answer: StateAnswer) -> Cid:
        return await self._put(answer.state, Region.STATE, answer.state_bytes)

    async def _do_jobs(self, worker: Channel) -> None:
        self.consulting.worker = self.shards.worker = worker
        before: Cid | None = None  # the last shard that was made
        while True:
            if not self._jobs:
                if not worker.is_open:
                    raise RemoteError(Status.UNAVAILABLE, "it has ended")
                self._job_arrived = trio.Event()
                await self._job_arrived.wait()
                continue
            self._job = self._jobs.popleft()
            match self._job:
                case events.Collect(samples, max_seconds):
                    done = await worker.call(COLLECT, Collect(samples, max_seconds))
                    while (waited := await self._waited_for(done)) is not None:
                        done = await worker.call(COLLECT_ON, waited)
                    self.post(self._collected(done))
                case events.Rollout(samples):
                    made = await worker.call(ROLL_OUT, RollOut(samples, before))
                    self._note_failures(made.failures, made.failure)
                    await trio.to_thread.run_sync(self._numbering.used, made.stream)
                    before = await self.shards.give(made, self.core.progress.epoch)
                    self.post(events.RolledOut(made.samples, made.seconds, made.episode_returns))
                case events.Update(policy):
                    begin = Begin(policy.epoch, policy.cid, policy.env_steps, policy.electorate.to_plain())
                    await self._merged(worker, await worker.call(BEGIN, begin))
                case events.Merge(ballot):
                    await self._merge(worker, ballot)
                case events.Load(result, keep_samples):
                    await self._load(worker, result, keep_samples)
                case events.Evaluate():
                    await self._evaluate(worker)
                case events.Finish(final):
                    await self._finish(worker, final)
                case events.Abandon(keep_samples):
                    await worker.call(ABANDON, Abandon(keep_samples))

    async def _waited_for(self, done: Collected | Evaluated) -> PlayOn | None:
        """What plays wait for; None, if they do not."""
        if done.consult is not None:
            return PlayOn(await self.consulting.ask(done.consult))
        return None if done.fetch is None else await self.weights.fetch(done.fetch)

    def _collected(self, done: Collected) -> events.Collected:
        self._note_failures(done.failures, done.failure)
        return events.Collected(done.epoch_samples, done.samples, done.seconds, done.episode_returns)

    async def _merge(self, worker: Channel, ballot: Ballot) -> None:
        key = self.core.epoch.key
        if key is not None and key.step == 0:
            given = ", ".join(f"{each.offer.weight} of …{each.author[-6:]}" for each in ballot.offers)
            log.info("swarm %s: epoch %d averages %s", self.swarm, key.epoch + 1, given)
        try:
            contributions = [await self._contribution(each) for each in ballot.offers]
            answer = await self._merged_by(worker, ballot, contributions)
        except (UnavailableError, ProtocolError) as error:
            self.post(events.MergeFailed(str(error)))
        except RemoteError as error:
            if error.status not in (MERGE_FAILED, Status.FAILED_PRECONDITION):
                raise
            self.post(events.MergeFailed(error.message))
        else:
            await self._merged(worker, answer)

    async def _merged_by(self, worker: Channel, ballot: Ballot, contributions: list[bytes | memoryview]) -> MergeAnswer:
        request = Merge(
            ballot.name,
            tuple(each.author for each in ballot.offers),
            tuple(each.offer.weight for each in ballot.offers),
            tuple(each.offer.seconds for each in ballot.offers),
            tuple(contributions),
        )
        arena, failure, answer = self._arena, None, None
        if not self._large or arena is None:
            return await worker.call(MERGE, request)
        async with self._exchanging.reduced(ballot, contributions, self._large, arena, self.core.shunned) as absent:
            try:
                answer = await worker.call(MERGE, replace(request, absent=absent))
            except RemoteError as error:  # out of the context as itself, and not in a group
                failure = error
        if answer is None:
            raise failure or RemoteError(Status.INTERNAL, "the worker gave no answer")
        return answer

    async def _contribution(self, offer: SignedOffer) -> bytes | memoryview:
        given = self.giving.find(offer.author, offer.offer.cid)
        return await self._content.get(offer.offer.cid, (), owner=self.swarm) if given is None else given

    async def _reply(self, answer: MergeAnswer, epoch: int, out: AbstractSet[PeerId]) -> GoOn | None:
        """What an update asks for that is not an average; None, if it asks for nothing such."""
        if answer.given is not None:
            return GoOn(cid=await self.shards.give(answer.given, epoch))
        return await self._posts.reply(answer, epoch, out)

    async def _merged(self, worker: Channel, answer: MergeAnswer) -> None:
        """The update wants something averaged, or is done; what else it wants it is given at once."""
        epoch = 0 if self.policy is None else self.policy.epoch
        out = self.core.shunned | self.core.claims.liars
        while (reply := await self._reply(answer, epoch, out)) is not None:
            answer = await worker.call(GO_ON, reply)
        self._large = answer.layout
        if answer.state is not None:
            cid = await self._put_state(answer.state)
            self._num_lost = 0
            self.shards.learned(answer.learned_from, answer.waiting, epoch)
            ahead = None if answer.ahead is None else self._collected(answer.ahead)
            part = answer.state.part
            self.consulting.sitting.seat(answer.state.roles)
            self.post(events.Updated(_policy(answer.state, cid), answer.rejected, answer.stats, ahead, part))
            return
        offered: Cid | None = None
        if answer.contribution is not None or answer.contribution_bytes:
            try:
                offered = await self._put(answer.contribution, Region.OFFERED, answer.contribution_bytes)
                self._needs.offer(offered)
            except NoRoomError as error:  # it takes part in the round, with nothing to give
                self.error = str(error)
                log.warning("swarm %s: what was learned is not given to the others: %s", self.swarm, error)
        uplink = self._exchanging.uplink
        self.post(events.Yielded(offered, int(answer.weight), answer.rejected, answer.is_last, uplink))

    async def _load(self, worker: Channel, result: Result, keep_samples: bool) -> None:
        cid = result.cid
        if self._acts_by_copies and await self.copying.load(worker, cid, result.epoch):
            descent = result.parent, result.ballot, Electorate()
            self.post(events.Loaded(Policy(result.epoch, cid, "", result.env_steps, *descent), 0))
            return
        try:
            self._needs.come(cid, is_policy=True)
            sources = await self._reachable(self.core.lineage.holders(cid))
            data = await self._content.get(cid, sources, max_bytes=self._max_bytes(is_policy=True), owner=self.swarm)
            answer = await worker.call(LOAD, await self._to_load(data, cid, keep_samples))
        except UnavailableError as error:
            self.post(events.LoadRefused(str(error)))
        except RemoteError as error:
            if error.status is not Status.INVALID_ARGUMENT:
                raise
            self.post(events.LoadRefused(error.message))
        else:
            if self._acts_by_copies:
                self.copying.loaded_whole(answer.copy)
            self.post(events.Loaded(_policy(answer, cid), answer.epoch_samples))

    async def _to_load(self, data: bytes | memoryview, cid: Cid, keep_samples: bool) -> Load:
        """A state, for the worker."""
        if len(data) < LARGE_STATE_BYTES or self._arena is None:
            return Load(data, keep_samples, cid=cid)
        view = self._arena.view(Region.STATE, len(data))

        def copy() -> None:
            view[:] = data

        await trio.to_thread.run_sync(copy)
        return Load(None, keep_samples, len(data), cid)

    async def _evaluate(self, worker: Channel) -> None:
        from shoal.training.tasks.source import seed_of  # with NumPy, which an idle node does not load

        held = self.core.jobs.in_worker  # each policy meets other episodes, and the same wherever it is evaluated
        seed = seed_of(self.manifest.seed, "" if held is None else held.cid)
        request = Evaluate(self.manifest.eval_episodes, seed)
        evaluated = await worker.call(EVALUATE, request)
        while (waited := await self._waited_for(evaluated)) is not None:
            evaluated = await worker.call(EVALUATE_ON, waited)
        self._note_failures(evaluated.failures, evaluated.failure)
        mean = sum(evaluated.returns) / len(evaluated.returns)
        env_steps = 0 if self.policy is None else self.policy.env_steps
        if math.isfinite(mean):
            found = {f"evaluation/{name}": score for name, score in evaluated.scores.items()}
            await worker.call(LOG, Log(env_steps, {"evaluation/return": mean} | found))
        self.post(events.Evaluated(mean, evaluated.scores))

    async def _finish(self, worker: Channel, final: Evaluation | None) -> None:
        policy, progress = self.policy, self.core.progress
        if self.ended_at is None:
            self.ended_at = time.time()
        points = self.curve()
        result = {
            "swarm": self.swarm,
            "task": self.manifest.task,
            "algorithm": self.manifest.algorithm,
            "solved": final is not None,
            "return": final.mean_return if final else (points[-1][2] if points else None),
            "target_return": self.manifest.target_return,
            "epoch": 0 if policy is None else policy.epoch,
            "env_steps": 0 if policy is None else policy.env_steps,
            "digest": None if policy is None else policy.digest,
            "policy": None if policy is None else policy.cid,
            "trained_alone": self.core.trained_alone,
            "seconds": round(self.ended_at - self.started_at, 3),
            "manifest": to_plain(self.manifest),
            "curve": [{"epoch": int(p[0]), "env_steps": int(p[1]), "return": p[2]} for p in points],
        }
        await worker.call(FINISH, Finish(str(self._folder), points, result))
        self.results = self._folder
        log.info("swarm %s: done, solved: %s (epoch %d)", self.swarm, progress.solved, result["epoch"])
        self.post(events.Finished())


def part_fact(swarm: SwarmId) -> str:
    """Under which it is kept what this node is in a recipe."""
    return f"part/{swarm}"


def _policy(answer: StateAnswer, cid: Cid) -> Policy:
    return Policy(
        answer.epoch,
        cid,
        answer.digest,
        answer.env_steps,
        answer.parent,
        answer.ballot,
        Electorate.from_plain(answer.electorate),
    )
