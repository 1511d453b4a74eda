"""One round: how learners settle, without a leader, which contributions are averaged.

Every learner signs an *offer*: bytes named by a CID, with a weight, for one round. The one whose turn it is signs a
*proposal* that lists, by hash, the offers that it holds. Whoever holds all of them too *votes* for that ballot. A
ballot with two thirds of the stake is decided: everybody who holds what it lists merges it in the order of the authors
and so gets the same bytes (`averager`).

* **Turns.** Of those who have stake and have offered, the lowest hash of (swarm, round, attempt, peer) proposes; whose
  turn it is not, is not heard. When nobody was decided on for the learned silence (`waits`), the next attempt begins.
* **Stake** is what a member delivered in the rounds before (`shoal.training.electorate`); invented names have none. Who
  is gone, says that it is at an earlier epoch, or lets nothing be heard for two silences while others wait for its
  vote, is left out of the reckoning, so that any survivor goes on.
* **One vote per attempt.** In a later attempt a member leaves the ballot it voted for only if less than a third of the
  stake stands behind that one, and a proposer repeats the ballot that has most votes if a third does. So what somebody
  may have decided on stays decided.
* A proposal that leaves out more than half of the weight that a voter has held for a while is not voted for; offers and
  ballots heavier than honest ones can be are not heard (`Limits`).

This core has no clock: ``now`` is seconds of any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.waits import Waits
from shoal.training.statements import MAX_ATTEMPTS, MAX_OFFERS, Offer, Proposal, RoundKey, Vote, turn_rank

QUORUM: Final = 2 / 3
LOCK: Final = 1 / 3
FAIR_PART: Final = 1 / 2
MAX_PROPOSALS_EACH: Final = 4
"""That are remembered of one author in one round."""
SPARE_SAMPLES: Final = 1024
"""What the vector steps of a few environments may add to a share."""
MAX_VOTERS: Final = 24
"""Members that vote in one round, of more with stake those with the lowest hashes; with a tenth of liars, less than one
round in a thousand has a third of them among its voters."""
_EPSILON: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """What honest members can say.

    Attributes:
        offer: the heaviest offer, in samples.
        ballot: the heaviest ballot.
    """

    offer: int
    ballot: int

    @classmethod
    def of_batch(cls, batch_size: int) -> Limits:
        """For the batch of a manifest: a share is never more than a batch, and what a late member kept comes on top."""
        return cls(2 * batch_size + SPARE_SAMPLES, 3 * batch_size + SPARE_SAMPLES)


@dataclass(frozen=True, slots=True)
class SignedOffer:
    """An offer, who signed it, and the hash of the record."""

    author: PeerId
    name: bytes
    offer: Offer


@dataclass(frozen=True, slots=True)
class Ballot:
    """What is to be averaged, in the order of the authors.

    Attributes:
        name: see `shoal.training.statements.ballot_name`.
    """

    name: bytes
    offers: tuple[SignedOffer, ...]


# What happens.


@dataclass(frozen=True, slots=True)
class Begin:
    """This learner has arrived at the round.

    Attributes:
        productive_s: how long it collected and optimised for it.
    """

    productive_s: float


@dataclass(frozen=True, slots=True)
class OfferHeard:
    """An offer for this round was signed; this learner's own as well."""

    offer: SignedOffer


@dataclass(frozen=True, slots=True)
class ProposalHeard:
    """A proposal for this round was signed."""

    author: PeerId
    proposal: Proposal


@dataclass(frozen=True, slots=True)
class VoteHeard:
    """A vote in this round was signed."""

    author: PeerId
    vote: Vote


@dataclass(frozen=True, slots=True)
class Held:
    """These bytes are here."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class CannotBeHad:
    """These bytes did not come; they may be asked for again."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class Left:
    """A member is gone, or says that it is at an earlier epoch."""

    author: PeerId


@dataclass(frozen=True, slots=True)
class Joined:
    """Where nobody has shown anything yet: one more who learns."""

    author: PeerId
    stake: float


@dataclass(frozen=True, slots=True)
class Busy:
    """A member says that it does something else now, so that it will not offer soon."""

    author: PeerId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


RoundEvent: TypeAlias = (
    Begin | OfferHeard | ProposalHeard | VoteHeard | Held | CannotBeHad | Left | Joined | Busy | Tick
)

# What to do.


