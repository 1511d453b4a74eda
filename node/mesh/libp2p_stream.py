"""A libp2p stream as what channels and bulk transfers run on."""

from __future__ import annotations

import logging
from typing import Any, Final

from libp2p.abc import INetStream

from shoal.node.mesh.circuits import BROKEN
from shoal.node.wire.channel import StreamClosedError
from shoal.protocol.codec import Buffer

log = logging.getLogger(__name__)

WRITE_BYTES: Final = 1024 * 1024


class Libp2pByteStream:
    """A `ByteStream` on a libp2p stream."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        """What is there, at most 256 KiB; `StreamClosedError` at the end."""
        try:
            data = await self._stream.read(256 * 1024)
        except BROKEN as error:
            raise StreamClosedError(f"the path is gone ({type(error).__name__})") from error
        if not data:
            raise StreamClosedError("the far side closed the stream")
        return data

    async def write(self, data: Buffer) -> None:
        """Write all; `StreamClosedError` if the path is gone."""
        # A view stands in for the bytes that libp2p asks for: it only slices them and puts them after a header.
        view: Any = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), WRITE_BYTES):
                await self._stream.write(view[start : start + WRITE_BYTES])
        except BROKEN as error:
            raise StreamClosedError(f"the path is gone ({type(error).__name__})") from error

    def try_write(self, data: Buffer) -> bool:
        """Never: libp2p has no writing without waiting."""
        return False

    async def close(self) -> None:
        """End both directions; never raises."""
        try:
            await self._stream.reset()
        except BROKEN as error:
            log.debug("closing a dead stream: %s", error)
