"""What a node remembers of itself from one life to the next: its ports, its last incarnation, relays that it knew.

A node that is found again where it was needs no server that says where it is now: so its port stays the same. Of two
things that it said, the others believe the one of the later incarnation, so that has to grow whatever its clock does.

All methods block; what they have written when they return survives a kill.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from shoal.node.store.database import Storage
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError

log = logging.getLogger(__name__)

MAX_RELAYS: Final = 8
MAX_INCARNATION: Final = 2**53
"""As `shoal.crdt.presence.MAX_STAMP`."""

T = TypeVar("T")

_PORTS: Final = "ports"
_INCARNATION: Final = "incarnation"
_RELAYS: Final = "relays"


class Remembered:
    """Kept among the facts of the node's file."""

    def __init__(self, storage: Storage, wall_clock: Callable[[], float] = time.time) -> None:
        """Read nothing yet.

        Args:
            storage: the node's file.
            wall_clock: Unix seconds; it may be set back from one life to the next, and within one.
        """
        self._storage = storage
        self._wall_clock = wall_clock
        self._lock = threading.Lock()

    def ports(self) -> dict[str, int]:
        """By listening multiaddr with port 0, the port that the system chose for it last."""
        known = self._read(_PORTS, dict[str, int], {})
        return {address: port for address, port in known.items() if 0 < port < 65536}

    def set_ports(self, ports: Mapping[str, int]) -> None:
        """Keep them, beside those of other multiaddrs."""
        kept = self.ports()
        if not ports.items() <= kept.items():
            self._storage.put_fact(_PORTS, encode(kept | dict(ports)))

    def next_incarnation(self) -> int:
        """A number greater than all that were given before, in this life and in earlier ones; the time if it can be.

        Returns:
            Unix milliseconds, or one more than what was given last.
        """
        with self._lock:
            last = self._read(_INCARNATION, int, 0)
            number = min(max(last + 1, int(self._wall_clock() * 1000)), MAX_INCARNATION)
            self._storage.put_fact(_INCARNATION, encode(number))
        return number

    def note_incarnation(self, number: int) -> None:
        """This one was used, though it was not given here."""
        with self._lock:
            if self._read(_INCARNATION, int, 0) < number <= MAX_INCARNATION:
                self._storage.put_fact(_INCARNATION, encode(number))

    def relays(self) -> tuple[str, ...]:
        """Full multiaddrs of relays, those known last first."""
        return self._read(_RELAYS, tuple[str, ...], ())[:MAX_RELAYS]

    def set_relays(self, addresses: Iterable[str]) -> None:
        """Keep these, in this order."""
        self._storage.put_fact(_RELAYS, encode(tuple(addresses)[:MAX_RELAYS]))

    def _read(self, name: str, kind: type[T], otherwise: T) -> T:
        data = self._storage.get_fact(name)
        if data is None:
            return otherwise
        try:
            return decode(kind, data)
        except ProtocolError as error:
            log.warning("what was kept of the node's %s cannot be read (%s); it begins anew", name, error)
            return otherwise
