"""A fetch ends with the right bytes as long as one honest source stays, whatever the others do."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Mapping

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
    Lack,
    Look,
    Looked,
    Output,
    Planned,
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


def begin(fetch: Fetch, have: Mapping[Cid, bytes] | None = None, now: float = 0.0) -> list[Output]:
    """The first tick; what is looked for is found among ``have``."""
    return found(fetch, fetch.handle(Tick(), now), have or {}, now)


def found(fetch: Fetch, outputs: list[Output], have: Mapping[Cid, bytes], now: float) -> list[Output]:
    """Answer what a fetch looks for; all that it says until it looks for no more."""
    all_outputs, looks = list(outputs), of(Look, outputs)
    while looks:
        (look,) = looks
        assert isinstance(look, Look)
        here = {cid: len(have[cid]) for cid in look.cids if cid in have and cid.matches(have[cid])}
        manifest = have.get(fetch.cid) if fetch.cid in here and fetch.cid.is_manifest else None
        more = fetch.handle(Looked(here, manifest), now)
        all_outputs += more
        looks = of(Look, more)
    return all_outputs


def give(
    fetch: Fetch, source: PeerId, cid: Cid, data: bytes, now: float, have: Mapping[Cid, bytes] | None = None
) -> list[Output]:
    """A source answers."""
    return found(fetch, fetch.handle(BlockArrived(source, cid, data, cid.matches(data)), now), have or {}, now)


def test_a_single_block_is_asked_and_done() -> None:
    content = split(b"hello")
    fetch = Fetch(content.cid, [ANN])
    (request,) = requests(begin(fetch))
    assert (request.source, request.cid) == (ANN, content.cid)
    assert give(fetch, ANN, content.cid, b"hello", 0.1) == [Store(content.cid, b"hello"), Done()]
    assert fetch.handle(Tick(), 9.0) == []


def test_blocks_are_asked_of_many_sources_at_once() -> None:
    data, content = a_content(9)
    fetch = Fetch(content.cid, PEERS[:2], max_in_flight=2)
    (first,) = requests(begin(fetch))
    asked = requests(give(fetch, first.source, content.cid, content.blocks[content.cid], 0.1))
    assert Counter(request.source for request in asked) == {first.source: 2, ({ANN, BOB} - {first.source}).pop(): 1}
    assert requests(fetch.handle(Tick(), 0.2)) == []
    most: Counter[PeerId] = Counter()
    while asked:
        most |= Counter(request.source for request in asked)
        request = asked.pop(0)
        outputs = give(fetch, request.source, request.cid, content.blocks[request.cid], 1.0)
        asked += requests(outputs)
    assert most == {ANN: 2, BOB: 2}
    assert outputs[-1] == Done()
    assert fetch.progress == (len(data), len(data))


def test_a_slow_source_is_asked_for_one_block_at_a_time() -> None:
    _, content = a_content(15)
    fetch = Fetch(content.cid, [ANN])
    (asked,) = requests(begin(fetch))
    now = 0.0
    for _ in range(12):
        now += 20.0
        (asked,) = requests(give(fetch, ANN, asked.cid, content.blocks[asked.cid], now))


def test_a_liar_is_dropped_and_its_blocks_are_asked_elsewhere() -> None:
    _, content = a_content()
    fetch = Fetch(content.cid, [ANN])
    begin(fetch)
    fetch.handle(SourceFound(BOB), 0.0)
    outputs = give(fetch, ANN, content.cid, b"lies", 0.1)
    assert [output.source for output in outputs if isinstance(output, Drop)] == [ANN]
    assert [request.source for request in requests(outputs)] == [BOB]
    fetch.handle(SourceFound(ANN), 0.2)
    assert all(request.source != ANN for request in requests(fetch.handle(Tick(), 0.3)))
    assert not of(Store, outputs)


def test_a_failing_source_is_left_alone_for_a_while() -> None:
    _, content = a_content()
    fetch = Fetch(content.cid, [ANN])
    begin(fetch)
    outputs = fetch.handle(BlockFailed(ANN, content.cid, "busy"), 1.0)
    assert outputs == [Wake(1.0 + module.FIRST_BACKOFF_S)]
    assert requests(fetch.handle(Tick(), 1.1)) == []
    assert len(requests(fetch.handle(Tick(), 1.0 + module.FIRST_BACKOFF_S))) == 1
    outputs = fetch.handle(BlockFailed(ANN, content.cid, "busy"), 2.0)
    assert outputs == [Wake(2.0 + 2 * module.FIRST_BACKOFF_S)]


@pytest.mark.parametrize(("is_grave", "times"), [(False, module.MAX_FAILURES), (True, 3)])
def test_a_source_that_only_fails_is_given_up_and_the_reason_told(is_grave: bool, times: int) -> None:
    content = split(b"x")
    fetch = Fetch(content.cid, [ANN])
    now, outputs, failures = 0.0, begin(fetch), 0
    while not fetch.is_over:
        if requests(outputs):
            failures += 1
            outputs = fetch.handle(BlockFailed(ANN, content.cid, "no such block", is_grave), now)
        else:
            (wake,) = (output for output in outputs if isinstance(output, Wake))
            now = wake.at
            outputs = fetch.handle(Tick(), now)
    (failed,) = (output for output in outputs if isinstance(output, Failed))
    assert "no such block" in failed.reason
    assert failed.lack is Lack.UNAVAILABLE
    assert failures == times


def test_a_lost_source_is_not_waited_for() -> None:
    content = split(b"x")
    fetch = Fetch(content.cid, [ANN])
    begin(fetch)
    fetch.handle(SourceFound(BOB), 0.0)
    assert [request.source for request in requests(fetch.handle(SourceLost(ANN), 0.1))] == [BOB]
    assert not requests(give(fetch, ANN, content.cid, b"lies", 0.2))
    assert of(Failed, fetch.handle(SourceLost(BOB), 0.3))


def test_without_sources_it_waits_as_long_as_its_patience_lasts() -> None:
    content = split(b"x")
    fetch = Fetch(content.cid, [], patience_s=5.0)
    assert begin(fetch)[-1] == Wake(5.0)
    assert requests(fetch.handle(SourceFound(ANN), 4.0))
    assert of(Failed, fetch.handle(Tick(), 5.0))
    assert of(Failed, begin(Fetch(content.cid, [], patience_s=0.0)))


def test_it_lasts_as_long_as_blocks_come_and_fails_when_none_do() -> None:
    _, content = a_content(15)
    fetch = Fetch(content.cid, [ANN], patience_s=30.0)
    (asked,) = requests(begin(fetch))
    now = 0.0
    for _ in range(14):  # seven minutes, each block but a little before the patience is at its end
        now += 29.0
        (asked,) = requests(give(fetch, ANN, asked.cid, content.blocks[asked.cid], now))
    assert not fetch.is_over
    (failed,) = of(Failed, fetch.handle(Tick(), now + 30.0))
    assert isinstance(failed, Failed)
    assert failed.lack is Lack.STALLED


def test_what_is_late_at_one_source_is_asked_of_another_that_is_idle() -> None:
    data, content = a_content(1)
    fetch = Fetch(content.cid, [ANN, BOB])
    (first,) = requests(begin(fetch))
    other = BOB if first.source == ANN else ANN
    assert not requests(fetch.handle(Tick(), module.LATE_S - 0.1))
    (again,) = requests(fetch.handle(Tick(), module.LATE_S))
    assert (again.source, again.cid) == (other, first.cid)
    assert give(fetch, other, first.cid, data, 4.0)[-1] == Done()


def test_what_is_here_is_not_asked_for() -> None:
    data, content = a_content()
    manifest = content.blocks[content.cid]
    names = manifests.open_content_manifest(content.cid, manifest).blocks
    have = {names[0]: content.blocks[names[0]], names[1]: b"damaged", content.cid: manifest}
    asked = requests(begin(Fetch(content.cid, [ANN, BOB, CAT, *PEERS[3:]]), have))
    assert [request.cid for request in asked] == list(names[1:])
    assert begin(Fetch(content.cid, []), content.blocks)[-1] == Done()
    late = Fetch(content.cid, PEERS)
    (request,) = requests(begin(late))
    asked = requests(give(late, request.source, content.cid, manifest, 0.1, {names[0]: content.blocks[names[0]]}))
    assert [request.cid for request in asked] == list(names[1:])
    assert late.progress == (1024, len(data))


def test_a_run_manifest_is_one_block() -> None:
    data = encode({"task": "gym:CartPole-v1"})
    cid = Cid.of_manifest(data)
    fetch = Fetch(cid, [ANN], is_plain=True)
    begin(fetch)
    assert give(fetch, ANN, cid, data, 0.1)[-1] == Done()


def test_a_content_that_is_wrong_in_itself_fails_without_blaming_the_source() -> None:
    data = encode({"size": 2048, "blocks": ["junk"]})
    fetch = Fetch(Cid.of_manifest(data), [ANN])
    begin(fetch)
    outputs = give(fetch, ANN, Cid.of_manifest(data), data, 0.1)
    assert [each.lack for each in outputs if isinstance(each, Failed)] == [Lack.UNFIT]
    assert not of(Drop, outputs)


def test_a_content_that_is_too_big_is_refused_before_room_is_made_or_a_block_asked() -> None:
    data, content = a_content()
    one = split(b"x" * 1000)
    for each, size in ((content, len(data)), (one, 1000)):
        fetch = Fetch(each.cid, [ANN], max_bytes=size - 1)
        begin(fetch)
        outputs = give(fetch, ANN, each.cid, each.blocks[each.cid], 0.1)
        assert [output.lack for output in outputs if isinstance(output, Failed)] == [Lack.UNFIT]
        assert not [output for output in outputs if isinstance(output, Request | Planned | Store)]


def test_a_manifest_that_repeats_one_block_without_end_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifests, "FREE_REPEAT_BYTES", 0)
    block = Cid.of_block(bytes(1024))
    data = encode(manifests.ContentManifest(size=1024 * 15, blocks=(block,) * 15))
    for repeats, is_refused in ((15, False), (14, True)):
        monkeypatch.setattr(manifests, "MAX_REPEATS", repeats)
        fetch = Fetch(Cid.of_manifest(data), [ANN])
        begin(fetch)
        outputs = give(fetch, ANN, fetch.cid, data, 0.1)
        assert bool(of(Failed, outputs)) is is_refused
        assert bool(requests(outputs)) is not is_refused


def test_answers_to_what_was_not_asked_are_ignored() -> None:
    _, content = a_content()
    fetch = Fetch(content.cid, [ANN])
    begin(fetch)
    for event in (
        BlockArrived(BOB, content.cid, b"lies", False),
        BlockArrived(ANN, Cid.of_block(b"x"), b"x", True),
        BlockFailed(BOB, content.cid, ""),
        SourceLost(CAT),
    ):
        assert fetch.handle(event, 0.1) == [Wake(module.PATIENCE_S)]


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
    names: tuple[Cid, ...] = (content.cid,)
    queue: list[tuple[float, int, object]] = [(0.0, 0, Tick())]
    open_requests: Counter[PeerId] = Counter()
    kept: dict[Cid, bytes | memoryview] = {}
    serial, dropped = 0, set()
    while queue:
        now, _, event = heapq.heappop(queue)
        assert isinstance(event, Tick | BlockArrived | BlockFailed | Looked)
        if isinstance(event, BlockArrived | BlockFailed):
            open_requests[event.source] -= 1
        for output in fetch.handle(event, now):
            serial += 1
            match output:
                case Request(source, cid, _):
                    assert source not in dropped
                    open_requests[source] += 1
                    assert open_requests[source] <= 4
                    answer: BlockArrived | BlockFailed = BlockArrived(source, cid, content.blocks[cid], True)
                    if source in lying:
                        answer = BlockArrived(source, cid, b"lies", False)
                    elif source in failing and rng.random() < 0.7:
                        answer = BlockFailed(source, cid, "busy")
                    heapq.heappush(queue, (now + rng.random(), serial, answer))
                case Wake(at) if at < 1e6:
                    heapq.heappush(queue, (at, serial, Tick()))
                case Drop(source, _):
                    dropped.add(source)
                    assert source in lying
                case Look():
                    heapq.heappush(queue, (now + rng.random() / 10, serial, Looked({})))
                case Planned(manifest, _):
                    names = manifest.blocks
                case Store(cid, stored):
                    kept[cid] = stored
                case Done():
                    assert b"".join(kept[cid] for cid in names) == data
                    return
                case Failed(reason, _):
                    raise AssertionError(f"seed {seed}: {reason}")
                case _:
                    pass
    raise AssertionError(f"seed {seed}: it stalled")
