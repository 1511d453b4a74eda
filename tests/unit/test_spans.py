"""Parts of an array: what is reduced of them is the mean, within each codec's bound, and the same bytes everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import TensorCodec
from shoal.training.exchange.spans import FIXED, Spans

ERRORS = {
    TensorCodec.FP32: 0.0,
    TensorCodec.FP16: 2.0**-11,
    TensorCodec.BF16: 2.0**-8,
    TensorCodec.INT8: 1 / 254,
    TensorCodec.INT4: 1 / 14,
}
"""Of one writing, by the largest magnitude that there is."""


def reduced(spans: Spans, arrays: list[np.ndarray], weights: list[float]) -> np.ndarray:
    data = [spans.encode(array) for array in arrays]
    out = memoryview(bytearray(spans.num_bytes))
    for part in range(spans.num_parts):
        place = spans.place(part)
        spans.reduce(part, [each[place] for each in data], weights, out[place])
    return spans.decode(out)


@settings(max_examples=25, deadline=None)
@given(
    codec=st.sampled_from(FIXED),
    numel=st.integers(1, 3000),
    count=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_mean_is_right_within_the_codecs_bound(codec: TensorCodec, numel: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=numel).astype(np.float32) for _ in range(count)]
    weights = [float(each) for each in rng.integers(1, 5000, count)]
    found = reduced(Spans(numel, codec, 512), arrays, weights)
    shares = np.array(weights) / sum(weights)
    exact = sum(share * array.astype(np.float64) for share, array in zip(shares, arrays, strict=True))
    most = max(float(np.abs(array).max()) for array in arrays)
    bound = 2 * ERRORS[codec] * most * 1.01 + (count + 1) * 2.0**-24 * most
    assert np.abs(found - exact).max() <= bound


@pytest.mark.parametrize("codec", FIXED)
def test_parts_lie_one_after_the_other_and_a_part_alone_gives_the_same_bytes(codec: TensorCodec) -> None:
    spans = Spans(1300, codec, 512)
    places = [spans.place(part) for part in range(spans.num_parts)]
    assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
    assert places[-1].stop == spans.num_bytes == len(spans.encode(np.ones(1300, np.float32)))
    array = np.random.default_rng(1).normal(size=1300).astype(np.float32)
    alone = Spans(1300 - 1024, codec, 512)
    assert spans.encode(array)[places[2]] == alone.encode(array[1024:])


def test_what_no_codec_wrote_is_refused() -> None:
    spans = Spans(512, TensorCodec.INT8, 512)
    with pytest.raises(ProtocolError):
        spans.reduce(0, [b"\xff" * spans.num_bytes], [1.0], memoryview(bytearray(spans.num_bytes)))


@pytest.mark.parametrize(("numel", "codec", "part"), [(0, "fp32", 512), (5, "topk", 512), (5, "fp32", 100)])
def test_a_layout_that_cannot_be_is_refused(numel: int, codec: str, part: int) -> None:
    with pytest.raises(UsageError):
        Spans(numel, TensorCodec(codec), part)
