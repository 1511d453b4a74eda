"""A peer that falls silent: how long its paths are kept, and what a sign of life is worth. The clock is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from shoal.node.mesh.connections import Connections, PathDown, PathId, PathUp
from shoal.node.mesh.keepalive import KEEPALIVE_INTERVAL_S, KEEPALIVE_TIMEOUT_S, MAX_MISSES, SOON_S, keep_alive
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty
from shoal.protocol.signing import Signer

pytestmark = pytest.mark.trio

PEER = Signer(bytes([1]) * 32).peer_id
FORGOTTEN_S = 300.0


class Cable:
    """Calls to the peer, of which some are answered: those for which ``answers`` says so, by their number."""

    def __init__(self, answers: Callable[[int], bool]) -> None:
        self.num_calls = 0
        self._answers = answers

    def at(self, _: PeerId) -> Cable:
        return self

    def is_moving(self, _peer: PeerId, _since: float) -> bool:
        return False

    async def call(self, _method: Any, _request: Any, *, timeout_s: float | None = None) -> Empty:
        self.num_calls += 1
        if self._answers(self.num_calls):
            return Empty()
        await trio.sleep(timeout_s or 0.0)
        raise RemoteError(Status.DEADLINE_EXCEEDED, "nothing came")


async def closed_at(num_paths: int, answers: Callable[[int], bool]) -> list[float]:
    """When each path was closed, in seconds; of those that were until the peer counts as there."""
    connections = Connections(max_peers=8)
    for number in range(num_paths):
        path = PathUp(PEER, PathId(number), f"/ip4/5.1.0.{number + 2}/tcp/4001/p2p/{PEER}", outbound=True, relay=None)
        connections.handle(path, trio.current_time())
    began, closed = trio.current_time(), []

    def close(path: PathId) -> None:
        closed.append(trio.current_time() - began)
        connections.handle(PathDown(PEER, path), trio.current_time())

    with trio.move_on_after(FORGOTTEN_S):
        await keep_alive(PEER, connections, Cable(answers), close)  # type: ignore[arg-type]
    return closed


async def test_a_path_is_closed_when_two_calls_in_a_row_stay_without_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    first_s = MAX_MISSES * KEEPALIVE_TIMEOUT_S + SOON_S
    assert await closed_at(1, lambda _: False) == [pytest.approx(first_s)]
    assert await closed_at(1, lambda number: number != 2) == []


async def test_paths_that_fell_silent_together_are_given_up_one_call_after_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Else a peer with three paths was dialed anew three quarters of a minute after its cable was pulled."""
    first_s, each_s = MAX_MISSES * KEEPALIVE_TIMEOUT_S + SOON_S, SOON_S + KEEPALIVE_TIMEOUT_S
    assert await closed_at(3, lambda _: False) == pytest.approx([first_s, first_s + each_s, first_s + 2 * each_s])


async def test_a_further_path_that_answers_has_two_calls_again(autojump_clock: trio.testing.MockClock) -> None:
    closed = await closed_at(2, lambda number: number == MAX_MISSES + 1)
    first_s = MAX_MISSES * KEEPALIVE_TIMEOUT_S + SOON_S
    again_s = SOON_S + KEEPALIVE_INTERVAL_S + MAX_MISSES * KEEPALIVE_TIMEOUT_S + SOON_S
    assert closed == pytest.approx([first_s, first_s + again_s])
