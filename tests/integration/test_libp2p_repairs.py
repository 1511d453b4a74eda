"""Each repair of libp2p does what it is for, and libp2p without it does not: its symptom is shown beside it.

When an upgrade of libp2p mends a symptom, the second half of its test fails, and the repair may go. Of the repairs, the
windows are in ``test_hostile.py``, and what is kept of a peer and read of the DHT in ``test_strangers.py``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.peer.envelope import seal_record
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MULTISELECT_PROTOCOL_ID, MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils import encode_delim
from multiaddr import Multiaddr

from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.mesh.libp2p_repairs import apply_repairs
from shoal.node.wire.channel import Router
from shoal.protocol.errors import NoPeersError
from shoal.protocol.ids import Cid
from shoal.protocol.signing import Signer

pytestmark = pytest.mark.trio

# As libp2p has them; this file is imported before any host is opened, since that is when they are repaired.
WRITE_FRAME: Any = Yamux._write_frame
SELECT_ONE_OF: Any = MultiselectClient.select_one_of
MAYBE_CONNECT: Any = AutoConnector.maybe_connect
GET_REMOTE_ADDRESS: Any = TrioTCPStream.get_remote_address
CONSUME_PEER_RECORD: Any = PeerStore.consume_peer_record

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 20.0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture(autouse=True)
def _repaired() -> None:
    apply_repairs()


@asynccontextmanager
async def host(number: int, listen: str = LOOPBACK) -> AsyncIterator[Host]:
    with trio.fail_after(GENEROUS_S):
        async with open_host(
            secret=bytes([number]) * 32, listen=[listen], bootstrap=[], mdns=False, router=Router(), lanes=False
        ) as opened:
            yield opened


async def connect(one: Host, other: Host) -> None:
    await one.connect(other.addresses())
    assert await one.events.receive() == PeerUp(other.peer_id)
    assert await other.events.receive() == PeerUp(one.peer_id)


async def part(one: Host, other: Host) -> None:
    await one.disconnect(other.peer_id)
    assert await one.events.receive() == PeerDown(other.peer_id)
    assert await other.events.receive() == PeerDown(one.peer_id)


async def test_what_is_compared_with_here_is_libp2ps_own() -> None:
    for function in (WRITE_FRAME, SELECT_ONE_OF, MAYBE_CONNECT, GET_REMOTE_ADDRESS, CONSUME_PEER_RECORD):
        assert function.__module__.startswith("libp2p."), function


# --- addresses ---


@needs_ipv6
async def test_a_connection_over_ipv6_has_an_address_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with host(1, "/ip6/::1/tcp/0") as one, host(2, "/ip6/::1/tcp/0") as other:
        await connect(one, other)
        for near, far in ((one, other), (other, one)):
            assert near.connected[far.peer_id].address.startswith("/ip6/::1/tcp/")
            assert near.connected[far.peer_id].address.endswith(f"/p2p/{far.peer_id}")
        assert one.dialed_address(other.peer_id) == ("::1", other.door.port("::1"))
        await part(one, other)

        monkeypatch.setattr(TrioTCPStream, "get_remote_address", GET_REMOTE_ADDRESS)
        await connect(one, other)
        assert other.connected[one.peer_id].address == ""


@needs_ipv6
async def test_ipv4_that_comes_in_by_a_socket_for_both_is_ipv4() -> None:
    with socket.socket(socket.AF_INET6) as listening:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::", 0))
        listening.listen()
        async with await trio.open_tcp_stream("127.0.0.1", listening.getsockname()[1]) as near:
            accepted, seen = listening.accept()
            assert seen[0] == "::ffff:127.0.0.1"
            far = TrioTCPStream(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))
            assert far.get_remote_address() == near.socket.getsockname()
            await far.close()


async def test_a_circuits_address_is_announced_whole() -> None:
    relay = Signer(bytes([9]) * 32).peer_id
    cid = Cid.of_block(b"a circuit")
    async with host(1) as one, host(2) as other:
        circuit = f"/ip4/192.0.2.1/tcp/4001/p2p/{relay}/p2p-circuit/p2p/{one.peer_id}"
        one.announce([circuit])
        await connect(one, other)
        assert await one.provide(cid)
        (found,) = await other.find_providers(cid)
        assert circuit in found

        as_it_comes = new_host(key_pair=create_new_key_pair(bytes([1]) * 32), announce_addrs=[Multiaddr(circuit)])
        assert [str(address) for address in as_it_comes.get_addrs()] != [circuit]
        assert all("p2p-circuit" not in str(address) for address in as_it_comes.get_addrs())


async def test_no_address_is_announced_that_stands_for_all_of_them() -> None:
    async with host(1, "/ip4/0.0.0.0/tcp/0") as one:
        announced = [str(address) for address in one.libp2p.get_addrs()]
        assert announced == list(one.addresses())
        assert announced
        assert not any("/0.0.0.0/" in address for address in announced)
        as_it_comes = BasicHost.get_addrs(one.libp2p)  # type: ignore[arg-type]  # it is one
        assert any("/0.0.0.0/" in str(address) for address in as_it_comes)


async def test_an_old_record_of_a_peer_changes_nothing_and_is_no_offence(monkeypatch: pytest.MonkeyPatch) -> None:
    key = create_new_key_pair(bytes([1]) * 32)
    peer = ID.from_pubkey(key.public_key)
    old, new = (Multiaddr(f"/ip4/192.0.2.{number}/tcp/4001") for number in (1, 2))

    def taken(store: PeerStore, address: Multiaddr, seq: int, signer: KeyPair = key) -> bool:
        return store.consume_peer_record(seal_record(PeerRecord(peer, [address], seq), signer.private_key), 3600)

    store = PeerStore()
    assert taken(store, new, 2)
    assert taken(store, old, 1), "a look-up goes on with the peer that it was told of"
    assert store.addrs(peer) == [new]
    assert not taken(store, old, 3, create_new_key_pair(bytes([2]) * 32)), "signed by another one"
    assert not taken(store, old, 1, create_new_key_pair(bytes([2]) * 32))
    assert store.addrs(peer) == [new]
    assert taken(store, old, 3)
    assert store.addrs(peer) == [old]

    monkeypatch.setattr(PeerStore, "consume_peer_record", CONSUME_PEER_RECORD)
    as_it_comes = PeerStore()
    assert taken(as_it_comes, new, 2)
    assert not taken(as_it_comes, old, 1)


# --- dialing unasked ---


async def test_nobody_is_dialed_whom_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with host(1) as one, host(2) as other, host(3) as heard_of:
        network: Any = one.libp2p.get_network()
        address = heard_of.addresses()[0].partition("/p2p/")[0]
        network.peerstore.add_addrs(ID.from_base58(heard_of.peer_id), [Multiaddr(address)], 3600)
        await connect(one, other)
        await part(one, other)
        await network.auto_connector.maybe_connect()
        assert one.connected == heard_of.connected == {}

        monkeypatch.setattr(AutoConnector, "maybe_connect", MAYBE_CONNECT)
        await network.auto_connector.maybe_connect()
        assert await heard_of.events.receive() == PeerUp(one.peer_id)


# --- half a frame ---


class Pipe(TrioTCPStream):
    """One end of a socket pair that takes little at a time, as what yamux takes for a secured connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().__init__(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))


