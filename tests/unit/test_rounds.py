"""One learner's part in one round, fed by hand: what it waits for, whom it passes over, what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.exchange.rounds import (
    FIRST_PATIENCE_S,
    MAX_PATIENCE_S,
    MIN_PATIENCE_S,
    Decide,
    Fetch,
    LearnerView,
    Offer,
    Output,
    Patience,
    Proposal,
    Propose,
    Round,
    RoundKey,
    choose,
    rendezvous_rank,
)

SWARM = SwarmId.of_manifest(b"a run")
KEY = RoundKey(4, 2)
PATIENCE_S = 1.0

# By rank in this round: FIRST proposes, then SECOND, and so on.
FIRST, SECOND, THIRD, FOURTH = sorted(
    (PeerId.of_public_key(bytes([n]) * 32) for n in range(4)),
    key=lambda peer: rendezvous_rank(SWARM, "round", KEY.epoch, KEY.step, peer),
)
ABSENT = LearnerView(RoundKey(KEY.epoch, 0))
EMPTY_HANDED = LearnerView(KEY, is_ready=True)


def offer_of(peer: PeerId, weight: int = 10) -> Offer:
    return Offer(peer, Cid.of_block(peer.encode()), weight)


def offering(peer: PeerId, proposal: Proposal | None = None) -> LearnerView:
    return LearnerView(KEY, is_ready=True, offer=offer_of(peer), proposal=proposal)


def proposal_of(*peers: PeerId, attempt: int = 0) -> Proposal:
    return Proposal(KEY.epoch, KEY.step, attempt, tuple(sorted(map(offer_of, peers), key=lambda offer: offer.author)))


def round_of(me: PeerId, *, offers: bool = True) -> Round:
    return Round(SWARM, me, KEY, offer_of(me) if offers else None, PATIENCE_S, now=0.0)


def round_holding(me: PeerId, *peers: PeerId, offers: bool = True) -> Round:
    """A round in which the offers of these peers have been fetched."""
    one = round_of(me, offers=offers)
    for peer in peers:
        one.hold(offer_of(peer).cid)
    return one


def without_fetches(outputs: list[Output]) -> list[Output]:
    return [output for output in outputs if not isinstance(output, Fetch)]


def test_a_learner_that_is_alone_decides_at_once_on_its_own_offer() -> None:
    alone = proposal_of(FIRST)
    assert round_of(FIRST).update({}, now=0.0) == [Propose(alone), Decide(alone)]


def test_a_round_that_is_decided_says_nothing_more() -> None:
    one = round_of(FIRST)
    one.update({}, now=0.0)
    assert one.update({SECOND: offering(SECOND)}, now=1.0) == []


def test_the_proposer_fetches_an_offer_from_its_author_then_proposes_both_in_the_order_of_authors() -> None:
    one = round_of(FIRST)
    views = {SECOND: offering(SECOND)}
    assert one.update(views, now=0.0) == [Fetch(offer_of(SECOND), (SECOND,))]
    assert one.update(views, now=0.1) == []
    one.hold(offer_of(SECOND).cid)
    both = proposal_of(FIRST, SECOND)
    assert one.update(views, now=0.2) == [Propose(both), Decide(both)]
    assert [offer.author for offer in both.offers] == sorted([FIRST, SECOND])


def test_the_proposer_waits_for_those_who_are_still_on_their_way() -> None:
    one = round_holding(FIRST, SECOND)
    views = {SECOND: offering(SECOND), THIRD: ABSENT}
    assert one.update(views, now=0.0) == []
    one.hold(offer_of(THIRD).cid)
    everybody = proposal_of(FIRST, SECOND, THIRD)
    assert one.update({**views, THIRD: offering(THIRD)}, now=0.5) == [Propose(everybody), Decide(everybody)]


def test_the_proposer_does_not_wait_for_an_offer_of_one_that_has_none() -> None:
    one = round_holding(FIRST, SECOND)
    both = proposal_of(FIRST, SECOND)
    assert Decide(both) in one.update({SECOND: offering(SECOND), THIRD: EMPTY_HANDED}, now=0.0)


def test_the_proposer_does_not_wait_for_learners_of_another_epoch_or_ahead() -> None:
    one = round_of(FIRST)
    elsewhere = {
        SECOND: LearnerView(RoundKey(KEY.epoch - 1, 0)),
        THIRD: LearnerView(RoundKey(KEY.epoch + 1, 0)),
        FOURTH: LearnerView(RoundKey(KEY.epoch, KEY.step + 1)),
    }
    assert Decide(proposal_of(FIRST)) in one.update(elsewhere, now=0.0)


def test_a_silent_learner_is_left_out_after_the_wait() -> None:
    one = round_holding(FIRST, SECOND)
    views = {SECOND: offering(SECOND), THIRD: ABSENT}
    assert one.update(views, now=0.99 * PATIENCE_S) == []
    assert one.next_wake == pytest.approx(PATIENCE_S)
    assert one.update(views, now=PATIENCE_S) == [
        Propose(proposal_of(FIRST, SECOND)),
        Decide(proposal_of(FIRST, SECOND)),
    ]


def test_an_offer_that_is_not_here_in_time_is_left_out() -> None:
    one = round_of(FIRST)
    views = {SECOND: offering(SECOND)}
    one.update(views, now=0.0)
    assert Decide(proposal_of(FIRST)) in one.update(views, now=PATIENCE_S)


def test_who_is_not_the_proposer_waits_for_it() -> None:
    one = round_holding(SECOND, FIRST)
    assert one.update({FIRST: offering(FIRST)}, now=0.0) == []
    assert one.update({FIRST: offering(FIRST)}, now=1.99 * PATIENCE_S) == []


def test_a_proposer_seen_to_be_gone_makes_the_next_hash_propose_at_once() -> None:
    one = round_holding(SECOND, FIRST, THIRD)
    views = {FIRST: offering(FIRST), THIRD: offering(THIRD)}
    assert one.update(views, now=0.0) == []
    del views[FIRST]
    rest = proposal_of(SECOND, THIRD)
    assert one.update(views, now=0.01) == [Propose(rest), Decide(rest)]


def test_a_silent_proposer_is_passed_over_only_after_it_had_the_time_to_leave_others_out() -> None:
    one = round_holding(SECOND, THIRD)
    views = {FIRST: ABSENT, THIRD: offering(THIRD)}
    one.update(views, now=0.0)
    assert one.next_wake == pytest.approx(2 * PATIENCE_S)
    rest = proposal_of(SECOND, THIRD, attempt=1)
    assert one.update(views, now=2 * PATIENCE_S) == [Propose(rest), Decide(rest)]


def test_whoever_passed_over_a_proposer_still_takes_its_late_proposal() -> None:
    one = round_holding(THIRD, FIRST)
    views = {FIRST: offering(FIRST), SECOND: ABSENT}
    one.update(views, now=0.0)
    one.update(views, now=2 * PATIENCE_S)
    late = proposal_of(FIRST, THIRD)
    outputs = one.update({**views, FIRST: offering(FIRST, late)}, now=2.1 * PATIENCE_S)
    assert outputs == [Propose(late), Decide(late)]


def test_what_is_accepted_is_said_again_and_fetched_from_whoever_may_hold_it() -> None:
    one = round_of(SECOND)
    said = proposal_of(FIRST, SECOND, THIRD)
    outputs = one.update({FIRST: offering(FIRST, said), THIRD: offering(THIRD)}, now=0.0)
    anywhere = (FIRST, THIRD)
    assert outputs[0] == Propose(said)
    assert set(outputs[1:]) == {Fetch(offer_of(FIRST), anywhere), Fetch(offer_of(THIRD), anywhere)}
    one.hold(offer_of(FIRST).cid)
    assert one.update({}, now=0.1) == []
    one.hold(offer_of(THIRD).cid)
    assert one.update({}, now=0.2) == [Decide(said)]


def test_a_proposal_outlives_its_proposer_in_the_presence_of_those_who_went_on_with_it() -> None:
    one = round_holding(SECOND, FIRST, THIRD)
    said = proposal_of(FIRST, SECOND, THIRD)
    gone_on = LearnerView(RoundKey(KEY.epoch + 1, 0), proposal=said)
    assert one.update({THIRD: gone_on}, now=0.0) == [Propose(said), Decide(said)]


def test_a_fetch_that_failed_is_tried_again_and_not_before() -> None:
    one = round_of(SECOND)
    views = {FIRST: offering(FIRST)}
    ask = Fetch(offer_of(FIRST), (FIRST,))
    assert one.update(views, now=0.0) == [ask]
    assert one.update(views, now=0.1) == []
    one.spoil(offer_of(FIRST).cid)
    assert one.update(views, now=0.2) == [ask]


def test_an_accepted_proposal_that_cannot_be_fetched_is_given_up_for_the_next_attempt() -> None:
    one = round_holding(SECOND, THIRD)
    lost = proposal_of(FIRST, SECOND, THIRD)
    views = {FIRST: offering(FIRST, lost), THIRD: offering(THIRD)}
    assert Propose(lost) in one.update(views, now=0.5)
    assert one.next_wake == pytest.approx(0.5 + 2 * PATIENCE_S)
    views[FIRST] = LearnerView(KEY, proposal=lost)
    rest = proposal_of(SECOND, THIRD, attempt=1)
    assert without_fetches(one.update(views, now=one.next_wake)) == [Propose(rest), Decide(rest)]


def test_of_competing_proposals_everybody_with_the_same_view_takes_the_same() -> None:
    small, big, late = proposal_of(FIRST), proposal_of(SECOND, THIRD), proposal_of(FIRST, SECOND, THIRD, attempt=1)
    says = {FIRST: offering(FIRST, small), SECOND: offering(SECOND, big), THIRD: offering(THIRD, late)}
    for me in (FIRST, SECOND, THIRD, FOURTH):
        for order in (list(says), list(reversed(says))):
            one = round_of(me)
            outputs = one.update({peer: says[peer] for peer in order}, now=0.0)
            assert outputs[0] == Propose(big), "the lowest attempt, and of those the one with the most offers"


def test_a_proposal_for_another_round_is_none_for_this_one() -> None:
    one = round_holding(SECOND, FIRST)
    for other in (RoundKey(KEY.epoch, KEY.step - 1), RoundKey(KEY.epoch - 1, KEY.step)):
        stale = replace(proposal_of(FIRST), epoch=other.epoch, step=other.step)
        assert one.update({FIRST: offering(FIRST, stale)}, now=0.0) == []


def test_a_learner_without_an_offer_follows() -> None:
    one = round_holding(SECOND, FIRST, offers=False)
    said = proposal_of(FIRST)
    assert one.update({FIRST: offering(FIRST)}, now=0.0) == []
    assert one.update({FIRST: offering(FIRST, said)}, now=0.1) == [Propose(said), Decide(said)]


def test_a_learner_without_an_offer_proposes_those_of_others_in_its_turn() -> None:
    one = round_holding(FIRST, SECOND, THIRD, offers=False)
    others = proposal_of(SECOND, THIRD)
    assert Decide(others) in one.update({SECOND: offering(SECOND), THIRD: offering(THIRD)}, now=0.0)


def test_where_nobody_has_an_offer_nothing_is_proposed_and_the_shell_may_sleep() -> None:
    one = round_of(FIRST, offers=False)
    for now in (0.0, PATIENCE_S, 5 * PATIENCE_S):
        assert one.update({SECOND: EMPTY_HANDED}, now=now) == []
        assert one.next_wake > now


@pytest.mark.parametrize("me", [FIRST, SECOND, THIRD])
def test_an_undecided_round_always_wakes_later_than_now(me: PeerId) -> None:
    one = round_of(me)
    views = {peer: ABSENT for peer in (FIRST, SECOND, THIRD) if peer != me}
    now = 0.0
    for _ in range(6):
        if any(isinstance(output, Decide) for output in one.update(views, now)):
            return
        assert one.next_wake > now
        now = one.next_wake
    pytest.fail("no decision after six waits")


def test_a_round_is_a_learners_turn_and_the_turn_passes_on() -> None:
    peers = [FIRST, SECOND, THIRD, FOURTH]
    turns = {choose(SWARM, "evaluate", epoch, peers) for epoch in range(100)}
    assert turns == set(peers)
    assert choose(SWARM, "evaluate", 1, peers) == choose(SWARM, "evaluate", 1, reversed(peers))
    assert choose(SWARM, "evaluate", 1, []) is None


@pytest.mark.parametrize(
    "offers",
    [
        (),
        (offer_of(FIRST), offer_of(FIRST)),
        tuple(sorted(map(offer_of, (FIRST, SECOND)), key=lambda offer: offer.author, reverse=True)),
        (offer_of(FIRST, weight=0),),
        (offer_of(FIRST, weight=-3),),
    ],
    ids=["none", "twice", "out of order", "weightless", "negative"],
)
def test_a_proposal_that_could_not_be_averaged_cannot_be_made(offers: tuple[Offer, ...]) -> None:
    with pytest.raises(ProtocolError):
        Proposal(0, 0, 0, offers)


def test_a_proposal_cannot_come_before_the_first_attempt() -> None:
    with pytest.raises(ProtocolError):
        proposal_of(FIRST, attempt=-1)


def test_patience_starts_long_and_is_learned_from_three_rounds_on() -> None:
    patience = Patience()
    for _ in range(2):
        patience.learn(2.0)
        assert patience.seconds == FIRST_PATIENCE_S
    patience.learn(2.0)
    assert patience.seconds == 2.0


def test_patience_is_the_median_and_four_deviations() -> None:
    patience = Patience()
    for duration_s in (2.0, 3.0, 4.0, 5.0, 100.0):
        patience.learn(duration_s)
    assert patience.seconds == 4.0 + 4 * 1.0


@pytest.mark.parametrize(("duration_s", "patience_s"), [(0.001, MIN_PATIENCE_S), (1e6, MAX_PATIENCE_S)])
def test_patience_has_bounds(duration_s: float, patience_s: float) -> None:
    patience = Patience()
    for _ in range(3):
        patience.learn(duration_s)
    assert patience.seconds == patience_s


def test_patience_forgets_what_was_long_ago() -> None:
    patience = Patience()
    for _ in range(100):
        patience.learn(20.0)
    for _ in range(32):
        patience.learn(2.0)
    assert patience.seconds == 2.0
