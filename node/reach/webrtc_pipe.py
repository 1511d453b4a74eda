"""What the two loops of a WebRTC connection tell each other, and how much of it may be on its way.

See `shoal.node.reach.webrtc` for the picture. It stands apart so that neither side has to import the other for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.protocol.errors import Fault, ShoalError

StunServer = tuple[str, int]

WINDOW_BYTES: Final = 1024 * 1024
"""Sent and not read yet at most, in each direction; on a path of 50 ms it allows 20 MB/s, what aiortc can do."""
GRANT_BYTES: Final = WINDOW_BYTES // 4
MESSAGE_BYTES: Final = 16 * 1024
"""In one message at most: the size that every implementation of WebRTC takes (RFC 8831, section 6.6)."""
MESSAGE_COST: Final = 1024
"""What a message weighs beside its bytes, so that a window of small ones is not too much to keep and to sort."""


class WebRtcError(ShoalError):
    """No path by WebRTC, or a malformed offer or answer."""

    fault = Fault.REMOTE


@dataclass(frozen=True, slots=True)
class PipeOpened:
    """The channel is open."""

    address: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class CreditGranted:
    """The far end may be sent messages up to this sum of costs."""

    cost: int


@dataclass(frozen=True, slots=True)
class PipeEnded:
    """Nothing more comes or goes."""

    reason: str


PipeNews = bytes | PipeOpened | CreditGranted | PipeEnded
