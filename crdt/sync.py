"""The shared state of one swarm: every author's log and document, and what two nodes have to tell each other.

Sync is anti-entropy over heads: one node says how far it is with each author and by which op (`SwarmDocs.version`),
the other answers with what comes after (`SwarmDocs.missing`), and the first takes it in (`SwarmDocs.receive`). Ops may
arrive in any order and any number of times. What cannot be placed yet is not kept: the next exchange brings it again,
in order. So two nodes with the same version hold the same documents, byte for byte.

A snapshot stands for all that was before it: whoever is at an earlier place is sent it and what comes after.

Forks (`shoal.crdt.oplog.Fork`) travel the same way. Whoever sees that another's newest op is not the one that it holds
itself at that place sends ops from there on backwards, in steps that double, and its snapshot last; the first that
contradict each other prove a fork at the lowest place among them, and since a lower fork counts more, a few exchanges
find the first place at which the two logs part. A proof is sent as its two ops, side by side. A head says where its log
is frozen, so what would be refused is not sent again; nor are ops of authors for whom the asker has no place.

Store before you acknowledge: the shell writes `Received.forks` and `Received.accepted`, and what `SwarmDocs.write`
returns, to disk before it answers the sender or anybody's sync, or sends the op. `version` and `missing` show what is
not stored yet too, so one lock has to be held from `receive` or `write` until it is stored, and around those. If
storing fails, the shell throws this object away and builds one from what is stored; otherwise a node could sign two
different ops with one number.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.crdt.oplog import (
    KIND,
    MAX_LAMPORT,
    NO_OP,
    Fork,
    Op,
    OpLog,
    Outcome,
    ReadOp,
    contradiction,
    open_op,
    prove,
    read_op,
)
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.protocol.signing import Signed, Signer


@dataclass(frozen=True, slots=True)
class Head:
    """How far somebody is with one author.

    Attributes:
        seq: of the newest op held; 0 if there is none.
        hash: its `op_hash`.
        fork: the place from which on the log is frozen; 0 if it is not.
    """

    seq: int = 0
    hash: bytes = NO_OP
    fork: int = 0

    def __post_init__(self) -> None:
        if self.seq < 0 or self.fork < 0 or len(self.hash) != len(NO_OP):
            raise ProtocolError(f"number {self.seq}, fork {self.fork} cannot be of a log's head")

    def counts_before(self, fork: Fork | None) -> bool:
        """Whether it is frozen by a fork that counts more than this one."""
        return self.fork > 0 and (fork is None or self.fork < fork.seq)


_NOTHING = Head()


@dataclass(frozen=True, slots=True)
class Version:
    """How far somebody is.

    Attributes:
        heads: of every author of whom it holds something.
        is_full: whether it has a place for no more authors.
    """

    heads: Mapping[PeerId, Head] = field(default_factory=dict)
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """An op that was not taken in.

    Attributes:
        author: who it says it is by; not proven.
        reason: for a log line.
        sealed: the op.
    """

    author: PeerId
    reason: str
    sealed: Signed


@dataclass(frozen=True, slots=True)
class Received:
    """What came of a batch of ops.

    Attributes:
        accepted: what is new, in an order in which it can be replayed; store it before you acknowledge anything.
        rejected: what will never fit.
        missing: authors of whom ops between those held and those offered are missing; ask somebody for them.
        forks: of which each cuts a log; store them first.
    """

    accepted: tuple[Signed, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    missing: frozenset[PeerId] = frozenset()
    forks: tuple[Fork, ...] = ()

    def then(self, later: Received) -> Received:
        """This and what came of a batch right after it, as if both were one."""
        cut = {fork.author: fork.seq for fork in later.forks}
        accepted = [op for op in self.accepted if op.author not in cut or open_op(op).seq < cut[op.author]]
        forks = {fork.author: fork for fork in (*self.forks, *later.forks)}
        rejected = {each.sealed: each for each in (*self.rejected, *later.rejected)}
        return Received(
            (*accepted, *later.accepted),
            tuple(rejected.values()),
            self.missing | later.missing,
            tuple(forks.values()),
        )


class SwarmDocs:
    """Everything that one node knows of one swarm's shared state."""

    __slots__ = ("_logs", "own", "swarm")

    def __init__(self, swarm: SwarmId, own: PeerId, stored: Iterable[Signed] = (), forks: Iterable[Fork] = ()) -> None:
        """Start from what is stored, in any order.

        Raises:
            ProtocolError: if that is not what a `SwarmDocs` of this swarm accepted or wrote.
        """
        self.swarm = swarm
        self.own = own
        self._logs = {own: OpLog(swarm, own)}
        for fork in forks:
            self._log_of(fork.author).freeze(fork)
        read = [self._read_stored(sealed) for sealed in stored]
        self._restore(sorted(read, key=lambda each: (each.op.author, each.op.seq)))
        self.check_restored()

    def restore(self, ops: Iterable[Signed]) -> None:
        """Take in more of what is stored, before anything else; `check_restored` after the last of it.

        Args:
            ops: in the order of each author's log.

        Raises:
            ProtocolError: as when made.
        """
        self._restore(map(self._read_stored, ops))

    def check_restored(self) -> None:
        """Check that what was restored was signed: the newest op of each log vouches for all before it.

        Raises:
            ProtocolError: as when made.
        """
        try:
            for log in self._logs.values():
                log.check_head()
        except ProtocolError as error:
            raise ProtocolError(f"the stored state of {self.swarm} is damaged: {error}") from error

    @property
    def lamport(self) -> int:
        """The greatest Lamport time of any op held; 0 if there is none."""
        return max(log.lamport for log in self._logs.values())

    @property
    def num_ops(self) -> int:
        """How many ops are held; those before a snapshot are not."""
        return sum(log.num_ops for log in self._logs.values())

    @property
    def frozen(self) -> dict[PeerId, Fork]:
        """The authors who were shown to keep two logs, by what shows it; of `own`, nothing more can be written."""
        return {author: log.fork for author, log in sorted(self._logs.items()) if log.fork is not None}

    def seqs(self) -> dict[PeerId, int]:
        """The number of the newest op held of every author of whom there is one."""
        return {author: log.seq for author, log in sorted(self._logs.items()) if log.seq}

    def version(self) -> Version:
        """How far this node is."""
        heads = {
            author: _head_of(log)
            for author, log in sorted(self._logs.items())
            if log.seq or log.fork is not None or self._is_full
        }
        return Version(heads, self._is_full)

    def is_behind(self, theirs: Version) -> bool:
        """Whether somebody with this version has what is not here and would be taken."""
        return any(self._is_behind(author, head) for author, head in theirs.heads.items())

    def is_ahead(self, theirs: Version) -> bool:
        """Whether there is something here that somebody with this version has not and would take."""
        return any(next(units, None) is not None for units in self._lacking(theirs).values())

    def missing(self, theirs: Version, max_bytes: int) -> list[Signed]:
        """What somebody with this version lacks and would take: no more than ``max_bytes``, but at least one.

        The ops of each author are in their order. No author comes before another by more than one op's bytes, so that
        nobody keeps others from being heard by how much it has to say.
        """
        streams = self._lacking(theirs)
        turns = [(0, author) for author in streams]
        heapq.heapify(turns)
        ops: list[Signed] = []
        total = 0
        while turns:
            taken, author = heapq.heappop(turns)
            unit = next(streams[author], None)
            if unit is None:
                continue
            size = sum(num_bytes for _, num_bytes in unit)
            total += size
            if ops and total > max_bytes:
                break
            ops += [sealed for sealed, _ in unit]
            heapq.heappush(turns, (taken + size, author))
        return ops

    def receive(self, ops: Iterable[Signed]) -> Received:
        """Take in ops, in any order; never raises for what is in them."""
        accepted: list[Signed] = []
        rejected: list[Rejected] = []
        missing: set[PeerId] = set()
        forks: list[Fork] = []
        by_author: dict[PeerId, list[ReadOp]] = {}
        for sealed in ops:
            try:
                read = self._read(sealed)
            except ProtocolError as error:
                rejected.append(Rejected(sealed.author, str(error), sealed))
            else:
                by_author.setdefault(read.op.author, []).append(read)
        for author, offered in sorted(by_author.items()):
            offered.sort(key=lambda each: each.op.seq)
            fork, genuine = self._find_fork(author, offered, rejected)
            if fork is not None:
                forks.append(fork)
            for each in genuine:
                try:
                    outcome = self._append(each)
                except ProtocolError as error:
                    rejected.append(Rejected(author, str(error), each.sealed))
                    continue
                match outcome:
                    case Outcome.APPENDED:
                        accepted.append(each.sealed)
                    case Outcome.HELD:
                        pass
                    case Outcome.GAP:
                        missing.add(author)
                    case Outcome.FORKED | Outcome.FROZEN:
                        reason = f"{author} signed two logs; its op {each.op.seq} is not taken"
                        if fork is None or each.sealed not in (fork.one, fork.other):
                            rejected.append(Rejected(author, reason, each.sealed))
        return Received(tuple(accepted), tuple(rejected), frozenset(missing), tuple(forks))

    def write(self, signer: Signer, **registers: Any) -> Signed:
        """Set registers of the own document; now and then by a snapshot, which keeps fewer of many old entries.

        Args:
            signer: of the own key.
            **registers: plain data by register; of ``evaluations``, only the entries to add, by epoch.

        Returns:
            The op. Store it before you send it to anybody.

        Raises:
            UsageError: if the signer is another, or a value is not plain data; as a `FrozenLogError`, if two logs were
                signed with this key.
            TooLargeError: if it is too much for one op or one document. As with any error, nothing was changed.
        """
        if signer.peer_id != self.own:
            raise UsageError(f"only {self.own} writes here, not {signer.peer_id}")
        log = self._logs[self.own]
        log.check_not_frozen()
        lamport, seq = min(self.lamport + 1, MAX_LAMPORT), log.seq + 1
        if log.is_due:
            document, update = log.document.compacted(registers)
            trail = log.trail(seq)
        else:
            document, update, trail = None, log.document.set(registers), None
        op = Op(
            swarm=self.swarm,
            author=self.own,
            seq=seq,
            prev=log.head,
            lamport=lamport,
            update=update,
            trail=trail,
        )
        sealed = signer.seal(KIND, encode(op))
        log.append_own(sealed, document)
        return sealed

    def documents(self) -> dict[PeerId, Mapping[str, Any]]:
        """The registers of every author, for `shoal.crdt.views`; what is in it is never changed."""
        return {author: log.document.view() for author, log in sorted(self._logs.items()) if log.seq}

    # Inside.

    def _read(self, sealed: Signed) -> ReadOp:
        read = read_op(sealed)
        if read.op.swarm != self.swarm:
            raise ProtocolError(f"an op of {read.op.author} in {read.op.swarm} was offered to {self.swarm}")
        return read

    def _read_stored(self, sealed: Signed) -> ReadOp:
        try:
            return self._read(sealed)
        except ProtocolError as error:
            raise ProtocolError(f"the stored state of {self.swarm} is damaged: {error}") from error

    def _restore(self, ops: Iterable[ReadOp]) -> None:
        for read in ops:
            author = read.op.author
            try:
                outcome = self._log_of(author).append(read.sealed, read, is_checked=True)
            except ProtocolError as error:
                raise ProtocolError(f"the stored state of {self.swarm} is damaged: {error}") from error
            if outcome not in (Outcome.APPENDED, Outcome.HELD):
                raise ProtocolError(f"the stored state of {self.swarm} is damaged: ops of {author} are missing")

    @property
    def _is_full(self) -> bool:
        return len(self._logs) >= MAX_MEMBERS

    def _is_behind(self, author: PeerId, theirs: Head) -> bool:
        log = self._logs.get(author)
        if log is None:
            return not self._is_full and theirs != _NOTHING
        if theirs.counts_before(log.fork):
            return True
        if log.fork is not None and theirs.seq >= log.fork.seq:
            return log.seq < log.fork.seq - 1
        return theirs.seq > log.seq or (theirs.seq == log.seq and theirs.hash != log.head)

    def _lacking(self, theirs: Version) -> dict[PeerId, Iterator[list[tuple[Signed, int]]]]:
        return {
            author: _units(log, theirs.heads.get(author, _NOTHING))
            for author, log in self._logs.items()
            if author in theirs.heads or not theirs.is_full
        }

    def _log_of(self, author: PeerId) -> OpLog:
        log = self._logs.get(author)
        if log is None:
            if self._is_full:
                raise LimitError(f"{self.swarm} has {MAX_MEMBERS} authors already; {author} is one too many")
            log = self._logs[author] = OpLog(self.swarm, author)
        return log

    def _find_fork(
        self, author: PeerId, offered: list[ReadOp], rejected: list[Rejected]
    ) -> tuple[Fork | None, list[ReadOp]]:
        """Freeze the author's log by the fork that counts most among those that these ops and those held show.

        Returns:
            The fork, if it is news, and the ops without those that the author did not sign, if that matters.
        """
        log = self._logs.get(author)
        best: Fork | None = None
        genuine: list[ReadOp] = []
        claimed: dict[int, tuple[bytes, ReadOp]] = {}  # what the genuine ops say of each place, and which
        for read in offered:
            op = read.op
            if log is not None and log.hash_at(op.seq) == read.hash:
                continue
            end = None if log is None or log.fork is None else log.fork.seq
            claims = read.claims()
            is_at_odds = log is not None and log.conflict(read) is not None
            others = {seq: claimed[seq][0] for seq in claims if seq in claimed and (end is None or seq < end)}
            against = contradiction(others, claims)
            if end is not None and min(claims) >= end:
                genuine.append(read)  # it shows nothing that counts more than what is known: it is refused unread
                continue
            try:
                read.sealed.check(KIND)
            except ProtocolError as error:
                rejected.append(Rejected(author, str(error), read.sealed))
                continue
            genuine.append(read)
            found = log.fork_with(read) if log is not None and is_at_odds else None
            if against is not None and (found is None or against < found.seq):
                found = prove(claimed[against][1].sealed, read.sealed)
            if found is not None and (best is None or found.seq < best.seq):
                best = found
            for seq, name in claims.items():
                claimed.setdefault(seq, (name, read))
        if best is None:
            return None, genuine
        try:
            log = self._log_of(author)
        except LimitError as error:
            rejected += [Rejected(author, str(error), read.sealed) for read in genuine]
            return None, []
        return best if log.freeze(best) else None, genuine

    def _append(self, read: ReadOp) -> Outcome:
        author = read.op.author
        log = self._logs.get(author)
        if log is not None:
            return log.append(read.sealed, read, is_checked=True)
        if self._is_full:
            raise LimitError(f"{self.swarm} has {MAX_MEMBERS} authors already; {author} is one too many")
        log = OpLog(self.swarm, author)
        outcome = log.append(read.sealed, read, is_checked=True)
        if outcome is Outcome.APPENDED:  # nobody gets a place by a forged op
            self._logs[author] = log
        return outcome


def _head_of(log: OpLog) -> Head:
    return Head(log.seq, log.head, 0 if log.fork is None else log.fork.seq)


def _units(log: OpLog, theirs: Head) -> Iterator[list[tuple[Signed, int]]]:
    """What somebody with this head lacks of a log and would take, with sizes; what must go together, together."""
    end = log.seq
    if theirs.counts_before(log.fork):
        end = min(end, theirs.fork - 1)
    elif log.fork is not None and theirs.fork != log.fork.seq:
        yield [(sealed, len(encode(sealed))) for sealed in (log.fork.one, log.fork.other)]
        if theirs.seq >= log.fork.seq:
            return  # it will cut its log, and then say how far it is
    if theirs.seq > end or end < log.base:
        return
    if theirs.seq >= log.base - 1 and theirs.hash == log.hash_at(theirs.seq):
        for seq in range(theirs.seq + 1, end + 1):
            yield [log.op_at(seq)]
        return
    if theirs.seq < log.base:
        for seq in range(log.base, end + 1):
            yield [log.op_at(seq)]
        return
    seq, step = theirs.seq, 1
    while seq > log.base:
        yield [log.op_at(seq)]
        seq, step = seq - step, 2 * step
    yield [log.op_at(log.base)]
