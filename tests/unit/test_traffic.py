"""No more bytes go than the rate allows, and those of members go first."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shoal.node.traffic import BURST_S, MAX_AHEAD_S, Traffic

pytestmark = pytest.mark.trio

RATE = 1_000_000.0
BLOCK = 1_000_000


async def test_over_any_time_no_more_goes_than_the_rate_and_one_block(
    autojump_clock: trio.testing.MockClock,
) -> None:
    traffic = Traffic(RATE)
    gone: list[float] = []

    async def send(start_s: float) -> None:
        await trio.sleep(start_s)
        for _ in range(5):
            assert await traffic.turn(BLOCK // 4, is_member=True)
            gone.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(send, number * 0.3)
    assert len(gone) == 40
    for index, since in enumerate(gone):
        for later, at in enumerate(gone[index:], 1):
            assert later * BLOCK / 4 <= RATE * (at - since + BURST_S) + BLOCK / 4 + 1
    assert gone[-1] - gone[0] <= 40 * BLOCK / 4 / RATE + 2.2  # and no slower, but for the time at which some began
    assert traffic.num_bytes == 10 * BLOCK


async def test_members_go_before_others_who_came_first(autojump_clock: trio.testing.MockClock) -> None:
    traffic = Traffic(RATE)
    order: list[str] = []

    async def send(name: str, *, is_member: bool) -> None:
        if await traffic.turn(BLOCK, is_member=is_member):
            order.append(name)

    async with trio.open_nursery() as nursery:
        await traffic.turn(BLOCK, is_member=True)
        for name in ("stranger 1", "stranger 2", "member 1", "member 2"):
            nursery.start_soon(lambda name=name: send(name, is_member=name.startswith("member")))
            await trio.testing.wait_all_tasks_blocked()
    assert order == ["member 1", "member 2", "stranger 1", "stranger 2"]


async def test_what_would_wait_long_is_refused_at_once_and_strangers_cannot_have_that_done_to_members(
    autojump_clock: trio.testing.MockClock,
) -> None:
    traffic = Traffic(RATE)
    answers: list[bool] = []

    async def send() -> None:
        answers.append(await traffic.turn(BLOCK, is_member=False))

    async with trio.open_nursery() as nursery:
        await traffic.turn(BLOCK, is_member=False)
        for _ in range(100):
            nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert answers.count(False) == traffic.num_refused == 100 - int(MAX_AHEAD_S * RATE / BLOCK) - 1
        assert await traffic.turn(BLOCK, is_member=True)
    assert answers.count(True) == int(MAX_AHEAD_S * RATE / BLOCK) + 1


async def test_who_gives_up_takes_nothing_and_what_did_not_come_is_given_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    traffic = Traffic(RATE)
    await traffic.turn(BLOCK, is_member=True)
    with trio.move_on_after(0.1):
        await traffic.turn(BLOCK, is_member=True, is_patient=True)
    traffic.correct(-BLOCK)
    began = trio.current_time()
    assert await traffic.turn(BLOCK // 10, is_member=True)
    assert trio.current_time() - began < 0.01
    assert traffic.num_bytes == BLOCK // 10


async def test_without_a_limit_bytes_are_counted_and_nobody_waits() -> None:
    traffic = Traffic()
    for _ in range(1000):
        assert await traffic.turn(BLOCK, is_member=False)
    assert traffic.num_bytes == 1000 * BLOCK