@asynccontextmanager
async def muxed_pair() -> AsyncIterator[tuple[Any, Any, Callable[[], None]]]:
    """Two ends of yamux, and what lets the second begin to read."""
    names = [ID.from_base58(Signer(bytes([seed]) * 32).peer_id) for seed in (1, 2)]
    pipes: list[Any] = [Pipe(sock) for sock in socket.socketpair()]
    near, far = (
        Yamux(pipe, name, is_initiator) for pipe, name, is_initiator in zip(pipes, names, (True, False), strict=True)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.start)
        await near.event_started.wait()
        yield near, far, lambda: nursery.start_soon(far.start)
        nursery.cancel_scope.cancel()
    for pipe in pipes:
        await pipe.close()


async def stop_one_write_and_use_another_stream() -> bytes:
    """Cancel a write in the middle of its frame; gives what arrives of the connection's other stream."""
    with trio.fail_after(GENEROUS_S):
        async with muxed_pair() as (near, far, let_read):
            busy, other = await near.open_stream(), await near.open_stream()
            with trio.move_on_after(0.1) as scope:
                await busy.write(os.urandom(200_000))
            assert scope.cancelled_caught, "else this shows nothing: the socket took all of it"
            let_read()
            await other.write(b"whole")
            await other.close()
            arrived = b""
            with trio.move_on_after(1):  # an end that understands nothing any more waits for more
                for _ in range(2):
                    stream = await far.accept_stream()
                    if stream.stream_id == other.stream_id:
                        arrived = await stream.read()
            return arrived


