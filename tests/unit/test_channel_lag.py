"""Answers that say nothing but that something was taken go with what is said next, or a little later by themselves."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shoal.node.wire.outbox import MAX_UNHURRIED
from shoal.protocol.errors import Status, UsageError
from shoal.protocol.services import Empty, Service, client, unary

from .channels import Pair, Question, Reply, failure, pair_of_channels

pytestmark = pytest.mark.trio

LAG_S = 0.25


class Notes(Service, name="notes"):
    """Takes notes, but none below 0."""

    @unary(answer_lag_s=LAG_S)
    async def take(self, request: Question) -> Empty:
        if request.number < 0:
            raise UsageError("a number below 0")
        return Empty()


async def took(notes: Notes, number: int, times: list[float]) -> None:
    await notes.take(Question(number))
    times.append(trio.current_time())


def written_by_bob(pair: Pair) -> int:
    return pair.streams[1].num_writes


async def test_an_answer_in_no_hurry_goes_with_what_is_said_next(autojump_clock: trio.testing.MockClock) -> None:
    for is_eager in (False, True):
        async with pair_of_channels(Notes(), is_eager=is_eager) as pair, trio.open_nursery() as nursery:
            times: list[float] = []
            began = trio.current_time()
            nursery.start_soon(took, client(Notes, pair.ann), 1, times)
            await trio.sleep(LAG_S / 5)
            assert written_by_bob(pair) == 0
            assert await pair.to_ann.double(Question(2)) == Reply(4)
            assert times == [began + LAG_S / 5]
            assert written_by_bob(pair) == 1
            await trio.sleep(2 * LAG_S)
            assert written_by_bob(pair) == 1


async def test_by_itself_it_goes_when_its_time_is_over(autojump_clock: trio.testing.MockClock) -> None:
    for is_eager in (False, True):
        async with pair_of_channels(Notes(), is_eager=is_eager) as pair:
            for number in range(3):
                times: list[float] = []
                began = trio.current_time()
                await took(client(Notes, pair.ann), number, times)
                assert times == [began + LAG_S]
                assert written_by_bob(pair) == number + 1


async def test_what_comes_meanwhile_does_not_hurry_it(autojump_clock: trio.testing.MockClock) -> None:
    async with pair_of_channels(Notes()) as pair, trio.open_nursery() as nursery:
        times: list[float] = []
        began = trio.current_time()
        for number in range(MAX_UNHURRIED - 1):
            nursery.start_soon(took, client(Notes, pair.ann), number, times)
            await trio.sleep(LAG_S / 10)
        await trio.sleep(LAG_S)
        assert times == [began + LAG_S] * (MAX_UNHURRIED - 1)
        assert written_by_bob(pair) == 1


async def test_some_of_them_are_worth_a_write(autojump_clock: trio.testing.MockClock) -> None:
    async with pair_of_channels(Notes()) as pair, trio.open_nursery() as nursery:
        times: list[float] = []
        began = trio.current_time()
        for number in range(MAX_UNHURRIED):
            nursery.start_soon(took, client(Notes, pair.ann), number, times)
        await trio.sleep(LAG_S / 10)
        assert times == [began] * MAX_UNHURRIED


async def test_a_failure_does_not_wait(autojump_clock: trio.testing.MockClock) -> None:
    async with pair_of_channels(Notes()) as pair:
        began = trio.current_time()
        assert (await failure(client(Notes, pair.ann).take(Question(-1)))).status is Status.INVALID_ARGUMENT
        assert trio.current_time() == began


async def test_the_end_of_a_node_does_not_wait_for_it_and_no_answer_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with pair_of_channels(Notes()) as pair, trio.open_nursery() as nursery:
        times: list[float] = []
        began = trio.current_time()
        nursery.start_soon(took, client(Notes, pair.ann), 1, times)
        await trio.sleep(LAG_S / 5)
        await pair.bob.drain()
        await trio.testing.wait_all_tasks_blocked()
        assert times == [began + LAG_S / 5]


async def test_memory_is_given_back_when_the_answer_is_written(autojump_clock: trio.testing.MockClock) -> None:
    async with pair_of_channels(Notes()) as pair:
        await client(Notes, pair.ann).take(Question(1))
        assert pair.account.budget.held_bytes == 0
