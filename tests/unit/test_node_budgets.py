"""What there is once for a whole node, and that many names get no more of it than few, and newcomers some."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.node.budgets import (
    MIB,
    PURSE_SLACK_BYTES,
    PURSE_STEP_BYTES,
    SHUT_OUT_S,
    BudgetLimits,
    Dials,
    Memory,
    NodeBudgets,
    Purse,
    Shares,
    Turns,
    user_of,
)
from shoal.protocol.budget import Budget
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer

NAMES = [Signer(bytes([number]) * 32).peer_id for number in range(1, 70)]


def no_one(peer: PeerId) -> bool:
    return False


# --- shares ----------------------------------------------------------------------------------------------------------


def test_one_alone_gets_half_and_sixty_no_more_than_the_whole_and_their_floors() -> None:
    shares: Shares[int] = Shares(6000, floor=10)
    while shares.take(0, 1):
        pass
    assert shares.used == 3000
    for who in range(1, 60):
        while shares.take(who, 1):
            pass
    assert shares.used < 6000 + 60 * 10
    assert shares.take(99, 10), "whoever comes next has a floor"


def test_when_little_is_free_whoever_holds_most_is_named() -> None:
    shares: Shares[int] = Shares(1000)
    for who in range(10):
        while shares.take(who, 1):
            pass
    assert shares.greediest() == 0
    shares.hold(0, -shares.held(0))
    assert shares.greediest() is None
    assert shares.take(99, 200)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50), st.booleans())))
def test_no_more_is_given_than_there_is_and_all_of_it_comes_back(asked: list[tuple[int, int, bool]]) -> None:
    shares: Shares[int] = Shares(200)
    for who, num, gives_back in asked:
        if gives_back:
            shares.hold(who, -min(num, shares.held(who)))
        else:
            shares.take(who, num)
        assert 0 <= shares.used <= 200
    for who in range(10):
        shares.hold(who, -shares.held(who))
    assert shares.used == 0


# --- memory ----------------------------------------------------------------------------------------------------------


def test_unfinished_frames_of_sixty_strangers_are_held_to_one_budget_and_a_members_to_another() -> None:
    member = NAMES[60]
    memory = Memory(64 * MIB, 512 * MIB, {member}.__contains__)
    held = 0
    for name in NAMES[:60]:
        budget = Budget(purse=memory.purse(name))
        while budget.buffer(256 * 1024) is None:
            held += 256 * 1024
    assert 32 * MIB < held <= 64 * MIB
    assert memory.strangers.greediest() == NAMES[0]
    assert Budget(purse=memory.purse(member)).buffer(60 * MIB) is None
    newcomer = Budget(purse=memory.purse(NAMES[61]))
    assert newcomer.buffer(4096) is None
    assert newcomer.enter(4096) is None


def test_who_becomes_a_member_takes_along_what_it_holds() -> None:
    wanted: set[PeerId] = set()
    memory = Memory(64 * MIB, 512 * MIB, wanted.__contains__)
    purse = memory.purse(NAMES[0])
    assert purse.hold(20 * MIB)
    assert memory.strangers.used == 20 * MIB
    wanted.add(NAMES[0])
    assert purse.hold(20 * MIB)
    assert (memory.strangers.used, memory.members.used) == (0, 40 * MIB)
    purse.hold(-40 * MIB)
    assert memory.members.used == 0


@given(st.lists(st.integers(-3 * MIB, 3 * MIB)))
def test_a_purse_has_drawn_what_is_held_and_little_more(changes: list[int]) -> None:
    memory = Memory(64 * MIB, MIB, no_one)
    purse, held = Purse(memory, NAMES[0]), 0
    for change in changes:
        taken = max(change, -held)
        if purse.hold(taken):
            held += taken
        else:
            purse.hold(-taken)
        assert held <= memory.strangers.used <= held + PURSE_SLACK_BYTES + PURSE_STEP_BYTES
    purse.hold(-held)
    assert memory.strangers.used == 0


def test_a_refused_request_of_a_stranger_holds_nothing() -> None:
    memory = Memory(MIB, MIB, no_one)
    budget = Budget(purse=memory.purse(NAMES[0]))
    refusal = budget.enter(MIB)
    assert refusal is not None
    assert "try again" in refusal
    assert (budget.num_calls, memory.strangers.used) == (0, 0)


# --- handshakes ------------------------------------------------------------------------------------------------------


def test_whoever_comes_from_elsewhere_has_its_turn_before_those_of_one_that_floods() -> None:
    turns: Turns[str] = Turns(per_s=10, burst=5, max_waiting=100)
    now = 0.0
    for number in range(50):
        assert turns.ask("flood", number)
    assert len(turns.granted(now)) == 5
    assert turns.ask("newcomer", "me")
    assert turns.granted(now) == []
    at = turns.next_at(now)
    assert at is not None
    assert turns.granted(at) == ["me"]


def test_many_that_wait_are_bounded_and_a_newcomer_still_gets_a_place() -> None:
    turns: Turns[str] = Turns(per_s=1, burst=1, max_waiting=20)
    asked = sum(turns.ask("flood", number) for number in range(1000))
    assert asked == 20
    assert turns.ask("newcomer", "me")
    assert turns.num_refused == 980


def test_a_flood_gets_no_more_turns_than_there_are() -> None:
    turns: Turns[int] = Turns(per_s=32, burst=64, max_waiting=256)
    num = 0
    for tick in range(1000):
        turns.ask(tick % 7, tick)
        num += len(turns.granted(tick / 100))
    assert num <= 64 + 32 * 10


# --- dials -----------------------------------------------------------------------------------------------------------


def test_names_without_end_that_lead_to_one_bystander_make_few_dials() -> None:
    limits = BudgetLimits()
    dials = Dials(limits)
    num = sum(
        dials.may(NAMES[number % 69], f"/ip4/192.0.2.1/tcp/{1 + number}", second + part / 100)
        for second in range(30)
        for part, number in enumerate(range(100))
    )
    assert num <= limits.dials_per_ip_burst + 30 * limits.dials_per_ip_per_s


def test_one_name_with_addresses_without_end_makes_few_dials() -> None:
    limits = BudgetLimits()
    dials = Dials(limits)
    num = sum(dials.may(NAMES[0], f"/ip4/192.0.2.{number % 250}/tcp/1", number / 10) for number in range(300))
    assert num <= limits.dials_per_peer_burst + 30 * limits.dials_per_peer_per_s


def test_the_rate_of_all_dials_is_bounded_and_what_is_over_is_forgotten() -> None:
    limits = BudgetLimits()
    dials = Dials(limits)
    num = 0
    for number in range(6000):
        num += dials.may(NAMES[number % 69], f"/ip4/10.{number % 256}.{number // 256}.1/tcp/1", number / 100)
    assert num <= limits.dials_burst + 60 * limits.dials_per_s
    assert dials.num_refused == 6000 - num


def test_a_place_where_nobody_is_is_dialed_less_and_a_place_where_the_wanted_one_is_as_often_as_it_takes() -> None:
    limits = BudgetLimits()
    place, dials = "/ip4/192.0.2.1/tcp/1", Dials(limits)
    num = sum(dials.may(NAMES[number % 69], place, float(number)) for number in range(100))
    assert num <= limits.dials_per_place_burst + 100 * limits.dials_per_place_per_s
    dials = Dials(limits)
    for number in range(1000):
        assert dials.may(NAMES[0], place, number / 1000)
        dials.give_back(NAMES[0], place)


def test_a_household_has_one_budget_whatever_its_addresses_look_like() -> None:
    limits = BudgetLimits()
    dials = Dials(limits)
    num = sum(dials.may(NAMES[n % 69], f"/ip6/2001:db8::{n:x}/tcp/{n}", 0.0) for n in range(1, 60))
    assert num == limits.dials_per_ip_burst
    assert not dials.may(NAMES[0], "/ip6/2001:db8::ffff/tcp/1", 0.0)
    assert dials.may(NAMES[0], "/ip6/2001:db8:0:1::1/tcp/1", 0.0)


def test_the_nodes_of_one_machine_have_the_rate_of_all_whatever_its_loopback_is_called() -> None:
    limits = BudgetLimits()
    for place in ("/ip4/127.0.0.1/tcp/{}", "/ip6/::1/tcp/{}"):
        dials = Dials(limits)
        assert sum(dials.may(NAMES[n % 69], place.format(n), 0.0) for n in range(100)) == limits.dials_burst


def test_an_ipv6_network_is_one_user() -> None:
    assert user_of("2001:db8::1") == user_of("2001:db8::2") != user_of("2001:db8:0:1::1")
    assert user_of("192.0.2.1") != user_of("192.0.2.2")
    assert user_of("::ffff:192.0.2.1") == user_of("192.0.2.1")


def test_from_where_somebody_was_cut_off_nobody_comes_for_a_while_and_from_elsewhere_at_once() -> None:
    budgets = NodeBudgets(no_one)
    budgets.cut("192.0.2.1", 5.0)
    assert budgets.is_shut_out("192.0.2.1", 5.0 + SHUT_OUT_S - 0.1)
    assert not budgets.is_shut_out("192.0.2.1", 5.0 + SHUT_OUT_S)
    assert not budgets.is_shut_out("192.0.2.2", 5.1)
    budgets.cut("", 6.0)
    assert not budgets.is_shut_out("", 6.1), "by a relay come many"
    assert (budgets.num_cut, budgets.num_shut_out) == (2, 1)
