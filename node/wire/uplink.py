"""How much this node can send, as its bulk lanes show: from what they carry anyway, and never from a probe.

While a lane that others pull by has anything to send, it is looked every `LOOK_S` how many bytes the far sides have:
those that are acknowledged (RFC 4898's tcpEStatsAppHCThruOctetsAcked) and those beyond a gap (RFC 2018), which else
would seem to arrive all at once when it is filled. What was merely written lies in the kernel's buffers, which hold
seconds of a slow link. Only that busy time counts, cut into *windows* of a rate each. The estimate is the rate that was
reached or passed for `SUSTAINED_S` of the last `KEPT_S` of busy time: the best that lasted, so that neither a burst
counts nor what a slow receiver takes. It needs time to fall: a link that became slow is known once `KEPT_S` were sent
by it.

Lanes to addresses of the internet are held apart, and count if there are any: who sends quickly to the next room may
have a slow way out. Not counted is what goes by libp2p or with calls: a node that gives nothing by bulk lanes does not
know.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

LOOK_S: Final = 0.05
WINDOW_S: Final = 0.2
WINDOW_BYTES: Final = 1024 * 1024
"""What a window has at least; less of both only if it would take longer than `LONGEST_WINDOW_S`."""
LONGEST_WINDOW_S: Final = 2.0
SUSTAINED_S: Final = 1.0
KEPT_S: Final = 60.0
MAX_WINDOWS: Final = 4096
"""That are kept, should they be short."""

_TCP_INFO: Final = struct.Struct("=16xI8xI88xQ")
"""Of Linux's ``struct tcp_info``: ``tcpi_snd_mss``, ``tcpi_sacked`` in segments, ``tcpi_bytes_acked`` (from 4.2 on)."""
_QUEUED: Final = struct.Struct("=i")


class Estimate:
    """The rate that one way out sustains; knows no clock, as ``now`` is seconds of any that is monotonic."""

    __slots__ = ("_began_at", "_busy_s", "_kept_s", "_num_bytes", "_windows")

    def __init__(self) -> None:
        self._windows: deque[tuple[float, float]] = deque(maxlen=MAX_WINDOWS)  # bytes per second, seconds
        self._kept_s = 0.0
        self._began_at: float | None = None
        self._num_bytes = 0
        self._busy_s = 0.0

    def look(self, num_bytes: int, now: float, *, is_busy: bool) -> None:
        """So many bytes went since the last look; ``is_busy``: more are to go, else nobody knows when the last went."""
        if self._began_at is not None:
            if is_busy:
                self._num_bytes += num_bytes
                self._busy_s = now - self._began_at
            is_whole = self._num_bytes >= WINDOW_BYTES and (self._busy_s >= WINDOW_S or not is_busy)
            if self._busy_s > 0 and (is_whole or self._busy_s >= LONGEST_WINDOW_S):
                self._keep(self._num_bytes / self._busy_s, self._busy_s)
                self._began_at = None
        if not is_busy:
            self._began_at = None
        elif self._began_at is None:
            self._began_at, self._num_bytes, self._busy_s = now, 0, 0.0

    @property
    def per_s(self) -> float:
        """Bytes per second; 0 if too little was sent to say."""
        lasted_s = 0.0
        for rate, seconds in sorted(self._windows, reverse=True):
            lasted_s += seconds
            if lasted_s >= SUSTAINED_S:
                return rate
        return 0.0

    def _keep(self, rate: float, seconds: float) -> None:
        if len(self._windows) == MAX_WINDOWS:
            self._kept_s -= self._windows.popleft()[1]
        self._windows.append((rate, seconds))
        self._kept_s += seconds
        while self._kept_s - self._windows[0][1] >= KEPT_S:
            self._kept_s -= self._windows.popleft()[1]


@dataclass(slots=True)
class _Lane:
    """One by which others pull."""

    estimate: Estimate
    num_there: int
    is_sending: bool = False


class Uplink:
    """What all lanes by which others pull show together."""

    def __init__(self) -> None:
        self._lanes: dict[ssl.SSLSocket, _Lane] = {}
        self._near, self._far = Estimate(), Estimate()
        self._begun = trio.Event()

    @property
    def per_s(self) -> float:
        """Bytes per second that this node can send; 0 if it does not know."""
        return self._far.per_s or self._near.per_s

    @contextmanager
    def carrying(self, tls: ssl.SSLSocket) -> Iterator[None]:
        """In the block, what this lane is `sending` counts."""
        there = _there(tls)
        if there is not None:
            self._lanes[tls] = _Lane(self._far if _is_far(tls) else self._near, there)
        try:
            yield
        finally:
            self._lanes.pop(tls, None)

    @contextmanager
    def sending(self, tls: ssl.SSLSocket) -> Iterator[None]:
        """In the block, this lane is given what it is to carry."""
        lane = self._lanes.get(tls)
        if lane is None:
            yield
            return
        lane.is_sending = True
        self._begun.set()
        try:
            yield
        finally:
            lane.is_sending = False

    async def watch(self) -> None:
        """Look while anything is sent, until cancelled."""
        while True:
            await self._begun.wait()
            self._begun = trio.Event()
            self._look()  # from here on it counts
            while self._look():  # noqa: ASYNC110  the kernel says nothing of what is acknowledged until it is asked
                await trio.sleep(LOOK_S)

    def _look(self) -> bool:
        """Whether anything is still to be sent."""
        went = {self._near: 0, self._far: 0}
        busy: set[Estimate] = set()
        for tls, lane in self._lanes.items():
            there = _there(tls)
            if there is not None:
                went[lane.estimate] += there - lane.num_there
                lane.num_there = there
                if lane.is_sending or _num_queued(tls):
                    busy.add(lane.estimate)
        now = trio.current_time()
        for estimate, num_bytes in went.items():
            estimate.look(num_bytes, now, is_busy=estimate in busy)
        return bool(busy)


def _is_far(tls: ssl.SSLSocket) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return ipaddress.ip_address(tls.getpeername()[0].partition("%")[0]).is_global
    return False


def _there(tls: ssl.SSLSocket) -> int | None:
    """Bytes that the far side has; None if the path is gone, or this kernel does not count them."""
    with contextlib.suppress(OSError):
        info = tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) == _TCP_INFO.size:
            segment_bytes, num_beyond, num_acked = _TCP_INFO.unpack(info)
            return int(num_acked + num_beyond * segment_bytes)
    return None


def _num_queued(tls: ssl.SSLSocket) -> int:
    """Bytes that were written and are not acknowledged."""
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(tls.fileno(), termios.TIOCOUTQ, bytes(_QUEUED.size))
        return int(_QUEUED.unpack(answer)[0])
    return 0
