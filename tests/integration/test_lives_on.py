"""Nothing that fails in a node ends it: each background task in turn is made to raise, and the rest goes on.

The tasks are read from the source, so that one that is added is in this test from then on.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from libp2p.peer.id import ID

import shoal.node
from shoal.crdt.sync import Head
from shoal.node.api.client import Client
from shoal.node.api.schemas import FailureInfo, SwarmDetail
from shoal.node.config import NodeConfig, ReachConfig
from shoal.node.daemon import Node, run_node
from shoal.node.identity import load_or_create_identity
from shoal.node.mesh.circuits import BROKEN
from shoal.node.mesh.connections import ClosePath, LetGo
from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.reach.punch import DCUTR_PROTOCOL, PunchError
from shoal.node.reach.webrtc import open_webrtc
from shoal.node.store.database import Storage, StorageError, StoredSwarm
from shoal.node.supervise import Policy, Supervisor
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.swarms import Swarms
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import ReachService, SessionDescription, SwarmService, SyncRequest
from shoal.protocol.codec import encode
from shoal.protocol.errors import RemoteError, ShoalError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import client
from shoal.protocol.signing import Signer
from shoal.training.manifest import Manifest, sign_manifest
from shoal.training.run_events import Fetch
from shoal.training.ticket import Ticket

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 30.0
OWNER = Signer(b"o" * 32)
STRANGER = Signer(b"s" * 32).peer_id
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


NOT_IN_THE_SCENE = {
    "mapping the port": "a node that listens on loopback alone asks no router",
    "meeting a neighbour on the LAN": "it is not looked for on loopback",
    "reaching a neighbour": "in a swarm so small every member is dialed, and not those alone whom gossip wants",
}
"""Tasks that do not begin in the scene, and why."""


async def until(holds: Callable[[], object]) -> None:
    """Wait for what no event tells of."""
    with trio.fail_after(GENEROUS_S):
        while not holds():  # noqa: ASYNC110  see above
            await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """A node changes its process: how it takes signals, and what its collector looks at."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    gc.unfreeze()
    gc.collect()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass
