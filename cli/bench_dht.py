"""What ``shoal bench dht`` does: nodes of their own processes put and get names, announce and find holders.

First everything is put and announced, then some nodes are killed at once, then those that are left look for what was
put, and for the holders that are left. What fails or is not found counts; what a killed node alone held does not.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shoal.cli.spawn import BackgroundNode
from shoal.node.api.client import Client
from shoal.node.api.requests import BenchDhtRequest
from shoal.node.config import NodeConfig
from shoal.protocol.errors import NoPeersError, ShoalError
from shoal.protocol.ids import Cid

NUM_KNOWN: Final = 3
"""Nodes that a new one is told of."""
LOOKUPS_EACH: Final = 4
ACQUAINTED_S: Final = 120.0
START_AT_ONCE: Final = 4


def measure_dht(num_nodes: int, kill: float, seed: int = 0) -> dict[str, Any]:
    """Measure it.

    Args:
        num_nodes: that are started.
        kill: part of them that is killed.
        seed: of which nodes do what.
    """
    chance = random.Random(seed)  # noqa: S311  which nodes are killed is no secret
    home = Path(tempfile.mkdtemp(prefix="shoal-bench-"))
    nodes: list[BackgroundNode] = []
    try:
        with ExitStack() as stack:
            names = _start(home, num_nodes, nodes)
            clients = [stack.enter_context(Client(node.config.paths, node.config.profile)) for node in nodes]
            return _measure(clients, names, nodes, round(kill * num_nodes), chance)
    finally:
        for node in nodes:
            node.kill()
        shutil.rmtree(home, ignore_errors=True)


def _start(home: Path, num_nodes: int, nodes: list[BackgroundNode]) -> list[str]:
    addresses: list[str] = []
    names: list[str] = []
    waiting: list[BackgroundNode] = []
    for number in range(num_nodes):
        config = NodeConfig(home=home, profile=f"node{number}", listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
        nodes.append(BackgroundNode(replace(config, bootstrap=tuple(addresses[:NUM_KNOWN]))))
        waiting.append(nodes[-1])
        if len(addresses) < NUM_KNOWN or len(waiting) == START_AT_ONCE or number == num_nodes - 1:
            for node in waiting:
                ready = node.wait_ready()
                addresses += ready["addresses"][:1]
                names.append(str(ready["peer_id"]))
            waiting.clear()
    return names


def _measure(
    clients: Sequence[Client],
    names: Sequence[str],
    nodes: Sequence[BackgroundNode],
    num_killed: int,
    chance: random.Random,
) -> dict[str, Any]:
    _wait_acquainted(clients)
    times: dict[str, list[float]] = {"put": [], "get": [], "provide": [], "find": []}
    num_kept = []
    cids = [str(Cid.of_block(f"model of {name}".encode())) for name in names]
    for client, cid in zip(clients, cids, strict=True):
        for request in (BenchDhtRequest(kind="put", name="model", cid=cid), BenchDhtRequest(kind="provide", cid=cid)):
            result = client.bench_dht(request)
            times[request.kind].append(result.ms)
            num_kept.append(result.num_kept)
    killed = set(chance.sample(range(len(nodes)), num_killed))
    for number in killed:
        nodes[number].kill()
    alive = [number for number in range(len(nodes)) if number not in killed]
    num_good = num_lookups = 0
    for asker in alive:
        for _ in range(LOOKUPS_EACH):
            named, holder = chance.randrange(len(nodes)), chance.choice([each for each in alive if each != asker])
            get = BenchDhtRequest(kind="get", name="model", owner=names[named])
            find = BenchDhtRequest(kind="find", cid=cids[holder])
            for request, expected in ((get, cids[named]), (find, names[holder])):
                num_lookups += 1
                try:
                    result = clients[asker].bench_dht(request)
                except ShoalError:
                    continue
                times[request.kind].append(result.ms)
                num_good += expected in result.found
    return {
        "success": round(num_good / num_lookups, 4),
        **{f"{what}_ms": round(statistics.median(each), 2) for what, each in times.items()},
        "nodes": len(nodes),
        "killed": num_killed,
        "kept_by": statistics.median(num_kept),
        "lookups": num_lookups,
    }


def _wait_acquainted(clients: Sequence[Client]) -> None:
    """Until each knows as many others as it will ask, or all."""
    enough = min(len(clients) - 1, 10)
    request = BenchDhtRequest(kind="find", cid=str(Cid.of_block(b"")))
    deadline = time.monotonic() + ACQUAINTED_S
    for client in clients:
        while client.bench_dht(request).contacts < enough:
            if time.monotonic() > deadline:
                raise NoPeersError(f"a node on this machine has not met {enough} others in {ACQUAINTED_S:.0f} s")
            time.sleep(0.2)
