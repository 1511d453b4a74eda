"""One vote per attempt, and none before it is known what was voted for until then: what is decided stays decided."""

from __future__ import annotations

from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.votes import MAX_CASTS, Votes
from shoal.training.statements import HASH_BYTES, NO_BALLOT, RoundKey, Vote, first_after

KEY = RoundKey(0, 0, first_after(Cid.of_block(b"policy")))
A, B, C, D, STRANGER = (PeerId.of_public_key(bytes([n]) * 32) for n in range(5))
ONE, OTHER = b"1" * HASH_BYTES, b"2" * HASH_BYTES


def vote(ballot: bytes, attempt: int = 0, cast: int | None = None) -> Vote:
    return Vote(key=KEY, ballot=ballot, attempt=attempt, cast=attempt if cast is None else cast)


def promise(attempt: int) -> Vote:
    return vote(NO_BALLOT, attempt, 0)


def votes_of(**says: float) -> Votes:
    names = {"a": A, "b": B, "c": C, "d": D}
    return Votes({names[name]: say for name, say in says.items()})


def is_there(*gone: PeerId):  # type: ignore[no-untyped-def]
    return lambda peer: peer not in gone


def never(_: bytes) -> bool:
    return False


def always(_: bytes) -> bool:
    return True


def test_two_thirds_of_the_stake_decide() -> None:
    votes = votes_of(a=1, b=1, c=1)
    votes.take(A, vote(ONE))
    assert not votes.is_decided(0, ONE, is_there())
    votes.take(B, vote(ONE))
    assert votes.is_decided(0, ONE, is_there())


def test_votes_of_different_attempts_do_not_add_up() -> None:
    votes = votes_of(a=1, b=1, c=1)
    votes.take(A, vote(ONE, 0))
    votes.take(B, vote(ONE, 1))
    assert not votes.is_decided(0, ONE, is_there())
    assert not votes.is_decided(1, ONE, is_there())


def test_the_first_word_of_a_member_on_an_attempt_counts() -> None:
    votes = votes_of(a=1, b=1)
    votes.take(A, vote(ONE))
    assert not votes.take(A, vote(OTHER))
    assert votes.behind(0, OTHER) == 0.0


def test_invented_names_have_no_vote() -> None:
    """Item 2, ATTACKS row 4."""
    votes = votes_of(a=1, b=1)
    assert not votes.take(STRANGER, vote(ONE))
    assert not votes.commit(STRANGER, ONE)
    assert not votes


def test_who_is_gone_is_not_reckoned_with_unless_it_voted_for_it() -> None:
    votes = votes_of(a=3, b=1, c=1)
    votes.take(B, vote(ONE))
    votes.take(C, vote(ONE))
    assert not votes.is_decided(0, ONE, is_there())
    assert votes.is_decided(0, ONE, is_there(A))


def test_a_dead_vote_for_something_else_holds_nobody_up() -> None:
    """ATTACKS row 1: the survivors go on, whatever the dead one had proposed."""
    votes = votes_of(a=3, b=1, c=1)
    votes.take(A, vote(OTHER, 0))
    votes.take(B, vote(ONE, 1))
    votes.take(C, vote(ONE, 1))
    assert votes.is_decided(1, ONE, is_there(A))


def test_a_promise_is_for_all_attempts_before() -> None:
    votes = votes_of(a=1, b=1, c=1)
    votes.take(A, promise(3))
    votes.take(B, promise(1))
    assert votes.promised(2, is_there()) == (1.0, 3.0)
    assert votes.promised(1, is_there()) == (2.0, 3.0)


def test_the_newest_vote_is_kept_to() -> None:
    votes = votes_of(a=1, b=1, c=2)
    votes.take(C, vote(ONE, 0))
    votes.take(A, vote(OTHER, 2))
    assert votes.to_keep_to(is_there(), always) == OTHER


def test_nothing_is_to_be_kept_to_if_nobody_who_is_there_voted() -> None:
    votes = votes_of(a=3, b=1, c=1)
    votes.take(A, vote(ONE, 0))
    votes.take(B, promise(1))
    assert votes.to_keep_to(is_there(A), always) is None


def test_the_vote_of_a_few_for_what_nobody_saw_proposed_is_passed_over() -> None:
    votes = votes_of(a=10, b=1, c=10)
    votes.take(B, vote(ONE, 60))
    assert votes.to_keep_to(is_there(), never) is None
    votes.take(A, vote(OTHER, 1))
    assert votes.to_keep_to(is_there(), never) == OTHER


def test_between_two_ballots_of_one_attempt_that_of_more_stake_is_kept_to() -> None:
    votes = votes_of(a=2, b=1, c=2)
    votes.take(A, vote(ONE))
    votes.take(C, vote(ONE))
    votes.take(B, vote(OTHER))
    assert votes.to_keep_to(is_there(), always) == ONE


def test_who_made_something_of_a_ballot_voted_for_it_in_every_attempt() -> None:
    votes = votes_of(a=2, b=1)
    assert votes.commit(A, ONE)
    votes.take(B, vote(ONE, 4))
    assert votes.is_decided(4, ONE, is_there())
    assert votes.promised(9, is_there(B)) == (2.0, 2.0)
    assert votes.to_keep_to(is_there(), never) == ONE


def test_votes_of_many_attempts_are_bounded() -> None:
    votes = votes_of(a=1, b=1)
    for attempt in range(10 * MAX_CASTS):
        votes.take(A, vote(bytes([attempt]) * HASH_BYTES, attempt))
    assert len(list(votes.ballots())) == MAX_CASTS


def test_stake_that_changes_counts_for_what_was_voted_already() -> None:
    votes = votes_of(a=1, b=1, c=1)
    votes.take(A, vote(ONE))
    votes.change({A: 5.0, B: 1.0})
    assert votes.is_decided(0, ONE, is_there())


def test_all_go_to_the_attempt_at_which_more_than_liars_are() -> None:
    votes = votes_of(a=1, b=1, c=1, d=1)
    votes.take(A, promise(7))
    assert votes.attempt_of(1 / 2, is_there()) == -1
    votes.take(B, promise(5))
    assert votes.attempt_of(1 / 2, is_there()) == 5
