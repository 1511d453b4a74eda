"""Real nodes in one process on loopback: how they introduce themselves, find relays, and come to better paths."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb

from shoal.node.api.requests import PingRequest
from shoal.node.config import NodeConfig
from shoal.node.daemon import Node
from shoal.node.mesh.address_book import MAX_KNOWN_ADDRESSES, MAX_KNOWN_PEERS
from shoal.node.mesh.circuits import BROKEN, end_stream, read_message, write_message
from shoal.node.mesh.door import NONCE_BYTES
from shoal.node.mesh.host import Host, open_host
from shoal.node.mesh.paths import PathKind, Rung
from shoal.node.mesh.relay import STOP_PROTOCOL
from shoal.node.reach import reach as reach_module
from shoal.node.reach.held_relays import NUM_RELAYS, RELAY_CID
from shoal.node.reach.reach import MAX_INTRODUCED_ADDRESSES, Reach, open_reach
from shoal.node.reach.settings import ReachConfig
from shoal.node.reach.stun import TOKEN_BYTES
from shoal.node.store.database import Storage
from shoal.node.store.remembered import Remembered
from shoal.node.supervise import Supervisor
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.holders import Holders
from shoal.node.swarm.models import Models
from shoal.node.swarm.names import Names
from shoal.node.swarm.swarms import Swarms
from shoal.node.swarm.trees import Trees
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import DialBack, Introduction, NodeService, Poke, ReachService, SessionDescription
from shoal.protocol.errors import NoPeersError, RemoteError, Status, UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty, Service, client, unary
from shoal.protocol.signing import Signer

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 12.0
QUIET = ReachConfig(port_mapping=False, punch=False, webrtc=False)
RELAYING = replace(QUIET, relay="on")
NOBODY_IS_THERE = "/ip4/127.0.0.1/tcp/9"


class Post(Service, name="test"):
    """What the nodes of these tests serve."""

    @unary(idempotent=True)
    async def again(self, request: Empty) -> Empty:
        raise NotImplementedError

    @unary()
    async def once(self, request: Empty) -> Empty:
        raise NotImplementedError


class Slow(Post):
    """Answers once it may."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.reached, self.may_answer = trio.Event(), trio.Event()
        if at_once:
            self.may_answer.set()

    async def again(self, request: Empty) -> Empty:
        self.reached.set()
        await self.may_answer.wait()
        return request

    async def once(self, request: Empty) -> Empty:
        return await self.again(request)


@dataclass(frozen=True, slots=True)
class Peer:
    """A node, as far as reaching goes."""

    host: Host
    reach: Reach

    @property
    def name(self) -> PeerId:
        return self.host.peer_id

    def path_to(self, other: Peer) -> PathKind | None:
        state = self.host.connected.get(other.name)
        return None if state is None else state.kind

    def circuits(self) -> list[str]:
        return [address for address in self.host.addresses() if "/p2p-circuit/" in address]


def id_of(number: int) -> PeerId:
    return Signer(bytes([number]) * 32).peer_id


@asynccontextmanager
async def bare(number: int, *services: Service, max_peers: int = 256) -> AsyncIterator[Host]:
    """A host that introduces itself to nobody."""
    with trio.fail_after(GENEROUS_S):
        async with open_host(
            secret=bytes([number]) * 32,
            listen=[LOOPBACK],
            bootstrap=[],
            mdns=False,
            router=Router(*services),
            max_peers=max_peers,
        ) as host:
            yield host


@asynccontextmanager
async def peer(number: int, config: ReachConfig = QUIET) -> AsyncIterator[Peer]:
    router = Router()
    with trio.fail_after(GENEROUS_S):
        async with (
            open_host(secret=bytes([number]) * 32, listen=[LOOPBACK], bootstrap=[], mdns=False, router=router) as host,
            open_reach(host, router, config) as reach,
        ):
            yield Peer(host, reach)


async def until(holds: Callable[[], object]) -> None:
    """Wait for what no event tells of."""
    while not holds():  # noqa: ASYNC110  see above
        await trio.sleep(0.01)


async def ping(one: Host, other: PeerId) -> None:
    await client(NodeService, one.at(other)).ping(Empty())


# --- introductions ---


async def test_both_sides_introduce_themselves_whoever_dialed() -> None:
    async with peer(1) as one, peer(2) as other:
        await one.host.connect(other.host.addresses())
        for near, far in ((one, other), (other, one)):
            await until(lambda near=near, far=far: near.reach.introduction(far.name))
            said = near.reach.introduction(far.name)
            assert said is not None
            assert said.addresses == far.host.addresses()
            assert said.stun_port > 0
            assert (said.relays, said.load, said.reachability) == (False, 0.0, "unknown")
            assert near.host.known_addresses(far.name) == list(far.host.addresses())


