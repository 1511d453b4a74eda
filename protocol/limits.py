"""Bounds on everything that comes from the network. Checked before anything is allocated."""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 256 * 1024
"""The MessagePack header of one frame."""

MAX_ATTACHMENT_BYTES: Final = 64 * 1024 * 1024
"""All raw attachments of one frame together."""

MAX_ATTACHMENTS: Final = 1024
"""Attachments of one frame."""

MAX_NESTING: Final = 16
"""Depth of maps and arrays inside a header."""

MAX_ERROR_CHARS: Final = 500
"""Characters of a remote error message that are kept."""

MAX_CALLS_IN_FLIGHT: Final = 256
"""Unanswered calls that one peer may have open at this node."""

BLOCK_BYTES: Final = 1024 * 1024
"""Size of every block of a content but its last."""

MAX_CONTENT_BYTES: Final = 8 * 1024**3
"""The largest content that a manifest may describe."""

MAX_OP_BYTES: Final = 64 * 1024
"""One signed CRDT operation."""

MAX_PRESENCE_BYTES: Final = 16 * 1024
"""One signed presence record."""

MAX_MEMBERS: Final = 256
"""Authors of one swarm that this node keeps documents for."""
