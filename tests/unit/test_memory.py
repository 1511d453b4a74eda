"""Policies that remember: gradients, sequences, parity, and a task that cannot be learned without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit import autograd
from tests.unit.learning import PEERS, assert_close, learners, run_of, update

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.a2c import A2C
from shoal.training.algorithms.dqn import DQN
from shoal.training.algorithms.engine import OnEngine, PolicyLearner
from shoal.training.algorithms.on_policy import Batch
from shoal.training.algorithms.ppo import PPO
from shoal.training.algorithms.ppo_config import PPOConfig
from shoal.training.algorithms.ppo_loss import ClippedLoss
from shoal.training.algorithms.reinforce import Reinforce
from shoal.training.algorithms.sequences import Runs, remembered
from shoal.training.algorithms.vtrace import VTrace
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.policy import Course
from shoal.training.models.recurrent import RecurrentActorCritic
from shoal.training.state import digest, encode_arrays
from shoal.training.tasks import Box, Continuous, Discrete, Transition, load_task
from shoal.training.tasks.base import Actions, Floats
from shoal.training.tasks.failures import Failures

pytestmark = pytest.mark.usefixtures("one_thread")

ALL: list[OnEngine[Any]] = [PPO(), A2C(), Reinforce(), VTrace()]
GRU = {"memory": "gru", "memory_size": 8, "sequence_length": 7}
COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=7).map(lambda each: tuple(sorted(each, reverse=True)))
SPACES = st.one_of(st.builds(Discrete, st.integers(1, 4)), st.builds(Continuous, st.integers(1, 3)))


def by_name(algorithm: OnEngine[Any]) -> str:
    return algorithm.name


def a_model(space: Discrete | Continuous, hidden: tuple[int, ...] = (7,), seed: int = 0) -> RecurrentActorCritic:
    model = RecurrentActorCritic(3, space, hidden, memory_size=5, initial_log_std=-0.2, seed=seed)
    model.flat += np.random.default_rng(seed).normal(0, 0.3, model.flat.shape).astype(np.float32)
    return model


def a_batch(model: RecurrentActorCritic, counts: tuple[int, ...], seed: int = 0) -> Batch:
    """Samples of sequences, whose ratios lie on both sides of the clip."""
    rng = np.random.default_rng(seed)
    size, space = sum(counts), model._heads.action_space
    memory = rng.uniform(-1, 1, (counts[0], model.memory_size)).astype(np.float32)
    course = Course(counts, memory)
    observations = rng.normal(size=(size, 3)).astype(np.float32)
    if isinstance(space, Discrete):
        actions = rng.integers(space.count, size=size)
    else:
        actions = rng.normal(size=(space.size, size)).astype(np.float32)
    moved = rng.choice([-1.5, -0.4, -0.1, 0.0, 0.1, 0.15, 0.3, 1.5], size).astype(np.float32)
    log_probs = model.passes(size).judge(observations, actions, course) - moved
    advantages, returns, values = rng.normal(size=(3, size)).astype(np.float32)
    ages = np.zeros(size, np.int64)
    return Batch(observations, actions, log_probs, advantages, returns, values, log_probs, ages, course)


def torch_features(parameters: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """What `autograd.judge` is to see: observations beside what torch's own unit remembers, sequence by sequence."""
    assert batch.course is not None
    width = batch.course.memory.shape[1]
    names = ("memory/in", "memory/again", "memory/in_bias", "memory/again_bias")
    unit = torch.nn.GRUCell(batch.observations.shape[1], width).double()
    weights = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), (parameters[n] for n in names), strict=True))
    shown = torch.from_numpy(batch.observations.astype(np.float64))
    memory, start, after = torch.from_numpy(batch.course.memory.astype(np.float64)), 0, []
    for count in batch.course.counts:
        memory = torch.func.functional_call(unit, weights, (shown[start : start + count], memory[:count]))
        after.append(memory)
        start += count
    return torch.cat([shown, torch.cat(after)], dim=1)


