"""Signed facts that expire: what a peer is doing now. Pushed between members, never stored.

A record is newer than another of its author if its incarnation (when its process started) is, or within one
incarnation its sequence number. Only a newer record says that a peer is alive, from the moment at which it is heard;
an older one, however often it is replayed, says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS, MAX_PRESENCE_BYTES
from shoal.protocol.signing import Signed, Signer

KIND: Final = "presence/1"

MAX_STAMP: Final = 2**53
"""The latest incarnation, in milliseconds since 1970, and the greatest sequence number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """What one peer says of itself.

    Attributes:
        swarm: in which it says so.
        author: the peer.
        started_at: its incarnation: Unix milliseconds at the start of its process, by its own clock.
        seq: from 1 in each incarnation.
        facts: plain data; see `docs/architecture.md`. Whoever reads a fact checks its form.
    """

    swarm: SwarmId
    author: PeerId
    started_at: int
    seq: int
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        if not 0 <= self.started_at <= MAX_STAMP or not 1 <= self.seq <= MAX_STAMP:
            raise ProtocolError(f"incarnation {self.started_at}, number {self.seq} cannot be of a presence")

    @property
    def stamp(self) -> tuple[int, int]:
        """Greater in the newer of two records of one author."""
        return self.started_at, self.seq


@dataclass(slots=True)
class _Entry:
    presence: Presence
    sealed: Signed
    expires_at: float
    is_live: bool


class PresenceTable:
    """The newest record of every peer of one swarm. Bounded to `limits.MAX_MEMBERS` peers."""

    __slots__ = ("_entries", "_own_sealed", "_started_at", "own", "own_presence", "swarm", "ttl_s")

    def __init__(self, swarm: SwarmId, own: PeerId, started_at: int, ttl_s: float = 3.0) -> None:
        """Start empty.

        Args:
            swarm: whose presence this is.
            own: the peer that announces here.
            started_at: Unix milliseconds now; must grow from one process to the next.
            ttl_s: seconds for which a record that was heard is believed.
        """
        self.swarm = swarm
        self.own = own
        self.ttl_s = ttl_s
        self.own_presence: Presence | None = None
        """What was announced last."""
        self._own_sealed: Signed | None = None
        self._started_at = started_at
        self._entries: dict[PeerId, _Entry] = {}

    def announce(self, signer: Signer, facts: dict[str, Any]) -> Signed:
        """Say something new of oneself; the record is to be pushed to the other members.

        Raises:
            UsageError: if the signer is another, or the facts are not plain data.
            TooLargeError: if they are too much.
        """
        if signer.peer_id != self.own:
            raise UsageError(f"only {self.own} announces here, not {signer.peer_id}")
        last = self.own_presence
        seq = last.seq + 1 if last is not None and last.started_at == self._started_at else 1
        presence = Presence(swarm=self.swarm, author=self.own, started_at=self._started_at, seq=seq, facts=facts)
        try:
            sealed = signer.seal(KIND, encode(presence))
            presence = _open(sealed)
        except LimitError as error:
            raise TooLargeError(str(error)) from error
        except (TypeError, ValueError, OverflowError, RecursionError, ProtocolError) as error:
            raise UsageError(f"presence can hold only plain data: {error}") from error
        self.own_presence, self._own_sealed = presence, sealed
        return sealed

    def receive(self, sealed: Signed, now: float) -> Presence | None:
        """Take in a record.

        Returns:
            What it says, to be acted and passed on; None if it is no news.

        Raises:
            SignatureError: if its author did not sign it.
            LimitError: if it is too big, or the table is full of live peers.
            ProtocolError: if it is no presence record of this swarm.
        """
        presence = _open(sealed)
        if presence.swarm != self.swarm:
            raise ProtocolError(f"presence of {presence.author} belongs to swarm {presence.swarm}, not {self.swarm}")
        entry = self._entries.get(presence.author)
        if entry is not None and presence.stamp <= entry.presence.stamp:
            return None
        sealed.check(KIND)
        if presence.author == self.own:
            # Our clock was set back since an earlier process; outdo it, or nobody would believe us.
            if presence.started_at > self._started_at:
                self._started_at = min(presence.started_at + 1, MAX_STAMP)
            return None
        if entry is None:
            self._make_room(now)
        self._entries[presence.author] = _Entry(presence, sealed, now + self.ttl_s, is_live=True)
        return presence

    def live(self, now: float) -> dict[PeerId, Presence]:
        """Who is there, in order, and what it says; this node too, once it announced itself."""
        found = {author: entry.presence for author, entry in self._entries.items() if self._is_live(entry, now)}
        if self.own_presence is not None:
            found[self.own] = self.own_presence
        return dict(sorted(found.items()))

    def drop(self, peer: PeerId) -> bool:
        """No longer take a peer as there, until a newer record of it is heard; whether it was there."""
        entry = self._entries.get(peer)
        if entry is None or not entry.is_live:
            return False
        entry.is_live = False
        return True

    def expire(self, now: float) -> list[PeerId]:
        """Whom nothing was heard of for too long, each told once."""
        gone = [peer for peer, entry in self._entries.items() if entry.is_live and entry.expires_at <= now]
        for peer in gone:
            self._entries[peer].is_live = False
        return sorted(gone)

    def next_expiry(self) -> float | None:
        """When to call `expire` next."""
        return min((entry.expires_at for entry in self._entries.values() if entry.is_live), default=None)

    def newest(self) -> list[Signed]:
        """The records of all who are there, this node first: what a newcomer should hear."""
        own = [] if self._own_sealed is None else [self._own_sealed]
        return own + [entry.sealed for _, entry in sorted(self._entries.items()) if entry.is_live]

    @staticmethod
    def _is_live(entry: _Entry, now: float) -> bool:
        return entry.is_live and now < entry.expires_at

    def _make_room(self, now: float) -> None:
        if len(self._entries) < MAX_MEMBERS - 1:
            return
        # Who is gone is remembered, so that replayed records stay old; the longest gone is forgotten first.
        gone = [(entry.expires_at, peer) for peer, entry in self._entries.items() if not self._is_live(entry, now)]
        if not gone:
            raise LimitError(f"{self.swarm} has {MAX_MEMBERS} live peers already; one more is not listened to")
        del self._entries[min(gone)[1]]


def _open(sealed: Signed) -> Presence:
    if len(sealed.payload) > MAX_PRESENCE_BYTES or len(encode(sealed)) > MAX_PRESENCE_BYTES:
        raise LimitError(f"presence of {sealed.author} exceeds the limit of {MAX_PRESENCE_BYTES} bytes; say less")
    presence = decode(Presence, sealed.payload, max_bytes=MAX_PRESENCE_BYTES)
    if presence.author != sealed.author:
        raise ProtocolError(f"{sealed.author} sealed a presence of {presence.author}")
    return presence
