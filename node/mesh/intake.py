"""How fast what strangers send is read: whose bytes are next. Pure.

Names cost nothing, and a line of a gigabit deciphered takes half a core. So what peers send that this node does not
want (`Connections.wanted`) is read at a rate: each connection has one, and all of them together have one, which they
share by IP as the circuits of a relay do (`shoal.node.mesh.relay_limits.FairShare`). What they send beyond that is not
refused and not dropped. It stays in the system's buffers, and TCP holds the sender up.

A message is paid for before it is read, and counts as `LEAST_BYTES` at least: a small one costs this node as much as
some kilobytes. One message of each connection waits at a time, so what waits is bounded by the connections.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import Final

from shoal.node.budgets import Bucket, BudgetLimits
from shoal.node.mesh.relay_limits import MAX_PIECE_BYTES, FairShare, RelayLimits

LEAST_BYTES: Final = 8192
"""What a message counts as at least."""
BURST_S: Final = 0.5
"""What may come at once on a connection, in seconds of its rate."""


class Intake:
    """Lets strangers' messages be read. ``ask`` for one, and look into `granted` at `next_at` or earlier.

    Args:
        per_s: bytes a second of all strangers together.
        each_per_s: of one connection.

    Attributes:
        num_held_up: messages that had to wait.
        num_bytes: that were let in.
    """

    def __init__(self, per_s: float, each_per_s: float) -> None:
        self.num_held_up = 0
        self.num_bytes = 0
        self._each_per_s = each_per_s
        self._share = FairShare(per_s)
        self._numbers = count()
        self._early: list[tuple[float, int, object]] = []  # those whose own bucket is empty until then
        self._asked: dict[object, tuple[str, int]] = {}  # by ticket; user and bytes

    @property
    def num_waiting(self) -> int:
        """Messages that wait."""
        return len(self._asked)

    def bucket(self) -> Bucket:
        """That of a new connection."""
        return Bucket(self._each_per_s, self._each_per_s * BURST_S)

    def ask(self, user: str, bucket: Bucket, num_bytes: int, ticket: object, now: float) -> None:
        """Wait for a message to be read; `granted` gives the ticket back when it may be.

        Args:
            user: whom it comes from, as far as shares go.
            bucket: of its connection.
            num_bytes: of it, at most `MAX_PIECE_BYTES`.
            ticket: of it.
            now: the time.
        """
        cost = min(MAX_PIECE_BYTES, max(LEAST_BYTES, num_bytes))
        self.num_bytes += num_bytes
        at = bucket.one_at(now)
        bucket.spend(now, cost)
        self._asked[ticket] = (user, cost)
        if at > now:
            heapq.heappush(self._early, (at, next(self._numbers), ticket))
        else:
            self._share.ask(user, cost, ticket)

    def forget(self, ticket: object) -> None:
        """Whoever waited does so no more."""
        asked = self._asked.pop(ticket, None)
        if asked is not None:
            self._share.forget(asked[0], ticket)

    def granted(self, now: float) -> list[object]:
        """The tickets of those that may be read now."""
        while self._early and self._early[0][0] <= now:
            _, _, ticket = heapq.heappop(self._early)
            if ticket in self._asked:
                user, cost = self._asked[ticket]
                self._share.ask(user, cost, ticket)
        found = self._share.granted(now)
        for ticket in found:
            self._asked.pop(ticket, None)
        return found

    def next_at(self, now: float) -> float | None:
        """When there may be one that can be read; None if none waits."""
        times = [self._early[0][0]] if self._early else []
        shared = self._share.next_at(now)
        if shared is not None:
            times.append(shared)
        return min(times) if times else None


def intake(limits: BudgetLimits, relay: RelayLimits) -> Intake | None:
    """That of a node; None if it is to read whatever comes as it comes.

    What it relays comes from strangers as well. If it is to carry more than is usual, it reads so much more.
    """
    if limits.read_bytes_per_s is None:
        return None
    more = relay.bytes_per_s if relay.bytes_per_s > RelayLimits().bytes_per_s else 0.0
    per_s = limits.read_bytes_per_s + more
    return Intake(per_s, min(per_s, limits.read_each_bytes_per_s + more))
