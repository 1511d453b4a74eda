"""A policy that acts, and nothing else: the actor's layers in NumPy, its chance from a committed seed.

An actor's process needs no critic, no gradient, no optimiser and no torch. It holds the layers of
`shoal.training.models.actor_critic` that give actions, and what observations are normalised by. Weights are bfloat16,
so that a new version travels as a patch (`shoal.training.rollouts.patches`), and are computed with as float32; the
normaliser's numbers are float32, bit for bit. All of it is one vector of 16-bit words: the *copy* of a policy, which
every member derives alike from the policy's state.

Chance. An action is the argmax of logits plus Gumbel noise, or a mean plus deviations times normal noise. The noise
comes from PCG64's raw integers, which NumPy keeps the same (its distributions it does not), seeded by what the author
cannot choose (`shoal.training.rollouts.shard.noise_seed`). So whoever has the copy knows which action it had to be.

Rounding. A BLAS adds in the order that suits a processor, its threads and the batch, so logits differ a little from
machine to machine. By how much they can is computed and not guessed: with u = 2⁻²⁴, a sum of k products in any order,
with fused operations or without, is within g(k) Σ|a||b| of the exact one, g(k) = k u / (1 - k u) (Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd ed., §3.1). From layer to layer that error is carried on by |W|, and by tanh as
far as it is steep there, which is itself within 4 units in the last place. Whoever checks computes in float64, which is
as good as exact, and so nobody honest is ever further from that than the bound, whatever the machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.tensors import TensorCodec, encode_tensor
from shoal.training.algorithms.normalizers import mean_and_scale, normal
from shoal.training.exchange.averager import Moments
from shoal.training.tasks.base import Actions, ActionSpace, Continuous, Discrete, Floats, MultiDiscrete

Words = npt.NDArray[np.uint16]
_Wide = npt.NDArray[np.float64]

_UNIT: Final = 2.0**-24
"""Half the distance from 1 to the next float32: what one operation rounds by."""
_TANH: Final = 8 * _UNIT
"""NumPy's tanh, exp and log of float32 are within 4 units in the last place, each of at most 2 u."""
_TINY: Final = 1e-12
"""More than float64 rounds by here."""
_HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)
_TO_UNIT: Final = 2.0**-53


def acted_in(space: ActionSpace) -> Discrete | Continuous:
    """A space in which actors act.

    Raises:
        UsageError: if it is another one.
    """
    if isinstance(space, MultiDiscrete):
        raise UsageError("actors choose one act or give numbers, and not several choices at once; take the mode local")
    return space


@dataclass(frozen=True, slots=True)
class ActorShape:
    """What kind of policy a copy is of.

    Attributes:
        observation_size: how many numbers it sees.
        space: how it acts.
        hidden_sizes: units of each hidden layer.
        is_normalized: whether observations are.
    """

    observation_size: int
    space: Discrete | Continuous
    hidden_sizes: tuple[int, ...]
    is_normalized: bool

    @property
    def outputs(self) -> int:
        """How many numbers the last layer gives."""
        return self.space.count if isinstance(self.space, Discrete) else self.space.size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, by the names that they have in a state, in the order in which a copy holds them."""
        sizes = [self.observation_size, *self.hidden_sizes, self.outputs]
        found: dict[str, tuple[int, ...]] = {}
        for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
            found[f"parameters/actor/{layer}/weight"] = (after, before)
            found[f"parameters/actor/{layer}/bias"] = (after,)
        if not isinstance(self.space, Discrete):
            found["parameters/actor/log_std"] = (self.space.size,)
        return found

    @property
    def num_parameters(self) -> int:
        """Of the actor."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def num_words(self) -> int:
        """Of a copy: a word for each parameter, two for each number of the normaliser."""
        return self.num_parameters + (4 * self.observation_size if self.is_normalized else 0)


def copy_of(shape: ActorShape, policy: Mapping[str, npt.NDArray[Any]]) -> Words:
    """The copy that actors act by: uint16 ``[num_words]``, the same bits on every machine.

    Args:
        shape: of the policy.
        policy: its arrays, `shoal.training.algorithms.Learner.policy_arrays`; others among them are passed over.

    Raises:
        UsageError: if they are of another shape, or beyond bfloat16's range.
    """
    parts = []
    for name, expected in shape.shapes().items():
        array = policy.get(name)
        if array is None or array.shape != expected:
            raise UsageError(f"the policy has no {name} of shape {list(expected)}; say the shape that the run has")
        parts.append(array.ravel())
    flat = np.concatenate(parts).astype(np.float32)
    words = [np.frombuffer(encode_tensor(flat, TensorCodec.BF16).parts[0], "<u2")]
    if shape.is_normalized:
        seen = Moments.from_arrays(dict(policy), "observation")
        none = np.zeros(shape.observation_size), np.ones(shape.observation_size)  # nothing was seen yet
        words += [each.astype("<f4").view("<u2") for each in (mean_and_scale(seen) if seen.count else none)]
    return np.concatenate(words).astype(np.uint16)


