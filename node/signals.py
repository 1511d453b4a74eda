"""A change that anybody can wait for."""

from __future__ import annotations

import trio


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
