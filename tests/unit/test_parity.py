"""Peers that learn together learn what one process would.

Mode ``gradient``: N peers equal one process that owns all their streams, so has their joint batch. Mode ``local``: N
peers end each epoch with the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.unit.learning import PEERS, SMALL, assert_close, update

from shoal.training.algorithms.engine import PolicyLearner
from shoal.training.algorithms.extrapolation import MAX_FACTOR
from shoal.training.algorithms.ppo import PPO
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.exchange.outer import Outer
from shoal.training.manifest import Manifest, Mode
from shoal.training.state import digest, encode_arrays
from shoal.training.tasks import load_task


def manifest(task: str, mode: Mode, **settings: Any) -> Manifest:
    settings = SMALL | settings
    return Manifest(owner=PEERS[0], task=task, algorithm="ppo", hyperparameters=settings, seed=7, mode=mode)


def learners(run: Manifest, num_peers: int) -> list[PolicyLearner]:
    return [PPO().learner(run, load_task(run.task), peer=peer) for peer in PEERS[:num_peers]]


@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_averaged_gradients_equal_one_process_with_the_joint_batch(task: str, num_peers: int) -> None:
    run = manifest(task, Mode.GRADIENT)
    peers = learners(run, num_peers)
    alone = PPO().learner(run, load_task(task), peer=PEERS[0], streams=PEERS[:num_peers])
    start = alone.export_state()
    for _ in range(5):
        samples = sum(peer.collect(128).samples for peer in peers)
        assert alone.collect(128 * num_peers).samples == samples
        update(peers)
        update([alone])
        for peer in peers:
            assert digest(peer.export_state()) == digest(peers[0].export_state())
            assert_close(peer.policy_arrays(), alone.policy_arrays(), 1e-5)
    assert_close(peers[0].export_state(), alone.export_state(), 1e-4)
    moved = max(
        float(np.abs(array - start[name]).max())  # type: ignore[operator]
        for name, array in alone.export_state().items()
        if name.startswith("parameters/")
    )
    assert moved > 1e-2


def test_unequal_peers_count_by_their_samples() -> None:
    run = manifest("gym:CartPole-v1", Mode.GRADIENT)
    fast, slow = learners(run, 2)
    alone = PPO().learner(run, load_task(run.task), peer=PEERS[0], streams=PEERS[:2])
    fast_stream, slow_stream = alone._streams
    for _ in range(3):
        fast.collect(200)
        slow.collect(40)
        fast_stream.collect(200, alone._act)
        slow_stream.collect(40, alone._act)
        update([fast, slow])
        update([alone])
        assert_close(fast.policy_arrays(), alone.policy_arrays(), 1e-5)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_peers_end_with_the_same_bits_whatever_each_collected(task: str, mode: Mode) -> None:
    peers = learners(manifest(task, mode), 3)
    counts = set()
    for shares in ((64, 200, 8), (128, 0, 4), (0, 0, 64)):
        for peer, share in zip(peers, shares, strict=True):
            if share:
                peer.collect(share)
        stats, exchanges = update(peers)
        counts.add(exchanges)
        assert [each.samples for each in stats] == list(shares)
        assert [bool(each.metrics) for each in stats] == [share > 0 for share in shares]
        states = {encode_arrays(peer.export_state(), {}) for peer in peers}
        assert len(states) == 1
    assert counts == {1 + SMALL["update_epochs"] * SMALL["num_minibatches"] if mode is Mode.GRADIENT else 1}


@pytest.mark.parametrize("mode", list(Mode))
def test_an_update_without_any_samples_changes_nothing(mode: Mode) -> None:
    peers = learners(manifest("gym:Pendulum-v1", mode), 2)
    before = digest(peers[0].export_state())
    update(peers)
    assert {digest(peer.export_state()) for peer in peers} == {before}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_newcomer_that_takes_the_state_goes_on_with_the_same_bits(mode: Mode) -> None:
    run = manifest("gym:Pendulum-v1", mode)
    first, second, newcomer = learners(run, 3)
    for peer in (first, second):
        peer.collect(64)
    update([first, second])
    newcomer.collect(64)
    newcomer.import_state(second.export_state())
    assert digest(newcomer.export_state()) == digest(first.export_state())
    for peer in (first, second, newcomer):
        peer.collect(64)
    update([first, second, newcomer])
    assert len({digest(peer.export_state()) for peer in (first, second, newcomer)}) == 1


# --- mode diloco -----------------------------------------------------------------------------------------------------


def test_the_outer_state_of_two_learners_is_that_of_one_process_that_takes_their_average() -> None:
    """Epoch after epoch, bit for bit: parameters and outer momentum."""
    peers = learners(manifest("gym:CartPole-v1", Mode.DILOCO), 2)
    start = peers[0]._model.flat.copy()
    alone = Outer(start.size, max_gradient=1.0)
    for _ in range(3):
        updates = []
        for peer, share in zip(peers, (64, 32), strict=True):
            peer.collect(share)
            updates.append(peer.update())
        exchanges = [next(each) for each in updates]
        merged = merge(
            Contribution(author, exchange.weight, exchange.arrays)
            for author, exchange in zip(PEERS, exchanges, strict=False)
        )
        for each in updates:
            with pytest.raises(StopIteration):
                each.send(merged)
        alone.apply(start, merged["mean/delta"].astype(np.float32))
        for peer in peers:
            assert peer._model.flat.tobytes() == start.tobytes()
            assert peer.export_state()["outer/momentum"].tobytes() == alone.momentum.tobytes()
    assert np.abs(alone.momentum).max() > 0


def test_with_a_rate_of_one_and_no_momentum_diloco_goes_where_local_does_which_goes_further() -> None:
    local = learners(manifest("gym:Pendulum-v1", Mode.LOCAL), 2)
    settings = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    diloco = learners(manifest("gym:Pendulum-v1", Mode.DILOCO, **settings), 2)
    start = local[0]._model.flat.copy()
    for peers in (local, diloco):
        for peer, share in zip(peers, (64, 128), strict=True):
            peer.collect(share)
        update(peers)
    far, near = local[0]._model.flat - start, diloco[0]._model.flat - start
    factor = np.linalg.norm(far) / np.linalg.norm(near)  # local's average is stretched
    assert 1 < factor <= MAX_FACTOR
    assert np.abs(far - factor * near).max() < 1e-6


def test_adam_stays_with_its_peer_and_a_newcomer_begins_with_zeros() -> None:
    run = manifest("gym:Pendulum-v1", Mode.DILOCO)
    first, second, newcomer = learners(run, 3)
    for peer in (first, second):
        peer.collect(64)
    update([first, second])
    assert not any(name.startswith("adam/") for name in first.export_state())
    assert first._adam.step == second._adam.step > 0
    assert digest(first._inner_state()) != digest(second._inner_state())
    before = digest(first._inner_state())
    first.import_state(second.export_state())
    assert digest(first._inner_state()) == before
    newcomer.import_state(second.export_state())
    assert newcomer._adam.step == 0
    assert not newcomer._adam.first.any()
    for peer in (first, second, newcomer):
        peer.collect(64)
    update([first, second, newcomer])
    assert len({digest(peer.export_state()) for peer in (first, second, newcomer)}) == 1


def test_an_update_that_is_given_up_takes_adam_back_too() -> None:
    (alone,) = learners(manifest("gym:Pendulum-v1", Mode.DILOCO), 1)
    for _ in range(2):
        alone.collect(64)
        before = digest(alone._state() | alone._inner_state())
        next(alone.update())
        alone.abandon()
        assert digest(alone._state() | alone._inner_state()) == before
        alone.collect(64)
        update([alone])