async def test_a_cancelled_write_leaves_the_other_streams_of_its_connection_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await stop_one_write_and_use_another_stream() == b"whole"
    monkeypatch.setattr(Yamux, "_write_frame", WRITE_FRAME)
    assert await stop_one_write_and_use_another_stream() == b""


async def test_a_write_that_is_cancelled_before_its_turn_is_not_made() -> None:
    with trio.fail_after(GENEROUS_S):
        async with muxed_pair() as (near, far, let_read), trio.open_nursery() as nursery:
            busy, other = await near.open_stream(), await near.open_stream()
            nursery.start_soon(busy.write, os.urandom(200_000))
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.05) as scope:
                await other.write(b"never")
            assert scope.cancelled_caught
            let_read()
            await other.write(b"whole")
            await far.accept_stream()
            assert await (await far.accept_stream()).read() == b"whole"


async def test_a_write_to_a_connection_that_has_gone_fails_for_whoever_waits_for_it() -> None:
    with trio.fail_after(GENEROUS_S):
        async with muxed_pair() as (near, far, _):
            stream = await near.open_stream()
            await far.secured_conn.close()

            async def write_on() -> None:
                while True:
                    await stream.write(bytes(1000))

            with pytest.raises((BaseLibp2pError, OSError)):
                await write_on()


# --- agreeing on a protocol ---


class Recorded(ReadWriteCloser):
    """One end of a pipe; counts how often it had to wait for the other side after it had written."""

    def __init__(self, stream: trio.StapledStream[Any, Any]) -> None:
        self._stream = stream
        self._has_written = False
        self.num_round_trips = 0
        self.written = b""

    async def write(self, data: bytes) -> None:
        self._has_written = True
        self.written += data
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise ConnectionClosedError("the other end is closed") from error

    async def read(self, n: int | None = None) -> bytes:
        self.num_round_trips += self._has_written
        self._has_written = False
        return bytes(await self._stream.receive_some(n))

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


A, B, C = (TProtocol(name) for name in ("/a/1", "/b/1", "/c/1"))


async def agree(*proposed: TProtocol, supported: tuple[TProtocol, ...]) -> tuple[TProtocol, Recorded]:
    """Let libp2p's own other side answer."""
    near, far = map(Recorded, trio.testing.memory_stream_pair())
    multiselect = Multiselect(dict.fromkeys(supported))
    chosen: list[TProtocol] = []
    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(multiselect.negotiate, MultiselectCommunicator(far))
            chosen.append(await MultiselectClient().select_one_of(proposed, MultiselectCommunicator(near)))
    return chosen[0], near


async def test_a_protocol_is_agreed_on_in_one_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, pipe = await agree(A, supported=(A, B))
    assert chosen == A
    assert pipe.num_round_trips == 1
    assert pipe.written == encode_delim(MULTISELECT_PROTOCOL_ID.encode()) + encode_delim(A.encode())

    monkeypatch.setattr(MultiselectClient, "select_one_of", SELECT_ONE_OF)
    chosen, as_it_comes = await agree(A, supported=(A, B))
    assert chosen == A
    assert as_it_comes.num_round_trips == 2
    assert as_it_comes.written == pipe.written, "the same words, so that every libp2p understands them"


