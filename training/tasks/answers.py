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

from shoal.training.tasks.base import Box, Floats, Observations
from shoal.training.tasks.failures import BadAnswerError

TOLERANCE: Final = 0.1
"""Of a space's range, beyond its bounds. Of eight packages that were tried two leave theirs by 0.2 and 3 %, which no
network minds; what is farther out is of another unit, or wrong."""
_TRUTHS: Final = (bool, np.bool_)


class Shown:
    """What an environment with one `Box` may show.

    Attributes:
        box: what it is to those who learn.
        shape: of an observation that needs no change, and of all that come from here.
        dtype: the space's: of an observation that needs no change.
        low: smallest numbers, float32 of `shape`; the smallest finite ones where it has no bound.
        high: likewise the largest.
        is_any: whether it may show any number of its dtype, so that there is nothing to check.
    """

    def __init__(self, space: Any, box: Box, *, is_bounded: bool = True) -> None:
        """Read a Gymnasium Box; its bounds count only if ``is_bounded``."""
        self.box, self.shape = box, box.shape
        self.dtype = np.dtype(space.dtype)
        self._kept = np.dtype(box.dtype)
        self._shape: tuple[int, ...] = space.shape
        self._hold(space.low.reshape(box.shape), space.high.reshape(box.shape), is_bounded)

    def _hold(self, low: npt.NDArray[Any], high: npt.NDArray[Any], is_bounded: bool) -> None:
        """Keep the bounds that observations are held to."""
        self._bounds = low, high
        most = np.full(self.shape, np.finfo(np.float32).max, np.float64)
        low, high = low.astype(np.float64), high.astype(np.float64)
        is_closed = np.isfinite(low) & np.isfinite(high) & is_bounded
        slack = TOLERANCE * np.subtract(high, low, out=np.zeros_like(low), where=is_closed) + 1e-6
        self.low: Floats = np.where(np.isfinite(low) & is_bounded, np.maximum(low - slack, -most), -most).astype(
            np.float32
        )
        self.high: Floats = np.where(np.isfinite(high) & is_bounded, np.minimum(high + slack, most), most).astype(
            np.float32
        )
        is_bytes = self.box.dtype == "uint8"
        self.is_any = is_bytes and not bool((self.low > 0).any()) and not bool((self.high < 255).any())

    def read(self, observation: object) -> npt.NDArray[Any]:
        """An observation that does not fit, if it means the same as one that does: ``shape``, perhaps not a copy.

        Raises:
            BadAnswerError: if not.
        """
        return read_box(observation, self._shape, self.dtype).reshape(self.shape)

    def copy(self, observation: npt.NDArray[Any]) -> Observations:
        """As the box keeps it."""
        return np.array(observation, self._kept)

    def check(self, observation: Observations) -> None:
        """Check the numbers of one observation.

        Raises:
            BadAnswerError: if one is not finite, or outside of the space.
        """
        if self.is_any or ((observation >= self.low) & (observation <= self.high)).all():
            return
        if not np.isfinite(observation).all():
            index = int(np.flatnonzero(~np.isfinite(observation))[0])
            raise BadAnswerError(f"an observation is not finite: number {index} of it is {observation.flat[index]}")
        outside = np.flatnonzero((observation < self.low) | (observation > self.high))
        if len(outside):
            index = int(outside[0])
            low, high = (bound.flat[index] for bound in self._bounds)
            shown = f"number {index} of it is {observation.flat[index]:g}, not {low:g} to {high:g}"
            raise BadAnswerError(f"an observation is outside of its space: {shown}")


def read_box(observation: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array of this shape, whose numbers are of this dtype or mean the same.

    Raises:
        BadAnswerError: if it is none.
    """
    array = np.asarray(observation)
    if array.shape != shape:
        raise BadAnswerError(f"an observation is of shape {array.shape} and not {shape}, as its space says")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise BadAnswerError(f"an observation holds {array.dtype} and not {dtype}, as its space says")
    return array


def read_reset(answer: object, shown: Shown) -> Observations:
    """The first observation of an episode, copied.

    Raises:
        BadAnswerError: if that is not what ``reset`` may give.
    """
    if type(answer) is not tuple or len(answer) != 2:
        raise BadAnswerError(f"reset gave {what_of(answer)} and not (observation, info)")
    observation = shown.copy(shown.read(answer[0]))  # it may be used again for the next one
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
        raise BadAnswerError(f"a reward is {what_of(reward)} and not a number")
    try:
        number = float(reward)  # type: ignore[arg-type]  # whatever it is, it may know
    except (TypeError, ValueError, OverflowError) as error:
        raise BadAnswerError(f"a reward is {what_of(reward)} and not a number") from error
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
    raise BadAnswerError(f"{name} is {what_of(value)} and not true or false")


def read_step(answer: object) -> tuple[Any, Any, Any, Any, Any]:
    """What a step gave: observation, reward, terminated, truncated, info.

    Raises:
        BadAnswerError: if it has others.
    """
    if type(answer) is not tuple or len(answer) != 5:
        raise BadAnswerError(f"step gave {what_of(answer)} and not (observation, reward, terminated, truncated, info)")
    return answer


def what_of(value: object) -> str:
    """What something is, in a few words."""
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}"
