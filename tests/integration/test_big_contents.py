"""Contributions that together are more than the memory for contents merge all the same."""

import gc
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.config import NodeConfig, ReachConfig
from shoal.node.daemon import Node, run_node
from shoal.node.swarm.content import ContentStore

MEMORY_BYTES = 4 * 1024 * 1024
"""For contributions of a hundredth of those that did not fit into the 256 MiB that a node has."""
SETTINGS = {"hidden_sizes": [256, 256], "update_epochs": 1, "num_minibatches": 1}


@asynccontextmanager
async def running(config: NodeConfig):
    config.paths.create()
    async with trio.open_nursery() as nursery:
        is_ready, nodes = trio.Event(), []

        def on_ready(node: Node) -> None:
            nodes.append(node)
            is_ready.set()

        nursery.start_soon(run_node, config, on_ready)
        await is_ready.wait()
        yield nodes[0]
        nodes[0].stop()


@pytest.fixture(autouse=True)
def _process():
    """A node changes its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.trio
async def test_three_members_merge_contributions_that_do_not_fit_into_memory_together(tmp_path, monkeypatch):
    stores: list[ContentStore] = []

    def small_store(*args, **kwargs):
        stores.append(ContentStore(*args, **kwargs, memory_bytes=MEMORY_BYTES))
        return stores[-1]

    monkeypatch.setattr("shoal.node.daemon.ContentStore", small_store)
    async with AsyncExitStack() as stack:
        configs = [
            NodeConfig(
                home=tmp_path,
                profile=f"node{number}",
                listen=("/ip4/127.0.0.1/tcp/0",),
                mdns=False,
                reach=ReachConfig(port_mapping=False),
            )
            for number in range(3)
        ]
        nodes = [await stack.enter_async_context(running(config)) for config in configs]
        created = await nodes[0].create_swarm(
            CreateSwarm(
                task="gym:CartPole-v1",
                algorithm="ppo",
                min_learners=3,
                target_return=100_000,
                hyperparameters=SETTINGS,
            )
        )
        for node in nodes[1:]:
            await node.join_swarm(JoinSwarm(ticket=created.ticket))

        def all_contribute(shown) -> bool:
            return shown.epoch >= 2 and sum(member.rounds > 0 for member in shown.members) == 3

        await until(lambda: all(all_contribute(node.swarm(created.swarm)) for node in nodes))
        assert all(store.holding.file_bytes > 0 for store in stores)
        assert all(store.holding.memory_bytes <= MEMORY_BYTES for store in stores)
        assert all(node.swarm(created.swarm).error is None for node in nodes)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(120):
        while not holds():  # noqa: ASYNC110  no event tells of it
            await trio.sleep(0.05)