async def test_what_a_gone_peer_said_is_forgotten_but_its_addresses_are_kept() -> None:
    async with peer(1) as one, peer(2) as other:
        await one.host.connect(other.host.addresses())
        await until(lambda: other.reach.introduction(one.name))
        await one.host.disconnect(other.name)
        await until(lambda: not other.host.connected)
        assert other.reach.introduction(one.name) is None
        assert await other.host.find(one.name) == one.name


async def test_a_change_is_told_to_those_who_are_there() -> None:
    async with peer(1) as one, peer(2) as other, peer(3, RELAYING) as relay:
        await one.host.connect(other.host.addresses())
        await until(lambda: other.reach.introduction(one.name))
        await one.host.connect(relay.host.addresses())
        await until(lambda: one.circuits())
        await until(lambda: set(one.circuits()) <= set(other.host.known_addresses(one.name)))


async def test_a_peer_of_another_kind_is_only_a_peer() -> None:
    async with peer(1) as one, bare(2) as other:
        await one.host.connect(other.addresses())
        await ping(one.host, other.peer_id)
        assert one.reach.introduction(other.peer_id) is None


# --- relays ---


async def run_relay(number: int, end: trio.Event, *, task_status: trio.TaskStatus[Peer]) -> None:
    async with peer(number, RELAYING) as relay:
        task_status.started(relay)
        await end.wait()


@asynccontextmanager
async def one_among_relays() -> AsyncIterator[tuple[Peer, dict[PeerId, Peer], dict[PeerId, trio.Event]]]:
    """A node that knows three relays and holds two; the relays, and what ends each of them."""
    relays, ends = dict[PeerId, Peer](), dict[PeerId, trio.Event]()
    async with trio.open_nursery() as nursery:
        for number in (7, 8, 9):
            ends[id_of(number)] = trio.Event()
            relays[id_of(number)] = await nursery.start(run_relay, number, ends[id_of(number)])
        async with peer(1) as one:
            for relay in relays.values():
                await one.host.connect(relay.host.addresses())
            await until(lambda: len(one.reach.report().held_relays) == NUM_RELAYS)
            yield one, relays, ends
        for end in ends.values():
            end.set()


async def test_a_node_that_nobody_is_known_to_reach_holds_two_relays_and_announces_both() -> None:
    async with one_among_relays() as (one, relays, _):
        await until(lambda: all(one.reach.introduction(relay) for relay in relays))
        held = one.reach.report().held_relays
        assert len(held) == NUM_RELAYS == 2
        now = trio.current_time()
        granted = {name for name, relay in relays.items() if relay.host.relay.ledger.has_reservation(one.name, now)}
        assert granted == set(held)
        expected = {f"{relays[name].host.addresses()[0]}/p2p-circuit/p2p/{one.name}" for name in held}
        assert set(one.circuits()) == expected
        assert all("relay" in one.host.wanted[name] for name in held), "they are not let go to make room"


async def test_a_relay_that_no_peer_names_is_found_in_the_dht() -> None:
    async with peer(7, RELAYING) as relay, peer(2) as between:
        await between.host.connect(relay.host.addresses())
        while not await between.host.find_providers(RELAY_CID):  # noqa: ASYNC110  it takes a moment to tell there
            await trio.sleep(0.1)
        async with peer(1) as one:
            await one.host.connect(between.host.addresses())
            await until(lambda: one.reach.report().held_relays == [relay.name])


async def test_a_dead_relay_is_replaced_and_a_third_node_comes_by_the_other_meanwhile() -> None:
    async with one_among_relays() as (one, relays, ends), bare(2) as third:
        dead, other = one.reach.report().held_relays
        (spare,) = relays.keys() - {dead, other}
        ends[dead].set()
        await until(lambda: dead not in one.host.connected)
        assert dead not in one.reach.report().held_relays
        assert not any(dead in address for address in one.circuits())
        assert dead not in one.host.wanted, "nobody waits for it"

        await third.connect(one.circuits()[:1])
        assert third.connected[one.name].kind is PathKind.RELAYED
        assert other in third.connected[one.name].address

        await until(lambda: set(one.reach.report().held_relays) == {other, spare})
        assert any(spare in address for address in one.circuits())


async def test_who_may_not_relay_is_asked_by_nobody() -> None:
    async with peer(1) as one, peer(2, replace(QUIET, relay="off")) as other:
        await one.host.connect(other.host.addresses())
        await until(lambda: one.reach.introduction(other.name))
        assert not other.host.relay.is_open
        assert one.host.relays == {}
        assert one.reach.report().held_relays == []


