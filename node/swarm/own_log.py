"""This node's own log: how far it is before anything is written to it, and whether anybody else writes it.

A node whose disk was put back to an earlier state would sign other ops at places that it has used. So nothing of its
own is written before a member was asked how far this node's own log is, or nobody could be asked for a while; until
then it is held back, and shown as if it were written.

That two nodes have one key is seen in three ways, and told to the user in each: others have heard newer words in this
node's name than it has said, for longer than those of a life before could last; ops in its name come that it did not
write; there are two logs. The last one cannot be mended.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import trio

from shoal.crdt.oplog import FrozenLogError
from shoal.node.signals import Signal
from shoal.node.swarm.journal import Journal
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed

log = logging.getLogger(__name__)

HEAD_S: Final = 60.0
"""How long a node with other members waits for one that tells the head of its own log, before it writes."""
HEAD_ALONE_S: Final = 5.0
"""The same, if it knows of no other author."""
OTHERS_S: Final = 1.0
"""How long those who answer later are waited for: one of them may know more."""
TWICE_FROM_S: Final = 10.0
"""Newer words in one's own name after so long were not left over from one's own life before."""
TWICE_FOR_S: Final = 60.0


class OwnLog:
    """Of one swarm."""

    def __init__(
        self,
        swarm: SwarmId,
        own: PeerId,
        journal: Journal,
        *,
        on_held: Callable[[], None],
        on_written: Callable[[Signed], None],
        is_new: bool = False,
    ) -> None:
        """Begin.

        Args:
            swarm: whose log it is.
            own: this node.
            journal: keeps it.
            on_held: told when something was held back, and so is shown.
            on_written: told of each op of this node that is on disk.
            is_new: nobody else can hold ops of this node, because it has just created the swarm.
        """
        self._swarm = swarm
        self._own = own
        self._journal = journal
        self._on_held = on_held
        self._on_written = on_written
        self._knows_head = is_new
        self._num_asking = 0
        self._has_asked = False
        self._asked = Signal()
        self._said_frozen = False
        self._first_outdone_at = math.inf
        self._last_outdone_at = -math.inf
        self._written_elsewhere_at = -math.inf

    # Writing.

    async def write(self, registers: Mapping[str, Any]) -> bool:
        """Set registers of this node's document; returns when they are on disk, or held back at the start.

        Returns:
            Whether they were written: not if there are two logs.

        Raises:
            UsageError: if a register is not plain data.
            LimitError: if it is too much.
            StorageError: if the disk fails. Nothing was changed then, as after any error.
        """
        if not self._knows_head and not self.is_frozen:
            self._journal.hold(registers)
            self._on_held()
            return True
        return await self._written(self._journal.write(registers))

    async def write_held(self) -> None:
        """Write what was held back, whether anybody was asked for the head or not. Raises as `write`."""
        while self._journal.is_holding:
            await self._written(self._journal.write_held())
        self._knows_head = True

    async def _written(self, writing: Awaitable[Signed | None]) -> bool:
        try:
            op = await writing
        except FrozenLogError as error:
            self.forked(error)
            return False
        if op is not None:
            self._on_written(op)
        return True

    # Asking how far it is.

    async def ask(self) -> None:
        """Let nothing be written before this node knows how far its own log is; then write what was held back."""
        if self._knows_head:
            return
        has_others = any(author != self._own for author in self._journal.seqs())
        with trio.move_on_after(HEAD_S if has_others else HEAD_ALONE_S) as asking:
            while not self._has_asked:
                await self._asked.wait()
            with trio.move_on_after(OTHERS_S):
                while self._num_asking:
                    await self._asked.wait()
        if has_others and asking.cancelled_caught:
            log.warning(
                "%s: no member can be asked how far this node's own log is, so it goes on from what is on its disk; if "
                "that was restored from a backup, the others will not believe it",
                self._swarm,
            )
        await self.write_held()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """All that a member has is taken inside the block, this node's own log included; unless it raises."""
        self._num_asking += 1
        try:
            yield
            self._has_asked = True
        finally:
            self._num_asking -= 1
            self._asked.set()

    # Whether anybody else writes it.

    @property
    def is_frozen(self) -> bool:
        """Whether two logs were signed with this node's key, so that nobody takes its ops any more."""
        return self._own in self._journal.frozen

    @property
    def problem(self) -> str | None:
        """What is wrong with this node's identity in this swarm, and what to do about it, if something is."""
        if self.is_frozen:
            return (
                "this node's identity has written two logs: two nodes have used its profile, or it was restored from a "
                "backup. Nobody takes what it writes any more; leave this swarm, and join it again with a new profile "
                "(another SHOAL_HOME)"
            )
        now = trio.current_time()
        is_outdone = self._last_outdone_at - self._first_outdone_at > TWICE_FROM_S
        if (is_outdone and now < self._last_outdone_at + TWICE_FOR_S) or now < self._written_elsewhere_at + TWICE_FOR_S:
            return (
                "another node speaks with this node's identity: its profile was copied. Stop one of the two and give "
                "it a new profile (another SHOAL_HOME), before both write and neither is believed"
            )
        return None

    def outdone(self) -> None:
        """Others have heard newer words in this node's name than it has said."""
        now = trio.current_time()
        self._first_outdone_at = min(self._first_outdone_at, now)
        self._last_outdone_at = now

    def came(self, count: int, source: PeerId) -> None:
        """So many ops in this node's name, which were not here, came from a member."""
        if self._knows_head:
            self._written_elsewhere_at = trio.current_time()
            log.error(
                "%s has %d ops in the name of this node that it did not write since it started: its profile was copied "
                "or restored; stop the other node that uses it, if there is one",
                *(source, count),
            )
        else:
            log.warning("%d ops of this node's own, which its disk had lost, came back from %s", count, source)

    def forked(self, error: FrozenLogError | None = None) -> None:
        """There are two logs: say so, once."""
        if not self._said_frozen:
            self._said_frozen = True
            log.error(
                "%s: what this node writes is not taken by anybody any more. Two nodes have used this profile, or it "
                "was restored from a backup; leave the swarm %s and join it again with a new profile%s",
                *(self._own, self._swarm, f" ({error})" if error else ""),
            )
