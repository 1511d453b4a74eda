"""The shared state of one swarm: every author's log and document, and what two nodes have to tell each other.

Sync is anti-entropy over version vectors: one node says how far it is with each author (`SwarmDocs.version`), the other
answers with what comes after (`SwarmDocs.missing`), and the first takes it in (`SwarmDocs.receive`). Ops may arrive
in any order and any number of times. What cannot be placed yet is not kept: the next exchange brings it again, in
order. So two nodes with the same version hold the same documents, byte for byte, as long as no author equivocates.

Store before you acknowledge: the shell writes `Received.accepted`, and what `SwarmDocs.write` returns, to disk before
it answers the sender or anybody's sync, or sends the op. `version` and `missing` show what is not stored yet too, so
one lock has to be held from `receive` or `write` until it is stored, and around those. If storing fails, the shell
throws this object away and builds one from what is stored; otherwise a node could sign two different ops with one
number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.crdt.oplog import KIND, MAX_LAMPORT, Op, OpLog, Outcome, open_op
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.protocol.signing import Signed, Signer


@dataclass(frozen=True, slots=True)
class Rejected:
    """An op that was not taken in.

    Attributes:
        author: who it says it is by; proven only if ``equivocation``.
        reason: for a log line.
        equivocation: whether its author signed two different ops for one place.
        sealed: the op.
    """

    author: PeerId
    reason: str
    equivocation: bool
    sealed: Signed


@dataclass(frozen=True, slots=True)
class Received:
    """What came of a batch of ops.

    Attributes:
        accepted: what is new, in an order in which it can be replayed; store it before you acknowledge anything.
        rejected: what will never fit.
        missing: authors of whom ops between those held and those offered are missing; ask somebody for them.
    """

    accepted: tuple[Signed, ...]
    rejected: tuple[Rejected, ...]
    missing: frozenset[PeerId]


class SwarmDocs:
    """Everything that one node knows of one swarm's shared state."""

    __slots__ = ("_logs", "own", "swarm")

    def __init__(self, swarm: SwarmId, own: PeerId, stored: Iterable[Signed] = ()) -> None:
        """Start from what is stored, in any order.

        Raises:
            ProtocolError: if that is not what a `SwarmDocs` of this swarm accepted or wrote.
        """
        self.swarm = swarm
        self.own = own
        self._logs = {own: OpLog(swarm, own)}
        restored = self.receive(stored)
        if restored.rejected:
            raise ProtocolError(f"the stored state of {swarm} is damaged: {restored.rejected[0].reason}")
        if restored.missing:
            raise ProtocolError(f"the stored state of {swarm} is damaged: ops of {min(restored.missing)} are missing")

    @property
    def lamport(self) -> int:
        """The greatest Lamport time of any op held; 0 if there is none."""
        return max(log.lamport for log in self._logs.values())

    @property
    def num_ops(self) -> int:
        """How many ops are held."""
        return sum(log.seq for log in self._logs.values())

    def version(self) -> dict[PeerId, int]:
        """The newest sequence number of every author of whom something is held."""
        return {author: log.seq for author, log in sorted(self._logs.items()) if log.seq}

    def is_behind(self, version: Mapping[PeerId, int]) -> bool:
        """Whether somebody with this version has ops that are not here."""
        return any(seq > self._seq(author) for author, seq in version.items())

    def is_ahead(self, version: Mapping[PeerId, int]) -> bool:
        """Whether ops are here that somebody with this version has not."""
        return any(log.seq > version.get(author, 0) for author, log in self._logs.items())

    def missing(self, version: Mapping[PeerId, int], max_bytes: int) -> list[Signed]:
        """What somebody with this version lacks: the oldest first, and no more than ``max_bytes``, but at least one."""
        found = [
            (lamport, author, sealed, num_bytes)
            for author, log in self._logs.items()
            for lamport, sealed, num_bytes in log.after(version.get(author, 0))
        ]
        found.sort(key=lambda item: item[:2])  # stable, so that the ops of one author stay in their order
        ops: list[Signed] = []
        total = 0
        for _, _, sealed, num_bytes in found:
            total += num_bytes
            if ops and total > max_bytes:
                break
            ops.append(sealed)
        return ops

    def receive(self, ops: Iterable[Signed]) -> Received:
        """Take in ops, in any order; never raises for what is in them."""
        accepted: list[Signed] = []
        rejected: list[Rejected] = []
        missing: set[PeerId] = set()
        opened: list[tuple[PeerId, int, Signed, Op]] = []
        for sealed in ops:
            try:
                op = open_op(sealed)
            except ProtocolError as error:
                rejected.append(Rejected(sealed.author, str(error), equivocation=False, sealed=sealed))
            else:
                opened.append((op.author, op.seq, sealed, op))
        opened.sort(key=lambda item: item[:2])
        for author, seq, sealed, op in opened:
            try:
                outcome = self._append(sealed, op)
            except ProtocolError as error:
                rejected.append(Rejected(author, str(error), equivocation=False, sealed=sealed))
                continue
            match outcome:
                case Outcome.APPENDED:
                    accepted.append(sealed)
                case Outcome.HELD:
                    pass
                case Outcome.GAP:
                    missing.add(author)
                case Outcome.EQUIVOCATION:
                    reason = f"{author} signed two different ops {seq}; the one heard first stays"
                    rejected.append(Rejected(author, reason, equivocation=True, sealed=sealed))
        return Received(tuple(accepted), tuple(rejected), frozenset(missing))

    def write(self, signer: Signer, **registers: Any) -> Signed:
        """Set registers of the own document.

        Args:
            signer: of the own key.
            **registers: plain data by register; of ``evaluations``, only the entries to add, by epoch.

        Returns:
            The op. Store it before you send it to anybody.

        Raises:
            UsageError: if the signer is another, or a value is not plain data.
            TooLargeError: if it is too much for one op, or the log is full. As with any error, nothing was changed.
        """
        if signer.peer_id != self.own:
            raise UsageError(f"only {self.own} writes here, not {signer.peer_id}")
        log = self._logs[self.own]
        log.check_room()
        lamport = min(self.lamport + 1, MAX_LAMPORT)
        update = log.document.set(registers)
        op = Op(swarm=self.swarm, author=self.own, seq=log.seq + 1, prev=log.head, lamport=lamport, update=update)
        sealed = signer.seal(KIND, encode(op))
        log.append_own(sealed)
        return sealed

    def documents(self) -> dict[PeerId, dict[str, Any]]:
        """The registers of every author, for `shoal.crdt.views`."""
        return {author: log.document.values() for author, log in sorted(self._logs.items()) if log.seq}

    def _seq(self, author: PeerId) -> int:
        log = self._logs.get(author)
        return 0 if log is None else log.seq

    def _append(self, sealed: Signed, op: Op) -> Outcome:
        log = self._logs.get(sealed.author)
        if log is not None:
            return log.append(sealed, op)
        if len(self._logs) >= MAX_MEMBERS:
            raise LimitError(f"{self.swarm} has {MAX_MEMBERS} authors already; {sealed.author} is one too many")
        log = OpLog(self.swarm, sealed.author)
        outcome = log.append(sealed, op)
        if outcome is Outcome.APPENDED:  # nobody gets a place by a forged op
            self._logs[sealed.author] = log
        return outcome
