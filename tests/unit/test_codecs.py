"""What a contribution loses on its way is bounded, made up for in the next, and the same for all who read it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.training.exchange import codecs
from shoal.training.exchange.codecs import Sender, decode_contribution, packed_bytes
from shoal.training.exchange.rules import ROUNDING, WRITTEN, Codec
from shoal.training.state import decode_arrays, encode_arrays

LOSSY = [codec for codec in WRITTEN if codec is not Codec.FP32]
NAME = "mean/delta"
BOUND = {NAME: 1e6}

seeds = st.integers(0, 2**32 - 1)
sizes = st.one_of(st.integers(1, 300), st.integers(4090, 9000))


def values(seed: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 10.0 ** rng.integers(-6, 3), size) * (rng.random(size) < rng.choice([0.02, 0.5, 1.0]))
    return found.astype(np.float32)


def sent(codec: Codec, array: np.ndarray, sender: Sender | None = None) -> np.ndarray:
    data = (sender or Sender(codec)).encode({NAME: array}, BOUND, {})
    return decode_contribution(data, codec, BOUND, {}, {NAME: array})[NAME]


def blocks(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array.astype(np.float64), (0, -array.size % width)).reshape(-1, width)


# --- bounds ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=seeds, size=sizes, codec=st.sampled_from(WRITTEN))
def test_each_codec_keeps_to_its_bound(seed: int, size: int, codec: Codec) -> None:
    array = values(seed, size)
    result = sent(codec, array)
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    lost = np.abs(result.astype(np.float64) - array)
    assert np.abs(result).max() <= ROUNDING * np.abs(array).max()
    tiny = 1e-37
    match codec:
        case Codec.FP32:
            np.testing.assert_array_equal(result, array)
        case Codec.BF16:
            assert (lost <= np.abs(array) * 2.0**-8 + tiny).all()
        case Codec.INT8 | Codec.INT4:
            levels = 127 if codec is Codec.INT8 else 7
            largest = np.abs(blocks(array, 256)).max(axis=1, keepdims=True)
            assert (blocks(lost, 256) <= largest / levels / 2 * 1.0001 + tiny).all()
        case Codec.INT2 | Codec.TOPK:
            width = 256 if codec is Codec.INT2 else 4096
            there, gone = (np.square(blocks(each, width)).sum(axis=1) for each in (array, lost))
            assert (gone <= there * (1 + 1e-6)).all()
            assert (gone[there > 0] < there[there > 0]).all()


def test_what_two_bits_and_the_largest_lose_of_normal_values() -> None:
    array = np.random.default_rng(1).normal(size=1 << 16).astype(np.float32)
    lost = np.square(sent(Codec.INT2, array) - array).mean()
    assert lost < 0.125  # 0.1175 is what the best four levels lose
    kept = sent(Codec.TOPK, array)
    assert np.count_nonzero(kept) == array.size // 64
    assert set(np.flatnonzero(kept[:4096])) == set(np.argsort(-np.abs(array[:4096]))[:64])


def test_how_much_smaller_each_codec_is() -> None:
    size = 1 << 20
    times = {codec: 4 * size / packed_bytes(size, codec) for codec in WRITTEN}
    at_least = {"fp32": 1, "bf16": 2, "int8": 3.9, "int4": 7.7, "int2": 15.0, "topk": 195}
    assert {codec: times[codec] >= at_least[codec] for codec in WRITTEN} == dict.fromkeys(WRITTEN, True), times


@settings(deadline=None)
@given(seed=seeds, codec=st.sampled_from(LOSSY))
def test_what_is_sent_is_the_difference_from_what_all_have(seed: int, codec: Codec) -> None:
    """So that a codec's loss is of the size of the change, however large the parameters are."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(0, 10, (7, 100)).astype(np.float32)
    array = centre + rng.normal(0, 1e-3, (7, 100)).astype(np.float32)
    centres, template = {NAME: centre}, {NAME: array}
    data = Sender(codec).encode({NAME: array}, BOUND, centres)
    result = decode_contribution(data, codec, BOUND, centres, template)[NAME]
    assert np.abs(result - array).max() <= 2 * np.abs(array - centre).max()


# --- error feedback --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=seeds, codec=st.sampled_from([Codec.BF16, Codec.INT8, Codec.INT4, Codec.INT2]))
def test_in_the_sum_nothing_is_lost_but_what_the_sender_still_holds(seed: int, codec: Codec) -> None:
    sender = Sender(codec)
    given_sum, sent_sum = np.zeros(600), np.zeros(600)
    for index in range(8):
        array = values(seed + index, 600)
        sent_sum += sent(codec, array, sender)
        sender.settle(arrived=True)
        given_sum += array
    scale = np.abs(given_sum).max() + np.abs(sent_sum).max() + 1e-30
    np.testing.assert_allclose(sent_sum + sender.memory[NAME], given_sum, atol=1e-5 * scale)


def test_of_a_lasting_change_topk_sends_most_parts_in_time_and_holds_little() -> None:
    sender, array = Sender(Codec.TOPK), np.random.default_rng(2).uniform(0.5, 1.0, 4096).astype(np.float32)
    total = np.zeros(4096)
    for _ in range(200):
        total += sent(Codec.TOPK, array, sender)
        sender.settle(arrived=True)
    assert np.count_nonzero(total) > 0.5 * total.size
    assert np.abs(sender.memory[NAME]).max() < 1.0 / (1 - 0.95)


