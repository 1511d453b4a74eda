"""The scene for a network of its own, in which `test_lives_on.py` runs this file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from shoal.crdt.presence import PresenceTable
from shoal.node.mesh.host import open_host
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import GossipPush, SwarmService
from shoal.protocol.services import client
from shoal.protocol.signing import Signer
from shoal.training.statements import TOPIC_RULES

from .lives import ON_A_LAN, Failures, Scene, all_fail, running

pytestmark = pytest.mark.trio

ANYWHERE = "/ip4/0.0.0.0/tcp/0"


@pytest.fixture(autouse=True)
def _process(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    caplog.get_records("call").clear()  # they hold what failed, and with it their sockets


# A task that fails before it has begun closes nothing of what it was handed; what fails later does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_node_and_its_other_swarm_live_on_when_each_task_of_a_lan_fails_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.swarm.members.SMALL", 0)  # so that gossip says who is dialed
    numbers = itertools.count()
    async with running(Scene(tmp_path / "friend")) as friend:
        bootstrap = tuple(friend.node().addresses)
        scene = Scene(tmp_path / "node", bootstrap=bootstrap, listen=ANYWHERE)
        failures = Failures(scene, {*ON_A_LAN, "looking around on the LAN"})

        async with (
            running(scene, failures.seam) as node,
            open_host(secret=b"l" * 32, listen=[ANYWHERE], bootstrap=[], mdns=True, router=Router()) as neighbour,
            trio.open_nursery() as nursery,
        ):

            async def a_member_is_heard_of() -> None:
                """One that nobody is connected to, so that it is for gossip to have it dialed."""
                member = Signer(f"member {next(numbers)}".encode().ljust(32))
                table = PresenceTable(scene.first, member.peer_id, 1, TOPIC_RULES)
                addresses = [f"/ip4/127.0.0.1/tcp/1/p2p/{member.peer_id}"]
                record = table.announce(member, "addresses", {"addresses": addresses}, 1.0).sealed
                await neighbour.connect([each for each in node.node().addresses if "/tcp/" in each])
                to_node = client(SwarmService, neighbour.at(node.node().peer_id), timeout_s=5)
                await to_node.gossip(GossipPush(scene.first, (record,), (), ()))
                await trio.sleep(1)  # as often as gossip is told who is known

            nursery.start_soon(failures.make, (a_member_is_heard_of, ("reaching a neighbour",)))
            await all_fail(failures, node)
            await failures.check(caplog)
            nursery.cancel_scope.cancel()
