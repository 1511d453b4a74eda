"""The plan of one large fetch: which blocks to ask of whom, when many give and many of them do not have all yet.

Blocks are numbers here; who has which is a set of bits for each source. What is asked for next of a source is, of what
it has and nobody was asked for, what the fewest others have (rarest first, BitTorrent's; Legout et al., "Rarest First
and Choke Algorithms Are Enough", 2006), and among those the one that follows on what was asked for last, so that a lone
source is read in order; the first place is drawn, so that receivers of one source begin at different ones and have
something for each other. A request is a run of neighbouring blocks, as many as the source brings in `RUN_S`, and it has
several open while its answers come quickly.

A source that has only a part is asked again what it has whenever some blocks came. When all that is wanted is asked
for, a source that is free is asked for what it would bring much sooner than who was asked first (the end game), and the
later one is called off.

There is no time by which a fetch must have ended. It has failed when no block came for its patience, or when it had no
source for `LONELY_S`. Bytes that are not what their name says are a lie: the source is dropped at once and for good.
Other failures make it wait, twice as long each time, and end it after `MAX_FAILURES` in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from shoal.dht.fetch import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_FAILURES,
    PATIENCE_S,
    Done,
    Drop,
    Failed,
    Lack,
    SourceFound,
    SourceLost,
    Tick,
    Wake,
)
from shoal.protocol.ids import PeerId

LONELY_S: Final = 10.0
"""A fetch fails that has had no source for so long."""
RUN_S: Final = 0.25
"""What one request is to take: each costs both sides some milliseconds beside its blocks."""
MAX_RUN: Final = 8
MAX_WINDOW: Final = 3
"""Requests open at one source."""
MAX_OPEN_BLOCKS: Final = 24
"""Blocks asked for at once, of all sources: as much memory as this."""
QUICK_S: Final = 0.5
"""A source that answers within this is asked for one run more at a time."""
SLOW_S: Final = 1.5
"""One that takes longer than this, for one: what waits there would come sooner from another one."""
LATE_S: Final = 5.0
"""After which a block is asked of a second source that is free, whatever was expected."""
TRICKLE_S: Final = 30.0
"""A request that took so long is called off if another source has its blocks."""
MIN_HAVE_S: Final = 0.25
MAX_HAVE_S: Final = 1.0
"""Between two questions to one source what it has."""
BLOCKS_PER_HAVE: Final = 2
UNKNOWN_RATE: Final = 1.0
"""Blocks per second, of a source that has brought nothing yet."""
NUM_RARITIES: Final = 8


@dataclass(frozen=True, slots=True)
class HaveArrived:
    """What a source has: bit n of ``blocks`` is block n."""

    source: PeerId
    blocks: int


@dataclass(frozen=True, slots=True)
class HaveFailed:
    """It does not say what it has."""

    source: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A request is over.

    Attributes:
        start: the first block that was asked for.
        came: those that came and are right; they are stored.
        failure: why not all did; empty if they did.
        is_lie: whether one was not what its name says.
    """

    source: PeerId
    start: int
    came: tuple[int, ...]
    failure: str = ""
    is_lie: bool = False


@dataclass(frozen=True, slots=True)
class AskHave:
    """Ask a source what it has; tell by `HaveArrived` or `HaveFailed`."""

    source: PeerId


@dataclass(frozen=True, slots=True)
class Request:
    """Ask a source for ``count`` blocks from ``start`` on; tell by `Answered`."""

    source: PeerId
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class CallOff:
    """Nothing of this request is needed any more; it is `Answered` nevertheless."""

    source: PeerId
    start: int


Event = SourceFound | SourceLost | HaveArrived | HaveFailed | Answered | Tick
Output = AskHave | Request | CallOff | Drop | Wake | Done | Failed


@dataclass(slots=True)
class _Open:
    """A request, of these blocks, since then."""

    blocks: int
    count: int
    since: float
    is_called_off: bool = False


