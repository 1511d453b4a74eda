"""States and contributions: whatever bytes a peer stores under a CID, arrays come out that fit and can be averaged.

An input is a safetensors file: the length of its header, the header in JSON, raw arrays.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.batch import Batch
from shoal.training.electorate import Delivered, Electorate, says_of
from shoal.training.exchange.averager import Arrays, Contribution, Moments, merge, validate
from shoal.training.exchange.codecs import Sender, decode_contribution
from shoal.training.exchange.rules import WRITTEN, Aggregator, Codec
from shoal.training.state import check_fit, decode_arrays, digest, encode_arrays

from .harness import BASE_BYTES, BYTES_PER_BYTE, FindingError, MutateBytes, Target, refusing, require, unless_refused
from .identities import ALICE, BOB
from .mutators import mutate_plain

_LENGTH_BYTES: Final = 8

_TEMPLATE: Final[Arrays] = {
    "mean/weights": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "nonneg/squares": np.array([0.5, 2.0]),
    "sum/steps": np.asarray(7),
    "sum/rewards": np.array([1.0, -1.0], np.float32),
    **Moments.of(np.array([[1.0, 2.0], [3.0, 5.0]])).to_arrays("observation"),
}
"""What this node has itself."""

_PACKED: Final = "mean/weights"
_LOSSY: Final = tuple(codec for codec in WRITTEN if codec is not Codec.FP32)
_RULES: Final = ("trimmed_mean", "nnm+multi_krum", "arc+nnm+centered_clipping", "median")
_OTHERS: Final = tuple(PeerId.of_public_key(bytes([number]) * 32) for number in (1, 2))


def _run(data: bytes) -> None:
    _check_packed(data)
    decoded = unless_refused(lambda: decode_arrays(data), ProtocolError)
    if decoded is None:
        return
    arrays, meta = decoded
    require(sum(array.nbytes for array in arrays.values()) <= len(data), "there is more in the arrays than came")
    try:
        written = encode_arrays(arrays, meta)
        again, meta_again = decode_arrays(written)
    except (ProtocolError, TypeError, ValueError) as error:
        raise FindingError(f"a state that was taken cannot be written, or read again: {error!r}") from error
    require(digest(again) == digest(arrays) and again.keys() == arrays.keys(), "arrays come back changed")
    require(json.dumps(meta_again, sort_keys=True) == json.dumps(meta, sort_keys=True), "metadata comes back changed")
    _check_fit(arrays)
    _check_merge(arrays, meta.get("weight"))
    _check_electorate(meta.get("electorate"))


def _check_fit(arrays: Arrays) -> None:
    with refusing(ProtocolError):
        check_fit(arrays, _TEMPLATE)
        for name, array in arrays.items():
            require((array.dtype, array.shape) == _kind(_TEMPLATE[name]), "a state fits that is of another form")
            require(np.isfinite(array).all(), "a state fits that is not finite")


def _check_merge(arrays: Arrays, weight: object) -> None:
    theirs = Contribution(BOB.peer_id, weight if isinstance(weight, float) else 1.0, arrays)
    is_valid = False
    with refusing(ProtocolError):
        validate(theirs, _TEMPLATE)
        is_valid = True
    if not is_valid:
        return
    ours = Contribution(ALICE.peer_id, 2.0, _TEMPLATE)
    others = [Contribution(peer, 3.0, _TEMPLATE) for peer in _OTHERS]
    for rule, given in (("mean", [theirs, ours]), *((rule, [theirs, ours, *others]) for rule in _RULES)):
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                merged = merge(given, Aggregator.parse(rule))
        except (ProtocolError, ArithmeticError) as error:
            raise FindingError(f"what was found valid cannot be merged by {rule}: {error!r}") from error
        require(merged.keys() == _TEMPLATE.keys(), "merging changed the names")
        for name, array in merged.items():
            require(_kind(array) == _kind(_TEMPLATE[name]), "merging changed the form of an array")
            require(np.isfinite(array).all(), "what was merged is not finite")


def _check_packed(data: bytes) -> None:
    """What travels smaller comes out in the form that was asked for."""
    for codec in _LOSSY:
        said = unless_refused(lambda codec=codec: _unpack(data, codec), ProtocolError)
        if said is not None and said.keys() == _TEMPLATE.keys():
            require(_kind(said[_PACKED]) == _kind(_TEMPLATE[_PACKED]), "a packed array comes out in another form")


def _unpack(data: bytes, codec: Codec) -> Arrays:
    return decode_contribution(data, codec, {_PACKED: 1.0}, {}, _TEMPLATE)


def _check_electorate(plain: object) -> None:
    """Who counts, says the metadata: what is taken of it can be counted with, and said again."""
    electorate = unless_refused(lambda: Electorate.from_plain(plain), ProtocolError)
    if electorate is None:
        return
    require(Electorate.from_plain(electorate.to_plain()) == electorate, "an electorate comes back changed")
    following = electorate.after((Delivered(ALICE.peer_id, 7, 0.0),))
    require(Electorate.from_plain(following.to_plain()) == following, "an electorate leads to one that cannot be")
    require(all(say > 0 for say in says_of(following.stakes).values()), "a member of an electorate has no say")
    require(1 <= following.share(ALICE.peer_id, Batch(256), 0.0) <= 256, "a share is not from 1 to the batch")


def _kind(array: np.ndarray[Any, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    return array.dtype, array.shape


def _seeds() -> list[bytes]:
    others: Arrays = {
        "b": np.arange(6, dtype=np.int8).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float16),
        "mask": np.array([True, False]),
    }
    electorate = {ALICE.peer_id: [256.0, 100.0, 0], BOB.peer_id: [64.0, 25.0, 2]}
    meta = {"epoch": 3, "env_steps": 7, "weight": 0.5, "ü": [1, None, {"a": "é"}], "electorate": electorate}
    files = [encode_arrays(_TEMPLATE, {}), encode_arrays(_TEMPLATE, meta), encode_arrays(others, meta)]
    packed = [Sender(codec).encode(_TEMPLATE, {_PACKED: 1.0}, {}) for codec in _LOSSY]
    return [*files, encode_arrays({}, {}), *packed]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    header, body = data[_LENGTH_BYTES:end], data[end:]
    try:
        plain = json.loads(header)
    except (ValueError, RecursionError):
        return mutate_bytes(data, max_bytes)
    if rng.random() < 0.4 and body:
        # Values in place: with another length no file fits its header.
        at = rng.randrange(len(body))
        value = rng.choice(_VALUES)
        body = (body[:at] + value + body[at + len(value) :])[: len(body)]
    elif rng.random() < 0.1:
        return mutate_bytes(data, max_bytes)
    else:
        header = _mutate_header(header, plain, rng, mutate_bytes)
    changed = len(header).to_bytes(_LENGTH_BYTES, "little") + header + body
    return changed if len(changed) <= max_bytes else mutate_bytes(data, max_bytes)


def _mutate_header(header: bytes, plain: Any, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change one place of the header, or of the metadata, which is JSON as text within it."""
    try:
        if rng.random() < 0.3:
            metadata = plain["__metadata__"]
            metadata["shoal"] = _dumps(mutate_plain(json.loads(metadata["shoal"]), rng, mutate_bytes))
        else:
            plain = mutate_plain(plain, rng, mutate_bytes)
        return _dumps(plain).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return mutate_bytes(header, len(header) + 64)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=lambda odd: odd.hex() if isinstance(odd, bytes) else None)


_VALUES: Final = (
    *(np.array(value, "<f8").tobytes() for value in (np.nan, np.inf, -np.inf, -1.0, 1e30, -1e30, 1e300, 0.0)),
    *(np.array(value, "<f4").tobytes() for value in (np.nan, np.inf, -1.0, 1e30, 1e31, 1e-40)),
    *(np.array(value, "<i8").tobytes() for value in (2**53, 2**63 - 1, -(2**53))),
    b"\x02",
)


def _max_peak_bytes(length: int) -> int:
    return BASE_BYTES + BYTES_PER_BYTE * length


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=_max_peak_bytes)
