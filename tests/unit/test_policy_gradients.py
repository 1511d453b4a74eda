"""A2C, REINFORCE and V-trace: by the formulas of their papers, alone and together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit import autograd
from tests.unit.learning import PEERS, assert_close, learners, run_of, update
from tests.unit.test_gradients import SPACES, a_batch, a_model
from tests.unit.test_gradients import assert_close as assert_gradient

from shoal.protocol.errors import UsageError
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.a2c import A2C, A2CSettings, ActorCriticObjective
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.normalizers import Normalizers
from shoal.training.algorithms.objective import Experience
from shoal.training.algorithms.on_policy import Batch, Judged
from shoal.training.algorithms.policy_gradient import PolicyGradientLoss
from shoal.training.algorithms.reinforce import Reinforce
from shoal.training.algorithms.rollouts import Rollout
from shoal.training.algorithms.vtrace import VTrace, VTraceObjective, VTraceSettings
from shoal.training.exchange.averager import Moments
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.state import digest, encode_arrays
from shoal.training.tasks import Continuous, Discrete, load_task
from shoal.training.tasks.base import Box

pytestmark = pytest.mark.usefixtures("one_thread")

ALL: list[OnEngine[Any]] = [A2C(), Reinforce(), VTrace()]
CONFIG = A2CSettings(entropy_coefficient=0.02, value_coefficient=0.7)


def by_name(algorithm: OnEngine[Any]) -> str:
    return algorithm.name


# --- the gradient ----------------------------------------------------------------------------------------------------


def torch_gradient(model: ActorCritic, batch: Batch, max_weight: float | None) -> tuple[np.ndarray, float]:
    """What autograd makes of the loss, and its policy part."""
    parameters = autograd.leaves(model)
    log_probs, entropies, values = autograd.judge(parameters, batch.observations, batch.actions)
    acted, advantages, returns = (
        torch.from_numpy(each.astype(np.float64)) for each in (batch.log_probs, batch.advantages, batch.returns)
    )
    weights = torch.ones_like(acted)
    if max_weight is not None:
        weights = (log_probs.detach() - acted).exp().clamp(max=max_weight)
    policy_loss = -(weights * advantages * log_probs).mean()
    loss = policy_loss + CONFIG.value_coefficient * 0.5 * (values - returns).square().mean()
    loss = loss - CONFIG.entropy_coefficient * entropies.mean()
    parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return np.concatenate([part.numpy().ravel() for part in parts]), policy_loss.item()


@settings(max_examples=40, deadline=None)
@given(SPACES, st.integers(1, 40), st.sampled_from([None, 1.0, 1.3, 1e3]), st.integers(0, 2**32))
def test_the_gradient_is_autograds(
    space: Discrete | Continuous, size: int, max_weight: float | None, seed: int
) -> None:
    model = a_model(space, seed=seed)
    batch = a_batch(model, size, seed)
    loss = PolicyGradientLoss(model, CONFIG, size, max_weight=max_weight)
    expected, policy_loss = torch_gradient(model, batch, max_weight)
    assert_gradient(loss.gradient(batch), expected)
    assert loss.measures()["policy_loss"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-5)


# --- the targets -----------------------------------------------------------------------------------------------------


def an_experience(rng: np.random.Generator, num_steps: int, num_envs: int) -> tuple[Experience, Judged, np.ndarray]:
    """Made-up steps, what is made of them, and the log-probabilities of whoever acted."""
    shape = (num_steps, num_envs)
    terminated = rng.random(shape) < 0.2
    truncated = (rng.random(shape) < 0.2) & ~terminated
    nothing = np.zeros((0, 1), np.float32)
    rewards, log_probs, acted = rng.normal(size=(3, *shape)).astype(np.float32)
    rollout = Rollout(nothing, nothing, rewards, terminated, truncated, nothing, nothing)
    normalizers = Normalizers(Box(1), A2CSettings())
    experience = Experience(rollout, nothing, nothing, nothing, nothing, acted.ravel(), rewards, normalizers)
    values = rng.normal(size=(num_steps + 1, num_envs)).astype(np.float32)
    finals = rng.normal(size=int(truncated.sum())).astype(np.float32)
    return experience, Judged(log_probs.ravel(), values, finals), acted


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.1, 3),
    st.floats(0.1, 3),
    st.integers(0, 2**32),
)
def test_the_targets_of_vtrace_are_those_of_its_recursion(
    num_steps: int, num_envs: int, gamma: float, lam: float, max_rho: float, max_c: float, seed: int
) -> None:
    experience, judged, acted = an_experience(np.random.default_rng(seed), num_steps, num_envs)
    config = VTraceSettings(gamma=gamma, gae_lambda=lam, max_rho=max_rho, max_c=max_c)
    objective = VTraceObjective(config, a_model(Discrete(2)))
    advantages, returns = objective.estimate(experience, judged, acted.ravel())
    ratios = np.exp(judged.log_probs.reshape(acted.shape) - acted)
    rho, c = np.minimum(max_rho, ratios), lam * np.minimum(max_c, ratios)
    values, rollout = judged.values, experience.rollout
    ends = rollout.terminated | rollout.truncated
    after = np.where(rollout.terminated, 0, values[1:])
    after[rollout.truncated] = judged.final_values
    later, targets = values[-1].copy(), after.copy()
    expected = np.empty_like(acted)
    for step in reversed(range(num_steps)):
        targets[step] = np.where(ends[step], after[step], later)
        delta = rho[step] * (experience.rewards[step] + gamma * after[step] - values[step])
        later = values[step] + delta + gamma * c[step] * (targets[step] - after[step])
        expected[step] = later
    np.testing.assert_allclose(returns.reshape(acted.shape), expected, rtol=1e-3, atol=1e-3)
    gain = experience.rewards + gamma * targets - values[:-1]
    np.testing.assert_allclose(advantages.reshape(acted.shape), gain, rtol=1e-3, atol=1e-3)


def test_without_another_policy_the_values_of_vtrace_are_a2cs() -> None:
    experience, judged, _ = an_experience(np.random.default_rng(0), 30, 2)
    vtrace = VTraceObjective(VTraceSettings(), a_model(Discrete(2)))
    a2c = ActorCriticObjective(A2CSettings(), a_model(Discrete(2)))
    returns = [each.estimate(experience, judged, judged.log_probs)[1] for each in (vtrace, a2c)]
    np.testing.assert_allclose(*returns, rtol=1e-4, atol=1e-5)


def test_each_pass_of_vtrace_has_targets_of_its_own() -> None:
    (alone,) = learners(VTrace(), run_of(VTrace(), "gym:CartPole-v1", Mode.LOCAL), 1)
    alone.collect(256)
    objective = alone._objective
    assert isinstance(objective, VTraceObjective)
    first = alone._batch()
    moments = objective.moments(first)
    batch = objective.with_moments(first, moments)
    before = batch.advantages.copy(), batch.returns.copy()
    objective.refresh(batch)  # nothing has changed
    np.testing.assert_allclose(batch.advantages, before[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(batch.returns, before[1], rtol=1e-4, atol=1e-4)
    alone._model.flat += np.random.default_rng(0).normal(0, 0.1, alone._model.flat.shape).astype(np.float32)
    objective.refresh(batch)
    (experience,) = (alone._experience(stream) for stream in alone._streams)
    judged = Judged.by(objective.model, experience)
    advantages, returns = objective.estimate(experience, judged, batch.log_probs)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-5, atol=1e-5)
    normal = (advantages - float(moments.mean)) / (float(moments.std) + 1e-8)
    np.testing.assert_allclose(batch.advantages, normal, rtol=1e-4, atol=1e-4)
    assert not np.allclose(batch.returns, before[1], atol=1e-3)


def test_reinforce_counts_the_rewards_that_came() -> None:
    run = run_of(Reinforce(), "gym:Pendulum-v1", Mode.LOCAL, normalize_returns=False, gamma=0.9)
    (alone,) = learners(Reinforce(), run, 1)
    alone.collect(4 * 250)
    batch, stream = alone._batch(), alone._streams[0]
    rollout = stream.rollout()
    values = alone._model.values(alone._normalizers.observations(rollout.final_observations))
    expected = np.empty(rollout.rewards.shape)
    running = alone._model.values(alone._normalizers.observations(rollout.observations[-1])).astype(np.float64)
    finals = np.zeros(rollout.rewards.shape)
    finals[rollout.truncated] = values
    for step in reversed(range(len(expected))):
        running = rollout.rewards[step] + 0.9 * np.where(rollout.truncated[step], finals[step], running)
        expected[step] = running
    np.testing.assert_allclose(batch.returns, expected.ravel(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(batch.advantages, expected.ravel() - batch.values, rtol=1e-4, atol=1e-3)
    with pytest.raises(UsageError, match="gae_lambda"):
        learners(Reinforce(), run_of(Reinforce(), "gym:CartPole-v1", Mode.LOCAL, gae_lambda=0.9), 1)


@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_advantages_may_stay_as_they_are(algorithm: OnEngine[Any]) -> None:
    run = run_of(algorithm, "gym:CartPole-v1", Mode.LOCAL, normalize_advantages=False)
    (alone,) = learners(algorithm, run, 1)
    alone.collect(64)
    batch = alone._batch()
    assert alone._objective.with_moments(batch, Moments.of(batch.advantages)) is batch
    update([alone])


# --- alone and together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_it_learns_cart_pole(algorithm: OnEngine[Any]) -> None:
    run = Manifest(owner=PEERS[0], task="gym:CartPole-v1", algorithm=algorithm.name, batch_size=1024)
    (alone,) = learners(algorithm, run, 1)
    assert float(np.mean(alone.evaluate(10, seed=1))) < 100
    best = 0.0
    for epoch in range(50):
        alone.collect(1024)
        (stats,), _ = update([alone])
        assert np.isfinite(list(stats.metrics.values())).all()
        if epoch >= 10 and epoch % 3 == 0:
            best = max(best, float(np.mean(alone.evaluate(10, seed=epoch))))
        if best >= 300:
            return
    raise AssertionError(f"the best mean return was {best}")


@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_averaged_gradients_equal_one_process_with_the_joint_batch(
    algorithm: OnEngine[Any], task: str, num_peers: int
) -> None:
    run = run_of(algorithm, task, Mode.GRADIENT)
    peers = learners(algorithm, run, num_peers)
    alone = algorithm.learner(run, load_task(task), peer=PEERS[0], streams=PEERS[:num_peers])
    start = alone._model.flat.copy()
    for _ in range(4):
        for peer in peers:
            peer.collect(128)
        alone.collect(128 * num_peers)
        update(peers)
        update([alone])
        assert len({digest(peer.export_state()) for peer in peers}) == 1
        assert_close(peers[0].policy_arrays(), alone.policy_arrays(), 1e-5)
    assert np.abs(alone._model.flat - start).max() > 1e-3


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_peers_end_with_the_same_bits_whatever_each_collected(algorithm: OnEngine[Any], mode: Mode) -> None:
    peers = learners(algorithm, run_of(algorithm, "gym:Pendulum-v1", mode), 3)
    for shares in ((64, 200, 8), (128, 0, 4), (0, 0, 64)):
        for peer, share in zip(peers, shares, strict=True):
            if share:
                peer.collect(share)
        stats, exchanges = update(peers)
        assert exchanges == (1 + peers[0].config.num_steps if mode is Mode.GRADIENT else 1)
        assert [bool(each.metrics) for each in stats] == [share > 0 for share in shares]
        assert len({encode_arrays(peer.export_state(), {}) for peer in peers}) == 1


@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_what_another_policy_made_is_learned_from(algorithm: OnEngine[Any]) -> None:
    """Kept samples, and those of an update that waits."""
    fast, slow = learners(algorithm, run_of(algorithm, "gym:CartPole-v1", Mode.LOCAL), 2)
    fast.collect(128)
    slow.collect(64)
    update([fast])
    slow.import_state(fast.export_state(), keep_samples=True)
    assert slow.samples == 64
    fast.collect(128)
    updates = [each.update() for each in (fast, slow)]
    for each in updates:
        next(each)
    assert slow.collect_ahead(lambda: slow.samples >= 128).samples == 64
    slow.abandon()
    fast.abandon()
    slow.collect(64)
    (stats,), _ = update([slow])
    assert np.isfinite(list(stats.metrics.values())).all()


@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_it_is_found_by_name(algorithm: OnEngine[Any]) -> None:
    assert type(load_algorithm(algorithm.name)) is type(algorithm)
