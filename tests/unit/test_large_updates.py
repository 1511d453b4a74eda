"""Workers whose arrays are reduced part by part: the policy that whole contributions come to, the same bits for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError, RemoteError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer
from shoal.protocol.tensors import TensorCodec
from shoal.training.arena import Arena, Region
from shoal.training.exchange import layout as layout_module
from shoal.training.exchange.layout import Layout, Segment
from shoal.training.exchange.rules import Aggregator, Codec
from shoal.training.manifest import Manifest, Mode
from shoal.training.state import decode_arrays
from shoal.training.worker import Worker
from shoal.training.worker_calls import Begin, Collect, Merge, MergeAnswer, Open

PEERS = sorted(Signer(bytes([number]) * 32).peer_id for number in (1, 2, 3))
PARENT = Cid.of_block(b"the policy before")
BALLOT = bytes([7]) * 32


class Pair:
    """A worker and its node's side of the memory."""

    def __init__(self, peer: PeerId, manifest: Manifest) -> None:
        self.peer = peer
        self.arena = Arena.make()
        self.worker = Worker(self.arena)
        self.worker.open(Open(manifest, peer))
        self.worker.collect(Collect(128))
        self.answer = self.worker.begin(Begin(0, PARENT, 0, {}))

    def merge(self, request: Merge) -> MergeAnswer:
        self.answer = self.worker.merge(request)
        return self.answer


def a_manifest(mode: Mode, codec: Codec, aggregator: str) -> Manifest:
    settings: dict[str, Any] = {"num_envs": 2, "update_epochs": 1, "num_minibatches": 2}
    return Manifest(
        owner=PEERS[0],
        task="gym:CartPole-v1",
        algorithm="ppo",
        hyperparameters=settings,
        mode=mode,
        codec=codec,
        aggregator=aggregator,
        batch_per_learner=128,
    )


def request(pairs: list[Pair], absent: tuple[PeerId, ...] = ()) -> Merge:
    weights = tuple(int(pair.answer.weight) for pair in pairs)
    contents = tuple(bytes(pair.answer.contribution or b"") for pair in pairs)
    return Merge(BALLOT, tuple(pair.peer for pair in pairs), weights, (1.0,) * len(pairs), contents, absent)


def layout_of(answer: MergeAnswer, aggregator: str = "mean") -> Layout:
    segments = tuple(Segment(each.name, each.numel, TensorCodec(each.codec), each.bound) for each in answer.layout)
    return Layout(segments, Aggregator.parse(aggregator))


def reduce(pairs: list[Pair], aggregator: str) -> None:
    """As owners do, into everybody's memory."""
    layout = layout_of(pairs[0].answer, aggregator)
    offered = [pair.arena.view(Region.OFFERED, layout.num_bytes) for pair in pairs]
    results = [pair.arena.view(Region.RESULT, layout.num_bytes) for pair in pairs]
    weights = [pair.answer.weight for pair in pairs]
    for part in range(layout.num_parts):
        place = layout.place(part)
        used = layout.reduce(part, [each[place] for each in offered], weights, results[0][place])
        assert used == list(range(len(pairs))), "nobody honest is left out"
        for each in results[1:]:
            each[place] = results[0][place]


def learn(mode: Mode, codec: Codec, aggregator: str, *, num: int = 3) -> list[MergeAnswer]:
    """One update of all of them."""
    pairs = [Pair(peer, a_manifest(mode, codec, aggregator)) for peer in PEERS[:num]]
    while pairs[0].answer.state is None:
        if pairs[0].answer.layout:
            reduce(pairs, aggregator)
        asked = request(pairs)
        for pair in pairs:
            pair.merge(asked)
            assert not pair.answer.rejected
    return [pair.answer for pair in pairs]


@pytest.mark.parametrize("aggregator", ["mean", "trimmed_mean"])
@pytest.mark.parametrize(
    ("mode", "codec"),
    [(Mode.LOCAL, Codec.FP32), (Mode.LOCAL, Codec.INT8), (Mode.DILOCO, Codec.INT4), (Mode.GRADIENT, Codec.FP32)],
)
def test_part_by_part_comes_to_what_whole_contributions_come_to(
    mode: Mode, codec: Codec, aggregator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(mode, codec, aggregator)
    monkeypatch.setattr(layout_module, "LARGE_NUMEL", 1000)
    parts = learn(mode, codec, aggregator)
    assert len({bytes(each.state.state or b"") for each in parts if each.state is not None}) == 1
    one, other = whole[0].state, parts[0].state
    assert one is not None
    assert other is not None
    wanted, found = decode_arrays(bytes(one.state or b""))[0], decode_arrays(bytes(other.state or b""))[0]
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        far = np.abs(found[name].astype(np.float64) - array).max(initial=0.0)
        assert far <= (1e-6 if codec is Codec.FP32 else 3e-3), name


def test_of_whom_too_little_came_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "LARGE_NUMEL", 1000)
    pairs = [Pair(peer, a_manifest(Mode.LOCAL, Codec.FP32, "mean")) for peer in PEERS]
    reduce(pairs, "mean")
    asked = request(pairs, absent=PEERS[2:])
    answers = [pair.merge(asked) for pair in pairs]
    assert {each.rejected for each in answers} == {(PEERS[2],)}
    states = [each.state for each in answers if each.state is not None]
    assert {each.env_steps for each in states} == {256}
    assert all(PEERS[2] not in each.electorate for each in states)
    assert len({each.digest for each in states}) == 1


def test_a_content_without_hashes_and_a_result_that_is_not_finite_lead_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout_module, "LARGE_NUMEL", 1000)
    pair = Pair(PEERS[0], a_manifest(Mode.LOCAL, Codec.FP32, "mean"))
    reduce([pair], "mean")
    asked = request([pair])
    short = Merge(asked.ballot, asked.authors, asked.weights, asked.seconds, (b"short",))
    with pytest.raises(RemoteError, match="no contribution"):
        pair.worker.merge(short)
    result = pair.arena.view(Region.RESULT, layout_of(pair.answer).num_bytes)
    np.frombuffer(result, np.float32, 1)[0] = np.nan
    with pytest.raises(ProtocolError, match="NaN"):
        pair.worker.merge(asked)
