"""Who holds something: what of a look-up's answers counts, and when to announce what this node holds.

Whoever takes part in a distributed hash table may have written into it. So of the answers of a look-up only those count
that name a peer as nodes are named, as many of them and of their addresses as are worth trying; one that is malformed
costs nobody else's. Whether a named peer is there, and holds anything, shows when it is dialed and asked.

An announcement is forgotten by those that took it, and they leave. So it is repeated every `interval_s`; sooner where
nobody took it, and soon after a peer has come, which may be the first that can take it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

MAX_PROVIDERS: Final = 100
"""Peers that count in one look-up."""
MAX_PROVIDER_ADDRESSES: Final = 8
"""Addresses of one of them."""
MAX_ADDRESS_CHARS: Final = 300


# --- what counts in a look-up ---


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """One answer of a look-up, as it came.

    Attributes:
        name: the libp2p peer id that it names, of whatever kind of key.
        addresses: multiaddrs, with or without that name at their end.
    """

    name: str
    addresses: Sequence[str]


def providers_of(records: Iterable[ProviderRecord], me: PeerId) -> dict[PeerId, tuple[str, ...]]:
    """The peers that hold something, in the order of the answers, each with its full multiaddrs.

    Left out are names that no node can have (only Ed25519 keys are embedded in a name), this node, peers without any
    address, addresses of somebody else, and what is over the limits. A peer may be named by several answers.
    """
    found: dict[PeerId, dict[str, None]] = {}
    for record in records:
        try:
            peer = PeerId.parse(record.name)
        except UsageError:
            continue
        if peer == me:
            continue
        addresses = [full for address in record.addresses if (full := _full(address, peer)) is not None]
        if not addresses or (peer not in found and len(found) >= MAX_PROVIDERS):
            continue
        known = found.setdefault(peer, {})
        for address in addresses:
            if len(known) < MAX_PROVIDER_ADDRESSES:
                known[address] = None
    return {peer: tuple(addresses) for peer, addresses in found.items()}


def _full(address: str, peer: PeerId) -> str | None:
    """An address that ends in the name of its peer; None if it leads to another one."""
    if not address.startswith("/") or len(address) > MAX_ADDRESS_CHARS or not address.isprintable():
        return None
    bare = address.removesuffix(f"/p2p/{peer}")
    end = bare.rpartition("/p2p-circuit")[2]  # before it stands the name of a relay
    return None if "/p2p/" in end else f"{bare}/p2p/{peer}"


# --- when to announce ---


@dataclass(frozen=True, slots=True)
class AnnounceTimes:
    """How often something is announced."""

    interval_s: float = 300.0
    """After an announcement that somebody took: it costs its node a tenth of a second, and each that takes it some."""

    retry_s: float = 5.0
    """After one that nobody took."""

    pause_s: float = 1.0
    """After a peer has come; others often come at the same time."""


@dataclass(frozen=True, slots=True)
class PeerCame:
    """A peer is connected that was not before."""


@dataclass(frozen=True, slots=True)
class Announced:
    """What `Announce` asked for is over."""

    is_taken: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """It is time that `Wake` asked for, or this begins."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Announce it now, and tell by `Announced` what came of it."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing is to be done before that time, unless a peer comes."""

    at: float


class Announcer:
    """When to announce one thing. It answers each event with one output."""

    def __init__(self, times: AnnounceTimes | None = None) -> None:
        self._times = times or AnnounceTimes()
        self._due_at = 0.0

    def handle(self, event: PeerCame | Announced | Tick, now: float) -> Announce | Wake:
        """Something happened."""
        match event:
            case PeerCame():
                self._due_at = min(self._due_at, now + self._times.pause_s)
            case Announced(is_taken):
                self._due_at = now + (self._times.interval_s if is_taken else self._times.retry_s)
            case Tick():
                pass
            case _:
                assert_never(event)
        return Announce() if self._due_at <= now else Wake(self._due_at)
