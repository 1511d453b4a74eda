"""Who owns what: the shortest round for what members can send, the same for all, and little to be had by a lie."""

from __future__ import annotations

import itertools
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from shoal.node.swarm.exchanging import members_of
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer
from shoal.training.electorate import BELIEVED_MEDIANS
from shoal.training.exchange.allreduce import AllReduce
from shoal.training.exchange.ballots import SignedOffer
from shoal.training.exchange.owning import MAX_SHARE, owners, rates_of
from shoal.training.statements import MAX_UPLINK, Offer, RoundKey, first_after

PEERS = sorted(Signer(bytes([number]) * 32).peer_id for number in range(1, 33))
KEY = RoundKey(3, 1, first_after(Cid.of_block(b"policy")))


def of(*rates: float) -> dict[PeerId, float]:
    return dict(zip(PEERS, rates, strict=False))


def counts(rates: Mapping[PeerId, float], num_parts: int) -> list[int]:
    found = Counter(owners(rates, num_parts))
    return [found[peer] for peer in sorted(rates)]


def longest_s(rates: Sequence[float], owned: Sequence[int]) -> float:
    """When the last has sent its array, and what it reduced."""
    num_parts, others = sum(owned), len(rates) - 2
    return max((num_parts + others * count) / rate for rate, count in zip(rates, owned, strict=True))


# --- who owns what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 32])
def test_where_all_can_send_as_much_all_own_as_much(count: int) -> None:
    owned = counts(of(*[5e6] * count), 24 * count)
    assert owned == [24] * count


@pytest.mark.parametrize("seed", range(60))
def test_no_other_shares_make_a_shorter_round(seed: int) -> None:
    rng = random.Random(seed)
    count, num_parts = rng.choice([(3, 9), (4, 8), (5, 6)])
    rates = [10 ** rng.uniform(0, 2) for _ in range(count)]
    most = int(MAX_SHARE * num_parts)
    every = (each for each in itertools.product(range(most + 1), repeat=count) if sum(each) == num_parts)
    best = min(longest_s(rates, each) for each in every)
    assert longest_s(rates, counts(of(*rates), num_parts)) == pytest.approx(best), f"seed {seed}"


@pytest.mark.parametrize("slowness", [10, 100, 1e6])
def test_one_that_is_slow_owns_nothing_and_sends_its_array_once(slowness: float) -> None:
    assert counts(of(1.0, 1.0, 1.0, 1 / slowness), 8)[3] == 0
    assert longest_s((1, 1, 1, 0.1), counts(of(1, 1, 1, 0.1), 24)) == pytest.approx(24 / 0.1)
    assert longest_s((1, 1, 1, 0.1), (6, 6, 6, 6)) == pytest.approx(1.5 * 24 / 0.1)


def test_one_that_is_a_little_slower_owns_a_little_less() -> None:
    owned = counts(of(1.0, 1.0, 1.0, 0.8), 400)
    assert 0 < owned[3] < 100 < owned[0]
    assert max(owned[:3]) - min(owned[:3]) <= 1


def test_whoever_has_no_rate_owns_nothing_unless_nobody_has_one() -> None:
    assert counts(of(1.0, 0.0, 1.0), 8) == [4, 0, 4]
    assert counts(of(0.0, 3.0), 8) == [0, 8]
    with pytest.raises(UsageError):
        owners(of(0.0, 0.0), 8)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 8, 191, 65_536])
