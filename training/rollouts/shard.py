"""A rollout shard: what one actor did under one policy version, in columns, signed, and named by its bytes.

======  ============================================================================================================
bytes   what
======  ============================================================================================================
4       ``shd`` and the form's number
4       how long the next is, little-endian
n       the `Head` in canonical MessagePack, its author and signature (`shoal.protocol.signing.Signed`)
rest    the body: all columns, compressed (`shoal.training.rollouts.packed`)
======  ============================================================================================================

The head says whose shard it is, of which swarm, policy and version, what columns there are and how long, and the hash
of the compressed body. So a head alone says what a shard costs to take, a signed head proves what its author claimed,
and nothing is decompressed that its author did not sign. A shard is a content like any other: it is fetched by the CID
of all its bytes (`shoal.dht.blocks.name`).

What chance a shard has was not its author's to choose: seeds of environments and of actions follow from the swarm, the
author, the policy and the shard's place in the author's stream of shards (`seeds_of`, `noise_seed`). So whoever has the
policy can have the shard again from its head alone, up to rounding; and a shard that is signed again under another name
has the wrong seeds. What is in columns, of rows of environments and of takes of plays, is said in
`shoal.training.rollouts.rows` and `shoal.training.rollouts.takes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from shoal.dht import blocks
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, UnknownFieldError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer
from shoal.training.rollouts.packed import (
    Array,
    Column,
    Columns,
    body_bytes,
    check_room,
    describe,
    read_body,
    write_body,
)
from shoal.training.statements import HASH_BYTES, MAX_EPOCH

KIND: Final = "shard/1"
"""What is signed is of this kind."""
FORM: Final = b"shd\x01"
_LENGTH_BYTES: Final = 4
MAX_HEAD_BYTES: Final = 16 * 1024
"""Of a head with its signature."""
MAX_SHARD_BYTES: Final = 32 * 1024 * 1024
"""As it is sent."""
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""Unpacked."""
MAX_SAMPLES: Final = 2**20
"""Of one shard: environment steps, or acts."""
MAX_STREAM: Final = 2**32
MAX_NUMBER: Final = 2**16
"""Shards of one stream."""
MAX_TEXT: Final = 120
PRINT_BYTES: Final = 16


class ShardKind(StrEnum):
    """What a shard's columns are of."""

    ROWS = "rows"
    TAKES = "takes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is signed of a shard.

    Attributes:
        kind: of its columns.
        swarm: whose run it is for.
        task: the manifest's.
        policy: which of the run's policies acted; empty, where there is one.
        version: its epoch.
        state: names the bytes of that policy; with it, the log-probabilities are what they are.
        copy: digest of the acting copy (`patches.digest_of`); who was given a wrong one is no liar. Empty: not said.
        stream: the author's number of the stream of shards that this one belongs to.
        number: of the shard within the stream.
        before: the shard that comes before it in the stream; None for the first.
        samples: environment steps, or acts, that can be learned from.
        surroundings: says by what arithmetic and which version of the task it was made
            (`shoal.training.rollouts.checking.surroundings`); who has others cannot replay it exactly.
        columns: in the order of their names.
        digest: SHA-256 of the compressed body.
    """

    kind: ShardKind
    swarm: SwarmId
    task: str
    policy: str = ""
    version: int
    state: Cid
    stream: int
    number: int
    before: Cid | None = None
    samples: int
    surroundings: bytes
    columns: tuple[Column, ...] = ()
    digest: bytes = bytes(HASH_BYTES)
    copy: bytes = b""

    def __post_init__(self) -> None:
        for noun, value, most in (
            ("version", self.version, MAX_EPOCH),
            ("stream", self.stream, MAX_STREAM),
            ("number", self.number, MAX_NUMBER),
        ):
            if not 0 <= value <= most:
                raise ProtocolError(f"a shard's {noun} is 0 to {most}, not {value:.30g}; refuse it")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise LimitError(f"a shard has 1 to {MAX_SAMPLES} samples, not {self.samples:.30g}; make several")
        if not all(len(text) <= MAX_TEXT and text.isprintable() for text in (self.task, self.policy)):
            raise ProtocolError(f"a shard's task and policy have at most {MAX_TEXT} printable characters; refuse it")
        if len(self.digest) != HASH_BYTES or len(self.surroundings) != PRINT_BYTES:
            raise ProtocolError("a shard's digest or its surroundings are of another length than hashes are; refuse it")
        if (self.before is None) != (self.number == 0):
            raise ProtocolError("the first shard of a stream follows none, and all others one; refuse it")
        if body_bytes(self.columns) > MAX_BODY_BYTES:
            raise LimitError(f"a shard takes at most {MAX_BODY_BYTES} bytes unpacked; make several")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shard stands: two shards of one author in one place are two histories of one stream.

    Attributes:
        author: whose.
        policy: which of the run's policies.
        stream: of the author's.
        number: within the stream.
    """

    author: PeerId
    policy: str
    stream: int
    number: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard whose signature, name and form were checked. Whether it is true is another question.

    Attributes:
        cid: of all its bytes.
        author: who signed it.
        head: what is signed.
        columns: by name, read-only.
        num_bytes: as it was sent.
        proof: the signed head, which convicts its author alone if the shard is false.
    """

    cid: Cid
    author: PeerId
    head: Head
    columns: Mapping[str, Array]
    num_bytes: int
    proof: bytes

    @property
    def place(self) -> Place:
        """Where it stands among its author's."""
        return Place(self.author, self.head.policy, self.head.stream, self.head.number)


