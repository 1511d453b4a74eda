"""A run is named by its manifest: whoever has the name can tell whether bytes are that run, and who started it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.codec import encode, to_plain
from shoal.protocol.errors import LimitError, ProtocolError, ShoalError, SignatureError, TooLargeError, UsageError
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_HEADER_BYTES
from shoal.protocol.signing import Signed, Signer
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import KIND, Manifest, Mode, open_manifest, sign_manifest

ANN, BOB = Signer(b"a" * 32), Signer(b"b" * 32)


def a_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {"owner": ANN.peer_id, "task": "gym:CartPole-v1", "algorithm": "ppo"}
    return Manifest(**fields | changes)


def named(data: bytes) -> tuple[SwarmId, bytes]:
    return SwarmId.of_manifest(data), data


def sealed(signer: Signer = ANN, kind: str = KIND, **changes: Any) -> tuple[SwarmId, bytes]:
    plain = to_plain(a_manifest()) | changes
    return named(encode(signer.seal(kind, encode(plain))))


@given(
    st.builds(
        a_manifest,
        hyperparameters=st.dictionaries(st.sampled_from(["lr", "größe"]), st.floats(-1e9, 1e9) | st.integers(0, 9)),
        seed=st.integers(0, 2**32 - 1),
        mode=st.sampled_from(Mode),
        target_return=st.none() | st.floats(-1e9, 1e9),
        created_at=st.integers(0, 2**40),
    )
)
def test_what_was_signed_is_read(manifest: Manifest) -> None:
    swarm, data = sign_manifest(manifest, ANN)
    assert open_manifest(swarm, data) == manifest
    assert sign_manifest(manifest, ANN) == (swarm, data)


def test_every_field_is_part_of_the_name() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"created_at": 1},
        {"name": "one for people"},
        {"mode": Mode.GRADIENT},
        {"aggregator": "nnm+trimmed_mean"},
        {"codec": Codec.INT8},
        {"target_return": 1.0},
    ]
    assert len({sign_manifest(a_manifest(**change), ANN)[0] for change in changes}) == len(changes)


def test_only_the_owner_signs() -> None:
    with pytest.raises(UsageError):
        sign_manifest(a_manifest(), BOB)
    with pytest.raises(ShoalError, match="names"):
        open_manifest(*sealed(BOB))


def test_other_bytes_are_refused() -> None:
    swarm, data = sign_manifest(a_manifest(), ANN)
    with pytest.raises(UsageError):
        open_manifest(swarm, data + b"\0")
    signed = Signed(ANN.peer_id, encode(a_manifest(seed=5)), ANN.sign(KIND, encode(a_manifest())))
    with pytest.raises(SignatureError):
        open_manifest(*named(encode(signed)))
    with pytest.raises(SignatureError):
        open_manifest(*sealed(kind="op/1"))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "CartPole-v1"},
        {"batch_size": 0},
        {"min_learners": 257},
        {"seed": -1},
        {"seed": 2**32},
        {"mode": "gossip"},
        {"target_return": float("nan")},
        {"target_return": "500"},
        {"hyperparameters": []},
        {"eval_episodes": 0},
        {"max_env_steps": 2**63},
        {"created_at": -1},
        {"name": "x" * 81},
        {"name": "two\nlines"},
        {"created_at": 2**63},
        {"version": 2},
        {"owner": "somebody"},
        {"aggregator": "mode"},
        {"codec": "int3"},
        {"codec": "auto"},
    ],
)
def test_a_manifest_with_a_senseless_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        open_manifest(*sealed(**changes))


def test_senseless_settings_are_told_to_the_owner() -> None:
    with pytest.raises(UsageError, match="gym:CartPole-v1"):
        a_manifest(task="CartPole-v1")
    with pytest.raises(UsageError, match="batch size"):
        a_manifest(batch_size=0)
    with pytest.raises(UsageError, match="choose one of mean"):
        a_manifest(aggregator="mode")


def test_what_a_manifest_says_reaches_no_terminal_as_it_is() -> None:
    with pytest.raises(ProtocolError) as refused:
        open_manifest(*sealed(task="\x1b[2J" * 1000))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_a_manifest_is_bounded() -> None:
    with pytest.raises(LimitError):
        open_manifest(*named(bytes(MAX_HEADER_BYTES + 1)))
    with pytest.raises(TooLargeError):
        sign_manifest(a_manifest(hyperparameters={"x": "x" * MAX_HEADER_BYTES}), ANN)


@given(st.binary(max_size=100))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        open_manifest(*named(data))


def test_an_unknown_field_refuses_to_join_and_says_what_to_update() -> None:
    signed = ANN.seal(KIND, encode(a_manifest()))
    wrapped = named(encode(to_plain(signed) | {"second_signature": b""}))
    for swarm, data in (sealed(clip_merges=True), sealed(**{"\x1b[2J\n" * 99: 1}), wrapped):
        with pytest.raises(UsageError, match="update Shoal to join") as refused:
            open_manifest(swarm, data)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 300


def test_what_a_run_requires_is_part_of_its_name_and_bounded() -> None:
    plain, strict = (sign_manifest(a_manifest(requires=each), ANN) for each in ({}, {"exchange": 1}))
    assert plain[0] != strict[0]
    assert open_manifest(*strict).requires == {"exchange": 1}
    for senseless in ({"exchange": -1}, {"exchange": 2**31}, {str(n): 1 for n in range(65)}):
        with pytest.raises(UsageError):
            a_manifest(requires=senseless)
    for wrong in ({"exchange": "1"}, {"exchange": 2**63}, ["exchange"]):
        with pytest.raises(ProtocolError):
            open_manifest(*sealed(requires=wrong))


@pytest.mark.parametrize("later", ["requires", "aggregator", "codec"])
def test_a_manifest_from_before_there_was_a_field_is_still_read(later: str) -> None:
    plain = {name: value for name, value in to_plain(a_manifest()).items() if name != later}
    assert open_manifest(*named(encode(ANN.seal(KIND, encode(plain))))) == a_manifest()
