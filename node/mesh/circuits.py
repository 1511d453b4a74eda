"""What circuits are made of: their addresses, the messages that open them, and a stream as a connection's pipe.

The messages are those of libp2p's circuit relay v2 and DCUtR, protobufs with their length before them. Who asks whom
for a circuit is `shoal.node.mesh.relay`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import trio
from google.protobuf.message import Message
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from shoal.node.mesh.addresses import CIRCUIT
from shoal.protocol.errors import Fault, ShoalError
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 4096
CLOSE_TIMEOUT_S: Final = 1.0
BROKEN: Final = (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What libp2p raises when a stream or its connection is gone."""

M = TypeVar("M", bound=Message)


class RelayError(ShoalError):
    """A relay did not do what it was asked; the message says why."""

    fault = Fault.REMOTE


def parse_circuit(address: str) -> tuple[PeerId, PeerId]:
    """The relay and the peer of a circuit's address.

    Raises:
        RelayError: if it is none.
    """
    via, _, target = address.partition(f"{CIRCUIT}/p2p/")
    relay = via.rpartition("/p2p/")[2]
    try:
        return PeerId.parse(relay), PeerId.parse(target)
    except ShoalError as error:
        raise RelayError(f"{address[:200]!r} is not a circuit's address") from error


class CircuitStream(ReadWriteCloser):
    """A libp2p stream as what libp2p's upgrade takes for a socket."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        """At most ``n`` bytes; none at the end.

        Raises:
            ConnectionClosedError: if the circuit broke.
        """
        try:
            return await self._stream.read(n)
        except StreamEOF:
            return b""
        except BROKEN as error:
            raise ConnectionClosedError(f"the circuit broke: {error}", transport="circuit") from error

    async def write(self, data: bytes) -> None:
        """Write all.

        Raises:
            ConnectionClosedError: if the circuit broke.
        """
        try:
            await self._stream.write(data)
        except BROKEN as error:
            raise ConnectionClosedError(f"the circuit broke: {error}", transport="circuit") from error

    async def close(self) -> None:
        """End both directions; never raises."""
        await end_stream(self._stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the far end's address is not to be seen, and the relay's would be taken for it."""
        return None


@asynccontextmanager
async def closed_on_failure(raw: RawConnection) -> AsyncIterator[None]:
    """Close a pipe if what happens to it inside fails or is cancelled.

    libp2p leaves a pipe open when it is cancelled, or told nonsense, while both sides agree on security.
    """
    try:
        yield
    except BaseException:
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
            try:
                await raw.close()
            except BROKEN as error:
                log.debug("closing a dead pipe: %s", error)
        raise


def raw_connection(stream: INetStream, address: str, *, is_initiator: bool) -> RawConnection:
    """A circuit's stream, ready to be upgraded."""
    return RawConnection(CircuitStream(stream), is_initiator, ConnectionType.RELAYED, [Multiaddr(address)])


async def read_message(stream: INetStream, kind: type[M]) -> M:
    """Read a protobuf message, length first.

    Raises:
        DecodeError: if it is none.
        BaseLibp2pError: if it is too long, or the stream ended.
    """
    message = kind()
    message.ParseFromString(await read_varint_prefixed_bytes_limited(stream, MAX_MESSAGE_BYTES))
    return message


async def write_message(stream: INetStream, message: Message) -> None:
    """Write a protobuf message, length first."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def close_stream(stream: INetStream) -> None:
    """Let the far end read what was written."""
    with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
        try:
            await stream.close()
        except BROKEN as error:
            log.debug("closing a dead stream: %s", error)


async def end_stream(stream: INetStream) -> None:
    """Reset a stream; never raises."""
    with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
        try:
            await stream.reset()
        except BROKEN as error:
            log.debug("ending a dead stream: %s", error)
