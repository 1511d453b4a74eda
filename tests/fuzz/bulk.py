"""Bulk transfers: what an owner may do to a puller's memory, and a puller to what is offered.

An input is a list of steps. By the first, the others are an *owner's*: what comes by one path after the other, lanes
and streams, until each breaks; or a *puller's*: requests. Beside either there is a model that knows where each byte
belongs.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Any, Final, cast

import trio

from shoal.node.wire import bulk, pulls
from shoal.node.wire.bulk import Bulk
from shoal.node.wire.channel import StreamClosedError
from shoal.protocol.codec import Buffer
from shoal.protocol.errors import RemoteError, Status

from .harness import BASE_BYTES, BYTES_PER_BYTE, MutateBytes, Target, check_text, require
from .identities import ALICE, BOB
from .mutators import Step, mutate_steps, pack_steps, read_steps

_REQUEST: Final = struct.Struct("!16sQQ")
_OWNER, _PULLER = 0, 1  # the first step

_ID: Final = b"what is offered "
_MARGIN: Final = 64  # bytes on either side of the memory that is pulled into
_UNTOUCHED: Final = 0xA5
_MAX_PULLED_BYTES: Final = 700
_MAX_PATHS: Final = 8
_READ_BYTES: Final = (1, 7, 50, 65536)
"""What one read of a path gives at most."""

_MINE, _OTHERS, _GONE = b"offered to me   ", b"to somebody else", b"not any more    "
"""In a puller's requests these stand for ids, which are random."""
_OFFERED: Final = bytes(range(251)) * 5000  # more than `bulk.CHUNK_BYTES`
_MAX_SERVED_BYTES: Final = 4 * len(_OFFERED)  # to one input; then its path breaks


def _run(data: bytes) -> None:
    (what, settings), *rest = read_steps(data) or [(_OWNER, b"")]
    if what % 2 == _OWNER:
        _Puller(settings).run(rest[:_MAX_PATHS])
    else:
        trio.run(_serve, [requests for _, requests in rest])


# --- an owner's bytes ------------------------------------------------------------------------------------------------


