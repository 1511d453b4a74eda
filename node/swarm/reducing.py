"""The all-reduce between real nodes: the shell of `shoal.training.exchange.allreduce`.

What a member offers, and what it holds of the results, lies in two buffers that the others pull from by bulk lanes
(`shoal.node.wire.bulk`); calls carry names of parts only. What an owner pulls lies in scratch memory until it is
reduced: a few parts of each member, whatever the arrays' size. Reducing and hashing run in threads.

Where members have signed the hashes of their parts, what is pulled is held to them, and each member does one part over
that another owned: whose, turns on what came of them all, and which part is its secret. An owner that lied is found out
by that (`shoal.training.exchange.audits`), and the others are told, who look for themselves.

A member of the run that came too late for an all-reduce gets what came of it (`shoal.node.swarm.following`): it is
kept until the run's next one begins.

NumPy is loaded when the first all-reduce runs.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from shoal.node.wire.bulk import BulkRef
from shoal.node.wire.contracts import (
    ArrayOffered,
    ExchangeService,
    LieFound,
    PartAsked,
    PartHeld,
    ReduceEnded,
    ResultAsked,
    ResultGiven,
)
from shoal.node.wire.links import Links
from shoal.protocol.errors import ProtocolError, RemoteError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import Empty, client, current_call
from shoal.protocol.signing import Signer
from shoal.training.exchange import allreduce as core
from shoal.training.exchange.audits import Parts, SignedOutcome, audited_by, follows, sign_outcome

log = logging.getLogger(__name__)

CALL_S: Final = 2.0
ASK_S: Final = 1.0
"""For a member to say whether it holds what came of a part."""
PULL_S: Final = 120.0
"""For one part, beside all others that come from the same member. Who is given up before is for the core to say; a path
that stands still ends sooner (`bulk.PROGRESS_S`)."""
LINGER_S: Final = 5.0
"""How long one that has everything goes on giving to those who have not, at most."""
KEY_BYTES: Final = 16
MAX_EARLY: Final = 64
"""All-reduces of which others speak that this node has not begun; and calls of each that are kept."""
MAX_AUDITS: Final = 4
"""In one all-reduce: the own one, and those that others ask for."""
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
        longest_gap_s: for which nothing came on.
    """

    data: memoryview
    digest: bytes
    seconds: float
    outcomes: dict[int, core.Outcome]
    longest_gap_s: float


@dataclass(frozen=True, slots=True)
class Commitments:
    """What holds members to what they signed.

    Attributes:
        hashes: of each member's parts, SHA-256, as its signed offer has them.
        shunned: members whose results are not taken.
        on_lie: told what an owner signed that does not follow from the parts that it names.
        on_false: told who gives another part than it signed.
    """

    hashes: Mapping[PeerId, Sequence[bytes]]
    shunned: Set[PeerId]
    on_lie: Callable[[SignedOutcome], None]
    on_false: Callable[[PeerId], None]


@dataclass(slots=True)
class _Other:
    """Another member's buffers."""

    arrays: BulkRef | None = None
    results: BulkRef | None = None
    has_ended: bool = False


