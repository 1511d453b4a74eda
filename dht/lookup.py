"""One look-up: whom to ask next for the peers nearest to a key, until they are found.

Iterative as in Kademlia, on `PATHS` paths that have no peer in common (S/Kademlia, Baumgart and Mies, 2007): what a
peer answers leads on only the path that asked it, so that a liar bends one path and the others go by. Each path asks
`ALPHA` at a time. Three rules keep it fast where many are gone or lie:

- Whoever does not answer within `patience_s` is no longer waited for: another is asked in its place. Its answer counts
  if it comes after all.
- Whoever named `MAX_BLAMED` peers that did not answer by then, and more such than others, is not believed: what only
  such peers named is left out.
- Of an answer, the nearest `K` count.

It ends when on every path the `width` nearest that are left have answered, or are not waited for any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Final

from shoal.dht.keyspace import Key, key_of_peer
from shoal.dht.routing import Contact, K, usable
from shoal.protocol.ids import PeerId

PATHS: Final = 3
ALPHA: Final = 3
"""Questions of one path under way, beside those not waited for."""
MAX_ASKED: Final = 120
"""Peers that one look-up asks at most, so that none leads it around for ever."""
MAX_BLAMED: Final = 3


class _State(Enum):
    NEW = auto()
    ASKED = auto()
    SLOW = auto()
    ANSWERED = auto()
    FAILED = auto()


class _Candidate:
    """A peer that may be near."""

    __slots__ = ("asked_at", "contact", "distance", "path", "referrers", "state")

    def __init__(self, contact: Contact, distance: int) -> None:
        self.contact = contact
        self.distance = distance
        self.state = _State.NEW
        self.asked_at = 0.0
        self.path: int | None = None  # that asked it
        self.referrers: set[PeerId] = set()


class Lookup:
    """One of them.

    Args:
        target: the key.
        seeds: contacts to begin with.
        me: who is never asked.
        patience_s: how long a peer is waited for before another one is asked too.
        paths: without peers in common.
        width: how many of the nearest are to answer.
    """

    def __init__(
        self, target: Key, seeds: Iterable[Contact], me: PeerId, patience_s: float, paths: int = PATHS, width: int = K
    ) -> None:
        self.target = target
        self.num_asked = 0
        self._me = me
        self._width = width
        self._patience_s = patience_s
        self._candidates: dict[PeerId, _Candidate] = {}
        self._blame: dict[PeerId, list[int]] = {}  # of who named others: how many answered, and how many did not
        self._paths: list[list[_Candidate]] = [[] for _ in range(paths)]  # each sorted by distance
        for number, contact in enumerate(seeds):
            self._learn(number % paths, contact, None)
        self._sort()

    @property
    def wake_at(self) -> float | None:
        """When to call `next` again if nothing comes before; None if nothing is waited for."""
        asked = [each.asked_at for each in self._candidates.values() if each.state is _State.ASKED]
        return min(asked) + self._patience_s if asked else None

    @property
    def is_over(self) -> bool:
        """Whether nobody is to be asked or waited for any more; ask `next` before."""
        return not any(each.state is _State.ASKED for each in self._candidates.values())

    def next(self, now: float) -> list[Contact]:
        """Whom to ask now."""
        found: list[Contact] = []
        busy = [0] * len(self._paths)
        for each in self._candidates.values():
            if each.state is _State.ASKED:
                if now >= each.asked_at + self._patience_s:
                    each.state = _State.SLOW
                    self._note(each, answered=False)
                elif each.path is not None:
                    busy[each.path] += 1
        for number, path in enumerate(self._paths):
            room = ALPHA - busy[number]
            for each in self._frontier(path):
                if room <= 0 or self.num_asked >= MAX_ASKED:
                    break
                each.state, each.asked_at, each.path = _State.ASKED, now, number
                self.num_asked += 1
                room -= 1
                found.append(each.contact)
        return found

    def answered(self, peer: PeerId, contacts: Sequence[Contact]) -> None:
        """A peer answered, with contacts that it says are near."""
        each = self._candidates.get(peer)
        if each is None or each.path is None or each.state is _State.ANSWERED:
            return
        if each.state is _State.SLOW:
            self._note(each, answered=False, times=-1)
        each.state = _State.ANSWERED
        self._note(each, answered=True)
        near = sorted(contacts, key=lambda contact: key_of_peer(contact.peer) ^ self.target)
        for contact in near[:K]:
            if (known := usable(contact)) is not None:
                self._learn(each.path, known, peer)
        self._paths[each.path].sort(key=_distance)

    def failed(self, peer: PeerId) -> None:
        """A peer cannot be reached, or does not answer."""
        each = self._candidates.get(peer)
        if each is None or each.state in (_State.ANSWERED, _State.FAILED):
            return
        if each.state is not _State.SLOW:
            self._note(each, answered=False)
        each.state = _State.FAILED

    def _note(self, each: _Candidate, *, answered: bool, times: int = 1) -> None:
        """What comes of a peer says something of those who named it."""
        for referrer in each.referrers:
            self._blame[referrer][0 if answered else 1] += times

    def closest(self, count: int = K) -> list[Contact]:
        """Those that answered, the nearest first."""
        found = [each for each in self._candidates.values() if each.state is _State.ANSWERED]
        return [each.contact for each in sorted(found, key=_distance)[:count]]

    def _frontier(self, path: list[_Candidate]) -> list[_Candidate]:
        """Those of the `K` nearest of a path that were not asked, the nearest first."""
        found: list[_Candidate] = []
        seen = 0
        for each in path:
            if seen >= self._width:
                break
            if each.state is _State.FAILED or each.state is _State.SLOW:
                continue
            if each.state is _State.NEW:
                if self._is_disbelieved(each):
                    continue
                found.append(each)
            seen += 1
        return found

    def _is_disbelieved(self, each: _Candidate) -> bool:
        if not each.referrers:
            return False
        for referrer in each.referrers:
            good, bad = self._blame[referrer]
            if bad < MAX_BLAMED or bad <= good:
                return False
        return True

    def _learn(self, path: int, contact: Contact, referrer: PeerId | None) -> None:
        if contact.peer == self._me:
            return
        each = self._candidates.get(contact.peer)
        if each is None:
            each = self._candidates[contact.peer] = _Candidate(contact, key_of_peer(contact.peer) ^ self.target)
        is_open = each.state in (_State.NEW, _State.ASKED)
        if referrer is not None and is_open and len(each.referrers) < K:
            each.referrers.add(referrer)
            self._blame.setdefault(referrer, [0, 0])
        if each not in self._paths[path]:
            self._paths[path].append(each)

    def _sort(self) -> None:
        for path in self._paths:
            path.sort(key=_distance)


def _distance(each: _Candidate) -> int:
    return each.distance