class Acting:
    """A copy that acts.

    Attributes:
        shape: of the policy.
    """

    def __init__(self, shape: ActorShape, words: Words) -> None:
        """Take a copy, from anybody.

        Raises:
            ProtocolError: if it is none of this shape, or holds what is not finite.
        """
        if words.shape != (shape.num_words,) or words.dtype != np.uint16:
            raise ProtocolError(
                f"a copy of this policy has {shape.num_words} words, not {words.size}; take another one"
            )
        self.shape = shape
        count = shape.num_parameters
        flat = (words[:count].astype(np.uint32) << 16).view(np.float32)
        exact = words[count:].view(np.float32) if shape.is_normalized else np.zeros(0, np.float32)
        if not (np.isfinite(flat).all() and np.isfinite(exact).all()):
            raise ProtocolError("a copy of a policy holds numbers that are not finite; take another one")
        arrays: dict[str, Floats] = {}
        start = 0
        for name, expected in shape.shapes().items():
            size = math.prod(expected)
            arrays[name] = flat[start : start + size].reshape(expected)
            start += size
        self._layers = [
            (arrays[f"parameters/actor/{layer}/weight"], arrays[f"parameters/actor/{layer}/bias"])
            for layer in range(len(shape.hidden_sizes) + 1)
        ]
        self._log_std: Floats | None = arrays.get("parameters/actor/log_std")
        self._scale = (exact[: shape.observation_size], exact[shape.observation_size :])

    def act(self, sights: Floats, noise: Noise) -> tuple[Actions, Floats]:
        """Sample.

        Args:
            sights: ``[N, observation_size]``, as environments show them.
            noise: moves on by as much whatever the sights.

        Returns:
            Actions, ``[N]`` int64 or ``[N, size]`` float32, and their log-probabilities ``[N]``.
        """
        outputs = self._outputs(self._normal(sights))
        if self._log_std is None:
            scores = outputs + noise.gumbel(outputs.shape)
            chosen: npt.NDArray[np.int64] = scores.argmax(axis=1)
            return chosen, self._log_probs(outputs, chosen)
        actions = (outputs + np.exp(self._log_std) * noise.normal(outputs.shape)).astype(np.float32)
        return actions, self._log_probs(outputs, actions)

    def log_probs(self, sights: Floats, actions: Actions) -> Floats:
        """``[S]``, of ``[S, observation_size]`` and ``[S]`` or ``[S, size]``."""
        return self._log_probs(self._outputs(self._normal(sights)), actions)

    def expected(self, sights: Floats, actions: Actions, noise: Noise) -> Expected:
        """What an honest actor must have done and said, and how far rounding may have led it.

        Args:
            sights: ``[S, observation_size]``, in the order in which they were acted on.
            actions: that it says it took, ``[S]`` or ``[S, size]``.
            noise: by which it acted.
        """
        outputs, apart = self._exact(self._normal(sights))
        log_probs = self._log_probs(outputs, actions)
        if self._log_std is None:
            scores = outputs + noise.gumbel(outputs.shape)
            missed = scores.max(axis=1) - _of_each(scores, actions)
            most = apart.max(axis=1) + _of_each(apart, actions)
            # Of log p = -log Σ exp(z - z_a), which changes by no more than the others are likely.
            others = np.minimum(1, -np.expm1(np.minimum(log_probs, 0).astype(np.float64)) * np.exp(2 * most))
            return Expected(log_probs, others * most + 16 * _UNIT * (1 + np.abs(log_probs)), missed, most + 1e-9)
        std = np.exp(self._log_std.astype(np.float64))
        spread = std * noise.normal(outputs.shape)
        away = np.abs(actions - (outputs + spread))
        rounding = 4 * _UNIT * (np.abs(outputs) + np.abs(spread) + np.abs(actions))
        allowed = apart + _TANH * np.abs(spread) + rounding + 1e-30
        distance = np.abs(actions - outputs) / std
        slack = (distance * apart / std + 0.5 * (apart / std) ** 2).sum(axis=1)
        slack += 64 * _UNIT * (1 + np.abs(log_probs) + np.square(distance).sum(axis=1))
        return Expected(log_probs, slack, (away / allowed).max(axis=1), np.ones(len(actions)))

    def _normal(self, sights: Floats) -> Floats:
        return normal(sights, *self._scale) if self.shape.is_normalized else sights

    def _outputs(self, hidden: Floats) -> Floats:
        for number, (weight, bias) in enumerate(self._layers):
            if number:
                hidden = np.tanh(hidden)
            hidden = hidden @ weight.T + bias
        return hidden

    def _log_probs(self, outputs: Floats | _Wide, actions: Actions) -> Floats:
        wide = outputs.astype(np.float64)
        if self._log_std is None:
            highest = wide.max(axis=1)
            total = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=1))
            chosen: Floats = np.minimum(_of_each(wide, actions) - total, 0).astype(np.float32)
            return chosen
        log_std = self._log_std.astype(np.float64)
        away = (actions - wide) * np.exp(-log_std)
        found: Floats = (-0.5 * away**2 - log_std - _HALF_LOG_TAU).sum(axis=1).astype(np.float32)
        return found

    def _exact(self, hidden: Floats) -> tuple[_Wide, _Wide]:
        """``[S, outputs]`` each: what `_outputs` would give without rounding, and how far it may be from that."""
        exact: _Wide = hidden.astype(np.float64)
        errors: _Wide = np.zeros_like(exact)
        for number, (weight, bias) in enumerate(self._layers):
            if number:
                nearest = np.maximum(np.abs(exact) - errors, 0)  # to where tanh is steepest
                exact = np.tanh(exact)
                errors = np.minimum(errors * (1 - np.square(np.tanh(nearest))) + _TANH * np.abs(exact) + _TINY, 2.0)
            wide = weight.T.astype(np.float64)
            magnitudes = np.abs(wide)
            steps = len(wide) + 1
            most = steps * _UNIT / (1 - steps * _UNIT)
            errors = errors @ magnitudes + most * ((np.abs(exact) + errors) @ magnitudes + np.abs(bias)) + _TINY
            exact = exact @ wide + bias
        return exact, errors


