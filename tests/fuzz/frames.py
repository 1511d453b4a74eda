"""Frames, in pieces: any cut of the stream gives the same frames, and what comes out can go in again.

An input is four bytes that say where the stream is cut, and the stream.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from random import Random
from typing import Final

import zstandard

from shoal.protocol.codec import encode
from shoal.protocol.errors import ProtocolError, TooLargeError
from shoal.protocol.frames import Frame, FrameDecoder, FrameType, encode_frame
from shoal.protocol.limits import MAX_ATTACHMENTS, MAX_HEADER_BYTES

from .harness import BASE_BYTES, BYTES_PER_BYTE, FindingError, MutateBytes, Target, refusing, require
from .mutators import mutate_packed
from .samples import sample

_MAX_ATTACHMENT_BYTES: Final = 256 * 1024  # of one frame; small, so that a little too much is seen
_CUT_BYTES: Final = 4


def _run(data: bytes) -> None:
    cut, stream = data[:_CUT_BYTES], data[_CUT_BYTES:]
    whole, in_pieces = _decode([stream]), _decode(_pieces(stream, Random(zlib.crc32(cut))))
    require((whole is None) == (in_pieces is None), "whether a stream is refused depends on how it is cut")
    if whole is None or in_pieces is None:
        return
    require(_content(whole) == _content(in_pieces), "the frames of a stream depend on how it is cut")
    held = sum(len(header) + sum(map(len, attachments)) for _, _, header, attachments, _ in _content(whole))
    require(
        held <= BYTES_PER_BYTE * len(stream) + MAX_HEADER_BYTES + _MAX_ATTACHMENT_BYTES,
        f"{len(stream)} bytes of stream became {held} bytes of frames at once",
    )
    for frame in whole:
        num_bytes = sum(len(attachment) for attachment in frame.attachments)
        require(len(frame.header) <= MAX_HEADER_BYTES, "a header is over its limit")
        require(len(frame.attachments) <= MAX_ATTACHMENTS, "there are more attachments than may be")
        require(num_bytes <= _MAX_ATTACHMENT_BYTES, "attachments are over their limit")
        for compress in (False, True):
            again = _decode([_wire(frame, compress=compress)])
            require(again is not None and _content(again) == _content([frame]), "a frame does not come back as it was")


def _decode(pieces: list[bytes]) -> list[Frame] | None:
    """All frames, or None if the stream is refused."""
    decoder = FrameDecoder(max_attachment_bytes=_MAX_ATTACHMENT_BYTES)
    frames: list[Frame] = []
    is_refused = True
    with refusing(ProtocolError):
        for piece in pieces:
            frames += decoder.receive_data(piece)
        is_refused = False
    return None if is_refused else frames


def _pieces(stream: bytes, rng: Random) -> list[bytes]:
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(6)))
    return [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]


def _content(frames: list[Frame]) -> list[tuple[FrameType, int, bytes, list[bytes], int]]:
    return [
        (frame.type, frame.call_id, bytes(frame.header), [bytes(one) for one in frame.attachments], frame.flags)
        for frame in frames
    ]


def _wire(frame: Frame, *, compress: bool) -> bytes:
    try:
        return b"".join(encode_frame(frame, compress=compress, max_attachment_bytes=_MAX_ATTACHMENT_BYTES))
    except ProtocolError as error:
        raise FindingError(f"a frame that was taken cannot be sent: {error}") from error


def _seeds() -> list[bytes]:
    header = encode(sample(dict[str, int]))
    long = b"compressible " * 800
    frames = [Frame(kind, 7, header) for kind in FrameType]
    frames += [
        Frame(FrameType.REQUEST, 2**32 - 1, header, (b"", b"one", bytes(200))),
        Frame(FrameType.ANSWER, 1, header, (long,)),
        Frame(FrameType.ANSWER, 1, long, (long, b"x")),
        Frame(FrameType.ANSWER, 1, bytes(MAX_HEADER_BYTES), (bytes(_MAX_ATTACHMENT_BYTES),)),
    ]
    alone = [bytes(_CUT_BYTES) + _wire(frame, compress=True) for frame in frames]
    del frames[-1]  # the largest there is
    return [
        *alone,
        b"cuts" + b"".join(_wire(frame, compress=True) for frame in frames),
        bytes(_CUT_BYTES) + 4 * _bomb(),
    ]


def _bomb() -> bytes:
    """A frame whose attachment grows by more than may be."""
    piece = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(_MAX_ATTACHMENT_BYTES))
    after_length = struct.pack("!BBIIHI", FrameType.ANSWER, 0, 1, 0, 1, len(piece) | 1 << 31) + piece
    return len(after_length).to_bytes(4, "big") + after_length


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    frames = _decode([data[_CUT_BYTES:]])
    if not frames or rng.random() < 0.3:
        return mutate_bytes(data, max_bytes)
    at = rng.randrange(len(frames))
    kind, call_id, header, attachments, flags = frames[at]
    match rng.randrange(7):
        case 0:
            frames.insert(rng.randrange(len(frames) + 1), frames[at])
        case 1:
            del frames[at]
        case 2:
            frames[at] = Frame(rng.choice(list(FrameType)), call_id, header, attachments, flags)
        case 3 | 4:
            header = mutate_packed(bytes(header), max_bytes, rng, mutate_bytes)
            frames[at] = Frame(kind, call_id, header, attachments, flags)
        case 5:
            more = rng.choice((b"", b"x", bytes(5000), rng.randbytes(40)))
            frames[at] = Frame(kind, call_id, header, (*attachments, more), flags)
        case _ if attachments:
            frames[at] = Frame(kind, call_id, header, (*attachments[1:], bytes(len(attachments[0]) + 5000)), flags)
    try:
        stream = b"".join(
            b"".join(encode_frame(frame, compress=rng.random() < 0.5, max_attachment_bytes=_MAX_ATTACHMENT_BYTES))
            for frame in frames
        )
    except TooLargeError:
        return mutate_bytes(data, max_bytes)
    changed = (data[:_CUT_BYTES] if rng.random() < 0.8 else rng.randbytes(_CUT_BYTES)) + stream
    return changed if len(changed) <= max_bytes else mutate_bytes(data, max_bytes)


def _max_peak_bytes(length: int) -> int:
    one_frame = MAX_HEADER_BYTES + _MAX_ATTACHMENT_BYTES
    # Compressed, a frame is longer than what came. It is held, and written and read again, here, to compare.
    return BASE_BYTES + BYTES_PER_BYTE * length + 6 * one_frame


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=_max_peak_bytes)
