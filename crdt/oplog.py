"""One author's log: signed, numbered, hash-linked updates to its own document.

An op is sealed by its author and names the op before it by hash, so nobody else can write into a document, and the
author cannot change its past unseen. An op is applied to the document before it is taken into the log: a log
never holds what cannot be replayed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from shoal.crdt.document import Document
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, TooLargeError
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


class Outcome(Enum):
    """What became of an op that its author really signed."""

    APPENDED = auto()
    HELD = auto()
    """It is in the log already; nothing was changed."""
    GAP = auto()
    """Ops before it are missing; offer it again after them."""
    EQUIVOCATION = auto()
    """Its author also signed another op at its place, or another past before it. Refused: the first one heard stays."""


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


class OpLog:
    """All ops of one author in one swarm that this node holds, and the document that they make."""

    __slots__ = ("_head", "_lamports", "_num_bytes", "_ops", "_sizes", "author", "document", "swarm")

    def __init__(self, swarm: SwarmId, author: PeerId) -> None:
        self.swarm = swarm
        self.author = author
        self.document = Document()
        self._ops: list[Signed] = []
        self._sizes: list[int] = []
        self._lamports: list[int] = []
        self._head = NO_OP
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
        return self._head

    @property
    def num_bytes(self) -> int:
        """The size of all ops, as they are stored and sent."""
        return self._num_bytes

    def after(self, seq: int) -> list[tuple[int, Signed, int]]:
        """Every op after a sequence number, in order: (Lamport time, sealed op, its size in bytes)."""
        start = max(seq, 0)
        return list(zip(self._lamports[start:], self._ops[start:], self._sizes[start:], strict=True))

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
        sealed.check(KIND)
        if op.seq <= self.seq:
            return Outcome.EQUIVOCATION
        if op.seq > self.seq + 1:
            return Outcome.GAP
        if op.prev != self._head:
            return Outcome.EQUIVOCATION
        if op.lamport < self.lamport:
            raise ProtocolError(f"the Lamport time of {self.author} runs backwards at op {op.seq}")
        num_bytes = self._room_for(sealed)
        try:
            self.document.apply(op.update)
        except ProtocolError as error:
            if error.__cause__ is not None:
                self.document = Document(open_op(held).update for held in self._ops)
            raise
        self._take(sealed, op.lamport, num_bytes)
        return Outcome.APPENDED

    def append_own(self, sealed: Signed) -> None:
        """Take in the op that was just made of an update that `document` itself wrote.

        Raises:
            ProtocolError: if it is not the next op.
        """
        op = self._belonging(open_op(sealed))
        if op.seq != self.seq + 1 or op.prev != self._head:
            raise ProtocolError(f"op {op.seq} does not follow op {self.seq} of {self.author}")
        self._take(sealed, op.lamport, len(encode(sealed)))

    def check_room(self) -> None:
        """Check that one more op of any size fits.

        Raises:
            TooLargeError: if it might not.
        """
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
        self._head = op_hash(sealed)
        self._num_bytes += num_bytes