class _Path:
    """One lane or stream to an owner that says what it likes, at once, whatever it is asked for."""

    def __init__(self, data: bytes, read_bytes: int) -> None:
        self.requests = b""
        self.given = b""
        self._data = data
        self._read_bytes = read_bytes

    def sendall(self, requests: bytes) -> None:
        """As a lane's."""
        self.requests += requests
        num_whole = sum(not left for _, _, left in _answers(self.requests, self.given))
        require(len(self.requests) // _REQUEST.size - num_whole <= 2, "more than two segments are asked for at once")

    def recv_into(self, target: memoryview) -> int:
        """As a lane's: 0 at the end."""
        require(len(target) > 0, "nothing is asked for")
        piece = self._next(min(len(target), self._read_bytes))
        target[: len(piece)] = piece
        return len(piece)

    async def write(self, requests: Buffer) -> None:
        """As a stream's."""
        self.sendall(bytes(requests))

    async def read(self) -> bytes:
        """As a stream's."""
        piece = self._next(self._read_bytes)
        if not piece:
            raise StreamClosedError("the path broke")
        return piece

    def _next(self, max_bytes: int) -> bytes:
        piece = self._data[len(self.given) : len(self.given) + max_bytes]
        self.given += piece
        return piece


def _answers(requests: bytes, given: bytes) -> Iterator[tuple[int, bytes, int]]:
    """What answers which request, in order, until the bytes end or refuse: its offset, its bytes, how many it lacks."""
    at = 0
    for _, offset, length in _REQUEST.iter_unpack(requests):
        if at >= len(given) or given[at]:
            return
        piece = given[at + 1 : at + 1 + length]
        at += 1 + len(piece)
        yield offset, piece, length - len(piece)


_REFUSALS = (Status.NOT_FOUND, Status.OUT_OF_RANGE, Status.RESOURCE_EXHAUSTED)


def _refusal(requests: bytes, given: bytes) -> Status:
    """With which status a request was refused."""
    at = num_answered = 0
    for _, piece, left in _answers(requests, given):
        at += 1 + len(piece)
        num_answered += not left
    if num_answered == len(requests) // _REQUEST.size or at >= len(given):
        return Status.OK
    return Status(given[at]) if given[at] in _REFUSALS else Status.UNKNOWN


class _Puller:
    """Pulls into a part of some memory, by one path after the other."""

    def __init__(self, settings: bytes) -> None:
        length, segment_bytes, self._offset, flags = struct.unpack("!HBBB", settings[:5].ljust(5, b"\0"))
        self._num_bytes = length % (_MAX_PULLED_BYTES + 1)
        self._memory = bytearray([_UNTOUCHED]) * (self._num_bytes + 2 * _MARGIN)
        self._expected = bytearray(self._memory)
        self._num_filled = [0] * self._num_bytes  # how often each byte was
        self._is_path_wanted = bool(flags & 1)  # by another pull, as soon as it has brought one segment
        self._pull = pulls.Pull(
            _ID, self._offset, pulls.Memory(memoryview(self._memory)[_MARGIN:-_MARGIN]), num_lanes=1
        )
        ends = range(0, self._num_bytes or 1, segment_bytes + 1)
        self._pull.todo = deque((start, min(start + segment_bytes + 1, self._num_bytes)) for start in ends)

    def run(self, paths: list[Step]) -> None:
        """Pull until all is there, the paths end, or the owner refuses."""
        for what, data in paths:
            path = _Path(data, _READ_BYTES[what // 2 % len(_READ_BYTES)])
            refusal = self._ask(path, is_lane=what % 2 == 0)
            self._learn(path)
            require(refusal is _refusal(path.requests, path.given), "a refusal is not the one that the owner gave")
            if refusal or not self._pull.todo:
                break
        self._check()

    def _ask(self, path: _Path, *, is_lane: bool) -> Status:
        """Let one path bring what it does; with which status the owner refused."""
        asker = pulls.Asker(self._pull, lambda: self._is_path_wanted)
        try:
            if is_lane:
                bulk._ask(cast(Any, path), asker)
            else:
                trio.run(bulk._ask_stream, cast(Any, path), asker)
            require(asker.is_done, "a path ends well and owes something")
        except RemoteError as error:
            check_text(str(error))
            return error.status
        except (ConnectionError, StreamClosedError):
            pass
        finally:
            asker.close()
        return Status.OK

    def _learn(self, path: _Path) -> None:
        for ref_id, offset, length in _REQUEST.iter_unpack(path.requests):
            start = offset - self._offset
            require(ref_id == _ID and 0 <= start <= start + length <= self._num_bytes, "what is asked for is not there")
        for offset, piece, _ in _answers(path.requests, path.given):
            start = offset - self._offset
            self._expected[_MARGIN + start : _MARGIN + start + len(piece)] = piece
            for at in range(start, start + len(piece)):
                self._num_filled[at] += 1

    def _check(self) -> None:
        require(self._memory == self._expected, "a byte is not where it belongs")
        for start, end in self._pull.todo:
            for at in range(start, end):
                self._num_filled[at] += 1
        require(set(self._num_filled) <= {1}, "a part is fetched twice, or forgotten")
        cast(pulls.Memory, self._pull.into).view.release()
        self._memory.append(0)  # which a BufferError forbids while anybody may still write


# --- a puller's requests ---------------------------------------------------------------------------------------------


class _Served:
    """A stream from a puller that has said all at once; checks what it gets."""

    def __init__(self, pieces: list[bytes], expected: Iterator[Buffer]) -> None:
        self._pieces = iter(pieces)
        self._expected = expected
        self._next: Buffer = b""
        self._num_bytes = 0
        self.is_cut = False
        self.is_closed = False

    async def read(self) -> bytes:
        for piece in self._pieces:
            if piece:
                return piece
        raise StreamClosedError("the path broke")

    async def write(self, data: Buffer) -> None:
        while data:
            if not self._next:
                self._next = next(self._expected, b"")
                require(self._next, "something is sent that was not asked for")
            size = min(len(data), len(self._next))
            require(data[:size] == self._next[:size], "other bytes are sent than were asked for")
            data, self._next = data[size:], self._next[size:]
            self._num_bytes += size
        if self._num_bytes > _MAX_SERVED_BYTES:
            self.is_cut = True
            raise StreamClosedError("the path broke")

    async def close(self) -> None:
        self.is_closed = True

    def check(self) -> None:
        require(self.is_closed, "a stream is left open")
        require(self.is_cut or (not self._next and next(self._expected, None) is None), "a request was not answered")


async def _serve(pieces: list[bytes]) -> None:
    owner = Bulk(cast(Any, None))
    memory = bytearray(_OFFERED)
    async with owner.offer(ALICE.peer_id, memory) as mine, owner.offer(BOB.peer_id, b"a secret") as others:
        async with owner.offer(ALICE.peer_id, b"what was") as gone:
            pass
        for name, ref in ((_MINE, mine), (_OTHERS, others), (_GONE, gone)):
            pieces = [piece.replace(name, ref.id) for piece in pieces]
        stream = _Served(pieces, _expected(b"".join(pieces), mine.id))
        await owner.serve_stream(ALICE.peer_id, cast(Any, stream))
        stream.check()
    memory.append(0)  # which a BufferError forbids while it is still offered
    await owner.aclose()


def _expected(requests: bytes, ref_id: bytes) -> Iterator[Buffer]:
    whole = len(requests) // _REQUEST.size * _REQUEST.size
    for asked_for, offset, length in _REQUEST.iter_unpack(requests[:whole]):
        if asked_for != ref_id:
            yield bytes([Status.NOT_FOUND])
        elif offset + length > len(_OFFERED):
            yield bytes([Status.OUT_OF_RANGE])
        else:
            yield b"\0"
            if length:
                yield memoryview(_OFFERED)[offset : offset + length]


# --- inputs ----------------------------------------------------------------------------------------------------------


def _pulled(num_bytes: int, segment_bytes: int, *paths: tuple[int, bytes], offset: int = 0, flags: int = 0) -> bytes:
    return pack_steps([(_OWNER, struct.pack("!HBBB", num_bytes, segment_bytes - 1, offset, flags)), *paths])


def _seeds() -> list[bytes]:
    body = bytes(range(100))
    whole = b"\0" + body[:40] + b"\0" + body[40:80] + b"\0" + body[80:]
    lanes, streams = range(0, 8, 2), range(1, 8, 2)
    asked = [
        *((_MINE, 5, 100), (_MINE, 0, 0), (_MINE, len(_OFFERED), 0), (_MINE, len(_OFFERED) - 1, 2)),
        *((_OTHERS, 0, 8), (_GONE, 0, 8), (bytes(16), 0, 1), (_MINE, 2**64 - 1, 2**64 - 1), (_MINE, 1, 2)),
    ]
    requests = b"".join(_REQUEST.pack(*one) for one in asked)
    return [
        *(_pulled(100, 40, (what, whole)) for what in (*lanes, *streams)),
        _pulled(100, 40, (0, whole[:50]), (1, whole[:10]), (2, b""), (3, whole + b"more"), offset=9),
        _pulled(100, 10, *((what % 2, b"\0" + body[:10]) for what in range(_MAX_PATHS)), flags=1),
        _pulled(100, 40, (4, whole[:41] + b"\5" + whole)),
        _pulled(100, 40, (1, b"\x0b")),
        _pulled(0, 40, (0, b"\0")),
        _pulled(0, 40, (1, b"\0")),
        pack_steps([(_PULLER, b""), (0, requests)]),
        pack_steps([(_PULLER, b""), *((0, requests[at : at + 23]) for at in range(0, len(requests), 23))]),
        pack_steps([(_PULLER, b""), (0, _REQUEST.pack(_MINE, 0, len(_OFFERED)) * 9)]),
    ]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    def mutate_step(step: Step) -> Step:
        what, with_bytes = step
        at = rng.randrange(len(with_bytes) + 1)
        match rng.randrange(6):
            case 0:
                return rng.randrange(8), with_bytes
            case 1:
                return what, with_bytes[:at]
            case 2:
                return what, with_bytes[:at] + b"\0" * rng.choice((1, 2, 40)) + with_bytes[at:]
            case 3:
                name = rng.choice((_MINE, _MINE, _OTHERS, _GONE))
                limits = (0, 1, len(_OFFERED) - 1, len(_OFFERED), 2**32, 2**64 - 1)
                return what, with_bytes + _REQUEST.pack(name, rng.choice(limits), rng.choice(limits))
        return what, mutate_bytes(with_bytes, len(with_bytes) + 64)

    return mutate_steps(data, max_bytes, rng, mutate_bytes, mutate_step)


def _max_peak_bytes(length: int) -> int:
    # What is offered is copied for each input, and sent chunk by chunk without a copy.
    return BASE_BYTES + BYTES_PER_BYTE * length + 2 * len(_OFFERED)


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=_max_peak_bytes)