async def test_a_relay_that_refuses_is_not_held_and_another_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer(1) as one, peer(2) as liar, peer(3, RELAYING) as relay:
        me = liar.reach.me
        monkeypatch.setattr(liar.reach, "me", lambda: replace(me(), relays=True))
        await one.host.connect(liar.host.addresses())
        await until(lambda: liar.name in one.host.relays)
        await one.host.connect(relay.host.addresses())
        await until(lambda: relay.name in one.reach.report().held_relays)
        assert one.reach.report().held_relays == [relay.name]
        assert liar.name not in one.host.wanted


# --- the climb ---


async def test_a_relayed_path_becomes_a_direct_one_by_itself() -> None:
    async with peer(1) as one, peer(2) as other, peer(3, RELAYING) as relay:
        await other.host.connect(relay.host.addresses())
        await until(lambda: other.circuits())
        await one.host.connect(other.circuits())
        await until(lambda: one.path_to(other) is PathKind.DIRECT and other.path_to(one) is PathKind.DIRECT)
        await ping(one.host, other.name)
        await ping(other.host, one.name)


async def relayed_stranger(one: Peer, relay: Peer, stranger: Host) -> None:
    """The stranger is connected to the node, through the relay alone."""
    await one.host.connect(relay.host.addresses())
    await until(lambda: one.circuits())
    await stranger.connect(one.circuits())


def introduction(*addresses: str, **facts: Any) -> Introduction:
    usual = {
        "relays": False,
        "load": 0.0,
        "stun_port": 0,
        "reachability": "private",
        "udp": "symmetric",
        "tcp_mapping": "endpoint-dependent",
    }
    return Introduction(addresses=addresses, **(usual | facts))


async def introduce(stranger: Host, one: Peer, what: Introduction) -> Introduction:
    return await client(ReachService, stranger.at(one.name)).hello(what)


async def test_each_rung_that_failed_is_noted_with_its_reason() -> None:
    async with peer(1) as one, peer(2, RELAYING) as relay, bare(3) as stranger:
        await relayed_stranger(one, relay, stranger)
        await introduce(stranger, one, introduction(f"{NOBODY_IS_THERE}/p2p/{stranger.peer_id}"))
        tried = one.host.connected[stranger.peer_id].ladder.tried
        await until(lambda: len(tried) == 3)
        assert tried[Rung.DIRECT].failure == f"connection refused ({NOBODY_IS_THERE})"
        assert tried[Rung.PUNCH].failure == "switched off here (--no-punch)"
        assert tried[Rung.WEBRTC].failure == "switched off here (--no-webrtc)"
        assert one.host.connected[stranger.peer_id].kind is PathKind.RELAYED


async def test_a_peer_without_an_address_is_not_dialed_and_new_addresses_are_tried_at_once() -> None:
    async with peer(1) as one, peer(2, RELAYING) as relay, bare(3) as stranger:
        await relayed_stranger(one, relay, stranger)
        await introduce(stranger, one, introduction())
        tried = one.host.connected[stranger.peer_id].ladder.tried
        await until(lambda: Rung.DIRECT in tried)
        assert tried[Rung.DIRECT].failure == "the peer has no address that this node could dial"
        await introduce(stranger, one, introduction(*stranger.addresses()))
        await until(lambda: one.host.connected[stranger.peer_id].kind is PathKind.DIRECT)
        await until(lambda: tried[Rung.DIRECT].failure is None)


async def test_another_node_at_a_peers_address_is_not_taken_for_it() -> None:
    async with peer(1) as one, peer(2, RELAYING) as relay, bare(3) as stranger, bare(4) as other:
        await relayed_stranger(one, relay, stranger)
        address = other.addresses()[0].replace(other.peer_id, stranger.peer_id)
        await introduce(stranger, one, introduction(address))
        tried = one.host.connected[stranger.peer_id].ladder.tried
        await until(lambda: Rung.DIRECT in tried)
        assert tried[Rung.DIRECT].failure
        assert one.host.connected[stranger.peer_id].kind is PathKind.RELAYED
        assert other.peer_id not in one.host.connected


# --- hostile introductions ---


