"""Members that are away, silent, or gone without news: replicas on real hosts in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from shoal.crdt.meeting import Differing
from shoal.crdt.presence import PresenceTable
from shoal.node.mesh.host import Host
from shoal.node.wire.contracts import GossipPush, PresenceSummary, SwarmService, SyncAnswer, SyncRequest
from shoal.protocol.codec import encode
from shoal.protocol.services import Empty, client

from .replicas import GENEROUS_S, SWARM, TOPICS, a_host, a_node, holds_nothing, signer_of, together

pytestmark = pytest.mark.trio


async def until(holds: Callable[[], object]) -> None:
    """Wait for what no event tells of."""
    with trio.fail_after(GENEROUS_S):
        while not holds():  # noqa: ASYNC110  see above
            await trio.sleep(0.02)


async def test_after_fifteen_minutes_without_each_other_both_sides_dial(mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 1.0
    places = {1: "/ip4/127.0.0.1/tcp/0", 2: "/ip4/127.0.0.1/tcp/0"}
    for away, here in ((2, 1), (1, 2)):
        async with a_node(here, listen=places[here]) as stays:
            async with a_node(away, listen=places[away]) as goes:
                await goes.host.connect(stays.host.addresses())
                await stays.knows(goes)
                await until(lambda: stays.replica.addresses(goes.me))
                place = goes.host.addresses()[0].partition("/p2p/")[0]
            await until(lambda: stays.replica.neighbours == frozenset())
            for _ in range(15):
                mock_clock.jump(60.0)
                await trio.sleep(0.05)
            async with a_node(away, listen=place, started_at=9_000_000) as back:  # which knows nobody
                mock_clock.jump(60.0)
                await stays.knows(back)


async def test_news_of_a_connection_that_are_lost_are_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "_pass_on", lambda *_: None)
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            await two.knows(one)
            two.domain.cancel()
            two.calls.replica = None
            await two.domain.wait_gone()
            await two.host.disconnect(one.me)
            await one.until(lambda: two.me not in one.replica.neighbours)
            assert one.replica.counters.unheard >= 1


class Silent(SwarmService):
    """A member that never answers a sync once it was met."""

    def __init__(self) -> None:
        self.is_silent = False

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        if self.is_silent:
            await trio.sleep_forever()
        return SyncAnswer((), encode({}))

    async def compare(self, request: PresenceSummary) -> Differing:
        return holds_nothing(request)

    async def gossip(self, request: GossipPush) -> Empty:
        return Empty()


async def test_a_member_that_does_not_answer_holds_up_nobody_else() -> None:
    with trio.fail_after(GENEROUS_S):
        calls = Silent()
        async with AsyncExitStack() as stack:
            one, two, silent = await stack.enter_async_context(together(a_node(1), a_node(2), a_host(3, calls)))
            await silent.connect(one.host.addresses())
            key = signer_of(3)
            table = PresenceTable(SWARM, key.peer_id, 1, TOPICS)
            said = table.announce(key, "facts", {}, 60.0).sealed
            await client(SwarmService, silent.at(one.me), timeout_s=5).gossip(GossipPush(SWARM, (said,)))
            await one.until(lambda: silent.peer_id in one.replica.neighbours)
            calls.is_silent = True
            one.replica._syncing.sync_soon(silent.peer_id)
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            began = trio.current_time()
            await one.replica.write(policy=1)
            await two.until(lambda: two.replica.documents().get(one.me) == {"policy": 1})
            assert trio.current_time() - began < 4.0  # a silent one is given up after 5 s
