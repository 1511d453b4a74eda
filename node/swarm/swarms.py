"""The swarms that this node is in: created, joined, left, taken up again after a restart.

Each swarm is a failure domain. One that ends by a failure, or that cannot be taken up again, is shown as failed with
its reason; the node and its other swarms go on. It stays joined, and is taken up again at the next start, or when a
person joins it anew. Only leaving is for good.

Also the services that peers call: content, documents and presence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

import trio

from shoal.crdt.meeting import Differing
from shoal.crdt.presence import PresenceTable
from shoal.crdt.sync import SwarmDocs
from shoal.node.api.requests import CreateSwarm
from shoal.node.mesh.addresses import usefulness
from shoal.node.mesh.host import Host, HostEvent, PeerDown, PeerUp
from shoal.node.profile import ProfilePaths
from shoal.node.signals import Signal
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.store.remembered import Remembered
from shoal.node.supervise import Domain, Policy, open_plain_nursery, reason_of
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.introducing import fetch_manifest
from shoal.node.swarm.journal import load_docs
from shoal.node.swarm.lookup import LookedUp, look_up
from shoal.node.swarm.members import by_peer
from shoal.node.swarm.memory import memory_limit
from shoal.node.swarm.reducing import Reductions
from shoal.node.swarm.replica import Replica
from shoal.node.swarm.runner import Runner, part_fact
from shoal.node.swarm.workers import MissingTrainingError, can_act, can_train, require_training
from shoal.node.wire.contracts import (
    ConsultAnswer,
    ConsultRequest,
    GossipPush,
    PresenceSummary,
    StepPart,
    SwarmService,
    SyncAnswer,
    SyncRequest,
)
from shoal.protocol.codec import from_plain, to_plain
from shoal.protocol.errors import Fault, NoPeersError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import BLOCK_BYTES
from shoal.protocol.services import Empty, Service, current_call
from shoal.protocol.signing import Signer
from shoal.training.manifest import LOOP_SCHEME, RECIPE_SCHEME, Manifest, Mode, Role, open_manifest, sign_manifest
from shoal.training.requirements import check_here, loop_requirements
from shoal.training.roles import Machine, first_role
from shoal.training.statements import TOPIC_RULES, Phase
from shoal.training.ticket import Ticket, in_turns

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

AUTO: Final = "auto"
"""In place of a role: whatever suits this node."""
LOOKUPS: Final = 3
LOOKUP_PAUSE_S: Final = 1.0
DIAL_ALL_S: Final = 5.0
"""In which who answers is asked beside the first."""


@dataclass(slots=True)
class Joined:
    """One swarm that this node is in.

    Attributes:
        home: the failure domain in which it is entered, and entered again if the machine lacked something.
        domain: the failure domain of its tasks; none while it does not run.
        failure: why it does not run, if a failure keeps it from it.
    """

    manifest: Manifest
    run: Runner
    replica: Replica
    home: Domain
    domain: Domain | None = None
    failure: str | None = None

    @property
    def phase(self) -> Phase:
        """What this node does in it now."""
        return self.run.core.progress.phase if self.failure is None else Phase.FAILED

    @property
    def error(self) -> str | None:
        """What is wrong, if something is."""
        return self.failure or self.replica.problem or self.run.weights.problem or self.run.error


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
        domain: Domain,
        remembered: Remembered,
    ) -> None:
        self.joined: dict[SwarmId, Joined] = {}
        self._created: set[SwarmId] = set()  # in this life of the node, which alone can have written in them so far
        self.changed = Signal()
        self._signer = signer
        self._host = host
        self._storage = storage
        self._content = content
        self._paths = paths
        self._domain = domain
        self._remembered = remembered
        self.reductions = Reductions(host.links, signer)
        self._entering: WeakValueDictionary[SwarmId, trio.Lock] = WeakValueDictionary()
        self._is_taken_up = False

    def get(self, swarm: SwarmId) -> Joined:
        """One of them.

        Raises:
            UsageError: if this node is not in it.
        """
        membership = self.joined.get(swarm)
        if membership is None:
            raise UsageError(f"this node is not in the swarm {swarm}; `shoal swarm ls` shows those it is in")
        return membership

    def ticket(self, swarm: SwarmId) -> str:
        """A ticket for a swarm, with addresses of this node and of other members, the most useful first."""
        replica = self.get(swarm).replica
        known = by_peer(replica.members_addresses()).values()
        return str(Ticket.of(swarm, in_turns([self._host.addresses(), *known], usefulness)))

    # What a person does.

    async def create(self, request: CreateSwarm) -> SwarmId:
        """Start a run and take part in it.

        Raises:
            UsageError: if the task, the algorithm or a setting is unknown or out of range.
        """
        is_loop = request.task.partition(":")[0] == LOOP_SCHEME
        role, is_chosen = _role(request.role, request.task, request.mode)
        asked = Manifest(
            owner=self._signer.peer_id,
            task=request.task,
            algorithm=request.algorithm,
            hyperparameters=request.hyperparameters,
            env_arguments=request.env_arguments,
            seed=request.seed,
            mode=request.mode,
            aggregator=request.aggregator,
            codec=request.codec,
            batch_per_learner=request.per_learner,
            batch_size=request.batch_size,
            max_staleness=request.max_staleness,
            foreign_ratio=request.foreign_ratio,
            check_rate=request.check_rate,
            min_learners=request.min_learners,
            target_return=request.target_return,
            eval_episodes=request.eval_episodes,
            eval_interval=request.eval_interval,
            evaluators=request.evaluators,
            max_env_steps=request.most_env_steps,
            name=request.name or "",
            created_at=int(time.time()),
        )
        if is_loop:
            manifest = replace(asked, target_return=None, requires=loop_requirements())
        else:
            found = await self._check_task(request)
            asked = replace(asked, target_return=found.target_return, requires=found.requires)
            given = request.model_fields_set | ({"batch_per_learner"} if request.batch_size is not None else set())
            wished = {name: value for name, value in found.defaults.items() if name not in given}
            manifest = from_plain(Manifest, to_plain(asked) | wished)
        if request.target_return is not None:
            manifest = replace(manifest, target_return=request.target_return)
        held = await trio.to_thread.run_sync(self._storage.list_swarms)
        known = self.joined.keys() | {entry.swarm for entry in held}
        swarm, data = sign_manifest(manifest, self._signer)
        while swarm in known or swarm in self._entering:  # another run like this one was started in the same second
            manifest = replace(manifest, created_at=manifest.created_at + 1)
            swarm, data = sign_manifest(manifest, self._signer)
        self._created.add(swarm)
        async with self._alone_in(swarm):
            await trio.to_thread.run_sync(self._storage.put_fact, part_fact(swarm), request.part.encode())
            await self._enter(self._entry(swarm, data, AUTO if is_chosen else role), is_new=True)
        return swarm

    async def join(self, ticket: Ticket, role_name: str, part: str = "") -> tuple[SwarmId, Role]:
        """Take part in a run; in one that has failed on this node, again.

        Raises:
            NoPeersError: if no member can be reached.
            UsageError: if this node cannot take part in this run.
        """
        _named(role_name)  # whatever it is a run of, there must be such a role
        async with self._alone_in(ticket.swarm):
            return await self._join(ticket, role_name, part)

    async def _join(self, ticket: Ticket, role_name: str, part: str) -> tuple[SwarmId, Role]:
        known = self.joined.get(ticket.swarm)
        if known is not None and known.failure is None:
            known.replica.look_for(ticket.addresses)
            return ticket.swarm, known.run.role
        held = await trio.to_thread.run_sync(self._storage.list_swarms)
        stored = next((entry for entry in held if entry.swarm == ticket.swarm), None)
        peers = await self._reach(ticket, must=stored is None)
        data = stored.manifest if stored is not None else await self._fetch_manifest(ticket, peers)
        manifest = open_manifest(ticket.swarm, data)
        role, is_chosen = _role(role_name, manifest.task, manifest.mode)
        if known is not None:
            known.home.cancel()
            await known.home.wait_gone()
        before = () if stored is None else stored.addresses
        addresses = tuple(dict.fromkeys((*ticket.addresses, *before)))
        entry = self._entry(ticket.swarm, data, AUTO if is_chosen else role, addresses)
        await trio.to_thread.run_sync(self._storage.put_fact, part_fact(ticket.swarm), part.encode())
        await self._enter(entry, is_new=stored is None or stored.has_left)
        return ticket.swarm, role

    async def leave(self, swarm: SwarmId) -> None:
        """Say goodbye to the members and forget the run; what is on disk stays.

        Raises:
            UsageError: if this node is not in it.
        """
        async with self._alone_in(swarm):
            await self._leave(swarm)

    async def _leave(self, swarm: SwarmId) -> None:
        membership = self.get(swarm)
        if membership.domain is not None:
            try:
                await membership.replica.write(member={"role": str(membership.run.role), "left": True})
                await membership.replica.write_held()
            except ShoalError as error:
                log.warning("%s is left without a goodbye: %s", swarm, error)
            await trio.sleep(0.2)  # for the goodbye to go out; who misses it, hears it by sync from the others
        await trio.to_thread.run_sync(self._storage.set_left, swarm)
        membership.home.cancel()
        await membership.home.wait_gone()
        self.joined.pop(swarm, None)
        self.changed.set()

    async def take_up(self) -> None:
        """Go on with the runs that this node was in when it stopped."""
        for stored in await trio.to_thread.run_sync(self._storage.list_swarms):
            if stored.has_left:
                continue
            try:
                manifest = open_manifest(stored.swarm, stored.manifest)
            except ShoalError:
                log.exception("swarm %s cannot be taken up again", stored.swarm)
                continue
            home = self._domain.inside("swarm", str(stored.swarm))
            home.start_soon("living", self._take_up, home, stored, manifest, policy=Policy.RESTART)
        self._is_taken_up = True

    # Entering.

    @asynccontextmanager
    async def _alone_in(self, swarm: SwarmId) -> AsyncIterator[None]:
        """Only one at a time enters or leaves a swarm, so that no two replicas of one are run."""
        lock = self._entering.get(swarm)
        if lock is None:
            lock = self._entering[swarm] = trio.Lock()
        async with lock:
            yield

    async def _check_task(self, request: CreateSwarm) -> LookedUp:
        """Whether both are installed here, and what a run of them needs."""
        require_training()
        return await look_up(request.task, request.algorithm, request.env_arguments)

    @staticmethod
    def _entry(swarm: SwarmId, data: bytes, role: str, addresses: tuple[str, ...] = ()) -> StoredSwarm:
        return StoredSwarm(swarm=swarm, manifest=data, role=str(role), joined_at=time.time(), addresses=addresses)

    async def _enter(self, entry: StoredSwarm, *, is_new: bool) -> None:
        """Be in a swarm from now on; returns when all of it runs.

        Raises:
            ShoalError: if it cannot be entered. A new one is then as if it had been left; another one has failed.
        """
        manifest = open_manifest(entry.swarm, entry.manifest)
        home = self._domain.inside("swarm", str(entry.swarm))
        await trio.to_thread.run_sync(self._storage.add_swarm, entry)
        try:
            await home.start("living", self._live, home, entry, manifest, policy=Policy.RESTART)
        except Exception:
            if is_new:
                self.joined.pop(entry.swarm, None)
                self.changed.set()
                await trio.to_thread.run_sync(self._storage.set_left, entry.swarm)
            raise

    async def _take_up(self, home: Domain, entry: StoredSwarm, manifest: Manifest) -> None:
        """Enter a swarm again after the node was restarted.

        Raises:
            ResourceError: if this machine lacks something for it now, so that it is to be tried again.
        """
        try:
            await self._live(home, entry, manifest)
        except ShoalError as error:
            if error.fault is Fault.RESOURCE:
                raise
            log.warning("swarm %s is not taken up: %s", entry.swarm, error)

    async def _live(
        self,
        home: Domain,
        entry: StoredSwarm,
        manifest: Manifest,
        task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """One swarm from entering it until it is left, or until a failure ends it."""
        has_begun = False
        # Shown from now on; nothing may be written before what is stored has been read.
        membership = self.joined[entry.swarm] = self._membership(home, entry, manifest, None, home, 0)
        try:
            check_here(manifest, _meant(entry.role, manifest.task, manifest.mode)[0])
            docs = await load_docs(entry.swarm, self._signer.peer_id, self._storage)
            incarnation = await trio.to_thread.run_sync(self._remembered.next_incarnation)
            async with home.supervisor.open("swarm", str(entry.swarm)) as domain:
                membership = self._membership(home, entry, manifest, docs, domain, incarnation)
                membership.domain = domain
                self.joined[entry.swarm] = membership
                await self._begin(membership, domain, entry)
                has_begun = True
                task_status.started()
            if domain.failure is not None:
                if not has_begun:
                    raise ShoalError(str(domain.failure))  # noqa: TRY301  the caller waits for this to begin
                membership.failure = f"{domain.failure}; restart the node, or join again, to go on"
        except Exception as error:
            membership.failure = reason_of(error)
            raise
        finally:
            membership.domain = None
            membership.replica.end()
            if membership.failure is None:
                self.joined.pop(entry.swarm, None)
            self.changed.set()

    def _membership(
        self,
        home: Domain,
        entry: StoredSwarm,
        manifest: Manifest,
        docs: SwarmDocs | None,
        domain: Domain,
        incarnation: int,
    ) -> Joined:
        swarm, me = entry.swarm, self._signer.peer_id
        role, is_chosen = _meant(entry.role, manifest.task, manifest.mode)
        docs = SwarmDocs(swarm, me) if docs is None else docs
        presence = PresenceTable(swarm, me, incarnation, TOPIC_RULES)
        replica = Replica(
            *(swarm, self._signer, docs, presence, self._storage, self._host, domain),
            known=entry.addresses,
            is_new=swarm in self._created,
            target_return=manifest.target_return,
        )

        def outdone(number: int) -> None:
            domain.start_soon("noting an incarnation", self._note_incarnation, number, policy=Policy.DROP)

        replica.on_outdone = outdone
        folder, loop_socket = self._paths.swarm(swarm), self._paths.loop_socket(swarm)
        run = Runner(
            *(manifest, swarm, me, role, replica, self._content, self._storage, self._host, self.reductions),
            *(folder, loop_socket, domain),
            is_new=swarm in self._created,
            is_chosen=is_chosen,
        )
        replica.changed = run.changed = self.changed
        return Joined(manifest, run, replica, home)

    async def _note_incarnation(self, number: int) -> None:
        await trio.to_thread.run_sync(self._remembered.note_incarnation, number)

    async def _begin(self, membership: Joined, domain: Domain, entry: StoredSwarm) -> None:
        run, replica = membership.run, membership.replica
        replica.begin()
        for peer in self._host.connected:
            self._catch_up(membership, peer)
        await domain.start("run", run.run, policy=Policy.RESTART)
        await self._content.pin(entry.manifest)
        register = {"role": str(run.role), "left": False}
        if replica.documents().get(self._signer.peer_id, {}).get("member") != register:
            await replica.write(member=register)
        domain.start_soon("providing", self._host.keep_provided, run.swarm, policy=Policy.RESTART)

    def _catch_up(self, membership: Joined, peer: PeerId) -> None:
        if membership.domain is not None:
            of_peer = membership.domain.inside("peer", f"{peer} in {membership.run.swarm}")
            of_peer.start_soon("catching up", membership.replica.peer_up, peer, policy=Policy.DROP)

    # Reaching members.

    async def _reach(self, ticket: Ticket, *, must: bool) -> list[PeerId]:
        """Connect to members: those that the ticket names, or else those that the DHT knows."""
        reached = await self._connect(_by_member(ticket))
        for _ in range(LOOKUPS):
            if reached or not self._host.connected:
                break
            reached = await self._connect(await self._known(ticket.swarm), heard=True)
            if not reached:
                await trio.sleep(LOOKUP_PAUSE_S)
        if not reached and must:
            raise NoPeersError(
                f"no member of {ticket.swarm} can be reached: tried {', '.join(ticket.addresses) or 'no addresses'}; "
                "ask for a fresh ticket, or start this node with --bootstrap"
            )
        return reached

    async def _known(self, swarm: SwarmId) -> list[list[str]]:
        """The addresses of each member that the DHT knows."""
        return [list(each) for each in await self._host.find_providers(swarm)]

    async def _connect(
        self, groups: list[list[str]], *, heard: bool = False, for_s: float | None = None
    ) -> list[PeerId]:
        """Dial all, as `Host.connect` does; returns those that answered by the time the first did, or in so long."""
        reached: list[PeerId] = []
        async with open_plain_nursery() as nursery:

            async def dial(addresses: list[str]) -> None:
                try:
                    peer = await self._host.connect(addresses, heard=heard)
                except (ShoalError, ValueError) as error:  # whatever a ticket or the DHT gives for an address
                    log.info("%s", error)
                    return
                if peer != self._signer.peer_id:
                    reached.append(peer)
                    if for_s is None:
                        nursery.cancel_scope.cancel()

            if for_s is not None:
                nursery.cancel_scope.deadline = trio.current_time() + for_s
            for addresses in groups:
                nursery.start_soon(dial, addresses)
        return reached

    async def _fetch_manifest(self, ticket: Ticket, peers: list[PeerId]) -> bytes:
        async def find_others() -> list[PeerId]:
            named = await self._connect(_by_member(ticket), for_s=DIAL_ALL_S)
            known: list[list[str]] = []
            with trio.move_on_after(DIAL_ALL_S):
                known = await self._known(ticket.swarm)
            return named + await self._connect(known, heard=True, for_s=DIAL_ALL_S)

        async def get(members: Sequence[PeerId], patience_s: float) -> bytes:
            found = self._content.get(
                ticket.swarm, members, patience_s=patience_s, max_bytes=BLOCK_BYTES, is_plain=True
            )
            return bytes(await found)

        return await fetch_manifest(ticket.swarm, peers, find_others, get)

    # Services.

    def services(self) -> tuple[Service, ...]:
        """What peers may call."""
        return self._content, self.reductions, _SwarmCalls(self)

    def handle(self, event: HostEvent) -> None:
        """A peer came or went."""
        for membership in list(self.joined.values()):
            if membership.domain is None:
                continue
            match event:
                case PeerUp(peer):
                    self._catch_up(membership, peer)
                case PeerDown(peer):
                    membership.domain.call("losing a peer", membership.replica.peer_down, peer)
        self.changed.set()

    def replica(self, swarm: SwarmId) -> Replica:
        """The state of a swarm that this node is in. Raises as `running`."""
        return self.running(swarm).replica

    def running(self, swarm: SwarmId) -> Joined:
        """A swarm that this node is in and that runs.

        Raises:
            RemoteError: NOT_FOUND if it is in no such swarm, or if that does not run; UNAVAILABLE if it is about to.
        """
        membership = self.joined.get(swarm)
        is_coming = not self._is_taken_up if membership is None else membership.failure is None
        if membership is None or membership.domain is None:
            if is_coming:  # who heard that it is not in the swarm would forget it
                raise RemoteError(Status.UNAVAILABLE, "this node has just begun; ask again")
            raise RemoteError(Status.NOT_FOUND, f"this node is not in {swarm}")
        return membership


class _SwarmCalls(SwarmService):
    """The calls of peers, each for the swarm that it names."""

    def __init__(self, swarms: Swarms) -> None:
        self._swarms = swarms

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        return await self._swarms.replica(request.swarm).serve_sync(current_call().peer, request)

    async def compare(self, request: PresenceSummary) -> Differing:
        return self._swarms.replica(request.swarm).serve_compare(request)

    async def gossip(self, request: GossipPush) -> Empty:
        await self._swarms.replica(request.swarm).serve_gossip(current_call().peer, request)
        return Empty()

    async def give(self, request: StepPart) -> Empty:
        self._swarms.running(request.swarm).run.giving.take(current_call().peer, request)
        return Empty()

    async def consult(self, request: ConsultRequest) -> ConsultAnswer:
        consulting, call = self._swarms.running(request.swarm).run.consulting, current_call()
        acts = await consulting.answer(call.peer, request.policy, bytes(request.takes), call.deadline)
        return ConsultAnswer(acts)


def _by_member(ticket: Ticket) -> list[list[str]]:
    """The addresses that a ticket names, of each member apart."""
    by_peer: dict[str, list[str]] = {}
    for address in ticket.addresses:
        by_peer.setdefault(address.rpartition("/p2p/")[2], []).append(address)
    return list(by_peer.values())


def _named(name: str) -> Role | None:
    """The role of a name; None: whatever suits this node."""
    if name == AUTO:
        return None
    try:
        return Role(name)
    except ValueError as error:
        raise UsageError(f"there is no role {name[:40]!r}; take auto, {', '.join(Role)}") from error


def _role(name: str, task: str, mode: Mode) -> tuple[Role, bool]:
    """As `_meant`, of a node that has what the role needs; a training loop of the user brings that with it.

    Raises:
        UsageError: if there is none of this name in such a run.
        ShoalError: if what it needs is not installed.
    """
    role, is_chosen = _meant(name, task, mode)
    if role in (Role.LEARNER, Role.EVALUATOR) and task.partition(":")[0] != LOOP_SCHEME:
        require_training()
    if role is Role.ACTOR and not can_act():
        raise MissingTrainingError(
            "this installation cannot act: install it with  pip install 'shoal[act]'  or take --role storage"
        )
    return role, is_chosen


def _meant(name: str, task: str, mode: Mode) -> tuple[Role, bool]:
    """The role that is meant, and whether it is this node's own choice, which it may change while the run goes on.

    Who plays in a recipe learns from it, too.

    Raises:
        UsageError: if there is none of this name in such a run.
    """
    role = _named(name)
    scheme = task.partition(":")[0]
    has_actors = mode is Mode.ROLLOUTS and scheme not in (LOOP_SCHEME, RECIPE_SCHEME)
    if role is None:
        if scheme == LOOP_SCHEME:
            return Role.LEARNER, False
        here = Machine(can_train(), can_act(), memory_limit())
        first = first_role(here, mode if has_actors else Mode.LOCAL)
        return first, has_actors and here.can_learn and here.can_act
    if role is Role.ACTOR and not has_actors:
        raise UsageError(
            "there are actors in mode rollouts alone, and not of recipes; take the role learner, evaluator or storage"
        )
    return role, False