BAD_ADDRESSES = [
    "",
    "/",
    "nonsense",
    "/ip4/not-an-ip/tcp/1",
    "/ip4/127.0.0.1/tcp/99999",
    "/ip4/127.0.0.1/tcp/0",
    "/ip4/127.0.0.1/tcp/" + "9" * 200,
    "/ip4/127.0.0.1/tcp/٣",
    "/ip4/127.0.0.1/udp/1/quic-v1",
    "/ip6/127.0.0.1/tcp/1",
    "/ip6/::1%lo/tcp/1",
    "/unix/tmp/x",
    "/dns4//tcp/1",
    "/p2p/12D3KooW",
    "/p2p-circuit",
    f"/ip4/127.0.0.1/tcp/1/p2p/{id_of(99)}/p2p-circuit",
    "/ip4/127.0.0.1/tcp/1/p2p/nobody/p2p-circuit",
]


async def test_addresses_of_nonsense_harm_nobody_who_dials_them() -> None:
    async with peer(1) as one, peer(2, RELAYING) as relay, bare(3) as stranger:
        await relayed_stranger(one, relay, stranger)
        tried = one.host.connected[stranger.peer_id].ladder.tried
        for begin in range(0, len(BAD_ADDRESSES), MAX_INTRODUCED_ADDRESSES):
            part = BAD_ADDRESSES[begin : begin + MAX_INTRODUCED_ADDRESSES]
            before = tried.get(Rung.DIRECT)
            await introduce(stranger, one, introduction(*(f"{address}/p2p/{stranger.peer_id}" for address in part)))
            await until(lambda before=before: tried.get(Rung.DIRECT) is not before)
            assert tried[Rung.DIRECT].failure
        await stranger.disconnect(one.name)
        await until(lambda: stranger.peer_id not in one.host.connected)
        for address in BAD_ADDRESSES:
            with pytest.raises((NoPeersError, UsageError)):
                await one.host.connect([f"{address}/p2p/{stranger.peer_id}"])
        await ping(one.host, relay.name)


async def test_a_peer_speaks_for_its_own_addresses_alone() -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        me, victim = stranger.peer_id, id_of(77)
        good = f"/ip4/192.0.2.1/tcp/1/p2p/{me}"
        await introduce(
            stranger,
            one,
            introduction(
                good,
                f"/ip4/192.0.2.2/tcp/1/p2p/{victim}",
                "/ip4/192.0.2.3/tcp/1",
                f"/ip4/192.0.2.4/tcp/1/p2p/{me}\n",
                f"/dns4/\x1b[31mred/tcp/1/p2p/{me}",
                f"/dns4/{'x' * 1000}/tcp/1/p2p/{me}",
            ),
        )
        said = one.reach.introduction(me)
        assert said is not None
        assert said.addresses == (good,)
        assert one.host.known_addresses(me) == [good]
        assert one.host.known_addresses(victim) == []


@pytest.mark.parametrize(("load", "taken_for"), [(-1.0, 0.0), (0.5, 0.5), (1e308, 1.0)])
async def test_words_and_numbers_that_make_no_sense_become_those_that_mean_nothing(
    load: float, taken_for: float
) -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        facts = {"reachability": "sure", "udp": "\x1b[2J", "tcp_mapping": "x" * 10_000, "stun_port": 2**40}
        await introduce(stranger, one, introduction(load=load, **facts))
        said = one.reach.introduction(stranger.peer_id)
        assert said is not None
        assert (said.reachability, said.udp, said.tcp_mapping) == ("unknown", "unknown", "unknown")
        assert (said.stun_port, said.load) == (0, taken_for)


@pytest.mark.parametrize("load", [math.nan, math.inf, -math.inf])
async def test_an_introduction_with_a_number_that_is_none_is_refused(load: float) -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        with pytest.raises(RemoteError) as caught:
            await introduce(stranger, one, introduction(load=load))
        assert caught.value.status is Status.INVALID_ARGUMENT
        assert one.reach.introduction(stranger.peer_id) is None


async def test_of_thousands_of_addresses_a_few_are_kept() -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        for begin in range(0, 5_000, 2_500):
            many = [f"/ip4/10.1.{n // 250}.{n % 250}/tcp/1/p2p/{stranger.peer_id}" for n in range(begin, begin + 2_500)]
            await introduce(stranger, one, introduction(*many))
        said = one.reach.introduction(stranger.peer_id)
        assert said is not None
        assert len(said.addresses) == MAX_INTRODUCED_ADDRESSES
        assert len(one.host.known_addresses(stranger.peer_id)) == MAX_KNOWN_ADDRESSES


async def test_addresses_of_ever_more_peers_are_kept_for_the_newest() -> None:
    async with bare(1) as one:
        names = [PeerId(f"peer{number}") for number in range(MAX_KNOWN_PEERS + 10)]
        for name in names:
            one.remember(name, [f"{NOBODY_IS_THERE}/p2p/{name}"])
        assert [name for name in names if not one.known_addresses(name)] == names[:10]


