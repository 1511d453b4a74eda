"""What the local API shows of models, and takes: folders (`Trees`), their names (`Names`), who has them (`Holders`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shoal.dht.records import Record
from shoal.dht.registry import Known, ModelName, check_name, check_tags, history, resolve
from shoal.node.api.requests import GetModel, PublishModel
from shoal.node.api.schemas import ContentInfo, FetchInfo, FileInfo, ModelDetail, ModelInfo, VersionInfo
from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.holders import Holders
from shoal.node.swarm.names import Names
from shoal.node.swarm.trees import Progress, TreeRecord, Trees
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId

MAX_SHOWN_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class _Meant:
    """What somebody asks for: a content, and the name and version that it was asked for by, if it was."""

    cid: Cid
    name: ModelName | None = None
    known: Known | None = None


class Models:
    """The models of one node."""

    def __init__(
        self, trees: Trees, names: Names, holders: Holders, content: ContentStore, storage: Storage, me: PeerId
    ) -> None:
        self._trees = trees
        self._names = names
        self._holders = holders
        self._content = content
        self._storage = storage
        self._me = me
        trees.on_gone = names.unsay

    def take_up(self) -> None:
        """Say again what this node has, and what it is called."""
        whole = sorted((each for each in self._trees.records() if each.is_whole), key=lambda each: each.used_at)
        self._holders.keep_saying(record.cid for record in whole)
        here = {record.cid for record in whole}
        self._names.take_up(here.__contains__)

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
        """Every one that is here."""
        return [self._info(record) for record in self._trees.records()]

    async def search(self, word: str) -> list[ModelInfo]:
        """Models with a tag or a name, here and elsewhere, as their owners say."""
        found = await self._names.search(word)
        return [_told(record, record.statement.seq, record.body.manifest) for record in found]

    async def one(self, model: str) -> ModelDetail:
        """One: with its first files if it is here, with the versions of its name."""
        meant = await self._meant(model)
        here, known = self._trees.find(meant.cid), meant.known
        files: list[FileInfo] = []
        if here is None:
            if known is None or meant.name is None:
                raise UsageError(f"{meant.cid} is not here; `shoal model get {meant.cid}` fetches it")
            info = _told(known.newest, meant.name.version or 0, meant.cid)
        else:
            info = self._info(here)
            if known is None and here.known_as:
                known = self._names.known(ModelName.parse(here.known_as))
            tree = await self._trees.tree(meant.cid)
            shown = itertools.islice(tree.entries(), MAX_SHOWN_FILES)
            files = [FileInfo(path=entry.path, num_bytes=entry.size) for entry in shown]
        holders = await self._holders.named(meant.cid)
        detail = ModelDetail(**info.model_dump() | {"stored_on": [*info.stored_on, *holders]}, files=files)
        return detail if known is None else detail.model_copy(update=_history(known))

    async def publish(self, request: PublishModel) -> ModelInfo:
        """Take a folder in, make it the newest version of a name, and say so."""
        name, tags = check_name(request.name), check_tags(request.tags)
        taken = self._trees.called(name)
        if taken is not None and not taken.known_as.startswith(f"{self._me}/{name}@"):
            raise UsageError(
                f"{name!r} is what {taken.known_as or taken.cid} is called here; "
                "remove that first (`shoal model rm`), or take another name"
            )
        record = await self._trees.publish(_absolute(request.path), "", tags)
        said = await self._names.say(name, record.cid, record.size, tags)
        record = await self._trees.title(record.cid, name, str(said.name), tags)
        await self._holders.provide(record.cid)
        return self._info(record).model_copy(update={"num_told": said.num_kept})

    async def get(self, request: GetModel) -> FetchInfo:
        """Fetch one."""
        if request.name and (not request.name.isprintable() or "/" in request.name):
            raise UsageError(f"{request.name[:80]!r} can be no name here; names are printable, and without a slash")
        out = _absolute(request.out) if request.out else None
        meant = await self._meant(request.model)
        known_as = "" if meant.name is None else str(meant.name)
        progress = await self._trees.get(
            meant.cid, out, name=request.name, known_as=known_as, is_pinned=request.is_pinned
        )
        return _fetch_info(progress).model_copy(update={"model": known_as})

    async def pin(self, model: str, is_pinned: bool) -> ModelInfo:
        """Let one stay, or not."""
        return self._info(await self._trees.set_pinned(self._here(model), is_pinned))

    async def remove(self, model: str) -> ContentInfo:
        """Forget one."""
        return self.content(await self._trees.remove(self._here(model)))

    async def collect(self) -> ContentInfo:
        """Forget those that are not pinned."""
        return self.content(await self._trees.collect())

    # --- what is meant ---

    def _name_in(self, text: str) -> ModelName | None:
        """The name of a model that a text is, an owner left out being this node; None if it means something here."""
        is_own = self._trees.called(text) is None and text.partition("@")[0] in self._names.own()
        return ModelName.parse(f"{self._me}/{text}" if is_own else text) if is_own or "/" in text else None

    async def _meant(self, text: str) -> _Meant:
        """What a CID or a name means here, or else anywhere."""
        name = self._name_in(text)
        if name is None:
            return _Meant(self._trees.resolve(text))
        known = self._names.known(name)
        if known is None or name.version not in history(known.newest):
            known = await self._names.look_up(name)
        version, cid = resolve(name, known)
        return _Meant(cid, replace(name, version=version), known)

    def _here(self, text: str) -> Cid:
        """The same without asking anybody."""
        name = self._name_in(text)
        if name is None:
            return self._trees.resolve(text)
        known = self._names.known(name)
        if known is None:
            raise UsageError(f"{text[:160]} is not here; `shoal model ls` lists what is")
        return resolve(name, known)[1]

    # --- what is shown ---

    def _info(self, record: TreeRecord) -> ModelInfo:
        known_as = ModelName.parse(record.known_as) if record.known_as else None
        return ModelInfo(
            name=record.name or ("" if known_as is None else known_as.name),
            version=None if known_as is None else known_as.version,
            owner=None if known_as is None else known_as.owner,
            cid=record.cid,
            num_bytes=record.size,
            num_files=record.num_files,
            tags=list(record.tags),
            is_pinned=record.is_pinned,
            is_whole=record.is_whole,
            stored_on=[self._me] if record.is_whole else [],
        )


def _told(record: Record, version: int, cid: Cid) -> ModelInfo:
    """A model that is not here."""
    newest = version == record.statement.seq
    return ModelInfo(
        name=record.statement.item or record.statement.topic,
        version=version,
        owner=record.author,
        cid=cid,
        num_bytes=record.body.num_bytes if newest else 0,
        num_files=0,
        tags=list(record.body.tags) if newest else [],
    )


def _history(known: Known) -> dict[str, list[VersionInfo]]:
    return {
        "versions": [VersionInfo(version=version, cid=cid) for version, cid in history(known.newest).items()],
        "disputed": [
            VersionInfo(version=version, cid=cid) for version, both in known.disputed().items() for cid in both
        ],
    }


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
