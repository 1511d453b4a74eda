"""Whatever order, repetition or partition: nodes that heard the same ops hold the same documents."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt import sync
from shoal.crdt.document import Document
from shoal.crdt.oplog import KIND, MAX_LAMPORT, NO_OP, FrozenLogError, Op, op_hash, open_op
from shoal.crdt.sync import Head, Received, SwarmDocs, Version
from shoal.protocol.codec import encode
from shoal.protocol.errors import ProtocolError, TooLargeError, UsageError
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_OP_BYTES
from shoal.protocol.signing import Signed, Signer

SIGNERS = [Signer(bytes([n]) * 32) for n in range(1, 7)]
ANN, BOB, CAT = SIGNERS[:3]
SWARM = SwarmId.of_manifest(b"one")


def docs_of(signer: Signer, stored: list[Signed] | None = None) -> SwarmDocs:
    return SwarmDocs(SWARM, signer.peer_id, stored or [])


def all_ops(docs: SwarmDocs) -> list[Signed]:
    return docs.missing(Version(), 2**40)


def at(signer: Signer, seq: int, head: bytes = NO_OP) -> Version:
    return Version({signer.peer_id: Head(seq, head)})


def exchange(one: SwarmDocs, other: SwarmDocs, max_bytes: int = 2**40) -> None:
    while one.is_behind(other.version()):
        assert one.receive(other.missing(one.version(), max_bytes)).accepted
    while other.is_behind(one.version()):
        assert other.receive(one.missing(other.version(), max_bytes)).accepted


def first_op(signer: Signer, value: Any, lamport: int = 1) -> Signed:
    update = Document().set({"policy": value})
    op = Op(swarm=SWARM, author=signer.peer_id, seq=1, prev=NO_OP, lamport=lamport, update=update)
    return signer.seal(KIND, encode(op))


steps = st.lists(
    st.tuples(st.just("write"), st.integers(0, 3), st.integers(0, 9))
    | st.tuples(st.just("sync"), st.integers(0, 3), st.integers(0, 3)),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(1, 3000))
def test_any_history_of_writes_and_partial_syncs_heals(history: list[tuple[str, int, int]], max_bytes: int) -> None:
    nodes = [docs_of(signer) for signer in SIGNERS[:4]]
    for what, one, two in history:
        if what == "write":
            nodes[one].write(SIGNERS[one], policy={"epoch": two}, evaluations={str(two): {"return": two / 3}})
        else:
            nodes[one].receive(nodes[two].missing(nodes[one].version(), max_bytes))
    for other in nodes[1:] + nodes[1:]:
        exchange(nodes[0], other, max_bytes)
    assert all(node.documents() == nodes[0].documents() for node in nodes)
    assert all(node.version() == nodes[0].version() for node in nodes)


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_any_order_and_any_duplication_gives_the_same_documents(rng: random.Random, batches: int) -> None:
    writers = [docs_of(signer) for signer in SIGNERS[:3]]
    for at in range(9):
        writers[at % 3].write(SIGNERS[at % 3], policy=at, größe=f"😀{at}")
        exchange(writers[0], writers[1 + at % 2])
    exchange(writers[0], writers[1])
    exchange(writers[0], writers[2])
    ops = all_ops(writers[0])
    shuffled = ops + rng.choices(ops, k=5)
    rng.shuffle(shuffled)
    reader = docs_of(SIGNERS[3])
    for _ in range(len(ops)):  # what came too early is offered again, as sync does
        for batch in range(batches):
            assert reader.receive(shuffled[batch::batches]).rejected == ()
    assert reader.documents() == writers[0].documents()
    assert docs_of(SIGNERS[3], shuffled).documents() == writers[0].documents()


def test_one_batch_may_be_in_any_order() -> None:
    writer = docs_of(ANN)
    ops = [writer.write(ANN, policy=n) for n in range(5)]
    received = docs_of(BOB).receive(reversed(ops))
    assert received.accepted == tuple(ops)
    assert not received.missing


def test_a_gap_names_whose_ops_are_missing() -> None:
    writer, reader = docs_of(ANN), docs_of(BOB)
    ops = [writer.write(ANN, policy=n) for n in range(3)]
    received = reader.receive(ops[1:])
    assert received == Received(missing=frozenset({ANN.peer_id}))
    assert reader.version() == Version()


def test_what_is_held_is_not_accepted_again() -> None:
    writer, reader = docs_of(ANN), docs_of(BOB)
    op = writer.write(ANN, policy=1)
    assert reader.receive([op, op]).accepted == (op,)
    assert reader.receive([op]) == Received()


def test_lamport_time_is_past_all_that_was_seen() -> None:
    ann, bob = docs_of(ANN), docs_of(BOB)
    for n in range(5):
        ann.write(ANN, policy=n)
    exchange(ann, bob)
    assert open_op(bob.write(BOB, policy=1)).lamport == 6


def test_a_liar_about_lamport_time_stops_nobody_from_writing() -> None:
    bob = docs_of(BOB)
    assert bob.receive([first_op(ANN, 1, lamport=MAX_LAMPORT)]).accepted
    for n in range(3):
        bob.write(BOB, policy=n)
    assert docs_of(CAT, all_ops(bob)).documents() == bob.documents()


def test_missing_keeps_to_its_bytes_but_always_moves_on() -> None:
    writer = docs_of(ANN)
    ops = [writer.write(ANN, policy="x" * 1000) for _ in range(5)]
    assert writer.missing(Version(), 0) == ops[:1]
    assert writer.missing(Version(), 2 * len(encode(ops[0])) + 50) == ops[:2]
    assert writer.missing(at(ANN, 3, op_hash(ops[2])), 2**40) == ops[3:]
    assert writer.missing(at(ANN, 99), 2**40) == []


def test_who_says_much_keeps_nobody_from_being_heard() -> None:
    ann, bob = docs_of(ANN), docs_of(BOB)
    for n in range(50):
        ann.write(ANN, policy="x" * 1000, n=n)
    bob.receive(all_ops(ann)[:40])
    last = [bob.write(BOB, policy=n) for n in range(3)]
    assert set(last) <= set(bob.missing(Version(), 5000))


def test_behind_and_ahead() -> None:
    writer = docs_of(ANN)
    op = writer.write(ANN, policy=1)
    assert writer.is_ahead(Version())
    assert not writer.is_ahead(at(ANN, 1, op_hash(op)))
    assert writer.is_behind(at(BOB, 3))
    assert not writer.is_behind(Version({ANN.peer_id: Head(1, op_hash(op)), BOB.peer_id: Head()}))


def test_who_has_no_place_for_more_authors_is_not_sent_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "MAX_MEMBERS", 3)
    reader = docs_of(ANN)
    reader.receive([first_op(signer, 1) for signer in SIGNERS[1:3]])
    monkeypatch.setattr(sync, "MAX_MEMBERS", 9)
    writer = docs_of(SIGNERS[3], [first_op(signer, 1) for signer in SIGNERS[1:]])
    monkeypatch.setattr(sync, "MAX_MEMBERS", 3)
    assert not writer.is_ahead(reader.version())
    assert not reader.is_behind(writer.version())
    assert writer.missing(reader.version(), 2**40) == []


def forked(common: int, one: int, two: int) -> tuple[list[Signed], list[Signed]]:
    """Ann's log, and what a copy of her node made of it: all ops of each."""
    original = docs_of(ANN)
    for n in range(common):
        original.write(ANN, policy=n)
    copy = docs_of(ANN, all_ops(original))
    for n in range(one):
        original.write(ANN, policy=f"original {n}")
    for n in range(two):
        copy.write(ANN, policy=f"copy {n}")
    return all_ops(original), all_ops(copy)


