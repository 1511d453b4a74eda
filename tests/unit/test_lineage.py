"""A policy is taken because those who count hold it, and never because somebody says that it is newer."""

from __future__ import annotations

from dataclasses import replace

from shoal.protocol.ids import Cid, PeerId
from shoal.training.lineage import FORK_S, MAX_REFUSED, MAX_RETRY_S, RETRY_S, Lineage, Refusal
from shoal.training.statements import HASH_BYTES, MAX_EPOCH, NO_BALLOT, Result

ME, A, B, C, LIAR = (PeerId.of_public_key(bytes([n]) * 32) for n in range(5))
SAYS = {ME: 1.0, A: 1.0, B: 1.0}
INITIAL = Result(epoch=0, cid=Cid.of_block(b"initial"), parent=None, ballot=NO_BALLOT, env_steps=0)


def after(parent: Result, text: str = "", env_steps: int = 100) -> Result:
    cid = Cid.of_block(f"{parent.cid} {text}".encode())
    ballot = text.encode().ljust(HASH_BYTES, b"-")
    return Result(
        epoch=parent.epoch + 1, cid=cid, parent=parent.cid, ballot=ballot, env_steps=parent.env_steps + env_steps
    )


FIRST = after(INITIAL)
OWN = after(FIRST)


def lineage_of(own: Result = OWN, says: dict[PeerId, float] = SAYS) -> Lineage:
    lineage = Lineage(ME)
    lineage.hold(own, says)
    return lineage


def test_what_half_of_the_stake_holds_is_taken_at_once() -> None:
    lineage, newer = lineage_of(), after(OWN)
    lineage.heard(A, newer)
    lineage.heard(B, newer)
    found = lineage.overtaken(0.0)
    assert found is not None
    assert (found.result, found.holders, found.is_other_line) == (newer, tuple(sorted([A, B])), False)


def test_less_than_half_is_not_enough() -> None:
    lineage = lineage_of()
    lineage.heard(A, after(OWN))
    lineage.heard(B, OWN)
    assert lineage.overtaken(0.0) is None


def test_who_holds_a_policy_vouches_for_its_parent() -> None:
    lineage, newer = lineage_of(), after(OWN)
    lineage.heard(A, newer)
    lineage.heard(B, after(newer))
    found = lineage.overtaken(0.0)
    assert found is not None
    assert found.result == newer


def test_a_newer_epoch_of_members_without_stake_is_not_taken() -> None:
    """Item 9, ATTACKS rows 4 and 5: a member took over a policy, and one epoch near 2^53 stopped all for ever."""
    lineage = lineage_of()
    lineage.heard(A, OWN)
    lineage.heard(B, OWN)
    jump = Result(epoch=MAX_EPOCH, cid=Cid.of_block(b"mine"), parent=OWN.cid, ballot=NO_BALLOT, env_steps=2**40)
    lineage.heard(LIAR, jump)
    for now in (0.0, FORK_S, 100 * FORK_S):
        assert lineage.overtaken(now) is None
        assert lineage.other_line(now) is None


def test_after_a_partition_the_part_with_fewer_members_takes_the_policy_of_the_other() -> None:
    """ATTACKS row 30."""
    lineage, other = lineage_of(), after(FIRST, "of the others")
    for member in (A, B, C):
        lineage.heard(member, other)
    lineage.hold(OWN, {ME: 1.0})
    assert lineage.other_line(0.0) is None
    found = lineage.other_line(FORK_S)
    assert found is not None
    assert found.result == other
    assert found.is_other_line


def test_between_parts_of_equal_size_the_one_with_more_steps_wins_on_both_sides() -> None:
    """ATTACKS row 30: nobody stays apart."""
    more, less = after(FIRST, "more", 200), after(FIRST, "less", 100)
    losing, winning = lineage_of(less, {ME: 1.0}), lineage_of(more, {ME: 1.0})
    losing.heard(A, more)
    winning.heard(A, less)
    for now in (0.0, FORK_S):
        found = losing.other_line(now)
        assert winning.other_line(now) is None
    assert found is not None
    assert found.result == more


def test_a_part_that_heals_by_itself_in_time_changes_nothing() -> None:
    lineage, other = lineage_of(), after(FIRST, "of the others")
    for member in (A, B):
        lineage.heard(member, other)
    lineage.hold(OWN, {ME: 1.0})
    lineage.other_line(0.0)
    for member in (A, B):
        lineage.heard(member, OWN)
    assert lineage.other_line(FORK_S / 2) is None
    for member in (A, B):
        lineage.heard(member, other)
    assert lineage.other_line(FORK_S) is None  # counted from anew


