"""Real nodes of one swarm, and a member that lies to them: what the honest lose while it does, and afterwards.

``python tests/hostile/run.py [--nodes 3] [--seconds 8] [--only NAME,…]``
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile.members import ATTACKS, a_liar

from shoal.node.api.client import Client
from shoal.node.config import NodeConfig
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import SwarmId

SHOAL = [sys.executable, "-m", "shoal.cli.main"]


class Nodes:
    """Real nodes on loopback."""

    def __init__(self, home: Path, number: int) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the nodes would outlive this process
        self.home, self.number = home, number
        self.infos: list[dict[str, Any]] = []

    def ask(self, number: int, *words: str) -> Any:
        command = [*SHOAL, *words, "--profile", f"n{number}", "--json"]
        environment = os.environ | {"SHOAL_HOME": str(self.home)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def start(self) -> str:
        for number in range(self.number):
            self.infos.append(self.ask(number, "up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"))
        created = self.ask(
            0, "swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo", "--target-return", "100000"
        )
        for number in range(1, self.number):
            self.ask(number, "join", created["ticket"], "--detach")
        return str(created["swarm"])

    def epochs(self, swarm: str) -> list[int]:
        """Of each node; -1 for one that does not answer."""
        found = []
        for number in range(self.number):
            paths = NodeConfig(home=self.home, profile=f"n{number}").paths
            try:
                with Client(paths, f"n{number}") as client:
                    found.append(client.swarm(swarm).epoch)
            except ShoalError:
                found.append(-1)
        return found

    def rate(self, swarm: str, seconds: float) -> float:
        """Epochs per second of the slowest node; negative if one has ended."""
        began, before = time.monotonic(), self.epochs(swarm)
        time.sleep(seconds)
        after, took = self.epochs(swarm), time.monotonic() - began
        if min(before) < 0 or min(after) < 0:
            return -1.0
        return min(b - a for a, b in zip(before, after, strict=True)) / took

    def stop(self) -> None:
        for number in range(self.number):
            subprocess.run(
                [*SHOAL, "down", "--profile", f"n{number}"],
                env=os.environ | {"SHOAL_HOME": str(self.home)},
                capture_output=True,
                check=False,
            )


async def play(nodes: Nodes, swarm: str, name: str, seconds: float) -> dict[str, Any]:
    """One attack: epochs per second before, during and after it."""
    before = await trio.to_thread.run_sync(nodes.rate, swarm, seconds / 2)
    address = nodes.infos[0]["addresses"][0]
    async with a_liar(SwarmId.parse(swarm), address) as liar, trio.open_nursery() as nursery:
        nursery.start_soon(ATTACKS[name], liar)
        during = await trio.to_thread.run_sync(nodes.rate, swarm, seconds)
        said = liar.said
        nursery.cancel_scope.cancel()
    after = await trio.to_thread.run_sync(nodes.rate, swarm, seconds / 2)
    return {"attack": name, "before": before, "during": during, "after": after, "said": said}


def main() -> int:
    """Play the attacks, print a table; 1 if a node ended or the swarm stood still."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--only", default=",".join(ATTACKS))
    arguments = parser.parse_args()
    is_bad = False
    logging.disable(logging.CRITICAL)  # what libp2p says at the liar's end
    with tempfile.TemporaryDirectory() as home:
        nodes = Nodes(Path(home), arguments.nodes)
        try:
            swarm = nodes.start()
            time.sleep(5)
            print(f"{'attack':24} {'before':>8} {'during':>8} {'after':>8} {'records':>8}  (epochs/s, slowest node)")
            for name in arguments.only.split(","):
                found = trio.run(play, nodes, swarm, name, arguments.seconds)
                is_bad |= found["during"] <= 0 or found["after"] <= 0
                figures = " ".join(f"{found[when]:8.2f}" for when in ("before", "during", "after"))
                print(f"{name:24} {figures} {found['said']:8}", flush=True)
        finally:
            nodes.stop()
    return int(is_bad)


if __name__ == "__main__":
    raise SystemExit(main())