def settle(one: SwarmDocs, other: SwarmDocs, max_bytes: int = 2**40) -> int:
    """Sync until both say that there is nothing more; how many exchanges it took."""
    for count in range(200):
        if not (one.is_behind(other.version()) or other.is_behind(one.version())):
            assert one.missing(other.version(), 2**40) == other.missing(one.version(), 2**40) == []
            assert one.version() == other.version()
            assert one.documents() == other.documents()
            return count
        one.receive(other.missing(one.version(), max_bytes))
        other.receive(one.missing(other.version(), max_bytes))
    raise AssertionError("sync does not come to an end")


@pytest.mark.parametrize(("common", "one", "two"), [(0, 1, 1), (0, 66, 4), (5, 1, 1), (3, 2, 200), (40, 40, 40)])
@pytest.mark.parametrize("max_bytes", [1, 2**40])
def test_two_logs_of_one_author_end_the_same_everywhere(common: int, one: int, two: int, max_bytes: int) -> None:
    original, copy = forked(common, one, two)
    bob, cat = docs_of(BOB, original), docs_of(CAT, copy)
    bob.write(BOB, policy="bob")
    cat.write(CAT, policy="cat")
    settle(bob, cat, max_bytes)
    assert bob.frozen[ANN.peer_id].seq == cat.frozen[ANN.peer_id].seq == common + 1
    assert bob.documents().get(ANN.peer_id) == ({"policy": common - 1} if common else None)
    bob.write(BOB, policy="goes on")
    settle(bob, cat)
    assert cat.documents()[BOB.peer_id] == {"policy": "goes on"}


def test_a_far_fork_is_found_in_few_exchanges() -> None:
    original, copy = forked(3, 500, 400)
    assert settle(docs_of(BOB, original), docs_of(CAT, copy)) <= 16


def test_whoever_hears_of_a_fork_first_takes_what_is_before_it_later() -> None:
    original, copy = forked(4, 2, 2)
    bob, cat = docs_of(BOB, original), docs_of(CAT)
    bob.receive(copy)
    cat.receive([bob.frozen[ANN.peer_id].other, bob.frozen[ANN.peer_id].one])
    assert cat.frozen == bob.frozen
    assert cat.documents() == {}
    settle(bob, cat)
    assert cat.version().heads[ANN.peer_id].seq == 4