@pytest.mark.parametrize(
    "addresses", [(), ("/ip4/not-an-ip/tcp/1",), ("/ip4/192.0.2.1/tcp/99999",), ("/dns4/x/tcp/1",)], ids=repr
)
async def test_a_relay_whose_addresses_make_no_sense_is_announced_where_it_was_reached(
    addresses: tuple[str, ...],
) -> None:
    async with peer(1) as one, bare(2) as stranger:
        stranger.relay.open()
        await one.host.connect(stranger.addresses())
        claimed = [f"{address}/p2p/{stranger.peer_id}" for address in addresses]
        await introduce(stranger, one, introduction(*claimed, relays=True))
        await until(lambda: one.circuits())
        assert one.circuits() == [f"{stranger.addresses()[0]}/p2p-circuit/p2p/{one.name}"]


async def test_a_flood_of_introductions_is_refused_and_calls_go_on() -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        refused = []

        async def flood() -> None:
            try:
                await client(ReachService, stranger.links.at(one.name), timeout_s=0.5).hello(introduction())
            except RemoteError as error:
                refused.append(error.status)

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(flood)
            await ping(stranger, one.name)
        assert len(refused) > 100
        assert set(refused) <= {Status.RESOURCE_EXHAUSTED, Status.DEADLINE_EXCEEDED}


# --- what peers ask for ---


@pytest.mark.parametrize(
    "request_",
    [
        DialBack(0, bytes(NONCE_BYTES), is_ipv6=False),
        DialBack(65536, bytes(NONCE_BYTES), is_ipv6=False),
        DialBack(-1, bytes(NONCE_BYTES), is_ipv6=False),
        DialBack(1, b"", is_ipv6=False),
        DialBack(1, bytes(NONCE_BYTES + 1), is_ipv6=False),
        Poke(0, bytes(TOKEN_BYTES), other_port=False, is_ipv6=False),
        Poke(2**40, bytes(TOKEN_BYTES), other_port=False, is_ipv6=False),
        Poke(1, bytes(TOKEN_BYTES + 1), other_port=True, is_ipv6=False),
        Poke(1, b"", other_port=True, is_ipv6=False),
    ],
    ids=repr,
)
async def test_a_request_that_makes_no_sense_is_refused(request_: DialBack | Poke) -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        reach = client(ReachService, stranger.at(one.name))
        with pytest.raises(RemoteError) as caught:
            await (reach.dial_back(request_) if isinstance(request_, DialBack) else reach.poke(request_))
        assert caught.value.status is Status.INVALID_ARGUMENT


async def test_whoever_dials_back_shows_the_nonce_and_says_where_it_did() -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        port = stranger.door.port("127.0.0.1")
        assert port is not None
        with stranger.door.expect_knock() as (nonce, came):
            seen = await client(ReachService, stranger.at(one.name)).dial_back(DialBack(port, nonce, is_ipv6=False))
            await came.wait()
        assert seen.ip == "127.0.0.1"


async def test_nothing_is_sent_to_where_a_relayed_peer_seems_to_be() -> None:
    """That is the relay's address, or another one's."""
    async with peer(1) as one, peer(2, RELAYING) as relay, bare(3) as stranger:
        await relayed_stranger(one, relay, stranger)
        reach = client(ReachService, stranger.at(one.name))
        for call in (
            reach.dial_back(DialBack(1, bytes(NONCE_BYTES), is_ipv6=False)),
            reach.poke(Poke(1, bytes(TOKEN_BYTES), other_port=False, is_ipv6=False)),
        ):
            with pytest.raises(RemoteError) as caught:
                await call
            assert caught.value.status is Status.FAILED_PRECONDITION


async def test_nothing_is_sent_by_an_ip_that_the_peer_is_not_connected_by() -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        with pytest.raises(RemoteError) as caught:
            await client(ReachService, stranger.at(one.name)).dial_back(DialBack(1, bytes(NONCE_BYTES), is_ipv6=True))
        assert caught.value.status is Status.FAILED_PRECONDITION


async def test_a_node_without_webrtc_says_so() -> None:
    async with peer(1) as one, bare(2) as stranger:
        await stranger.connect(one.host.addresses())
        with pytest.raises(RemoteError) as caught:
            await client(ReachService, stranger.at(one.name)).webrtc(SessionDescription("v=0"))
        assert caught.value.status is Status.UNIMPLEMENTED


# --- room ---