async def test_a_second_choice_takes_one_round_trip_more() -> None:
    chosen, pipe = await agree(A, B, supported=(B,))
    assert (chosen, pipe.num_round_trips) == (B, 2)
    chosen, pipe = await agree(A, B, C, supported=(C, B))
    assert (chosen, pipe.num_round_trips) == (B, 2)


def lines(*words: str) -> bytes:
    return b"".join(encode_delim(word.encode()) for word in words)


async def answered(answers: list[bytes], *proposed: TProtocol) -> tuple[TProtocol | None, str]:
    """What comes of these answers, each given when something was asked, whatever that was."""
    near, far = map(Recorded, trio.testing.memory_stream_pair())

    async def answer() -> None:
        for each in answers:
            await far.read(1000)
            await far.write(each)
        await far.close()

    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            try:
                return await MultiselectClient().select_one_of(proposed, MultiselectCommunicator(near), 1), ""
            except MultiselectClientError as error:
                return None, str(error)
    raise AssertionError


async def test_a_peer_that_answers_the_greeting_first_and_then_no_is_asked_for_the_next() -> None:
    """As js-libp2p does, whose answers come one by one."""
    chosen, _ = await answered([lines(MULTISELECT_PROTOCOL_ID, "na"), lines(B)], A, B)
    assert chosen == B
    chosen, _ = await answered([lines(MULTISELECT_PROTOCOL_ID, "na"), lines("na"), lines(C)], A, B, C)
    assert chosen == C


@pytest.mark.parametrize(
    "answers",
    [
        [b""],
        [lines(MULTISELECT_PROTOCOL_ID)],
        [lines("na", "na")],
        [lines("/multistream/2.0.0", A)],
        [lines(MULTISELECT_PROTOCOL_ID, "na")],
        [lines(MULTISELECT_PROTOCOL_ID, B)],
        [lines(MULTISELECT_PROTOCOL_ID, "na"), lines("na")],
        [lines(MULTISELECT_PROTOCOL_ID, "na"), lines(C)],
        [lines(A, A)],
        [b"\xff" * 100],
        [b"\x05hello"],
        [b"\x03\xff\xff\n"],
        [lines(MULTISELECT_PROTOCOL_ID) + b"\x03\xff\xff\n"],
        [lines(MULTISELECT_PROTOCOL_ID, "na"), b"\x03\xff\xff\n"],
    ],
    ids=repr,
)
async def test_an_answer_that_agrees_to_nothing_is_one_error_in_one_line(answers: list[bytes]) -> None:
    chosen, why = await answered(answers, A, B)
    assert chosen is None
    assert why
    assert "\n" not in why


async def test_a_peer_that_says_nothing_is_given_up_in_time() -> None:
    near, _far = map(Recorded, trio.testing.memory_stream_pair())
    with trio.fail_after(GENEROUS_S), pytest.raises(MultiselectClientError, match=r"within 0\.05 s"):
        await MultiselectClient().select_one_of([A], MultiselectCommunicator(near), 0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer", [lines(MULTISELECT_PROTOCOL_ID) + b"\x03\xff\xff\n", b"\x03\xff\xff\n", b"\xff" * 1000, b""], ids=repr
)
async def test_nonsense_instead_of_an_agreement_is_nobody_there(answer: bytes) -> None:
    async def lie(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.receive_some()
            await stream.send_all(answer)

    async with host(1) as one, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lie, listeners)
        stranger = Signer(bytes([9]) * 32).peer_id
        with pytest.raises(NoPeersError):
            await one.connect([f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}/p2p/{stranger}"])
        assert one.connected == {}
        nursery.cancel_scope.cancel()
