"""The composition root: one node from start to stop, and what its local API shows."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

import shoal
from shoal.dht.records import Kind, Model
from shoal.dht.registry import ModelName, check_name
from shoal.node.api.requests import (
    AnswerAsk,
    BenchDhtRequest,
    BenchReduceRequest,
    BenchRequest,
    CreateSwarm,
    GetModel,
    JoinSwarm,
    PingRequest,
    PublishModel,
)
from shoal.node.api.schemas import (
    ActsInfo,
    AskInfo,
    BenchDhtResult,
    BenchReduceResult,
    BenchResult,
    ConsultInfo,
    ContentInfo,
    CreatedSwarm,
    CurvePoint,
    DoctorInfo,
    Event,
    EvidenceInfo,
    FailureInfo,
    FamilyInfo,
    FetchInfo,
    JoinedSwarm,
    MemberInfo,
    MeshInfo,
    MeshLink,
    MeshNode,
    MethodInfo,
    MetricsInfo,
    ModelDetail,
    ModelInfo,
    NatInfo,
    NodeInfo,
    PeerInfo,
    PingResult,
    Scores,
    StateInfo,
    SwarmDetail,
    SwarmSummary,
    TriedInfo,
    UseInfo,
)
from shoal.node.api.server import serve_api
from shoal.node.budgets import give_memory_back, keep_few_heaps, raise_descriptors
from shoal.node.config import NodeConfig, check_peer_address
from shoal.node.doctor import examine
from shoal.node.identity import load_or_create_identity
from shoal.node.lock import hold_profile
from shoal.node.mesh.circuits import parse_circuit
from shoal.node.mesh.host import Connected, Host, open_host
from shoal.node.mesh.paths import PathKind
from shoal.node.metrics import MethodMetrics
from shoal.node.reach.reach import Reach, open_reach
from shoal.node.store.database import Storage
from shoal.node.store.remembered import Remembered
from shoal.node.supervise import Domain, FaultSeam, Policy, Supervisor, open_plain_nursery
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.holders import Holders
from shoal.node.swarm.models import Models
from shoal.node.swarm.names import Names
from shoal.node.swarm.shards import MAX_ACCUSED, REGISTER
from shoal.node.swarm.swarms import Joined, Swarms
from shoal.node.swarm.trees import Trees
from shoal.node.swarm.workers import can_train
from shoal.node.way_back import keep_way_back
from shoal.node.wire.bench import Bench, BenchServer
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import NodeService
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import NoPeersError, RemoteError, ShoalError, Status, UsageError, unwrap
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import Empty, client
from shoal.training.rollouts.intake import Tally
from shoal.training.statements import Facts, Phase
from shoal.training.ticket import Ticket

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

EVENT_INTERVAL_S: Final = 0.1
MAX_SHOWN_SCORES: Final = 1024
MAX_SHOWN: Final = 80
"""Characters of a word that others wrote."""
PING_TIMEOUT_S: Final = 10.0


def run(config: NodeConfig, *, on_ready: Callable[[NodeInfo], None], fault_seam: FaultSeam | None = None) -> None:
    """Run a node until SIGINT, SIGTERM or its API stops it.

    Args:
        config: how it is set up.
        on_ready: told once when the node listens and its API answers.
        fault_seam: lets a test make each task of the node fail.

    Raises:
        ShoalError: if it cannot start.
    """
    paths = config.paths
    paths.create()
    raise_descriptors()
    keep_few_heaps()
    with hold_profile(paths.lock, config.profile):
        try:
            trio.run(run_node, config, lambda node: on_ready(node.node()), fault_seam)
        except BaseExceptionGroup as group:
            error = unwrap(group)
            if isinstance(error, ShoalError):
                raise error from None
            raise


async def run_node(config: NodeConfig, on_ready: Callable[[Node], None], fault_seam: FaultSeam | None = None) -> None:
    """As `run`, in a trio loop that is there already and under a profile that the caller holds."""
    paths = config.paths
    identity = load_or_create_identity(paths.identity)
    storage = Storage(paths.database)
    remembered = Remembered(storage, config.wall_clock)
    router = Router()
    try:
        async with (
            Supervisor(fault_seam).open("node") as domain,
            open_host(
                secret=identity.secret,
                listen=config.listen,
                bootstrap=config.bootstrap,
                mdns=config.mdns,
                router=router,
                relay_limits=config.reach.relay_limits,
                max_peers=config.max_peers,
                budget_limits=replace(config.budgets, read_bytes_per_s=None) if config.serve_bench else config.budgets,
                domain=domain,
                kept_ports=remembered.ports(),
            ) as host,
            open_reach(host, router, config.reach) as reach,
        ):
            remembered.set_ports({address: port for address, port in host.ports.items() if address.endswith("/tcp/0")})
            content = ContentStore(storage, host)
            swarms = Swarms(
                signer=identity.signer,
                host=host,
                storage=storage,
                content=content,
                paths=paths,
                domain=domain,
                remembered=remembered,
            )
            for service in swarms.services():
                router.add(service)
            holders, names = Holders(host), Names(storage, host, identity.signer, config.wall_clock)
            trees = Trees(storage, host, content, holders)
            models = Models(trees, names, holders, content, storage, host.peer_id)
            for served in (trees, names):
                router.add(served)
            router.add(BenchServer(host.links, is_open=config.serve_bench))
            node = Node(config, host, reach, swarms, content, models, domain)
            domain.start_soon("stopping on signals", _stop_on_signal, node, policy=Policy.RESTART)
            domain.start_soon("keeping a way back", keep_way_back, host, remembered, policy=Policy.RESTART)
            domain.start_soon("following the host", _follow_host, host, swarms, policy=Policy.RESTART)
            await swarms.take_up()
            models.take_up()
            await domain.start("the local API", node.serve_api, policy=Policy.RESTART)
            log.info("node %s is ready; it listens on %s", host.peer_id, ", ".join(host.addresses()))
            gc.collect()
            gc.freeze()  # what is here by now stays; going through it again and again would hold up small calls
            give_memory_back()
            on_ready(node)
            await trio.sleep_forever()
    finally:
        storage.close()
        log.info("node %s has stopped", identity.signer.peer_id)


async def _stop_on_signal(node: Node) -> None:
    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                log.info("stopping on %s", signal.Signals(number).name)
                node.stop()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not cut the stop short
            signal.signal(number, signal.SIG_IGN)


async def _follow_host(host: Host, swarms: Swarms) -> None:
    async for event in host.events:
        log.info("%s", event)
        swarms.handle(event)


class Node:
    """What the local API sees; see `shoal.node.api.app.NodeView`."""

    def __init__(
        self,
        config: NodeConfig,
        host: Host,
        reach: Reach,
        swarms: Swarms,
        content: ContentStore,
        models: Models,
        domain: Domain,
    ) -> None:
        self.api_url = ""
        self._api_port = config.api_port
        self._config = config
        self._host = host
        self._reach = reach
        self._swarms = swarms
        self._content = content
        self._models = models
        self._domain = domain
        self._started = time.monotonic()

    def node(self) -> NodeInfo:
        """The node itself."""
        return NodeInfo(
            peer_id=self._host.peer_id,
            addresses=list(self._host.addresses()),
            profile=self._config.profile,
            pid=os.getpid(),
            version=shoal.__version__,
            uptime_s=round(time.monotonic() - self._started, 3),
            num_peers=len(self._host.connected),
            alone=not self._host.connected,
            swarms=list(self._swarms.joined),
            can_train=can_train(),
            api=self.api_url,
            listen=list(self._config.listen),
            use=self._use(),
        )

    def _use(self) -> UseInfo:
        upload, download = self._host.upload, self._host.download
        return UseInfo(
            disk_bytes=self._content.disk_bytes,
            max_disk_bytes=self._content.max_disk_bytes,
            upload_bytes=upload.num_bytes,
            max_upload_bytes_per_s=upload.per_s,
            refused_uploads=upload.num_refused,
            download_bytes=download.num_bytes,
            max_download_bytes_per_s=download.per_s,
        )

    def peers(self) -> list[PeerInfo]:
        """Whom it is connected to."""
        return [self._peer(peer, state) for peer, state in self._host.connected.items()]

    def _peer(self, peer: PeerId, state: Connected) -> PeerInfo:
        said = self._reach.introduction(peer)
        return PeerInfo(
            peer_id=peer,
            path=str(state.kind),
            address=state.address,
            rtt_ms=None if state.rtt_ms is None else round(state.rtt_ms, 3),
            connected_s=round(trio.current_time() - state.since, 3),
            direction="outbound" if state.outbound else "inbound",
            swarms=[swarm for swarm, joined in self._swarms.joined.items() if peer in joined.replica.neighbours],
            relayed_by=_relay_of(state),
            reachability="" if said is None else said.reachability,
            nat="" if said is None else said.udp,
            relays=said is not None and said.relays,
            tried=_tried(state),
        )

    def mesh(self) -> MeshInfo:
        """What it knows of the mesh: itself, its peers, and members of its swarms that it heard of."""
        me = self._host.peer_id
        nodes = {me: MeshNode(peer_id=me, is_self=True, addresses=list(self._host.addresses()))}
        for peer, state in self._host.connected.items():
            nodes[peer] = MeshNode(peer_id=peer, addresses=[state.address])
        for joined in self._swarms.joined.values():
            for peer in joined.replica.live:
                nodes.setdefault(peer, MeshNode(peer_id=peer, addresses=list(joined.replica.addresses(peer))))
        for peer, node in nodes.items():
            in_swarms = [s for s, joined in self._swarms.joined.items() if peer == me or peer in joined.replica.live]
            nodes[peer] = node.model_copy(update={"swarms": in_swarms})
        links = [
            MeshLink(
                a=me,
                b=peer,
                path=str(state.kind),
                rtt_ms=state.rtt_ms,
                relayed_by=_relay_of(state),
                tried=_tried(state),
            )
            for peer, state in self._host.connected.items()
        ]
        return MeshInfo(nodes=list(nodes.values()), links=links, nat=self.nat())

    def nat(self) -> NatInfo:
        """How it is reached, and how it knows."""
        report = self._reach.report()
        families = [
            FamilyInfo(
                family=name,
                reachability=str(each.reachability),
                udp=str(each.udp),
                tcp_mapping=str(each.tcp_mapping),
                public_addresses=[str(endpoint) for endpoint in each.public_addresses],
                evidence=list(each.evidence),
            )
            for name, each in (("IPv4", report.nat.ipv4), ("IPv6", report.nat.ipv6))
        ]
        mapped = report.mapping
        return NatInfo(
            reachability=str(report.nat.reachability),
            udp=str(report.nat.udp),
            families=families,
            addresses=list(self._host.addresses()),
            held_relays=report.held_relays,
            relaying=report.is_relaying,
            num_reservations=report.num_reservations,
            num_circuits=report.num_circuits,
            relayed_bytes=report.relayed_bytes,
            port_mapping=None
            if mapped is None
            else f"{mapped.external_ip} port {mapped.external_port} to port {mapped.internal_port} ({mapped.method})",
            port_mapping_attempts=[f"{attempt.method}: {attempt.outcome}" for attempt in report.map_attempts],
        )

    def doctor(self) -> DoctorInfo:
        """What stands between it and its peers, and what to do about it."""
        nat, peers = self.nat(), self.peers()
        return DoctorInfo(findings=examine(nat, peers, listens=self._config.listen), nat=nat, peers=peers)

    async def ping(self, request: PingRequest) -> PingResult:
        """Call a peer once, after connecting to it if need be."""
        began = trio.current_time()
        if "/" in request.peer:
            check_peer_address(request.peer)
            peer = await self._host.connect([request.peer])
        else:
            part = request.peer.strip("…")
            known = [peer for peer in self._host.connected if part and (peer.startswith(part) or peer.endswith(part))]
            peer = known[0] if len(known) == 1 else await self._host.find(PeerId.parse(request.peer))
        if peer == self._host.peer_id:
            raise UsageError(f"{peer} is this node itself; name another one")
        called = trio.current_time()
        try:
            await client(NodeService, self._host.at(peer), timeout_s=PING_TIMEOUT_S).ping(Empty())
        except RemoteError as error:
            if error.status is not Status.UNIMPLEMENTED:
                raise NoPeersError(f"{peer} does not answer: {error}") from error
        now = trio.current_time()
        state = self._host.connected.get(peer)
        if state is None:
            raise NoPeersError(f"{peer} answered and was gone")
        return PingResult(
            peer=peer,
            path=str(state.kind),
            address=state.address,
            rtt_ms=round(1000 * (now - called), 3),
            first_byte_s=round(now - began, 4),
        )

    def metrics(self) -> MetricsInfo:
        """What was called, how often and how fast."""
        metrics = self._host.links.metrics
        return MetricsInfo(
            served={name: _method_info(counted) for name, counted in sorted(metrics.served.items())},
            called={name: _method_info(counted) for name, counted in sorted(metrics.called.items())},
            failures=[
                FailureInfo(domain=domain, task=task, fault=str(fault), count=count)
                for (domain, task, fault), count in sorted(self._domain.supervisor.failures.items())
            ],
        )

    async def bench_reduce(self, request: BenchReduceRequest) -> BenchReduceResult:
        """Take part in all-reduces that are measured."""
        from shoal.node.swarm.reduce_bench import bench_reduce  # which hardly any node is asked for

        others = [peer for peer in request.peers if peer != self._host.peer_id]
        for peer in others:
            self._host.want(peer, "bench")
        try:
            figures = await bench_reduce(
                *(self._swarms.reductions, self._host.links, self._host.peer_id, request.peers),
                numel=request.numel,
                codec=request.codec,
                rounds=request.rounds,
                name=request.name,
            )
        finally:
            for peer in others:
                self._host.unwant(peer, "bench")
        return BenchReduceResult(**figures)

    async def bench_dht(self, request: BenchDhtRequest) -> BenchDhtResult:
        """Do one thing in the DHT."""
        table, began, num_kept = self._host.table, trio.current_time(), 0
        found: list[str] = []
        match request.kind:
            case "put":
                body = Model(Cid.parse(request.cid), 0)
                num_kept = (await table.publish(Kind.MODEL, check_name(request.name), body, seq=1)).num_kept
            case "get":
                newest = await table.newest(ModelName(PeerId.parse(request.owner), check_name(request.name)))
                found = [] if newest is None else [newest.body.manifest]
            case "provide":
                num_kept = await table.provide(Cid.parse(request.cid))
            case "find":
                found = list(await table.find(Cid.parse(request.cid)))
        ms = round(1000 * (trio.current_time() - began), 3)
        return BenchDhtResult(ms=ms, num_kept=num_kept, found=found, contacts=len(table.core.table))

    async def bench(self, request: BenchRequest) -> BenchResult:
        """Measure the wire to a peer."""
        if request.peer not in self._host.connected:
            raise NoPeersError(f"{request.peer} is not connected; `shoal peers` lists those that are")
        bench = Bench(self._host.links, request.peer, request.transport)
        self._host.want(request.peer, "bench")
        try:
            match request.kind:
                case "rpc":
                    size, concurrency = request.size, request.concurrency
                    figures = await bench.rpc(size=size, concurrency=concurrency, seconds=request.seconds)
                case "stream":
                    figures = await bench.stream(size=request.size, seconds=request.seconds)
                case "load":
                    figures = await bench.load(size=request.size, seconds=request.seconds)
        finally:
            self._host.unwant(request.peer, "bench")
        return BenchResult(
            kind=request.kind,
            size=request.size,
            path=str(self._host.connected[request.peer].kind),
            secure=True,
            **figures,
        )

    def swarms(self) -> list[SwarmSummary]:
        """The swarms that it is in."""
        return [
            SwarmSummary.model_validate(self._detail(joined).model_dump()) for joined in self._swarms.joined.values()
        ]

    def details(self) -> list[SwarmDetail]:
        """The same swarms in detail."""
        return [self._detail(joined) for joined in self._swarms.joined.values()]

    def swarm(self, swarm: SwarmId) -> SwarmDetail:
        """One of them; `UsageError` if it is in no such swarm."""
        return self._detail(self._swarms.get(swarm))

    def state(self, swarm: SwarmId) -> StateInfo:
        """The shared state of one of them; `UsageError` if it is in no such swarm."""
        replica = self._swarms.get(swarm).replica
        return StateInfo(
            version={str(author): seq for author, seq in replica.version().items()},
            documents={str(author): dict(values) for author, values in replica.documents().items()},
        )

    def manifest(self, swarm: SwarmId) -> dict[str, Any]:
        """What one of them was made with; `UsageError` if it is in no such swarm."""
        plain: dict[str, Any] = to_plain(self._swarms.get(swarm).run.manifest)
        return plain

    async def policy(self, swarm: SwarmId) -> bytes:
        """The newest training state of one of them; `UsageError` if there is none here."""
        return await self._swarms.get(swarm).run.held()

    async def create_swarm(self, request: CreateSwarm) -> CreatedSwarm:
        """Start a run and take part in it."""
        swarm = await self._swarms.create(request)
        return CreatedSwarm(swarm=swarm, ticket=self._swarms.ticket(swarm))

    async def join_swarm(self, request: JoinSwarm) -> JoinedSwarm:
        """Take part in a run."""
        swarm, role = await self._swarms.join(Ticket.parse(request.ticket), request.role, request.part)
        return JoinedSwarm(swarm=swarm, role=str(role))

    async def leave_swarm(self, swarm: SwarmId) -> None:
        """Say goodbye to the members and forget the run."""
        await self._swarms.leave(swarm)

    async def asks(self, swarm: SwarmId, wait_s: float) -> list[AskInfo]:
        """What the person at this node is asked in a swarm; if nothing, wait for so long."""
        asked = await self._swarms.get(swarm).run.consulting.sitting.look(wait_s)
        now = trio.current_time()
        return [
            AskInfo(
                id=each.number,
                peer=each.peer,
                role=each.take.role,
                tag=each.take.scenario.tag,
                turn=len(each.take.acts),
                sight=each.sight,
                acts=ActsInfo(kind=each.acts.kind, size=each.acts.size),
                legal=each.legal,
                seconds_left=round(max(0.0, each.until - now), 1),
            )
            for each in asked
        ]

    def answer_ask(self, swarm: SwarmId, request: AnswerAsk) -> None:
        """What the person does; `UsageError` if nobody waits for it, or it cannot be done."""
        self._swarms.get(swarm).run.consulting.sitting.answer(request.id, request.act)

    def content(self) -> ContentInfo:
        """What contents take on disk."""
        return self._models.content()

    def models(self) -> list[ModelInfo]:
        """The models that it has."""
        return self._models.all()

    async def search_models(self, word: str) -> list[ModelInfo]:
        """Models with a tag or a name, here and elsewhere."""
        return await self._models.search(word)

    async def model(self, model: str) -> ModelDetail:
        """One of them; `UsageError` if it is not here."""
        return await self._models.one(model)

    async def publish_model(self, request: PublishModel) -> ModelInfo:
        """Take a folder in."""
        return await self._models.publish(request)

    async def get_model(self, request: GetModel) -> FetchInfo:
        """Fetch one."""
        return await self._models.get(request)

    async def pin_model(self, model: str, is_pinned: bool) -> ModelInfo:
        """Let one stay, or not."""
        return await self._models.pin(model, is_pinned)

    async def remove_model(self, model: str) -> ContentInfo:
        """Forget one."""
        return await self._models.remove(model)

    async def collect_models(self) -> ContentInfo:
        """Forget those that are not pinned."""
        return await self._models.collect()

    async def serve_api(self, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the local API; started when it answers. When it begins again, it is at the same port."""
        async with open_plain_nursery() as nursery:
            address = await nursery.start(partial(serve_api, self, self._config.paths, port=self._api_port))
            self.api_url = address.url
            self._api_port = int(address.url.rpartition(":")[2])
            task_status.started()

    def stop(self) -> None:
        """Begin to end the node; returns at once."""
        self._domain.cancel()

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """What changes from now on, at most ten times a second; a slow reader sees the newest, never a backlog."""
        yield self._changes()

    async def _changes(self) -> AsyncIterator[Event]:
        last: dict[str, Any] = {}
        while True:
            current: dict[str, Any] = {"node": self.node().model_dump(mode="json", exclude={"uptime_s", "use"})}
            for swarm, joined in list(self._swarms.joined.items()):
                current[f"swarm {swarm}"] = self._detail(joined).model_dump(mode="json")
            for key, value in current.items():
                if last.get(key) != value:
                    yield Event(name=key.split()[0], data=value)
            for key in last.keys() - current.keys():
                yield Event(name="left", data={"swarm": key.split()[1]})
            last = current
            with trio.move_on_after(1):
                await self._swarms.changed.wait()
            await trio.sleep(EVENT_INTERVAL_S)

    def _detail(self, joined: Joined) -> SwarmDetail:
        run, manifest, replica = joined.run, joined.manifest, joined.replica
        policy, progress = run.policy, run.core.progress
        found = replica.views.evaluations
        points = [CurvePoint(epoch=int(p[0]), env_steps=int(p[1]), mean_return=p[2]) for p in run.curve()]
        people = self._members(joined)
        mean_return = progress.final.mean_return if progress.final else (found[-1].mean_return if found else None)
        return SwarmDetail(
            swarm=run.swarm,
            name=manifest.name or None,
            task=manifest.task,
            algorithm=manifest.algorithm,
            role=str(run.role),
            phase=str(joined.phase),
            waits=run.core.facts().wait.words,
            epoch=0 if policy is None else policy.epoch,
            mean_return=mean_return,
            target_return=manifest.target_return,
            env_steps=0 if policy is None else policy.env_steps,
            num_members=sum(member.live for member in people),
            alone=not replica.live,
            solved=progress.solved,
            env_arguments=manifest.env_arguments,
            mode=str(manifest.mode),
            aggregator=manifest.aggregator,
            codec=str(manifest.codec),
            owner=manifest.owner,
            training_return=run.training_return,
            max_env_steps=manifest.max_env_steps,
            batch_per_learner=manifest.batch_per_learner,
            batch_size=manifest.batch_size,
            steps_per_s=round(sum(member.steps_per_s for member in people if member.live), 1),
            members=people,
            shunned=sorted(run.core.shunned),
            digest=(policy.digest or None) if policy else None,
            policy_cid=policy.cid if policy else None,
            alone_since=run.alone_since,
            trained_alone=run.core.trained_alone,
            metrics={name: value for name, value in progress.metrics.items() if math.isfinite(value)},
            curve=points,
            scores=[
                Scores(epoch=each.epoch, author=each.author, scores=dict(each.scores))
                for each in joined.replica.views.evaluations[-MAX_SHOWN_SCORES:]
                if each.scores
            ],
            copies=run.copying.num_taken,
            copy_bytes=run.copying.num_bytes,
            evidence=_evidence(joined.replica.documents()),
            consults={part: ConsultInfo(**asdict(tally)) for part, tally in sorted(run.consulting.asked.items())},
            num_asks=run.consulting.sitting.num_waiting,
            results=None if run.results is None else str(run.results),
            error=joined.error,
            loop_socket=None if run.loop_socket is None else str(run.loop_socket),
            ticket=self._swarms.ticket(run.swarm),
            started_at=run.started_at,
            elapsed_s=round((run.ended_at or time.time()) - run.started_at, 3),
        )

    def _members(self, joined: Joined) -> list[MemberInfo]:
        replica, me = joined.replica, self._host.peer_id
        contributed = replica.views.contributions
        total = sum(entry.env_steps for entry in contributed.values())
        tallies = joined.run.shards.intake.tallies
        learned = sum(tally.samples for tally in tallies.values())
        told = joined.run.core.live
        listed: dict[PeerId, str] = {peer: str(facts.role) for peer, facts in told.items()}
        listed |= {peer: known.role for peer, known in replica.views.members.items() if not known.left}
        listed[me] = str(joined.run.role)
        found = []
        for peer, role in sorted(listed.items()):
            live: Facts | None = joined.run.core.facts() if peer == me else told.get(peer)
            given = contributed.get(peer)
            tally = tallies.get(peer, Tally())
            made = joined.run.shards.num_given if peer == me else tally.made
            found.append(
                MemberInfo(
                    peer_id=peer,
                    role=role,
                    is_self=peer == me,
                    live=live is not None,
                    epoch=live.epoch if live else 0,
                    phase=str(joined.phase if peer == me else live.phase) if live else "gone",
                    waits=live.wait.words if live else "",
                    env_steps=max(given.env_steps if given else 0, live.env_steps if live else 0),
                    samples=live.samples if live else 0,
                    steps_per_s=live.steps_per_s if live and live.phase is not Phase.DONE else 0.0,
                    rounds=given.rounds if given else 0,
                    share=round(given.env_steps / total, 4) if given and total else 0.0,
                    shards_made=made,
                    shards_used=tally.used,
                    samples_used=tally.samples,
                    shards_checked=tally.checked,
                    shards_refused=tally.refused + tally.stale,
                    shards_share=round(tally.samples / learned, 4) if learned else 0.0,
                    mean_staleness=round(tally.mean_staleness, 2),
                )
            )
        return found