class Reductions(ExchangeService):
    """All of a node's."""

    def __init__(self, links: Links, signer: Signer) -> None:
        self._links = links
        self._signer = signer
        self._running: dict[bytes, _Reduction | _Meeting] = {}
        self._early: OrderedDict[bytes, deque[tuple[PeerId, object]]] = OrderedDict()
        self._kept: dict[SwarmId, tuple[bytes, _Reduction]] = {}

    @property
    def links(self) -> Links:
        """To the members."""
        return self._links

    @property
    def me(self) -> PeerId:
        """This node."""
        return self._signer.peer_id

    @asynccontextmanager
    async def reducing(
        self,
        key: bytes,
        members: Sequence[core.Member],
        parts: Parts,
        offered: memoryview,
        *,
        into: memoryview,
        patience_s: float,
        commitments: Commitments | None = None,
        linger_s: float = LINGER_S,
        run: SwarmId | None = None,
    ) -> AsyncIterator[ReduceResult]:
        """Take part in one all-reduce; the context begins when this node has everything.

        It ends when everybody has, or ``linger_s`` later: until then others may pull what is offered, and the result.

        Args:
            key: 16 bytes that name it, equal at all members.
            members: all, this node among them; the same for everybody.
            parts: the layout, likewise.
            offered: what this node gives, as the layout wrote it.
            into: where the result goes; as many bytes.
            patience_s: for which nothing may come on.
            commitments: what members signed; None, if nothing is held against them.
            linger_s: how long one that has everything goes on giving to those who have not, at most.
            run: for which it is; ``into`` is then left as it is until the run's next one, or `forget`.
        """
        if run is not None:
            self.forget(run)
        reduction = _Reduction(
            *(self._links, self._signer, key, members, parts, offered, into),
            patience_s=patience_s,
            commitments=commitments,
        )
        with self._hearing(key, reduction):
            async with reduction.run(linger_s) as result:
                yield result
        if run is not None:
            self._kept[run] = key, reduction

    def forget(self, run: SwarmId) -> None:
        """What came of a run's last all-reduce is not given to anybody any more."""
        self._kept.pop(run, None)

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
        if isinstance(call, SignedOutcome | LieFound):
            return  # as large as its author likes; who begins late asks for it
        self._early.setdefault(key, deque(maxlen=MAX_EARLY)).append((peer, call))
        while len(self._early) > MAX_EARLY:
            self._early.popitem(last=False)

    async def array(self, request: ArrayOffered) -> Empty:
        """A member's buffers can be pulled from."""
        self._to(request.key, request)
        return Empty()

    async def outcome(self, request: SignedOutcome) -> Empty:
        """A member holds what came of a part."""
        self._to(request.key, request)
        return Empty()

    async def lie(self, request: LieFound) -> Empty:
        """A member says that an owner lied; answered once that was looked into, as the parts are there until then."""
        self._to(request.said.key, request)
        running = self._running.get(request.said.key)
        if isinstance(running, _Reduction):
            await running.looked_into(request.said)
        return Empty()

    async def ended(self, request: ReduceEnded) -> Empty:
        """A member holds everything."""
        self._to(request.key, request)
        return Empty()

    async def result(self, request: ResultAsked) -> ResultGiven:
        """A member of the run that is none of the all-reduce wants what comes of a part."""
        running = self._running.get(request.key)
        if running is None:
            running = next((each for key, each in self._kept.values() if key == request.key), None)
        if not isinstance(running, _Reduction):
            raise RemoteError(Status.NOT_FOUND, "this node is in no such all-reduce")
        return await running.given(request.part, is_data_wanted=request.is_data_wanted)

    async def held(self, request: PartAsked) -> PartHeld:
        """A member asks who holds what came of a part."""
        running = self._running.get(request.key)
        if not isinstance(running, _Reduction):
            raise RemoteError(Status.NOT_FOUND, "this node is in no such all-reduce")
        return running.asked(current_call().peer, request)


