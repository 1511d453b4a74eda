"""What a person may set of how a node is reached, and that a node in the background is set up just the same."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli import main, spawn
from shoal.cli import node as node_commands
from shoal.node.budgets import BudgetLimits
from shoal.node.config import NodeConfig, budget_limits, parse_relay_limits, relay_limit_words
from shoal.node.mesh.relay_limits import RelayLimits
from shoal.node.reach.settings import ReachConfig
from shoal.protocol.errors import UsageError
from shoal.protocol.signing import Signer

PEER = Signer(bytes(32)).peer_id
NAMES = [each.name for each in fields(RelayLimits)]


def test_limits_are_read_on_top_of_the_usual_ones() -> None:
    read = parse_relay_limits(["max_circuits=7", "bytes_per_s=2.5e6", "circuit_s=60"])
    assert read == replace(RelayLimits(), max_circuits=7, bytes_per_s=2.5e6, circuit_s=60)
    assert parse_relay_limits([]) == RelayLimits()
    assert parse_relay_limits(["max_circuits=7", "max_circuits=9"]).max_circuits == 9


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max_circuits",
        "max_circuits=",
        "=5",
        "max_circuits=many",
        "max_circuits=0",
        "max_circuits=0.5",
        "max_circuits=-1",
        "max_circuits=nan",
        "max_circuits=inf",
        "max_circuits=1e300",
        "MAX_CIRCUITS=5",
        "max_circuits=5=5",
        "bytes_per_s=0",
        "bytes_per_s=nan",
        "bytes_per_s=-inf",
        "speed=5",
        "__class__=5",
    ],
)
def test_what_is_no_limit_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_relay_limits([text])
    assert all(name in str(caught.value) for name in NAMES)
    assert "\n" not in str(caught.value)


@given(
    st.fixed_dictionaries(
        {name: st.integers(1, 2**49) if name != "bytes_per_s" else st.floats(1, 2.0**49) for name in NAMES}
    )
)
def test_limits_come_back_from_their_words(values: dict[str, Any]) -> None:
    limits = RelayLimits(**values)
    assert parse_relay_limits(relay_limit_words(limits)) == limits
    assert relay_limit_words(RelayLimits()) == []


@pytest.mark.parametrize("rule", ["", "AUTO", "yes", "auto "])
def test_a_rule_for_relaying_is_one_of_three_words(rule: str) -> None:
    with pytest.raises(UsageError, match="auto, on, off"):
        ReachConfig(relay=rule)


@pytest.mark.parametrize("address", ["", "x", "/ip4/1.2.3.4", "/dns4/x.org/tcp/1", f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}"])
def test_what_others_can_not_dial_is_not_announced(address: str) -> None:
    with pytest.raises(UsageError):
        ReachConfig(announce=(address,))


@pytest.mark.parametrize("server", ["", "x", ":3478", "x:", "x:0", "x:65536", "x:y", "x:-1"])
def test_a_stun_server_is_a_host_and_a_port(server: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        ReachConfig(stun_servers=(server,))


def test_a_node_that_may_have_next_to_no_peers_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 4"):
        NodeConfig(max_peers=3)


@pytest.mark.parametrize(
    ("limits", "advice"),
    [
        ({"max_disk_gb": 0.05}, "--max-disk 0.1"),
        ({"max_upload_mbit": 0.5}, "--max-upload 1,"),
        ({"max_download_mbit": 0.5}, "--max-download 1,"),
        ({"max_upload_mbit": -1}, "not negative"),
        ({"max_disk_gb": float("nan")}, "not negative"),
    ],
)
def test_budgets_that_a_node_cannot_live_on_are_refused_with_those_that_it_can(
    limits: dict[str, float], advice: str
) -> None:
    given = {"max_disk_gb": 10.0, "max_upload_mbit": 0.0, "max_download_mbit": 0.0} | limits
    with pytest.raises(UsageError, match=advice):
        NodeConfig(budgets=budget_limits(**given))


def config_of(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> NodeConfig:
    """What ``shoal`` would run a node with, in the foreground."""
    seen: list[NodeConfig] = []

    def run(config: NodeConfig, *_: object, **__: object) -> None:
        seen.append(config)

    monkeypatch.setattr(node_commands, "_run", run)
    monkeypatch.setattr(node_commands, "_run_for_parent", run)
    assert main.run(words) == 0
    return seen[0]


EVERY_OPTION = {
    "--listen": ["/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/4001"],
    "--bootstrap": [f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}", f"/dns4/example.org/tcp/1/p2p/{PEER}"],
    "--relay": ["on"],
    "--relay-limit": ["max_circuits=7", "bytes_per_s=1.5e6"],
    "--announce": ["/ip4/192.0.2.9/tcp/4001", "/ip6/2001:db8::9/tcp/4001"],
    "--stun": ["stun.example.org:3478", "192.0.2.1:19302"],
    "--max-peers": ["64"],
    "--max-disk": ["2.5"],
    "--max-upload": ["20"],
    "--max-download": ["1.5"],
    "--api-port": ["4002"],
    "--profile": ["lab"],
}
EXPECTED = NodeConfig(
    profile="lab",
    listen=tuple(EVERY_OPTION["--listen"]),
    bootstrap=tuple(EVERY_OPTION["--bootstrap"]),
    mdns=False,
    api_port=4002,
    serve_bench=True,
    max_peers=64,
    budgets=BudgetLimits(max_disk_bytes=2_500_000_000, upload_bytes_per_s=2_500_000.0, download_bytes_per_s=187_500.0),
    reach=ReachConfig(
        relay="on",
        relay_limits=replace(RelayLimits(), max_circuits=7, bytes_per_s=1.5e6),
        port_mapping=False,
        punch=False,
        webrtc=False,
        announce=tuple(EVERY_OPTION["--announce"]),
        stun_servers=tuple(EVERY_OPTION["--stun"]),
    ),
)
SWITCHES = ["--no-mdns", "--no-port-mapping", "--no-punch", "--no-webrtc", "--serve-bench"]
WORDS = [word for option, values in EVERY_OPTION.items() for value in values for word in (option, value)]


class Child:
    """Stands for the process of a node in the background."""

    commands: list[list[str]]

    def __init__(self, command: list[str], **_: object) -> None:
        self.commands.append(command)
        raise OSError(5, "not started in this test")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The command lines of the nodes that were to be started in the background."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SHOAL_PROFILE", raising=False)
    monkeypatch.setattr(Child, "commands", [], raising=False)
    monkeypatch.setattr(spawn.subprocess, "Popen", Child)
    return Child.commands


def test_each_option_of_up_arrives(monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]) -> None:
    found = config_of(monkeypatch, ["up", *WORDS, *SWITCHES])
    assert found == replace(EXPECTED, home=found.home)
    assert commands == []


@pytest.mark.parametrize("words", [[*WORDS, *SWITCHES], []], ids=["every option", "none"])
def test_a_node_in_the_background_is_set_up_as_one_in_the_foreground(
    monkeypatch: pytest.MonkeyPatch, commands: list[list[str]], words: list[str]
) -> None:
    in_the_foreground = config_of(monkeypatch, ["up", *words])
    assert main.run(["up", "-d", *words]) == 1
    (command,) = commands
    assert command[1:5] == ["-P", "-m", "shoal.cli.main", "up"]
    assert config_of(monkeypatch, command[4:]) == in_the_foreground


def test_this_file_knows_every_setting() -> None:
    """So that a new one does not get lost on the way to the background: each differs from its default above."""
    for config, usual in ((EXPECTED, NodeConfig()), (EXPECTED.reach, ReachConfig())):
        same = {each.name for each in fields(config) if getattr(config, each.name) == getattr(usual, each.name)}
        assert same <= {"home", "wall_clock"}, same