def unsigned(head: Head, columns: Columns) -> tuple[bytes, bytes]:
    """What a shard's author has to sign, and the body that goes with it; `signed` makes a shard of both.

    Args:
        head: without ``columns`` and ``digest``, which are filled in.
        columns: what it is made of.

    Raises:
        UsageError: if one cannot be a column.
        ProtocolError: if nobody would take the head.
    """
    body = write_body(columns)
    return encode(replace(head, columns=describe(columns), digest=hashlib.sha256(body).digest())), body


def signed(signer: Signer, head: bytes, body: bytes) -> tuple[Cid, bytes]:
    """A shard's name and bytes, of what `unsigned` gave.

    Raises:
        TooLargeError: if nobody would take so large a shard.
    """
    sealed = encode(signer.seal(KIND, head))
    check_room(len(sealed), MAX_HEAD_BYTES, "shard's head")
    data = FORM + len(sealed).to_bytes(_LENGTH_BYTES, "little") + sealed + body
    check_room(len(data), MAX_SHARD_BYTES, "shard")
    return blocks.name(data).cid, data


def seal(signer: Signer, head: Head, columns: Columns) -> tuple[Cid, bytes]:
    """Make a shard of columns.

    Args:
        signer: the author.
        head: without ``columns`` and ``digest``, which are filled in.
        columns: what it is made of.

    Returns:
        Its name and its bytes.

    Raises:
        UsageError: if one cannot be a column.
        ProtocolError: if nobody would take the head.
        TooLargeError: if nobody would take so large a shard.
    """
    return signed(signer, *unsigned(head, columns))


def open_head(proof: bytes | memoryview) -> tuple[PeerId, Head]:
    """The author and the head of a shard, from its first bytes or from what somebody keeps as proof.

    Raises:
        LimitError: if they are too many.
        SignatureError: if the author did not sign this.
        ProtocolError: if they are no signed head, or not written as we write one.
    """
    signed = decode(Signed, bytes(proof), max_bytes=MAX_HEAD_BYTES, strict=True)
    signed.check(KIND)
    try:
        head = decode(Head, signed.payload, max_bytes=MAX_HEAD_BYTES, strict=True)
    except UnknownFieldError as error:
        raise ProtocolError(f"this shard is of a newer version ({error}); update Shoal to use it") from error
    if encode(head) != signed.payload or encode(signed) != proof:
        raise ProtocolError("a shard's head is not written in the canonical form; refuse it")
    return signed.author, head


def open_shard(
    data: bytes | memoryview,
    *,
    cid: Cid | None = None,
    swarm: SwarmId | None = None,
    max_bytes: int = MAX_BODY_BYTES,
) -> Shard:
    """Read a shard that came from anybody.

    It costs the bytes themselves, one SHA-256 and one signature; then, if its author signed it, at most twice
    ``max_bytes``.

    Args:
        data: its bytes.
        cid: by which it was asked for; None: by none.
        swarm: for which it has to be; None: any.
        max_bytes: that its columns may take.

    Raises:
        LimitError: if it is larger than it may be. Nothing was unpacked.
        SignatureError: if its author did not sign it. Likewise.
        ProtocolError: if it is not what it should be.
    """
    if len(data) > MAX_SHARD_BYTES:
        raise LimitError(f"a shard of {len(data)} bytes exceeds the limit of {MAX_SHARD_BYTES}; refuse it")
    view = memoryview(data)
    start = len(FORM) + _LENGTH_BYTES
    if bytes(view[: len(FORM)]) != FORM:
        raise ProtocolError("these bytes are no shard, or one of another version; update Shoal if others take them")
    length = int.from_bytes(view[len(FORM) : start], "little")
    if length > MAX_HEAD_BYTES or start + length > len(view):
        raise LimitError(f"a shard's head of {length} bytes does not fit into it, or exceeds {MAX_HEAD_BYTES}")
    proof = bytes(view[start : start + length])
    author, head = open_head(proof)
    if swarm is not None and head.swarm != swarm:
        raise ProtocolError(f"this shard is of the swarm {head.swarm}, not of this one; refuse it")
    body = view[start + length :]
    if hashlib.sha256(body).digest() != head.digest:
        raise ProtocolError("a shard's body is not the one that its author signed; fetch it from another peer")
    named = blocks.name(data).cid
    if cid is not None and named != cid:
        raise ProtocolError(f"these bytes are not the shard {cid}; fetch it from another peer")
    columns = read_body(head.columns, body, max_bytes=min(max_bytes, MAX_BODY_BYTES))
    return Shard(named, author, head, columns, len(data), proof)


# --- chance that nobody chooses --------------------------------------------------------------------------------------


def seeds_of(swarm: SwarmId, author: PeerId, policy: str, stream: int, count: int) -> list[int]:
    """The seeds of a stream's environments, each of 32 bits; they are reset once, when the stream begins."""
    return [_hashed("environment", swarm, author, policy, stream, index) % 2**32 for index in range(count)]


def noise_seed(author: PeerId, head: Head) -> int:
    """The seed of all chance by which a shard's acts were drawn, of 128 bits: another one for each shard and policy."""
    return _hashed("acts", head.swarm, author, head.policy, head.state, head.stream, head.number) % 2**128


def _hashed(*parts: object) -> int:
    told = "\n".join(["shoal shard", *map(str, parts)])  # names of policies are printable, so no part has a new line
    return int.from_bytes(hashlib.sha256(told.encode()).digest(), "big")
