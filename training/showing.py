"""Episodes of a trained policy, to be looked at: what they earn, and how they look, as a GIF.

A GIF is held to `MAX_FRAMES` and `MAX_FRAMES_PER_S`: of a faster environment some frames are left out, so that it still
runs at its own speed; what comes later than the last frame is played and not recorded. Needs the extra ``play``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ShoalError, UsageError
from shoal.training.tasks import VectorEnv
from shoal.training.tasks.base import Lenient
from shoal.training.tasks.failures import TaskFailedError, in_words
from shoal.training.tasks.gym import GymTask, GymVectorEnv
from shoal.training.tasks.source import seed_of
from shoal.training.trained import Trained

MAX_FRAMES: Final = 1500
MAX_FRAMES_PER_S: Final = 25.0
MAX_SIDE: Final = 480
MAX_STEPS: Final = 100_000
"""Of one episode."""
_RGB: Final = 3


class Film:
    """Frames of one GIF."""

    def __init__(self, path: Path, frames_per_s: float) -> None:
        """Begin one.

        Raises:
            UsageError: if Pillow is not installed, or the file is to be something else than a GIF.
        """
        if path.suffix.lower() != ".gif":
            raise UsageError(f"{path.name} is to be no GIF; give a name that ends with .gif")
        try:
            from PIL import Image
        except ImportError as error:
            raise UsageError("recording needs Pillow: pip install 'shoal[play]'") from error
        self._images, self._path = Image, path
        self._every = max(1, round(frames_per_s / MAX_FRAMES_PER_S))
        self._duration_ms = 1000 * self._every / frames_per_s
        self._frames: list[Any] = []
        self._shown = 0

    def add(self, frame: Any) -> None:
        """What is seen now: bytes ``[rows, columns, 3]``.

        Raises:
            TaskFailedError: if it is none of these.
        """
        self._shown += 1
        if (self._shown - 1) % self._every or len(self._frames) >= MAX_FRAMES:
            return
        pixels = np.asarray(frame)
        if pixels.ndim != _RGB or pixels.shape[2] != _RGB or pixels.dtype != np.uint8:
            raise TaskFailedError(f"the environment draws {pixels.dtype} of shape {pixels.shape} and no colour image")
        image = self._images.fromarray(pixels)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        self._frames.append(image.quantize(64, dither=self._images.Dither.NONE))

    def write(self) -> None:
        """Put it into the file.

        Raises:
            ShoalError: if it cannot be written.
        """
        first, *rest = self._frames
        try:
            first.save(
                self._path, save_all=True, append_images=rest, duration=self._duration_ms, loop=0, optimize=False
            )
        except OSError as error:
            raise ShoalError(f"{self._path} cannot be written: {error.strerror or error}") from error


def show(trained: Trained, *, episodes: int, seed: int, out: Path | None) -> list[float]:
    """Play episodes without chance, one after the other.

    Args:
        trained: who plays.
        episodes: how many.
        seed: of all of them.
        out: a GIF of them; none, if None.

    Returns:
        The undiscounted return of each.

    Raises:
        UsageError: if the task can't be seen.
        TaskFailedError: if its environment fails.
    """
    if out is None:
        task = trained.task
        env: VectorEnv = task.make_plain(1) if isinstance(task, Lenient) else task.make(1)
        return _play(trained, env, episodes, seed, None)
    if not isinstance(trained.task, GymTask):
        raise UsageError(f"{trained.task.name} cannot be drawn; leave --out away to see its returns")
    shown = trained.task.make_shown("rgb_array")
    film = Film(out, shown.frames_per_s)
    returns = _play(trained, shown, episodes, seed, film)
    film.write()
    return returns


def _play(trained: Trained, env: VectorEnv, episodes: int, seed: int, film: Film | None) -> list[float]:
    returns = []
    try:
        for number in range(episodes):
            observations, act = env.reset([seed_of(seed, "play", number)]), trained.acting()
            total = 0.0
            for _ in range(MAX_STEPS):
                if film is not None and isinstance(env, GymVectorEnv):
                    film.add(_frame(env, trained))
                step = env.step(act(observations))
                if step.failed:
                    raise TaskFailedError(trained.task.failures.summary)
                observations = step.observations
                total += float(step.rewards[0])
                if step.terminated[0] or step.truncated[0]:
                    break
            returns.append(total)
    finally:
        env.close()
    return returns


def _frame(env: GymVectorEnv, trained: Trained) -> Any:
    """How it looks now.

    Raises:
        TaskFailedError: if it can't be drawn.
    """
    try:
        return env.frame()
    except Exception as error:  # other people's code
        words = in_words(error)
        raise TaskFailedError(f"{trained.task.name} cannot be drawn: {words}; pip install 'shoal[play]'") from error
