"""Bulk transfers: large bytes go beside the calls, and the receiver pulls them into its own memory.

The owner of bytes opens an offer and puts its `BulkRef` into an ordinary request or answer; the far side pulls what it
wants of it. So a receiver decides when and where to, as in the rendezvous protocols of MPI and UCX. Bytes come by up
to `MAX_LANES` lanes (`shoal.node.wire.lanes`), and what no lane could bring comes by a libp2p stream. Both speak
the same:

    puller: id 16 | offset u64 | length u64     owner: status u8 (0, or gRPC's number), then exactly length bytes

A pull is cut into segments that the lanes take from a common queue, so a faster lane carries more, and what a broken
lane still owed goes back into the queue. A lane is asked for its next segment before it has brought the current one,
so that it is never without work.

While bytes flow a lane belongs to a blocking thread, because OpenSSL gives the interpreter free while it works: that
is several times what an event loop reaches. A thread ends when its socket is shut down, which is how everything here is
cancelled, and whoever cancels waits for it. Threads have a lower priority than the event loop (nice 5).

Bytes need not be in memory on either side: a standing offer (`Bulk.offer_source`) is read in the thread that sends it,
and a puller may take what comes in parts (`shoal.node.wire.pulls`), each in the thread that brought it. So blocks go
from disk to disk, and the event loop has to do with whole runs of them only.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import logging
import os
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import outcome
import trio

from shoal.node.signals import Signal
from shoal.node.wire.channel import ByteStream, StreamClosedError
from shoal.node.wire.lanes import TlsByteStream
from shoal.node.wire.pulls import REQUEST, Asker, Memory, Parts, Pull
from shoal.node.wire.uplink import Uplink
from shoal.protocol.errors import ProtocolError, RemoteError, Status
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

ID_BYTES: Final = 16
MAX_LANES: Final = 4
"""Lanes between two peers by which one pulls; each of the two may have as many."""
MAX_STREAMS: Final = 4
"""libp2p streams of one peer that are served at once, and by which one pulls of one peer."""
MAX_SERVED: Final = 64
"""Lanes of all peers that are served at once, and so threads that serve."""
IDLE_S: Final = 10.0
"""How long a lane is kept by its puller for the next pull."""
SERVED_IDLE_S: Final = 2 * IDLE_S
"""How long a lane or stream may stand without a request before its owner closes it."""
PROGRESS_S: Final = 30.0
"""A path ends that takes longer than this for one piece: `SEND_BYTES` on a lane, `CHUNK_BYTES` on a stream."""
NO_LANE_S: Final = 10.0
"""After a dial that failed, pulls from that peer go by libp2p for so long."""
MAX_FAILURES: Final = 4
"""Of lanes in one pull, after which it goes by libp2p; and of streams, after which it fails."""

SEND_BYTES: Final = 64 * 1024
"""One SSL_write: short enough that the loop, waiting for the interpreter or the core, gets it soon."""
RECEIVE_BYTES: Final = 64 * 1024
"""What is received of a lane before it is counted."""
INLINE_BYTES: Final = 64 * 1024
"""Up to this a lane's answer is written without a thread."""
CHUNK_BYTES: Final = 1024 * 1024
"""One write to a libp2p stream."""
NICE: Final = 5

_OK: Final = b"\x00"

AnyBuffer = bytes | bytearray | memoryview
Transport = Literal["auto", "libp2p"]
Abort = Callable[[], None]


