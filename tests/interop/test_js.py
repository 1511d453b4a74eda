"""js-libp2p as a peer that nobody here wrote: connections, identify, ping, Kademlia and circuits, both ways.

The node of this project is a real one (`shoal up`) wherever the other side alone can tell whether it works, and an open
host in this process where a test has to ask it something that no command asks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.host.ping import PingService
from libp2p.peer.id import ID
from libp2p.records.validator import Validator

from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.wire.channel import Router
from shoal.node.wire.links import RPC_PROTOCOL
from shoal.protocol.ids import Cid, PeerId

from .js import Js, js_dialer, js_node

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 60.0
STAYS_S = 3.0
"""Longer than a node takes to find that a peer does not answer its first two pings."""


class AnyValue(Validator):
    """What this test puts into the DHT needs no signature."""

    def validate(self, key: str, value: bytes) -> None:
        pass

    def select(self, key: str, values: list[bytes]) -> int:
        return 0


async def shoal(home: Path, *words: str) -> Any:
    """Run one command; gives what it prints for programs."""
    command = [sys.executable, "-m", "shoal.cli.main", *words, "--json"]
    environment = os.environ | {"SHOAL_HOME": str(home)}
    done = await trio.run_process(command, env=environment, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout!r} {done.stderr!r}"
    return json.loads(done.stdout.splitlines()[-1])


@asynccontextmanager
async def shoal_node(home: Path, *options: str) -> AsyncIterator[dict[str, Any]]:
    """A node in a process of its own, started as a person would; gives what ``shoal up --json`` prints."""
    with trio.fail_after(GENEROUS_S):
        info = await shoal(home, "up", "-d", "--no-mdns", "--listen", LOOPBACK, *options)
    try:
        with trio.fail_after(GENEROUS_S):
            yield info
    finally:
        with trio.CancelScope(deadline=trio.current_time() + GENEROUS_S, shield=True):
            await shoal(home, "down")


def bare(addresses: Sequence[str]) -> set[str]:
    """The addresses without the name of whom they lead to, which some add and others do not."""
    return {address.partition("/p2p/")[0] for address in addresses}


@asynccontextmanager
async def host() -> AsyncIterator[Host]:
    async with open_host(secret=os.urandom(32), listen=[LOOPBACK], bootstrap=[], mdns=False, router=Router()) as opened:
        yield opened


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[Host, Js]]:
    """A host that dialed a js-libp2p node; each asks the other when it looks for something in the DHT."""
    with trio.fail_after(GENEROUS_S):
        async with host() as one, js_node(folder) as js:
            assert await one.connect(js.addresses) == js.peer_id
            assert await one.events.receive() == PeerUp(PeerId(js.peer_id))
            await js.ask("routed", peer=one.peer_id)
            yield one, js


async def found(one: Host, cid: Cid) -> set[str]:
    """Where the DHT says that a CID is held, as soon as it does: a record is sent without waiting for an answer."""
    while not (providers := await one.find_providers(cid)):  # noqa: ASYNC110  no event tells of a record that came
        await trio.sleep(0.05)
    return {address for provider in providers for address in provider}


async def test_js_dials_a_node_and_learns_what_it_is(tmp_path: Path, folder: Path) -> None:
    async with shoal_node(tmp_path) as node, js_node(folder) as js:
        facts = await js.ask("dial", address=node["addresses"][0])
        assert facts["peer_id"] == node["peer_id"]
        assert (facts["encryption"], facts["multiplexer"], facts["limited"]) == ("/noise", "/yamux/1.0.0", False)
        known = await js.ask("identified", peer=node["peer_id"])
        assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/ipfs/kad/1.0.0", RPC_PROTOCOL} <= set(known["protocols"])
        assert bare(known["listen_addresses"]) == bare(node["addresses"])
        assert known["agent"]
        assert known["observed_address"].startswith("/ip4/127.0.0.1/tcp/")
        (seen,) = await shoal(tmp_path, "peers")
        assert seen["peer_id"] == js.peer_id


async def test_a_node_answers_the_pings_of_js(tmp_path: Path, folder: Path) -> None:
    async with shoal_node(tmp_path) as node, js_node(folder) as js:
        for _ in range(3):
            assert (await js.ask("ping", address=node["addresses"][0]))["rtt_ms"] < 1000 * GENEROUS_S


async def test_a_node_is_connected_to_js_as_its_bootstrap_node(tmp_path: Path, folder: Path) -> None:
    async with js_node(folder) as js, shoal_node(tmp_path, "--bootstrap", js.addresses[0]) as node:
        facts = await js.ask("connected", peer=node["peer_id"])
        assert facts["direction"] == "inbound"
        known = await js.ask("identified", peer=node["peer_id"])
        assert RPC_PROTOCOL in known["protocols"]
        (seen,) = await shoal(tmp_path, "peers")
        assert seen["peer_id"] == js.peer_id


async def test_js_answers_the_pings_of_a_node(folder: Path) -> None:
    async with connected(folder) as (one, js):
        rtts_us = await PingService(one.libp2p).ping(ID.from_base58(js.peer_id), 3)
        assert len(rtts_us) == 3


async def test_a_node_keeps_a_peer_that_knows_nothing_of_its_calls(folder: Path) -> None:
    """Its pings go unanswered for another reason than that the peer is gone."""
    async with connected(folder) as (one, js):
        with trio.move_on_after(STAYS_S):
            pytest.fail(f"it lets go of it: {await one.events.receive()}")
        await js.ask("ping", address=one.addresses()[0])


async def test_a_node_that_ends_is_gone_for_js_and_the_other_way_round(folder: Path) -> None:
    with trio.fail_after(GENEROUS_S):
        async with host() as one:
            async with js_node(folder) as js:
                async with host() as other:
                    await other.connect(js.addresses)
                    await js.ask("connected", peer=other.peer_id)
                await js.ask("disconnected", peer=other.peer_id)
                await one.connect(js.addresses)
                assert await one.events.receive() == PeerUp(PeerId(js.peer_id))
            assert await one.events.receive() == PeerDown(PeerId(js.peer_id))


async def test_a_node_finds_what_js_provides(folder: Path) -> None:
    cid = Cid.of_block(b"weights")
    async with connected(folder) as (one, js):
        await js.ask("provide", cid=cid)
        assert await found(one, cid) == {*js.addresses}
        assert await one.find_providers(Cid.of_block(b"something else")) == []


async def test_js_finds_what_a_node_provides(folder: Path) -> None:
    cid = Cid.of_block(b"weights")
    async with connected(folder) as (one, js):
        assert await one.provide(cid)
        (provider,) = (await js.ask("find_providers", cid=cid))["providers"]
        assert provider["peer_id"] == one.peer_id
        assert bare(provider["addresses"]) == bare(one.addresses())


async def test_js_finds_a_peer_that_only_a_node_knows(tmp_path: Path, folder: Path) -> None:
    async with shoal_node(tmp_path) as node, js_node(folder) as js, js_node(folder) as other:
        await other.ask("dial", address=node["addresses"][0])
        await other.ask("routed", peer=node["peer_id"])
        await js.ask("dial", address=node["addresses"][0])
        await js.ask("routed", peer=node["peer_id"])
        known = await js.ask("find_peer", peer=other.peer_id)
        assert bare(known["addresses"]) == bare(other.addresses)


async def test_two_nodes_find_each_others_content_through_js_alone(folder: Path) -> None:
    cid = Cid.of_block(b"weights")
    with trio.fail_after(GENEROUS_S):
        async with js_node(folder) as js, host() as one, host() as other:
            for each in (one, other):
                await each.connect(js.addresses)
                await js.ask("routed", peer=each.peer_id)
            assert await one.provide(cid)
            assert await found(other, cid) == {*one.addresses()}


async def test_a_value_that_one_put_into_the_dht_is_there_for_the_other(folder: Path) -> None:
    async with connected(folder) as (one, js):
        assert one.kademlia is not None
        one.kademlia.libp2p.register_validator("interop", AnyValue())
        assert (await js.ask("put", key="/interop/of-js", value="kept by a node"))["taken"] == 1
        assert await one.kademlia.libp2p.get_value("/interop/of-js") == b"kept by a node"
        await one.kademlia.libp2p.put_value("/interop/of-a-node", b"kept by js")
        assert await js.ask("get", key="/interop/of-a-node") == {"value": "kept by js", "from": js.peer_id}


async def test_js_and_a_node_are_reached_by_js_through_a_node_that_relays(tmp_path: Path, folder: Path) -> None:
    """All nodes in processes of their own; the reservation of the one behind it is its own idea."""
    async with shoal_node(tmp_path / "relay", "--relay", "on") as relay:
        (address,) = relay["addresses"]
        async with (
            shoal_node(tmp_path / "far", "--bootstrap", address) as far,
            js_node(folder, listen=[f"{address}/p2p-circuit"]) as js,
            js_dialer(folder) as near,
        ):
            assert js.addresses == [f"{address}/p2p-circuit/p2p/{js.peer_id}"]
            assert (await near.ask("echo", address=js.addresses[0], text="by a circuit"))["text"] == "by a circuit"
            circuit = f"{address}/p2p-circuit/p2p/{far['peer_id']}"
            while circuit not in (await shoal(tmp_path / "far", "status"))["addresses"]:  # noqa: ASYNC110  as above
                await trio.sleep(0.2)
            await near.ask("dial", address=circuit)  # and if the DHT has told it a shorter way, it takes that
            assert RPC_PROTOCOL in (await near.ask("identified", peer=far["peer_id"]))["protocols"]
            await near.ask("ping", address=circuit)
