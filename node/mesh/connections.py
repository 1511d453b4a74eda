"""Who is connected, by which paths, and what follows from that. A core: no loop, no libp2p.

A shell (`shoal.node.mesh.host`) tells it which connections came and went, and does what it says:

- The best path to a peer carries what begins now. A path that a better one has replaced is closed when it carries
  nothing any more, at the earliest `RETIRE_S` and at the latest `RETIRE_MAX_S` after that.
- When there are more peers than there should be, the least valued are let go (`shoal.node.mesh.paths.surplus`).
- A peer whose last path was a circuit may be gone only because the relay is. It is worth waiting for, for
  `COME_BACK_S`, if the relay ended with it or soon after.

A path is known here by a number that the shell gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Final, NewType, assert_never

from shoal.node.mesh.paths import Candidate, Ladder, PathKind, kind_of, surplus
from shoal.protocol.ids import PeerId

PathId = NewType("PathId", int)

RETIRE_S: Final = 10.0
"""How long a path stays at least after a better one has come."""
RETIRE_MAX_S: Final = 600.0
COME_BACK_S: Final = 10.0
"""How long calls wait for a peer whose relay is gone to be reached by another."""
RELAY_ENDS_S: Final = 1.0
"""How long after its circuits a relay may end, as it does in good order, to count as the reason for their end."""
MAX_LOSSES: Final = 1024
NEEDED: Final = frozenset(("bootstrap", "relay"))
"""By whom a peer is wanted that stays however many there are."""


@dataclass(frozen=True, slots=True)
class Path:
    """One connection to a peer.

    Attributes:
        address: the full multiaddr of the far end, empty if it has none.
        outbound: whether this node dialed.
        relay: in between; None if there is none.
        since: when it came.
    """

    id: PathId
    kind: PathKind
    address: str
    outbound: bool
    relay: PeerId | None
    since: float


@dataclass(slots=True)
class Connected:
    """What is known of a connected peer. Only `Connections` writes into it, but for the ladder.

    Attributes:
        since: when it came.
        paths: the best first; never empty.
        ladder: what was tried to reach it better, kept by whoever tries (`shoal.node.reach.climb`).
        rtt_ms: the last measured round trip of a small call; None before the first.
        used_at: when this node last wanted to call it.
    """

    since: float
    paths: list[Path]
    ladder: Ladder = field(default_factory=Ladder)
    rtt_ms: float | None = None
    used_at: float = 0.0

    @property
    def best(self) -> Path:
        """The path that carries what begins now."""
        return self.paths[0]

    @property
    def kind(self) -> PathKind:
        """How it is reached."""
        return self.best.kind

    @property
    def address(self) -> str:
        """The far end of the best path."""
        return self.best.address

    @property
    def outbound(self) -> bool:
        """Whether this node dialed the best path."""
        return self.best.outbound


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Loss:
    """A peer is gone since a circuit through a relay ended."""

    relay: PeerId
    at: float

    def may_be_made_good(self, now: float, *, is_relay_there: bool) -> bool:
        """Whether the relay is the reason, or may yet prove to be, and it is not too long ago."""
        return now - self.at < (RELAY_ENDS_S if is_relay_there else COME_BACK_S)


# --- events ---


@dataclass(frozen=True, slots=True)
class PathUp:
    """A connection stands.

    Attributes:
        address: the full multiaddr of the far end, empty if it has none.
        outbound: whether this node dialed.
        relay: in between, if there is one and it is known.
    """

    peer: PeerId
    path: PathId
    address: str
    outbound: bool
    relay: PeerId | None = None


@dataclass(frozen=True, slots=True)
class PathDown:
    """A connection is gone."""

    peer: PeerId
    path: PathId


@dataclass(frozen=True, slots=True)
class PathsBroken:
    """No stream can be opened on any path to a peer; the news of their end are still on their way."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Used:
    """This node wants to call a peer."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Measured:
    """A small call to a peer went there and back."""

    peer: PeerId
    rtt_ms: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """A peer must not be let go to make room."""

    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class Unwanted:
    """This reason to keep a peer is gone."""

    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class PunchBegan:
    """Holes are being punched with a peer: a direct connection that comes now came by them."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PunchOver:
    """No more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class RelayKnown:
    """A peer relays, and others dial it by this address; None if it does not relay any more."""

    peer: PeerId
    address: str | None


@dataclass(frozen=True, slots=True)
class Tick:
    """It is time that `Wake` asked for.

    Attributes:
        busy: of the paths `Connections.retiring`, those that still carry something.
    """

    busy: Set[PathId] = frozenset()


Event = (
    PathUp | PathDown | PathsBroken | Used | Measured | Wanted | Unwanted | PunchBegan | PunchOver | RelayKnown | Tick
)


# --- outputs ---


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A first connection to this peer stands."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The last connection to this peer is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class BestPathChanged:
    """A connected peer is reached by another path than before."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PathAdded:
    """There is one more path to a connected peer; whether it is the best is told before."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class ClosePath:
    """A path has been replaced and carries nothing any more, or for too long."""

    path: PathId


@dataclass(frozen=True, slots=True)
class LetGo:
    """Close every connection to a peer: others are worth more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` then, and not before."""

    at: float


Output = PeerUp | PeerDown | BestPathChanged | PathAdded | ClosePath | LetGo | Wake


@dataclass(frozen=True, slots=True)
class _Retiring:
    """A path that a better one has replaced."""

    peer: PeerId
    look_at: float
    until: float


class Connections:
    """All of a node's connections.

    Args:
        max_peers: how many are kept connected, unless more are wanted.
    """

    def __init__(self, max_peers: int) -> None:
        self.max_peers = max_peers
        self._peers: dict[PeerId, Connected] = {}
        self._relays: dict[PeerId, str] = {}
        self._wanted: dict[PeerId, set[str]] = {}
        self._punching: set[PeerId] = set()
        self._retiring: dict[PathId, _Retiring] = {}
        self._losses: dict[PeerId, Loss] = {}
        self._num_let_go = 0
        self._num_retired = 0

    @property
    def peers(self) -> Mapping[PeerId, Connected]:
        """Who is connected."""
        return self._peers

    @property
    def relays(self) -> Mapping[PeerId, str]:
        """Connected peers that relay, with an address of each."""
        return self._relays

    @property
    def wanted(self) -> Mapping[PeerId, Set[str]]:
        """Peers that must not be let go to make room, and by whom they are wanted."""
        return self._wanted

    @property
    def punching(self) -> Set[PeerId]:
        """Peers with which holes are being punched now."""
        return self._punching

    @property
    def retiring(self) -> Set[PathId]:
        """Paths that are closed as soon as they carry nothing."""
        return self._retiring.keys()

    def loss(self, peer: PeerId) -> Loss | None:
        """How a peer came to be gone, if a circuit ended with it and it is not back."""
        return self._losses.get(peer)

    def statistics(self) -> dict[str, int]:
        """Counters, and how much is held."""
        return {
            "peers": len(self._peers),
            "paths": sum(len(state.paths) for state in self._peers.values()),
            "retiring": len(self._retiring),
            "losses": len(self._losses),
            "let_go": self._num_let_go,
            "retired": self._num_retired,
        }

    def handle(self, event: Event, now: float) -> list[Output]:
        """Something happened."""
        match event:
            case PathUp():
                return self._path_up(event, now)
            case PathDown(peer, path):
                return self._path_down(peer, path, now)
            case PathsBroken(peer):
                if peer in self._peers:
                    self._note_loss(peer, self._peers[peer].best, now)
            case Used(peer):
                if peer in self._peers:
                    self._peers[peer].used_at = now
            case Measured(peer, rtt_ms):
                if peer in self._peers:
                    self._peers[peer].rtt_ms = rtt_ms
            case Wanted(peer, why):
                self._wanted.setdefault(peer, set()).add(why)
            case Unwanted(peer, why):
                reasons = self._wanted.get(peer, set())
                reasons.discard(why)
                if not reasons:
                    self._wanted.pop(peer, None)
            case PunchBegan(peer):
                self._punching.add(peer)
            case PunchOver(peer):
                self._punching.discard(peer)
            case RelayKnown(peer, address):
                if address is None or peer not in self._peers:
                    self._relays.pop(peer, None)
                else:
                    self._relays[peer] = address
            case Tick(busy):
                return self._retire(busy, now)
            case _:
                assert_never(event)
        return []

    def _path_up(self, event: PathUp, now: float) -> list[Output]:
        peer = event.peer
        kind = kind_of(event.address, is_punching=peer in self._punching)
        path = Path(event.path, kind, event.address, event.outbound, event.relay, since=now)
        self._losses.pop(peer, None)
        state = self._peers.get(peer)
        if state is None:
            self._peers[peer] = Connected(since=now, paths=[path], used_at=now)
            return [PeerUp(peer), *self._make_room(peer, now)]
        before = state.best
        state.paths = sorted([*state.paths, path], key=lambda each: each.kind.rank)
        changed = self._best_changed(peer, state, now) if state.best is not before else []
        return [*changed, PathAdded(peer)]

    def _path_down(self, peer: PeerId, path: PathId, now: float) -> list[Output]:
        self._retiring.pop(path, None)
        state = self._peers.get(peer)
        if state is None:
            return []
        before = state.best
        left = [each for each in state.paths if each.id != path]
        if left:
            state.paths = left
            return self._best_changed(peer, state, now) if state.best is not before else []
        self._note_loss(peer, before, now)
        del self._peers[peer]
        self._relays.pop(peer, None)
        return [PeerDown(peer)]

    def _best_changed(self, peer: PeerId, state: Connected, now: float) -> list[Output]:
        for path in state.paths[1:]:
            self._retiring.setdefault(path.id, _Retiring(peer, now + RETIRE_S, now + RETIRE_MAX_S))
        return [BestPathChanged(peer), *self._wake()]

    def _retire(self, busy: Set[PathId], now: float) -> list[Output]:
        outputs: list[Output] = []
        for path_id, retiring in list(self._retiring.items()):
            if retiring.look_at > now:
                continue
            state = self._peers.get(retiring.peer)
            path = next((each for each in state.paths if each.id == path_id), None) if state is not None else None
            if state is None or path is None or state.kind.rank >= path.kind.rank:
                del self._retiring[path_id]  # it is gone, or as good as the best by now
            elif path_id in busy and now + RETIRE_S <= retiring.until:
                self._retiring[path_id] = replace(retiring, look_at=now + RETIRE_S)
            else:
                del self._retiring[path_id]
                self._num_retired += 1
                outputs.append(ClosePath(path_id))
        return outputs + self._wake()

    def _wake(self) -> list[Output]:
        return [Wake(min(each.look_at for each in self._retiring.values()))] if self._retiring else []

    def _make_room(self, newcomer: PeerId, now: float) -> list[Output]:
        if len(self._peers) <= self.max_peers:
            return []
        candidates = [
            Candidate(
                peer,
                state.kind,
                peer in self._wanted,
                state.used_at,
                is_needed=not NEEDED.isdisjoint(self._wanted.get(peer, ())),
            )
            for peer, state in self._peers.items()
            if peer != newcomer
        ]
        gone = surplus(candidates, self.max_peers - 1, now)
        self._num_let_go += len(gone)
        return [LetGo(peer) for peer in gone]

    def _note_loss(self, peer: PeerId, path: Path, now: float) -> None:
        if path.relay is not None and peer not in self._losses:
            self._losses[peer] = Loss(path.relay, now)
            while len(self._losses) > MAX_LOSSES:
                del self._losses[next(iter(self._losses))]
