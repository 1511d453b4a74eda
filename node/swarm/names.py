"""Names of models, as this node knows them: said of its own, looked up of others'.

What is known of a model is kept on disk: of an own one before anybody hears of it, so that no number is given twice; of
another's when it was looked up, so that no older version is ever taken for it. A look-up asks connected peers and the
distributed hash table at once and takes the newest that anybody has; what decides is in `shoal.dht.registry`.

An own model is said, by its name and its tags, as long as the content of its newest version is here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from shoal.dht.records import Kind, Model, Record, Slot, open_record, sign_record
from shoal.dht.registry import Known, ModelName, check_name, check_tags, learn, next_version
from shoal.node.mesh.host import Host
from shoal.node.store.database import Storage
from shoal.node.supervise import open_plain_nursery
from shoal.node.wire.contracts import NameAsked, NameHeld, NameService
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, RemoteError, ResourceError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import client
from shoal.protocol.signing import Signed, Signer

log = logging.getLogger(__name__)

LOOK_UP_S: Final = 10.0
SAY_S: Final = 15.0
"""How long somebody waits for others to take what is said; it is said again by itself."""
ANSWER_S: Final = 2.0
MAX_ASKED: Final = 16
"""Connected peers that one look-up asks."""
MAX_RECORDS: Final = 3
"""Of one peer's answer: the newest and a fork."""
MAX_OTHERS: Final = 1000
"""Models of others that are remembered."""
MAX_OWN: Final = 1000
_NAME: Final = "name/"


@dataclass(frozen=True, slots=True)
class Said:
    """What came of saying a version.

    Attributes:
        name: with its number.
        num_kept: other nodes that keep the name, so far.
    """

    name: ModelName
    num_kept: int