@dataclass(slots=True)
class _Source:
    """What is known of one.

    Attributes:
        has: which blocks; None before it said so.
        rate: blocks per second that one request brings.
        have_at: when it was asked last what it has; `is_asked`: and did not answer yet.
    """

    has: int | None = None
    open: dict[int, _Open] = field(default_factory=dict)
    rate: float = UNKNOWN_RATE
    has_brought: bool = False
    window: int = 1
    failures: int = 0
    ready_at: float = 0.0
    have_at: float = float("-inf")
    is_asked: bool = False


class TreeFetch:
    """Blocks on their way here.

    Attributes:
        max_open_blocks: asked for at once; may be changed while it goes on.
        came_from: blocks by source.
    """

    def __init__(
        self,
        num_blocks: int,
        here: int,
        sources: Iterable[PeerId],
        rng: Random,
        *,
        patience_s: float = PATIENCE_S,
        max_open_blocks: int = MAX_OPEN_BLOCKS,
    ) -> None:
        """Plan a fetch; the first `Tick` starts it.

        Args:
            num_blocks: of the whole, those with equal bytes counted once.
            here: those that are here already: bit n is block n.
            sources: who may have some.
            rng: draws where to begin.
            patience_s: without a block, after which it has failed.
            max_open_blocks: asked for at once.
        """
        self.max_open_blocks = max_open_blocks
        self.came_from: dict[PeerId, int] = {}
        self.is_over = False
        self._all = (1 << num_blocks) - 1
        self._wanted = self._all & ~here
        self._asked = 0  # wanted, and asked of somebody
        self._num_open = 0
        self._sources = {source: _Source() for source in sources}
        self._liars: set[PeerId] = set()
        self._rarer = [0] * NUM_RARITIES  # those that more than n sources have
        self._next = rng.randrange(num_blocks) if num_blocks else 0
        self._patience_s = patience_s
        self._began_at: float | None = None
        self._moved_at = 0.0
        self._num_came = 0
        self._lonely_since: float | None = None
        self._last = "nobody who has it was found"

    @property
    def num_wanted(self) -> int:
        """Blocks that are not here yet."""
        return self._wanted.bit_count()

    @property
    def here(self) -> int:
        """Those that are: bit n is block n."""
        return self._all & ~self._wanted

    @property
    def num_sources(self) -> int:
        """Those that are asked."""
        return len(self._sources)

    def handle(self, event: Event, now: float) -> list[Output]:
        """Take an event; what is to be done about it, in order."""
        outputs: list[Output] = []
        if self.is_over:
            return []
        if self._began_at is None:
            self._began_at = self._moved_at = now
        match event:
            case SourceFound(source):
                if source not in self._liars:
                    self._sources.setdefault(source, _Source())
            case SourceLost(source):
                self._remove(source, f"{source} was lost", outputs)
            case HaveArrived(source, blocks):
                self._take_have(source, blocks)
            case HaveFailed(source, reason):
                state = self._sources.get(source)
                if state is not None:
                    state.is_asked = False
                    self._failed(source, state, reason, now, outputs)
            case Answered():
                self._answered(event, now, outputs)
            case Tick():
                pass
        self._plan(now, outputs)
        return outputs

    # --- taking in ---

    def _take_have(self, source: PeerId, blocks: int) -> None:
        state = self._sources.get(source)
        if state is None:
            return
        state.is_asked = False
        state.has = blocks & self._all
        if not state.open:
            state.failures = 0
        self._count_rarities()

    def _count_rarities(self) -> None:
        rarer = [0] * NUM_RARITIES
        for state in self._sources.values():
            if state.has:
                for level in range(NUM_RARITIES - 1, 0, -1):
                    rarer[level] |= rarer[level - 1] & state.has
                rarer[0] |= state.has
        self._rarer = rarer

    def _answered(self, event: Answered, now: float, outputs: list[Output]) -> None:
        source = event.source
        state = self._sources.get(source)
        request = None if state is None else state.open.pop(event.start, None)
        came = 0
        for block in event.came:
            came |= 1 << block
        new = came & self._wanted
        if new:
            self._wanted &= ~new
            self._asked &= ~new
            self._moved_at = now
            self._num_came += new.bit_count()
            self.came_from[source] = self.came_from.get(source, 0) + new.bit_count()
            self._call_off_useless(outputs)
        if state is None or request is None:
            return  # of somebody who was given up
        self._num_open -= request.count
        self._settle_asked()
        if event.is_lie:
            self._liars.add(source)
            reason = f"{source} sent other bytes than it was asked for"
            self._remove(source, reason, outputs)
            outputs.append(Drop(source, reason))
        elif event.failure and not request.is_called_off:
            if state.has is not None:
                state.has &= ~(request.blocks & ~came)  # until it says otherwise
                self._count_rarities()
            self._failed(source, state, event.failure, now, outputs)
        elif came and not request.is_called_off:
            rate = request.count / max(now - request.since, 1e-6)
            state.rate = (state.rate + rate) / 2 if state.has_brought else rate
            state.has_brought = True
            state.failures = 0
            took_s = now - request.since
            if took_s < QUICK_S:
                state.window = min(state.window + 1, MAX_WINDOW)
            elif took_s > SLOW_S:
                state.window = 1

    def _settle_asked(self) -> None:
        asked = 0
        for state in self._sources.values():
            for request in state.open.values():
                if not request.is_called_off:
                    asked |= request.blocks
        self._asked = asked & self._wanted

    def _call_off_useless(self, outputs: list[Output]) -> None:
        for source, state in self._sources.items():
            for start, request in state.open.items():
                if not request.blocks & self._wanted and not request.is_called_off:
                    request.is_called_off = True
                    outputs.append(CallOff(source, start))

    def _failed(self, source: PeerId, state: _Source, reason: str, now: float, outputs: list[Output]) -> None:
        self._last = f"{source}: {reason}"
        if now < state.ready_at:
            return  # requests that fail together are one failure
        state.ready_at = now + min(FIRST_BACKOFF_S * 2**state.failures, MAX_BACKOFF_S)
        state.failures += 1
        state.window = 1
        if state.failures >= MAX_FAILURES:
            self._remove(source, self._last, outputs)

    def _remove(self, source: PeerId, reason: str, outputs: list[Output]) -> None:
        state = self._sources.pop(source, None)
        if state is None:
            return
        self._last = reason
        for start, request in state.open.items():
            self._num_open -= request.count
            outputs.append(CallOff(source, start))
        self._settle_asked()
        self._count_rarities()

    # --- asking ---

    def _plan(self, now: float, outputs: list[Output]) -> None:
        if not self._wanted:
            self.is_over = True
            outputs.append(Done())
        elif self._is_lonely(now):
            self.is_over = True
            outputs.append(Failed(f"nobody is left who has it; {self._last}", Lack.UNAVAILABLE))
        elif now >= self._moved_at + self._patience_s:
            self.is_over = True
            lack = Lack.STALLED if self._num_came else Lack.UNAVAILABLE
            outputs.append(Failed(f"no block came for {self._patience_s:g} s; {self._last}", lack))
        else:
            self._ask(now, outputs)

    def _is_lonely(self, now: float) -> bool:
        if self._sources:
            self._lonely_since = None
        elif self._lonely_since is None:
            self._lonely_since = now
        return self._lonely_since is not None and now >= self._lonely_since + LONELY_S

    def _ask(self, now: float, outputs: list[Output]) -> None:
        wake_at = self._moved_at + self._patience_s
        if self._lonely_since is not None:
            wake_at = min(wake_at, self._lonely_since + LONELY_S)
        quickest = sorted(
            self._sources.items(), key=lambda item: (item[1].has_brought, -item[1].rate, len(item[1].open))
        )
        have_s = self._have_s()
        for source, state in quickest:
            if state.ready_at > now:
                wake_at = min(wake_at, state.ready_at)
                continue
            if state.has is not None:
                while len(state.open) < state.window and self._ask_next(source, state, now, outputs):
                    pass
            if state.has != self._all and not state.is_asked:
                if now >= state.have_at + have_s:
                    state.have_at, state.is_asked = now, True
                    outputs.append(AskHave(source))
                else:
                    wake_at = min(wake_at, state.have_at + have_s)
        if not self._wanted & ~self._asked:
            wake_at = min(wake_at, self._end_game(now, outputs))
        wake_at = min(wake_at, self._call_off_trickles(now, outputs))
        outputs.append(Wake(wake_at))

    def _have_s(self) -> float:
        lasted_s = self._moved_at - (self._began_at or 0.0)
        if not self._num_came:
            return MIN_HAVE_S
        return min(max(BLOCKS_PER_HAVE * lasted_s / self._num_came, MIN_HAVE_S), MAX_HAVE_S)

    def _ask_next(self, source: PeerId, state: _Source, now: float, outputs: list[Output]) -> bool:
        """Ask a source for the rarest of what it has and nobody was asked for."""
        count = min(self._run_of(state), self.max_open_blocks - self._num_open)
        found = self._wanted & ~self._asked & (state.has or 0)
        if not found or count < 1:
            return False
        for more in self._rarer[1:]:
            if found & ~more:
                found &= ~more
                break
        self._request(source, state, found, count, now, outputs)
        return True

    def _request(
        self, source: PeerId, state: _Source, found: int, count: int, now: float, outputs: list[Output]
    ) -> None:
        """Ask for the first of these blocks that follows on the last one, and its neighbours."""
        ahead = found >> self._next
        start = self._next + _lowest(ahead) if ahead else _lowest(found)
        run = found >> start
        count = min(count, _lowest(~run))
        blocks = ((1 << count) - 1) << start
        state.open[start] = _Open(blocks, count, now)
        self._asked |= blocks
        self._num_open += count
        self._next = start + count
        outputs.append(Request(source, start, count))

    @staticmethod
    def _run_of(state: _Source) -> int:
        return max(1, min(MAX_RUN, int(state.rate * RUN_S))) if state.has_brought else 1

    def _end_game(self, now: float, outputs: list[Output]) -> float:
        """Ask free sources for what they would bring sooner; gives when to look again."""
        look_at = float("inf")
        askers: dict[int, list[tuple[PeerId, _Source, _Open]]] = {}
        for source, state in self._sources.items():
            for request in state.open.values():
                left = request.blocks & self._wanted
                while left:
                    block = _lowest(left)
                    left &= left - 1
                    askers.setdefault(block, []).append((source, state, request))
        for source, state in self._sources.items():
            if len(state.open) >= state.window or state.ready_at > now or not state.has:
                continue
            for block, asked in askers.items():
                other, slow, request = asked[0]
                if len(asked) > 1 or other == source or block in state.open or not state.has >> block & 1:
                    continue
                expected_s = max(request.since + request.count / slow.rate - now, now - request.since)
                is_late = now >= request.since + LATE_S
                if not is_late and expected_s < 2 / state.rate:
                    look_at = min(look_at, request.since + LATE_S)
                    continue
                if self._num_open >= self.max_open_blocks:
                    break
                self._request(source, state, 1 << block, 1, now, outputs)
                asked.append((source, state, state.open[block]))
                if len(state.open) >= state.window:
                    break
        return look_at

    def _call_off_trickles(self, now: float, outputs: list[Output]) -> float:
        look_at = float("inf")
        for source, state in list(self._sources.items()):
            for start, request in list(state.open.items()):
                if request.is_called_off:
                    continue
                if now < request.since + TRICKLE_S:
                    look_at = min(look_at, request.since + TRICKLE_S)
                    continue
                others = [each for each in self._sources.values() if each is not state and each.has]
                if any(not request.blocks & ~(each.has or 0) for each in others):
                    request.is_called_off = True
                    outputs.append(CallOff(source, start))
                    self._settle_asked()
                    self._failed(source, state, f"it brought no block in {TRICKLE_S:g} s", now, outputs)
        return look_at


def _lowest(bits: int) -> int:
    """Which is the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
