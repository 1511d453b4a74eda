"""All that is known of a peer is dialed at once, relays a little later, and callers share an attempt."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shoal.node.budgets import BudgetLimits, Dials
from shoal.node.mesh.dialing import (
    CIRCUIT_HEAD_START_S,
    DIAL_TIMEOUT_S,
    MAX_CIRCUITS_TRIED,
    Dialer,
    dialing_order,
)
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer

PEER, *RELAYS = [Signer(number.to_bytes(32)).peer_id for number in range(1, 9)]
DIRECT = [f"/ip4/5.1.0.{number}/tcp/4001/p2p/{PEER}" for number in (1, 2)]
CIRCUIT = f"/ip4/5.1.0.9/tcp/4001/p2p/{RELAYS[0]}/p2p-circuit/p2p/{PEER}"


def test_a_relay_is_troubled_only_when_nothing_direct_answers_soon() -> None:
    order = dialing_order(PEER, [CIRCUIT, *DIRECT, DIRECT[0]], {})
    assert order == [(DIRECT[0], 0.0), (DIRECT[1], 0.0), (CIRCUIT, CIRCUIT_HEAD_START_S)]
    assert dialing_order(PEER, [CIRCUIT], {}) == [(CIRCUIT, 0.0)]


def test_this_nodes_relays_are_tried_too_but_not_all_and_not_the_peer_itself() -> None:
    relays = {PEER: "/ip4/5.1.0.1/tcp/1", **{relay: f"/ip4/5.1.0.8/tcp/1/p2p/{relay}" for relay in RELAYS}}
    order = dialing_order(PEER, [], relays)
    assert order == [
        (f"/ip4/5.1.0.8/tcp/1/p2p/{relay}/p2p-circuit/p2p/{PEER}", 0.0) for relay in RELAYS[:MAX_CIRCUITS_TRIED]
    ]


class Far:
    """A peer that is reached by some addresses."""

    def __init__(self, open_at: set[str], after_s: float = 0.1) -> None:
        self.open_at = open_at
        self.after_s = after_s
        self.dialed: list[str] = []
        self.is_connected = False
        self.dialer = Dialer(self.dial, lambda peer: self.is_connected, {}, Dials(BudgetLimits()))

    async def dial(self, peer: PeerId, address: str) -> None:
        self.dialed.append(address)
        await trio.sleep(self.after_s)
        if address not in self.open_at:
            raise OSError("nobody is there")
        self.is_connected = True


@pytest.mark.trio
async def test_what_answers_first_is_kept_and_no_relay_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    far = Far({DIRECT[1]})
    assert await far.dialer.reach(PEER, [*DIRECT, CIRCUIT])
    assert far.dialed == DIRECT or far.dialed == DIRECT[::-1]


@pytest.mark.trio
async def test_nobody_there_is_told_when_all_have_failed(autojump_clock: trio.testing.MockClock) -> None:
    far = Far(set())
    began = trio.current_time()
    assert not await far.dialer.reach(PEER, [*DIRECT, CIRCUIT])
    assert set(far.dialed) == {*DIRECT, CIRCUIT}
    assert trio.current_time() - began < 1
    silent = Far(set(), after_s=3600)
    assert not await silent.dialer.reach(PEER, DIRECT)
    assert trio.current_time() - began < 1 + DIAL_TIMEOUT_S


@pytest.mark.trio
@pytest.mark.parametrize("is_there", [True, False])
async def test_many_callers_share_one_attempt(autojump_clock: trio.testing.MockClock, is_there: bool) -> None:
    far = Far({DIRECT[0]} if is_there else set())
    found: list[bool] = []

    async def call() -> None:
        found.append(await far.dialer.reach(PEER, DIRECT[:1]))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(call)
    assert found == [is_there] * 20
    assert far.dialed == DIRECT[:1]


@pytest.mark.trio
async def test_a_caller_who_knows_more_tries_it_and_one_who_gives_up_takes_nobody_along(
    autojump_clock: trio.testing.MockClock,
) -> None:
    far = Far({DIRECT[1]})
    found: list[bool] = []

    async def impatient() -> None:
        with trio.move_on_after(0.05):
            await far.dialer.reach(PEER, DIRECT)

    async def call() -> None:
        await trio.sleep(0.01)
        found.append(await far.dialer.reach(PEER, DIRECT))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        nursery.start_soon(call)
    assert found == [True]

    far = Far({DIRECT[1]})

    async def knows_less() -> None:
        found.append(await far.dialer.reach(PEER, DIRECT[:1]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(knows_less)
        nursery.start_soon(call)
    assert sorted(found) == [False, True, True]
