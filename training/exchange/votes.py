"""The votes of one round: how often each member may vote, when a ballot is decided, and which one must be kept to.

It is single-decree Paxos (Lamport, *Paxos Made Simple*, 2001) with stake in place of heads. In attempt 0 the first
phase is left out, as there is nothing to find out; so a round without faults takes one vote of each. Before anybody
proposes or votes in a later attempt, it has the *promises* of the others: "in attempt ``a``, my newest vote is for this
ballot, cast in that attempt; I do not vote in earlier ones any more". If there are votes, the ballot of the newest is
the only one that may be voted for. So what somebody decided on stays decided.

Deviations:

* Who is gone or silent is left out of the reckoning, so that any survivor goes on. Quorums then need not meet, so
  promises are waited for from everybody that is there (for a while; a liar might give none), not only from a quorum.
  Only what is decided and known to nobody that is left is lost.
* A member that says what it made of a ballot has *committed* to it: a vote in every attempt.
* With proposers that lie, two ballots can have votes in one attempt: that of more stake is kept to. A vote for a ballot
  that nobody saw proposed counts only with the stake that liars do not have (`LOCK`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from shoal.protocol.ids import PeerId
from shoal.training.statements import NO_BALLOT, Vote

QUORUM: Final = 2 / 3
LOCK: Final = 1 / 4
"""Of the stake: more than liars have."""
MAX_CASTS: Final = 16
"""Attempts of which the vote of one member is remembered."""
_COMMITTED: Final = 2**62
_EPSILON: Final = 1e-9


class Votes:
    """What was voted in one round, as one member saw it."""

    __slots__ = ("_behind", "_casts", "_committed", "_committed_stake", "_promised", "latest", "says")

    def __init__(self, says: dict[PeerId, float]) -> None:
        """Start; ``says`` is what each voter counts for."""
        self.says = says
        self._casts: dict[PeerId, dict[int, bytes]] = {}
        self._behind: dict[tuple[int, bytes], float] = {}
        self._promised: dict[PeerId, int] = {}
        self.latest = -1
        """The latest attempt at which anybody has arrived."""
        self._committed: dict[PeerId, bytes] = {}
        self._committed_stake: dict[bytes, float] = {}

    def __bool__(self) -> bool:
        return bool(self._behind or self._committed)

    def change(self, says: dict[PeerId, float]) -> None:
        """Others vote, or count for something else."""
        self.says = says
        self._behind = {}
        for author, casts in self._casts.items():
            if author not in self._committed:
                for attempt, name in casts.items():
                    self._add(attempt, name, says.get(author, 0.0))
        self._committed_stake = {}
        for author, name in self._committed.items():
            self._committed_stake[name] = self._committed_stake.get(name, 0.0) + says.get(author, 0.0)

    def take(self, author: PeerId, vote: Vote) -> bool:
        """A member voted or promised; whether that is news. Its first word on an attempt is the one that counts."""
        if author not in self.says:
            return False
        is_news = vote.attempt > self._promised.get(author, -1)
        if is_news:
            self._promised[author] = vote.attempt
            self.latest = max(self.latest, vote.attempt)
        if vote.ballot == NO_BALLOT or author in self._committed:
            return is_news
        casts = self._casts.setdefault(author, {})
        if vote.cast in casts:
            return is_news
        casts[vote.cast] = vote.ballot
        self._add(vote.cast, vote.ballot, self.says[author])
        if len(casts) > MAX_CASTS:
            oldest = min(casts)
            self._add(oldest, casts.pop(oldest), -self.says[author])
        return True

    def commit(self, author: PeerId, name: bytes) -> bool:
        """A member made something of a ballot; whether that is news."""
        if author not in self.says or author in self._committed:
            return False
        stake = self.says[author]
        for attempt, ballot in self._casts.get(author, {}).items():
            self._add(attempt, ballot, -stake)
        self._committed[author] = name
        self._committed_stake[name] = self._committed_stake.get(name, 0.0) + stake
        return True

    def has_spoken(self, author: PeerId) -> bool:
        """Whether a member voted, promised or committed."""
        return author in self._promised or author in self._committed

    def promised_at(self, author: PeerId) -> int:
        """The latest attempt that a member has said anything in; -1 if none. Who has committed says it in each."""
        return _COMMITTED if self._is_borne_out(author) else self._promised.get(author, -1)

    def last_cast(self, author: PeerId, is_known: Callable[[bytes], bool]) -> int:
        """The same of its votes for ballots that are known."""
        if self._is_borne_out(author):
            return _COMMITTED
        casts = self._casts.get(author, {})
        return max((attempt for attempt, name in casts.items() if is_known(name)), default=-1)

    def _is_borne_out(self, author: PeerId) -> bool:
        """Whether a member has committed to what others voted for too, or could decide alone."""
        name = self._committed.get(author)
        if name is None:
            return False
        total = sum(self.says.values())
        others = sum(say for peer, say in self.says.items() if peer != author and self._was_ever_for(peer, name))
        return others >= LOCK * total - _EPSILON or self.says.get(author, 0.0) >= QUORUM * total - _EPSILON

    def _was_ever_for(self, author: PeerId, name: bytes) -> bool:
        return self._committed.get(author) == name or name in self._casts.get(author, {}).values()

    def ballots(self) -> Iterable[tuple[int, bytes]]:
        """Each attempt and ballot that anybody votes for."""
        return [*self._behind, *((-1, name) for name in self._committed_stake)]

    def behind(self, attempt: int, name: bytes) -> float:
        """The stake that voted for a ballot in an attempt."""
        return self._behind.get((attempt, name), 0.0) + self._committed_stake.get(name, 0.0)

    def is_decided(self, attempt: int, name: bytes, is_there: Callable[[PeerId], bool]) -> bool:
        """Whether those who voted for a ballot in an attempt have two thirds of the stake of all who are there."""
        stake = self.behind(attempt, name)
        if stake <= 0.0:
            return False
        most, total = (stake + _EPSILON) / QUORUM, 0.0
        for author, say in self.says.items():
            if is_there(author) or self._is_for(author, attempt, name):
                total += say
                if total > most:
                    return False
        return True

    def promised(self, attempt: int, is_there: Callable[[PeerId], bool]) -> tuple[float, float]:
        """Of those who are there: the stake of those who promised for an attempt or committed, and of all."""
        have = total = 0.0
        for author, say in self.says.items():
            if is_there(author):
                total += say
                if author in self._committed or self._promised.get(author, -1) >= attempt:
                    have += say
        return have, total

    def attempt_of(self, part: float, is_there: Callable[[PeerId], bool]) -> int:
        """The latest attempt at which this part of the stake has arrived; -1 if there is none."""
        there = [(attempt, author) for author, attempt in self._promised.items() if is_there(author)]
        total = sum(say for author, say in self.says.items() if is_there(author))
        stake = 0.0
        for attempt, author in sorted(there, reverse=True):
            stake += self.says.get(author, 0.0)
            if stake >= part * total - _EPSILON:
                return attempt
        return -1

    def to_keep_to(self, is_there: Callable[[PeerId], bool], is_sound: Callable[[bytes], bool]) -> bytes | None:
        """The ballot that must be voted for in a later attempt, if any may have been decided on.

        Args:
            is_there: whether a member is to be reckoned with.
            is_sound: whether a ballot was proposed by whose turn it was, and could be voted for by this member.
        """
        newest: dict[bytes, int] = {}
        stakes: dict[bytes, float] = {}
        total = 0.0
        for author, say in self.says.items():
            if not is_there(author):
                continue
            total += say
            if author in self._committed:
                attempt, name = _COMMITTED, self._committed[author]
            else:
                casts = self._casts.get(author)
                if not casts:
                    continue
                attempt = max(casts)
                name = casts[attempt]
            newest[name] = max(attempt, newest.get(name, -1))
            stakes[name] = stakes.get(name, 0.0) + say
        found = [name for name in stakes if stakes[name] >= LOCK * total - _EPSILON or is_sound(name)]
        return max(found, key=lambda name: (newest[name], stakes[name], name), default=None)

    def voters_for(self, names: set[bytes]) -> list[PeerId]:
        """Who say that they hold what one of these ballots lists."""
        found = [author for author, name in self._committed.items() if name in names]
        return found + [author for author, casts in self._casts.items() if not names.isdisjoint(casts.values())]

    def _is_for(self, author: PeerId, attempt: int, name: bytes) -> bool:
        if author in self._committed:
            return self._committed[author] == name
        return self._casts.get(author, {}).get(attempt) == name

    def _add(self, attempt: int, name: bytes, stake: float) -> None:
        left = self._behind.get((attempt, name), 0.0) + stake
        if left > _EPSILON:
            self._behind[attempt, name] = left
        else:
            self._behind.pop((attempt, name), None)