class _Sender(Protocol):
    async def __call__(self, pieces: Iterator[memoryview], num_bytes: int, *, is_read: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class BulkRef:
    """Names bytes that a peer offers; a part of a message.

    Attributes:
        id: 16 random bytes.
        num_bytes: how many there are.
    """

    id: bytes
    num_bytes: int

    def __post_init__(self) -> None:
        if len(self.id) != ID_BYTES or self.num_bytes < 0:
            raise ProtocolError(f"a bulk reference has {ID_BYTES} bytes of id and no negative size")


class Source(Protocol):
    """Bytes that are read when somebody pulls them."""

    async def open(self, peer: PeerId, offset: int, length: int) -> Iterator[memoryview]:
        """Some of them, for a peer, in pieces of any length, each there until the next is asked for.

        Whoever takes the pieces is in a thread of its own, since they may be read from a disk.

        Raises:
            RemoteError: whose status the peer is told; the iterator may raise it too.
        """


class BulkLinks(Protocol):
    """What bulk transfers need of the host."""

    async def dial_bulk_lane(self, peer: PeerId) -> ssl.SSLSocket | None:
        """A fresh non-blocking lane by which to pull; None if it cannot be had."""

    async def open_bulk_stream(self, peer: PeerId) -> ByteStream:
        """A libp2p stream by which to pull; `StreamClosedError`, or `RemoteError` UNAVAILABLE."""

    def num_lanes(self, peer: PeerId) -> int:
        """How many lanes are worth while."""


@dataclass(slots=True, eq=False)
class _Offer:
    """Bytes that one peer may pull, or all may, and how to stop those who send them.

    Attributes:
        peer: who may; None if everybody.
        view: where they are; nothing if ``source`` reads them.
    """

    peer: PeerId | None
    num_bytes: int
    view: memoryview
    source: Source | None = None
    senders: set[Abort] = field(default_factory=set)
    left: trio.Event = field(default_factory=trio.Event)  # the newest sender's

    @asynccontextmanager
    async def pieces(self, peer: PeerId, offset: int, length: int, abort: Abort) -> AsyncIterator[Iterator[memoryview]]:
        self.senders.add(abort)
        try:
            if self.source is not None:
                yield await self.source.open(peer, offset, length)
            else:
                with self.view[offset : offset + length] as piece:
                    yield iter((piece,))
        finally:
            self.senders.discard(abort)
            if not self.senders:
                self.left.set()

    async def withdraw(self) -> None:
        """Return when nobody reads the bytes any more."""
        for abort in list(self.senders):
            abort()
        with trio.CancelScope(shield=True):
            while self.senders:
                self.left = trio.Event()
                await self.left.wait()
        self.view.release()


@dataclass(slots=True, eq=False)
class _Peer:
    """The lanes to and from one peer."""

    slots: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(MAX_LANES))
    stream_slots: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(MAX_STREAMS))
    num_waiting: int = 0  # pulls that want a lane and have none
    pulling: set[ssl.SSLSocket] = field(default_factory=set)
    idle: list[tuple[float, ssl.SSLSocket]] = field(default_factory=list)  # until when, oldest first
    no_lane_before: float = 0.0
    served_lanes: set[Abort] = field(default_factory=set)
    served_streams: set[Abort] = field(default_factory=set)
    is_gone: bool = False

    def take_idle(self) -> ssl.SSLSocket | None:
        """A lane that stands, as far as one can see."""
        while self.idle:
            _, tls = self.idle.pop()
            try:
                tls.recv(1)  # nothing is owed, so there can only be nothing, or the end
            except ssl.SSLWantReadError:
                return tls
            except OSError:
                pass
            tls.close()
        return None


