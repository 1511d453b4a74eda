"""Gymnasium environments (https://gymnasium.farama.org) as tasks: ``gym:CartPole-v1``.

What becomes of their spaces is in `shoal.training.tasks.spaces`; Atari games (``gym:ALE/Pong-v5``) come as they are
usually learned (`shoal.training.tasks.atari`).

The environments are stepped in a plain loop: with eight CartPoles on one core it made 190,000 steps/s where
`SyncVectorEnv` made 158,000, and resetting within the step spares both the step that Gymnasium 1.x's default autoreset
(`AutoresetMode.NEXT_STEP`) spends on a reset and the mask that would have to keep that step out of the training data.

Which of them may be made, and with what, is in `shoal.training.tasks.making`.

An environment is other people's code. What it answers is checked (`answers`) and copied, since many use one array for
all observations; one that raises, does not come back (`shoal.training.watch`) or answers with what it may not is told
to `Failures` and replaced by a new one with another seed, so that the same failure is not met by the same path. It is
held to the bounds of its space, unless it is Gymnasium's own: of these some leave theirs (LunarLander, when it flies
away), which is known and harmless.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training import watch
from shoal.training.tasks import registry
from shoal.training.tasks.answers import read_reset, read_reward, read_step, read_truth
from shoal.training.tasks.base import (
    Actions,
    ActionSpace,
    Continuous,
    Discrete,
    Floats,
    MultiDiscrete,
    Observations,
    Transition,
    VectorEnv,
)
from shoal.training.tasks.failures import BadAnswerError, Failures, Place, TaskFailedError, in_words
from shoal.training.tasks.making import close_env, is_gymnasiums_own, make_env
from shoal.training.tasks.spaces import ToEnv, action_space, shown_by
from shoal.training.watch import Act, Slot

log = logging.getLogger(__name__)

TRIED_STEPS: Final = 3
# To take members out of enumerations at every step would cost as much as a third of CartPole: `Slot.PLACE` is 1 below,
# `Slot.CALLS` is 2.
_STEP: Final = int(Act.STEP)
_RESET: Final = int(Act.RESET)


class GymTask:
    """One Gymnasium environment id as a `shoal.training.tasks.Task`.

    Raises:
        UsageError: if the id is not registered, what it needs is not installed, or its spaces are of another kind.
        TaskFailedError: if one cannot be made.
    """

    def __init__(self, env_id: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Look at one of them.

        Args:
            env_id: in Gymnasium's registry.
            arguments: what it is made with; see `shoal.training.tasks.making`.
        """
        self.name = f"gym:{env_id}"
        self.failures = Failures(self.name)
        self._env_id, self._arguments = env_id, dict(arguments or {})
        env = self._first()
        try:
            shown = shown_by(self.name, env.observation_space, is_bounded=not is_gymnasiums_own(env))
            self.observation_space = shown.box
            self.action_space = action_space(self.name, env.action_space)
            self.to_env = ToEnv(env.action_space)
            # Members that know bytes as numbers up to 255 would learn something else.
            self.version = 2 if shown.box.dtype == "uint8" else 1
            self.target_return: float | None = None if env.spec is None else env.spec.reward_threshold
        finally:
            close_env(env, 0)

    def _first(self) -> Any:
        """One to learn from what the task is like.

        Raises:
            UsageError: if there is none of this name, or what it needs is missing.
            TaskFailedError: if it fails.
        """
        try:
            return make_env(self._env_id, 0, self._arguments)
        except UsageError:
            raise
        except BaseException as error:  # see the head
            failed = f"{self.name} cannot be made: its constructor failed: {in_words(error)}"
            raise TaskFailedError(failed) from error

    def make(self, num_envs: int) -> VectorEnv:
        """Environments of this task in one process."""
        return self._made(num_envs, self._make_one)

    def make_plain(self, num_envs: int) -> VectorEnv:
        """The same, without what makes learning easier; see `shoal.training.tasks.atari`."""
        return self._made(num_envs, lambda index: self._make_one(index, is_training=False))

    def make_shown(self, render_mode: str) -> GymVectorEnv:
        """One environment as `make_plain` makes it, which can be seen (`GymVectorEnv.frame`)."""
        env = make_env(self._env_id, 0, self._arguments, is_training=False, render_mode=render_mode)
        return GymVectorEnv([env], None, self.failures)

    def _made(self, num_envs: int, make: Callable[[int], Any]) -> VectorEnv:
        return GymVectorEnv([make(index) for index in range(num_envs)], make, self.failures)

    def _make_one(self, index: int, *, is_training: bool = True) -> Any:
        while True:
            try:
                return make_env(self._env_id, index, self._arguments, is_training=is_training)
            except BaseException as error:  # it worked before; anything may be raised by other people's code
                self.failures.add(Place(index, Act.MAKE), error)

    @staticmethod
    def listed() -> list[dict[str, Any]]:
        """What is in Gymnasium's registry; see `shoal.training.tasks.catalogue`."""
        return registry.listed()

    def described(self) -> dict[str, Any]:
        """What there is to tell of one; see `shoal.training.tasks.catalogue`."""
        env = self._first()
        try:
            return registry.described(env)
        finally:
            close_env(env, 0)

    def try_out(self, seed: int) -> None:
        """A few steps of one environment, to meet at once what would fail every time.

        Raises:
            TaskFailedError: if it fails.
        """
        env = self.make(1)
        try:
            env.reset([seed])
            rng = np.random.default_rng(seed)
            for _ in range(TRIED_STEPS):
                if self.failures.count:
                    break
                env.step(_any_actions(self.action_space, rng))
        finally:
            env.close()
        if self.failures.count:
            raise TaskFailedError(self.failures.last)


