"""What members sign of their probes, as one number for each probe and epoch: the median over the members.

A score is its author's word. Each author has one of a probe and an epoch, and counts once; of those in order, the one
in the middle is taken, of an even number the lower of the two. So fewer than half of those who said something move it
nowhere but to what an honest one said, or something between two such. Two members cannot tell which of them lies: then
a liar may make the number lower, and not higher.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.crdt.views import MAX_SCORE_CHARS, Evaluation
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

MAX_PROBES: Final = 16
"""That are asked for at once."""
MAX_EPOCHS: Final = 64
"""The newest, beyond which nothing is told."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What members found.

    Attributes:
        probe: by which.
        epoch: of the policies.
        score: their median; finite.
        members: how many said something.
    """

    probe: str
    epoch: int
    score: float
    members: int


def check_probes(probes: Collection[str]) -> None:
    """Check what is asked for.

    Raises:
        UsageError: if these are too many, or no names.
    """
    if not 1 <= len(probes) <= MAX_PROBES or not all(1 <= len(each) <= MAX_SCORE_CHARS for each in probes):
        raise UsageError(f"name 1 to {MAX_PROBES} probes, each by 1 to {MAX_SCORE_CHARS} characters")


def medians(
    evaluations: Sequence[Evaluation], probes: Collection[str], since: int, until: int, counted: Collection[PeerId]
) -> tuple[Scored, ...]:
    """By probe and epoch, ascending.

    Args:
        evaluations: that members signed, by epoch.
        probes: that are asked for.
        since: the first epoch; of more than `MAX_EPOCHS` the newest are told.
        until: the last.
        counted: whose word counts.
    """
    since = max(since, until - MAX_EPOCHS + 1)
    said: defaultdict[tuple[str, int], dict[PeerId, float]] = defaultdict(dict)
    for each in reversed(evaluations):
        if each.epoch < since:
            break
        if each.epoch > until or each.author not in counted:
            continue
        for name, score in each.scores:
            if name in probes and math.isfinite(score):
                said[name, each.epoch][each.author] = score
    return tuple(
        Scored(name, epoch, statistics.median_low(found.values()), len(found))
        for (name, epoch), found in sorted(said.items())
    )
