"""A log is compacted by its author's snapshots: nobody has to hold the past, and nobody can rewrite it unseen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt import document, oplog
from shoal.crdt.document import KEPT_ENTRIES, Document
from shoal.crdt.oplog import COMPACT_OPS, Fork, Op, OpLog, Outcome, contradiction, op_hash, open_op, read_op
from shoal.crdt.snapshots import NAME_BYTES, WINDOW, places, thinned
from shoal.crdt.sync import Head, Received, SwarmDocs, Version
from shoal.protocol.codec import encode
from shoal.protocol.errors import ProtocolError, TooLargeError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer

SIGNERS = [Signer(bytes([n]) * 32) for n in range(1, 5)]
ANN, BOB, CAT = SIGNERS[:3]
SWARM = SwarmId.of_manifest(b"one")


def docs_of(signer: Signer, stored: list[Signed] | None = None) -> SwarmDocs:
    return SwarmDocs(SWARM, signer.peer_id, stored or [])


def all_ops(docs: SwarmDocs) -> list[Signed]:
    return docs.missing(Version(), 2**40)


def write(docs: SwarmDocs, signer: Signer, count: int, tag: str = "") -> list[Signed]:
    return [docs.write(signer, policy=f"{tag}{n}") for n in range(count)]


def settle(nodes: list[SwarmDocs], max_bytes: int = 2**40) -> None:
    """Sync in a ring and back until everybody says that there is nothing more."""
    for _ in range(300):
        is_done = True
        for one in nodes:
            for other in nodes:
                if one is not other:
                    ops = other.missing(one.version(), max_bytes)
                    is_done = is_done and not ops
                    one.receive(ops)
        if is_done:
            break
    else:
        raise AssertionError("sync does not come to an end")
    for node in nodes[1:]:
        assert node.version() == nodes[0].version()
        assert node.documents() == nodes[0].documents()
        assert not node.is_behind(nodes[0].version())


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_what_a_snapshot_names_suffices_to_make_the_next(seq: int, step: int) -> None:
    known = {*places(seq), *range(max(seq - 1, 1), seq + step)}
    assert {*places(seq + step)} <= known
    assert set(places(seq)) >= set(range(max(seq - WINDOW, 1), seq - 1))
    assert len(places(seq)) <= WINDOW + WINDOW // 2 * 16
    assert list(places(seq)) == sorted(set(places(seq)), reverse=True)


@given(st.dictionaries(st.text(max_size=3), st.integers()), st.integers(1, 40))
def test_thinning_keeps_the_newest(entries: dict[str, int], keep: int) -> None:
    kept = thinned(entries, keep)
    assert len(kept) == min(len(entries), keep) or keep // 2 <= len(kept) <= keep
    assert list(kept.items())[-(keep // 2) or len(kept) :] == list(entries.items())[-(keep // 2) or len(entries) :]
    assert kept.items() <= entries.items()


def test_a_log_of_any_age_stays_small_and_its_author_never_meets_a_limit() -> None:
    ann, bob = docs_of(ANN), docs_of(BOB)
    for epoch in range(3000):
        entry = {"cid": "b" * 59, "return": epoch / 7, "env_steps": epoch * 2048, "episodes": 20}
        op = ann.write(ANN, policy={"epoch": epoch, "cid": "b" * 59}, evaluations={str(epoch): entry})
        bob.receive([op])
    assert ann.num_ops <= COMPACT_OPS
    assert sum(len(encode(op)) for op in all_ops(ann)) < 256 * 1024
    assert bob.documents() == ann.documents()
    registers = ann.documents()[ANN.peer_id]
    assert registers["policy"]["epoch"] == 2999
    assert KEPT_ENTRIES <= len(registers["evaluations"]) <= KEPT_ENTRIES + COMPACT_OPS
    newest = [str(epoch) for epoch in range(3000 - KEPT_ENTRIES // 2, 3000)]
    assert list(registers["evaluations"])[-len(newest) :] == newest
    assert next(iter(registers["evaluations"])) == "0"


def test_whoever_holds_nothing_takes_the_snapshot_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    ann = docs_of(ANN)
    write(ann, ANN, 35)
    ops = all_ops(ann)
    assert [open_op(op).seq for op in ops] == [31, 32, 33, 34, 35]
    bob = docs_of(BOB)
    assert bob.receive(ops).accepted == tuple(ops)
    assert bob.documents() == ann.documents()
    assert docs_of(CAT, all_ops(bob)).version() == ann.version()


def test_whoever_holds_older_ops_drops_them_for_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    ann, bob = docs_of(ANN), docs_of(BOB)
    early = write(ann, ANN, 7)
    bob.receive(early)
    write(ann, ANN, 28)
    assert bob.receive(ann.missing(bob.version(), 2**40)).rejected == ()
    assert bob.version() == ann.version()
    assert bob.num_ops == 5
    assert bob.receive(early) == Received()


def test_a_lost_log_goes_on_from_what_others_hold_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    ann, bob = docs_of(ANN), docs_of(BOB)
    write(ann, ANN, 25)
    settle([ann, bob])
    again = docs_of(ANN)
    settle([again, bob])
    write(again, ANN, 20)
    settle([again, bob, ann])
    assert bob.frozen == {}
    assert bob.version().heads[ANN.peer_id].seq == 45


def a_parting(common: int, one: int, two: int) -> tuple[SwarmDocs, SwarmDocs, list[Signed], list[Signed]]:
    """Bob and Cat, each of whom heard all of one of two logs of Ann that part after ``common`` ops; and the logs."""
    original, bob, cat = docs_of(ANN), docs_of(BOB), docs_of(CAT)
    shared = write(original, ANN, common)
    copy = docs_of(ANN, all_ops(original))
    ones, twos = write(original, ANN, one, "one "), write(copy, ANN, two, "two ")
    bob.receive([*shared, *ones])
    cat.receive([*shared, *twos])
    return bob, cat, [*shared, *ones], [*shared, *twos]


@pytest.mark.parametrize(
    ("common", "one", "two"),
    [(5, 1, 30), (5, 30, 30), (9, 1, 1), (10, 1, 1), (11, 40, 3), (15, 1, 200), (30, 200, 200), (0, 50, 1)],
)
def test_a_fork_before_or_across_a_snapshot_is_found(
    common: int, one: int, two: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    bob, cat, _, _ = a_parting(common, one, two)
    settle([bob, cat, docs_of(SIGNERS[3])], 1)
    assert list(bob.frozen) == list(cat.frozen) == [ANN.peer_id]
    assert max(common - WINDOW // 2, 0) < bob.frozen[ANN.peer_id].seq <= common + 1 + max(one, two) // 32


def test_a_fork_that_is_found_late_is_found_by_whoever_held_the_other_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cat was away with one of two logs while the other was compacted many times."""
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    bob, cat, _, _ = a_parting(100, 1000, 40)
    received = cat.receive(bob.missing(cat.version(), 2**40))
    assert [fork.author for fork in received.forks] == [ANN.peer_id]
    fork = received.forks[0]
    assert oplog.prove(fork.other, fork.one) == fork
    assert 101 <= fork.seq <= 101 + 32