async def _tell(links: Links, peer: PeerId, call: ArrayOffered | SignedOutcome | ReduceEnded | LieFound) -> None:
    service = client(ExchangeService, links.at(peer), timeout_s=CALL_S)
    try:
        match call:
            case ArrayOffered():
                await service.array(call)
            case SignedOutcome():
                await service.outcome(call)
            case ReduceEnded():
                await service.ended(call)
            case LieFound():
                await service.lie(call)
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
        signer: Signer,
        key: bytes,
        members: Sequence[core.Member],
        parts: Parts,
        offered: memoryview,
        into: memoryview,
        *,
        patience_s: float,
        commitments: Commitments | None,
    ) -> None:
        self._links = links
        self._signer = signer
        self._key = key
        self._me = signer.peer_id
        self._parts = parts
        self._offered = offered
        self._result = into
        self._commitments = commitments
        self._left: set[PeerId] = set()
        self._weights = {member.peer: member.weight for member in members}
        self._others = {member.peer: _Other() for member in members if member.peer != self._me}
        self._shunned: Set[PeerId] = frozenset() if commitments is None else frozenset(commitments.shunned)
        self._core = core.AllReduce(
            *(self._me, members, parts.num_parts),
            patience_s=patience_s,
            now=trio.current_time(),
            shunned=self._shunned,
        )
        self._pulled: dict[tuple[int, PeerId], memoryview] = {}
        self._fetching: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        self._said: dict[tuple[int, PeerId], SignedOutcome] = {}
        self._num_audits = self._num_auditing = 0
        self._looked: dict[tuple[int, PeerId], trio.Event] = {}  # by what was to be looked into
        self._accused: set[PeerId] = set()
        self._events: deque[core.Event | SignedOutcome] = deque()
        self._arrived = trio.Event()
        self._came = trio.Event()  # something; made anew each time
        self._digest: bytes | None = None
        self._began_at = self._came_at = trio.current_time()
        self._longest_gap_s = 0.0
        self._done_s = 0.0

    # What others say.

    def heard(self, peer: PeerId, call: object) -> None:
        """A call of another node; of one that is no member, nothing is taken."""
        other = self._others.get(peer)
        if other is None:
            return
        match call:
            case ArrayOffered(_, arrays, results):
                if min(arrays.num_bytes, results.num_bytes) == self._parts.num_bytes:
                    other.arrays, other.results = arrays, results
                    self._post(core.Ready(peer))
            case SignedOutcome() as said:
                self._announced(peer, said)
            case LieFound(said):
                if self._knows(said):
                    self._said.setdefault((said.part, said.owner), said)
                    self._looked.setdefault((said.part, said.owner), trio.Event())
                    self._post(said)
            case ReduceEnded():
                other.has_ended = True
                self._arrived.set()
            case _:
                pass

    async def looked_into(self, said: SignedOutcome) -> None:
        """Wait until an accusation that was heard is looked into, for as long as a call takes."""
        looked = self._looked.get((said.part, said.owner))
        if looked is not None:
            with trio.move_on_after(CALL_S):
                await looked.wait()

    def asked(self, peer: PeerId, request: PartAsked) -> PartHeld:
        """Whether this node holds what came of a part."""
        if peer not in self._others:
            raise RemoteError(Status.PERMISSION_DENIED, "the caller is no member of this all-reduce")
        outcome = self._core.outcomes.get(request.part)
        if outcome is None:
            self._post(core.Asked(request.part, request.heir))
            return PartHeld()
        return PartHeld(self._said[request.part, outcome.owner])

    async def given(self, part: int, *, is_data_wanted: bool) -> ResultGiven:
        """What came of a part, once it is here."""
        if not 0 <= part < self._parts.num_parts:
            raise RemoteError(Status.INVALID_ARGUMENT, f"there are {self._parts.num_parts} parts")
        while part not in self._core.outcomes:
            await self._came.wait()
        said = self._said[part, self._core.outcomes[part].owner]
        return ResultGiven(said, bytes(self._result[self._parts.place(part)]) if is_data_wanted else b"")

    def _announced(self, holder: PeerId, said: SignedOutcome) -> None:
        """Take what an owner signed, from whoever holds what came of it; its first word on a part counts."""
        before = self._said.get((said.part, said.owner))
        if before is None and self._knows(said):
            before = self._said[said.part, said.owner] = said
        if before is not None and before == said:
            self._post(core.Announced(holder, said.part, said.outcome))

    def _knows(self, said: SignedOutcome) -> bool:
        is_of_this = said.key == self._key and 0 <= said.part < self._parts.num_parts and said.owner in self._weights
        return is_of_this and said.is_signed()

    def _post(self, event: core.Event | SignedOutcome) -> None:
        self._events.append(event)
        self._arrived.set()

    # The loop.

    @asynccontextmanager
    async def run(self, linger_s: float) -> AsyncIterator[ReduceResult]:
        """Until this node has everything; and then, until everybody has or was given time enough."""
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for peer in self._others:
                arrays = await stack.enter_async_context(self._links.bulk.offer(peer, self._offered))
                results = await stack.enter_async_context(self._links.bulk.offer(peer, self._result))
                nursery.start_soon(_tell, self._links, peer, ArrayOffered(self._key, arrays, results))
            self._do(self._core.start(trio.current_time()), nursery)
            while self._digest is None:
                await self._step(nursery)
            everybody, told = trio.Event(), trio.Event()
            self._look_into_one(self._digest, nursery)
            nursery.start_soon(self._go_on, nursery, everybody, told)
            yield ReduceResult(self._result, self._digest, self._done_s, dict(self._core.outcomes), self._longest_gap_s)
            with trio.move_on_after(linger_s):
                await everybody.wait()
                await told.wait()  # else they would wait for this node
            nursery.cancel_scope.cancel()

    async def _go_on(self, nursery: trio.Nursery, everybody: trio.Event, told: trio.Event) -> None:
        """Answer the others, until all have everything and have looked into what they want to."""
        is_told = False
        while True:
            if not is_told and not self._num_auditing:
                is_told = True
                nursery.start_soon(self._tell_ended, told)
            is_looking = self._num_auditing > 0 or bool(self._events)
            if (
                is_told
                and not is_looking
                and all(other.has_ended or peer in self._left for peer, other in self._others.items())
            ):
                everybody.set()
            await self._step(nursery)

    async def _tell_ended(self, told: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self._others:
                if peer not in self._left:
                    nursery.start_soon(_tell, self._links, peer, ReduceEnded(self._key))
        told.set()

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
            event = self._events.popleft()
            if isinstance(event, SignedOutcome):
                self._audit_soon(event, nursery)
                continue
            if isinstance(event, core.Pulled | core.Reduced | core.Fetched):
                self._longest_gap_s = max(self._longest_gap_s, now - self._came_at)
                self._came_at = now
            self._do(self._core.handle(event, now), nursery)
            if isinstance(event, core.Reduced | core.Fetched):
                self._came.set()
                self._came = trio.Event()

    def _do(self, outputs: Iterable[core.Output], nursery: trio.Nursery) -> None:
        for output in outputs:
            match output:
                case core.Pull(author, part):
                    nursery.start_soon(self._pull, author, part)
                case core.Reduce(part, authors):
                    nursery.start_soon(self._reduce, part, authors)
                case core.Announce(part, outcome):
                    said = self._said[part, outcome.owner]
                    for peer in self._others:
                        nursery.start_soon(_tell, self._links, peer, said)
                case core.Fetch(part, holder, outcome):
                    nursery.start_soon(self._fetch, part, holder, outcome)
                case core.Ask(part, members, heir):
                    nursery.start_soon(self._ask, part, members, heir)
                case core.Done(digest):
                    self._digest = digest
                    self._done_s = trio.current_time() - self._began_at

    # What is done.

    async def _pull(self, author: PeerId, part: int) -> None:
        into = await self._part_of(author, part)
        if into is not None:
            self._pulled[part, author] = into
            self._post(core.Pulled(author, part))
        else:
            self._post(core.NotPulled(author, part))

    async def _part_of(self, author: PeerId, part: int) -> memoryview | None:
        """A member's part, as it signed it; None if it does not give that."""
        place = self._parts.place(part)
        if author == self._me:
            return self._offered[place]
        arrays, into = self._others[author].arrays, memoryview(bytearray(place.stop - place.start))
        if arrays is None or not await self._bring(author, arrays, into, place.start):
            return None
        if self._commitments is not None:
            digest = await trio.to_thread.run_sync(lambda: hashlib.sha256(into).digest())
            if digest != self._commitments.hashes[author][part]:
                log.warning("%s gives another part %d than it offered: it is left out", author, part)
                self._commitments.on_false(author)
                return None
        return into

    async def _bring(self, peer: PeerId, ref: BulkRef, into: memoryview, offset: int) -> bool:
        try:
            await self._links.bulk.pull(peer, ref, into, offset=offset, timeout_s=PULL_S)
        except RemoteError as error:
            log.debug("%s gives nothing: %s", peer, error)
            return False
        return True

    async def _reduce(self, part: int, authors: tuple[PeerId, ...]) -> None:
        await self._stop_fetching(part)
        place = self._parts.place(part)
        given = [self._offered[place] if peer == self._me else self._pulled[part, peer] for peer in authors]
        weights = [self._weights[peer] for peer in authors]
        out = self._result[place]

        def work() -> tuple[list[int], bytes]:
            used = self._parts.reduce(part, given, weights, out)
            return used, hashlib.sha256(out).digest()

        used, digest = await trio.to_thread.run_sync(work)
        for peer in self._others:
            self._pulled.pop((part, peer), None)
        outcome = core.Outcome(self._me, tuple(authors[number] for number in used), digest)
        self._said[part, self._me] = sign_outcome(self._signer, self._key, part, outcome)
        self._post(core.Reduced(part, outcome.authors, digest))

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
        place = self._parts.place(part)
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
            if held.said is not None and held.said.part == part and held.said.owner not in self._shunned:
                is_found = True
                self._announced(peer, held.said)

        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(ask, member)
        if not is_found:
            self._post(core.NobodyHolds(part))

    # Whether owners lie.

    def _look_into_one(self, digest: bytes, nursery: trio.Nursery) -> None:
        """Audit one part of the owner whose turn it is; of any other one, if that made none."""
        theirs = {part: each.owner for part, each in self._core.outcomes.items() if each.owner != self._me}
        if not theirs:
            return
        owner = audited_by(self._me, list(self._weights), digest)
        part = secrets.choice([part for part in theirs if theirs[part] == owner] or list(theirs))
        self._audit_soon(self._said[part, theirs[part]], nursery)

    def _audit_soon(self, said: SignedOutcome, nursery: trio.Nursery) -> None:
        if self._commitments is not None and said.owner not in self._accused and self._num_audits < MAX_AUDITS:
            self._num_audits += 1
            self._num_auditing += 1
            nursery.start_soon(self._audit, said, self._commitments)
        elif (said.part, said.owner) in self._looked:
            self._looked[said.part, said.owner].set()

    async def _audit(self, said: SignedOutcome, commitments: Commitments) -> None:
        """Do a part over; if something else comes of it than was signed, its owner lied."""
        try:
            given: dict[PeerId, memoryview] = {}
            for author in said.authors:
                data = await self._part_of(author, said.part) if author in self._weights else None
                if data is not None:
                    given[author] = data
            if len(given) < len(said.authors):
                return  # who does not give its part any more
            parts, weights = self._parts, self._weights
            if await trio.to_thread.run_sync(lambda: follows(parts, said, given, weights)):
                return
            if said.owner not in self._accused:
                self._accused.add(said.owner)
                commitments.on_lie(said)
                async with trio.open_nursery() as telling:  # before they hear that this node has ended, and go
                    for peer in self._others:
                        if peer != said.owner:
                            telling.start_soon(_tell, self._links, peer, LieFound(said))
        finally:
            self._num_auditing -= 1
            if (said.part, said.owner) in self._looked:
                self._looked[said.part, said.owner].set()
            self._arrived.set()
