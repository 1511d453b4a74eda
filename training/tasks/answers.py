"""What an environment answers, held to what Gymnasium lets it answer.

NumPy is too obliging here: an observation of one number fills four places, text becomes numbers, of complex ones the
half is dropped. What was trained from such would be wrong without a word. So what comes is refused unless it is what
the environment's own spaces promise; the message says what came and what should have.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.training.tasks.base import Floats
from shoal.training.tasks.failures import BadAnswerError

TOLERANCE: Final = 1e-3
"""Of a space's range: rounding is no fault."""
_TRUTHS: Final = (bool, np.bool_)


class Shown:
    """What an environment may show.

    Attributes:
        dtype: the space's.
        low: smallest numbers, float32 of the space's shape; the smallest finite ones where it has no bound.
        high: likewise the largest.
    """

    def __init__(self, space: Any, *, is_bounded: bool = True) -> None:
        """Read a Gymnasium Box; its bounds count only if ``is_bounded``."""
        self.shape: tuple[int, ...] = space.shape
        self.dtype = np.dtype(space.dtype)
        most = np.full(self.shape, np.finfo(np.float32).max, np.float64)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        is_closed = np.isfinite(low) & np.isfinite(high) & is_bounded
        slack = TOLERANCE * np.subtract(high, low, out=np.zeros_like(low), where=is_closed) + 1e-6
        self.low: Floats = np.where(np.isfinite(low) & is_bounded, np.maximum(low - slack, -most), -most).astype(
            np.float32
        )
        self.high: Floats = np.where(np.isfinite(high) & is_bounded, np.minimum(high + slack, most), most).astype(
            np.float32
        )
        self._space = space

    def read(self, observation: object) -> npt.NDArray[Any]:
        """An observation that does not fit, if it means the same as one that does.

        Raises:
            BadAnswerError: if not.
        """
        array = np.asarray(observation)
        if array.shape != self.shape:
            raise BadAnswerError(f"an observation is of shape {array.shape} and not {self.shape}, as its space says")
        if not np.can_cast(array.dtype, self.dtype, "same_kind"):
            raise BadAnswerError(f"an observation holds {array.dtype} and not {self.dtype}, as its space says")
        return array

    def check(self, observation: Floats) -> None:
        """Check the numbers of one observation.

        Raises:
            BadAnswerError: if one is not finite, or outside of the space.
        """
        if ((observation >= self.low) & (observation <= self.high)).all():
            return
        if not np.isfinite(observation).all():
            index = int(np.flatnonzero(~np.isfinite(observation))[0])
            raise BadAnswerError(f"an observation is not finite: number {index} of it is {observation[index]}")
        outside = np.flatnonzero((observation < self.low) | (observation > self.high))
        if len(outside):
            index = int(outside[0])
            bounds = f"{self._space.low[index]:g} to {self._space.high[index]:g}"
            raise BadAnswerError(
                f"an observation is outside of its space: number {index} of it is {observation[index]:g}, not {bounds}"
            )


def read_reset(answer: object, shown: Shown) -> Floats:
    """The first observation of an episode, copied.

    Raises:
        BadAnswerError: if that is not what ``reset`` may give.
    """
    if type(answer) is not tuple or len(answer) != 2:
        raise BadAnswerError(f"reset gave {_what(answer)} and not (observation, info)")
    observation = np.array(shown.read(answer[0]), np.float32)  # a copy: it may be used again for the next one
    shown.check(observation)
    return observation


def read_reward(reward: object) -> float:
    """A reward as a number.

    Raises:
        BadAnswerError: if it is none, or not finite.
    """
    if isinstance(reward, np.ndarray) and reward.ndim > 0:
        raise BadAnswerError(f"a reward is an array of shape {reward.shape} and not a number")
    if isinstance(reward, str | bytes | complex) or reward is None:
        raise BadAnswerError(f"a reward is {_what(reward)} and not a number")
    try:
        number = float(reward)  # type: ignore[arg-type]  # whatever it is, it may know
    except (TypeError, ValueError, OverflowError) as error:
        raise BadAnswerError(f"a reward is {_what(reward)} and not a number") from error
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise BadAnswerError(
            f"a reward is {number}, which is not finite"
            if not math.isfinite(number)
            else f"a reward is {number:g}, more than float32 holds"
        )
    return number


def read_truth(name: str, value: object) -> bool:
    """Whether an episode is over.

    Raises:
        BadAnswerError: if it is neither true nor false.
    """
    if isinstance(value, _TRUTHS) or (isinstance(value, int | np.integer) and value in (0, 1)):
        return bool(value)
    raise BadAnswerError(f"{name} is {_what(value)} and not true or false")


def read_step(answer: object) -> tuple[Any, Any, Any, Any, Any]:
    """What a step gave: observation, reward, terminated, truncated, info.

    Raises:
        BadAnswerError: if it has others.
    """
    if type(answer) is not tuple or len(answer) != 5:
        raise BadAnswerError(f"step gave {_what(answer)} and not (observation, reward, terminated, truncated, info)")
    return answer


def _what(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}"
