"""The gradient that is written out by hand is autograd's, whatever the shapes, and inside, at and beyond the clip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit import autograd

from shoal.training.algorithms.adam import Adam, clip_by_norm, shorten
from shoal.training.algorithms.objective import Measures
from shoal.training.algorithms.on_policy import Batch
from shoal.training.algorithms.ppo_config import Correction, PPOConfig
from shoal.training.algorithms.ppo_corrected import CorrectedLoss
from shoal.training.algorithms.ppo_loss import ClippedLoss
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.tasks import Continuous, Discrete

pytestmark = pytest.mark.usefixtures("one_thread")

SPACES = st.one_of(st.builds(Discrete, st.integers(1, 6)), st.builds(Continuous, st.integers(1, 4)))
CONFIG = PPOConfig(entropy_coefficient=0.02, value_coefficient=0.7)


def a_model(
    space: Discrete | Continuous, hidden: tuple[int, ...] = (7, 5), seen: int = 3, seed: int = 0
) -> ActorCritic:
    model = ActorCritic(seen, space, hidden, initial_log_std=-0.2, seed=seed)
    model.flat += np.random.default_rng(seed).normal(0, 0.4, model.flat.shape).astype(np.float32)
    return model


def a_batch(model: ActorCritic, size: int, seed: int = 0) -> Batch:
    """Samples whose ratios lie on both sides of the clip, and none so near to an edge that rounding could decide."""
    rng = np.random.default_rng(seed)
    seen = model.parameters["actor/0/weight"].shape[1]
    observations = rng.normal(size=(size, seen)).astype(np.float32)
    actions = np.ascontiguousarray(model.act(observations, rng).T)
    moved = rng.choice([-1.5, -0.4, -0.1, 0.0, 0.1, 0.15, 0.3, 1.5], size).astype(np.float32)
    log_probs = model.judge(observations, actions)[0] - moved
    advantages, returns, values = rng.normal(size=(3, size)).astype(np.float32)
    proximal = log_probs + rng.choice([-0.5, 0.0, 0.05, 2.0], size).astype(np.float32)
    return Batch(
        observations, actions, log_probs, advantages, returns, values, proximal, rng.integers(0, 9, size, np.int64)
    )


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6 * (1 + np.abs(expected).max()))


@settings(max_examples=30, deadline=None)
@given(SPACES, st.sampled_from([Correction.DECOUPLED, Correction.A3PO]), st.integers(1, 40), st.integers(0, 2**32))
def test_it_is_autograds_where_old_samples_are_corrected_for(
    space: Discrete | Continuous, correction: Correction, size: int, seed: int
) -> None:
    model, config = a_model(space, seed=seed), replace(CONFIG, correction=correction)
    batch = a_batch(model, size, seed)
    loss = CorrectedLoss(model, config, size)
    assert_close(loss.gradient(batch), autograd.gradient(model, batch, config))
    parts = autograd.loss(autograd.leaves(model), batch, config)
    assert loss.measures() == pytest.approx(
        {name: parts[name].item() for name in parts if name != "loss"}, rel=1e-4, abs=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(SPACES, st.lists(st.integers(1, 9), max_size=3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32))
def test_it_is_autograds(space: Discrete | Continuous, hidden: list[int], seen: int, size: int, seed: int) -> None:
    model = a_model(space, tuple(hidden), seen, seed)
    batch = a_batch(model, size, seed)
    loss = ClippedLoss(model, CONFIG, size)
    assert_close(loss.gradient(batch), autograd.gradient(model, batch, CONFIG))
    parts = autograd.loss(autograd.leaves(model), batch, CONFIG)
    assert loss.measures() == pytest.approx(
        {name: parts[name].item() for name in parts if name != "loss"}, rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("space", [Discrete(2), Continuous(6)])
@pytest.mark.parametrize(("size", "width"), [(64, 64), (256, 64), (64, 256), (1024, 32)])
def test_it_is_autograds_at_the_sizes_that_are_trained(space: Discrete | Continuous, size: int, width: int) -> None:
    model = a_model(space, (width, width), seen=8)
    batch = a_batch(model, size)
    assert_close(ClippedLoss(model, CONFIG, size).gradient(batch), autograd.gradient(model, batch, CONFIG))


@pytest.mark.parametrize("space", [Discrete(3), Continuous(2)])
@pytest.mark.parametrize("edge", [0.25, -0.25])
@pytest.mark.parametrize("sign", [1, -1])
def test_at_an_edge_of_the_clip_the_gradient_is_that_from_within(
    space: Discrete | Continuous, edge: float, sign: int
) -> None:
    model = a_model(space)
    batch = a_batch(model, 200)
    own = model.judge(batch.observations, batch.actions)[0]
    exact = own - (own - np.float32(edge)) == np.float32(edge)
    assert exact.sum() > 20
    columns = (batch.observations[exact], batch.actions[..., exact], own[exact] - np.float32(edge))
    advantages = sign * np.abs(batch.advantages[exact])
    rest = (each[exact] for each in (batch.returns, batch.values, batch.proximal, batch.ages))
    at_edge = Batch(columns[0], np.ascontiguousarray(columns[1]), columns[2], advantages, *rest)
    size = len(at_edge)
    clip_range = abs(float(np.exp(np.float32(edge))) - 1)
    here = ClippedLoss(model, PPOConfig(clip_range=clip_range), size).gradient(at_edge).copy()
    without = ClippedLoss(model, PPOConfig(clip_range=100.0), size).gradient(at_edge).copy()
    np.testing.assert_array_equal(here, without)
    narrower = ClippedLoss(model, PPOConfig(clip_range=clip_range * 0.999), size).gradient(at_edge)
    is_stopped = sign * edge > 0  # going on in this direction is what the clip takes the reward from
    assert np.array_equal(narrower, without) is not is_stopped


def test_a_ratio_that_overflows_stops_where_it_is_clipped_and_is_seen_where_it_is_not() -> None:
    model = a_model(Discrete(3))
    batch = a_batch(model, 4)
    batch.log_probs[0] = -1000.0
    batch.advantages[0] = 1.0
    assert np.isfinite(ClippedLoss(model, CONFIG, 4).gradient(batch)).all()
    batch.advantages[0] = -1.0
    assert not np.isfinite(ClippedLoss(model, CONFIG, 4).gradient(batch)).all()


def test_batches_of_unlike_sizes_do_not_disturb_each_other() -> None:
    model = a_model(Continuous(2))
    batches = [a_batch(model, size, size) for size in range(1, 20)]
    alone = [ClippedLoss(model, CONFIG, len(batch)).gradient(batch).copy() for batch in batches]
    losses = [ClippedLoss(model, CONFIG, len(batch)) for batch in batches]
    for _ in range(2):
        for loss, batch, expected in zip(losses, batches, alone, strict=True):
            np.testing.assert_array_equal(loss.gradient(batch), expected)


@pytest.mark.parametrize("space", [Discrete(4), Continuous(3)])
def test_judging_many_is_judging_each_and_is_what_torch_says(space: Discrete | Continuous) -> None:
    model = a_model(space)
    batch = a_batch(model, 1100)
    log_probs, values = model.judge(batch.observations, batch.actions)
    with torch.no_grad():
        expected, _, judged = autograd.judge(autograd.leaves(model), batch.observations, batch.actions)
    np.testing.assert_allclose(log_probs, expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values, judged.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.values(batch.observations[:5]), values[:5], rtol=1e-5, atol=1e-6)


def test_a_minibatch_is_the_samples_that_its_order_names() -> None:
    model = a_model(Continuous(2))
    batch = a_batch(model, 50)
    order = np.random.default_rng(0).permutation(50)
    mixed = batch.empty()
    batch.reorder(order, mixed)
    part = mixed.part(10, 30)
    np.testing.assert_array_equal(part.observations, batch.observations[order[10:30]])
    np.testing.assert_array_equal(part.actions, batch.actions[:, order[10:30]])
    np.testing.assert_array_equal(part.log_probs, batch.log_probs[order[10:30]])
    np.testing.assert_array_equal(part.returns, batch.returns[order[10:30]])


def test_adam_takes_the_same_bits_as_its_formula_in_separate_operations() -> None:
    rng = np.random.default_rng(0)
    adam, parameters = Adam(40, learning_rate=1e-3, epsilon=1e-5), rng.normal(size=40).astype(np.float32)
    expected, first, second = parameters.copy(), np.zeros(40, np.float32), np.zeros(40, np.float32)
    for step in range(1, 50):
        gradient = rng.normal(size=40).astype(np.float32)
        adam.apply(parameters, gradient)
        first = first * np.float32(0.9) + np.float32(1 - 0.9) * gradient
        second = second * np.float32(0.999) + np.float32(1 - 0.999) * (gradient * gradient)
        correction = np.sqrt(1 - 0.999**step)
        step_size = np.float32(1e-3 * correction / (1 - 0.9**step))
        expected = expected - step_size * first / (np.sqrt(second) + np.float32(1e-5 * correction))
        assert parameters.tobytes() == expected.tobytes()
        assert (adam.first.tobytes(), adam.second.tobytes()) == (first.tobytes(), second.tobytes())


@pytest.mark.parametrize("length", [0.1, 7.0, 1e25])
def test_a_gradient_of_ones_own_is_shortened_as_one_of_all_is(length: float) -> None:
    gradient = np.random.default_rng(0).normal(size=300)
    gradient = (gradient * length / np.linalg.norm(gradient)).astype(np.float32)
    expected, norm = clip_by_norm(gradient.copy(), 0.5)
    assert shorten(gradient, 0.5) == pytest.approx(norm)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_measures_are_means_by_weight() -> None:
    measures = Measures()
    measures.add({"loss": 1.0}, 3)
    measures.add({"loss": 5.0, "norm": 2.0}, 1)
    assert measures.means() == {"loss": 2.0, "norm": 2.0}
