"""What waits to be sent to one member, and how much of it goes into one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import trio

from shoal.crdt.gossip_messages import Control, ItemId
from shoal.node.wire.contracts import GossipPush
from shoal.protocol.codec import encode
from shoal.protocol.ids import SwarmId
from shoal.protocol.signing import Signed

PUSH_BYTES: Final = 200 * 1024
SEAL_BYTES: Final = 160
"""What an author's name, a signature and MessagePack add to a payload, rounded up."""
MAX_RECORDS: Final = 2048
MAX_OPS: Final = 1024
MAX_CONTROLS: Final = 64


class Waiting:
    """The queue to one member. What does not fit is dropped, the oldest first: sync and gossip bring it again.

    Presence waits by name alone. What was replaced by then is not sent.
    """

    def __init__(self) -> None:
        self.num_dropped = 0
        self.is_closed = False
        self._records: dict[ItemId, None] = {}
        self._ops: dict[ItemId, Signed] = {}
        self._controls: list[Control] = []
        self._wake = trio.Event()

    def add(
        self,
        *,
        records: Sequence[ItemId] = (),
        ops: Sequence[tuple[ItemId, Signed]] = (),
        controls: Sequence[Control] = (),
    ) -> None:
        """Send these soon."""
        self._records.update(dict.fromkeys(records))
        self._ops.update(ops)
        self._controls += controls
        for queue, bound in ((self._records, MAX_RECORDS), (self._ops, MAX_OPS)):
            while len(queue) > bound:
                del queue[next(iter(queue))]
                self.num_dropped += 1
        if len(self._controls) > MAX_CONTROLS:
            self.num_dropped += len(self._controls) - MAX_CONTROLS
            del self._controls[:-MAX_CONTROLS]
        self._wake.set()

    async def take(self) -> tuple[list[ItemId], list[Signed], list[Control]]:
        """All that waits, once there is something, or nothing at all once the queue is closed."""
        await self._wake.wait()
        taken = list(self._records), list(self._ops.values()), self._controls
        self._records, self._ops, self._controls, self._wake = {}, {}, [], trio.Event()
        if self.is_closed:
            self._wake.set()
        return taken

    def close(self) -> None:
        """Nothing is sent any more."""
        self.is_closed = True
        self._wake.set()


def in_parts(
    swarm: SwarmId, records: Sequence[Signed], ops: Sequence[Signed], controls: Sequence[Control] = ()
) -> Iterator[GossipPush]:
    """Messages with as much as goes into one call each, in order."""
    part: tuple[list[Signed], list[Signed], list[Control]] = ([], [], [])
    total = 0
    sized: list[tuple[int, int, Signed | Control]] = [
        *((2, len(encode(control)), control) for control in controls),
        *((0, len(record.payload) + SEAL_BYTES, record) for record in records),
        *((1, len(op.payload) + SEAL_BYTES, op) for op in ops),
    ]
    for kind, size, thing in sized:
        if total and total + size > PUSH_BYTES:
            yield GossipPush(swarm, tuple(part[0]), tuple(part[1]), tuple(part[2]))
            part, total = ([], [], []), 0
        part[kind].append(thing)  # type: ignore[arg-type]  # the number says which
        total += size
    if total:
        yield GossipPush(swarm, tuple(part[0]), tuple(part[1]), tuple(part[2]))
