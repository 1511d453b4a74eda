"""What was acknowledged is there afterwards, whatever happened to the process; what cannot be done is told clearly."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.crdt import oplog
from shoal.crdt.sync import SwarmDocs
from shoal.node.store.database import KEPT, SCHEMA_VERSION, Storage, StoredSwarm
from shoal.node.store.errors import StorageError
from shoal.protocol.codec import encode
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.limits import BLOCK_BYTES
from shoal.protocol.signing import Signed, Signer

ANN, BOB = Signer(b"a" * 32), Signer(b"b" * 32)
SWARM, OTHER = SwarmId.of_manifest(b"one"), SwarmId.of_manifest(b"two")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.sqlite"


def a_swarm(swarm: SwarmId = SWARM, joined_at: float = 1.0) -> StoredSwarm:
    return StoredSwarm(
        swarm=swarm, manifest=b"one", role="learner", joined_at=joined_at, addresses=("/ip4/1.2.3.4/tcp/1",)
    )


def some_ops(count: int = 3, signer: Signer = ANN, start: str = "") -> list[Signed]:
    docs = SwarmDocs(SWARM, signer.peer_id)
    return [docs.write(signer, policy=f"{start}{n}") for n in range(count)]


def a_block(data: bytes) -> tuple[Cid, bytes]:
    return Cid.of_block(data), data


def test_swarms_survive(path: Path) -> None:
    with Storage(path) as storage:
        storage.add_swarm(a_swarm(OTHER, joined_at=2.0))
        storage.add_swarm(a_swarm())
        storage.set_left(OTHER)
        storage.set_addresses(SWARM, ["/ip6/::1/tcp/2"])
    with Storage(path) as storage:
        first, second = storage.list_swarms()
        assert (first.swarm, first.manifest, first.has_left, first.addresses) == (
            SWARM,
            b"one",
            False,
            ("/ip6/::1/tcp/2",),
        )
        assert type(first.swarm) is SwarmId
        assert (second.swarm, second.has_left) == (OTHER, True)
        storage.add_swarm(a_swarm(OTHER, joined_at=99.0))  # joined again
        assert storage.list_swarms()[1] == a_swarm(OTHER, joined_at=2.0)


def test_ops_survive_in_order_and_once(path: Path) -> None:
    anns, bobs = some_ops(3), some_ops(2, BOB)
    with Storage(path) as storage:
        storage.add_swarm(a_swarm())
        storage.add_swarm(a_swarm(OTHER))
        storage.append_ops(SWARM, [*bobs, *anns[:2]])
        storage.append_ops(SWARM, anns)
        storage.append_ops(SWARM, [])
    with Storage(path) as storage:
        loaded = storage.load_ops(SWARM)
        assert len(loaded) == 5
        assert set(loaded) == {*anns, *bobs}
        restored = SwarmDocs(SWARM, ANN.peer_id, loaded)
        assert {author: head.seq for author, head in restored.version().heads.items()} == {
            ANN.peer_id: 3,
            BOB.peer_id: 2,
        }
        assert storage.load_ops(OTHER) == []


def test_ops_are_kept_all_or_none(path: Path) -> None:
    ops, fork = some_ops(3), some_ops(2, start="other")
    with Storage(path) as storage:
        storage.add_swarm(a_swarm())
        storage.append_ops(SWARM, ops[:2])
        with pytest.raises(StorageError, match="another op"):
            storage.append_ops(SWARM, [ops[2], fork[1]])
        assert storage.load_ops(SWARM) == ops[:2]
        with pytest.raises(StorageError, match="add the swarm first"):
            storage.append_ops(OTHER, ops)


def test_a_fork_cuts_what_is_kept_and_survives(path: Path) -> None:
    ops, other = some_ops(4), some_ops(4, start="other")
    docs = SwarmDocs(SWARM, BOB.peer_id, ops)
    with Storage(path) as storage:
        storage.add_swarm(a_swarm())
        storage.append_ops(SWARM, ops)
        for shown in (other[2:3], other[:1]):
            received = docs.receive(shown)
            assert len(received.forks) == 1
            storage.append_ops(SWARM, received.accepted, received.forks)
    with Storage(path) as storage:
        assert storage.load_forks(OTHER) == []
        again = SwarmDocs(SWARM, BOB.peer_id, storage.load_ops(SWARM), storage.load_forks(SWARM))
        assert again.frozen[ANN.peer_id].seq == 1
        assert again.version() == docs.version()
        assert again.documents() == docs.documents()


def test_a_snapshot_takes_the_place_of_what_is_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    ops = some_ops(35)
    with Storage(path) as storage:
        storage.add_swarm(a_swarm())
        storage.append_ops(SWARM, [*ops[:15], *some_ops(3, BOB)])
        for op in ops[15:]:
            storage.append_ops(SWARM, [op])
    with Storage(path) as storage:
        assert [op for op in storage.load_ops(SWARM) if op.author == ANN.peer_id] == ops[30:]
        again = SwarmDocs(SWARM, ANN.peer_id, storage.load_ops(SWARM))
        assert again.documents() == {ANN.peer_id: {"policy": "34"}, BOB.peer_id: {"policy": "2"}}


@pytest.mark.parametrize("version", range(1, 3))
def test_a_file_of_an_older_shoal_is_told_in_one_line(path: Path, version: int) -> None:
    Storage(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    with pytest.raises(StorageError, match="written by an older Shoal") as told:
        Storage(path)
    assert "\n" not in str(told.value)


def test_facts(path: Path) -> None:
    with Storage(path) as storage:
        assert storage.get_fact("name") is None
        storage.put_fact("name", b"one")
        storage.put_fact("name", b"two")
    with Storage(path) as storage:
        assert storage.get_fact("name") == b"two"


def test_the_file_is_private_and_durable(path: Path) -> None:
    with Storage(path) as storage:
        assert path.stat().st_mode & 0o777 == 0o600
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "user_version")
        values = [storage._db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
        assert values == ["wal", 2, 1, SCHEMA_VERSION]


def test_blocks_of_a_file_of_schema_3_become_files_once(path: Path) -> None:
    Storage(path).close()
    blocks = [a_block(f"block {n}".encode()) for n in range(5)]
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TABLE blocks (cid TEXT PRIMARY KEY, num_bytes INTEGER, last_used REAL, pinned INTEGER, data BLOB)"
        )
        db.executemany(
            "INSERT INTO blocks VALUES (?, 0, 0, ?, ?)", [(cid, n == 2, d) for n, (cid, d) in enumerate(blocks)]
        )
        db.execute("INSERT INTO blocks VALUES (?, 0, 0, 0, x'00')", (Cid.of_block(b"damaged"),))
        db.execute("PRAGMA user_version = 3")
    db.close()
    for _ in range(2):
        with Storage(path) as storage:
            assert [storage.blocks.get(cid) for cid, _ in blocks] == [data for _, data in blocks]
            assert len(storage.blocks) == 5
            assert storage.list_facts(KEPT) == {f"{KEPT}pinned/{blocks[2][0]}": encode((blocks[2][0],))}
            assert storage._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    Storage(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(StorageError, match="update Shoal"):
        Storage(path)


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE thing (x)")
    db.close()
    with pytest.raises(StorageError, match="something else"):
        Storage(path)
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StorageError, match="damaged"):
        Storage(path)


def test_damage_is_told_with_the_path(path: Path) -> None:
    with Storage(path) as storage:
        storage.add_swarm(a_swarm())
        storage.append_ops(SWARM, some_ops())
    with sqlite3.connect(path) as db:
        db.execute("UPDATE ops SET sealed = x'c1'")
    db.close()
    with Storage(path) as storage, pytest.raises(StorageError, match=r"node\.sqlite is damaged"):
        storage.load_ops(SWARM)


def test_a_full_disk_is_told_and_nothing_is_lost(path: Path) -> None:
    with Storage(path) as storage:
        storage.put_fact("before", b"x")
        pages = storage._db.execute("PRAGMA page_count").fetchone()[0]
        storage._db.execute(f"PRAGMA max_page_count = {pages + 20}")
        with pytest.raises(StorageError, match="disk is full"):
            storage.put_fact("more", bytes(BLOCK_BYTES))
        assert storage.get_fact("before") == b"x"
        storage.put_fact("after", b"x")


def test_a_file_that_cannot_be_written_is_told(path: Path, tmp_path: Path) -> None:
    with Storage(path) as storage:
        storage._db.execute("PRAGMA query_only = ON")
        with pytest.raises(StorageError, match="cannot be written"):
            storage.put_fact("x", b"")
    with pytest.raises(StorageError, match="cannot be opened"):
        Storage(tmp_path / "no folder" / "node.sqlite")


WRITER = """
import sys
from pathlib import Path
from shoal.crdt.sync import SwarmDocs
from shoal.node.store.database import Storage
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer

signer, swarm = Signer(b"a" * 32), SwarmId.of_manifest(b"one")
storage = Storage(Path(sys.argv[1]))
docs = SwarmDocs(swarm, signer.peer_id, storage.load_ops(swarm))
while True:
    number = docs.seqs().get(signer.peer_id, 0)
    block = str(number + 1).encode()
    storage.blocks.put({Cid.of_block(block): block})
    op = docs.write(signer, policy={"epoch": number})
    storage.append_ops(swarm, [op])
    print(number + 1, flush=True)
"""


def test_a_writer_that_is_killed_loses_nothing_that_it_acknowledged(path: Path) -> None:
    with Storage(path) as storage:
        storage.add_swarm(a_swarm())
    acknowledged = 0
    for lines in (1, 40, 7):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(lines):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        with Storage(path) as storage:
            docs = SwarmDocs(SWARM, ANN.peer_id, storage.load_ops(SWARM))
            number = docs.seqs()[ANN.peer_id]
            assert acknowledged <= number <= acknowledged + 1
            assert docs.documents()[ANN.peer_id] == {"policy": {"epoch": number - 1}}
            for each in range(1, acknowledged + 1):
                assert storage.blocks.has(Cid.of_block(str(each).encode()))
