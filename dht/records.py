"""What the distributed hash table keeps: signed statements about a topic, each of a kind that says what is in it.

A record is signed by its author, numbered by it and expires. Of the records of one author about one thing (its *slot*)
the highest number wins, then the later expiry: so an old record never comes back, whoever repeats it. Two records with
one number that say different things are a *fork*: proof that their author said both. All nodes then keep the one with
the lower hash, and whoever asks is shown both.

Kinds differ in who may write at a key. At that of an *owned* kind only one author can; at others everybody may, so that
what is found there is a claim of its author and no more. Some are taken only from their author itself: who holds
something, and where a peer is, is said by whoever is there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

from shoal.dht.keyspace import Key, key_of_topic
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import SIGNATURE_BYTES, Signed, Signer

MAX_RECORD_BYTES: Final = 4096
MAX_TOPIC_CHARS: Final = 96
MAX_ADDRESSES: Final = 8
MAX_ADDRESS_CHARS: Final = 256
MAX_TAGS: Final = 8
MAX_EARLIER: Final = 32
"""Earlier versions of a model that its record names."""
MAX_TEXT_CHARS: Final = 200
SKEW_S: Final = 600.0
"""By how much clocks may differ."""
HOUR_S: Final = 3600.0
_SIGNED_KIND: Final = "dht-record"


class Kind(StrEnum):
    """What a record is about."""

    PROVIDER = "provider"
    """The author holds the content that is the topic."""
    MEMBER = "member"
    """The author is in the swarm that is the topic."""
    PEER = "peer"
    """The author is at these addresses."""
    MODEL = "model"
    """The newest version of the author's model, whose name is the topic."""
    TAG = "tag"
    """The author's model that is the item has the tag, or does the task, that is the topic."""
    PROFILE = "profile"
    """The author wants to be called what the topic says."""


