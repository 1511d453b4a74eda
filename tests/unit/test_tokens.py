"""The character transformer: the same bits everywhere, and what it samples is as likely as it says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import UsageError
from shoal.training.models.flat import FlatParameters, Spec
from shoal.training.models.tokens import TokenModel, decode_text, encode_text
from shoal.training.rollouts.acting import Noise
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.play import Role, Take, Text
from shoal.training.tasks.source import Scenario

TALK = Role(Text(), Text())


def take(*turns: tuple[str, str], waiting: str | None = None, max_tokens: int | None = None) -> Take:
    """A take with these sights and acts, and maybe a sight that waits."""
    made = Take("solver", TALK, Learned("own"), Scenario(0), 0)
    made.sights = [sight for sight, _ in turns] + ([] if waiting is None else [waiting])
    made.acts = [act for _, act in turns]
    made.rewards = [0.0] * len(turns)
    made.max_tokens = max_tokens
    return made


def small(seed: int = 0) -> TokenModel:
    """A model that takes no time."""
    return TokenModel(width=16, layers=2, heads=2, context=32, seed=seed)


def test_initial_parameters_are_the_same_bits_on_every_machine() -> None:
    """By their digest; another seed gives others."""
    digest = hashlib.sha256(small().flat.tobytes()).hexdigest()
    assert digest == hashlib.sha256(small().flat.tobytes()).hexdigest()
    assert digest == "526e2a45486926bf8c0b6b0650239143200c8f858bf7c66089bd4238b7b8fa5b"
    assert not np.array_equal(small().flat, small(1).flat)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_text_that_can_be_said_comes_back(text: str) -> None:
    """And what cannot be reads as a question mark."""
    assert decode_text(encode_text(text)) == text
    assert decode_text(encode_text(text + "é")) == text + "?"


def test_what_is_sampled_is_as_likely_as_the_model_says() -> None:
    """Side by side, with keys and values kept, over several turns: the same as judging the whole sequence."""
    model = small()
    takes = [
        take(waiting="31", max_tokens=6),
        take(waiting="12", max_tokens=6),
        take(("12", "ab"), ("3", ""), waiting="xyz", max_tokens=4),
        take(waiting="7" * 40, max_tokens=3),
    ]
    said, log_probs = model.act(takes, np.random.default_rng(0), greedy=False)
    for each, act, log_prob in zip(takes, said, log_probs, strict=True):
        assert each.max_tokens is not None
        assert len(act) <= each.max_tokens
        before = len(each.acts)
        each.acts.append(act)
        each.rewards.append(0.0)
        sequences = model.encode([each])
        judged = model.log_probs(sequences)[0].detach()
        newest = len(act) + 1
        used = int(sequences.is_act[0].nonzero().max()) + 1
        if before or len(each.sights[0]) < 30:
            assert float(judged[used - newest : used].sum()) == pytest.approx(float(log_prob), abs=1e-4)


def test_who_is_beside_a_take_changes_nothing() -> None:
    """A greedy answer is the same alone and in company of prompts of other lengths."""
    model = small()
    prompts = ["1", "22", "333", "22", "4444"]
    together, _ = model.act([take(waiting=each, max_tokens=5) for each in prompts], np.random.default_rng(0), True)
    alone = [model.act([take(waiting=each, max_tokens=5)], np.random.default_rng(1), True)[0][0] for each in prompts]
    assert together == alone


def test_an_act_can_be_drawn_again_alone_from_its_noise() -> None:
    """Whatever was drawn beside it, and in whatever order."""
    model = small()
    model.flat[:] *= 20
    takes = [take(waiting=each, max_tokens=20) for each in ("1", "22", "333", "44", "5")]
    together = model.complete(takes, [Noise(seed) for seed in range(5)])
    assert len({tuple(each.tokens.tolist()) for each in together}) == 5
    for index in (4, 2, 0):
        (alone,) = model.complete([takes[index]], [Noise(index)])
        np.testing.assert_array_equal(alone.tokens, together[index].tokens)
        np.testing.assert_allclose(alone.log_probs, together[index].log_probs, atol=1e-4)


def test_gradients_reach_the_one_vector() -> None:
    """And are those of a difference quotient."""
    model = small()
    sequences = model.encode([take(("12", "21")), take(("31", "13"))])
    gradient = model.gradient_of(model.log_probs(sequences).sum()).copy()
    index = int(np.abs(gradient).argmax())
    with torch.no_grad():
        values = []
        for step in (1e-2, -1e-2):
            model.flat[index] += np.float32(step)
            values.append(float(model.log_probs(sequences).sum()))
            model.flat[index] -= np.float32(step)
    assert gradient[index] == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05)


def test_sizes_that_do_not_go_together_are_refused() -> None:
    """With what to choose."""
    with pytest.raises(UsageError, match="multiple"):
        TokenModel(width=30, heads=4)
    with pytest.raises(UsageError, match="context"):
        TokenModel(context=0)


def test_flat_parameters_are_views_of_one_vector() -> None:
    """What NumPy writes, torch reads."""
    made = FlatParameters({"a": Spec((2, 3), 0.5), "b": Spec((4,), fill=2.0)}, seed=3)
    made.flat[:] = np.arange(10)
    np.testing.assert_array_equal(made.parameters["a"], np.arange(6).reshape(2, 3))
    assert made.tensors["b"].tolist() == [6.0, 7.0, 8.0, 9.0]
    assert made.gradient_of((made.tensors["b"] * 3).sum()).tolist() == [0.0] * 6 + [3.0] * 4
