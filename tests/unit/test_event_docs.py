"""The events that a node sends are those that docs/api.md names, with the data that it names."""

from __future__ import annotations

import re
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from shoal.node.api.schemas import NodeInfo, SwarmDetail
from shoal.node.daemon import Node
from shoal.node.signals import Signal
from shoal.protocol.ids import PeerId, SwarmId

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
ME = PeerId.of_public_key(bytes([1]) * 32)
SWARM = SwarmId.of_manifest(b"x")


class OneSwarm(Node):
    """A node without a network, in one swarm."""

    def __init__(self) -> None:
        self._swarms: Any = SimpleNamespace(joined={SWARM: None}, changed=Signal())
        self.uptime_s = 0.0

    def node(self) -> NodeInfo:
        self.uptime_s += 1
        return NodeInfo(
            peer_id=ME, addresses=[], profile="p", pid=1, version="0", uptime_s=self.uptime_s, num_peers=0, alone=True
        )

    def _detail(self, _: Any) -> SwarmDetail:
        return SwarmDetail(swarm=SWARM, task="t", algorithm="a", role="r", phase="p", epoch=0, mode="local", owner=ME)


@pytest.mark.trio
async def test_the_events_that_a_node_sends_are_those_of_the_page(autojump_clock: trio.testing.MockClock) -> None:
    node = OneSwarm()
    sent = {}
    async with node.events() as stream, aclosing(stream) as events:
        async for event in events:
            sent[event.name] = event.data
            if event.name == "swarm":
                node._swarms.joined.clear()
                node._swarms.changed.set()
            if event.name == "left":
                break
    section = PAGE.read_text(encoding="utf-8").partition("**Events**")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sent.keys()
    assert sent["node"].keys() == NodeInfo.model_fields.keys() - {"uptime_s", "use"}
    assert sent["swarm"] == node._detail(None).model_dump(mode="json")
    assert sent["left"] == {"swarm": SWARM}
