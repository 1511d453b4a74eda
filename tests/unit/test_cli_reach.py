"""``shoal nat``, ``doctor`` and ``ping``, and their routes: what a node says of how it is reached arrives whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import trio
from rich.console import Console

from shoal.cli import main, render
from shoal.node.api.app import NodeView
from shoal.node.api.requests import PingRequest
from shoal.node.api.schemas import (
    DoctorInfo,
    FamilyInfo,
    FindingInfo,
    MeshInfo,
    MeshLink,
    NatInfo,
    PeerInfo,
    PingResult,
    TriedInfo,
)
from shoal.node.api.server import ApiAddress, serve_api
from shoal.node.profile import ProfilePaths
from shoal.protocol.errors import NoPeersError, UsageError

from .test_api import ME, OTHER, FakeNode

T = TypeVar("T")
RELAY = OTHER
FAILURE = "both NATs give every connection another port"
CIRCUIT = f"/ip4/192.0.2.7/tcp/443/p2p/{RELAY}/p2p-circuit/p2p/{ME}"


class ReachNode(FakeNode):
    """Behind a NAT, reached through a relay, with one relayed peer."""

    def __init__(self) -> None:
        super().__init__()
        self.pinged: list[str] = []

    def peers(self) -> list[PeerInfo]:
        tried = [
            TriedInfo(rung="hole punching (TCP)", failure=FAILURE, ago_s=3.5),
            TriedInfo(rung="direct", failure="no answer within 1 s", ago_s=4.5),
        ]
        return [
            PeerInfo(
                peer_id=OTHER, path="relayed", address=CIRCUIT, relayed_by=RELAY, reachability="private",
                nat="symmetric", tried=tried,
            )
        ]  # fmt: skip

    def nat(self) -> NatInfo:
        four = FamilyInfo(
            family="IPv4", reachability="private", udp="symmetric", tcp_mapping="endpoint-dependent",
            public_addresses=["192.0.2.1:4001"], evidence=["3 peers in 2 networks see another port each"],
        )  # fmt: skip
        six = FamilyInfo(family="IPv6", reachability="unknown", udp="unknown", tcp_mapping="unknown")
        return NatInfo(
            reachability="private", udp="symmetric", families=[four, six], addresses=[CIRCUIT], held_relays=[RELAY],
            relaying=True, num_reservations=3, num_circuits=2, relayed_bytes=12_345_678,
            port_mapping_attempts=["PCP: no answer", "UPnP: [red]no router[/nonsense]"],
        )  # fmt: skip

    def doctor(self) -> DoctorInfo:
        findings = [
            FindingInfo(level="problem", what="it is reached through 1 relay", advice="forward a [bold]port[/x]"),
            FindingInfo(level="note", what="the NAT is symmetric"),
            FindingInfo(level="good", what="its clock is right"),
        ]
        return DoctorInfo(findings=findings, nat=self.nat(), peers=self.peers())

    def mesh(self) -> MeshInfo:
        link = MeshLink(a=ME, b=OTHER, path="relayed", relayed_by=RELAY, tried=self.peers()[0].tried)
        return super().mesh().model_copy(update={"links": [link], "nat": self.nat()})

    async def ping(self, request: PingRequest) -> PingResult:
        self.pinged.append(request.peer)
        if self.failure is not None:
            raise self.failure
        return PingResult(peer=OTHER, path="relayed", address=CIRCUIT, rtt_ms=12.345, first_byte_s=0.5)


def _is_a_node_view(node: ReachNode) -> NodeView:
    return node


@pytest.fixture
def node() -> ReachNode:
    return ReachNode()


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ProfilePaths:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.delenv("SHOAL_PROFILE", raising=False)
    monkeypatch.setattr("shoal.cli.node.PING_INTERVAL_S", 0.0)
    paths = ProfilePaths(tmp_path / "profiles" / "default")
    paths.create()
    return paths


def served(node: ReachNode, paths: ProfilePaths, ask: Callable[[ApiAddress], T]) -> T:
    """Serve the node, and ask it from another thread, as another process would."""

    async def serve() -> T:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                address = await nursery.start(serve_api, node, paths)
                answer = await trio.to_thread.run_sync(ask, address)
                nursery.cancel_scope.cancel()
        return answer

    return trio.run(serve)


def shoal(node: ReachNode, paths: ProfilePaths, *words: str) -> int:
    return served(node, paths, lambda _: main.run(list(words)))


def fetched(node: ReachNode, paths: ProfilePaths, method: str, path: str, **body: Any) -> httpx.Response:
    def ask(address: ApiAddress) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(address.socket))
        with httpx.Client(transport=transport, base_url="http://localhost") as http:
            return http.request(method, path, json=body or None)

    return served(node, paths, ask)


def test_nat_shows_what_is_known_how_it_is_known_and_by_which_relay(
    node: ReachNode, paths: ProfilePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shoal(node, paths, "nat") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (
        "private",
        "symmetric",
        "endpoint-dependent",
        "3 peers in 2 networks see another port each",
        render.short_peer(RELAY),
        "3 nodes, 2 circuits, 12.3 MB",
        "UPnP: [red]no router[/nonsense]",
    ):
        assert word in out
    assert CIRCUIT in "".join(out.split()), "a long address goes on in the next line"
    assert "IPv6" not in out, "nothing is known of it"


def test_a_node_without_relays_or_addresses_says_so(
    node: ReachNode, paths: ProfilePaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "nat", lambda: NatInfo(reachability="unknown", udp="unknown"))
    assert shoal(node, paths, "nat") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["reached", "through", "no", "relay"] in lines
    assert ["addresses", "none"] in lines
    assert ["port", "mapping", "none"] in lines


def test_doctor_shows_each_finding_with_its_advice_and_what_was_tried(
    node: ReachNode, paths: ProfilePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shoal(node, paths, "doctor") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line[0] for line in out.splitlines() if line.startswith(("✗", "!", "✓"))] == ["✗", "!", "✓"]
    for word in ("→ forward a [bold]port[/x]", f"hole punching (TCP): {FAILURE}", "direct: no answer within 1 s"):
        assert word in out


def test_a_relayed_peer_is_shown_with_its_relay_and_not_with_that_ones_address(
    capsys: pytest.CaptureFixture[str],
) -> None:
    peer = PeerInfo(peer_id=ME, path="relayed", address=CIRCUIT, relayed_by=RELAY)
    Console(width=120).print(render.peers([peer]))
    shown = capsys.readouterr().out
    assert f"through …{RELAY[-8:]}" in shown
    assert "192.0.2.7" not in shown


def test_ping_tells_the_path_and_the_time_as_often_as_asked(
    node: ReachNode, paths: ProfilePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shoal(node, paths, "ping", OTHER, "-c", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{render.short_peer(OTHER)} answered in 12.3 ms (relayed; 0.500 s in all)")
    assert lines[0].endswith(CIRCUIT)
    assert node.pinged == 3 * [OTHER]


@pytest.mark.parametrize("kind", [NoPeersError, UsageError])
def test_a_peer_that_cannot_be_reached_is_one_line_and_an_exit_code(
    node: ReachNode, paths: ProfilePaths, capsys: pytest.CaptureFixture[str], kind: type[NoPeersError | UsageError]
) -> None:
    node.failure = kind("the reason")
    assert shoal(node, paths, "ping", OTHER) == kind.exit_code
    assert capsys.readouterr() == ("", "shoal: the reason\n")
    assert node.pinged == [OTHER]


def test_programs_get_the_same_as_json(
    node: ReachNode, paths: ProfilePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, info in (
        (("nat",), node.nat()),
        (("doctor",), node.doctor()),
        (("ping", OTHER, "-c", "1"), trio.run(node.ping, PingRequest(peer=OTHER))),
    ):
        assert shoal(node, paths, *words, "--json") == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line) == info.model_dump(mode="json")


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["nat"], 3, "shoal up"),
        (["doctor"], 3, "shoal up"),
        (["ping", OTHER], 3, "shoal up"),
        (["ping"], 2, "Missing argument"),
        (["ping", OTHER, "-c", "0"], 2, "--count"),
        (["up", "--relay", "maybe"], 2, "auto, on, off"),
        (["up", "--relay-limit", "speed=5"], 2, "max_circuits"),
        (["up", "--announce", "/ip4/1.2.3.4"], 2, "cannot listen on"),
        (["up", "--stun", "x"], 2, "HOST:PORT"),
        (["up", "--max-peers", "1"], 2, "at least 4"),
    ],
)
def test_what_can_not_be_done_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, complaint: str
) -> None:
    assert main.run(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize("command", ["nat", "doctor", "ping"])
def test_each_takes_a_profile_and_speaks_json(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main.run([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert "--json" in page
    assert "--profile" in page


# --- routes ---


def test_the_routes_give_what_the_node_says(node: ReachNode, paths: ProfilePaths) -> None:
    assert fetched(node, paths, "GET", "/v1/nat").json() == node.nat().model_dump(mode="json")
    assert fetched(node, paths, "GET", "/v1/doctor").json() == node.doctor().model_dump(mode="json")
    answer = fetched(node, paths, "POST", "/v1/ping", peer=OTHER)
    assert answer.json() == {
        "peer": OTHER, "path": "relayed", "address": CIRCUIT, "rtt_ms": 12.345, "first_byte_s": 0.5,
    }  # fmt: skip


def test_the_mesh_says_who_relays_and_why_no_better_path_was_had(node: ReachNode, paths: ProfilePaths) -> None:
    mesh = fetched(node, paths, "GET", "/v1/mesh").json()
    (link,) = mesh["links"]
    assert link["relayed_by"] == RELAY
    assert [(each["rung"], each["failure"]) for each in link["tried"]] == [
        ("hole punching (TCP)", FAILURE),
        ("direct", "no answer within 1 s"),
    ]
    assert mesh["nat"] == node.nat().model_dump(mode="json")


def test_a_ping_without_a_peer_says_which_field_is_missing(node: ReachNode, paths: ProfilePaths) -> None:
    answer = fetched(node, paths, "POST", "/v1/ping", nobody=1)
    assert answer.status_code == 422
    assert answer.json() == {"error": {"code": 2, "message": "peer: Field required"}}


def test_a_peer_out_of_reach_is_503(node: ReachNode, paths: ProfilePaths) -> None:
    node.failure = NoPeersError("the reason")
    answer = fetched(node, paths, "POST", "/v1/ping", peer=OTHER)
    assert answer.status_code == 503
    assert answer.json() == {"error": {"code": NoPeersError.exit_code, "message": "the reason"}}
