"""Environments that are used again, since to make one costs as much as thousands of its steps.

As many are made as plays go on side by side. One that raised is let go of, as nobody knows what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Pool:
    """Environments of one kind."""

    def __init__(self, make: Callable[[], Any], close: Callable[[Any], None]) -> None:
        self._make, self._close = make, close
        self._free: list[Any] = []

    @contextmanager
    def one(self) -> Iterator[Any]:
        """One for one play, which resets it first."""
        env = self._free.pop() if self._free else self._make()
        try:
            yield env
        except GeneratorExit:  # the play is not wanted any more; the environment is as good as before
            self._free.append(env)
            raise
        except BaseException:
            self._close(env)
            raise
        self._free.append(env)
