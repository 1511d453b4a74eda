"""Frames: how messages lie on a byte stream.

    u32 length of what follows | u8 type | u8 flags | u32 call id | u32 header length | u16 number of attachments
    | u32 length of each attachment | header (MessagePack) | attachments (raw)

All integers are big-endian. Attachments are bulk bytes (blocks, tensors) that never pass through MessagePack. The top
bit of an attachment's length says that it is compressed (zstd, RFC 8878, with its content size, and maybe followed by
zeros), the flag `HEADER_COMPRESSED` says so of the header. Only what shrinks is compressed, by `MAX_EXPANSION` at most,
and only where the sender was asked to.

A decoder checks every length against its limits as soon as it can be read, before it waits for the rest and before it
decompresses, so a peer cannot make this side hold more than one frame of the largest allowed size that is not whole
yet; and the whole ones of a read, decompressed, are at most `MAX_EXPANSION` times as long as that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

import zstandard

from shoal.protocol.codec import Buffer
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES, MAX_ATTACHMENTS, MAX_HEADER_BYTES

_PREFIX: Final = struct.Struct("!IBBIIH")
_PREFIX_WITH_ONE: Final = struct.Struct("!IBBIIHI")
_AFTER_LENGTH: Final = _PREFIX.size - 4
_SIZE_COMPRESSED: Final = 1 << 31
_SIZE: Final = _SIZE_COMPRESSED - 1

FROM_CALLER: Final = 1
"""Flag of MESSAGE, END and CREDIT: the sender of this frame is the one who made the call."""
HEADER_COMPRESSED: Final = 2
"""Flag: the header is compressed."""

PROBE_BYTES: Final = 4096
"""What is at least this long is tried for compression, by its first so many bytes."""
COMPRESS_UP_TO_BYTES: Final = 2 * 1024 * 1024
"""What is longer is not compressed, nor read if it was: it would hold up the loop (here: 4 ms)."""
WORTH_COMPRESSING: Final = 0.8
"""Compressed to at most this part of its size; less is not worth the time."""
MAX_EXPANSION: Final = 256
"""Nothing grows by more than this when it is decompressed: one read may hold any number of frames, and would fill the
memory of this side. What compresses further is followed by zeros, up to that size."""
COPY_BELOW_BYTES: Final = 16 * 1024
MIN_SHARE: Final = 4
"""A received attachment is copied out if it is shorter than the one, or less than a fourth of all that came with it: as
a view it would keep all of that alive."""

_compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
_decompressor = zstandard.ZstdDecompressor()


class FrameType(IntEnum):
    """What a frame says about its call."""

    REQUEST = 1
    ANSWER = 2
    ERROR = 3
    CANCEL = 4
    MESSAGE = 5
    END = 6
    CREDIT = 7
    DRAIN = 8


_TYPES: Final = {int(kind): kind for kind in FrameType}


class Frame(NamedTuple):
    """One message.

    Attributes:
        type: what it says about the call.
        call_id: chosen by the caller, unique among its open calls on this stream.
        header: MessagePack.
        attachments: raw bytes; large ones are views of what was received.
        flags: `FROM_CALLER` or 0.
    """

    type: FrameType
    call_id: int
    header: Buffer = b""
    attachments: tuple[Buffer, ...] = ()
    flags: int = 0


def encode_frame(
    frame: tuple[FrameType, int, Buffer, tuple[Buffer, ...], int],
    *,
    compress: bool = False,
    max_attachment_bytes: int = MAX_ATTACHMENT_BYTES,
) -> list[Buffer]:
    """The frame as pieces to be written one after the other; attachments are passed on, not copied.

    Args:
        frame: a `Frame`, or a tuple of the same.
        compress: whether to compress what shrinks.
        max_attachment_bytes: of all attachments together.

    Raises:
        TooLargeError: if the far side would refuse it.
    """
    kind, call_id, header, attachments, flags = frame
    header_bytes = len(header)
    if header_bytes < PROBE_BYTES and not attachments:
        return [_PREFIX.pack(_AFTER_LENGTH + header_bytes, kind, flags, call_id, header_bytes, 0) + header]
    if len(attachments) == 1 and type(attachments[0]) is bytes:
        (small,) = attachments
        num_bytes = len(small)
        if header_bytes + num_bytes < PROBE_BYTES:
            length = _AFTER_LENGTH + 4 + header_bytes + num_bytes
            prefix = _PREFIX_WITH_ONE.pack(length, kind, flags, call_id, header_bytes, 1, num_bytes)
            return [b"".join((prefix, header, small))]
    sizes = [memoryview(attachment).nbytes for attachment in attachments]  # len() counts a tensor's rows
    _check_limits(header_bytes, sizes, max_attachment_bytes, TooLargeError)
    pieces = list(attachments)
    marks = sizes
    if compress:
        header, is_compressed = _compress(header)
        flags |= HEADER_COMPRESSED if is_compressed else 0
        marks = []
        for number, attachment in enumerate(attachments):
            pieces[number], is_compressed = _compress(attachment)
            sizes[number] = memoryview(pieces[number]).nbytes
            marks.append(sizes[number] | (_SIZE_COMPRESSED if is_compressed else 0))
    table = struct.pack(f"!{len(marks)}I", *marks)
    length = _AFTER_LENGTH + len(table) + len(header) + sum(sizes)
    return [_PREFIX.pack(length, kind, flags, call_id, len(header), len(sizes)) + table + header, *pieces]


class FrameDecoder:
    """Cuts a byte stream into frames."""

    __slots__ = ("_buffer", "_max_attachment_bytes", "_max_length", "_wanted")

    def __init__(self, *, max_attachment_bytes: int = MAX_ATTACHMENT_BYTES) -> None:
        self._buffer = bytearray()
        self._wanted = _PREFIX.size  # bytes from the start of a frame until there is something to do
        self._max_attachment_bytes = max_attachment_bytes
        self._max_length = _AFTER_LENGTH + 4 * MAX_ATTACHMENTS + MAX_HEADER_BYTES + max_attachment_bytes

    @property
    def buffered_bytes(self) -> int:
        """What is here of a frame that is not whole yet."""
        return len(self._buffer)

    def receive_data(self, data: Buffer | bytearray) -> list[Frame]:
        """Take what arrived and give back the frames that are now whole.

        Raises:
            ProtocolError: if this is no frame; the stream is of no more use.
            LimitError: if a length is above its limit; likewise.
        """
        source: bytes | bytearray
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return []
            source, self._buffer = self._buffer, bytearray()
        else:
            source = data if isinstance(data, bytes) else bytes(data)
        frames: list[Frame] = []
        start, end = 0, len(source)
        while end - start >= self._wanted:
            start = self._read(source, start, frames)
        if start < end:
            self._buffer += memoryview(source)[start:]
        return frames

    def _read(self, source: bytes | bytearray, start: int, frames: list[Frame]) -> int:
        """Read one frame at ``start``, or learn how much of it is wanted; returns where the next one starts."""
        if len(source) - start >= _PREFIX_WITH_ONE.size:  # the usual small frame, read in one step
            length, kind, flags, call_id, header_bytes, count, size = _PREFIX_WITH_ONE.unpack_from(source, start)
            at = start + _PREFIX_WITH_ONE.size
            end = at + header_bytes + size
            if count == 1 and flags <= FROM_CALLER and end == start + 4 + length and length < COPY_BELOW_BYTES:
                frame_type = _TYPES.get(kind)
                if frame_type is not None and end <= len(source):
                    middle = at + header_bytes
                    header, attached = bytes(source[at:middle]), bytes(source[middle:end])
                    frames.append(Frame(frame_type, call_id, header, (attached,), flags))
                    self._wanted = _PREFIX.size
                    return int(end)
        return self._read_any(source, start, frames)

    def _read_any(self, source: bytes | bytearray, start: int, frames: list[Frame]) -> int:
        length, kind, flags, call_id, header_bytes, num_attachments = _PREFIX.unpack_from(source, start)
        frame_type = _TYPES.get(kind)
        if frame_type is None or flags > (FROM_CALLER | HEADER_COMPRESSED):
            raise ProtocolError(f"{kind} with flags {flags} is not a frame type")
        if length > self._max_length:
            raise LimitError(f"a frame of {length} bytes exceeds the limit of {self._max_length}")
        end = start + 4 + length
        at = start + _PREFIX.size
        marks: tuple[int, ...] = ()
        attached = 0
        if num_attachments:
            if num_attachments > MAX_ATTACHMENTS:
                raise LimitError(f"a frame with {num_attachments} attachments exceeds the limit of {MAX_ATTACHMENTS}")
            self._wanted = _PREFIX.size + 4 * num_attachments
            if len(source) - start < self._wanted:
                return start
            marks = struct.unpack_from(f"!{num_attachments}I", source, at)
            attached = sum(marks) if max(marks) < _SIZE_COMPRESSED else sum(mark & _SIZE for mark in marks)
            at += 4 * num_attachments
        if header_bytes > MAX_HEADER_BYTES or attached > self._max_attachment_bytes:
            _check_limits(header_bytes, (attached,), self._max_attachment_bytes, LimitError)
        if end != at + header_bytes + attached:
            raise ProtocolError("a frame's lengths contradict each other")
        self._wanted = end - start
        if len(source) < end:
            return start
        self._wanted = _PREFIX.size
        cut = source[at : at + header_bytes]
        header = cut if type(cut) is bytes else bytes(cut)
        if flags & HEADER_COMPRESSED:
            header = _decompress(header, MAX_HEADER_BYTES)
        attachments: tuple[Buffer, ...] = ()
        if num_attachments:
            min_bytes = max(COPY_BELOW_BYTES, len(source) // MIN_SHARE)
            view = memoryview(source).toreadonly()[at + header_bytes : end]
            attachments = self._attachments(view, marks, min_bytes)
        frames.append(Frame(frame_type, call_id, header, attachments, flags & FROM_CALLER))
        return int(end)

    def _attachments(self, view: memoryview, marks: tuple[int, ...], min_bytes: int) -> tuple[Buffer, ...]:
        """Cut them out; as copies, if they are shorter than ``min_bytes``."""
        attachments: list[Buffer] = []
        left = self._max_attachment_bytes
        for mark in marks:
            size = mark & _SIZE
            piece: Buffer = view[:size]
            view = view[size:]
            if mark & _SIZE_COMPRESSED:
                piece = _decompress(piece, left)
            elif size < min_bytes:
                piece = bytes(piece)
            left -= len(piece)
            if left < 0:
                raise LimitError(f"attachments exceed the limit of {self._max_attachment_bytes} bytes")
            attachments.append(piece)
        return tuple(attachments)


def _compress(piece: Buffer) -> tuple[Buffer, bool]:
    view = memoryview(piece).cast("B")
    if not PROBE_BYTES <= len(view) <= COMPRESS_UP_TO_BYTES:
        return piece, False
    if len(_compressor.compress(view[:PROBE_BYTES])) > WORTH_COMPRESSING * PROBE_BYTES:
        return piece, False
    compressed = _compressor.compress(view).ljust(-(-len(view) // MAX_EXPANSION), b"\0")
    return (compressed, True) if len(compressed) <= WORTH_COMPRESSING * len(view) else (piece, False)


def _decompress(piece: Buffer, max_bytes: int) -> bytes:
    try:
        size = zstandard.frame_content_size(piece)
        if size < 0:
            raise ProtocolError("compressed bytes do not say how long they will be")
        if size > min(max_bytes, COMPRESS_UP_TO_BYTES):
            raise LimitError(f"{size} bytes, compressed, exceed the limit of {min(max_bytes, COMPRESS_UP_TO_BYTES)}")
        if size > MAX_EXPANSION * len(piece):
            raise LimitError(f"{size} bytes, compressed to {len(piece)}, exceed {MAX_EXPANSION} times as many")
        plain: bytes = _decompressor.decompress(piece, max_output_size=max(1, size), allow_extra_data=True)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"compressed bytes cannot be read: {error}") from error
    if len(plain) != size:
        raise ProtocolError("compressed bytes are not as long as they say")
    return plain


def _check_limits(
    header_bytes: int, sizes: Sequence[int], max_attachment_bytes: int, error: type[LimitError | TooLargeError]
) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise error(f"a header of {header_bytes} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if len(sizes) > MAX_ATTACHMENTS:
        raise error(f"{len(sizes)} attachments exceed the limit of {MAX_ATTACHMENTS}")
    if sum(sizes) > max_attachment_bytes:
        raise error(f"attachments of {sum(sizes)} bytes exceed the limit of {max_attachment_bytes}")
