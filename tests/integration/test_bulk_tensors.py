"""A tensor that one host offers fills the other's own array, whatever carries it and however it is written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import trio

from shoal.node.mesh.host import Host, open_host
from shoal.node.wire.bulk import Transport
from shoal.node.wire.bulk_tensors import OfferedTensor, offer_tensor, pull_tensor_into
from shoal.node.wire.channel import Router
from shoal.protocol.errors import RemoteError, Status, UsageError
from shoal.protocol.services import Empty, Service, client, current_call, unary
from shoal.protocol.tensors import Array, TensorCodec, decode_tensor, encode_tensor

pytestmark = pytest.mark.trio

GENEROUS_S = 30.0
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Span:
    tensor: OfferedTensor
    transport: str = "auto"


class Exchange(Service, name="test_exchange"):
    @unary()
    async def take(self, request: Span) -> Empty:
        raise NotImplementedError


class Taker(Exchange):
    """Pulls into an array of its own."""

    host: Host

    def __init__(self, out: Array) -> None:
        self.out = out

    async def take(self, request: Span) -> Empty:
        transport: Transport = "libp2p" if request.transport == "libp2p" else "auto"
        peer, bulk = current_call().peer, self.host.links.bulk
        await pull_tensor_into(bulk, peer, request.tensor, self.out, timeout_s=GENEROUS_S, transport=transport)
        return Empty()


@asynccontextmanager
async def giver_and(taker: Taker) -> AsyncIterator[tuple[Host, Exchange]]:
    def host(number: int, *services: Service) -> object:
        secret, listen = bytes([number]) * 32, ["/ip4/127.0.0.1/tcp/0"]
        return open_host(secret=secret, listen=listen, bootstrap=[], mdns=False, router=Router(*services))

    with trio.fail_after(GENEROUS_S):
        async with host(1) as giver, host(2, taker) as taker.host:  # type: ignore[attr-defined]
            await giver.connect(taker.host.addresses())
            yield giver, client(Exchange, giver.at(taker.host.peer_id))


def values(num: int, dtype: str = "float32") -> Array:
    return np.random.default_rng(7).standard_normal(num).astype(dtype)


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
@pytest.mark.parametrize("codec", list(TensorCodec))
async def test_the_far_array_holds_what_the_codec_says(codec: TensorCodec, transport: str) -> None:
    array = values(700_000).reshape(7, 100_000)
    tensor = encode_tensor(array, codec, k=1000 if codec is TensorCodec.TOPK else None)
    taker = Taker(np.full_like(array, np.nan))
    async with giver_and(taker) as (giver, far), offer_tensor(giver.links.bulk, taker.host.peer_id, tensor) as offered:
        await far.take(Span(offered, transport))
    np.testing.assert_array_equal(taker.out, decode_tensor(tensor, max_bytes=array.nbytes))


@pytest.mark.parametrize("array", [np.float32(3).reshape(()), np.zeros((0, 5), "float16"), np.array([True, False])])
async def test_of_any_shape_and_dtype(array: Array) -> None:
    taker = Taker(np.ones_like(array))
    tensor = encode_tensor(array)
    async with giver_and(taker) as (giver, far), offer_tensor(giver.links.bulk, taker.host.peer_id, tensor) as offered:
        await far.take(Span(offered))
    np.testing.assert_array_equal(taker.out, array)


async def test_one_that_is_not_what_was_expected_changes_nothing() -> None:
    taker = Taker(values(2000))
    before = taker.out.copy()
    tensor = encode_tensor(values(1000))
    async with giver_and(taker) as (giver, far), offer_tensor(giver.links.bulk, taker.host.peer_id, tensor) as offered:
        for lie in (
            offered,  # another shape
            replace(offered, shape=(2000,)),
            replace(offered, dtype="float64", shape=(500,)),
            replace(offered, shape=(2**40,)),
            replace(offered, codec=TensorCodec.INT8, block_size=1),
            replace(offered, parts=()),
            replace(offered, dtype="object"),
        ):
            with pytest.raises(RemoteError) as caught:
                await far.take(Span(lie))
            assert caught.value.status in (Status.INVALID_ARGUMENT, Status.RESOURCE_EXHAUSTED)
        np.testing.assert_array_equal(taker.out, before)


async def test_an_array_that_cannot_be_filled_in_place_is_refused() -> None:
    taker = Taker(values(2000)[::2])
    tensor = encode_tensor(values(1000))
    async with giver_and(taker) as (giver, _), offer_tensor(giver.links.bulk, taker.host.peer_id, tensor) as offered:
        with pytest.raises(UsageError, match="C-contiguous"):
            await pull_tensor_into(taker.host.links.bulk, giver.peer_id, offered, taker.out, timeout_s=GENEROUS_S)