def test_a_proof_across_a_snapshot_can_be_checked_by_anybody_and_forged_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    _, _, ones, twos = a_parting(5, 30, 3)
    snapshot, op = next(each for each in reversed(ones) if open_op(each).trail is not None), twos[6]
    fork = oplog.prove(snapshot, op)
    assert fork.seq == 6  # op 7 names op 6
    stranger = docs_of(SIGNERS[3])
    assert stranger.receive([snapshot, op]).forks == (fork,)
    forged = Signed(ANN.peer_id, op.payload, bytes(64))
    received = docs_of(SIGNERS[3]).receive([forged, snapshot])
    assert (received.forks, received.accepted) == ((), (snapshot,))
    with pytest.raises(ProtocolError):
        oplog.prove(snapshot, ones[6])


def test_a_snapshot_after_a_fork_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    bob, _, ones, twos = a_parting(5, 30, 3)
    dan = docs_of(SIGNERS[3], ones[:5])
    dan.receive([ones[5], twos[5]])
    assert dan.frozen[ANN.peer_id].seq == 6
    received = dan.receive(all_ops(bob))
    assert received.accepted == ()
    assert dan.documents()[ANN.peer_id] == {"policy": "4"}
    settle([bob, dan])  # Bob has nothing from before the fork, and is given it
    assert bob.documents()[ANN.peer_id] == {"policy": "4"}


