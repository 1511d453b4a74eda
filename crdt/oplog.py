"""One author's log: signed, numbered, hash-linked updates to its own document.

An op is sealed by its author and names the op before it by hash, so nobody else can write into a document, and the
author cannot change its past unseen. An op is applied to the document before it is taken into the log: a log
never holds what cannot be replayed.

So that a log does not grow for ever, its author makes every few hundredth op a *snapshot* (`shoal.crdt.snapshots`),
which begins the document anew. Whoever takes it in drops what was before; whoever held nothing, or less, needs nothing
else. A log is therefore held from its newest snapshot on.

Every op *claims* which op has its own place, which the place before it, and a snapshot which had many earlier places.
Two ops of one author that claim different things of one place are a `Fork`: a proof, which anybody can check, that the
author keeps two logs. It need not be malice; a profile that was copied or restored from a backup does it too. Whoever
holds the proof cuts the log before that place and takes nothing of that author from there on: the log is frozen. Of
several forks of one author the one at the lowest place counts. So what a log comes to depends on what its author signed
and not on the order in which that was heard. (If everybody had dropped what was before the fork, it comes to nothing.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from shoal.crdt.document import MAX_REGISTERS, Document
from shoal.crdt.snapshots import MAX_SEQ, NAME_BYTES, places
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_OP_BYTES
from shoal.protocol.signing import Signed

KIND: Final = "op/2"

NO_OP: Final = bytes(32)
"""What the first op of a log follows."""

MAX_LAMPORT: Final = 2**53
"""Lamport times stop here; a liar who starts at the end makes ties, but stops nobody from writing."""

MAX_LOG_OPS: Final = 1024
"""Ops of one author from its newest snapshot on."""

MAX_LOG_BYTES: Final = 512 * 1024
"""The same in bytes."""

COMPACT_OPS: Final = 256
"""After so many ops an author makes the next one a snapshot,"""

COMPACT_BYTES: Final = 128 * 1024
"""or after so many bytes beside the last snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One update of one author's document.

    Attributes:
        swarm: in which it is valid.
        author: whose document it changes.
        seq: its place in the author's log, from 1.
        prev: sha256 of the sealed op before it, `NO_OP` for the first.
        lamport: greater than that of any op that the author had seen, up to `MAX_LAMPORT`.
        update: for `Document.apply`; of a snapshot, to an empty one.
        trail: of a snapshot, and of no other op: the first `NAME_BYTES` of the hash of the op at each of its `places`.
    """

    swarm: SwarmId
    author: PeerId
    seq: int
    prev: bytes
    lamport: int
    update: bytes
    trail: bytes | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.seq <= MAX_SEQ:
            raise ProtocolError(f"an op cannot have the sequence number {self.seq}")
        if not 1 <= self.lamport <= MAX_LAMPORT:
            raise ProtocolError(f"an op cannot have the Lamport time {self.lamport}")
        if len(self.prev) != len(NO_OP) or (self.seq == 1 and self.prev != NO_OP):
            raise ProtocolError("an op names the op before it by 32 bytes")
        if self.trail is not None and len(self.trail) != NAME_BYTES * len(places(self.seq)):
            raise ProtocolError("a snapshot names the ops at all of its places")


class FrozenLogError(UsageError):
    """The author has signed two logs, so that nobody takes more ops of it."""


class Outcome(Enum):
    """What became of an op that its author really signed, unless the answer did not depend on that."""

    APPENDED = auto()
    HELD = auto()
    """It is in the log, or before its snapshot; nothing was changed."""
    GAP = auto()
    """Ops before it are missing; offer it again after them."""
    FORKED = auto()
    """It contradicts what is held: `OpLog.fork_with` has the proof, which is to be taken."""
    FROZEN = auto()
    """It is at or after a fork; nothing of its author is taken there any more."""


def op_hash(sealed: Signed) -> bytes:
    """What the next op gives as ``prev``."""
    return hashlib.sha256(encode(sealed)).digest()


def open_op(sealed: Signed) -> Op:
    """Read an op, without checking its signature.

    Raises:
        LimitError: if it is too big.
        ProtocolError: if it is no op, or not by the author of the seal.
    """
    return read_op(sealed).op


@dataclass(frozen=True, slots=True)
class ReadOp:
    """An op with what is needed of it again and again.

    Attributes:
        sealed: as it travels.
        op: what is in it.
        hash: its `op_hash`.
        num_bytes: as it is stored and sent.
    """

    sealed: Signed
    op: Op
    hash: bytes
    num_bytes: int

    def claims(self) -> dict[int, bytes]:
        """The first `NAME_BYTES` of the hash of every op that it speaks of, by place."""
        op = self.op
        found = {op.seq: self.hash[:NAME_BYTES]}
        if op.seq > 1:
            found[op.seq - 1] = op.prev[:NAME_BYTES]
        if op.trail is not None:
            found.update(_trail_of(op))
        return found


def read_op(sealed: Signed) -> ReadOp:
    """As `open_op`."""
    data = encode(sealed) if len(sealed.payload) <= MAX_OP_BYTES else b""
    if not 0 < len(data) <= MAX_OP_BYTES:
        raise LimitError(f"an op by {sealed.author} exceeds the limit of {MAX_OP_BYTES} bytes")
    op = decode(Op, sealed.payload, max_bytes=MAX_OP_BYTES)
    if op.author != sealed.author:
        raise ProtocolError(f"{sealed.author} sealed an op that changes the document of {op.author}")
    return ReadOp(sealed, op, hashlib.sha256(data).digest(), len(data))


@dataclass(frozen=True, slots=True)
class Fork:
    """The proof that an author keeps two logs; made by `prove`.

    Attributes:
        swarm: of both.
        author: who is shown to keep them.
        seq: the lowest place of which the two ops claim different things.
        one: an op.
        other: one that contradicts it.
    """

    swarm: SwarmId
    author: PeerId
    seq: int
    one: Signed
    other: Signed


def contradiction(claims: Mapping[int, bytes], others: Mapping[int, bytes]) -> int | None:
    """The lowest place of which the two say different things."""
    return min((seq for seq, name in claims.items() if others.get(seq, name) != name), default=None)


def prove(one: Signed, other: Signed) -> Fork:
    """The fork that two ops show.

    Raises:
        SignatureError: if the author did not sign both.
        ProtocolError: if they show none.
    """
    first, second = sorted((read_op(one), read_op(other)), key=lambda read: read.hash)
    op = first.op
    seq = contradiction(first.claims(), second.claims())
    if (op.swarm, op.author) != (second.op.swarm, second.op.author) or seq is None:
        raise ProtocolError("a fork is shown by two ops of one author in one swarm that contradict each other")
    first.sealed.check(KIND)
    second.sealed.check(KIND)
    return Fork(op.swarm, op.author, seq, first.sealed, second.sealed)


class OpLog:
    """All ops of one author in one swarm that this node holds, and the document that they make."""

    __slots__ = ("_lamports", "_num_bytes", "_ops", "_trail", "author", "base", "document", "fork", "swarm")

    def __init__(self, swarm: SwarmId, author: PeerId) -> None:
        self.swarm = swarm
        self.author = author
        self.document = Document()
        self.fork: Fork | None = None
        """Where the log is frozen, if it is."""
        self.base = 1
        """The place of the first op that is held: of the newest snapshot, if there is one."""
        self._ops: list[tuple[Signed, bytes, int]] = []  # each with its hash and size
        self._lamports: list[int] = []
        self._trail: dict[int, bytes] = {}  # what the first op claims of those before it
        self._num_bytes = 0

    @property
    def seq(self) -> int:
        """The number of the newest op; 0 if there is none."""
        return self.base + len(self._ops) - 1

    @property
    def lamport(self) -> int:
        """The Lamport time of the newest op; 0 if there is none."""
        return self._lamports[-1] if self._lamports else 0

    @property
    def head(self) -> bytes:
        """The hash of the newest op; `NO_OP` if there is none."""
        return self._ops[-1][1] if self._ops else NO_OP

    @property
    def num_bytes(self) -> int:
        """The size of all ops that are held, as they are stored and sent."""
        return self._num_bytes

    @property
    def num_ops(self) -> int:
        """How many ops are held."""
        return len(self._ops)

    @property
    def is_due(self) -> bool:
        """Whether its author makes the next op a snapshot."""
        first = self._ops[0][2] if self._ops else 0
        return (
            len(self._ops) >= COMPACT_OPS
            or self._num_bytes - first >= COMPACT_BYTES
            or self.document.num_registers > MAX_REGISTERS // 2
        )

    def hash_at(self, seq: int) -> bytes | None:
        """The hash of an op that is held; `NO_OP` of number 0; None if it is not known in full."""
        if seq == 0:
            return NO_OP
        return self._ops[seq - self.base][1] if self.base <= seq <= self.seq else None

    def op_at(self, seq: int) -> tuple[Signed, int]:
        """An op that is held, and its size in bytes."""
        sealed, _, num_bytes = self._ops[seq - self.base]
        return sealed, num_bytes

    def known(self, seq: int) -> bytes | None:
        """The first `NAME_BYTES` of the hash at a place, if anything that is held says it."""
        if self.base <= seq <= self.seq:
            return self._ops[seq - self.base][1][:NAME_BYTES]
        return self._trail.get(seq)

    def conflict(self, read: ReadOp) -> int | None:
        """The lowest place before the known fork at which an op contradicts what is held."""
        end = MAX_SEQ + 1 if self.fork is None else self.fork.seq
        lowest: int | None = None
        for seq, name in read.claims().items():
            if seq < end and (lowest is None or seq < lowest) and self.known(seq) not in (None, name):
                lowest = seq
        return lowest

    def fork_with(self, read: ReadOp) -> Fork | None:
        """The proof that an op makes together with what is held.

        Raises:
            SignatureError: if there is a conflict, and the author did not sign the op.
        """
        seq = self.conflict(read)
        if seq is None:
            return None
        return prove(self._ops[max(seq - self.base, 0)][0], read.sealed)

    def trail(self, seq: int) -> bytes:
        """What a snapshot at the next place, ``seq``, has to claim."""
        return b"".join(self.known(place) or b"" for place in places(seq))

    def append(self, sealed: Signed, read: ReadOp | None = None, *, is_checked: bool = False) -> Outcome:
        """Check an op and take it in, if it is the next one, or a later snapshot.

        Args:
            sealed: the op.
            read: what `read_op` made of it, if that was asked already.
            is_checked: the signature is known to be good.

        Raises:
            SignatureError: if the author did not sign it.
            LimitError: if it, or the log with it, is too big.
            ProtocolError: if it belongs elsewhere or breaks a rule. As with any error, nothing was changed.
        """
        read = self._belonging(read_op(sealed) if read is None else read)
        op = read.op
        if self.hash_at(op.seq) == read.hash:
            return Outcome.HELD
        place = self.conflict(read)
        if place is None and self.fork is not None and op.seq >= self.fork.seq:
            return Outcome.FROZEN
        if not is_checked:
            sealed.check(KIND)
        if place is not None:
            return Outcome.FORKED
        if op.seq <= self.seq:
            return Outcome.HELD
        if op.trail is not None:
            self._begin_at(read, Document([op.update]))
            return Outcome.APPENDED
        if op.seq > self.seq + 1:
            return Outcome.GAP
        if op.lamport < self.lamport:
            raise ProtocolError(f"the Lamport time of {self.author} runs backwards at op {op.seq}")
        if len(self._ops) >= MAX_LOG_OPS or self._num_bytes + read.num_bytes > MAX_LOG_BYTES:
            raise LimitError(
                f"the log of {self.author} exceeds the limit of {MAX_LOG_OPS} ops or {MAX_LOG_BYTES} bytes since its "
                "last snapshot"
            )
        try:
            self.document.apply(op.update)
        except ProtocolError as error:
            if error.__cause__ is not None:
                self._rebuild()
            raise
        self._take(read)
        return Outcome.APPENDED

    def append_own(self, sealed: Signed, document: Document | None = None) -> None:
        """Take in the op that was just made of an update that `document` itself wrote.

        Args:
            sealed: the op.
            document: of a snapshot, the new document.

        Raises:
            ProtocolError: if it is not the next op.
        """
        read = self._belonging(read_op(sealed))
        if read.op.seq != self.seq + 1 or read.op.prev != self.head:
            raise ProtocolError(f"op {read.op.seq} does not follow op {self.seq} of {self.author}")
        if document is not None:
            self._begin_at(read, document)
        else:
            self._take(read)

    def freeze(self, fork: Fork) -> bool:
        """Cut the log before a fork, unless one that counts more is known; whether anything was changed."""
        if self.fork is not None and self.fork.seq <= fork.seq:
            return False
        self.fork = fork
        keep = max(fork.seq - self.base, 0)
        if len(self._ops) > keep:
            self._num_bytes -= sum(num_bytes for _, _, num_bytes in self._ops[keep:])
            del self._ops[keep:], self._lamports[keep:]
            if not self._ops:
                self.base, self._trail = 1, {}
            self._rebuild()
        return True

    def check_not_frozen(self) -> None:
        """Check that its author may write.

        Raises:
            FrozenLogError: if it keeps two logs.
        """
        if self.fork is not None:
            raise FrozenLogError(
                f"{self.author} has signed two different logs in {self.swarm}, from op {self.fork.seq} on: its profile "
                "was copied, or restored from a backup. Nobody takes more of its ops; take part with a new profile"
            )

    def check_head(self) -> None:
        """Check the signature of the newest op: by its hash it vouches for all before it that are held.

        Raises:
            SignatureError: if the author did not sign it.
        """
        if self._ops:
            self._ops[-1][0].check(KIND)

    def _belonging(self, read: ReadOp) -> ReadOp:
        if read.op.swarm != self.swarm or read.op.author != self.author:
            op = read.op
            raise ProtocolError(f"an op of {op.author} in {op.swarm} was offered to the log of {self.author}")
        return read

    def _begin_at(self, read: ReadOp, document: Document) -> None:
        self._ops, self._lamports, self._num_bytes = [], [], 0
        self.base, self.document = read.op.seq, document
        self._trail = _trail_of(read.op)
        if read.op.seq > 1:
            self._trail[read.op.seq - 1] = read.op.prev[:NAME_BYTES]
        self._take(read)

    def _take(self, read: ReadOp) -> None:
        self._ops.append((read.sealed, read.hash, read.num_bytes))
        self._lamports.append(read.op.lamport)
        self._num_bytes += read.num_bytes

    def _rebuild(self) -> None:
        self.document = Document(open_op(sealed).update for sealed, _, _ in self._ops)


def _trail_of(op: Op) -> dict[int, bytes]:
    trail = op.trail or b""
    return {
        seq: trail[at : at + NAME_BYTES]
        for seq, at in zip(places(op.seq), range(0, len(trail), NAME_BYTES), strict=False)
    }
