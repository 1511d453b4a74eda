"""The plan of one fetch: which block to ask of whom, and what to make of the answers.

A fetch fails for lack of progress, never for lack of time: it lasts as long as blocks come, however slow the link. What
is here is looked for first, the manifest before the blocks; a manifest that describes more than the caller allows ends
it before any block is asked for. Blocks are asked for in the order of the content, from the source with the fewest
requests open. A source has one request open at first, and more as long as its answers come quickly (the idea is TCP's
slow start, RFC 5681). When every block is asked for, a source that has nothing to do is asked for what is late
elsewhere, as in BitTorrent's end game (BEP 3).

A source whose bytes do not have the name that was asked for lied: it is dropped at once. One that fails is left alone
for a while that doubles with every failure in a row, and given up after `MAX_FAILURES` of them. A fetch that lost its
last source, to which nothing came for its patience, or whose content itself is wrong has failed; what it `Store`d is
kept by the caller, and looked for by the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from shoal.dht.manifests import ContentManifest, open_content_manifest
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES

SILENCE_S: Final = 10.0
"""A request fails at a source of which nothing at all comes for so long."""
PATIENCE_S: Final = 120.0
"""A fetch fails to which no block comes for so long: one of a mebibyte, at 9 kB/s."""
FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 5.0
MAX_FAILURES: Final = 6
"""Failures in a row after which a source is given up; being found again makes it new."""
GRAVE_FAILURES: Final = 2
"""What a silence counts as, of which three take half a minute, and the answer that the block is not there."""
QUICK_S: Final = 1.0
"""A source that answers within this is asked for one block more at a time."""
SLOW_S: Final = 4.0
"""One that takes longer than this, for half as many."""
LATE_S: Final = 3.0
"""After which a block is asked of a second source that has nothing else to do."""


class Lack(Enum):
    """Why a content was not had: three different things.

    STALLED: it was coming, and then nothing came any more; a later try goes on from there.
    UNAVAILABLE: nobody gives it now, or there is no room for it now.
    UNFIT: what the name stands for is not a content, or a bigger one than is allowed; no try will change that.
    """

    STALLED = auto()
    UNAVAILABLE = auto()
    UNFIT = auto()


@dataclass(frozen=True, slots=True)
class SourceFound:
    """Somebody may have the content."""

    source: PeerId


@dataclass(frozen=True, slots=True)
class SourceLost:
    """Somebody can no longer be reached."""

    source: PeerId


@dataclass(frozen=True, slots=True)
class Looked:
    """What `Look` asked about: the blocks that are here and sound, and how many bytes each has.

    Attributes:
        sizes: by name.
        manifest: the bytes of the content's manifest, if that was asked about and is here.
    """

    sizes: Mapping[Cid, int]
    manifest: bytes | None = None


@dataclass(frozen=True, slots=True)
class BlockArrived:
    """A request was answered.

    Attributes:
        is_right: whether the bytes are what the name says; hashing is not the core's to do.
    """

    source: PeerId
    cid: Cid
    data: bytes | memoryview
    is_right: bool


@dataclass(frozen=True, slots=True)
class BlockFailed:
    """A request failed; ``is_grave`` if nothing at all came of the source, or if it says that it has no such block."""

    source: PeerId
    cid: Cid
    reason: str
    is_grave: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; also the first event, which starts the fetch."""


