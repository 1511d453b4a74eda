"""Scenes in which the tasks of a node begin, and fail: what the tests that it lives on are made of."""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

import shoal.node
from shoal.node.api.client import Client
from shoal.node.api.schemas import FailureInfo, SwarmDetail
from shoal.node.config import NodeConfig, ReachConfig
from shoal.node.daemon import Node, run_node
from shoal.node.identity import load_or_create_identity
from shoal.node.mesh.circuits import BROKEN
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.supervise import Policy
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import SwarmId
from shoal.protocol.signing import Signer
from shoal.training.manifest import Manifest, sign_manifest

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 120.0
TRY_S = 30.0
"""How long one try may take to make a task begin, before it is made again."""
OWNER = Signer(b"o" * 32)
ALIVE = ("storing", "starting")
WHY = "it was made to fail"


def supervised(source: str) -> Iterator[tuple[str, Policy]]:
    """The tasks that a source starts in a failure domain, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            name, by = node.args[0], node.func.attr
            policies = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "policy"]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and (policies or by in ("call", "serve")):
                yield name.value, Policy[policies[0].rpartition(".")[2]] if policies else Policy.DROP


SOURCES = [path for folder in shoal.node.__path__ for path in sorted(Path(folder).rglob("*.py"))]
TASKS = dict(task for path in SOURCES for task in supervised(path.read_text(encoding="utf-8")))


ON_A_LAN = {"mapping the port", "meeting a neighbour on the LAN", "reaching a neighbour"}
"""Tasks that begin in a network alone, or in a swarm too large for everybody to be connected to everybody."""
OF_A_LEARNER = {"learning the task", "fetching a shard", "giving a copy"}
"""The first begins where a task does not work, and fails at once: `test_bad_environments` has one. The others begin
where others act: `test_rollouts` has the second fail."""


async def until(holds: Callable[[], object]) -> None:
    """Wait for what no event tells of."""
    with trio.fail_after(GENEROUS_S):
        while not holds():  # noqa: ASYNC110  see above
            await trio.sleep(0.01)


@dataclass
class Scene:
    """A profile that is in two swarms, in which it stores."""

    home: Path
    role: str = "storage"
    bootstrap: tuple[str, ...] = ()
    listen: str = LOOPBACK
    config: NodeConfig = field(init=False)
    first: SwarmId = field(init=False)
    second: SwarmId = field(init=False)

    def __post_init__(self) -> None:
        reach = ReachConfig(port_mapping=self.listen != LOOPBACK, relay="on")
        self.config = NodeConfig(
            home=self.home, profile="p", listen=(self.listen,), mdns=True, bootstrap=self.bootstrap, reach=reach
        )
        self.config.paths.create()
        self.signer = load_or_create_identity(self.config.paths.identity).signer
        self.first, self.second = (self._joined(seed) for seed in (1, 2))

    def _joined(self, seed: int) -> SwarmId:
        manifest = Manifest(owner=OWNER.peer_id, task="gym:CartPole-v1", algorithm="ppo", seed=seed)
        swarm, data = sign_manifest(manifest, OWNER)
        role = self.role if seed == 1 else "storage"
        with self.storage() as storage:
            storage.add_swarm(StoredSwarm(swarm=swarm, manifest=data, role=role, joined_at=float(seed), addresses=()))
        return swarm

    def storage(self) -> _Stored:
        return _Stored(self.config.paths.database)

    def has_left(self) -> list[bool]:
        with self.storage() as storage:
            return [entry.has_left for entry in storage.list_swarms()]


class _Stored:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Storage:
        self._storage = Storage(self._path)
        return self._storage

    def __exit__(self, *_: object) -> None:
        self._storage.close()


@asynccontextmanager
async def running(scene: Scene, seam: Callable[[str, str], None] | None = None) -> AsyncIterator[Node]:
    """The whole node of a scene."""
    async with trio.open_nursery() as nursery:
        is_ready = trio.Event()
        nodes: list[Node] = []

        def on_ready(node: Node) -> None:
            nodes.append(node)
            is_ready.set()

        nursery.start_soon(run_node, scene.config, on_ready, seam)
        with trio.fail_after(GENEROUS_S):
            await is_ready.wait()
        yield nodes[0]
        nodes[0].stop()


async def ask(scene: Scene, swarm: SwarmId) -> tuple[SwarmDetail, list[FailureInfo]]:
    """What the node's API says."""

    def asks() -> tuple[SwarmDetail, list[FailureInfo]]:
        with Client(scene.config.paths, scene.config.profile) as client:
            return client.swarm(swarm), client.metrics().failures

    return await trio.to_thread.run_sync(asks)


# --- tasks that fail ---


class Failures:
    """Makes each task raise when it first begins, but for those of a scene's second swarm."""

    def __init__(self, scene: Scene, expected: set[str]) -> None:
        self.scene = scene
        self.expected = expected
        self.failed_in: dict[str, str] = {}
        self.is_over = False
        """Whether nothing more is made to fail."""
        self._begun: Counter[tuple[str, str]] = Counter()

    def seam(self, domain: str, name: str) -> None:
        """A task begins."""
        self._begun[domain, name] += 1
        if not self.is_over and name not in self.failed_in and str(self.scene.second) not in domain:
            self.failed_in[name] = domain
            raise ZeroDivisionError(f"{WHY}: {name};")

    def missing(self) -> set[str]:
        """What is expected and has not begun, or not begun again; a peer may be gone before it does."""
        failed = {name: domain for name, domain in self.failed_in.items() if not domain.startswith("peer")}
        again = {name for name, domain in failed.items() if TASKS[name] is Policy.RESTART}
        return (self.expected - self.failed_in.keys()) | {
            name for name in again & self.expected if self._begun[failed[name], name] < 2
        }

    async def make(self, *happenings: tuple[Callable[[], Awaitable[object]], tuple[str, ...]]) -> None:
        """Do these, one after the other and again and again, until all tasks have begun that are to begin by them."""
        while missing := [act for act, names in happenings if not self.failed_in.keys() >= set(names)]:
            for act in missing:
                with contextlib.suppress(ShoalError, *BROKEN), trio.move_on_after(TRY_S):
                    await act()
                await trio.sleep(0.05)

    async def check(self, caplog: pytest.LogCaptureFixture) -> None:
        """The node goes on: it is in both swarms, counts each failure and has told it once."""
        scene = self.scene
        shown, failures = await ask(scene, scene.second)
        assert (shown.phase in ALIVE, shown.error) == (True, None), shown
        own = {each.task: each.count for each in failures if each.fault == "own"}
        assert own == dict.fromkeys(self.failed_in, 1), own
        assert scene.has_left() == [False, False]
        for task, domain in self.failed_in.items():
            told = [record for record in caplog.records if f"{WHY}: {task};" in record.getMessage()]
            assert len(told) == 1, (task, told)
            assert f"{domain}: {task} failed" in told[0].getMessage()
            assert told[0].exc_info is not None


async def all_fail(failures: Failures, node: Node) -> None:
    """Wait until everything that is expected has failed, and the node is as it was."""
    scene = failures.scene
    with trio.move_on_after(GENEROUS_S):
        await until(lambda: not failures.missing())
    assert not failures.missing(), failures.missing()
    failures.is_over = True
    await until(lambda: scene.first in node.node().swarms and node.swarm(scene.first).phase in ALIVE)
    await until(lambda: Path(scene.config.paths.api).exists())