def _of_each(numbers: _Wide, actions: Actions) -> _Wide:
    """Of each row ``[S, count]``, the number of its action."""
    found: _Wide = numbers[np.arange(len(actions)), actions.astype(np.int64)]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What `Acting.expected` gives, each ``[S]``.

    Attributes:
        log_probs: of the actions that are said to have been taken.
        slack: how far an honest actor's may be from these.
        missed: how far the actions are from those that the noise asks for: in scores; of continuous ones relative.
        allowed: how far rounding may have led an honest actor's.
    """

    log_probs: Floats
    slack: _Wide
    missed: _Wide
    allowed: _Wide


class Noise:
    """Numbers that follow from a seed on every machine, up to the last bits of a logarithm."""

    def __init__(self, seed: int) -> None:
        self._raw = np.random.PCG64(seed)

    def gumbel(self, shape: tuple[int, ...]) -> _Wide:
        """Standard Gumbel."""
        found: _Wide = -np.log(-np.log(self._uniform(math.prod(shape)))).reshape(shape)
        return found

    def normal(self, shape: tuple[int, ...]) -> _Wide:
        """Standard normal (Box and Muller, 1958), two raw numbers for each."""
        first, second = self._uniform(2 * math.prod(shape)).reshape(-1, 2).T
        found: _Wide = (np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)).reshape(shape)
        return found

    def _uniform(self, count: int) -> _Wide:
        """Between 0 and 1, both left out."""
        raw: npt.NDArray[np.uint64] = self._raw.random_raw(count)
        return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * _TO_UNIT


class NoiseOfOne(Noise):
    """That by which one of several environments was acted in, which step together and share a noise."""

    def __init__(self, noise: Noise, env: int, count: int) -> None:
        """Take every ``count``-th row of ``noise``, from the row ``env`` on."""
        self._noise, self._env, self._count = noise, env, count

    def gumbel(self, shape: tuple[int, ...]) -> _Wide:
        """See `Noise.gumbel`."""
        return self._noise.gumbel((shape[0] * self._count, *shape[1:]))[self._env :: self._count]

    def normal(self, shape: tuple[int, ...]) -> _Wide:
        """See `Noise.normal`."""
        return self._noise.normal((shape[0] * self._count, *shape[1:]))[self._env :: self._count]
