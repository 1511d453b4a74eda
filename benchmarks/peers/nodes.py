"""Real nodes on this machine for a benchmark: started in the background, asked by their API, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shoal.cli.spawn import descendants, kill_tree, wait_gone
from shoal.node.api.client import Client
from shoal.node.config import NodeConfig

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
COMMAND_TIMEOUT_S = 120
FIRST_EPOCH_TIMEOUT_S = 120.0
STOP_S = 10.0


@dataclass(frozen=True)
class Node:
    """A node that runs; `pid` is its daemon's."""

    home: Path
    profile: str
    pid: int
    peer_id: str

    def client(self) -> Client:
        """Of its local API."""
        return Client(NodeConfig(home=self.home, profile=self.profile).paths, self.profile)

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, object]:
        """One command to it; its answer."""
        return shoal(self.home, self.profile, *words, environment=environment)

    def daemon_s(self) -> float:
        """Processor seconds of the daemon so far."""
        return processor_s(self.pid)

    def workers_s(self) -> float:
        """Processor seconds of the workers that run."""
        return sum(processor_s(pid) for pid in descendants(self.pid))


def processor_s(pid: int) -> float:
    """User and system seconds of all threads of a process; without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def shoal(home: Path, profile: str, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, object]:
    """Run one command of a node and read its answer."""
    command = [sys.executable, "-m", "shoal.cli.main", *words, "--profile", profile, "--json"]
    given = os.environ | {"SHOAL_HOME": str(home)} | dict(environment or {})
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"shoal {' '.join(words)} of {profile} failed: {done.stdout}{done.stderr}")
    answer: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class Nodes:
    """Those of one benchmark, under one folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._running: list[Node] = []

    def up(self, profile: str, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> Node:
        """Start one; it hears of nobody by itself."""
        words = ("up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0", *options)
        started = shoal(self.home, profile, *words, environment=environment)
        node = Node(self.home, profile, int(str(started["pid"])), str(started["peer_id"]))
        self._running.append(node)
        return node

    def down(self) -> None:
        """Stop all: first all are asked, then those that are left are killed, with their workers."""
        for node in self._running:
            try:
                os.kill(node.pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
        ends = time.monotonic() + STOP_S
        for node in self._running:
            if not wait_gone(node.pid, max(0.0, ends - time.monotonic())):
                kill_tree(node.pid)
        self._running.clear()


def learn_together(running: list[Node], *options: str) -> str:
    """Let nodes learn CartPole-v1 in a swarm of their own, towards a return that cannot be reached.

    Gives its name, once all are in it and the first epoch is over.
    """
    settings = ("--min-learners", str(len(running)), "--target-return", "100000", *options)
    created = running[0].run("swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo", *settings)
    swarm = str(created["swarm"])
    for node in running[1:]:
        node.run("join", str(created["ticket"]), "-d")
    ends = time.monotonic() + FIRST_EPOCH_TIMEOUT_S
    with running[0].client() as client:
        while client.swarm(swarm).epoch == 0:
            if time.monotonic() > ends:
                raise SystemExit(f"the first epoch has not come in {FIRST_EPOCH_TIMEOUT_S:.0f} s")
            time.sleep(0.5)
    return swarm


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A folder for nodes that are down, and deleted, however the block ends: also by Ctrl-C or SIGTERM."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            started = Nodes(Path(folder))
            try:
                yield started
            finally:
                started.down()
    finally:
        signal.signal(signal.SIGTERM, before)
