"""Which policy a node holds: its own, or one that others have signed for.

A policy is never taken because somebody says that it is newer. Every member signs which policy it holds, made from
which parent by which ballot (`Result`), and a signature for a policy is one for its parent too. Another policy is taken

* at once, if those with half of the stake of the own policy's electorate hold it: they went on without this node;
* after `FORK_S`, if it is of another line, which more members that are live hold than the own one; between equal ones,
  the line with more environment steps, then the lower CID. So two parts of a swarm that trained apart end on one
  policy;
* by a node that has trained nothing yet in this life, if nothing that is live is held by more members, and it is
  further than what the node kept: the others went on meanwhile;
* by an actor that holds a copy, which nobody can go on from, as the learners alone say: what half of them hold, and,
  if they are of another line, after `FORK_S`, wherever that is. What an evaluator or another actor holds, which may be
  an older one for a while, is nothing to it.

A few invented names can so mislead a newcomer or a swarm that they outnumber, never one in which they have no stake.

What cannot be taken is told apart (`Refusal`): *false* (it is not what its signers said: they are not heard again),
*unreachable* (nobody gave it; asked for again later, with back-off), *unfit* (this node cannot load it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.training.statements import Result

FORK_S: Final = 2.0
RETRY_S: Final = 2.0
MAX_RETRY_S: Final = 60.0
MAX_REFUSED: Final = 4096
MAX_PAST: Final = 8192
"""Policies that were held, remembered."""
_EPSILON: Final = 1e-9


class Refusal(Enum):
    """Why a policy is not taken."""

    FALSE = auto()
    UNREACHABLE = auto()
    UNFIT = auto()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that should be held instead of the own one.

    Attributes:
        result: what its holders signed.
        holders: who hold it, in order.
        is_other_line: whether it was made apart from the own policy.
    """

    result: Result
    holders: tuple[PeerId, ...]
    is_other_line: bool = False


@dataclass(slots=True)
class _Refused:
    until: float
    num_times: int


