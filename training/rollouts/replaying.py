"""The same experience again, from seeds and acts; and whether an environment can be had again at all.

Environments on one machine that are reset from one seed and act alike show and earn the same bits, or their shards
cannot be checked: `is_deterministic` finds those that do not. On two machines, or under two versions of a task, sines
may differ in their last bit, and a chaotic body then goes elsewhere. Whether that is so is known beforehand: a short
rollout is hashed (`surroundings`), the hash is part of each shard's head, and only those whose hash is the same hold
each other to exactness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ShoalError
from shoal.training import watch
from shoal.training.models.seen import as_vectors
from shoal.training.rollouts.acting import acted_in
from shoal.training.rollouts.rows import Rows
from shoal.training.rollouts.shard import PRINT_BYTES
from shoal.training.rollouts.takes import PlayOf
from shoal.training.tasks import Task, Transition, VectorEnv
from shoal.training.tasks.base import Actions, ActionSpace, Discrete, Floats, Following, Observations
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.failures import TaskFailedError
from shoal.training.tasks.play import BadActError, BadScenarioError, Game
from shoal.training.tasks.playing import Played, Playing

MakeEnv = Callable[[int], VectorEnv]
"""Makes so many environments that step together, as `Task.make` does."""

_TRIED_STEPS: Final = 256
_PRINT_STEPS: Final = 64
_PRINT_ENVS: Final = 2
_PRINT_SEED: Final = 20_261_127
_SOMEBODY: Final = Learned("replayed")


class CannotReplayError(ShoalError):
    """An environment or a game failed while it was replayed: nothing is known of the shard."""


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """What environments showed and earned this time, T steps of N.

    Attributes:
        sights: ``[T + 1, N, observation_size]``.
        rewards: ``[T, N]``.
        terminated: ``[T, N]``.
        truncated: ``[T, N]``.
        finals: ``[K, observation_size]``, in the order of ``truncated``.
    """

    sights: Floats
    rewards: Floats
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    finals: Floats


def replay(rows: Rows, make_env: MakeEnv, *, until: int | None = None) -> Replayed:
    """Step environments as a shard's author says it did.

    Args:
        rows: that it signed.
        make_env: makes environments of the task.
        until: how many steps, after the lead; None: all.

    Raises:
        CannotReplayError: if an environment failed here.
    """
    steps = rows.steps if until is None else min(until, rows.steps)
    env = make_env(rows.num_envs)
    try:
        shown = env.reset(rows.seeds.tolist())
        lead = rows.lead
        if isinstance(env, Following) and len(lead):
            env.follow(lead[:-1])
            lead = lead[-1:]
        for acts in lead:
            shown = _step(env, acts).observations
        return _collected(env, shown, (rows.actions[index] for index in range(steps)))
    except TaskFailedError as error:
        raise CannotReplayError("an environment failed while a shard was replayed; see the task's failures") from error
    finally:
        env.close()


def with_sights(rows: Rows, make_env: MakeEnv) -> Rows:
    """A shard's rows with what was shown, replayed if they are without.

    Raises:
        CannotReplayError: if an environment failed here.
    """
    if rows.sights is not None:
        return rows
    again = replay(rows, make_env)
    return rows.replace_sights(again.sights, again.finals)


@dataclass(frozen=True, slots=True, eq=False)
class Again:
    """A play of a shard, played once more.

    Attributes:
        played: what came of it.
        limits: by role, of each of its asks, the most that a language model should say (`Ask.max_tokens`).
    """

    played: Played
    limits: Mapping[str, Sequence[int | None]]


def again(game: Game, play: PlayOf) -> Again:
    """A play of a shard once more, from its scenario and from what each of its roles did.

    Raises:
        BadScenarioError: if these acts do not fit this scenario of this game.
        BadPlayError: if the game yields what it may not; what else it raises comes through.
    """
    left = {part.take.role: iter(part.take.acts) for part in play.parts}
    total = sum(len(part.take) for part in play.parts)
    seats = dict.fromkeys(game.roles, _SOMEBODY)
    playing = Playing(game, play.scenario, seats, max_turns=len(play.scenario.acts) + total + 2)
    limits: dict[str, list[int | None]] = {role: [] for role in game.roles}
    used = 0
    try:
        playing.begin()
        goes_on = True
        while goes_on and used < total:
            answers = []
            for position, ask in enumerate(playing.asks):
                act = next(left.get(ask.role, iter(())), None)
                if act is None:
                    raise BadScenarioError(f"turn {playing.turns} asks {ask.role[:80]!r}, which has no act for it")
                try:
                    answers.append(playing.answer(position, act))
                except BadActError as error:
                    raise BadScenarioError(f"turn {playing.turns}: {error}") from error
                limits[ask.role].append(ask.max_tokens)
            used += len(answers)
            watch.page[2] += 1
            goes_on = playing.resume(answers)
        if goes_on:
            playing.cut()
    finally:
        playing.close()
    if playing.played is None or used < total:
        raise BadScenarioError(f"the play ends after {used} of {total} acts; they are of another")
    return Again(playing.played, limits)


def is_deterministic(make_env: MakeEnv, space: ActionSpace, *, seed: int = 0, steps: int = _TRIED_STEPS) -> bool:
    """Whether environments can be had again from their seeds; see `nondeterminism`."""
    return not nondeterminism(make_env, space, seed=seed, steps=steps)


def nondeterminism(make_env: MakeEnv, space: ActionSpace, *, seed: int = 0, steps: int = _TRIED_STEPS) -> str:
    """Where environments of one seed and the same acts went apart, in words; empty: nowhere.

    Tried are new environments, new ones beside others, and used ones that are reset: what is kept from episode to
    episode, shared by environments, or drawn from a global generator or a clock, shows in one of the three.

    Args:
        make_env: makes environments of the task.
        space: how they act.
        seed: of everything.
        steps: of each try.

    Raises:
        CannotReplayError: if an environment failed.
    """
    acts = list(_any_acts(space, 1, steps, np.random.default_rng(seed)))
    first = make_env(1)
    try:
        known = _collected(first, first.reset([seed]), iter(acts))
        for words, tried in (
            ("a second new environment", _beside(make_env, seed, acts)),
            ("the same environment, reset,", _collected(first, first.reset([seed]), iter(acts))),
        ):
            place = _difference(known, tried)
            if place:
                return f"{words} {place}"
    finally:
        first.close()
    return ""


def surroundings(task: Task) -> bytes:
    """A hash of what the task shows here, by its version, its libraries and this machine's arithmetic.

    Raises:
        CannotReplayError: if an environment failed.
    """
    env = task.make(_PRINT_ENVS)
    try:
        shown = env.reset([_PRINT_SEED + index for index in range(_PRINT_ENVS)])
        acts = _any_acts(
            task.action_space, _PRINT_ENVS, _PRINT_STEPS, np.random.Generator(np.random.PCG64(_PRINT_SEED))
        )
        found = _collected(env, shown, acts)
    finally:
        env.close()
    hasher = hashlib.sha256(f"{task.name}\n{task.version}\n".encode())
    for array in (found.sights, found.rewards, found.terminated, found.truncated, found.finals):
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.digest()[:PRINT_BYTES]


def _beside(make_env: MakeEnv, seed: int, acts: list[Actions]) -> Replayed:
    """The same beside an environment of another seed."""
    env = make_env(2)
    try:
        shown = env.reset([seed + 1, seed])
        both = _collected(env, shown, (np.concatenate([each, each]) for each in acts))
    finally:
        env.close()
    own = slice(1, 2)
    finals = both.finals[np.nonzero(both.truncated)[1] == 1]
    return Replayed(both.sights[:, own], both.rewards[:, own], both.terminated[:, own], both.truncated[:, own], finals)


def _difference(known: Replayed, tried: Replayed) -> str:
    for name in ("sights", "rewards", "terminated", "truncated"):
        left, right = getattr(known, name), getattr(tried, name)
        apart = left.view(np.uint8) != right.view(np.uint8) if left.dtype == np.bool_ else _apart(left, right)
        if apart.any():
            return f"had other {name} from step {int(np.argwhere(apart)[0][0])} on"
    return "had other last sights" if known.finals.tobytes() != tried.finals.tobytes() else ""


def _apart(left: Floats, right: Floats) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = np.ascontiguousarray(left).view(np.uint32) != np.ascontiguousarray(right).view(
        np.uint32
    )
    return found


def _collected(env: VectorEnv, shown: Observations, acts: Iterator[Actions]) -> Replayed:
    sights, rewards, terminated, truncated, finals = [as_vectors(shown)], [], [], [], []
    for each in acts:
        step = _step(env, each)
        sights.append(as_vectors(step.observations))
        rewards.append(step.rewards)
        terminated.append(step.terminated)
        truncated.append(step.truncated)
        finals += [
            as_vectors(step.final_observations[index][None])[0] for index in np.flatnonzero(step.truncated).tolist()
        ]
    return Replayed(
        np.stack(sights),
        np.stack(rewards),
        np.stack(terminated),
        np.stack(truncated),
        np.array(finals, np.float32).reshape(-1, sights[0].shape[1]),
    )


def _step(env: VectorEnv, acts: Actions) -> Transition:
    step = env.step(acts)
    if step.failed:
        raise CannotReplayError("an environment failed while a shard was replayed; see the task's failures")
    return step


def _any_acts(space: ActionSpace, count: int, steps: int, rng: np.random.Generator) -> Iterator[Actions]:
    """From raw integers, which are the same under every NumPy."""
    space = acted_in(space)
    for _ in range(steps):
        if isinstance(space, Discrete):
            raw = rng.bit_generator.random_raw(count)
            yield (raw % np.uint64(space.count)).astype(np.int64)
        else:
            raw = rng.bit_generator.random_raw(count * space.size)
            unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
            yield unit.reshape(count, space.size)