def test_what_was_not_merged_was_not_sent() -> None:
    sender, array = Sender(Codec.INT4), values(3, 600)
    first = sender.encode({NAME: array}, BOUND, {})
    sender.settle(arrived=False)
    assert sender.encode({NAME: array}, BOUND, {}) == first
    sender.settle(arrived=True)
    assert sender.encode({NAME: array}, BOUND, {}) != first
    again = Sender(Codec.INT4, {name: each.copy() for name, each in sender.memory.items()})
    assert again.encode({NAME: array}, BOUND, {}) == sender.encode({NAME: array}, BOUND, {})
    sender.forget()
    assert sender.encode({NAME: array}, BOUND, {}) == first


@pytest.mark.parametrize("codec", [Codec.INT4, Codec.FP32])
def test_what_one_codec_lost_the_next_one_brings(codec: Codec) -> None:
    sender, array, centre = Sender(Codec.INT8), values(5, 600), values(6, 600)
    sent(Codec.INT8, array, sender)
    sender.settle(arrived=True)
    lost = sender.memory[NAME].copy()
    sender.codec = codec
    for arrived in (False, True):
        data = sender.encode({NAME: array}, BOUND, {NAME: centre})
        sender.settle(arrived=arrived)
    result = decode_contribution(data, codec, BOUND, {NAME: centre}, {NAME: array})[NAME]
    left = sender.memory.get(NAME, np.zeros_like(array))
    np.testing.assert_allclose(result + left, array + lost, atol=1e-5 * np.abs(array).max())
    assert (NAME in sender.memory) == (codec is not Codec.FP32)


def test_nothing_that_a_memory_adds_goes_beyond_what_an_honest_peer_may_say() -> None:
    for codec in LOSSY:
        sender = Sender(codec, {NAME: np.full(600, 100.0, np.float32)})
        data = sender.encode({NAME: np.ones(600, np.float32)}, {NAME: 1.5}, {})
        result = decode_contribution(data, codec, {NAME: 1.5}, {}, {NAME: np.ones(600, np.float32)})[NAME]
        assert np.abs(result).max() <= 1.5 * ROUNDING


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_no_number_is_sent_for_all_to_refuse_and_not_remembered(codec: Codec) -> None:
    sender, array = Sender(codec), np.array([1, np.nan, np.inf], np.float32)
    data = sender.encode({NAME: array}, BOUND, {})
    sender.settle(arrived=True)
    assert not sender.memory
    with pytest.raises(ProtocolError, match=NAME):
        decode_contribution(data, codec, BOUND, {}, {NAME: array})


# --- what anybody may send -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
def test_the_rest_of_a_contribution_travels_exactly(codec: Codec) -> None:
    arrays = {NAME: values(1, 70), "nonneg/v": np.abs(values(2, 9)), "moments/x/count": np.asarray(3.0)}
    result = decode_contribution(Sender(codec).encode(arrays, BOUND, {}), codec, BOUND, {}, arrays)
    assert result.keys() == arrays.keys()
    assert all(result[name].tobytes() == arrays[name].tobytes() for name in arrays if name != NAME)


def test_as_they_are_the_bytes_are_those_of_a_state() -> None:
    arrays = {NAME: values(1, 70)}
    assert Sender(Codec.FP32).encode(arrays, BOUND, {}) == encode_arrays(arrays, {})


@settings(deadline=None)
@given(seed=seeds, codec=st.sampled_from(LOSSY), data=st.data())
def test_whatever_is_forged_is_an_array_of_the_right_form_or_refused(
    seed: int, codec: Codec, data: st.DataObject
) -> None:
    array = values(seed, data.draw(sizes))
    parts, _ = decode_arrays(Sender(codec).encode({NAME: array}, BOUND, {}))
    name = data.draw(st.sampled_from(sorted(parts)))
    forged = bytearray(parts[name].tobytes())
    for _ in range(data.draw(st.integers(1, 20))):
        forged[data.draw(st.integers(0, len(forged) - 1))] = data.draw(st.integers(0, 255))
    parts[name] = np.frombuffer(bytes(forged), parts[name].dtype).reshape(parts[name].shape)
    try:
        result = decode_contribution(encode_arrays(parts, {}), codec, BOUND, {}, {NAME: array})
    except ProtocolError:
        return
    assert result[NAME].shape == array.shape


@pytest.mark.parametrize("codec", LOSSY)
def test_parts_that_are_missing_or_of_another_form_are_refused(codec: Codec) -> None:
    array = values(4, 5000)
    parts, _ = decode_arrays(Sender(codec).encode({NAME: array}, BOUND, {}))
    wrong = [{NAME: array}, {}, parts | {NAME: array}]
    wrong += [{**parts, name: part[:-1]} for name, part in parts.items()]
    wrong += [{**parts, name: part.astype(np.int64)} for name, part in parts.items()]
    wrong += [{key: part for key, part in parts.items() if key != name} for name in parts]
    for forged in wrong:
        with pytest.raises(ProtocolError):
            decode_contribution(encode_arrays(forged, {}), codec, BOUND, {}, {NAME: array})


@settings(deadline=None)
@given(seed=seeds)
def test_positions_come_back_as_they_were(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = np.sort(np.stack([rng.choice(4096, 64, replace=False) for _ in range(3)]), axis=1)
    np.testing.assert_array_equal(codecs._from_elias_fano(codecs._to_elias_fano(positions), 3), positions)
