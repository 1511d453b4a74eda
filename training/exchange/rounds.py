"""One round: how learners settle, without a leader, which contributions are averaged.

Every learner signs an *offer*: bytes named by a CID, with a weight, for one round. The one whose turn it is signs a
*proposal* that lists, by hash, the offers that it holds. Whoever holds all of them too *votes* for that ballot. A
ballot with two thirds of the stake is decided: everybody who holds what it lists merges it in the order of the authors
and so gets the same bytes (`averager`).

* **Turns.** Of those who have stake and have offered, the lowest hash of (round, attempt, peer) proposes; whose
  turn it is not, is not heard. When nothing was decided for the learned silence (`waits`), the next attempt begins.
* **Stake** is what a member delivered in the rounds before (`shoal.training.electorate`); invented names have none. Who
  is gone, says that it is at an earlier epoch, or lets nothing be heard for two silences while others wait for its
  vote, is left out of the reckoning, so that any survivor goes on. So is who says nothing in the round for
  `MUTE_ATTEMPTS`, or votes for nothing that is known for `IDLE_ATTEMPTS`, however often it is heard of: else a member
  with a third of the stake would hold up the others by silence. Who was left out so is not waited for in the next
  rounds either, until it has voted for what was decided.
* **One vote per attempt**, and none before the others said what they voted for until then (`votes`): so what somebody
  decided on stays decided, whoever dies.
* A proposal that leaves out more than half of what a voter holds is not voted for; offers and ballots heavier than
  honest ones can be are not heard (`Limits`).

This core has no clock: ``now`` is seconds of any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from shoal.protocol.ids import Cid, PeerId
from shoal.training.electorate import most_awaited, says_of
from shoal.training.exchange.ballots import (
    Ballot,
    Begin,
    Busy,
    CannotBeHad,
    Cast,
    Committed,
    Decide,
    Held,
    Joined,
    Left,
    Limits,
    Obtain,
    OfferHeard,
    ProposalHeard,
    Propose,
    RoundEvent,
    RoundOutput,
    SignedOffer,
    Tick,
    VoteHeard,
)
from shoal.training.exchange.votes import LOCK, QUORUM, Votes
from shoal.training.exchange.waits import MAX_OFFERS_S, Waits
from shoal.training.statements import (
    MAX_ATTEMPTS,
    MAX_OFFERS,
    NO_BALLOT,
    Proposal,
    RoundKey,
    Vote,
    turn_rank,
)

FAIR_PART: Final = 1 / 2
PROMISES_PART: Final = 1 / 2
"""Of a silence: how long an attempt waits for the promises of those who are there and give none."""
ASK_PART: Final = 1 / 4
"""Of a silence: until bytes that did not come are asked for again."""
PATIENCE: Final = 4.0
"""Silences in which the bytes of a ballot that others voted for must come."""
MUTE_ATTEMPTS: Final = 3
IDLE_ATTEMPTS: Final = 8
MAX_PROPOSALS_EACH: Final = 4
"""That are remembered of one author in one round, the newest attempts."""
MAX_KNOWN: Final = 256
"""Ballots of one round."""
MAX_VOTERS: Final = 24
"""Members that vote in one round, of more with stake those with the lowest hashes; with a tenth of liars, less than one
round in a thousand has a third of them among its voters."""
_EPSILON: Final = 1e-9


@dataclass(slots=True)
class _Proposed:
    author: PeerId
    proposal: Proposal
    name: bytes
    heard_at: float
    was_in_turn: bool = False


@dataclass(slots=True)
class _Known:
    """A ballot of which every offer is known.

    Attributes:
        lacks: what this learner does not hold of it yet.
    """

    ballot: Ballot
    weight: int
    lacks: set[Cid] = field(default_factory=set)


class Round:
    """One learner's part in one round: `handle` takes what happens and says what to do."""

    __slots__ = (
        "_ask_at",
        "_asked",
        "_attempt",
        "_attempt_at",
        "_awaited",
        "_awaited_stake",
        "_began_at",
        "_by_cid",
        "_by_name",
        "_cast",
        "_created_at",
        "_decided_at",
        "_gone",
        "_half_at",
        "_heard_at",
        "_held",
        "_held_stake",
        "_held_weight",
        "_idle",
        "_known",
        "_last_held_at",
        "_limits",
        "_me",
        "_most_awaited",
        "_offers",
        "_own_attempt",
        "_productive_s",
        "_promised",
        "_proposals",
        "_said_attempt",
        "_says",
        "_shunned",
        "_stakes",
        "_total",
        "_turn_of",
        "_votes",
        "_waits",
        "_wake_at",
        "_would_at",
        "decided",
        "key",
    )

    def __init__(
        self,
        me: PeerId,
        key: RoundKey,
        stakes: Mapping[PeerId, float],
        limits: Limits,
        waits: Waits,
        now: float,
        *,
        heard_at: Mapping[PeerId, float],
        busy: Iterable[PeerId] = (),
        gone: Iterable[PeerId] = (),
        idle: set[PeerId] | None = None,
        may_have_voted: bool = False,
        shunned: Set[PeerId] = frozenset(),
    ) -> None:
        """Take part from now on.

        Args:
            me: this learner.
            key: which round.
            stakes: what each member has a say by, positive; this learner may be among them.
            limits: of what is heard.
            waits: what was learned of the others' timing.
            now: the time.
            heard_at: when each member was last heard of in any way; a view that stays up to date.
            busy: members that say that they do something else.
            gone: members that are not there.
            idle: members that did not help to decide the rounds before; kept up to date.
            may_have_voted: whether an earlier life of this node may have been in this round: then it has no say in the
                first attempt, and in later ones what the others know of it counts.
            shunned: whose offers are not proposed.
        """
        self.key = key
        self.decided: Ballot | None = None
        self._me = me
        self._stakes = dict(stakes)
        self._gone = set(gone)
        self._says = says_of(self._stakes)
        self._total = sum(self._says.values())
        self._votes = Votes(voters_of(key, self._says))
        self._limits = limits
        self._waits = waits
        self._heard_at = heard_at
        self._idle = set() if idle is None else idle
        self._shunned = shunned
        self._created_at = now
        self._began_at: float | None = None
        self._decided_at: float | None = None
        self._productive_s = 0.0
        self._offers: dict[PeerId, SignedOffer] = {}
        self._by_name: dict[bytes, SignedOffer] = {}
        self._by_cid: dict[Cid, list[SignedOffer]] = {}
        self._held: set[Cid] = set()
        self._asked: set[Cid] = set()
        self._ask_at: dict[Cid, float] = {}  # again, for what did not come
        self._held_weight = 0
        self._held_stake = 0.0
        self._half_at: float | None = None
        self._last_held_at = now
        self._awaited = self._stakes.keys() - {me} - set(busy) - self._gone
        self._most_awaited = most_awaited(self._stakes)
        awaited = [
            stake for peer, stake in self._stakes.items() if peer in self._awaited
        ]  # in an order, as floats add up
        self._awaited_stake = sum(min(stake, self._most_awaited) for stake in awaited)
        self._proposals: list[_Proposed] = []
        self._known: dict[bytes, _Known] = {}
        may_have_voted = may_have_voted and not self._gone.issuperset(self._stakes.keys() - {me})
        self._cast = (NO_BALLOT, 0)  # the newest vote, and the attempt it was cast in
        self._promised = 0 if may_have_voted else -1  # the attempt up to which nothing is voted for any more
        self._own_attempt = self._promised
        self._said_attempt = 0
        self._turn_of: dict[int, PeerId | None] = {}
        self._attempt = 0
        self._attempt_at: float | None = None
        self._would_at: float | None = None
        self._wake_at = now

    @property
    def next_wake(self) -> float:
        """When to hand in a `Tick` at the latest."""
        return self._wake_at

    @property
    def voters(self) -> Mapping[PeerId, float]:
        """Who votes, and what each counts for."""
        return self._votes.says

    @property
    def has_begun(self) -> bool:
        """Whether this learner has arrived here."""
        return self._began_at is not None

    @property
    def offers(self) -> Mapping[PeerId, SignedOffer]:
        """What was offered, by author."""
        return self._offers

    @property
    def deciders(self) -> set[PeerId]:
        """The others who may hold what was decided: who voted for it, and whose offers it lists."""
        if self.decided is None:
            return set()
        found = {*self._votes.voters_for({self.decided.name}), *(each.author for each in self.decided.offers)}
        return found - {self._me}

    @property
    def attempt(self) -> int:
        """How many proposers were passed over."""
        return self._attempt

    def takes_part(self, author: PeerId) -> bool:
        """Whether a member has said anything in this round."""
        return author in self._offers or self._votes.has_spoken(author)

    def handle(self, event: RoundEvent, now: float) -> list[RoundOutput]:
        """Take in what happened; what is to be done about it."""
        outputs: list[RoundOutput] = []
        if isinstance(event, Begin):
            self._began_at, self._productive_s = now, event.productive_s
        if self.decided is not None:
            if isinstance(event, VoteHeard):
                if event.vote.ballot == self.decided.name:
                    self._idle.discard(event.author)
                self._answer(event.vote, outputs)
            return outputs
        match event:
            case VoteHeard(author, vote):
                if author == self._me or not self._votes.take(author, vote):
                    return outputs
            case Committed(author, name):
                if author == self._me or not self._votes.commit(author, name):
                    return outputs
                self._ask_for(name, outputs)
            case OfferHeard(offer):
                if not self._take_offer(offer, now, outputs):
                    return outputs
            case Held(cid):
                self._take_bytes(cid, now)
            case ProposalHeard(author, proposal):
                self._take_proposal(author, proposal, now, outputs)
            case CannotBeHad(cid):
                self._asked.discard(cid)
                self._ask_at[cid] = now + ASK_PART * self._waits.silence_s
                for signed in self._by_cid.get(cid, ()):
                    self._stop_waiting_for(signed.author)
            case Left(author):
                self._leave(author)
            case Busy(author):
                self._stop_waiting_for(author)
            case Joined(author, stake):
                self._join(author, stake)
            case Begin() | Tick():
                pass
        self._plan(now, outputs)
        return outputs

    # Taking in.

    def _take_offer(self, signed: SignedOffer, now: float, outputs: list[RoundOutput]) -> bool:
        offer = signed.offer
        if signed.author in self._offers or offer.key != self.key:
            return False
        if offer.weight > self._limits.offer:
            self._stop_waiting_for(signed.author)  # nobody can have collected that; nothing better will come
            return True
        if len(self._offers) >= 2 * MAX_OFFERS and signed.author not in self._stakes:
            return False
        self._offers[signed.author] = signed
        self._by_cid.setdefault(offer.cid, []).append(signed)
        self._take_in_turn(signed.author)
        self._by_name[signed.name] = signed
        if offer.cid in self._held or signed.author == self._me:
            self._held.add(offer.cid)
            self._count_held(signed, now)
        elif offer.cid not in self._asked:
            self._asked.add(offer.cid)
            outputs.append(Obtain(offer.cid, (signed.author,)))
        for proposed in self._proposals:
            if proposed.name not in self._known:
                self._complete(proposed, outputs)
        return True

    def _take_bytes(self, cid: Cid, now: float) -> None:
        self._asked.discard(cid)
        if cid in self._held:
            return
        self._held.add(cid)
        for signed in self._by_cid.get(cid, ()):
            self._count_held(signed, now)
        for known in self._known.values():
            known.lacks.discard(cid)

    def _count_held(self, signed: SignedOffer, now: float) -> None:
        self._held_weight += signed.offer.weight
        self._last_held_at = now
        self._stop_waiting_for(signed.author)
        self._held_stake += self._says.get(signed.author, 0.0)
        if self._half_at is None and self._held_stake >= self._total / 2 - _EPSILON:
            self._half_at = now

    def _take_proposal(self, author: PeerId, proposal: Proposal, now: float, outputs: list[RoundOutput]) -> None:
        mine = [each for each in self._proposals if each.author == author]
        if proposal.key != self.key or any(each.proposal.attempt == proposal.attempt for each in mine):
            return  # the first word of an author on an attempt is the one that counts
        if author not in self._stakes and author not in self._offers:
            return
        if len(mine) >= MAX_PROPOSALS_EACH:
            oldest = min(mine, key=lambda each: each.proposal.attempt)
            if oldest.proposal.attempt > proposal.attempt:
                return
            self._proposals.remove(oldest)
        proposed = _Proposed(author, proposal, proposal.ballot, now)
        self._proposals.append(proposed)
        self._complete(proposed, outputs)

    def _complete(self, proposed: _Proposed, outputs: list[RoundOutput]) -> None:
        """Once all of its offers are known, a proposal is a ballot that can be held."""
        offers = [self._by_name.get(name) for name in proposed.proposal.offers]
        found = [offer for offer in offers if offer is not None]
        if len(found) < len(offers):
            return
        found.sort(key=lambda each: each.author)
        weight = sum(each.offer.weight for each in found)
        if weight > self._limits.ballot:
            return
        lacks = {each.offer.cid for each in found} - self._held
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[proposed.name] = _Known(Ballot(proposed.name, tuple(found)), weight, lacks)
        for cid in sorted(lacks):  # of its proposer too: the author may give it to hardly anybody
            self._asked.discard(cid)
            self._ask_again(cid, outputs)

    def _ask_again(self, cid: Cid, outputs: list[RoundOutput]) -> None:
        """Of whoever must hold it: the voters and proposers of a ballot that lists it."""
        if cid in self._held or cid in self._asked:
            return
        names = {name for name, known in self._known.items() if cid in known.lacks}
        if not names:
            return
        sources = self._votes.voters_for(names)
        sources += [each.author for each in self._proposals if each.name in names]
        sources += [signed.author for signed in self._by_cid.get(cid, ())]
        sources = [peer for peer in dict.fromkeys(sources) if peer != self._me and peer not in self._gone]
        if sources:
            self._asked.add(cid)
            outputs.append(Obtain(cid, tuple(sources)))

    def _ask_once_more(self, now: float, outputs: list[RoundOutput]) -> None:
        """For what did not come, after a while: whoever gave nothing at once will not do it the next moment."""
        for cid in [cid for cid, at in self._ask_at.items() if at <= now]:
            del self._ask_at[cid]
            self._ask_again(cid, outputs)
        self._wake_at = min([self._wake_at, *self._ask_at.values()])

    def _ask_for(self, name: bytes, outputs: list[RoundOutput]) -> None:
        """One more holds all of this ballot."""
        known = self._known.get(name)
        if known is not None:
            for cid in sorted(known.lacks):
                self._ask_again(cid, outputs)

    def _answer(self, vote: Vote, outputs: list[RoundOutput]) -> None:
        """Say it again to those who have not decided: a vote for what is decided is right in any attempt."""
        if self.decided is None or vote.attempt <= self._promised or self._me not in self.voters:
            return
        self._promised = vote.attempt
        name = self.decided.name
        outputs.append(Cast(Vote(key=self.key, attempt=vote.attempt, ballot=name, cast=vote.attempt)))

    def _join(self, author: PeerId, stake: float) -> None:
        self._gone.discard(author)
        if author in self._stakes or len(self._stakes) >= MAX_OFFERS:
            return
        self._stakes[author] = stake
        self._reckon_anew(self._stakes)
        is_here = author in self._offers and self._offers[author].offer.cid in self._held
        if not is_here and not self.has_begun:
            self._awaited.add(author)
            self._awaited_stake += min(stake, self._most_awaited)

    def _leave(self, author: PeerId) -> None:
        if author in self._gone:
            return
        self._gone.add(author)
        self._stop_waiting_for(author)
        self._turn_of.clear()
        if author in self.voters and self._gone.issuperset(self.voters):
            there = {peer: stake for peer, stake in self._stakes.items() if peer not in self._gone}
            if not there:  # nobody who has shown anything is left: those who are there count alike
                there = dict.fromkeys([self._me, *(peer for peer in self._offers if peer not in self._gone)], 1.0)
                self._stakes = dict(there)
            self._reckon_anew(there)

    def _reckon_anew(self, stakes: Mapping[PeerId, float]) -> None:
        self._says = says_of(stakes)
        self._total = sum(self._says.values())
        self._votes.change(voters_of(self.key, self._says))
        self._turn_of.clear()
        self._held_stake = sum(
            self._says.get(author, 0.0) for author, signed in self._offers.items() if signed.offer.cid in self._held
        )

    def _stop_waiting_for(self, author: PeerId) -> None:
        if author in self._awaited:
            self._awaited.discard(author)
            self._awaited_stake -= min(self._stakes[author], self._most_awaited)

    # Deciding.

    def _plan(self, now: float, outputs: list[RoundOutput]) -> None:
        self._advance(now)
        if self._ask_at:
            self._ask_once_more(now, outputs)
        if self._attempt_at is None and not self._proposals:
            return  # there is nothing yet to vote for or to decide on, and it is too early to propose
        self._promise(outputs)
        if min(self._promised, self._own_attempt) < self._attempt and self._has_promises(now):
            keep_to = self._to_keep_to(now) if self._attempt > 0 else None
            self._vote(keep_to, now, outputs)
            self._propose(keep_to, now, outputs)
        self._decide(now, outputs)

    def _decide(self, now: float, outputs: list[RoundOutput]) -> None:
        for attempt, name in self._votes.ballots():
            known = self._known.get(name)
            if known is None or known.lacks:
                continue
            if self._votes.is_decided(attempt, name, lambda peer: self._is_there(peer, now)):
                self._note_idle(name)
                self.decided, self._decided_at = known.ballot, now
                self._learn(known.ballot, now)
                outputs.append(Decide(known.ballot))
                return

    def _note_idle(self, name: bytes) -> None:
        """Remember, for the rounds to come, who did not help to decide on this ballot."""
        for_it = set(self._votes.voters_for({name}))
        for peer in self.voters:
            if peer in for_it:
                self._idle.discard(peer)
            elif peer != self._me and self._is_idle(peer):
                self._idle.add(peer)

    def _is_there(self, peer: PeerId, now: float) -> bool:
        """Whether a member can be expected to vote."""
        if peer == self._me:
            return True
        if peer in self._gone or self._is_idle(peer):
            return False
        return self._attempt == 0 or self._heard_at.get(peer, self._created_at) >= now - 2 * self._attempt_s()

    def _is_idle(self, peer: PeerId) -> bool:
        """Whether it does not help to decide, though it is heard of."""
        if peer in self._idle:
            return self._votes.last_cast(peer, self._known.__contains__) < 0
        if self._attempt < MUTE_ATTEMPTS:
            return False
        if self._votes.promised_at(peer) <= self._attempt - MUTE_ATTEMPTS:
            return True
        return self._votes.last_cast(peer, self._known.__contains__) <= self._attempt - IDLE_ATTEMPTS

    def _promise(self, outputs: list[RoundOutput]) -> None:
        """Say in a new attempt what was voted for until then."""
        if self._attempt == 0 or self._said_attempt >= self._attempt or self._me not in self.voters:
            return
        self._said_attempt = self._attempt
        name, cast = self._cast
        vote = Vote(key=self.key, attempt=self._attempt, ballot=name, cast=cast)
        self._votes.take(self._me, vote)
        outputs.append(Cast(vote))

    def _has_promises(self, now: float) -> bool:
        """Whether those who are there said what they voted for in earlier attempts."""
        if self._attempt == 0 or self._attempt_at is None:
            return True
        have, total = self._votes.promised(self._attempt, lambda peer: self._is_there(peer, now))
        if have >= total - _EPSILON:
            return True
        at = self._attempt_at + PROMISES_PART * self._waits.silence_s
        self._wake_at = min(self._wake_at, at) if now < at else self._wake_at
        return now >= at and have >= QUORUM * total - _EPSILON

    def _to_keep_to(self, now: float) -> bytes | None:
        by_name = {each.name: each for each in self._proposals if self._was_in_turn(each)}

        def is_sound(name: bytes) -> bool:
            known, proposed = self._known.get(name), by_name.get(name)
            if known is None or proposed is None or not self._is_fair(known):
                return False
            return not known.lacks or now < proposed.heard_at + PATIENCE * self._waits.silence_s

        return self._votes.to_keep_to(lambda peer: self._is_there(peer, now), is_sound)

    def _vote(self, keep_to: bytes | None, now: float, outputs: list[RoundOutput]) -> None:
        if self._promised >= self._attempt or self._me not in self.voters:
            return
        for proposed in self._proposals:
            if proposed.proposal.attempt != self._attempt or not self._was_in_turn(proposed):
                continue
            known = self._known.get(proposed.name)
            if known is None or known.lacks:
                continue
            if proposed.name == keep_to or (keep_to is None and self._is_fair(known)):
                self._cast_for(proposed.name, outputs)
                return

    def _cast_for(self, name: bytes, outputs: list[RoundOutput]) -> None:
        self._promised = self._attempt
        self._cast = name, self._attempt
        vote = Vote(key=self.key, attempt=self._attempt, ballot=name, cast=self._attempt)
        self._votes.take(self._me, vote)
        outputs.append(Cast(vote))

    def _is_fair(self, known: _Known) -> bool:
        """Whether it leaves out no more than half of the stake that is held; where nobody has any, of the samples."""
        if self._held_stake <= _EPSILON:
            return known.weight >= FAIR_PART * min(self._held_weight, self._limits.ballot)
        stake = sum(self._says.get(each.author, 0.0) for each in known.ballot.offers)
        return stake >= FAIR_PART * self._held_stake - _EPSILON

    def _candidates(self) -> list[PeerId]:
        """Who may propose: those with stake who have offered; if there are none left, whoever has offered."""
        with_stake = [peer for peer in self._offers if peer in self._stakes and peer not in self._gone]
        return with_stake or [peer for peer in self._offers if peer not in self._gone]

    def _turn(self, attempt: int) -> PeerId | None:
        if attempt not in self._turn_of:
            self._turn_of[attempt] = min(
                self._candidates(), key=lambda peer: turn_rank("round", self.key, attempt, peer), default=None
            )
        return self._turn_of[attempt]

    def _take_in_turn(self, author: PeerId) -> None:
        """One more may propose: whose turn it is in each attempt, without ranking the others again."""
        if author in self._gone:
            return
        for attempt, before in self._turn_of.items():
            if before is not None and (before in self._stakes) != (author in self._stakes):
                is_first = author in self._stakes
            else:
                rank = turn_rank("round", self.key, attempt, author)
                is_first = before is None or rank < turn_rank("round", self.key, attempt, before)
            if is_first:
                self._turn_of[attempt] = author

    def _was_in_turn(self, proposed: _Proposed) -> bool:
        """Whether it was its author's turn, when it proposed or since."""
        if not proposed.was_in_turn:
            proposed.was_in_turn = self._turn(proposed.proposal.attempt) == proposed.author
        return proposed.was_in_turn

    @property
    def settling_s(self) -> float:
        """How long a round that is decided took, from when this learner would have waited for nobody any more."""
        if self._decided_at is None or self._would_at is None:
            return 0.0
        return max(0.0, self._decided_at - self._would_at)

    def _would(self, now: float) -> float:
        """When this learner would propose, were it its turn; infinity while that is open."""
        if self._began_at is None:
            return self._half_at + self._waits.offers_s if self._half_at is not None else float("inf")
        if not self._awaited:
            return self._began_at
        if not self._held_weight:
            return float("inf") if self._half_at is None else self._half_at + self._waits.offers_s
        worth_s = self._productive_s * self._awaited_stake / self._held_weight
        return self._began_at + min(worth_s, MAX_OFFERS_S)

    def _advance(self, now: float) -> None:
        """Keep the clock of attempts."""
        if self._attempt_at is None:
            would = self._would(now)
            if now < would:
                self._wake_at = would
                return
            self._attempt_at = self._would_at = now
        while now >= (ends_at := self._attempt_at + self._attempt_s()) and self._attempt < MAX_ATTEMPTS:
            self._attempt += 1
            self._attempt_at = ends_at if now < ends_at + self._attempt_s() else now  # after a sleep
        if self._votes.latest > self._attempt:
            others = self._votes.attempt_of(LOCK, lambda peer: peer not in self._gone)
            if others > self._attempt:
                self._attempt, self._attempt_at = others, now
        self._wake_at = self._attempt_at + self._attempt_s()

    def _attempt_s(self) -> float:
        """How long an attempt lasts: the more there were, the longer, so that in the end all are in the same one."""
        return self._waits.silence_s * (1 + min(self._attempt, 8) / 4)

    def _propose(self, keep_to: bytes | None, now: float, outputs: list[RoundOutput]) -> None:
        if self._began_at is None or self._attempt_at is None or self._own_attempt >= self._attempt:
            return
        if self._promised >= self._attempt or self._turn(self._attempt) != self._me:
            return
        names = self._names_to_propose() if keep_to is None else self._names_of(keep_to)
        if not names:
            return
        proposal = Proposal(key=self.key, attempt=self._attempt, offers=names)
        self._own_attempt = self._attempt
        outputs.append(Propose(proposal))
        proposed = _Proposed(self._me, proposal, proposal.ballot, now, was_in_turn=True)
        self._proposals.append(proposed)
        self._complete(proposed, outputs)
        if self._me in self.voters:
            self._cast_for(proposed.name, outputs)

    def _names_of(self, name: bytes) -> tuple[bytes, ...]:
        known = self._known.get(name)
        if known is None or known.lacks:
            return ()
        return tuple(sorted(each.name for each in known.ballot.offers))

    def _names_to_propose(self) -> tuple[bytes, ...]:
        """All that is held and fits, those with stake first."""
        held = [
            each
            for each in self._offers.values()
            if each.offer.cid in self._held and each.author not in self._gone and each.author not in self._shunned
        ]
        held.sort(key=lambda each: (-self._stakes.get(each.author, 0.0), each.author))
        names, weight = [], 0
        for each in held[:MAX_OFFERS]:
            if weight + each.offer.weight <= self._limits.ballot:
                names.append(each.name)
                weight += each.offer.weight
        return tuple(sorted(names))

    def _learn(self, ballot: Ballot, now: float) -> None:
        others = any(each.author != self._me for each in ballot.offers)
        if others and self._began_at is not None and self._attempt_at is not None:
            reference = self._began_at if self._half_at is None else max(self._half_at, self._began_at)
            self._waits.learn(self._last_held_at - reference, now - self._attempt_at)


def voters_of(key: RoundKey, stakes: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """Who votes in a round, and what each counts for: everybody, or the `MAX_VOTERS` whose hashes are the lowest."""
    if len(stakes) <= MAX_VOTERS:
        return dict(stakes)
    chosen = sorted(stakes, key=lambda peer: turn_rank("vote", key, 0, peer))[:MAX_VOTERS]
    return {peer: stakes[peer] for peer in chosen}
