"""The writing side of a channel: what gathers goes out in one piece, and who waits for that is told.

Two ways lead out at once. `Outbox.flush_soon` wakes the writer, which runs after all tasks that are ready now, so that
everything they have to say leaves together. `Outbox.flush_now` writes on the spot if the stream takes it without
waiting: two task switches fewer for a lone call. What is in no hurry waits for either: each message that is written
alone costs both sides a wake-up of their process, which is more than all else that is done for a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

import trio

from shoal.protocol.codec import Buffer, encode_message
from shoal.protocol.rpc import RpcConnection

T = TypeVar("T")

JOIN_BELOW_BYTES: Final = 64 * 1024
"""Pieces shorter than this are written together; longer ones as they are, without a copy."""
WRITE_BYTES: Final = 256 * 1024
"""Written at once; after each it is known that the path still takes something."""
INLINE_BYTES: Final = 64 * 1024
"""What is at most this long may be written by `Outbox.flush_now`."""
ENOUGH_BYTES: Final = 4 * 1024
"""So much is worth a write of its own: the far side works on it while this side makes more."""
MAX_UNHURRIED: Final = 4
"""As many messages that are in no hurry are written without waiting for more."""


class StreamClosedError(Exception):
    """Raised by a `ByteStream` when the far side or the path is gone."""


class UnknownProtocolError(StreamClosedError):
    """The far side is there, and does not speak the protocol that a stream was opened for."""


class ByteStream(Protocol):
    """What a channel needs of a transport."""

    async def read(self) -> bytes:
        """Some bytes, or `StreamClosedError`."""

    async def write(self, data: Buffer) -> None:
        """Write all, or `StreamClosedError`."""

    def try_write(self, data: Buffer) -> bool:
        """Write all at once, or give back False: then the next `write` begins with the same bytes.

        Never called while a `write` is under way.
        """

    async def close(self) -> None:
        """Close both directions; never raises."""


def total_bytes(body: Buffer, attachments: Sequence[Buffer]) -> int:
    """How long a message is, as the codec wrote it."""
    num_bytes = len(body)
    for attachment in attachments:
        num_bytes += len(attachment)
    return num_bytes


class Outbox:
    """What a connection has to say, on its way to a stream."""

    def __init__(self, stream: ByteStream, connection: RpcConnection) -> None:
        self.is_closed = False
        self._busy_since = math.inf
        self._written_at = -math.inf
        self._stream = stream
        self._connection = connection
        self._idle_writer: trio.lowlevel.Task | None = None
        self._is_writing = False
        self._after_write: list[tuple[Callable[[Any], None], Any]] = []
        self._room = trio.lowlevel.ParkingLot()
        self._num_unhurried = 0
        self._hurry_at = math.inf
        self._idling = trio.CancelScope()  # around the wait of a writer with nothing to do

    @property
    def is_empty(self) -> bool:
        """Whether all has been handed to the stream, and taken by it."""
        return not self._is_writing and not self._connection.unsent_bytes

    def is_moving(self, since: float) -> bool:
        """Whether what waited then is still on its way out, and part of it has gone since."""
        return self._busy_since <= since < self._written_at

    def flush_soon(self) -> None:
        """Let the writer run."""
        if self._idle_writer is not None:
            writer, self._idle_writer = self._idle_writer, None
            trio.lowlevel.reschedule(writer)

    def flush(self) -> None:
        """Write now if there is enough for that, else soon, with what is still to come."""
        if self._connection.unsent_bytes >= ENOUGH_BYTES:
            self.flush_now()
        else:
            self.flush_soon()

    def flush_within(self, lag_s: float) -> None:
        """Write with whatever else is written, and at the latest after this time."""
        self._num_unhurried += 1
        at = trio.current_time() + lag_s
        if self._num_unhurried >= MAX_UNHURRIED or self._connection.unsent_bytes >= ENOUGH_BYTES:
            self.flush_now()
        elif at < self._hurry_at:
            self._hurry_at = self._idling.deadline = at

    def flush_now(self) -> None:
        """Write at once if that is possible without waiting, else soon."""
        connection = self._connection
        if self._is_writing or self.is_closed or not connection.unsent_bytes:
            return  # the writer goes on with it, or there is nothing to do
        if connection.unsent_bytes <= INLINE_BYTES:
            pieces = self._take()
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            try:
                if self._stream.try_write(data):
                    self._tell_written()
                    return
            except StreamClosedError:
                return  # the reader notices too, and ends the channel
            connection.put_back(data)
        self.flush_soon()

    def when_written(self, tell: Callable[[T], None], about: T) -> None:
        """Call back once all that waits now has been taken by the stream; at once if nothing waits."""
        if self.is_empty:
            tell(about)
        else:
            self._after_write.append((tell, about))

    async def wait_for_room(self, max_bytes: int) -> None:
        """Return once at most so many bytes wait, or the stream is gone."""
        while self._connection.unsent_bytes > max_bytes and not self.is_closed:
            await self._room.park()

    async def send_message(
        self, call_id: int, message: object, writable: trio.lowlevel.ParkingLot, *, is_ours: bool
    ) -> int:
        """Send the next message of a stream as soon as its reader has room; into the void if the call is over.

        ``writable`` is unparked by whoever learns of new credit, and of the call's end. Returns the message's bytes.
        """
        body, attachments = encode_message(message)
        await trio.lowlevel.checkpoint()
        while self._connection.is_stopped(call_id, is_ours=is_ours):
            await writable.park()
        self._connection.send_message(call_id, body, attachments, is_ours=is_ours)
        self.flush_soon()
        return total_bytes(body, attachments)

    async def run(self) -> None:
        """Write until the stream breaks, which the reader notices."""
        try:
            while True:
                if self._connection.unsent_bytes:
                    num_waiting = len(self._after_write)  # they stay in the list: if this breaks, `close` tells them
                    self._is_writing = True
                    await self._write(self._take())
                    self._is_writing = False
                    self._tell_written(num_waiting)
                    self._room.unpark_all()
                else:
                    self._busy_since = math.inf
                    self._tell_written()
                    with trio.CancelScope(deadline=self._hurry_at) as self._idling:
                        self._idle_writer = trio.lowlevel.current_task()
                        await trio.lowlevel.wait_task_rescheduled(self._stop_idling)
        except StreamClosedError:
            await self._stream.close()

    def _take(self) -> list[Buffer]:
        self._num_unhurried = 0
        if self._hurry_at != math.inf:
            self._hurry_at = self._idling.deadline = math.inf
        return self._connection.data_to_send()

    async def _write(self, pieces: list[Buffer]) -> None:
        if self._busy_since == math.inf:
            self._busy_since = trio.current_time()
        for data in _gather(pieces):
            if len(data) <= WRITE_BYTES:
                await self._stream.write(data)
                self._written_at = trio.current_time()
                continue
            view = memoryview(data)
            for start in range(0, len(view), WRITE_BYTES):
                await self._stream.write(view[start : start + WRITE_BYTES])
                self._written_at = trio.current_time()

    def close(self) -> None:
        """Nothing more will be written; whoever waits goes on."""
        self.is_closed = True
        self._tell_written()
        self._room.unpark_all()

    def _tell_written(self, num: int | None = None) -> None:
        after = self._after_write[:num]
        del self._after_write[:num]
        for tell, about in after:
            tell(about)

    def _stop_idling(self, _: Any) -> trio.lowlevel.Abort:
        self._idle_writer = None
        return trio.lowlevel.Abort.SUCCEEDED


def _gather(pieces: list[Buffer]) -> Iterator[Buffer]:
    """Short pieces joined, long ones as they are."""
    short: list[Buffer] = []
    num_bytes = 0
    for piece in pieces:
        is_long = len(piece) >= JOIN_BELOW_BYTES
        if not is_long:
            short.append(piece)
            num_bytes += len(piece)
        if short and (is_long or num_bytes >= JOIN_BELOW_BYTES):
            yield b"".join(short)
            short, num_bytes = [], 0
        if is_long:
            yield piece
    if short:
        yield short[0] if len(short) == 1 else b"".join(short)