class Lineage:
    """What each member says that it holds."""

    __slots__ = (
        "_different",
        "_follows",
        "_fork_since",
        "_is_new",
        "_me",
        "_past",
        "_refused",
        "_results",
        "_says",
        "_support",
        "_together",
        "_total",
        "liars",
        "own",
    )

    def __init__(self, me: PeerId) -> None:
        self.own: Result | None = None
        self.liars: set[PeerId] = set()
        """Members whose word on a policy turned out false."""
        self._me = me
        self._says: dict[PeerId, float] = {}
        self._results: dict[PeerId, Result] = {}
        self._different: list[Result] | None = None
        self._past: dict[Cid, None] = {}
        self._support: dict[Cid, float] = {}
        self._total = 0.0
        self._refused: dict[Cid | Result, _Refused] = {}
        self._fork_since: float | None = None
        self._together: dict[PeerId, int] = {}
        self._is_new = True
        self._follows = False

    @property
    def results(self) -> Mapping[PeerId, Result]:
        """The newest word of each member that is there."""
        return self._results

    def hold(self, own: Result, says: Mapping[PeerId, float], *, is_new: bool = False, follows: bool = False) -> None:
        """This node holds a policy now.

        Args:
            own: that policy.
            says: what each member counts for in what follows.
            is_new: whether this node, in this life, made nothing itself yet.
            follows: whether it holds nothing that could be gone on from, and goes where those who count are.
        """
        self.own = own
        self._past[own.cid] = None
        if len(self._past) > MAX_PAST:
            del self._past[next(iter(self._past))]
        self._is_new = is_new
        self._follows = follows
        self._says = dict(says)
        self._different = None
        for author, result in self._results.items():
            self._note_together(author, result)
        self._recount()

    def count(self, says: Mapping[PeerId, float]) -> None:
        """From now on members count for so much."""
        if says != self._says:
            self._says = dict(says)
            self._recount()

    def heard(self, author: PeerId, result: Result) -> bool:
        """A member says what it holds; whether those who count may be ahead of this node now."""
        if author in self.liars or author == self._me:
            return False
        before = self._results.get(author)
        self._results[author] = result
        self._different = None
        self._note_together(author, result)
        stake = self._stake(author)
        if before is None:
            self._total += stake
        else:
            self._add(before, -stake)
        self._add(result, stake)
        own = self.own
        if own is None:
            return True
        return result.epoch > own.epoch and self._support[result.cid] >= self._total / 2 - _EPSILON

    def together_until(self, holders: tuple[PeerId, ...]) -> int:
        """The environment steps up to which any of these members was of one line with this node."""
        return max((self._together.get(holder, 0) for holder in holders), default=0)

    def _note_together(self, author: PeerId, result: Result) -> None:
        own = self.own
        if own is not None and _same_line(own, result):
            self._together.pop(author, None)
            self._together[author] = min(own.env_steps, result.env_steps)
            if len(self._together) > MAX_MEMBERS:
                del self._together[next(iter(self._together))]

    def gone(self, author: PeerId) -> None:
        """A member is no longer there."""
        if self._results.pop(author, None) is not None:
            self._recount()

    def refuse(self, result: Result, why: Refusal, now: float) -> None:
        """A candidate could not be taken. If it is false, so is the word of those who signed exactly this of it."""
        what: Cid | Result = result if why is Refusal.FALSE else result.cid
        before = self._refused.get(what)
        number = 1 if before is None else before.num_times + 1
        if why is Refusal.UNREACHABLE:
            until = now + min(RETRY_S * 2 ** min(number - 1, 10), MAX_RETRY_S)
        else:
            until = float("inf")
        if why is Refusal.FALSE:
            for author in [author for author, each in self._results.items() if each == result]:
                self.liars.add(author)
                del self._results[author]
            self._recount()
        self._refused[what] = _Refused(until, number)
        while len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]

    def overtaken(self, now: float) -> Candidate | None:
        """The newest policy that half of the own policy's electorate holds, if it is newer than the own one.

        Without an electorate (a node that only stores, or has only begun) all who are there count alike.
        """
        own = self.own
        most, support = self._total / 2 - _EPSILON, self._support
        epoch = -1 if own is None else own.epoch
        if not any(each.epoch > epoch and support.get(each.cid, 0.0) >= most for each in self._results.values()):
            return None  # as nearly always; telling the policies apart takes a while
        best: Result | None = None
        for result in self._distinct():
            if (own is not None and result.epoch <= own.epoch) or self.is_refused(result, now):
                continue
            if support.get(result.cid, 0.0) < most:
                continue
            if best is None or (result.epoch, result.env_steps, result.cid) > (best.epoch, best.env_steps, best.cid):
                best = result
        return None if best is None else self._candidate(best)

    def made_of(self, ballot: bytes, now: float) -> Candidate | None:
        """What those say who merged a ballot that this node saw decided; of several answers, that of most stake."""
        own = self.own
        found: dict[Cid, Result] = {}
        for result in self._results.values():
            is_next = own is not None and result.parent == own.cid and result.ballot == ballot
            if is_next and not self.is_refused(result, now):
                found[result.cid] = result
        if not found:
            return None
        return self._candidate(found[max(found, key=lambda cid: (self._support.get(cid, 0.0), cid))])

    def other_line(self, now: float) -> Candidate | None:
        """A policy of another line that more live members hold than the own one, since `FORK_S`.

        For a node that made nothing in this life, whatever most members hold, if it is further than its own.
        """
        own = self.own
        has_none = own is None or own.epoch == 0
        is_new = has_none or (self._is_new and not self._follows)
        results = [each for author, each in self._results.items() if not self._follows or self._stake(author)]
        ours = sum(self._is_on_own_line(each) for each in results) if not has_none else 0
        ours += not (is_new or self._follows)
        found: list[tuple[int, int, int, Cid]] = []
        is_any = any(each.epoch and not self._is_on_own_line(each) for each in results)
        for result in self._distinct() if is_any else ():
            if result.epoch == 0 or self.is_refused(result, now) or self._is_on_own_line(result):
                continue
            number = sum(_same_line(result, each) for each in results)
            is_better = own is None or (result.env_steps, own.cid) > (own.env_steps, result.cid)
            if (number > ours and not is_new) or (number >= ours and number and is_better):
                found.append((number, result.env_steps, result.epoch, result.cid))
        if not found:
            self._fork_since = None
            return None
        self._fork_since = now if self._fork_since is None else self._fork_since
        if not is_new and now < self._fork_since + FORK_S:
            return None
        cid = max(found)[-1]
        result = next(each for each in self._distinct() if each.cid == cid)
        return Candidate(result, self.holders(cid), is_other_line=not (is_new or self._follows))

    def holders(self, cid: Cid) -> tuple[PeerId, ...]:
        """Who say that they hold a policy, or one made from it."""
        return tuple(sorted(author for author, each in self._results.items() if cid in (each.cid, each.parent)))

    def _is_on_own_line(self, result: Result) -> bool:
        """Whether a policy is next to the own one, or was held here before: its holder lags, or said no more yet."""
        return result.cid in self._past or (self.own is not None and _same_line(self.own, result))

    def _distinct(self) -> list[Result]:
        """Every policy that somebody holds, as those with the most stake say of it."""
        if self._different is not None:
            return self._different
        stakes: dict[Result, float] = {}
        for author, result in self._results.items():
            stakes[result] = stakes.get(result, 0.0) + self._stake(author)
        best: dict[Cid, Result] = {}
        for result in sorted(stakes, key=lambda each: (stakes[each], each.env_steps)):
            best[result.cid] = result
        self._different = list(best.values())
        return self._different

    def _candidate(self, result: Result) -> Candidate:
        return Candidate(result, self.holders(result.cid))

    def is_refused(self, result: Result, now: float) -> bool:
        """Whether this was refused, for now or for good."""
        found = (self._refused.get(result), self._refused.get(result.cid))
        return any(refused is not None and now < refused.until for refused in found)

    def _add(self, result: Result, stake: float) -> None:
        self._support[result.cid] = self._support.get(result.cid, 0.0) + stake
        if result.parent is not None:
            self._support[result.parent] = self._support.get(result.parent, 0.0) + stake

    def _stake(self, author: PeerId) -> float:
        return self._says.get(author, 0.0) if self._says else 1.0

    def _recount(self) -> None:
        self._different = None
        self._support = {}
        self._total = self._stake(self._me) if self.own is not None else 0.0
        for author, result in self._results.items():
            stake = self._stake(author)
            self._total += stake
            self._add(result, stake)


def _same_line(one: Result, other: Result) -> bool:
    return other.cid == one.cid or one.cid == other.parent or other.cid == one.parent
