"""What the gossip core takes and gives: items, events, outputs, and the control messages between nodes.

`shoal.crdt.gossip` says what happens with them. Control messages come from strangers: every part of one is bounded
before anything is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import PeerId

ItemId = bytes
"""The name of one item: `ITEM_ID_BYTES` bytes that everybody derives alike from its payload."""

ITEM_ID_BYTES: Final = 16
MAX_HAVE: Final = 1024
"""Items that one control message may announce."""
MAX_WANT: Final = 256
"""Items that one control message may ask for, graft, or prune."""
MAX_SAMPLE: Final = 8
"""Members that one control message may name in a shuffle."""
MAX_WALKS: Final = 4
"""Newcomers that one control message may pass on."""
MAX_STEPS: Final = 6
"""Steps that a newcomer's name is walked: HyParView's ARWL."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to be passed on.

    Attributes:
        id: its name, `ITEM_ID_BYTES` long.
        key: what it is the newest of; a newer item with this key makes an older one not worth sending.
        source: whose it is, as the shell has verified: items of one source travel by one tree. Its author is best.
    """

    id: ItemId
    key: str
    source: str = ""


# --- control messages ------------------------------------------------------------------------------------------------


class Ask(IntEnum):
    """How much somebody wants to be a neighbour."""

    NONE = 0
    ROOM = 1  # if there is room
    MIX = 2  # it exchanges a neighbour for this one: room is made
    URGENT = 3  # it has too few: room is made
    JOIN = 4  # it has none: room is made, and its name is walked through the overlay


@dataclass(frozen=True, slots=True)
class Walk:
    """A newcomer on its way to those who will take it as a neighbour.

    Attributes:
        peer: the newcomer.
        steps: how many are left, 0 to `MAX_STEPS`.
    """

    peer: PeerId
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= MAX_STEPS:
            raise ProtocolError(f"a walk has 0 to {MAX_STEPS} steps left, not {self.steps}")


@dataclass(frozen=True, slots=True)
class Control:
    """What one node tells another beside payloads; any of it at once.

    Attributes:
        have: items that the sender could push.
        want: items that the sender asks for, and for whose sources it puts the link back into the tree (GRAFT).
        graft: items for whose sources alone it does that.
        prune: items for whose sources the sender takes the link out of the tree.
        neighbour: the sender takes the receiver as a neighbour, and asks for the same.
        disconnect: the sender does not (any longer) take the receiver as a neighbour.
        walks: newcomers (FORWARDJOIN).
        shuffle: a sample of the members that the sender knows; it asks for one in return.
        shuffle_reply: such a sample, unasked or in return.
    """

    have: tuple[bytes, ...] = ()
    want: tuple[bytes, ...] = ()
    graft: tuple[bytes, ...] = ()
    prune: tuple[bytes, ...] = ()
    neighbour: Ask = Ask.NONE
    disconnect: bool = False
    walks: tuple[Walk, ...] = ()
    shuffle: tuple[PeerId, ...] = ()
    shuffle_reply: tuple[PeerId, ...] = ()

    def __post_init__(self) -> None:
        for name, most in _MOST:
            part = getattr(self, name)
            if part and len(part) > most:
                raise LimitError(f"{name} names {len(part)}, more than {most}")
        for ids in (self.have, self.want, self.graft, self.prune):
            if ids and not _ID_LENGTHS.issuperset(map(len, ids)):
                raise ProtocolError(f"an item's id has {ITEM_ID_BYTES} bytes")


_MOST: Final = (
    ("have", MAX_HAVE),
    ("want", MAX_WANT),
    ("graft", MAX_WANT),
    ("prune", MAX_WANT),
    ("walks", MAX_WALKS),
    ("shuffle", MAX_SAMPLE),
    ("shuffle_reply", MAX_SAMPLE),
)
_ID_LENGTHS: Final = frozenset((ITEM_ID_BYTES,))


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContactUp:
    """A connection to a member stands; the shell has checked that it is one."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class ContactDown:
    """The connection to a peer is gone, or a `Dial` of it failed."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Known:
    """Members that could be dialed, checked by the shell; tell them again whenever that is cheap."""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """This node has something new of its own, or from elsewhere than a push: pass it on."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Pushed:
    """Payloads came from a peer, and the shell has judged them.

    Attributes:
        peer: who sent them.
        fresh: what was news, to be passed on. What is not to be passed on (refused, too fast, stale) is in neither.
        known: the ids of what was held already.
    """

    peer: PeerId
    fresh: tuple[Item, ...]
    known: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """A control message came from a peer."""

    peer: PeerId
    message: Control


@dataclass(frozen=True, slots=True)
class Tick:
    """A `Wake` is due. Ticks too many do no harm."""


Event = ContactUp | ContactDown | Known | Published | Pushed | Told | Tick


# --- outputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Push:
    """Send a peer the payloads of these items, those that are still held."""

    peer: PeerId
    ids: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a peer a control message; it may travel with a push of the same moment."""

    peer: PeerId
    message: Control


@dataclass(frozen=True, slots=True)
class Dial:
    """A member is wanted as a neighbour: connect to it, if it is one. `ContactUp` or `ContactDown` is the answer."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` at this time; it replaces any later one that was asked for."""

    at: float


Output = Push | Tell | Dial | Wake


@dataclass(frozen=True, slots=True)
class GossipConfig:
    """How a node gossips; times in seconds.

    Attributes:
        active: neighbours at most.
        few: with fewer neighbours than this, others make room when asked.
        passive: members remembered that the shell vouches for; half as many again that were only heard of.
        flush_gap_s: between two pushes to one neighbour; what comes between goes together.
        have_gap_s: between two pushes to one neighbour with which it is told what it is not pushed.
        have_late_s: when a lazy neighbour is told of an item at the latest, if nothing is pushed to it meanwhile; at
            the earliest in half of that, so that of two who are each other's only one says so.
        graft_wait_s: how long an item that was announced may take to come by itself.
        graft_next_s: how long an item that was asked for may take, before the next is asked.
        shuffle_s: between two shuffles.
        mix_s: between two exchanges of a neighbour for a random other member.
        retry_s: how long a member that refused, or could not be reached, is left alone.
        dial_s: how long a dial may take.
        wants_per_s: items that one peer may ask for, on the long run.
        max_seen: items remembered as seen.
        max_sources: sources whose trees are remembered.
        max_waiting: items that may wait for one neighbour.
        max_missing: announced items of one neighbour that are waited for.
        max_contacts: connections that are looked at.
    """

    active: int = 6
    few: int = 4
    passive: int = 30
    flush_gap_s: float = 0.02
    have_gap_s: float = 0.1
    have_late_s: float = 1.6
    graft_wait_s: float = 0.25
    graft_next_s: float = 0.15
    shuffle_s: float = 20.0
    mix_s: float = 60.0
    retry_s: float = 10.0
    dial_s: float = 10.0
    wants_per_s: float = 200.0
    max_seen: int = 8192
    max_sources: int = 512
    max_waiting: int = 4096
    max_missing: int = 512
    max_contacts: int = 1024
