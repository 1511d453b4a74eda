"""Frames survive any cut of the stream; what is no frame, or too much, is refused before it is waited for."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from array import array
from collections.abc import Iterator, Sequence

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError
from shoal.protocol.frames import (
    COMPRESS_UP_TO_BYTES,
    COPY_BELOW_BYTES,
    FROM_CALLER,
    MAX_EXPANSION,
    MIN_SHARE,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
)
from shoal.protocol.limits import MAX_ATTACHMENT_BYTES, MAX_ATTACHMENTS, MAX_HEADER_BYTES

frames = st.builds(
    Frame,
    type=st.sampled_from(FrameType),
    call_id=st.integers(0, 2**32 - 1),
    header=st.binary(max_size=200),
    attachments=st.lists(st.binary(max_size=200), max_size=5).map(tuple),
    flags=st.sampled_from([0, FROM_CALLER]),
)


def wire(*several: Frame) -> bytes:
    return b"".join(bytes(piece) for frame in several for piece in encode_frame(frame))


def cut(data: bytes, points: list[int]) -> Iterator[bytes]:
    bounds = [0, *sorted(point % (len(data) + 1) for point in points), len(data)]
    return (data[one:other] for one, other in itertools.pairwise(bounds))


def prefix(
    *,
    length: int,
    header_bytes: int = 0,
    sizes: Sequence[int] = (),
    kind: int = 1,
    num_attachments: int | None = None,
) -> bytes:
    """What a liar may write before the header."""
    count = len(sizes) if num_attachments is None else num_attachments
    return struct.pack("!IBBIIH", length, kind, 0, 7, header_bytes, count) + struct.pack(f"!{len(sizes)}I", *sizes)


def length_of(header_bytes: int, *sizes: int) -> int:
    return 12 + 4 * len(sizes) + header_bytes + sum(sizes)


@given(st.lists(frames, max_size=4), st.lists(st.integers(0, 10_000), max_size=12))
def test_frames_come_out_as_they_went_in_wherever_the_stream_is_cut(sent: list[Frame], points: list[int]) -> None:
    decoder = FrameDecoder()
    received = [frame for piece in cut(wire(*sent), points) for frame in decoder.receive_data(piece)]
    assert received == sent


def test_a_frame_comes_out_with_its_last_byte() -> None:
    frame = Frame(FrameType.ANSWER, 3, b"head", (b"one", b"", b"two"))
    decoder = FrameDecoder()
    outcomes = [decoder.receive_data(bytes([byte])) for byte in wire(frame)]
    assert not any(outcomes[:-1])
    assert outcomes[-1] == [frame]


def test_attachments_are_passed_on_not_copied() -> None:
    block = memoryview(bytes(1000))
    assert encode_frame(Frame(FrameType.ANSWER, 1, b"", (block,)))[1] is block


def test_an_attachment_is_measured_in_bytes_whatever_its_items() -> None:
    numbers = array("d", [1.0, 2.0, 3.0])
    (frame,) = FrameDecoder().receive_data(wire(Frame(FrameType.ANSWER, 1, b"", (memoryview(numbers),))))
    assert bytes(frame.attachments[0]) == numbers.tobytes()


def test_attachments_stay_readable_while_more_arrives() -> None:
    decoder = FrameDecoder()
    (first,) = decoder.receive_data(wire(Frame(FrameType.ANSWER, 1, b"", (b"kept",))))
    decoder.receive_data(wire(*(Frame(FrameType.ANSWER, n, bytes(5000)) for n in range(5))))
    assert bytes(first.attachments[0]) == b"kept"


@pytest.mark.parametrize("size", [1, COPY_BELOW_BYTES - 1, COPY_BELOW_BYTES, 200_000, 2**20])
@pytest.mark.parametrize("points", [[], [-10]], ids=["in one read", "in two"])
def test_an_attachment_keeps_no_more_alive_than_a_few_times_its_own_length(size: int, points: list[int]) -> None:
    long, short = (Frame(FrameType.ANSWER, n, b"", (bytes(length),)) for n, length in ((1, 2**20), (2, size)))
    decoder = FrameDecoder()
    received = [frame for piece in cut(wire(long, short), points) for frame in decoder.receive_data(piece)]
    assert received == [long, short]
    (kept,) = received[1].attachments
    assert len(kept.obj if isinstance(kept, memoryview) else kept) <= MIN_SHARE * size


def test_the_largest_frame_goes_through() -> None:
    largest = Frame(FrameType.REQUEST, 1, bytes(MAX_HEADER_BYTES), (bytes(MAX_ATTACHMENT_BYTES),))
    (frame,) = FrameDecoder().receive_data(wire(largest))
    assert len(frame.header) == MAX_HEADER_BYTES
    assert len(frame.attachments[0]) == MAX_ATTACHMENT_BYTES


@pytest.mark.parametrize(
    "frame",
    [
        Frame(FrameType.REQUEST, 1, bytes(MAX_HEADER_BYTES + 1)),
        Frame(FrameType.REQUEST, 1, b"", (b"",) * (MAX_ATTACHMENTS + 1)),
        Frame(FrameType.REQUEST, 1, b"", (bytes(MAX_ATTACHMENT_BYTES), b"1")),
    ],
    ids=["header", "number of attachments", "bytes of attachments"],
)
def test_what_the_far_side_would_refuse_is_not_sent(frame: Frame) -> None:
    with pytest.raises(TooLargeError):
        encode_frame(frame)


half = MAX_ATTACHMENT_BYTES // 2 + 1


@pytest.mark.parametrize(
    "start",
    [
        prefix(length=length_of(MAX_HEADER_BYTES + 1), header_bytes=MAX_HEADER_BYTES + 1),
        prefix(length=100_000, num_attachments=MAX_ATTACHMENTS + 1),
        prefix(length=length_of(0, half, half), sizes=(half, half)),
        prefix(length=length_of(0, 2**31 - 1), sizes=(2**31 - 1,)),
        prefix(length=2**32 - 1),
    ],
    ids=["header", "number of attachments", "attachments together", "one attachment", "frame"],
)
def test_every_limit_is_refused_before_a_byte_of_the_body_is_waited_for(start: bytes) -> None:
    with pytest.raises(LimitError):
        FrameDecoder().receive_data(start)


def test_an_unknown_type_is_refused_before_a_byte_of_the_body_is_waited_for() -> None:
    for kind in {*range(256)} - {*FrameType}:
        with pytest.raises(ProtocolError, match="frame type"):
            FrameDecoder().receive_data(prefix(length=length_of(1000), header_bytes=1000, kind=kind))


@pytest.mark.parametrize("wrong_by", [-12, -1, 1, 1000])
def test_lengths_that_contradict_each_other_are_refused_as_soon_as_all_are_known(wrong_by: int) -> None:
    start = prefix(length=length_of(20, 30) + wrong_by, header_bytes=20, sizes=(30,))
    with pytest.raises(ProtocolError, match="contradict"):
        FrameDecoder().receive_data(start)


@given(st.binary(max_size=300), st.lists(st.integers(0, 10_000), max_size=4))
def test_garbage_is_a_protocol_error_or_waits_for_more(garbage: bytes, points: list[int]) -> None:
    decoder = FrameDecoder()
    try:
        for piece in cut(garbage, points):
            decoder.receive_data(piece)
    except ProtocolError:
        pass


@given(frames, st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_frame_is_a_frame_a_protocol_error_or_waits_for_more(frame: Frame, at: int, flip: int) -> None:
    data = bytearray(wire(frame))
    data[at % len(data)] ^= flip
    try:
        received = FrameDecoder().receive_data(data)
    except ProtocolError:
        return
    assert len(received) <= 1


# --- compression -----------------------------------------------------------------------------------------------------

TEXT = b"the same words again and again; " * 1000


def compressed(frame: Frame) -> bytes:
    return b"".join(bytes(piece) for piece in encode_frame(frame, compress=True))


@given(
    st.binary(max_size=50), st.integers(0, 2000), st.binary(max_size=50), st.lists(st.integers(0, 10_000), max_size=5)
)
def test_what_was_compressed_comes_out_as_it_went_in(word: bytes, times: int, other: bytes, points: list[int]) -> None:
    frame = Frame(FrameType.ANSWER, 3, word * times, (other * times, b"", word))
    decoder = FrameDecoder()
    received = [got for piece in cut(compressed(frame), points) for got in decoder.receive_data(piece)]
    assert received == [frame]


def test_only_what_shrinks_is_compressed() -> None:
    noise = os.urandom(len(TEXT))
    assert len(compressed(Frame(FrameType.ANSWER, 1, b"", (TEXT,)))) < len(TEXT) / 10
    assert len(compressed(Frame(FrameType.ANSWER, 1, TEXT))) < len(TEXT) / 10
    assert encode_frame(Frame(FrameType.ANSWER, 1, b"", (noise,)), compress=True)[1] is noise
    assert len(wire(Frame(FrameType.ANSWER, 1, b"", (TEXT,)))) > len(TEXT)


def bomb_of(*sizes: int) -> bytes:
    """A frame whose attachments are zeros, so many of them, compressed as far as may be."""
    compressor = zstandard.ZstdCompressor(write_content_size=True)
    pieces = [compressor.compress(bytes(size)).ljust(-(-size // MAX_EXPANSION), b"\0") for size in sizes]
    marks = [len(piece) | 1 << 31 for piece in pieces]
    return prefix(length=length_of(0, *map(len, pieces)), sizes=marks) + b"".join(pieces)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(LimitError, match="compressed"):
        FrameDecoder().receive_data(bomb_of(COMPRESS_UP_TO_BYTES + 1))
    with pytest.raises(LimitError, match="compressed"):
        FrameDecoder(max_attachment_bytes=1_500_000).receive_data(bomb_of(1_000_000, 1_000_000))
    (frame,) = FrameDecoder().receive_data(bomb_of(1_000_000, 1_000_000))
    assert [len(attachment) for attachment in frame.attachments] == [1_000_000, 1_000_000]


def test_a_few_bytes_do_not_become_many() -> None:
    zeros = Frame(FrameType.ANSWER, 1, bytes(MAX_HEADER_BYTES), (bytes(2**20), b"x", bytes(2**20 + 1)))
    data = compressed(zeros)
    assert len(data) < 3 * 2**20 / MAX_EXPANSION
    assert FrameDecoder().receive_data(data) == [zeros]
    piece = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(100_000))
    shorter = prefix(length=length_of(0, len(piece)), sizes=[len(piece) | 1 << 31]) + piece
    with pytest.raises(LimitError, match=f"exceed {MAX_EXPANSION} times"):
        FrameDecoder().receive_data(100 * shorter)


def test_what_would_take_long_to_compress_is_sent_as_it_is() -> None:
    long = bytes(COMPRESS_UP_TO_BYTES + 1)
    assert encode_frame(Frame(FrameType.ANSWER, 1, b"", (long,)), compress=True)[1] is long


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_damaged_compressed_bytes_are_a_protocol_error_or_other_bytes(at: int, flip: int) -> None:
    data = bytearray(compressed(Frame(FrameType.ANSWER, 1, TEXT, (TEXT,))))
    data[at % len(data)] ^= flip
    with contextlib.suppress(ProtocolError):
        FrameDecoder().receive_data(bytes(data))
