"""The streams that an actor began, by number: kept in the node's store, so that none is ever begun a second time.

Two shards in one place of a stream convict their author (`shoal.training.rollouts.evidence`), so a number must not come
again after a crash, nor when the clock is set back: what is on disk is at least as high as what was used before a shard
of it is signed. The clock counts too, for a node whose store was lost and whose key was not.
"""

from __future__ import annotations

import time
from typing import Final

from shoal.node.store.database import Storage
from shoal.protocol.ids import SwarmId

STREAMS_PER_S: Final = 16
"""More than an actor ever begins."""
SINCE: Final = 1_700_000_000
"""Unix seconds."""
AHEAD: Final = 256
"""Numbers that are set aside at once."""


class Numbering:
    """Of one node in one run. Its calls write to disk, and are for a thread."""

    def __init__(self, storage: Storage, swarm: SwarmId) -> None:
        """Nothing is read yet."""
        self._storage = storage
        self._name = f"streams/{swarm}"
        self._until = 0

    def begin(self) -> int:
        """The first stream of a new worker: higher than any before.

        Raises:
            StorageError: if the disk fails.
        """
        kept = self._storage.get_fact(self._name) or b"0"
        stream = max(int(kept) if kept.isdigit() else 0, int((time.time() - SINCE) * STREAMS_PER_S), self._until)
        self._set_aside(stream)
        return stream

    def used(self, stream: int) -> None:
        """A shard of this stream is about to be signed.

        Raises:
            StorageError: if the disk fails. Nothing of this stream may be signed.
        """
        if stream >= self._until:
            self._set_aside(stream)

    def _set_aside(self, stream: int) -> None:
        self._storage.put_fact(self._name, b"%d" % (stream + AHEAD))
        self._until = stream + AHEAD
