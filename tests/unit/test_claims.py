"""A claim that the task is solved ends a run only where it was checked, and holds nobody up."""

from __future__ import annotations

from shoal.crdt.views import Evaluation
from shoal.protocol.ids import Cid, PeerId
from shoal.training.claims import MAX_OPEN, MAX_RETRY_S, RETRY_S, Claims

ME, HONEST, LIAR = (PeerId.of_public_key(bytes([n]) * 32) for n in range(3))
TARGET = 475.0


def claim(author: PeerId, epoch: int, text: str | None = None, mean_return: float = 500.0) -> Evaluation:
    return Evaluation(
        author=author,
        epoch=epoch,
        cid=Cid.of_block((text or f"policy {epoch}").encode()),
        mean_return=mean_return,
        env_steps=1,
        episodes=20,
    )


def claims_with(*heard: Evaluation) -> Claims:
    claims = Claims(ME, TARGET)
    claims.heard(heard)
    return claims


def test_a_claim_counts_only_when_it_was_measured_here() -> None:
    one = claim(HONEST, 3)
    claims = claims_with(one)
    assert claims.solved() is None
    assert claims.to_check(0.0) == one
    claims.measured(one.cid, 480.0)
    assert claims.checked(one)
    assert claims.solved() == one


def test_a_little_less_than_the_target_is_no_lie() -> None:
    one = claim(HONEST, 3)
    claims = claims_with(one)
    claims.measured(one.cid, 0.95 * TARGET)
    assert claims.checked(one)


def test_whoever_lied_is_not_heard_again_also_not_in_a_later_life() -> None:
    """ATTACKS row 7: of 300 false claims the first is checked."""
    lies = [claim(LIAR, n, f"lie {n}") for n in range(300)]
    claims = claims_with(*lies)
    first = claims.to_check(0.0)
    assert first is not None
    claims.measured(first.cid, 9.0)
    assert not claims.checked(first)
    assert claims.to_check(0.0) is None
    again = Claims(ME, TARGET, claims.liars)
    again.heard(lies)
    assert again.to_check(0.0) is None


def test_claims_of_one_author_are_bounded() -> None:
    claims = claims_with(*(claim(LIAR, n, f"lie {n}") for n in range(300)))
    checked = 0
    while (one := claims.to_check(0.0)) is not None:
        claims.measured(one.cid, 1e9)  # found out to be high, so that the next is looked at
        checked += 1
        assert checked <= MAX_OPEN


def test_a_true_policy_that_a_liar_claims_too_stays_true() -> None:
    """Item 3: a liar that claims each true policy as solved had it refused by everybody."""
    true = claim(HONEST, 7)
    claims = claims_with(claim(LIAR, 1, "lie"), claim(LIAR, 7), true)
    lie = claims.to_check(0.0)
    assert lie is not None
    claims.measured(lie.cid, 0.0)
    claims.checked(lie)
    claims.measured(true.cid, 500.0)
    assert claims.solved() == true


def test_a_claim_that_nobody_gives_is_asked_for_again_later_and_less_and_less_often() -> None:
    """Item 9, ATTACKS row 7: claims of policies that nobody holds."""
    one = claim(LIAR, 3)
    claims = claims_with(one, claim(LIAR, 4))
    now = 0.0
    gaps = []
    for _ in range(20):
        assert claims.to_check(now) == one
        claims.unreachable(one, now)
        assert claims.to_check(now + 0.1) is None  # of that author nothing else either
        gaps.append(claims.next_check(now) - now)
        now += gaps[-1]
    assert gaps[0] == RETRY_S
    assert gaps[-1] == MAX_RETRY_S
    assert gaps == sorted(gaps)


def test_others_are_checked_while_one_cannot_be_had() -> None:
    unreachable, other = claim(LIAR, 3), claim(HONEST, 5)
    claims = claims_with(unreachable, other)
    claims.unreachable(unreachable, 0.0)
    assert claims.to_check(0.1) == other


def test_a_claim_of_another_line_than_the_own_means_nothing() -> None:
    claims = claims_with(claim(LIAR, 3, "another policy of epoch 3"))
    claims.held(3, Cid.of_block(b"policy 3"))
    assert claims.to_check(0.0) is None


def test_the_lowest_epoch_is_the_one_all_end_on() -> None:
    early, late = claim(HONEST, 3), claim(LIAR, 9)
    claims = claims_with(late, early)
    claims.measured(late.cid, 500.0)
    assert claims.solved() == late
    assert claims.to_check(0.0) == early
    claims.measured(early.cid, 500.0)
    assert claims.solved() == early
    assert claims.to_check(0.0) is None


def test_without_a_target_nothing_is_checked() -> None:
    claims = Claims(ME, None)
    claims.heard([claim(HONEST, 3)])
    assert claims.to_check(0.0) is None