class Bulk:
    """All bulk transfers of a node. Used in one trio loop; `aclose` ends it.

    Attributes:
        uplink: how much this node can send, as its lanes show.
    """

    def __init__(self, links: BulkLinks) -> None:
        self.uplink = Uplink()
        self._links = links
        self._offers: dict[bytes, _Offer] = {}
        self._peers: dict[PeerId, _Peer] = {}
        self._num_served = 0
        self._kept = Signal()
        self._is_closed = False

    # --- owning ---

    @asynccontextmanager
    async def offer(self, peer: PeerId, buffer: AnyBuffer) -> AsyncIterator[BulkRef]:
        """Let one peer pull these bytes, as often as it likes, until the context ends.

        The end breaks off what is still being sent, and waits, shielded, until no thread reads the buffer any more:
        normally less than a millisecond, at most `PROGRESS_S`.

        Args:
            peer: who may.
            buffer: C-contiguous; its owner leaves it as it is meanwhile.
        """
        view = _as_bytes(buffer).toreadonly()
        offer = _Offer(peer, len(view), view)
        ref = BulkRef(secrets.token_bytes(ID_BYTES), len(view))
        self._offers[ref.id] = offer
        try:
            yield ref
        finally:
            del self._offers[ref.id]
            await offer.withdraw()

    def offer_source(self, source: Source, num_bytes: int) -> BulkRef:
        """Let every peer that knows the reference pull what a source reads, until it is `withdraw`n."""
        ref = BulkRef(secrets.token_bytes(ID_BYTES), num_bytes)
        self._offers[ref.id] = _Offer(None, num_bytes, memoryview(b""), source)
        return ref

    def withdraw(self, ref: BulkRef) -> None:
        """Nobody pulls this from its source any more; what is being sent ends by itself."""
        self._offers.pop(ref.id, None)

    async def serve_lane(self, peer: PeerId, tls: ssl.SSLSocket) -> None:
        """Serve a peer on a fresh lane until that ends; closes it."""
        stream = TlsByteStream(tls)

        async def send(pieces: Iterator[memoryview], num_bytes: int, *, is_read: bool) -> None:
            if num_bytes <= INLINE_BYTES and not is_read:
                with trio.fail_after(PROGRESS_S):
                    await stream.write(_OK + b"".join(pieces))
            else:
                with self.uplink.sending(tls):
                    await _in_thread(tls, functools.partial(_send, tls, pieces))

        lanes = self._peer(peer).served_lanes
        try:
            if len(lanes) < MAX_LANES and self._num_served < MAX_SERVED and not self._is_closed:
                self._num_served += 1
                try:
                    with self.uplink.carrying(tls):
                        await self._serve(peer, stream, send, functools.partial(_shut_down, tls), lanes)
                finally:
                    self._num_served -= 1
        finally:
            await stream.close()

    async def serve_stream(self, peer: PeerId, stream: ByteStream) -> None:
        """Serve a peer on a fresh libp2p stream until that ends; closes it."""

        async def send(pieces: Iterator[memoryview], num_bytes: int, *, is_read: bool) -> None:
            async def take(step: Callable[[], memoryview | None]) -> memoryview | None:
                return await trio.to_thread.run_sync(step) if is_read else step()

            piece = await take(lambda: next(pieces, None))  # if that is refused, nothing was sent
            with trio.fail_after(PROGRESS_S):
                await stream.write(_OK)
            while piece is not None:
                for start in range(0, len(piece), CHUNK_BYTES):
                    with trio.fail_after(PROGRESS_S):
                        await stream.write(piece[start : start + CHUNK_BYTES])
                piece = await take(lambda: _following(pieces))

        streams = self._peer(peer).served_streams
        try:
            if len(streams) < MAX_STREAMS and not self._is_closed:
                with trio.CancelScope() as scope:
                    await self._serve(peer, stream, send, scope.cancel, streams)
        finally:
            await _close(stream)

    async def _serve(
        self,
        peer: PeerId,
        stream: ByteStream,
        send: _Sender,
        abort: Abort,
        served: set[Abort],
    ) -> None:
        served.add(abort)
        unread = bytearray()
        try:
            while True:
                with trio.fail_after(SERVED_IDLE_S):
                    while len(unread) < REQUEST.size:
                        unread += await stream.read()
                ref_id, offset, length = REQUEST.unpack_from(unread)
                del unread[: REQUEST.size]
                offer = self._offers.get(ref_id)
                if offer is None or offer.peer not in (peer, None):
                    status = Status.NOT_FOUND
                elif offset + length > offer.num_bytes:
                    status = Status.OUT_OF_RANGE
                else:
                    try:
                        async with offer.pieces(peer, offset, length, abort) as pieces:
                            await send(pieces, length, is_read=offer.source is not None)
                        continue
                    except RemoteError as error:
                        status = error.status
                with trio.fail_after(PROGRESS_S):
                    await stream.write(bytes([status]))
        except (StreamClosedError, OSError, trio.TooSlowError) as error:
            log.debug("a bulk path of %s ended: %s", peer, error)
        finally:
            served.discard(abort)

    # --- pulling ---

    async def pull(
        self,
        peer: PeerId,
        ref: BulkRef,
        into: AnyBuffer | Parts,
        *,
        offset: int = 0,
        timeout_s: float,
        transport: Transport = "auto",
    ) -> str:
        """Fill ``into`` with offered bytes. When it returns or raises, nothing writes into it any more.

        Args:
            peer: who offers them.
            ref: what it offers.
            into: writable and C-contiguous; holds some of the bytes, in no order, if this raises. Or parts, which are
                told when they are there.
            offset: where in the offered bytes to begin.
            timeout_s: for all of it.
            transport: ``auto``: by lanes, and what they cannot bring by libp2p; ``libp2p``: by libp2p alone.

        Returns:
            What brought the last of it: ``lane`` or ``libp2p``.

        Raises:
            RemoteError: NOT_FOUND if there is no such offer to this node (any more); OUT_OF_RANGE; DEADLINE_EXCEEDED;
                UNAVAILABLE if every path died.
        """
        if self._is_closed:
            raise RemoteError(Status.UNAVAILABLE, "this node is stopping")
        if isinstance(into, Parts):
            return await self._pull(peer, ref, into, offset, timeout_s, transport)
        with _as_bytes(into) as view:
            if view.readonly:
                raise ValueError("pull needs memory that it may write to")
            return await self._pull(peer, ref, Memory(view), offset, timeout_s, transport)

    async def _pull(
        self, peer: PeerId, ref: BulkRef, into: Memory | Parts, offset: int, timeout_s: float, transport: Transport
    ) -> str:
        if offset < 0 or offset + into.size > ref.num_bytes:
            raise RemoteError(Status.OUT_OF_RANGE, f"the offer has {ref.num_bytes} bytes, not as many as asked for")
        carried_by = "lane"
        # Whoever takes parts has several pulls on at once, and each segment costs its owner a thread.
        num_lanes = 1 if isinstance(into, Parts) else min(max(1, self._links.num_lanes(peer)), MAX_LANES)
        pull = Pull(ref.id, offset, into, num_lanes)
        with trio.move_on_after(timeout_s) as scope:
            if transport == "auto":
                await self._pull_by_lanes(peer, pull, num_lanes)
            if pull.todo:
                carried_by = "libp2p"
                async with self._peer(peer).stream_slots:
                    await self._pull_by_stream(peer, pull)
        if scope.cancelled_caught:
            raise RemoteError(Status.DEADLINE_EXCEEDED, f"{peer} did not send {into.size} bytes in {timeout_s:g} s")
        return carried_by

    async def _pull_by_lanes(self, peer: PeerId, pull: Pull, num_lanes: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(min(num_lanes, len(pull.todo))):
                nursery.start_soon(self._pull_by_lane, peer, pull, nursery.cancel_scope)
        if pull.refusal is not None:
            raise pull.refusal

    async def _pull_by_lane(self, peer: PeerId, pull: Pull, others: trio.CancelScope) -> None:
        """Carry segments while there are any, by one lane after the other."""
        state = self._peer(peer)
        while pull.todo and pull.num_failures < MAX_FAILURES:
            state.num_waiting += 1
            try:
                await state.slots.acquire()
            finally:
                state.num_waiting -= 1
            try:
                tls = state.take_idle() or await self._dial(peer, state)
                if tls is None:
                    return
                await self._pull_by(tls, state, pull)
            except RemoteError as error:
                pull.refusal = error
                others.cancel()
                return
            except (OSError, ValueError) as error:
                pull.num_failures += 1
                log.debug("a lane to %s broke: %s", peer, error)
            finally:
                state.slots.release()

    async def _pull_by(self, tls: ssl.SSLSocket, state: _Peer, pull: Pull) -> None:
        asker = Asker(pull, lambda: state.num_waiting > 0)
        state.pulling.add(tls)
        is_good = False
        try:
            await _in_thread(tls, functools.partial(_ask, tls, asker))
            is_good = not state.is_gone and not self._is_closed
        finally:
            asker.close()
            state.pulling.discard(tls)
            if is_good:
                self._keep(tls, state)
            else:
                tls.close()

    async def _dial(self, peer: PeerId, state: _Peer) -> ssl.SSLSocket | None:
        if state.is_gone or trio.current_time() < state.no_lane_before:
            return None
        tls = await self._links.dial_bulk_lane(peer)
        if tls is None:
            state.no_lane_before = trio.current_time() + NO_LANE_S
        return tls

    async def _pull_by_stream(self, peer: PeerId, pull: Pull) -> None:
        reason = ""
        for _ in range(MAX_FAILURES):
            asker = Asker(pull, lambda: False)
            try:
                stream = await self._links.open_bulk_stream(peer)
                try:
                    await _ask_stream(stream, asker)
                finally:
                    await _close(stream)
            except (StreamClosedError, trio.TooSlowError) as error:
                reason = str(error)
            else:
                return
            finally:
                asker.close()
        raise RemoteError(Status.UNAVAILABLE, f"no path to {peer} brings the bytes: {reason}")

    # --- keeping ---

    def drop_peer(self, peer: PeerId) -> None:
        """A peer is gone: break off everything from and to it."""
        state = self._peers.pop(peer, None)
        if state is None:
            return
        state.is_gone = True
        for abort in [*state.served_lanes, *state.served_streams]:
            abort()
        for tls in state.pulling:
            _shut_down(tls)
        for _, tls in state.idle:
            tls.close()
        state.idle.clear()

    async def aclose(self) -> None:
        """Break off everything, for good."""
        self._is_closed = True
        for peer in list(self._peers):
            self.drop_peer(peer)
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _peer(self, peer: PeerId) -> _Peer:
        return self._peers.setdefault(peer, _Peer())

    def _keep(self, tls: ssl.SSLSocket, state: _Peer) -> None:
        state.idle.append((trio.current_time() + IDLE_S, tls))
        self._kept.set()

    async def reap(self) -> None:
        """Close idle lanes when their time has come; until cancelled."""
        while True:
            until = [state.idle[0][0] for state in self._peers.values() if state.idle]
            if not until:
                await self._kept.wait()
                continue
            await trio.sleep_until(min(until))
            now = trio.current_time()
            for state in self._peers.values():
                while state.idle and state.idle[0][0] <= now:
                    state.idle.pop(0)[1].close()


async def _ask_stream(stream: ByteStream, asker: Asker) -> None:
    data = memoryview(b"")
    with trio.fail_after(PROGRESS_S) as progress:
        while True:
            if requests := asker.next_requests():
                await stream.write(requests)
            if asker.is_done:
                return
            goes_on = True
            while goes_on:
                if not data:
                    data = memoryview(await stream.read())
                    now = trio.current_time()
                    if progress.deadline < now + PROGRESS_S / 2:  # seldom: a new deadline costs as much as a read
                        progress.deadline = now + PROGRESS_S
                num_bytes = min(len(data), len(asker.target))
                asker.target[:num_bytes] = data[:num_bytes]
                data = data[num_bytes:]
                if asker.fills_part(num_bytes):
                    goes_on = await trio.to_thread.run_sync(asker.filled, num_bytes)
                else:
                    goes_on = asker.filled(num_bytes)


# --- threads ---------------------------------------------------------------------------------------------------------


def _ask(tls: ssl.SSLSocket, asker: Asker) -> None:
    while True:
        if requests := asker.next_requests():
            tls.sendall(requests)
        if asker.is_done:
            return
        while _fill(tls, asker):
            pass


def _fill(tls: ssl.SSLSocket, asker: Asker) -> bool:
    """Receive into the target, which takes a call for each TLS record, and tell of some at once; as `Asker.filled`."""
    most, num_bytes = min(len(asker.target), RECEIVE_BYTES), 0
    try:
        while num_bytes < most:
            with asker.target[num_bytes:most] as rest:  # which an error's traceback would hold for long
                came = tls.recv_into(rest)
            if not came:
                raise ConnectionError("the far side closed the lane")
            num_bytes += came
    except OSError:
        if num_bytes:
            asker.filled(num_bytes)
        raise
    return asker.filled(num_bytes)


def _send(tls: ssl.SSLSocket, pieces: Iterator[memoryview]) -> None:
    piece = next(pieces, None)  # if that is refused, nothing was sent
    tls.sendall(_OK)
    while piece is not None:
        for start in range(0, len(piece), SEND_BYTES):
            tls.sendall(piece[start : start + SEND_BYTES])
        piece = _following(pieces)


def _following(pieces: Iterator[memoryview]) -> memoryview | None:
    """The next piece; a refusal amidst the bytes can only end the path."""
    try:
        return next(pieces, None)
    except RemoteError as error:
        raise ConnectionError(str(error)) from error


async def _in_thread(tls: ssl.SSLSocket, work: Callable[[], None]) -> None:
    """Run blocking work on a lane in a thread of its own; returns or raises only after it has ended.

    Not one of trio's threads: those are used again by others, and a lowered priority cannot be raised again.
    """
    token = trio.lowlevel.current_trio_token()
    has_ended = trio.Event()
    result: list[outcome.Outcome[None]] = []

    def run() -> None:
        with contextlib.suppress(OSError):  # a sandbox may forbid it, and it only orders who goes first
            os.nice(NICE)  # on Linux of this thread alone
        result.append(outcome.capture(work))
        token.run_sync_soon(has_ended.set)

    tls.settimeout(PROGRESS_S)
    try:
        # Not `threading`, whose start waits until the new thread has had a turn: the loop would stand still meanwhile.
        _thread.start_new_thread(run, ())
    except RuntimeError as error:
        raise OSError("no thread can be had") from error
    try:
        await has_ended.wait()
    finally:
        if not has_ended.is_set():
            _shut_down(tls)
            with trio.CancelScope(shield=True):
                await has_ended.wait()
        tls.setblocking(False)
    result.pop().unwrap()


def _shut_down(tls: ssl.SSLSocket) -> None:
    """Wake whoever is blocked on a lane. `ssl.SSLSocket.shutdown` would let it go on in plain text."""
    try:
        socket.socket.shutdown(tls, socket.SHUT_RDWR)
    except OSError as error:
        log.debug("a lane was closed already: %s", error)


async def _close(stream: ByteStream) -> None:
    with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
        await stream.close()


def _as_bytes(buffer: AnyBuffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(bytearray())
