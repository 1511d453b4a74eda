"""Whom a node dials to be with its swarm, where, and how often; between objects, with the time as an argument."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest

from shoal.node.swarm import members as module
from shoal.node.swarm.members import (
    AT_ONCE,
    CARRIER_BURST,
    CARRIER_PER_S,
    DIAL_AGAIN_MAX_S,
    LONG_GONE_AGAIN_S,
    LONG_GONE_S,
    MAX_ADDRESSES,
    MAX_DIALED,
    MAX_KEPT_ADDRESSES,
    MAX_KEPT_MEMBERS,
    SMALL,
    STEADY_S,
    Back,
    Dial,
    Known,
    Left,
    Look,
    Lost,
    Members,
    Told,
    Tried,
)
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.protocol.signing import Signer

ME, *PEERS = [Signer(n.to_bytes(32)).peer_id for n in range(1, 70)]
OWN = (f"/ip4/5.1.0.1/tcp/1/p2p/{ME}",)


def at(peer: PeerId, place: str = "5.1.0.9", port: int = 4001) -> str:
    return f"/ip4/{place}/tcp/{port}/p2p/{peer}"


def told(table: Members, peer: PeerId, *addresses: str, carrier: PeerId = PEERS[-1], now: float = 0.0) -> None:
    table.handle(Told(peer, list(addresses or (at(peer),)), carrier), now)


def look(
    table: Members, now: float, live: Iterable[PeerId] = (), contacts: Iterable[PeerId] = (), own: tuple[str, ...] = OWN
) -> list[Dial]:
    return table.handle(Look(frozenset(live), frozenset(contacts), own), now)


def dials(table: Members, until: float, *, begin: float = 0.0, step: float = 1.0) -> list[tuple[float, Dial]]:
    """All tries at members of whom nothing is heard; each fails at once."""
    found = []
    now = begin
    while now < until:
        for dial in look(table, now):
            found.append((now, dial))
            table.handle(Tried(dial.peer), now)
        now += step
    return found


def connected(table: Members, peer: PeerId, now: float = 0.0, *, was_dialed: bool = True) -> None:
    table.handle(Back(peer, at(peer) if was_dialed else at(peer, port=50000), was_dialed), now)


def test_everybody_live_in_a_small_swarm_is_dialed_once_at_a_time() -> None:
    table = Members(ME)
    for peer in PEERS[:AT_ONCE]:
        told(table, peer)
    live = PEERS[:AT_ONCE]
    assert {dial.peer for dial in look(table, 0.0, live, live[:1])} == set(live[1:])
    assert look(table, 0.0, live, live[:1]) == []
    table.handle(Tried(live[1]), 0.0)
    assert look(table, 0.5, live, live[:1]) == []
    assert [dial.peer for dial in look(table, 1.0, live, live[:1])] == [live[1]]


def test_in_a_large_swarm_gossip_chooses_but_the_lost_are_tried_one_at_a_time_so_that_halves_find_together() -> None:
    table = Members(ME)
    for peer in PEERS:
        told(table, peer)
        connected(table, peer)
    other_half = PEERS[SMALL + 2 :]
    for peer in other_half:
        table.handle(Lost(peer), 100.0)
    ours = PEERS[: SMALL + 2]
    assert look(table, 50.0, PEERS[:-1], PEERS[:1]) == []
    tried = set()
    for _ in other_half:
        (dial,) = look(table, 100.0, ours, ours)
        assert look(table, 100.0, ours, ours) == []
        tried.add(dial.peer)
        table.handle(Tried(dial.peer), 100.0)
    assert tried == set(other_half)


def test_one_who_was_away_for_fifteen_minutes_or_a_week_is_still_dialed_by_both_sides() -> None:
    table = Members(ME)
    told(table, PEERS[0])
    connected(table, PEERS[0])
    table.handle(Lost(PEERS[0]), STEADY_S)
    times = [now for now, _ in dials(table, 7200.0, begin=STEADY_S)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[:6] == [1, 2, 4, 8, 16, 32]
    quarter = [now for now in times if 900 <= now < 900 + 2 * DIAL_AGAIN_MAX_S]
    assert len(quarter) == 2
    assert gaps[-1] == LONG_GONE_AGAIN_S
    assert times[-1] > LONG_GONE_S
    week = 7 * 86400.0
    assert len(dials(table, week + LONG_GONE_AGAIN_S, begin=week)) >= 1


def test_one_that_left_is_not_dialed_nor_kept() -> None:
    table = Members(ME)
    told(table, PEERS[0])
    connected(table, PEERS[0])
    table.handle(Lost(PEERS[0]), 20.0)
    assert table.sought == [PEERS[0]]
    table.handle(Left(PEERS[0]), 20.0)
    assert dials(table, 1000.0) == []
    assert table.worth_keeping() == ()


def test_one_who_comes_and_goes_is_not_dialed_ever_faster() -> None:
    table = Members(ME)
    told(table, PEERS[0])
    num_dials = 0
    for now in range(600):
        for dial in look(table, float(now)):
            num_dials += 1
            connected(table, dial.peer, now)
            table.handle(Tried(dial.peer), now)
            table.handle(Lost(dial.peer), now)
        if now == 0:
            table.handle(Lost(PEERS[0]), 0.0)
    assert num_dials <= 18


def test_what_an_earlier_life_kept_is_dialed_though_nobody_is_heard() -> None:
    table = Members(ME)
    told(table, PEERS[0], at(PEERS[0]), at(PEERS[0], "192.168.7.7"), at(PEERS[0], "127.0.0.1"))
    told(table, PEERS[1])
    connected(table, PEERS[0])
    connected(table, PEERS[1])
    kept = table.worth_keeping()
    assert [address.rpartition("/")[2] for address in kept[:1]] == [PEERS[1]]
    later = Members(ME)
    later.handle(Known(kept), 0.0)
    assert {dial.peer for dial in look(later, 0.0)} == set(PEERS[:2])
    assert later.worth_keeping() == kept


def test_of_many_members_those_met_last_are_kept_and_of_each_the_best_addresses() -> None:
    table = Members(ME)
    for n in range(2 * MAX_MEMBERS):
        peer = Signer((1000 + n).to_bytes(32)).peer_id
        told(table, peer, *(at(peer, f"10.0.0.{k}") for k in range(MAX_ADDRESSES - 1)), at(peer))
    met = PEERS[:5]
    for peer in met:
        told(table, peer)
        connected(table, peer)
    kept = table.worth_keeping()
    assert kept[:5] == tuple(at(peer) for peer in reversed(met))
    assert len(kept) <= MAX_KEPT_MEMBERS * MAX_KEPT_ADDRESSES
    assert kept[5].startswith("/ip4/5.1.0.9/")


def test_names_without_end_push_out_nobody_who_was_met() -> None:
    table = Members(ME)
    told(table, PEERS[0])
    connected(table, PEERS[0])
    for n in range(3 * MAX_MEMBERS):
        told(table, Signer((5000 + n).to_bytes(32)).peer_id)
    assert table.addresses(PEERS[0]) == (at(PEERS[0]),)
    assert table.counters.forgotten == MAX_MEMBERS + 1


def test_only_its_own_addresses_are_dialed_and_not_too_many() -> None:
    table = Members(ME)
    peer = PEERS[0]
    own = [at(peer, f"10.0.0.{n}") for n in range(MAX_ADDRESSES + 5)]
    wrong = [at(PEERS[1]), "/ip4/10.0.0.1/tcp/1", "x" * 5000 + f"/p2p/{peer}", 7, None]
    table.handle(Told(peer, [*wrong, *own], PEERS[1]), 0.0)
    assert table.addresses(peer) == tuple(own[:MAX_ADDRESSES])
    assert table.counters.refused_addresses == len(wrong)
    for nonsense in (None, "text", 7, {"a": 1}):
        table.handle(Told(PEERS[1], nonsense, PEERS[1]), 0.0)
        assert table.addresses(PEERS[1]) == ()
    table.handle(Known(("nonsense", "/p2p/nobody", "/ip4/5.1.0.1/tcp/1/p2p/12D3KooW")), 0.0)
    assert table.sought == []


def test_a_try_takes_a_few_addresses_and_the_next_one_others_those_that_worked_in_each() -> None:
    table = Members(ME)
    peer = PEERS[0]
    many = [at(peer, f"10.0.0.{n}") for n in range(MAX_ADDRESSES)]
    told(table, peer, *many)
    connected(table, peer)
    table.handle(Lost(peer), 20.0)
    tries = [dial.addresses for _, dial in dials(table, 60.0, begin=20.0)][:3]
    assert all(len(addresses) == MAX_DIALED and addresses[0] == at(peer) for addresses in tries)
    assert {address for addresses in tries for address in addresses} == {at(peer), *many}


def test_where_it_came_from_goes_before_what_else_it_says() -> None:
    table = Members(ME)
    told(table, PEERS[0], at(PEERS[0], "10.0.0.1"), at(PEERS[0]))
    connected(table, PEERS[0], was_dialed=False)
    assert table.addresses(PEERS[0])[0] == at(PEERS[0])


@pytest.mark.parametrize(
    ("own", "also", "is_dialed"),
    [
        (OWN, "10.0.0.1", False),
        ((*OWN, at(ME, "10.0.0.1")), "10.0.0.1", True),
        ((at(ME, "127.0.0.1"),), "127.0.0.1", True),
    ],
)
def test_nobody_has_this_node_try_ports_of_its_own_machine(own: tuple[str, ...], also: str, is_dialed: bool) -> None:
    table = Members(ME)
    told(table, PEERS[0], at(PEERS[0], "127.0.0.1", 22), at(PEERS[0], also))
    (dial,) = look(table, 0.0, [PEERS[0]], own=own)
    assert (at(PEERS[0], "127.0.0.1", 22) in dial.addresses) is is_dialed


def test_who_makes_up_members_has_a_few_tries_for_all_of_them_and_who_names_real_ones_as_many_as_it_takes() -> None:
    table = Members(ME)
    liar = PEERS[0]
    invented = [Signer((9000 + n).to_bytes(32)).peer_id for n in range(30)]
    for peer in invented:
        told(table, peer, carrier=liar)
    num_tries = 0
    for now in range(600):
        for dial in look(table, float(now), invented):
            num_tries += 1
            table.handle(Tried(dial.peer), now)
    assert num_tries <= CARRIER_BURST + 600 * CARRIER_PER_S
    assert table.counters.on_no_account > 0
    honest = Members(ME)
    found = set()
    for round_ in range(4):
        real = [Signer((100 * round_ + 9000 + n).to_bytes(32)).peer_id for n in range(SMALL)]
        for peer in real:
            told(honest, peer, carrier=PEERS[1])
        for _ in range(3):
            for dial in look(honest, float(round_), real):
                connected(honest, dial.peer, round_)
                honest.handle(Tried(dial.peer), round_)
                found.add(dial.peer)
            real = [peer for peer in real if peer not in found]
    assert len(found) == 4 * SMALL


def test_a_member_that_moved_is_dialed_at_once() -> None:
    table = Members(ME)
    told(table, PEERS[0])
    connected(table, PEERS[0])
    table.handle(Lost(PEERS[0]), 20.0)
    dials(table, 320.0, begin=20.0)
    assert look(table, 320.0) == []
    told(table, PEERS[0], at(PEERS[0], "5.1.0.77"), now=320.0)
    (dial,) = look(table, 320.0)
    assert at(PEERS[0], "5.1.0.77") in dial.addresses


def test_a_member_that_says_again_and_again_that_it_moved_is_not_dialed_each_time() -> None:
    table = Members(ME)
    told(table, PEERS[0])
    connected(table, PEERS[0])
    table.handle(Lost(PEERS[0]), 20.0)
    num_dials = 0
    for now in range(20, 620):
        told(table, PEERS[0], at(PEERS[0], f"5.1.{now // 250}.{now % 250}"), now=float(now))
        for dial in look(table, float(now)):
            num_dials += 1
            table.handle(Tried(dial.peer), now)
    assert num_dials <= 20 + 16


def test_the_bounds_fit_each_other() -> None:
    assert module.MAX_PROVEN < MAX_DIALED <= MAX_ADDRESSES
