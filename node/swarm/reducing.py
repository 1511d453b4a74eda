"""The all-reduce between real nodes: the shell of `shoal.training.exchange.allreduce`.

What a member offers, and what it holds of the results, lies in two buffers that the others pull from by bulk lanes
(`shoal.node.wire.bulk`); calls carry names of parts only. What an owner pulls lies in scratch memory until it is
reduced: a few parts of each member, whatever the arrays' size. Reducing and hashing run in threads.

NumPy is loaded when the first all-reduce runs.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from shoal.node.wire.bulk import BulkRef
from shoal.node.wire.contracts import (
    ArrayOffered,
    ExchangeService,
    PartAsked,
    PartHeld,
    PartOutcome,
    ReduceEnded,
)
from shoal.node.wire.links import Links
from shoal.protocol.errors import ProtocolError, RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty, client, current_call
from shoal.training.exchange import allreduce as core

if TYPE_CHECKING:
    from shoal.training.exchange.spans import Spans

log = logging.getLogger(__name__)

CALL_S: Final = 2.0
ASK_S: Final = 1.0
"""For a member to say whether it holds what came of a part."""
PULL_S: Final = 30.0
LINGER_S: Final = 5.0
"""How long one that has everything goes on giving to those who have not, at most."""
KEY_BYTES: Final = 16
MAX_EARLY: Final = 64
"""All-reduces of which others speak that this node has not begun; and calls of each that are kept."""
LOOK_S: Final = 0.2
"""How often it is looked who is connected."""


@dataclass(frozen=True, slots=True)
class ReduceResult:
    """What one all-reduce brought.

    Attributes:
        data: the result, as the layout's codec writes it.
        digest: of it; equal where all bytes are.
        seconds: from the start to the last part.
        outcomes: whose parts are in each part.
    """

    data: memoryview
    digest: bytes
    seconds: float
    outcomes: dict[int, core.Outcome]


@dataclass(slots=True)
class _Other:
    """Another member's buffers."""

    arrays: BulkRef | None = None
    results: BulkRef | None = None
    has_ended: bool = False


class Reductions(ExchangeService):
    """All of a node's."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._running: dict[bytes, _Reduction | _Meeting] = {}
        self._early: OrderedDict[bytes, deque[tuple[PeerId, object]]] = OrderedDict()

    async def reduce(
        self,
        key: bytes,
        me: PeerId,
        members: Sequence[core.Member],
        spans: Spans,
        offered: memoryview,
        *,
        into: memoryview,
        patience_s: float,
    ) -> ReduceResult:
        """Take part in one all-reduce; returns when everybody has it, or `LINGER_S` after this node has.

        Args:
            key: 16 bytes that name it, equal at all members.
            me: this node.
            members: all; the same for everybody.
            spans: the layout, likewise.
            offered: what this node gives, as `Spans.encode` wrote it.
            into: where the result goes; as many bytes.
            patience_s: for which nothing may come on.
        """
        reduction = _Reduction(self._links, key, me, members, spans, offered, into, patience_s)
        with self._hearing(key, reduction):
            return await reduction.run()

    @asynccontextmanager
    async def meeting(
        self, key: bytes, others: Sequence[PeerId], offered: memoryview
    ) -> AsyncIterator[dict[PeerId, BulkRef]]:
        """What each of these offers, once all have come; the context ends when all have left it.

        Nothing is reduced: it is for measuring what the lanes carry.
        """
        meeting = _Meeting(others)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._hearing(key, meeting))
            for peer in others:
                ref = await stack.enter_async_context(self._links.bulk.offer(peer, offered))
                await _tell(self._links, peer, ArrayOffered(key, ref, ref))
            with trio.fail_after(LINGER_S):
                await meeting.all_came.wait()
            yield meeting.refs
            for peer in others:
                await _tell(self._links, peer, ReduceEnded(key))
            with trio.move_on_after(LINGER_S):
                await meeting.all_ended.wait()

    @contextmanager
    def _hearing(self, key: bytes, running: _Reduction | _Meeting) -> Iterator[None]:
        """What is said under this name in the block, and was said before, goes there."""
        self._running[key] = running
        try:
            for peer, call in self._early.pop(key, ()):
                running.heard(peer, call)
            yield
        finally:
            del self._running[key]

    def _to(self, key: bytes, call: object) -> None:
        peer = current_call().peer
        if len(key) != KEY_BYTES:
            raise ProtocolError(f"an all-reduce is named by {KEY_BYTES} bytes")
        running = self._running.get(key)
        if running is not None:
            running.heard(peer, call)
            return
        if isinstance(call, PartOutcome):
            return  # as large as its author likes; who begins late asks for it
        self._early.setdefault(key, deque(maxlen=MAX_EARLY)).append((peer, call))
        while len(self._early) > MAX_EARLY:
            self._early.popitem(last=False)

    async def array(self, request: ArrayOffered) -> Empty:
        """A member's buffers can be pulled from."""
        self._to(request.key, request)
        return Empty()

    async def outcome(self, request: PartOutcome) -> Empty:
        """A member holds what came of a part."""
        self._to(request.key, request)
        return Empty()

    async def ended(self, request: ReduceEnded) -> Empty:
        """A member holds everything."""
        self._to(request.key, request)
        return Empty()

    async def held(self, request: PartAsked) -> PartHeld:
        """A member asks who holds what came of a part."""
        running = self._running.get(request.key)
        if not isinstance(running, _Reduction):
            raise RemoteError(Status.NOT_FOUND, "this node is in no such all-reduce")
        return running.asked(current_call().peer, request)


