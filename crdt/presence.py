"""Signed facts that expire: what a peer says of itself now, by topic. Gossiped between members, never stored.

A record belongs to an author and a topic, and replaces what its author said on that topic before. What the topics are,
how large a record of each may be, how fast one author may speak on it and how many of its newest records are kept is
handed in: nothing here knows what the facts mean.

Of two records of one author the newer is the one of the later incarnation (when its process started), and within one
incarnation the one with the greater number, which counts over all topics. Only a record newer than all others of its
author says that the author is alive: from the moment at which it is heard, for `LIFETIMES` times as long as the author
says that it is silent at most. An older record, however often it is replayed, says nothing of that.

A record that comes faster than its topic allows (a token bucket per author and topic) is no news: neither kept nor
passed on, so that a spammer is heard by its neighbours and by nobody else. The cheap questions come first: a record
that was seen is known by its signature, before it is decoded; and no signature is checked of what would be dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS, MAX_PRESENCE_BYTES
from shoal.protocol.signing import Signed, Signer

KIND: Final = "presence/2"

MAX_STAMP: Final = 2**53
"""The latest incarnation, in milliseconds since 1970, and the greatest sequence number."""

MIN_EVERY_S: Final = 0.1
MAX_EVERY_S: Final = 60.0
"""An author that says it may be silent for longer is believed for as long as one that says this."""

LIFETIMES: Final = 3.0

MAX_SEEN: Final = 2048
"""Signatures remembered of records that are held, or were until lately."""

ID_BYTES: Final = 16
"""Of a record's hash, its name among what is gossiped."""

SUBJECT_BYTES: Final = 8
"""Of the hash that stands for an author and a topic where two members compare what they hold."""

Facts = Mapping[str, Any]
"""Plain data; whoever reads a fact checks its form, and changes nothing in it."""


def _worth_nothing(_: Facts) -> int:
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicRule:
    """What is taken on one topic from one author.

    Attributes:
        max_bytes: of one sealed record; `limits.MAX_PRESENCE_BYTES` is a bound for all.
        keep: how many of an author's newest records are held.
        per_s: how many records a second are news in the long run.
        burst: how many may be news at once.
        worth: what an author is worth who says this. In a full table, one who is worth more takes the place of one
            who is worth less.
    """

    max_bytes: int
    keep: int = 1
    per_s: float
    burst: int
    worth: Callable[[Facts], int] = _worth_nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """What one peer says of itself on one topic.

    Attributes:
        swarm: in which it says so.
        author: the peer.
        topic: what it speaks of.
        started_at: its incarnation: Unix milliseconds at the start of its process, by its own clock.
        seq: from 1 in each incarnation, over all topics.
        every_s: seconds within which it will speak again, on any topic.
        facts: plain data.
    """

    swarm: SwarmId
    author: PeerId
    topic: str
    started_at: int
    seq: int
    every_s: float
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        if not 0 <= self.started_at <= MAX_STAMP or not 1 <= self.seq <= MAX_STAMP:
            raise ProtocolError(f"incarnation {self.started_at}, number {self.seq} cannot be of a presence")
        if not self.every_s >= MIN_EVERY_S:
            raise ProtocolError(f"nobody speaks every {self.every_s} s")

    @property
    def stamp(self) -> tuple[int, int]:
        """Greater in the newer of two records of one author."""
        return self.started_at, self.seq

    @property
    def lifetime_s(self) -> float:
        """For how long it is believed from when it was heard."""
        return LIFETIMES * min(self.every_s, MAX_EVERY_S)


@dataclass(frozen=True, slots=True)
class Fresh:
    """News: to be acted and passed on."""

    presence: Presence
    record_hash: bytes


@dataclass(frozen=True, slots=True)
class Known:
    """It was heard before; or it is one of this node's own."""

    record_hash: bytes


@dataclass(frozen=True, slots=True)
class Stale:
    """Older than what is held.

    Attributes:
        record_hash: of the record.
        newest: what is held of its author, newest of all and on its topic: for the author itself, if that sent it,
            since it does not know how it spoke in an earlier life.
    """

    record_hash: bytes
    newest: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class Excess:
    """It came faster than its author may speak on its topic; not kept."""

    record_hash: bytes


