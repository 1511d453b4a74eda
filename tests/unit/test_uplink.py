"""What a node can send: the best rate that lasted while there was something to send; nothing where that was little."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import trio

from shoal.node.wire.uplink import KEPT_S, LOOK_S, MAX_WINDOWS, SUSTAINED_S, WINDOW_BYTES, Estimate

from .test_bulk import ANN, BOB, MIB, owner_and_puller

MBIT = 125_000.0


@dataclass
class Link:
    """A way out that is looked at as the shell looks."""

    estimate: Estimate = field(default_factory=Estimate)
    now: float = 1000.0

    def send(self, rate: float, seconds: float) -> None:
        """Something is to be sent for so long, and goes at this rate."""
        self.estimate.look(0, self.now, is_busy=True)
        for _ in range(round(seconds / LOOK_S)):
            self.now += LOOK_S
            self.estimate.look(round(rate * LOOK_S), self.now, is_busy=True)
        self.now += LOOK_S
        self.estimate.look(round(rate * LOOK_S / 2), self.now, is_busy=False)

    def rest(self, seconds: float) -> None:
        self.now += seconds


def test_nothing_is_known_before_anything_was_sent_for_long_enough() -> None:
    link = Link()
    assert link.estimate.per_s == 0
    link.send(100 * MBIT, SUSTAINED_S / 2)
    assert link.estimate.per_s == 0
    link.send(100 * MBIT, SUSTAINED_S)
    assert link.estimate.per_s == pytest.approx(100 * MBIT, rel=0.02)


@pytest.mark.parametrize("mbit", [0.1, 1, 10, 100, 1000, 10_000])
def test_whatever_a_link_carries_is_found(mbit: float) -> None:
    link = Link()
    for _ in range(6):
        link.send(mbit * MBIT, 4.0)
        link.rest(30.0)
    assert link.estimate.per_s == pytest.approx(mbit * MBIT, rel=0.02)


def test_time_without_anything_to_send_does_not_count() -> None:
    link = Link()
    for _ in range(20):
        link.send(80 * MBIT, 0.5)
        link.rest(600.0)
    assert link.estimate.per_s == pytest.approx(80 * MBIT, rel=0.02)


def test_a_slow_receiver_takes_nothing_away() -> None:
    link = Link()
    link.send(100 * MBIT, 2.0)
    link.send(5 * MBIT, KEPT_S / 2)
    assert link.estimate.per_s == pytest.approx(100 * MBIT, rel=0.02)


def test_a_burst_that_does_not_last_adds_nothing() -> None:
    link = Link()
    link.send(10 * MBIT, 5.0)
    link.send(1000 * MBIT, SUSTAINED_S / 2)
    assert link.estimate.per_s == pytest.approx(10 * MBIT, rel=0.02)


def test_a_link_that_became_slow_is_known_after_so_much_of_sending() -> None:
    link = Link()
    link.send(100 * MBIT, 10.0)
    link.send(3 * MBIT, KEPT_S + 5.0)
    assert link.estimate.per_s == pytest.approx(3 * MBIT, rel=0.02)


def test_transfers_too_small_to_say_anything_are_passed_over() -> None:
    link = Link()
    for _ in range(1000):
        link.send(WINDOW_BYTES / 2 / LOOK_S, LOOK_S)
    assert link.estimate.per_s == 0


def test_however_long_it_goes_on_memory_is_bounded() -> None:
    estimate, rng, now = Estimate(), random.Random(1), 0.0
    for _ in range(4 * MAX_WINDOWS):
        now += rng.random() * 1e-3
        estimate.look(2 * WINDOW_BYTES, now, is_busy=True)
        now += rng.random() * 1e-3
        estimate.look(2 * WINDOW_BYTES, now, is_busy=True)
        estimate.look(0, now, is_busy=False)
    assert len(estimate._windows) <= MAX_WINDOWS
    assert estimate._kept_s == pytest.approx(sum(seconds for _, seconds in estimate._windows))


# --- on real lanes ---------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_others_pull_by_lanes_is_measured_and_no_more_than_they_got() -> None:
    data = random.randbytes(16 * MIB)
    async with owner_and_puller(2) as (owner, puller, _), owner.bulk.offer(BOB, data) as ref, trio.open_nursery() as n:
        n.start_soon(owner.bulk.uplink.watch)
        into, num_pulled = bytearray(len(data)), 0
        while not owner.bulk.uplink.per_s:
            assert await puller.pull(ANN, ref, into, timeout_s=20.0) == "lane"
            num_pulled += len(data)
        seen = sum(rate * seconds for rate, seconds in owner.bulk.uplink._near._windows)
        assert 0 < seen < 1.02 * num_pulled
        assert puller.uplink.per_s == 0  # it sent nothing
        n.cancel_scope.cancel()


@pytest.mark.trio
async def test_what_went_by_libp2p_is_not_known() -> None:
    data = random.randbytes(8 * MIB)
    async with owner_and_puller(0) as (owner, puller, _), owner.bulk.offer(BOB, data) as ref, trio.open_nursery() as n:
        n.start_soon(owner.bulk.uplink.watch)
        await puller.pull(ANN, ref, bytearray(len(data)), timeout_s=20.0)
        assert owner.bulk.uplink.per_s == 0
        n.cancel_scope.cancel()