# --- the gradient ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SPACES, COUNTS, st.booleans(), st.integers(0, 2**32))
def test_it_is_autograds_through_time(
    space: Discrete | Continuous, counts: tuple[int, ...], is_deep: bool, seed: int
) -> None:
    model = a_model(space, (7, 4) if is_deep else (), seed)
    batch = a_batch(model, counts, seed)
    config = PPOConfig(entropy_coefficient=0.02, value_coefficient=0.7)
    found = ClippedLoss(model, config, len(batch)).gradient(batch).copy()
    parameters = {
        name: torch.tensor(each, dtype=torch.float64, requires_grad=True) for name, each in model.parameters.items()
    }
    seen = torch_features(parameters, batch)
    loss = autograd.loss(parameters, batch, config, seen)["loss"]
    parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    expected = np.concatenate([part.numpy().ravel() for part in parts])
    np.testing.assert_allclose(found, expected, rtol=5e-4, atol=5e-6 * (1 + np.abs(expected).max()))
    again = ClippedLoss(model, config, len(batch)).gradient(batch)
    np.testing.assert_array_equal(found, again)


# --- sequences -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32))
def test_sequences_are_all_steps_once_each_within_an_episode(steps: int, envs: int, longest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ended = rng.random((steps, envs)) < 0.3
    runs = Runs.of(ended, longest)
    episodes = np.cumsum(ended, axis=0) - ended  # the number of each step's, in its environment
    found = []
    for first, length, stride in zip(runs.firsts, runs.lengths, runs.strides, strict=True):
        rows = first + stride * np.arange(length)
        assert len({int(row % envs) for row in rows}) == 1
        assert len({int(episodes.ravel()[row]) for row in rows}) == 1
        assert 1 <= length <= longest
        found += rows.tolist()
    assert sorted(found) == list(range(steps * envs))
    order, counts = runs.in_order()
    assert sorted(order.tolist()) == sorted(found)
    assert list(counts) == sorted(counts, reverse=True)
    for step, start in enumerate(np.cumsum([0, *counts])[:-1]):
        for row, number in enumerate(order[start : start + counts[step]]):
            assert number == order[row] + step * envs


@pytest.mark.parametrize("num_parts", [1, 3, 50])
def test_minibatches_are_all_samples_once_each_in_sequences(num_parts: int) -> None:
    run = run_of(PPO(), "gym:CartPole-v1", Mode.LOCAL, **GRU | {"num_minibatches": num_parts, "update_epochs": 2})
    alone = PPO().learner(run, load_task(run.task), peer=PEERS[0], streams=PEERS[:2])
    alone.collect(160)
    batch = alone._batch()
    parts = [each for each, _ in alone._objective.minibatches(batch, alone._streams)]
    assert len(parts) == 2 * num_parts
    for half in (parts[:num_parts], parts[num_parts:]):
        seen = np.concatenate([each.observations for each in half if each is not None])
        assert sum(len(each) for each in half if each is not None) == 160
        assert sorted(map(tuple, seen)) == sorted(map(tuple, batch.observations))


# --- what is remembered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_an_update_remembers_what_who_acted_did(task: str) -> None:
    """From update to update, over ends of episodes, and for the observations that only values see."""
    (alone,) = learners(PPO(), run_of(PPO(), task, Mode.LOCAL, **GRU), 1)
    model: Any = alone._model
    has_ended = False
    for steps in (4 * 150, 4 * 130):
        alone.collect(steps)
        stream, normal = alone._streams[0], alone._normalizers.observations
        rollout = stream.rollout()
        observations = normal(rollout.observations[:-1]).reshape(steps, -1)
        before, after = remembered(model, rollout, observations)
        np.testing.assert_allclose(before, rollout.memories, atol=1e-5)
        ended = rollout.terminated | rollout.truncated
        has_ended |= bool(ended.any())
        assert not before[1:][ended[:-1]].any()
        batch = alone._batch()
        np.testing.assert_allclose(
            batch.values, model.values(observations, rollout.memories.reshape(steps, -1)), atol=1e-4
        )
        last = model.values(normal(rollout.observations[-1]), stream._memory)
        finals = model.values(normal(rollout.final_observations), after[rollout.truncated])
        following = np.concatenate([batch.values.reshape(-1, 4)[1:], last[None]])
        following[rollout.terminated], following[rollout.truncated] = 0, finals
        rewards = alone._normalizers.rewards(rollout.rewards)
        lam, gamma, running = alone.config.gae_lambda, alone.config.gamma, np.zeros(4)
        for step in reversed(range(len(rewards))):
            delta = rewards[step] + gamma * following[step] - batch.values.reshape(-1, 4)[step]
            running = delta + gamma * lam * ~ended[step] * running
            np.testing.assert_allclose(batch.advantages.reshape(-1, 4)[step], running, rtol=1e-3, atol=1e-3)
        update([alone])
    assert has_ended


def test_greedy_episodes_begin_with_nothing_remembered_and_go_on_remembering() -> None:
    (alone,) = learners(PPO(), run_of(PPO(), "gym:Pendulum-v1", Mode.LOCAL, **GRU), 1)
    alone.collect(64)
    before = alone._streams[0]._memory.copy()
    assert alone.evaluate(3, seed=3) == alone.evaluate(3, seed=3)
    np.testing.assert_array_equal(alone._streams[0]._memory, before)
    model: Any = alone._model
    act, memory, shown = alone._greedy(2), np.zeros((2, 8), np.float32), np.ones((2, 3), np.float32)
    acts = [act(shown) for _ in range(3)]
    np.testing.assert_array_equal(
        acts, [model.act_greedily(alone._normalizers.observations(shown), memory) for _ in range(3)]
    )
    assert not np.array_equal(acts[0], acts[1])


# --- alone and together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "num_peers"), [("gym:CartPole-v1", 2), ("gym:Pendulum-v1", 3)])
@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_averaged_gradients_equal_one_process_with_the_joint_batch(
    algorithm: OnEngine[Any], task: str, num_peers: int
) -> None:
    run = run_of(algorithm, task, Mode.GRADIENT, **GRU)
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
    moved = {
        name: np.abs(array - start_of(alone, start)[name]).max() for name, array in alone._model.parameters.items()
    }
    assert min(moved[name] for name in moved if name.startswith("memory/")) > 1e-3


def start_of(learner: PolicyLearner, flat: Floats) -> Mapping[str, Floats]:
    """Another vector of a learner's parameters, by name."""
    found: Mapping[str, Floats] = learner._model._heads.views_of(flat)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.DILOCO, Mode.GRADIENT])
