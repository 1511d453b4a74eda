"""Learning in one process, alone or several at once, without a network: to measure, and for who writes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.protocol.ids import PeerId
from shoal.training.algorithms.base import Algorithm, Exchange, Learner, UpdateStats
from shoal.training.exchange.averager import Arrays, Contribution, merge
from shoal.training.manifest import Manifest
from shoal.training.tasks import load_task


def learn_locally(
    algorithm: Algorithm,
    task: str,
    updates: int,
    *,
    batch: int = 2048,
    seed: int = 0,
    env: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[tuple[float, ...]]:
    """Make so many updates.

    Args:
        algorithm: how.
        task: what, ``gym:CartPole-v1``.
        updates: how many.
        batch: environment steps of each.
        seed: of the run.
        env: what environments are made with.
        settings: of the algorithm, where they differ from its defaults.

    Returns:
        For each update, the undiscounted returns of the episodes that ended while its samples were collected.

    Raises:
        UsageError: if there is no such task, or no such setting.
        TaskFailedError: if its environments fail.
    """
    owner = PeerId.of_public_key(bytes(32))
    manifest = Manifest(
        owner=owner,
        task=task,
        algorithm=algorithm.name,
        seed=seed,
        batch_size=batch,
        hyperparameters=settings,
        env_arguments=dict(env or {}),
    )
    learner = algorithm.learner(manifest, load_task(task, env), peer=owner)
    returns = []
    for _ in range(updates):
        returns.append(learner.collect(batch).episode_returns)
        update_together({owner: learner})
    return returns


def update_together(learners: Mapping[PeerId, Learner]) -> list[UpdateStats]:
    """One update of each, all at once; what they exchange is merged as in a swarm that averages.

    Args:
        learners: of one run, by peer; at least one. Each has collected what it updates from.

    Returns:
        How it went for each, in their order.

    Raises:
        TypeError: if one asks a swarm for more than averages.
        ValueError: if some need more exchanges than others.
    """
    updates = [learner.update() for learner in learners.values()]
    merged: Arrays | None = None  # what a generator is begun with
    while True:
        contributions, stats = [], []
        for peer, update in zip(learners, updates, strict=True):
            try:
                asked = update.send(merged)
            except StopIteration as stop:
                stats.append(stop.value)
                continue
            if not isinstance(asked, Exchange):
                raise TypeError(f"an update asks a swarm for {asked}, and there is none here")
            contributions.append(Contribution(peer, asked.weight, asked.arrays))
        if not contributions:
            return stats
        if stats:
            raise ValueError("these learners need unlike numbers of exchanges; give those of one run")
        merged = merge(contributions)
