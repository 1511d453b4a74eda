"""The plan of one fetch: which block to ask of whom, and what to make of the answers.

Blocks are asked for in the order of the content, each of one source at a time, from the source with the fewest requests
open. A source whose bytes do not have the name that was asked for lied: it is dropped at once. One that
fails is left alone for a while that doubles with every failure in a row, and given up after `MAX_FAILURES` of them. A
fetch that starts without sources waits for some; one that lost its last source, that is past its deadline or whose
content itself is wrong has failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shoal.dht.manifests import ContentManifest, open_content_manifest
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES

REQUEST_TIMEOUT_S: Final = 10.0
FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 5.0
MAX_FAILURES: Final = 6
"""Failures in a row after which a source is given up; being found again makes it new."""


@dataclass(frozen=True, slots=True)
class SourceFound:
    """Somebody may have the content."""

    source: PeerId


@dataclass(frozen=True, slots=True)
class SourceLost:
    """Somebody can no longer be reached."""

    source: PeerId


@dataclass(frozen=True, slots=True)
class BlockArrived:
    """A request was answered."""

    source: PeerId
    cid: Cid
    data: bytes


@dataclass(frozen=True, slots=True)
class BlockFailed:
    """A request was refused, or timed out."""

    source: PeerId
    cid: Cid
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; also the first event, which starts the fetch."""


@dataclass(frozen=True, slots=True)
class Request:
    """Ask a source for a block, and tell how it went within ``timeout_s``."""

    source: PeerId
    cid: Cid
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Store:
    """A block arrived and is what its name says; keep it, and serve it."""

    cid: Cid
    data: bytes


