"""DQN and SAC: by the formulas of their papers, alone and together; replays and target networks that fail safely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.learning import PEERS, assert_close, learners, update
from torch.nn import functional

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.dqn import DQN, DQNObjective, DQNSettings
from shoal.training.algorithms.engine import OnEngine, PolicyLearner
from shoal.training.algorithms.off_policy import Minibatch, OffPolicy, OffPolicySettings, Targets
from shoal.training.algorithms.replay import Replay, Transitions
from shoal.training.algorithms.rollouts import Rollout
from shoal.training.algorithms.sac import SAC, SACObjective, SACSettings
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.q_network import QNetwork
from shoal.training.models.soft_actor import SoftActorCritics
from shoal.training.state import digest, encode_arrays
from shoal.training.tasks import load_task
from shoal.training.tasks.base import Floats

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"gradient_steps": 6, "minibatch_size": 16, "learning_starts": 64, "hidden_sizes": [16, 16], "num_envs": 4}
BOTH: list[tuple[OnEngine[Any], str]] = [(DQN(), "gym:CartPole-v1"), (SAC(), "gym:Pendulum-v1")]
EACH = pytest.mark.parametrize(("algorithm", "task"), BOTH, ids=["dqn", "sac"])


def run_of(algorithm: OnEngine[Any], task: str, mode: Mode = Mode.LOCAL, **changed: Any) -> Manifest:
    hyperparameters = SMALL | changed
    return Manifest(
        owner=PEERS[0], task=task, algorithm=algorithm.name, hyperparameters=hyperparameters, seed=7, mode=mode
    )


def collected(peers: list[PolicyLearner], *shares: int) -> None:
    for peer, share in zip(peers, shares, strict=True):
        if share:
            peer.collect(share)


def everything(peer: PolicyLearner) -> str:
    return digest(peer._state() | peer._inner_state())


def replays(peer: PolicyLearner) -> list[Replay]:
    objective = peer._objective
    assert isinstance(objective, OffPolicy)
    return objective._replays


# --- transitions -----------------------------------------------------------------------------------------------------


def a_rollout(rng: np.random.Generator, length: int, num_envs: int) -> Rollout:
    """Made-up steps: what is seen says where, as ``step, environment, 0``, and finals as ``step, environment, 1``."""
    shape = (length, num_envs)
    terminated = rng.random(shape) < 0.15
    truncated = (rng.random(shape) < 0.15) & ~terminated
    steps, envs = np.meshgrid(np.arange(length + 1), np.arange(num_envs), indexing="ij")
    shown = np.stack([steps, envs, 0 * steps], axis=2).astype(np.float32)
    finals = np.array([[step, env, 1] for step, env in np.argwhere(truncated)], np.float32).reshape(-1, 3)
    rewards = rng.normal(size=shape).astype(np.float32)
    actions = rng.integers(3, size=shape)
    return Rollout(shown, actions, rewards, terminated, truncated, rewards, finals)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 3), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32))
def test_transitions_are_those_of_the_definition_step_by_step(
    length: int, num_envs: int, num_steps: int, gamma: float, seed: int
) -> None:
    rollout = a_rollout(np.random.default_rng(seed), length, num_envs)
    made = Transitions.of(rollout, gamma=gamma, num_steps=num_steps)
    assert len(made) == length * num_envs
    for row, (step, env) in enumerate(np.ndindex(length, num_envs)):
        earned, weight, last = 0.0, 1.0, step
        for last in range(step, min(step + num_steps, length)):
            earned += weight * float(rollout.rewards[last, env])
            weight *= gamma
            if rollout.terminated[last, env] or rollout.truncated[last, env]:
                break
        assert made.rewards[row] == pytest.approx(earned, rel=1e-4, abs=1e-5)
        assert made.observations[row].tolist() == [step, env, 0]
        assert made.actions[row] == rollout.actions[step, env]
        if rollout.terminated[last, env]:
            assert made.discounts[row] == 0
        else:
            is_cut = bool(rollout.truncated[last, env])
            assert made.discounts[row] == pytest.approx(weight, rel=1e-4, abs=1e-30)
            assert made.following[row].tolist() == ([last, env, 1] if is_cut else [last + 1, env, 0])


# --- the replay ------------------------------------------------------------------------------------------------------


def numbered(first: int, count: int, kind: type[np.generic] = np.float32) -> Transitions:
    numbers = np.arange(first, first + count)
    images = np.broadcast_to(numbers[:, None, None], (count, 2, 3)).astype(kind)
    rest = numbers.astype(np.float32)
    return Transitions(images, numbers, rest, images, rest)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=12), st.integers(0, 2**32))
def test_a_replay_holds_the_newest_that_were_committed_and_what_is_staged(
    most: int, batches: list[tuple[int, bool]], seed: int
) -> None:
    replay, rng = Replay(max_steps=most, max_bytes=2**20), np.random.default_rng(seed)
    kept: list[int] = []
    first = 0
    for count, is_done in batches:
        staged = list(range(first, first + count))
        replay.stage(numbered(first, count))
        first += count
        if kept + staged:
            drawn = replay.draw(300, rng)
            assert set(drawn.actions.tolist()) <= {*kept, *staged}
            np.testing.assert_array_equal(drawn.observations[:, 1, 2], drawn.actions)
            np.testing.assert_array_equal(drawn.rewards, drawn.actions)
        if is_done:
            replay.commit()
            kept = (kept + staged)[-most:]
        else:
            replay.stage(numbered(0, 0))
        assert len(replay) == len(kept)
        if kept:
            assert set(replay.draw(60 * len(kept), rng).actions.tolist()) <= set(kept)


def test_a_replay_keeps_to_its_bytes_and_the_type_of_what_is_shown() -> None:
    one = sum(column.nbytes for column in numbered(0, 1, np.uint8).columns)
    replay = Replay(max_steps=10**9, max_bytes=10 * one)
    for first in range(0, 100, 5):
        replay.stage(numbered(first, 5, np.uint8))
        replay.commit()
        assert replay.num_bytes <= 15 * one
    assert len(replay) == 10
    drawn = replay.draw(500, np.random.default_rng(0))
    assert drawn.observations.dtype == np.uint8
    assert set(drawn.actions.tolist()) == set(range(90, 100))
    with pytest.raises(UsageError, match="less than one sample"):
        Replay(max_steps=10, max_bytes=one - 1).stage(numbered(0, 1, np.uint8))
    with pytest.raises(UsageError, match="nothing to draw"):
        Replay(max_steps=10, max_bytes=one).draw(1, np.random.default_rng(0))


# --- the gradients ---------------------------------------------------------------------------------------------------


def a_minibatch(rng: np.random.Generator, size: int, shown: int, actions: Any, num_noise: int) -> Minibatch:
    observations, following = rng.normal(size=(2, size, shown)).astype(np.float32)
    rewards, discounts = 3 * rng.normal(size=size), rng.random(size) * (rng.random(size) < 0.8)
    noise = rng.normal(size=(size, num_noise))
    rest = (each.astype(np.float32) for each in (rewards, discounts, noise))
    rewards, discounts, noise = rest
    return Minibatch(observations, actions, rewards, following, discounts, noise)


def through(parameters: dict[str, torch.Tensor], prefix: str, inputs: torch.Tensor, copy: int = 0) -> torch.Tensor:
    """What one of the networks makes of inputs."""
    count = sum(name.startswith(prefix) and name.endswith("weight") for name in parameters)
    for layer in range(count):
        inputs = inputs @ parameters[f"{prefix}/{layer}/weight"][copy] + parameters[f"{prefix}/{layer}/bias"][copy]
        inputs = inputs.relu() if layer < count - 1 else inputs
    return inputs


def leaves(parameters: dict[str, Floats]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(each, dtype=torch.float64, requires_grad=True) for name, each in parameters.items()}


def moved(objective: OffPolicy[Any], rng: np.random.Generator) -> None:
    """Parameters and targets that differ."""
    for each in (objective.model.flat, objective._targets.flat):
        each += rng.normal(0, 0.1, each.shape).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.booleans(), st.sampled_from([(), (8,), (8, 6)]), st.integers(0, 2**32))
def test_the_gradient_of_dqn_is_autograds(size: int, double: bool, hidden: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = QNetwork(4, 3, hidden, seed=1)
    objective = DQNObjective(DQNSettings(double=double), model)
    moved(objective, rng)
    batch = a_minibatch(rng, size, 4, rng.integers(3, size=size), 0)
    parameters, targets = leaves(model.parameters), leaves(model._arrays.views(objective._targets.flat))
    observations, following, rewards, discounts = (
        torch.tensor(each, dtype=torch.float64)
        for each in (batch.observations, batch.following, batch.rewards, batch.discounts)
    )
    with torch.no_grad():
        after = through(targets, "q", following)
        chosen = (through(parameters, "q", following) if double else after).argmax(dim=1, keepdim=True)
        wanted = rewards + discounts * after.gather(1, chosen)[:, 0]
    values = through(parameters, "q", observations).gather(1, torch.from_numpy(batch.actions)[:, None])[:, 0]
    loss = functional.huber_loss(values, wanted)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    made = objective.gradient(batch)
    np.testing.assert_allclose(made, np.concatenate([part.numpy().ravel() for part in expected]), rtol=1e-3, atol=1e-5)
    assert objective.measures()["value_loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([(), (8,), (8, 6)]), st.integers(0, 2**32))
def test_the_gradient_of_sac_is_autograds(size: int, count: int, hidden: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = SoftActorCritics(4, count, hidden, temperature=0.3, seed=1)
    objective = SACObjective(SACSettings(), model, count)
    moved(objective, rng)
    actions = rng.uniform(-1, 1, (size, count)).astype(np.float32)
    batch = a_minibatch(rng, size, 4, actions, objective.num_noise)
    parameters = leaves(model.parameters)
    targets = leaves(model._arrays.views(objective._targets.flat, "critics"))
    observations, following, rewards, discounts, noise, done = (
        torch.tensor(each, dtype=torch.float64) for each in (*_columns(batch), batch.actions)
    )

    def sample(shown: torch.Tensor, chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means, log_std = through(parameters, "actor", shown).chunk(2, dim=1)
        normal = torch.distributions.Normal(means, log_std.clamp(-20, 2).exp())
        u = means + log_std.clamp(-20, 2).exp() * chance
        return u.tanh(), (normal.log_prob(u) - torch.log1p(-u.tanh().square())).sum(dim=1)

    def values(of: dict[str, torch.Tensor], shown: torch.Tensor, acted: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([shown, acted], dim=1)
        return torch.stack([through(of, "critics", inputs, copy)[:, 0] for copy in range(2)])

    temperature = parameters["temperature/log"][0].exp().detach()
    with torch.no_grad():
        after, log_after = sample(following, noise[:, :count])
        worth = values(targets, following, after).amin(dim=0) - temperature * log_after
        wanted = rewards + discounts * worth
    critics = 0.5 * (values(parameters, observations, done) - wanted).square().mean(dim=1).sum()
    chosen, log_probs = sample(observations, noise[:, count:])
    frozen = {name: each.detach() for name, each in parameters.items()}
    actor = (temperature * log_probs - values(frozen, observations, chosen).amin(dim=0)).mean()
    tuned = -(log_probs.detach().mean() - count) * parameters["temperature/log"][0]
    expected = torch.autograd.grad(critics + actor + tuned, list(parameters.values()))
    made = objective.gradient(batch)
    flat = np.concatenate([part.numpy().ravel() for part in expected])
    np.testing.assert_allclose(made, flat, rtol=2e-3, atol=2e-5 * max(1.0, float(np.abs(flat).max())))
    measured = objective.measures()
    assert measured["value_loss"] == pytest.approx(critics.item(), rel=1e-3)
    assert measured["policy_loss"] == pytest.approx(actor.item(), rel=1e-3, abs=1e-3)
    assert measured["entropy"] == pytest.approx(-log_probs.mean().item(), rel=1e-3, abs=1e-3)


def _columns(batch: Minibatch) -> tuple[Floats, ...]:
    return batch.observations, batch.following, batch.rewards, batch.discounts, batch.noise


def test_actions_of_sac_are_within_their_range_and_their_log_probabilities_finite_at_its_ends() -> None:
    model = SoftActorCritics(3, 2, (8,), temperature=0.2, seed=0)
    model.is_exploring = False
    many = 100 * np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    actions = model.act(many, np.random.default_rng(1))
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    sampled = model.sample(np.array([[80, -80, 0, 0]], np.float32), np.zeros((1, 2), np.float32))
    assert np.isfinite(sampled.log_probs).all()


# --- target networks -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1), st.integers(1, 5), st.integers(0, 40))
def test_targets_are_put_where_as_many_steps_lead(tau: float, interval: int, num_steps: int) -> None:
    online = np.array([1.0, -2.0, 3.0], np.float32)
    config = OffPolicySettings(target_tau=tau, target_interval=interval)
    stepping, settled = Targets(online, config), Targets(online, config)
    online[:] = [4.0, 4.0, -4.0]
    for each in (stepping, settled):
        each.begin()
    for _ in range(num_steps):
        stepping.stepped()
    settled.stepped()  # whatever it did on its own
    settled.settle(num_steps)
    np.testing.assert_allclose(stepping.flat, settled.flat, rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("mode", list(Mode))
def test_targets_are_no_more_bytes_on_the_wire_and_part_of_the_state(
    algorithm: OnEngine[Any], task: str, mode: Mode
) -> None:
    (alone,) = learners(algorithm, run_of(algorithm, task, mode), 1)
    alone.collect(64)
    sent = next(alone.update())
    assert not any("target" in name for name in sent.template)
    alone.abandon()
    state = alone.export_state()
    assert "objective/targets" in state
    assert "objective/targets" not in alone.policy_arrays()


# --- alone and together ----------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("changed", [{}, {"n_steps": 3, "normalize_observations": True, "normalize_returns": True}])
def test_averaged_gradients_equal_one_process_with_the_streams_of_all(
    algorithm: OnEngine[Any], task: str, num_peers: int, changed: dict[str, Any]
) -> None:
    run = run_of(algorithm, task, Mode.GRADIENT, **changed)
    peers = learners(algorithm, run, num_peers)
    alone = algorithm.learner(run, load_task(task), peer=PEERS[0], streams=PEERS[:num_peers])
    start = alone._model.flat.copy()
    for _ in range(6):
        for peer in peers:
            peer.collect(64)
        alone.collect(64 * num_peers)
        update(peers)
        update([alone])
        assert len({digest(peer.export_state()) for peer in peers}) == 1
        assert_close(peers[0].policy_arrays(), alone.policy_arrays(), 1e-5)
    for name in ("objective/targets", "progress/env_steps"):
        np.testing.assert_allclose(peers[0].export_state()[name], alone.export_state()[name], rtol=1e-5, atol=1e-5)
    assert np.abs(alone._model.flat - start).max() > 1e-3


@EACH
def test_who_brings_nothing_draws_nothing(algorithm: OnEngine[Any], task: str) -> None:
    """So a process with the streams of two does not draw from one that nothing came of."""
    run = run_of(algorithm, task, Mode.GRADIENT)
    peers = learners(algorithm, run, 2)
    alone = algorithm.learner(run, load_task(task), peer=PEERS[0], streams=PEERS[:2])
    for shares in ((64, 64), (64, 0), (0, 40)):
        collected(peers, *shares)
        for stream, share in zip(alone._streams, shares, strict=True):
            if share:
                stream.collect(share, alone._act)
        update(peers)
        update([alone])
        assert_close(peers[0].policy_arrays(), alone.policy_arrays(), 1e-5)


@EACH
@pytest.mark.parametrize("mode", list(Mode))
def test_peers_end_with_the_same_bits_whatever_each_collected(algorithm: OnEngine[Any], task: str, mode: Mode) -> None:
    peers = learners(algorithm, run_of(algorithm, task, mode), 3)
    counts = []
    for shares in ((64, 200, 8), (128, 0, 4), (0, 0, 64)):
        collected(peers, *shares)
        stats, exchanges = update(peers)
        counts.append(exchanges)
        assert [bool(each.metrics) for each in stats] == [share > 0 for share in shares]
        assert len({encode_arrays(peer.export_state(), {}) for peer in peers}) == 1
    assert counts == ([1, 7, 7] if mode is Mode.GRADIENT else [1, 1, 1]), "the first update has no steps"


@EACH
@pytest.mark.parametrize("mode", list(Mode))
def test_before_learning_starts_nothing_is_stepped_and_everything_is_kept(
    algorithm: OnEngine[Any], task: str, mode: Mode
) -> None:
    peers = learners(algorithm, run_of(algorithm, task, mode, learning_starts=200), 2)
    start = peers[0]._model.flat.copy()
    for number in range(4):
        collected(peers, 64, 32)
        (stats, _), _ = update(peers)
        assert stats.steps == (0 if number < 3 else 6)  # 0, 96 and 192 had been taken
        assert np.array_equal(peers[0]._model.flat, start) == (number < 3)
        assert peers[0]._adam.step == (0 if number < 3 else 6)
    assert [len(replay) for peer in peers for replay in replays(peer)] == [4 * 64, 4 * 32]


@EACH
@pytest.mark.parametrize("mode", list(Mode))
def test_an_update_that_is_given_up_or_fails_leaves_no_trace(algorithm: OnEngine[Any], task: str, mode: Mode) -> None:
    (alone,) = learners(algorithm, run_of(algorithm, task, mode), 1)
    for _ in range(2):
        alone.collect(64)
        update([alone])
    before, held = everything(alone), [len(replay) for replay in replays(alone)]
    alone.collect(64)
    running = alone.update()
    exchange = next(running)
    if mode is Mode.GRADIENT:
        for _ in range(4):
            exchange = running.send(dict(exchange.arrays))
    running.close()
    assert everything(alone) == before
    running = alone.update()
    merged = merge([Contribution(PEERS[0], 1.0, next(running).arrays)])
    del merged[min(merged)]
    with pytest.raises(ProtocolError):
        running.send(merged)
    assert everything(alone) == before
    assert [len(replay) for replay in replays(alone)] == held
    assert alone.samples == 64
    update([alone])
    assert [len(replay) for replay in replays(alone)] == [held[0] + 64]


@EACH
def test_what_was_dropped_is_not_kept_by_a_later_update(algorithm: OnEngine[Any], task: str) -> None:
    peers = learners(algorithm, run_of(algorithm, task), 2)
    collected(peers, 64, 64)
    update(peers)
    peers[0].collect(64)
    next(peers[0].update())
    peers[0].abandon()
    collected(peers, 0, 64)
    update(peers)
    assert [len(replay) for peer in peers for replay in replays(peer)] == [64, 128]


@EACH
def test_what_another_policy_made_is_learned_from_and_counts(algorithm: OnEngine[Any], task: str) -> None:
    """Kept samples, and those of an update that waits."""
    fast, slow = learners(algorithm, run_of(algorithm, task), 2)
    for _ in range(2):
        fast.collect(128)
        slow.collect(64)
        update([fast])
        slow.import_state(fast.export_state(), keep_samples=True)
        assert slow.samples == 64
        update([slow])
    assert [len(replay) for replay in replays(slow)] == [128]
    slow.collect(64)
    running = slow.update()
    exchange = next(running)
    ahead = slow.collect_ahead(lambda: slow.samples >= 64 + 32)
    assert ahead.samples == 32
    with pytest.raises(StopIteration):
        running.send(dict(exchange.arrays))
    assert slow.samples == 32
    update([slow])
    assert [len(replay) for replay in replays(slow)] == [128 + 64 + 32]


@EACH
@pytest.mark.parametrize("mode", list(Mode))
def test_a_newcomer_that_takes_the_state_goes_on_with_the_same_bits(
    algorithm: OnEngine[Any], task: str, mode: Mode
) -> None:
    first, second, newcomer = learners(algorithm, run_of(algorithm, task, mode), 3)
    for _ in range(2):
        collected([first, second], 64, 64)
        update([first, second])
    newcomer.import_state(second.export_state())
    collected([first, second, newcomer], 64, 64, 64)
    (_, _, stats), _ = update([first, second, newcomer])
    assert stats.steps == 6
    assert len({digest(peer.export_state()) for peer in (first, second, newcomer)}) == 1


@EACH
@pytest.mark.parametrize("damage", [np.float32(2e9), np.float32(np.nan), None, "shape"])
def test_a_state_with_impossible_targets_is_refused(algorithm: OnEngine[Any], task: str, damage: Any) -> None:
    (alone,) = learners(algorithm, run_of(algorithm, task), 1)
    alone.collect(64)
    update([alone])
    state, before = alone.export_state(), everything(alone)
    targets = state.pop("objective/targets")
    if damage == "shape":
        state["objective/targets"] = targets[:-1]
    elif damage is not None:
        state["objective/targets"] = np.full_like(targets, damage)
    with pytest.raises(ProtocolError):
        alone.import_state(state)
    assert everything(alone) == before


# --- exploration -----------------------------------------------------------------------------------------------------


def test_chance_fades_with_the_steps_that_all_have_taken() -> None:
    run = run_of(DQN(), "gym:CartPole-v1", epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=400, learning_starts=0)
    peers = learners(DQN(), run, 2)
    for expected in (0.9, 0.7, 0.5, 0.3, 0.1, 0.1):
        assert [peer._model.epsilon for peer in peers] == pytest.approx([expected] * 2)
        collected(peers, 64, 36)
        update(peers)
    newcomer = learners(DQN(), run, 3)[2]
    newcomer.import_state(peers[0].export_state())
    assert newcomer._model.epsilon == pytest.approx(0.1)


def test_dqn_acts_by_chance_as_often_as_it_is_to() -> None:
    model = QNetwork(4, 5, (8,), seed=0)
    many = np.repeat(np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32), 20_000, axis=0)
    best = model.act_greedily(many[:1])[0]
    model.epsilon = 0.4
    frequencies = np.bincount(model.act(many, np.random.default_rng(1)), minlength=5) / len(many)
    expected = np.full(5, 0.4 / 5)
    expected[best] += 0.6
    np.testing.assert_allclose(frequencies, expected, atol=0.02)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_follow_the_batch_and_what_cannot_be_is_refused() -> None:
    task = load_task("gym:CartPole-v1")
    run = Manifest(owner=PEERS[0], task=task.name, algorithm="dqn", batch_per_learner=300)
    assert DQN().configured(run, task).num_steps == 300
    swinging = load_task("gym:Pendulum-v1")
    run = Manifest(owner=PEERS[0], task=swinging.name, algorithm="sac", batch_per_learner=300)
    config = SAC().configured(run, swinging)
    assert (config.normalize_observations, config.normalize_returns, config.num_steps) == (False, False, 300)
    for algorithm, wrong in ((DQN(), swinging), (SAC(), task)):
        with pytest.raises(UsageError, match="take "):
            algorithm.learner(run_of(algorithm, wrong.name), wrong, peer=PEERS[0])
    with pytest.raises(UsageError, match="never do"):
        DQN().learner(run_of(DQN(), task.name, target_interval=7), task, peer=PEERS[0])


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_it_is_found_by_name(name: str) -> None:
    algorithm = load_algorithm(name)
    assert (algorithm.name, algorithm.version) == (name, 1)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "task", "threshold", "most"),
    [(DQN(), "gym:CartPole-v1", 300.0, 40_000), (SAC(), "gym:Pendulum-v1", -250.0, 12_000)],
    ids=["dqn", "sac"],
)
def test_it_learns_its_task(algorithm: OnEngine[Any], task: str, threshold: float, most: int) -> None:
    run = Manifest(owner=PEERS[0], task=task, algorithm=algorithm.name, batch_per_learner=256)
    (alone,) = learners(algorithm, run, 1)
    assert float(np.mean(alone.evaluate(10, seed=1))) < threshold
    steps, best = 0, -np.inf
    while best < threshold and steps < most:
        for _ in range(4):
            steps += alone.collect(256).samples
            (stats,), _ = update([alone])
            assert np.isfinite(list(stats.metrics.values())).all()
        best = max(best, float(np.mean(alone.evaluate(10, seed=steps))))
    assert best >= threshold