@dataclass(frozen=True, slots=True)
class Obtain:
    """Get these bytes, from their author or any of the others, and say `Held` or `CannotBeHad`."""

    cid: Cid
    sources: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Propose:
    """Sign this proposal and tell everybody."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class Cast:
    """Sign this vote and tell everybody."""

    vote: Vote


@dataclass(frozen=True, slots=True)
class Decide:
    """Average these; all of them are held. The round is over."""

    ballot: Ballot


RoundOutput: TypeAlias = Obtain | Propose | Cast | Decide


@dataclass(slots=True)
class _Proposed:
    author: PeerId
    proposal: Proposal
    name: bytes
    heard_at: float


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
        "_asked",
        "_attempt",
        "_attempt_at",
        "_awaited",
        "_awaited_stake",
        "_began_at",
        "_by_name",
        "_created_at",
        "_gone",
        "_half_at",
        "_heard_at",
        "_held",
        "_held_stake",
        "_held_weight",
        "_known",
        "_last_held_at",
        "_limits",
        "_me",
        "_offers",
        "_own_attempt",
        "_productive_s",
        "_proposals",
        "_stakes",
        "_total",
        "_turn_of",
        "_turns",
        "_voted",
        "_voted_attempt",
        "_votes",
        "_waits",
        "_wake_at",
        "_would_at",
        "decided",
        "key",
        "voters",
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
        """
        self.key = key
        self.decided: Ballot | None = None
        self._me = me
        self._stakes = dict(stakes)
        self._total = sum(self._stakes.values())
        self.voters = voters_of(key, self._stakes)
        """Who votes, and with what stake."""
        self._limits = limits
        self._waits = waits
        self._heard_at = heard_at
        self._created_at = now
        self._began_at: float | None = None
        self._productive_s = 0.0
        self._offers: dict[PeerId, SignedOffer] = {}
        self._by_name: dict[bytes, SignedOffer] = {}
        self._held: set[Cid] = set()
        self._asked: set[Cid] = set()
        self._held_weight = 0
        self._held_stake = 0.0
        self._half_at: float | None = None
        self._last_held_at = now
        self._gone = set(gone)
        self._awaited = self._stakes.keys() - {me} - set(busy) - self._gone
        self._awaited_stake = sum(self._stakes[peer] for peer in self._awaited)
        self._proposals: list[_Proposed] = []
        self._known: dict[bytes, _Known] = {}
        self._votes: dict[PeerId, bytes] = {}
        self._turns: dict[bytes, float] = {}  # stake behind each ballot
        self._voted: bytes | None = None
        self._voted_attempt = -1
        self._own_attempt = -1
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
    def has_begun(self) -> bool:
        """Whether this learner has arrived here."""
        return self._began_at is not None

    @property
    def offers(self) -> Mapping[PeerId, SignedOffer]:
        """What was offered, by author."""
        return self._offers

    @property
    def attempt(self) -> int:
        """How many proposers were passed over."""
        return self._attempt

    def handle(self, event: RoundEvent, now: float) -> list[RoundOutput]:
        """Take in what happened; what is to be done about it."""
        outputs: list[RoundOutput] = []
        if isinstance(event, Begin):
            self._began_at, self._productive_s = now, event.productive_s
        if self.decided is not None:
            return outputs
        match event:
            case VoteHeard(author, vote):
                if not self._take_vote(author, vote.ballot):
                    return outputs
            case OfferHeard(offer):
                if not self._take_offer(offer, now, outputs):
                    return outputs
            case Held(cid):
                self._take_bytes(cid, now)
            case ProposalHeard(author, proposal):
                self._take_proposal(author, proposal, now, outputs)
            case CannotBeHad(cid):
                self._asked.discard(cid)
                self._ask_again(cid, outputs)
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
        if signed.author in self._offers or offer.key != self.key or offer.weight > self._limits.offer:
            return False
        if len(self._offers) >= 2 * MAX_OFFERS and signed.author not in self._stakes:
            return False
        self._offers[signed.author] = signed
        self._turn_of.clear()
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
        for signed in self._offers.values():
            if signed.offer.cid == cid:
                self._count_held(signed, now)
        for known in self._known.values():
            known.lacks.discard(cid)

    def _count_held(self, signed: SignedOffer, now: float) -> None:
        self._held_weight += signed.offer.weight
        self._last_held_at = now
        self._stop_waiting_for(signed.author)
        self._held_stake += self._stakes.get(signed.author, 0.0)
        if self._half_at is None and self._held_stake >= self._total / 2 - _EPSILON:
            self._half_at = now

    def _take_proposal(self, author: PeerId, proposal: Proposal, now: float, outputs: list[RoundOutput]) -> None:
        mine = [each for each in self._proposals if each.author == author]
        if proposal.key != self.key or len(mine) >= MAX_PROPOSALS_EACH:
            return
        if any(each.proposal.attempt == proposal.attempt for each in mine):
            return  # the first word of an author on an attempt is the one that counts
        if author not in self._stakes and author not in self._offers:
            return
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
        self._known[proposed.name] = _Known(Ballot(proposed.name, tuple(found)), weight, lacks)
        for cid in sorted(lacks - self._asked):
            self._ask_again(cid, outputs)

    def _ask_again(self, cid: Cid, outputs: list[RoundOutput]) -> None:
        """Of whoever must hold it: the voters and proposers of a ballot that lists it."""
        if cid in self._held or cid in self._asked:
            return
        names = {name for name, known in self._known.items() if cid in known.lacks}
        if not names:
            return
        sources = [author for author, name in self._votes.items() if name in names]
        sources += [each.author for each in self._proposals if each.name in names]
        sources += [author for author, signed in self._offers.items() if signed.offer.cid == cid]
        sources = [peer for peer in dict.fromkeys(sources) if peer != self._me and peer not in self._gone]
        if sources:
            self._asked.add(cid)
            outputs.append(Obtain(cid, tuple(sources)))

    def _take_vote(self, author: PeerId, name: bytes) -> bool:
        before = self._votes.get(author)
        if before == name:
            return False
        stake = self._stake(author)
        if stake == 0.0:
            return False
        if before is not None:
            self._turns[before] -= stake
        self._votes[author] = name
        self._turns[name] = self._turns.get(name, 0.0) + stake
        return True

    def _stake(self, peer: PeerId) -> float:
        return self.voters.get(peer, 0.0)

    def _join(self, author: PeerId, stake: float) -> None:
        self._gone.discard(author)
        if author in self._stakes or len(self._stakes) >= MAX_OFFERS:
            return
        self._stakes[author] = stake
        self._total += stake
        self.voters = voters_of(self.key, self._stakes)
        self._turn_of.clear()
        if author in self._offers and self._offers[author].offer.cid in self._held:
            self._held_stake += stake
        elif not self.has_begun:
            self._awaited.add(author)
            self._awaited_stake += stake

    def _leave(self, author: PeerId) -> None:
        self._gone.add(author)
        self._stop_waiting_for(author)
        self._turn_of.clear()
        if self._me not in self._stakes and self._gone.issuperset(self._stakes):
            # Nobody who has shown anything is left: those who are there count alike.
            self._stakes = dict.fromkeys([self._me, *(peer for peer in self._offers if peer not in self._gone)], 1.0)
            self._total = float(len(self._stakes))
            self.voters = voters_of(self.key, self._stakes)

    def _stop_waiting_for(self, author: PeerId) -> None:
        if author in self._awaited:
            self._awaited.discard(author)
            self._awaited_stake -= self._stakes[author]

    # Deciding.

    def _plan(self, now: float, outputs: list[RoundOutput]) -> None:
        self._advance(now)
        self._vote(now, outputs)
        self._propose(now, outputs)
        self._decide(now, outputs)

    def _decide(self, now: float, outputs: list[RoundOutput]) -> None:
        if not self._turns:
            return
        need: float | None = None
        for name, stake in self._turns.items():
            known = self._known.get(name)
            if stake <= 0 or known is None or known.lacks:
                continue
            if need is None:
                need = QUORUM * self._reckoned(now)
            if stake >= need - _EPSILON:
                self.decided = known.ballot
                self._learn(known.ballot, now)
                outputs.append(Decide(known.ballot))
                return

    def _reckoned(self, now: float) -> float:
        """The stake of those who can be expected to vote, and of those who did."""
        silence_s = self._waits.silence_s
        is_late = self._attempt > 0
        total = 0.0
        for peer, stake in self.voters.items():
            is_silent = is_late and self._heard_at.get(peer, self._created_at) < now - 2 * silence_s
            if peer in self._votes or peer == self._me or not (is_silent or peer in self._gone):
                total += stake
        return total

    def _vote(self, now: float, outputs: list[RoundOutput]) -> None:
        if self._voted_attempt >= self._attempt or not self._proposals or self._stake(self._me) == 0.0:
            return
        for proposed in self._proposals:
            attempt = proposed.proposal.attempt
            if not self._voted_attempt < attempt <= self._attempt:
                continue
            known = self._known.get(proposed.name)
            if known is None or known.lacks or not self._may_propose(proposed.author, attempt):
                continue
            if not self._is_fair(known) or not self._may_leave_for(proposed.name, now):
                continue
            self._cast(proposed.name, attempt, outputs)
            return

    def _cast(self, name: bytes, attempt: int, outputs: list[RoundOutput]) -> None:
        self._voted, self._voted_attempt = name, attempt
        self._take_vote(self._me, name)
        outputs.append(Cast(Vote(key=self.key, ballot=name)))

    def _may_leave_for(self, name: bytes, now: float) -> bool:
        if self._voted is None or self._voted == name:
            return True
        behind = self._turns.get(self._voted, 0.0)
        return behind < LOCK * self._reckoned(now) or self._turns.get(name, 0.0) >= behind

    def _is_fair(self, known: _Known) -> bool:
        """Whether it leaves out no more than half of what is held and would have fitted."""
        return known.weight >= FAIR_PART * min(self._held_weight, self._limits.ballot)

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

    def _may_propose(self, author: PeerId, attempt: int) -> bool:
        return self._turn(attempt) == author

    def _would(self, now: float) -> float:
        """When this learner would propose, were it its turn; infinity while that is open."""
        if self._began_at is None:
            return self._half_at + self._waits.offers_s if self._half_at is not None else float("inf")
        if not self._awaited:
            return self._began_at
        worth = float("inf")
        if self._held_weight:
            worth = self._began_at + self._productive_s * self._awaited_stake / self._held_weight
        if self._half_at is None:
            return worth
        return min(worth, max(self._half_at, self._began_at) + self._waits.offers_s)

    def _advance(self, now: float) -> None:
        """Keep the clock of attempts."""
        if self._attempt_at is None:
            would = self._would(now)
            if now < would:
                self._wake_at = would
                return
            self._attempt_at = self._would_at = now
        silence_s = self._waits.silence_s
        while now >= self._attempt_at + silence_s and self._attempt < MAX_ATTEMPTS:
            self._attempt += 1
            self._attempt_at += silence_s
            if self._attempt_at + silence_s < now:  # after a sleep
                self._attempt_at = now
        self._wake_at = self._attempt_at + silence_s

    def _propose(self, now: float, outputs: list[RoundOutput]) -> None:
        if self._began_at is None or self._attempt_at is None or self._own_attempt >= self._attempt:
            return
        if self._voted_attempt >= self._attempt or self._turn(self._attempt) != self._me:
            return
        names = self._names_to_propose(now)
        if not names:
            return
        proposal = Proposal(key=self.key, attempt=self._attempt, offers=names)
        self._own_attempt = self._attempt
        outputs.append(Propose(proposal))
        proposed = _Proposed(self._me, proposal, proposal.ballot, now)
        self._proposals.append(proposed)
        self._complete(proposed, outputs)
        if self._stake(self._me) > 0.0 and self._may_leave_for(proposed.name, now):
            self._cast(proposed.name, self._attempt, outputs)

    def _names_to_propose(self, now: float) -> tuple[bytes, ...]:
        """The ballot that a third stands behind, or else all that is held and fits, those with stake first."""
        locked = max(self._turns, key=lambda name: (self._turns[name], name), default=None)
        if locked is not None and self._turns[locked] >= LOCK * self._reckoned(now):
            known = self._known.get(locked)
            if known is not None and not known.lacks:
                return tuple(sorted(each.name for each in known.ballot.offers))
        held = [
            each for each in self._offers.values() if each.offer.cid in self._held and each.author not in self._gone
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
        if others and self._began_at is not None and self._attempt == 0 and self._would_at is not None:
            reference = self._began_at if self._half_at is None else max(self._half_at, self._began_at)
            self._waits.learn(self._last_held_at - reference, now - self._would_at)


def voters_of(key: RoundKey, stakes: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """Who votes in a round, and with what stake: everybody, or the `MAX_VOTERS` whose hashes are the lowest."""
    if len(stakes) <= MAX_VOTERS:
        return dict(stakes)
    chosen = sorted(stakes, key=lambda peer: turn_rank("vote", key, 0, peer))[:MAX_VOTERS]
    return {peer: stakes[peer] for peer in chosen}
