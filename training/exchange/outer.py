"""The outer step of mode ``diloco`` (Douillard et al., arXiv 2311.08105): what all found apart moves what all hold.

Every peer takes its own optimiser's steps from the parameters that all hold, and contributes how far it came, turned
round: ``start - local``. The average of that is taken for a gradient, and Nesterov's momentum applied to it:

    momentum ← μ momentum + gradient
    parameters ← parameters - η (gradient + μ momentum)

With η = 1 and μ = 0 the result is the average of the local parameters, as in mode ``local``. The momentum is part of
the state that all share, so a newcomer gets it with the parameters; the inner optimiser is each peer's own.

One elementwise float32 operation after the other, which IEEE 754 rounds the same everywhere: who takes the same average
holds the same bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError

Floats = npt.NDArray[np.float32]

LEARNING_RATE: Final = 0.7
MOMENTUM: Final = 0.9
MAX_MOMENTUM: Final = 0.999
_ROUNDING: Final = 1.01


class Outer:
    """The outer optimiser's state.

    Attributes:
        momentum: float32 ``[n]``.
    """

    def __init__(
        self, size: int, *, learning_rate: float = LEARNING_RATE, momentum: float = MOMENTUM, max_gradient: float
    ) -> None:
        """Begin with no momentum.

        Args:
            size: number of parameters, n.
            learning_rate: η.
            momentum: μ, 0 to `MAX_MOMENTUM`.
            max_gradient: largest magnitude that a coordinate of an average can have.
        """
        self.momentum: Floats = np.zeros(size, np.float32)
        self._learning_rate = np.float32(learning_rate)
        self._decay = np.float32(momentum)
        self._most = _ROUNDING * max_gradient / (1 - momentum)

    def apply(self, parameters: Floats, gradient: Floats) -> None:
        """Take one step, in place: ``parameters`` are those that all began from, ``gradient`` the average."""
        self.momentum *= self._decay
        self.momentum += gradient
        parameters -= self._learning_rate * (gradient + self._decay * self.momentum)

    def check(self, momentum: npt.NDArray[np.generic]) -> None:
        """Refuse a momentum from elsewhere that no averages lead to.

        Raises:
            ProtocolError: if it is one.
        """
        if not (np.abs(momentum.astype(np.float64)) <= self._most).all():
            raise ProtocolError(f"the outer momentum holds numbers beyond {self._most:.3g}; take another state")
