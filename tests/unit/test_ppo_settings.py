"""Settings of PPO that are off by default: each does what the papers say that used it, for one learner and for many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit import autograd
from tests.unit.learning import PEERS, assert_close, learners, run_of, update
from tests.unit.test_gradients import SPACES, a_batch, a_model
from tests.unit.test_gradients import assert_close as assert_gradient

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.ppo import PPO, Clipped
from shoal.training.algorithms.ppo_config import Over, PPOConfig
from shoal.training.algorithms.ppo_loss import ClippedLoss
from shoal.training.exchange.averager import Contribution
from shoal.training.manifest import Mode
from shoal.training.state import digest
from shoal.training.tasks import Continuous, Discrete, load_task

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=40, deadline=None)
@given(SPACES, st.integers(1, 40), st.floats(0.01, 2.0), st.integers(0, 2**32))
def test_the_gradient_with_clipped_values_is_autograds(
    space: Discrete | Continuous, size: int, most: float, seed: int
) -> None:
    model, config = a_model(space, seed=seed), PPOConfig(value_clip_range=most)
    batch = a_batch(model, size, seed)
    loss = ClippedLoss(model, config, size)
    assert_gradient(loss.gradient(batch), autograd.gradient(model, batch, config))
    expected = autograd.loss(autograd.leaves(model), batch, config)["value_loss"].item()
    assert loss.measures()["value_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_values_stop_where_they_are_clipped() -> None:
    model = a_model(Discrete(2))
    batch = a_batch(model, 50)
    values = model.values(batch.observations)
    far = replace(batch, returns=values + 5, values=values + 3)
    gradient = ClippedLoss(model, PPOConfig(value_clip_range=0.5), 50).gradient(far)
    critic = slice(sum(each.size for name, each in model.parameters.items() if name.startswith("actor")), None)
    assert np.abs(gradient[critic]).max() > 0  # kept near its old, a value would be nearer to its return
    passed = replace(batch, returns=values - 1, values=values - 3)
    held = ClippedLoss(model, PPOConfig(value_clip_range=0.5), 50).gradient(passed)
    assert np.abs(held[critic]).max() == 0


def test_advantages_normalised_over_the_minibatch_give_autograds_gradient() -> None:
    model, config = a_model(Continuous(2)), PPOConfig(normalize_advantages=Over.MINIBATCH)
    batch = a_batch(model, 64)
    wide = batch.advantages.astype(np.float64)
    normal = ((wide - wide.mean()) / (wide.std() + 1e-8)).astype(np.float32)
    normalized = replace(batch, advantages=normal)
    objective = Clipped(config, model)
    assert objective.with_moments(batch, objective.moments(batch)) is batch
    assert_gradient(objective.gradient(batch), autograd.gradient(model, normalized, config))
    # Of a single sample there is no deviation: it stays as it is.
    assert_gradient(objective.gradient(batch.part(0, 1)), autograd.gradient(model, batch.part(0, 1), config))


def test_advantages_may_stay_as_they_are() -> None:
    model, config = a_model(Discrete(3)), PPOConfig(normalize_advantages=Over.NOTHING)
    batch, objective = a_batch(model, 64), Clipped(PPOConfig(normalize_advantages=Over.NOTHING), model)
    assert objective.with_moments(batch, objective.moments(batch)) is batch
    assert_gradient(objective.gradient(batch), autograd.gradient(model, batch, config))


def test_the_clip_range_narrows_in_a_line() -> None:
    model = a_model(Discrete(3))
    batch = a_batch(model, 64)
    objective = Clipped(PPOConfig(clip_range=0.4, value_clip_range=1.0, anneal_clip_range=True), model)
    for progress in (0.0, 0.25, 0.9):
        objective.begin(progress)
        config = PPOConfig(clip_range=0.4 * (1 - progress), value_clip_range=1 - progress)
        assert_gradient(objective.gradient(batch), autograd.gradient(model, batch, config))
    objective.begin(1.0)
    assert np.isfinite(objective.gradient(batch)).all()


# --- annealing -------------------------------------------------------------------------------------------------------

ANNEALED = {"anneal_learning_rate": True, "anneal_clip_range": True}


@pytest.mark.parametrize("mode", list(Mode))
def test_the_learning_rate_falls_with_the_steps_that_all_have_taken(mode: Mode) -> None:
    run = run_of(PPO(), "gym:CartPole-v1", mode, max_env_steps=512, **ANNEALED)
    peers = learners(PPO(), run, 2)
    rate = peers[0].config.learning_rate
    for left in (1.0, 0.625, 0.25, 0.0, 0.0):
        before = peers[0].export_state()
        for peer, share in zip(peers, (128, 64), strict=True):
            peer.collect(share)
        update(peers)
        assert len({digest(peer.export_state()) for peer in peers}) == 1
        assert peers[0]._adam.learning_rate == pytest.approx(rate * left)
        after = peers[0].export_state()
        moved = any(not np.array_equal(after[name], before[name]) for name in after if name.startswith("parameters/"))
        assert moved == (left > 0 or mode is Mode.DILOCO)  # whose outer momentum carries on
    assert int(after["progress/env_steps"]) == 5 * 192


def test_annealed_learners_equal_one_process_with_the_joint_batch() -> None:
    run = run_of(PPO(), "gym:Pendulum-v1", Mode.GRADIENT, max_env_steps=2000, value_clip_range=0.2, **ANNEALED)
    peers = learners(PPO(), run, 2)
    alone = PPO().learner(run, load_task(run.task), peer=PEERS[0], streams=PEERS[:2])
    for _ in range(4):
        for peer in peers:
            peer.collect(128)
        alone.collect(256)
        update(peers)
        update([alone])
        assert_close(peers[0].policy_arrays(), alone.policy_arrays(), 1e-5)


def test_a_newcomer_knows_how_far_the_run_is() -> None:
    run = run_of(PPO(), "gym:CartPole-v1", Mode.LOCAL, max_env_steps=1000, **ANNEALED)
    first, newcomer = learners(PPO(), run, 2)
    first.collect(400)
    update([first])
    newcomer.import_state(first.export_state())
    for peer in (first, newcomer):
        peer.collect(64)
    update([first, newcomer])
    assert digest(first.export_state()) == digest(newcomer.export_state())
    assert newcomer._adam.learning_rate == pytest.approx(0.6 * newcomer.config.learning_rate)


def test_nobody_counts_more_samples_than_its_weight_says() -> None:
    (alone,) = learners(PPO(), run_of(PPO(), "gym:CartPole-v1", Mode.LOCAL, **ANNEALED), 1)
    alone.collect(64)
    made = next(alone.update())
    made.check(Contribution(PEERS[1], made.weight, made.arrays))
    forged = made.arrays | {"sum/samples": np.asarray(10**9)}
    with pytest.raises(ProtocolError, match="counts 1000000000 samples of 64"):
        made.check(Contribution(PEERS[1], made.weight, forged))


@pytest.mark.parametrize("steps", [-1, 2**60])
def test_a_state_from_beyond_the_run_is_refused(steps: int) -> None:
    (alone,) = learners(PPO(), run_of(PPO(), "gym:CartPole-v1", Mode.LOCAL, **ANNEALED), 1)
    with pytest.raises(ProtocolError, match="environment steps"):
        alone.import_state(alone.export_state() | {"progress/env_steps": np.asarray(steps, np.int64)})


def test_an_update_that_is_given_up_counts_nothing() -> None:
    (alone,) = learners(PPO(), run_of(PPO(), "gym:CartPole-v1", Mode.LOCAL, **ANNEALED), 1)
    alone.collect(64)
    update([alone])
    before = digest(alone.export_state())
    alone.collect(64)
    next(alone.update())
    alone.abandon()
    assert digest(alone.export_state()) == before


def test_without_annealing_nothing_is_counted() -> None:
    (alone,) = learners(PPO(), run_of(PPO(), "gym:CartPole-v1", Mode.LOCAL), 1)
    assert not any(name.startswith("progress/") for name in alone.export_state())


# --- the early stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.DILOCO])
def test_an_update_ends_when_the_policy_is_too_far_from_the_one_that_acted(mode: Mode) -> None:
    long = {"update_epochs": 20, "learning_rate": 1e-2}
    measured: dict[Any, dict[str, float]] = {}
    for target in (None, 1e-3, 1e3):
        peers = learners(PPO(), run_of(PPO(), "gym:CartPole-v1", mode, target_kl=target, **long), 2)
        for peer, share in zip(peers, (128, 256), strict=True):
            peer.collect(share)
        stats, exchanges = update(peers)
        assert exchanges == 1
        assert len({digest(peer.export_state()) for peer in peers}) == 1
        measured[target] = stats[0].metrics
    assert measured[None] == measured[1e3], "what is never reached changes nothing"
    stopped = measured[1e-3]
    assert 0 < stopped["steps_taken"] < 20 * 6
    assert stopped["approx_kl"] > 1.5e-3
    assert measured[None]["approx_kl"] > stopped["approx_kl"]


@pytest.mark.parametrize("setting", [{"target_kl": 0.01}, {"normalize_advantages": "minibatch"}])
def test_what_cannot_be_done_together_is_refused_in_mode_gradient(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="mode local or diloco"):
        learners(PPO(), run_of(PPO(), "gym:CartPole-v1", Mode.GRADIENT, **setting), 1)
