"""A swarm's run on one node, as a core: `Run.handle(event, now)` says what to do next, and decides all that is decided.

A learner's epoch: *collect* its share of the batch (`electorate`), *update*, and average in one or more *rounds* what
the update yields (`epoch`; one round is `exchange.rounds`). The others hear of it by signed statements (`statements`).
Nobody is waited for longer than what it is expected to bring is worth; who is late keeps what it collected for the next
epoch. Which policy is held instead of the own one says `taking`, by `lineage`; what is evaluated, which claims that the
task is solved are looked into, and when the run ends, `ending`, by `claims`.

The worker does one job at a time (`jobs`); every job ends in an event. Whatever is waited for has an end that depends
on nobody:

* collecting ends with the own share, or when those with most of the stake are ready;
* a round ends by turns and silences, until this learner alone is left;
* bytes that nobody gives stop nothing: the run goes on beside them.

The shell (`shoal.node.swarm.runner`) calls the worker, fetches, signs, writes; the simulator (`shoal.training.sim`) is
another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training import pacing
from shoal.training.claims import Claims
from shoal.training.electorate import Electorate, says_of
from shoal.training.ending import Ending
from shoal.training.epoch import Epoch
from shoal.training.exchange.ballots import CannotBeHad, Held, Limits
from shoal.training.exchange.rounds import MAX_VOTERS, Round
from shoal.training.jobs import Jobs
from shoal.training.lineage import Candidate, Lineage, Refusal
from shoal.training.manifest import Manifest, Role
from shoal.training.others import Others
from shoal.training.pacing import Pace
from shoal.training.progress import Progress
from shoal.training.rationing import Rationing
from shoal.training.roles import Choosing, View
from shoal.training.run_events import (
    Admitted,
    Collect,
    Collected,
    Coming,
    Documents,
    Evaluate,
    Evaluated,
    Event,
    Fetched,
    Finished,
    Given,
    Gone,
    Heard,
    Job,
    Lied,
    Load,
    Loaded,
    LoadRefused,
    Merge,
    MergeFailed,
    Note,
    NotFetched,
    NotGiven,
    Opened,
    Output,
    Policy,
    RolledOut,
    Rollout,
    Said,
    Say,
    TakeRole,
    TaskFailed,
    Tick,
    Update,
    Updated,
    Wake,
    WorkerGone,
    WriteLie,
    Yielded,
)
from shoal.training.saving import Saving
from shoal.training.statements import (
    Addresses,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    Vote,
    Wait,
    first_after,
)
from shoal.training.taking import Taking

CHUNK_S: Final = 0.25
"""How long the worker collects before the run looks up."""
RESULT_GAP_S: Final = 4.0
"""After which a member of a large swarm says what it holds, if it was not among those who had to say so at once."""
_NEVER: Final = float("inf")


class Run:
    """One node's part in one run."""

    def __init__(
        self,
        manifest: Manifest,
        swarm: SwarmId,
        me: PeerId,
        role: Role,
        now: float,
        *,
        stored: Result | None = None,
        liars: Iterable[PeerId] = (),
        shunned: Iterable[PeerId] = (),
        own_env_steps: int = 0,
        rounds: int = 0,
        part: str = "",
        is_chosen: bool = False,
    ) -> None:
        """Begin.

        Args:
            manifest: of the run.
            swarm: its name.
            me: this node.
            role: what it does.
            now: the time.
            stored: the policy that an earlier life of this node kept.
            liars: members that an earlier life found out.
            shunned: likewise, in what they reduced.
            own_env_steps: that an earlier life put in.
            rounds: that an earlier life was part of.
            part: what this node is in a recipe.
            is_chosen: whether the role is this node's own choice, which it may change.
        """
        self.progress = Progress(own_env_steps=own_env_steps, rounds=rounds, rounds_before=rounds, part=part)
        self.claims = Claims(me, manifest.target_return, liars)
        self.lineage = Lineage(me)
        self.jobs = Jobs(self.progress, now)
        self.others = Others(me, self.progress, now)
        fetching: set[Cid] = set()
        """What was asked for and has not come."""
        parts = (self.progress, self.jobs, self.others, self.lineage)
        is_resumed = stored is not None and stored.epoch > 0
        self.shunned = set(shunned)
        """Members that signed a result that does not follow from what it was made of: nothing is averaged with them."""
        self.epoch = Epoch(manifest, me, *parts, fetching, self.shunned, is_resumed=is_resumed)
        self.taking = Taking(role, self.progress, self.jobs, self.lineage, self.epoch, fetching, stored, now)
        self.ending = Ending(manifest, me, *parts, self.claims, fetching, now)
        self._manifest = manifest
        self._me = me
        self._role = role
        self._fetching = fetching
        self.rationing = Rationing(manifest.most_foreign)
        self._choosing = Choosing(me, role, now) if is_chosen else None
        self._has_chosen = False
        self._is_whole = True  # what this node holds; else there is nothing to keep, nor for others to ask for
        self._state_bytes = 0
        self.progress.stands_by = is_chosen
        self._saving = Saving(self.progress)
        self._kept = None if stored is None else stored.cid
        self._collect_s = 0.0  # collecting in this epoch
        self._num_kept = 0  # samples of the epoch before
        self._result_due = _NEVER
        self._wake_at = now

    # What others ask.

    @property
    def policy(self) -> Policy | None:
        """What this node holds and goes on from."""
        return self.progress.policy

    @property
    def round(self) -> Round | None:
        """The round that this node is in."""
        return self.epoch.round

    @property
    def live(self) -> dict[PeerId, Facts]:
        """The facts of the other members that are there."""
        return self.others.live

    @property
    def learners(self) -> list[PeerId]:
        """Other live members that still learn."""
        return self.others.learners

    @property
    def learned_wait_s(self) -> float:
        """How long a round waits for those who have not come, and then for one who says nothing."""
        return self.epoch.learned_wait_s

    def facts(self) -> Facts:
        """What this node says of itself."""
        return self.progress.facts(self._role, self.progress.epoch)

    @property
    def trained_alone(self) -> bool:
        """Whether there were rounds and nobody else was in any."""
        return self.progress.rounds > 0 and self.progress.shared_rounds == 0

    # The one entry.

    def handle(self, event: Event, now: float) -> list[Output]:
        """Take in what happened; what to do about it, in order."""
        outputs: list[Output] = []
        match event:
            case Heard():
                self._heard(event, now, outputs)
            case Said(statement, name):
                if not self.epoch.own_said(statement, name, now, outputs):
                    self.taking.look(now, outputs)  # who went on may have said what they hold already
            case Gone(author):
                self.others.gone(author, now)
                self._count_learners()
                self.lineage.gone(author)
                self.epoch.gone(author, now, outputs)
            case Given(author, part):
                self.epoch.given(author, part, now, outputs)
            case NotGiven(author, key, reason):
                self.epoch.not_given(author, key, reason, now, outputs)
            case Lied(owner, said):
                self._lied(owner, said, outputs)
            case Documents(evaluations, own):
                if own is not None:
                    self.progress.count_on(own)
                self.ending.documents(evaluations)
            case Fetched(cid, is_whole):
                self._fetched(cid, now, outputs, is_whole=is_whole)
            case Coming(cid):
                self.taking.coming(cid, now)
            case NotFetched():
                self._not_fetched(event, now, outputs)
            case Opened(policy, part):
                self._state_bytes = event.state_bytes
                self.progress.part = part or self.progress.part
                self._opened(policy, now, outputs)
            case Admitted(total):
                self.progress.samples = total
            case WorkerGone(reason):
                self._worker_gone(reason, now, outputs)
            case TaskFailed(reason):
                self._worker_gone(reason, now, outputs)
                self.progress.phase = Phase.FAILED
            case Tick():
                self._tick(now, outputs)
            case _:
                self._job_done(event, now, outputs)
        self.taking.look_if_due(now, outputs)
        self._next(now, outputs)
        self._choose_role(now, outputs)
        facts = self.progress.to_tell(self._role, self.progress.epoch, len(self.others.live), now)
        if facts is not None:
            outputs.append(Say(facts))
        self._set_wake(now, outputs)
        return outputs

    def _choose_role(self, now: float, outputs: list[Output]) -> None:
        """Take another role, if that is better by now; this run is begun anew in it, from what is on disk."""
        policy = self.policy
        if self._choosing is None or self._has_chosen or policy is None or self.others.have_ended:
            return
        if self.progress.phase in (Phase.DONE, Phase.FAILED):
            return
        view = View(
            self.live,
            policy.electorate,
            self.facts(),
            policy.epoch,
            self._manifest.min_learners,
            self.epoch.uplink,
            self._state_bytes,
        )
        chosen = self._choosing.look(view, now)
        if chosen is not None:
            self._has_chosen = True
            self._saving.write(policy, now, outputs, at_once=True)
            outputs.append(TakeRole(*chosen))

    def _heard(self, event: Heard, now: float, outputs: list[Output]) -> None:
        author, statement = event.author, event.statement
        if author == self._me:
            return
        self.others.heard_at[author] = now
        match statement:
            case Vote(key=key) | Offer(key=key) | Proposal(key=key):
                self.epoch.heard(event, key, now, outputs)
            case Result():
                if self._is_plausible(statement):
                    is_ahead = self.lineage.heard(author, statement)
                    self.epoch.committed(author, statement, now, outputs)
                    if is_ahead:
                        self.taking.look_soon(now)
            case Facts():
                self.others.told(author, statement)
                self._count_learners()
                self.epoch.told(author, statement, now, outputs)
            case Addresses():
                pass

    @property
    def _learners_alike(self) -> dict[PeerId, float]:
        return dict.fromkeys(self.others.learners, 1.0)

    def _count_learners(self) -> None:
        """A copy says nothing of who made it: whoever learns now counts."""
        if not self._is_whole:
            self.lineage.count(self._learners_alike)

    def _is_plausible(self, result: Result) -> bool:
        most = self._manifest.max_env_steps + Limits.of_batch(self._manifest.batch, None).ballot
        return result.env_steps <= most and result.epoch <= result.env_steps

    def _lied(self, owner: PeerId, said: bytes, outputs: list[Output]) -> None:
        if owner in self.shunned or owner == self._me:
            return
        self.shunned.add(owner)
        epoch = 0 if self.policy is None else self.policy.epoch
        lie = (
            "signed a result that does not follow from what it was made of"
            if said
            else "gave another part than it signed"
        )
        outputs.append(Note(f"{owner} {lie}: nothing is averaged with it any more"))
        if said:
            outputs.append(WriteLie(owner, epoch, said))

    # The worker.

    def _opened(self, policy: Policy | None, now: float, outputs: list[Output]) -> None:
        self.jobs.opened(policy)
        if self.policy is not None or policy is None:
            return  # it goes on from what it held before the worker ended
        stored = self.taking.stored
        if stored is not None and stored.epoch > 0:
            self.taking.take_stored(stored, outputs)
        else:
            self._hold(policy, now, outputs)

    def _worker_gone(self, reason: str, now: float, outputs: list[Output]) -> None:
        taken, policy = self.taking.taken, self.policy
        job, claim = self.jobs.gone(), self.ending.worker_gone()
        outputs.append(Note(reason))
        self.epoch.worker_gone(now, outputs)
        # What ends a worker twice would end every one; a loop of a person's own is ended by that person.
        if self._manifest.is_loop:
            job = None
        match job:
            case Merge():
                if self.jobs.is_to_blame(job, is_own=True):
                    self.epoch.merge_failed(reason, now, outputs)
            case Load(result):
                cid = result.cid
                is_own = (policy is not None and policy.cid == cid) or cid == self._kept
                if not self.jobs.is_to_blame(job, is_own=is_own):
                    return
                if taken is not None and taken.result.cid == cid:
                    self._not_taken(taken, Refusal.UNFIT, now, outputs)
                elif claim is not None and claim.cid == cid:
                    self.claims.unfit(claim)
                elif is_own:  # it is lost; what the next worker opens with is gone on from
                    self.lineage.refuse(result, Refusal.UNFIT, now)
                    self.progress.policy = self.epoch.round = self.taking.stored = None
                    outputs.append(Note("the policy that this node held ends every worker: it is given up"))
            case _:
                pass

    def _job_done(self, event: Event, now: float, outputs: list[Output]) -> None:
        job, seconds = self.jobs.done(now)
        if job is None:
            return  # of a worker that is gone
        if isinstance(job, Collect | Update | Merge):
            self.epoch.work_s += seconds
        match event:
            case Collected():
                self._collected(event, now)
            case RolledOut(samples, took_s, returns):
                self.rationing.made(self.progress.epoch, samples)
                self.progress.collected(Collected(0, samples, took_s, returns), now)
            case Yielded(cid, weight, rejected, is_last):
                self._reject(rejected, outputs)
                self.epoch.uplink = event.uplink
                if not self.epoch.arrive(cid, weight, job, now, outputs, is_last=is_last):
                    self.taking.look(now, outputs)  # who went on may have said what they hold already
            case Updated(policy, rejected):
                self._reject(rejected, outputs)
                self.progress.metrics = dict(event.metrics)
                self.progress.part = event.part or self.progress.part
                self._updated(policy, now, outputs)
                if event.ahead is not None:
                    self._collected(event.ahead, now)
                    self.epoch.work_s = self.epoch.ahead_s = event.ahead.seconds
            case MergeFailed(reason):
                self.epoch.merge_failed(reason, now, outputs)
            case Loaded(policy, num_kept):
                self._loaded(policy, num_kept, now, outputs)
            case LoadRefused(reason):
                self._load_refused(job, reason, now, outputs)
            case Evaluated(mean_return, scores):
                self.ending.evaluated(mean_return, scores, outputs)
            case Finished():
                self.progress.phase = Phase.DONE
                if self.policy is not None:
                    self._saving.write(self.policy, now, outputs, at_once=True)
            case _:
                pass

    def _collected(self, event: Collected, now: float) -> None:
        self._collect_s += event.seconds
        self.progress.collected(event, now)

    def _reject(self, rejected: tuple[PeerId, ...], outputs: list[Output]) -> None:
        for author in rejected:
            self.progress.rejected[author] = self.progress.rejected.get(author, 0) + 1
            outputs.append(Note(f"the contribution of {author} is malformed or absurd and left out"))

    def _updated(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        self.epoch.updated()
        self.progress.samples = 0
        self.jobs.in_worker = policy
        self._hold(policy, now, outputs)
        self._saving.keep(policy, now, outputs)
        self._saving.write(policy, now, outputs)
        self.ending.made(policy)

    def _loaded(self, policy: Policy, num_kept: int, now: float, outputs: list[Output]) -> None:
        before, taken = self.policy, self.taking.taken
        self.jobs.in_worker = policy
        self.progress.samples = num_kept
        if self.ending.loaded(policy) or (before is not None and policy.cid == before.cid):
            return
        if taken is None or taken.result.cid != policy.cid:
            return
        if policy.result != taken.result:
            outputs.append(Note(f"the state of epoch {taken.result.epoch} is not what its holders say"))
            self._not_taken(taken, Refusal.FALSE, now, outputs)
            return
        self.taking.loaded(taken, policy, outputs)
        self._hold(policy, now, outputs)
        if self._role is Role.EVALUATOR:
            self.ending.holds(policy)
        self._num_kept = num_kept
        if num_kept and self.progress.speed:
            self._collect_s = self.epoch.work_s = num_kept / self.progress.speed
        if self._is_whole:
            self._saving.keep(policy, now, outputs)
        if self._role is Role.LEARNER or self.progress.stands_by:
            self._saving.write(policy, now, outputs)

    def _load_refused(self, job: Job, reason: str, now: float, outputs: list[Output]) -> None:
        taken, in_worker = self.taking.taken, self.jobs.in_worker
        outputs.append(Note(f"a state does not fit: {reason}"))
        if isinstance(job, Load) and self.ending.load_refused(job.result, now):
            return
        if isinstance(job, Load) and taken is not None and job.result.cid == taken.result.cid:
            self._not_taken(taken, Refusal.UNFIT, now, outputs)
        elif self.policy is not None and in_worker is not None:  # its own policy is lost
            self._hold(in_worker, now, outputs)

    # Bytes from others.

    def _fetched(self, cid: Cid, now: float, outputs: list[Output], *, is_whole: bool) -> None:
        self._fetching.discard(cid)
        self.ending.fetched(cid)
        taken = self.taking.fetched(cid)
        if taken is not None:
            self._is_whole = is_whole
        if taken is not None and self._role is Role.STORAGE:
            self._store(taken, now, outputs)
        self.epoch.take(Held(cid), now, outputs)

    def _not_fetched(self, event: NotFetched, now: float, outputs: list[Output]) -> None:
        self._fetching.discard(event.cid)
        self.ending.not_fetched(event.cid, now)
        refused = self.taking.not_fetched(event, outputs)
        if refused is not None:
            self._not_taken(*refused, now, outputs)
        self.epoch.take(CannotBeHad(event.cid), now, outputs)

    def _not_taken(self, candidate: Candidate, why: Refusal, now: float, outputs: list[Output]) -> None:
        self.taking.refuse(candidate, why, now)
        if self.policy is None and self.jobs.in_worker is not None and self.taking.stored is None:
            self._hold(self.jobs.in_worker, now, outputs)
        else:
            self.taking.look(now, outputs)

    def _store(self, result: Result, now: float, outputs: list[Output]) -> None:
        """A node that only stores holds what it fetched."""
        self.taking.taking = self.taking.taken = None
        policy = Policy(result.epoch, result.cid, "", result.env_steps, result.parent, result.ballot, Electorate())
        self._hold(policy, now, outputs)
        self._saving.keep(policy, now, outputs)
        self.progress.phase = Phase.STORING

    def _hold(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        """Go on from this policy, and say so."""
        self.progress.policy = policy
        self._collect_s = 0.0
        self._num_kept = 0
        self.epoch.clear()
        self.claims.held(policy.epoch, policy.cid)
        self.taking.holding(policy)
        before = self.round
        is_of_few = len(self.live) < MAX_VOTERS
        has_voice = self._role is Role.LEARNER if before is None else self._me in before.voters
        if not self._is_whole:
            self._result_due = _NEVER
        elif is_of_few or has_voice or (before is not None and before.key.epoch + 1 != policy.epoch):
            outputs.append(Say(policy.result))
            self._result_due = _NEVER
        else:
            self._result_due = now + RESULT_GAP_S
        if self._role is Role.LEARNER:
            self.epoch.begin(policy, first_after(policy.cid), now, outputs)
        if self._is_whole:
            voters = says_of(policy.electorate.stakes) if self.round is None else self.round.voters
            says = {peer: say for peer, say in voters.items() if peer in policy.electorate}
        else:
            says = self._learners_alike
        self.lineage.hold(policy.result, says, is_new=self.progress.has_made_nothing, follows=not self._is_whole)
        self.taking.look(now, outputs)

    # What comes next.

    def _next(self, now: float, outputs: list[Output]) -> None:
        """Give the worker its next job, if it has none."""
        jobs, policy, taken = self.jobs, self.policy, self.taking.taken
        in_worker = jobs.in_worker
        if self._role is Role.ACTOR:
            self._act(now, outputs)
        elif self._role is Role.EVALUATOR:
            self._evaluate(now, outputs)
        if self._role is not Role.LEARNER or not jobs.is_open or jobs.job is not None or in_worker is None:
            return
        if taken is not None:
            if self.epoch.is_exchanging:
                self.epoch.give_up(outputs)
            keep = policy is not None and in_worker.cid == policy.cid and not self.progress.is_following
            jobs.start(Load(taken.result, keep_samples=keep), Phase.FETCHING, now, outputs)
        elif policy is None or self.epoch.is_exchanging or self.ending.is_busy(now, outputs):
            return
        elif in_worker.cid != policy.cid:
            jobs.start(Load(policy.result, keep_samples=False), Phase.FETCHING, now, outputs)
        elif self.ending.is_to_evaluate(policy):
            jobs.start(Evaluate(), Phase.EVALUATING, now, outputs)
        elif policy.epoch == 0 and self.others.num_learners + 1 < self._manifest.min_learners:
            self.progress.wait_for(Wait.MEMBERS)
        else:
            self._collect_or_update(policy, now, outputs)

    def _act(self, now: float, outputs: list[Output]) -> None:
        """Give an actor's worker its next job, if it has none."""
        jobs, policy, taken = self.jobs, self.policy, self.taking.taken
        if not jobs.is_open or jobs.job is not None or self.progress.phase is Phase.DONE:
            return
        if taken is not None:
            jobs.start(Load(taken.result, keep_samples=False), Phase.FETCHING, now, outputs)
        elif policy is None:
            self.progress.wait_for(Wait.POLICY)
        elif jobs.in_worker is None or jobs.in_worker.cid != policy.cid:
            jobs.start(Load(policy.result, keep_samples=False), Phase.FETCHING, now, outputs)
        elif self.others.have_ended:
            self.progress.phase = Phase.DONE
        elif samples := self._ration(policy):
            jobs.start(Rollout(samples), Phase.COLLECTING, now, outputs)
        else:
            self.progress.wait_for(Wait.OUTRUN if self.others.num_learners else Wait.LEARNERS)

    def _ration(self, policy: Policy) -> int:
        actors = sum(facts.role is Role.ACTOR for facts in self.live.values())
        return self.rationing.next(policy.epoch, self.progress.speed, self.others.num_learners, actors + 1)

    def _evaluate(self, now: float, outputs: list[Output]) -> None:
        """Give an evaluator's worker its next job, if it has none."""
        jobs, policy, taken = self.jobs, self.policy, self.taking.taken
        if not jobs.is_open or jobs.job is not None:
            return
        if taken is not None and self.progress.phase is not Phase.DONE:
            jobs.start(Load(taken.result, keep_samples=False), Phase.FETCHING, now, outputs)
        elif policy is None or self.ending.is_busy(now, outputs):
            return
        elif jobs.in_worker is None or jobs.in_worker.cid != policy.cid:
            jobs.start(Load(policy.result, keep_samples=False), Phase.FETCHING, now, outputs)
        elif self.ending.is_to_evaluate(policy):
            jobs.start(Evaluate(), Phase.EVALUATING, now, outputs)
        else:
            self.progress.wait_for(Wait.NEWER)

    def _collect_or_update(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        pace = self._pace(policy)
        samples, share = self.progress.samples, pacing.share(pace)
        is_following = pacing.is_follower(pace)
        if is_following and not self.progress.is_following:
            text = "this node is too slow beside the others for mode gradient: it follows, and does not slow them"
            outputs.append(Note(text))
        self.progress.is_following = is_following
        if not is_following and self._may_update(pace, samples, share, now):
            self.jobs.start(Update(policy), Phase.UPDATING, now, outputs)
        elif samples < share:
            self.jobs.start(Collect(share - samples, CHUNK_S), Phase.COLLECTING, now, outputs)
        else:
            self.progress.wait_for(Wait.OTHERS)

    def _pace(self, policy: Policy) -> Pace:
        return Pace(
            self._me,
            self._manifest,
            policy.electorate,
            policy.epoch,
            self.live,
            self.epoch.equal_stake,
            self.progress.speed,
            self._collect_s,
        )

    def _may_update(self, pace: Pace, samples: int, share: int, now: float) -> bool:
        current = self.round
        if samples == 0 or current is None:
            return False
        if current.decided is not None:  # without this learner: their policy comes, unless they all end just now
            return self.epoch.waited_for_result(now)
        if samples >= share or pacing.others_are_ready(pace, current, samples):
            return True
        own = pace.electorate.get(self._me)
        return self._num_kept > 0 and (own is None or own.missed > 0)  # late again, if it does not begin at once

    # Time.

    def _tick(self, now: float, outputs: list[Output]) -> None:
        policy, is_look = self.policy, now >= self.taking.next_look
        self.epoch.tick(now, outputs, is_look=is_look)
        if is_look:
            self.taking.look_again(now, outputs)
        self.others.tick(now, outputs)
        if policy is not None and now >= self._result_due:
            self._result_due = _NEVER
            outputs.append(Say(policy.result))
        if policy is not None and policy.epoch > 0 and self._is_whole:
            self._saving.keep(policy, now, outputs)
            if self._role is Role.LEARNER or self.progress.stands_by:
                self._saving.write(policy, now, outputs)

    def _set_wake(self, now: float, outputs: list[Output]) -> None:
        at = min(self.taking.next_wake(now), self.epoch.next_wake, self.others.next_wake)
        at = max(at, now + 0.001)
        if at != self._wake_at:
            self._wake_at = at
            outputs.append(Wake(at))
