"""Episodes of a trained policy, to be looked at: what they earn, and how they look, as a GIF or as MP4 (H.264).

Either is held to `MAX_FRAMES` and `MAX_FRAMES_PER_S`: of a faster environment some frames are left out, so that it
still runs at its own speed; what comes later than the last frame is played and not recorded. A GIF needs Pillow, MP4
PyAV, which comes with aiortc; the extra ``play`` brings what draws Gymnasium's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

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
_SMALLEST: Final = 2
"""Pixels of a side, as H.264 halves them for colours."""


class Film(Protocol):
    """A file that frames are put into."""

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """The next, ``[rows, columns, 3]``, all of one size."""
        ...

    def close(self) -> None:
        """No more of them."""
        ...


class Gif:
    """An animated picture of `MAX_SIDE` at most, which begins again when it is over.

    Raises:
        UsageError: if Pillow is not installed.
    """

    def __init__(self, path: Path, frames_per_s: float) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise UsageError("recording needs Pillow: pip install 'shoal[play]'") from error
        self._images, self._path, self._duration_ms = Image, path, 1000 / frames_per_s
        self._frames: list[Any] = []

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """See `Film`."""
        image = self._images.fromarray(pixels)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        self._frames.append(image.quantize(64, dither=self._images.Dither.NONE))

    def close(self) -> None:
        """Write it."""
        first, *rest = self._frames
        first.save(self._path, save_all=True, append_images=rest, duration=self._duration_ms, loop=0, optimize=False)


class Mp4:
    """A film of the frames' own size, less a row or column where that is odd, as players want it.

    Raises:
        UsageError: if PyAV is not installed.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path, frames_per_s: float) -> None:
        try:
            import av
        except ImportError as error:
            raise UsageError("MP4 needs PyAV: pip install av; or give a name that ends with .gif") from error
        self._av: Any = av
        self._file: Any = av.open(str(path), "w", format="mp4")
        self._stream: Any = self._file.add_stream("libx264", rate=Fraction(frames_per_s).limit_denominator(1000))
        self._stream.pix_fmt = "yuv420p"
        self._is_begun = False

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """See `Film`."""
        rows, columns = (size - size % 2 for size in pixels.shape[:2])
        if not self._is_begun:
            self._stream.height, self._stream.width, self._is_begun = rows, columns, True
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:rows, :columns]), format="rgb24")
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left of it."""
        self._file.mux(self._stream.encode())
        self._file.close()


FILMS: Final[dict[str, Callable[[Path, float], Film]]] = {".gif": Gif, ".mp4": Mp4}


class Recording:
    """Frames on their way into a file: checked, and no more than it is to have."""

    def __init__(self, path: Path, frames_per_s: float) -> None:
        """Begin one.

        Raises:
            UsageError: if it is to be something else than `FILMS`, or what writes it is not installed.
            ShoalError: if it cannot be written.
        """
        kind = FILMS.get(path.suffix.lower())
        if kind is None:
            raise UsageError(f"{path.name} is to be no GIF and no MP4; give a name that ends with .gif or .mp4")
        self._path, self._shown, self._added = path, 0, 0
        self._shape: tuple[int, ...] = ()
        self._every = max(1, round(frames_per_s / MAX_FRAMES_PER_S))
        with self._writing():
            self._film = kind(path, frames_per_s / self._every)

    def add(self, frame: Any) -> None:
        """What is seen now: bytes ``[rows, columns, 3]``.

        Raises:
            TaskFailedError: if it is none of these, or of another size than the first.
            ShoalError: if it cannot be written.
        """
        self._shown += 1
        if (self._shown - 1) % self._every or self._added >= MAX_FRAMES:
            return
        pixels = np.asarray(frame)
        if pixels.ndim != _RGB or pixels.shape[2] != _RGB or pixels.dtype != np.uint8 or min(pixels.shape) < _SMALLEST:
            raise TaskFailedError(f"the environment draws {pixels.dtype} of shape {pixels.shape} and no colour image")
        if pixels.shape != (self._shape or pixels.shape):
            raise TaskFailedError(
                f"the environment draws images of {self._shape} and of {pixels.shape}, and not of one size"
            )
        self._shape = pixels.shape
        self._added += 1
        with self._writing():
            self._film.add(pixels)

    def close(self) -> None:
        """No more of them.

        Raises:
            ShoalError: if it cannot be written.
        """
        with self._writing():
            self._film.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # PyAV's are
            raise ShoalError(f"{self._path} cannot be written: {error.strerror or error}") from error


def show(trained: Trained, *, episodes: int, seed: int, out: Path | None) -> list[float]:
    """Play episodes without chance, one after the other.

    Args:
        trained: who plays.
        episodes: how many.
        seed: of all of them.
        out: a GIF or MP4 of them; none, if None.

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
    film = Recording(out, shown.frames_per_s)
    returns = _play(trained, shown, episodes, seed, film)
    film.close()
    return returns


def _play(trained: Trained, env: VectorEnv, episodes: int, seed: int, film: Recording | None) -> list[float]:
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
