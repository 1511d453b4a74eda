"""Who counts, and for how much, follows from what was decided, and never from what anybody says of itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.batch import Batch
from shoal.training.electorate import (
    BELIEVED_MEDIANS,
    LEAST_SHARE,
    MAX_MISSED,
    MAX_SAY,
    Delivered,
    Electorate,
    Standing,
    says_of,
)
from shoal.training.statements import MAX_OFFERS, MAX_RATE, MAX_SECONDS

PEERS = sorted(PeerId.of_public_key(n.to_bytes(32, "big")) for n in range(MAX_OFFERS + 2))
FAST, SLOW, OTHER = PEERS[:3]
BATCH = 2048
TOGETHER = Batch(BATCH, together=BATCH)
EACH = Batch(BATCH)


def after_rounds(*rounds: dict[PeerId, tuple[int, float]]) -> Electorate:
    electorate = Electorate()
    for given_ in rounds:
        electorate = electorate.after(
            tuple(Delivered(author, weight, seconds) for author, (weight, seconds) in given_.items())
        )
    return electorate


def test_stake_is_what_was_delivered() -> None:
    electorate = after_rounds({FAST: (300, 1.0), SLOW: (100, 1.0)})
    assert electorate.stakes == {FAST: 300.0, SLOW: 100.0}


def test_newer_rounds_count_more() -> None:
    electorate = after_rounds({FAST: (100, 1.0)}, {FAST: (300, 1.0)})
    assert electorate[FAST] == Standing(200.0, 200.0)


def test_who_lets_rounds_pass_counts_less_and_then_not_at_all() -> None:
    """ATTACKS row 15: a member that is present and never ready."""
    rounds = [after_rounds({FAST: (100, 1.0), SLOW: (100, 1.0)}, *[{FAST: (100, 1.0)}] * n) for n in range(MAX_MISSED)]
    assert all(later.stakes[SLOW] < earlier.stakes[SLOW] for earlier, later in pairwise(rounds))
    gone = after_rounds({FAST: (100, 1.0), SLOW: (100, 1.0)}, *[{FAST: (100, 1.0)}] * MAX_MISSED)
    assert SLOW not in gone


def test_who_delivers_again_counts_again() -> None:
    electorate = after_rounds({FAST: (100, 1.0)}, {FAST: (100, 1.0), SLOW: (50, 1.0)})
    assert electorate[SLOW] == Standing(50.0, 50.0)


def test_an_electorate_is_bounded_and_keeps_those_who_deliver_most() -> None:
    electorate = after_rounds({peer: (number + 1, 1.0) for number, peer in enumerate(PEERS)})
    assert len(electorate) == MAX_OFFERS
    assert min(electorate.stakes.values()) == len(PEERS) - MAX_OFFERS + 1


def test_it_travels_with_the_state() -> None:
    electorate = after_rounds({FAST: (300, 1.0), SLOW: (7, 3.0)}, {FAST: (300, 1.0)})
    assert Electorate.from_plain(electorate.to_plain()) == electorate


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [1.0, 1.0],
        [1.0, 1.0, MAX_MISSED],
        [0.0, 1.0, 0],
        [5e-324, 1.0, 0],
        [0.49, 1.0, 0],
        [0.124, 1.0, MAX_MISSED - 1],
        [1.0, float("nan"), 0],
        [1.0, 2 * MAX_RATE, 0],
        ["1", 1, 0],
    ],
    ids=str,
)
def test_a_state_that_says_nonsense_of_its_members_is_refused(entry: object) -> None:
    with pytest.raises(ProtocolError):
        Electorate.from_plain({FAST: entry})


@pytest.mark.parametrize("missed", range(MAX_MISSED))
def test_what_follows_from_a_state_that_is_taken_is_taken_too(missed: int) -> None:
    """Else one state with a standing that halves to nothing would end the run a round later, for everybody."""
    electorate = Electorate.from_plain({FAST: [0.5 ** (missed + 1), 5e-324, missed]})
    for _ in range(MAX_MISSED):
        for delivered in ((), (Delivered(FAST, 1, MAX_SECONDS),)):
            after = electorate.after(delivered)
            assert Electorate.from_plain(after.to_plain()) == after
        electorate = electorate.after(())


def test_a_state_that_names_nobody_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Electorate.from_plain({"nobody": [1.0, 1.0, 0]})


# Shares.


@pytest.mark.parametrize("batch", [TOGETHER, EACH], ids=str)
def test_who_is_alone_collects_everything(batch: Batch) -> None:
    assert Electorate().share(FAST, batch, 0.0) == BATCH


def test_shares_follow_the_rates_so_that_all_are_ready_together() -> None:
    electorate = after_rounds(*[{FAST: (1536, 1.0), SLOW: (512, 1.0)}] * 4)
    fast, slow = electorate.share(FAST, TOGETHER, 0.0), electorate.share(SLOW, TOGETHER, 0.0)
    assert fast / 1536 == pytest.approx(slow / 512, rel=0.01)
    assert BATCH <= fast + slow <= 1.1 * BATCH


@pytest.mark.parametrize("number", [2, 3, 6, 100])
def test_so_many_equal_learners_bring_so_many_times_the_samples_of_one(number: int) -> None:
    electorate = after_rounds(*[dict.fromkeys(PEERS[:number], (BATCH, 1.0))] * 4)
    assert [electorate.share(peer, EACH, 0.0) for peer in PEERS[:number]] == [BATCH] * number


def test_the_fastest_sets_the_pace_and_the_others_bring_what_they_manage_meanwhile() -> None:
    electorate = after_rounds(*[{FAST: (2048, 2.0), OTHER: (1024, 2.0), SLOW: (512, 2.0)}] * 4)
    assert [electorate.share(peer, EACH, 0.0) for peer in (FAST, OTHER, SLOW)] == [2048, 1024, 512]


def test_a_batch_may_be_bounded_for_each_and_for_all_together() -> None:
    electorate = after_rounds(*[dict.fromkeys(PEERS[:4], (BATCH, 1.0))] * 4)
    assert electorate.share(FAST, Batch(BATCH, together=100_000), 0.0) == BATCH
    assert electorate.share(FAST, Batch(BATCH, together=1000), 0.0) == pytest.approx(1000 / 4, rel=0.06)


def test_of_many_nobody_sets_a_pace_that_leaves_the_others_next_to_nothing() -> None:
    electorate = after_rounds(*[{**dict.fromkeys(PEERS[1:8], (BATCH, 1.0)), PEERS[0]: (2 * BATCH, 0.0)}] * 4)
    assert electorate.share(PEERS[1], EACH, 0.0) == pytest.approx(BATCH / BELIEVED_MEDIANS, abs=1)


@pytest.mark.parametrize("batch", [TOGETHER, EACH], ids=str)
def test_a_member_of_a_hundredth_of_the_speed_leaves_nearly_all_to_the_fast_one(batch: Batch) -> None:
    """Item 7: its share follows what it delivered."""
    electorate = after_rounds(*[{FAST: (2000, 1.0), SLOW: (20, 1.0)}] * 4)
    assert electorate.share(SLOW, batch, 1e6) <= 40
    assert electorate.share(FAST, batch, 0.0) >= 0.99 * BATCH


@pytest.mark.parametrize("batch", [TOGETHER, EACH], ids=str)
@given(seconds=st.floats(0, MAX_RATE), weight=st.integers(1, 2**31))
def test_no_claim_leaves_the_others_without_a_share(batch: Batch, seconds: float, weight: int) -> None:
    """Item 3: ``speed = 1e300`` made everybody else's share 0."""
    honest = dict.fromkeys(PEERS[1:8], (256, 0.5))
    electorate = after_rounds(*[{**honest, PEERS[0]: (weight, seconds)}] * 3)
    for peer in honest:
        assert electorate.share(peer, batch, 512.0) >= LEAST_SHARE * batch.equal_share(8) * 0.9


