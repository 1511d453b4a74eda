"""Memory that a node and the worker of one of its runs share: large arrays lie there, and calls name parts of them.

What the worker offers lies in its first half and what came of everybody's in its second; the node lets others pull from
the one by bulk lanes, and has the lanes write into the other, so that no large array passes a socket on this machine.
The worker makes it as large as it needs. It never gets smaller (a seal of memfd_create(2)): who reads memory that
another has cut off is ended.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final, Self

from shoal.protocol.errors import ProtocolError

ALIGN: Final = mmap.ALLOCATIONGRANULARITY
MAX_HALF_BYTES: Final = 64 * 1024**3


@dataclass(frozen=True, slots=True)
class Halves:
    """Views of an arena; valid for as long as anybody holds them.

    Attributes:
        offered: what the worker offers.
        result: what came of everybody's.
    """

    offered: memoryview
    result: memoryview


class Arena:
    """One side's hold of the memory.

    Attributes:
        descriptor: of the memory file.
    """

    __slots__ = ("_half_bytes", "_map", "descriptor")

    def __init__(self, descriptor: int) -> None:
        """Take part in what somebody made."""
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._half_bytes = 0

    @classmethod
    def make(cls) -> Self:
        """A new one, empty."""
        descriptor = os.memfd_create("shoal-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(descriptor)

    def grow(self, num_bytes: int) -> Halves:
        """Have room for arrays of so many bytes, twice."""
        wanted = 2 * _rounded(num_bytes)
        if os.fstat(self.descriptor).st_size < wanted:
            os.ftruncate(self.descriptor, wanted)
        return self.halves(num_bytes)

    def halves(self, num_bytes: int) -> Halves:
        """The two halves, where there is room for arrays of so many bytes.

        Raises:
            ProtocolError: if there is none: whoever should have grown it has not.
        """
        half = _rounded(num_bytes)
        if self._map is None or self._half_bytes != half:
            if os.fstat(self.descriptor).st_size < 2 * half:
                raise ProtocolError(f"the worker's memory has no room for arrays of {num_bytes} bytes")
            self._map = mmap.mmap(self.descriptor, 2 * half)  # the one before stays for those who hold views of it
            self._half_bytes = half
        view = memoryview(self._map)
        return Halves(view[:num_bytes], view[half : half + num_bytes])

    def close(self) -> None:
        """Let go of it; views stay valid."""
        self._map = None
        os.close(self.descriptor)


def _rounded(num_bytes: int) -> int:
    if not 1 <= num_bytes <= MAX_HALF_BYTES:
        raise ProtocolError(f"arrays of {num_bytes} bytes are not shared with a worker")
    return -(-num_bytes // ALIGN) * ALIGN
