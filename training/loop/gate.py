"""Where a training loop and the thread that speaks to the node for it meet.

The loop's own thread is the only one that ever touches its tensors, and only while it is in `Gate.step`: so nothing
changes under a forward pass, and whatever PyTorch ties to a thread (devices, streams, modes) is as the loop has it.
The other thread counts what the loop has done, asks the loop to stay when something is to be done with the tensors,
and hands it that to do.

The loop stays in `step` of itself once it has done its share of an epoch, until the average is there: it never runs
ahead of it, however fast it is. While there is no node, nothing keeps it: it trains on alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from shoal.protocol.errors import ShoalError

News = TypeVar("News")
Result = TypeVar("Result")

POLL_S: Final = 0.02
"""How often `count_to` looks whether it is over, which nobody tells it."""


class GateClosedError(ShoalError):
    """The loop has ended, or failed; nothing more can be done with its tensors."""


class Gate(Generic[News]):
    """Between one loop and one thread that speaks for it.

    Attributes:
        samples: that the loop has trained on and that no average has counted yet.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._turn = threading.Lock()  # a loop may call from several threads, one after the other
        self._changed = threading.Condition()
        self._wanted = math.inf
        self._is_held = False
        self._is_here = False
        self._task: Callable[[], Any] | None = None
        self._made: list[Any] = []
        self._news: News | None = None
        self._failure: Exception | None = None
        self._is_closed = False

    # The loop's side.

    def step(self, num_samples: int) -> News | None:
        """The loop has trained on so many more; stays as long as it is asked to. What has happened since the last call.

        Raises:
            ShoalError: if the loop cannot be averaged (any more).
        """
        with self._turn, self._changed:
            self.samples += num_samples
            return self._stay(lambda: self._is_held or self.samples >= self._wanted)

    def wait_for_news(self) -> News | None:
        """Stay until something has happened; None if the gate was closed. Raises as `step` does."""
        with self._turn, self._changed:
            return self._stay(lambda: self._is_held or self._news is None)

    def _stay(self, is_to: Callable[[], bool]) -> News | None:
        self._is_here = True
        self._changed.notify_all()
        try:
            while self._failure is None and not self._is_closed and is_to():
                if self._task is None:
                    self._changed.wait()
                    continue
                task, self._task = self._task, None
                try:
                    self._made.append(task())
                except BaseException as error:
                    self._failure = GateClosedError(f"the loop's tensors cannot be used: {error!r:.300}")
                    raise
                finally:
                    self._changed.notify_all()
        finally:
            self._is_here = False
        if self._failure is not None:
            raise self._failure
        news, self._news = self._news, None
        return news

    def close(self) -> None:
        """The loop has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # The other thread's.

    @property
    def is_open(self) -> bool:
        """Whether the loop goes on, as far as is known."""
        return not self._is_closed and self._failure is None

    def count_to(self, num_samples: int, is_over: Callable[[], bool]) -> int:
        """Wait until the loop has done so many since it was averaged, or ``is_over``; how many those are.

        The loop stays in its step when it has, until it is let go, or more is asked of it.
        """
        with self._changed:
            self._wanted = num_samples
            self._changed.notify_all()
            while self.is_open and self.samples < self._wanted and not is_over():
                self._changed.wait(POLL_S)
            return self.samples

    def hold(self) -> None:
        """Wait for the loop to come to its next step, and keep it there until `let_go`.

        Raises:
            GateClosedError: if it does not come.
        """
        with self._changed:
            self._is_held = True
            self._changed.notify_all()
            while not self._is_here:
                self._require_open()
                self._changed.wait()

    def do(self, task: Callable[[], Result]) -> Result:
        """Have the loop's thread, which is held, do something.

        Raises:
            GateClosedError: if that fails, or the loop ends.
        """
        with self._changed:
            self._made.clear()
            self._task = task
            self._changed.notify_all()
            while not self._made:
                self._require_open()
                self._changed.wait()
            result: Result = self._made.pop()
            return result

    def let_go(self, num_more: float = math.inf) -> None:
        """The loop goes on, for so many more samples unless it is told otherwise meanwhile."""
        with self._changed:
            self._is_held = False
            self._wanted = self.samples + num_more
            self._task = None
            self._changed.notify_all()

    def tell(self, news: News, *, samples: int) -> None:
        """Something happened, after which so many samples wait for the next average."""
        with self._changed:
            self._news = news
            self.samples = samples
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """The loop cannot be averaged, and hears why at its next step."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _require_open(self) -> None:
        if not self.is_open:
            raise GateClosedError(str(self._failure or "the training loop has ended"))
