"""Memory that a node and the worker of one of its runs share: large arrays lie there, and calls name parts of them.

What the worker offers others lies in one region, what came of everybody's in another, and its state in a third. The
node lets others pull from the first by bulk lanes and has the lanes write into the second, so that no large array
passes a socket on this machine. The memory is a file without a name, most of which is never there; it never gets
smaller (a seal of memfd_create(2)): who reads memory that another has cut off is ended.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from enum import IntEnum
from typing import Final, Self

from shoal.protocol.errors import ProtocolError

MAX_REGION_BYTES: Final = 64 * 1024**3


class Region(IntEnum):
    """Where something lies."""

    OFFERED = 0
    """What this worker contributes."""
    RESULT = 1
    """What came of everybody's."""
    STATE = 2
    """The learner's whole state, on its way between the worker and the node."""


class Arena:
    """One side's hold of the memory.

    Attributes:
        descriptor: of the memory file.
    """

    __slots__ = ("_maps", "descriptor")

    def __init__(self, descriptor: int) -> None:
        """Take part in what somebody made."""
        self.descriptor = descriptor
        self._maps: dict[Region, mmap.mmap] = {}

    @classmethod
    def make(cls) -> Self:
        """A new one, empty."""
        descriptor = os.memfd_create("shoal-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(descriptor)

    def view(self, region: Region, num_bytes: int) -> memoryview:
        """The first bytes of a region, zeros where nobody has written; valid for as long as anybody holds it.

        Raises:
            ProtocolError: if it cannot be so large.
        """
        if not 1 <= num_bytes <= MAX_REGION_BYTES:
            raise ProtocolError(f"arrays of {num_bytes} bytes are not shared between a worker and its node")
        mapped = self._maps.get(region)
        if mapped is None or len(mapped) < num_bytes:
            start = region * MAX_REGION_BYTES
            if os.fstat(self.descriptor).st_size < start + num_bytes:
                os.ftruncate(self.descriptor, start + num_bytes)
            # The one before stays for those who hold views of it.
            mapped = self._maps[region] = mmap.mmap(self.descriptor, num_bytes, offset=start)
        return memoryview(mapped)[:num_bytes]

    def close(self) -> None:
        """Let go of it; views stay valid."""
        self._maps.clear()
        os.close(self.descriptor)
