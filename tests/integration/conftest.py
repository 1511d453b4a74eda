"""Real nodes: each its own process with its own profile, driven by the command line alone."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.spawn import kill_tree, wait_gone
from shoal.node.api.client import Client
from shoal.node.api.schemas import MetricsInfo
from shoal.node.config import NodeConfig
from shoal.node.lock import lock_holder

SHARE = os.environ.pop("SHOAL_TEST_SHARE", None)
"""A folder in which several runs of these tests tell each other which files they have taken; none inherits it."""
LONG = (
    "coming_back",
    "links",
    "demo",
    "lan",
    "bad_environments",
    "hostile",
    "lives_on",
    "loop",
    "swarm",
    "reach",
    "portmap",
)
"""Files that take long: they are begun first, so that all who share end at about the same time. No more than a hint."""
SHOAL = [sys.executable, "-m", "shoal.cli.main"]
END_S = 30.0
LOOPBACK = ("--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In which order they are taken, where they are shared."""
    if SHARE is not None:
        order = {f"test_{name}": place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Whether another run has taken the file of this test: then that one shows what comes of it."""
    return None if SHARE is None or _is_ours(item.path.name) else True


@cache
def _is_ours(name: str) -> bool:
    try:
        (Path(str(SHARE)) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Node:
    """One node on this machine."""

    def __init__(self, home: Path, profile: str, *options: str) -> None:
        self.home = home
        self.profile = profile
        self.options = options
        self.config = NodeConfig(home=home, profile=profile)
        self.info: dict[str, Any] = {}

    @property
    def peer_id(self) -> str:
        return str(self.info["peer_id"])

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SHOAL_HOME": str(self.home)}

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [*SHOAL, *words, "--profile", self.profile]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, (
            f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ask(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json").stdout.strip().splitlines()[-1])

    def up(self, *options: str) -> "Node":
        self.info = self.ask("up", "-d", *LOOPBACK, *self.options, *options)
        return self

    def create(self, *options: str) -> dict[str, str]:
        created: dict[str, str] = self.ask(
            "swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo", *options
        )
        return created

    def wait_for(self, swarm: str, promise: str, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 90) -> Any:
        """Follow ``shoal watch`` until what it shows is as promised."""
        command = [*SHOAL, "watch", swarm, "--json", "--profile", self.profile]
        watch = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        timer = threading.Timer(timeout_s, watch.kill)
        timer.start()
        last: dict[str, Any] = {}
        try:
            assert watch.stdout is not None
            for line in watch.stdout:
                shown = json.loads(line)
                if "epoch" in shown:
                    last = shown
                    if holds(shown):
                        return shown
            pytest.fail(f"{promise}: not within {timeout_s} s; last seen {last}\n{self.log()}")
        finally:
            timer.cancel()
            watch.kill()
            watch.communicate()

    def wait_until_connected(self) -> None:
        """Returns when the node has a peer; the events of its API say so."""
        with Client(self.config.paths, self.profile) as client, client.events() as events:
            for event in events:
                if event is not None and event.name == "node" and event.data["num_peers"] > 0:
                    return

    def metrics(self) -> MetricsInfo:
        with Client(self.config.paths, self.profile) as client:
            return client.metrics()

    def workers(self) -> list[int]:
        tasks = Path(f"/proc/{self.info['pid']}/task").glob("*/children")  # listed by the thread that started them
        return [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]

    def kill(self) -> None:
        """The node and its workers are gone at once, as in a power cut."""
        for pid in (int(self.info["pid"]), *self.workers()):
            os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        path = self.home / "profiles" / self.profile / "node.log"
        return path.read_text(encoding="utf-8")[-4000:] if path.exists() else ""


@contextmanager
def nodes_in(home: Path) -> Iterator[Callable[..., Node]]:
    """Makes nodes, and ends them with the block: by a signal, all at once."""
    nodes: list[Node] = []

    def make(*options: str) -> Node:
        nodes.append(Node(home, f"node{len(nodes)}", *options))
        return nodes[-1].up()

    try:
        yield make
    finally:
        pids = {node: pid for node in nodes if (pid := lock_holder(node.config.paths.lock)) is not None}
        for pid in pids.values():
            os.kill(pid, signal.SIGTERM)
        hung = [node for node, pid in pids.items() if not wait_gone(pid, END_S)]
        for node in hung:
            kill_tree(pids[node])
        assert not hung, "\n\n".join(node.log() for node in hung)


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Makes nodes, and ends them with the test."""
    with nodes_in(tmp_path) as make:
        yield make
