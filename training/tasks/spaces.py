"""What each of Gymnasium's spaces becomes: one array that networks see, and actions that policies know.

===================================  ===================================================================================
observation                          seen as
===================================  ===================================================================================
Box of bytes (uint8)                 the same bytes, from 0 to 1 to the networks; of two or three axes: an image
Box of other numbers, three axes     an image of float32
Box of other numbers, other axes     its numbers in a row, as float32
Discrete(n)                          n numbers, of which the one that is meant is 1 and the others are 0 (one-hot)
MultiDiscrete                        that for each of its numbers, one after the other
MultiBinary                          its bits, 0 or 1
Dict, Tuple                          what is in them, one after the other in the space's own order, all as float32,
                                     bytes divided by 255; however deep
===================================  ===================================================================================

Text, Sequence, Graph and OneOf are of no fixed size, and refused. Bytes of four axes and more are a row of bytes.

Actions: Discrete; Box of any shape, of which -1 to 1 spans the bounds; MultiDiscrete and MultiBinary as independent
choices. A Dict or Tuple of choices alone is all of them at once, one after the other in the space's own order, and one
of boxes alone is one box; however deep. Choices beside boxes are refused: a policy gives the one or the other.

What an environment shows is other people's: every part of it is read as `shoal.training.tasks.answers` reads a Box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import UsageError
from shoal.training.tasks.answers import Shown, read_box, what_of
from shoal.training.tasks.base import Actions, ActionSpace, Box, Continuous, Discrete, Floats, MultiDiscrete
from shoal.training.tasks.failures import BadAnswerError

MAX_OBSERVATION: Final = 2**18
"""Numbers in one observation."""
MAX_CHOICES: Final = 2**16
"""Of one action: all numbers that can be chosen, together."""
_AXES_OF_IMAGES: Final = (2, 3)
_MAX_BYTE: Final = 255

_Write: TypeAlias = Callable[[Any, Floats], None]
"""Puts what a space showed into its place, or raises `BadAnswerError`."""
_Bounds: TypeAlias = npt.NDArray[np.float64]


def shown_by(name: str, space: Any, *, is_bounded: bool, is_vector: bool = False) -> Shown:
    """How to read what an environment shows.

    Args:
        name: the task's.
        space: Gymnasium's.
        is_bounded: whether it is held to the bounds of its boxes.
        is_vector: whether it is to be float32 in one axis whatever it is.

    Raises:
        UsageError: if nothing of a fixed size can be made of it, or it is too large.
    """
    size = _size(name, space)
    if not 1 <= size <= MAX_OBSERVATION:
        raise UsageError(f"{name} shows {size} numbers at once; 1 to {MAX_OBSERVATION} can be learned from")
    if isinstance(space, gymnasium.spaces.Box):
        box = _box(space)
        if not is_vector or box == Box(size):
            return Shown(space, box, is_bounded=is_bounded)
    return Flattened(space, size, is_bounded=is_bounded)


def action_space(name: str, space: Any) -> ActionSpace:
    """A space of actions, as policies know it.

    Raises:
        UsageError: if they can't.
    """
    match space:
        case gymnasium.spaces.Discrete():
            found: ActionSpace = Discrete(int(space.n))
            number = int(space.n)
        case gymnasium.spaces.Box() if np.issubdtype(space.dtype, np.number):
            number = math.prod(space.shape)
            found = Continuous(number)
        case gymnasium.spaces.MultiDiscrete():
            counts = tuple(int(count) for count in space.nvec.ravel())
            found, number = MultiDiscrete(counts), sum(counts)
        case gymnasium.spaces.MultiBinary():
            number = 2 * math.prod(space.shape)
            found = MultiDiscrete((2,) * math.prod(space.shape))
        case gymnasium.spaces.Dict() | gymnasium.spaces.Tuple():
            found, number = _joined(name, space)
        case _:
            raise UsageError(
                f"{name} acts in {_named(space)}; Discrete, Box, MultiDiscrete, MultiBinary, and Dict and Tuple of "
                "them can be learned, so choose another task"
            )
    if not 1 <= number <= MAX_CHOICES:
        raise UsageError(f"{name} acts in {_named(space)}; 1 to {MAX_CHOICES} numbers can be learned")
    return found


def _joined(name: str, space: Any) -> tuple[ActionSpace, int]:
    """What a Dict or Tuple of actions is in one, and how many numbers that is; raises as `action_space`."""
    parts = [action_space(name, part) for _, part in _parts(space)]
    sizes = [part.size for part in parts if isinstance(part, Continuous)]
    if not sizes:
        counts = tuple(itertools.chain.from_iterable(_counts(part) for part in parts))
        return MultiDiscrete(counts), sum(counts)
    if len(sizes) == len(parts):
        return Continuous(sum(sizes)), sum(sizes)
    raise UsageError(
        f"{name} acts in {_named(space)}: by choices and by numbers at once, and a policy gives the one or the other, "
        "so choose another task"
    )


def _counts(space: ActionSpace) -> tuple[int, ...]:
    match space:
        case Discrete(count):
            return (count,)
        case MultiDiscrete(counts):
            return counts
        case Continuous():
            return ()


def _parts(space: Any) -> list[tuple[Any, Any]]:
    """Of a Dict or Tuple: keys and what is under them, in its order."""
    return list(space.spaces.items() if isinstance(space, gymnasium.spaces.Dict) else enumerate(space.spaces))


class ToEnv:
    """How actions as policies know them become a Gymnasium space's own: numbers from 0, or -1 to 1 over its range."""

    def __init__(self, space: Any) -> None:
        """Read a space that `action_space` knows."""
        self.parts: list[tuple[Any, slice, ToEnv]] = []
        """Of a Dict or Tuple: under which key, which columns of an action, and how they become what is there."""
        self.size = 1
        """Columns of an action."""
        self._is_dict = isinstance(space, gymnasium.spaces.Dict)
        self.start: int | None = None
        """The first number of a Discrete space."""
        self.shape: tuple[int, ...] = space.shape or ()
        self.dtype = space.dtype
        self.first: npt.NDArray[np.int64] | None = None
        if isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
            self.size = 0
            for key, part in _parts(space):
                inner = ToEnv(part)
                self.parts.append((key, slice(self.size, self.size + inner.size), inner))
                self.size += inner.size
            return
        if isinstance(space, gymnasium.spaces.Discrete):
            self.start = int(space.start)
            return
        self.size = math.prod(space.shape)
        if isinstance(space, gymnasium.spaces.MultiDiscrete):
            self.first = np.asarray(space.start, np.int64).ravel()
        elif isinstance(space, gymnasium.spaces.MultiBinary):
            self.first = np.zeros(self.size, np.int64)
        else:
            low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
            bounded = np.isfinite(low) & np.isfinite(high)
            self.low, self.high = low, high
            self.middle = np.add(low, high, out=np.zeros_like(low), where=bounded) / 2
            self.half_range = np.subtract(high, low, out=np.full_like(low, 2.0), where=bounded) / 2

    def __call__(self, actions: Actions) -> list[Any]:
        """One for each environment."""
        if self.start is not None:
            numbers: list[Any] = (actions + self.start).tolist()
            return numbers
        if self.parts:
            columns = [
                inner(actions[:, place.start] if inner.start is not None else actions[:, place])
                for _, place, inner in self.parts
            ]
            keys = [key for key, _, _ in self.parts]
            rows = zip(*columns, strict=True)
            return [dict(zip(keys, row, strict=True)) for row in rows] if self._is_dict else list(rows)
        if self.first is not None:
            return list((actions + self.first).astype(self.dtype).reshape(-1, *self.shape))
        scaled = np.clip(self.middle + self.half_range * actions, self.low, self.high)
        return list(scaled.astype(self.dtype).reshape(-1, *self.shape))

    def one(self, action: Any) -> Any:
        """For one environment: a whole number, or ``[size]``."""
        if self.start is not None:
            return action + self.start
        return self(action[np.newaxis])[0]