class Names(NameService):
    """All that this node knows."""

    def __init__(
        self, storage: Storage, host: Host, signer: Signer, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Read what is on disk."""
        self._storage = storage
        self._host = host
        self._signer = signer
        self._wall_clock = wall_clock
        self._me = signer.peer_id
        self._known: dict[ModelName, Known] = {}  # by names without a version; of others' the oldest first
        self._saying = trio.Lock()
        for fact, data in storage.list_facts(_NAME).items():
            try:
                records = [open_record(signed) for signed in decode(tuple[Signed, ...], data)]
                known = learn(None, records)
            except ProtocolError as error:
                log.warning("what is known of %s cannot be read (%s)", fact, error)
                continue
            if known is not None:
                self._known[ModelName(known.newest.author, known.newest.statement.topic)] = known

    # --- what is known ---

    def known(self, name: ModelName) -> Known | None:
        """What is known of a model here."""
        return self._known.get(ModelName(name.owner, name.name))

    def own(self) -> dict[str, Known]:
        """This node's own, by name."""
        return {name.name: known for name, known in self._known.items() if name.owner == self._me}

    async def look_up(self, name: ModelName) -> Known | None:
        """What is known of a model here, by connected peers and in the DHT; in a few seconds."""
        found: list[Record] = []
        with trio.move_on_after(LOOK_UP_S):
            async with open_plain_nursery() as nursery:
                nursery.start_soon(self._ask_dht, name, found)
                for peer in self._whom(name.owner):
                    nursery.start_soon(self._ask_peer, peer, name, found)
        return await self._learn(name, found)

    def _whom(self, owner: PeerId) -> Sequence[PeerId]:
        connected = sorted(self._host.connected, key=lambda peer: peer != owner)
        return connected[:MAX_ASKED]

    async def _ask_dht(self, name: ModelName, found: list[Record]) -> None:
        done = await self._host.table.get(Kind.MODEL, name.name, name.owner)
        found += done.records
        for pair in done.forks:
            found += pair

    async def _ask_peer(self, peer: PeerId, name: ModelName, found: list[Record]) -> None:
        service = client(NameService, self._host.at(peer), timeout_s=ANSWER_S)
        try:
            answer = await service.named(NameAsked(name.owner, name.name))
            found += [open_record(signed) for signed in answer.records[:MAX_RECORDS]]
        except ShoalError as error:
            log.debug("asking %s for %s: %s", peer, name, error)

    async def _learn(self, name: ModelName, records: Iterable[Record]) -> Known | None:
        name = ModelName(name.owner, name.name)
        before = self._known.get(name)
        known = learn(before, [record for record in records if _is_of(record, name)])
        if known is None or known == before:
            return known
        if known.fork is not None and (before is None or before.fork is None):
            log.warning("%s signed two different versions of %s with one number", name.owner, name.name)
        await self._in_thread(partial(self._storage.put_fact, _fact(name), encode(_signed(known))))
        self._known.pop(name, None)
        self._known[name] = known
        others = [each for each in self._known if each.owner != self._me]
        if len(others) > MAX_OTHERS:
            del self._known[others[0]]
            await self._in_thread(partial(self._storage.delete_fact, _fact(others[0])))
        return known

    async def search(self, word: str) -> list[Record]:
        """Models with a tag, a task or a name, as their owners say, by name.

        Raises:
            UsageError: if it is no tag.
        """
        (word,) = check_tags((word,))
        found: list[Record] = []
        with trio.move_on_after(LOOK_UP_S):
            found = await self._host.table.tagged(word)
        mine = [known.newest for known in self.own().values()]
        best: dict[ModelName, Record] = {}
        for record in (*mine, *found):
            if (name := _name_in(record, word)) is not None and name not in best:
                best[name] = record
        return sorted(best.values(), key=lambda record: (str(_name_in(record, word)), record.author))

    # --- what this node says ---

    async def say(self, name: str, manifest: Cid, num_bytes: int, tags: Sequence[str]) -> Said:
        """Make a content the newest version of an own model; the version that there is, if that is the same.

        Raises:
            UsageError: if the name or a tag can be none.
            ResourceError: if this node has too many.
        """
        model, tags = ModelName(self._me, check_name(name)), check_tags(tags)
        async with self._saying:
            known = await self.look_up(model)
            if known is None and len(self.own()) >= MAX_OWN:
                raise ResourceError(f"this node has {MAX_OWN} names of models, and may have no more")
            before = None if known is None else known.newest
            if before is None or (before.body.manifest, before.body.tags) != (manifest, tags):
                version, body = next_version(before, manifest, num_bytes, tags)
                try:
                    now = self._wall_clock()
                    record = sign_record(self._signer, Kind.MODEL, name, body, seq=version, now=now)
                except ProtocolError as error:
                    raise UsageError(f"nobody would keep that name: {error}; use fewer or shorter tags") from error
                await self._learn(model, [record])
                self._unsay_words(name, set(_words(before)) - set(_words(record)))
            return await self._publish(model)

    async def _publish(self, model: ModelName) -> Said:
        newest = self._known[model].newest
        seq, num_kept = newest.statement.seq, 0

        async def put() -> None:
            nonlocal num_kept
            done = await self._host.table.publish(Kind.MODEL, model.name, newest.body, seq=seq)
            num_kept = done.num_kept
            if done.better is not None:
                await self._learn(model, [done.better])

        async def tag(word: str) -> None:
            await self._host.table.publish(Kind.TAG, word, newest.body, seq=seq, item=model.name)

        with trio.move_on_after(SAY_S):
            async with open_plain_nursery() as nursery:
                nursery.start_soon(put)
                for word in _words(newest):
                    nursery.start_soon(tag, word)
        return Said(ModelName(model.owner, model.name, seq), num_kept)

    def take_up(self, is_here: Callable[[Cid], bool]) -> None:
        """Say again what was said before this node ended, if its content is here."""
        for name, known in self.own().items():
            newest = known.newest
            if not is_here(newest.body.manifest):
                continue
            body: Model = newest.body
            self._host.table.keep_saying(Kind.MODEL, name, body, seq=newest.statement.seq)
            for word in _words(newest):
                self._host.table.keep_saying(Kind.TAG, word, body, seq=newest.statement.seq, item=name)

    def unsay(self, gone: Cid) -> None:
        """A content is here no more: say no more that it is the newest of something. Its number stays taken."""
        for name, known in self.own().items():
            if known.newest.body.manifest == gone:
                self._host.table.withdraw(Kind.MODEL, name)
                self._unsay_words(name, _words(known.newest))

    def _unsay_words(self, name: str, words: Iterable[str]) -> None:
        for word in words:
            self._host.table.withdraw(Kind.TAG, word, name)

    # --- what others ask ---

    async def named(self, request: NameAsked) -> NameHeld:
        """Answer a peer."""
        known = self._known.get(ModelName(request.owner, request.name))
        if known is None:
            raise RemoteError(Status.NOT_FOUND, "this node knows no such model")
        return NameHeld(_signed(known))

    async def _in_thread(self, function: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(function)


def _is_of(record: Record, name: ModelName) -> bool:
    return record.slot == Slot(Kind.MODEL, name.name, name.owner, "")


def _name_in(record: Record, word: str) -> ModelName | None:
    """The model that a record says has a tag, a task or a name; None if it is no such record."""
    name = record.statement.item or record.statement.topic
    try:
        check_name(name)
    except UsageError:
        return None
    return ModelName(record.author, name) if word in (*_words(record, name), record.body.task.lower()) else None


def _words(record: Record | None, name: str = "") -> tuple[str, ...]:
    """What a model is found by: its tags, and its name."""
    if record is None:
        return ()
    return tuple(dict.fromkeys((*record.body.tags, (name or record.statement.topic).lower())))


def _signed(known: Known) -> tuple[Signed, ...]:
    return tuple(record.signed for record in known.records())


def _fact(name: ModelName) -> str:
    return f"{_NAME}{name.owner}/{name.name}"