def test_every_part_has_one_owner_and_nobody_has_more_than_half(num_parts: int) -> None:
    rates = of(1e12, *[1.0] * 7)
    found = owners(rates, num_parts)
    assert len(found) == num_parts
    assert found == sorted(found)
    assert max(Counter(found).values()) <= max(1, num_parts // 2)


def test_the_order_in_which_members_are_named_changes_nothing() -> None:
    rates = {peer: 1e6 * (1 + number % 5) for number, peer in enumerate(PEERS)}
    turned = dict(sorted(rates.items(), reverse=True))
    assert owners(rates, 191) == owners(turned, 191)


def test_owners_are_the_same_in_another_process() -> None:
    code = (
        "from shoal.training.exchange.owning import *; from shoal.protocol.ids import PeerId;"
        "import sys; names = sys.argv[1:];"
        "print(*owners(rates_of({PeerId(n): (i * 7919 % 13) * 1e5 + i / 3 for i, n in enumerate(names)}), 191))"
    )
    names = [str(peer) for peer in PEERS]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    claims = {peer: (number * 7919 % 13) * 1e5 + number / 3 for number, peer in enumerate(PEERS)}
    assert done.stdout.split() == owners(rates_of(claims), 191)


# --- what is believed ------------------------------------------------------------------------------------------------


def test_nothing_known_means_alike_and_something_unknown_means_as_the_median() -> None:
    assert set(rates_of(of(0, 0, 0, 0)).values()) == {1.0}
    assert list(rates_of(of(1e6, 0, 4e6, 9e6)).values()) == [1e6, 4e6, 4e6, 9e6]


def test_what_differs_as_measurements_do_counts_as_alike() -> None:
    assert list(rates_of(of(0.7e6, 1e6, 1.4e6)).values()) == [1e6, 1e6, 1e6]
    assert list(rates_of(of(0.6e6, 1e6, 1.6e6)).values()) == [0.6e6, 1e6, 1.6e6]


def test_a_claim_counts_for_a_few_times_the_median_however_high_it_is() -> None:
    assert list(rates_of(of(1e6, 1e6, 1e6, MAX_UPLINK)).values()) == [1e6, 1e6, 1e6, BELIEVED_MEDIANS * 1e6]


def test_a_low_claim_is_believed_as_links_do_differ_so_much() -> None:
    assert list(rates_of(of(1e8, 1e8, 1e6)).values()) == [1e8, 1e8, 1e6]


@pytest.mark.parametrize("count", [3, 4, 5, 8, 32])
def test_a_member_that_claims_all_there_is_makes_a_round_a_few_times_as_long_at_most(count: int) -> None:
    truth, num_parts = [1.0] * count, 24 * count
    believed = rates_of(of(MAX_UPLINK, *truth[1:]))
    owned = counts(believed, num_parts)
    assert longest_s(truth, owned) <= BELIEVED_MEDIANS * longest_s(truth, [24] * count)
    assert max(owned) <= MAX_SHARE * num_parts


@pytest.mark.parametrize("count", [3, 4, 8, 32])
def test_members_that_claim_next_to_nothing_leave_the_others_little_more(count: int) -> None:
    num_parts = 24 * count
    alike = longest_s([1.0] * count, [24] * count)
    assert longest_s([1.0] * count, counts(rates_of(of(1, *[1e9] * (count - 1))), num_parts)) <= 1.25 * alike
    few = (count - 1) // 2  # liars
    if count > 3:
        assert (
            longest_s([1.0] * count, counts(rates_of(of(*[1] * few, *[1e9] * (count - few))), num_parts)) <= 2 * alike
        )


def test_liars_without_a_majority_move_the_median_no_further_than_honest_members_reach() -> None:
    honest = [8e5, 1e6, 1e6, 2e6]
    for lie in (1, MAX_UPLINK):
        rates = rates_of(of(lie, lie, lie, *honest))
        assert min(honest) <= statistics.median(rates.values()) <= max(honest)


# --- from signed offers ----------------------------------------------------------------------------------------------


def signed(peer: PeerId, uplink: int) -> SignedOffer:
    name = peer.encode()
    return SignedOffer(peer, name, Offer(key=KEY, cid=Cid.of_block(name), weight=100, uplink=uplink))


def test_all_who_hold_the_offers_find_the_same_owners() -> None:
    offers = [
        signed(peer, uplink) for peer, uplink in zip(PEERS, (125_000_000, 12_500_000, 0, 1_250_000), strict=False)
    ]
    members = members_of(offers)
    assert [member.rate for member in members] == [5e7, 12_500_000, 12_500_000, 1_250_000]
    assert {member.weight for member in members} == {100.0}
    owned = [
        AllReduce(each.peer, order, 8, patience_s=1.0, now=0.0)._owner_of
        for each, order in zip(members, itertools.permutations(members), strict=False)
    ]
    assert all(each == owned[0] for each in owned)
    assert members[3].peer not in owned[0]
