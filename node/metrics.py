"""Counters per method: how often, how fast, how much, and what failed. Kept in memory, told by the local API."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shoal.protocol.errors import Status

_PER_OCTAVE = 4
_FIRST_EXPONENT = -19  # the first bucket begins at 2**-20 s, about a microsecond
_NUM_BUCKETS = 30 * _PER_OCTAVE  # and the last ends at 1,024 s
_LEAST_S = 1e-9


class Latencies:
    """A histogram of durations with four buckets an octave, so a quantile is right to within a fifth."""

    __slots__ = ("_counts", "count")

    def __init__(self) -> None:
        self.count = 0
        self._counts = [0] * _NUM_BUCKETS

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.count += 1
        mantissa, exponent = math.frexp(seconds or _LEAST_S)  # seconds = mantissa * 2**exponent, mantissa in [0.5, 1)
        bucket = (exponent - _FIRST_EXPONENT) * _PER_OCTAVE + int((mantissa - 0.5) * 2 * _PER_OCTAVE)
        self._counts[0 if bucket < 0 else bucket if bucket < _NUM_BUCKETS else _NUM_BUCKETS - 1] += 1

    def quantile(self, part: float) -> float:
        """Seconds within which this part of all durations lies; 0 if there are none."""
        left = max(1, math.ceil(self.count * part))
        for bucket, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                octave, part_of_it = divmod(bucket, _PER_OCTAVE)
                return math.ldexp(0.5 + (part_of_it + 0.5) / (2 * _PER_OCTAVE), octave + _FIRST_EXPONENT)
        return 0.0


@dataclass(slots=True)
class MethodMetrics:
    """One method, on one side of its calls.

    Attributes:
        calls: that are over.
        errors: those among them that failed, by status.
        request_bytes: bodies and attachments of requests, before compression.
        answer_bytes: likewise of answers.
        latencies: from the request to the outcome; for a caller with the way there and back.
    """

    calls: int = 0
    errors: dict[Status, int] = field(default_factory=dict)
    request_bytes: int = 0
    answer_bytes: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    def count(self, status: Status, seconds: float, request_bytes: int, answer_bytes: int) -> None:
        """One call is over."""
        self.calls += 1
        self.request_bytes += request_bytes
        self.answer_bytes += answer_bytes
        self.latencies.add(seconds)
        if status is not Status.OK:
            self.errors[status] = self.errors.get(status, 0) + 1


class Metrics:
    """All methods of a node; a name that nobody serves is not counted, so a stranger cannot grow this."""

    def __init__(self) -> None:
        self.served: dict[str, MethodMetrics] = {}
        self.called: dict[str, MethodMetrics] = {}

    def of_served(self, method: str) -> MethodMetrics:
        """Calls of peers to this node."""
        found = self.served.get(method)
        return found if found is not None else self.served.setdefault(method, MethodMetrics())

    def of_called(self, method: str) -> MethodMetrics:
        """Calls of this node to peers."""
        found = self.called.get(method)
        return found if found is not None else self.called.setdefault(method, MethodMetrics())
