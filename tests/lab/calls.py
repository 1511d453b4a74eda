"""Calls that go on while something happens to the network: what came of each, and how long there was silence.

Ten times a second a node is asked over its local API to ping a peer, whether or not earlier pings are answered by then,
so that one that hangs hides nothing of those after it. A ping is marked idempotent: the node may wait for a path and
send it again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Self

from shoal.node.api.client import Client
from shoal.protocol.errors import ShoalError

from .nodes import LabNode

INTERVAL_S: Final = 0.1
MAX_IN_FLIGHT: Final = 90
"""Fewer than the connections that the API's client opens."""
SILENCE_S: Final = 1.0
"""That long without an answer is not the ordinary pace of calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """One ping; times are those of `time.monotonic`.

    Attributes:
        failure: why it failed; empty if it was answered.
    """

    began: float
    ended: float
    failure: str


class Calls:
    """Pings from a node to a peer, for as long as the ``with`` block lasts."""

    def __init__(self, node: LabNode, peer: str) -> None:
        self._node = node
        self._peer = peer
        self._over: list[Call] = []
        self._has_ended = threading.Event()
        self._pool = ThreadPoolExecutor(MAX_IN_FLIGHT)
        self._places = threading.Semaphore(MAX_IN_FLIGHT)
        self._beat = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        self._client = self._node.client()
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, without waiting for answers."""
        self._has_ended.set()
        self._beat.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> list[Call]:
        """Begin no more, and wait for the answers that are missing; gives all calls, in the order of their ends."""
        self._has_ended.set()
        self._beat.join()
        self._pool.shutdown()
        return list(self._over)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._has_ended.is_set():
            if self._places.acquire(blocking=False):
                self._pool.submit(self._call, self._client)
            due = max(due + INTERVAL_S, time.monotonic())
            self._has_ended.wait(due - time.monotonic())

    def _call(self, client: Client) -> None:
        began, failure = time.monotonic(), ""
        try:
            client.ping(self._peer)
        except ShoalError as error:
            failure = str(error) or type(error).__name__
        finally:
            self._places.release()
        self._over.append(Call(began, time.monotonic(), failure))


def answers(calls: Iterable[Call]) -> list[float]:
    """When calls were answered."""
    return sorted(call.ended for call in calls if not call.failure)


def longest_gap_s(calls: Iterable[Call], since: float, until: float) -> float:
    """The longest time between two answers."""
    times = answers(calls)
    before, inside = [at for at in times if at < since], [at for at in times if since <= at <= until]
    return max(later - earlier for earlier, later in pairwise([*(before[-1:] or [since]), *inside, until]))


def healed_after_s(calls: Iterable[Call], since: float, until: float) -> float:
    """From a moment to when the last silence after it was over; infinite if the calls end in silence."""
    inside = [at for at in answers(calls) if since <= at <= until]
    if not inside or until - inside[-1] > SILENCE_S:
        return float("inf")
    ends = [later for earlier, later in pairwise([since, *inside]) if later - earlier > SILENCE_S]
    return (ends[-1] if ends else inside[0]) - since


def answers_by_second(calls: Iterable[Call], since: float, until: float) -> str:
    """How many answers came in each second, for people."""
    counted = Counter(int(at - since) for at in answers(calls) if since <= at <= until)
    return " ".join(str(counted[second]) for second in range(int(until - since)))


def failures(calls: Iterable[Call], since: float) -> str:
    """When and how the first of the calls failed that did, for people."""
    failed = sorted((call for call in calls if call.failure), key=lambda call: call.began)
    shown = [
        f"{call.began - since:+.2f} s (took {call.ended - call.began:.2f} s): {call.failure}" for call in failed[:5]
    ]
    return f"{len(failed)} of them; {'; '.join(shown)}" if shown else "none"
