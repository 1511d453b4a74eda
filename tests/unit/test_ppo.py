"""PPO learns, by the formulas of its paper, and a learner keeps what it promises to whoever drives it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.algorithms import UpdateStats, load_algorithm
from shoal.training.algorithms.adam import Adam, clip_by_norm
from shoal.training.algorithms.engine import PolicyLearner
from shoal.training.algorithms.local import update_together
from shoal.training.algorithms.ppo import PPO
from shoal.training.algorithms.rollouts import Rollout, Stream, advantages
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.state import digest
from shoal.training.tasks import Continuous, Discrete, load_task

ALICE, BOB = (PeerId.of_public_key(bytes([n]) * 32) for n in (1, 2))


def learner(
    task: str = "gym:CartPole-v1", *, peer: PeerId = ALICE, mode: Mode = Mode.LOCAL, **settings: Any
) -> PolicyLearner:
    run = Manifest(owner=ALICE, task=task, algorithm="ppo", hyperparameters=settings, mode=mode, batch_size=1024)
    return PPO().learner(run, load_task(task), peer=peer)


def update_alone(alone: PolicyLearner) -> UpdateStats:
    return update_together({ALICE: alone})[0]


def test_it_solves_cart_pole() -> None:
    alone = learner()
    steps, best = 0, 0.0
    while best < 475 and steps < 40_000:
        steps += alone.collect(1024).samples
        update_alone(alone)
        best = float(np.mean(alone.evaluate(20, seed=steps)))
    assert best >= 475


def test_it_learns_continuous_actions() -> None:
    alone = learner("gym:Pendulum-v1")
    untrained = float(np.mean(alone.evaluate(10, seed=1)))
    for _ in range(15):
        alone.collect(1024)
        stats = update_alone(alone)
    assert float(np.mean(alone.evaluate(10, seed=1))) > untrained + 300
    assert all(math.isfinite(value) for value in stats.metrics.values())


def test_advantages_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    num_steps, gamma, lam = 12, 0.9, 0.8
    rewards, values = rng.normal(size=(num_steps, 1)), rng.normal(size=(num_steps + 1, 1))
    terminated, truncated = np.zeros((num_steps, 1), bool), np.zeros((num_steps, 1), bool)
    terminated[3], truncated[7] = True, True
    final_value = np.array([5.0], np.float32)
    nothing = np.zeros((0, 1), np.float32)
    rollout = Rollout(nothing, nothing, nothing, terminated, truncated, nothing, nothing)
    result = advantages(
        rollout, rewards.astype(np.float32), values.astype(np.float32), final_value, gamma=gamma, gae_lambda=lam
    )
    for start in range(num_steps):
        expected, weight = 0.0, 1.0
        for step in range(start, num_steps):
            after = 0.0 if terminated[step, 0] else 5.0 if truncated[step, 0] else values[step + 1, 0]
            expected += weight * (rewards[step, 0] + gamma * after - values[step, 0])
            weight *= gamma * lam
            if terminated[step, 0] or truncated[step, 0]:
                break
        assert result[start, 0] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 70), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_advantages_are_those_of_the_recursion_step_by_step(
    num_steps: int, num_envs: int, gamma: float, lam: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_envs)
    rewards, values = rng.normal(size=shape), rng.normal(size=(num_steps + 1, num_envs))
    terminated = rng.random(shape) < 0.2
    truncated = (rng.random(shape) < 0.2) & ~terminated
    after = rng.normal(size=int(truncated.sum()))
    nothing = np.zeros((0, 1), np.float32)
    rollout = Rollout(nothing, nothing, nothing, terminated, truncated, nothing, nothing)
    result = advantages(
        rollout, *(each.astype(np.float32) for each in (rewards, values, after)), gamma=gamma, gae_lambda=lam
    )
    following = np.where(terminated, 0.0, values[1:])
    following[truncated] = after
    running = np.zeros(num_envs)
    for step in reversed(range(num_steps)):
        ends = terminated[step] | truncated[step]
        running = rewards[step] + gamma * following[step] - values[step] + gamma * lam * ~ends * running
        np.testing.assert_allclose(result[step], running, rtol=1e-4, atol=1e-4)


def test_a_stream_continues_its_episodes_from_call_to_call() -> None:
    task, whole, parts = load_task("gym:Pendulum-v1"), None, None
    model = ActorCritic(3, task.action_space, (8,), initial_log_std=0.0, seed=0)

    def policy(shown: np.ndarray, rng: np.random.Generator, memory: np.ndarray) -> np.ndarray:
        return model.act(shown, rng)

    streams = [Stream(task, num_envs=2, gamma=0.9, seed=1, name="a") for _ in range(2)]
    _, finished = streams[0].collect(600, policy)
    assert len(finished) == 2
    for _ in range(6):
        streams[1].collect(99, policy)
    whole, parts = (stream.rollout() for stream in streams)
    assert whole.samples == parts.samples == 600
    for name in ("observations", "actions", "rewards", "truncated", "discounted_returns", "final_observations"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.truncated.sum() == len(whole.final_observations) == 2
    # What the running episode has earned starts anew with it.
    np.testing.assert_array_equal(whole.discounted_returns[200], whole.rewards[200])
    np.testing.assert_allclose(whole.discounted_returns[1], 0.9 * whole.rewards[0] + whole.rewards[1], rtol=1e-6)


@pytest.mark.parametrize("space", [Discrete(5), Continuous(3)])
def test_sampled_actions_follow_the_policy_that_is_optimised(space: Discrete | Continuous) -> None:
    model = ActorCritic(4, space, (16, 16), initial_log_std=-0.3, seed=3)
    model.flat += np.random.default_rng(0).normal(0, 0.2, model.flat.shape).astype(np.float32)
    observation = np.random.default_rng(1).normal(size=(1, 4)).astype(np.float32)
    many = np.repeat(observation, 50_000, axis=0)
    actions = model.act(many, np.random.default_rng(2))
    log_probs, _ = model.judge(many, np.ascontiguousarray(actions.T))
    passes = model.passes(1)
    passes.judge(observation, np.ascontiguousarray(actions[:1].T))
    # The mean surprise of a policy's own actions is its entropy.
    assert -float(log_probs.mean()) == pytest.approx(passes.entropy, abs=0.02)
    if isinstance(space, Discrete):
        frequencies = np.bincount(actions, minlength=5) / len(actions)
        every = np.exp(model.judge(many[:5], np.arange(5))[0])
        np.testing.assert_allclose(frequencies, every, atol=0.01)
        assert model.act_greedily(observation)[0] == every.argmax()
    else:
        np.testing.assert_allclose(actions.mean(axis=0), model.act_greedily(observation)[0], atol=0.02)


def test_noise_that_rounds_to_nothing_is_acted_on_without_a_word() -> None:
    class Nothing(np.random.Generator):
        def standard_exponential(self, size: Any, dtype: Any) -> Any:  # type: ignore[override]
            return np.zeros(size, dtype)

    model = ActorCritic(4, Discrete(3), (8,), initial_log_std=0.0, seed=3)
    observation = np.ones((2, 4), np.float32)
    actions = model.act(observation, Nothing(np.random.PCG64(0)))
    np.testing.assert_array_equal(actions, model.act_greedily(observation))


def test_initial_parameters_are_orthogonal_and_the_same_bits_everywhere() -> None:
    model = ActorCritic(4, Discrete(2), (64, 64), initial_log_std=0.0, seed=0)
    for name, gain in (("actor/1/weight", math.sqrt(2)), ("actor/2/weight", 0.01), ("critic/2/weight", 1.0)):
        rows = model.parameters[name].astype(np.float64)
        np.testing.assert_allclose(rows @ rows.T, gain**2 * np.eye(len(rows)), atol=1e-5)
    tall = model.parameters["actor/0/weight"].astype(np.float64)
    np.testing.assert_allclose(tall.T @ tall, 2 * np.eye(4), atol=1e-5)
    assert digest(dict(model.parameters)) == "8b1d0b0d9008f05da743e49b6d1b6a802f72b602500c982e22906ba02bab7162"


def test_peers_start_alike_and_see_different_things() -> None:
    alice, bob = learner(), learner(peer=BOB)
    assert digest(alice.export_state()) == digest(bob.export_state())
    alice.collect(64)
    bob.collect(64)
    first, second = (each._streams[0].rollout().observations for each in (alice, bob))
    assert not np.array_equal(first, second)


def test_adam_and_clipping_are_torchs() -> None:
    rng = np.random.default_rng(0)
    ours = rng.normal(size=50).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(ours.copy()))
    adam = Adam(50, learning_rate=1e-2, epsilon=1e-5)
    reference = torch.optim.Adam([theirs], lr=1e-2, eps=1e-5)
    for _ in range(30):
        gradient = rng.normal(size=50).astype(np.float32)
        theirs.grad = torch.from_numpy(gradient.copy())
        norm = torch.nn.utils.clip_grad_norm_([theirs], 5.0)
        reference.step()
        clipped, own_norm = clip_by_norm(gradient, 5.0)
        adam.apply(ours, clipped)
        assert own_norm == pytest.approx(float(norm), rel=1e-5)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"gama": 0.9}, "did you mean gamma"),
        ({"gamma": "high"}, "should be a number"),
        ({"gamma": 1.5}, "between 0.0 and 1.0"),
        ({"num_envs": 2.5}, "should be int"),
        ({"num_minibatches": 0}, "between 1"),
        ({"hidden_sizes": [64, -1]}, "hidden_sizes"),
        ({"learning_rate": float("nan")}, "finite"),
    ],
)
def test_wrong_hyperparameters_are_refused(settings: dict[str, Any], answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        learner(**settings)


def test_hyperparameters_override_defaults_and_those_follow_the_task() -> None:
    assert learner(gamma=0.5, hidden_sizes=[8]).config.gamma == 0.5
    assert not learner().config.normalize_observations
    swinging = learner("gym:Pendulum-v1").config
    assert (swinging.normalize_observations, swinging.gamma, swinging.entropy_coefficient) == (True, 0.95, 0.0)
    assert learner("gym:Pendulum-v1", gamma=0.9).config.gamma == 0.9


def test_collect_rounds_up_and_counts() -> None:
    alone = learner(num_envs=8)
    first = alone.collect(100)
    assert (first.samples, first.total) == (104, 104)
    second = alone.collect(8)
    assert (second.samples, second.total) == (8, 112)
    assert update_alone(alone).samples == 112
    assert alone.collect(8).total == 8


def test_samples_do_not_pile_up_without_bound() -> None:
    alone = learner()
    for _ in range(8):
        alone.collect(1024)
    with pytest.raises(UsageError, match="wait for an update"):
        alone.collect(1024)
    alone.abandon()
    assert alone.collect(1024).total == 1024


@pytest.mark.parametrize("mode", list(Mode))
def test_a_half_done_update_leaves_no_trace(mode: Mode) -> None:
    alone = learner("gym:Pendulum-v1", mode=mode)
    alone.collect(256)
    update_alone(alone)
    before = digest(alone.export_state())
    alone.collect(256)
    update = alone.update()
    exchange = next(update)
    if mode is Mode.GRADIENT:
        for _ in range(5):
            exchange = update.send(merge([Contribution(ALICE, exchange.weight, exchange.arrays)]))
    for forbidden in (alone.export_state, alone.update, lambda: alone.collect(8)):
        with pytest.raises(UsageError, match="under way"):
            forbidden()
    alone.abandon()
    assert digest(alone.export_state()) == before
    assert alone.collect(8).total == 8


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("damage", ["shape", "nan", "missing"])
def test_a_merge_that_does_not_fit_changes_nothing_and_can_be_tried_again(mode: Mode, damage: str) -> None:
    alone = learner(mode=mode)
    before = digest(alone.export_state())
    alone.collect(256)
    update = alone.update()
    merged = merge([Contribution(ALICE, 1.0, next(update).arrays)])
    name = min(merged)
    match damage:
        case "shape":
            merged[name] = np.zeros((*merged[name].shape, 2), merged[name].dtype)
        case "nan":
            merged[name] = np.full_like(merged[name], np.nan)
        case _:
            del merged[name]
    with pytest.raises(ProtocolError, match=name):
        update.send(merged)
    assert digest(alone.export_state()) == before
    assert update_alone(alone).samples == 256


@pytest.mark.parametrize(
    "change",
    [
        {"parameters/actor/0/bias": np.zeros(3, np.float32)},
        {"parameters/actor/0/bias": np.full(64, np.nan, np.float32)},
        {"adam/second": None},
        {"adam/step": np.asarray(-1)},
        {"surprise": np.zeros(1)},
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    alone = learner()
    state = {name: array for name, array in (alone.export_state() | change).items() if array is not None}
    before = digest(alone.export_state())
    with pytest.raises(ProtocolError):
        alone.import_state(state)
    assert digest(alone.export_state()) == before


def test_a_policy_travels_with_its_normaliser() -> None:
    alone = learner("gym:Pendulum-v1")
    alone.collect(512)
    update_alone(alone)
    other = learner("gym:Pendulum-v1", peer=BOB)
    other.import_state(alone.export_state())
    assert digest(other.policy_arrays()) == digest(alone.policy_arrays())
    assert "moments/observation/mean" in alone.policy_arrays()
    assert not any(name.startswith("moments/") for name in learner().policy_arrays())


def test_evaluation_is_repeatable_and_disturbs_nothing() -> None:
    alone, undisturbed = learner(), learner()
    for each in (alone, undisturbed):
        each.collect(100)
    returns = alone.evaluate(40, seed=5)
    assert len(returns) == 40
    assert alone.evaluate(40, seed=5) == returns
    assert alone.evaluate(40, seed=6) != returns
    for each in (alone, undisturbed):
        each.collect(100)
        update_alone(each)
    assert digest(alone.export_state()) == digest(undisturbed.export_state())


def test_it_is_found_by_name() -> None:
    algorithm = load_algorithm("ppo")
    assert (algorithm.name, algorithm.version) == ("ppo", 5)
