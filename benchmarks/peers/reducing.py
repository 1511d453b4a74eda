"""What the peers of ``benchmarks/exchange.py`` have in common: their arrays, what comes of them, and their commands.

A peer prints a line when it stands, then obeys lines of its standard input: at ``prepare`` it makes all ready for one
round and answers ``{}``; at ``go`` it reduces, and answers with the seconds that this took and how wrong the result is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def array_of(rank: int, numel: int) -> Array:
    """What a peer brings."""
    return np.random.default_rng(rank).standard_normal(numel, np.float32)


def mean_of(size: int, numel: int) -> npt.NDArray[np.float64]:
    """What should come of it."""
    return np.asarray(sum(array_of(rank, numel).astype(np.float64) for rank in range(size)) / size)


def say(**answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def obey(size: int, numel: int, prepare: Callable[[], None], reduce: Callable[[], Array]) -> None:
    """Until the standard input ends."""
    mean = mean_of(size, numel)
    for line in sys.stdin:
        if line.strip() == "prepare":
            prepare()
            say()
        else:
            began = time.perf_counter()
            result = reduce()
            seconds = time.perf_counter() - began
            say(seconds=seconds, max_error=float(np.abs(result - mean).max()))
