"""Who is told what: a bounded overlay of members, and news that runs along a tree inside it.

The overlay is HyParView (Leitão, Pereira, Rodrigues 2007, https://asc.di.fct.unl.pt/~jleitao/pdf/dsn07-leitao.pdf):
a small symmetric *active view* of neighbours to which connections stand, and a *passive view* of members that could be
dialed when a neighbour is lost. Over it runs Plumtree (the same authors, 2007,
https://asc.di.fct.unl.pt/~jleitao/pdf/srds07-leitao.pdf): news is pushed at once to the *eager* neighbours, and the
*lazy* ones are told only that it exists. Whoever gets a push that brought nothing new prunes that link to lazy; whoever
is told of an item that does not come in time grafts the link back. So what a node spends per item does not grow with
the swarm, and a swarm of up to seven is a full mesh with a tree in it.

`shoal.crdt.overlay` keeps the views; the tree is here; `shoal.crdt.gossip_messages` has what goes in and out, which can
be imported from here too.

The core knows items by id and never sees a payload: the shell keeps those, judges what is news, and sends what it still
has. An item has a key; a newer one with the same key replaces an older one that still waits to be sent.

Where this deviates:

- A member with whom a connection stands is taken as a neighbour at once while there is room, and told so; it refuses by
  ``disconnect``. In a small swarm nothing waits for a round trip.
- A shuffle is exchanged with a neighbour and not walked, so that the answer needs no further connection. What is only
  heard of (shuffles, joins) never displaces what the shell vouches for, for a liar invents members.
- Who makes room for a newcomer names it to whom it drops: that one has room for it now.
- Now and then one neighbour is exchanged for a random other member, so that two halves that were parted, each with full
  views, find each other again, and nobody stays surrounded by liars.
- When an eager neighbour is lost, all lazy links become eager at once; the next item prunes what was too much.
- An announced item is asked of whoever broke the fewest promises first, so that a liar that announces what it does not
  have is asked last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from random import Random
from typing import Final

from shoal.crdt.gossip_messages import (
    ITEM_ID_BYTES,
    MAX_HAVE,
    MAX_SAMPLE,
    MAX_STEPS,
    MAX_WALKS,
    MAX_WANT,
    Ask,
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Event,
    GossipConfig,
    Item,
    ItemId,
    Known,
    Output,
    Published,
    Push,
    Pushed,
    Tell,
    Tick,
    Told,
    Wake,
    Walk,
)
from shoal.crdt.overlay import Overlay
from shoal.protocol.ids import PeerId

__all__ = [
    "ITEM_ID_BYTES",
    "MAX_HAVE",
    "MAX_SAMPLE",
    "MAX_STEPS",
    "MAX_WALKS",
    "MAX_WANT",
    "Ask",
    "ContactDown",
    "ContactUp",
    "Control",
    "Dial",
    "Event",
    "Gossip",
    "GossipConfig",
    "GossipStatistics",
    "Item",
    "ItemId",
    "Known",
    "Output",
    "Published",
    "Push",
    "Pushed",
    "Tell",
    "Tick",
    "Told",
    "Wake",
    "Walk",
]

_MANY_BROKEN: Final = 64
"""Promises that a neighbour has to break, more than it kept, before hardly anything that it announces is waited for."""

_MAX_MISSING_OF_LIAR: Final = 8
_PRUNE_AGAIN_S: Final = 1.0
_EARLY_S: Final = 0.001
"""A tick this much early is taken for the one that was asked for: clocks round."""


@dataclass(frozen=True, slots=True)
class GossipStatistics:
    """Counters since the start, and sizes now.

    Attributes:
        neighbours: in the active view.
        eager: of them, those in the tree.
        contacts: members connected.
        passive: members that could be dialed.
        seen: items remembered.
        missing: items announced that have not come.
        fresh: items that came by a push and were news.
        duplicates: items that came by a push and were held.
        grafts: items asked for.
        never_came: items announced that nobody sent.
        dropped: what did not fit into a bound, whatever it was.
        replaced: items that a newer one with their key replaced before they were sent.
    """

    neighbours: int
    eager: int
    contacts: int
    passive: int
    seen: int
    missing: int
    fresh: int
    duplicates: int
    grafts: int
    never_came: int
    dropped: int
    replaced: int


class _Branch:
    """The link to one neighbour, as the tree sees it."""

    __slots__ = (
        "broken",
        "gave",
        "has",
        "is_eager",
        "next_at",
        "num_missing",
        "peer",
        "pruned_at",
        "waiting",
        "wants",
        "wants_at",
    )

    def __init__(self, peer: PeerId, wants: float) -> None:
        self.peer = peer
        self.is_eager = True
        self.gave = False  # whether news ever came from it
        self.next_at = -inf  # no push before
        self.waiting: dict[str, ItemId] | None = None  # for the next push, by key
        self.has: set[ItemId] = set()  # what needs not be announced to it any more
        self.num_missing = 0  # items that it announced and that are waited for
        self.broken = 0  # promises, less those that it kept since
        self.pruned_at = -inf
        self.wants = wants  # items that it may ask for now
        self.wants_at = -inf


class _Missing:
    """An item that was announced and has not come."""

    __slots__ = ("announcers", "asked", "tries")

    def __init__(self, announcer: PeerId) -> None:
        self.announcers = [announcer]
        self.asked: PeerId | None = None
        self.tries = 0


class Gossip:
    """What one node of one swarm tells whom."""

    __slots__ = (
        "_branches",
        "_config",
        "_counts",
        "_eager",
        "_first",
        "_flush_at",
        "_have_at",
        "_lazy",
        "_missing",
        "_next",
        "_overlay",
        "_rng",
        "_seen",
        "_unsaid",
        "_woken_at",
        "me",
    )

    def __init__(self, me: PeerId, rng: Random, config: GossipConfig | None = None) -> None:
        """Start with nobody.

        Args:
            me: this node; it never tells itself anything.
            rng: for the choice of neighbours.
            config: sizes and waits.
        """
        self.me = me
        self._config = config or GossipConfig()
        self._rng = rng
        self._overlay = Overlay(me, rng, self._config)
        self._branches: dict[PeerId, _Branch] = {}
        self._eager: list[_Branch] = []
        self._lazy: list[_Branch] = []
        self._seen: dict[ItemId, None] = {}
        self._unsaid: dict[str, ItemId] = {}  # to be announced to lazy neighbours, by key
        self._missing: dict[ItemId, _Missing] = {}
        # Each wait is always as long, so what is due next stands in front.
        self._first: deque[tuple[float, Sequence[ItemId]]] = deque()
        self._next: deque[tuple[float, Sequence[ItemId]]] = deque()
        self._flush_at = inf
        self._have_at = inf
        self._woken_at = inf
        self._counts = _Counts()

    def handle(self, event: Event, now: float) -> list[Output]:
        """Take in one event; what is to be done for it, in order.

        Args:
            event: what happened.
            now: seconds, monotonic.
        """
        outputs: list[Output] = []
        match event:
            case Pushed(peer, fresh, known):
                self._pushed(peer, fresh, known, now, outputs)
            case Tick():
                if now < self._woken_at - _EARLY_S:
                    return outputs  # of a wake that another replaced
                self._woken_at = inf
                self._tick(now, outputs)
            case Told(peer, message):
                self._told(peer, message, now, outputs)
            case Published(items):
                new = tuple([item for item in items if item.id not in self._seen])
                if new:
                    self._pass_on(new, tuple([item.id for item in new]), None, now, outputs)
            case ContactUp(peer):
                self._overlay.up(peer, now, outputs)
                self._regrow(now, outputs)
            case ContactDown(peer):
                self._overlay.down(peer, now, outputs)
                self._regrow(now, outputs)
            case Known(peers):
                self._overlay.known(peers, now, outputs)
                self._regrow(now, outputs)
        at = min(self._flush_at, self._have_at, self._overlay.due)
        if self._first:
            at = min(at, self._first[0][0])
        if self._next:
            at = min(at, self._next[0][0])
        if at < self._woken_at:
            self._woken_at = at
            outputs.append(Wake(at))
        return outputs

    @property
    def neighbours(self) -> frozenset[PeerId]:
        """The active view."""
        return frozenset(self._branches)

    def statistics(self) -> GossipStatistics:
        """Counters and sizes."""
        counts = self._counts
        return GossipStatistics(
            neighbours=len(self._branches),
            eager=len(self._eager),
            contacts=len(self._overlay.contacts),
            passive=self._overlay.num_passive,
            seen=len(self._seen),
            missing=len(self._missing),
            fresh=counts.fresh,
            duplicates=counts.duplicates,
            grafts=counts.grafts,
            never_came=counts.never_came,
            dropped=counts.dropped + self._overlay.num_dropped,
            replaced=counts.replaced,
        )

    # --- news --------------------------------------------------------------------------------------------------------

    def _pushed(
        self, peer: PeerId, fresh: tuple[Item, ...], known: tuple[ItemId, ...], now: float, outputs: list[Output]
    ) -> None:
        branch = self._branches.get(peer)
        if known:
            self._counts.duplicates += len(known)
            if self._missing:
                self._came(known)
            for item_id in known:
                if item_id not in self._seen:
                    self._saw((item_id,))
        if fresh:
            ids = tuple([item.id for item in fresh])
            self._counts.fresh += len(ids)
            if self._missing:
                self._came(ids)
            if branch is not None:
                branch.gave = True
                if self._lazy:
                    branch.has.update(ids)
                if not branch.is_eager:
                    self._set_eager(branch)
            self._pass_on(fresh, ids, branch, now, outputs)
        elif known and branch is not None:
            if branch.is_eager:
                if len(self._eager) > 1:  # the last link into the tree stays
                    self._set_lazy(branch)
                    branch.pruned_at = now
                    outputs.append(Tell(peer, Control(prune=True)))
            elif now - branch.pruned_at > _PRUNE_AGAIN_S:  # it did not hear it the last time
                branch.pruned_at = now
                outputs.append(Tell(peer, Control(prune=True)))
        if branch is None:
            self._overlay.strange(peer, now, outputs)
            self._regrow(now, outputs)

    def _pass_on(
        self,
        items: tuple[Item, ...],
        ids: tuple[ItemId, ...],
        source: _Branch | None,
        now: float,
        outputs: list[Output],
    ) -> None:
        self._saw(ids)
        if not self._eager and self._lazy:
            self._graft_one(None, outputs)
        gap_s = self._config.flush_gap_s
        for branch in self._eager:
            if branch is source:
                continue
            if branch.waiting is None and branch.next_at <= now:
                branch.next_at = now + gap_s
                outputs.append(Push(branch.peer, ids))
            else:
                self._wait(branch, items)
        if self._lazy:
            unsaid = self._unsaid
            for item in items:
                unsaid[item.key] = item.id
            if self._have_at == inf:
                self._have_at = now + self._config.have_gap_s
            while len(unsaid) > self._config.max_waiting:
                del unsaid[next(iter(unsaid))]
                self._counts.dropped += 1

    def _wait(self, branch: _Branch, items: tuple[Item, ...]) -> None:
        waiting = branch.waiting
        if waiting is None:
            waiting = branch.waiting = {}
            if branch.next_at < self._flush_at:
                self._flush_at = branch.next_at
        before = len(waiting)
        for item in items:
            waiting[item.key] = item.id
        self._counts.replaced += len(items) - (len(waiting) - before)
        while len(waiting) > self._config.max_waiting:
            del waiting[next(iter(waiting))]
            self._counts.dropped += 1

    def _saw(self, ids: Iterable[ItemId]) -> None:
        seen = self._seen
        for item_id in ids:
            seen[item_id] = None
        most = self._config.max_seen
        if len(seen) > most:  # many at once: looking for the first of a dict passes over all that was deleted
            for old in list(islice(seen, len(seen) - most + most // 8)):
                del seen[old]

    def _flush(self, now: float, outputs: list[Output]) -> None:
        self._flush_at = inf
        for branch in self._eager:
            if branch.waiting is None:
                continue
            if branch.next_at <= now:
                outputs.append(Push(branch.peer, tuple(branch.waiting.values())))
                branch.waiting = None
                branch.next_at = now + self._config.flush_gap_s
            elif branch.next_at < self._flush_at:
                self._flush_at = branch.next_at

    def _tick(self, now: float, outputs: list[Output]) -> None:
        if self._flush_at <= now:
            self._flush(now, outputs)
        if self._have_at <= now:
            self._announce(outputs)
        self._ask_for_missing(now, outputs)
        if self._overlay.due <= now:
            self._overlay.upkeep(now, outputs)
            self._regrow(now, outputs)

    # --- announcements -----------------------------------------------------------------------------------------------

    def _announce(self, outputs: list[Output]) -> None:
        self._have_at = inf
        ids = tuple(self._unsaid.values())
        self._unsaid.clear()
        for branch in self._lazy:
            has = branch.has
            news = tuple([item_id for item_id in ids if item_id not in has]) if has else ids
            outputs += [
                Tell(branch.peer, Control(have=news[start : start + MAX_HAVE]))
                for start in range(0, len(news), MAX_HAVE)
            ]
        for branch in self._branches.values():
            if branch.has:
                branch.has.clear()

    def _told(self, peer: PeerId, message: Control, now: float, outputs: list[Output]) -> None:
        if message.neighbour or message.disconnect or message.walks or message.shuffle or message.shuffle_reply:
            self._overlay.told(peer, message, now, outputs)
            self._regrow(now, outputs)
        if not (message.have or message.want or message.graft or message.prune):
            return
        branch = self._branches.get(peer)
        if branch is None:
            self._overlay.strange(peer, now, outputs)
            self._regrow(now, outputs)
            branch = self._branches.get(peer)
            if branch is None:
                return
        if message.have:
            self._heard_of(branch, message.have, now)
        if message.prune and branch.is_eager:
            if len(self._eager) > 1:
                self._set_lazy(branch)
            elif self._lazy:  # its last link into the tree gone, a node is told of everything late: take another
                self._set_lazy(branch)
                self._graft_one(branch, outputs)
        if message.graft or message.want:
            self._set_eager(branch)
        if message.want:
            self._give(branch, message.want, now, outputs)

    def _heard_of(self, branch: _Branch, have: tuple[ItemId, ...], now: float) -> None:
        if self._unsaid:
            branch.has.update(have)
            if len(branch.has) > self._config.max_waiting:
                branch.has.clear()
        seen, missing = self._seen, self._missing
        new = []
        most = self._config.max_missing if branch.broken < _MANY_BROKEN else _MAX_MISSING_OF_LIAR
        for item_id in have:
            if item_id in seen:
                continue
            entry = missing.get(item_id)
            if entry is not None and branch.peer in entry.announcers:
                continue
            if branch.num_missing >= most:
                self._counts.dropped += 1
                continue
            branch.num_missing += 1
            if entry is None:
                missing[item_id] = _Missing(branch.peer)
                new.append(item_id)
            else:
                entry.announcers.append(branch.peer)
        if new:
            self._first.append((now + self._config.graft_wait_s, new))

    def _came(self, ids: tuple[ItemId, ...]) -> None:
        for item_id in ids:
            entry = self._missing.pop(item_id, None)
            if entry is None:
                continue
            for peer in entry.announcers:
                branch = self._branches.get(peer)
                if branch is not None:
                    branch.num_missing -= 1
                    branch.has.add(item_id)
            asked = None if entry.asked is None else self._branches.get(entry.asked)
            if asked is not None:
                asked.broken //= 2

    def _ask_for_missing(self, now: float, outputs: list[Output]) -> None:
        due: list[ItemId] = []
        for queue in (self._first, self._next):
            while queue and queue[0][0] <= now:
                due += queue.popleft()[1]
        asked: dict[PeerId, list[ItemId]] = {}
        again = []
        for item_id in due:
            entry = self._missing.get(item_id)
            if entry is None:
                continue
            branch = self._whom_to_ask(entry)
            if branch is None:
                self._give_up(item_id, entry)
                continue
            entry.asked = branch.peer
            entry.tries += 1
            asked.setdefault(branch.peer, []).append(item_id)
            again.append(item_id)
        for peer, ids in asked.items():
            self._counts.grafts += len(ids)
            self._set_eager(self._branches[peer])
            outputs += [
                Tell(peer, Control(want=tuple(ids[start : start + MAX_WANT]))) for start in range(0, len(ids), MAX_WANT)
            ]
        if again:
            self._next.append((now + self._config.graft_next_s, again))

    def _whom_to_ask(self, entry: _Missing) -> _Branch | None:
        """The announcer to be asked next: each twice at most, who broke the fewest promises first."""
        if entry.asked is not None:
            broke = self._branches.get(entry.asked)
            if broke is not None:
                broke.broken = min(2 * _MANY_BROKEN, broke.broken + 1)
        left = [self._branches[peer] for peer in entry.announcers if peer in self._branches]
        if entry.tries >= 2 * len(left):
            return None
        others = [branch for branch in left if branch.peer != entry.asked] or left
        return min(others, key=lambda branch: branch.broken)

    def _give_up(self, item_id: ItemId, entry: _Missing) -> None:
        del self._missing[item_id]
        self._counts.never_came += 1
        for peer in entry.announcers:
            branch = self._branches.get(peer)
            if branch is not None:
                branch.num_missing -= 1

    def _give(self, branch: _Branch, want: tuple[ItemId, ...], now: float, outputs: list[Output]) -> None:
        most = float(MAX_WANT)
        branch.wants = min(most, branch.wants + min(60.0, now - branch.wants_at) * self._config.wants_per_s)
        branch.wants_at = now
        ids = [item_id for item_id in want if item_id in self._seen]
        allowed = int(branch.wants)
        if len(ids) > allowed:
            self._counts.dropped += len(ids) - allowed
            ids = ids[:allowed]
        if ids:
            branch.wants -= len(ids)
            outputs.append(Push(branch.peer, tuple(ids)))

    # --- the tree ----------------------------------------------------------------------------------------------------

    def _set_eager(self, branch: _Branch) -> None:
        if not branch.is_eager:
            branch.is_eager = True
            self._lazy.remove(branch)
            self._eager.append(branch)
            self._overlay.spare.discard(branch.peer)

    def _set_lazy(self, branch: _Branch) -> None:
        branch.is_eager = False
        self._eager.remove(branch)
        self._lazy.append(branch)
        self._overlay.spare.add(branch.peer)
        if branch.waiting is not None:
            self._unsaid.update(branch.waiting)
            branch.waiting = None
            self._have_at = min(self._have_at, branch.next_at)

    def _graft_one(self, but: _Branch | None, outputs: list[Output]) -> None:
        branches = [branch for branch in self._lazy if branch is not but]
        if branches:
            branch = self._rng.choice(branches)
            self._set_eager(branch)
            outputs.append(Tell(branch.peer, Control(graft=True)))

    def _regrow(self, now: float, outputs: list[Output]) -> None:
        """Follow the overlay: whom it gained is eager; whom it lost may have been the way into the tree."""
        overlay = self._overlay
        if not overlay.gained and not overlay.lost:
            return
        is_torn = False
        for peer in overlay.lost:
            branch = self._branches.pop(peer, None)
            if branch is None:
                continue
            overlay.spare.discard(peer)
            if branch.is_eager:
                is_torn = is_torn or branch.gave
                self._eager.remove(branch)
            else:
                self._lazy.remove(branch)
        overlay.lost.clear()
        for peer in overlay.gained:
            if peer in overlay.neighbours and peer not in self._branches:
                branch = self._branches[peer] = _Branch(peer, float(MAX_WANT))
                self._eager.append(branch)
        overlay.gained.clear()
        if is_torn:
            for branch in list(self._lazy):
                self._set_eager(branch)
                outputs.append(Tell(branch.peer, Control(graft=True)))
            if self._missing:
                # Its messages may be what was waited for; an item stands in one of these queues at most.
                self._first = deque((min(now, at), ids) for at, ids in self._first)
                self._ask_for_missing(now, outputs)


class _Counts:
    """What `GossipStatistics` counts."""

    __slots__ = ("dropped", "duplicates", "fresh", "grafts", "never_came", "replaced")

    def __init__(self) -> None:
        self.dropped = 0
        self.duplicates = 0
        self.fresh = 0
        self.grafts = 0
        self.never_came = 0
        self.replaced = 0