async def test_to_make_room_a_wanted_peer_is_never_let_go_and_the_longest_unused_is() -> None:
    async with bare(1, max_peers=2) as one, AsyncExitStack() as stack:
        others = [await stack.enter_async_context(bare(number)) for number in (2, 3, 4, 5)]

        async def arrives(number: int) -> None:
            other = others[number]
            await until(lambda: one.peer_id not in other.connected)  # it may just be let go
            await other.connect(one.addresses())
            await until(lambda: other.peer_id in one.connected)

        def present() -> set[int]:
            return {number for number, other in enumerate(others) if other.peer_id in one.connected}

        one.want(others[0].peer_id, "a swarm")
        one.want(others[0].peer_id, "a relay")
        await arrives(0)
        await arrives(1)
        await arrives(2)
        await until(lambda: len(one.connected) == 2)
        assert present() == {0, 2}

        one.unwant(others[0].peer_id, "a relay")
        one.unwant(others[0].peer_id, "never a reason")
        await arrives(1)
        await until(lambda: len(one.connected) == 2)
        assert present() == {0, 1}, "one reason is left"

        one.unwant(others[0].peer_id, "a swarm")
        assert one.wanted == {}
        one.at(others[1].peer_id)
        await arrives(3)
        await until(lambda: len(one.connected) == 2)
        assert present() == {1, 3}


async def test_more_peers_than_there_is_room_for_stay_if_all_are_wanted() -> None:
    async with bare(1, max_peers=1) as one, bare(2) as other, bare(3) as third:
        for each in (other, third):
            one.want(each.peer_id, "a swarm")
            await each.connect(one.addresses())
            await until(lambda each=each: each.peer_id in one.connected)
        await ping(one, other.peer_id)
        await ping(one, third.peer_id)
        assert len(one.connected) == 2


# --- finding ---


async def test_a_peer_is_found_by_its_name_with_the_dht() -> None:
    async with peer(1) as one, peer(2) as other, peer(3) as between:
        await other.host.connect(between.host.addresses())
        await one.host.connect(between.host.addresses())
        assert one.host.known_addresses(other.name) == []
        assert await one.host.find(other.name) == other.name
        await ping(one.host, other.name)


async def test_a_peer_is_found_by_its_name_where_it_was_before() -> None:
    async with bare(1) as one, bare(2) as other:
        await one.connect(other.addresses())
        await one.disconnect(other.peer_id)
        await until(lambda: not one.connected)
        assert await one.find(other.peer_id) == other.peer_id
        assert await one.find(one.peer_id) == one.peer_id


async def test_a_peer_that_nobody_knows_is_not_found() -> None:
    async with peer(1) as one, peer(2) as other:
        await one.host.connect(other.host.addresses())
        with pytest.raises(NoPeersError, match=id_of(99)):
            await one.host.find(id_of(99))


# --- calls, while paths come and go ---


@asynccontextmanager
async def by_a_relay_alone(*services: Service) -> AsyncIterator[tuple[Host, Host, trio.Event]]:
    """Two hosts, the first connected to the second through a relay; and what ends the relay."""
    end = trio.Event()
    async with trio.open_nursery() as nursery:
        relay: Peer = await nursery.start(run_relay, 7, end)
        async with bare(1) as one, bare(2, *services) as other:
            await other.connect(relay.host.addresses())
            await other.relay.reserve(relay.name)
            await one.connect([f"{relay.host.addresses()[0]}/p2p-circuit/p2p/{other.peer_id}"])
            assert one.connected[other.peer_id].kind is PathKind.RELAYED
            yield one, other, end
        end.set()


async def test_an_idempotent_call_outlives_the_relay_that_it_went_by() -> None:
    slow = Slow()
    async with by_a_relay_alone(slow) as (one, other, end), trio.open_nursery() as nursery:
        one.remember(other.peer_id, other.addresses())
        answers = []

        async def ask() -> None:
            answers.append(await client(Post, one.at(other.peer_id), timeout_s=GENEROUS_S).again(Empty()))

        nursery.start_soon(ask)
        await slow.reached.wait()
        end.set()
        await until(lambda: other.peer_id in one.connected and one.connected[other.peer_id].kind is PathKind.DIRECT)
        slow.may_answer.set()
        await until(lambda: answers)


async def test_a_call_that_is_not_idempotent_fails_at_once_with_the_relay_that_it_went_by() -> None:
    slow = Slow()
    async with by_a_relay_alone(slow) as (one, other, end), trio.open_nursery() as nursery:
        one.remember(other.peer_id, other.addresses())
        failed = trio.Event()

        async def ask() -> None:
            with pytest.raises(RemoteError) as caught:
                await client(Post, one.at(other.peer_id), timeout_s=10 * GENEROUS_S).once(Empty())
            assert caught.value.status is Status.UNAVAILABLE
            failed.set()

        nursery.start_soon(ask)
        await slow.reached.wait()
        end.set()
        await failed.wait()


