"""The average of several learners goes as far as one of them, in the same bits everywhere, and one learner is alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.algorithms.engine import PolicyLearner
from shoal.training.algorithms.extrapolation import MAX_FACTOR, extrapolate, travel
from shoal.training.algorithms.ppo import PPO
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.manifest import Manifest
from shoal.training.state import digest
from shoal.training.tasks import load_task
from shoal.training.tasks.base import Floats

PEERS = tuple(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 5))


def vectors(count: int, *, signal: float, noise: float, size: int = 4000) -> tuple[Floats, list[Floats]]:
    """A start, and where learners got to from it."""
    rng = np.random.default_rng(0)
    start, way = rng.normal(size=(2, size))
    ends = [start + signal * way + noise * rng.normal(size=size) for _ in range(count)]
    return start.astype(np.float32), [end.astype(np.float32) for end in ends]


def outcome(start: Floats, ends: list[Floats]) -> tuple[Floats, float]:
    """What is made of ends of equal weight, and how many times as far from the start as their average it is."""
    average: Floats = np.stack(ends).mean(axis=0, dtype=np.float64).astype(np.float32)
    result = extrapolate(start, average, float(np.mean([travel(start, end) for end in ends])))
    return result, math.sqrt(travel(start, result) / travel(start, average))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_of_nothing_but_noise_the_average_is_stretched_by_the_root_of_their_number(count: int) -> None:
    start, ends = vectors(count, signal=0.0, noise=1e-3)
    result, factor = outcome(start, ends)
    assert factor == pytest.approx(math.sqrt(count), rel=0.05)
    assert travel(start, result) == pytest.approx(np.mean([travel(start, end) for end in ends]), rel=1e-3)


def test_learners_that_agree_are_averaged_and_no_more() -> None:
    start, ends = vectors(4, signal=1e-2, noise=1e-5)
    assert outcome(start, ends)[1] == pytest.approx(1.0, abs=1e-3)


def test_where_learners_cancel_each_other_what_is_left_is_not_blown_up() -> None:
    start, (end, *_) = vectors(1, signal=1e-2, noise=0.0)
    other = (start - 0.99 * (end - start)).astype(np.float32)
    assert outcome(start, [end, other])[1] == pytest.approx(MAX_FACTOR, rel=1e-2)
    assert np.array_equal(extrapolate(start, start, 1.0), start)


def learners(count: int) -> list[PolicyLearner]:
    task = load_task("gym:Pendulum-v1")
    run = Manifest(owner=PEERS[0], task="gym:Pendulum-v1", algorithm="ppo", hyperparameters={"update_epochs": 2})
    return [PPO().learner(run, task, peer=peer) for peer in PEERS[:count]]


def test_one_learner_goes_on_from_the_very_parameters_that_it_made() -> None:
    (alone,) = learners(1)
    alone.collect(256)
    update = alone.update()
    made = next(update)
    with pytest.raises(StopIteration):
        update.send(merge([Contribution(PEERS[0], made.weight, made.arrays)]))
    assert np.array_equal(alone._model.flat, made.arrays["mean/parameters"])


def test_several_of_unequal_weight_end_with_the_same_bits_as_far_as_one_went() -> None:
    several = learners(3)
    start = several[0]._model.flat.copy()
    for each, steps in zip(several, (64, 256, 512), strict=True):
        each.collect(steps)
    updates = [each.update() for each in several]
    exchanges = [next(update) for update in updates]
    merged = merge(Contribution(peer, each.weight, each.arrays) for peer, each in zip(PEERS, exchanges, strict=False))
    for update in updates:
        with pytest.raises(StopIteration):
            update.send(merged)
    assert len({digest(each.export_state()) for each in several}) == 1
    assert travel(start, several[0]._model.flat) == pytest.approx(float(merged["mean/travel"]), rel=1e-3)
    assert travel(start, several[0]._model.flat) > 1.1 * travel(start, merged["mean/parameters"].astype(np.float32))


@pytest.mark.parametrize("times", [0.0, 0.5, 2.0, 1e20])
def test_nobody_claims_to_have_travelled_further_or_less_far_than_its_parameters_did(times: float) -> None:
    (one,) = learners(1)
    one.collect(64)
    made = next(one.update())
    made.check(Contribution(PEERS[1], made.weight, made.arrays))
    forged = made.arrays | {"mean/travel": np.asarray(times * float(made.arrays["mean/travel"]))}
    with pytest.raises(ProtocolError, match="travelled"):
        made.check(Contribution(PEERS[1], made.weight, forged))
