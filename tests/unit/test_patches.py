"""A patch leads to the copy that it names, bit for bit, from the copy that it names, and to nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.training.rollouts.acting import ActorShape, copy_of
from shoal.training.rollouts.packed import compress
from shoal.training.rollouts.patches import (
    FORM,
    MissingBaseError,
    Patcher,
    PatchHead,
    PatchKind,
    apply,
    digest_of,
    eased,
    head_of,
    key_of,
    patch_of,
)
from shoal.training.tasks.base import Discrete

from .shards import a_copy, a_model, a_shape, a_task, policy_of

lengths = st.shared(st.integers(1, 300), key="length")
copies = lengths.flatmap(lambda length: hnp.arrays(np.uint16, length))


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@given(copies, copies)
def test_any_copy_is_a_patch_away_from_any_other(before: np.ndarray, words: np.ndarray) -> None:
    for data in (patch_of(before, words, 3), key_of(words, 3)):
        found = apply(before, data, words.size, digest=digest_of(words))
        assert found.dtype == np.uint16
        assert found.tobytes() == words.tobytes()
        assert head_of(data).version == 3


@given(copies, st.floats(0, 1), st.integers(0, 2**32))
def test_what_changed_little_is_sent_in_little(before: np.ndarray, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = before.copy()
    changed = rng.random(words.size) < share
    words[changed] += rng.integers(1, 4, words.size).astype(np.uint16)[changed]
    data = patch_of(before, words, 1)
    assert apply(before, data, words.size).tobytes() == words.tobytes()
    assert len(data) <= len(key_of(words, 1))


def test_few_small_steps_cost_two_bytes_each_and_a_head() -> None:
    rng = np.random.default_rng(0)
    before = bf16(rng.standard_normal(100_000))
    words = before.copy()
    places = rng.choice(words.size, 1000, replace=False)
    words[places] += 1
    data = patch_of(before, words, 1)
    assert head_of(data).kind is PatchKind.SPARSE
    assert len(data) < 2000
    assert len(patch_of(before, before, 1)) < 400


def test_where_most_words_take_a_step_all_steps_are_sent() -> None:
    rng = np.random.default_rng(0)
    before = bf16(rng.standard_normal(20_000))
    words = (before + rng.integers(0, 4, before.size)).astype(np.uint16)
    data = patch_of(before, words, 1)
    assert head_of(data).kind is PatchKind.DENSE
    assert len(data) < 0.25 * before.nbytes
    other = rng.integers(0, 2**16, before.size).astype(np.uint16)
    assert head_of(patch_of(before, other, 1)).kind is PatchKind.KEY


def test_a_patch_of_another_copy_is_nobodys_fault() -> None:
    words = np.arange(50, dtype=np.uint16)
    data = patch_of(words, words + np.uint16(1), 1)
    for before in (None, words + np.uint16(7), words[:-1]):
        with pytest.raises(MissingBaseError, match="keyframe"):
            apply(before, data, 50)


@given(st.data())
def test_a_patch_that_was_changed_anywhere_leads_nowhere(data: st.DataObject) -> None:
    before = np.arange(60, dtype=np.uint16)
    words = before.copy()
    words[::7] += 1
    whole = data.draw(st.sampled_from([patch_of(before, words, 1), key_of(words, 1)]))
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = apply(before, bytes(changed), 60, digest=digest_of(words))
    except (ProtocolError, MissingBaseError):
        return
    assert found.tobytes() == words.tobytes(), "only what is said of the version may differ"


def a_patch(values: bytes, gaps: bytes = b"", **others: object) -> bytes:
    words = np.zeros(10, np.uint16)
    known: dict[str, object] = {
        "kind": PatchKind.SPARSE,
        "version": 1,
        "words": 10,
        "base": digest_of(words),
        "digest": digest_of(words),
        "changed": 2,
        "gap_bytes": 4,
        "value_bytes": 1,
        "gaps": len(gaps),
    }
    told = encode(PatchHead(**(known | others)))  # type: ignore[arg-type]
    return FORM + len(told).to_bytes(4, "little") + told + gaps + values


def test_places_that_there_are_not_and_lengths_that_lie_are_refused() -> None:
    words = np.zeros(10, np.uint16)
    gaps = np.array([3, 2**32 - 1], np.uint32).view(np.uint8).reshape(2, 4).T.tobytes()
    with pytest.raises(ProtocolError, match="words that there are not"):
        apply(words, a_patch(compress(b"\1\1"), compress(gaps)), 10)
    with pytest.raises(ProtocolError, match="said to have"):
        apply(words, a_patch(compress(bytes(100_000)), compress(gaps)), 10)
    with pytest.raises(ProtocolError, match="does not lead to"):
        apply(words, a_patch(compress(b"\1\1"), compress(bytes(8))), 10)
    with pytest.raises(LimitError, match="this policy's copy has 10"):
        apply(words, key_of(np.zeros(2_000_000, np.uint16), 1), 10)


@pytest.mark.parametrize(
    "odd",
    [
        {"changed": 11},
        {"changed": -1},
        {"gap_bytes": 3},
        {"gap_bytes": 0},
        {"value_bytes": 4},
        {"words": 0},
        {"words": 2**40},
        {"base": b""},
        {"digest": b"x"},
        {"version": -1},
        {"kind": PatchKind.KEY},
        {"kind": PatchKind.DENSE},
    ],
)
def test_a_head_that_cannot_be_is_refused(odd: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        a_patch(b"", **odd)


def test_a_keyframe_comes_every_so_often_and_whoever_joins_waits_for_one() -> None:
    rng, patcher = np.random.default_rng(0), Patcher(4)
    words = bf16(rng.standard_normal(2000))
    copy: np.ndarray | None = None
    kinds = []
    for version in range(9):
        words = words.copy()
        words[rng.choice(2000, 20)] += 1
        data = patcher.next(words, version)
        kinds.append(head_of(data).kind is PatchKind.KEY)
        copy = apply(copy, data, 2000)
        assert copy.tobytes() == words.tobytes()
    assert kinds == [True, False, False, False, True, False, False, False, True]
    with pytest.raises(UsageError):
        Patcher(0)


def test_an_eased_copy_is_near_and_changes_less() -> None:
    rng = np.random.default_rng(0)
    exact = bf16(rng.standard_normal(5000))
    before = exact.copy()
    changed_eased = changed_exact = 0
    for _ in range(20):
        after = (exact + rng.integers(-1, 2, exact.size)).astype(np.uint16)
        changed_exact += int((after != exact).sum())
        exact = after
        copy = eased(before, exact, 4990, most=2)
        changed_eased += int((copy[:4990] != before[:4990]).sum())
        assert np.abs(copy.astype(int) - exact.astype(int))[:4990].max() <= 2
        assert (copy[4990:] == exact[4990:]).all()
        before = copy
    assert changed_eased < changed_exact / 3


def test_the_copy_of_a_policy_is_its_actor_rounded_and_its_normaliser_exact() -> None:
    task = a_task()
    model = a_model(task.observation_space.size, task.action_space)
    policy = policy_of(model, task.observation_space.size)
    words = copy_of(a_shape(task), policy)
    assert words.tobytes() == a_copy(task).tobytes()
    actor = np.concatenate([policy[name].ravel() for name in a_shape(task).shapes()])
    assert (words[: actor.size].astype(np.uint32) << 16).view(np.float32) == pytest.approx(actor, rel=2**-8)
    exact = words[actor.size :].view(np.float32)
    assert exact[:4] == pytest.approx(policy["moments/observation/mean"], rel=1e-7)
    bare = ActorShape(4, Discrete(2), (64, 64), False)
    assert copy_of(bare, policy).tobytes() == words[: actor.size].tobytes()
    with pytest.raises(UsageError, match="say the shape"):
        copy_of(ActorShape(4, Discrete(2), (64, 32), False), policy)
