"""Who is told what: a bounded overlay of members, and news that runs along a tree inside it.

The overlay is HyParView (Leitão, Pereira, Rodrigues 2007, https://asc.di.fct.unl.pt/~jleitao/pdf/dsn07-leitao.pdf):
a small symmetric *active view* of neighbours to which connections stand, and a *passive view* of members that could be
dialed when a neighbour is lost. Over it runs Plumtree (the same authors, 2007,
https://asc.di.fct.unl.pt/~jleitao/pdf/srds07-leitao.pdf): news is pushed at once to the *eager* neighbours, and the
*lazy* ones are told only that it exists. Whoever is pushed what it holds already prunes that link to lazy; whoever is
told of an item that does not come in time grafts the link back. So what a node spends per item does not grow with the
swarm, and a swarm of up to seven is a full mesh with trees in it.

`shoal.crdt.overlay` keeps the views; the tree is here; `shoal.crdt.gossip_messages` has what goes in and out, which can
be imported from here too.

The core knows items by id and never sees a payload: the shell keeps those, judges what is news, and sends what it still
has. An item has a key; a newer one with the same key replaces an older one that still waits to be sent.

Where this deviates:

- A member with whom a connection stands is taken as a neighbour at once while there is room, and told so; it refuses by
  ``disconnect``. In a small swarm nothing waits for a round trip.
- There is a tree per source (an item names its own) in place of one shared tree: in that, with 128 that send, news took
  twice as long on its way, and everybody's grafts and prunes undid each other's. An item's id stands for its source in
  prunes and grafts.
- A shuffle is exchanged with a neighbour and not walked, so that the answer needs no further connection. What is only
  heard of (shuffles, joins) never displaces what the shell vouches for, for a liar invents members.
- Who makes room for a newcomer names it to whom it drops: that one has room for it now.
- Now and then one neighbour is exchanged for a random other member, so that two halves that were parted, each with full
  views, find each other again, and nobody stays surrounded by liars.
- When a neighbour is lost, the others are asked at once for all that came through it; the next items prune what is too
  much.
- An announced item is asked of whoever broke the fewest promises first, so that a liar that announces what it does not
  have is asked last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from random import Random
from typing import Final, TypeVar

from shoal.crdt.gossip_messages import (
    MAX_HAVE,
    MAX_WANT,
    ContactDown,
    ContactUp,
    Control,
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
)
from shoal.crdt.overlay import Overlay
from shoal.protocol.ids import PeerId

_Key = TypeVar("_Key")

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
        sources: whose trees are known.
        lazy: pairs of a neighbour and a source that are pruned, at this end.
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
    sources: int
    lazy: int
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
    """The link to one neighbour, as the trees see it."""

    __slots__ = (
        "broken",
        "has",
        "have_at",
        "lazy",
        "next_at",
        "num_missing",
        "peer",
        "pruned_at",
        "said_at",
        "unsaid",
        "waiting",
        "wants",
        "wants_at",
    )

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.lazy: set[str] = set()  # sources whose items it is not pushed
        self.next_at = -inf  # no push before
        self.waiting: dict[str, ItemId] | None = None  # for the next push, by key
        self.unsaid: dict[str, Item] = {}  # to be announced to it, by key
        self.have_at = inf  # when it is announced at the latest
        self.said_at = -inf  # when anything was announced
        self.has: set[ItemId] = set()  # what needs not be announced to it any more
        self.num_missing = 0  # items that it announced and that are waited for
        self.broken = 0  # promises, less those that it kept since
        self.pruned_at = -inf
        self.wants = float(MAX_WANT)  # items that it may ask for now
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
        "_first",
        "_flush_at",
        "_have_at",
        "_have_wait_s",
        "_missing",
        "_next",
        "_overlay",
        "_parent",
        "_rng",
        "_seen",
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
        self._overlay = Overlay(me, rng, self._config, self._num_fed)
        self._branches: dict[PeerId, _Branch] = {}
        self._seen: dict[ItemId, str] = {}  # and the source of each
        self._parent: dict[str, _Branch | None] = {}  # by source: whom its newest came from
        self._missing: dict[ItemId, _Missing] = {}
        # Each wait is always as long, so what is due next stands in front.
        self._first: deque[tuple[float, Sequence[ItemId]]] = deque()
        self._next: deque[tuple[float, Sequence[ItemId]]] = deque()
        self._flush_at = inf
        self._have_at = inf
        self._have_wait_s = inf
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
                    self._publish(new, now, outputs)
            case ContactUp(peer):
                self._overlay.up(peer, now, outputs)
                self._regrow(now, outputs)
            case ContactDown(peer):
                self._overlay.down(peer, now, outputs)
                self._regrow(now, outputs)
            case Known(peers):
                self._overlay.known(peers, now, outputs)
                self._regrow(now, outputs)
        self._plan(now, outputs)
        return outputs

    def _plan(self, now: float, outputs: list[Output]) -> None:
        at = self._woken_at
        for due in (self._flush_at, self._have_at, self._overlay.due):
            if due < at:
                at = due
        if self._first and self._first[0][0] < at:
            at = self._first[0][0]
        if self._next and self._next[0][0] < at:
            at = self._next[0][0]
        at = max(at, now)
        if at < self._woken_at:
            self._woken_at = at
            outputs.append(Wake(at))

    @property
    def neighbours(self) -> frozenset[PeerId]:
        """The active view."""
        return frozenset(self._branches)

    def statistics(self) -> GossipStatistics:
        """Counters and sizes."""
        counts = self._counts
        return GossipStatistics(
            neighbours=len(self._branches),
            sources=len(self._parent),
            lazy=sum(len(branch.lazy) for branch in self._branches.values()),
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

    def _publish(self, items: tuple[Item, ...], now: float, outputs: list[Output]) -> None:
        branches = self._branches.values()
        for item in items:
            if all(item.source in branch.lazy for branch in branches):  # pruned by everybody: somebody lies
                for branch in branches:
                    self._set_eager(branch, item.source)
        self._pass_on(items, None, now, outputs)

    def _pushed(
        self, peer: PeerId, fresh: tuple[Item, ...], known: tuple[ItemId, ...], now: float, outputs: list[Output]
    ) -> None:
        branch = self._branches.get(peer)
        if fresh:
            self._counts.fresh += len(fresh)
            if self._missing:
                self._came([item.id for item in fresh if item.id in self._missing])
            if branch is not None:
                for item in fresh:
                    self._set_eager(branch, item.source)
            self._pass_on(fresh, branch, now, outputs)
        if known:
            self._counts.duplicates += len(known)
            if self._missing:
                self._came(known)
            self._prune(branch, known, now, outputs)
        if branch is None:
            self._overlay.strange(peer, now, outputs)
            self._regrow(now, outputs)

    def _prune(self, branch: _Branch | None, known: tuple[ItemId, ...], now: float, outputs: list[Output]) -> None:
        """Take a neighbour out of the trees by which it sent what was held already."""
        pruned = []
        for item_id in known:
            source = self._seen.get(item_id)
            if source is None:
                self._seen[item_id] = ""
                continue
            if branch is None:
                continue
            if source in branch.lazy:
                if now - branch.pruned_at > _PRUNE_AGAIN_S:  # it did not hear it the last time
                    pruned.append(item_id)
            elif any(source not in other.lazy for other in self._branches.values() if other is not branch):
                self._set_lazy(branch, source)  # but the last link into a tree stays
                pruned.append(item_id)
        if branch is not None and pruned:
            branch.pruned_at = now
            outputs += [
                Tell(branch.peer, Control(prune=tuple(pruned[start : start + MAX_WANT])))
                for start in range(0, len(pruned), MAX_WANT)
            ]

    def _pass_on(self, items: tuple[Item, ...], origin: _Branch | None, now: float, outputs: list[Output]) -> None:
        seen, parent = self._seen, self._parent
        for item in items:
            seen[item.id] = item.source
            parent[item.source] = origin
        if len(seen) > self._config.max_seen or len(parent) > self._config.max_sources:
            self._forget()
        if len(items) == 1:
            self._pass_one_on(items[0], origin, now, outputs)
        else:
            self._pass_many_on(items, origin, now, outputs)

    def _pass_one_on(self, item: Item, origin: _Branch | None, now: float, outputs: list[Output]) -> None:
        """As `_pass_many_on`: nearly all that comes, comes alone."""
        source = item.source
        push: tuple[ItemId, ...] = (item.id,)
        for branch in self._branches.values():
            if branch is origin:
                continue
            if source in branch.lazy:
                self._announce_later(branch, (item,), now)
            elif branch.waiting is not None or branch.next_at > now:
                self._wait(branch, (item,))
            else:
                self._push(branch, push, now, outputs)

    def _pass_many_on(self, items: tuple[Item, ...], origin: _Branch | None, now: float, outputs: list[Output]) -> None:
        ids: tuple[ItemId, ...] | None = None
        for branch in self._branches.values():
            if branch is origin:
                continue
            lazy = branch.lazy
            mine = [item for item in items if item.source not in lazy] if lazy else items
            if len(mine) < len(items):
                self._announce_later(branch, [item for item in items if item.source in lazy], now)
            if not mine:
                continue
            if branch.waiting is not None or branch.next_at > now:
                self._wait(branch, mine)
            elif len(mine) < len(items):
                self._push(branch, tuple([item.id for item in mine]), now, outputs)
            else:
                if ids is None:
                    ids = tuple([item.id for item in items])
                self._push(branch, ids, now, outputs)

    def _push(self, branch: _Branch, ids: tuple[ItemId, ...], now: float, outputs: list[Output]) -> None:
        """With what is to be announced to it, so that this needs no message of its own."""
        branch.next_at = now + self._config.flush_gap_s
        outputs.append(Push(branch.peer, ids))
        if branch.unsaid and now >= branch.said_at + self._config.have_gap_s:
            self._announce_to(branch, now, outputs)

    def _forget(self) -> None:
        """Forget the oldest, many at once: looking for the first of a dict passes over all that was deleted."""
        config = self._config
        for item_id in _oldest(self._seen, config.max_seen):
            del self._seen[item_id]
        for source in _oldest(self._parent, config.max_sources):
            del self._parent[source]

    def _wait(self, branch: _Branch, items: Sequence[Item]) -> None:
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

    def _flush(self, now: float, outputs: list[Output]) -> None:
        self._flush_at = inf
        for branch in self._branches.values():
            if branch.waiting is None:
                continue
            if branch.next_at <= now + self._config.flush_gap_s / 4:  # one wake for several
                ids, branch.waiting = tuple(branch.waiting.values()), None
                self._push(branch, ids, now, outputs)
            elif branch.next_at < self._flush_at:
                self._flush_at = branch.next_at

    def _tick(self, now: float, outputs: list[Output]) -> None:
        if self._flush_at <= now:
            self._flush(now, outputs)
        if self._have_at <= now:
            self._announce(now, outputs)
        if self._first or self._next:
            self._ask_for_missing(now, outputs)
        if self._overlay.due <= now:
            self._overlay.upkeep(now, outputs)
            self._regrow(now, outputs)

    # --- announcements -----------------------------------------------------------------------------------------------

    def _announce_later(self, branch: _Branch, items: Sequence[Item], now: float) -> None:
        unsaid = branch.unsaid
        if not unsaid:
            if self._have_at == inf:  # who is earlier than its neighbour spares that one a message
                self._have_wait_s = self._config.have_late_s * self._rng.uniform(0.5, 1)
            branch.have_at = now + self._have_wait_s
            self._have_at = min(self._have_at, branch.have_at)
        for item in items:
            unsaid[item.key] = item
        while len(unsaid) > self._config.max_waiting:
            del unsaid[next(iter(unsaid))]
            self._counts.dropped += 1

    def _announce(self, now: float, outputs: list[Output]) -> None:
        self._have_at = inf
        for branch in self._branches.values():
            if branch.have_at <= now + self._config.have_gap_s:  # one wake for several
                self._announce_to(branch, now, outputs)
            elif branch.have_at < self._have_at:
                self._have_at = branch.have_at

    def _announce_to(self, branch: _Branch, now: float, outputs: list[Output]) -> None:
        lazy, has = branch.lazy, branch.has
        news = tuple([item.id for item in branch.unsaid.values() if item.source in lazy and item.id not in has])
        outputs += [
            Tell(branch.peer, Control(have=news[start : start + MAX_HAVE])) for start in range(0, len(news), MAX_HAVE)
        ]
        branch.said_at, branch.have_at = now, inf
        branch.unsaid.clear()
        has.clear()

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
        for item_id in message.prune:
            source = self._seen.get(item_id)
            if source is not None:
                self._set_lazy(branch, source)
        for item_id in (*message.graft, *message.want):
            self._set_eager(branch, self._seen.get(item_id, ""))
        if message.want:
            self._give(branch, message.want, now, outputs)

    def _heard_of(self, branch: _Branch, have: tuple[ItemId, ...], now: float) -> None:
        if branch.unsaid:
            self._it_has(branch, have)
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

    def _it_has(self, branch: _Branch, ids: Sequence[ItemId]) -> None:
        branch.has.update(ids)
        if len(branch.has) > self._config.max_waiting:
            branch.has.clear()

    def _came(self, ids: Sequence[ItemId]) -> None:
        for item_id in ids:
            entry = self._missing.pop(item_id, None)
            if entry is None:
                continue
            for peer in entry.announcers:
                branch = self._branches.get(peer)
                if branch is not None:
                    branch.num_missing -= 1
                    self._it_has(branch, (item_id,))
            if entry.asked is None:
                continue
            asked = self._branches.get(entry.asked)
            if asked is not None:
                asked.broken //= 2
        for queue in (self._first, self._next):  # nobody is woken for what has come
            while queue and self._missing.keys().isdisjoint(queue[0][1]):
                queue.popleft()

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

    # --- the trees ---------------------------------------------------------------------------------------------------

    def _num_fed(self, peer: PeerId) -> int:
        """Of how many sources this neighbour is the way here."""
        branch = self._branches.get(peer)
        return sum(parent is branch for parent in self._parent.values())

    def _set_lazy(self, branch: _Branch, source: str) -> None:
        if len(branch.lazy) < self._config.max_sources:
            branch.lazy.add(source)
        else:
            self._counts.dropped += 1

    def _set_eager(self, branch: _Branch, source: str) -> None:
        if source not in branch.lazy:
            return
        branch.lazy.remove(source)
        # What was to be announced to it is not any more, so it has to be pushed.
        late = [item for item in branch.unsaid.values() if item.source == source and item.id not in branch.has]
        if late:
            self._wait(branch, late)

    def _regrow(self, now: float, outputs: list[Output]) -> None:
        """Follow the overlay: whom it gained may be the way into all trees; whom it lost may have been."""
        overlay = self._overlay
        if not overlay.gained and not overlay.lost:
            return
        lost = [self._branches.pop(peer) for peer in overlay.lost if peer in self._branches]
        overlay.lost.clear()
        for branch in lost:
            torn = {source for source, parent in self._parent.items() if parent is branch}
            if torn:
                self._graft(torn, now, outputs)
        for peer, is_short in overlay.gained:
            if peer in overlay.neighbours and peer not in self._branches:
                branch = self._branches[peer] = _Branch(peer)
                if not is_short:  # both have their ways into the trees
                    branch.lazy.update(self._parent)
        overlay.gained.clear()

    def _graft(self, torn: set[str], now: float, outputs: list[Output]) -> None:
        """Ask everybody for the items of these sources from now on, and at once for all that was waited for."""
        newest: dict[str, ItemId] = {}
        for item_id in reversed(self._seen):
            source = self._seen[item_id]
            if source in torn and source not in newest:
                newest[source] = item_id
                if len(newest) == len(torn):
                    break
        ids = tuple(newest.values())
        for branch in self._branches.values():
            for source in sorted(torn & branch.lazy):
                self._set_eager(branch, source)
            outputs += [
                Tell(branch.peer, Control(graft=ids[start : start + MAX_WANT]))
                for start in range(0, len(ids), MAX_WANT)
            ]
        for source in sorted(torn):
            self._parent[source] = None
        if self._first:
            self._first = deque((min(now, at), missing) for at, missing in self._first)
            self._ask_for_missing(now, outputs)


def _oldest(memory: Mapping[_Key, object], most: int) -> list[_Key]:
    """What is to be forgotten of a memory in the order of its age, so that it has room for a while."""
    return list(islice(memory, len(memory) - most + most // 8)) if len(memory) > most else []


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
