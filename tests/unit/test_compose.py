"""What the Dockerfile and the compose file promise, checked without an engine: form, commands, rights and topology."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer

from shoal.cli import main

yaml = pytest.importorskip("ruamel.yaml", reason="reads the compose file; it comes with check-jsonschema")

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
COMPOSE: dict[str, Any] = yaml.YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = ("relay", "a1", "a2", "b1", "b2")
ROUTERS = ("nat-a", "nat-b")
HOME = {"a1": "nat-a", "a2": "nat-a", "b1": "nat-b", "b2": "nat-b"}


def stage(name: str) -> list[str]:
    """The instructions of one stage of the Dockerfile, one a line."""
    (body,) = re.findall(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return [line for line in body.splitlines() if line and not line.startswith("#")]


def script(service: str) -> str:
    """The shell script that a service runs, as its shell gets it."""
    assert SERVICES[service]["entrypoint"] == ["sh", "-euc"]
    (text,) = SERVICES[service]["command"]
    return str(text).replace("$$", "$")


def shell_lines() -> list[tuple[str, str]]:
    """Every script and health check of the compose file, with the service that it is of."""
    lines = [(name, script(name)) for name in SERVICES]
    for name, service in SERVICES.items():
        kind, *words = service.get("healthcheck", {}).get("test", ["NONE"])
        if kind == "CMD-SHELL":
            lines.append((name, words[0].replace("$$", "$")))
    return lines


def shoal_commands() -> list[list[str]]:
    """Every call of ``shoal``, without the word itself, what the shell puts in replaced by what it would be."""
    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    stand_ins = {"$(cat /shared/relay)": f"/ip4/203.0.113.10/tcp/4001/p2p/{peer}", "$(cat /shared/ticket)": "shoal1a"}
    commands = []
    for _, text in shell_lines():
        for stand_in in stand_ins.items():
            text = text.replace(*stand_in)
        commands += [shlex.split(found) for found in re.findall(r"\bshoal ((?:(?!\s\d?[<>])[^\n;|&])+)", text)]
    for line in stage("node"):
        kind, _, rest = line.partition(" ")
        if kind == "CMD":
            commands.append([str(word) for word in yaml.YAML(typ="safe").load(rest)])
        elif kind == "HEALTHCHECK":
            commands.append([str(word) for word in yaml.YAML(typ="safe").load(rest.partition(" CMD ")[2])][1:])
    return commands


def parse(words: list[str]) -> str:
    """Let the command line parse these words without running anything; gives the command's name."""
    command: Any = typer.main.get_command(main.app)
    path = []
    while hasattr(command, "commands"):
        path.append(words[0])
        command, words = command.get_command(command.make_context("", [], resilient_parsing=True), words[0]), words[1:]
        assert command is not None, f"there is no command {' '.join(path)!r}"
    command.make_context(" ".join(path), list(words))
    return " ".join(path)


def waits_for(service: str) -> set[str]:
    """All that is healthy before a service starts."""
    direct = set(SERVICES[service].get("depends_on", ()))
    return direct.union(*(waits_for(name) for name in direct))


def test_the_compose_file_is_one_by_the_schema_of_its_specification() -> None:
    pytest.importorskip("check_jsonschema", reason="brings the schema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_the_image_is_built_from_exists_and_is_not_left_out() -> None:
    ignored, *rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[1:]
    assert ignored == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source for line in stage("builder") if line.startswith("COPY ") for source in line.split()[1:-1] if source
    }
    assert kept == copied
    assert all((ROOT / source).exists() for source in copied)
    assert not [rule for rule in rules if rule[0] != "!" and any(fnmatch(name, rule) for name in copied)]


def test_the_image_holds_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {source for line in stage("builder") if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert {Path(folder).parts[0] for folder in project["tool"]["setuptools"]["package-dir"].values()} <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"} <= copied


def test_a_node_in_a_container_is_not_root_and_has_no_compiler() -> None:
    lines = stage("node")
    assert "USER 10001:10001" in lines
    assert 'ENTRYPOINT ["shoal"]' in lines
    assert "VOLUME /data" in lines
    assert not [line for line in lines if "build-essential" in line or "-dev" in line]
    assert not [name for name in NODES if "user" in SERVICES[name]]


def test_every_command_in_them_is_one_that_the_command_line_has() -> None:
    names = [parse(words) for words in shoal_commands()]
    assert {"up", "status", "peers", "swarm create", "join"} == set(names)
    assert names.count("up") == len(NODES) + 1, "each node's, and the image's own"


@pytest.mark.parametrize(("service", "text"), shell_lines())
def test_every_script_is_one_to_the_shell(service: str, text: str) -> None:
    done = subprocess.run(["sh", "-n", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{service}: {done.stderr}"


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_limited_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) == ([] if name in NODES else ["NET_ADMIN"])
    assert not {"privileged", "ports", "devices", "pid", "ipc"} & set(service)


def test_a_node_behind_a_nat_has_no_other_way_out() -> None:
    subnets = {
        name: ipaddress.ip_network(network["ipam"]["config"][0]["subnet"])
        for name, network in COMPOSE["networks"].items()
    }
    for network in COMPOSE["networks"].values():
        assert network["driver_opts"] == {"com.docker.network.bridge.enable_ip_masquerade": "false"}
    for router in ROUTERS:
        ours = SERVICES[router]["networks"]
        (lan,) = set(ours) - {"internet"}
        assert SERVICES[router]["environment"]["LAN"] == str(subnets[lan])
        assert all(ipaddress.ip_address(at["ipv4_address"]) in subnets[name] for name, at in ours.items())
        for node in (node for node, home in HOME.items() if home == router):
            assert SERVICES[node]["network_mode"] == f"service:{node}-net"
            assert SERVICES[f"{node}-net"]["networks"] == [lan]
            assert SERVICES[f"{node}-net"]["environment"]["ROUTER"] == ours[lan]["ipv4_address"]
            assert {router, f"{node}-net", "relay"} <= waits_for(node)
    assert list(SERVICES["relay"]["networks"]) == ["internet"]


def test_whoever_reads_what_another_writes_waits_for_it() -> None:
    for name in NODES:
        read = set(re.findall(r"cat (/shared/\w+)", script(name)))
        for path in read:
            (writer,) = [other for other in NODES if re.search(rf"mv \S+ {path}\b", script(other))]
            assert writer in waits_for(name)
            assert f"test -s {path}" in SERVICES[writer]["healthcheck"]["test"][1]
            assert "shared:/shared" in SERVICES[writer]["volumes"]
    assert {volume.partition(":")[0] for name in NODES for volume in SERVICES[name]["volumes"]} == set(
        COMPOSE["volumes"]
    )


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="needs root and nft to load packet filters")
def test_a_router_loads_its_rules_and_loads_them_again(router: str) -> None:
    loads = script(router).replace("exec sleep infinity", "")
    command = ["unshare", "--net", "sh", "-euc", f"{loads}\n{loads}\nnft list table ip router"]
    environment = os.environ | SERVICES[router]["environment"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lan = SERVICES[router]["environment"]["LAN"]
    assert done.stdout.count(f"ip saddr {lan} ip daddr != {lan} masquerade") == 1