class GymVectorEnv:
    """Gymnasium environments stepped one after the other; see `shoal.training.tasks.VectorEnv`."""

    def __init__(
        self, envs: list[Any], make: Callable[[int], Any] | None = None, failures: Failures | None = None
    ) -> None:
        """Step these.

        Args:
            envs: that were just made, all alike.
            make: gives a new one in place of one that failed, of which it is told the index; none: there is none.
            failures: told what goes wrong.
        """
        self.num_envs = len(envs)
        self._envs = envs
        self._make = make
        self._failures = failures or Failures("an environment")
        is_bounded = not is_gymnasiums_own(envs[0])
        self._shown = shown_by(self._failures.task, envs[0].observation_space, is_bounded=is_bounded)
        self._shape = (self.num_envs, *self._shown.shape)
        self._kept = np.dtype(self._shown.box.dtype)
        self._last: Observations = np.zeros(self._shape, self._kept)
        self._seeds = [0] * self.num_envs
        self._num_steps = 0
        self._failed: set[int] = set()
        self._to_env = ToEnv(envs[0].action_space)

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start all anew, each from its own seed."""
        observations: Observations = np.empty(self._shape, self._kept)
        self._seeds, self._num_steps = list(seeds), 0
        self._failed.clear()
        for index, seed in enumerate(seeds):
            try:
                observations[index] = self._reset(index, seed)
            except BaseException as error:  # see the head
                observations[index] = self._replace(index, Act.RESET, error)
        self._last = observations
        return observations

    def step(self, actions: Actions) -> Transition:
        """Step all; reset those whose episode ended."""
        shown, place, low, high = self._shown, watch.page, self._shown.low, self._shown.high
        shape, dtype = shown.shape, shown.dtype
        observations: Observations = np.empty(self._shape, self._kept)
        rewards = np.zeros(self.num_envs, np.float32)
        terminated = np.zeros(self.num_envs, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        final_observations: dict[int, Observations] = {}
        failed: dict[int, tuple[Act, BaseException]] = {}
        place[2] += 1
        for index, (env, action) in enumerate(zip(self._envs, self._to_env(actions), strict=True)):
            try:
                place[1] = _STEP | index
                answer = env.step(action)
                place[1] = 0
                if type(answer) is not tuple or len(answer) != 5:
                    answer = read_step(answer)
                observation, reward, ends, is_cut, _ = answer
                if type(observation) is not np.ndarray or observation.dtype is not dtype or observation.shape != shape:
                    observation = shown.read(observation)
                rewards[index] = reward if type(reward) is float else read_reward(reward)
                if ends is not False or is_cut is not False:
                    if ends is not True:
                        ends = read_truth("terminated", ends)
                    if is_cut is not False:
                        is_cut = read_truth("truncated", is_cut)
                    if ends or is_cut:
                        final = shown.copy(observation)
                        shown.check(final)
                        terminated[index], truncated[index] = ends, is_cut and not ends
                        final_observations[index] = final
                        observation = self._reset(index)
                observations[index] = observation
            except BaseException as error:  # see the head
                failed[index] = (Act(place[1] & ~0xFFFFFFFF) or Act.STEP, error)
                place[1] = 0
                observations[index] = self._last[index]
        is_inside = shown.is_any or ((observations >= low) & (observations <= high)).all()
        if not is_inside or not np.isfinite(rewards).all():
            self._check(observations, rewards, failed)
        self._num_steps += 1
        for index, (act, reason) in failed.items():
            rewards[index], terminated[index], truncated[index] = 0.0, False, True
            final_observations[index] = self._last[index].copy()
            observations[index] = self._replace(index, act, reason)
        self._last = observations
        self._failures.stepped(self.num_envs - len(failed))
        all_failed, self._failed = self._failed | failed.keys(), set()
        return Transition(observations, rewards, terminated, truncated, final_observations, frozenset(all_failed))

    def follow(self, actions: Actions) -> None:
        """See `shoal.training.tasks.base.Following`."""
        place = watch.page
        plain = iter(self._to_env(actions.reshape(-1, *actions.shape[2:])))
        for _ in range(len(actions)):
            place[2] += 1
            for index, env in enumerate(self._envs):
                try:
                    place[1] = _STEP | index
                    _, _, ends, is_cut, _ = env.step(next(plain))
                    place[1] = 0
                    if ends or is_cut:
                        self._reset(index)
                except BaseException as error:  # see the head
                    act, place[1] = Act(place[1] & ~0xFFFFFFFF) or Act.STEP, 0
                    self._failures.add(Place(index, act, self._seeds[index], self._num_steps), error)
                    raise TaskFailedError(self._failures.summary) from error
            self._num_steps += 1
        self._failures.stepped(len(actions) * self.num_envs)

    def frame(self) -> Any:
        """How the first environment looks now, as its render mode has it."""
        return self._envs[0].render()

    @property
    def frames_per_s(self) -> float:
        """At which it is meant to be seen."""
        return float(self._envs[0].metadata.get("render_fps") or 30)

    def close(self) -> None:
        """Close every environment."""
        for index, env in enumerate(self._envs):
            close_env(env, index)

    def _reset(self, index: int, seed: int | None = None) -> Observations:
        place = watch.page
        place[2] += 1
        place[1] = _RESET | index
        answer = self._envs[index].reset() if seed is None else self._envs[index].reset(seed=seed)
        observation = read_reset(answer, self._shown)
        place[1] = 0
        return observation

    def _check(self, observations: Observations, rewards: Floats, failed: dict[int, tuple[Act, BaseException]]) -> None:
        """Find those that gave numbers that are not finite, or outside of their space."""
        for index in range(self.num_envs):
            if index not in failed:
                try:
                    read_reward(rewards[index])
                    self._shown.check(observations[index])
                except BadAnswerError as error:
                    failed[index] = (Act.STEP, error)

    def _replace(self, index: int, act: Act, error: BaseException) -> Observations:
        """Put a new environment in place of one that failed; gives what it shows first.

        Raises:
            TaskFailedError: if too many have failed.
        """
        reason = error
        while True:
            watch.page[Slot.PLACE] = 0
            self._failures.add(Place(index, act, self._seeds[index], self._num_steps), reason)
            self._failed.add(index)
            if self._make is None:
                raise TaskFailedError(self._failures.summary) from reason
            close_env(self._envs[index], index)
            self._envs[index] = self._make(index)
            self._seeds[index] = _another(self._seeds[index])
            try:
                return self._reset(index, self._seeds[index])
            except BaseException as again:  # see the head
                act, reason = Act.RESET, again


def _another(seed: int) -> int:
    """A seed that follows from another, and is not the same."""
    return int.from_bytes(hashlib.sha256(f"after a failure\n{seed}".encode()).digest()[:4], "big")


def _any_actions(space: ActionSpace, rng: np.random.Generator) -> Actions:
    match space:
        case Discrete(count):
            return rng.integers(count, size=1)
        case MultiDiscrete(counts):
            return rng.integers(counts)[np.newaxis]
        case Continuous(size):
            return rng.uniform(-1, 1, (1, size)).astype(np.float32)
