"""A replay buffer: what one stream's environments brought, to be looked at again in any order.

It belongs to its stream and to nobody else: it is in no state, crosses no wire, and is lost with its worker, which
begins a new one. The samples of an update that is under way are *staged*: they can be drawn, and stay only if the
update is done (`Replay.commit`). Those of one that failed are staged again by the next, or gone.

Each transition holds what was seen before and after it, so that an episode that was cut off goes on from what was seen
last (Pardo et al., arXiv 1712.00378), and one of several steps from where these led. Observations are kept as the
environments gave them, of whatever shape and type; they are normalised when they are drawn, if at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.rollouts import Rollout, runs_on
from shoal.training.tasks.base import Actions, Floats


@dataclass(frozen=True, slots=True)
class Transitions:
    """S times an action and what it led to, as the environments showed it.

    Attributes:
        observations: ``[S, ...]``.
        actions: ``[S]`` or ``[S, size]``.
        rewards: ``[S]``, of one step or the discounted sum of several.
        following: ``[S, ...]``, what was seen after them.
        discounts: ``[S]``, what the worth of that counts: nothing where the episode ended by itself.
    """

    observations: Floats
    actions: Actions
    rewards: Floats
    following: Floats
    discounts: Floats

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def columns(self) -> tuple[npt.NDArray[Any], ...]:
        """All of it, in order."""
        return self.observations, self.actions, self.rewards, self.following, self.discounts

    @classmethod
    def join(cls, parts: Sequence[Transitions]) -> Self:
        """One after the other."""
        return cls(*(np.concatenate(columns) for columns in zip(*(part.columns for part in parts), strict=True)))

    @classmethod
    def of(cls, rollout: Rollout, *, gamma: float, num_steps: int) -> Self:
        """Each step of a rollout with those that follow, up to ``num_steps`` or to the end of the episode or rollout.

        Args:
            rollout: T steps of N environments.
            gamma: discount per step.
            num_steps: of which the rewards are taken as they came, before what was seen then is valued.
        """
        length, num_envs = rollout.rewards.shape
        goes_on = runs_on(rollout.terminated, rollout.truncated)
        after = rollout.observations[1:].copy()
        after[rollout.truncated] = rollout.final_observations
        rewards, last = rollout.rewards.copy(), np.repeat(np.arange(length)[:, None], num_envs, axis=1)
        reaches = goes_on.copy()  # whether the next of the steps belongs to it
        for number in range(1, min(num_steps, length)):
            part = reaches[:-number]
            rewards[:-number] += part * np.float32(gamma**number) * rollout.rewards[number:]
            last[:-number] += part
            part &= goes_on[number:]
        place = last, np.arange(num_envs)
        steps = last - np.arange(length)[:, None] + 1
        discounts = np.float32(gamma) ** steps.astype(np.float32) * ~rollout.terminated[place]
        rows = length * num_envs
        return cls(
            rollout.observations[:-1].reshape(rows, *rollout.observations.shape[2:]),
            rollout.actions.reshape(rows, *rollout.actions.shape[2:]),
            rewards.ravel(),
            after[place].reshape(rows, *after.shape[2:]),
            discounts.ravel(),
        )


class Replay:
    """The newest transitions, in a ring with room for those that are staged."""

    def __init__(self, *, max_steps: int, max_bytes: int) -> None:
        """Begin with none.

        Args:
            max_steps: how many are kept at most.
            max_bytes: how much memory those that are kept take at most. Those that are staged come on top.
        """
        self._max_steps, self._max_bytes = max_steps, max_bytes
        self._columns: tuple[npt.NDArray[Any], ...] = ()
        self._end = self._kept = self._staged = 0  # of those that are kept; after these are the staged ones

    def __len__(self) -> int:
        return self._kept

    @property
    def num_bytes(self) -> int:
        """What it takes now, with the room for what is staged."""
        return sum(column.nbytes for column in self._columns)

    def stage(self, new: Transitions) -> None:
        """Let these be drawn, in place of what was staged before.

        Raises:
            UsageError: if not one fits into the memory.
        """
        self._staged = len(new)
        if not len(new):
            return
        most = self._most(new)
        room = len(self._columns[0]) if self._columns else 0
        if room < self._kept + len(new):
            self._grow(new, min(max(2 * room, self._kept + len(new)), most + len(new)))
            room = len(self._columns[0])
        places = (self._end + np.arange(len(new))) % room
        for column, added in zip(self._columns, new.columns, strict=True):
            column[places] = added

    def draw(self, count: int, rng: np.random.Generator) -> Transitions:
        """``count`` of those that are kept or staged, each as likely as any other, and maybe twice.

        Raises:
            UsageError: if there are none.
        """
        first, end = self._end - self._kept, self._end + self._staged
        if first == end:
            raise UsageError("the replay holds nothing to draw from; stage what was collected first")
        rows = rng.integers(first, end, size=count) % len(self._columns[0])
        return Transitions(*(np.take(column, rows, axis=0) for column in self._columns))

    def commit(self) -> None:
        """Keep what is staged, and forget the oldest beyond the bounds."""
        if self._staged:
            most = self._max_steps if not self._columns else self._most(Transitions(*self._columns))
            self._end += self._staged
            self._kept = min(self._kept + self._staged, most)
            self._staged = 0

    def _most(self, rows: Transitions) -> int:
        """How many such are kept at most."""
        one = sum(column[:1].nbytes for column in rows.columns)
        if one > self._max_bytes:
            raise UsageError(f"replay_bytes={self._max_bytes} is less than one sample of this task takes, {one} bytes")
        return min(self._max_steps, self._max_bytes // one)

    def _grow(self, like: Transitions, room: int) -> None:
        grown = tuple(np.empty((room, *column.shape[1:]), column.dtype) for column in like.columns)
        if self._kept:
            places = np.arange(self._end - self._kept, self._end) % len(self._columns[0])
            for column, larger in zip(self._columns, grown, strict=True):
                larger[: self._kept] = column[places]
        self._columns, self._end = grown, self._kept