@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_peers_end_with_the_same_bits_whatever_each_collected(algorithm: OnEngine[Any], mode: Mode) -> None:
    peers = learners(algorithm, run_of(algorithm, "gym:Pendulum-v1", mode, **GRU), 3)
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
    """Kept samples, and those of an update that waits: judged by what was remembered then."""
    fast, slow = learners(algorithm, run_of(algorithm, "gym:CartPole-v1", Mode.LOCAL, **GRU), 2)
    fast.collect(128)
    slow.collect(64)
    acted = slow._log_probs(slow._streams[0])
    update([fast])
    slow.import_state(fast.export_state(), keep_samples=True)
    np.testing.assert_array_equal(slow._streams[0].log_probs, acted)
    running = slow.update()
    next(running)
    assert slow.collect_ahead(lambda: slow.samples >= 128).samples == 64
    known = slow._streams[0].log_probs[-16:]
    assert np.isfinite(known).all()
    slow.abandon()
    slow.collect(64)
    (stats,), _ = update([slow])
    assert np.isfinite(list(stats.metrics.values())).all()


# --- learning --------------------------------------------------------------------------------------------------------


class Recall:
    """A task: one of two cues is shown once, and after a few steps of nothing the action has to be that one."""

    name = "test:recall"
    version = 1
    observation_space = Box(3)
    action_space = Discrete(2)
    target_return = None

    def __init__(self, folder: Path) -> None:
        self.failures = Failures(self.name)

    def make(self, num_envs: int) -> RecallEnv:
        return RecallEnv(num_envs)


