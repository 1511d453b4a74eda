"""What becomes of a network's outputs: a distribution over actions, drawn from, judged, and derived by hand.

A head works on what comes out by column, ``[outputs, batch]``: there are few actions, and sums over so short an axis
would cost as much as the layers below. It is the same for every network, whoever computes that one's gradient.

- `Discrete`: a categorical distribution.
- `MultiDiscrete`: one for each choice, each independent of the others, as Gymnasium's MultiDiscrete has them.
- `Continuous`: a diagonal Gaussian with a state-independent log standard deviation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from shoal.training.tasks.base import Actions, ActionSpace, Continuous, Discrete, Floats, MultiDiscrete

_HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)
_TINY: Final = np.finfo(np.float32).tiny


class Head(Protocol):
    """A distribution on batches of one size.

    Attributes:
        log_probs: ``[B]``, of the actions that `judge` was given last. Overwritten by the next.
    """

    log_probs: Floats

    def judge(self, outputs: Floats, actions: Actions) -> None:
        """Look at actions ``[B]`` or ``[size, B]`` under outputs ``[outputs, B]``."""
        ...

    @property
    def entropy(self) -> float:
        """The mean over what `judge` was given last."""
        ...

    def backward(self, d_log_probs: Floats, d_entropy: float, d_outputs: Floats) -> None:
        """Write a loss's derivative by the outputs ``[outputs, B]``, given that by each log-probability ``[B]``.

        ``d_entropy`` is that by the entropy at each observation, the same for all.
        """
        ...


def num_outputs(space: ActionSpace) -> int:
    """How many a network has to give."""
    match space:
        case Discrete(count):
            return count
        case MultiDiscrete(counts):
            return sum(counts)
        case Continuous(size):
            return size


def sample(space: ActionSpace, outputs: Floats, log_std: Floats | None, rng: np.random.Generator) -> Actions:
    """Draw actions.

    Args:
        space: of the actions.
        outputs: ``[N, outputs]``.
        log_std: ``[size]``, of a continuous policy.
        rng: whose state advances by the same amount whatever the outputs.

    Returns:
        ``[N]`` or ``[N, size]``; int64, or float32 of a continuous policy.
    """
    if isinstance(space, Continuous):
        normal = rng.standard_normal(outputs.shape, np.float32)
        std: Floats = np.exp(log_std)  # type: ignore[arg-type]  # a continuous policy has one
        return outputs + std * normal
    # The Gumbel-max trick: the argmax is distributed as the softmax.
    noise = rng.standard_exponential(outputs.shape, np.float32)
    np.maximum(noise, _TINY, out=noise)  # in float32 it is 0 now and then
    np.log(noise, out=noise)
    return likeliest(space, outputs - noise)


def likeliest(space: ActionSpace, outputs: Floats) -> Actions:
    """The actions that outputs ``[N, outputs]`` make likeliest, as `sample` would shape them."""
    match space:
        case Discrete():
            chosen: npt.NDArray[np.int64] = np.argmax(outputs, axis=1)
            return chosen
        case MultiDiscrete(counts):
            return np.stack([np.argmax(outputs[:, part], axis=1) for part in _parts(counts)], axis=1)
        case Continuous():
            return outputs


def head_of(space: ActionSpace, size: int, log_std: Floats | None, d_log_std: Floats | None) -> Head:
    """The head of a policy on batches of ``size``, whose ``log_std`` and its gradient are views of vectors."""
    match space:
        case Discrete(count):
            return _Categorical(count, size)
        case MultiDiscrete(counts):
            return _Categoricals(counts, size)
        case Continuous():
            return _Gaussian(log_std, d_log_std, size)  # type: ignore[arg-type]  # a continuous policy has them


class _Categorical:
    """One of several actions: the softmax of what the actor gives."""

    def __init__(self, count: int, size: int) -> None:
        self.log_probs: Floats = np.empty(size, np.float32)
        self._negative_entropies: Floats = np.empty(size, np.float32)
        self._log_p, self._p, self._scratch, self._chosen = (np.empty((count, size), np.float32) for _ in range(4))
        self._numbers = np.arange(count)[:, None]
        self._is_chosen = np.empty((count, size), np.bool_)

    def judge(self, outputs: Floats, actions: Actions) -> None:
        row, log_p, p, scratch = self._negative_entropies, self._log_p, self._p, self._scratch
        np.maximum.reduce(outputs, axis=0, out=row)
        np.subtract(outputs, row, out=log_p)
        np.exp(log_p, out=p)
        np.add.reduce(p, axis=0, out=row)
        np.divide(p, row, out=p)
        np.log(row, out=row)
        np.subtract(log_p, row, out=log_p)
        np.equal(self._numbers, actions, out=self._is_chosen)
        np.copyto(self._chosen, self._is_chosen)
        np.multiply(log_p, self._chosen, out=scratch)
        np.add.reduce(scratch, axis=0, out=self.log_probs)
        np.multiply(p, log_p, out=scratch)
        np.add.reduce(scratch, axis=0, out=row)

    @property
    def entropy(self) -> float:
        return -float(self._negative_entropies.mean())

    def backward(self, d_log_probs: Floats, d_entropy: float, d_outputs: Floats) -> None:
        # d log p(a) / dz = [a] - p and dH / dz = -p (log p + H), summed over what the loss is made of.
        scratch = self._scratch
        np.multiply(self._chosen, d_log_probs, out=d_outputs)
        if d_entropy:
            np.subtract(self._log_p, self._negative_entropies, out=scratch)
            np.multiply(scratch, d_entropy, out=scratch)
            np.add(scratch, d_log_probs, out=scratch)
            np.multiply(scratch, self._p, out=scratch)
        else:
            np.multiply(self._p, d_log_probs, out=scratch)
        np.subtract(d_outputs, scratch, out=d_outputs)


class _Gaussian:
    """A vector of independent normals: the actor gives the means, ``log_std`` the deviations."""

    def __init__(self, log_std: Floats, d_log_std: Floats, size: int) -> None:
        self.log_probs: Floats = np.empty(size, np.float32)
        self._log_std, self._d_log_std = log_std, d_log_std
        self._distances, self._squares = (np.empty((len(log_std), size), np.float32) for _ in range(2))
        self._precisions: Floats = np.empty((len(log_std), 1), np.float32)

    def judge(self, outputs: Floats, actions: Actions) -> None:
        np.negative(self._log_std[:, None], out=self._precisions)
        np.exp(self._precisions, out=self._precisions)
        np.subtract(actions, outputs, out=self._distances)
        np.multiply(self._distances, self._precisions, out=self._distances)
        np.square(self._distances, out=self._squares)
        np.add.reduce(self._squares, axis=0, out=self.log_probs)
        np.multiply(self.log_probs, -0.5, out=self.log_probs)
        spread = float(self._log_std.sum()) + len(self._log_std) * _HALF_LOG_TAU
        np.subtract(self.log_probs, spread, out=self.log_probs)

    @property
    def entropy(self) -> float:
        return float(self._log_std.sum()) + len(self._log_std) * (0.5 + _HALF_LOG_TAU)

    def backward(self, d_log_probs: Floats, d_entropy: float, d_outputs: Floats) -> None:
        np.matmul(self._squares, d_log_probs, out=self._d_log_std)
        self._d_log_std += len(d_log_probs) * d_entropy - float(d_log_probs.sum())
        np.multiply(self._distances, self._precisions, out=d_outputs)
        np.multiply(d_outputs, d_log_probs, out=d_outputs)


class _Categoricals:
    """Several choices, each independent of the others."""

    def __init__(self, counts: Sequence[int], size: int) -> None:
        self.log_probs: Floats = np.empty(size, np.float32)
        self._parts = [(part, _Categorical(count, size)) for part, count in zip(_parts(counts), counts, strict=True)]

    def judge(self, outputs: Floats, actions: Actions) -> None:
        self.log_probs[:] = 0
        for (part, head), chosen in zip(self._parts, actions, strict=True):
            head.judge(outputs[part], chosen)
            self.log_probs += head.log_probs

    @property
    def entropy(self) -> float:
        return sum(head.entropy for _, head in self._parts)

    def backward(self, d_log_probs: Floats, d_entropy: float, d_outputs: Floats) -> None:
        for part, head in self._parts:
            head.backward(d_log_probs, d_entropy, d_outputs[part])


def _parts(counts: Sequence[int]) -> list[slice]:
    """The outputs of each choice."""
    ends = [*itertools.accumulate(counts)]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
