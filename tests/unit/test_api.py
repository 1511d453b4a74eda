"""The local API and its client, over real sockets, in front of a node made of plain values."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import trio

from shoal.node.api.app import NodeView
from shoal.node.api.client import Client
from shoal.node.api.requests import AnswerAsk, BenchRequest, CreateSwarm, JoinSwarm
from shoal.node.api.schemas import (
    ActsInfo,
    AskInfo,
    BenchResult,
    ConsultInfo,
    CreatedSwarm,
    CurvePoint,
    Event,
    JoinedSwarm,
    MemberInfo,
    MeshInfo,
    MeshLink,
    MeshNode,
    MethodInfo,
    MetricsInfo,
    ModelDetail,
    ModelInfo,
    NodeInfo,
    PeerInfo,
    StateInfo,
    SwarmDetail,
    SwarmSummary,
)
from shoal.node.api.server import ApiAddress, serve_api
from shoal.node.profile import ProfilePaths
from shoal.protocol.errors import NoDaemonError, NoPeersError, RefusedError, ShoalError, UsageError
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer

T = TypeVar("T")
ME, OTHER = (Signer(bytes([seed]) * 32).peer_id for seed in (1, 2))
SWARM, OTHER_SWARM = (SwarmId.of_manifest(text) for text in (b"one", b"two"))


class FakeNode:
    """A `NodeView` of plain values; what it is asked to do, it notes."""

    def __init__(self) -> None:
        self.joined: list[SwarmId] = [SWARM]
        self.epoch = 3
        self.asked: list[object] = []
        self.failure: Exception | None = None
        self.stopped = trio.Event()
        self._readers: set[trio.MemorySendChannel[Event]] = set()

    def node(self) -> NodeInfo:
        return NodeInfo(
            peer_id=ME, addresses=["/ip4/1.2.3.4/tcp/5"], profile="p", pid=os.getpid(), version="0", uptime_s=1.5,
            num_peers=1, alone=False, swarms=self.joined,
        )  # fmt: skip

    def peers(self) -> list[PeerInfo]:
        if self.failure is not None:
            raise self.failure
        return [PeerInfo(peer_id=OTHER, path="direct", address="/ip4/1.2.3.4/tcp/6", connected_s=2.0)]

    def mesh(self) -> MeshInfo:
        nodes = [MeshNode(peer_id=ME, is_self=True), MeshNode(peer_id=OTHER)]
        return MeshInfo(nodes=nodes, links=[MeshLink(a=ME, b=OTHER, path="direct", rtt_ms=0.1)])

    def swarms(self) -> list[SwarmSummary]:
        return [self.swarm(swarm) for swarm in self.joined]

    def swarm(self, swarm: SwarmId) -> SwarmDetail:
        if swarm not in self.joined:
            raise UsageError("unknown")
        return SwarmDetail(
            swarm=swarm, task="gym:X-v1", algorithm="ppo", role="learner", phase="collecting", epoch=self.epoch,
            mean_return=12.5, mode="local", owner=OTHER, members=[MemberInfo(peer_id=ME, role="learner", is_self=True)],
            curve=[CurvePoint(epoch=1, env_steps=100, mean_return=9.0)],
        )  # fmt: skip

    def details(self) -> list[SwarmDetail]:
        odd = {'gu"est\n': ConsultInfo(asked=5, answered=3, unanswered=2, fell_back=1, seconds=2.5)}
        return [self.swarm(swarm).model_copy(update={"consults": odd}) for swarm in self.joined]

    async def asks(self, swarm: SwarmId, wait_s: float) -> list[AskInfo]:
        self.asked.append(wait_s)
        acts = ActsInfo(kind="discrete", size=4)
        return [AskInfo(id=7, peer=OTHER, role="r", sight=[0.5], acts=acts, legal=[1, 3], seconds_left=9)]

    def answer_ask(self, swarm: SwarmId, request: AnswerAsk) -> None:
        self.asked.append(request.act)
        if request.id != 7:
            raise UsageError("nobody waits for that")

    async def model(self, model: str) -> ModelDetail:
        return ModelDetail(name=model, cid=Cid.of_block(b""), num_bytes=0, num_files=0)

    async def search_models(self, word: str) -> list[ModelInfo]:
        return [await self.model(word)]

    def manifest(self, swarm: SwarmId) -> dict[str, Any]:
        return {"task": "gym:CartPole-v1", "seed": 0}

    async def policy(self, swarm: SwarmId) -> bytes:
        return b"\x00\xff tensors"

    def state(self, swarm: SwarmId) -> StateInfo:
        return StateInfo(version={ME: 3}, documents={ME: {"member": {"role": "learner"}}})

    def metrics(self) -> MetricsInfo:
        ping = MethodInfo(calls=3, errors={"UNAVAILABLE": 1}, request_bytes=9, answer_bytes=6, p50_ms=0.5, p99_ms=2.0)
        return MetricsInfo(served={}, called={"node.ping": ping})

    async def bench(self, request: BenchRequest) -> BenchResult:
        self.asked.append(request)
        if self.failure is not None:
            raise self.failure
        return BenchResult(
            kind=request.kind, size=request.size, path="direct", transport="lane", secure=True, security="tls1.3",
            calls_per_s=1.5,
        )  # fmt: skip

    async def create_swarm(self, request: CreateSwarm) -> CreatedSwarm:
        self.asked.append(request)
        if self.failure is not None:
            raise self.failure
        return CreatedSwarm(swarm=SWARM, ticket="ticket")

    async def join_swarm(self, request: JoinSwarm) -> JoinedSwarm:
        self.asked.append(request)
        return JoinedSwarm(swarm=SWARM, role="learner")

    async def leave_swarm(self, swarm: SwarmId) -> None:
        self.joined.remove(swarm)

    def stop(self) -> None:
        self.stopped.set()

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        send, receive = trio.open_memory_channel[Event](16)
        self._readers.add(send)
        try:
            async with receive:
                yield receive
        finally:
            self._readers.discard(send)

    def happen(self, event: Event) -> None:
        for reader in self._readers:
            reader.send_nowait(event)

    @property
    def is_full(self) -> bool:
        return any(reader.statistics().current_buffer_used == 16 for reader in self._readers)


def _is_a_node_view(node: FakeNode) -> NodeView:
    return node


def served(
    paths: ProfilePaths, ask: Callable[[FakeNode, ApiAddress], T], prepare: Callable[[FakeNode], None] = lambda _: None
) -> T:
    """Serve a fake node, and ask it from another thread, as another process would."""

    async def main() -> T:
        node = FakeNode()
        prepare(node)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                address = await nursery.start(serve_api, node, paths)
                answer = await trio.to_thread.run_sync(ask, node, address)
                nursery.cancel_scope.cancel()
        return answer

    return trio.run(main)


@pytest.fixture
def paths(tmp_path: Path) -> ProfilePaths:
    paths = ProfilePaths(tmp_path / "p")
    paths.create()
    return paths


def asked(paths: ProfilePaths, ask: Callable[[Client], T], prepare: Callable[[FakeNode], None] = lambda _: None) -> T:
    def with_client(node: FakeNode, address: ApiAddress) -> T:
        with Client(paths, "p") as client:
            return ask(client)

    return served(paths, with_client, prepare)


def test_the_client_gives_what_the_node_says(paths: ProfilePaths) -> None:
    def ask(client: Client) -> list[Any]:
        swarm = [client.swarms(), client.swarm(SWARM), client.state(SWARM)]
        assert (client.manifest(SWARM)["task"], client.policy(SWARM)) == ("gym:CartPole-v1", b"\x00\xff tensors")
        return [client.node(), client.peers(), client.mesh(), client.metrics(), *swarm]

    node = FakeNode()
    summary = SwarmSummary.model_validate(node.swarm(SWARM).model_dump())
    swarm = [[summary], node.swarm(SWARM), node.state(SWARM)]
    assert asked(paths, ask) == [node.node(), node.peers(), node.mesh(), node.metrics(), *swarm]


def test_a_measurement_is_asked_for_with_its_defaults_and_told_whole(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> tuple[list[object], BenchResult]:
        with Client(paths, "p") as client:
            return node.asked, client.bench(BenchRequest(kind="rpc", peer=OTHER, size=128))

    questions, result = served(paths, ask)
    assert questions == [BenchRequest(kind="rpc", peer=OTHER, size=128, concurrency=1, seconds=5, transport="auto")]
    assert (result.calls_per_s, result.transport, result.mb_per_s) == (1.5, "lane", None)


@pytest.mark.parametrize("kind", [NoPeersError, RefusedError, UsageError])
def test_a_measurement_that_cannot_be_made_says_why(paths: ProfilePaths, kind: type[ShoalError]) -> None:
    def ask(client: Client) -> None:
        with pytest.raises(kind, match="the reason"):
            client.bench(BenchRequest(kind="stream", peer=OTHER, size=1))

    asked(paths, ask, lambda node: setattr(node, "failure", kind("the reason")))


def test_json_has_the_promised_names(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> Any:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(address.socket)), base_url="http://localhost") as http:
            return http.get(f"/v1/swarms/{SWARM}").json()

    answer = served(paths, ask)
    assert answer["return"] == 12.5
    assert answer["members"][0]["self"] is True
    assert answer["curve"] == [{"epoch": 1, "env_steps": 100, "return": 9.0}]


def test_a_request_arrives_with_its_defaults(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> list[object]:
        with Client(paths, "p") as client:
            request = CreateSwarm(task="gym:X-v1", algorithm="ppo", hyperparameters={"a": 1})
            assert client.create_swarm(request).ticket == "ticket"
            assert client.join_swarm(JoinSwarm(ticket="t", role="storage")).swarm == SWARM
        return node.asked

    expected = [
        CreateSwarm(task="gym:X-v1", algorithm="ppo", hyperparameters={"a": 1}),
        JoinSwarm(ticket="t", role="storage"),
    ]
    assert served(paths, ask) == expected


@pytest.mark.parametrize("kind", [ShoalError, UsageError, NoPeersError, RefusedError])
def test_an_error_of_the_node_is_the_same_error_at_the_client(paths: ProfilePaths, kind: type[ShoalError]) -> None:
    def ask(client: Client) -> None:
        with pytest.raises(kind, match="the reason") as caught:
            client.create_swarm(CreateSwarm(task="gym:X-v1", algorithm="ppo"))
        assert type(caught.value) is kind

    def prepare(node: FakeNode) -> None:
        node.failure = kind("the reason")

    asked(paths, ask, prepare)


@pytest.mark.parametrize("name", [f"{ME}/cart-pole.v1@2", "../x", "a b?c#d%2F/pin", "ü", "get", "\udcff"])
def test_a_model_may_be_called_anything_on_the_way_to_the_node(paths: ProfilePaths, name: str) -> None:
    def ask(client: Client) -> list[str]:
        return [client.model(name).name, *(each.name for each in client.search_models(name))]

    assert asked(paths, ask) == [name.encode(errors="replace").decode()] * 2


def test_a_person_is_shown_what_is_asked_and_answers(paths: ProfilePaths) -> None:
    """An act is whatever JSON says; the node knows what the role can do."""

    def ask(node: FakeNode, address: ApiAddress) -> list[object]:
        with Client(paths, "p") as client:
            (shown,) = client.asks(SWARM, 2.5)
            assert (shown.id, shown.peer, shown.sight, shown.legal) == (7, OTHER, [0.5], [1, 3])
            for act in (3, [0.5, 1], "a word"):
                client.answer_ask(SWARM, AnswerAsk(id=7, act=act))
            with pytest.raises(UsageError, match="nobody waits"):
                client.answer_ask(SWARM, AnswerAsk(id=8, act=1))
            with pytest.raises(UsageError, match="less than or equal to 30"):
                client.asks(SWARM, 31)
        return node.asked

    assert served(paths, ask) == [2.5, 3, [0.5, 1], "a word", 1]


def test_prometheus_reads_what_is_counted(paths: ProfilePaths) -> None:
    """Names, labels and what has to be escaped in them."""

    def ask(node: FakeNode, address: ApiAddress) -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(address.socket)), base_url="http://localhost") as http:
            return http.get("/metrics")

    answer = served(paths, ask)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    part = f'swarm="{SWARM}",part="gu\\"est\\n"'
    for line in (
        "shoal_uptime_seconds 1.5",
        "# TYPE shoal_calls_total counter",
        'shoal_calls_total{side="called",method="node.ping"} 3',
        'shoal_call_errors_total{side="called",method="node.ping",status="UNAVAILABLE"} 1',
        f'shoal_swarm_epoch{{swarm="{SWARM}"}} 3',
        f"shoal_consults_asked_total{{{part}}} 5",
        f"shoal_consults_fell_back_total{{{part}}} 1",
        f"shoal_consults_seconds_total{{{part}}} 2.5",
    ):
        assert line in lines, answer.text
    for line in lines:
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{.*\})? [-+.e0-9]+", line), line
    assert len(lines) == len(set(lines))


@pytest.mark.filterwarnings("default")
def test_an_unforeseen_failure_fails_one_request_only(paths: ProfilePaths) -> None:
    def ask(client: Client) -> None:
        with pytest.raises(ShoalError, match="boom"):
            client.peers()
        assert client.node().peer_id == ME

    def prepare(node: FakeNode) -> None:
        node.failure = ZeroDivisionError("boom")

    asked(paths, ask, prepare)


def test_a_swarm_is_named_by_any_unambiguous_beginning(paths: ProfilePaths) -> None:
    def prepare(node: FakeNode) -> None:
        node.joined = [SWARM, OTHER_SWARM]

    def ask(client: Client) -> None:
        assert client.swarm(SWARM[:20]).swarm == SWARM
        for name, complaint in ((SWARM[:5], "could be any of 2"), ("zzz", "in no swarm"), ("../x", "not the name")):
            with pytest.raises(UsageError, match=complaint):
                client.swarm(name)
        with pytest.raises(UsageError, match="say which one"):
            client.the_swarm(None)
        assert client.leave_swarm(OTHER_SWARM[:20]) == OTHER_SWARM
        assert client.the_swarm(None) == SWARM

    asked(paths, ask, prepare)


def test_a_bad_request_says_which_field(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(address.socket)), base_url="http://localhost") as http:
            answer = http.post("/v1/swarms", json={"task": "gym:X-v1"})
            assert answer.status_code == 422
            assert answer.json() == {"error": {"code": 2, "message": "algorithm: Field required"}}
            assert http.get("/nowhere").status_code == 404
            assert http.get("/v1/swarms/zzz").status_code == 404
            page = http.get("/docs").text
            assert "/v1/mesh" in page
            assert "http" not in page.lower().replace("https://html", "")  # nothing is loaded from another site
            assert "/v1/events" in http.get("/openapi.json").json()["paths"]

    served(paths, ask)


def test_tcp_wants_the_token_and_a_local_host_name(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> None:
        bearer = {"Authorization": f"Bearer {address.token_file.read_text()}"}
        with httpx.Client(base_url=address.url, trust_env=False) as http:
            for headers, status in (
                (bearer, 200),
                (bearer | {"Host": "localhost"}, 200),
                ({}, 401),
                ({"Authorization": "Bearer wrong"}, 401),
                ({"Authorization": "Bearer"}, 401),
                (bearer | {"Host": "evil.example"}, 403),
                (bearer | {"Host": "127.0.0.1.evil.example"}, 403),
            ):
                answer = http.get("/v1/node", headers=headers)
                assert answer.status_code == status, headers
                assert "access-control-allow-origin" not in answer.headers

    served(paths, ask)


def test_the_socket_and_the_token_are_for_this_user_alone(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> None:
        for path in (address.socket, address.token_file, paths.api):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(address.socket.parent.stat().st_mode) == 0o700

    served(paths, ask)


def test_a_profile_whose_path_is_too_long_for_a_socket_works_all_the_same(tmp_path: Path) -> None:
    paths = ProfilePaths(tmp_path / ("x" * 60) / ("y" * 60))
    paths.create()

    def ask(node: FakeNode, address: ApiAddress) -> Path:
        with Client(paths, "p") as client:
            assert client.node().peer_id == ME
        assert stat.S_IMODE(address.socket.parent.stat().st_mode) == 0o700
        return address.socket

    assert not served(paths, ask).parent.exists()


def test_a_stopped_node_leaves_no_address_and_no_socket(paths: ProfilePaths) -> None:
    asked(paths, lambda client: client.node())
    assert not paths.api.exists()
    assert not paths.api_socket.exists()
    with pytest.raises(NoDaemonError, match="shoal up"):
        Client(paths, "p")


def test_the_address_of_a_killed_node_is_no_daemon_and_its_socket_is_taken_over(paths: ProfilePaths) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(paths.api_socket))
    paths.api.write_text(json.dumps({"socket": str(paths.api_socket), "pid": 2**22 - 1}))
    with pytest.raises(NoDaemonError):
        Client(paths, "p")
    asked(paths, lambda client: client.node())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_damaged_address_is_no_daemon(paths: ProfilePaths, content: str) -> None:
    paths.api.write_text(content)
    with pytest.raises(NoDaemonError):
        Client(paths, "p")


def test_a_port_in_use_is_said_in_one_line(paths: ProfilePaths) -> None:
    async def main(port: int) -> None:
        await serve_api(FakeNode(), paths, port=port)

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ShoalError, match="port"):
        trio.run(main, taken.getsockname()[1])


def test_events_are_told_and_a_watched_swarm_is_told_again_when_it_changes(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> None:
        with Client(paths, "p") as client:
            with client.events() as events:
                assert next(events) is None
                trio.from_thread.run_sync(node.happen, Event(name="peers", data={"a": [1, "ü"]}))
                assert next(event for event in events if event is not None) == Event(name="peers", data={"a": [1, "ü"]})
            details = client.watch_swarm(SWARM[:20])
            assert next(details).epoch == 3
            node.epoch = 4
            assert next(detail for detail in details if detail.epoch == 4).swarm == SWARM
            details.close()

    served(paths, ask)


def test_a_watcher_learns_that_the_node_has_ended(paths: ProfilePaths) -> None:
    def ask(node: FakeNode) -> None:
        with Client(paths, "p") as client:
            details = client.watch_swarm(SWARM)
            next(details)
            trio.from_thread.run_sync(client_is_watching.set)
            with pytest.raises(NoDaemonError):
                for _ in details:
                    pass

    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as asking, trio.open_nursery() as nursery:
                await nursery.start(serve_api, node, paths)
                asking.start_soon(trio.to_thread.run_sync, ask, node)
                await client_is_watching.wait()
                nursery.cancel_scope.cancel()

    node, client_is_watching = FakeNode(), trio.Event()
    trio.run(main)


def test_a_reader_that_has_stopped_reading_does_not_hold_up_the_end(paths: ProfilePaths) -> None:
    async def main() -> float:
        node = FakeNode()
        big = Event(name="big", data={"text": "x" * 100_000})
        with socket.socket(socket.AF_UNIX) as reader:
            async with trio.open_nursery() as nursery:
                address = await nursery.start(serve_api, node, paths)
                reader.connect(str(address.socket))
                reader.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                # Nothing more fits in when the node's own bounded channel is full: nobody takes from it any more.
                with trio.fail_after(10):
                    while not node.is_full:
                        node.happen(big)
                        await trio.sleep(0.001)
                asked_at = trio.current_time()
                nursery.cancel_scope.cancel()
        return trio.current_time() - asked_at

    assert trio.run(main) < 1


def test_a_request_to_stop_is_answered_and_passed_on(paths: ProfilePaths) -> None:
    def ask(node: FakeNode, address: ApiAddress) -> bool:
        with Client(paths, "p") as client:
            assert client.stop() == os.getpid()
        return node.stopped.is_set()

    assert served(paths, ask)