def test_what_is_refused_is_not_sent_again() -> None:
    original, copy = forked(2, 30, 30)
    bob, cat = docs_of(BOB, original), docs_of(CAT, copy)
    while ops := bob.missing(cat.version(), 2**40):
        assert cat.receive(ops).forks  # each exchange finds a lower one
    assert ANN.peer_id in cat.frozen
    assert bob.is_behind(cat.version())
    assert bob.receive(cat.missing(bob.version(), 2**40)).forks
    settle(bob, cat)
    assert cat.frozen[ANN.peer_id].seq == 3


def test_an_author_whose_log_turned_out_to_be_two_goes_on_reading_but_writes_no_more() -> None:
    original, copy = forked(2, 3, 1)
    ann, bob = docs_of(ANN, copy), docs_of(BOB, original)
    settle(ann, bob)
    assert list(ann.frozen) == [ANN.peer_id]
    with pytest.raises(FrozenLogError, match="new profile"):
        ann.write(ANN, policy=9)
    bob.write(BOB, policy=1)
    settle(ann, bob)
    assert ann.documents()[BOB.peer_id] == {"policy": 1}


def test_a_fork_survives_a_restart() -> None:
    original, copy = forked(2, 3, 3)
    bob = docs_of(BOB, original)
    received = bob.receive(copy)
    assert [fork.seq for fork in received.forks] == [3]
    assert all(op not in received.accepted for op in (*original[3:], *copy[3:]))
    again = SwarmDocs(SWARM, BOB.peer_id, all_ops_held(bob), received.forks)
    assert again.version() == bob.version()
    assert again.documents() == bob.documents()


def all_ops_held(docs: SwarmDocs) -> list[Signed]:
    frozen = {author: Head(fork=fork.seq) for author, fork in docs.frozen.items()}
    return docs.missing(Version(frozen), 2**40)


def test_a_forged_rival_proves_nothing() -> None:
    bob, (op,) = docs_of(BOB), forked(0, 1, 0)[0]
    bob.receive([op])
    forged = Signed(ANN.peer_id, first_op(ANN, "other").payload, op.signature)
    assert len(bob.receive([forged]).rejected) == 1
    assert len(docs_of(CAT).receive([forged, op]).accepted) == 1
    assert bob.frozen == {}


def test_hostile_ops_are_rejected_one_by_one() -> None:
    reader, good = docs_of(BOB), first_op(ANN, 1)
    bad = [
        Signed(author=CAT.peer_id, payload=good.payload, signature=good.signature),
        Signed(author=ANN.peer_id, payload=b"", signature=b""),
        CAT.seal(KIND, b"\xc1"),
        CAT.seal(KIND, b"x" * MAX_OP_BYTES),
        CAT.seal("manifest/1", first_op(CAT, 1).payload),
    ]
    received = reader.receive([*bad, good])
    assert received.accepted == (good,)
    assert len(received.rejected) == len(bad)
    assert reader.version().heads.keys() == {ANN.peer_id}


def test_authors_are_bounded_and_a_forged_op_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "MAX_MEMBERS", 3)  # one place is the reader's own
    reader = docs_of(ANN)
    forged = Signed(BOB.peer_id, first_op(BOB, 1).payload, b"0" * 64)
    assert len(reader.receive([forged]).rejected) == 1
    received = reader.receive([first_op(signer, 1) for signer in SIGNERS[1:5]])
    assert len(received.accepted) == 2
    assert len(received.rejected) == 2
    reader.write(ANN, policy=1)


def test_only_the_own_key_writes() -> None:
    with pytest.raises(UsageError):
        docs_of(ANN).write(BOB, policy=1)


def test_a_write_that_fails_changes_nothing() -> None:
    docs = docs_of(ANN)
    with pytest.raises(UsageError):
        docs.write(ANN, policy=b"bytes")
    with pytest.raises(TooLargeError):
        docs.write(ANN, policy="x" * MAX_OP_BYTES)
    docs.write(ANN, policy=1)
    assert docs_of(BOB, all_ops(docs)).documents() == docs.documents()


def test_a_restored_node_goes_on_where_it_was() -> None:
    before = docs_of(ANN)
    before.write(ANN, policy=1)
    before.receive([first_op(BOB, 1)])
    after = docs_of(ANN, all_ops(before))
    assert after.documents() == before.documents()
    assert open_op(after.write(ANN, policy=2)).seq == 2
    assert before.receive(all_ops(after)).rejected == ()


def test_a_node_that_lost_its_disk_gets_its_own_ops_back() -> None:
    ann, bob = docs_of(ANN), docs_of(BOB)
    ann.write(ANN, policy=1)
    exchange(ann, bob)
    again = docs_of(ANN)
    exchange(again, bob)
    again.write(ANN, policy=2)
    assert bob.receive(all_ops(again)).rejected == ()
    assert bob.documents()[ANN.peer_id] == {"policy": 2}


@pytest.mark.parametrize("damage", ["gap", "forgery"])
def test_damaged_storage_is_told(damage: str) -> None:
    writer = docs_of(ANN)
    first, second = (writer.write(ANN, policy=n) for n in range(2))
    with pytest.raises(ProtocolError, match="damaged"):
        docs_of(ANN, [second] if damage == "gap" else [first, Signed(ANN.peer_id, second.payload, bytes(64))])
