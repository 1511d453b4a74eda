"""What went wrong in the environments of a task: where it can be read, and when it is too much.

Environments are other people's code. One that fails is replaced and the others go on; the owner reads why in one file,
`FILE` in the run's folder: one entry per failure, with its traceback. A single failure in a million steps is nobody's
business but his. When failures come faster than one per `FORGIVEN_STEPS` steps and their sum rises above `MAX_LEVEL`,
the task is given up with the last reason (`TaskFailedError`): no run is of use whose environments do not work.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.protocol.errors import ShoalError
from shoal.training.watch import Act, HungError

log = logging.getLogger(__name__)

FILE: Final = "environments.log"
MAX_FILE_BYTES: Final = 1024 * 1024
MAX_ENTRY_CHARS: Final = 16_384
MAX_WORDS: Final = 300
MAX_LEVEL: Final = 8.0
FORGIVEN_STEPS: Final = 1000
HUNG_COSTS: Final = 5.0
"""As much as so many others: each takes seconds from everybody."""


class TaskFailedError(ShoalError):
    """Too many environments of a task failed; another start will hardly help before its owner has looked at why."""


class BadAnswerError(ShoalError):
    """An environment answered with what no environment may answer with."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something failed.

    Attributes:
        index: number of the environment among those beside it.
        act: what it was asked to do.
        seed: of its last seeded reset.
        step: how many steps it had taken since.
    """

    index: int
    act: Act
    seed: int | None = None
    step: int = 0


class Failures:
    """Those of one task in one process.

    Attributes:
        task: its name.
        count: how many there were.
        last: the newest, in one line; none yet: empty.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.count = 0
        self.last = ""
        self._level = 0.0
        self._steps = 0
        self._path: Path | None = None

    def keep_in(self, folder: Path) -> Path:
        """Write what comes into `FILE` in this folder, which is made; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        return self._path

    def stepped(self, num_steps: int) -> None:
        """Environments took so many steps and none failed."""
        self._steps += num_steps

    def add(self, place: Place, error: BaseException) -> None:
        """One failed.

        Raises:
            TaskFailedError: if that is too much.
        """
        self.count += 1
        self.last = f"environment {place.index} of {self.task} failed in {place.act.words}: {in_words(error)}"
        self._write(place, error)
        log.warning("%s", self.last)
        self._level = max(0.0, self._level - self._steps / FORGIVEN_STEPS)
        self._steps = 0
        self._level += HUNG_COSTS if isinstance(error, HungError) else 1.0
        if self._level > MAX_LEVEL:
            raise TaskFailedError(self.summary) from error

    @property
    def summary(self) -> str:
        """The newest, and where to read of all."""
        where = f"; see {self._path}" if self._path is not None else ""
        return f"{self.last} ({self.count} in all){where}"

    def _write(self, place: Place, error: BaseException) -> None:
        if self._path is None:
            return
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.last}\n"
        seed = "" if place.seed is None else f"seed {place.seed}, "
        report = "".join(traceback.format_exception(error))[-MAX_ENTRY_CHARS:]
        append(self._path, f"{head}{seed}{place.step} steps after its reset\n{report}\n")


def append(path: Path, text: str) -> None:
    """Add to a file that is no longer than `MAX_FILE_BYTES`, twice; what is older goes. It fails without a word."""
    try:
        if path.exists() and path.stat().st_size > MAX_FILE_BYTES:
            path.replace(path.with_suffix(".log.1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123  a descriptor
            file.write(text)
    except OSError as failure:
        log.warning("%s cannot be written: %s", path, failure)


def in_words(error: BaseException) -> str:
    """An error in one line."""
    try:
        text = str(error)
    except Exception:  # another person's class
        text = "its error has no words"
    text = " ".join(text.split())[:MAX_WORDS]
    if isinstance(error, BadAnswerError | HungError):
        return text
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}{_place_of(error)}"


def _place_of(error: BaseException) -> str:
    """Where one without words was raised, since nothing else tells what it is about."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" in line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
