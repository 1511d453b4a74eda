"""Circuits with js-libp2p: through a relay of either kind, to a peer of either kind, from one of either kind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID

from shoal.node.mesh.host import Host, open_host
from shoal.node.mesh.paths import PathKind
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import NodeService
from shoal.node.wire.links import RPC_PROTOCOL
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty, client

from .js import JsError, js_dialer, js_node

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 60.0
AGAIN_S = 10.0
ECHO = TProtocol("/interop/echo/1.0.0")


@asynccontextmanager
async def host() -> AsyncIterator[Host]:
    """A host that sends back what comes over the echo protocol of these tests."""
    with trio.fail_after(GENEROUS_S):
        async with open_host(
            secret=os.urandom(32), listen=[LOOPBACK], bootstrap=[], mdns=False, router=Router()
        ) as opened:
            opened.libp2p.set_stream_handler(ECHO, echo)
            yield opened


async def echo(stream: INetStream) -> None:
    with contextlib.suppress(StreamEOF):
        while data := await stream.read(4096):
            await stream.write(data)
    await stream.close()


async def echoed(one: Host, peer: PeerId, data: bytes) -> bytes:
    """What comes back of this; js drops one of two connections as a duplicate, with what is under way on it."""
    while True:
        with trio.move_on_after(AGAIN_S):
            stream = await one.libp2p.new_stream(ID.from_base58(str(peer)), [ECHO])
            await stream.write(data)
            await stream.close_write()
            answer = bytearray()
            with contextlib.suppress(StreamEOF):
                while received := await stream.read(4096):
                    answer += received
            await stream.close()
            return bytes(answer)


def circuit(relay_address: str, peer: str) -> str:
    return f"{relay_address}/p2p-circuit/p2p/{peer}"


async def test_js_is_reached_by_js_through_a_node(folder: Path) -> None:
    async with host() as relay:
        relay.relay.open()
        (address,) = relay.addresses()
        async with js_node(folder, listen=[f"{address}/p2p-circuit"]) as far, js_dialer(folder) as near:
            assert far.addresses == [circuit(address, far.peer_id)]
            facts = await near.ask("dial", address=far.addresses[0])
            assert (facts["peer_id"], facts["limited"]) == (far.peer_id, True)
            assert (facts["encryption"], facts["multiplexer"]) == ("/noise", "/yamux/1.0.0")
            text = "through a node " * 2000
            assert (await near.ask("echo", address=far.addresses[0], text=text))["text"] == text
            await near.ask("ping", address=far.addresses[0])
            assert (await near.ask("identified", peer=far.peer_id))["agent"].startswith("js-libp2p/")
            assert relay.relay.num_bytes > 2 * len(text), "it went through the node"


async def test_js_is_reached_by_a_node_through_a_node(folder: Path) -> None:
    async with host() as relay, host() as near:
        relay.relay.open()
        (address,) = relay.addresses()
        async with js_node(folder, listen=[f"{address}/p2p-circuit"]) as far:
            assert await near.connect(far.addresses) == far.peer_id
            assert near.connected[PeerId(far.peer_id)].kind is PathKind.RELAYED
            await far.ask("connected", peer=near.peer_id)
            assert RPC_PROTOCOL in (await far.ask("identified", peer=near.peer_id))["protocols"]
            assert len(await PingService(near.libp2p).ping(ID.from_base58(far.peer_id), 3)) == 3
            assert await echoed(near, PeerId(far.peer_id), b"through a node") == b"through a node"


async def test_a_node_is_reached_by_js_through_a_node(folder: Path) -> None:
    async with host() as relay, host() as far, js_dialer(folder) as near:
        relay.relay.open()
        await far.connect(relay.addresses())
        await far.relay.reserve(relay.peer_id)
        address = circuit(relay.addresses()[0], far.peer_id)
        facts = await near.ask("dial", address=address)
        assert (facts["peer_id"], facts["limited"]) == (far.peer_id, True)
        assert RPC_PROTOCOL in (await near.ask("identified", peer=far.peer_id))["protocols"]
        assert (await near.ask("echo", address=address, text="through a node"))["text"] == "through a node"


async def test_a_node_is_reached_by_js_through_js(folder: Path) -> None:
    async with js_node(folder, relay=True) as relay, js_dialer(folder) as near, host() as far:
        await far.connect(relay.addresses)
        granted = await far.relay.reserve(PeerId(relay.peer_id))
        assert granted.expires_s > 60
        assert set(granted.addresses) == set(relay.addresses)
        address = circuit(relay.addresses[0], far.peer_id)
        facts = await near.ask("dial", address=address)
        assert (facts["peer_id"], facts["limited"]) == (far.peer_id, True)
        assert RPC_PROTOCOL in (await near.ask("identified", peer=far.peer_id))["protocols"]
        await near.ask("ping", address=address)
        assert (await near.ask("echo", address=address, text="through js"))["text"] == "through js"
        assert far.connected[PeerId(near.peer_id)].kind is PathKind.RELAYED


async def test_a_node_is_reached_by_a_node_through_js(folder: Path) -> None:
    async with js_node(folder, relay=True) as relay, host() as far, host() as near:
        await far.connect(relay.addresses)
        await far.relay.reserve(PeerId(relay.peer_id))
        assert await near.connect([circuit(relay.addresses[0], far.peer_id)]) == far.peer_id
        assert near.connected[far.peer_id].kind is PathKind.RELAYED
        await client(NodeService, near.at(far.peer_id)).ping(Empty())
        assert await echoed(near, far.peer_id, b"through js") == b"through js"
        await client(NodeService, far.at(near.peer_id)).ping(Empty())


async def test_js_without_a_reservation_is_not_reached_through_a_node(folder: Path) -> None:
    async with host() as relay, js_node(folder) as far, js_dialer(folder) as near:
        relay.relay.open()
        await far.ask("dial", address=relay.addresses()[0])
        answer = await near.ask("refused", address=circuit(relay.addresses()[0], far.peer_id))
        assert "NO_RESERVATION" in answer["reason"]


async def test_js_gets_no_reservation_at_a_node_that_does_not_relay(folder: Path) -> None:
    async with host() as relay:
        (address,) = relay.addresses()
        with pytest.raises(JsError, match="start"):
            async with js_node(folder, listen=[f"{address}/p2p-circuit"]):
                pytest.fail("it has a reservation")
