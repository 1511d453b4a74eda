"""Learners in one round, with the messages between them carried by hand: what they wait for, vote for and decide."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pytest

from shoal.protocol.ids import Cid, PeerId
from shoal.training.batch import Batch
from shoal.training.exchange.ballots import (
    BALLOT_BATCHES,
    SPARE_SAMPLES,
    Ballot,
    Begin,
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
    SignedOffer,
    Tick,
    VoteHeard,
)
from shoal.training.exchange.rounds import IDLE_ATTEMPTS, Round
from shoal.training.exchange.waits import Waits
from shoal.training.statements import NO_BALLOT, Offer, Proposal, RoundKey, Vote, first_after, turn_rank

KEY = RoundKey(4, 0, first_after(Cid.of_block(b"policy")))
BATCH = 400
LIMITS = Limits.of_batch(Batch(BATCH, together=BATCH), None)
SILENCE_S = 1.0
OFFERS_S = 0.5


def by_turn(number: int, attempt: int = 0) -> list[PeerId]:
    peers = [PeerId.of_public_key(bytes([n]) * 32) for n in range(number)]
    return sorted(peers, key=lambda peer: turn_rank("round", KEY, attempt, peer))


FIRST, SECOND, THIRD, FOURTH = by_turn(4)
"""In the order of their turns in the first attempt."""


def learned() -> Waits:
    waits = Waits()
    for _ in range(8):
        waits.learn(OFFERS_S, SILENCE_S)
    return waits


def test_those_who_have_shown_nothing_never_outweigh_what_is_usual_by_more_than_so_much() -> None:
    """Item 2: 116 invented authors had a weight of 950,272 where the batch was 2,048."""
    limits = Limits.of_batch(Batch(2048), 3 * 2048)
    assert limits.ballot == BALLOT_BATCHES * 3 * 2048 + SPARE_SAMPLES
    assert Limits.of_batch(Batch(2048), 1.0).ballot == BALLOT_BATCHES * 2048 + SPARE_SAMPLES


def test_a_ballot_of_a_batch_that_is_bounded_for_all_weighs_no_more_however_many_learn() -> None:
    bounded = Batch(2048, together=2048)
    assert Limits.of_batch(bounded, 100 * 2048).ballot == Limits.of_batch(bounded, None).ballot


def offer_of(peer: PeerId, weight: int = 100) -> SignedOffer:
    name = hashlib.sha256(f"{peer} {weight}".encode()).digest()
    return SignedOffer(peer, name, Offer(key=KEY, cid=Cid.of_block(name), weight=weight, seconds=1.0))


class Table:
    """Learners around a table: all of what one says reaches every other that is there, at once and in order."""

    def __init__(
        self,
        stakes: dict[PeerId, float],
        *,
        peers: Iterable[PeerId] | None = None,
        idle: dict[PeerId, set[PeerId]] | None = None,
    ) -> None:
        self.now = 0.0
        self.heard_at: dict[PeerId, dict[PeerId, float]] = {}
        self.rounds: dict[PeerId, Round] = {}
        self.decided: dict[PeerId, Ballot] = {}
        self.said: list[tuple[PeerId, Proposal | Vote]] = []
        self.deaf: set[tuple[PeerId, PeerId]] = set()
        """Who does not hear whom."""
        self.idle: dict[PeerId, set[PeerId]] = {} if idle is None else idle
        for peer in stakes if peers is None else peers:
            self.heard_at[peer] = dict.fromkeys(stakes, 0.0)
            idle_of = self.idle.setdefault(peer, set())
            self.rounds[peer] = Round(
                peer, KEY, stakes, LIMITS, learned(), 0.0, heard_at=self.heard_at[peer], idle=idle_of
            )

    def give(self, peer: PeerId, event: RoundEvent) -> None:
        """One event for one learner, and all that comes of it."""
        for output in self.rounds[peer].handle(event, self.now):
            match output:
                case Obtain(cid, sources):
                    is_given = any(source in self.rounds and (peer, source) not in self.deaf for source in sources)
                    self.give(peer, Held(cid) if is_given else CannotBeHad(cid))
                case Propose(proposal):
                    self.said.append((peer, proposal))
                    self.tell(peer, ProposalHeard(peer, proposal))
                case Cast(vote):
                    self.said.append((peer, vote))
                    self.tell(peer, VoteHeard(peer, vote))
                case Decide(ballot):
                    assert peer not in self.decided
                    self.decided[peer] = ballot

    def tell(self, author: PeerId, event: RoundEvent) -> None:
        """Something that everybody hears but its author."""
        for peer in list(self.rounds):
            if peer != author and (peer, author) not in self.deaf:
                self.heard_at[peer][author] = self.now
                self.give(peer, event)

    def arrive(self, *peers: PeerId, weight: int = 100, begins: bool = True) -> None:
        """These offer."""
        for peer in peers:
            offer = OfferHeard(offer_of(peer, weight))
            if peer in self.rounds:
                self.give(peer, offer)
            self.tell(peer, offer)
            if peer in self.rounds and begins:
                self.give(peer, Begin(1.0))

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while (
            at := min((each.next_wake for peer, each in self.rounds.items() if peer not in self.decided), default=until)
        ) < until:
            self.now = max(self.now + 1e-3, at)
            for peer in list(self.rounds):
                self.give(peer, Tick())
        self.now = until
        for peer in list(self.rounds):
            self.give(peer, Tick())

    def die(self, peer: PeerId, *, is_noticed: bool = True) -> None:
        """One is gone."""
        del self.rounds[peer]
        if is_noticed:
            for other in list(self.rounds):
                self.give(other, Left(peer))

    def proposers(self) -> list[PeerId]:
        return [author for author, each in self.said if isinstance(each, Proposal)]

    def authors(self, peer: PeerId) -> set[PeerId]:
        return {each.author for each in self.decided[peer].offers}


def table_of(*peers: PeerId, **kwargs: object) -> Table:
    return Table(dict.fromkeys(peers, 100.0))


def test_a_learner_that_is_alone_decides_at_once_on_its_own_offer() -> None:
    table = table_of(FIRST)
    table.arrive(FIRST)
    assert table.authors(FIRST) == {FIRST}


def test_all_decide_on_the_same_ballot_when_all_have_offered_and_nobody_waits() -> None:
    table = table_of(FIRST, SECOND, THIRD)
    table.arrive(THIRD, SECOND, FIRST)
    assert table.now == 0.0
    assert set(table.decided) == {FIRST, SECOND, THIRD}
    assert len({ballot.name for ballot in table.decided.values()}) == 1
    assert table.authors(FIRST) == {FIRST, SECOND, THIRD}
    assert table.proposers() == [FIRST]


def test_a_round_that_is_decided_proposes_and_votes_no_more() -> None:
    table = table_of(FIRST, SECOND)
    table.arrive(FIRST, SECOND)
    before = list(table.said)
    table.wait(60.0)
    assert table.said == before


HEAVY = {FIRST: 100.0, SECOND: 100.0, THIRD: 150.0}


def heard_of_all_the_time(table: Table, idler: PeerId, event: RoundEvent | None = None) -> None:
    """One offers, and says this, and is heard of from then on, and has no part in what is decided."""
    table.arrive(FIRST, SECOND, idler)
    if event is not None:
        table.tell(idler, event)
    while len(table.decided) < len(table.rounds):
        for heard_at in table.heard_at.values():
            heard_at[idler] = table.now
        table.wait(SILENCE_S / 10)
        assert table.now < 60.0


@pytest.mark.parametrize(
    "event", [None, Committed(THIRD, hashlib.sha256(b"what nobody proposed").digest())], ids=["silent", "committed"]
)
def test_one_with_a_third_of_the_stake_that_votes_for_nothing_holds_the_others_up_once(
    event: RoundEvent | None,
) -> None:
    """It was waited for as long as it was heard of, in every round: for ever."""
    table = Table(HEAVY, peers=(FIRST, SECOND))
    heard_of_all_the_time(table, THIRD, event)
    assert table.now < 5 * SILENCE_S
    assert len({ballot.name for ballot in table.decided.values()}) == 1
    assert table.idle == {FIRST: {THIRD}, SECOND: {THIRD}}
    after = Table(HEAVY, peers=(FIRST, SECOND), idle=table.idle)
    heard_of_all_the_time(after, THIRD, event)
    assert after.now < SILENCE_S / 5


def test_one_that_promises_and_votes_for_nothing_is_left_out_in_the_end() -> None:
    table = Table(HEAVY, peers=(FIRST, SECOND))
    for attempt in range(1, 2 * IDLE_ATTEMPTS):
        table.tell(THIRD, VoteHeard(THIRD, Vote(key=KEY, attempt=attempt, ballot=NO_BALLOT, cast=0)))
    heard_of_all_the_time(table, THIRD)
    assert len({ballot.name for ballot in table.decided.values()}) == 1


def test_who_was_left_out_counts_again_when_it_votes_again() -> None:
    table = Table(HEAVY, idle={FIRST: {THIRD}, SECOND: {THIRD}})
    table.arrive(THIRD, SECOND, FIRST)
    assert set(table.decided) == {FIRST, SECOND, THIRD}
    assert table.idle[FIRST] == table.idle[SECOND] == set()


def test_who_is_late_is_waited_for_only_as_long_as_it_is_worth() -> None:
    """Item 7: one of a hundredth of the stake holds nobody up for more than a hundredth of the time."""
    table = Table({FIRST: 100.0, SECOND: 1.0})
    table.arrive(FIRST)
    table.wait(0.011)
    assert table.authors(FIRST) == {FIRST}


def test_of_equals_the_last_one_is_waited_for_as_others_were_before() -> None:
    """Item 4, ATTACKS row 15: not longer, however often it is late."""
    table = table_of(FIRST, SECOND, THIRD, FOURTH)
    table.arrive(FIRST, SECOND, THIRD)
    table.wait(0.9 / 3)  # what is missing is worth a third of the second that the others worked
    assert not table.decided
    table.wait(OFFERS_S)
    assert table.authors(FIRST) == {FIRST, SECOND, THIRD}


def test_rounds_in_which_one_is_late_do_not_make_the_waits_longer() -> None:
    """Item 4, ATTACKS row 15: from 0.75 s to 30 s in 30 rounds, for ever."""
    waits = learned()
    before = waits.offers_s
    for _ in range(60):
        heard_at = dict.fromkeys((FIRST, SECOND, THIRD), 0.0)
        one = Round(FIRST, KEY, dict.fromkeys(heard_at, 100.0), LIMITS, waits, 0.0, heard_at=heard_at)
        second = offer_of(SECOND)
        one.handle(OfferHeard(offer_of(FIRST)), 0.0)
        one.handle(Begin(1.0), 0.0)
        one.handle(OfferHeard(second), 0.1)
        one.handle(Held(second.offer.cid), 0.1)
        now, said = 0.1, one.handle(Tick(), 0.1)
        while not any(isinstance(output, Propose) for output in said):
            now = max(now + 0.01, one.next_wake)
            assert now < 5.0
            said = one.handle(Tick(), now)
        ballot = next(output.proposal.ballot for output in said if isinstance(output, Propose))
        one.handle(VoteHeard(SECOND, Vote(key=KEY, ballot=ballot)), now + 0.05)
        assert one.decided is not None
    assert waits.offers_s <= before


def test_when_the_proposer_is_silent_the_next_one_proposes() -> None:
    table = table_of(FIRST, SECOND, THIRD)
    table.arrive(FIRST, begins=False)  # it offered, and then its core hangs
    table.die(FIRST, is_noticed=False)
    table.arrive(SECOND, THIRD)
    assert not table.decided
    table.wait(SILENCE_S * 10)
    assert table.decided[SECOND].name == table.decided[THIRD].name


@pytest.mark.parametrize("is_noticed", [True, False])
def test_the_last_survivor_goes_on_alone(is_noticed: bool) -> None:
    """Item 10, ATTACKS row 1: it stood still for ever."""
    table = table_of(FIRST, SECOND)
    table.arrive(SECOND)
    table.die(FIRST, is_noticed=is_noticed)
    table.wait(12 * SILENCE_S)
    assert table.authors(SECOND) == {SECOND}


def test_whose_turn_it_is_not_is_not_heard() -> None:
    """Item 2, ATTACKS row 4."""
    table = table_of(FIRST, SECOND, THIRD)
    table.arrive(SECOND, begins=False)
    table.tell(THIRD, OfferHeard(offer_of(THIRD)))
    usurped = Proposal(key=KEY, attempt=0, offers=(offer_of(THIRD).name,))
    turn = min((SECOND, THIRD), key=lambda peer: turn_rank("round", KEY, 0, peer))
    table.give(FIRST, OfferHeard(offer_of(FIRST)))
    assert turn != FIRST
    table.tell(THIRD, ProposalHeard(THIRD, usurped))
    assert not [each for author, each in table.said if isinstance(each, Vote)]


def test_a_proposal_of_offers_that_nobody_signed_gathers_no_votes() -> None:
    """Items 1 and 2, ATTACKS rows 3 and 4: invented authors, and other members' names under one's own bytes."""
    table = Table(dict.fromkeys((FIRST, SECOND, THIRD), 100.0), peers=(SECOND, THIRD))
    table.arrive(FIRST)
    invented = tuple(sorted(hashlib.sha256(b"%d" % n).digest() for n in range(116)))
    table.tell(FIRST, ProposalHeard(FIRST, Proposal(key=KEY, attempt=0, offers=invented)))
    table.arrive(SECOND, THIRD)
    assert not table.decided
    table.wait(8 * SILENCE_S)
    assert {SECOND, THIRD} <= table.authors(SECOND)
    assert table.decided[SECOND].name == table.decided[THIRD].name


def test_a_proposal_that_leaves_out_more_than_half_is_not_voted_for() -> None:
    table = table_of(FIRST, SECOND, THIRD, FOURTH)
    table.arrive(FIRST, SECOND, THIRD, begins=False)
    table.tell(FIRST, ProposalHeard(FIRST, Proposal(key=KEY, attempt=0, offers=(offer_of(FIRST).name,))))
    assert not [each for _, each in table.said if isinstance(each, Vote)]


def test_an_offer_heavier_than_a_learner_can_make_is_not_heard() -> None:
    """Item 2: four batches of samples were accepted, of each of 116 names."""
    table = table_of(FIRST, SECOND)
    table.tell(SECOND, OfferHeard(offer_of(SECOND, LIMITS.offer + 1)))
    assert SECOND not in table.rounds[FIRST].offers


def test_a_newcomer_that_has_shown_nothing_is_averaged_but_has_no_vote() -> None:
    table = Table({FIRST: 100.0, SECOND: 100.0}, peers=(FIRST, SECOND, THIRD))
    table.arrive(THIRD)
    table.arrive(FIRST, SECOND)
    assert table.authors(FIRST) == {FIRST, SECOND, THIRD}
    assert THIRD not in [author for author, each in table.said if isinstance(each, Vote)]


def test_where_nobody_has_shown_anything_who_joins_counts_like_the_others() -> None:
    table = table_of(FIRST)
    table.give(FIRST, Joined(SECOND, 100.0))
    table.arrive(FIRST)
    table.wait(OFFERS_S / 2)
    assert not table.decided


def test_what_one_decided_on_stays_decided_when_the_others_never_heard_the_votes() -> None:
    """The one that decided lives on: the others come to the same ballot in a later attempt."""
    table = table_of(FIRST, SECOND, THIRD)
    table.deaf = {(THIRD, FIRST), (THIRD, SECOND), (SECOND, FIRST)}
    table.arrive(THIRD, SECOND, FIRST)
    # FIRST proposes; nobody but itself knows. Then only SECOND hears of it, votes, and FIRST decides.
    table.deaf = {(THIRD, FIRST), (THIRD, SECOND)}
    proposal = next(each for _, each in table.said if isinstance(each, Proposal))
    for offer in (FIRST, SECOND, THIRD):
        table.give(SECOND, OfferHeard(offer_of(offer)))
    table.give(SECOND, ProposalHeard(FIRST, proposal))
    assert FIRST in table.decided
    assert THIRD not in table.decided
    table.deaf = set()
    for author in (FIRST, SECOND):
        table.give(THIRD, OfferHeard(offer_of(author)))
    table.wait(12 * SILENCE_S)
    assert {ballot.name for ballot in table.decided.values()} == {table.decided[FIRST].name}
    assert set(table.decided) == {FIRST, SECOND, THIRD}


def test_an_earlier_life_that_may_have_voted_has_no_say_in_the_first_attempt() -> None:
    heard_at = dict.fromkeys((FIRST, SECOND), 0.0)
    one = Round(
        FIRST, KEY, dict.fromkeys(heard_at, 100.0), LIMITS, learned(), 0.0, heard_at=heard_at, may_have_voted=True
    )
    offer = offer_of(SECOND)
    said = [one.handle(OfferHeard(offer_of(FIRST)), 0.0), one.handle(Begin(1.0), 0.0)]
    said += [one.handle(OfferHeard(offer), 0.0), one.handle(Held(offer.offer.cid), 0.0)]
    assert not [each for outputs in said for each in outputs if isinstance(each, Propose | Cast)]
    later = one.handle(Tick(), SILENCE_S * 1.01)
    assert [each for each in later if isinstance(each, Cast)]


def test_who_says_what_it_made_of_a_ballot_voted_for_it() -> None:
    table = Table({FIRST: 200.0, SECOND: 100.0}, peers=(SECOND,))
    table.arrive(FIRST, SECOND)
    proposal = Proposal(key=KEY, attempt=0, offers=tuple(sorted(offer_of(each).name for each in (FIRST, SECOND))))
    table.heard_at[FIRST] = {}
    table.rounds[FIRST] = Round(FIRST, KEY, {}, LIMITS, learned(), 0.0, heard_at={})  # so that its bytes can be had
    table.give(SECOND, ProposalHeard(FIRST, proposal))
    assert table.decided == {}
    table.give(SECOND, Committed(FIRST, proposal.ballot))
    assert table.decided[SECOND].name == proposal.ballot


def test_bytes_that_did_not_come_are_asked_for_of_those_who_voted_for_them() -> None:
    heard_at = dict.fromkeys((FIRST, SECOND, THIRD), 0.0)
    one = Round(THIRD, KEY, dict.fromkeys(heard_at, 100.0), LIMITS, learned(), 0.0, heard_at=heard_at)
    offers = [offer_of(FIRST), offer_of(SECOND)]
    for each in offers:
        assert one.handle(OfferHeard(each), 0.0) == [Obtain(each.offer.cid, (each.author,))]
    proposal = Proposal(key=KEY, attempt=0, offers=tuple(sorted(each.name for each in offers)))
    one.handle(ProposalHeard(FIRST, proposal), 0.0)
    one.handle(Left(FIRST), 0.0)
    one.handle(VoteHeard(SECOND, Vote(key=KEY, ballot=proposal.ballot)), 0.0)
    one.handle(CannotBeHad(offers[0].offer.cid), 0.0)
    assert one.next_wake < SILENCE_S
    assert one.handle(Tick(), one.next_wake) == [Obtain(offers[0].offer.cid, (SECOND,))]


def test_a_learner_that_slept_does_not_run_through_all_the_attempts_it_missed() -> None:
    table = table_of(FIRST, SECOND)
    table.arrive(SECOND)
    one = table.rounds[SECOND]
    one.handle(Tick(), 1000.0)
    attempt = one.attempt
    assert attempt <= 2
    one.handle(Tick(), 1000.0 + SILENCE_S / 2)
    assert one.attempt <= attempt + 1
