"""Waiting for one's turn: what `shoal.node.budgets.Turns` and `shoal.node.mesh.intake` decide, for tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from shoal.node.budgets import Bucket, Turns
from shoal.node.mesh.intake import Intake
from shoal.node.mesh.relay_limits import MAX_PIECE_BYTES
from shoal.protocol.ids import PeerId

TICK_S: Final = 0.02
"""Between two looks at whose messages may be read now: each look costs as much as reading one."""


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


class Reading:
    """Lets what peers send be read; `run` must run for what a stranger sends to be read that had to wait.

    Args:
        intake: how fast; None if as fast as it comes.
        is_wanted: whose is read as it comes.
    """

    def __init__(self, intake: Intake | None, is_wanted: Callable[[PeerId], bool]) -> None:
        self.intake = intake
        self._is_wanted = is_wanted
        self._waiting: dict[PeerId, set[trio.Event]] = {}
        self._asked = trio.Event()

    def reader(self, peer: PeerId, user: str) -> Reader:
        """One connection to a peer.

        Args:
            peer: whose.
            user: whom it counts for, see `shoal.node.budgets.user_of`.
        """
        return Reader(self, peer, user)

    def let_go(self, peer: PeerId) -> None:
        """It is wanted from now on: nothing of it waits any more."""
        for turn in self._waiting.pop(peer, ()):
            turn.set()

    def statistics(self) -> dict[str, int]:
        """Counters, and how much waits."""
        if self.intake is None:
            return {"reads_waiting": 0, "reads_held_up": 0}
        return {"reads_waiting": self.intake.num_waiting, "reads_held_up": self.intake.num_held_up}

    async def run(self) -> None:
        """For ever."""
        while True:
            self._asked = trio.Event()
            self._grant()
            now = trio.current_time()
            at = None if self.intake is None else self.intake.next_at(now)
            if at is None:
                await self._asked.wait()
            else:
                await trio.sleep_until(max(at, now + TICK_S))

    def is_free(self, peer: PeerId) -> bool:
        """Whether what it sends is read as it comes."""
        return self._is_wanted(peer)

    async def turn(self, intake: Intake, peer: PeerId, user: str, bucket: Bucket, num_bytes: int) -> None:
        """Wait until so many bytes of it may be read, at most `MAX_PIECE_BYTES`."""
        turn = trio.Event()
        intake.ask(user, bucket, num_bytes, turn, trio.current_time())
        self._grant()
        if turn.is_set():
            return
        intake.num_held_up += 1
        self._waiting.setdefault(peer, set()).add(turn)
        self._asked.set()
        try:
            await turn.wait()
        finally:
            intake.forget(turn)
            waiting = self._waiting.get(peer)
            if waiting is not None:
                waiting.discard(turn)
                if not waiting:
                    del self._waiting[peer]

    def _grant(self) -> None:
        if self.intake is not None:
            for turn in self.intake.granted(trio.current_time()):
                turn.set()  # type: ignore[attr-defined]  # a ticket of `turn`


class Reader:
    """One connection, as far as reading from it goes."""

    __slots__ = ("_bucket", "_intake", "_peer", "_reading", "_user")

    def __init__(self, reading: Reading, peer: PeerId, user: str) -> None:
        self._reading = reading
        self._peer = peer
        self._user = user
        self._intake = reading.intake
        self._bucket = None if reading.intake is None else reading.intake.bucket()

    async def turn(self, num_bytes: int) -> None:
        """Wait until so many more bytes may be read."""
        while num_bytes > 0 and self._intake is not None and self._bucket is not None:
            if self._reading.is_free(self._peer):
                return
            piece = min(num_bytes, MAX_PIECE_BYTES)
            await self._reading.turn(self._intake, self._peer, self._user, self._bucket, piece)
            num_bytes -= piece