async def test_a_peer_whose_relay_is_gone_is_waited_for_only_as_long_as_the_call_may_take() -> None:
    async with by_a_relay_alone(Slow(at_once=True)) as (one, other, end):
        await client(Post, one.at(other.peer_id)).again(Empty())
        end.set()
        await until(lambda: other.peer_id not in one.connected)
        with trio.fail_after(4), pytest.raises(RemoteError) as caught:
            await client(Post, one.at(other.peer_id), timeout_s=0.5).again(Empty())
        assert caught.value.status in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)


async def test_an_idempotent_call_to_a_peer_that_ended_fails_at_once() -> None:
    failed = trio.Event()
    async with bare(1) as one, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(RemoteError) as caught:
                await client(Post, one.at(id_of(2)), timeout_s=10 * GENEROUS_S).again(Empty())
            assert caught.value.status is Status.UNAVAILABLE
            failed.set()

        slow = Slow()
        async with bare(2, slow) as other:
            await one.connect(other.addresses())
            nursery.start_soon(ask)
            await slow.reached.wait()
        with trio.fail_after(4):
            await failed.wait()


async def test_an_idempotent_call_to_a_peer_that_was_never_there_fails_at_once() -> None:
    async with bare(1) as one:
        with trio.fail_after(4), pytest.raises(RemoteError) as caught:
            await client(Post, one.at(id_of(2)), timeout_s=10 * GENEROUS_S).again(Empty())
        assert caught.value.status is Status.UNAVAILABLE


# --- dials that are given up ---


async def test_a_dial_that_is_given_up_is_closed() -> None:
    closed = trio.Event()

    async def say_nothing(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass
        closed.set()

    async with bare(1) as one, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, say_nothing, listeners)
        with trio.move_on_after(0.3) as scope:
            await one.dial(id_of(2), f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}/p2p/{id_of(2)}")
        assert scope.cancelled_caught
        with trio.fail_after(1):
            await closed.wait()
        nursery.cancel_scope.cancel()


async def test_a_circuit_whose_dial_is_given_up_ends_at_the_relay_too() -> None:
    async def take_and_say_nothing(stream: INetStream) -> None:
        await read_message(stream, pb.StopMessage)
        await write_message(stream, pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.OK))
        with suppress(*BROKEN):
            while await stream.read(1000):
                reached.set()
        await end_stream(stream)

    reached = trio.Event()
    async with peer(1, RELAYING) as relay, bare(2) as one, bare(3) as silent:
        for each in (one, silent):
            await each.connect(relay.host.addresses())
        await silent.relay.reserve(relay.name)
        silent.libp2p.set_stream_handler(STOP_PROTOCOL, take_and_say_nothing)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.relay.dial, f"{relay.host.addresses()[0]}/p2p-circuit/p2p/{silent.peer_id}")
            await reached.wait()
            assert relay.host.relay.ledger.num_circuits == 1
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await until(lambda: relay.host.relay.ledger.num_circuits == 0)


# --- changes of the network ---


