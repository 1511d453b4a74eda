"""What a relay grants, and that its line is shared fairly."""

import random
from collections import Counter

import pytest

from shoal.node.mesh.relay_limits import (
    MAX_PIECE_BYTES,
    FairShare,
    RelayLedger,
    RelayLimits,
    RelayRefusedError,
    user_of,
)
from shoal.protocol.signing import Signer

PEERS = [Signer(bytes([number]) * 32).peer_id for number in range(1, 8)]
A, B, C = PEERS[:3]


def test_a_reservation_ends_unless_it_is_renewed():
    ledger = RelayLedger(RelayLimits(reservation_s=100))
    assert ledger.reserve(A, "5.1.0.2", 0) == 100
    assert ledger.has_reservation(A, 99)
    assert ledger.reserve(A, "5.1.0.2", 99) == 199
    assert ledger.has_reservation(A, 198)
    assert not ledger.has_reservation(A, 199)
    assert ledger.num_reservations == 0


def test_a_full_relay_refuses_newcomers_and_still_renews():
    ledger = RelayLedger(RelayLimits(max_reservations=2))
    ledger.reserve(A, "5.1.0.2", 0)
    ledger.reserve(B, "5.2.0.2", 0)
    with pytest.raises(RelayRefusedError) as refused:
        ledger.reserve(C, "5.3.0.2", 0)
    assert refused.value.full
    assert ledger.load() == 1.0
    ledger.reserve(A, "5.1.0.2", 1)
    ledger.release(B)
    ledger.reserve(C, "5.3.0.2", 1)


def test_one_address_cannot_take_all_reservations_by_many_names():
    ledger = RelayLedger(RelayLimits(max_reservations_per_user=2))
    for peer in PEERS[:2]:
        ledger.reserve(peer, "5.1.0.2", 0)
    with pytest.raises(RelayRefusedError) as refused:
        ledger.reserve(PEERS[2], "5.1.0.2", 0)
    assert not refused.value.full
    ledger.reserve(PEERS[2], "5.1.0.3", 0)


def test_a_user_of_ipv6_is_its_network():
    assert user_of("2a00:1::1") == user_of("2a00:1::ffff") != user_of("2a00:2::1")
    assert user_of("5.1.0.2") == "5.1.0.2"


def test_circuits_are_limited_in_all_and_for_each_end():
    ledger = RelayLedger(RelayLimits(max_circuits=3, max_circuits_per_peer=2))
    first = ledger.open_circuit(A, B)
    ledger.open_circuit(C, B)
    with pytest.raises(RelayRefusedError) as refused:
        ledger.open_circuit(PEERS[3], B)
    assert not refused.value.full
    ledger.open_circuit(PEERS[3], PEERS[4])
    with pytest.raises(RelayRefusedError) as refused:
        ledger.open_circuit(PEERS[5], PEERS[6])
    assert refused.value.full
    ledger.close_circuit(first)
    ledger.open_circuit(PEERS[3], B)


def carried(share: FairShare, wants: dict[str, list[int]], seconds: float) -> Counter[str]:
    """How much passed by user, when each of its circuits asks for its next piece as soon as the last one passed."""
    now, passed = 0.0, Counter[str]()
    share.granted(now)
    for user, sizes in wants.items():
        for size in sizes:
            share.ask(user, size, (user, size, object()))
    while now < seconds:
        for user, size, _ in share.granted(now):
            passed[user] += size
            share.ask(user, size, (user, size, object()))
        now = share.next_at(now)
    return passed


def test_the_line_is_never_exceeded_and_is_used():
    passed = carried(FairShare(1e6), {"a": [1500] * 3, "b": [60_000]}, 20)
    assert 0.97 * 20e6 <= passed.total() <= 20e6 + 1e6 / 4 + MAX_PIECE_BYTES


def test_many_circuits_get_their_user_no_more_than_one_gets_another():
    passed = carried(FairShare(1e6), {"greedy": [MAX_PIECE_BYTES] * 20, "modest": [MAX_PIECE_BYTES]}, 20)
    assert 0.9 < passed["greedy"] / passed["modest"] < 1.1


def test_small_pieces_get_as_much_as_large_ones():
    passed = carried(FairShare(1e6), {"large": [MAX_PIECE_BYTES], "small": [500] * 4}, 20)
    assert 0.85 < passed["large"] / passed["small"] < 1.2


def test_who_is_alone_has_the_whole_line():
    assert carried(FairShare(1e6), {"a": [MAX_PIECE_BYTES]}, 10)["a"] > 0.95 * 10e6


def test_who_gave_up_waiting_takes_nothing():
    share, gone, here = FairShare(1e6), object(), object()
    share.granted(0)
    while share.next_at(0) == 0:  # use up the burst
        share.ask("x", MAX_PIECE_BYTES, here)
        share.granted(0)
    share.ask("a", 1000, gone)
    share.ask("a", 1000, here)
    share.forget("a", gone)
    share.forget("x", here)
    assert share.granted(10) == [here]
    assert share.next_at(10) is None


@pytest.mark.parametrize("num_bytes", [0, -1, MAX_PIECE_BYTES + 1])
def test_a_piece_has_a_size(num_bytes):
    with pytest.raises(ValueError, match="in one piece"):
        FairShare(1e6).ask("a", num_bytes, object())


def test_random_askers_all_pass_in_the_end():
    rng = random.Random(7)
    share, tickets, now = FairShare(1e6), set(), 0.0
    for number in range(300):
        share.ask(rng.choice("abcde"), rng.randint(1, MAX_PIECE_BYTES), number)
        tickets.add(number)
    while now is not None:
        tickets.difference_update(share.granted(now))
        now = share.next_at(now)
    assert not tickets
