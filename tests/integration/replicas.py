"""Replicas of one swarm on real hosts in one process: what the tests of them are made of."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from shoal.crdt.meeting import BUCKET_BYTES, Differing
from shoal.crdt.presence import PresenceTable, TopicRule
from shoal.crdt.sync import SwarmDocs, Version
from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.supervise import Domain, Policy, Supervisor
from shoal.node.swarm.replica import Replica
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import GossipPush, PresenceSummary, SwarmService, SyncAnswer, SyncRequest, plain_version
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import Empty, current_call
from shoal.protocol.signing import Signed, Signer

SWARM = SwarmId.of_manifest(b"a run")
GENEROUS_S = 30.0
TOPICS = {
    "facts": TopicRule(max_bytes=4096, per_s=100, burst=100),
    "addresses": TopicRule(max_bytes=8192, per_s=1, burst=8),
    "vote": TopicRule(max_bytes=1024, keep=4, per_s=10, burst=20),
}


def holds_nothing(request: PresenceSummary) -> Differing:
    """What somebody answers who wants to be told everything."""
    num_buckets = len(request.buckets) // BUCKET_BYTES
    return Differing(b"\xff" * -(-num_buckets // 8), b"")


class Calls(SwarmService):
    """What peers call; NOT_FOUND once the node has left."""

    def __init__(self) -> None:
        self.replica: Replica | None = None

    def _member(self) -> Replica:
        if self.replica is None:
            raise RemoteError(Status.NOT_FOUND, "this node is not in the swarm")
        return self.replica

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        return await self._member().serve_sync(current_call().peer, request)

    async def compare(self, request: PresenceSummary) -> Differing:
        return self._member().serve_compare(request)

    async def gossip(self, request: GossipPush) -> Empty:
        await self._member().serve_gossip(current_call().peer, request)
        return Empty()


class Listener(SwarmService):
    """Takes whatever it is told, and says nothing."""

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        return SyncAnswer((), plain_version(Version()))

    async def compare(self, request: PresenceSummary) -> Differing:
        return holds_nothing(request)

    async def gossip(self, request: GossipPush) -> Empty:
        return Empty()


@dataclass
class Node:
    """One node in the swarm, and what it heard."""

    signer: Signer
    host: Host
    replica: Replica
    storage: Storage
    calls: Calls
    heard: list[tuple[PeerId, str, dict[str, Any], bytes]] = field(default_factory=list)
    gone: list[PeerId] = field(default_factory=list)
    domain: Domain = field(kw_only=True)

    @property
    def me(self) -> PeerId:
        return self.signer.peer_id

    async def until(self, what: Callable[[], bool]) -> None:
        while not what():
            with trio.move_on_after(0.2):
                await self.replica.changed.wait()

    async def knows(self, *others: Node) -> None:
        """Until these are its neighbours and live."""
        everybody = {other.me for other in others}
        await self.until(lambda: everybody <= self.replica.neighbours and everybody <= self.replica.live.keys())


def signer_of(number: int) -> Signer:
    return Signer(bytes([number]) * 32)


@asynccontextmanager
async def a_host(
    number: int, calls: SwarmService | None = None, listen: str = "/ip4/127.0.0.1/tcp/0"
) -> AsyncIterator[Host]:
    router = Router(calls) if calls is not None else Router()
    async with open_host(
        secret=bytes([number]) * 32, listen=[listen], bootstrap=[], mdns=False, router=router, lanes=False
    ) as host:
        yield host


@asynccontextmanager
async def a_node(
    number: int,
    *,
    folder: Path | None = None,
    stored: list[Signed] | None = None,
    is_new: bool | None = None,
    started_at: int = 1_000_000,
    listen: str = "/ip4/127.0.0.1/tcp/0",
) -> AsyncIterator[Node]:
    """A node that is in the swarm; nobody has ops of its own if ``is_new``, as when none were stored."""
    signer, calls = signer_of(number), Calls()
    with tempfile.TemporaryDirectory() as temporary:
        async with a_host(number, calls, listen) as host, Supervisor().open("node") as outer:
            domain = outer.inside("swarm", str(SWARM))
            with Storage((folder or Path(temporary)) / "node.sqlite") as storage:
                storage.add_swarm(StoredSwarm(swarm=SWARM, manifest=b"a run", role="learner", joined_at=1.0))
                storage.append_ops(SWARM, stored or [])
                docs = SwarmDocs(SWARM, signer.peer_id, storage.load_ops(SWARM), storage.load_forks(SWARM))
                table = PresenceTable(SWARM, signer.peer_id, started_at, TOPICS)
                new = signer.peer_id not in docs.seqs() if is_new is None else is_new
                replica = Replica(SWARM, signer, docs, table, storage, host, domain, is_new=new)
                node = Node(signer, host, replica, storage, calls, domain=domain)
                replica.on_heard = lambda *news: node.heard.append(news)  # type: ignore[arg-type]
                replica.on_gone = node.gone.append
                calls.replica = replica
                replica.begin()
                domain.start_soon("following the host", _follow_host, node, policy=Policy.END)
                try:
                    yield node
                finally:
                    domain.cancel()
                    with trio.CancelScope(shield=True):
                        await domain.wait_gone()
                    replica.end()


async def _follow_host(node: Node) -> None:
    async for event in node.host.events:
        match event:
            case PeerUp(peer):
                node.domain.start_soon("catching up", node.replica.peer_up, peer, policy=Policy.DROP)
            case PeerDown(peer):
                node.replica.peer_down(peer)


@asynccontextmanager
async def together(*contexts: AbstractAsyncContextManager[Any]) -> AsyncIterator[list[Any]]:
    """Nodes and hosts, of which all stop talking before the first of them closes."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(context) for context in contexts]
        try:
            yield opened
        finally:
            for each in opened:
                if isinstance(each, Node):
                    each.domain.cancel()
