"""What ``shoal bench allreduce`` has each of its nodes do: all-reduces of made-up arrays, and the same bytes raw."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Sequence
from typing import Any, Final

import trio

from shoal.node.swarm.reducing import KEY_BYTES, ReduceResult, Reductions
from shoal.node.wire.bulk import Bulk
from shoal.node.wire.links import Links
from shoal.protocol.errors import NoPeersError, RemoteError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.exchange.allreduce import Member

log = logging.getLogger(__name__)

PATIENCE_S: Final = 5.0
MAX_NUMEL: Final = 2**28
CONNECT_S: Final = 10.0
RAW_S: Final = 60.0


async def bench_reduce(
    reductions: Reductions,
    links: Links,
    me: PeerId,
    peers: Sequence[PeerId],
    numel: int,
    codec: str,
    rounds: int,
    name: str,
) -> dict[str, Any]:
    """Reduce so often with these peers, each of which does the same at the same time.

    Args:
        reductions: of this node.
        links: likewise.
        me: this node, one of the peers.
        peers: all, in the same order at everybody.
        numel: of the float32 array.
        codec: that it is written by.
        rounds: how many are measured, after one that is not.
        name: of the measurement.

    Returns:
        ``seconds`` of each round; ``num_bytes`` of the array as it travels; ``digests`` of the results;
        ``num_left_out``, members' parts that came too late; ``max_error`` against float64; ``raw_seconds``, in which as
        many bytes were pulled from the same peers by the same lanes, and nothing else done; None if a peer is gone.
    """
    import numpy as np

    from shoal.protocol.tensors import TensorCodec
    from shoal.training.exchange.spans import FIXED, Spans

    if me not in peers or len(peers) < 2 or not 1 <= numel <= MAX_NUMEL:
        raise UsageError(f"an all-reduce is measured among two peers or more, with up to {MAX_NUMEL} values")
    if codec not in FIXED:
        raise UsageError(f"--codec should be one of {', '.join(FIXED)}, not {codec[:40]!r}")
    others = [peer for peer in peers if peer != me]
    await _connected(links, others)
    spans = Spans(numel, TensorCodec(codec))
    weight_of = {peer: 100.0 + 10 * rank for rank, peer in enumerate(peers)}
    members = [Member(peer, weight) for peer, weight in weight_of.items()]

    def array(rank: int) -> Any:
        return np.random.default_rng(rank).standard_normal(numel, np.float32)

    offered = await trio.to_thread.run_sync(lambda: spans.encode(array(peers.index(me))))
    results: list[ReduceResult] = []
    into = memoryview(bytearray(spans.num_bytes))
    for number in range(rounds + 1):
        key = _key(name, f"{number}")
        async with reductions.reducing(key, members, spans, offered, into=into, patience_s=PATIENCE_S) as result:
            results.append(result)

    def error(result: ReduceResult) -> float:
        """From the mean of those whose parts are in it."""
        found, far = spans.decode(result.data), 0.0
        arrays = {peer: array(rank) for rank, peer in enumerate(peers)}
        for part, outcome in result.outcomes.items():
            values, total = spans.values(part), sum(weight_of[peer] for peer in outcome.authors)
            exact = sum(arrays[peer][values].astype(np.float64) * (weight_of[peer] / total) for peer in outcome.authors)
            far = max(far, float(np.abs(found[values] - exact).max()))
        return far

    raw_s: float | None = None
    try:
        raw_s = await _raw(reductions, links.bulk, others, spans.num_bytes, rounds, _key(name, "raw"))
    except (RemoteError, trio.TooSlowError) as error_:
        log.info("the lanes alone are not measured: %s", error_ or "a peer is gone")
    return {
        "seconds": [result.seconds for result in results[1:]],
        "num_bytes": spans.num_bytes,
        "digests": [result.digest.hex() for result in results],
        "num_left_out": sum(len(peers) - len(each.authors) for result in results for each in result.outcomes.values()),
        "max_error": await trio.to_thread.run_sync(error, results[-1]),
        "raw_seconds": raw_s,
    }


def _key(name: str, what: str) -> bytes:
    return hashlib.sha256(f"{name} {what}".encode()).digest()[:KEY_BYTES]


async def _connected(links: Links, peers: Sequence[PeerId]) -> None:
    with trio.move_on_after(CONNECT_S) as scope:
        while not all(links.is_connected(peer) for peer in peers):  # noqa: ASYNC110  the nodes have just begun
            await trio.sleep(0.05)
    if scope.cancelled_caught:
        raise NoPeersError("not all of the peers are connected to this node; `shoal peers` lists those that are")


async def _raw(
    reductions: Reductions, bulk: Bulk, others: Sequence[PeerId], num_bytes: int, rounds: int, key: bytes
) -> float:
    """The median seconds in which what an all-reduce pulls was pulled from the same peers, by everybody at once."""
    share = num_bytes // (len(others) + 1)
    taken = {peer: memoryview(bytearray(share)) for peer in others}
    times: list[float] = []
    async with reductions.meeting(key, others, memoryview(bytearray(num_bytes))) as refs:
        for _ in range(rounds):
            began = trio.current_time()
            for _ in range(2):  # parts, then results
                async with trio.open_nursery() as nursery:
                    for peer in others:
                        nursery.start_soon(_pull, bulk, peer, refs[peer], taken[peer])
            times.append(trio.current_time() - began)
    return statistics.median(times)


async def _pull(bulk: Bulk, peer: PeerId, ref: Any, into: memoryview) -> None:
    await bulk.pull(peer, ref, into, timeout_s=RAW_S)