def test_a_newcomer_begins_with_half_of_an_equal_share() -> None:
    electorate = after_rounds({FAST: (1024, 1.0), SLOW: (1024, 1.0)})
    assert electorate.share(OTHER, TOGETHER, 1e6) == pytest.approx(BATCH / 6, abs=1)
    assert electorate.share(OTHER, EACH, 1e6) == BATCH // 2


# Votes.


def test_of_a_few_each_counts_for_what_it_delivered() -> None:
    assert says_of({FAST: 99.0, SLOW: 1.0}) == {FAST: 99.0, SLOW: 1.0}


@given(st.lists(st.floats(1.0, 1e9), min_size=5, max_size=40))
def test_of_many_nobody_counts_for_more_than_a_quarter(stakes: list[float]) -> None:
    """Item 2, ATTACKS row 4: a weight that nobody can check does not decide alone."""
    says = says_of(dict(zip(PEERS, stakes, strict=False)))
    assert max(says.values()) <= MAX_SAY * sum(says.values()) * (1 + 1e-6)
    for stake, say in zip(stakes, says.values(), strict=True):
        assert 0 < say <= stake


def test_equals_count_alike() -> None:
    stakes = dict.fromkeys(PEERS[:9], 256.0)
    assert says_of(stakes) == stakes
