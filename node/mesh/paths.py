"""How peers are reached: the kinds of path, the ladder that leads to a better one, and which peers to keep. Pure.

A peer may be connected by several paths at a time, for example while a better one takes over. The best carries what
begins now; the others stay until what they carry has ended.

The ladder, best rung first (DESIGN, section 5): an address of the peer's, or one that its router forwards
(``direct``); a hole punched in both NATs with the help of a relay (``punched``); UDP by ICE (``webrtc``); a circuit
(``relayed``). A peer that is reached worse than it could be is worth another climb: at once when something has changed,
else ever more seldom.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

from shoal.protocol.ids import PeerId

CLIMB_AGAIN_S: Final = (30.0, 120.0, 600.0)
"""After how long a climb that led nowhere is worth another try, by the number of such climbs before."""


class PathKind(StrEnum):
    """How bytes get to a peer."""

    DIRECT = "direct"
    PUNCHED = "punched"
    WEBRTC = "webrtc"
    RELAYED = "relayed"

    @property
    def rank(self) -> int:
        """0 is best."""
        return _RANKS[self]

    @property
    def is_tcp_between_both(self) -> bool:
        """Whether bytes go by TCP from one to the other: there is nothing better that a climb could lead to."""
        return self in (PathKind.DIRECT, PathKind.PUNCHED)


_RANKS: Final = {kind: rank for rank, kind in enumerate(PathKind)}


def kind_of(address: str, *, is_punching: bool) -> PathKind:
    """The kind of a path, by its far end's multiaddr.

    Args:
        address: the far end.
        is_punching: whether this node and the peer are just now at punching holes for each other.
    """
    if "/p2p-circuit" in address:
        return PathKind.RELAYED
    if "/webrtc" in address:
        return PathKind.WEBRTC
    return PathKind.PUNCHED if is_punching else PathKind.DIRECT


class Rung(StrEnum):
    """A way to a better path."""

    DIRECT = "direct"
    PUNCH = "hole punching (TCP)"
    WEBRTC = "WebRTC (UDP)"


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of trying a rung.

    Attributes:
        at: when, in the node's own time.
        failure: why not, in one line; None if it led to a path.
    """

    at: float
    failure: str | None


class Ladder:
    """What was tried to reach one peer, and when it is worth trying again."""

    def __init__(self) -> None:
        self.tried: dict[Rung, Attempt] = {}
        self._num_in_vain = 0
        self._next_at = 0.0

    def note(self, rung: Rung, failure: str | None, now: float) -> None:
        """A rung was tried."""
        self.tried[rung] = Attempt(now, failure)

    def climbed(self, *, is_better: bool, now: float) -> None:
        """A climb is over."""
        self._num_in_vain = 0 if is_better else self._num_in_vain + 1
        self._next_at = now + CLIMB_AGAIN_S[min(self._num_in_vain, len(CLIMB_AGAIN_S)) - 1]

    def something_changed(self) -> None:
        """Addresses, a NAT or a network are others than before: it is worth trying at once."""
        self._num_in_vain = 0
        self._next_at = 0.0

    def wait_s(self, kind: PathKind, now: float) -> float | None:
        """Seconds until the next climb from such a path; None if there is nothing better."""
        return None if kind is PathKind.DIRECT else max(0.0, self._next_at - now)


class Value(IntEnum):
    """What a connected peer is worth to this node, least first."""

    STRANGER = 0
    """It came by itself, or was met by looking something up."""
    RECENT = 1
    """Calls went to it or came from it within `RECENT_S`."""
    WANTED = 2
    """A swarm uses it, this node is reached through it, or a person named it; never closed to make room."""


RECENT_S: Final = 60.0
MAX_OVER: Final = 2
"""So many times as many peers as there should be are kept if swarms use them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A connected peer, as far as making room goes.

    Attributes:
        kind: of its best path.
        is_wanted: a swarm uses it, or as below.
        used_at: when a call last went either way.
        is_needed: this node is reached through it, or a person named it.
    """

    peer: PeerId
    kind: PathKind
    is_wanted: bool
    used_at: float
    is_needed: bool = False

    def value(self, now: float) -> Value:
        """What it is worth."""
        if self.is_wanted:
            return Value.WANTED
        return Value.RECENT if now - self.used_at < RECENT_S else Value.STRANGER


def surplus(candidates: Iterable[Candidate], max_peers: int, now: float) -> list[PeerId]:
    """Whom to let go so that at most ``max_peers`` stay: the least valued, among equals the longest unused.

    A relayed peer goes before one that is reached better, since it costs a third party. Those that are wanted stay,
    even if they are too many. But anybody who knows a swarm's name can make itself one of its members: when there are
    `MAX_OVER` times as many as there should be, those of them go that this node has not called for longest, unless
    they are needed.
    """
    found = list(candidates)
    spare = sorted(
        (candidate for candidate in found if not candidate.is_wanted),
        key=lambda candidate: (candidate.value(now), -candidate.kind.rank, candidate.used_at),
    )
    gone = spare[: max(0, len(found) - max_peers)]
    members = sorted(
        (candidate for candidate in found if candidate.is_wanted and not candidate.is_needed),
        key=lambda candidate: (-candidate.kind.rank, candidate.used_at),
    )
    gone += members[: max(0, len(found) - len(gone) - MAX_OVER * max(1, max_peers))]
    return [candidate.peer for candidate in gone]
