"""What the local API shows of models, and takes: `Trees` in the API's words."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

from shoal.node.api.requests import GetModel, PublishModel
from shoal.node.api.schemas import ContentInfo, FetchInfo, FileInfo, ModelDetail, ModelInfo
from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.trees import Progress, TreeRecord, Trees
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

MAX_SHOWN_FILES: Final = 1000


class Models:
    """The models of one node."""

    def __init__(self, trees: Trees, content: ContentStore, storage: Storage, me: PeerId) -> None:
        self._trees = trees
        self._content = content
        self._storage = storage
        self._me = me

    def content(self, freed_bytes: int = 0) -> ContentInfo:
        """What contents take on disk."""
        blocks, models = self._storage.blocks, self._storage.trees
        return ContentInfo(
            disk_bytes=self._content.disk_bytes,
            max_disk_bytes=self._content.max_disk_bytes,
            run_bytes=blocks.num_bytes,
            model_bytes=models.num_bytes,
            freed_bytes=freed_bytes,
            num_damaged=blocks.num_damaged + models.num_damaged,
            fetching=[_fetch_info(progress) for progress in self._trees.fetching.values()],
        )

    def all(self) -> list[ModelInfo]:
        """Every one."""
        return [self._info(record) for record in self._trees.records()]

    async def one(self, model: str) -> ModelDetail:
        """One, with its first files."""
        cid = self._trees.resolve(model)
        record, tree = self._trees.record(cid), await self._trees.tree(cid)
        files = itertools.islice(tree.entries(), MAX_SHOWN_FILES)
        return ModelDetail(
            **self._info(record).model_dump(),
            files=[FileInfo(path=entry.path, num_bytes=entry.size) for entry in files],
        )

    async def publish(self, request: PublishModel) -> ModelInfo:
        """Take a folder in."""
        for word in (request.name, *request.tags):
            if not word.isprintable() or "/" in word:
                raise UsageError(f"{word[:80]!r} can be no name or tag; they are printable, and without a slash")
        return self._info(await self._trees.publish(_absolute(request.path), request.name, request.tags))

    async def get(self, request: GetModel) -> FetchInfo:
        """Fetch one."""
        cid = self._trees.resolve(request.model)
        out = _absolute(request.out) if request.out else None
        return _fetch_info(await self._trees.get(cid, out, name=request.name, is_pinned=request.is_pinned))

    async def pin(self, model: str, is_pinned: bool) -> ModelInfo:
        """Let one stay, or not."""
        return self._info(await self._trees.set_pinned(self._trees.resolve(model), is_pinned))

    async def remove(self, model: str) -> ContentInfo:
        """Forget one."""
        return self.content(await self._trees.remove(self._trees.resolve(model)))

    async def collect(self) -> ContentInfo:
        """Forget those that are not pinned."""
        return self.content(await self._trees.collect())

    def _info(self, record: TreeRecord) -> ModelInfo:
        return ModelInfo(
            name=record.name,
            cid=record.cid,
            num_bytes=record.size,
            num_files=record.num_files,
            tags=list(record.tags),
            is_pinned=record.is_pinned,
            is_whole=record.is_whole,
            stored_on=[self._me] if record.is_whole else [],
        )


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise UsageError(f"{text[:80]!r} is no absolute path; the node does not stand where you do")
    return path


def _fetch_info(progress: Progress) -> FetchInfo:
    seconds = progress.seconds
    return FetchInfo(
        cid=progress.cid,
        num_bytes=progress.num_bytes,
        of_bytes=progress.size,
        seconds=round(seconds, 3),
        mb_per_s=round(progress.num_bytes / seconds / 1e6, 1) if seconds > 0 else 0.0,
        sources={str(peer): num_bytes for peer, num_bytes in progress.sources.items()},
    )
