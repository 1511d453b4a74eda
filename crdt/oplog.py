"""One author's log: signed, numbered, hash-linked updates to its own document.

An op is sealed by its author and names the op before it by hash, so nobody else can write into a document, and the
author cannot change its past unseen. An op is applied to the document before it is taken into the log: a log
never holds what cannot be replayed.

Two different ops of one author at one place are a `Fork`: a proof, which anybody can check, that the author keeps two
logs. It need not be malice; a profile that was copied or restored from a backup does it too. Whoever holds the proof
cuts the log before the fork, lets the op with the lower hash stand there if it fits what is before it, and takes
nothing of that author after it: the log is frozen. Of several forks of one author the one at the lowest place counts,
and of those at one place the one with the lowest hash. So what a log comes to depends on what its author signed and not
on the order in which that was heard.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from shoal.crdt.document import Document
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_OP_BYTES
from shoal.protocol.signing import Signed

KIND: Final = "op/1"

NO_OP: Final = bytes(32)
"""What the first op of a log follows."""

MAX_LAMPORT: Final = 2**53
"""Lamport times stop here; a liar who starts at the end makes ties, but stops nobody from writing."""

MAX_LOG_BYTES: Final = 16 * 1024 * 1024
"""All ops of one author; one of a thousand bytes per epoch lasts for 16,000 epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One update of one author's document.

    Attributes:
        swarm: in which it is valid.
        author: whose document it changes.
        seq: its place in the author's log, from 1.
        prev: sha256 of the sealed op before it, `NO_OP` for the first.
        lamport: greater than that of any op that the author had seen, up to `MAX_LAMPORT`.
        update: for `Document.apply`.
    """

    swarm: SwarmId
    author: PeerId
    seq: int
    prev: bytes
    lamport: int
    update: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.seq <= MAX_LOG_BYTES:
            raise ProtocolError(f"an op cannot have the sequence number {self.seq}")
        if not 1 <= self.lamport <= MAX_LAMPORT:
            raise ProtocolError(f"an op cannot have the Lamport time {self.lamport}")
        if len(self.prev) != len(NO_OP):
            raise ProtocolError("an op names the op before it by 32 bytes")


class FrozenLogError(UsageError):
    """The author has signed two logs, so that nobody takes more ops of it."""


class Outcome(Enum):
    """What became of an op that its author really signed, unless the answer did not depend on that."""

    APPENDED = auto()
    HELD = auto()
    """It is in the log already; nothing was changed."""
    GAP = auto()
    """Ops before it are missing; offer it again after them."""
    ASTRAY = auto()
    """It follows another past than the one held: there is a fork below it. Ask for the ops before it."""
    FORKED = auto()
    """Its author also signed another op at its place: `OpLog.rival` and it make a `Fork` that is to be taken."""
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
    if len(sealed.payload) > MAX_OP_BYTES or len(encode(sealed)) > MAX_OP_BYTES:
        raise LimitError(f"an op by {sealed.author} exceeds the limit of {MAX_OP_BYTES} bytes")
    op = decode(Op, sealed.payload, max_bytes=MAX_OP_BYTES)
    if op.author != sealed.author:
        raise ProtocolError(f"{sealed.author} sealed an op that changes the document of {op.author}")
    return op


@dataclass(frozen=True, slots=True)
class Fork:
    """The proof that an author signed two different ops for one place; made by `prove`.

    Attributes:
        swarm: of both.
        author: who is shown to keep two logs.
        seq: the place.
        stands: the one of the lower hash.
        other: any other.
        stands_hash: its `op_hash`.
    """

    swarm: SwarmId
    author: PeerId
    seq: int
    stands: Signed
    other: Signed
    stands_hash: bytes

    @property
    def rank(self) -> tuple[int, bytes]:
        """Of two forks of one author, the one with the lower counts."""
        return self.seq, self.stands_hash


def prove(*ops: Signed) -> Fork:
    """The fork that two or more ops show.

    Raises:
        SignatureError: if the author did not sign them all.
        ProtocolError: if they show none.
    """
    ordered = sorted({op_hash(sealed): sealed for sealed in ops}.items())
    opened = [open_op(sealed) for _, sealed in ordered]
    if len(opened) < 2 or len({(op.swarm, op.author, op.seq) for op in opened}) > 1:
        raise ProtocolError("a fork is shown by different ops of one author at one place, in one swarm")
    for _, sealed in ordered:
        sealed.check(KIND)
    (stands_hash, stands), (_, other) = ordered[:2]
    return Fork(opened[0].swarm, opened[0].author, opened[0].seq, stands, other, stands_hash)


class OpLog:
    """All ops of one author in one swarm that this node holds, and the document that they make."""

    __slots__ = ("_hashes", "_lamports", "_num_bytes", "_ops", "_sizes", "author", "document", "fork", "swarm")

    def __init__(self, swarm: SwarmId, author: PeerId) -> None:
        self.swarm = swarm
        self.author = author
        self.document = Document()
        self.fork: Fork | None = None
        """Where the log is frozen, if it is."""
        self._ops: list[Signed] = []
        self._sizes: list[int] = []
        self._lamports: list[int] = []
        self._hashes: list[bytes] = []
        self._num_bytes = 0

    @property
    def seq(self) -> int:
        """The number of the newest op; 0 if there is none."""
        return len(self._ops)

    @property
    def lamport(self) -> int:
        """The Lamport time of the newest op; 0 if there is none."""
        return self._lamports[-1] if self._lamports else 0

    @property
    def head(self) -> bytes:
        """The hash of the newest op; `NO_OP` if there is none."""
        return self.hash_at(self.seq)

    @property
    def num_bytes(self) -> int:
        """The size of all ops, as they are stored and sent."""
        return self._num_bytes

    def hash_at(self, seq: int) -> bytes:
        """The hash of an op that is held; `NO_OP` of number 0."""
        return self._hashes[seq - 1] if seq > 0 else NO_OP

    def op_at(self, seq: int) -> tuple[Signed, int]:
        """An op that is held, and its size in bytes."""
        return self._ops[seq - 1], self._sizes[seq - 1]

    def after(self, seq: int) -> list[tuple[int, Signed, int]]:
        """Every op after a sequence number, in order: (Lamport time, sealed op, its size in bytes)."""
        start = max(seq, 0)
        return list(zip(self._lamports[start:], self._ops[start:], self._sizes[start:], strict=True))

    def rival(self, seq: int) -> Signed | None:
        """The op that has this place here: held, or standing at the fork though it does not fit."""
        if self.fork is not None and self.fork.seq == seq:
            return self.fork.stands
        return self._ops[seq - 1] if 1 <= seq <= self.seq else None

    def append(self, sealed: Signed, op: Op | None = None) -> Outcome:
        """Check an op and take it in, if it is the next one.

        Args:
            sealed: the op.
            op: what `open_op` made of it, if that was asked already.

        Raises:
            SignatureError: if the author did not sign it.
            LimitError: if it, or the log with it, is too big.
            ProtocolError: if it belongs elsewhere or breaks a rule. As with any error, nothing was changed.
        """
        op = self._belonging(open_op(sealed) if op is None else op)
        if op.seq <= self.seq and self._ops[op.seq - 1] == sealed:
            return Outcome.HELD
        if self.fork is not None and (
            op.seq > self.fork.seq or (op.seq == self.fork.seq and op_hash(sealed) > self.fork.stands_hash)
        ):
            return Outcome.FROZEN
        sealed.check(KIND)
        rival = self.rival(op.seq)
        if rival is not None and rival != sealed:
            return Outcome.FORKED
        if op.seq > self.seq + 1:
            return Outcome.GAP
        if op.prev != self.head:
            return Outcome.ASTRAY
        if op.lamport < self.lamport:
            raise ProtocolError(f"the Lamport time of {self.author} runs backwards at op {op.seq}")
        num_bytes = self._room_for(sealed)
        try:
            self.document.apply(op.update)
        except ProtocolError as error:
            if error.__cause__ is not None:
                self._rebuild()
            raise
        self._take(sealed, op.lamport, num_bytes)
        return Outcome.APPENDED

    def freeze(self, fork: Fork) -> bool:
        """Cut the log before a fork, unless a fork that counts more is known; whether anything was changed.

        The op that stands there is not in the log yet: `settle`.
        """
        if self.fork is not None and self.fork.rank <= fork.rank:
            return False
        self.fork = fork
        keep = fork.seq - 1
        if self.seq > keep:
            self._num_bytes -= sum(self._sizes[keep:])
            for held in (self._ops, self._sizes, self._lamports, self._hashes):
                del held[keep:]
            self._rebuild()
        return True

    def settle(self) -> Signed | None:
        """Take in the op that stands at the fork, if the log has come to there and it fits; what was taken in."""
        if self.fork is None or self.seq != self.fork.seq - 1:
            return None
        try:
            outcome = self.append(self.fork.stands)
        except ProtocolError:
            return None
        return self.fork.stands if outcome is Outcome.APPENDED else None

    def append_own(self, sealed: Signed) -> None:
        """Take in the op that was just made of an update that `document` itself wrote.

        Raises:
            ProtocolError: if it is not the next op.
        """
        op = self._belonging(open_op(sealed))
        if op.seq != self.seq + 1 or op.prev != self.head:
            raise ProtocolError(f"op {op.seq} does not follow op {self.seq} of {self.author}")
        self._take(sealed, op.lamport, len(encode(sealed)))

    def check_room(self) -> None:
        """Check that one more op of any size may be appended.

        Raises:
            FrozenLogError: if its author keeps two logs.
            TooLargeError: if it might not fit.
        """
        if self.fork is not None:
            raise FrozenLogError(
                f"{self.author} has signed two different ops {self.fork.seq} in {self.swarm}: its profile was copied, "
                "or restored from a backup. Nobody takes more of its ops; take part with a new profile"
            )
        if self._num_bytes + MAX_OP_BYTES > MAX_LOG_BYTES:
            raise TooLargeError(f"the log of {self.author} is full: {MAX_LOG_BYTES} bytes per author and swarm")

    def _belonging(self, op: Op) -> Op:
        if op.swarm != self.swarm or op.author != self.author:
            raise ProtocolError(f"an op of {op.author} in {op.swarm} was offered to the log of {self.author}")
        return op

    def _room_for(self, sealed: Signed) -> int:
        num_bytes = len(encode(sealed))
        if self._num_bytes + num_bytes > MAX_LOG_BYTES:
            raise LimitError(f"the log of {self.author} exceeds the limit of {MAX_LOG_BYTES} bytes per author")
        return num_bytes

    def _take(self, sealed: Signed, lamport: int, num_bytes: int) -> None:
        self._ops.append(sealed)
        self._sizes.append(num_bytes)
        self._lamports.append(lamport)
        self._hashes.append(op_hash(sealed))
        self._num_bytes += num_bytes

    def _rebuild(self) -> None:
        self.document = Document(open_op(held).update for held in self._ops)
