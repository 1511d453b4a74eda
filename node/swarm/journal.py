"""The documents of one swarm together with the disk: nothing is told, acknowledged or acted on that is not stored.

Checking and applying ops takes the loop's time, so it is done a few at a time, with others' turns in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import trio

from shoal.crdt.document import GROWING, Document
from shoal.crdt.oplog import Fork
from shoal.crdt.sync import Received, SwarmDocs, Version
from shoal.node.store.database import Storage
from shoal.node.store.errors import StorageError
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer

SLICE_OPS: Final = 12
"""Ops that are taken in without a pause; each takes up to a quarter of a millisecond,"""
SLICE_BYTES: Final = 24 * 1024
"""or so many bytes, since a snapshot takes longer."""


async def load_docs(swarm: SwarmId, own: PeerId, storage: Storage) -> SwarmDocs:
    """The documents as they are stored.

    Raises:
        StorageError: if the disk cannot be read.
        ProtocolError: if what is on it is damaged.
    """
    stored = await trio.to_thread.run_sync(storage.load_ops, swarm)
    forks = await trio.to_thread.run_sync(storage.load_forks, swarm)
    docs = SwarmDocs(swarm, own, (), forks)
    for part in _slices(stored):
        docs.restore(part)
        await trio.lowlevel.checkpoint()
    docs.check_restored()
    return docs


class Journal:
    """`SwarmDocs` behind a lock that is held until what was taken in is on disk.

    If the disk fails, what is held in memory is thrown away and read again, so that this node never signs two
    different ops with one number. Until it can be read, every method fails with a `StorageError`.

    What this node writes before it knows the head of its own log is held back, and shown as if it were written.
    """

    def __init__(self, swarm: SwarmId, signer: Signer, docs: SwarmDocs, storage: Storage) -> None:
        self._swarm = swarm
        self._signer = signer
        self._docs = docs
        self._storage = storage
        self._lock = trio.Lock()
        self._must_reload = False
        self._held: dict[str, Any] = {}
        self._documents: dict[PeerId, Mapping[str, Any]] = {}
        self._show()

    @property
    def frozen(self) -> dict[PeerId, Fork]:
        """The authors who were shown to keep two logs, by what shows it."""
        return self._docs.frozen

    def documents(self) -> Mapping[PeerId, Mapping[str, Any]]:
        """Every author's registers; another object after each change, in which what was not touched is the same."""
        return self._documents

    def seqs(self) -> dict[PeerId, int]:
        """The newest sequence number held of each author."""
        return self._docs.seqs()

    def hold(self, registers: Mapping[str, Any]) -> None:
        """Set registers of this node's document, to be written by `write_held`.

        Raises:
            UsageError: if a register is not plain data.
            TooLargeError: if it is too much.
        """
        held = _merged(self._held, registers)
        Document().set(held)
        self._held = held
        self._show()

    @property
    def is_holding(self) -> bool:
        """Whether anything is held back."""
        return bool(self._held)

    async def write_held(self) -> Signed | None:
        """Write what was held back; returns the op when it is on disk, None if there was nothing.

        Raises as `write`. If the disk fails, it is held back again; after another error it is gone.
        """
        async with self._lock:
            await self._ready()
            if not self._held:
                return None
            held, self._held = self._held, {}
            try:
                return await self._write(held)
            except StorageError:
                self._held = _merged(held, self._held)
                raise
            finally:
                self._show()

    async def write(self, registers: Mapping[str, Any]) -> Signed:
        """Set registers of this node's document; returns the op when it is on disk.

        Raises:
            UsageError: if a register is not plain data; as a `FrozenLogError`, if two logs were signed with this key.
            LimitError: if it is too much.
            StorageError: if the disk fails. Nothing was changed then, as after any error.
        """
        async with self._lock:
            await self._ready()
            return await self._write(registers)

    async def receive(self, ops: Sequence[Signed]) -> Received:
        """Take in ops; returns when what is new is on disk.

        Raises:
            StorageError: if the disk fails. Nothing was changed then.
        """
        async with self._lock:
            await self._ready()
            received = Received()
            with trio.CancelScope(shield=True):  # what is taken in has to be stored
                self._must_reload = True
                for part in _slices(ops):
                    received = received.then(self._docs.receive(part))
                    await trio.lowlevel.checkpoint()
                self._must_reload = False
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

    async def _write(self, registers: Mapping[str, Any]) -> Signed:
        op = self._docs.write(self._signer, **registers)
        await self._store([op])
        return op

    async def _store(self, ops: Sequence[Signed], forks: Sequence[Fork] = ()) -> None:
        with trio.CancelScope(shield=True):  # half a step would leave the documents ahead of the disk
            try:
                await trio.to_thread.run_sync(self._storage.append_ops, self._swarm, ops, forks)
            except Exception:
                self._must_reload = True
                await self._ready()
                raise
        self._show()

    async def _ready(self) -> None:
        if not self._must_reload:
            return
        with trio.CancelScope(shield=True):
            try:
                self._docs = await load_docs(self._swarm, self._signer.peer_id, self._storage)
            except ProtocolError as error:  # of this node's own disk, not of whoever made it read that
                raise StorageError(str(error)) from error
        self._must_reload = False
        self._show()

    def _show(self) -> None:
        documents = self._docs.documents()
        if self._held:
            own = self._signer.peer_id
            documents[own] = _merged(documents.get(own, {}), self._held)
        self._documents = documents


def _merged(before: Mapping[str, Any], registers: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(before)
    for name, value in registers.items():
        is_grown = name in GROWING and isinstance(value, Mapping)
        merged[name] = {**merged.get(name, {}), **value} if is_grown else value
    return merged


def _slices(ops: Sequence[Signed]) -> Iterator[Sequence[Signed]]:
    """Parts of which each begins with the last op of the one before, so that two that prove a fork are in one."""
    start = 0
    while start < len(ops):
        end, num_bytes = start + 1, len(ops[start].payload)
        while end < len(ops) and (
            end - start < 2 or (end - start < SLICE_OPS and num_bytes + len(ops[end].payload) <= SLICE_BYTES)
        ):
            num_bytes += len(ops[end].payload)
            end += 1
        yield ops[start:end]
        if end == len(ops):
            return
        start = end - 1
