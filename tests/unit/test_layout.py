"""Large arrays, cut into parts: what is large, where it lies, what is left out of a part, what comes of the rest."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import TensorCodec
from shoal.training.arena import MAX_REGION_BYTES, Arena, Region
from shoal.training.exchange import layout as layout_module
from shoal.training.exchange.codecs import Sender
from shoal.training.exchange.layout import HASH_BYTES, LARGE_NUMEL, Layout, Segment, hashes_of, layout_of
from shoal.training.exchange.packing import pack, small_of, unpack
from shoal.training.exchange.rules import Aggregator, Codec
from shoal.training.state import decode_arrays

Array = npt.NDArray[Any]

PART = 1024
SEGMENTS = (
    Segment("mean/a", 3000, TensorCodec.FP32, 1.0),
    Segment("mean/b", 1500, TensorCodec.INT8, 1.0),
    Segment("nonneg/c", 7, TensorCodec.FP32, 1e30),
)
LAYOUT = Layout(SEGMENTS, part_numel=PART)


def arrays(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {each.name: rng.uniform(-1, 1, each.numel).astype(np.float32) for each in SEGMENTS}


def written(seed: int, layout: Layout = LAYOUT) -> memoryview:
    data = memoryview(bytearray(layout.num_bytes))
    layout.encode(arrays(seed), data)
    return data


def reduced(layout: Layout, given: list[memoryview], weights: list[float]) -> tuple[memoryview, list[list[int]]]:
    out = memoryview(bytearray(layout.num_bytes))
    used = []
    for part in range(layout.num_parts):
        place = layout.place(part)
        used.append(layout.reduce(part, [each[place] for each in given], weights, out[place]))
    return out, used


def test_parts_follow_each_other_and_do_not_overlap() -> None:
    places = [LAYOUT.place(part) for part in range(LAYOUT.num_parts)]
    assert LAYOUT.num_parts == 3 + 2 + 1
    assert all(before.stop <= after.start for before, after in itertools.pairwise(places))
    assert places[-1].stop <= LAYOUT.num_bytes
    for beyond in (-1, LAYOUT.num_parts):
        with pytest.raises(UsageError):
            LAYOUT.place(beyond)


def test_what_is_written_is_read_within_what_its_codec_loses() -> None:
    read, wanted = LAYOUT.decode(written(1)), arrays(1)
    assert np.array_equal(read["mean/a"], wanted["mean/a"])
    assert np.array_equal(read["nonneg/c"], wanted["nonneg/c"])
    assert np.abs(read["mean/b"] - wanted["mean/b"]).max() <= 1 / 127


def test_what_comes_of_all_parts_is_the_weighted_mean() -> None:
    out, used = reduced(LAYOUT, [written(1), written(2)], [1.0, 3.0])
    assert used == [[0, 1]] * LAYOUT.num_parts
    found = LAYOUT.decode(out)
    for name in found:
        exact = 0.25 * arrays(1)[name].astype(np.float64) + 0.75 * arrays(2)[name]
        assert np.abs(found[name] - exact).max() <= (0.03 if name == "mean/b" else 1e-6)


@pytest.mark.parametrize("lie", [np.nan, np.inf, -np.inf, 1.5, -1e30])
def test_what_no_honest_member_offers_is_left_out_of_its_part_alone(lie: float) -> None:
    told = written(2)
    np.frombuffer(told, np.float32, PART)[5] = lie  # in the first part
    out, used = reduced(LAYOUT, [written(1), told, written(3)], [1.0, 1.0, 1.0])
    assert used == [[0, 2]] + [[0, 1, 2]] * (LAYOUT.num_parts - 1)
    exact = (arrays(1)["mean/a"][:PART] + arrays(3)["mean/a"][:PART]) / 2
    assert np.abs(LAYOUT.decode(out)["mean/a"][:PART] - exact).max() <= 1e-6


def test_of_nobodys_part_nothing_comes() -> None:
    bad = written(1)
    np.frombuffer(bad, np.float32, 3000)[:] = np.nan
    out, used = reduced(LAYOUT, [bad], [1.0])
    assert used[:3] == [[], [], []]
    assert not LAYOUT.decode(out)["mean/a"].any()


def test_a_rule_against_liars_holds_in_every_part() -> None:
    layout = Layout(SEGMENTS, Aggregator.parse("median"), PART)
    liar = memoryview(bytearray(layout.num_bytes))
    layout.encode({name: np.full_like(array, 1.0) for name, array in arrays(0).items()}, liar)
    one = {name: np.full_like(array, 0.1) for name, array in arrays(0).items()}
    honest = [memoryview(bytearray(layout.num_bytes)) for _ in range(3)]
    for each in honest:
        layout.encode(one, each)
    out, _ = reduced(layout, [*honest, liar], [1.0, 1.0, 1.0, 100.0])
    for name, array in layout.decode(out).items():
        assert np.abs(array - 0.1).max() <= 0.01, name


def test_small_contributions_are_none_that_are_reduced() -> None:
    small = {"mean/x": np.zeros(LARGE_NUMEL - 1, np.float32), "moments/x/mean": np.zeros(9)}
    assert layout_of(small, {}, Codec.FP32, Aggregator()) is None
    large = small | {"nonneg/y": np.zeros((2, 2), np.float32), "mean/travel": np.zeros((), np.float32)}
    layout = layout_of(large, {"mean/x": 0.5}, Codec.INT8, Aggregator())
    assert layout is not None
    assert [(each.name, each.codec, each.bound) for each in layout.segments] == [
        ("mean/x", TensorCodec.INT8, 0.5),
        ("nonneg/y", TensorCodec.FP32, 1e30),
    ]
    assert layout_of(large, {"mean/x": 0.5}, Codec.TOPK, Aggregator()) is None, "its size depends on the values"


@pytest.mark.parametrize("codec", [Codec.FP32, Codec.INT8])
def test_a_contribution_goes_through_the_arena_and_comes_back(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "LARGE_NUMEL", 100)
    rng = np.random.default_rng(3)
    centres = {"mean/x": rng.normal(size=(40, 50)).astype(np.float32)}
    given = {
        "mean/x": centres["mean/x"] + rng.uniform(-0.5, 0.5, (40, 50)).astype(np.float32),
        "nonneg/y": rng.uniform(0, 1, 30).astype(np.float32),
        "moments/z/count": np.asarray(5.0),
    }
    lossy = {"mean/x": 0.6}
    layout = layout_of(given, lossy, codec, Aggregator())
    assert layout is not None
    arena = Arena.make()
    offered = arena.view(Region.OFFERED, layout.num_bytes)
    result = arena.view(Region.RESULT, layout.num_bytes)
    sender = Sender(codec)
    content = pack(layout, sender, given, lossy, centres, offered)
    sender.settle(arrived=True)
    named = hashes_of(layout.num_parts, content)
    assert named is not None
    for part, digest in enumerate(named):
        assert hashlib.sha256(offered[layout.place(part)]).digest() == digest
    assert decode_arrays(small_of(layout, content))[0].keys() == {"moments/z/count"}
    out, _ = reduced(layout, [offered], [7.0])
    result[:] = out
    came = unpack(layout, given, centres, result)
    far = np.abs(came["mean/x"] - given["mean/x"]).max()
    assert far <= (1e-6 if codec is Codec.FP32 else 0.02)
    assert (codec is Codec.FP32) == ("mean/x" not in sender.memory), "what was lost is made up for"
    assert (came["nonneg/y"] >= 0).all()
    arena.close()


def test_a_content_without_hashes_names_no_parts() -> None:
    assert hashes_of(3, b"x" * (3 * HASH_BYTES - 1)) is None
    with pytest.raises(ProtocolError, match="does not name its parts"):
        small_of(LAYOUT, b"x")


def test_an_arena_is_one_memory_on_both_sides_and_never_gets_smaller() -> None:
    import os

    ours = Arena.make()
    theirs = Arena(os.dup(ours.descriptor))
    theirs.view(Region.OFFERED, 10_000)[:3] = b"abc"
    before = ours.view(Region.OFFERED, 10_000)
    assert bytes(before[:3]) == b"abc"
    ours.view(Region.RESULT, 10_000)[:3] = b"xyz"
    assert bytes(theirs.view(Region.RESULT, 10_000)[:3]) == b"xyz"
    assert bytes(before[:3]) == b"abc", "regions do not touch"
    theirs.view(Region.OFFERED, 10_000_000)[5] = 7
    assert before[5] == 7, "views of the smaller one stay"
    assert len(ours.view(Region.OFFERED, 10)) == 10
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(theirs.descriptor, 0)
    for bad in (0, -1, MAX_REGION_BYTES + 1):
        with pytest.raises(ProtocolError):
            ours.view(Region.STATE, bad)
    assert os.fstat(ours.descriptor).st_blocks * 512 < 100_000, "what nobody has written takes no memory"
    ours.close()
    theirs.close()
