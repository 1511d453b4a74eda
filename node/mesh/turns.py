"""Waiting for one's turn: what `shoal.node.budgets.Turns` decides, for tasks."""

from __future__ import annotations

import trio

from shoal.node.budgets import Turns


class Queue:
    """Lets those in whose turn it is; `run` must run for anybody to get in who had to wait.

    Args:
        turns: whose turn it is.
        wait_s: how long one waits at most.
    """

    def __init__(self, turns: Turns[str], wait_s: float) -> None:
        self._turns = turns
        self._wait_s = wait_s
        self._asked = trio.Event()

    async def run(self) -> None:
        """For ever."""
        while True:
            self._grant()
            at = self._turns.next_at(trio.current_time())
            if at is not None:
                await trio.sleep_until(at)
            else:
                self._asked = trio.Event()
                await self._asked.wait()

    async def turn(self, user: str) -> bool:
        """Wait for it; False if that takes too long, or too many wait."""
        turn = trio.Event()
        if not self._turns.ask(user, turn):
            return False
        self._grant()
        if turn.is_set():
            return True
        self._asked.set()
        try:
            with trio.move_on_after(self._wait_s):
                await turn.wait()
        finally:
            self._turns.forget(user, turn)
        return turn.is_set()

    def _grant(self) -> None:
        for turn in self._turns.granted(trio.current_time()):
            turn.set()  # type: ignore[attr-defined]  # a ticket of `turn`