@dataclass(frozen=True, slots=True)
class Drop:
    """A source lied; hold it against it."""

    source: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` at this time, which may be never (infinity); a later `Wake` replaces this one."""

    at: float


@dataclass(frozen=True, slots=True)
class Done:
    """The content is here. Nothing follows."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The content cannot be had. Nothing follows."""

    reason: str


Event = SourceFound | SourceLost | BlockArrived | BlockFailed | Tick
Output = Request | Store | Drop | Wake | Done | Failed


@dataclass(slots=True)
class _Source:
    open: set[Cid] = field(default_factory=set)
    failures: int = 0
    ready_at: float = 0.0


class Fetch:
    """One content on its way here. After `Done` or `Failed`, every event is ignored."""

    __slots__ = (
        "_asked",
        "_blocks",
        "_deadline",
        "_had_sources",
        "_have",
        "_is_plain",
        "_last",
        "_liars",
        "_look",
        "_manifest",
        "_max_bytes",
        "_max_in_flight",
        "_sources",
        "_wanted",
        "cid",
        "is_over",
    )

    def __init__(
        self,
        cid: Cid,
        sources: Iterable[PeerId],
        have: Mapping[Cid, bytes] | None = None,
        *,
        deadline: float = math.inf,
        is_plain: bool = False,
        max_in_flight: int = 4,
        max_bytes: int = MAX_CONTENT_BYTES,
    ) -> None:
        """Plan a fetch; the first `Tick` starts it.

        Args:
            cid: of the content.
            sources: who may have it, as far as is known.
            have: blocks that need not be asked for. Looked into at the start and once the manifest is known, so it may
                be a view of a disk.
            deadline: when to give up, on the clock of ``now``.
            is_plain: the CID names one block that is not cut up, though it is MessagePack: a run's manifest.
            max_in_flight: requests open at one source.
            max_bytes: a content that says it is bigger is refused.
        """
        self.cid = cid
        self.is_over = False
        self._sources = {source: _Source() for source in sources}
        self._liars: set[PeerId] = set()
        self._deadline = deadline
        self._have = {} if have is None else have
        self._is_plain = is_plain or not cid.is_manifest
        self._max_in_flight = max_in_flight
        self._max_bytes = max_bytes
        self._manifest: ContentManifest | None = None
        self._blocks: dict[Cid, bytes] = {}
        self._wanted: dict[Cid, int] = {cid: BLOCK_BYTES}  # in the order of the content, with the most bytes each has
        self._asked: dict[Cid, PeerId] = {}
        self._look = True
        self._had_sources = False
        self._last = "nobody who has it was found"

    @property
    def progress(self) -> tuple[int, int | None]:
        """Bytes of content that are here, and of all; None while that is unknown."""
        num_bytes = sum(len(data) for cid, data in self._blocks.items() if cid != self.cid or self._is_plain)
        return num_bytes, None if self._manifest is None else self._manifest.size

    def handle(self, event: Event, now: float) -> list[Output]:
        """Take an event; what is to be done about it, in order."""
        if self.is_over:
            return []
        outputs: list[Output] = []
        match event:
            case SourceFound(source):
                if source not in self._liars:
                    self._sources.setdefault(source, _Source())
            case SourceLost(source):
                self._remove(source, f"{source} was lost")
            case BlockArrived(source, cid, data):
                self._arrived(source, cid, data, now, outputs)
            case BlockFailed(source, cid, reason):
                self._failed(source, cid, reason, now)
            case Tick():
                pass
        self._plan(now, outputs)
        return outputs

    def _arrived(self, source: PeerId, cid: Cid, data: bytes, now: float, outputs: list[Output]) -> None:
        state = self._sources.get(source)
        if state is None or self._asked.get(cid) != source:
            return  # of somebody given up, or never asked for
        self._release(source, cid)
        if len(data) > BLOCK_BYTES or not cid.matches(data):
            reason = f"{source} sent other bytes than {cid}"
            self._liars.add(source)
            self._remove(source, reason)
            outputs.append(Drop(source, reason))
            return
        state.failures, state.ready_at = 0, now
        outputs.append(Store(cid, data))
        self._take(cid, data, outputs)

    def _take(self, cid: Cid, data: bytes, outputs: list[Output]) -> None:
        """Take a block that is what its name says. What does not fit now is the fault of the name, not of a source."""
        expected = self._wanted.pop(cid)
        self._blocks[cid] = data
        if self._manifest is not None:
            if len(data) != expected:
                self._end(Failed(f"block {cid} has {len(data)} bytes where {self.cid} says {expected}"), outputs)
        elif not self._is_plain:
            try:
                manifest = open_content_manifest(self.cid, data)
            except ProtocolError as error:
                self._end(Failed(f"{self.cid} is not a content: {error}"), outputs)
                return
            if manifest.size > self._max_bytes:
                self._end(Failed(f"{self.cid} has {manifest.size} bytes; {self._max_bytes} are allowed"), outputs)
                return
            self._manifest = manifest
            self._wanted = manifest.block_sizes()
            self._look = True

    def _failed(self, source: PeerId, cid: Cid, reason: str, now: float) -> None:
        state = self._sources.get(source)
        if state is None or self._asked.get(cid) != source:
            return
        self._release(source, cid)
        self._last = f"{source}: {reason}"
        if now >= state.ready_at:  # requests that fail together are one failure
            state.ready_at = now + min(FIRST_BACKOFF_S * 2**state.failures, MAX_BACKOFF_S)
            state.failures += 1
        if state.failures >= MAX_FAILURES:
            self._remove(source, self._last)

    def _plan(self, now: float, outputs: list[Output]) -> None:
        self._take_from_disk(outputs)
        if self.is_over:
            return
        if not self._wanted:
            self._finish(outputs)
        elif now >= self._deadline:
            self._end(Failed(f"{self.cid} did not arrive in time; {self._last}"), outputs)
        elif self._had_sources and not self._sources:
            self._end(Failed(f"nobody is left who has {self.cid}; {self._last}"), outputs)
        else:
            self._ask(now, outputs)

    def _take_from_disk(self, outputs: list[Output]) -> None:
        while self._look and not self.is_over:
            self._look = False  # set again by a manifest
            for cid in [cid for cid in self._wanted if cid in self._have]:
                data = self._have[cid]
                if cid.matches(data) and not self.is_over:  # what is damaged on disk is asked for
                    self._take(cid, data, outputs)

    def _ask(self, now: float, outputs: list[Output]) -> None:
        for cid in self._wanted:
            if cid in self._asked:
                continue
            free = [
                (len(state.open), state.failures, source)
                for source, state in self._sources.items()
                if len(state.open) < self._max_in_flight and state.ready_at <= now
            ]
            if not free:
                break
            source = min(free)[2]
            self._sources[source].open.add(cid)
            self._asked[cid] = source
            outputs.append(Request(source, cid, min(REQUEST_TIMEOUT_S, self._deadline - now)))
        waits = [state.ready_at for state in self._sources.values() if state.ready_at > now]
        outputs.append(Wake(min([*waits, self._deadline])))

    def _finish(self, outputs: list[Output]) -> None:
        names = (self.cid,) if self._manifest is None else self._manifest.blocks
        self._end(Done(b"".join(self._blocks[cid] for cid in names)), outputs)

    def _end(self, output: Done | Failed, outputs: list[Output]) -> None:
        self.is_over = True
        outputs.append(output)

    def _release(self, source: PeerId, cid: Cid) -> None:
        self._asked.pop(cid, None)
        self._sources[source].open.discard(cid)

    def _remove(self, source: PeerId, reason: str) -> None:
        state = self._sources.pop(source, None)
        if state is not None:
            self._had_sources = True
            self._last = reason
            for cid in state.open:
                self._asked.pop(cid, None)
