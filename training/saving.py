"""When a policy is written down: to disk, to start from it again, and into the node's document, for others to read."""

from __future__ import annotations

from typing import Final

from shoal.training.progress import Progress
from shoal.training.run_events import Keep, Output, Policy, Write

WRITE_GAP_S: Final = 10.0
"""Between two writes of the policy into the document; what is newer, members tell each other."""
KEEP_GAP_S: Final = 1.0
"""Between two writes of the policy to disk."""
SPARED_PART: Final = 0.1
"""Of the time, that writing policies to disk takes."""
SPARED_S: Final = 5.0
"""Longer than this, a write of less than two seconds puts off no other: it may have waited for a processor itself."""
MOST_PART: Final = 0.25
"""Of the time, that longer ones take."""


class Saving:
    """What was written down, and when."""

    __slots__ = ("_kept", "_kept_at", "_progress", "_written", "_written_at")

    def __init__(self, progress: Progress) -> None:
        """Start with nothing; ``progress`` is what goes into the document beside the policy."""
        self._progress = progress
        self._kept: Policy | None = None
        self._kept_at = -float("inf")
        self._written: Policy | None = None
        self._written_at = -float("inf")

    def keep(self, policy: Policy, now: float, outputs: list[Output]) -> None:
        """To disk, if the last time is a while ago."""
        if now >= self._kept_at + KEEP_GAP_S and self._kept is not policy:
            self._kept, self._kept_at = policy, now
            outputs.append(Keep(policy))

    def write(self, policy: Policy, now: float, outputs: list[Output], *, at_once: bool = False) -> None:
        """Into the document and to disk, if the last time is a while ago or it must be ``at_once``."""
        if not at_once and (self._written is policy or now < self._written_at + WRITE_GAP_S):
            return
        if self._kept is not policy:
            self._kept, self._kept_at = policy, now
            outputs.append(Keep(policy))
        self._written, self._written_at = policy, now
        outputs.append(Write(policy, self._progress.own_env_steps, self._progress.rounds))


class Sparing:
    """When the next policy may be written to disk, by how long the one before took.

    Attributes:
        next_at: not sooner.
    """

    __slots__ = ("next_at",)

    def __init__(self) -> None:
        """At once."""
        self.next_at = -float("inf")

    def wrote(self, began: float, now: float) -> None:
        """One was written, from then to now."""
        took_s = now - began
        rest_s = took_s * (1 / SPARED_PART - 1)
        self.next_at = now + min(rest_s, max(SPARED_S, took_s * (1 / MOST_PART - 1)))
