"""What this node says to all members of a swarm: its own records of presence, and when one is said again.

Whoever said nothing for a while is taken for gone, so the facts of a node are repeated before that; sooner, if somebody
was met who may have heard nothing yet. All is said anew when others turn out to have heard newer words in its name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import trio

from shoal.crdt.presence import Opened, PresenceTable
from shoal.node.signals import Signal
from shoal.protocol.signing import Signer

log = logging.getLogger(__name__)

FACTS: Final = "facts"
"""The topic that is repeated when a node has said nothing for a while."""
ADDRESSES: Final = "addresses"
"""The topic on which this node says where it is reached: ``{"addresses": [full multiaddrs]}``."""

HEARTBEAT_S: Final = 1.0
HEARTBEAT_MEMBERS: Final = 64
"""With more live members than this, each speaks less often, so that all together say as much."""
REANNOUNCE_S: Final = 1.0
REPEAT_S: Final = 0.2
"""After what was said last, and a newcomer may have missed."""
MAX_ADDRESSES: Final = 16


class Speaking:
    """Of one node in one swarm."""

    def __init__(
        self,
        signer: Signer,
        presence: PresenceTable,
        *,
        on_said: Callable[[Sequence[Opened]], None],
        on_reannounced: Callable[[int], None],
    ) -> None:
        """Begin.

        Args:
            signer: of this node.
            presence: what is said; its topics must have `ADDRESSES`, and `FACTS` if anything is published on it.
            on_said: told of records that are to go out now, together.
            on_reannounced: told of the incarnation as which this node speaks from now on.
        """
        self._signer = signer
        self._presence = presence
        self._on_said = on_said
        self._on_reannounced = on_reannounced
        self._to_say: list[Opened] | None = None
        self._said_at = -math.inf
        self._said_addresses: list[str] | None = None
        self._must_repeat = False
        self._must_reannounce = False
        self._reannounced_at = -math.inf
        self._changed = Signal()

    @property
    def every_s(self) -> float:
        """How often this node speaks at least: less often in a swarm of very many."""
        return HEARTBEAT_S * max(1.0, (1 + len(self._presence.live(trio.current_time()))) / HEARTBEAT_MEMBERS)

    @property
    def own_facts(self) -> Mapping[str, Mapping[str, Any]]:
        """What this node said last, by topic."""
        return self._presence.own_facts

    def publish(self, topic: str, facts: Mapping[str, Any]) -> bytes:
        """Say something to all members, signed.

        Returns:
            The record's hash, by which others may refer to it.

        Raises:
            UsageError: if the topic is unknown, or the facts are not plain data or too much for it.
        """
        record = self._presence.announce(self._signer, topic, facts, self.every_s)
        if self._to_say is None:
            self._say([record])
        else:
            self._to_say.append(record)
        return record.record_hash

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is published inside the block goes out at its end, to each neighbour in one message. Not nested."""
        to_say: list[Opened] = []
        self._to_say = to_say
        try:
            yield
        finally:
            self._to_say = None
            if to_say:
                self._say(to_say)

    def look(self, addresses: Sequence[str]) -> float:
        """Say where this node is reached if that changed, and repeat oneself before one is forgotten.

        Args:
            addresses: full multiaddrs, the best first.

        Returns:
            The time of the next look.
        """
        now = trio.current_time()
        if self._must_reannounce and now - self._reannounced_at >= REANNOUNCE_S:
            self._reannounced_at = now
            self.reannounce()
        told = list(addresses[:MAX_ADDRESSES])
        if told != self._said_addresses:
            self._said_addresses = told
            self.publish(ADDRESSES, {"addresses": told})
        repeat_at = self._said_at + (min(REPEAT_S, self.every_s) if self._must_repeat else self.every_s)
        if now >= repeat_at:
            self._must_repeat = False
            topic = FACTS if FACTS in self.own_facts else ADDRESSES
            self.publish(topic, self.own_facts[topic])
            repeat_at = now + self.every_s
        return min(now + HEARTBEAT_S, repeat_at)

    async def wait_until(self, at: float) -> None:
        """Until then, or until there is something to say again."""
        with trio.move_on_at(at):
            await self._changed.wait()

    def repeat_soon(self) -> None:
        """Somebody was met: if it took this node for gone, only something new changes its mind."""
        self._must_repeat = True
        self._changed.set()

    def reannounce_soon(self) -> None:
        """Others have heard newer things in this node's name."""
        self._must_reannounce = True
        self._changed.set()

    def reannounce(self) -> None:
        """Say all of it anew, as a later incarnation."""
        self._must_reannounce = False
        say = log.warning if self._presence.num_outdone == 1 else log.error
        say(
            "others have heard newer things in the name of this node than it has said (%d times): its clock was set "
            "back, or another node uses the same profile; stop that one if there is one",
            self._presence.num_outdone,
        )
        self._say(self._presence.reannounce(self._signer, self.every_s))
        self._on_reannounced(self._presence.incarnation)

    def _say(self, records: Sequence[Opened]) -> None:
        self._said_at = trio.current_time()
        self._on_said(records)
