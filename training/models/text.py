"""What objectives over text ask of a model, whichever it is, and takes as the tokens that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Take

Ids: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Takes as tokens, padded at their ends.

    Attributes:
        tokens: int64 ``[S, T]``.
        is_act: bool ``[S, T]``, of the tokens that the policy chose, ends of acts among them.
    """

    tokens: torch.Tensor
    is_act: torch.Tensor

    def part(self, rows: Ids) -> Sequences:
        """Some of them, no longer than the longest."""
        tokens, is_act = self.tokens[rows], self.is_act[rows]
        used = is_act.any(dim=0).nonzero()
        end = int(used.max()) + 1 if len(used) else 1
        return Sequences(tokens[:, :end], is_act[:, :end])

    def __len__(self) -> int:
        return len(self.tokens)


def padded(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], padding: int) -> Sequences:
    """Rows of unequal lengths, with what is padded at their ends."""
    shape = (len(rows), max((len(row) for row in rows), default=1))
    tokens, is_act = np.full(shape, padding, np.int64), np.zeros(shape, np.bool_)
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        tokens[index, : len(row)], is_act[index, : len(row)] = row, mask
    return Sequences(torch.from_numpy(tokens), torch.from_numpy(is_act))


class TextModel(Protocol):
    """A `shoal.training.algorithms.takes.TakeModel` that reads and writes text, and says how likely what it wrote is.

    It is an actor as well, see `shoal.training.tasks.cast.Actor`.
    """

    @property
    def context(self) -> int:
        """The longest sequence that it sees, in tokens."""
        ...

    @property
    def flat(self) -> Floats:
        """``[num_parameters]``: writing to it changes the model."""
        ...

    @property
    def parameters(self) -> dict[str, Floats]:
        """By name, views of `flat`."""
        ...

    def gradient_of(self, loss: torch.Tensor) -> Floats:
        """Of a scalar that came of `log_probs`, ``[num_parameters]``; overwritten by the next."""
        ...

    def encode(self, takes: Sequence[Take]) -> Sequences:
        """Takes that are over, or still wait for acts, as sequences."""
        ...

    def log_probs(self, sequences: Sequences) -> torch.Tensor:
        """Of every token that the policy chose, given what came before: ``[S, T]``, 0 for all others."""
        ...

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[str], Floats]:
        """Complete the newest sight of each; how likely each act was, ``[n]``."""
        ...
