"""Shards come back as they were sealed, cost what they say, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, SignatureError, UsageError
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signed
from shoal.training.rollouts.packed import (
    DTYPES,
    FREE_BYTES,
    MAX_EXPANSION,
    Column,
    body_bytes,
    compress,
    decompress,
    describe,
    read_body,
    write_body,
)
from shoal.training.rollouts.rows import DoesNotFitError, rows_of
from shoal.training.rollouts.shard import FORM, KIND, Head, ShardKind, noise_seed, open_head, open_shard, seal, seeds_of
from shoal.training.tasks.base import Continuous, Discrete

from .shards import ALICE, BOB, STATE, SWARM, a_shard, a_stream, a_task, an_actor, made, signed

MEBIBYTE = 1024 * 1024

columns = st.dictionaries(
    st.text("abcdefghij_", min_size=1, max_size=12),
    st.sampled_from(sorted(DTYPES)).flatmap(
        lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7))
    ),
    max_size=6,
)


def a_head(**others: object) -> Head:
    known = {
        "kind": ShardKind.ROWS,
        "swarm": SWARM,
        "task": "gym:CartPole-v1",
        "version": 3,
        "state": STATE,
        "stream": 0,
        "number": 0,
        "samples": 4,
        "surroundings": bytes(16),
    }
    return Head(**(known | others))  # type: ignore[arg-type]


@given(columns)
def test_columns_come_back_bit_for_bit(given_: dict[str, np.ndarray]) -> None:
    body = write_body(given_)
    found = read_body(describe(given_), body, max_bytes=MEBIBYTE)
    assert found.keys() == given_.keys()
    for name, array in given_.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@given(columns, st.integers(0, 2**32), st.text("abc", max_size=5))
def test_a_shard_comes_back_as_it_was_sealed(given_: dict[str, np.ndarray], stream: int, policy: str) -> None:
    head = a_head(stream=stream, policy=policy)
    cid, data = seal(ALICE, head, given_)
    shard = open_shard(data, cid=cid, swarm=SWARM)
    assert (shard.cid, shard.author, shard.num_bytes) == (cid, ALICE.peer_id, len(data))
    assert replace(shard.head, columns=(), digest=bytes(32)) == head
    assert all(shard.columns[name].tobytes() == array.tobytes() for name, array in given_.items())
    assert seal(ALICE, head, given_) == (cid, data), "equal shards have equal bytes"
    assert open_head(shard.proof) == (ALICE.peer_id, shard.head)


@given(st.data())
def test_a_shard_that_was_changed_anywhere_is_refused(data: st.DataObject) -> None:
    _, whole = seal(ALICE, a_head(), {"x": np.arange(40, dtype=np.float32)})
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError):
        open_shard(bytes(changed))
    with pytest.raises(ProtocolError):
        open_shard(whole[:at])


def test_bytes_are_only_the_shard_that_was_asked_for() -> None:
    cid, data = seal(ALICE, a_head(), {"x": np.zeros(3, np.float32)})
    with pytest.raises(ProtocolError, match="fetch it from another peer"):
        open_shard(data, cid=Cid.of_block(b"another"))
    with pytest.raises(ProtocolError, match="not of this one"):
        open_shard(data, cid=cid, swarm=SwarmId.of_manifest(b"another"))


def test_nothing_is_decompressed_that_its_author_did_not_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = seal(ALICE, a_head(), {"x": np.zeros(3, np.float32)})

    def refuse(*_: object) -> None:
        raise AssertionError("something was unpacked")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", refuse)
    with pytest.raises(ProtocolError, match="not the one that its author signed"):
        open_shard(data + b"\0")
    forged = encode(Signed(BOB.peer_id, encode(a_head()), bytes(64)))
    with pytest.raises(SignatureError):
        open_shard(FORM + len(forged).to_bytes(4, "little") + forged)


def with_body(body: bytes, *described: Column) -> bytes:
    """A shard that its author signed, whatever is in it."""
    head = a_head(columns=described, digest=hashlib.sha256(body).digest())
    sealed = encode(ALICE.seal(KIND, encode(head)))
    return FORM + len(sealed).to_bytes(4, "little") + sealed + body


@pytest.mark.parametrize("says", ["more", "less", "nothing"])
def test_a_bomb_is_refused_before_it_is_unpacked(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 * MEBIBYTE
    frame = zstandard.ZstdCompressor(write_content_size=says != "nothing").compress(bytes(size))
    assert len(frame) < size // MAX_EXPANSION
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("something was unpacked"))
    told = {"more": size, "less": 1000, "nothing": 1000}[says]
    with pytest.raises(ProtocolError):
        open_shard(with_body(frame, Column("x", "uint8", (told,))))


def test_a_shard_is_no_larger_than_whoever_takes_it_says() -> None:
    _, data = seal(ALICE, a_head(), {"x": np.zeros(1000, np.float32)})
    with pytest.raises(LimitError, match="4000 bytes unpacked exceed"):
        open_shard(data, max_bytes=3999)
    assert open_shard(data, max_bytes=4000).columns["x"].shape == (1000,)


def test_columns_that_would_take_too_much_are_refused_by_their_head_alone() -> None:
    with pytest.raises(ProtocolError, match="takes at most"):
        open_shard(with_body(b"", Column("x", "uint8", (2**20, 2**20))))
    with pytest.raises(ProtocolError, match="once each"):
        body_bytes([Column("x", "bool", (1,)), Column("x", "bool", (1,))])


@pytest.mark.parametrize("extra", [b"\0", zstandard.ZstdCompressor().compress(b"x")])
def test_nothing_follows_the_frame(extra: bytes) -> None:
    frame = compress(b"some bytes")
    with pytest.raises(ProtocolError):
        decompress(frame + extra, 10, max_bytes=100)
    with pytest.raises(ProtocolError):
        decompress(frame[:-1], 10, max_bytes=100)
    assert bytes(decompress(frame, 10, max_bytes=100)) == b"some bytes"


def test_columns_of_nothing_but_zeros_are_sent_and_taken() -> None:
    zeros = np.zeros(4 * FREE_BYTES, np.uint8)
    body = write_body({"x": zeros})
    assert len(zeros) / MAX_EXPANSION <= len(body) <= len(zeros) / MAX_EXPANSION + 64
    assert read_body(describe({"x": zeros}), body, max_bytes=len(zeros))["x"].tobytes() == zeros.tobytes()


@pytest.mark.parametrize(
    "odd",
    [
        {"version": -1},
        {"samples": 0},
        {"samples": 2**40},
        {"task": "a\nb"},
        {"digest": b"short"},
        {"surroundings": b""},
        {"before": STATE},
        {"number": 1},
        {"stream": 2**64},
    ],
)
def test_a_head_that_cannot_be_is_refused(odd: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        a_head(**odd)


def test_what_cannot_be_a_column_is_an_error_of_ones_own() -> None:
    for odd in ({"x": np.zeros(1, np.float64)}, {"é": np.zeros(1, np.bool_)}, {"x": np.zeros((1, 1, 1, 1), np.bool_)}):
        with pytest.raises(UsageError):
            seal(ALICE, a_head(), odd)


def test_seeds_differ_by_author_policy_and_stream_and_noise_by_all_that_a_shard_is_of() -> None:
    seen = {
        tuple(seeds_of(SWARM, signer.peer_id, policy, stream, 3))
        for signer in (ALICE, BOB)
        for policy in ("", "other")
        for stream in (0, 1)
    }
    assert len(seen) == 8
    assert len({seed for seeds in seen for seed in seeds}) == 24
    heads = [
        a_head(),
        a_head(state=Cid.of_block(b"another")),
        a_head(number=1, before=STATE),
        a_head(stream=1),
        a_head(policy="other"),
    ]
    assert len({noise_seed(signer.peer_id, head) for signer in (ALICE, BOB) for head in heads}) == 10
    assert noise_seed(ALICE.peer_id, a_head(samples=9, version=4)) == noise_seed(ALICE.peer_id, a_head())


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gym:CartPole-v1", "gym:Pendulum-v1"])
@pytest.mark.parametrize("is_shown", [False, True])
def test_rows_come_back_as_they_were_played(name: str, is_shown: bool) -> None:
    task = a_task(name)
    head, rows = made(task, steps=220, is_shown=is_shown)
    shard = signed(task, head, rows)
    found = rows_of(shard, task.observation_space.size, task.action_space)
    assert (found.steps, found.num_envs, found.samples) == (220, 2, 440) == (rows.steps, 2, shard.head.samples)
    for part in ("seeds", "lead", "actions", "rewards", "log_probs", "terminated", "truncated", "sights", "finals"):
        left, right = getattr(rows, part), getattr(found, part)
        assert (left is None and right is None) or (left.dtype == right.dtype and left.tobytes() == right.tobytes())
    assert (found.sights is not None) == is_shown


def test_what_is_drawn_of_a_shard_are_the_steps_of_some_environments() -> None:
    task = a_task("gym:Pendulum-v1")  # its episodes are cut off after 200 steps
    _, rows = made(task, steps=450, num_envs=3, is_shown=True)
    assert rows.units == (450, 450, 450)
    assert rows.sights is not None
    assert rows.finals is not None
    assert len(rows.finals) == 6
    part = rows.of_envs([2, 0])
    assert part.sights is not None
    assert part.finals is not None
    for index, env in enumerate((2, 0)):
        assert (part.seeds[index], part.samples) == (rows.seeds[env], 900)
        for name in ("actions", "rewards", "log_probs", "truncated", "sights"):
            assert np.array_equal(getattr(part, name)[:, index], getattr(rows, name)[:, env])
    # Of each end, first that of the environment that comes first.
    assert np.array_equal(part.finals, rows.finals[[2, 0, 5, 3]])


def test_a_stream_goes_on_from_shard_to_shard() -> None:
    task, acting = a_task(), an_actor(a_task())
    stream = a_stream(task, max_lead=40)
    shards = []
    for _ in range(4):
        head, rows = stream.collect(acting, 0, STATE, 40)
        shard = signed(task, head, rows)
        stream.sealed(shard.cid)
        shards.append((shard, rows))
    stream.close()
    assert [(shard.head.stream, shard.head.number) for shard, _ in shards] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [len(rows.lead) for _, rows in shards] == [0, 40, 0, 40]
    assert shards[1][0].head.before == shards[0][0].cid
    assert shards[1][1].lead.tobytes() == shards[0][1].actions.tobytes()
    assert not np.array_equal(shards[2][1].seeds, shards[0][1].seeds)


def test_a_shard_has_to_be_sealed_before_the_next() -> None:
    stream = a_stream(a_task())
    stream.collect(an_actor(a_task()), 0, STATE, 4)
    with pytest.raises(UsageError, match="sealed"):
        stream.collect(an_actor(a_task()), 0, STATE, 4)
    stream.drop()
    assert stream.collect(an_actor(a_task()), 0, STATE, 4)[0].stream == 1
    stream.close()


def test_rows_of_another_task_do_not_fit() -> None:
    shard = a_shard(a_task())
    for size, space in ((4, Continuous(1)), (4, Discrete(1)), (5, Discrete(2))):
        if size == 5:
            shard = a_shard(a_task(), is_shown=True)
        with pytest.raises(ProtocolError) as caught:
            rows_of(shard, size, space)
        assert isinstance(caught.value, DoesNotFitError) == (space != Discrete(1))
