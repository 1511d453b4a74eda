"""How fast what strangers send is read: no faster than the rates, and by turns between those who want more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shoal.node.budgets import BudgetLimits
from shoal.node.mesh.intake import LEAST_BYTES, Intake, intake
from shoal.node.mesh.relay_limits import MAX_PIECE_BYTES, RelayLimits

ALL_PER_S = 8e6
EACH_PER_S = 4e6


def read(
    users: Mapping[str, int], num_bytes: int, seconds: float, *, each_per_s: float = EACH_PER_S
) -> tuple[Counter[str], Counter[tuple[str, int]]]:
    """What is read, by user and by connection, of so many connections of each that send messages without end."""
    intake = Intake(ALL_PER_S, each_per_s)
    ends = [(user, number) for user, num in users.items() for number in range(num)]
    buckets = {end: intake.bucket() for end in ends}
    of_user: Counter[str] = Counter()
    of_end: Counter[tuple[str, int]] = Counter()
    now, to_ask = 0.0, list(ends)
    while now < seconds:
        for end in to_ask:
            intake.ask(end[0], buckets[end], num_bytes, end, now)
        granted = set(intake.granted(now))
        to_ask = [end for end in ends if end in granted]
        for end in to_ask:
            of_user[end[0]] += num_bytes
            of_end[end] += num_bytes
        at = intake.next_at(now)
        if not to_ask and at is not None:
            now = max(at, now + 1e-6)
    return of_user, of_end


def test_all_together_are_read_at_no_more_than_their_rate() -> None:
    of_user, _ = read({f"192.0.2.{n}": 8 for n in range(8)}, MAX_PIECE_BYTES, 10)
    assert 0.95 * 10 * ALL_PER_S <= of_user.total() <= 10.3 * ALL_PER_S + 64 * MAX_PIECE_BYTES


def test_one_connection_is_read_at_no_more_than_its_own() -> None:
    of_user, _ = read({"192.0.2.1": 1}, MAX_PIECE_BYTES, 10)
    assert 0.95 * 10 * EACH_PER_S <= of_user.total() <= 10.6 * EACH_PER_S


def test_one_at_another_ip_is_read_as_much_of_as_sixty_connections_of_one() -> None:
    of_user, of_end = read({"greedy": 60, "modest": 1}, MAX_PIECE_BYTES, 10)
    assert of_user["modest"] >= 0.9 * of_user["greedy"] - 60 * MAX_PIECE_BYTES
    assert max(of_end.values()) == of_end["modest", 0]


def test_a_small_message_counts_for_what_it_costs() -> None:
    of_user, _ = read({"a": 20}, 12, 10)
    assert of_user.total() / 12 * LEAST_BYTES <= 10.6 * ALL_PER_S


def test_who_waits_no_more_is_granted_nothing_and_leaves_nothing() -> None:
    intake = Intake(ALL_PER_S, EACH_PER_S)
    buckets = [intake.bucket() for _ in range(3)]
    tickets = [object() for _ in range(300)]
    for number, ticket in enumerate(tickets):
        intake.ask("a", buckets[number % 3], MAX_PIECE_BYTES, ticket, 0.0)
    early = intake.granted(0.0)
    assert 0 < len(early) < 100
    for ticket in tickets:
        intake.forget(ticket)
    assert intake.num_waiting == 0
    assert intake.granted(100.0) == []
    assert intake.next_at(100.0) is None


def test_a_relay_that_is_to_carry_more_reads_more() -> None:
    limits = BudgetLimits(read_bytes_per_s=1e6)
    buckets = []
    for relay in (RelayLimits(), RelayLimits(bytes_per_s=1e8)):
        made = intake(limits, relay)
        assert made is not None
        buckets.append(made.bucket().left(0.0))
    assert buckets[1] > 50 * buckets[0]
    assert intake(BudgetLimits(read_bytes_per_s=None), RelayLimits()) is None