class Flattened(Shown):
    """What an environment with any other space may show, as float32 in one axis; see the head."""

    def __init__(self, space: Any, size: int, *, is_bounded: bool) -> None:
        self.box, self.shape = Box(size), (size,)
        self.dtype = np.dtype(np.void)  # of no observation: all are read
        self._kept = np.dtype(np.float32)
        self._size = size
        low, high = np.zeros(size), np.ones(size)
        self._write = _writer(space, low, high)
        self._hold(low, high, is_bounded)

    def read(self, observation: object) -> Floats:
        """What was shown, in one axis.

        Raises:
            BadAnswerError: if it is nothing of the space.
        """
        found: Floats = np.zeros(self._size, np.float32)
        self._write(observation, found)
        return found


def _box(space: Any) -> Box:
    """What one Box is to those who learn."""
    axes = len(space.shape)
    if space.dtype == np.uint8:
        return Box(space.shape if axes in (1, *_AXES_OF_IMAGES) else math.prod(space.shape), "uint8")
    return Box(space.shape if axes == _AXES_OF_IMAGES[-1] else math.prod(space.shape))


def _size(name: str, space: Any) -> int:
    """How many numbers become of a space.

    Raises:
        UsageError: if that is not always the same.
    """
    match space:
        case gymnasium.spaces.Box() | gymnasium.spaces.MultiBinary():
            return math.prod(space.shape)
        case gymnasium.spaces.Discrete():
            return int(space.n)
        case gymnasium.spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case gymnasium.spaces.Dict():
            return sum(_size(name, part) for part in space.spaces.values())
        case gymnasium.spaces.Tuple():
            return sum(_size(name, part) for part in space.spaces)
        case _:
            raise UsageError(
                f"{name} shows {type(space).__name__}, which is not always as many numbers; Box, Discrete, "
                "MultiDiscrete, MultiBinary, and Dict and Tuple of them can be learned from: leave it out (--env-set "
                "observe=KEY, of a Dict), or choose another task"
            )


