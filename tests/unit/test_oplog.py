"""A log takes its author's ops, each once and in order, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shoal.crdt import document, oplog
from shoal.crdt.document import Document
from shoal.crdt.oplog import (
    KIND,
    MAX_LAMPORT,
    NO_OP,
    Fork,
    FrozenLogError,
    Op,
    OpLog,
    Outcome,
    op_hash,
    open_op,
    prove,
    read_op,
)
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, SignatureError
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_OP_BYTES
from shoal.protocol.signing import Signed, Signer

ANN, BOB = Signer(b"a" * 32), Signer(b"b" * 32)
SWARM, OTHER = SwarmId.of_manifest(b"one"), SwarmId.of_manifest(b"two")


def seal(signer: Signer = ANN, kind: str = KIND, **changes: Any) -> Signed:
    fields = {"swarm": SWARM, "author": ANN.peer_id, "seq": 1, "prev": NO_OP, "lamport": 1}
    fields |= {"update": Document().set({"policy": 1})} | changes
    plain = encode(fields)  # not by Op, which refuses some of what liars write
    return signer.seal(kind, plain)


def chain(count: int, start: str = "") -> list[Signed]:
    author, ops, prev = Document(), list[Signed](), NO_OP
    for seq in range(1, count + 1):
        ops.append(seal(seq=seq, prev=prev, lamport=seq, update=author.set({"policy": f"{start}{seq}"})))
        prev = op_hash(ops[-1])
    return ops


def a_log(ops: list[Signed]) -> OpLog:
    log = OpLog(SWARM, ANN.peer_id)
    for sealed in ops:
        assert log.append(sealed) is Outcome.APPENDED
    return log


def test_ops_in_order_make_the_document() -> None:
    log = a_log(chain(3))
    assert (log.seq, log.lamport, log.head) == (3, 3, op_hash(chain(3)[-1]))
    assert log.document.values() == {"policy": "3"}
    assert [log.op_at(seq)[0] for seq in (1, 2, 3)] == chain(3)
    assert log.num_bytes == sum(len(encode(sealed)) for sealed in chain(3))


def test_an_op_that_is_held_changes_nothing() -> None:
    log = a_log(chain(3))
    assert [log.append(sealed) for sealed in chain(3)] == [Outcome.HELD] * 3
    assert log.seq == 3


def test_an_op_after_a_gap_is_refused_until_the_gap_is_closed() -> None:
    first, second, third = chain(3)
    log = a_log([first])
    assert log.append(third) is Outcome.GAP
    assert log.seq == 1
    assert log.append(second) is Outcome.APPENDED
    assert log.append(third) is Outcome.APPENDED


def test_a_different_op_at_a_held_place_is_a_fork() -> None:
    log, other = a_log(chain(3)), chain(3, "other")[1]
    assert log.append(other) is Outcome.FORKED
    assert log.document.values() == {"policy": "3"}
    assert log.fork_with(read_op(other)) == prove(chain(3)[0], other)  # which names another op 1 before it


def test_an_op_that_follows_another_past_is_a_fork_at_the_place_before_it() -> None:
    log, other = a_log(chain(2)), chain(3, "other")[2]
    assert log.append(other) is Outcome.FORKED
    fork = log.fork_with(read_op(other))
    assert fork is not None
    assert (fork.seq, {fork.one, fork.other}) == (2, {chain(2)[1], other})
    assert log.seq == 2


def fork_at(seq: int) -> Fork:
    return prove(*(chain(seq, start)[-1] for start in ("", "other")))


def test_a_fork_cuts_the_log_before_it_and_nothing_is_taken_from_there_on() -> None:
    ops = chain(4)
    sides = [ops[1], seal(seq=2, prev=op_hash(ops[0]), lamport=2, update=open_op(chain(2, "other")[1]).update)]
    fork = prove(*sides)
    assert fork == prove(*reversed(sides))
    log = a_log(ops)
    assert log.freeze(fork)
    assert (log.seq, log.document.values()) == (1, {"policy": "1"})
    assert log.num_bytes == len(encode(ops[0]))
    assert log.append(ops[2]) is Outcome.FROZEN
    assert log.append(fork.other) is Outcome.FROZEN
    assert log.append(ops[0]) is Outcome.HELD
    with pytest.raises(FrozenLogError):
        log.check_not_frozen()


def test_of_several_forks_the_lowest_counts() -> None:
    log = a_log(chain(4))
    first = prove(chain(1)[0], chain(1, "other")[0])
    assert log.freeze(fork_at(3))
    assert log.fork is not None
    assert log.fork.seq == 2  # op 3 names op 2, and so shows that they parted before
    assert not log.freeze(fork_at(4))
    assert not log.freeze(fork_at(3))
    assert log.freeze(first)
    assert (log.seq, log.head) == (0, NO_OP)


def test_only_different_ops_of_one_author_at_one_place_are_a_fork() -> None:
    one, two = chain(2)
    forged = dataclasses.replace(seal(update=Document().set({"policy": 5})), signature=bytes(64))
    for pair in ((one, one), (one, two), (one, seal(swarm=OTHER)), (one, forged)):
        with pytest.raises(ProtocolError):
            prove(*pair)


@pytest.mark.parametrize(
    ("sealed", "error"),
    [
        (seal(BOB), ProtocolError),
        (seal(BOB, author=BOB.peer_id), ProtocolError),
        (seal(swarm=OTHER), ProtocolError),
        (seal(kind="presence/1"), SignatureError),
        (dataclasses.replace(seal(BOB), author=ANN.peer_id), SignatureError),
        (dataclasses.replace(seal(), signature=b""), SignatureError),
        (seal(seq=0), ProtocolError),
        (seal(seq=-1), ProtocolError),
        (seal(seq=2**63), ProtocolError),
        (seal(prev=bytes([1]) * 32), ProtocolError),
        (seal(seq=9, prev=bytes([1]) * 32, trail=bytes(16)), ProtocolError),
        (seal(lamport=0), ProtocolError),
        (seal(lamport=MAX_LAMPORT + 1), ProtocolError),
        (seal(prev=b""), ProtocolError),
        (seal(update=b"garbage"), ProtocolError),
        (seal(update=b""), ProtocolError),
        (seal(update="text"), ProtocolError),
        (seal(update=b"x" * MAX_OP_BYTES), LimitError),
        (ANN.seal(KIND, b"garbage"), ProtocolError),
        (ANN.seal(KIND, b"\x91" * 5000), ProtocolError),
    ],
)
def test_what_is_not_an_op_of_this_log_is_refused(sealed: Signed, error: type[Exception]) -> None:
    log = OpLog(SWARM, ANN.peer_id)
    with pytest.raises(error):
        log.append(sealed)
    assert log.seq == 0
    assert log.append(seal()) is Outcome.APPENDED


def test_lamport_time_never_runs_backwards() -> None:
    first = seal(lamport=9)
    log = a_log([first])
    author = Document([open_op(first).update])
    update = author.set({"policy": 2})
    with pytest.raises(ProtocolError):
        log.append(seal(seq=2, prev=op_hash(first), lamport=8, update=update))
    assert log.append(seal(seq=2, prev=op_hash(first), lamport=9, update=update)) is Outcome.APPENDED


def test_a_log_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = chain(3)
    monkeypatch.setattr(oplog, "MAX_LOG_BYTES", sum(len(encode(sealed)) for sealed in ops[:2]))
    log = a_log(ops[:2])
    with pytest.raises(LimitError):
        log.append(ops[2])
    assert log.seq == 2


def test_an_update_that_breaks_the_yjs_document_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = chain(2)
    log = a_log([first])
    monkeypatch.setattr(
        document, "_check_update", lambda update, known: document._Changes(("policy",), (encode("1"),), (None,), 1, ())
    )  # as if it saw nothing wrong
    with pytest.raises(ProtocolError):
        log.append(seal(seq=2, prev=op_hash(first), lamport=2, update=b"\x01\x01\x01\x01\xff\xff\xff"))
    monkeypatch.undo()
    assert log.document.values() == {"policy": "1"}
    assert log.append(second) is Outcome.APPENDED
    assert log.document.values() == {"policy": "2"}


def test_an_op_reads_back() -> None:
    op = open_op(seal())
    assert op == Op(swarm=SWARM, author=ANN.peer_id, seq=1, prev=NO_OP, lamport=1, update=op.update)
    assert type(op.swarm) is SwarmId
