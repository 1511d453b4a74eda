"""Circuits between real hosts in one process: what works over them, what is refused, and how they end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import trio

from shoal.node.mesh.circuits import RelayError
from shoal.node.mesh.host import Host, open_host
from shoal.node.mesh.paths import PathKind
from shoal.node.mesh.relay_limits import RelayLimits
from shoal.node.wire.bulk_tensors import offer_tensor, pull_tensor_into
from shoal.node.wire.channel import Router
from shoal.protocol.codec import Attachment
from shoal.protocol.errors import NoPeersError, RemoteError, Status
from shoal.protocol.services import (
    Service,
    bidirectional,
    client,
    client_streaming,
    current_call,
    server_streaming,
    unary,
)
from shoal.protocol.signing import Signer
from shoal.protocol.tensors import encode_tensor

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 30.0


@dataclass(frozen=True, slots=True)
class Parcel:
    data: tuple[Attachment, ...] = ()
    sender: str = ""


class Post(Service, name="test"):
    @unary(idempotent=True, max_answer_bytes=2_000_000)
    async def who(self, request: Parcel) -> Parcel:
        return Parcel(request.data, current_call().peer)

    @server_streaming()
    async def count(self, request: Parcel) -> AsyncIterator[Parcel]:
        for number in range(int(request.sender)):
            yield Parcel((bytes(10_000),), str(number))

    @client_streaming()
    async def gather(self, requests: AsyncIterator[Parcel]) -> Parcel:
        return Parcel(sender="".join([request.sender async for request in requests]))

    @bidirectional()
    async def echo(self, requests: AsyncIterator[Parcel]) -> AsyncIterator[Parcel]:
        async for request in requests:
            yield request


@asynccontextmanager
async def host(number: int, limits: RelayLimits | None = None) -> AsyncIterator[Host]:
    async with open_host(
        secret=bytes([number]) * 32,
        listen=[LOOPBACK],
        bootstrap=[],
        mdns=False,
        router=Router(Post()),
        relay_limits=limits,
    ) as opened:
        yield opened


@asynccontextmanager
async def three(limits: RelayLimits | None = None) -> AsyncIterator[tuple[Host, Host, Host]]:
    """One and other, each connected to the relay in the middle, with which the other has a reservation."""
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(2, limits) as relay, host(3) as other:
            relay.relay.open()
            await one.connect(relay.addresses())
            await other.connect(relay.addresses())
            await other.relay.reserve(relay.peer_id)
            yield one, relay, other


def circuit(relay: Host, target: Host) -> str:
    return f"{relay.addresses()[0]}/p2p-circuit/p2p/{target.peer_id}"


async def test_a_circuit_is_a_connection_like_any_other_and_says_that_it_is_relayed() -> None:
    block = os.urandom(1_000_000)
    async with three() as (one, relay, other):
        await one.connect([circuit(relay, other)])
        answer = await client(Post, one.at(other.peer_id)).who(Parcel((block,)))
        assert answer.sender == one.peer_id
        assert bytes(answer.data[0]) == block
        answer = await client(Post, other.at(one.peer_id)).who(Parcel())
        assert answer.sender == other.peer_id
        for near, far in ((one, other), (other, one)):
            assert near.connected[far.peer_id].kind is PathKind.RELAYED
            assert f"/p2p/{relay.peer_id}/p2p-circuit/p2p/{far.peer_id}" in near.connected[far.peer_id].address
        assert relay.relay.num_bytes > 2_000_000
        assert relay.relay.ledger.num_circuits == 1


async def test_streams_and_tensors_go_over_a_circuit_too() -> None:
    async def letters() -> AsyncIterator[Parcel]:
        for letter in "abc":
            yield Parcel(sender=letter)

    tensor = np.random.default_rng(1).random(300_000, dtype=np.float32)
    async with three() as (one, relay, other):
        await one.connect([circuit(relay, other)])
        post = client(Post, one.at(other.peer_id))
        assert [each.sender async for each in post.count(Parcel(sender="200"))] == [str(n) for n in range(200)]
        assert (await post.gather(letters())).sender == "abc"
        assert [each.sender async for each in post.echo(letters())] == ["a", "b", "c"]
        async with offer_tensor(one.links.bulk, other.peer_id, encode_tensor(tensor)) as offered:
            taken = np.zeros_like(tensor)
            await pull_tensor_into(other.links.bulk, one.peer_id, offered, taken, timeout_s=GENEROUS_S)
        assert np.array_equal(taken, tensor)
        assert one.connected[other.peer_id].kind is PathKind.RELAYED


async def test_a_peer_is_found_by_its_name_alone_through_a_relay_that_both_know() -> None:
    async with three() as (one, relay, other):
        one.relays[relay.peer_id] = relay.addresses()[0]
        await one.find(other.peer_id)
        assert one.connected[other.peer_id].kind is PathKind.RELAYED


async def test_a_better_path_takes_over_without_a_failed_call_and_a_worse_one_when_it_dies() -> None:
    async with three() as (one, relay, other):
        await one.connect([circuit(relay, other)])
        post = client(Post, one.at(other.peer_id))
        num_answered = 0
        is_over = False

        async def keep_calling() -> None:
            nonlocal num_answered
            while not is_over:
                await post.who(Parcel())
                num_answered += 1

        async def more_are_answered() -> None:
            """Some that were under way, and some that began since."""
            enough = num_answered + 10
            with trio.fail_after(GENEROUS_S):
                while num_answered < enough:  # noqa: ASYNC110  the calls know nothing of it
                    await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_calling)
            await more_are_answered()
            await one.dial(other.peer_id, other.addresses()[0])
            assert one.connected[other.peer_id].kind is PathKind.DIRECT
            await more_are_answered()
            await one.close_path(one.connected[other.peer_id].best)
            assert one.connected[other.peer_id].kind is PathKind.RELAYED
            await more_are_answered()
            is_over = True


async def test_without_a_reservation_there_is_no_circuit() -> None:
    async with three() as (one, relay, other):
        with pytest.raises(RelayError, match="NO_RESERVATION"):
            await other.relay.dial(circuit(relay, one))
        with pytest.raises(NoPeersError):
            await other.connect([circuit(relay, one)])


async def test_whoever_does_not_relay_refuses() -> None:
    async with host(1) as one, host(2) as other:
        await one.connect(other.addresses())
        with pytest.raises(RelayError):
            await one.relay.reserve(other.peer_id)


async def test_no_circuit_goes_through_two_relays() -> None:
    async with three() as (one, relay, other):
        other.relay.open()
        await one.connect([circuit(relay, other)])
        with pytest.raises(RelayError, match="PERMISSION_DENIED"):
            await one.relay.reserve(other.peer_id)


async def test_a_reservation_ends_with_the_connection() -> None:
    async with three() as (one, relay, other):
        assert relay.relay.ledger.num_reservations == 1
        await other.disconnect(relay.peer_id)
        while other.peer_id in relay.connected:
            await relay.wait_for_change()
        assert relay.relay.ledger.num_reservations == 0
        assert one.connected.keys() == {relay.peer_id}


async def test_a_circuit_ends_when_it_has_carried_all_that_it_may() -> None:
    async with three(replace(RelayLimits(), circuit_bytes=300_000)) as (one, relay, other):
        await one.connect([circuit(relay, other)])
        with pytest.raises(RemoteError) as caught:
            await client(Post, one.at(other.peer_id)).who(Parcel((os.urandom(1_000_000),)))
        assert caught.value.status is Status.UNAVAILABLE
        while other.peer_id in one.connected:
            await one.wait_for_change()
        assert relay.peer_id in one.connected


async def test_a_circuit_ends_when_its_time_is_over() -> None:
    async with three(replace(RelayLimits(), circuit_s=1)) as (one, relay, other):
        await one.connect([circuit(relay, other)])
        while other.peer_id in one.connected:
            await one.wait_for_change()
        while relay.relay.ledger.num_circuits:  # noqa: ASYNC110  nothing tells
            await trio.sleep(0.05)


async def test_the_line_is_kept_to_its_limit() -> None:
    async with three(replace(RelayLimits(), bytes_per_s=1e6)) as (one, relay, other):
        await one.connect([circuit(relay, other)])
        began = trio.current_time()
        await client(Post, one.at(other.peer_id)).who(Parcel((os.urandom(1_000_000),)))
        assert trio.current_time() - began > 1.0


async def test_when_the_relay_ends_so_do_its_circuits_and_nothing_else() -> None:
    with trio.fail_after(GENEROUS_S):
        async with host(1) as one, host(3) as other:
            async with host(2) as relay:
                relay.relay.open()
                await one.connect(relay.addresses())
                await other.connect(relay.addresses())
                await other.relay.reserve(relay.peer_id)
                await one.connect([circuit(relay, other)])
            while one.connected or other.connected:  # noqa: ASYNC110  of both
                await trio.sleep(0.05)
            await one.connect(other.addresses())
            assert (await client(Post, one.at(other.peer_id)).who(Parcel())).sender == one.peer_id


@pytest.mark.parametrize("address", ["/p2p-circuit/p2p/x", "", "/ip4/1.2.3.4/tcp/1/p2p/y/p2p-circuit/p2p/"])
async def test_what_is_no_circuit_address_is_told(address: str) -> None:
    async with host(1) as one:
        with pytest.raises(RelayError, match="not a circuit's address"):
            await one.relay.dial(address)


async def test_a_peer_with_another_name_at_the_far_end_is_not_taken() -> None:
    async with three() as (one, relay, other):
        stranger = Signer(bytes([9]) * 32).peer_id
        await other.connect(relay.addresses())
        with pytest.raises(RelayError):
            await one.relay.dial(f"{relay.addresses()[0]}/p2p-circuit/p2p/{stranger}")
        assert stranger not in one.connected
