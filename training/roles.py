"""What a node does in a run whose person left that to it (``--role auto``): a core.

At first what the machine can: learn, act, or store. In mode rollouts it then follows what is measured while the run
goes on, of what members say in presence and of what rounds have shown (`electorate`):

* a learner is missing → those that stand by learn, the fastest first. Who does not come is not waited for: the next
  one's turn is a little later, so that who claims to be fast and does nothing holds nobody up;
* an actor that waits most of the time, since it outruns the learners, learns, too;
* a learner that is far slower than the others, or whose link takes longer for a policy than an update takes, acts;
* among many learners, the slowest evaluates, so that no other has to.

A claim moves nobody away from learning: how fast learners are is what rounds have shown. A change costs a new worker,
some seconds, and what was collected for an update that was not made; so none follows another soon, unless learners are
missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shoal.protocol.ids import PeerId
from shoal.training.electorate import Electorate
from shoal.training.manifest import Mode, Role
from shoal.training.statements import NO_BALLOT, Facts, Phase, RoundKey, Wait, turn_rank

LACK_S: Final = 1.0
"""Learners are missing for so long before anybody steps in: who starts anew is there again sooner."""
TURN_S: Final = 2.0
"""From one who may step in to the next."""
STAY_S: Final = 30.0
"""In a role, before it is given up for anything but missing learners."""
WAITED_PART: Final = 0.6
"""Of an actor's time, from which on it is better used by learning."""
WAITED_S: Final = 15.0
"""How far back that is looked at: the time constant of its mean."""
SLOW_PART: Final = 1 / 8
"""Of the median rate of the other learners: below it a learner's samples are worth more than its updates."""
EVALUATOR_FROM: Final = 5
"""Learners; among fewer, evaluating in turns costs less than one learner."""
LEAST_LEARNING_BYTES: Final = 1024 * 1024 * 1024
"""A node and a worker with PyTorch."""
LEAST_ACTING_BYTES: Final = 250 * 1024 * 1024
"""A node and a worker without."""
_OUT: Final = (Phase.DONE, Phase.FAILED)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a node is on.

    Attributes:
        has_training: whether the packages are installed that learning needs.
        has_acting: whether those are that acting needs.
        memory_bytes: that it may use.
    """

    has_training: bool
    has_acting: bool
    memory_bytes: int

    @property
    def can_learn(self) -> bool:
        """Whether it can learn."""
        return self.has_training and self.memory_bytes >= LEAST_LEARNING_BYTES

    @property
    def can_act(self) -> bool:
        """Whether it can act."""
        return self.has_acting and self.memory_bytes >= LEAST_ACTING_BYTES


def first_role(machine: Machine, mode: Mode) -> Role:
    """What to begin with, before anything is known of the others."""
    if machine.can_learn:
        return Role.LEARNER
    return Role.ACTOR if mode is Mode.ROLLOUTS and machine.can_act else Role.STORAGE


@dataclass(frozen=True, slots=True)
class View:
    """What a choice follows from.

    Attributes:
        live: the facts of the other members that are there.
        electorate: of the policy that is held.
        facts: of this node.
        epoch: of the policy that is held.
        min_learners: of the manifest.
        uplink: bytes per second that this node can send; 0 if that is not known.
        state_bytes: of a policy; 0 if that is not known.
    """

    live: Mapping[PeerId, Facts]
    electorate: Electorate
    facts: Facts
    epoch: int
    min_learners: int
    uplink: float = 0.0
    state_bytes: int = 0


class Choosing:
    """Of one node that can learn and act, in one run of mode rollouts, as long as it is in one role."""

    __slots__ = ("_epoch", "_epoch_at", "_epoch_s", "_lacks_since", "_looked_at", "_me", "_role", "_since", "_waited")

    def __init__(self, me: PeerId, role: Role, now: float) -> None:
        """Take a role up."""
        self._me = me
        self._role = role
        self._since = self._looked_at = self._epoch_at = now
        self._epoch = -1
        self._epoch_s = 0.0
        self._lacks_since: float | None = None
        self._waited = 0.0

    def look(self, view: View, now: float) -> tuple[Role, str] | None:
        """The role to change to now, and why; None: stay."""
        self._measure(view, now)
        learners = [peer for peer, each in view.live.items() if each.role is Role.LEARNER and each.phase not in _OUT]
        if self._role is not Role.LEARNER:
            if self._is_missed(view, len(learners), now):
                return Role.LEARNER, "there are too few learners"
            if now >= self._since + STAY_S:
                return self._to_learning(view, len(learners))
            return None
        is_between = view.facts.phase in (Phase.COLLECTING, Phase.WAITING)
        if now < self._since + STAY_S or not is_between or len(learners) < max(1, view.min_learners):
            return None
        return self._from_learning(view, learners)

    def _measure(self, view: View, now: float) -> None:
        is_waiting = view.facts.phase is Phase.WAITING and view.facts.wait is Wait.OUTRUN
        kept = math.exp((self._looked_at - now) / WAITED_S)
        self._waited = kept * self._waited + (1 - kept) * is_waiting
        self._looked_at = now
        if view.epoch != self._epoch:
            if self._epoch >= 0:
                took = now - self._epoch_at
                self._epoch_s = took if not self._epoch_s else 0.8 * self._epoch_s + 0.2 * took
            self._epoch, self._epoch_at = view.epoch, now

    def _is_missed(self, view: View, num_learners: int, now: float) -> bool:
        missing = max(1, view.min_learners) - num_learners
        if missing <= 0:
            self._lacks_since = None
            return False
        if self._lacks_since is None:
            self._lacks_since = now
        stand_by = {peer: each for peer, each in view.live.items() if each.stands_by and each.phase not in _OUT}
        speeds = {peer: each.speed for peer, each in stand_by.items() if each.role is not Role.LEARNER}
        speeds[self._me] = view.facts.speed
        key = RoundKey(view.epoch, 0, NO_BALLOT)
        turns = sorted(speeds, key=lambda peer: (-speeds[peer], turn_rank("learn", key, 0, peer)))
        late = max(0, turns.index(self._me) - missing + 1)
        return now >= self._lacks_since + LACK_S + late * TURN_S

    def _to_learning(self, view: View, num_learners: int) -> tuple[Role, str] | None:
        if self._role is Role.ACTOR and self._waited > WAITED_PART:
            return Role.LEARNER, "it outran the learners and waited most of the time"
        if self._role is Role.EVALUATOR:
            before = [peer for peer, each in view.live.items() if each.role is Role.EVALUATOR and peer < self._me]
            if before or num_learners < EVALUATOR_FROM - 1:
                return Role.LEARNER, "another evaluates" if before else "there are few learners"
        return None

    def _from_learning(self, view: View, learners: list[PeerId]) -> tuple[Role, str] | None:
        own, shown = view.electorate.get(self._me), view.electorate
        rates = {peer: shown[peer].rate for peer in learners if peer in shown}
        if own is not None and rates and own.rate < SLOW_PART * statistics.median(rates.values()):
            return Role.ACTOR, "it is far slower than the other learners"
        if view.uplink and self._epoch_s and view.state_bytes / view.uplink > self._epoch_s:
            return Role.ACTOR, "its link takes longer for a policy than the others take to make one"
        if len(learners) + 1 < EVALUATOR_FROM or any(each.role is Role.EVALUATOR for each in view.live.values()):
            return None
        stand_by = {peer: rate for peer, rate in rates.items() if view.live[peer].stands_by}
        if own is not None and all((own.rate, self._me) < (rate, peer) for peer, rate in stand_by.items()):
            return Role.EVALUATOR, "there are many learners, and it is the slowest"
        return None
