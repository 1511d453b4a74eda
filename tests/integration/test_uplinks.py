"""Real hosts that reduce together measure what they send by that, and own parts by what all of them signed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest
import trio

from shoal.node.mesh.host import Host, open_host
from shoal.node.swarm.exchanging import members_of
from shoal.node.swarm.reducing import ReduceResult, Reductions
from shoal.node.wire.channel import Router
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer
from shoal.training.exchange.ballots import SignedOffer
from shoal.training.exchange.spans import Spans
from shoal.training.statements import Offer, RoundKey, first_after

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 120.0
PATIENCE_S = 20.0
SPANS = Spans(2_000_000, part_numel=256 * 1024)  # 8 MB in eight parts
KEY = RoundKey(1, 0, first_after(Cid.of_block(b"policy")))


@asynccontextmanager
async def hosts(count: int) -> AsyncIterator[list[tuple[Host, Reductions]]]:
    with trio.fail_after(GENEROUS_S):
        async with AsyncExitStack() as stack:
            found: list[tuple[Host, Reductions]] = []
            for number in range(1, count + 1):
                router, secret = Router(), bytes([number]) * 32
                host = await stack.enter_async_context(
                    open_host(secret=secret, listen=[LOOPBACK], bootstrap=[], mdns=False, router=router)
                )
                reductions = Reductions(host.links, Signer(secret))
                router.add(reductions)
                for other, _ in found:
                    await host.connect(other.addresses())
                found.append((host, reductions))
            yield found


def offers(peers: Sequence[PeerId], uplinks: Sequence[int]) -> list[SignedOffer]:
    return [
        SignedOffer(peer, peer.encode(), Offer(key=KEY, cid=Cid.of_block(peer.encode()), weight=64, uplink=uplink))
        for peer, uplink in zip(peers, uplinks, strict=True)
    ]


async def reduce(found: list[tuple[Host, Reductions]], uplinks: Sequence[int], name: str) -> list[ReduceResult]:
    """One all-reduce; each finds its members from the offers, in an order of its own."""
    signed = offers([host.peer_id for host, _ in found], uplinks)
    key = hashlib.sha256(name.encode()).digest()[:16]
    results: list[ReduceResult] = []
    # Before anybody begins: all share one loop, and calls that it keeps waiting for seconds are given up.
    arrays = [
        SPANS.encode(np.random.default_rng(n).standard_normal(SPANS.numel, np.float32)) for n in range(len(found))
    ]

    async def take_part(number: int, reductions: Reductions) -> None:
        members = members_of(signed[number:] + signed[:number])
        into = memoryview(bytearray(SPANS.num_bytes))
        async with reductions.reducing(key, members, SPANS, arrays[number], into=into, patience_s=PATIENCE_S) as result:
            results.append(result)

    async with trio.open_nursery() as nursery:
        for number, (_, reductions) in enumerate(found):
            nursery.start_soon(take_part, number, reductions)
    return results


async def test_whoever_says_that_it_is_slow_owns_nothing_and_is_in_every_result() -> None:
    async with hosts(4) as found:
        results = await reduce(found, [12_500_000, 12_500_000, 0, 1_250_000], "unequal")
    everybody = tuple(sorted(host.peer_id for host, _ in found))
    slow = found[3][0].peer_id
    assert len({result.digest for result in results}) == 1
    for result in results:
        owned = Counter(outcome.owner for outcome in result.outcomes.values())
        assert slow not in owned
        assert sorted(owned.values()) == [2, 3, 3]
        assert {outcome.authors for outcome in result.outcomes.values()} == {everybody}


async def test_hosts_measure_what_they_send_by_reducing() -> None:
    async with hosts(3) as found:
        uplinks = [host.links.bulk.uplink for host, _ in found]
        assert [uplink.per_s for uplink in uplinks] == [0, 0, 0]
        number = 0
        while not all(uplink.per_s for uplink in uplinks):
            number += 1
            await reduce(found, [0, 0, 0], f"{number}")
        results = await reduce(found, [round(uplink.per_s) for uplink in uplinks], "measured")
    assert len({result.digest for result in results}) == 1
