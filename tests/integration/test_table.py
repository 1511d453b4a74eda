"""The distributed hash table between real hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from shoal.dht.records import Kind, Model
from shoal.dht.registry import ModelName
from shoal.node.mesh.host import Host, open_host
from shoal.node.wire.channel import Router
from shoal.protocol.ids import Cid

WEIGHTS = Cid.of_block(b"weights")
GENEROUS_S = 30.0


@asynccontextmanager
async def host(number: int) -> AsyncIterator[Host]:
    async with open_host(
        secret=bytes([number]) * 32, listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=[], mdns=False, router=Router()
    ) as opened:
        opened.table.note_reach(is_reachable=True)
        yield opened


async def acquainted(*hosts: Host) -> None:
    """Until each knows that each other takes part."""
    for one in hosts:
        while len(one.table.core.table) < len(hosts) - 1:  # noqa: ASYNC110  no event tells of it
            await trio.sleep(0.05)


@pytest.mark.trio
async def test_names_and_holders_are_found_by_whoever_is_there_and_survive_who_left() -> None:
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2) as other, AsyncExitStack() as stack:
            third = await stack.enter_async_context(host(3))
            await other.connect(one.addresses())
            await third.connect(one.addresses())
            await acquainted(one, other, third)
            put = await third.table.publish(Kind.MODEL, "cart", Model(WEIGHTS, 7), seq=1)
            assert put.num_kept == 2
            assert await third.table.provide(WEIGHTS) == 2
            assert await other.table.find(WEIGHTS) == {third.peer_id: third.addresses()}
            name = ModelName(third.peer_id, "cart")
            await stack.aclose()
            for each in (one, other):
                found = await each.table.newest(name)
                assert found is not None
                assert found.body.manifest == WEIGHTS


@pytest.mark.trio
async def test_who_begins_to_serve_is_known_to_those_who_were_connected_before() -> None:
    """Two nodes by themselves know no more when they meet, and what one published was told to nobody, for good."""
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2) as other:
            for each in (one, other):
                each.table.note_reach(is_reachable=False)
            await other.connect(one.addresses())
            assert await one.table.provide(WEIGHTS) == 0
            for each in (one, other):
                each.table.note_reach(is_reachable=True)
            await acquainted(one, other)
            while await other.table.find(WEIGHTS) != {one.peer_id: one.addresses()}:  # noqa: ASYNC110
                await trio.sleep(0.5)  # it is said again soon, as nobody had taken it


@pytest.mark.trio
async def test_nobody_keeps_what_is_said_where_nobody_is() -> None:
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one:
            assert await one.table.provide(WEIGHTS) == 0
            assert await one.table.find(WEIGHTS) == {}
