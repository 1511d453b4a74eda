"""Samples that follow each other, for policies that remember: what was remembered before each, and minibatches of them.

An update goes once through all that its streams brought, with the parameters that it begins with, from what was
remembered in each environment before the first step. That gives its values and log-probabilities, and what is
remembered before each sample. Minibatches are made of sequences: steps of one environment that follow each other within
an episode, at most ``sequence_length`` of them. A gradient goes back to the beginning of its sequence and takes what
was remembered there as given: truncated backpropagation through time from stored states, here no older than the update
(R2D2, Kapturowski et al., ICLR 2019, has them from a replay).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.training.algorithms.rollouts import Rollout, Source
from shoal.training.models.policy import Course, Recurrent
from shoal.training.tasks.base import Floats, Observations

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Runs:
    """C sequences of samples, whose k-th are ``firsts + k * strides`` as long as k < ``lengths``; each ``[C]``."""

    firsts: Ids
    lengths: Ids
    strides: Ids

    @classmethod
    def of(cls, ended: npt.NDArray[np.bool_], longest: int) -> Runs:
        """Those of a stream whose samples are numbered as ``[T, N]``, of at most ``longest`` steps each.

        Args:
            ended: ``[T, N]``, whether an episode ended with the step.
            longest: a longer part of an episode makes several, all but the last of this length.
        """
        num_steps, num_envs = ended.shape
        begins = np.ones((num_envs, num_steps), np.bool_)
        begins[:, 1:] = ended[:-1].T
        steps = np.arange(num_steps)
        since = steps - np.maximum.accumulate(np.where(begins, steps, 0), axis=1)
        places = np.flatnonzero(since % longest == 0)  # environment after environment
        lengths = np.diff(places, append=begins.size)
        return cls(places % num_steps * num_envs + places // num_steps, lengths, np.full(len(places), num_envs))

    @classmethod
    def join(cls, parts: Sequence[Runs]) -> Runs:
        """All of them."""
        return cls(
            np.concatenate([each.firsts for each in parts]),
            np.concatenate([each.lengths for each in parts]),
            np.concatenate([each.strides for each in parts]),
        )

    def chosen(self, rows: Ids, offset: int) -> Runs:
        """Some of them, their samples renumbered from ``offset`` on."""
        return Runs(self.firsts[rows] + offset, self.lengths[rows], self.strides[rows])

    def in_order(self) -> tuple[Ids, tuple[int, ...]]:
        """The samples as a `Course` has them, ``[S]``, and its counts."""
        by_length = np.argsort(-self.lengths, kind="stable")
        firsts, strides, lengths = self.firsts[by_length], self.strides[by_length], self.lengths[by_length]
        steps = np.arange(int(lengths.max(initial=0)))
        counts = np.searchsorted(-lengths, -steps, side="left")
        rows = [firsts[:count] + step * strides[:count] for step, count in enumerate(counts)]
        order: Ids = np.concatenate(rows) if rows else firsts
        return order, tuple(counts.tolist())


def remembered(model: Recurrent, rollout: Rollout, observations: Observations, first: int = 0) -> tuple[Floats, Floats]:
    """What the present policy remembers before and after each step from the ``first`` on: each ``[S, N, memory_size]``.

    Args:
        model: the policy.
        rollout: whose memory at the ``first`` step it begins with.
        observations: ``[S * N, *shape]`` of these steps, normalised.
        first: where they begin.
    """
    ended = (rollout.terminated | rollout.truncated)[first:]
    num_steps, num_envs = ended.shape
    before, after = np.zeros((2, num_steps, num_envs, model.memory_size), np.float32)
    if num_steps:
        before[0] = rollout.memories[first]
        order, counts = Runs.of(ended, num_steps).in_order()
        flat = before.reshape(-1, model.memory_size)
        after.reshape(flat.shape)[order] = model.remember(observations[order], Course(counts, flat[order[: counts[0]]]))
        before[1:] = after[:-1] * ~ended[:-1, :, None]
    return before, after


class Sequences:
    """What an update of a policy that remembers is made from, cut into sequences.

    Attributes:
        memory: ``[S, memory_size]``, what is remembered before each sample, stream after stream.
    """

    def __init__(self, streams: Sequence[Runs], memory: Floats) -> None:
        """Hold those of each stream, whose samples come one stream after the other."""
        self._streams = streams
        self.memory = memory

    def shuffled(self, streams: Sequence[Source], parts: int) -> Iterator[tuple[Ids, Course]]:
        """All samples in ``parts`` parts of whole sequences, each in order; some are empty if there are too few.

        A part is made of parts of each stream, which that stream's own generator shuffles.
        """
        drawn = [
            np.array_split(stream.rng.permutation(len(runs.firsts)), parts)
            for stream, runs in zip(streams, self._streams, strict=True)
        ]
        offsets = np.cumsum([0, *(int(runs.lengths.sum()) for runs in self._streams)])
        for part in range(parts):
            chosen = [
                runs.chosen(rows[part], offset)
                for runs, rows, offset in zip(self._streams, drawn, offsets[:-1], strict=True)
            ]
            order, counts = Runs.join(chosen).in_order()
            yield order, Course(counts, self.memory[order[: counts[0]]] if counts else self.memory[:0])