def _evidence(documents: Mapping[PeerId, Mapping[str, Any]]) -> list[EvidenceInfo]:
    """What members say of each other, as far as it is written as we write it."""
    found: list[EvidenceInfo] = []
    for by, document in sorted(documents.items()):
        for register in ("lies", REGISTER):
            said = document.get(register)
            for against, entry in list(said.items())[:MAX_ACCUSED] if isinstance(said, Mapping) else ():
                epoch = entry.get("epoch") if isinstance(entry, Mapping) else None
                kind = entry.get("kind", "reduce") if isinstance(entry, Mapping) else None
                if type(epoch) is int and isinstance(kind, str) and isinstance(against, str):
                    found.append(EvidenceInfo(against=against[:MAX_SHOWN], kind=kind[:MAX_SHOWN], by=by, epoch=epoch))
    return found[:MAX_SHOWN_SCORES]


def _relay_of(state: Connected) -> PeerId | None:
    return parse_circuit(state.address)[0] if state.kind is PathKind.RELAYED else None


def _tried(state: Connected) -> list[TriedInfo]:
    now = trio.current_time()
    return [
        TriedInfo(rung=str(rung), failure=attempt.failure, ago_s=round(now - attempt.at, 1))
        for rung, attempt in state.ladder.tried.items()
    ]


def _method_info(counted: MethodMetrics) -> MethodInfo:
    return MethodInfo(
        calls=counted.calls,
        errors={status.name: number for status, number in counted.errors.items()},
        request_bytes=counted.request_bytes,
        answer_bytes=counted.answer_bytes,
        p50_ms=round(1000 * counted.latencies.quantile(0.5), 3),
        p99_ms=round(1000 * counted.latencies.quantile(0.99), 3),
    )
