"""A fetch ends with the right bytes as long as one honest source stays, whatever the others do."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht import blocks as blocks_module
from shoal.dht import fetch as module
from shoal.dht import manifests
from shoal.dht.blocks import Content, split
from shoal.dht.fetch import (
    BlockArrived,
    BlockFailed,
    Done,
    Drop,
    Failed,
    Fetch,
    Output,
    Request,
    SourceFound,
    SourceLost,
    Store,
    Tick,
    Wake,
)
from shoal.protocol.codec import encode
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer

PEERS = [Signer(bytes([n]) * 32).peer_id for n in range(1, 8)]
ANN, BOB, CAT = PEERS[:3]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (blocks_module, manifests, module):
        monkeypatch.setattr(where, "BLOCK_BYTES", 1024)


def a_content(count: int = 5) -> tuple[bytes, Content]:
    data = b"".join(bytes([n]) * 1024 for n in range(count))[:-1]
    return data, split(data)


def of(kind: type[Output], outputs: list[Output]) -> list[Output]:
    return [output for output in outputs if isinstance(output, kind)]


def requests(outputs: list[Output]) -> list[Request]:
    return [output for output in outputs if isinstance(output, Request)]


def test_a_single_block_is_asked_and_done() -> None:
    content = split(b"hello")
    fetch = Fetch(content.cid, [ANN])
    (request,) = requests(fetch.handle(Tick(), 0.0))
    assert (request.source, request.cid) == (ANN, content.cid)
    outputs = fetch.handle(BlockArrived(ANN, content.cid, b"hello"), 0.1)
    assert outputs == [Store(content.cid, b"hello"), Done(b"hello")]
    assert fetch.handle(Tick(), 9.0) == []


def test_blocks_are_asked_of_many_sources_at_once() -> None:
    data, content = a_content()
    fetch = Fetch(content.cid, PEERS[:2], max_in_flight=2)
    (first,) = requests(fetch.handle(Tick(), 0.0))
    asked = requests(fetch.handle(BlockArrived(first.source, content.cid, content.blocks[content.cid]), 0.1))
    assert Counter(request.source for request in asked) == {ANN: 2, BOB: 2}
    assert len({request.cid for request in asked}) == 4
    assert requests(fetch.handle(Tick(), 0.2)) == []
    while asked:
        request = asked.pop()
        outputs = fetch.handle(BlockArrived(request.source, request.cid, content.blocks[request.cid]), 1.0)
        asked += requests(outputs)
    assert outputs[-1] == Done(data)
    assert fetch.progress == (len(data), len(data))


def test_a_liar_is_dropped_and_its_blocks_are_asked_elsewhere() -> None:
    _, content = a_content()
    fetch = Fetch(content.cid, [ANN])
    fetch.handle(Tick(), 0.0)
    fetch.handle(SourceFound(BOB), 0.0)
    outputs = fetch.handle(BlockArrived(ANN, content.cid, b"lies"), 0.1)
    assert [output.source for output in outputs if isinstance(output, Drop)] == [ANN]
    assert [request.source for request in requests(outputs)] == [BOB]
    fetch.handle(SourceFound(ANN), 0.2)
    assert all(request.source != ANN for request in requests(fetch.handle(Tick(), 0.3)))
    assert not of(Store, outputs)


def test_a_failing_source_is_left_alone_for_a_while() -> None:
    _, content = a_content()
    fetch = Fetch(content.cid, [ANN])
    fetch.handle(Tick(), 0.0)
    outputs = fetch.handle(BlockFailed(ANN, content.cid, "busy"), 1.0)
    assert outputs == [Wake(1.0 + module.FIRST_BACKOFF_S)]
    assert requests(fetch.handle(Tick(), 1.1)) == []
    assert len(requests(fetch.handle(Tick(), 1.0 + module.FIRST_BACKOFF_S))) == 1
    outputs = fetch.handle(BlockFailed(ANN, content.cid, "busy"), 2.0)
    assert outputs == [Wake(2.0 + 2 * module.FIRST_BACKOFF_S)]


def test_a_source_that_only_fails_is_given_up_and_the_reason_told() -> None:
    content = split(b"x")
    fetch = Fetch(content.cid, [ANN])
    now, outputs = 0.0, fetch.handle(Tick(), 0.0)
    for _ in range(100):
        if requests(outputs):
            outputs = fetch.handle(BlockFailed(ANN, content.cid, "no such block"), now)
        if fetch.is_over:
            break
        (wake,) = (output for output in outputs if isinstance(output, Wake))
        now = wake.at
        outputs = fetch.handle(Tick(), now)
    (failed,) = (output for output in outputs if isinstance(output, Failed))
    assert "no such block" in failed.reason


def test_a_lost_source_is_not_waited_for() -> None:
    content = split(b"x")
    fetch = Fetch(content.cid, [ANN])
    fetch.handle(Tick(), 0.0)
    fetch.handle(SourceFound(BOB), 0.0)
    assert [request.source for request in requests(fetch.handle(SourceLost(ANN), 0.1))] == [BOB]
    assert fetch.handle(BlockArrived(ANN, content.cid, b"lies"), 0.2)[0:] == [Wake(float("inf"))]
    assert of(Failed, fetch.handle(SourceLost(BOB), 0.3))


def test_without_sources_it_waits_until_its_deadline() -> None:
    content = split(b"x")
    fetch = Fetch(content.cid, [], deadline=5.0)
    assert fetch.handle(Tick(), 0.0) == [Wake(5.0)]
    (request,) = requests(fetch.handle(SourceFound(ANN), 4.0))
    assert request.timeout_s == pytest.approx(1.0)
    assert of(Failed, fetch.handle(Tick(), 5.0))


def test_what_is_on_disk_is_not_asked() -> None:
    data, content = a_content()
    manifest = content.blocks[content.cid]
    names = manifests.open_content_manifest(content.cid, manifest).blocks
    have = {names[0]: content.blocks[names[0]], names[1]: b"damaged", content.cid: manifest}
    asked = requests(Fetch(content.cid, [ANN], have, max_in_flight=99).handle(Tick(), 0.0))
    assert [request.cid for request in asked] == list(names[1:])
    assert Fetch(content.cid, [], content.blocks).handle(Tick(), 0.0) == [Done(data)]
    late = Fetch(content.cid, [ANN], {names[0]: content.blocks[names[0]]}, max_in_flight=99)
    late.handle(Tick(), 0.0)
    asked = requests(late.handle(BlockArrived(ANN, content.cid, manifest), 0.1))
    assert [request.cid for request in asked] == list(names[1:])


def test_a_run_manifest_is_one_block() -> None:
    data = encode({"task": "gym:CartPole-v1"})
    cid = Cid.of_manifest(data)
    fetch = Fetch(cid, [ANN], is_plain=True)
    fetch.handle(Tick(), 0.0)
    assert fetch.handle(BlockArrived(ANN, cid, data), 0.1)[-1] == Done(data)


def test_a_content_that_is_wrong_in_itself_fails_without_blaming_the_source() -> None:
    data = encode({"size": 2048, "blocks": ["junk"]})
    fetch = Fetch(Cid.of_manifest(data), [ANN])
    fetch.handle(Tick(), 0.0)
    outputs = fetch.handle(BlockArrived(ANN, Cid.of_manifest(data), data), 0.1)
    assert of(Failed, outputs)
    assert not of(Drop, outputs)


def test_a_content_that_is_too_big_is_refused_before_its_blocks_are_asked() -> None:
    data, content = a_content()
    fetch = Fetch(content.cid, [ANN], max_bytes=len(data) - 1)
    fetch.handle(Tick(), 0.0)
    outputs = fetch.handle(BlockArrived(ANN, content.cid, content.blocks[content.cid]), 0.1)
    assert of(Failed, outputs)
    assert not requests(outputs)


def test_answers_to_what_was_not_asked_are_ignored() -> None:
    _, content = a_content()
    fetch = Fetch(content.cid, [ANN])
    fetch.handle(Tick(), 0.0)
    for event in (
        BlockArrived(BOB, content.cid, b"lies"),
        BlockArrived(ANN, Cid.of_block(b"x"), b"x"),
        BlockFailed(BOB, content.cid, ""),
        SourceLost(CAT),
    ):
        assert fetch.handle(event, 0.1) == [Wake(float("inf"))]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3))
def test_one_honest_source_is_enough(seed: int, count: int, liars: int, flaky: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(1024 * count - rng.randrange(1024))
    content = split(data)
    lying, failing = set(PEERS[:liars]), set(PEERS[3 : 3 + flaky])
    sources: list[PeerId] = [*lying, *failing, PEERS[6]]
    rng.shuffle(sources)
    fetch = Fetch(content.cid, sources, max_in_flight=rng.randint(1, 4))
    queue: list[tuple[float, int, object]] = [(0.0, 0, Tick())]
    open_requests: Counter[PeerId] = Counter()
    serial, dropped = 0, set()
    while queue:
        now, _, event = heapq.heappop(queue)
        assert isinstance(event, Tick | BlockArrived | BlockFailed)
        if not isinstance(event, Tick):
            open_requests[event.source] -= 1
        for output in fetch.handle(event, now):
            serial += 1
            match output:
                case Request(source, cid, _):
                    assert source not in dropped
                    open_requests[source] += 1
                    assert open_requests[source] <= 4
                    answer: BlockArrived | BlockFailed = BlockArrived(source, cid, content.blocks[cid])
                    if source in lying:
                        answer = BlockArrived(source, cid, b"lies")
                    elif source in failing and rng.random() < 0.7:
                        answer = BlockFailed(source, cid, "busy")
                    heapq.heappush(queue, (now + rng.random(), serial, answer))
                case Wake(at) if at < 1e6:
                    heapq.heappush(queue, (at, serial, Tick()))
                case Drop(source, _):
                    dropped.add(source)
                    assert source in lying
                case Done(result):
                    assert result == data
                    return
                case Failed(reason):
                    raise AssertionError(f"seed {seed}: {reason}")
                case _:
                    pass
    raise AssertionError(f"seed {seed}: it stalled")
