"""What other frameworks may be like; `test_foreign` installs it as a package."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from foreign_plays import Echo  # plays.py, under another name

from shoal.training.tasks.cast import Chance
from shoal.training.tasks.foreign import Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shoal.training.tasks.play import Role, Take


class Acting:
    """Does what `Echo` does, but for what a function makes of it."""

    def __init__(self, change: Any) -> None:
        self.change, self.echo, self.calls = change, Echo(), 0

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[Any], np.ndarray]:
        self.calls += 1
        acts, log_probs = self.echo.act(takes, rng, greedy)
        return self.change(self, acts), log_probs


def seat(change: Any) -> Any:
    """What makes one that does that."""

    def make(roles: Mapping[str, Role], seed: int) -> Acting:
        return Acting(change)

    return make


def random(roles: Mapping[str, Role], seed: int) -> Chance:
    """Any act."""
    return Chance()


def broken(roles: Mapping[str, Role], seed: int) -> Any:
    """Nobody can sit here."""
    raise RuntimeError("no licence")


def _sleep(self: Acting, acts: list[Any]) -> list[Any]:
    time.sleep(3600)
    return acts


def _end(self: Acting, acts: list[Any]) -> list[Any]:
    if self.calls == 2:
        os._exit(3)
    return acts


def _end_once(self: Acting, acts: list[Any]) -> list[Any]:
    mark = Path(__file__).with_name("has_ended")
    if not mark.exists():
        mark.touch()
        os._exit(3)
    return [0] * len(acts)


def _odd(self: Acting, acts: list[Any]) -> list[Any]:
    return [0] * len(acts)  # not always legal


echo = seat(lambda self, acts: acts)
sleeps = seat(_sleep)
ends = seat(_end)
ends_once = seat(_end_once)
odd = seat(_odd)
few = seat(lambda self, acts: acts[1:])
program = Program((sys.executable, "-P", "-m", "shoal.training.tasks.seat_host", "echo"))
nonsense = Program((sys.executable, "-c", "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'x' * 99)"))
missing = Program(("/no/such/program",))
neither = 7