@dataclass(frozen=True, slots=True)
class Look:
    """Say which of these blocks are here, by one `Looked`."""

    cids: tuple[Cid, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """Ask a source for a block, and tell how it went; it failed when nothing comes of the source for ``silence_s``."""

    source: PeerId
    cid: Cid
    silence_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    """What the content consists of; make room for it. Comes before its first block, unless it is one block."""

    manifest: ContentManifest
    data: bytes


@dataclass(frozen=True, slots=True)
class Store:
    """A block arrived and is what its name says; keep it, and serve it."""

    cid: Cid
    data: bytes | memoryview


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
    """All blocks are here. Nothing follows."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The content was not had. Nothing follows."""

    reason: str
    lack: Lack


Event = SourceFound | SourceLost | Looked | BlockArrived | BlockFailed | Tick
Output = Look | Request | Planned | Store | Drop | Wake | Done | Failed


@dataclass(slots=True)
class _Source:
    open: dict[Cid, float] = field(default_factory=dict)  # and since when
    window: int = 1
    failures: int = 0
    ready_at: float = 0.0


class Fetch:
    """One content on its way here. After `Done` or `Failed`, every event is ignored."""

    __slots__ = (
        "_asked",
        "_began_at",
        "_had_sources",
        "_is_looking",
        "_is_plain",
        "_last",
        "_liars",
        "_manifest",
        "_max_in_flight",
        "_moved_at",
        "_num_bytes",
        "_patience_s",
        "_sources",
        "_wanted",
        "cid",
        "is_over",
        "max_bytes",
    )

    def __init__(
        self,
        cid: Cid,
        sources: Iterable[PeerId],
        *,
        patience_s: float = PATIENCE_S,
        is_plain: bool = False,
        max_in_flight: int = 4,
        max_bytes: int = MAX_CONTENT_BYTES,
    ) -> None:
        """Plan a fetch; the first `Tick` starts it.

        Args:
            cid: of the content.
            sources: who may have it, as far as is known.
            patience_s: without a block, after which it has failed; also how long a fetch without sources waits for one.
            is_plain: the CID names one block that is not cut up, though it is MessagePack: a run's manifest.
            max_in_flight: requests open at one source.
            max_bytes: a content that says it is bigger is refused.
        """
        self.cid = cid
        self.is_over = False
        self._sources = {source: _Source() for source in sources}
        self._liars: set[PeerId] = set()
        self._patience_s = patience_s
        self._is_plain = is_plain or not cid.is_manifest
        self._max_in_flight = max_in_flight
        self.max_bytes = max_bytes
        self._manifest: ContentManifest | None = None
        self._wanted: dict[Cid, int] = {cid: BLOCK_BYTES}  # in the order of the content, with the most bytes each has
        self._asked: dict[Cid, set[PeerId]] = {}
        self._is_looking: bool | None = None  # None: it has not begun
        self._had_sources = False
        self._began_at = self._moved_at = 0.0
        self._num_bytes = 0
        self._last = "nobody who has it was found"

    @property
    def progress(self) -> tuple[int, int | None]:
        """Bytes of distinct blocks that are here, and of the whole content; None while that is unknown."""
        return self._num_bytes, None if self._manifest is None else self._manifest.size

    def is_manifest(self, cid: Cid) -> bool:
        """Whether a block is the list of the others, and no part of the content."""
        return cid == self.cid and not self._is_plain

    def handle(self, event: Event, now: float) -> list[Output]:
        """Take an event; what is to be done about it, in order."""
        if self.is_over:
            return []
        outputs: list[Output] = []
        if self._is_looking is None:
            self._began_at = self._moved_at = now
            self._look(outputs)
        match event:
            case SourceFound(source):
                if source not in self._liars:
                    self._sources.setdefault(source, _Source())
            case SourceLost(source):
                self._remove(source, f"{source} was lost")
            case Looked(sizes, manifest):
                self._looked(sizes, manifest, outputs)
            case BlockArrived():
                self._arrived(event, now, outputs)
            case BlockFailed():
                self._failed(event, now)
            case Tick():
                pass
        if not self.is_over:
            self._plan(now, outputs)
        return outputs

    # Taking in.

    def _look(self, outputs: list[Output]) -> None:
        self._is_looking = True
        outputs.append(Look(tuple(self._wanted)))

    def _looked(self, sizes: Mapping[Cid, int], manifest: bytes | None, outputs: list[Output]) -> None:
        self._is_looking = False
        if self._manifest is None and not self._is_plain:
            if manifest is not None:
                self._open(manifest, outputs)
            return
        for cid, num_bytes in sizes.items():
            if cid in self._wanted and not self.is_over:
                self._take(cid, num_bytes, outputs)

    def _arrived(self, event: BlockArrived, now: float, outputs: list[Output]) -> None:
        source, cid, data = event.source, event.cid, event.data
        state = self._sources.get(source)
        if state is None or cid not in state.open:
            return  # of somebody given up, or never asked for
        took_s = now - state.open[cid]
        self._release(source, cid)
        if len(data) > BLOCK_BYTES or not event.is_right:
            reason = f"{source} sent other bytes than {cid}"
            self._liars.add(source)
            self._remove(source, reason)
            outputs.append(Drop(source, reason))
            return
        state.failures, state.ready_at = 0, now
        if took_s < QUICK_S:
            state.window = min(state.window + 1, self._max_in_flight)
        elif took_s > SLOW_S:
            state.window = max(state.window // 2, 1)
        if cid not in self._wanted:
            return  # another source was faster
        self._moved_at = now
        if self._manifest is None and not self._is_plain:
            self._open(bytes(data), outputs)
            return
        before = len(outputs)
        self._take(cid, len(data), outputs)
        if not self.is_over:
            outputs.insert(before, Store(cid, data))

    def _open(self, data: bytes, outputs: list[Output]) -> None:
        """Read the manifest. What is wrong with it is the fault of the name, not of a source."""
        try:
            manifest = open_content_manifest(self.cid, data, max_bytes=self.max_bytes)
        except ProtocolError as error:
            self._end(Failed(f"{self.cid} is not a content that can be taken: {error}", Lack.UNFIT), outputs)
            return
        self._manifest = manifest
        self._wanted = manifest.block_sizes()
        outputs.append(Planned(manifest, data))
        self._look(outputs)

    def _take(self, cid: Cid, num_bytes: int, outputs: list[Output]) -> None:
        expected = self._wanted.pop(cid)
        self._num_bytes += num_bytes
        if self._manifest is not None and num_bytes != expected:
            text = f"block {cid} has {num_bytes} bytes where {self.cid} says {expected}"
            self._end(Failed(text, Lack.UNFIT), outputs)
        elif num_bytes > self.max_bytes:
            self._end(Failed(f"{cid} has {num_bytes} bytes; {self.max_bytes} are allowed", Lack.UNFIT), outputs)

    def _failed(self, event: BlockFailed, now: float) -> None:
        source, cid = event.source, event.cid
        state = self._sources.get(source)
        if state is None or cid not in state.open:
            return
        self._release(source, cid)
        self._last = f"{source}: {event.reason}"
        if now >= state.ready_at:  # requests that fail together are one failure
            state.ready_at = now + min(FIRST_BACKOFF_S * 2**state.failures, MAX_BACKOFF_S)
            state.failures += GRAVE_FAILURES if event.is_grave else 1
            state.window = 1
        if state.failures >= MAX_FAILURES:
            self._remove(source, self._last)

    # Asking.

    def _plan(self, now: float, outputs: list[Output]) -> None:
        if not self._wanted:
            self._end(Done(), outputs)
        elif self._is_looking:
            pass  # what is here need not be asked for
        elif self._had_sources and not self._sources:
            self._end(Failed(f"nobody is left who has {self.cid}; {self._last}", Lack.UNAVAILABLE), outputs)
        elif now >= self._moved_at + self._patience_s:
            text = f"nothing of {self.cid} came for {self._patience_s:g} s; {self._last}"
            self._end(Failed(text, Lack.STALLED if self._moved_at > self._began_at else Lack.UNAVAILABLE), outputs)
        else:
            self._ask(now, outputs)

    def _ask(self, now: float, outputs: list[Output]) -> None:
        wake_at = self._moved_at + self._patience_s
        for cid in self._wanted:
            if cid not in self._asked and not self._ask_somebody(cid, now, outputs):
                break
        else:
            for cid in self._wanted:  # the end game
                askers = self._asked[cid]
                if len(askers) > 1 or len(self._sources) == 1:
                    continue
                late_at = LATE_S + min(self._sources[source].open[cid] for source in askers)
                if late_at > now:
                    wake_at = min(wake_at, late_at)
                elif not self._ask_somebody(cid, now, outputs):
                    break
        waits = [state.ready_at for state in self._sources.values() if state.ready_at > now]
        outputs.append(Wake(min([*waits, wake_at])))

    def _ask_somebody(self, cid: Cid, now: float, outputs: list[Output]) -> bool:
        """Ask a source that has a request free, if there is one; not one that is asked for this already."""
        askers = self._asked.get(cid, set())
        free = [
            (len(state.open), state.failures, source)
            for source, state in self._sources.items()
            if len(state.open) < state.window and state.ready_at <= now and source not in askers
        ]
        if not free:
            return False
        source = min(free)[2]
        self._sources[source].open[cid] = now
        self._asked.setdefault(cid, set()).add(source)
        outputs.append(Request(source, cid, SILENCE_S))
        return True

    def _end(self, output: Done | Failed, outputs: list[Output]) -> None:
        self.is_over = True
        outputs.append(output)

    def _release(self, source: PeerId, cid: Cid) -> None:
        self._sources[source].open.pop(cid, None)
        self._no_longer_asked(source, cid)

    def _remove(self, source: PeerId, reason: str) -> None:
        state = self._sources.pop(source, None)
        if state is not None:
            self._had_sources = True
            self._last = reason
            for cid in state.open:
                self._no_longer_asked(source, cid)

    def _no_longer_asked(self, source: PeerId, cid: Cid) -> None:
        askers = self._asked.get(cid)
        if askers is not None:
            askers.discard(source)
            if not askers:
                del self._asked[cid]