class Scene:
    """A profile that is in two swarms, in which it stores."""

    home: Path
    role: str = "storage"
    bootstrap: tuple[str, ...] = ()
    config: NodeConfig = field(init=False)
    first: SwarmId = field(init=False)
    second: SwarmId = field(init=False)

    def __post_init__(self) -> None:
        reach = ReachConfig(port_mapping=False, relay="on")
        self.config = NodeConfig(
            home=self.home, profile="p", listen=(LOOPBACK,), mdns=True, bootstrap=self.bootstrap, reach=reach
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


# --- each task -------------------------------------------------------------------------------------------------------


async def test_the_tasks_are_found() -> None:
    assert {"living", "run", "following the host", "the local API"} <= TASKS.keys()
    source = "domain.start_soon('a', f, policy=Policy.END)\nd.call('b', f)\nnursery.start_soon(f)\nx.start('c', f)"
    assert list(supervised(source)) == [("a", Policy.END), ("b", Policy.DROP)]


# A task that fails before it has begun closes nothing of what it was handed; what fails later does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_node_and_its_other_swarm_live_on_when_each_task_fails_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = itertools.count(1)  # the machine comes to another one each second
    monkeypatch.setattr("shoal.node.reach.reach.local_ips", lambda: {f"192.0.2.{next(networks) % 250}"})
    failed_in: dict[str, str] = {}
    begun: Counter[tuple[str, str]] = Counter()
    expected = TASKS.keys() - NOT_IN_THE_SCENE.keys()

    def seam(domain: str, name: str) -> None:
        begun[domain, name] += 1
        if name not in failed_in and str(scene.second) not in domain:
            failed_in[name] = domain
            raise ZeroDivisionError(f"{WHY}: {name};")

    def all_have_failed() -> bool:
        again = [(failed_in[name], name) for name in expected & failed_in.keys() if TASKS[name] is Policy.RESTART]
        return expected <= failed_in.keys() and all(begun[task] > 1 for task in again if not task[0].startswith("peer"))

    async with running(Scene(tmp_path / "friend")) as friend:
        scene = Scene(tmp_path / "node", bootstrap=tuple(friend.node().addresses))
        async with running(scene, seam) as node:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(be_strange_to, node, friend, scene.first)
                nursery.start_soon(lose_again_and_again, node, friend.node().peer_id, scene.first)
                with trio.move_on_after(GENEROUS_S):
                    await until(all_have_failed)
                nursery.cancel_scope.cancel()
            assert expected - failed_in.keys() == set()
            assert all_have_failed()
            await until(lambda: scene.first in node.node().swarms and node.swarm(scene.first).phase in ALIVE)
            await until(lambda: Path(scene.config.paths.api).exists())
            shown, failures = await ask(scene, scene.second)
        assert shown.phase in ALIVE
        assert shown.error is None
        own = {each.task: each.count for each in failures if each.fault == "own"}
        assert own == dict.fromkeys(failed_in, 1)
        assert scene.has_left() == [False, False]
    check_told(caplog, failed_in)
    caplog.clear()  # it holds what failed, and with it their sockets


def check_told(caplog: pytest.LogCaptureFixture, failed_in: dict[str, str]) -> None:
    """Each failure is in the log once, with its task and where that was."""
    for task, domain in failed_in.items():
        told = [record for record in caplog.records if f"{WHY}: {task};" in record.getMessage()]
        assert len(told) == 1
        assert f"{domain}: {task} failed" in told[0].getMessage()
        assert told[0].exc_info is not None


async def be_strange_to(node: Node, friend: Node, swarm: SwarmId) -> None:
    """Hosts that come and go, by every way in, and what else happens to a node; again and again."""
    name, host, climber = node.node().peer_id, node._host, node._reach._climber
    for number in itertools.count():
        first = 3 * number % 250
        async with stranger(node, first) as one, stranger(node, first + 1) as other, plain(first + 2) as hidden:
            with contextlib.suppress(ShoalError, *BROKEN):
                one.relay.open()
                await hidden.connect(one.addresses())
                await hidden.relay.reserve(one.peer_id)
                await host.relay.reserve(one.peer_id)
                await host.connect([f"{one.addresses()[0]}/p2p-circuit/p2p/{hidden.peer_id}"])
                async with open_webrtc() as webrtc:
                    offer = await webrtc.offer([])
                    reach = client(ReachService, hidden.at(name), timeout_s=5)
                    await reach.webrtc(SessionDescription(offer.sdp))
                    await offer.aclose()
            with contextlib.suppress(ShoalError, *BROKEN):
                await hidden.disconnect(name)
                await hidden.relay.dial(f"{one.addresses()[0]}/p2p-circuit/p2p/{name}")
            with contextlib.suppress(ShoalError, *BROKEN):
                await one.relay.reserve(name)
                await other.relay.dial(f"{node.node().addresses[0]}/p2p-circuit/p2p/{one.peer_id}")
            with contextlib.suppress(Exception):
                await one.libp2p.new_stream(ID.from_base58(name), [DCUTR_PROTOCOL])
            with contextlib.suppress(PunchError):
                await climber._puncher._dial_all(other.peer_id, [("127.0.0.1", 1)], None, is_initiator=True)
            lane = await friend._host.links.dial_bulk_lane(name)
            if lane is not None:
                lane.close()
            if swarm in node.node().swarms:
                node._swarms.get(swarm).run._do(Fetch(Cid.of_block(b"nobody has this"), (), keep=False))
            if other.peer_id in host.connected:
                host._carry_out(ClosePath(host.connected[other.peer_id].best.id))
                host._carry_out(LetGo(other.peer_id))
            with contextlib.suppress(ShoalError, *BROKEN):
                ahead = SyncRequest(swarm, encode({str(friend.node().peer_id): Head(99, bytes(32))}))
                await client(SwarmService, one.at(name), timeout_s=1).sync(ahead)
            await trio.sleep(0.1)


async def lose_again_and_again(node: Node, friend: PeerId, swarm: SwarmId) -> None:
    """The connections to another member end whenever it has just become one."""
    while True:
        joined = node._swarms.joined.get(swarm)
        if joined is not None and friend in joined.replica.neighbours and friend in joined.replica.live:
            await node._host.disconnect(friend)
        await trio.sleep(0.2)


@asynccontextmanager
async def plain(number: int) -> AsyncIterator[Host]:
    """A host."""
    secret = bytes([number]) * 32
    async with open_host(secret=secret, listen=[LOOPBACK], bootstrap=[], mdns=False, router=Router()) as host:
        yield host


@asynccontextmanager
async def stranger(node: Node, number: int) -> AsyncIterator[Host]:
    """A host that connects to the node, and goes again."""
    async with plain(number) as host:
        with contextlib.suppress(ShoalError):
            await host.connect(node.node().addresses)
        yield host


# --- a swarm that ends -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def swarms_of(scene: Scene) -> AsyncIterator[Swarms]:
    """The swarms of a scene, without the rest of the node."""
    router = Router()
    secret = load_or_create_identity(scene.config.paths.identity).secret
    with scene.storage() as storage, trio.fail_after(GENEROUS_S):
        async with (
            Supervisor().open("node") as domain,
            open_host(secret=secret, listen=[LOOPBACK], bootstrap=[], mdns=False, router=router) as host,
        ):
            swarms = Swarms(
                signer=scene.signer,
                host=host,
                storage=storage,
                content=ContentStore(storage, host),
                paths=scene.config.paths,
                domain=domain,
            )
            for service in swarms.services():
                router.add(service)
            await swarms.take_up()
            yield swarms
            domain.cancel()


async def fails() -> None:
    raise ZeroDivisionError(WHY)


async def end_by_a_failure(swarms: Swarms, swarm: SwarmId) -> None:
    await until(lambda: swarm in swarms.joined and swarms.get(swarm).domain is not None)
    domain = swarms.get(swarm).domain
    assert domain is not None
    domain.start_soon("a task", fails, policy=Policy.END)
    await until(lambda: swarms.get(swarm).failure)


async def test_a_swarm_that_ends_by_a_failure_is_shown_as_failed_and_is_not_left(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with swarms_of(scene) as swarms:
        await end_by_a_failure(swarms, scene.first)
        failed = swarms.get(scene.first)
        assert str(failed.phase) == "failed"
        assert failed.error is not None
        assert WHY in failed.error
        assert str(swarms.get(scene.second).phase) in ALIVE
    assert scene.has_left() == [False, False]
    async with swarms_of(scene) as swarms:
        await until(lambda: scene.first in swarms.joined and str(swarms.get(scene.first).phase) in ALIVE)
        assert swarms.get(scene.first).error is None


async def test_a_swarm_that_failed_is_entered_again_when_it_is_joined_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with swarms_of(scene) as swarms:
        await end_by_a_failure(swarms, scene.first)
        await swarms.join(Ticket.parse(swarms.ticket(scene.first)), "storage")
        assert str(swarms.get(scene.first).phase) in ALIVE
        assert swarms.get(scene.first).error is None


async def test_a_swarm_that_failed_can_be_left(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with swarms_of(scene) as swarms:
        await end_by_a_failure(swarms, scene.first)
        await swarms.leave(scene.first)
        with pytest.raises(UsageError):
            swarms.get(scene.first)
    assert scene.has_left() == [True, False]


async def test_a_peer_that_calls_and_comes_and_goes_while_a_swarm_is_left_harms_nobody(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    async with swarms_of(scene) as swarms, trio.open_nursery() as nursery:
        await until(lambda: len(swarms.joined) == 2 and all(each.domain for each in swarms.joined.values()))
        membership = swarms.get(scene.first)
        domain, replica = membership.domain, membership.replica
        assert domain is not None
        ahead = SyncRequest(scene.first, encode({str(scene.signer.peer_id): Head(99, bytes(32), 99)}))
        nursery.start_soon(swarms.leave, scene.first)
        while scene.first in swarms.joined:
            for event in (PeerUp(STRANGER), PeerDown(STRANGER), PeerUp(STRANGER)):
                swarms.handle(event)
            await replica.serve_sync(STRANGER, ahead)
            await trio.sleep(0.01)
        await replica.serve_sync(STRANGER, ahead)
        with pytest.raises(RemoteError, match="not in"):
            swarms.replica(scene.first)
        assert not domain.supervisor.failures
        assert str(swarms.get(scene.second).phase) in ALIVE
    assert scene.has_left() == [True, False]


async def test_content_that_cannot_be_read_is_one_error_and_not_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path)
    async with swarms_of(scene) as swarms:
        content = next(each for each in swarms.services() if isinstance(each, ContentStore))

        def get_block(*_: object) -> bytes:
            raise StorageError("the disk failed")

        monkeypatch.setattr(Storage, "get_block", get_block)
        with pytest.raises(StorageError, match="the disk failed"):
            await content.get(Cid.of_block(b"x"), (), keep=False)


# --- what a machine lacks --------------------------------------------------------------------------------------------


async def test_a_start_without_the_train_extra_keeps_the_run_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, role="learner")
    monkeypatch.setattr("shoal.node.swarm.workers.TRAINING_MODULES", ("a_module_that_is_not_there",))
    async with running(scene) as node:
        await until(lambda: node.swarm(scene.first).phase == "failed")
        shown, _ = await ask(scene, scene.first)
        assert shown.error is not None
        assert "pip install 'shoal[train]'" in shown.error
        await until(lambda: node.swarm(scene.second).phase in ALIVE)
        (listed,) = [summary for summary in node.swarms() if summary.swarm == scene.first]
        assert (listed.phase, listed.error) == ("failed", shown.error)
    assert scene.has_left() == [False, False]


async def test_a_worker_that_gets_no_descriptors_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path, role="learner")
    tries: list[float] = []

    async def open_process(*_: object, **__: object) -> trio.Process:
        tries.append(trio.current_time())
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("trio.lowlevel.open_process", open_process)
    async with running(scene) as node:
        await until(lambda: len(tries) >= 3)
        await until(lambda: node.swarm(scene.first).phase == "failed")
        shown, failures = await ask(scene, scene.first)
        assert shown.error is not None
        assert "ulimit -n" in shown.error
        assert {(each.task, each.fault) for each in failures} == {("living", "resource")}
        assert node.swarm(scene.second).phase in ALIVE
    assert tries[1] - tries[0] >= 0.5
    assert tries[2] - tries[1] >= 1
    assert all(record.exc_info is None for record in caplog.records)
    assert scene.has_left() == [False, False]
