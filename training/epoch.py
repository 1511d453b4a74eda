"""The exchanges of the epoch that is on: one learner in one round after the other, from its first offer to the merge.

A round is entered as soon as a policy is held, with those who have stake in it. This learner *arrives* when its update
wants something averaged, and merges what is decided on once it has arrived; if the others decided without it, it gives
up, and what it collected counts in the next epoch. What others say of a round that this learner is not in yet is kept
until it is.

The exchanges between an update's first and its last go from member to member directly (`exchange.direct`) as long as
nothing fails, and by further rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final

from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.ballots import (
    Ballot,
    Begin,
    Busy,
    Cast,
    Committed,
    Decide,
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
from shoal.training.exchange.direct import MAX_DIRECT, Direct, Part, Trust
from shoal.training.exchange.early import Early
from shoal.training.exchange.rounds import IDLE_ATTEMPTS, Round
from shoal.training.exchange.waits import Waits
from shoal.training.jobs import Jobs
from shoal.training.lineage import Lineage
from shoal.training.manifest import Manifest, Role
from shoal.training.others import Others
from shoal.training.progress import BUSY, Progress
from shoal.training.run_events import Abandon, Fetch, Give, Heard, Job, Merge, Note, Output, Policy, Say
from shoal.training.statements import (
    MAX_SECONDS,
    MAX_UPLINK,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    RoundKey,
    Statement,
    Vote,
    first_after,
)

MAX_FAILED_MERGES: Final = 3


class Epoch:
    """One learner's part in the rounds of an epoch, again for each policy.

    Attributes:
        round: the one that is on, or the first of those that go on directly.
        direct: the exchanges after the first, where they do.
        is_exchanging: whether the update is under way and what it wants averaged is not there yet.
        work_s: collecting and optimising for this epoch.
        ahead_s: of that, while the epoch before was settled.
        uplink: bytes per second that this node can send, as the shell found last; 0 if it does not know.
    """

    __slots__ = (
        "_batch",
        "_early",
        "_failed_merges",
        "_fetching",
        "_first",
        "_idle",
        "_is_resumed",
        "_is_shared",
        "_jobs",
        "_lineage",
        "_me",
        "_missed_at",
        "_others",
        "_parts",
        "_progress",
        "_settle_s",
        "_shunned",
        "_trust",
        "_usual_s",
        "_waits",
        "_weights",
        "ahead_s",
        "direct",
        "is_exchanging",
        "round",
        "uplink",
        "work_s",
    )

    def __init__(
        self,
        manifest: Manifest,
        me: PeerId,
        progress: Progress,
        jobs: Jobs,
        others: Others,
        lineage: Lineage,
        fetching: set[Cid],
        shunned: Set[PeerId],
        *,
        is_resumed: bool,
    ) -> None:
        """Start in no round.

        Args:
            manifest: of the run.
            me: this node.
            progress: of this node; with the policy that it holds.
            jobs: the worker's, which merges.
            others: who are there.
            lineage: what each of them holds.
            fetching: what was asked for and has not come, for whatever.
            shunned: members with whom nothing is averaged; kept up to date.
            is_resumed: an earlier life of this node was in the run, and may have voted.
        """
        self.round: Round | None = None
        self.direct: Direct | None = None
        self.is_exchanging = False
        self.work_s = self.ahead_s = 0.0
        self.uplink = 0
        self._batch = manifest.batch
        self._me = me
        self._progress = progress
        self._jobs = jobs
        self._others = others
        self._lineage = lineage
        self._fetching = fetching
        self._shunned = shunned
        self._is_resumed = is_resumed
        self._waits = (Waits(), Waits(), Waits())  # for the first exchange of an epoch, the others, and direct ones
        self._trust = Trust()
        self._first: bytes | None = None  # the ballot of the first exchange of the update that is under way
        self._parts: dict[PeerId, Part] = {}  # the newest that came before this learner was at its step
        self._early = Early(others.live)
        self._idle: set[PeerId] = set()  # those who did not help to decide lately
        self._weights: dict[PeerId, float] = {}  # of those who take part in this epoch's exchanges
        self._is_shared = False
        self._settle_s = 0.0  # settling its rounds, without waiting for those who are late
        self._usual_s = 0.0  # work and settling together, of the epochs before
        self._failed_merges = 0
        self._missed_at: float | None = None

    @property
    def learned_wait_s(self) -> float:
        """How long a round waits for those who have not come, and then for one who says nothing."""
        return self._waits[0].offers_s + self._waits[0].silence_s

    @property
    def silence_s(self) -> float:
        """How long one who says nothing is waited for."""
        return self._waits[0].silence_s

    @property
    def equal_stake(self) -> float | None:
        """An equal share, where nobody has shown anything or nobody who has is left; None where somebody has."""
        return self._batch.equal_share(self._others.num_learners + 1) if self._others.count_alike else None

    # Entering.

    def clear(self) -> None:
        """Another policy is held: what was done for the epoch before is over."""
        self.is_exchanging = False
        self.direct = self._first = None
        self.work_s = self.ahead_s = self._settle_s = 0.0
        self._missed_at = None
        self._progress.step = 0

    def begin(self, policy: Policy, after: bytes, now: float, outputs: list[Output]) -> None:
        """Enter the first round from a policy; ``after`` is what it follows from."""
        equal = self.equal_stake
        if equal is not None:
            stakes = dict.fromkeys((self._me, *self._others.learners), equal)
        else:
            stakes = policy.electorate.stakes
        stakes = {peer: stake for peer, stake in stakes.items() if peer not in self._shunned}
        self._enter(RoundKey(policy.epoch, 0, after), stakes, now, outputs)

    def _enter(self, key: RoundKey, stakes: dict[PeerId, float], now: float, outputs: list[Output]) -> Round:
        peers, live = [peer for peer in stakes if peer != self._me], self._others.live
        entered = self.round = Round(
            self._me,
            key,
            stakes,
            Limits.of_batch(self._batch, None if self._others.count_alike else sum(stakes.values())),
            self._waits[key.step > 0],
            now,
            heard_at=self._others.heard_at,
            busy=[peer for peer in peers if peer in live and live[peer].phase in BUSY],
            gone=[peer for peer in peers if peer not in live],
            idle=self._idle,
            may_have_voted=self._is_resumed and self._progress.has_made_nothing,
            shunned=self._shunned,
        )
        for event in self._early.of(key):
            self._tell(event, now, outputs)
        if key.step == 0:
            for author, result in list(self._lineage.results.items()):
                self.committed(author, result, now, outputs)
        return entered

    # What others say.

    def heard(self, event: Heard, key: RoundKey, now: float, outputs: list[Output]) -> None:
        """A member's word in a round: in this one, or for later."""
        current, policy = self.round, self._progress.policy
        if self._first is not None and isinstance(event.statement, Offer):
            self._heard_beside(event.author, key, now, outputs)
            current = self.round
        if current is not None and key == current.key:
            self._tell(event, now, outputs)
        elif current is not None and key.epoch == current.key.epoch and key.step == current.key.step + 1:
            self._early.keep(event)
            self.take(Committed(event.author, key.after), now, outputs)
        elif policy is None or key.epoch >= policy.epoch:
            self._early.keep(event)

    def _tell(self, event: Heard, now: float, outputs: list[Output]) -> None:
        match event.statement:
            case Offer() as offer:
                self.take(OfferHeard(SignedOffer(event.author, event.name, offer)), now, outputs)
            case Proposal() as proposal:
                self.take(ProposalHeard(event.author, proposal), now, outputs)
            case Vote() as vote:
                self.take(VoteHeard(event.author, vote), now, outputs)
            case _:
                pass

    def committed(self, author: PeerId, result: Result, now: float, outputs: list[Output]) -> None:
        """Who holds what came of a ballot voted for it, and always will."""
        policy = self._progress.policy
        if policy is not None and result.parent == policy.cid and author not in self._lineage.liars:
            self.take(Committed(author, result.ballot), now, outputs)

    def told(self, author: PeerId, facts: Facts, now: float, outputs: list[Output]) -> None:
        """A member says how it is: whether it will offer anything, and that it is there at all."""
        if facts.phase in BUSY or facts.role is not Role.LEARNER:
            self.take(Busy(author), now, outputs)
        elif author not in self._shunned:
            equal = self.equal_stake
            if equal is not None:
                self.take(Joined(author, equal), now, outputs)

    def gone(self, author: PeerId, now: float, outputs: list[Output]) -> None:
        """A member is not there any more."""
        self._parts.pop(author, None)
        self.take(Left(author), now, outputs)
        if self.direct is not None:
            self.direct.left(author, "is gone")
            self._go_on_directly(now, outputs)

    @property
    def key(self) -> RoundKey | None:
        """Of the exchange that is on."""
        if self.direct is not None:
            return self.direct.key
        return None if self.round is None else self.round.key

    @property
    def decided(self) -> bytes | None:
        """The ballot of which others make a policy: at the first exchange, and later if they do it without this one."""
        if self._first is not None and self._me not in self._weights:
            return self._first
        current = self.round
        return current.decided.name if current is not None and current.decided is not None else None

    @property
    def next_wake(self) -> float:
        """When the round is to be told that time passed."""
        if self.direct is not None:
            return self.direct.next_wake
        return float("inf") if self.round is None or self.round.decided is not None else self.round.next_wake

    def tick(self, now: float, outputs: list[Output], *, is_look: bool) -> None:
        """Time passed; ``is_look``: see who is left behind."""
        current = self.round
        if self.direct is not None:
            self.direct.tick(now)
            self._go_on_directly(now, outputs)
        elif current is not None and now >= current.next_wake:
            self.take(RoundTick(), now, outputs)
        if is_look and current is not None and current is self.round:
            self._leave_behind(current, now, outputs)

    def take(self, event: RoundEvent, now: float, outputs: list[Output]) -> None:
        """Something happens in the round."""
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
                    if current.has_begun and self.is_exchanging and self._jobs.job is None:
                        self._merge(ballot, now, outputs)
        if current is self.round and current.attempt > before:
            self._leave_behind(current, now, outputs)

    def _leave_behind(self, current: Round, now: float, outputs: list[Output]) -> None:
        """Nobody waits for one that is at another epoch, once attempts failed.

        Who says that it is at an earlier one, and nothing here, is left behind by the first. Who went on to a later
        one, without enough others to be followed, votes here no more: what it alone committed to holds up nobody for
        more than `IDLE_ATTEMPTS`.
        """
        if current.attempt == 0 or current.decided is not None:
            return
        for author, facts in list(self._others.live.items()):
            result = self._lineage.results.get(author)
            epoch = facts.epoch if result is None else max(facts.epoch, result.epoch)
            is_behind = epoch < current.key.epoch and not current.takes_part(author)
            is_past = result is not None and result.epoch > current.key.epoch and current.attempt >= IDLE_ATTEMPTS
            if is_behind or is_past:
                self.take(Left(author), now, outputs)

    # What this learner does in it.

    def arrive(
        self, cid: Cid | None, weight: int, job: Job, now: float, outputs: list[Output], *, is_last: bool
    ) -> bool:
        """The update under way wants something averaged.

        Args:
            cid: of what this learner gives; None if nothing.
            weight: of that, in samples.
            job: that came to this.
            now: the time.
            outputs: what is to be done is added there.
            is_last: nothing else will be averaged in this update.

        Returns:
            Whether it goes on: else it was given up.
        """
        policy, current = self._progress.policy, self.round
        if policy is None or current is None:
            self.give_up(outputs)
            return False
        if isinstance(job, Merge):
            direct, self.direct = self.direct, None
            if direct is not None and direct.failure:
                self._settle_anew(direct.failure, now, outputs)
                return False
            step = current.key.step + 1 if direct is None else direct.key.step
            key = RoundKey(policy.epoch, step, job.ballot.name)
            if direct is None and not is_last and self._can_be_direct(policy, current, key):
                direct = self._directly(key)
            if direct is not None and not is_last:
                self.direct = direct
                return self._give(direct, cid, weight, now, outputs)
            current = self._enter(key, self._weights or {self._me: 1.0}, now, outputs)
        return self._offer(current, cid, weight, now, outputs)

    def _offer(self, current: Round, cid: Cid | None, weight: int, now: float, outputs: list[Output]) -> bool:
        """Be there in a round, with what this learner gives."""
        self._exchange(current.key)
        if cid is None or weight <= 0:
            return self._begin(now, outputs)
        seconds = round(min(self.work_s, MAX_SECONDS), 4)
        offer = Offer(key=current.key, cid=cid, weight=weight, seconds=seconds, uplink=min(self.uplink, MAX_UPLINK))
        if self._is_solo:
            return self.own_said(offer, first_after(cid), now, outputs)
        outputs.append(Say(offer))
        return True

    def _exchange(self, key: RoundKey) -> None:
        self.is_exchanging = True
        self._progress.step = key.step
        self._progress.phase = Phase.EXCHANGING

    @property
    def _is_solo(self) -> bool:
        """Whether nobody else takes part in what is left of this epoch's exchanges, so that nobody need hear."""
        current = self.round
        return current is not None and current.key.step > 0 and self._weights.keys() == {self._me}

    def own_said(self, statement: Statement, name: bytes, now: float, outputs: list[Output]) -> bool:
        """What this learner says was signed; whether the update goes on, as with `arrive`."""
        current = self.round
        if isinstance(statement, Offer) and current is not None and statement.key == current.key:
            self.take(OfferHeard(SignedOffer(self._me, name, statement)), now, outputs)
            if self.is_exchanging and self._jobs.job is None:
                return self._begin(now, outputs)
        return True

    def _begin(self, now: float, outputs: list[Output]) -> bool:
        """Be there in the round, with an offer or with nothing to give."""
        current = self.round
        if current is None:
            return True
        decided = current.decided
        if not current.has_begun:
            self.take(Begin(max(self.work_s, self._usual_s)), now, outputs)
        if decided is None:
            return True
        is_in_it = any(each.author == self._me for each in decided.offers)
        if current.key.step == 0 and not is_in_it and not self.waited_for_result(now):
            self.give_up(outputs)  # the others went on; what was collected counts in the next epoch
            return False
        self._merge(decided, now, outputs)
        return True

    def waited_for_result(self, now: float) -> bool:
        """Whether those who decided without this learner had time enough to say what they made, or are all gone."""
        current = self.round
        if current is not None and not any(peer in self._others.live for peer in current.deciders):
            return True
        self._missed_at = now if self._missed_at is None else self._missed_at
        return now - self._missed_at > 2 * self.silence_s

    def _merge(self, ballot: Ballot, now: float, outputs: list[Output]) -> None:
        current = self.round
        if current is not None:
            self._settle_s += current.settling_s
        if current is not None and current.key.step == 0:
            self._weights = {each.author: float(each.offer.weight) for each in ballot.offers}
            self._is_shared = any(each.author != self._me for each in ballot.offers)
            self._first = ballot.name
        self._jobs.start(Merge(ballot), Phase.UPDATING, now, outputs)

    # Directly.

    def given(self, author: PeerId, part: Part, now: float, outputs: list[Output]) -> None:
        """A member gave its part: of the step that is on, of the next one, or of one that this learner comes to."""
        direct, current, policy = self.direct, self.round, self._progress.policy
        if author not in self._others.live or (policy is not None and part.key.epoch < policy.epoch):
            return
        if direct is not None and part.key.epoch == direct.key.epoch:
            direct.take(author, part)
            self._go_on_directly(now, outputs)
            return
        if author in self._parts or len(self._parts) < MAX_DIRECT:
            self._parts[author] = part
        if current is not None and (part.key.epoch, part.key.step) == (current.key.epoch, current.key.step + 1):
            self.take(Committed(author, part.key.after), now, outputs)

    def not_given(self, author: PeerId, key: RoundKey, reason: str, now: float, outputs: list[Output]) -> None:
        """A member does not take this learner's part."""
        direct, policy = self.direct, self._progress.policy
        if direct is None or policy is None or direct.key != key or self._jobs.job is not None:
            return
        if key.step == 1:
            outputs.append(Note(f"{author} takes nothing directly: {reason}", is_warning=False))
            self._settle_by_votes(direct, now, outputs)
        else:
            direct.left(author, f"takes nothing any more: {reason}")
            self._go_on_directly(now, outputs)

    def _can_be_direct(self, policy: Policy, first: Round, key: RoundKey) -> bool:
        """Whether the exchanges that follow from the first may go directly: nothing failed, and nobody minds."""
        others = [peer for peer in self._weights if peer != self._me]
        return (
            key.step == 1
            and first.key.after == first_after(policy.cid)
            and self._trust.holds(policy.epoch)
            and self._me in self._weights
            and 1 <= len(others) < MAX_DIRECT
            and all(peer in self._others.live for peer in others)
            and not any(
                isinstance(event.statement, Offer) and event.author in self._weights for event in self._early.of(key)
            )
        )

    def _directly(self, key: RoundKey) -> Direct:
        direct = Direct(self._me, key, self._weights, self._waits[2])
        for author, part in self._parts.items():
            direct.take(author, part)
        self._parts.clear()
        return direct

    def _give(self, direct: Direct, cid: Cid | None, weight: int, now: float, outputs: list[Output]) -> bool:
        """Give this learner's part of the step that is on; whether the update goes on."""
        self._exchange(direct.key)
        part = direct.give(cid, weight, now)
        outputs.append(Give(part, tuple(peer for peer in direct.members if peer != self._me)))
        self._go_on_directly(now, outputs)
        return self.direct is not None

    def _go_on_directly(self, now: float, outputs: list[Output]) -> None:
        """Merge the step, if all parts of it are there; see whether it failed."""
        direct = self.direct
        if direct is None or not self.is_exchanging or self._jobs.job is not None:
            return
        ballot = direct.ballot(now)
        if ballot is not None:
            self._jobs.start(Merge(ballot), Phase.UPDATING, now, outputs)
        elif direct.failure:
            self._settle_anew(direct.failure, now, outputs)

    def _heard_beside(self, author: PeerId, key: RoundKey, now: float, outputs: list[Output]) -> None:
        """While this learner is past the first exchange, a member offers something."""
        direct, current = self.direct, self.round
        if author not in self._weights:
            return
        if direct is not None and key == direct.key and key.step == 1:
            self._settle_by_votes(direct, now, outputs)
        elif (key.step, key.after) == (0, self._first):
            if direct is not None:
                direct.left(author, "settles this epoch anew")
                self._go_on_directly(now, outputs)
            elif current is not None and current.key.step > 0 and current.decided is None and self._jobs.job is None:
                self._settle_anew(f"{author} settles this epoch anew", now, outputs)

    def _settle_by_votes(self, direct: Direct, now: float, outputs: list[Output]) -> None:
        """Nothing was merged directly yet: go on by rounds."""
        own = direct.own
        self.direct = None
        self._trust.failed(direct.key.epoch)
        current = self._enter(direct.key, self._weights, now, outputs)
        if own is not None:
            self._offer(current, own.cid, own.weight, now, outputs)

    def _settle_anew(self, why: str, now: float, outputs: list[Output]) -> None:
        """The direct exchanges came to nothing: the epoch's first exchange again, and all by votes."""
        policy, first = self._progress.policy, self._first
        outputs.append(Note(f"the update is taken back, and settled anew by votes: {why}"))
        self.give_up(outputs)
        if policy is not None and first is not None:
            self._trust.failed(policy.epoch)
            self.begin(policy, first, now, outputs)

    # The end of it.

    def worker_gone(self, now: float, outputs: list[Output]) -> None:
        """The update that was under way is gone with the worker."""
        self.is_exchanging = False
        if self.direct is not None:
            self._settle_anew("this node lost its worker", now, outputs)

    def give_up(self, outputs: list[Output]) -> None:
        """Give the update up that is under way, and keep the samples."""
        self.is_exchanging = False
        self.direct = self._first = None
        outputs.append(Abandon(keep_samples=True))

    def updated(self) -> None:
        """The update is done."""
        took_s = self.work_s - self.ahead_s + self._settle_s
        self._usual_s = took_s if not self._usual_s else 0.7 * self._usual_s + 0.3 * took_s
        self._progress.rounds += 1
        self._progress.shared_rounds += self._is_shared
        self._failed_merges = 0
        if self._first is not None and self._progress.policy is not None:
            self._trust.succeeded(self._progress.policy.epoch)

    def merge_failed(self, reason: str, now: float, outputs: list[Output]) -> None:
        """All who decided on the same ballot fail alike; they settle on another one."""
        outputs.append(Note(f"what was decided on cannot be averaged: {reason}"))
        policy = self._progress.policy
        after, self.direct, self._first = self._first, None, None
        self.is_exchanging = False
        self._failed_merges += 1
        if self._failed_merges > MAX_FAILED_MERGES:
            self._failed_merges = 0
            self._progress.samples = 0
            outputs.append(Abandon(keep_samples=False))
        if policy is not None and after is not None:
            self._trust.failed(policy.epoch)
            self.begin(policy, after, now, outputs)
