"""The command line in front of real nodes: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.spawn import wait_gone
from shoal.node.lock import lock_holder

LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns")


@dataclass(frozen=True)
class Shoal:
    """Runs ``shoal`` under a home of its own."""

    home: Path

    def __call__(self, *words: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", *words],
            env=os.environ | {"SHOAL_HOME": str(self.home)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def json(self, *words: str) -> Any:
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def fails(self, code: int, *words: str) -> str:
        """Run a command that ends with ``code``; gives its one line."""
        done = self(*words, "--json")
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        error = json.loads(done.stdout.splitlines()[-1])["error"]
        assert error["code"] == code
        assert done.stderr == f"shoal: {error['message']}\n"
        return str(error["message"])


@pytest.fixture
def shoal(tmp_path: Path) -> Iterator[Shoal]:
    shoal = Shoal(tmp_path / "home")
    yield shoal
    for profile in (shoal.home / "profiles").glob("*"):
        assert shoal("down", "--profile", profile.name).returncode in (0, 3)


def test_a_node_starts_in_the_background_shows_itself_and_stops(shoal: Shoal) -> None:
    ready = shoal.json("up", "-d", *LOCAL)
    assert set(ready) == {"peer_id", "addresses", "api", "pid", "profile"}
    status = shoal.json("status")
    assert status["peer_id"] == ready["peer_id"]
    assert {"addresses", "num_peers", "swarms", "uptime_s", "alone"} <= set(status)
    assert status["addresses"] == ready["addresses"]
    assert all(address.endswith(f"/p2p/{ready['peer_id']}") for address in ready["addresses"])
    assert shoal.json("peers") == []
    assert shoal.json("swarm", "ls") == []
    assert shoal("status").returncode == 0

    assert f"pid {ready['pid']}" in shoal.fails(5, "up", *LOCAL)
    assert f"pid {ready['pid']}" in shoal.fails(5, "up", "-d", *LOCAL)

    assert shoal.json("down")["pid"] == ready["pid"]
    assert lock_holder(shoal.home / "profiles" / "default" / "lock") is None
    shoal.fails(3, "status")

    limits = ("--max-disk", "2", "--max-upload", "16")
    assert shoal.json("up", "-d", *LOCAL, *limits)["peer_id"] == ready["peer_id"]  # its name outlives it
    use = shoal.json("status")["use"]
    assert (use["max_disk_bytes"], use["max_upload_bytes_per_s"]) == (2_000_000_000, 2_000_000.0)
    assert use["max_download_bytes_per_s"] is None
    assert 0 < use["disk_bytes"] < 1_000_000
    assert (use["upload_bytes"], use["download_bytes"]) == (0, 0)
    assert "--max-upload 1," in shoal.fails(2, "up", "--max-upload", "0.1")


def test_two_nodes_meet_by_bootstrap_on_two_addresses(shoal: Shoal) -> None:
    first = shoal.json("up", "-d", "--profile", "a", *LOCAL, "--listen", "/ip4/127.0.0.2/tcp/0")
    assert len(first["addresses"]) == 2
    second = shoal.json("up", "-d", "--profile", "b", *LOCAL, "--bootstrap", first["addresses"][1])
    assert second["peer_id"] != first["peer_id"]


@pytest.mark.parametrize("detach", [[], ["-d"]], ids=["foreground", "background"])
def test_a_port_in_use_is_one_line(shoal: Shoal, detach: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in shoal.fails(1, "up", *detach, "--no-mdns", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
        assert str(port) in shoal.fails(1, "up", *detach, *LOCAL, "--api-port", str(port))


def test_a_damaged_identity_is_one_line(shoal: Shoal) -> None:
    key = shoal.home / "profiles" / "default" / "identity.key"
    key.parent.mkdir(parents=True, mode=0o700)
    key.write_bytes(b"short")
    key.chmod(0o600)
    assert "damaged" in shoal.fails(1, "up", "-d", *LOCAL)


def test_what_makes_no_sense_to_a_running_node_is_one_line(shoal: Shoal) -> None:
    shoal.json("up", "-d", *LOCAL)
    for complaint, words in (
        ("Nope-v9", ["swarm", "create", "--task", "gym:Nope-v9"]),
        ("scheme", ["swarm", "create", "--task", "CartPole-v1"]),
        ("alchemy", ["swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "alchemy"]),
        ("bogus", ["swarm", "create", "--task", "gym:CartPole-v1", "--set", "bogus=1"]),
        ("batch size", ["swarm", "create", "--task", "gym:CartPole-v1", "--batch-size", "0"]),
        ("in no swarm", ["swarm", "show"]),
        ("in no swarm", ["watch", "bagaq"]),
        ("in no swarm", ["leave", "bagaq"]),
        ("not a ticket", ["join", "bagaq"]),
    ):
        assert complaint in shoal.fails(2, *words)
    assert shoal.json("swarm", "ls") == []


def test_a_killed_node_is_no_daemon_and_starts_again(shoal: Shoal) -> None:
    pid = shoal.json("up", "-d", *LOCAL)["pid"]
    os.kill(pid, 9)
    assert wait_gone(pid, 10)
    shoal.fails(3, "status")
    assert shoal.json("up", "-d", *LOCAL)["pid"] != pid


def test_a_run_that_nobody_joined_ends_with_4(shoal: Shoal) -> None:
    shoal.json("up", "-d", *LOCAL)
    create = ["swarm", "create", "--task", "gym:CartPole-v1", "--target-return", "15", "--batch-size", "256"]
    swarm = shoal.json(*create)["swarm"]
    assert "ALONE" in shoal.fails(4, "watch", swarm[:20])
    detail = shoal.json("swarm", "show", swarm[:20])
    assert detail["phase"] == "done"
    assert detail["trained_alone"] is True
    assert {"epoch", "return", "env_steps", "members", "digest", "alone"} <= set(detail)
    assert {"policy_loss", "value_loss", "entropy", "clip_fraction"} <= set(detail["metrics"])
    assert shoal("watch").returncode == 4
    assert shoal.json("leave", swarm) == {"swarm": swarm, "left": True}


@pytest.mark.parametrize("algorithm", ["a2c", "reinforce", "vtrace"])
def test_every_algorithm_learns_on_a_node_and_tells_its_losses(shoal: Shoal, algorithm: str) -> None:
    shoal.json("up", "-d", *LOCAL)
    create = ["swarm", "create", "--task", "gym:CartPole-v1", "--target-return", "30", "--batch-size", "512"]
    swarm = shoal.json(*create, "--algorithm", algorithm)["swarm"]
    assert "ALONE" in shoal.fails(4, "watch", swarm)
    detail = shoal.json("swarm", "show", swarm)
    assert (detail["phase"], detail["solved"], detail["algorithm"]) == ("done", True, algorithm)
    assert {"policy_loss", "value_loss", "entropy", "gradient_norm"} <= set(detail["metrics"])


def test_output_into_a_closed_pipe_is_no_traceback(shoal: Shoal) -> None:
    command = f"{sys.executable} -m shoal.cli.main --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
