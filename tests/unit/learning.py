"""Several learners in one process: every exchange is merged and given to all, as in a swarm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.protocol.ids import PeerId
from shoal.training.algorithms import Exchange, UpdateStats
from shoal.training.algorithms.engine import OnEngine, PolicyLearner
from shoal.training.exchange.averager import Arrays, Contribution, merge, validate
from shoal.training.manifest import Manifest, Mode
from shoal.training.tasks import load_task

PEERS = [PeerId.of_public_key(bytes([n]) * 32) for n in (1, 2, 3)]
SMALL = {"num_envs": 4, "update_epochs": 3, "num_minibatches": 6, "hidden_sizes": [16, 16]}


def run_of(
    algorithm: OnEngine[Any], task: str, mode: Mode, *, max_env_steps: int = 1_000_000, **settings: Any
) -> Manifest:
    """A small run."""
    return Manifest(
        owner=PEERS[0],
        task=task,
        algorithm=algorithm.name,
        hyperparameters=SMALL | settings,
        seed=7,
        mode=mode,
        max_env_steps=max_env_steps,
    )


def learners(algorithm: OnEngine[Any], run: Manifest, num_peers: int) -> list[PolicyLearner]:
    """Of a run."""
    return [algorithm.learner(run, load_task(run.task), peer=peer) for peer in PEERS[:num_peers]]


def update(peers: Sequence[PolicyLearner]) -> tuple[list[UpdateStats], int]:
    """One update by all; how it went, and how many exchanges it took."""
    updates = [peer.update() for peer in peers]
    exchanges: list[Exchange] = [next(each) for each in updates]
    count = 0
    while True:
        count += 1
        contributions = [
            Contribution(author, exchange.weight, exchange.arrays)
            for author, exchange in zip(PEERS, exchanges, strict=False)
            if exchange.weight
        ]
        for contribution in contributions:
            validate(contribution, exchanges[0].template)
            exchanges[0].check(contribution)
        merged = merge(contributions)
        sent, stats = [], []
        for each in updates:
            try:
                sent.append(each.send(merged))
            except StopIteration as stop:
                stats.append(stop.value)
        if stats:
            assert not sent, "all peers end with the same exchange"
            return stats, count
        exchanges = sent


def assert_close(first: Arrays, second: Arrays, tolerance: float) -> None:
    """Of the same names and nearly the same numbers."""
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=tolerance, atol=tolerance, err_msg=name)
