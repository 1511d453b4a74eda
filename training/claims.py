"""Claims that a policy solved the task, and which of them to check.

A claim ends a run only when this node has evaluated that very policy itself. One claim is checked at a time, in the
order of epochs; of each author one is open at a time. A claim for an epoch whose policy this node held names that
policy, or is of another line of the run and means nothing here. An author whose claim was checked and found false is
not listened to any more; what it said of a policy does not touch what others say of the same one. A claim whose policy
nobody gives is asked for again later, with back-off, while the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shoal.crdt.views import Evaluation
from shoal.protocol.ids import Cid, PeerId
from shoal.training.statements import MAX_EPOCH, MAX_STEPS

TOLERANCE: Final = 0.1
"""Of the target: machines differ a little, lies a lot."""
RETRY_S: Final = 5.0
MAX_RETRY_S: Final = 600.0
MAX_HISTORY: Final = 8192
MAX_OPEN: Final = 16
"""Claims looked at of one author."""


@dataclass(slots=True)
class _Wait:
    until: float
    num_times: int


class Claims:
    """Claims of one run, as one node sees them."""

    __slots__ = ("_by_author", "_history", "_me", "_measured", "_target", "_waits", "liars")

    def __init__(self, me: PeerId, target_return: float | None, liars: Iterable[PeerId] = ()) -> None:
        """Start; ``liars`` were found out in an earlier life of this node."""
        self.liars = set(liars)
        self._me = me
        self._target = target_return
        self._by_author: dict[PeerId, dict[Cid, Evaluation]] = {}
        self._history: dict[int, Cid] = {}
        self._measured: dict[Cid, float] = {}
        self._waits: dict[PeerId, _Wait] = {}

    def held(self, epoch: int, cid: Cid) -> None:
        """This node held a policy."""
        self._history[epoch] = cid
        while len(self._history) > MAX_HISTORY:
            del self._history[next(iter(self._history))]

    def measured(self, cid: Cid, mean_return: float) -> None:
        """This node evaluated a policy."""
        self._measured[cid] = mean_return
        while len(self._measured) > MAX_HISTORY:
            del self._measured[next(iter(self._measured))]

    def heard(self, evaluations: Iterable[Evaluation]) -> None:
        """Evaluations that members signed, all that there are."""
        found: dict[PeerId, dict[Cid, Evaluation]] = {}
        if self._target is not None:
            for each in evaluations:
                if each.mean_return >= self._target and each.author not in self.liars:
                    of_author = found.setdefault(each.author, {})
                    if len(of_author) < MAX_OPEN:
                        of_author[each.cid] = each
        self._by_author = found

    def solved(self) -> Evaluation | None:
        """The claim of the lowest epoch that this node knows to be true."""
        true = [each for each in self._all() if self._is_true(each)]
        return min(true, key=_order, default=None)

    def to_check(self, now: float) -> Evaluation | None:
        """The next claim to evaluate, if it could end the run earlier than what is known to be true."""
        known = self.solved()
        found: list[Evaluation] = []
        for author, claims in self._by_author.items():
            wait = self._waits.get(author)
            if author in self.liars or (wait is not None and now < wait.until):
                continue
            open_ones = [each for each in claims.values() if each.cid not in self._measured and self._can_be(each)]
            found += sorted(open_ones, key=_order)[:1]
        first = min(found, key=_order, default=None)
        return first if first is not None and (known is None or _order(first) < _order(known)) else None

    def checked(self, claim: Evaluation) -> bool:
        """Whether a claim is true, once its policy was `measured` here; if not, its author is not heard any more."""
        if self._is_true(claim):
            return True
        self.is_false(claim)
        return False

    def is_false(self, claim: Evaluation) -> None:
        """What it names is not what it says."""
        self.liars.add(claim.author)
        self._by_author.pop(claim.author, None)

    def unfit(self, claim: Evaluation) -> None:
        """Its policy ended a worker here: whether it is true cannot be known, and it is not tried again."""
        self.measured(claim.cid, float("-inf"))

    def unreachable(self, claim: Evaluation, now: float) -> None:
        """Nobody gave its policy."""
        before = self._waits.get(claim.author)
        number = 0 if before is None else before.num_times
        self._waits[claim.author] = _Wait(now + min(RETRY_S * 2 ** min(number, 10), MAX_RETRY_S), number + 1)

    def next_check(self, now: float) -> float:
        """When a claim that could not be checked may be tried again; infinity if there is none."""
        waits = (wait.until for author, wait in self._waits.items() if author in self._by_author)
        return min((until for until in waits if until > now), default=float("inf"))

    def _all(self) -> Iterable[Evaluation]:
        return (each for claims in self._by_author.values() for each in claims.values())

    def _is_true(self, claim: Evaluation) -> bool:
        if self._target is None or claim.author in self.liars:
            return False
        if claim.author == self._me:
            return True
        measured = self._measured.get(claim.cid)
        return measured is not None and measured >= self._target - TOLERANCE * abs(self._target)

    def _can_be(self, claim: Evaluation) -> bool:
        return claim.author != self._me and self._history.get(claim.epoch, claim.cid) == claim.cid


def possible(evaluations: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """Without those beyond what any run can come to, which name no policy: documents take larger numbers."""
    return tuple(each for each in evaluations if each.epoch <= MAX_EPOCH and each.env_steps <= MAX_STEPS)


def _order(claim: Evaluation) -> tuple[int, Cid, PeerId]:
    return claim.epoch, claim.cid, claim.author