def test_a_newcomer_takes_what_most_hold() -> None:
    lineage = lineage_of(INITIAL, {ME: 1.0})
    other = after(FIRST, "of a few")
    lineage.heard(A, OWN)
    lineage.heard(B, OWN)
    lineage.heard(C, other)
    found = lineage.other_line(0.0)
    assert found is not None
    assert found.result == OWN
    assert not found.is_other_line


def test_who_was_started_again_goes_on_from_where_the_others_are_and_never_back() -> None:
    further = after(after(OWN))
    behind, ahead = Lineage(ME), Lineage(ME)
    behind.hold(OWN, SAYS, is_new=True)
    ahead.hold(further, SAYS, is_new=True)
    behind.heard(C, further)
    ahead.heard(C, OWN)
    found = behind.other_line(0.0)
    assert found is not None
    assert found.result == further
    assert ahead.other_line(0.0) is None


def test_who_was_started_again_does_not_follow_one_that_is_ahead_of_all_others() -> None:
    """ATTACKS row 5."""
    lineage = Lineage(ME)
    lineage.hold(OWN, SAYS, is_new=True)
    lineage.heard(A, OWN)
    lineage.heard(B, OWN)
    lineage.heard(LIAR, Result(epoch=9, cid=Cid.of_block(b"mine"), parent=None, ballot=NO_BALLOT, env_steps=2**40))
    assert lineage.other_line(0.0) is None


def test_what_came_of_a_ballot_that_was_seen_decided_is_known_from_any_one_who_merged_it() -> None:
    lineage, newer = lineage_of(), after(OWN, "the ballot")
    lineage.heard(C, newer)
    found = lineage.made_of(newer.ballot, 0.0)
    assert found is not None
    assert found.result == newer
    assert lineage.made_of(FIRST.ballot, 0.0) is None


def test_a_false_policy_has_its_signers_not_heard_again() -> None:
    lineage, false = lineage_of(), after(OWN, "false")
    lineage.heard(A, false)
    lineage.heard(B, false)
    lineage.refuse(false, Refusal.FALSE, 0.0)
    assert lineage.liars == {A, B}
    assert not lineage.heard(A, after(OWN))
    assert lineage.overtaken(1e9) is None


def test_a_policy_that_nobody_gives_is_asked_for_again_later_and_less_and_less_often() -> None:
    """Item 3: a claimed newer policy that nobody holds stopped everybody for 30 s each time."""
    lineage, newer = lineage_of(), after(OWN)
    lineage.heard(A, newer)
    lineage.heard(B, newer)
    now = 0.0
    for number in range(10):
        lineage.refuse(newer, Refusal.UNREACHABLE, now)
        wait_s = min(RETRY_S * 2**number, MAX_RETRY_S)
        assert lineage.overtaken(now + 0.9 * wait_s) is None
        assert lineage.overtaken(now + wait_s) is not None
        now += wait_s
    assert not lineage.liars  # who cannot be reached, did not lie


def test_what_does_not_fit_here_is_not_tried_again_and_nobody_is_blamed() -> None:
    lineage, newer = lineage_of(), after(OWN)
    lineage.heard(A, newer)
    lineage.heard(B, newer)
    lineage.refuse(newer, Refusal.UNFIT, 0.0)
    assert lineage.overtaken(1e9) is None
    assert not lineage.liars


def test_who_is_gone_does_not_count() -> None:
    lineage, newer = lineage_of(), after(OWN)
    lineage.heard(A, newer)
    lineage.heard(B, newer)
    lineage.gone(A)
    lineage.gone(B)
    assert lineage.overtaken(0.0) is None
    assert lineage.holders(newer.cid) == ()


def test_who_signs_a_true_policy_with_other_numbers_makes_nobody_else_a_liar() -> None:
    lineage, true = lineage_of(says={ME: 1.0, A: 1.0, B: 1.0, C: 1.0, LIAR: 1.0}), after(OWN)
    false = replace(true, env_steps=true.env_steps + 1)
    for author in (A, B, C):
        lineage.heard(author, true)
    lineage.heard(LIAR, false)
    found = lineage.overtaken(0.0)
    assert found is not None
    assert found.result == true
    lineage.refuse(false, Refusal.FALSE, 0.0)
    assert lineage.liars == {LIAR}
    assert lineage.overtaken(0.0) is not None


def test_refusals_are_bounded() -> None:
    lineage = lineage_of()
    for number in range(2 * MAX_REFUSED):
        lineage.refuse(after(OWN, str(number)), Refusal.UNFIT, 0.0)
    assert len(lineage._refused) == MAX_REFUSED
