"""A swarm's run on one node, as a core: `Run.handle(event, now)` says what to do next, and decides all that is decided.

A learner's epoch: *collect* its share of the batch (`electorate`), *update*, and average in one or more *rounds* what
the update yields (`exchange.rounds`). The others hear of it by signed statements (`statements`). Nobody is waited for
longer than what it is expected to bring is worth; who is late keeps what it collected for the next epoch. Which policy
is held says `lineage`; when a claim that the task is solved is believed, `claims`.

The worker does one job at a time; every job ends in an event. Whatever is waited for has an end that depends on nobody:

* collecting ends with the own share, or when those with most of the stake are ready;
* a round ends by turns and silences, until this learner alone is left;
* bytes that nobody gives stop nothing: the run goes on beside them.

The shell (`shoal.node.swarm.runner`) calls the worker, fetches, signs, writes; the simulator (`shoal.training.sim`) is
another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shoal.crdt.views import Contributed, Evaluation
from shoal.dht.fetch import Lack
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training import pacing
from shoal.training.claims import Claims, possible
from shoal.training.electorate import Electorate, says_of
from shoal.training.exchange.ballots import (
    Ballot,
    Begin,
    Busy,
    CannotBeHad,
    Cast,
    Committed,
    Decide,
    Held,
    Joined,
    Left,
    Limits,
    Obtain,
    OfferHeard,
    ProposalHeard,
    Propose,
    RoundEvent,
    SignedOffer,
    VoteHeard,
)
from shoal.training.exchange.ballots import Tick as RoundTick
from shoal.training.exchange.early import Early
from shoal.training.exchange.rounds import MAX_VOTERS, Round
from shoal.training.exchange.waits import Waits
from shoal.training.lineage import Candidate, Lineage, Refusal
from shoal.training.manifest import Manifest, Role
from shoal.training.pacing import Pace
from shoal.training.progress import BUSY, Progress
from shoal.training.run_events import (
    Abandon,
    Collect,
    Collected,
    Coming,
    Documents,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    Finish,
    Finished,
    Gone,
    Heard,
    Job,
    Load,
    Loaded,
    LoadRefused,
    Merge,
    MergeFailed,
    Note,
    NotFetched,
    Opened,
    Output,
    Policy,
    Said,
    Say,
    TaskFailed,
    Tick,
    Update,
    Updated,
    Wake,
    WorkerGone,
    WriteEvaluation,
    Yielded,
)
from shoal.training.saving import Saving
from shoal.training.statements import (
    MAX_SECONDS,
    NO_BALLOT,
    Addresses,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    RoundKey,
    Statement,
    Vote,
    first_after,
    turn_rank,
)

CHUNK_S: Final = 0.25
"""How long the worker collects before the run looks up."""
LOOK_S: Final = 1.0
"""How often other lines of the run are looked for."""
HEAR_OUT_S: Final = 0.05
"""After news of a newer policy, until it is asked for: whoever comes hears of several at once, the oldest first."""
COMING_S: Final = 10.0
"""A policy of which some has come is waited for so long, until more comes, before a newer one is asked for."""
RESULT_GAP_S: Final = 4.0
"""After which a member of a large swarm says what it holds, if it was not among those who had to say so at once."""
ALONE_S: Final = 2.0
RETRY_END_S: Final = 5.0
MAX_FAILED_MERGES: Final = 3
MAX_ENDED: Final = 2
"""Workers that one ballot, or the own policy, may end; another's state may end one, and is not loaded again."""
_NOT_LEARNING: Final = (Phase.DONE, Phase.FAILED, Phase.STARTING)
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
        own_env_steps: int = 0,
        rounds: int = 0,
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
            own_env_steps: that an earlier life put in.
            rounds: that an earlier life was part of.
        """
        self.progress = Progress(own_env_steps=own_env_steps, rounds=rounds)
        self.policy: Policy | None = None
        """What this node holds and goes on from."""
        self.round: Round | None = None
        self.claims = Claims(me, manifest.target_return, liars)
        self.lineage = Lineage(me)
        self._manifest = manifest
        self._me = me
        self._role = role
        self._stored = stored
        self._is_resumed = stored is not None and stored.epoch > 0
        self._rounds_before = rounds
        self._limits = Limits.of_batch(manifest.batch_size)
        self._waits = (Waits(), Waits())  # for the first exchange of an epoch, and for the others
        self._live: dict[PeerId, Facts] = {}
        self._num_learners = 0  # of them
        self._heard_at: dict[PeerId, float] = {}
        self._saving = Saving(self.progress)
        self._early = Early(self._live)
        self._evaluated: frozenset[Cid] = frozenset()
        # The worker.
        self._is_open = False
        self._job: Job | None = None
        self._job_at = now
        self._in_worker: Policy | None = None
        self._is_exchanging = False
        self._collect_s = 0.0
        self._work_s = 0.0  # collecting and optimising in this epoch
        self._settle_s = 0.0  # settling its rounds, without waiting for those who are late
        self._usual_s = 0.0  # both together, of the epochs before
        self._failed_merges = 0
        self._kept = None if stored is None else stored.cid
        self._ended_by: Cid | bytes | None = None  # what ended the worker, and how often in a row
        self._num_ended = 0
        self._num_kept = 0
        self._weights: dict[PeerId, float] = {}  # of those who take part in this epoch's exchanges
        self._is_shared = False
        self._must_evaluate = False
        self._checking: Evaluation | None = None
        self._claim_here: Cid | None = None
        self._retry_end_at = now
        # Bytes from others.
        self._fetching: set[Cid] = set()
        self._taking: Candidate | None = None
        self._taken: Candidate | None = None
        self._coming_at = -_NEVER
        self._overtaken_at: float | None = None
        self._missed_at: float | None = None
        # Time.
        self._looked_at = now
        self._look_at = _NEVER
        self._alone_at: float | None = now
        self._result_due = _NEVER
        self._wake_at = now

    # What others ask.

    @property
    def live(self) -> dict[PeerId, Facts]:
        """The facts of the other members that are there."""
        return self._live

    @property
    def learners(self) -> list[PeerId]:
        """Other live members that still learn."""
        return [peer for peer, facts in self._live.items() if _learns(facts)]

    @property
    def learned_wait_s(self) -> float:
        """How long a round waits for those who have not come, and then for one who says nothing."""
        return self._waits[0].offers_s + self._waits[0].silence_s

    def facts(self) -> Facts:
        """What this node says of itself."""
        return self.progress.facts(self._role, 0 if self.policy is None else self.policy.epoch)

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
                self._own_said(statement, name, now, outputs)
            case Gone(author):
                self._gone(author, now, outputs)
            case Documents(evaluations, own):
                self._count_on(own)
                found = possible(evaluations)
                self.claims.heard(found)
                self._evaluated = frozenset(each.cid for each in found)
            case Fetched(cid):
                self._fetched(cid, now, outputs)
            case Coming(cid):
                if self._taking is not None and self._taking.result.cid == cid:
                    self._coming_at = now
            case NotFetched():
                self._not_fetched(event, now, outputs)
            case Opened(policy):
                self._opened(policy, now, outputs)
            case WorkerGone(reason):
                self._worker_gone(reason, now, outputs)
            case TaskFailed(reason):
                self._worker_gone(reason, now, outputs)
                self.progress.phase = Phase.FAILED
            case Tick():
                self._tick(now, outputs)
            case _:
                self._job_done(event, now, outputs)
        if now >= self._look_at:
            self._look(now, outputs)
        self._next(now, outputs)
        facts = self.progress.to_tell(self._role, 0 if self.policy is None else self.policy.epoch, len(self._live), now)
        if facts is not None:
            outputs.append(Say(facts))
        self._set_wake(now, outputs)
        return outputs

    def _count_on(self, own: Contributed | None) -> None:
        """Go on counting from what this node's document says, where that is more than what was kept on this disk."""
        if own is None:
            return
        progress = self.progress
        progress.own_env_steps = max(progress.own_env_steps, own.env_steps)
        more = max(own.rounds - progress.rounds, 0)
        progress.rounds += more
        self._rounds_before += more

    # Others.

    def _heard(self, event: Heard, now: float, outputs: list[Output]) -> None:
        author, statement = event.author, event.statement
        if author == self._me:
            return
        self._heard_at[author] = now
        match statement:
            case Vote(key=key) | Offer(key=key) | Proposal(key=key):
                current = self.round
                if current is not None and key == current.key:
                    self._to_round(event, now, outputs)
                elif current is not None and key.epoch == current.key.epoch and key.step == current.key.step + 1:
                    self._early.keep(event)
                    self._in_round(Committed(author, key.after), now, outputs)
                elif self.policy is None or key.epoch >= self.policy.epoch:
                    self._early.keep(event)
            case Result():
                if self._is_plausible(statement):
                    is_ahead = self.lineage.heard(author, statement)
                    self._commit(author, statement, now, outputs)
                    if is_ahead:
                        self._look_at = min(self._look_at, now + HEAR_OUT_S)
            case Facts():
                before = self._live.get(author)
                self._live[author] = statement
                self._num_learners += _learns(statement) - (before is not None and _learns(before))
                self._alone_at, self.progress.is_alone = None, False
                if statement.phase in BUSY:
                    self._in_round(Busy(author), now, outputs)
                elif self._counts_alike and statement.role is Role.LEARNER:
                    self._in_round(Joined(author, self._equal_stake()), now, outputs)
            case Addresses():
                pass

    def _commit(self, author: PeerId, result: Result, now: float, outputs: list[Output]) -> None:
        """Who holds what came of a ballot voted for it, and always will."""
        policy = self.policy
        if policy is not None and result.parent == policy.cid and author not in self.lineage.liars:
            self._in_round(Committed(author, result.ballot), now, outputs)

    def _is_plausible(self, result: Result) -> bool:
        most = self._manifest.max_env_steps + self._limits.ballot
        return result.env_steps <= most and result.epoch <= result.env_steps

    def _to_round(self, event: Heard, now: float, outputs: list[Output]) -> None:
        match event.statement:
            case Offer() as offer:
                self._in_round(OfferHeard(SignedOffer(event.author, event.name, offer)), now, outputs)
            case Proposal() as proposal:
                self._in_round(ProposalHeard(event.author, proposal), now, outputs)
            case Vote() as vote:
                self._in_round(VoteHeard(event.author, vote), now, outputs)
            case _:
                pass

    def _gone(self, author: PeerId, now: float, outputs: list[Output]) -> None:
        facts = self._live.pop(author, None)
        self._num_learners -= facts is not None and _learns(facts)
        self._heard_at.pop(author, None)
        self.lineage.gone(author)
        if not self._live and self._alone_at is None:
            self._alone_at = now
        self._in_round(Left(author), now, outputs)

    # Rounds.

    @property
    def _counts_alike(self) -> bool:
        """Whether nobody has shown anything yet, or nobody who has is left: then all who learn count alike."""
        policy = self.policy
        return policy is not None and not any(peer == self._me or peer in self._live for peer in policy.electorate)

    def _equal_stake(self) -> float:
        return self._manifest.batch_size / (self._num_learners + 1)

    def _first_round(self, policy: Policy, after: bytes, now: float, outputs: list[Output]) -> None:
        if self._counts_alike:
            stakes = dict.fromkeys((self._me, *self.learners), self._equal_stake())
        else:
            stakes = policy.electorate.stakes
        self._enter_round(RoundKey(policy.epoch, 0, after), stakes, now, outputs)

    def _enter_round(self, key: RoundKey, stakes: dict[PeerId, float], now: float, outputs: list[Output]) -> Round:
        others = [peer for peer in stakes if peer != self._me]
        entered = self.round = Round(
            self._me,
            key,
            stakes,
            self._limits,
            self._waits[key.step > 0],
            now,
            heard_at=self._heard_at,
            busy=[peer for peer in others if peer in self._live and self._live[peer].phase in BUSY],
            gone=[peer for peer in others if peer not in self._live],
            may_have_voted=self._is_resumed and self.progress.rounds == self._rounds_before,
        )
        for event in self._early.of(key):
            self._to_round(event, now, outputs)
        if key.step == 0:
            for author, result in list(self.lineage.results.items()):
                self._commit(author, result, now, outputs)
        return entered

    def _in_round(self, event: RoundEvent, now: float, outputs: list[Output]) -> None:
        current = self.round
        if current is None:
            return
        before = current.attempt
        for output in current.handle(event, now):
            match output:
                case Obtain(cid, sources):
                    self._fetching.add(cid)
                    outputs.append(Fetch(cid, sources, keep=False))
                case Propose() | Cast() if self._is_solo:
                    pass
                case Propose(proposal):
                    outputs.append(Say(proposal))
                case Cast(vote):
                    outputs.append(Say(vote))
                case Decide(ballot):
                    if current.has_begun and self._is_exchanging and self._job is None:
                        self._merge(ballot, now, outputs)

        if current is self.round and current.decided is None and current.attempt > before:
            self._leave_behind(current, now, outputs)

    def _begin(self, now: float, outputs: list[Output]) -> None:
        """Arrive at the round, with an offer or with nothing to give."""
        current = self.round
        if current is None:
            return
        decided = current.decided
        if not current.has_begun:
            self._in_round(Begin(max(self._work_s, self._usual_s)), now, outputs)
        if decided is None:
            return
        is_in_it = any(each.author == self._me for each in decided.offers)
        if current.key.step == 0 and not is_in_it and not self._waited_for_result(now):
            self._give_up(now, outputs)  # the others went on; what was collected counts in the next epoch
        else:
            self._merge(decided, now, outputs)

    def _merge(self, ballot: Ballot, now: float, outputs: list[Output]) -> None:
        current = self.round
        if current is not None:
            self._settle_s += current.settling_s
        if current is not None and current.key.step == 0:
            self._weights = {each.author: float(each.offer.weight) for each in ballot.offers}
            self._is_shared = any(each.author != self._me for each in ballot.offers)
        self._start(Merge(ballot), Phase.UPDATING, now, outputs)

    def _give_up(self, now: float, outputs: list[Output]) -> None:
        self._is_exchanging = False
        outputs.append(Abandon(keep_samples=True))
        self._look(now, outputs)  # who went on may have said what they hold already

    # The worker's jobs.

    def _start(self, job: Job, phase: Phase, now: float, outputs: list[Output]) -> None:
        if self._job is not None:
            raise RuntimeError(f"the worker is to do {job} while it does {self._job}; this is an error in this module")
        self._job, self._job_at = job, now
        self.progress.phase = phase
        outputs.append(job)

    def _opened(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        self._is_open = True
        self._job, self._in_worker = None, policy
        if self.policy is not None:
            return  # it goes on from what it held before the worker ended
        if self._stored is not None and self._stored.epoch > 0:
            self._take(Candidate(self._stored, ()), now, outputs)
        else:
            self._hold(policy, now, outputs)

    def _worker_gone(self, reason: str, now: float, outputs: list[Output]) -> None:
        job, taken, claim, policy = self._job, self._taken, self._checking, self.policy
        self._is_open = self._is_exchanging = False
        self._job = self._in_worker = None
        self._checking = None
        self.progress.phase = Phase.STARTING
        self.progress.samples = 0
        outputs.append(Note(reason))
        # What ends a worker twice would end every one.
        if isinstance(job, Load | Merge):
            name = job.result.cid if isinstance(job, Load) else job.ballot.name
            self._num_ended = self._num_ended + 1 if name == self._ended_by else 1
            self._ended_by = name
            is_own = (
                isinstance(job, Merge) or (policy is not None and policy.cid == job.result.cid) or name == self._kept
            )
            if is_own and self._num_ended < MAX_ENDED:
                return
            self._num_ended = 0
            if isinstance(job, Merge):
                self._merge_failed(reason, now, outputs)
            elif taken is not None and taken.result.cid == job.result.cid:
                self._not_taken(taken, Refusal.UNFIT, now, outputs)
            elif claim is not None and claim.cid == job.result.cid:
                self.claims.unfit(claim)
            elif is_own:  # it is lost; what the next worker opens with is gone on from
                self.lineage.refuse(job.result, Refusal.UNFIT, now)
                self.policy = self.round = self._stored = None
                outputs.append(Note("the policy that this node held ends every worker: it is given up"))

    def _job_done(self, event: Event, now: float, outputs: list[Output]) -> None:
        job, self._job = self._job, None
        if job is None:
            return  # of a worker that is gone
        if isinstance(job, Collect | Update | Merge):
            self._work_s += now - self._job_at
        match event:
            case Collected():
                self._collect_s += event.seconds
                self.progress.collected(event, now)
            case Yielded(cid, weight, rejected):
                self._reject(rejected, outputs)
                self._exchange(cid, weight, job, now, outputs)
            case Updated(policy, rejected):
                self._reject(rejected, outputs)
                self.progress.metrics = dict(event.metrics)
                self._updated(policy, now, outputs)
            case MergeFailed(reason):
                self._merge_failed(reason, now, outputs)
            case Loaded(policy, num_kept):
                self._loaded(policy, num_kept, now, outputs)
            case LoadRefused(reason):
                self._load_refused(job, reason, now, outputs)
            case Evaluated(mean_return):
                self._was_evaluated(mean_return, now, outputs)
            case Finished():
                self.progress.phase = Phase.DONE
                if self.policy is not None:
                    self._saving.write(self.policy, now, outputs, at_once=True)
            case _:
                pass

    def _exchange(self, cid: Cid | None, weight: int, job: Job, now: float, outputs: list[Output]) -> None:
        """The update under way wants something averaged."""
        policy, current = self.policy, self.round
        if policy is None or current is None:
            self._give_up(now, outputs)
            return
        if isinstance(job, Merge):
            key = RoundKey(policy.epoch, current.key.step + 1, job.ballot.name)
            current = self._enter_round(key, self._weights or {self._me: 1.0}, now, outputs)
        self._is_exchanging = True
        self.progress.step = current.key.step
        self.progress.phase = Phase.EXCHANGING
        if cid is None or weight <= 0:
            self._begin(now, outputs)
        else:
            seconds = round(min(self._work_s, MAX_SECONDS), 4)
            offer = Offer(key=current.key, cid=cid, weight=weight, seconds=seconds)
            if self._is_solo:
                self._own_said(offer, first_after(cid), now, outputs)
            else:
                outputs.append(Say(offer))

    @property
    def _is_solo(self) -> bool:
        """Whether nobody else takes part in what is left of this epoch's exchanges, so that nobody need hear."""
        current = self.round
        return current is not None and current.key.step > 0 and self._weights.keys() == {self._me}

    def _own_said(self, statement: Statement, name: bytes, now: float, outputs: list[Output]) -> None:
        current = self.round
        if isinstance(statement, Offer) and current is not None and statement.key == current.key:
            self._in_round(OfferHeard(SignedOffer(self._me, name, statement)), now, outputs)
            if self._is_exchanging and self._job is None:
                self._begin(now, outputs)

    def _updated(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        progress = self.progress
        took_s = self._work_s + self._settle_s
        self._usual_s = took_s if not self._usual_s else 0.7 * self._usual_s + 0.3 * took_s
        progress.rounds += 1
        progress.shared_rounds += self._is_shared
        progress.samples = 0
        self._failed_merges = 0
        self._in_worker = policy
        self._hold(policy, now, outputs)
        self._saving.keep(policy, now, outputs)
        self._saving.write(policy, now, outputs)
        self._must_evaluate = policy.epoch % self._manifest.eval_interval == 0 and self._evaluator(policy) == self._me

    def _evaluator(self, policy: Policy) -> PeerId:
        there = [peer for peer in policy.electorate if peer == self._me or peer in self._live] or [self._me]
        key = RoundKey(policy.epoch, 0, first_after(policy.cid))
        return min(there, key=lambda peer: turn_rank("evaluate", key, 0, peer))

    def _merge_failed(self, reason: str, now: float, outputs: list[Output]) -> None:
        """All who decided on the same ballot fail alike; they settle on another one."""
        outputs.append(Note(f"what was decided on cannot be averaged: {reason}"))
        policy, current = self.policy, self.round
        self._is_exchanging = False
        self._failed_merges += 1
        if self._failed_merges > MAX_FAILED_MERGES:
            self._failed_merges = 0
            self.progress.samples = 0
            outputs.append(Abandon(keep_samples=False))
        if policy is not None and current is not None and current.decided is not None:
            self._first_round(policy, current.decided.name, now, outputs)

    def _reject(self, rejected: tuple[PeerId, ...], outputs: list[Output]) -> None:
        for author in rejected:
            self.progress.rejected[author] = self.progress.rejected.get(author, 0) + 1
            outputs.append(Note(f"the contribution of {author} is malformed or absurd and left out"))

    # Which policy to hold.

    def _hold(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        self.policy = policy
        self._is_exchanging = False
        self._collect_s = self._work_s = self._settle_s = 0.0
        self._num_kept = 0
        self._overtaken_at = self._missed_at = None
        self.progress.step = 0
        self.claims.held(policy.epoch, policy.cid)
        for waiting in (self._taking, self._taken):
            if waiting is not None and waiting.result.epoch <= policy.epoch:
                self._taking = self._taken = None
        is_of_few = len(self._live) < MAX_VOTERS
        has_voice = self._role is Role.LEARNER if self.round is None else self._me in self.round.voters
        is_told = is_of_few or has_voice
        if is_told or (self.round is not None and self.round.key.epoch + 1 != policy.epoch):
            outputs.append(Say(policy.result))
            self._result_due = _NEVER
        else:
            self._result_due = now + RESULT_GAP_S
        if self._role is Role.LEARNER:
            self._first_round(policy, first_after(policy.cid), now, outputs)
        voters = says_of(policy.electorate.stakes) if self.round is None else self.round.voters
        says = {peer: say for peer, say in voters.items() if peer in policy.electorate}
        self.lineage.hold(policy.result, says, is_new=self.progress.rounds == self._rounds_before)
        self._look(now, outputs)

    def _look(self, now: float, outputs: list[Output]) -> None:
        """Whether another policy than the own one is to be held."""
        self._look_at = _NEVER
        if self._taken is not None or self.progress.phase is Phase.DONE:
            return
        if self._role is Role.LEARNER and self.policy is None:
            self._seek_stored(now, outputs)
            return
        candidate = self.lineage.overtaken(now)
        if candidate is None and self.round is not None and self.round.decided is not None:
            candidate = self.lineage.made_of(self.round.decided.name, now)
        if candidate is None:
            self._overtaken_at = None
            candidate = self.lineage.other_line(now) if self._taking is None else None
        elif self._comes_by_itself(candidate, now):
            return
        taking = self._taking
        if candidate is None or (taking is not None and taking.result.epoch >= candidate.result.epoch):
            return
        # What comes is waited for: over a slow link a newer one would come no sooner.
        may_change = now >= self._looked_at + LOOK_S and now >= self._coming_at + COMING_S
        if taking is None or taking.result.cid not in self._fetching or may_change:
            self._take(candidate, now, outputs)

    def _comes_by_itself(self, candidate: Candidate, now: float) -> bool:
        """Whether this learner is about to make the same policy itself."""
        policy, current = self.policy, self.round
        if policy is None or current is None or candidate.result.parent != policy.cid:
            return False
        if self._overtaken_at is None:
            self._overtaken_at = now
        is_in_it = isinstance(self._job, Merge) or self._is_exchanging
        return is_in_it and now < self._overtaken_at + self._waits[0].silence_s

    def _take(self, candidate: Candidate, now: float, outputs: list[Output]) -> None:
        self._taking = candidate
        self._coming_at = -_NEVER
        cid = candidate.result.cid
        if cid not in self._fetching:
            self._fetching.add(cid)
            outputs.append(Fetch(cid, candidate.holders, keep=True))

    def _fetched(self, cid: Cid, now: float, outputs: list[Output]) -> None:
        self._fetching.discard(cid)
        taking, claim = self._taking, self._checking
        if claim is not None and claim.cid == cid:
            self._claim_here = cid
        if taking is not None and taking.result.cid == cid:
            self._taken = taking
            if self._role is Role.STORAGE:
                self._store(taking.result, now, outputs)
        self._in_round(Held(cid), now, outputs)

    def _not_fetched(self, event: NotFetched, now: float, outputs: list[Output]) -> None:
        cid = event.cid
        self._fetching.discard(cid)
        taking, claim = self._taking, self._checking
        if claim is not None and claim.cid == cid:
            self.claims.unreachable(claim, now)
            self._checking = None
        if taking is not None and taking.result.cid == cid:
            is_unfit = event.lack is Lack.UNFIT
            text = "cannot be a state of this run" if is_unfit else "cannot be had now"
            text = f"epoch {taking.result.epoch} {text}: {event.reason}"
            is_own = self.policy is None and self._stored is not None and taking.result.cid == self._stored.cid
            is_first = is_own and not is_unfit and self.progress.phase is not Phase.FETCHING
            if is_first:
                self.progress.phase = Phase.FETCHING
                text += "; it was trained here and is not on this disk any more, so a member who has it is waited for"
            outputs.append(Note(text, is_warning=is_unfit or is_first))
            self._not_taken(taking, Refusal.UNFIT if is_unfit else Refusal.UNREACHABLE, now, outputs)
        self._in_round(CannotBeHad(cid), now, outputs)

    def _not_taken(self, candidate: Candidate, why: Refusal, now: float, outputs: list[Output]) -> None:
        self._taking = self._taken = None
        self.lineage.refuse(candidate.result, why, now)
        stored = self._stored
        if stored is not None and candidate.result.cid == stored.cid and why is not Refusal.UNREACHABLE:
            self._stored = stored = None  # what an earlier life kept is worth nothing
        if self.policy is None and self._in_worker is not None and stored is None:
            self._hold(self._in_worker, now, outputs)
        else:
            self._look(now, outputs)

    def _seek_stored(self, now: float, outputs: list[Output]) -> None:
        """What an earlier life kept is gone from the disk: wait for a member who has it, or has come further.

        To begin anew would give up all that was trained, and bring a run to life again that had ended.
        """
        stored = self._stored
        if stored is None or self._in_worker is None or self._taking is not None:
            return
        candidate = self.lineage.overtaken(now) or self.lineage.other_line(now)
        if candidate is None or candidate.result.epoch == 0:
            if self.lineage.is_refused(stored, now):
                return
            candidate = Candidate(stored, self.lineage.holders(stored.cid))
        self._take(candidate, now, outputs)

    def _loaded(self, policy: Policy, num_kept: int, now: float, outputs: list[Output]) -> None:
        before, taken, claim = self.policy, self._taken, self._checking
        self._in_worker = policy
        self.progress.samples = num_kept
        if claim is not None and policy.cid == claim.cid:
            if policy.epoch != claim.epoch:
                self.claims.is_false(claim)
                self._checking = None
            return
        if before is not None and policy.cid == before.cid:
            return
        if taken is None or taken.result.cid != policy.cid:
            return
        if policy.result != taken.result:
            outputs.append(Note(f"the state of epoch {taken.result.epoch} is not what its holders say"))
            self._not_taken(taken, Refusal.FALSE, now, outputs)
            return
        self._taking = self._taken = None
        if before is not None and before.epoch > 0 and before.cid != policy.parent and taken.is_other_line:
            lost = max(0, before.env_steps - self.lineage.together_until(taken.holders))
            self.progress.lost_env_steps += lost
            text = f"taking the policy of another part of the swarm, of epoch {policy.epoch}"
            outputs.append(Note(f"{text}; {lost} environment steps of this part are given up for it"))
        self._hold(policy, now, outputs)
        self._num_kept = num_kept
        if num_kept and self.progress.speed:
            self._collect_s = self._work_s = num_kept / self.progress.speed
        self._saving.keep(policy, now, outputs)
        self._saving.write(policy, now, outputs)

    def _load_refused(self, job: Job, reason: str, now: float, outputs: list[Output]) -> None:
        taken, claim = self._taken, self._checking
        result = job.result if isinstance(job, Load) else None
        outputs.append(Note(f"a state does not fit: {reason}"))
        if claim is not None and result is not None and result.cid == claim.cid:
            self.claims.unreachable(claim, now)
            self._checking = None
            self._retry_end_at = now + RETRY_END_S
        elif taken is not None and result is not None and result.cid == taken.result.cid:
            self._not_taken(taken, Refusal.UNFIT, now, outputs)
        elif self.policy is not None and self._in_worker is not None:  # its own policy is lost
            self._hold(self._in_worker, now, outputs)

    def _store(self, result: Result, now: float, outputs: list[Output]) -> None:
        """A node that only stores holds what it fetched."""
        self._taking = self._taken = None
        policy = Policy(result.epoch, result.cid, "", result.env_steps, result.parent, result.ballot, Electorate())
        self._hold(policy, now, outputs)
        self._saving.keep(policy, now, outputs)
        self.progress.phase = Phase.STORING

    # Evaluation and the end.

    def _was_evaluated(self, mean_return: float, now: float, outputs: list[Output]) -> None:
        policy, claim = self._in_worker, self._checking
        if policy is None:
            return
        self.claims.measured(policy.cid, mean_return)
        if claim is None or claim.cid != policy.cid:
            self._must_evaluate = False
            outputs.append(WriteEvaluation(policy, mean_return))
            return
        self._checking = None
        if not self.claims.checked(claim):
            text = f"{claim.author} claims a return of {claim.mean_return:.1f}, but it is {mean_return:.1f} here"
            outputs.append(Note(f"{text}; it is not believed any more"))

    def _check_claims(self, now: float, outputs: list[Output]) -> bool:
        """Look into the next claim that the task is solved; whether the worker is busy with it now."""
        claim = self._checking
        if claim is None:
            claim = self._checking = self.claims.to_check(now)
            if claim is None:
                return False
        in_worker = self._in_worker
        if in_worker is not None and claim.cid == in_worker.cid:
            self._start(Evaluate(), Phase.EVALUATING, now, outputs)
        elif claim.cid in self._fetching:
            return False
        elif claim.cid == self._claim_here:
            self._start(Load(_claimed(claim), keep_samples=False), Phase.EVALUATING, now, outputs)
        else:
            self._fetching.add(claim.cid)
            outputs.append(Fetch(claim.cid, (claim.author, *self.lineage.holders(claim.cid)), keep=True))
            return False
        return True

    def _end(self, now: float, outputs: list[Output]) -> bool:
        """Whether the run has ended, or ends now."""
        progress, policy, in_worker = self.progress, self.policy, self._in_worker
        final = self.claims.solved()
        if policy is None or in_worker is None or now < self._retry_end_at:
            return progress.phase is Phase.DONE
        if progress.phase is Phase.DONE and (final is None or progress.final == final):
            return True
        if final is None and policy.env_steps < self._manifest.max_env_steps:
            return False
        if final is not None and in_worker.cid != final.cid:
            self._checking = final
            self._start(Load(_claimed(final), keep_samples=False), Phase.FETCHING, now, outputs)
            return True
        self._checking = None
        if final is not None and policy.cid != final.cid:
            self.policy = in_worker
        progress.final, progress.solved = final, final is not None
        self._start(Finish(final), Phase.EVALUATING, now, outputs)
        return True

    # What comes next.

    def _next(self, now: float, outputs: list[Output]) -> None:
        """Give the worker its next job, if it has none."""
        policy, in_worker = self.policy, self._in_worker
        if self._role is not Role.LEARNER or not self._is_open or self._job is not None or in_worker is None:
            return
        if self._taken is not None:
            if self._is_exchanging:
                self._give_up(now, outputs)
            keep = policy is not None and in_worker.cid == policy.cid and not self.progress.is_following
            self._start(Load(self._taken.result, keep_samples=keep), Phase.FETCHING, now, outputs)
        elif policy is None or self._is_exchanging or self._end(now, outputs) or self._check_claims(now, outputs):
            return
        elif in_worker.cid != policy.cid:
            self._start(Load(policy.result, keep_samples=False), Phase.FETCHING, now, outputs)
        elif self._must_evaluate and policy.cid not in self._evaluated:
            self._start(Evaluate(), Phase.EVALUATING, now, outputs)
        elif policy.epoch == 0 and self._num_learners + 1 < self._manifest.min_learners:
            self.progress.phase = Phase.WAITING
        else:
            self._collect_or_update(policy, now, outputs)

    def _collect_or_update(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        pace = self._pace(policy)
        samples, share = self.progress.samples, pacing.share(pace)
        is_following = pacing.is_follower(pace)
        if is_following and not self.progress.is_following:
            text = "this node is too slow beside the others for mode gradient: it follows, and does not slow them"
            outputs.append(Note(text))
        self.progress.is_following = is_following
        if not is_following and self._may_update(pace, samples, share, now):
            self._start(Update(policy), Phase.UPDATING, now, outputs)
        elif samples < share:
            self._start(Collect(share - samples, CHUNK_S), Phase.COLLECTING, now, outputs)
        else:
            self.progress.phase = Phase.WAITING

    def _pace(self, policy: Policy) -> Pace:
        return Pace(
            self._me,
            self._manifest,
            policy.electorate,
            policy.epoch,
            self._live,
            self._equal_stake() if self._counts_alike else None,
            self.progress.speed,
            self._collect_s,
        )

    def _may_update(self, pace: Pace, samples: int, share: int, now: float) -> bool:
        current = self.round
        if samples == 0 or current is None:
            return False
        if current.decided is not None:  # without this learner: their policy comes, unless they all end just now
            return self._waited_for_result(now)
        if samples >= share or pacing.others_are_ready(pace, current, samples):
            return True
        own = pace.electorate.get(self._me)
        return self._num_kept > 0 and (own is None or own.missed > 0)  # late again, if it does not begin at once

    def _waited_for_result(self, now: float) -> bool:
        """Whether those who decided without this learner had time enough to say what they made, or are all gone."""
        current = self.round
        if current is not None and not any(peer in self._live for peer in current.deciders):
            return True
        self._missed_at = now if self._missed_at is None else self._missed_at
        return now - self._missed_at > 2 * self._waits[0].silence_s

    # Time.

    def _tick(self, now: float, outputs: list[Output]) -> None:
        current, policy = self.round, self.policy
        if current is not None and now >= current.next_wake:
            self._in_round(RoundTick(), now, outputs)
        if now >= self._looked_at + LOOK_S:
            if current is not None and current is self.round and current.attempt > 0 and current.decided is None:
                self._leave_behind(current, now, outputs)
            self._look(now, outputs)
            self._looked_at = now
        if self._alone_at is not None and not self.progress.is_alone and now >= self._alone_at + ALONE_S:
            self.progress.is_alone = True
            outputs.append(Note("ALONE: no other member can be heard; what is trained now, is trained alone"))
        if policy is not None and now >= self._result_due:
            self._result_due = _NEVER
            outputs.append(Say(policy.result))
        if policy is not None and policy.epoch > 0:
            self._saving.keep(policy, now, outputs)
            if self._role is Role.LEARNER:
                self._saving.write(policy, now, outputs)

    def _leave_behind(self, current: Round, now: float, outputs: list[Output]) -> None:
        """Nobody waits for the vote of one that says that it is at an earlier epoch, and nothing in this round."""
        for author, facts in list(self._live.items()):
            result = self.lineage.results.get(author)
            epoch = facts.epoch if result is None else max(facts.epoch, result.epoch)
            if epoch < current.key.epoch and not current.takes_part(author):
                self._in_round(Left(author), now, outputs)

    def _set_wake(self, now: float, outputs: list[Output]) -> None:
        at = min(self._looked_at + LOOK_S, self._look_at)
        current = self.round
        if current is not None and current.decided is None:
            at = min(at, current.next_wake)
        if self._alone_at is not None and not self.progress.is_alone:
            at = min(at, self._alone_at + ALONE_S)
        if self._overtaken_at is not None:
            at = min(at, max(self._overtaken_at + self._waits[0].silence_s, now + 0.01))
        at = max(at, now + 0.001)
        if at != self._wake_at:
            self._wake_at = at
            outputs.append(Wake(at))


def _learns(facts: Facts) -> bool:
    return facts.role is Role.LEARNER and facts.phase not in _NOT_LEARNING


def _claimed(claim: Evaluation) -> Result:
    return Result(epoch=claim.epoch, cid=claim.cid, parent=None, ballot=NO_BALLOT, env_steps=claim.env_steps)
