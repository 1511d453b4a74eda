"""What a node keeps: swarms, ops and small facts in one SQLite file, and blocks in a folder beside it (`blocks`).

What a method has written when it returns survives a kill and a power cut: the file is in WAL mode with
``synchronous=FULL``, and each method is one transaction. All methods block, except where it is said that they do not;
the daemon calls them from worker threads. One connection behind one lock serves them all, so calls from several threads
wait for each other and never mix.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from shoal.crdt.oplog import Fork, open_op, prove
from shoal.node.store.blocks import BlockStore
from shoal.node.store.errors import StorageError, StorageFullError
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.limits import MAX_OP_BYTES
from shoal.protocol.signing import Signed

SCHEMA_VERSION: Final = 4
_BLOCKS_IN_FILE: Final = 3
"""The schema that had blocks as rows; they become files once."""
KEPT: Final = "kept/"
"""Facts that begin so name, by who keeps them, what of the blocks is to stay."""
MAX_WAL_BYTES: Final = 4 * 1024 * 1024
"""What is kept of the write-ahead log's file once all of it is in the file itself."""

_SCHEMA: Final = """
CREATE TABLE swarms (
    swarm TEXT PRIMARY KEY, manifest BLOB NOT NULL, role TEXT NOT NULL, joined_at REAL NOT NULL,
    has_left INTEGER NOT NULL DEFAULT 0, addresses BLOB NOT NULL
) STRICT;
CREATE TABLE ops (
    swarm TEXT NOT NULL REFERENCES swarms (swarm), author TEXT NOT NULL, seq INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (swarm, author, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE forks (
    swarm TEXT NOT NULL REFERENCES swarms (swarm), author TEXT NOT NULL, one BLOB NOT NULL, other BLOB NOT NULL,
    PRIMARY KEY (swarm, author)
) STRICT, WITHOUT ROWID;
"""
"""Of an author's ops, those from its newest snapshot on are kept; of one who signed two logs, the proof."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSwarm:
    """A swarm that this node joined.

    Attributes:
        swarm: its name.
        manifest: the bytes that the name stands for.
        role: what this node does in it.
        joined_at: Unix seconds.
        has_left: whether this node left it for good.
        addresses: of members, as last known: those of the ticket first.
    """

    swarm: SwarmId
    manifest: bytes
    role: str
    joined_at: float
    has_left: bool = False
    addresses: tuple[str, ...] = ()


class Storage:
    """One open file. Close it, or use it as a context manager."""

    __slots__ = ("_db", "_lock", "blocks", "path", "trees")

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open the file; create it, with mode 0600, if there is none.

        Args:
            path: of the file; its folder must exist. SQLite puts ``-wal`` and ``-shm`` beside it, ``blocks`` is the
                folder of the blocks of runs, and ``models`` that of the blocks of trees.
            clock: Unix seconds, for the order of use of blocks.

        Raises:
            StorageError: if it cannot be opened, is no such file, or was written by a newer or an older Shoal.
        """
        self.path = path
        self._lock = threading.Lock()
        with self._explained():
            try:
                path.touch(mode=0o600)
            except OSError as error:
                raise StorageError(f"{path} cannot be opened: {error.strerror}; check the folder's rights") from error
            self._db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(clock)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the file; nothing works afterwards."""
        with self._lock, self._explained():
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- swarms ---

    def add_swarm(self, swarm: StoredSwarm) -> None:
        """Remember a swarm, or replace what is remembered of it except when it was joined."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO swarms (swarm, manifest, role, joined_at, has_left, addresses) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (swarm) DO UPDATE SET role = excluded.role, has_left = excluded.has_left,"
                " addresses = excluded.addresses",
                (
                    *(str(swarm.swarm), swarm.manifest, swarm.role, swarm.joined_at),
                    *(int(swarm.has_left), encode(swarm.addresses)),
                ),
            )

    def list_swarms(self) -> list[StoredSwarm]:
        """Every swarm, those left too, in the order in which they were joined."""
        rows = self._rows(
            "SELECT swarm, manifest, role, joined_at, has_left, addresses FROM swarms ORDER BY joined_at, swarm"
        )
        with self._explained():
            return [
                StoredSwarm(
                    swarm=SwarmId.parse(swarm),
                    manifest=manifest,
                    role=role,
                    joined_at=joined_at,
                    has_left=bool(has_left),
                    addresses=decode(tuple[str, ...], addresses),
                )
                for swarm, manifest, role, joined_at, has_left, addresses in rows
            ]

    def set_left(self, swarm: SwarmId, has_left: bool = True) -> None:
        """Remember that this node left a swarm, or came back."""
        with self._transaction() as db:
            db.execute("UPDATE swarms SET has_left = ? WHERE swarm = ?", (int(has_left), str(swarm)))

    def set_addresses(self, swarm: SwarmId, addresses: Sequence[str]) -> None:
        """Remember where members of a swarm were reached last."""
        with self._transaction() as db:
            db.execute("UPDATE swarms SET addresses = ? WHERE swarm = ?", (encode(tuple(addresses)), str(swarm)))

    # --- ops ---

    def append_ops(self, swarm: SwarmId, ops: Iterable[Signed], forks: Iterable[Fork] = ()) -> None:
        """Keep ops that were accepted, all or none; those kept already are no error.

        Args:
            swarm: of all of them.
            ops: in order for each author. With a snapshot, those of its author before it go.
            forks: kept before the ops, each in the place of an earlier one of its author; ops from a fork on go.

        Raises:
            StorageError: if the swarm was not added, or another op is kept in the place of one of these.
        """
        opened = [(sealed, open_op(sealed)) for sealed in ops]
        with self._transaction() as db:
            for fork in forks:
                db.execute(
                    "INSERT INTO forks VALUES (?, ?, ?, ?) ON CONFLICT (swarm, author) DO UPDATE SET"
                    " one = excluded.one, other = excluded.other",
                    (str(swarm), str(fork.author), encode(fork.one), encode(fork.other)),
                )
                db.execute(
                    "DELETE FROM ops WHERE swarm = ? AND author = ? AND seq >= ?",
                    (str(swarm), str(fork.author), fork.seq),
                )
            for sealed, op in opened:
                row = (str(swarm), str(op.author), op.seq, encode(sealed))
                added = db.execute("INSERT INTO ops VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", row).rowcount
                if added == 0:
                    (held,) = db.execute(
                        "SELECT sealed FROM ops WHERE swarm = ? AND author = ? AND seq = ?", row[:3]
                    ).fetchone()
                    if held != row[3]:
                        raise StorageError(
                            f"{self.path} holds another op {op.seq} of {op.author}; stop other nodes that use this "
                            "profile"
                        )
                if op.trail is not None:
                    db.execute("DELETE FROM ops WHERE swarm = ? AND author = ? AND seq < ?", row[:3])

    def load_ops(self, swarm: SwarmId) -> list[Signed]:
        """Every op of a swarm, by author and sequence number."""
        rows = self._rows("SELECT sealed FROM ops WHERE swarm = ? ORDER BY author, seq", (str(swarm),))
        with self._explained():
            return [decode(Signed, sealed, max_bytes=MAX_OP_BYTES) for (sealed,) in rows]

    def load_forks(self, swarm: SwarmId) -> list[Fork]:
        """The fork kept of each author of a swarm who signed two logs."""
        rows = self._rows("SELECT one, other FROM forks WHERE swarm = ? ORDER BY author", (str(swarm),))
        with self._explained():
            return [prove(*(decode(Signed, sealed, max_bytes=MAX_OP_BYTES) for sealed in row)) for row in rows]

    def disk_bytes(self) -> int:
        """What the file, its write-ahead log and the blocks take on disk. Does not block."""
        return self.log_bytes() + self.blocks.num_bytes + self.trees.num_bytes

    def log_bytes(self) -> int:
        """The same without the blocks. Does not block."""
        found = 0
        for name in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            with suppress(FileNotFoundError):
                found += name.stat().st_size
        return found

    # --- facts ---

    def put_fact(self, name: str, value: bytes) -> None:
        """Keep some bytes under a name of the caller's choosing."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (name, value)
            )

    def delete_fact(self, name: str) -> None:
        """Forget what was kept under a name."""
        with self._transaction() as db:
            db.execute("DELETE FROM facts WHERE name = ?", (name,))

    def list_facts(self, prefix: str) -> dict[str, bytes]:
        """Everything that was kept under a name that begins so."""
        rows = self._rows("SELECT name, value FROM facts WHERE substr(name, 1, ?) = ?", (len(prefix), prefix))
        return dict(rows)

    def get_fact(self, name: str) -> bytes | None:
        """What was kept under a name."""
        rows = self._rows("SELECT value FROM facts WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    # --- the file ---

    def _prepare(self, clock: Callable[[], float]) -> None:
        db = self._db
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"{self.path} is of schema {version}, newer than this Shoal's {SCHEMA_VERSION}; update Shoal"
            )
        if 0 < version < _BLOCKS_IN_FILE:
            raise StorageError(
                f"{self.path} was written by an older Shoal (schema {version}, now {SCHEMA_VERSION}), which kept "
                "swarms in another way; move it away, and the node starts afresh: join its runs anew"
            )
        if version == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {MAX_WAL_BYTES}")
        db.execute("PRAGMA foreign_keys = ON")
        if version == 0:
            if db.execute("SELECT 1 FROM sqlite_schema").fetchone():
                raise StorageError(f"{self.path} is a database of something else; choose another place for it")
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        self.blocks = BlockStore(self.path.with_name("blocks"), clock)
        self.trees = BlockStore(self.path.with_name("models"), clock)
        if version == _BLOCKS_IN_FILE:
            self._move_blocks_out()

    def _move_blocks_out(self) -> None:
        """Once: rows become files, then the table goes. A kill in between leaves both, and it begins again."""
        db = self._db
        for cid, data in db.execute("SELECT cid, data FROM blocks"):
            if Cid(cid).matches(data):  # one that was damaged is fetched again
                self.blocks.put({Cid(cid): data}, is_checked=True)
        rows = db.execute("SELECT cid FROM blocks WHERE pinned")
        pinned = [(f"{KEPT}pinned/{cid}", encode((cid,))) for (cid,) in rows]
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", pinned)
        db.execute("DROP TABLE blocks")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
        db.executescript("PRAGMA incremental_vacuum")

    def _rows(self, query: str, arguments: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._explained():
            return self._db.execute(query, arguments).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise (StorageFullError if is_full else StorageError)(f"{self.path}: {_advice(error)}") from error
        except ProtocolError as error:
            raise StorageError(f"{self.path} is damaged ({error}); move it away, and the node starts afresh") from error


def _advice(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorname", "").split("_"):
        case ["SQLITE", "FULL", *_]:
            return "the disk is full; free some space, or start the node with a lower --max-disk"
        case ["SQLITE", "READONLY" | "PERM" | "CANTOPEN" | "AUTH", *_]:
            return f"it cannot be written ({error}); check the rights of the file and its folder"
        case ["SQLITE", "BUSY" | "LOCKED", *_]:
            return "another process uses it; stop the other node of this profile"
        case ["SQLITE", "CORRUPT" | "NOTADB", *_]:
            return f"it is damaged ({error}); move it away, and the node starts afresh"
        case ["SQLITE", "CONSTRAINT", *_]:
            return f"this does not fit what is stored ({error}); add the swarm first"
        case ["SQLITE", "IOERR", *_]:
            return f"the disk failed ({error}); check it, and its free space"
    return f"{error}; check the file and its folder"