@dataclass(frozen=True, slots=True)
class Outdone:
    """A newer record in the name of this node than it has itself spoken.

    It is of an earlier life under a later clock, or of another node with the same key. From now on this node speaks as
    a later incarnation, in which nothing was said yet: `PresenceTable.reannounce`.
    """

    record_hash: bytes


Heard = Fresh | Known | Stale | Excess | Outdone


@dataclass(frozen=True, slots=True)
class Opened:
    """A sealed record that was read, but not checked; with all that follows from the record alone.

    Attributes:
        sealed: the record.
        presence: what it says.
        record_hash: 32 bytes, the name of the sealed record.
        num_bytes: of the sealed record.
        stamp: of the presence.
        item: its name among what is gossiped.
        subject: what stands for its author and topic where two members compare what they hold.
        fresh: what is said of it where it is news.
        known: what is said of it where it was heard before.
    """

    sealed: Signed
    presence: Presence
    record_hash: bytes
    num_bytes: int
    stamp: tuple[int, int]
    item: bytes
    subject: bytes
    fresh: Fresh
    known: Known


def record_hash(sealed: Signed) -> bytes:
    """The 32-byte name of a sealed record: sha256 of its canonical bytes."""
    return hashlib.sha256(encode(sealed)).digest()


def open_record(sealed: Signed) -> Opened:
    """Read a record, without checking its signature. A function of the record alone, so it may be remembered.

    Raises:
        LimitError: if it is too big for any topic.
        ProtocolError: if it is no presence record, or not by the author of the seal.
    """
    if len(sealed.payload) > MAX_PRESENCE_BYTES:
        raise LimitError(f"presence of {sealed.author} exceeds the limit of {MAX_PRESENCE_BYTES} bytes; say less")
    data = encode(sealed)
    presence = decode(Presence, sealed.payload, max_bytes=MAX_PRESENCE_BYTES)
    if presence.author != sealed.author:
        raise ProtocolError(f"{sealed.author} sealed a presence of {presence.author}")
    name = hashlib.sha256(data).digest()
    stamp, item = presence.stamp, name[:ID_BYTES]
    subject = hashlib.sha256(f"{presence.author}/{presence.topic}".encode()).digest()[:SUBJECT_BYTES]
    return Opened(sealed, presence, name, len(data), stamp, item, subject, Fresh(presence, name), Known(name))


@dataclass(slots=True)
class _Spoken:
    """What one author said on one topic, oldest first, and its token bucket."""

    tokens: float
    at: float
    held: list[Opened] = field(default_factory=list)


@dataclass(slots=True)
class _Author:
    """What is held of one peer; who is gone is remembered, so that replayed records stay old."""

    newest: Opened
    expires_at: float = 0.0
    is_live: bool = False
    worth: int = 0  # the most that it said in this life
    spoken: dict[str, _Spoken] = field(default_factory=dict)  # by topic
    facts: dict[str, Facts] = field(default_factory=dict)  # the newest of each topic


