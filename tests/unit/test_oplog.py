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
)
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, SignatureError, TooLargeError
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
    assert [sealed for _, sealed, _ in log.after(1)] == chain(3)[1:]
    assert log.after(-5) == log.after(0)
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
    assert log.rival(2) == chain(3)[1]


def test_an_op_after_a_different_past_is_not_taken() -> None:
    log = a_log(chain(2))
    assert log.append(chain(3, "other")[2]) is Outcome.ASTRAY
    assert log.seq == 2


def fork_at(seq: int, *starts: str) -> Fork:
    return prove(*(chain(seq, start)[-1] for start in starts))


def test_a_fork_cuts_the_log_and_its_lower_op_stands() -> None:
    ops = chain(4)
    sides = [ops[1], seal(seq=2, prev=op_hash(ops[0]), lamport=2, update=open_op(chain(2, "other")[1]).update)]
    fork = prove(*sides)
    assert fork == prove(*reversed(sides))
    assert fork.stands_hash == min(map(op_hash, sides))
    log = a_log(ops)
    assert log.freeze(fork)
    assert (log.seq, log.document.values()) == (1, {"policy": "1"})
    assert log.settle() == fork.stands
    assert log.settle() is None
    assert (log.seq, log.num_bytes) == (2, sum(len(encode(sealed)) for sealed in (ops[0], fork.stands)))
    assert log.append(ops[2]) is Outcome.FROZEN
    assert log.append(fork.other) is Outcome.FROZEN
    assert log.append(fork.stands) is Outcome.HELD
    with pytest.raises(FrozenLogError):
        log.check_room()


def test_of_several_forks_the_lowest_counts() -> None:
    log = a_log(chain(4))
    assert log.freeze(fork_at(3, "", "other"))
    assert not log.freeze(fork_at(4, "", "other"))
    assert not log.freeze(fork_at(3, "", "other"))
    assert log.freeze(fork_at(1, "", "other"))
    assert log.seq == 0
    assert log.settle() == fork_at(1, "", "other").stands
    three = sorted((seal(update=Document().set({"policy": n})) for n in range(3)), key=op_hash)
    log = a_log([three[2]])
    assert log.freeze(prove(*three[1:]))
    assert log.settle() == three[1]
    assert log.append(three[2]) is Outcome.FROZEN
    assert log.append(three[0]) is Outcome.FORKED
    assert log.freeze(prove(*three[:2]))
    assert log.settle() == three[0]


def test_where_the_lower_op_of_a_fork_does_not_fit_nothing_stands() -> None:
    ops = chain(3)
    wild = min((seal(seq=2, prev=bytes([n]) * 32) for n in range(64)), key=op_hash)
    log = a_log(ops)
    fork = prove(wild, ops[1])
    assert fork.stands == wild
    assert log.freeze(fork)
    assert log.settle() is None
    assert log.seq == 1


def test_only_different_ops_of_one_author_at_one_place_are_a_fork() -> None:
    one, two = chain(2)
    forged = dataclasses.replace(seal(update=Document().set({"policy": 5})), signature=bytes(64))
    for pair in ((one, one), (one, two), (one, seal(swarm=OTHER)), (one, forged), (one,)):
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
    with pytest.raises(TooLargeError):
        log.check_room()
    assert log.seq == 2


def test_an_update_that_breaks_the_yjs_document_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = chain(2)
    log = a_log([first])
    monkeypatch.setattr(document, "_check_update", lambda update, clock: (1, 1))  # as if it saw nothing wrong
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