def test_a_snapshot_that_does_not_name_all_of_its_places_is_none() -> None:
    fields: dict[str, Any] = {"swarm": SWARM, "author": ANN.peer_id, "seq": 9, "prev": bytes(32), "lamport": 1}
    for trail in (b"", bytes(NAME_BYTES), bytes(NAME_BYTES * 8)):
        with pytest.raises(ProtocolError):
            Op(**fields, update=b"x", trail=trail)
    Op(**fields, update=b"x", trail=bytes(NAME_BYTES * 7))


def test_a_snapshot_that_cannot_be_applied_changes_nothing() -> None:
    ann, bob = docs_of(ANN), docs_of(BOB)
    first = write(ann, ANN, 3)
    bob.receive(first)
    fields: dict[str, Any] = {"swarm": SWARM, "author": ANN.peer_id, "seq": 4, "prev": op_hash(first[-1]), "lamport": 9}
    trail = b"".join(op_hash(first[place - 1])[:NAME_BYTES] for place in places(4))
    bad = ANN.seal(oplog.KIND, encode(Op(**fields, update=b"garbage", trail=trail)))
    assert len(bob.receive([bad]).rejected) == 1
    assert bob.documents() == ann.documents()
    good = ANN.seal(oplog.KIND, encode(Op(**fields, update=Document().set({"new": 1}), trail=trail)))
    assert bob.receive([good]).accepted == (good,)
    assert bob.documents()[ANN.peer_id] == {"new": 1}


def test_an_author_who_never_compacts_is_heard_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    author = docs_of(ANN)
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10**6)
    ops = write(author, ANN, 12)
    monkeypatch.setattr(oplog, "MAX_LOG_OPS", 10)
    bob = docs_of(BOB)
    received = bob.receive(ops)
    assert received.accepted == tuple(ops[:10])
    assert len(received.rejected) == 1
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    snapshot = write(author, ANN, 1)
    assert bob.receive(snapshot).accepted == tuple(snapshot)


def test_registers_that_do_not_fit_into_a_snapshot_are_not_written_at_all() -> None:
    ann = docs_of(ANN)
    ann.write(ANN, one="x" * 20_000)
    with pytest.raises(TooLargeError):
        ann.write(ANN, two="x" * 20_000)
    for n in range(600):
        ann.write(ANN, one="x" * 20_000, evaluations={str(n): "y" * 100})
    assert docs_of(BOB, all_ops(ann)).documents() == ann.documents()


def test_a_snapshot_keeps_fewer_entries_where_they_are_large() -> None:
    author = Document()
    for n in range(60):
        author.set({"evaluations": {str(n): "x" * 2000}})
    compacted, update = author.compacted({"evaluations": {"60": 1}})
    assert len(update) <= document.MAX_SNAPSHOT_BYTES
    kept = compacted.values()["evaluations"]
    assert list(kept)[-4:] == ["57", "58", "59", "60"]
    assert Document([update]).values() == compacted.values()


def test_a_log_that_was_restored_is_checked_by_its_head() -> None:
    ops = write(docs_of(ANN), ANN, 5)
    log = OpLog(SWARM, ANN.peer_id)
    forged = Signed(ANN.peer_id, ops[1].payload, bytes(64))
    assert log.append(ops[0]) is Outcome.APPENDED
    with pytest.raises(ProtocolError, match="damaged"):
        docs_of(BOB, [ops[0], forged, *ops[2:]])
    assert contradiction(read_op(forged).claims(), read_op(ops[2]).claims()) == 2