class PresenceTable:
    """What the peers of one swarm say. Bounded to `limits.MAX_MEMBERS` peers, this node among them."""

    __slots__ = (
        *(
            "_authors",
            "_by_id",
            "_check",
            "_displaced",
            "_live",
            "_next_expiry",
            "_own",
            "_own_facts",
            "_read",
            "_seen",
            "_seq",
        ),
        *("_started_at", "num_excess", "num_outdone", "own", "swarm", "topics"),
    )

    def __init__(
        self,
        swarm: SwarmId,
        own: PeerId,
        started_at: int,
        topics: Mapping[str, TopicRule],
        *,
        check: Callable[[Signed, str], None] = Signed.check,
        read: Callable[[Signed], Opened] = open_record,
    ) -> None:
        """Start empty.

        Args:
            swarm: whose presence this is.
            own: the peer that announces here.
            started_at: Unix milliseconds now; must grow from one process to the next.
            topics: what may be spoken of; a record on any other topic is refused.
            check: checks a signature, as `Signed.check` does; one that remembers serves a simulation of many nodes.
            read: reads a record, as `open_record` does; likewise.
        """
        self.swarm = swarm
        self.own = own
        self.topics = topics
        self.num_excess = 0
        """Records dropped because they came too fast."""
        self.num_outdone = 0
        """How often this node heard newer records in its own name than it had spoken."""
        self._started_at = started_at
        self._seq = 0
        self._check = check
        self._read = read
        self._own: dict[str, list[Opened]] = {}
        self._own_facts: dict[str, Facts] = {}
        self._authors: dict[PeerId, _Author] = {}
        self._live: dict[PeerId, dict[str, Facts]] = {}
        self._by_id: dict[bytes, Signed] = {}
        self._seen: dict[bytes, Known] = {}  # by signature, what was checked; oldest first
        self._next_expiry = float("inf")  # of nobody who is live before this
        self._displaced: list[PeerId] = []  # who had to make room, and was not told of as gone

    # Speaking.

    def announce(self, signer: Signer, topic: str, facts: Facts, every_s: float) -> Opened:
        """Say something new of oneself; the record is to be gossiped.

        Args:
            signer: of the own key.
            topic: one of the table's.
            facts: plain data.
            every_s: seconds within which this node will speak again.

        Returns:
            The record, as whoever hears it reads it.

        Raises:
            UsageError: if the signer is another, the topic unknown, or the facts are not plain data or too much.
                Nothing was changed.
        """
        if signer.peer_id != self.own:
            raise UsageError(f"only {self.own} announces here, not {signer.peer_id}")
        rule = self.topics.get(topic)
        if rule is None:
            raise UsageError(f"there is no topic {topic!r:.40}; take one of {', '.join(self.topics)}")
        try:
            presence = Presence(
                swarm=self.swarm,
                author=self.own,
                topic=topic,
                started_at=self._started_at,
                seq=self._seq + 1,
                every_s=every_s,
                facts=dict(facts),
            )
            opened = open_record(signer.seal(KIND, encode(presence)))
        except LimitError as error:
            raise TooLargeError(str(error)) from error
        except (TypeError, ValueError, OverflowError, RecursionError, ProtocolError) as error:
            raise UsageError(f"presence can hold only plain data: {error}") from error
        if opened.num_bytes > rule.max_bytes:
            raise TooLargeError(f"{opened.num_bytes} bytes on {topic} exceed the {rule.max_bytes} allowed; say less")
        self._seq += 1
        self._hold(self._own.setdefault(topic, []), opened, rule)
        self._own_facts[topic] = opened.presence.facts
        self._remember(opened)
        return opened

    def reannounce(self, signer: Signer, every_s: float) -> list[Opened]:
        """Say again, as the present incarnation, what holds until it is replaced: all topics of which one is kept."""
        again = {topic: facts for topic, facts in self._own_facts.items() if self.topics[topic].keep == 1}
        return [self.announce(signer, topic, facts, every_s) for topic, facts in again.items()]

    @property
    def incarnation(self) -> int:
        """As which this node speaks now."""
        return self._started_at

    @property
    def own_facts(self) -> Mapping[str, Facts]:
        """What this node said last, by topic."""
        return MappingProxyType(self._own_facts)

    # Hearing.

    def receive(self, sealed: Signed, now: float) -> Heard:
        """Take in a record.

        Raises:
            SignatureError: if its author did not sign it.
            LimitError: if it is too big, or the table is full of live peers.
            ProtocolError: if it is no presence record of this swarm on a topic that is spoken of.
        """
        # A signature fits one payload; with any other it is forged, and dropped as well as what is known.
        seen = self._seen.get(sealed.signature)
        if seen is not None:
            return seen
        opened = self._read(sealed)
        presence = opened.presence
        topic, name, stamp = presence.topic, presence.author, opened.stamp
        rule = self.topics.get(topic)
        if rule is None or opened.num_bytes > rule.max_bytes or presence.swarm != self.swarm:
            raise self._refusal(opened)
        if name == self.own:
            return self._hear_of_self(sealed, opened)
        author = self._authors.get(name)
        if author is None:
            self._check(sealed, KIND)
            self._make_room(rule.worth(presence.facts), now)
            author = self._authors[name] = _Author(opened)
            spoken = author.spoken[topic] = _Spoken(rule.burst, now)
        else:
            spoken = author.spoken.get(topic) or _Spoken(rule.burst, now)
            newest = author.newest.stamp
            if stamp <= newest:
                held = spoken.held
                if any(each.sealed == sealed for each in held):
                    return opened.known
                if self._is_stale(author, held, opened, rule, now):
                    again = {each.record_hash: each.sealed for each in (author.newest, *held[-1:])}
                    return Stale(opened.record_hash, tuple(again.values()))
            tokens = spoken.tokens + (now - spoken.at) * rule.per_s
            if tokens > rule.burst:
                tokens = rule.burst
            if tokens < 1:
                self.num_excess += 1
                return Excess(opened.record_hash)
            self._check(sealed, KIND)
            spoken.tokens, spoken.at = tokens, now
            author.spoken[topic] = spoken
            if stamp[0] > newest[0]:
                self._forget_records(author)
        spoken.tokens -= 1
        self._hold(spoken.held, opened, rule)
        author.facts[topic] = spoken.held[-1].presence.facts
        worth = rule.worth(presence.facts)
        if worth > author.worth:
            author.worth = worth
        self._remember(opened)
        if stamp >= author.newest.stamp:
            author.newest = opened
            author.expires_at = expires_at = now + presence.lifetime_s
            author.is_live = True
            self._live[name] = author.facts
            if expires_at < self._next_expiry:
                self._next_expiry = expires_at
        return opened.fresh

    def _refusal(self, opened: Opened) -> ProtocolError:
        """Why a record is no record of this table."""
        presence = opened.presence
        if presence.swarm != self.swarm:
            return ProtocolError(f"presence of {presence.author} belongs to swarm {presence.swarm}, not {self.swarm}")
        rule = self.topics.get(presence.topic)
        if rule is None:
            return ProtocolError(f"{presence.author} speaks on {presence.topic!r:.40}, of which nothing is known here")
        return LimitError(
            f"presence of {presence.author} on {presence.topic} exceeds the limit of {rule.max_bytes} bytes"
        )

    def _hear_of_self(self, sealed: Signed, opened: Opened) -> Heard:
        if opened.stamp <= (self._started_at, self._seq):
            return opened.known
        self._check(sealed, KIND)
        # Our clock was set back since an earlier process; outdo it, or nobody would believe us.
        self._started_at = min(opened.presence.started_at + 1, MAX_STAMP)
        self._seq = 0
        self.num_outdone += 1
        return Outdone(opened.record_hash)

    @staticmethod
    def _is_stale(author: _Author, held: list[Opened], opened: Opened, rule: TopicRule, now: float) -> bool:
        """Whether a record that is not the newest of its author counts for nothing."""
        if opened.stamp[0] < author.newest.stamp[0] or not author.is_live or now >= author.expires_at:
            return True
        # It was overtaken on its way; it counts if it is one of the newest of its topic nevertheless.
        stamps = [each.stamp for each in held]
        return opened.stamp in stamps or (len(stamps) >= rule.keep and opened.stamp < stamps[0])

    def _hold(self, held: list[Opened], opened: Opened, rule: TopicRule) -> None:
        held.append(opened)
        if len(held) > 1 and held[-2].stamp > opened.stamp:
            held.sort(key=lambda each: each.stamp)
        by_id = self._by_id
        by_id[opened.item] = opened.sealed
        while len(held) > rule.keep:
            by_id.pop(held.pop(0).item, None)

    def _remember(self, opened: Opened) -> None:
        seen = self._seen
        seen[opened.sealed.signature] = opened.known
        if len(seen) > MAX_SEEN:  # many at once: looking for the first of a dict passes over all that was deleted
            for signature in list(islice(seen, 1 + MAX_SEEN // 8)):
                del seen[signature]

    def _forget_records(self, author: _Author) -> None:
        """What was said in an earlier life; how fast it was said still counts."""
        for spoken in author.spoken.values():
            for opened in spoken.held:
                self._by_id.pop(opened.item, None)
            spoken.held.clear()
        author.facts = {}
        author.worth = 0

    # Who is there.

    def live(self, now: float) -> Mapping[PeerId, Mapping[str, Facts]]:
        """Who else is there, and what each said last, by topic. Not a copy: it changes as records come and expire."""
        if now >= self._next_expiry:
            return {peer: facts for peer, facts in self._live.items() if now < self._authors[peer].expires_at}
        return MappingProxyType(self._live)

    def knows(self, peer: PeerId) -> bool:
        """Whether something by this other peer is held, though it may be gone."""
        return peer in self._authors

    def statements(self, author: PeerId, topic: str) -> list[tuple[Facts, bytes]]:
        """What is held of a live author on a topic, oldest first: the facts, and the record's hash."""
        if author == self.own:
            held = self._own.get(topic, [])
        else:
            spoken = self._authors[author].spoken.get(topic) if author in self._live else None
            held = [] if spoken is None else spoken.held
        return [(each.presence.facts, each.record_hash) for each in held]

    def drop(self, peer: PeerId) -> bool:
        """No longer take a peer as there, until a newer record of it is heard; whether it was there."""
        author = self._authors.get(peer)
        if author is None or not author.is_live:
            return False
        author.is_live = False
        del self._live[peer]
        return True

    def expire(self, now: float) -> list[PeerId]:
        """Whom nothing was heard of for too long, each told once."""
        if now < self._next_expiry and not self._displaced:
            return []
        gone = sorted(peer for peer in self._live if self._authors[peer].expires_at <= now)
        for peer in gone:
            self.drop(peer)
        if self._displaced:
            gone = list(dict.fromkeys((*gone, *(peer for peer in self._displaced if peer not in self._live))))
            self._displaced.clear()
        self._next_expiry = min((self._authors[peer].expires_at for peer in self._live), default=float("inf"))
        return gone

    def next_expiry(self) -> float | None:
        """When to call `expire` next; it may turn out that nobody is gone then."""
        return self._next_expiry if self._live else None

    # What is gossiped.

    def held(self, *, with_gone: bool = True) -> list[Opened]:
        """Every record held, this node's first; without those who are gone, it is what a newcomer should hear."""
        everybody = list(self._own.values())
        for peer in sorted(self._authors if with_gone else self._live):
            everybody += [spoken.held for spoken in self._authors[peer].spoken.values()]
        return [opened for held in everybody for opened in held]

    def find(self, item: bytes) -> Signed | None:
        """A held record by the first `ID_BYTES` of its hash."""
        return self._by_id.get(item)

    def key_of(self, presence: Presence) -> str:
        """What a record replaces where it waits to be sent: older ones with the same key are not worth sending."""
        if self.topics[presence.topic].keep == 1:
            return f"{presence.author}/{presence.topic}"
        return f"{presence.author}/{presence.topic}/{presence.seq}"

    def _make_room(self, worth: int, now: float) -> None:
        """For one more author: of one who is gone, or of one who is worth less."""
        authors = self._authors
        if len(authors) < MAX_MEMBERS - 1:
            return
        may_have_gone = len(self._live) < len(authors) or now >= self._next_expiry
        if not may_have_gone and worth <= 0:
            raise self._is_full()
        _, _, _, peer = min(
            (author.is_live and author.expires_at > now, author.worth, author.expires_at, peer)
            for peer, author in authors.items()
        )
        author = authors[peer]
        if author.is_live and author.expires_at > now and author.worth >= worth:
            self._next_expiry = min(each.expires_at for each in authors.values())
            raise self._is_full()
        if author.is_live:
            self._displaced.append(peer)
            del self._live[peer]
        self._forget_records(author)
        del authors[peer]

    def _is_full(self) -> LimitError:
        return LimitError(f"{self.swarm} has {MAX_MEMBERS} live peers already; one more is not listened to")
