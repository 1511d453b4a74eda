"""Taking over another policy than the own one: which is asked for, which has come, and what an earlier life kept.

`shoal.training.lineage` names candidates. One at a time is fetched, and loaded by the worker when it is here. What an
earlier life of this node kept and is not on its disk any more is looked for at the members: to begin anew would give up
all that was trained.
"""

from __future__ import annotations

from typing import Final

from shoal.dht.fetch import Lack
from shoal.protocol.ids import Cid
from shoal.training.epoch import Epoch
from shoal.training.jobs import Jobs
from shoal.training.lineage import Candidate, Lineage, Refusal
from shoal.training.manifest import Role
from shoal.training.progress import Progress
from shoal.training.run_events import Fetch, Merge, Note, NotFetched, Output, Policy
from shoal.training.statements import Phase, Result

HEAR_OUT_S: Final = 0.05
"""After news of a newer policy, until it is asked for: whoever comes hears of several at once, the oldest first."""
LOOK_S: Final = 1.0
"""How often other lines of the run are looked for."""
COMING_S: Final = 10.0
"""A policy of which some has come is waited for so long, until more comes, before a newer one is asked for."""
_NEVER: Final = float("inf")


class Taking:
    """What one node takes over.

    Attributes:
        taking: the policy that is to be held instead of the own one.
        taken: the same, once it is here.
        stored: the policy that an earlier life of this node kept, as long as it is worth anything.
    """

    __slots__ = (
        "_coming_at",
        "_epoch",
        "_fetching",
        "_jobs",
        "_lineage",
        "_look_at",
        "_looked_at",
        "_overtaken_at",
        "_progress",
        "_role",
        "stored",
        "taken",
        "taking",
    )

    def __init__(
        self,
        role: Role,
        progress: Progress,
        jobs: Jobs,
        lineage: Lineage,
        epoch: Epoch,
        fetching: set[Cid],
        stored: Result | None,
        now: float,
    ) -> None:
        """Start with nothing under way.

        Args:
            role: of this node.
            progress: of this node; with the policy that it holds.
            jobs: the worker's.
            lineage: what each member holds.
            epoch: the exchanges that are on.
            fetching: what was asked for and has not come, for whatever.
            stored: what an earlier life kept.
            now: the time.
        """
        self.taking: Candidate | None = None
        self.taken: Candidate | None = None
        self.stored = stored
        self._role = role
        self._progress = progress
        self._jobs = jobs
        self._lineage = lineage
        self._epoch = epoch
        self._fetching = fetching
        self._look_at = _NEVER
        self._looked_at = now
        self._coming_at = -_NEVER
        self._overtaken_at: float | None = None

    # Which.

    @property
    def next_look(self) -> float:
        """When to look again."""
        return self._looked_at + LOOK_S

    def next_wake(self, now: float) -> float:
        """The same, or when others have had long enough to let this learner make the policy itself."""
        at = min(self.next_look, self._look_at)
        if self._overtaken_at is None:
            return at
        return min(at, max(self._overtaken_at + self._epoch.silence_s, now + 0.01))

    def look_soon(self, now: float) -> None:
        """A newer policy was heard of, and others may be in a moment."""
        self._look_at = min(self._look_at, now + HEAR_OUT_S)

    def look_if_due(self, now: float, outputs: list[Output]) -> None:
        """After `look_soon`."""
        if now >= self._look_at:
            self.look(now, outputs)

    def look_again(self, now: float, outputs: list[Output]) -> None:
        """As it is time to."""
        self.look(now, outputs)
        self._looked_at = now

    def look(self, now: float, outputs: list[Output]) -> None:
        """Whether another policy than the own one is to be held."""
        self._look_at = _NEVER
        if self.taken is not None or self._progress.phase is Phase.DONE:
            return
        if self._role is Role.LEARNER and self._progress.policy is None:
            self._seek_stored(now, outputs)
            return
        candidate, decided = self._lineage.overtaken(now), self._epoch.decided
        if candidate is None and decided is not None:
            candidate = self._lineage.made_of(decided, now)
        if candidate is None:
            self._overtaken_at = None
            candidate = self._lineage.other_line(now) if self.taking is None else None
        elif self._comes_by_itself(candidate, now):
            return
        taking = self.taking
        if candidate is None or (taking is not None and taking.result.epoch >= candidate.result.epoch):
            return
        # What comes is waited for: over a slow link a newer one would come no sooner.
        may_change = now >= self._looked_at + LOOK_S and now >= self._coming_at + COMING_S
        if taking is None or taking.result.cid not in self._fetching or may_change:
            self._take(candidate, outputs)

    def _comes_by_itself(self, candidate: Candidate, now: float) -> bool:
        """Whether this learner is about to make the same policy itself."""
        policy = self._progress.policy
        if policy is None or self._epoch.round is None or candidate.result.parent != policy.cid:
            return False
        if self._overtaken_at is None:
            self._overtaken_at = now
        is_in_it = isinstance(self._jobs.job, Merge) or self._epoch.is_exchanging
        return is_in_it and now < self._overtaken_at + self._epoch.silence_s

    def take_stored(self, stored: Result, outputs: list[Output]) -> None:
        """Go on from what an earlier life kept: it may be on this node's own disk."""
        self._take(Candidate(stored, ()), outputs)

    def _seek_stored(self, now: float, outputs: list[Output]) -> None:
        """What an earlier life kept is gone from the disk: wait for a member who has it, or has come further.

        To begin anew would give up all that was trained, and bring a run to life again that had ended.
        """
        stored = self.stored
        if stored is None or self._jobs.in_worker is None or self.taking is not None:
            return
        candidate = self._lineage.overtaken(now) or self._lineage.other_line(now)
        if candidate is None or candidate.result.epoch == 0:
            if self._lineage.is_refused(stored, now):
                return
            candidate = Candidate(stored, self._lineage.holders(stored.cid))
        self._take(candidate, outputs)

    def _take(self, candidate: Candidate, outputs: list[Output]) -> None:
        self.taking = candidate
        self._coming_at = -_NEVER
        cid = candidate.result.cid
        if cid not in self._fetching:
            self._fetching.add(cid)
            outputs.append(Fetch(cid, candidate.holders, keep=True))

    # What comes of it.

    def coming(self, cid: Cid, now: float) -> None:
        """Some of it has come."""
        if self.taking is not None and self.taking.result.cid == cid:
            self._coming_at = now

    def fetched(self, cid: Cid) -> Result | None:
        """These bytes are here; what is taken, if they are that."""
        taking = self.taking
        if taking is None or taking.result.cid != cid:
            return None
        self.taken = taking
        return taking.result

    def not_fetched(self, event: NotFetched, outputs: list[Output]) -> tuple[Candidate, Refusal] | None:
        """These bytes were not had; what is to be refused for it, and how."""
        taking, stored = self.taking, self.stored
        if taking is None or taking.result.cid != event.cid:
            return None
        is_unfit = event.lack is Lack.UNFIT
        text = "cannot be a state of this run" if is_unfit else "cannot be had now"
        text = f"epoch {taking.result.epoch} {text}: {event.reason}"
        is_own = self._progress.policy is None and stored is not None and taking.result.cid == stored.cid
        is_first = is_own and not is_unfit and self._progress.phase is not Phase.FETCHING
        if is_first:
            self._progress.phase = Phase.FETCHING
            text += "; it was trained here and is not on this disk any more, so a member who has it is waited for"
        outputs.append(Note(text, is_warning=is_unfit or is_first))
        return taking, Refusal.UNFIT if is_unfit else Refusal.UNREACHABLE

    def refuse(self, candidate: Candidate, why: Refusal, now: float) -> None:
        """It cannot be held."""
        self.taking = self.taken = None
        self._lineage.refuse(candidate.result, why, now)
        stored = self.stored
        if stored is not None and candidate.result.cid == stored.cid and why is not Refusal.UNREACHABLE:
            self.stored = None  # what an earlier life kept is worth nothing

    def loaded(self, taken: Candidate, policy: Policy, outputs: list[Output]) -> None:
        """The worker holds what was ``taken``, and it is what was said; if it is of another line, what it cost."""
        before = self._progress.policy
        self.taking = self.taken = None
        if before is not None and before.epoch > 0 and before.cid != policy.parent and taken.is_other_line:
            lost = max(0, before.env_steps - self._lineage.together_until(taken.holders))
            self._progress.lost_env_steps += lost
            text = f"taking the policy of another part of the swarm, of epoch {policy.epoch}"
            outputs.append(Note(f"{text}; {lost} environment steps of this part are given up for it"))

    def holding(self, policy: Policy) -> None:
        """This node holds a policy now: what is older is not taken any more."""
        self._overtaken_at = None
        for waiting in (self.taking, self.taken):
            if waiting is not None and waiting.result.epoch <= policy.epoch:
                self.taking = self.taken = None
