"""How much goes into an epoch, and how much of it each learner collects.

Joining is to help: by default an epoch lasts as long as its fastest learner needs for `Batch.per_learner` samples, and
the others bring what they manage meanwhile. So N equal learners bring N times the samples, with as many optimiser steps
as one. A run may bound what all bring together instead, so that its epochs stay as large as they were however many
learn; then joining makes them shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SHARE_MARGIN: Final = 1.05
"""Of a batch that is bounded for all together, so that it comes to be full."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of an epoch.

    Attributes:
        per_learner: environment steps that the fastest learner collects.
        together: at most so many by all together; no such bound, if None.
    """

    per_learner: int
    together: int | None = None

    @property
    def largest_share(self) -> int:
        """What one learner collects at most."""
        return self.per_learner if self.together is None else min(self.per_learner, self.together)

    def equal_share(self, num_learners: int) -> float:
        """What each of so many collects if they are alike."""
        return self.per_learner if self.together is None else min(self.per_learner, self.together / num_learners)

    def fair_share(self, rate: float, fastest: float, total: float) -> float:
        """What a learner collects so that all are ready together.

        Args:
            rate: its samples per second, positive.
            fastest: that of whoever sets the pace.
            total: those of all together.
        """
        fair = self.per_learner * min(1.0, rate / fastest)
        return fair if self.together is None else min(fair, SHARE_MARGIN * self.together * rate / total)
