"""Nothing that fails in a node ends it: each background task in turn is made to raise, and the rest goes on.

The tasks are read from the source, so that one that is added is in this test from then on.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from libp2p.peer.id import ID

from shoal.crdt.sync import Head
from shoal.node.daemon import Node
from shoal.node.identity import load_or_create_identity
from shoal.node.mesh.connections import ClosePath, LetGo
from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.reach.punch import DCUTR_PROTOCOL, PunchError
from shoal.node.reach.webrtc import open_webrtc
from shoal.node.store.blocks import BlockStore
from shoal.node.store.errors import StorageError
from shoal.node.store.remembered import Remembered
from shoal.node.supervise import Policy, Supervisor
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.swarms import Swarms
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import NodeService, ReachService, SessionDescription, SwarmService, SyncRequest
from shoal.protocol.codec import encode
from shoal.protocol.errors import RemoteError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import Empty, client
from shoal.protocol.signing import Signer
from shoal.training.exchange.direct import Part
from shoal.training.run_events import Fetch, Give
from shoal.training.statements import RoundKey
from shoal.training.ticket import Ticket

from .lives import (
    ALIVE,
    GENEROUS_S,
    LOOPBACK,
    OF_A_LEARNER,
    ON_A_LAN,
    TASKS,
    WHY,
    Failures,
    Scene,
    all_fail,
    ask,
    running,
    supervised,
    until,
)

pytestmark = pytest.mark.trio

STRANGER = Signer(b"s" * 32).peer_id


@pytest.fixture(autouse=True)
def _process(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A node changes its process: how it takes signals, and what its collector looks at."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    caplog.get_records("call").clear()  # they hold what failed, and with it their sockets
    gc.unfreeze()
    for _ in range(5):  # what one pass finalises may have held what the next one finds
        gc.collect()
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- each task -------------------------------------------------------------------------------------------------------


async def test_the_tasks_are_found() -> None:
    assert {"living", "run", "following the host", "the local API"} | ON_A_LAN <= TASKS.keys()
    source = "domain.start_soon('a', f, policy=Policy.END)\nd.call('b', f)\nnursery.start_soon(f)\nx.start('c', f)"
    assert list(supervised(source)) == [("a", Policy.END), ("b", Policy.DROP)]


# A task that fails before it has begun closes nothing of what it was handed; what fails later does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_node_and_its_other_swarm_live_on_when_each_task_fails_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = itertools.count(1)  # the machine comes to another one each second
    monkeypatch.setattr("shoal.node.reach.reach.local_ips", lambda: {f"192.0.2.{next(networks) % 250}"})
    async with running(Scene(tmp_path / "friend")) as friend:
        scene = Scene(tmp_path / "node", bootstrap=tuple(friend.node().addresses))
        failures = Failures(scene, TASKS.keys() - ON_A_LAN - OF_A_LEARNER)
        async with running(scene, failures.seam) as node:
            async with trio.open_nursery() as nursery:
                happenings = Happenings(node, friend, scene.first)
                nursery.start_soon(failures.make, *happenings.of_circuits())
                nursery.start_soon(failures.make, *happenings.of_others())
                nursery.start_soon(failures.make, *happenings.of_members())
                await all_fail(failures, node)
                nursery.cancel_scope.cancel()
            await failures.check(caplog)


Happening = tuple[Callable[[], Awaitable[object]], tuple[str, ...]]


@dataclass
class Happenings:
    """What happens to a node, by the tasks that begin by it: hosts come by every way in, and go, and others do not."""

    node: Node
    friend: Node
    swarm: SwarmId
    numbers: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(1, 250)))

    def of_circuits(self) -> Iterator[Happening]:
        """Each with the names of those tasks."""
        yield self.a_circuit_leads_out, ("climbing", "meeting a peer", "finding relays", "running a stream")
        yield self.a_circuit_leads_in, ("taking a circuit", "letting a stream go", "serving a stream")
        yield self.webrtc_is_offered, ("awaiting WebRTC",)
        yield self.it_relays, ("relaying",)

    def of_others(self) -> Iterator[Happening]:
        """Likewise."""
        yield self.a_punch_is_proposed, ("answering a punch",)
        yield self.a_punch_fails, ("ending a punch",)
        yield self.there_is_no_room, ("closing a path", "letting a peer go")
        yield self.somebody_comes_and_goes, ("accepting a lane", "keeping a lane", "keeping a peer alive")

    def of_members(self) -> Iterator[Happening]:
        """Likewise."""
        yield self.somebody_is_ahead, ("syncing with a peer",)
        yield self.news_is_lost, ("catching up",)
        yield self.it_is_outdone, ("noting an incarnation",)
        yield self.something_is_missing, ("fetching",)
        yield self.a_part_is_to_be_given, ("giving a part",)
        yield self.a_friend_pulls, ("serving a bulk lane",)
        yield self.a_friend_is_lost, ("telling who is gone", "reaching a member")

    @property
    def name(self) -> PeerId:
        return self.node.node().peer_id

    @property
    def address(self) -> str:
        return self.node.node().addresses[0]

    async def a_circuit_leads_out(self) -> None:
        async with self.stranger() as one, self.host() as hidden:
            await self._reserve(one, hidden)
            await self.node._host.relay.reserve(one.peer_id)
            await self.node._host.connect([f"{one.addresses()[0]}/p2p-circuit/p2p/{hidden.peer_id}"])
            await trio.sleep(0.5)  # as long as it takes to climb, or to fail

    async def a_circuit_leads_in(self) -> None:
        async with self.relayed() as hidden:
            await client(NodeService, hidden.at(self.name), timeout_s=5).ping(Empty())
            await hidden.dial(self.name, self.address)

    async def webrtc_is_offered(self) -> None:
        async with open_webrtc() as webrtc:
            offer = await webrtc.offer([])  # before there is a circuit, from which the node climbs
            async with self.relayed() as hidden:
                await client(ReachService, hidden.at(self.name), timeout_s=5).webrtc(SessionDescription(offer.sdp))
            await offer.aclose()

    async def it_relays(self) -> None:
        async with self.stranger() as one, self.stranger() as other:
            await one.relay.reserve(self.name)
            await other.relay.dial(f"{self.address}/p2p-circuit/p2p/{one.peer_id}")

    async def a_punch_is_proposed(self) -> None:
        async with self.stranger() as one:
            with contextlib.suppress(Exception):
                await one.libp2p.new_stream(ID.from_base58(self.name), [DCUTR_PROTOCOL])

    async def a_punch_fails(self) -> None:
        puncher = self.node._reach._climber._puncher
        assert puncher is not None
        async with self.stranger() as one:
            with contextlib.suppress(PunchError):
                await puncher._dial_all(one.peer_id, [("127.0.0.1", 1)], None, is_initiator=True)

    async def a_friend_pulls(self) -> None:
        lane = await self.friend._host.links.dial_bulk_lane(self.name)
        if lane is not None:
            lane.close()

    async def a_friend_is_lost(self) -> None:
        joined = self.node._swarms.joined.get(self.swarm)
        friend = self.friend.node().peer_id
        if joined is not None and friend in joined.replica.neighbours and friend in joined.replica.live:
            await self.node._host.disconnect(friend)

    async def something_is_missing(self) -> None:
        if self.swarm in self.node.node().swarms:
            run = self.node._swarms.get(self.swarm).run
            run._do(Fetch(Cid.of_block(b"nobody has this"), (), keep=False))

    async def a_part_is_to_be_given(self) -> None:
        if self.swarm in self.node.node().swarms:
            part = Part(RoundKey(0, 1, b"a" * 32), None, 0)
            self.node._swarms.get(self.swarm).run._do(Give(part, (PeerId(self.friend.node().peer_id),)))

    async def it_is_outdone(self) -> None:
        if self.swarm in self.node.node().swarms:
            self.node._swarms.get(self.swarm).replica._speaking.reannounce()

    async def somebody_is_ahead(self) -> None:
        async with self.stranger() as one:
            ahead = SyncRequest(self.swarm, encode({str(self.friend.node().peer_id): Head(99, bytes(32))}))
            await client(SwarmService, one.at(self.name), timeout_s=5).sync(ahead)

    async def news_is_lost(self) -> None:
        joined = self.node._swarms.joined.get(self.swarm)
        friend = self.friend.node().peer_id
        if joined is not None and friend in self.node._host.connected:
            joined.replica.peer_down(friend)  # and nobody says that it is there again

    async def there_is_no_room(self) -> None:
        host = self.node._host
        async with self.stranger() as one:
            await host.wait_connected(one.peer_id)
            host._carry_out(ClosePath(host.connected[one.peer_id].best.id))
            host._carry_out(LetGo(one.peer_id))

    async def somebody_comes_and_goes(self) -> None:
        async with self.stranger() as one:
            await client(NodeService, one.at(self.name), timeout_s=5).ping(Empty())
            await trio.sleep(0.5)  # as long as a lane takes

    async def _reserve(self, relay: Host, hidden: Host) -> None:
        relay.relay.open()
        await hidden.connect(relay.addresses())
        await hidden.relay.reserve(relay.peer_id)

    @asynccontextmanager
    async def host(self) -> AsyncIterator[Host]:
        """A host."""
        secret = bytes([next(self.numbers)]) * 32
        async with open_host(secret=secret, listen=[LOOPBACK], bootstrap=[], mdns=False, router=Router()) as host:
            yield host

    @asynccontextmanager
    async def relayed(self) -> AsyncIterator[Host]:
        """A host that has come to the node by a circuit."""
        async with self.stranger() as one, self.host() as hidden:
            await self._reserve(one, hidden)
            await self.node._host.relay.reserve(one.peer_id)
            await hidden.relay.dial(f"{one.addresses()[0]}/p2p-circuit/p2p/{self.name}")
            yield hidden

    @asynccontextmanager
    async def stranger(self) -> AsyncIterator[Host]:
        """A host that connects to the node, and goes again."""
        async with self.host() as host:
            await host.connect(self.node.node().addresses)
            yield host


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
async def test_so_they_do_on_a_lan_and_in_a_swarm_that_is_not_all_connected(tmp_path: Path) -> None:
    network = "ip link set lo up && ip link add eth0 type veth peer name far && ip addr add 10.77.0.1/24 dev eth0"
    network += " && ip link set far up && ip link set eth0 up && ip route add default via 10.77.0.254"
    scene = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("lives_on_a_lan.py"))]
    command = ["unshare", "--net", "sh", "-c", f'{network} && exec "$@"', "sh", *scene]
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'there'}"]
    # A task that is made to fail before its first line drops the socket that it was given.
    options += ["-W", "ignore:unclosed:ResourceWarning"]
    done = await trio.run_process([*command, *options], capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")


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
                remembered=Remembered(storage),
            )
            for service in swarms.services():
                router.add(service)
            await swarms.take_up()
            yield swarms
            domain.cancel()


async def fails() -> None:
    raise ZeroDivisionError(WHY)


async def end_by_a_failure(swarms: Swarms, swarm: SwarmId) -> None:
    await until(lambda: swarm in swarms.joined and swarms.get(swarm).domain)
    await until(lambda: str(swarms.get(swarm).phase) in ALIVE)
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

        monkeypatch.setattr(BlockStore, "get", get_block)
        monkeypatch.setattr(BlockStore, "has", lambda *_: True)
        with pytest.raises(StorageError, match="the disk failed"):
            await content.get(Cid.of_block(b"x"), ())


# --- what a machine lacks --------------------------------------------------------------------------------------------


async def test_a_start_without_the_train_extra_keeps_the_run_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, role="learner")
    monkeypatch.setattr("shoal.node.swarm.workers.TRAINING_MODULES", ("a_module_that_is_not_there",))
    async with running(scene) as node:
        await until(lambda: scene.first in node.node().swarms and node.swarm(scene.first).phase == "failed")
        shown, _ = await ask(scene, scene.first)
        assert shown.error is not None
        assert "pip install 'shoal[train]'" in shown.error
        await until(lambda: scene.second in node.node().swarms and node.swarm(scene.second).phase in ALIVE)
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
        await until(lambda: scene.first in node.node().swarms and node.swarm(scene.first).phase == "failed")
        shown, failures = await ask(scene, scene.first)
        assert shown.error is not None
        assert "ulimit -n" in shown.error
        assert {(each.task, each.fault) for each in failures} == {("living", "resource")}
        assert node.swarm(scene.second).phase in ALIVE
    assert tries[1] - tries[0] >= 0.5
    assert tries[2] - tries[1] >= 1
    assert all(record.exc_info is None for record in caplog.records)
    assert scene.has_left() == [False, False]
