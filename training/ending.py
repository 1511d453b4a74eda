"""Evaluating, looking into claims that the task is solved, and the end of a run.

Which claims there are, and which of them are true, is `shoal.training.claims`'. Here is what the worker has to do for
it: evaluate the own policy, when it is this node's turn; load the policy that a claim names, and evaluate that; at the
end, load the final policy and write the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from shoal.crdt.views import Evaluation
from shoal.protocol.ids import Cid, PeerId
from shoal.training.claims import Claims, possible
from shoal.training.jobs import Jobs
from shoal.training.lineage import Lineage
from shoal.training.manifest import Evaluators, Manifest, Role
from shoal.training.others import Others
from shoal.training.progress import Progress
from shoal.training.run_events import Evaluate, Fetch, Finish, Load, Note, Output, Policy, WriteEvaluation
from shoal.training.statements import NO_BALLOT, Phase, Result, RoundKey, first_after, turn_rank

RETRY_END_S: Final = 5.0


class Ending:
    """Of one node's run."""

    __slots__ = (
        "_checking",
        "_claim_here",
        "_claims",
        "_evaluated",
        "_fetching",
        "_jobs",
        "_lineage",
        "_manifest",
        "_me",
        "_must_evaluate",
        "_others",
        "_progress",
        "_retry_end_at",
        "_seen_at",
    )

    def __init__(
        self,
        manifest: Manifest,
        me: PeerId,
        progress: Progress,
        jobs: Jobs,
        others: Others,
        lineage: Lineage,
        claims: Claims,
        fetching: set[Cid],
        now: float,
    ) -> None:
        """Start with nothing to look into.

        Args:
            manifest: of the run.
            me: this node.
            progress: of this node; with the policy that it holds.
            jobs: the worker's, which evaluates.
            others: who are there.
            lineage: what each of them holds.
            claims: that the task is solved.
            fetching: what was asked for and has not come, for whatever.
            now: the time.
        """
        self._manifest = manifest
        self._me = me
        self._progress = progress
        self._jobs = jobs
        self._others = others
        self._lineage = lineage
        self._claims = claims
        self._fetching = fetching
        self._evaluated: frozenset[Cid] = frozenset()
        self._must_evaluate = False
        self._checking: Evaluation | None = None
        self._claim_here: Cid | None = None
        self._retry_end_at = now
        self._seen_at = 0

    # Evaluating the own policy.

    def documents(self, evaluations: Iterable[Evaluation]) -> None:
        """Members have written evaluations: all that can matter."""
        found = possible(evaluations)
        self._claims.heard(found)
        self._evaluated = frozenset(each.cid for each in found)

    def made(self, policy: Policy) -> None:
        """This node made a policy, with whoever else did: one of them evaluates it, if it is time to."""
        if self._manifest.is_loop:  # which does that itself, on what it likes
            return
        is_due = policy.epoch % self._manifest.eval_interval == 0
        if self._by_all:
            self._must_evaluate = is_due or policy.epoch == 1
        else:
            self._must_evaluate = is_due and self._evaluator(policy) == self._me

    def holds(self, policy: Policy) -> None:
        """This node, which only evaluates, holds a policy of others: it evaluates it, if the last one is long ago."""
        self._must_evaluate = policy.epoch >= self._seen_at + self._manifest.eval_interval
        if self._must_evaluate:
            self._seen_at = policy.epoch

    @property
    def _by_all(self) -> bool:
        return self._manifest.evaluators is Evaluators.ALL

    def _evaluator(self, policy: Policy) -> PeerId:
        ready = [peer for peer, facts in self._others.live.items() if facts.role is Role.EVALUATOR]
        there = (
            ready or [peer for peer in policy.electorate if peer == self._me or peer in self._others.live] or [self._me]
        )
        key = RoundKey(policy.epoch, 0, first_after(policy.cid))
        return min(there, key=lambda peer: turn_rank("evaluate", key, 0, peer))

    def is_to_evaluate(self, policy: Policy) -> bool:
        """Whether this node is to evaluate the policy that it holds, and nobody has whose word would do."""
        return self._must_evaluate and (self._by_all or policy.cid not in self._evaluated)

    def evaluated(self, mean_return: float, scores: Mapping[str, float], outputs: list[Output]) -> None:
        """The worker has evaluated what it holds."""
        policy, claim = self._jobs.in_worker, self._checking
        if policy is None:
            return
        self._claims.measured(policy.cid, mean_return)
        if claim is None or claim.cid != policy.cid:
            self._must_evaluate = False
            outputs.append(WriteEvaluation(policy, mean_return, scores))
            return
        self._checking = None
        if not self._claims.checked(claim):
            text = f"{claim.author} claims a return of {claim.mean_return:.1f}, but it is {mean_return:.1f} here"
            outputs.append(Note(f"{text}; it is not believed any more"))

    def is_busy(self, now: float, outputs: list[Output]) -> bool:
        """Whether the run has ended, or a claim is looked into; the worker is given what there is to do for it.

        A run that has ended looks into claims too: all are to end with the first policy that solved the task.
        """
        return self._end(now, outputs) or self._check_claims(now, outputs)

    # Looking into claims.

    def _check_claims(self, now: float, outputs: list[Output]) -> bool:
        """Look into the next claim that the task is solved; whether the worker is busy with it now."""
        claim, phase = self._checking, Phase.EVALUATING if self._progress.phase is not Phase.DONE else Phase.DONE
        if claim is None:
            claim = self._checking = self._claims.to_check(now)
            if claim is None:
                return False
        in_worker = self._jobs.in_worker
        if in_worker is not None and claim.cid == in_worker.cid:
            self._jobs.start(Evaluate(), phase, now, outputs)
        elif claim.cid in self._fetching:
            return False
        elif claim.cid == self._claim_here:
            self._jobs.start(Load(_claimed(claim), keep_samples=False), phase, now, outputs)
        else:
            self._fetching.add(claim.cid)
            outputs.append(Fetch(claim.cid, (claim.author, *self._lineage.holders(claim.cid)), keep=True))
            return False
        return True

    def fetched(self, cid: Cid) -> None:
        """These bytes are here."""
        if self._checking is not None and self._checking.cid == cid:
            self._claim_here = cid

    def not_fetched(self, cid: Cid, now: float) -> None:
        """These bytes were not had."""
        claim = self._checking
        if claim is not None and claim.cid == cid:
            self._claims.unreachable(claim, now)
            self._checking = None

    def loaded(self, policy: Policy) -> bool:
        """Whether the worker holds this for a claim."""
        claim = self._checking
        if claim is None or policy.cid != claim.cid:
            return False
        if policy.epoch != claim.epoch:
            self._claims.is_false(claim)
            self._checking = None
        return True

    def load_refused(self, result: Result, now: float) -> bool:
        """Whether it was for a claim that the worker could not load this."""
        claim = self._checking
        if claim is None or result.cid != claim.cid:
            return False
        self._claims.unreachable(claim, now)
        self._checking = None
        self._retry_end_at = now + RETRY_END_S
        return True

    def worker_gone(self) -> Evaluation | None:
        """Whatever claim is looked into, it is to be done again; which one that was."""
        claim, self._checking = self._checking, None
        return claim

    # The end.

    def _end(self, now: float, outputs: list[Output]) -> bool:
        """Whether the run has ended, or ends now."""
        progress, policy, in_worker = self._progress, self._progress.policy, self._jobs.in_worker
        final = self._claims.solved()
        if policy is None or in_worker is None or now < self._retry_end_at:
            return progress.phase is Phase.DONE
        if progress.phase is Phase.DONE and (final is None or progress.final == final):
            self._check_claims(now, outputs)  # that another solved it earlier was perhaps heard too late
            return True
        if final is None and policy.env_steps < self._manifest.max_env_steps:
            return False
        if final is not None and in_worker.cid != final.cid:
            self._checking = final
            self._jobs.start(Load(_claimed(final), keep_samples=False), Phase.FETCHING, now, outputs)
            return True
        self._checking = None
        if final is not None and policy.cid != final.cid:
            progress.policy = in_worker
        progress.final, progress.solved = final, final is not None
        self._jobs.start(Finish(final), Phase.EVALUATING, now, outputs)
        return True


def _claimed(claim: Evaluation) -> Result:
    return Result(epoch=claim.epoch, cid=claim.cid, parent=None, ballot=NO_BALLOT, env_steps=claim.env_steps)
