"""Real nodes that train, and strangers without a ticket: what these spend, and what the honest lose.

``python tests/hostile/strangers.py [--seconds 8] [--only NAME,…]``

Each attack (`attackers.py`) runs in a process of its own against the first of two nodes that train together; a third
joins and leaves meanwhile. Before it and after it the same is measured without strangers; after it, a process that only
burns takes as much of the processors as they did, since they would not run on a node's own machine. Told are the run's
epochs a second, what the honest nodes and their workers spent on one
epoch, which no other work on the machine changes, and how long a join took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile.attackers import ATTACKS, MIB, SET_UP_S
from tests.hostile.measuring import Epochs, cpu_s, measure
from tests.hostile.run import Nodes

from shoal.node.api.client import Client
from shoal.node.config import NodeConfig

MAX_MIB: Final = 400
QUIET_S: Final = 20.0
"""In which strangers that have gone are forgotten."""
BURN = """
import sys, time
part = float(sys.argv[1])
while True:
    until = time.process_time() + 0.05 * part
    began = time.monotonic()
    while time.process_time() < until:
        pass
    time.sleep(max(0, began + 0.05 - time.monotonic()))
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the honest had in some seconds."""

    epochs: Epochs
    join_s: float


class Swarm:
    """Two nodes that train, and a third that comes and goes."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        for number in range(3):
            nodes.infos.append(nodes.ask(number, "up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"))
        task = ("--task", "gym:CartPole-v1", "--algorithm", "ppo", "--target-return", "100000")
        created = nodes.ask(0, "swarm", "create", *task)
        self.swarm, self.ticket = created["swarm"], created["ticket"]
        nodes.ask(1, "join", self.ticket, "--detach")
        self.pids = [int(info["pid"]) for info in nodes.infos]
        self.join()  # whatever is done at a first time is done

    def client(self, number: int) -> Client:
        return Client(NodeConfig(home=self.nodes.home, profile=f"n{number}").paths, f"n{number}")

    def join(self) -> float:
        """How long a join of the third takes."""
        began = time.monotonic()
        self.nodes.ask(2, "join", self.ticket, "--detach")
        took_s = time.monotonic() - began
        self.nodes.ask(2, "leave", self.swarm)
        return took_s

    def measure(self, seconds: float) -> Measured:
        """For about so long."""
        with self.client(0) as one, self.client(1) as two:
            epochs = measure((one, two), self.pids[:2], self.swarm, seconds)
        return Measured(epochs, self.join())

    def wait_quiet(self) -> None:
        """Until those who attacked are forgotten."""
        until = time.monotonic() + QUIET_S
        with self.client(0) as client:
            while client.node().num_peers > 2 and time.monotonic() < until:
                time.sleep(0.1)


class Watched:
    """What the node under attack takes of the machine."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.max_rss = self.max_descriptors = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            with suppress(OSError, StopIteration):
                lines = (self._folder / "status").read_text(encoding="ascii").splitlines()
                rss = 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])
                self.max_rss = max(self.max_rss, rss)
                self.max_descriptors = max(self.max_descriptors, len(list((self._folder / "fd").iterdir())))

    def stop(self) -> None:
        self._stopped.set()


@contextmanager
def burning(part: float) -> Iterator[None]:
    """Somebody takes this part of one processor."""
    process = subprocess.Popen([sys.executable, "-c", BURN, f"{part:.3f}"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def play(swarm: Swarm, name: str, seconds: float) -> tuple[list[str], bool]:
    """One attack; the cells of its row, and whether the node kept to its promises."""
    info = swarm.nodes.infos[0]
    _, _, ip, _, port, *_ = info["addresses"][0].split("/")
    before = swarm.measure(seconds)
    watched = Watched(swarm.pids[0])
    words = [sys.executable, str(Path(__file__).with_name("attackers.py")), name, info["peer_id"], ip, port]
    attacker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert attacker.stdin is not None
    assert attacker.stdout is not None
    began_s = time.monotonic()
    is_set_up = json.loads(attacker.stdout.readline())["is_set_up"]
    set_up_s = time.monotonic() - began_s
    began, cpu = time.monotonic(), cpu_s(attacker.pid)
    meanwhile = swarm.measure(seconds)
    load = (cpu_s(attacker.pid) - cpu) / (time.monotonic() - began)
    attacker.stdin.close()
    spent = json.loads(attacker.stdout.readline())
    attacker.wait()
    watched.stop()
    swarm.wait_quiet()
    with burning(min(load, 1.0)):
        after = swarm.measure(seconds)
    one, other, two = before.epochs, after.epochs, meanwhile.epochs
    per_epoch = statistics.mean((one.cpu_s, other.cpu_s)) / two.cpu_s
    fits = watched.max_rss <= MAX_MIB * MIB
    return [
        name if is_set_up else f"{name} (not set up in {SET_UP_S} s)",
        f"{spent['num']}, {spent['num_bytes'] / 1e6:.1f} MB, {load:.2f} CPU, {set_up_s:.0f} s",
        f"{watched.max_rss / MIB:.0f}",
        f"{watched.max_descriptors}",
        f"{spent['num_dialed']}",
        f"{statistics.mean((one.node_load, other.node_load)):.2f} / {two.node_load:.2f}",
        f"{before.join_s:.1f}, {after.join_s:.1f} / {meanwhile.join_s:.1f}",
        f"{one.per_s:.2f}, {other.per_s:.2f} / {two.per_s:.2f}",
        f"{two.per_s / other.per_s:.2f}" if other.per_s else "-",
        f"{per_epoch:.2f}",
    ], fits and two.per_s > 0


HEAD: Final = (
    *("attack", "acts, bytes, load, set up", "node MiB", "descriptors", "dialed", "node's load without / with"),
    *("join s without / with", "epochs/s without / with", "with : burner", "epochs per CPU s, with : without"),
)


def main() -> int:
    """Play the attacks, print a table; 1 if a node ended, the swarm stood still or the memory was too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--only", default=",".join(ATTACKS))
    arguments = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory() as home:
        nodes = Nodes(Path(home), 3)
        try:
            swarm = Swarm(nodes)
            print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
            for name in arguments.only.split(","):
                row, kept = play(swarm, name, arguments.seconds)
                is_good &= kept
                print("| " + " | ".join(row) + " |", flush=True)
        finally:
            nodes.stop()
    return int(not is_good)


if __name__ == "__main__":
    raise SystemExit(main())
