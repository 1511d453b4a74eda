"""Where a person sits down: who asks waits for them, and for nobody else; and what came of asks is counted."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from shoal.node.swarm.consulting import Consulting
from shoal.node.swarm.sitting import MARGIN_S, Sitting
from shoal.protocol.errors import RemoteError, Status, UsageError
from shoal.protocol.ids import SwarmId
from shoal.protocol.signing import Signer
from shoal.training.recipes.placing import parts_of
from shoal.training.recipes.recipe import Part
from shoal.training.tasks.plain import plain_roles
from shoal.training.tasks.play import Discrete
from shoal.training.tasks.wire import decode_acts, encode_acts
from shoal.training.worker_calls import ConsultAsked

from .test_people import ROLES, takes

ME, OTHER, THIRD = (Signer(bytes([seed]) * 32).peer_id for seed in (1, 2, 3))
SWARM = SwarmId.of_manifest(b"one")


def played(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """By a clock that jumps."""
    trio.run(main, clock=MockClock(autojump_threshold=0))


def seated() -> Sitting:
    """A chair."""
    sitting = Sitting()
    sitting.seat(plain_roles(ROLES))
    return sitting


async def person(sitting: Sitting, count: int, act: object) -> None:
    """Answers so many."""
    for _ in range(count):
        asks = await sitting.look(30)
        await trio.sleep(1)
        sitting.answer(asks[0].number, act)


def test_who_asks_waits_for_the_person_and_takes_what_was_done_in_time() -> None:
    """Its deadline is the call's."""

    async def main() -> None:
        sitting = seated()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(person, sitting, 3, 2)
            await trio.sleep(1)
            began = trio.current_time()
            acts = await sitting.ask(OTHER, takes("chooser", 2), began + 60)
            assert decode_acts(acts, [Discrete(4)] * 2) == (2, 2)
            assert trio.current_time() == began + 2
            acts = await sitting.ask(OTHER, takes("chooser", 2), trio.current_time() + 10)
            assert decode_acts(acts, [Discrete(4)] * 2) == (2, None)
            assert trio.current_time() == began + 12 - MARGIN_S
            assert sitting.num_waiting == 0
            with pytest.raises(RemoteError) as caught:
                await sitting.ask(OTHER, takes("chooser"), trio.current_time() + 5)
            assert caught.value.status is Status.DEADLINE_EXCEEDED
            nursery.cancel_scope.cancel()

    played(main)


def test_nobody_waits_for_an_empty_chair_or_where_there_is_none() -> None:
    """Nor for one that is full, or taken away."""

    async def main() -> None:
        sitting = seated()
        for each in (sitting, Sitting()):
            with pytest.raises(RemoteError) as caught:
                await each.ask(OTHER, takes("chooser"), 60)
            assert caught.value.status is Status.FAILED_PRECONDITION
            assert await each.look(0) == []
        assert trio.current_time() < 1
        with pytest.raises(UsageError, match="no seat for a person"):
            Sitting().answer(1, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sitting.ask, OTHER, takes("chooser", 16), 600)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RemoteError) as caught:
                await sitting.ask(OTHER, takes("chooser"), 600)
            assert caught.value.status is Status.RESOURCE_EXHAUSTED
            assert sitting.num_waiting == 16
            nursery.cancel_scope.cancel()
        assert sitting.num_waiting == 0  # whoever asked is gone

        async def give_up() -> None:
            await trio.sleep(1)
            sitting.seat(())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            with pytest.raises(RemoteError):
                await sitting.ask(OTHER, takes("chooser"), 600)
        assert trio.current_time() < 30

    played(main)


class Replica:
    """Members, and the part that each plays."""

    def __init__(self, **parts: str) -> None:
        self.live = dict(zip((OTHER, THIRD), parts.values(), strict=False))

    def statements(self, peer: Any, topic: str) -> list[tuple[dict[str, str], bytes]]:
        """What it says."""
        return [({"part": self.live[peer]}, b"")]


class Host:
    """Calls of members end as a function says."""

    def __init__(self, answer: Callable[[Any, float], Coroutine[Any, Any, Any]]) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def at(self, peer: Any) -> Any:
        """A caller."""
        host = self

        class Caller:
            async def call(self, method: Any, request: Any, *, timeout_s: float | None = None) -> Any:
                host.asked.append((peer, request.policy, timeout_s))
                with trio.move_on_after(timeout_s or 0):
                    return await host.answer(peer, timeout_s or 0)
                raise RemoteError(Status.DEADLINE_EXCEEDED, "it did not answer")

        return Caller()


def test_what_came_of_asks_is_counted_by_part_and_a_person_has_one_deadline_for_all_tries() -> None:
    """A stand-in plays on for what did not come, if there is one."""

    async def main() -> None:
        from shoal.node.wire.contracts import ConsultAnswer

        async def connect(peer: Any) -> None:
            pass

        async def answer(peer: Any, timeout_s: float) -> ConsultAnswer:
            if peer == OTHER:
                await trio.sleep(4)
                raise RemoteError(Status.FAILED_PRECONDITION, "nobody sits there")
            await trio.sleep(2)
            return ConsultAnswer(encode_acts([1, None, np.float32([0.5])]))

        replica: Any = Replica(a="guest", b="guest")
        host: Any = Host(answer)
        consulting = Consulting(SWARM, host, replica, connect, lambda peer: True)
        asked = ConsultAsked("guest", None, b"", 3, seconds=10.0, falls_back=True)
        while {each[0] for each in host.asked} != {OTHER, THIRD}:
            before = len(host.asked)
            assert await consulting.ask(asked) is not None
            if len(host.asked) == before + 2:
                assert host.asked[-1] == (THIRD, "", 6.0)  # what was left of ten seconds
        tally = consulting.asked["guest"]
        times = tally.asked // 3
        assert (tally.answered, tally.unanswered, tally.fell_back) == (2 * times, times, times)
        assert tally.seconds == 2 * times + 4 * host.asked.count((OTHER, "", 10.0))
        assert await consulting.ask(ConsultAsked("nobody", "x", b"", 2)) is None
        other = consulting.asked["nobody"]
        assert (other.asked, other.answered, other.unanswered, other.fell_back) == (2, 0, 2, 0)
        assert await consulting.ask(ConsultAsked("guest", None, b"", 4, seconds=3.0)) is None  # acts of another number

    played(main)


def test_a_part_of_no_share_is_nobodys_who_was_not_told_so() -> None:
    """Whatever their number."""
    parts = {"guest": Part(share=0), "peer": Part(), "other": Part(share=2)}
    assert parts_of(6, parts).count("guest") == 0
    assert parts_of(6, parts).count("other") == 4
