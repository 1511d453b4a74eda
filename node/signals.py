"""Waiting: for a change, or for about as long as others wait."""

from __future__ import annotations

import math

import trio


def about(seconds: float) -> float:
    """A time in about so many seconds, for looks that are made now and then: such times are whole seconds.

    Each wake of a process costs most of a millisecond, whatever is done then, so that several do better to share one.
    What is shorter than a second is taken as it is.
    """
    at = trio.current_time() + seconds
    return at if seconds < 1 or math.isinf(at) else float(round(at))


class Signal:
    """Wakes everybody who waits for a change."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        """Until the next change."""
        await self._event.wait()
