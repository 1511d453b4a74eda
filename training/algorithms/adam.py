"""Adam (arXiv 1412.6980) on one flat vector, with a state that peers can average and compare.

Written in NumPy's elementwise operations, which IEEE 754 rounds the same everywhere; so peers that take the same
gradients hold the same bits on unlike processors. It is also several times faster than torch's on a few thousand
parameters.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from shoal.protocol.errors import ProtocolError
from shoal.training.tasks.base import Floats

_BETA1: Final = 0.9
_BETA2: Final = 0.999
_MAX_RATIO: Final = 7.35
"""|first| / √second, whatever the gradients were: by Cauchy and Schwarz it is at most
(1 - β₁) / √((1 - β₂)(1 - β₁² / β₂)) = 7.27; the rest is for rounding. Averages of such states keep to it as well."""
_UNDERFLOW: Final = 1e-15  # the squares of gradients smaller than this may be 0 in float32
_ROUNDING: Final = 1.001
_MAX_STEP: Final = 2**40


class Adam:
    """The optimiser's state.

    Attributes:
        first: running mean of gradients, float32 ``[n]``.
        second: running mean of squared gradients, float32 ``[n]``.
        step: how many steps were taken.
        learning_rate: of the next step.
    """

    def __init__(self, size: int, *, learning_rate: float, epsilon: float) -> None:
        self.first: Floats = np.zeros(size, np.float32)
        self.second: Floats = np.zeros(size, np.float32)
        self.step = 0
        self.learning_rate = learning_rate
        self._epsilon = epsilon
        self._spare, self._other = np.empty(size, np.float32), np.empty(size, np.float32)

    def apply(self, parameters: Floats, gradient: Floats) -> None:
        """Take one step, in place."""
        self.step += 1
        spare, other = self._spare, self._other
        np.multiply(self.first, np.float32(_BETA1), out=self.first)
        np.multiply(gradient, np.float32(1 - _BETA1), out=spare)
        np.add(self.first, spare, out=self.first)
        np.multiply(self.second, np.float32(_BETA2), out=self.second)
        np.multiply(gradient, gradient, out=spare)
        np.multiply(spare, np.float32(1 - _BETA2), out=spare)
        np.add(self.second, spare, out=self.second)
        # Bias correction, folded into the step size and epsilon.
        correction = math.sqrt(1 - _BETA2**self.step)
        step_size = np.float32(self.learning_rate * correction / (1 - _BETA1**self.step))
        np.sqrt(self.second, out=spare)
        np.add(spare, np.float32(self._epsilon * correction), out=spare)
        np.multiply(self.first, step_size, out=other)
        np.divide(other, spare, out=other)
        np.subtract(parameters, other, out=parameters)

    def max_change(self, steps: int) -> float:
        """How far ``steps`` steps can move a parameter; rounding at most doubles what the learning rate allows."""
        return 2 * _MAX_RATIO * self.learning_rate * steps


def check_adam(first: Floats, second: Floats, *, max_norm: float) -> None:
    """Check that a state from elsewhere is one that gradients of at most ``max_norm`` can lead to.

    One that is not could be made so that the next honest step is endless.

    Raises:
        ProtocolError: if it is not.
    """
    if not (second >= 0).all():
        raise ProtocolError("Adam's second moment is negative or no number")
    if not (second <= _ROUNDING * max_norm**2).all() or not (np.abs(first) <= _ROUNDING * max_norm).all():
        raise ProtocolError(f"Adam's moments are of gradients longer than {max_norm:g}")
    if not (np.abs(first) <= np.float32(_MAX_RATIO) * np.sqrt(second) + np.float32(_UNDERFLOW)).all():
        raise ProtocolError("Adam's first moment is too large for the second")


def fit_first(first: Floats, second: Floats) -> Floats:
    """A first moment that came of another rule than the second, or of other peers, cut to what `check_adam` allows."""
    bound = np.float32(_MAX_RATIO) * np.sqrt(second) + np.float32(_UNDERFLOW)
    return np.clip(first, -bound, bound)


def check_adam_step(step: int) -> None:
    """Check a number of steps from elsewhere.

    Raises:
        ProtocolError: if nobody can have taken so many.
    """
    if not 0 <= step <= _MAX_STEP:
        raise ProtocolError(f"Adam cannot have taken {step} steps")


def clip_by_norm(gradient: Floats, max_norm: float) -> tuple[Floats, float]:
    """The gradient, scaled down to ``max_norm`` where it is longer, and how long it was.

    The squares are summed strictly in order, in float64, so that every machine gets the same norm.
    """
    wide = gradient.astype(np.float64)
    norm = math.sqrt(float(np.add.accumulate(wide * wide)[-1]))
    return (gradient * np.float32(max_norm / norm) if norm > max_norm else gradient), norm


def shorten(gradient: Floats, max_norm: float) -> float:
    """Scale a gradient of this peer's own down to ``max_norm`` in place, where it is longer; gives how long it was.

    A third of the time that `clip_by_norm` takes, and not the same bits everywhere.
    """
    wide = gradient.astype(np.float64)
    norm = math.sqrt(float(wide.dot(wide)))
    if norm > max_norm:
        np.multiply(gradient, np.float32(max_norm / norm), out=gradient)
    return norm