def _writer(space: Any, low: _Bounds, high: _Bounds) -> _Write:
    """What reads a space; its bounds are put into ``low`` and ``high``, which are as long as what it writes."""
    match space:
        case gymnasium.spaces.Box():
            return _box_writer(space, low, high)
        case gymnasium.spaces.Discrete():
            return _numbers_writer((), np.array([int(space.n)]), np.array([int(space.start)]))
        case gymnasium.spaces.MultiDiscrete():
            starts = np.asarray(space.start, np.int64).ravel()
            return _numbers_writer(space.shape, space.nvec.ravel().astype(np.int64), starts)
        case gymnasium.spaces.MultiBinary():
            return _bits_writer(space.shape)
        case gymnasium.spaces.Dict():
            return _parts_writer(dict(space.spaces), low, high, _entries)
        case _:
            return _parts_writer(dict(enumerate(space.spaces)), low, high, _members)


def _box_writer(space: Any, low: _Bounds, high: _Bounds) -> _Write:
    shape, dtype = space.shape, np.dtype(space.dtype)
    scale = np.float32(1 / _MAX_BYTE if dtype == np.uint8 else 1)
    low[:], high[:] = space.low.ravel() * scale, space.high.ravel() * scale

    def write(shown: Any, out: Floats) -> None:
        out[:] = read_box(shown, shape, dtype).ravel()
        if dtype == np.uint8:
            out *= scale

    return write


def _numbers_writer(shape: tuple[int, ...], counts: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> _Write:
    begins = np.cumsum([0, *counts[:-1]])

    def write(shown: Any, out: Floats) -> None:
        numbers = _whole(shown, shape).ravel() - starts
        if ((numbers < 0) | (numbers >= counts)).any():
            index = int(np.flatnonzero((numbers < 0) | (numbers >= counts))[0])
            most = starts[index] + counts[index] - 1
            raise BadAnswerError(
                f"an observation holds the number {numbers[index] + starts[index]}, not {starts[index]} to {most}"
            )
        out[begins + numbers] = 1

    return write


def _bits_writer(shape: tuple[int, ...]) -> _Write:
    def write(shown: Any, out: Floats) -> None:
        bits = np.asarray(shown)
        bits = _whole(bits.astype(np.int8) if bits.dtype == np.bool_ else bits, shape).ravel()
        if ((bits != 0) & (bits != 1)).any():
            raise BadAnswerError("an observation holds other numbers than 0 and 1 where its space has bits")
        out[:] = bits

    return write


def _parts_writer(
    spaces: Mapping[Any, Any], low: _Bounds, high: _Bounds, parts_of: Callable[[Any, Any], Mapping[Any, Any]]
) -> _Write:
    writers, start = [], 0
    for key, space in spaces.items():
        part = slice(start, start + _size("", space))
        writers.append((key, part, _writer(space, low[part], high[part])))
        start = part.stop

    def write(shown: Any, out: Floats) -> None:
        parts = parts_of(shown, spaces)
        for key, part, inner in writers:
            inner(parts[key], out[part])

    return write


def _entries(shown: Any, spaces: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if not isinstance(shown, Mapping) or shown.keys() != spaces.keys():
        raise BadAnswerError(f"an observation is {what_of(shown)} and not a mapping with the keys of its space")
    return shown


def _members(shown: Any, spaces: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if not isinstance(shown, tuple | list) or len(shown) != len(spaces):
        raise BadAnswerError(f"an observation is {what_of(shown)} and not {len(spaces)} values, as its space says")
    return dict(enumerate(shown))


def _whole(shown: Any, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Whole numbers of this shape.

    Raises:
        BadAnswerError: if these are none.
    """
    numbers = np.asarray(shown)
    if numbers.shape != shape:
        raise BadAnswerError(f"an observation is of shape {numbers.shape} and not {shape}, as its space says")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise BadAnswerError(f"an observation holds {numbers.dtype} and not whole numbers, as its space says")
    return numbers.astype(np.int64)


def _named(space: Any) -> str:
    return str(space)[:120]
