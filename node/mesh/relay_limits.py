"""What a relay grants to whom: reservations, circuits, bytes and seconds, and whose turn it is. Pure.

A relay is somebody's line, lent for nothing. So everything has a limit, and the line is shared fairly: as long as
several users want more than there is, each gets an equal part of it, however many circuits or identities it opens. A
**user** is the network that bytes come from (an IPv4 address, an IPv6 /64), since identities cost nothing. Turns
follow start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996), behind a token bucket of the whole line.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

from shoal.node.budgets import user_of
from shoal.protocol.ids import PeerId

MAX_PIECE_BYTES: Final = 64 * 1024
"""How much may ask for passage in one piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """How much a relay gives."""

    max_reservations: int = 128
    """Nodes that may be reached through this one at a time."""

    max_reservations_per_user: int = 16

    reservation_s: int = 3600
    """How long a reservation holds unless it is renewed."""

    max_circuits: int = 256

    max_circuits_per_peer: int = 32
    """Circuits that one node may be an end of."""

    circuit_s: int = 6 * 3600
    """How long a circuit may last; then its ends have to open another one."""

    circuit_bytes: int = 4 * 1024**3
    """How much a circuit may carry, both ways together."""

    bytes_per_s: float = 8e6
    """For all circuits together, both ways."""


class RelayRefusedError(Exception):
    """A limit stands against it.

    Attributes:
        full: the relay has no room at all (else only this user has had its part).
    """

    def __init__(self, why: str, *, full: bool) -> None:
        super().__init__(why)
        self.full = full


@dataclass(frozen=True, slots=True)
class _Reservation:
    user: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class _CircuitEnds:
    source: PeerId
    target: PeerId


class RelayLedger:
    """Who has a reservation, and which circuits stand."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self._reservations: dict[PeerId, _Reservation] = {}
        self._circuits: dict[int, _CircuitEnds] = {}
        self._next_circuit = 1

    @property
    def num_reservations(self) -> int:
        """Those that have not ended, as of the last event."""
        return len(self._reservations)

    @property
    def num_circuits(self) -> int:
        """Those that stand now."""
        return len(self._circuits)

    def load(self) -> float:
        """How full the relay is, between 0 and 1."""
        return max(
            self.num_reservations / max(1, self.limits.max_reservations),
            self.num_circuits / max(1, self.limits.max_circuits),
        )

    def reserve(self, peer: PeerId, ip: str, now: float) -> float:
        """Let a peer be reached through this node, or go on being reached; gives the time at which it ends.

        Raises:
            RelayRefusedError: if there is no room.
        """
        self._expire(now)
        user = user_of(ip)
        if peer not in self._reservations:
            if len(self._reservations) >= self.limits.max_reservations:
                raise RelayRefusedError(f"{self.limits.max_reservations} reservations are taken", full=True)
            num_of_user = sum(held.user == user for held in self._reservations.values())
            if num_of_user >= self.limits.max_reservations_per_user:
                raise RelayRefusedError(f"{num_of_user} reservations for one address", full=False)
        expires_at = now + self.limits.reservation_s
        self._reservations[peer] = _Reservation(user, expires_at)
        return expires_at

    def has_reservation(self, peer: PeerId, now: float) -> bool:
        """Whether a peer may be reached through this node."""
        self._expire(now)
        return peer in self._reservations

    def release(self, peer: PeerId) -> None:
        """A peer is gone, and its reservation with it."""
        self._reservations.pop(peer, None)

    def open_circuit(self, source: PeerId, target: PeerId) -> int:
        """A circuit begins; gives its number.

        Raises:
            RelayRefusedError: if there are too many, of these two or in all.
        """
        if len(self._circuits) >= self.limits.max_circuits:
            raise RelayRefusedError(f"{self.limits.max_circuits} circuits stand", full=True)
        ends = Counter(end for circuit in self._circuits.values() for end in (circuit.source, circuit.target))
        for end in (source, target):
            if ends[end] >= self.limits.max_circuits_per_peer:
                raise RelayRefusedError(f"{ends[end]} circuits of {end} stand", full=False)
        number = self._next_circuit
        self._next_circuit += 1
        self._circuits[number] = _CircuitEnds(source, target)
        return number

    def close_circuit(self, number: int) -> None:
        """A circuit ended."""
        self._circuits.pop(number, None)

    def _expire(self, now: float) -> None:
        for peer in [peer for peer, held in self._reservations.items() if held.expires_at <= now]:
            del self._reservations[peer]


class FairShare:
    """Whose bytes pass next. ``ask`` for passage, and look into `granted` at `next_at` or earlier."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._burst = max(2.0 * MAX_PIECE_BYTES, bytes_per_s / 4)
        self._tokens = self._burst
        self._filled_at: float | None = None
        self._waiting: dict[str, deque[tuple[object, int]]] = {}
        self._clock = 0.0  # virtual: bytes that each of the users has had who asked all the time
        self._had: dict[str, float] = {}  # what a user has had on that clock, as far as it is ahead of it

    def ask(self, user: str, num_bytes: int, ticket: object) -> None:
        """Wait for passage; `granted` gives the ticket back when it is there."""
        if not 0 < num_bytes <= MAX_PIECE_BYTES:
            raise ValueError(f"{num_bytes} bytes in one piece; at most {MAX_PIECE_BYTES}")
        self._waiting.setdefault(user, deque()).append((ticket, num_bytes))

    def forget(self, user: str, ticket: object) -> None:
        """Whoever waited does so no more."""
        kept = deque(entry for entry in self._waiting.pop(user, ()) if entry[0] is not ticket)
        if kept:
            self._waiting[user] = kept

    def granted(self, now: float) -> list[object]:
        """The tickets of those who may pass now."""
        self._fill(now)
        found: list[object] = []
        while self._waiting:
            user = self._next_user()
            ticket, num_bytes = self._waiting[user][0]
            if self._tokens + 1 < num_bytes:  # or rounding could keep `next_at` from ever being late enough
                break
            self._tokens -= num_bytes
            self._clock = self._start(user)
            self._had[user] = self._clock + num_bytes
            self.forget(user, ticket)
            found.append(ticket)
        self._had = {user: had for user, had in self._had.items() if had > self._clock}
        return found

    def next_at(self, now: float) -> float | None:
        """When there will be passage for whoever is next; None if nobody waits."""
        if not self._waiting:
            return None
        self._fill(now)
        _, num_bytes = self._waiting[self._next_user()][0]
        return now + max(0.0, num_bytes - self._tokens) / self._rate

    def _next_user(self) -> str:
        return min(self._waiting, key=self._start)

    def _start(self, user: str) -> float:
        return max(self._clock, self._had.get(user, 0.0))

    def _fill(self, now: float) -> None:
        if self._filled_at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
