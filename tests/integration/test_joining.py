"""Joining a run: whom it depends on, and that it takes no longer than being let in.

What a worker loads, and what it finds wrong then, comes after.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.config import NodeConfig
from shoal.node.daemon import Node, run_node
from shoal.node.reach.settings import ReachConfig
from shoal.node.swarm.lookup import LookedUp
from shoal.node.swarm.swarms import Swarms
from shoal.protocol.errors import NoPeersError
from shoal.protocol.ids import SwarmId
from shoal.training.ticket import Ticket

pytestmark = pytest.mark.trio

GENEROUS_S = 60.0
STORED = CreateSwarm(task="gym:CartPole-v1", algorithm="ppo", role="storage")


@asynccontextmanager
async def joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requires: dict[str, int]
) -> AsyncIterator[tuple[Node, SwarmId]]:
    """A node that has just joined a run as a learner; whoever created that only stores."""

    async with nodes(tmp_path, monkeypatch, requires, "one", "two") as started:
        created = await started[0].create_swarm(STORED)
        await started[1].join_swarm(JoinSwarm(ticket=created.ticket, role="learner"))
        yield started[1], created.swarm


@asynccontextmanager
async def nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requires: dict[str, int], *names: str
) -> AsyncIterator[list[Node]]:
    """Nodes that know of nobody, for which any task is installed."""

    async def checked(*_: object) -> LookedUp:
        return LookedUp(475.0, requires, {})

    monkeypatch.setattr(Swarms, "_check_task", checked)
    started: list[Node] = []
    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            for number, name in enumerate(names):
                reach = ReachConfig(port_mapping=False)
                listen = ("/ip4/127.0.0.1/tcp/0",)
                config = NodeConfig(home=tmp_path, profile=name, listen=listen, mdns=False, reach=reach)
                config.paths.create()
                nursery.start_soon(run_node, config, started.append)
                await until(lambda wanted=number: len(started) > wanted)
            yield started
            for node in started:
                node.stop()
            nursery.cancel_scope.cancel()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110  no event tells of it
        await trio.sleep(0.02)


async def test_who_joins_is_a_member_before_its_worker_has_loaded_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(tmp_path, monkeypatch, {}) as (node, swarm):
        membership = node._swarms.get(swarm)
        assert membership.run.policy is None
        assert str(membership.phase) == "starting"
        assert membership.replica.neighbours
        await until(lambda: membership.run.policy is not None)


async def test_a_run_that_its_worker_cannot_take_part_in_has_failed_and_says_what_to_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(tmp_path, monkeypatch, {"algorithm:ppo": 99}) as (node, swarm):
        membership = node._swarms.get(swarm)
        await until(lambda: membership.failure)
        assert "update" in (membership.failure or "")
        assert node.swarm(swarm).phase == "failed"
        await node.leave_swarm(swarm)
        assert swarm not in node._swarms.joined


async def test_who_was_reached_first_and_has_left_the_run_is_not_all_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(tmp_path, monkeypatch, {}, "one", "stranger", "two") as (one, stranger, two):
        created = await one.create_swarm(STORED)
        await two._host.connect(stranger._host.addresses())  # who is connected is the first to answer
        ticket = Ticket.of(created.swarm, (*stranger._host.addresses(), *one._host.addresses()))
        await two.join_swarm(JoinSwarm(ticket=str(ticket), role="storage"))
        assert created.swarm in two._swarms.joined


async def test_who_can_give_no_manifest_is_counted_in_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(tmp_path, monkeypatch, {}, "stranger", "two") as (stranger, two):
        ticket = Ticket.of(SwarmId.of_manifest(b"none"), stranger._host.addresses())
        with pytest.raises(NoPeersError, match=r"1 member.* asked for its manifest, none gave it.*fresh ticket"):
            await two.join_swarm(JoinSwarm(ticket=str(ticket), role="storage"))
