"""What the tests of `protocol/rpc.py` share: how two connections exchange bytes, and frames of either side."""

from __future__ import annotations

from shoal.protocol.codec import Buffer, encode
from shoal.protocol.errors import Status
from shoal.protocol.frames import FROM_CALLER, Frame, FrameType, encode_frame
from shoal.protocol.limits import STREAM_WINDOW_BYTES
from shoal.protocol.rpc import (
    MESSAGE_OVERHEAD_BYTES,
    Attachments,
    CreditHeader,
    Event,
    Failed,
    Message,
    RpcConnection,
    request_header,
)
from shoal.protocol.services import CallKind

UNARY, DOWN, UP, BOTH = CallKind
HALF_WINDOW = bytes(STREAM_WINDOW_BYTES // 2 - MESSAGE_OVERHEAD_BYTES)
"""The attachment of an otherwise empty message that uses up half of a fresh credit."""


def carry(source: RpcConnection, target: RpcConnection, now: float = 0.0) -> list[Event]:
    """Take all that ``source`` has to send to ``target``."""
    return target.receive_data(b"".join(source.data_to_send()), now)


def wire(*frames: Frame) -> bytes:
    return b"".join(piece for frame in frames for piece in encode_frame(frame))


def request(call_id: int, kind: CallKind = UNARY, timeout_ms: int = 1000) -> Frame:
    return Frame(FrameType.REQUEST, call_id, request_header("test.echo", timeout_ms, b"", kind))


def message(call_id: int, *attachments: bytes, body: bytes = b"", by_caller: bool = True) -> Frame:
    return Frame(FrameType.MESSAGE, call_id, body, attachments, FROM_CALLER if by_caller else 0)


def credit(call_id: int, num_bytes: int, *, by_caller: bool = True) -> Frame:
    return Frame(FrameType.CREDIT, call_id, encode(CreditHeader(num_bytes)), (), FROM_CALLER if by_caller else 0)


def call(
    connection: RpcConnection,
    body: bytes = b"",
    attachments: Attachments = (),
    *,
    timeout_s: float = 1.0,
    kind: CallKind = UNARY,
) -> int:
    return connection.call("test.echo", body, attachments, timeout_s=timeout_s, now=0.0, kind=kind)


def failure(event: Event) -> tuple[int, Status]:
    assert isinstance(event, Failed)
    return event.call_id, event.error.status


def bodies(events: list[Event]) -> list[Buffer]:
    """Of the messages among some events, of which there are no others."""
    assert all(isinstance(event, Message) for event in events)
    return [event.body for event in events if isinstance(event, Message)]