class RecallEnv:
    """Its environments: a right last action earns 1."""

    delay = 4

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def reset(self, seeds: Any) -> Floats:
        self._rng = np.random.default_rng(seeds)
        self._cues = self._rng.integers(2, size=self.num_envs)
        self._step = 0
        return self._shown()

    def _shown(self) -> Floats:
        shown = np.zeros((self.num_envs, 3), np.float32)
        if self._step == 0:
            shown[np.arange(self.num_envs), self._cues] = 1
        shown[:, 2] = self._step == self.delay
        return shown

    def step(self, actions: Actions) -> Transition:
        is_last = self._step == self.delay
        rewards = np.where(is_last & (actions == self._cues), 1, 0).astype(np.float32)
        self._step = 0 if is_last else self._step + 1
        finals = dict(enumerate(self._shown())) if is_last else {}
        if is_last:
            self._cues = self._rng.integers(2, size=self.num_envs)
        terminated = np.full(self.num_envs, is_last)
        return Transition(self._shown(), rewards, terminated, np.zeros_like(terminated), finals)

    def close(self) -> None:
        pass


def recalled(algorithm: OnEngine[Any], epochs: int, **settings: Any) -> float:
    """The mean return of greedy episodes after so many updates; chance gives a half."""
    given = {"num_minibatches": 4, "update_epochs": 4, "learning_rate": 5e-3, "hidden_sizes": [16], "num_envs": 16}
    run = run_of(algorithm, "test:recall", Mode.LOCAL, **given | settings)
    alone = algorithm.learner(run, Recall(Path()), peer=PEERS[0])  # type: ignore[arg-type]
    best = 0.0
    for epoch in range(1, epochs + 1):
        alone.collect(640)
        update([alone])
        if epoch % 5 == 0:
            best = max(best, float(np.mean(alone.evaluate(32, seed=epoch))))
        if best == 1:
            break
    return best


@pytest.mark.parametrize("algorithm", ALL, ids=by_name)
def test_a_cue_is_recalled_by_who_remembers_alone(algorithm: OnEngine[Any]) -> None:
    assert recalled(algorithm, 60, **GRU | {"memory_size": 16}) == 1
    assert recalled(algorithm, 20) < 0.9


# --- where there is none ---------------------------------------------------------------------------------------------


def test_where_nobody_remembers_it_is_refused() -> None:
    def refused(algorithm: OnEngine[Any], task: str, mode: Mode, match: str, **settings: Any) -> None:
        run = Manifest(owner=PEERS[0], task=task, algorithm=algorithm.name, mode=mode, hyperparameters=settings)
        with pytest.raises(UsageError, match=match):
            algorithm.learner(run, load_task(task), peer=PEERS[0])

    refused(DQN(), "gym:CartPole-v1", Mode.LOCAL, "dqn has no hyperparameter 'memory'", memory="gru")
    refused(PPO(), "gym:CartPole-v1", Mode.ROLLOUTS, "leave memory out", memory="gru")
    refused(PPO(), "gym:CartPole-v1", Mode.LOCAL, "memory=none", memory="gru", network="nature")
    refused(PPO(), "gym:CartPole-v1", Mode.LOCAL, "none of none, gru", memory="lstm")
    run = Manifest(owner=PEERS[0], task="gym:CartPole-v1", algorithm="ppo", mode=Mode.ROLLOUTS, hyperparameters=GRU)
    with pytest.raises(UsageError, match="leave memory out"):
        PPO().actor_shape(run, load_task(run.task))
