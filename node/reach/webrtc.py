"""WebRTC: a byte pipe over UDP between two nodes that can already talk through a relay.

The two ends exchange an offer and an answer by that relay, ICE (RFC 8445) finds a pair of addresses that lets packets
through, and one data channel (RFC 8831: SCTP over DTLS), reliable and in order, carries bytes. Who is at the far end is
not proven here: the pipe takes the place of a TCP connection, and libp2p's own handshake runs over it.

aiortc needs asyncio, all else here is trio. `WebRtc` runs aiortc on uvloop in one thread of its own, started by the
first offer or answer, so that a node without such pipes does not even import it. What runs in that thread is
`shoal.node.reach.webrtc_end`. The loops hand each other what they have by `_Crossing`: a deque, and one wake-up for
whatever has gathered in it.

Neither data channels nor aiortc have back-pressure for a reader: what arrives is delivered. So the ends grant each
other credit, as in QUIC (RFC 9000, section 4.1). A binary message carries bytes, and costs `MESSAGE_COST` more than it
is long. A text message says, in decimal digits, up to which sum of costs the other end may send; both begin with
`WINDOW_BYTES`, and it rises in steps of at least `GRANT_BYTES`. An end that sends more than it was granted, or grants
what cannot be, is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from shoal.node.mesh.addresses import is_loopback
from shoal.node.mesh.interfaces import interface_ips
from shoal.node.reach.webrtc_pipe import (
    GRANT_BYTES,
    MESSAGE_BYTES,
    MESSAGE_COST,
    WINDOW_BYTES,
    CreditGranted,
    PipeEnded,
    PipeNews,
    PipeOpened,
    StunServer,
    WebRtcError,
)

if TYPE_CHECKING:
    from shoal.node.reach.webrtc_end import End

log = logging.getLogger(__name__)

T = TypeVar("T")
GATHER_S: Final = 1.0
STOP_S: Final = 0.8


class _Crossing(Generic[T]):
    """What one loop hands to the other: many things, one wake-up."""

    __slots__ = ("_is_woken", "_things", "_wake")

    def __init__(self, wake: Callable[[Callable[[], None]], object], take: Callable[[T], None]) -> None:
        def drain() -> None:
            self._is_woken = False  # first: what is put from now on wakes anew
            while self._things:
                take(self._things.popleft())

        self._things: deque[T] = deque()  # the credit of what is in it bounds it
        self._is_woken = False
        self._wake: Callable[[], object] = partial(wake, drain)

    def put(self, thing: T) -> None:
        """Hand over; called in one loop, and taken in the other."""
        self._things.append(thing)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError, trio.RunFinishedError):  # the other loop is over, and nobody waits
                self._wake()


class WebRtcPipe(ReadWriteCloser):
    """Bytes to and from a peer over a data channel; it fits libp2p's ``RawConnection``.

    Reading gives b"" when the far end has closed, the path is dead (noticed after about 30 s of silence, RFC 7675) or
    this end is closed; writing then raises libp2p's ``ConnectionClosedError``. At most `WINDOW_BYTES` wait to be read.
    """

    def __init__(
        self, trio_token: trio.lowlevel.TrioToken, make_end: Callable[[Callable[[PipeNews], None]], End]
    ) -> None:
        inbox = _Crossing[PipeNews](trio_token.run_sync_soon, self._take)
        self._end = make_end(inbox.put)
        self._outbox = _Crossing[bytes | str](self._end.loop.call_soon_threadsafe, self._end.send)
        self._unread: deque[bytes] = deque()
        self._head = memoryview(b"")
        self._consumed = self._sent = 0
        self._allowed = WINDOW_BYTES
        self._address: tuple[str, int] | None = None
        self._is_open = False
        self._ended: str | None = None
        self._changed = trio.lowlevel.ParkingLot()
        self._read_lock = trio.Lock()
        self._write_lock = trio.Lock()

    async def read(self, n: int | None = None) -> bytes:
        """At least one byte, and at most ``n``, as soon as there is one; b"" at the end."""
        async with self._read_lock:
            if n == 0:
                return b""
            while not self._head:
                if self._unread:
                    message = self._unread.popleft()
                    self._head = memoryview(message)
                    self._grant(len(message) + MESSAGE_COST)
                elif self._ended is not None:
                    return b""
                else:
                    await self._changed.park()
            piece = self._head[:n]
            self._head = self._head[len(piece) :]
            return bytes(piece)

    def _grant(self, cost: int) -> None:
        self._consumed += cost
        if self._consumed + WINDOW_BYTES - self._end.granted >= GRANT_BYTES:
            self._end.granted = self._consumed + WINDOW_BYTES
            self._outbox.put(str(self._end.granted))

    async def write(self, data: bytes) -> None:
        """Send all; waits while `WINDOW_BYTES` are under way that the far end has not read.

        Raises:
            ConnectionClosedError: if the pipe has ended. After a cancellation a part may have been sent.
        """
        async with self._write_lock:
            rest = memoryview(data)
            while rest:
                piece = rest[:MESSAGE_BYTES]
                cost = len(piece) + MESSAGE_COST
                while self._ended is None and self._sent + cost > self._allowed:
                    await self._changed.park()
                if self._ended is not None:
                    raise ConnectionClosedError(self._ended, transport="webrtc")
                self._sent += cost
                self._outbox.put(bytes(piece))
                rest = rest[len(piece) :]

    async def close(self) -> None:
        """End both directions. What was written still goes out, for `LINGER_S` at most, in the background."""
        self._take(PipeEnded("closed here"))
        self._unread.clear()
        self._head = memoryview(b"")
        self._end.close_soon()
        await trio.lowlevel.checkpoint()

    def get_remote_address(self) -> tuple[str, int] | None:
        """IP and UDP port of the far end, as ICE found it."""
        return self._address

    async def _wait_until_open(self) -> None:
        while not self._is_open and self._ended is None:
            await self._changed.park()
        if self._ended is not None:
            raise WebRtcError(f"no path by WebRTC: {self._ended}")

    def _take(self, news: PipeNews) -> None:
        match news:
            case bytes():
                if self._ended is None:
                    self._unread.append(news)
            case CreditGranted():
                self._allowed = news.cost
            case PipeOpened():
                self._is_open = True
                self._address = news.address
            case PipeEnded():
                self._ended = self._ended or news.reason
        self._changed.unpark_all()


class PendingPipe:
    """A pipe whose other end is being asked; made by `WebRtc.offer` and `WebRtc.answer`.

    Use it in ``contextlib.aclosing``, so that it is given up when what lies between it and `connected` is cancelled.

    Attributes:
        sdp: the offer or the answer, for the far side.
    """

    def __init__(self, web_rtc: WebRtc, pipe: WebRtcPipe, sdp: str) -> None:
        self.sdp = sdp
        self._web_rtc = web_rtc
        self._pipe = pipe

    async def accept(self, answer_sdp: str) -> None:
        """Take in the far side's answer to this offer; once.

        Raises:
            WebRtcError: if it is none, or hostile; then this pipe is over.
        """
        await self._web_rtc._ask(self._pipe._end, self._pipe._end.accept(answer_sdp))

    async def connected(self, timeout_s: float) -> WebRtcPipe:
        """The pipe, when it is open; in every other case the connection is closed.

        Raises:
            WebRtcError: if it does not open in this time.
        """
        end = self._pipe._end
        try:
            with trio.fail_after(timeout_s):
                await self._pipe._wait_until_open()
        except BaseException as error:
            end.close_soon()
            if isinstance(error, trio.TooSlowError):
                raise WebRtcError(f"no path by WebRTC within {timeout_s:g} s") from error
            raise
        end.is_taken = True
        return self._pipe

    async def aclose(self) -> None:
        """Give up, in the background; has no effect on a pipe that was taken."""
        if not self._pipe._end.is_taken:
            self._pipe._end.close_soon()
        await trio.lowlevel.checkpoint()


class WebRtc:
    """Makes pipes; made by `open_webrtc`."""

    def __init__(self, addresses: Callable[[], Sequence[str]]) -> None:
        self._addresses = addresses
        self._start = trio.Lock()
        self._trio = trio.lowlevel.current_trio_token()
        self._thread: _Thread | None = None
        self._questions: set[Future[Any]] = set()
        self._is_closed = False

    async def offer(self, stun: Sequence[StunServer], *, gather_s: float = GATHER_S) -> PendingPipe:
        """Begin a connection.

        Args:
            stun: IPv4 addresses and ports of STUN servers (RFC 5389), of which the first few are asked at once.
            gather_s: how long to wait for their answers; what has been learned by then is offered.

        Raises:
            WebRtcError: if WebRTC does not work here, or too many connections are being made.
        """
        pipe = await self._new_pipe()
        return PendingPipe(self, pipe, await self._ask(pipe._end, pipe._end.offer(stun, gather_s)))

    async def answer(self, sdp: str, stun: Sequence[StunServer], *, gather_s: float = GATHER_S) -> PendingPipe:
        """Accept a connection that the far side offers; the arguments and errors are those of `offer`.

        Raises:
            WebRtcError: also if the offer is none, or hostile.
        """
        pipe = await self._new_pipe()
        return PendingPipe(self, pipe, await self._ask(pipe._end, pipe._end.answer(sdp, stun, gather_s)))

    async def _new_pipe(self) -> WebRtcPipe:
        async with self._start:
            if self._is_closed:
                raise WebRtcError("this node is stopping")
            if self._thread is None:
                thread = _Thread(self._trio, self._addresses)
                with trio.CancelScope(shield=True):  # so that the thread is never without an owner
                    await thread.start()
                self._thread = thread
        return WebRtcPipe(self._trio, self._thread.new_end)

    async def _ask(self, end: End, question: Coroutine[Any, Any, T]) -> T:
        """Run what an end is to do in its thread; the end is closed if that fails or is cancelled here."""
        done = trio.Event()
        try:
            answer = asyncio.run_coroutine_threadsafe(question, end.loop)
        except RuntimeError as error:
            question.close()
            raise WebRtcError("this node is stopping") from error
        answer.add_done_callback(lambda _: self._trio.run_sync_soon(done.set))
        self._questions.add(answer)
        try:
            await done.wait()
            return answer.result()
        except WebRtcError:
            end.close_soon()
            raise
        except Exception as error:  # whatever aiortc makes of what the far side sent must not end the node
            end.close_soon()
            log.info("WebRTC: negotiation failed: %.200r", error)
            raise WebRtcError(f"WebRTC cannot use this: {type(error).__name__}") from error
        except BaseException:
            end.close_soon()
            raise
        finally:
            self._questions.discard(answer)

    async def _close(self) -> None:
        self._is_closed = True
        if self._thread is not None:
            await self._thread.stop()
        for question in self._questions:  # what came too late for the thread
            question.cancel()


@asynccontextmanager
async def open_webrtc(addresses: Callable[[], Sequence[str]] | None = None) -> AsyncIterator[WebRtc]:
    """Have WebRTC; at the end all pipes are cut and the thread is gone, within a second.

    Args:
        addresses: gives the own IP addresses on which to meet peers; those of `local_addresses` by default.
    """
    web_rtc = WebRtc(addresses or local_addresses)
    try:
        yield web_rtc
    finally:
        with trio.CancelScope(shield=True):
            await web_rtc._close()


def local_addresses() -> list[str]:
    """The IP addresses of this machine by which another one could reach it."""
    return [ip for ip in interface_ips() if not is_loopback(ip)]


class _Thread:
    """The asyncio loop, seen from trio."""

    def __init__(self, trio_token: trio.lowlevel.TrioToken, addresses: Callable[[], Sequence[str]]) -> None:
        self.new_end: Callable[[Callable[[PipeNews], None]], End]
        self.loop: asyncio.AbstractEventLoop
        self._trio = trio_token
        self._addresses = addresses
        self._ends: set[End] = set()  # touched in the thread alone
        self._is_up = trio.Event()
        self._is_over = trio.Event()
        self._thread = threading.Thread(target=self._run, name="webrtc", daemon=True)
        self._stop: asyncio.Event
        self._failure: Exception | None = None

    async def start(self) -> None:
        """Returns when the loop runs, or raises `WebRtcError`."""
        self._thread.start()
        await self._is_up.wait()
        if self._failure is not None:
            raise WebRtcError(f"WebRTC does not work here: {self._failure}") from self._failure

    async def stop(self) -> None:
        """Returns when the thread is over; a thread that hangs is left to the end of the process."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop.set)
        with trio.move_on_after(STOP_S + 0.2):
            await self._is_over.wait()
        if self._is_over.is_set():
            self._thread.join()  # telling so was the last that it did
        else:
            log.error("the WebRTC thread does not end")

    def _run(self) -> None:
        try:
            # 25 MB and 0.1 s, which only a node that uses them should pay.
            import uvloop

            from shoal.node.reach.webrtc_end import End

            with contextlib.closing(uvloop.new_event_loop()) as self.loop:
                self.new_end = partial(End, self.loop, self._ends, self._addresses)
                self.loop.set_exception_handler(_log_lost_error)
                self.loop.run_until_complete(self._serve())
        except Exception as error:
            log.exception("the WebRTC thread ends")
            self._failure = error
        finally:
            self._tell(self._is_up)
            self._tell(self._is_over)

    def _tell(self, event: trio.Event) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(event.set)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._tell(self._is_up)
        await self._stop.wait()
        for end in list(self._ends):
            end.finish("this node is stopping", linger_s=0)
        deadline = self.loop.time() + STOP_S
        # Twice, because ending tasks start others.
        for share in (0.5, 1.0):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=(deadline - self.loop.time()) * share)
                for task in late:
                    task.cancel()


def _log_lost_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Outside of a task it is a packet that aioice cannot parse: anybody can send those, and fill each node's log.
    # And aiortc has tasks that still want to send when their connection is over.
    error = context.get("exception")
    is_usual = "task" not in context or isinstance(error, ConnectionError)
    log.log(logging.DEBUG if is_usual else logging.WARNING, "WebRTC: %r: %.200r", context.get("message"), error)
