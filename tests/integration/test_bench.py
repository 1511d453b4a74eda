"""``shoal bench`` between real nodes: what it tells, and how it ends when it cannot measure."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import SHOAL, Node

FIGURES = {"calls_per_s", "mb_per_s", "p50_ms", "p99_ms", "cpu_s_per_gb", "path", "secure", "transport", "security"}


def bench(home: Path, *words: str) -> dict[str, Any]:
    command = [*SHOAL, "bench", *words, "--seconds", "0.3", "--json"]
    done = subprocess.run(
        command, env=os.environ | {"SHOAL_HOME": str(home)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    figures: dict[str, Any] = json.loads(line)
    return figures


@pytest.mark.parametrize(
    ("transport", "carrier", "security"), [("auto", "lane", "tls1.3"), ("libp2p", "libp2p", "noise")]
)
def test_calls_are_measured_between_two_nodes_of_its_own(
    tmp_path: Path, transport: str, carrier: str, security: str
) -> None:
    figures = bench(tmp_path, "rpc", "--size", "4KiB", "--concurrency", "8", "--transport", transport)
    assert figures.keys() >= FIGURES
    assert figures["calls_per_s"] > 0
    assert figures["mb_per_s"] == pytest.approx(figures["calls_per_s"] * 2 * 4096 / 1e6, rel=0.01)
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]
    assert (figures["path"], figures["secure"]) == ("direct", True)
    assert (figures["transport"], figures["security"]) == (carrier, security)
    assert not (tmp_path / "profiles").exists(), "the nodes of a measurement are nobody's profile"


@pytest.mark.parametrize(("transport", "carrier"), [("auto", "lane"), ("libp2p", "libp2p")])
def test_a_transfer_is_measured_and_costs_no_memory_beyond_its_buffer(
    tmp_path: Path, transport: str, carrier: str
) -> None:
    figures = bench(tmp_path, "stream", "--size", "64MB", "--transport", transport)
    assert figures.keys() >= FIGURES
    assert figures["transport"] == carrier
    assert figures["mb_per_s"] > 0
    assert max(figures["sender_memory_mb"], figures["receiver_memory_mb"]) < 64


def test_small_calls_are_measured_beside_a_transfer(tmp_path: Path) -> None:
    figures = bench(tmp_path, "load", "--size", "32MB")
    assert figures["calls"] > 0
    assert figures["ratio_p99"] > 0
    assert figures["transfer_mb_per_s"] > 0


def test_a_connected_peer_is_measured_if_it_lets_itself_be(make_node: Callable[..., Node]) -> None:
    willing = make_node("--serve-bench")
    unwilling = make_node("--bootstrap", willing.info["addresses"][0])
    unwilling.wait_until_connected()
    quick = ("--seconds", "0.2", "--json")

    asked = unwilling.run("bench", "rpc", "--peer", willing.peer_id, *quick)
    assert json.loads(asked.stdout)["calls_per_s"] > 0
    by_beginning = unwilling.run("bench", "stream", "--size", "1MB", "--peer", willing.peer_id[:-3], *quick)
    assert json.loads(by_beginning.stdout)["mb_per_s"] > 0

    refused = willing.run("bench", "rpc", "--peer", unwilling.peer_id, *quick, check=False)
    assert refused.returncode == 5
    assert "--serve-bench" in refused.stderr

    unknown = willing.run("bench", "rpc", "--peer", "12D3KooWnobody", *quick, check=False)
    assert unknown.returncode == 2
    assert "shoal peers" in unknown.stderr

    metrics = unwilling.metrics()
    assert metrics.called["bench.echo"].calls > 0
    assert metrics.called["bench.echo"].p50_ms <= metrics.called["bench.echo"].p99_ms
    assert willing.metrics().served["bench.echo"].request_bytes > 0
    assert unwilling.metrics().served["bench.echo"].errors["PERMISSION_DENIED"] > 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("rpc", "--size", "12 parsecs"), 2),
        (("rpc", "--size", "2MB"), 2),
        (("rpc", "--transport", "pigeon"), 2),
        (("stream", "--size", "0"), 2),
        (("stream", "--size", "1TB"), 2),
        (("rpc", "--concurrency", "0"), 2),
        (("rpc", "--peer", "12D3KooW"), 3),
    ],
)
def test_what_makes_no_sense_ends_with_one_line(tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    done = subprocess.run(
        [*SHOAL, "bench", *words],
        env=os.environ | {"SHOAL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("shoal: ")


def test_an_actor_is_measured_alone_and_without_torch(tmp_path: Path) -> None:
    figures = bench(tmp_path, "actor", "--task", "gym:CartPole-v1")
    assert figures["env_steps_per_s"] > 0
    assert 0 < figures["bytes_per_step"] < 100
    assert 0 < figures["memory_mb"] < 300
    assert not list(tmp_path.iterdir()), "acting alone starts no node"


@pytest.mark.parametrize(
    ("words", "said"), [(("--task", "gym:Nope-v1"), "Nope"), (("--algorithm", "sac"), "nobody can act")]
)
def test_what_nobody_can_act_for_is_said(tmp_path: Path, words: tuple[str, str], said: str) -> None:
    done = subprocess.run(
        [*SHOAL, "bench", "actor", *words],
        env=os.environ | {"SHOAL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
