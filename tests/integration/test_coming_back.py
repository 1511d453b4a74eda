"""Who was away finds the others again: real nodes without mDNS, whose first ports are chosen by the system."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from shoal.node.api.client import Client
from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.config import NodeConfig
from shoal.node.daemon import Node, run_node
from shoal.node.reach.settings import ReachConfig
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.swarm.lookup import LookedUp
from shoal.node.swarm.swarms import Swarms
from shoal.training.ticket import Ticket

from .storing import MANIFEST, RUN, StoringNode, storing_nodes, until, until_together

NEVER = ("--target-return", "100000", "--eval-interval", "1000000")


def together(number: int, after: int) -> Any:
    """So many members are there, and the run went on with all of them since."""

    def holds(shown: dict[str, Any]) -> bool:
        live = [member for member in shown["members"] if member["live"]]
        return len(live) == number and shown["epoch"] > after and all(m["epoch"] > after for m in live)

    return holds


def test_a_run_goes_on_when_both_who_learn_were_killed(make_node: Any) -> None:
    creator, joiner = make_node(), make_node()
    swarm = creator.create("--min-learners", "2", *NEVER)
    joiner.ask("join", swarm["ticket"], "-d")
    before = creator.wait_for(swarm["swarm"], "both learn", together(2, 0))
    for node in (creator, joiner):
        node.kill()
    for node in (creator, joiner):
        node.up()
    creator.wait_for(swarm["swarm"], "both go on together", together(2, before["epoch"]))
    assert creator.run("swarm", "ticket").stdout.startswith("shoal1")


def test_whoever_is_killed_alone_comes_back_to_its_port_and_is_live_at_once_though_its_clock_stands_an_hour_back(
    tmp_path: Path,
) -> None:
    with storing_nodes(tmp_path, 2) as (one, two):
        one.up()
        two.up(bootstrap=one.addresses)
        until_together(one, two)
        ports = one.port, two.port
        for node, other in ((one, two), (two, one)):
            until(lambda node=node, other=other: other.peer_id in str(node.kept()), node)  # type: ignore[misc]
        for node, other in ((one, two), (two, one)):
            node.kill()
            until(lambda node=node, other=other: node.peer_id not in other.live(), other)  # type: ignore[misc]
            node.up(clock_offset_s=-3600.0)
            until_together(one, two)
            assert "others have heard newer things" not in node.log()  # it need not be told so
        assert (one.port, two.port) == ports


def test_three_of_which_the_one_that_introduced_the_others_is_gone_for_ever(tmp_path: Path) -> None:
    with storing_nodes(tmp_path, 3) as (gone, one, two):
        gone.up()
        for node in (one, two):
            node.up(bootstrap=gone.addresses)
        until_together(gone, one, two)
        for node, other in ((one, two), (two, one)):
            until(lambda node=node, other=other: other.peer_id in str(node.kept()))  # type: ignore[misc]
        for node in (gone, one, two):
            node.kill()
        one.up()
        two.up()
        until_together(one, two)
        ticket = Ticket.parse(one.shown().ticket)
        assert {address.rpartition("/")[2] for address in ticket.addresses[:2]} == {one.peer_id, two.peer_id}


def test_a_node_whose_port_is_taken_says_so_and_is_found_at_another(tmp_path: Path) -> None:
    with storing_nodes(tmp_path, 2) as (one, two):
        one.up()
        two.up(bootstrap=one.addresses)
        until_together(one, two)
        until(lambda: one.peer_id in str(two.kept()))
        two.kill()
        before = two.port
        with socket.create_server(("127.0.0.1", before)):
            two.up()
            assert two.port != before
            assert f"port {before}, at which others know this node, is taken" in two.log()
            until_together(one, two)
            until(lambda: f"/tcp/{two.port}/" in str(one.kept()))


def test_two_that_are_both_somewhere_else_find_each_other_by_a_relay_that_they_knew_and_the_dht(tmp_path: Path) -> None:
    relay = StoringNode(tmp_path, "relay", is_relay=True)
    with storing_nodes(tmp_path, 2) as (one, two):
        try:
            relay.up()
            for node in (one, two):
                node.up(bootstrap=relay.addresses)
            until_together(one, two)
            for node in (one, two):
                until(lambda node=node: relay.peer_id.encode() in node.relays(), node)  # type: ignore[misc]
            ports = one.port, two.port
            for node in (one, two):
                node.kill()
            with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[1])):
                for node in (one, two):
                    node.up()
                assert {one.port, two.port}.isdisjoint(ports)
                until_together(one, two)
        finally:
            relay.kill()


def test_a_fresh_ticket_helps_one_that_is_in_the_swarm_and_finds_nobody(tmp_path: Path) -> None:
    with storing_nodes(tmp_path, 2) as (one, two):
        one.up()
        two.up()
        with Client(two.config.paths, two.config.profile) as client:
            client.join_swarm(JoinSwarm(ticket=one.shown().ticket, role="storage"))
        until_together(one, two)


@pytest.fixture
def process() -> Iterator[None]:
    """A node in this process changes it: how it takes signals, and what its collector looks at."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    gc.unfreeze()
    gc.collect()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.trio
@pytest.mark.usefixtures("process")
async def test_two_equal_requests_at_once_are_two_runs_and_a_run_joined_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def checked(*_: object) -> LookedUp:
        return LookedUp(475.0, {}, {})

    monkeypatch.setattr(Swarms, "_check_task", checked)
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)

    def config(name: str) -> NodeConfig:
        reach = ReachConfig(port_mapping=False)
        made = NodeConfig(home=tmp_path, profile=name, listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, reach=reach)
        made.paths.create()
        return made

    nodes: list[Node] = []
    with Storage(config("one").paths.database) as storage:
        storage.add_swarm(StoredSwarm(swarm=RUN, manifest=MANIFEST, role="storage", joined_at=1.0))
    async with trio.open_nursery() as nursery:
        for name in ("one", "two"):
            nursery.start_soon(run_node, config(name), nodes.append)
        while len(nodes) < 2 or not any(RUN in node._swarms.joined for node in nodes):  # noqa: ASYNC110  no event tells
            await trio.sleep(0.02)
        first, second = sorted(nodes, key=lambda node: RUN not in node._swarms.joined)
        request = CreateSwarm(task="gym:CartPole-v1", algorithm="ppo", role="storage", name="for people")
        created = []

        async def create() -> None:
            created.append(await first._swarms.create(request))

        async with trio.open_nursery() as requests:
            for _ in range(3):
                requests.start_soon(create)
        assert len(set(created)) == 3
        assert all(first.swarm(swarm).name == "for people" for swarm in created)
        ticket = Ticket.parse(first._swarms.ticket(RUN))
        replicas = []

        async def join() -> None:
            await second._swarms.join(ticket, "storage")
            replicas.append(second._swarms.get(RUN).replica)

        async with trio.open_nursery() as requests:
            for _ in range(3):
                requests.start_soon(join)
        assert len(set(map(id, replicas))) == 1
        for node in nodes:
            node.stop()