class Node:
    """One node and its disk, as `shoal.node.store.database` keeps it."""

    def __init__(
        self, signer: Signer, ops: list[Signed] | None = None, forks: dict[PeerId, Fork] | None = None
    ) -> None:
        self.signer = signer
        self.disk = list(ops or [])
        self.forks = dict(forks or {})
        self.docs = SwarmDocs(SWARM, signer.peer_id, self.disk, self.forks.values())

    def write(self, value: int) -> None:
        if self.signer.peer_id not in self.docs.frozen:
            self.store((self.docs.write(self.signer, policy=value, evaluations={str(value): value}),))

    def sync(self, other: Node, max_bytes: int) -> bool:
        ops = other.docs.missing(self.docs.version(), max_bytes)
        received = self.docs.receive(ops)
        self.store(received.accepted, received.forks)
        return bool(ops)

    def store(self, ops: tuple[Signed, ...], forks: tuple[Fork, ...] = ()) -> None:
        for fork in forks:
            self.forks[fork.author] = fork
            self.disk = [op for op in self.disk if op.author != fork.author or open_op(op).seq < fork.seq]
        for op in ops:
            if open_op(op).trail is not None:
                self.disk = [held for held in self.disk if held.author != op.author]
            self.disk.append(op)

    def restart(self) -> None:
        before = self.docs
        self.docs = SwarmDocs(SWARM, self.signer.peer_id, self.disk, self.forks.values())
        assert self.docs.version() == before.version()
        assert self.docs.documents() == before.documents()

    def copy(self) -> Node:
        return Node(self.signer, self.disk, self.forks)


acts = st.lists(
    st.tuples(st.sampled_from(["write", "write", "write", "sync", "restart", "back up", "restore"]), st.integers(0, 4))
    | st.tuples(st.just("sync"), st.integers(0, 24)),
    max_size=60,
)


@settings(max_examples=120, deadline=None)
@given(acts, st.sampled_from([1, 900, 2**40]))
def test_any_interleaving_of_ops_snapshots_and_forks_ends_equal_everywhere(
    history: list[tuple[str, int]], max_bytes: int
) -> None:
    """Two nodes have one key; any may be put back to an older copy of its disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oplog, "COMPACT_OPS", 4)
        nodes = [Node(signer) for signer in (ANN, ANN, BOB, CAT, SIGNERS[3])]
        backups = [node.copy() for node in nodes]
        for number, (what, index) in enumerate(history):
            at, other = index % 5, index // 5
            match what:
                case "write":
                    for n in range(3):
                        nodes[at].write(3 * number + n)
                case "sync":
                    if at != other:
                        nodes[at].sync(nodes[other], max_bytes)
                case "restart":
                    nodes[at].restart()
                case "back up":
                    backups[at] = nodes[at].copy()
                case "restore":
                    nodes[at] = backups[at].copy()
        for _ in range(500):
            sent = sum(one.sync(other, max_bytes) for one in nodes for other in nodes if one is not other)
            if not sent:
                break
        else:
            raise AssertionError("sync does not come to an end")
        first = nodes[0].docs
        for node in nodes:
            assert node.docs.version() == first.version()
            assert node.docs.documents() == first.documents()
            assert {author: fork.seq for author, fork in node.docs.frozen.items()} == {
                author: fork.seq for author, fork in first.frozen.items()
            }
            node.restart()


def test_heads_of_liars_are_answered() -> None:
    ann = docs_of(ANN)
    write(ann, ANN, COMPACT_OPS + 20)
    for head in (Head(), Head(3, bytes(32)), Head(2**40, bytes(32)), Head(0, bytes(32), 1), Head(260, bytes(32), 300)):
        ann.missing(Version({ANN.peer_id: head}), 1000)
        ann.is_behind(Version({ANN.peer_id: head}))
