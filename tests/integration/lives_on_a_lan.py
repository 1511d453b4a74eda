"""The scene for a network of its own, in which `test_lives_on.py` runs this file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from shoal.node.daemon import Node
from shoal.node.mesh.host import open_host
from shoal.node.wire.channel import Router
from shoal.protocol.ids import PeerId

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

        async def a_member_joins() -> None:
            """One that waits to be dialed."""
            async with running(Scene(tmp_path / f"member{next(numbers)}", bootstrap=bootstrap)) as member:
                dials_nobody_but(member, friend.node().peer_id)
                await node._host.wait_connected(member.node().peer_id)

        async with (
            running(scene, failures.seam) as node,
            open_host(secret=b"l" * 32, listen=[ANYWHERE], bootstrap=[], mdns=True, router=Router()),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(failures.make, (a_member_joins, ("reaching a neighbour",)))
            await all_fail(failures, node)
            await failures.check(caplog)
            nursery.cancel_scope.cancel()


def dials_nobody_but(member: Node, friend: PeerId) -> None:
    dialer = member._host._dialer
    dial = dialer._dial

    async def dials(peer: PeerId, address: str) -> None:
        if peer != friend:
            raise OSError("it waits to be dialed")
        await dial(peer, address)

    dialer._dial = dials
