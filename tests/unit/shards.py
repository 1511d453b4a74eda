"""Actors, their policies and their shards, as tests of rollouts need them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.rollouts.acting import Acting, ActorShape, Words, copy_of
from shoal.training.rollouts.replaying import surroundings
from shoal.training.rollouts.rows import Rows
from shoal.training.rollouts.shard import Head, Shard, open_shard, seal
from shoal.training.rollouts.streams import RowStream
from shoal.training.tasks import Task, load_task
from shoal.training.tasks.base import ActionSpace

SWARM = SwarmId.of_manifest(b"a swarm")
ALICE = Signer(b"a" * 32)
BOB = Signer(b"b" * 32)
CAROL = Signer(b"c" * 32)
STATE = Cid.of_block(b"a policy")
HIDDEN = (64, 64)

_tasks: dict[str, Task] = {}
_surroundings: dict[str, bytes] = {}


def a_task(name: str = "gym:CartPole-v1") -> Task:
    if name not in _tasks:
        _tasks[name] = load_task(name)
        _surroundings[name] = surroundings(_tasks[name])
    return _tasks[name]


def here(name: str = "gym:CartPole-v1") -> bytes:
    a_task(name)
    return _surroundings[name]


def a_model(observation_size: int, space: ActionSpace, *, seed: int = 1, loud: float = 3.0) -> ActorCritic:
    """One whose actions depend on what it sees: at first, all are as likely."""
    model = ActorCritic(observation_size, space, HIDDEN, initial_log_std=-0.5, seed=seed)
    rng = np.random.default_rng(seed)
    model.flat += (loud * 0.1 * rng.standard_normal(model.flat.size)).astype(np.float32)
    return model


def policy_of(model: ActorCritic, observation_size: int) -> dict[str, npt.NDArray[Any]]:
    """As a learner gives it, with moments of observations."""
    found: dict[str, npt.NDArray[Any]] = {f"parameters/{name}": array for name, array in model.parameters.items()}
    found["moments/observation/count"] = np.array(100.0)
    found["moments/observation/mean"] = np.linspace(-0.1, 0.1, observation_size)
    found["moments/observation/m2"] = 100.0 * np.linspace(0.5, 2.0, observation_size)
    return found


def a_shape(task: Task, *, is_normalized: bool = True) -> ActorShape:
    return ActorShape(task.observation_space.size, task.action_space, HIDDEN, is_normalized)


def a_copy(task: Task, seed: int = 1) -> Words:
    model = a_model(task.observation_space.size, task.action_space, seed=seed)
    return copy_of(a_shape(task), policy_of(model, task.observation_space.size))


def an_actor(task: Task, seed: int = 1) -> Acting:
    return Acting(a_shape(task), a_copy(task, seed))


def a_stream(task: Task, signer: Signer = ALICE, *, num_envs: int = 2, **others: Any) -> RowStream:
    return RowStream(task, num_envs, author=signer.peer_id, swarm=SWARM, surroundings=here(task.name), **others)


def made(
    task: Task,
    signer: Signer = ALICE,
    *,
    steps: int = 50,
    acting: Acting | None = None,
    num_envs: int = 2,
    **others: Any,
) -> tuple[Head, Rows]:
    """What an honest actor is about to sign."""
    stream = a_stream(task, signer, num_envs=num_envs, **others)
    try:
        return stream.collect(acting or an_actor(task), 7, STATE, steps)
    finally:
        stream.close()


def signed(task: Task, head: Head, rows: Rows, signer: Signer = ALICE) -> Shard:
    """As whoever asked for it opens it."""
    cid, data = seal(signer, replace(head, samples=rows.samples), rows.columns(task.action_space))
    return open_shard(data, cid=cid, swarm=SWARM)


def a_shard(task: Task, signer: Signer = ALICE, **others: Any) -> Shard:
    head, rows = made(task, signer, **others)
    return signed(task, head, rows, signer)
