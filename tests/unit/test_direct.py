"""Exchanges without votes: all merge the same, and whatever fails is seen before anybody holds what others do not."""

from __future__ import annotations

import itertools

import pytest

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer
from shoal.training.exchange.direct import PATIENCE_S, Direct, Part, Trust
from shoal.training.exchange.waits import Waits
from shoal.training.statements import RoundKey

PEERS = sorted(Signer(bytes([number]) * 32).peer_id for number in range(1, 4))
KEY = RoundKey(7, 1, b"f" * 32)


def cid(text: str) -> Cid:
    return Cid.of_block(text.encode())


def members(peers: list[PeerId] = PEERS) -> dict[PeerId, Direct]:
    return {peer: Direct(peer, KEY, peers, Waits()) for peer in peers}


def test_all_merge_the_same_in_the_order_of_the_authors_whatever_came_first() -> None:
    for order in itertools.permutations(PEERS):
        everybody = members()
        for step in range(3):
            parts = {peer: each.give(cid(f"{step} {peer}"), 5, 0.0) for peer, each in everybody.items()}
            for each in everybody.values():
                for author in order:
                    each.take(author, parts[author])
            ballots = {each.ballot(0.1) for each in everybody.values()}
            assert len(ballots) == 1
            (ballot,) = ballots
            assert ballot is not None
            assert [offer.author for offer in ballot.offers] == PEERS
            assert {each.key for each in everybody.values()} == {RoundKey(7, step + 2, ballot.name)}


def test_what_comes_a_step_early_is_kept_and_what_comes_earlier_is_not() -> None:
    one, two = Direct(PEERS[0], KEY, PEERS[:2], Waits()), Direct(PEERS[1], KEY, PEERS[:2], Waits())
    first = one.give(cid("a"), 1, 0.0), two.give(cid("b"), 1, 0.0)
    two.take(PEERS[0], first[0])
    assert two.ballot(0.0) is not None
    early = two.give(cid("d"), 1, 0.0)
    far = Part(RoundKey(7, 3, b"x" * 32), cid("e"), 1)
    one.take(PEERS[1], early)
    one.take(PEERS[1], far)
    assert one.ballot(0.0) is None
    one.take(PEERS[1], first[1])
    assert one.ballot(0.0) is not None
    one.give(cid("c"), 1, 0.0)
    assert one.ballot(0.0) is not None
    one.give(cid("f"), 1, 0.0)
    assert one.ballot(0.0) is None, "it was said two steps ahead"


def test_a_member_without_samples_in_a_step_takes_part() -> None:
    one, two = Direct(PEERS[0], KEY, PEERS[:2], Waits()), Direct(PEERS[1], KEY, PEERS[:2], Waits())
    one.take(PEERS[1], two.give(None, 0, 0.0))
    two.take(PEERS[0], one.give(cid("a"), 3, 0.0))
    for ballot in (one.ballot(0.0), two.ballot(0.0)):
        assert ballot is not None
        assert [offer.author for offer in ballot.offers] == PEERS[:1]


def test_who_gives_different_parts_to_different_members_is_seen_a_step_later() -> None:
    everybody = members()
    liar, one, two = PEERS
    for peer in (one, two):
        part = everybody[peer].give(cid(f"honest {peer}"), 5, 0.0)
        for each in (one, two):
            everybody[each].take(peer, part)
    for peer in (one, two):
        everybody[peer].take(liar, Part(KEY, cid(f"for {peer}"), 5))
        assert everybody[peer].ballot(0.0) is not None
    parts = {peer: everybody[peer].give(cid("next"), 5, 0.0) for peer in (one, two)}
    everybody[one].take(two, parts[two])
    everybody[two].take(one, parts[one])
    assert "something else" in everybody[one].failure
    assert "something else" in everybody[two].failure
    assert everybody[one].ballot(0.0) is None


def test_a_first_word_counts_and_a_strangers_does_not() -> None:
    one = Direct(PEERS[0], KEY, PEERS[:2], Waits())
    one.give(cid("a"), 1, 0.0)
    one.take(PEERS[2], Part(KEY, cid("s"), 1))
    assert one.ballot(0.0) is None
    one.take(PEERS[1], Part(KEY, cid("b"), 1))
    one.take(PEERS[1], Part(KEY, cid("c"), 1))
    ballot = one.ballot(0.0)
    assert ballot is not None
    assert [offer.offer.cid for offer in ballot.offers] == [cid("a"), cid("b")]


def test_nobody_waits_for_a_silent_member_for_long_and_the_words_name_it() -> None:
    waits = Waits()
    for _ in range(8):
        waits.learn(0.0, 0.01)
    one = Direct(PEERS[0], KEY, PEERS[:2], waits)
    assert one.next_wake == float("inf"), "it has not given anything itself"
    one.give(cid("a"), 1, 10.0)
    assert one.next_wake == 10.0 + PATIENCE_S
    one.tick(10.0 + PATIENCE_S - 0.01)
    assert not one.failure
    one.tick(10.0 + PATIENCE_S)
    assert PEERS[1] in one.failure
    one.take(PEERS[1], Part(KEY, cid("b"), 1))
    assert one.ballot(12.0) is None, "it has failed"


def test_after_failures_in_a_row_votes_are_kept_to_for_ever_longer() -> None:
    trust, epoch, gaps = Trust(), 0, []
    for _ in range(9):
        trust.failed(epoch)
        again = next(each for each in itertools.count(epoch + 1) if trust.holds(each))
        gaps.append(again - epoch - 1)
        trust.succeeded(epoch)  # by votes: that says nothing of it
        epoch = again
    assert gaps == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    trust.succeeded(epoch)
    trust.failed(epoch + 1)
    assert trust.holds(epoch + 3)


@pytest.mark.parametrize(("step", "after"), [(0, b"f" * 32), (2**60, b"f" * 32), (1, b"short")])
def test_a_step_that_there_cannot_be_is_refused(step: int, after: bytes) -> None:
    with pytest.raises(ProtocolError):
        Part(RoundKey(3, step, after), None, 0)


@pytest.mark.parametrize(("given", "weight"), [(None, 1), (cid("a"), 0), (cid("a"), 2**40), (cid("a"), -1)])
def test_a_part_that_weighs_what_it_cannot_is_refused(given: Cid | None, weight: int) -> None:
    with pytest.raises(ProtocolError):
        Part(KEY, given, weight)
