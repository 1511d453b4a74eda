"""An algorithm on a task in one process, alone and without a network: for tests, and for who writes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.protocol.ids import PeerId
from shoal.training.algorithms.base import Algorithm, Exchange
from shoal.training.exchange.averager import Contribution, merge
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
        update = learner.update()
        try:
            asked = next(update)
            while True:
                if not isinstance(asked, Exchange):
                    raise TypeError(f"{algorithm.name} asks a swarm for {asked}, and there is none here")
                asked = update.send(merge([Contribution(owner, asked.weight, asked.arrays)]))
        except StopIteration:
            pass
    return returns