async def _tell(links: Links, peer: PeerId, call: ArrayOffered | PartOutcome | ReduceEnded) -> None:
    service = client(ExchangeService, links.at(peer), timeout_s=CALL_S)
    try:
        match call:
            case ArrayOffered():
                await service.array(call)
            case PartOutcome():
                await service.outcome(call)
            case ReduceEnded():
                await service.ended(call)
    except RemoteError as error:  # who is gone is noticed, and who hears nothing asks
        log.debug("%s was not told: %s", peer, error)


class _Meeting:
    """Members that find out what each of them offers, and no more."""

    def __init__(self, others: Sequence[PeerId]) -> None:
        self._waiting, self._staying = set(others), set(others)
        self.refs: dict[PeerId, BulkRef] = {}
        self.all_came, self.all_ended = trio.Event(), trio.Event()

    def heard(self, peer: PeerId, call: object) -> None:
        """One of them says something."""
        match call:
            case ArrayOffered(_, arrays, _) if peer in self._waiting:
                self.refs[peer] = arrays
                self._waiting.discard(peer)
            case ReduceEnded():
                self._staying.discard(peer)
            case _:
                pass
        if not self._waiting:
            self.all_came.set()
        if not self._staying:
            self.all_ended.set()


class _Reduction:
    """One of them, while it runs."""

    def __init__(
        self,
        links: Links,
        key: bytes,
        me: PeerId,
        members: Sequence[core.Member],
        spans: Spans,
        offered: memoryview,
        into: memoryview,
        patience_s: float,
    ) -> None:
        self._links = links
        self._key = key
        self._me = me
        self._spans = spans
        self._offered = offered
        self._left: set[PeerId] = set()
        self._weights = {member.peer: member.weight for member in members}
        self._others = {member.peer: _Other() for member in members if member.peer != me}
        self._core = core.AllReduce(me, members, spans.num_parts, patience_s=patience_s, now=trio.current_time())
        self._result = into
        self._pulled: dict[tuple[int, PeerId], memoryview] = {}
        self._fetching: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        self._events: deque[core.Event] = deque()
        self._arrived = trio.Event()
        self._digest: bytes | None = None
        self._began_at = trio.current_time()
        self._done_s = 0.0

    # What others say.

    def heard(self, peer: PeerId, call: object) -> None:
        """A call of another node; of one that is no member, nothing is taken."""
        other = self._others.get(peer)
        if other is None:
            return
        match call:
            case ArrayOffered(_, arrays, results):
                if min(arrays.num_bytes, results.num_bytes) == self._spans.num_bytes:
                    other.arrays, other.results = arrays, results
                    self._post(core.Ready(peer))
            case PartOutcome(_, part, owner, authors, digest):
                self._post(core.Announced(peer, part, core.Outcome(owner, authors, digest)))
            case ReduceEnded():
                other.has_ended = True
                self._arrived.set()
            case _:
                pass

    def asked(self, peer: PeerId, request: PartAsked) -> PartHeld:
        """Whether this node holds what came of a part."""
        if peer not in self._others:
            raise RemoteError(Status.PERMISSION_DENIED, "the caller is no member of this all-reduce")
        outcome = self._core.outcomes.get(request.part)
        if outcome is None:
            self._post(core.Asked(request.part, request.heir))
            return PartHeld()
        return PartHeld(outcome.owner, outcome.authors, outcome.digest)

    def _post(self, event: core.Event) -> None:
        self._events.append(event)
        self._arrived.set()

    # The loop.

    async def run(self) -> ReduceResult:
        """Until everybody has everything, or was given time enough."""
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for peer in self._others:
                arrays = await stack.enter_async_context(self._links.bulk.offer(peer, self._offered))
                results = await stack.enter_async_context(self._links.bulk.offer(peer, self._result))
                nursery.start_soon(_tell, self._links, peer, ArrayOffered(self._key, arrays, results))
            self._do(self._core.start(trio.current_time()), nursery)
            while self._digest is None:
                await self._step(nursery)
            async with trio.open_nursery() as telling:
                for peer in self._others:
                    if peer not in self._left:
                        telling.start_soon(_tell, self._links, peer, ReduceEnded(self._key))
                with trio.move_on_after(LINGER_S):
                    while not all(other.has_ended or peer in self._left for peer, other in self._others.items()):
                        await self._step(nursery)
            nursery.cancel_scope.cancel()
        return ReduceResult(self._result, self._digest or b"", self._done_s, self._core.outcomes)

    async def _step(self, nursery: trio.Nursery) -> None:
        if not self._events:
            self._arrived = trio.Event()
            with trio.move_on_at(min(self._core.next_wake, trio.current_time() + LOOK_S)):
                await self._arrived.wait()
        now = trio.current_time()
        for peer in self._others:
            if peer not in self._left and not self._links.is_connected(peer):
                self._left.add(peer)
                self._events.append(core.Left(peer))
        if now >= self._core.next_wake:
            self._events.append(core.Tick())
        while self._events:
            self._do(self._core.handle(self._events.popleft(), now), nursery)

    def _do(self, outputs: Iterable[core.Output], nursery: trio.Nursery) -> None:
        for output in outputs:
            match output:
                case core.Pull(author, part):
                    nursery.start_soon(self._pull, author, part)
                case core.Reduce(part, authors):
                    nursery.start_soon(self._reduce, part, authors)
                case core.Announce(part, outcome):
                    call = PartOutcome(self._key, part, outcome.owner, outcome.authors, outcome.digest)
                    for peer in self._others:
                        nursery.start_soon(_tell, self._links, peer, call)
                case core.Fetch(part, holder, outcome):
                    nursery.start_soon(self._fetch, part, holder, outcome)
                case core.Ask(part, members, heir):
                    nursery.start_soon(self._ask, part, members, heir)
                case core.Done(digest):
                    self._digest = digest
                    self._done_s = trio.current_time() - self._began_at

    # What is done.

    async def _pull(self, author: PeerId, part: int) -> None:
        place = self._spans.place(part)
        arrays = self._others[author].arrays
        into = memoryview(bytearray(place.stop - place.start))
        if arrays is not None and await self._bring(author, arrays, into, place.start):
            self._pulled[part, author] = into
            self._post(core.Pulled(author, part))
        else:
            self._post(core.NotPulled(author, part))

    async def _bring(self, peer: PeerId, ref: BulkRef, into: memoryview, offset: int) -> bool:
        try:
            await self._links.bulk.pull(peer, ref, into, offset=offset, timeout_s=PULL_S)
        except RemoteError as error:
            log.debug("%s gives nothing: %s", peer, error)
            return False
        return True

    async def _reduce(self, part: int, authors: tuple[PeerId, ...]) -> None:
        await self._stop_fetching(part)
        place = self._spans.place(part)
        given = [self._offered[place] if peer == self._me else self._pulled[part, peer] for peer in authors]
        weights = [self._weights[peer] for peer in authors]
        out = self._result[place]

        def work() -> bytes:
            self._spans.reduce(part, given, weights, out)
            return hashlib.sha256(out).digest()

        digest = await trio.to_thread.run_sync(work)
        for peer in self._others:
            self._pulled.pop((part, peer), None)
        self._post(core.Reduced(part, digest))

    async def _stop_fetching(self, part: int) -> None:
        """Nothing else writes where this part goes, once this returns."""
        before = self._fetching.get(part)
        if before is not None:
            before[0].cancel()
            await before[1].wait()

    async def _fetch(self, part: int, holder: PeerId, outcome: core.Outcome) -> None:
        await self._stop_fetching(part)
        scope, is_over = trio.CancelScope(), trio.Event()
        self._fetching[part] = scope, is_over
        place = self._spans.place(part)
        into, results, is_it = self._result[place], self._others[holder].results, False
        try:
            with scope:
                if results is not None and await self._bring(holder, results, into, place.start):
                    digest = await trio.to_thread.run_sync(lambda: hashlib.sha256(into).digest())
                    is_it = digest == outcome.digest
        finally:
            if self._fetching.get(part) == (scope, is_over):
                del self._fetching[part]
            is_over.set()
        self._post(core.Fetched(part, holder) if is_it else core.NotFetched(part, holder))

    async def _ask(self, part: int, members: tuple[PeerId, ...], heir: PeerId) -> None:
        is_found = False

        async def ask(peer: PeerId) -> None:
            nonlocal is_found
            service = client(ExchangeService, self._links.at(peer), timeout_s=ASK_S)
            try:
                held = await service.held(PartAsked(self._key, part, heir))
            except RemoteError as error:
                log.debug("%s does not say what it holds: %s", peer, error)
                return
            if held.owner is not None:
                is_found = True
                self._post(core.Announced(peer, part, core.Outcome(held.owner, held.authors, held.digest)))

        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(ask, member)
        if not is_found:
            self._post(core.NobodyHolds(part))
