"""What the worker holds and does, as a run sees it: one job at a time, and which jobs may be what ends it."""

from __future__ import annotations

from typing import Final

from shoal.protocol.ids import Cid
from shoal.training.progress import Progress
from shoal.training.run_events import Job, Load, Merge, Output, Policy
from shoal.training.statements import Phase

MAX_ENDED: Final = 2
"""Workers that one ballot, or the own policy, may end; another's state may end one, and is not loaded again."""


class Jobs:
    """Of one worker after the other.

    Attributes:
        is_open: whether there is a worker.
        job: what it does.
        in_worker: the policy that it holds.
    """

    __slots__ = ("_ended_by", "_num_ended", "_progress", "_since", "in_worker", "is_open", "job")

    def __init__(self, progress: Progress, now: float) -> None:
        """Start without a worker; ``progress`` shows the phase that each job is."""
        self.is_open = False
        self.job: Job | None = None
        self.in_worker: Policy | None = None
        self._progress = progress
        self._since = now
        self._ended_by: Cid | bytes | None = None  # what ended the worker, and how often in a row
        self._num_ended = 0

    def opened(self, policy: Policy | None) -> None:
        """There is a worker; None: it holds no policy."""
        self.is_open = True
        self.job, self.in_worker = None, policy

    def start(self, job: Job, phase: Phase, now: float, outputs: list[Output]) -> None:
        """Give it a job; it must have none."""
        if self.job is not None:
            raise RuntimeError(f"the worker is to do {job} while it does {self.job}; this is an error in this module")
        self.job, self._since = job, now
        self._progress.phase = phase
        outputs.append(job)

    def done(self, now: float) -> tuple[Job | None, float]:
        """The job that is done, None if it was of a worker that is gone; and the seconds that it took."""
        job, self.job = self.job, None
        return job, now - self._since

    def gone(self) -> Job | None:
        """The worker is gone; what it did."""
        job = self.job
        self.is_open = False
        self.job = self.in_worker = None
        self._progress.phase = Phase.STARTING
        self._progress.samples = 0
        return job

    def is_to_blame(self, job: Load | Merge, *, is_own: bool) -> bool:
        """Whether what ended a worker would end every one; ``is_own``: it is a ballot, or what this node made."""
        name = job.result.cid if isinstance(job, Load) else job.ballot.name
        self._num_ended = self._num_ended + 1 if name == self._ended_by else 1
        self._ended_by = name
        if is_own and self._num_ended < MAX_ENDED:
            return False
        self._num_ended = 0
        return True
