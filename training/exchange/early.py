"""What members said of rounds that this node is not in yet; nobody can push out what others said."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import Final

from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.training.run_events import Heard
from shoal.training.statements import Offer, Proposal, RoundKey, Vote

MAX_EARLY: Final = 64
"""Statements of one member, the newest."""


class Early:
    """Statements by author; at most `MAX_EARLY` of each of `MAX_MEMBERS`."""

    __slots__ = ("_by_author", "_live")

    def __init__(self, live: Container[PeerId]) -> None:
        """Start with none; ``live`` are the members that are there, a view that stays up to date."""
        self._by_author: dict[PeerId, deque[Heard]] = {}
        self._live = live

    def keep(self, event: Heard) -> None:
        """For later."""
        waiting = self._by_author.get(event.author)
        if waiting is None:
            if len(self._by_author) >= MAX_MEMBERS:
                gone = (each for each in self._by_author if each not in self._live)
                del self._by_author[next(gone, next(iter(self._by_author)))]
            waiting = self._by_author[event.author] = deque(maxlen=MAX_EARLY)
        waiting.append(event)

    def of(self, key: RoundKey) -> list[Heard]:
        """What was said of this round, in the order of the authors' first words."""
        return [
            event
            for waiting in self._by_author.values()
            for event in waiting
            if isinstance(event.statement, Offer | Proposal | Vote) and event.statement.key == key
        ]
