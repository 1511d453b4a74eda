"""Frames: how messages lie on a byte stream.

    u32 length of what follows | u8 type | u32 call id | u32 header length | u16 number of attachments
    | u32 length of each attachment | header (MessagePack) | attachments (raw)

All integers are big-endian. Attachments are bulk bytes (blocks, tensors) that never pass through MessagePack.
A decoder checks every length against `limits` as soon as it can be read, before it waits for the rest, so a peer
cannot make this side hold more than one frame of the largest allowed size.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES, MAX_ATTACHMENTS, MAX_HEADER_BYTES

_PREFIX: Final = struct.Struct("!IBIIH")
_AFTER_LENGTH: Final = _PREFIX.size - 4


class FrameType(IntEnum):
    """What a frame says about its call."""

    REQUEST = 1
    ANSWER = 2
    ERROR = 3
    CANCEL = 4


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.

    Attributes:
        type: what it says about the call.
        call_id: chosen by the caller, unique among its open calls on this stream.
        header: MessagePack.
        attachments: raw bytes, not copied out of what was received.
    """

    type: FrameType
    call_id: int
    header: bytes = b""
    attachments: tuple[bytes | memoryview, ...] = ()


def encode_frame(frame: Frame) -> list[bytes | memoryview]:
    """The frame as pieces to be written one after the other; attachments are passed on, not copied.

    Raises:
        LimitError: if the far side would refuse it.
    """
    sizes = [memoryview(attachment).nbytes for attachment in frame.attachments]  # len() counts a tensor's rows
    _check_limits(len(frame.header), sizes)
    table = struct.pack(f"!{len(sizes)}I", *sizes)
    length = _AFTER_LENGTH + len(table) + len(frame.header) + sum(sizes)
    prefix = _PREFIX.pack(length, frame.type, frame.call_id, len(frame.header), len(sizes))
    return [prefix + table + frame.header, *frame.attachments]


class FrameDecoder:
    """Cuts a byte stream into frames."""

    __slots__ = ("_buffer", "_wanted")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = _PREFIX.size

    def receive_data(self, data: bytes | memoryview) -> list[Frame]:
        """Take what arrived and give back the frames that are now whole.

        Raises:
            ProtocolError: if this is no frame; the stream is of no more use.
            LimitError: if a length is above its limit; likewise.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= self._wanted:
            frame = self._next()
            if frame is not None:
                frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        length, kind, call_id, header_bytes, num_attachments = _PREFIX.unpack_from(self._buffer)
        try:
            frame_type = FrameType(kind)
        except ValueError as error:
            raise ProtocolError(f"{kind} is not a frame type") from error
        if num_attachments > MAX_ATTACHMENTS:
            raise LimitError(f"a frame with {num_attachments} attachments exceeds the limit of {MAX_ATTACHMENTS}")
        start = _PREFIX.size + 4 * num_attachments
        if length + 4 > start + MAX_HEADER_BYTES + MAX_ATTACHMENT_BYTES:
            raise LimitError(f"a frame of {length} bytes exceeds the limit")
        if len(self._buffer) < start:
            self._wanted = start
            return None
        sizes = struct.unpack_from(f"!{num_attachments}I", self._buffer, _PREFIX.size)
        _check_limits(header_bytes, sizes)
        end = start + header_bytes + sum(sizes)
        if end != length + 4:
            raise ProtocolError("a frame's lengths contradict each other")
        if len(self._buffer) < end:
            self._wanted = end
            return None
        whole = bytes(memoryview(self._buffer)[start:end])
        del self._buffer[:end]
        self._wanted = _PREFIX.size
        attachments = []
        view = memoryview(whole)[header_bytes:]
        for size in sizes:
            attachments.append(view[:size])
            view = view[size:]
        return Frame(frame_type, call_id, whole[:header_bytes], tuple(attachments))


def _check_limits(header_bytes: int, sizes: Sequence[int]) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise LimitError(f"a header of {header_bytes} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if len(sizes) > MAX_ATTACHMENTS:
        raise LimitError(f"{len(sizes)} attachments exceed the limit of {MAX_ATTACHMENTS}")
    if sum(sizes) > MAX_ATTACHMENT_BYTES:
        raise LimitError(f"attachments of {sum(sizes)} bytes exceed the limit of {MAX_ATTACHMENT_BYTES}")
