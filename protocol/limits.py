"""Bounds on everything that comes from the network. Checked before anything is allocated."""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 256 * 1024
"""The MessagePack header of one frame."""

MAX_ATTACHMENT_BYTES: Final = 16 * 1024 * 1024
"""All raw attachments of one frame from a peer together; what is larger goes in bulk or in blocks."""

MAX_WORKER_ATTACHMENT_BYTES: Final = 2**31 - 1
"""The same between a node and its own worker: one whole training state."""

MAX_ATTACHMENTS: Final = 1024
"""Attachments of one frame."""

MAX_NESTING: Final = 16
"""Depth of maps and arrays inside a header."""

MAX_ERROR_CHARS: Final = 500
"""Characters of a remote error message that are kept."""

MAX_CALLS_IN_FLIGHT: Final = 256
"""Calls that one peer may have open at this node, from their arrival until their answer was written."""

MAX_HELD_BYTES: Final = 64 * 1024 * 1024
"""Requests, answers and messages that this node holds for the calls of one peer; and as much of frames of that peer
that are not whole yet."""

MAX_ANSWER_BYTES: Final = 256 * 1024
"""What an answer is taken to need unless its method says otherwise."""

MAX_MESSAGE_STREAMS: Final = 16
"""Streams of messages that one peer may have open, each direction counted: together they leave a quarter of
`MAX_HELD_BYTES` to its other calls."""

MAX_STREAMS: Final = 64
"""Streams beside the first that one peer may have open at this node."""

MAX_UNSENT_BYTES: Final = 4 * 1024 * 1024
"""What may wait to be written to a peer before callers are made to wait."""

MAX_REFUSED_BYTES: Final = 1024 * 1024
"""Refusals that may wait for a peer to read them; over that, its stream is closed."""

STREAM_WINDOW_BYTES: Final = 1024 * 1024
"""What the sender of a stream of messages may be ahead of its reader, one message more at most."""

MAX_MESSAGE_BYTES: Final = 2 * 1024 * 1024
"""One message of a stream; what is larger goes in bulk."""

MAX_STREAM_HELD_BYTES: Final = STREAM_WINDOW_BYTES + MAX_MESSAGE_BYTES
"""What one direction of a stream of messages may hold, and so what is set aside for it."""

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
