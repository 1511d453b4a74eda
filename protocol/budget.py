"""What one peer may hold of a node at once, over all of its streams: calls, bytes, calls per second.

A call enters with its request and the memory that its answer may need; it leaves when the answer was written. What
does not fit is refused (calls, requests, rate) or waits (answers), so a peer that asks and does not read stops
itself, and nobody else.
"""

from __future__ import annotations

from typing import Protocol

from shoal.protocol.limits import MAX_CALLS_IN_FLIGHT, MAX_HELD_BYTES, MAX_MESSAGE_STREAMS

BURST_S = 2.0
"""A rate limit may be used ahead by so many seconds."""


class Purse(Protocol):
    """What there is for one peer in the budget of a whole node, from which its account draws."""

    def hold(self, change: int) -> bool:
        """Count bytes that are taken, or given back; False if it is more than there is for this peer now."""


class _Bottomless:
    def hold(self, change: int) -> bool:
        return True


class Budget:
    """The account of one peer.

    Args:
        max_calls: that may have entered and not left.
        max_bytes: of calls, and as much of unfinished frames.
        purse: from which those bytes are drawn; None: there are as many as that.

    Attributes:
        num_calls: that have entered and not left.
        num_running: those of them for whose answers memory is set aside.
        num_streams: streams of messages of all calls.
        held_bytes: requests, and what is set aside for answers.
        buffered_bytes: frames that are not whole yet.
    """

    __slots__ = (
        "_allowances",
        "_max_bytes",
        "_max_calls",
        "_purse",
        "buffered_bytes",
        "held_bytes",
        "num_calls",
        "num_running",
        "num_streams",
    )

    def __init__(
        self, *, max_calls: int = MAX_CALLS_IN_FLIGHT, max_bytes: int = MAX_HELD_BYTES, purse: Purse | None = None
    ) -> None:
        self.num_calls = 0
        self.num_running = 0
        self.num_streams = 0
        self.held_bytes = 0
        self.buffered_bytes = 0
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._purse = purse or _Bottomless()
        self._allowances: dict[str, tuple[float, float]] = {}  # by method: calls left, and when that was

    def buffer(self, change: int) -> str | None:
        """Count how much is here of frames that are not whole yet; returns what is wrong if it is too much."""
        self.buffered_bytes += change
        if self.buffered_bytes > self._max_bytes:
            self._purse.hold(change)
            return f"more than {self._max_bytes} bytes of unfinished frames, over all streams"
        if not self._purse.hold(change):
            return f"no memory for {self.buffered_bytes} bytes of unfinished frames now; too many others hold some"
        return None

    def enter(self, num_bytes: int, num_streams: int = 0) -> str | None:
        """Take a call in that holds so many bytes and streams; returns why not if it does not fit."""
        if self.num_calls >= self._max_calls:
            return f"more than {self._max_calls} calls in flight; wait for answers before calling again"
        if self.num_streams + num_streams > MAX_MESSAGE_STREAMS:
            return f"more than {MAX_MESSAGE_STREAMS} streams of messages; end one before opening another"
        if self.held_bytes + num_bytes > self._max_bytes and self.num_calls:
            return f"requests and answers of more than {self._max_bytes} bytes in flight; wait for answers"
        if not self._purse.hold(num_bytes):
            self._purse.hold(-num_bytes)
            return "no memory for this request now, too many others hold some; try again later"
        self.num_calls += 1
        self.num_streams += num_streams
        self.held_bytes += num_bytes
        return None

    def reserve(self, num_bytes: int) -> bool:
        """Set memory aside for an answer, so that its call may run; False if it has to wait.

        One call may always run: if all waited, none would ever make room for another.
        """
        if self.held_bytes + num_bytes > self._max_bytes and self.num_running:
            return False
        if not self._purse.hold(num_bytes) and self.num_running:
            self._purse.hold(-num_bytes)
            return False
        self.num_running += 1
        self.held_bytes += num_bytes
        return True

    def leave(self, num_bytes: int, num_streams: int = 0, *, was_running: bool = True) -> None:
        """A call is over and its answer written: give back what it had entered with and reserved."""
        self.num_calls -= 1
        self.num_running -= was_running
        self.num_streams -= num_streams
        self.held_bytes -= num_bytes
        self._purse.hold(-num_bytes)

    def spend(self, method: str, calls_per_s: float, now: float) -> str | None:
        """Count a call against its method's rate (a token bucket); returns why not if it comes too soon."""
        most = max(1.0, calls_per_s * BURST_S)
        left, then = self._allowances.get(method, (most, now))
        left = min(most, left + (now - then) * calls_per_s)
        if left < 1:
            return (
                f"more than {calls_per_s:g} calls of {method} a second; try again in {(1 - left) / calls_per_s:.1f} s"
            )
        self._allowances[method] = (left - 1, now)
        return None
