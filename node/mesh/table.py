"""This node's part in the distributed hash table: carries what its core (`shoal.dht.core`) says, and keeps its time.

Questions are calls like any other, to peers that are connected or are dialed within the budget for what others named.
So the table needs no protocol, stream or limit of its own.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, Protocol

import trio

from shoal.dht.core import (
    MAX_OPERATIONS,
    Answered,
    Ask,
    Dht,
    Event,
    Failed,
    Get,
    GetDone,
    Here,
    Met,
    Publish,
    PutDone,
    Tick,
    Wake,
    Withdraw,
)
from shoal.dht.messages import FindAnswer, FindRequest, StoreAnswer, StoreRequest
from shoal.dht.records import Kind, Model, Profile, Record
from shoal.dht.registry import ModelName
from shoal.node.signals import Signal
from shoal.node.supervise import Domain, Policy
from shoal.node.wire.contracts import DhtService
from shoal.protocol.errors import NoPeersError, ProtocolError, RemoteError, ShoalError, Status
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import Caller, client, current_call
from shoal.protocol.signing import Signer

log = logging.getLogger(__name__)

ASK_S: Final = 4.0
"""A question, with the dialing for it."""
MAX_GREETED: Final = 64
"""Connected peers, when this node begins to serve; the others hear of it by look-ups."""
CLOCK_S: Final = 300.0
"""How often it is looked at the wall clock, which is set now and then, and goes on while a machine sleeps."""


class Mesh(Protocol):
    """What the table needs of the host."""

    @property
    def connected(self) -> Iterable[PeerId]:
        """Who is connected."""

    def is_connected(self, peer: PeerId) -> bool:
        """Whether any connection stands."""

    async def reach_for_dht(self, peer: PeerId, addresses: Sequence[str]) -> bool | None:
        """Dial a peer that others named; whether it is connected, None if it was not tried."""

    def at(self, peer: PeerId) -> Caller:
        """What carries calls to a peer."""

    def addresses(self) -> tuple[str, ...]:
        """Where this node is."""

    def group(self, peer: PeerId) -> str:
        """For whom a peer counts, where bounds are shared."""


class Table:
    """Put, get, provide, find."""

    def __init__(self, mesh: Mesh, signer: Signer, domain: Domain, wall_clock: Callable[[], float] = time.time) -> None:
        self.core = Dht(signer, random.SystemRandom())
        self._mesh = mesh
        self._domain = domain
        self._wall_clock = wall_clock
        self._ahead_s = wall_clock() - trio.current_time()
        self._wake_at = math.inf
        self._retimed = Signal()
        self._last_op = 0
        self._done: dict[int, trio.MemorySendChannel[PutDone | GetDone]] = {}
        self._room = trio.CapacityLimiter(MAX_OPERATIONS)
        self._is_reachable = False

    # --- what the node asks ---

    async def provide(self, cid: Cid) -> int:
        """Say that this node holds a content, from now on until `withdraw`; how many peers took it at first."""
        return (await self.publish(Kind.PROVIDER, str(cid))).num_kept

    def withdraw(self, kind: Kind, topic: str, item: str = "") -> None:
        """Say something no more; what was said is not taken back, but expires."""
        self._tell(Withdraw(kind, topic, item))

    def keep_saying(
        self, kind: Kind, topic: str, body: Model | Profile | None = None, *, seq: int | None = None, item: str = ""
    ) -> None:
        """As `publish`, when its turn comes: nobody waits for what comes of it."""
        self._tell(Publish(0, kind, topic, item, seq, body))

    async def find(self, cid: Cid) -> dict[PeerId, tuple[str, ...]]:
        """The peers that say that they hold a content, with their full multiaddrs; whether they do, shows by asking."""
        done = await self.get(Kind.PROVIDER, str(cid))
        return {record.author: record.body.addresses for record in done.records if record.author != self.core.me}

    async def newest(self, name: ModelName) -> Record | None:
        """The record of the newest version of a model; None if nobody who answers has one.

        Raises:
            NoPeersError: if nobody answers.
        """
        done = await self.get(Kind.MODEL, name.name, name.owner)
        if not done.records and not len(self.core.table):
            raise NoPeersError("nobody takes part in the DHT that this node knows; connect it with --bootstrap")
        if done.forks:
            log.warning("%s signed two different versions of %s with one number", name.owner, name.name)
        return done.records[0] if done.records else None

    async def tagged(self, tag: str) -> list[Record]:
        """Models that their owners say have a tag, or do a task: a record of each, whose item is its name."""
        return list((await self.get(Kind.TAG, tag)).records)

    async def publish(
        self, kind: Kind, topic: str, body: Model | Profile | None = None, *, seq: int | None = None, item: str = ""
    ) -> PutDone:
        """Say something, and again before it expires: see `shoal.dht.core.Publish`. Gives what came of it first.

        Raises:
            ProtocolError: if it is more than a record may say.
        """
        done = await self._do(lambda op: Publish(op, kind, topic, item, seq, body))
        if not isinstance(done, PutDone):
            raise TypeError(f"a put ends with PutDone, not {done}")
        return done

    async def get(self, kind: Kind, topic: str, owner: PeerId | None = None) -> GetDone:
        """What is said about a topic; by one author, if the kind is owned."""
        done = await self._do(lambda op: Get(op, kind, topic, owner))
        if not isinstance(done, GetDone):
            raise TypeError(f"a get ends with GetDone, not {done}")
        return done

    async def _do(self, make: Callable[[int], Publish | Get]) -> PutDone | GetDone:
        async with self._room:
            self._last_op += 1
            op = self._last_op
            into, done = trio.open_memory_channel[PutDone | GetDone](1)
            self._done[op] = into
            self._move()
            try:
                self._tell(make(op))
                return await done.receive()
            finally:
                del self._done[op]

    # --- what the mesh says ---

    def met(self, peer: PeerId) -> None:
        """A peer is connected."""
        self._tell(Met(peer))

    def note_reach(self, *, is_reachable: bool) -> None:
        """Whether others can connect to this node by themselves; until that is said, and else, it is a client.

        Peers were met before that was known, and took it for a client: they are greeted anew.
        """
        began, self._is_reachable = is_reachable and not self._is_reachable, is_reachable
        self._move()
        if began:
            for peer in list(self._mesh.connected)[:MAX_GREETED]:
                self.met(peer)

    async def run(self) -> None:
        """Keep its time, for ever."""
        self._move()
        look_at = trio.current_time() + CLOCK_S
        while True:
            with trio.move_on_at(min(self._wake_at - self._ahead_s, look_at)):
                await self._retimed.wait()
            if trio.current_time() >= look_at:
                look_at = trio.current_time() + CLOCK_S
                self._ahead_s = self._wall_clock() - trio.current_time()
                self._move()
            if self.now() >= self._wake_at:
                self._wake_at = math.inf
                self._tell(Tick())

    def _move(self) -> None:
        self._tell(Here(self._mesh.addresses(), is_server=self._is_reachable))

    def now(self) -> float:
        """Unix seconds, as the table counts them."""
        return trio.current_time() + self._ahead_s

    def _tell(self, event: Event) -> None:
        for output in self.core.handle(event, self.now()):
            match output:
                case Ask():
                    self._domain.start_soon("asking in the DHT", self._ask, output, policy=Policy.DROP)
                case PutDone(op) | GetDone(op):
                    waiting = self._done.get(op)
                    if waiting is not None:
                        with suppress(trio.WouldBlock, trio.BrokenResourceError):
                            waiting.send_nowait(output)
                case Wake(at):
                    is_sooner = at < self._wake_at
                    self._wake_at = at
                    if is_sooner:
                        self._retimed.set()

    async def _ask(self, ask: Ask) -> None:
        peer = ask.contact.peer
        event: Answered | Failed = Failed(ask.query)
        with trio.move_on_after(ASK_S):
            is_there = self._mesh.is_connected(peer) or await self._mesh.reach_for_dht(peer, ask.contact.addresses)
            if is_there:
                try:
                    event = Answered(ask.query, await self._question(peer, ask.request))
                except ShoalError as error:
                    log.debug("asking %s in the DHT failed: %s", peer, error)
            elif is_there is None:
                event = Failed(ask.query, was_tried=False)
        self._tell(event)

    async def _question(self, peer: PeerId, request: FindRequest | StoreRequest) -> FindAnswer | StoreAnswer:
        stub = client(DhtService, self._mesh.at(peer), timeout_s=ASK_S)
        return await (stub.find(request) if isinstance(request, FindRequest) else stub.store(request))

    # --- what others ask ---

    def service(self) -> DhtService:
        """What serves them."""
        return _DhtCalls(self)

    def find_for(self, caller: PeerId, request: FindRequest) -> FindAnswer:
        """Answer a peer."""
        return self.core.serve_find(caller, request, self.now())

    def store_for(self, caller: PeerId, request: StoreRequest) -> StoreAnswer:
        """Answer a peer."""
        return self.core.serve_store(caller, self._mesh.group(caller), request, self.now())


class _DhtCalls(DhtService):
    def __init__(self, table: Table) -> None:
        self._table = table

    async def find(self, request: FindRequest) -> FindAnswer:
        try:
            return self._table.find_for(current_call().peer, request)
        except ProtocolError as error:
            raise RemoteError(Status.INVALID_ARGUMENT, str(error)) from error

    async def store(self, request: StoreRequest) -> StoreAnswer:
        try:
            return self._table.store_for(current_call().peer, request)
        except ProtocolError as error:
            raise RemoteError(Status.INVALID_ARGUMENT, str(error)) from error
