"""What PPO makes of samples that earlier policies made."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.learning import PEERS, SMALL, update

from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.engine import PolicyLearner
from shoal.training.algorithms.ppo import PPO
from shoal.training.algorithms.ppo_config import Correction
from shoal.training.manifest import Manifest, Mode
from shoal.training.state import digest
from shoal.training.tasks import load_task

TASK = "gym:CartPole-v1"


def a_learner(mode: Mode, **settings: object) -> PolicyLearner:
    run = Manifest(owner=PEERS[0], task=TASK, algorithm="ppo", hyperparameters=SMALL | settings, seed=7, mode=mode)
    return PPO().learner(run, load_task(TASK), peer=PEERS[0])


def batch_of(learner: PolicyLearner) -> object:
    learner._sources[:] = [*learner._streams, *learner._pool.use()]
    return learner._batch()


def test_old_samples_are_corrected_for_where_they_are_many_and_nowhere_else_unless_one_says_so() -> None:
    chosen = {mode: a_learner(mode).config.correction for mode in Mode}
    assert chosen.pop(Mode.ROLLOUTS) is Correction.DECOUPLED
    assert set(chosen.values()) == {Correction.NONE}
    assert a_learner(Mode.ROLLOUTS, correction="none").config.correction is Correction.NONE
    assert load_algorithm("ppo").version == 5, "what a run of mode rollouts leads to has changed"


def test_an_update_from_the_newest_policys_samples_alone_is_ppos_bit_for_bit() -> None:
    states = set()
    for correction in ("none", "decoupled"):
        learner = a_learner(Mode.ROLLOUTS, correction=correction)
        for _ in range(3):
            learner.collect(128)
            update([learner])
        states.add(digest(learner.export_state()))
    assert len(states) == 1


def test_a_batch_knows_how_old_each_sample_is_and_what_the_present_policy_makes_of_it() -> None:
    learner, other = (a_learner(Mode.ROLLOUTS) for _ in range(2))
    learner.holds(7, oldest=2)
    for version in (7, 4):
        other.collect(40)
        stream = other._streams[0]
        rollout = stream.rollout()
        acted = np.full_like(rollout.rewards, -0.5 * version)
        learner.admit(PEERS[1], rollout, acted, version)
    learner.collect(20)
    batch = batch_of(learner)
    own = learner._streams[0].samples
    assert batch.ages[:own].tolist() == [0] * own
    assert batch.log_probs[:own].tobytes() == batch.proximal[:own].tobytes()
    foreign = batch.ages[own:]
    assert sorted(set(foreign.tolist())) == [0, 3]
    assert set(batch.log_probs[own:][foreign == 3]) == {-2.0}
    judged = learner._model.judge(batch.observations, batch.actions)[0]
    assert batch.proximal == pytest.approx(judged, abs=1e-6)


def test_what_is_too_old_is_dropped_and_what_is_left_is_older_with_every_policy() -> None:
    learner, other = (a_learner(Mode.ROLLOUTS) for _ in range(2))
    other.collect(40)
    rollout = other._streams[0].rollout()
    for version in (1, 2):
        learner.admit(PEERS[1], rollout, np.zeros_like(rollout.rewards), version)
    ages = []
    for version in (3, 4):
        dropped = learner.holds(version, oldest=version - 2)
        ages.append((dropped, [each.age for each in learner._pool.use()]))
    assert ages == [(0, [1, 2]), (rollout.samples, [2])]
