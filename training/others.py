"""The other members of a run that are there: what they say of themselves, and whether there are any."""

from __future__ import annotations

from typing import Final

from shoal.protocol.ids import PeerId
from shoal.training.manifest import Role
from shoal.training.progress import Progress
from shoal.training.run_events import Note, Output
from shoal.training.statements import Facts, Phase

ALONE_S: Final = 2.0
_NOT_LEARNING: Final = (Phase.DONE, Phase.FAILED, Phase.STARTING)


class Others:
    """As one node hears of them.

    Attributes:
        live: the facts of each.
        heard_at: when each said anything last.
        num_learners: of them.
    """

    __slots__ = ("_alone_at", "_me", "_progress", "heard_at", "live", "num_learners")

    def __init__(self, me: PeerId, progress: Progress, now: float) -> None:
        """Start with nobody; ``progress`` shows whether this node, ``me``, is alone."""
        self.live: dict[PeerId, Facts] = {}
        self.heard_at: dict[PeerId, float] = {}
        self.num_learners = 0
        self._me = me
        self._progress = progress
        self._alone_at: float | None = now

    @property
    def learners(self) -> list[PeerId]:
        """Those that still learn."""
        return [peer for peer, facts in self.live.items() if _learns(facts)]

    @property
    def have_ended(self) -> bool:
        """Whether some learned, and none does any more."""
        return not self.num_learners and any(
            facts.role is Role.LEARNER and facts.phase is Phase.DONE for facts in self.live.values()
        )

    @property
    def count_alike(self) -> bool:
        """Whether nobody has shown anything yet, or nobody who has is left: then all who learn count alike."""
        policy = self._progress.policy
        return policy is not None and not any(peer == self._me or peer in self.live for peer in policy.electorate)

    def told(self, author: PeerId, facts: Facts) -> None:
        """One says how it is; it is there."""
        before = self.live.get(author)
        self.live[author] = facts
        self.num_learners += _learns(facts) - (before is not None and _learns(before))
        self._alone_at, self._progress.is_alone = None, False

    def gone(self, author: PeerId, now: float) -> None:
        """One is not there any more."""
        facts = self.live.pop(author, None)
        self.num_learners -= facts is not None and _learns(facts)
        self.heard_at.pop(author, None)
        if not self.live and self._alone_at is None:
            self._alone_at = now

    @property
    def next_wake(self) -> float:
        """When this node turns out to be alone, if nobody comes."""
        return float("inf") if self._alone_at is None or self._progress.is_alone else self._alone_at + ALONE_S

    def tick(self, now: float, outputs: list[Output]) -> None:
        """Time passed: being alone is said, once."""
        if now >= self.next_wake:
            self._progress.is_alone = True
            outputs.append(Note("ALONE: no other member can be heard; what is trained now, is trained alone"))


def _learns(facts: Facts) -> bool:
    return facts.role is Role.LEARNER and facts.phase not in _NOT_LEARNING