async def test_when_this_machines_addresses_change_a_dead_path_is_found_out_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a proxy that stops to pass anything on, and does not close: as a path of a network that one has left."""
    async with peer(1) as one, peer(2) as other, trio.open_nursery() as nursery:
        port = int(other.host.addresses()[0].split("/")[4])
        goes_on = True

        async def carry(near: trio.SocketStream) -> None:
            async with near, await trio.open_tcp_stream("127.0.0.1", port) as far, trio.open_nursery() as both:
                both.start_soon(pass_on, near, far)
                both.start_soon(pass_on, far, near)

        async def pass_on(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            async for data in source:
                if goes_on:
                    await sink.send_all(data)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, carry, listeners)
        proxy = listeners[0].socket.getsockname()[1]
        await one.host.connect([f"/ip4/127.0.0.1/tcp/{proxy}/p2p/{other.name}"])
        await until(lambda: one.reach.introduction(other.name))
        goes_on = False
        monkeypatch.setattr(reach_module, "CHECK_S", 0.3)
        monkeypatch.setattr(reach_module, "local_ips", lambda: frozenset({"198.51.100.1"}))
        with trio.fail_after(4):  # found out by silence alone, it takes ten seconds
            await until(lambda: other.name not in one.host.connected)
        nursery.cancel_scope.cancel()


# --- what the local API shows ---


@asynccontextmanager
async def shown(one: Peer, home: Path) -> AsyncIterator[Node]:
    config = NodeConfig(home=home, listen=(LOOPBACK,))
    config.paths.create()
    storage = Storage(config.paths.database)
    try:
        async with Supervisor().open("node") as domain:
            content = ContentStore(storage, one.host)
            swarms = Swarms(
                signer=Signer(bytes([1]) * 32),
                host=one.host,
                storage=storage,
                content=content,
                paths=config.paths,
                domain=domain,
                remembered=Remembered(storage),
            )
            holders, names = Holders(one.host), Names(storage, one.host, Signer(bytes([1]) * 32))
            trees = Trees(storage, one.host, content, holders)
            models = Models(trees, names, holders, content, storage, one.host.peer_id)
            yield Node(config, one.host, one.reach, swarms, content, models, domain)
            domain.cancel()
    finally:
        storage.close()


async def test_the_api_shows_relays_paths_and_what_was_tried(tmp_path: Path) -> None:
    async with peer(1) as one, peer(2, RELAYING) as relay, bare(3) as stranger, shown(one, tmp_path) as node:
        await relayed_stranger(one, relay, stranger)
        await introduce(stranger, one, introduction(f"{NOBODY_IS_THERE}/p2p/{stranger.peer_id}"))
        await until(lambda: len(one.host.connected[stranger.peer_id].ladder.tried) == 3)

        nat = node.nat()
        assert nat.held_relays == [relay.name]
        assert not nat.relaying
        assert nat.addresses == list(one.host.addresses())
        assert set(one.circuits()) <= set(nat.addresses)
        assert [family.family for family in nat.families] == ["IPv4", "IPv6"]

        by_name = {found.peer_id: found for found in node.peers()}
        assert by_name[relay.name].path == "direct"
        assert by_name[relay.name].relays
        assert by_name[relay.name].relayed_by is None
        relayed = by_name[stranger.peer_id]
        assert (relayed.path, relayed.relayed_by, relayed.direction) == ("relayed", relay.name, "inbound")
        assert (relayed.reachability, relayed.nat) == ("private", "symmetric")
        assert {each.rung for each in relayed.tried} == {Rung.DIRECT, Rung.PUNCH, Rung.WEBRTC}
        assert all(each.failure and each.ago_s >= 0 for each in relayed.tried)

        mesh = node.mesh()
        assert mesh.nat == nat
        links = {link.b: link for link in mesh.links}
        assert links[stranger.peer_id].relayed_by == relay.name
        assert links[stranger.peer_id].tried
        assert {each.peer_id for each in mesh.nodes} == {one.name, relay.name, stranger.peer_id}

        findings = node.doctor().findings
        assert any("loopback alone" in finding.what for finding in findings)
        assert any(stranger.peer_id in finding.what and NOBODY_IS_THERE in finding.what for finding in findings)


async def test_the_api_shows_what_a_relay_does_for_others(tmp_path: Path) -> None:
    async with peer(1, RELAYING) as relay, peer(2) as one, bare(3) as stranger, shown(relay, tmp_path) as node:
        await relayed_stranger(one, relay, stranger)
        await ping(stranger, one.name)
        nat = node.nat()
        assert nat.relaying
        assert nat.num_reservations >= 1
        assert nat.num_circuits == 1
        assert nat.relayed_bytes > 1000


async def test_a_ping_reaches_a_peer_by_its_name_a_part_of_it_or_its_address(tmp_path: Path) -> None:
    async with peer(1) as one, peer(2) as other, peer(3) as between, shown(one, tmp_path) as node:
        await other.host.connect(between.host.addresses())
        await one.host.connect(between.host.addresses())
        for text in (other.name, other.name, f"…{other.name[-8:]}", other.host.addresses()[0]):
            answer = await node.ping(PingRequest(peer=text))
            assert (answer.peer, answer.path) == (other.name, "direct")
            assert 0 < answer.rtt_ms / 1000 <= answer.first_byte_s + 0.0001, "both are rounded"
        for text in (one.name, "", "…", "12D3KooW", "nobody", "/ip4/127.0.0.1/tcp/1", f"/p2p/{other.name}"):
            with pytest.raises(UsageError):
                await node.ping(PingRequest(peer=text))
        for text in (id_of(99), f"{NOBODY_IS_THERE}/p2p/{id_of(99)}"):
            with pytest.raises(NoPeersError):
                await node.ping(PingRequest(peer=text))


async def test_with_one_peer_alone_no_name_at_all_is_still_no_name(tmp_path: Path) -> None:
    async with peer(1) as one, peer(2) as other, shown(one, tmp_path) as node:
        await one.host.connect(other.host.addresses())
        for text in ("", "…"):
            with pytest.raises(UsageError):
                await node.ping(PingRequest(peer=text))