class Rule(NamedTuple):
    """How a kind is kept.

    Attributes:
        is_owned: whether each key of it belongs to one author.
        is_own_only: whether only the author itself may hand it to others to keep.
        lifetime_s: how long it lives at most, and does by default.
        body: what it says.
    """

    is_owned: bool
    is_own_only: bool
    lifetime_s: float
    body: type[Any]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the author is: full multiaddrs."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model. Its number is the record's.

    Attributes:
        manifest: of the content.
        num_bytes: of the content.
        tags: words to find it by.
        task: that it was trained for, by name; empty if there is none.
        earlier: manifests of the versions before it, the newest first.
    """

    manifest: Cid
    num_bytes: int
    tags: tuple[str, ...] = ()
    task: str = ""
    earlier: tuple[Cid, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """Who the author is, in its own words."""

    about: str = ""


_DAY_S: Final = 24 * HOUR_S
RULES: Final[dict[Kind, Rule]] = {
    Kind.PROVIDER: Rule(False, True, HOUR_S, Addresses),
    Kind.MEMBER: Rule(False, True, HOUR_S, Addresses),
    Kind.PEER: Rule(True, True, HOUR_S, Addresses),
    Kind.MODEL: Rule(True, False, 30 * _DAY_S, Model),
    Kind.TAG: Rule(False, False, 30 * _DAY_S, Model),
    Kind.PROFILE: Rule(False, False, 30 * _DAY_S, Profile),
}


@dataclass(frozen=True, slots=True)
class Statement:
    """What is signed.

    Attributes:
        kind: of the record.
        topic: what it is about; with the kind, and the author if it is owned, it makes the key.
        item: which of several things the author says about the topic.
        seq: its number; of a later one about the same thing it is higher.
        expires_at: Unix seconds.
        body: as its kind says, encoded.
    """

    kind: Kind
    topic: str
    item: str
    seq: int
    expires_at: int
    body: bytes


class Slot(NamedTuple):
    """What only one record can be about."""

    kind: Kind
    topic: str
    author: PeerId
    item: str


@dataclass(frozen=True, slots=True)
class Record:
    """A record that was checked. Made by `open_record`."""

    signed: Signed
    statement: Statement
    body: Any
    key: Key
    digest: bytes

    @property
    def author(self) -> PeerId:
        """Who says it."""
        return self.signed.author

    @property
    def slot(self) -> Slot:
        """What it is about."""
        return Slot(self.statement.kind, self.statement.topic, self.author, self.statement.item)

    def is_current(self, now: float) -> bool:
        """Whether it lives, and for no longer than its kind may. ``now`` is in Unix seconds."""
        left_s = self.statement.expires_at - now
        return 0 < left_s <= RULES[self.statement.kind].lifetime_s + SKEW_S

    def beats(self, other: Record) -> bool:
        """Whether it is to be kept in place of another one of its slot."""
        mine, theirs = self.statement, other.statement
        if mine.seq != theirs.seq:
            return mine.seq > theirs.seq
        if mine.body != theirs.body:
            return self.digest < other.digest
        return mine.expires_at > theirs.expires_at

    def contradicts(self, other: Record) -> bool:
        """Whether both together prove that their author said two things of one version."""
        if self.slot != other.slot:
            return False
        if self.statement.seq == other.statement.seq:
            return self.statement.body != other.statement.body
        if self.statement.kind is not Kind.MODEL:
            return False
        said, retold = _versions(self), _versions(other)
        return any(said[version] != retold[version] for version in said.keys() & retold.keys())


def _versions(record: Record) -> dict[int, Cid]:
    body: Model = record.body
    newest = record.statement.seq
    return {newest: body.manifest} | {newest - back: cid for back, cid in enumerate(body.earlier, start=1)}


def key_of(kind: Kind, topic: str, owner: PeerId | None = None) -> Key:
    """Where records about a topic are kept.

    Args:
        kind: of the records.
        topic: that they are about.
        owner: their author, if the kind is owned.
    """
    if RULES[kind].is_owned != (owner is not None):
        raise UsageError(f"a key of {kind} records is made {'with' if RULES[kind].is_owned else 'without'} their owner")
    return key_of_topic(kind, topic, owner)


def sign_record(
    signer: Signer, kind: Kind, topic: str, body: Addresses | Model | Profile, *, seq: int, now: float, item: str = ""
) -> Record:
    """A new record by this node, which lives as long as its kind may.

    Args:
        signer: in whose name.
        kind: of the record.
        topic: that it is about.
        body: what it says; of the type that its kind has.
        seq: its number.
        now: Unix seconds.
        item: which of several things about the topic.

    Raises:
        ProtocolError: if nobody would take it.
    """
    statement = Statement(kind, topic, item, seq, int(now + RULES[kind].lifetime_s), encode(body))
    return open_record(signer.seal(_SIGNED_KIND, encode(statement)))


def open_record(signed: Signed) -> Record:
    """Check a record that came from anywhere; whether it lives still, says `Record.is_current`.

    Raises:
        SignatureError: if its author did not sign it.
        ProtocolError: if it is malformed or too large.
    """
    try:
        return _checked(signed)
    except UsageError as error:  # of a CID or a name in it
        raise ProtocolError(f"a malformed record: {error}") from error


@lru_cache(maxsize=2048)
def _checked(signed: Signed) -> Record:
    if len(signed.payload) > MAX_RECORD_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        raise LimitError(f"a record has at most {MAX_RECORD_BYTES} bytes and a signature of {SIGNATURE_BYTES}")
    statement = decode(Statement, signed.payload)
    if encode(statement) != signed.payload:
        raise ProtocolError("a record is not written in its one canonical form")
    if max(len(statement.topic), len(statement.item)) > MAX_TOPIC_CHARS or not 0 <= statement.seq < 2**63:
        raise LimitError("a record's topic or item is too long, or its number is none")
    rule = RULES[statement.kind]
    body = decode(rule.body, statement.body, max_bytes=MAX_RECORD_BYTES)
    _check_body(body)
    signed.check(_SIGNED_KIND)
    owner = signed.author if rule.is_owned else None
    key = key_of_topic(statement.kind, statement.topic, owner)
    return Record(signed, statement, body, key, hashlib.sha256(signed.payload).digest())


def _check_body(body: object) -> None:
    match body:
        case Addresses(addresses):
            if not 0 < len(addresses) <= MAX_ADDRESSES:
                raise LimitError(f"a record names 1 to {MAX_ADDRESSES} addresses, not {len(addresses)}")
            texts: tuple[str, ...] = addresses
            longest = MAX_ADDRESS_CHARS
        case Model(_, num_bytes, tags, task, earlier):
            if num_bytes < 0 or len(tags) > MAX_TAGS or len(earlier) > MAX_EARLIER:
                raise LimitError(f"a model has at most {MAX_TAGS} tags and names {MAX_EARLIER} earlier versions")
            texts, longest = (*tags, task), MAX_TOPIC_CHARS
        case Profile(about):
            texts, longest = (about,), MAX_TEXT_CHARS
        case _:
            raise ProtocolError(f"{type(body).__name__} is in no record")
    for text in texts:
        if len(text) > longest or not (text.isprintable()):
            raise LimitError(f"{text[:40]!r} in a record is longer than {longest} characters, or cannot be printed")
