"""When one learner collects, and when it updates: nobody waits for a slow member, and nobody is hurried by a claim.

Pure functions of what rounds have shown (`electorate`), of the round that is on, and of what the others say they do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shoal.protocol.ids import PeerId
from shoal.training.electorate import Electorate
from shoal.training.exchange.rounds import Round
from shoal.training.manifest import Manifest, Mode
from shoal.training.statements import Facts, Phase

FOLLOW_PART: Final = 1 / 10
"""In mode ``gradient``, a learner below this part of the median rate would cost the others more than it brings."""
HURRY_PART: Final = 1 / 2


@dataclass(frozen=True, slots=True)
class Pace:
    """What pacing follows from.

    Attributes:
        me: this learner.
        manifest: of the run.
        electorate: of the policy that is held.
        epoch: of that policy.
        live: the facts of the other members that are there.
        equal_stake: an equal share, where nobody has shown anything or nobody who has is left; None where somebody has.
        speed: environment steps per second while collecting; 0 if that is not known.
        collect_s: spent on collecting in this epoch.
    """

    me: PeerId
    manifest: Manifest
    electorate: Electorate
    epoch: int
    live: Mapping[PeerId, Facts]
    equal_stake: float | None
    speed: float
    collect_s: float


def share(pace: Pace) -> int:
    """How many samples this learner collects before it updates."""
    if pace.equal_stake is not None:
        return math.ceil(pace.equal_stake)
    return pace.electorate.share(pace.me, pace.manifest.batch, pace.speed)


def is_follower(pace: Pace) -> bool:
    """Whether this learner would slow the others down more than it helps them; only in mode ``gradient``."""
    others = [standing.rate for peer, standing in pace.electorate.items() if peer != pace.me]
    if pace.manifest.mode is not Mode.GRADIENT or not others or not pace.speed:
        return False
    return pace.speed < FOLLOW_PART * statistics.median(others)


def others_are_ready(pace: Pace, current: Round, samples: int) -> bool:
    """Whether those with most of the stake go on now, so that what is here has to do.

    A fast learner is not hurried by slow ones: they bring less than it would leave out.
    """
    electorate, own = pace.electorate, pace.electorate.get(pace.me)
    least = HURRY_PART * own.stake if own is not None else 0.0
    others = [peer for peer in electorate if peer != pace.me and peer in pace.live]
    total = sum(electorate[peer].stake for peer in others)
    if not total:
        return False
    most = max(HURRY_PART * total, least)
    offered = [peer for peer in others if peer in current.offers]
    if sum(electorate[peer].stake for peer in offered) > most:
        return True
    usual_s = own.stake / own.rate if own is not None else 0.0
    if samples < share(pace) / 2 and pace.collect_s < usual_s:
        return False
    ready = [peer for peer in others if _is_updating(pace.live[peer], pace.epoch) or peer in current.offers]
    return sum(electorate[peer].stake for peer in ready) > most


def _is_updating(facts: Facts, epoch: int) -> bool:
    return facts.epoch == epoch and facts.phase in (Phase.UPDATING, Phase.EXCHANGING)
