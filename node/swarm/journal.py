"""The documents of one swarm together with the disk: nothing is told, acknowledged or acted on that is not stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from shoal.crdt.oplog import Fork
from shoal.crdt.sync import Received, SwarmDocs, Version
from shoal.node.store.database import Storage, StorageError
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer


class Journal:
    """`SwarmDocs` behind a lock that is held until what was taken in is on disk.

    If the disk fails, what is held in memory is thrown away and read again, so that this node never signs two
    different ops with one number. Until it can be read, every method fails with a `StorageError`.
    """

    def __init__(self, swarm: SwarmId, signer: Signer, docs: SwarmDocs, storage: Storage) -> None:
        self._swarm = swarm
        self._signer = signer
        self._docs = docs
        self._storage = storage
        self._lock = trio.Lock()
        self._must_reload = False
        self._documents: dict[PeerId, dict[str, Any]] | None = None

    @property
    def frozen(self) -> dict[PeerId, Fork]:
        """The authors who were shown to keep two logs, by what shows it."""
        return self._docs.frozen

    def documents(self) -> dict[PeerId, dict[str, Any]]:
        """Every author's registers."""
        if self._documents is None:
            self._documents = self._docs.documents()
        return self._documents

    def seqs(self) -> dict[PeerId, int]:
        """The newest sequence number held of each author."""
        return self._docs.seqs()

    async def write(self, registers: dict[str, Any]) -> Signed:
        """Set registers of this node's document; returns the op when it is on disk.

        Raises:
            UsageError: if a register is not plain data; as a `FrozenLogError`, if two logs were signed with this key.
            LimitError: if it is too much.
            StorageError: if the disk fails. Nothing was changed then, as after any error.
        """
        async with self._lock:
            await self._ready()
            op = self._docs.write(self._signer, **registers)
            await self._store([op])
        return op

    async def receive(self, ops: Sequence[Signed]) -> Received:
        """Take in ops; returns when what is new is on disk.

        Raises:
            StorageError: if the disk fails. Nothing was changed then.
        """
        async with self._lock:
            await self._ready()
            received = self._docs.receive(ops)
            if received.accepted or received.forks:
                await self._store(received.accepted, received.forks)
        return received

    async def version(self) -> Version:
        """How far the disk is."""
        async with self._lock:
            await self._ready()
            return self._docs.version()

    async def missing(self, theirs: Version, max_bytes: int) -> list[Signed]:
        """What somebody lacks; as `SwarmDocs.missing`."""
        async with self._lock:
            await self._ready()
            return self._docs.missing(theirs, max_bytes)

    async def is_behind(self, theirs: Version) -> bool:
        """Whether somebody has what is not here; as `SwarmDocs.is_behind`."""
        async with self._lock:
            await self._ready()
            return self._docs.is_behind(theirs)

    async def _store(self, ops: Sequence[Signed], forks: Sequence[Fork] = ()) -> None:
        self._documents = None
        with trio.CancelScope(shield=True):  # half a step would leave the documents ahead of the disk
            try:
                await trio.to_thread.run_sync(self._storage.append_ops, self._swarm, ops, forks)
            except Exception:
                self._must_reload = True
                await self._ready()
                raise

    async def _ready(self) -> None:
        if not self._must_reload:
            return
        with trio.CancelScope(shield=True):
            stored = await trio.to_thread.run_sync(self._storage.load_ops, self._swarm)
            forks = await trio.to_thread.run_sync(self._storage.load_forks, self._swarm)
        try:
            self._docs = SwarmDocs(self._swarm, self._signer.peer_id, stored, forks)
        except ProtocolError as error:  # of this node's own disk, not of whoever made it read that
            raise StorageError(str(error)) from error
        self._documents = None
        self._must_reload = False
