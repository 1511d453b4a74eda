"""The swarms that this node is in: created, joined, left, taken up again after a restart.

Also the services that peers call: content, documents and presence.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from shoal.crdt.presence import PresenceTable
from shoal.crdt.sync import SwarmDocs
from shoal.node.api.schemas import CreateSwarm
from shoal.node.config import ProfilePaths
from shoal.node.mesh.host import Host, HostEvent, PeerDown, PeerUp
from shoal.node.signals import Signal
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.learner import Run
from shoal.node.swarm.replica import Replica
from shoal.node.swarm.workers import can_train, require_training
from shoal.node.wire.contracts import (
    OpsPush,
    PresencePush,
    SwarmService,
    SyncAnswer,
    SyncRequest,
)
from shoal.protocol.errors import NoPeersError, RemoteError, ShoalError, Status, UsageError, unwrap
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.services import Empty, Service, current_call
from shoal.protocol.signing import Signer
from shoal.training.facts import Facts
from shoal.training.manifest import Manifest, Role, open_manifest, sign_manifest
from shoal.training.requirements import check_here
from shoal.training.ticket import Ticket

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

PROVIDE_INTERVAL_S: Final = 60.0
PROVIDE_RETRY_S: Final = 5.0
PROVIDE_PAUSE_S: Final = 1.0
LOOKUPS: Final = 3
TICKET_ADDRESSES: Final = 8


@dataclass(slots=True)
class Membership:
    """One swarm that this node is in."""

    manifest: Manifest
    run: Run
    replica: Replica
    scope: trio.CancelScope
    done: trio.Event


class Swarms:
    """All of them."""

    def __init__(
        self,
        *,
        signer: Signer,
        host: Host,
        storage: Storage,
        content: ContentStore,
        paths: ProfilePaths,
        nursery: trio.Nursery,
    ) -> None:
        self.joined: dict[SwarmId, Membership] = {}
        self.changed = Signal()
        self._peer_came = Signal()
        self._signer = signer
        self._host = host
        self._storage = storage
        self._content = content
        self._paths = paths
        self._nursery = nursery

    def get(self, swarm: SwarmId) -> Membership:
        """One of them.

        Raises:
            UsageError: if this node is not in it.
        """
        membership = self.joined.get(swarm)
        if membership is None:
            raise UsageError(f"this node is not in the swarm {swarm}; `shoal swarm ls` shows those it is in")
        return membership

    def ticket(self, swarm: SwarmId) -> str:
        """A ticket for a swarm, with this node's and some other members' addresses."""
        addresses = [*self._host.addresses()]
        for facts in self.get(swarm).replica.live.values():
            addresses += facts.addresses
        return str(Ticket(swarm, tuple(dict.fromkeys(addresses))[:TICKET_ADDRESSES]))

    # What a person does.

    async def create(self, request: CreateSwarm) -> SwarmId:
        """Start a run and take part in it.

        Raises:
            UsageError: if the task, the algorithm or a setting is unknown or out of range.
        """
        role = self._role(request.role)
        target_return, requires = await self._check_task(request.task, request.algorithm)
        manifest = Manifest(
            owner=self._signer.peer_id,
            task=request.task,
            algorithm=request.algorithm,
            hyperparameters=request.hyperparameters,
            seed=request.seed,
            mode=request.mode,
            batch_size=request.batch_size,
            min_learners=request.min_learners,
            target_return=target_return if request.target_return is None else request.target_return,
            eval_episodes=request.eval_episodes,
            eval_interval=request.eval_interval,
            max_env_steps=request.max_env_steps,
            created_at=int(time.time()),
            requires=requires,
        )
        swarm, data = sign_manifest(manifest, self._signer)
        await self._enter(swarm, data, role, addresses=())
        return swarm

    async def join(self, ticket: Ticket, role_name: str) -> tuple[SwarmId, Role]:
        """Take part in a run.

        Raises:
            NoPeersError: if no member can be reached.
            UsageError: if this node cannot take part in this run.
        """
        role = self._role(role_name)
        known = self.joined.get(ticket.swarm)
        if known is not None:
            return ticket.swarm, known.run.role
        held = await trio.to_thread.run_sync(self._storage.list_swarms)
        stored = next((entry for entry in held if entry.swarm == ticket.swarm), None)
        peers = await self._reach(ticket, must=stored is None)
        data = stored.manifest if stored is not None else await self._fetch_manifest(ticket.swarm, peers)
        await self._enter(ticket.swarm, data, role, addresses=ticket.addresses)
        return ticket.swarm, role

    async def leave(self, swarm: SwarmId) -> None:
        """Say goodbye to the members and forget the run; what is on disk stays.

        Raises:
            UsageError: if this node is not in it.
        """
        membership = self.get(swarm)
        await membership.replica.write(member={"role": str(membership.run.role), "left": True})
        await trio.sleep(0.2)  # for the goodbye to go out; who misses it, hears it by sync from the others
        await trio.to_thread.run_sync(self._storage.set_left, swarm)
        membership.scope.cancel()
        await membership.done.wait()

    async def take_up(self) -> None:
        """Go on with the runs that this node was in when it stopped."""
        for stored in await trio.to_thread.run_sync(self._storage.list_swarms):
            if stored.has_left:
                continue
            try:
                await self._enter(stored.swarm, stored.manifest, Role(stored.role), stored.addresses, wait=False)
            except ShoalError:
                log.exception("swarm %s cannot be taken up again", stored.swarm)
                continue
            self._nursery.start_soon(self._reach_quietly, Ticket(stored.swarm, stored.addresses))

    # Entering.

    def _role(self, name: str) -> Role:
        if name == "auto":
            return Role.LEARNER if can_train() else Role.STORAGE
        try:
            role = Role(name)
        except ValueError as error:
            raise UsageError(f"there is no role {name[:40]!r}; take auto, {', '.join(Role)}") from error
        if role is Role.LEARNER:
            require_training()
        return role

    async def _check_task(self, task: str, algorithm: str) -> tuple[float | None, dict[str, int]]:
        """Whether both are installed here; gives the task's own target, and what members of a run must have."""
        require_training()
        result = await trio.run_process(
            [sys.executable, "-m", "shoal.training.tasks", task, algorithm],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        try:
            answer = json.loads(result.stdout)
        except ValueError as error:
            log.warning("checking %s failed: %s", task, result.stderr.decode(errors="replace")[-2000:])
            raise ShoalError(f"the task {task!r} could not be looked up; the node's log says why") from error
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer["target_return"], answer["requires"]

    async def _enter(
        self, swarm: SwarmId, data: bytes, role: Role, addresses: tuple[str, ...], *, wait: bool = True
    ) -> None:
        manifest = open_manifest(swarm, data)
        check_here(manifest, role)
        stored = await trio.to_thread.run_sync(self._storage.load_ops, swarm)
        me = self._signer.peer_id
        facts = Facts(role=role)
        replica = Replica(
            swarm,
            self._signer,
            SwarmDocs(swarm, me, stored),
            PresenceTable(swarm, me, started_at=int(time.time() * 1000)),
            self._storage,
            self._host,
            facts,
        )
        run = Run(manifest, swarm, me, role, replica, self._content, self._paths.swarm(swarm))
        membership = Membership(manifest, run, replica, trio.CancelScope(), trio.Event())
        if wait:
            await self._nursery.start(self._live, membership, data, addresses)
        else:
            self._nursery.start_soon(self._live, membership, data, addresses)

    async def _live(
        self,
        membership: Membership,
        data: bytes,
        addresses: tuple[str, ...],
        task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """One swarm from entering to leaving. A run that this node cannot take part in counts as left."""
        run, replica = membership.run, membership.replica
        started = False
        entry = StoredSwarm(
            swarm=run.swarm, manifest=data, role=str(run.role), joined_at=time.time(), addresses=addresses
        )
        await trio.to_thread.run_sync(self._storage.add_swarm, entry)
        try:
            with membership.scope:
                async with trio.open_nursery() as nursery:
                    self.joined[run.swarm] = membership
                    await nursery.start(replica.run)
                    for peer in self._host.connected:
                        nursery.start_soon(replica.peer_up, peer)
                    await nursery.start(run.run)
                    await self._content.put(data, keep=True, is_plain=True)
                    register = {"role": str(run.role), "left": False}
                    if replica.documents().get(self._signer.peer_id, {}).get("member") != register:
                        await replica.write(member=register)
                    nursery.start_soon(self._provide, run.swarm)
                    nursery.start_soon(self._forward_changes, replica)
                    started = True
                    task_status.started()
        except BaseExceptionGroup as group:
            if started:
                raise
            await trio.to_thread.run_sync(self._storage.set_left, run.swarm)
            raise unwrap(group) from None
        finally:
            self.joined.pop(run.swarm, None)
            self.changed.set()
            membership.done.set()

    async def _forward_changes(self, replica: Replica) -> None:
        while True:
            self.changed.set()
            await replica.changed.wait()

    async def _provide(self, swarm: SwarmId) -> None:
        """Be found in the DHT by those whose ticket's addresses are all gone."""
        while True:
            try:
                provided = bool(self._host.connected) and await self._host.provide(swarm)
            except Exception as error:
                log.info("announcing %s in the DHT failed: %s", swarm, error)
                provided = False
            with trio.move_on_after(PROVIDE_INTERVAL_S if provided else PROVIDE_RETRY_S):
                await self._peer_came.wait()
                await trio.sleep(PROVIDE_PAUSE_S)  # several come at once

    # Reaching members.

    async def _reach(self, ticket: Ticket, *, must: bool) -> list[PeerId]:
        """Connect to members: those that the ticket names, or else those that the DHT knows."""
        by_peer: dict[str, list[str]] = {}
        for address in ticket.addresses:
            by_peer.setdefault(address.rpartition("/p2p/")[2], []).append(address)
        reached = await self._connect_any(list(by_peer.values()))
        for _ in range(LOOKUPS):
            if reached or not self._host.connected:
                break
            reached = await self._connect_any([list(a) for a in await self._host.find_providers(ticket.swarm)])
            if not reached:
                await trio.sleep(PROVIDE_PAUSE_S)
        if not reached and must:
            raise NoPeersError(
                f"no member of {ticket.swarm} can be reached: tried {', '.join(ticket.addresses) or 'no addresses'}; "
                "ask for a fresh ticket, or start this node with --bootstrap"
            )
        return reached

    async def _connect_any(self, groups: list[list[str]]) -> list[PeerId]:
        """Dial all; returns those that answered by the time the first did."""
        reached: list[PeerId] = []
        async with trio.open_nursery() as nursery:

            async def dial(addresses: list[str]) -> None:
                try:
                    peer = await self._host.connect(addresses)
                except (NoPeersError, ValueError) as error:
                    log.info("%s", error)
                    return
                if peer != self._signer.peer_id:
                    reached.append(peer)
                    nursery.cancel_scope.cancel()

            for addresses in groups:
                nursery.start_soon(dial, addresses)
        return reached

    async def _reach_quietly(self, ticket: Ticket) -> None:
        await self._reach(ticket, must=False)

    async def _fetch_manifest(self, swarm: SwarmId, peers: list[PeerId]) -> bytes:
        try:
            return await self._content.get(swarm, peers, keep=False, timeout_s=10, is_plain=True)
        except UnavailableError as error:
            raise NoPeersError(f"the members that answer do not give the manifest of {swarm}: {error}") from error

    # Services.

    def services(self) -> tuple[Service, ...]:
        """What peers may call."""
        return self._content, _SwarmCalls(self)

    def handle(self, event: HostEvent) -> None:
        """A peer came or went."""
        for membership in list(self.joined.values()):
            match event:
                case PeerUp(peer):
                    self._nursery.start_soon(membership.replica.peer_up, peer)
                case PeerDown(peer):
                    membership.replica.peer_down(peer)
        if isinstance(event, PeerUp):
            self._peer_came.set()
        self.changed.set()

    def replica(self, swarm: SwarmId) -> Replica:
        """The state of a swarm that this node is in.

        Raises:
            RemoteError: NOT_FOUND if it is in no such swarm.
        """
        membership = self.joined.get(swarm)
        if membership is None:
            raise RemoteError(Status.NOT_FOUND, f"this node is not in {swarm}")
        return membership.replica


class _SwarmCalls(SwarmService):
    """The calls of peers, each for the swarm that it names."""

    def __init__(self, swarms: Swarms) -> None:
        self._swarms = swarms

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        return await self._swarms.replica(request.swarm).serve_sync(current_call().peer, request)

    async def push_ops(self, request: OpsPush) -> Empty:
        await self._swarms.replica(request.swarm).serve_ops(current_call().peer, request)
        return Empty()

    async def push_presence(self, request: PresencePush) -> Empty:
        await self._swarms.replica(request.swarm).serve_presence(current_call().peer, request)
        return Empty()
