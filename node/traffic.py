"""How many bytes of contents a node sends, or fetches, in a second; and whose go first.

One for each direction, for the whole node: a token bucket of bytes. What goes by it waits until the bucket is not
empty, and takes out all its bytes then, so that over any time no more goes than the rate allows, what the bucket holds
and one request: a block, or a run of those of a folder. Peers that this node wants (`Connections.wanted`) go first,
among them whoever came first; the others have what they leave. Calls, gossip and ops are not counted: they are few, and
what a run stands on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import trio

from shoal.node.budgets import Bucket

BURST_S: Final = 0.25
"""What a bucket holds, in seconds of its rate."""
MAX_AHEAD_S: Final = 5.0
"""If what waits before something would take longer, it is refused: whoever asks tries elsewhere, or in a while."""
MIN_BYTES_PER_S: Final = 125_000.0
"""At a lower rate, whoever asks for a block takes the wait for it for silence."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """Something that waits for its turn."""

    num_bytes: int
    has_turn: trio.Event = field(default_factory=trio.Event)


class Traffic:
    """One direction.

    Attributes:
        per_s: bytes a second; None if as many as there are.
        num_bytes: that went so far.
        num_refused: how often too much waited.
    """

    def __init__(self, per_s: float | None = None) -> None:
        self.per_s = per_s
        self.num_bytes = 0
        self.num_refused = 0
        self._bucket = None if per_s is None else Bucket(per_s, per_s * BURST_S)
        self._members: deque[_Waiter] = deque()
        self._others: deque[_Waiter] = deque()

    async def turn(self, num_bytes: int, *, is_member: bool, is_patient: bool = False) -> bool:
        """Wait until so many bytes may go, and count them.

        Args:
            num_bytes: of one thing: a block, or a run of them.
            is_member: whether they are to or from a peer that this node wants.
            is_patient: whether they wait however much waits before them; how many do is bounded elsewhere then.

        Returns:
            False, at once, if too much waits.
        """
        bucket = self._bucket
        if bucket is None or self.per_s is None:
            self.num_bytes += num_bytes
            return True
        ahead = sum(each.num_bytes for each in (*self._members, *(() if is_member else self._others)))
        if ahead > MAX_AHEAD_S * self.per_s and not is_patient:
            self.num_refused += 1
            return False
        waiter = _Waiter(num_bytes)
        queue = self._members if is_member else self._others
        queue.append(waiter)
        try:
            while True:
                self._let_go(bucket)
                if waiter.has_turn.is_set():
                    return True
                with trio.move_on_at(bucket.one_at(trio.current_time())):
                    await waiter.has_turn.wait()
        finally:
            if not waiter.has_turn.is_set():
                queue.remove(waiter)

    def correct(self, num_bytes: int) -> None:
        """So many more bytes went than were counted, or fewer."""
        self.num_bytes += num_bytes
        if self._bucket is not None:
            self._bucket.spend(trio.current_time(), num_bytes)

    def _let_go(self, bucket: Bucket) -> None:
        now = trio.current_time()
        while bucket.left(now) >= 1 - 1e-6 and (queue := self._members or self._others):
            waiter = queue.popleft()
            bucket.spend(now, waiter.num_bytes)
            self.num_bytes += waiter.num_bytes
            waiter.has_turn.set()
