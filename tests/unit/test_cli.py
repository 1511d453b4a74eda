"""Every failure of the command line is one clear line and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from shoal.cli import main, render
from shoal.cli.common import hyperparameters
from shoal.cli.spawn import kill_tree, wait_gone
from shoal.node.api.schemas import CurvePoint, MemberInfo, NodeInfo, PeerInfo, SwarmDetail
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import SwarmId
from shoal.protocol.signing import Signer
from shoal.training.keeper import descendants
from shoal.training.manifest import LOOP_MAX_SAMPLES

ME, OTHER = (Signer(bytes([seed]) * 32).peer_id for seed in (1, 2))
SWARM = SwarmId.of_manifest(b"one")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SHOAL_PROFILE", raising=False)
    monkeypatch.delenv("SHOAL_DEBUG", raising=False)
    return tmp_path / "home"


BAD = [
    (["bogus"], 2, "No such command"),
    (["up", "--bogus"], 2, "No such option"),
    (["up", "--listen", "nonsense"], 2, "not a multiaddr"),
    (["up", "-d", "--listen", "/ip4/1.2.3.4"], 2, "cannot listen on"),
    (["up", "--bootstrap", "/ip4/1.2.3.4/tcp/1"], 2, "whom to expect"),
    (["up", "--api-port", "70000"], 2, "not a TCP port"),
    (["up", "--api-port", "x"], 2, "'--api-port'"),
    (["status", "--profile", "../x"], 2, "profile name"),
    (["status"], 3, "shoal up"),
    (["peers"], 3, "shoal up"),
    (["down"], 3, "shoal up"),
    (["status", "--profile", "lab"], 3, "shoal up --profile lab"),
    (["swarm", "ls"], 3, "shoal up"),
    (["swarm", "show"], 3, "shoal up"),
    (["swarm", "create", "--task", "gym:CartPole-v1"], 3, "shoal up"),
    (["swarm", "create"], 2, "--task"),
    (["swarm", "create", "--task", "gym:CartPole-v1", "--mode", "psychic"], 2, "psychic"),
    (["swarm", "create", "--task", "gym:CartPole-v1", "--batch-size", "many"], 2, "'--batch-size'"),
    (["swarm", "create", "--task", "gym:CartPole-v1", "--set", "lr"], 2, "key=value"),
    (["leave", "bafy"], 3, "shoal up"),
    (["leave"], 2, "Missing argument"),
    (["watch"], 3, "shoal up"),
    (["join"], 2, "Missing argument"),
    (["join", "nonsense"], 2, "not a ticket"),
    (["join", "shoal1aaaaaaaa"], 2, "damaged"),
    (["join", "shoal1aaaaaaaa", "--role", "king"], 2, "king"),
    (["demo", "--peers", "0"], 2, "--peers"),
    (["demo", "--peers", "1", "--kill-one"], 2, "at least 2 peers"),
]


@pytest.mark.parametrize(("words", "code", "complaint"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_bad_input_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], home: Path, words: list[str], code: int, complaint: str
) -> None:
    assert main.run(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("shoal: ")
    assert complaint in err
    assert not home.exists()  # nothing was changed

    assert main.run([*words, "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"code": code, "message": err.removeprefix("shoal: ").rstrip("\n")}}


def test_an_unforeseen_failure_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError("boom\nand more")

    monkeypatch.setattr("shoal.cli.common.check_profile", fail)
    assert main.run(["status"]) == 1
    assert re.fullmatch(
        r"shoal: unexpected ZeroDivisionError: boom and more; .*SHOAL_DEBUG=1.*\n", capsys.readouterr().err
    )
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.run(["status"])


def test_a_home_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    home.write_text("a file where the folder should be")
    for words in (["up", "-d"], ["up"]):
        assert main.run(words) == 1
        assert re.fullmatch(r"shoal: .*cannot be written.*SHOAL_HOME.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("words", [[], ["--help"], ["swarm"], ["up", "--help"], ["demo", "-h"]])
def test_help_is_no_failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main.run(words) == 0
    out, err = capsys.readouterr()
    assert "Usage:" in out
    assert err == ""


def test_every_command_of_the_contract_takes_a_profile_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    commands = "up, down, status, peers, swarm create, swarm ls, swarm show, join, leave, watch, demo"
    for command in commands.split(", "):
        assert main.run([*command.split(), "--help"]) == 0
        page = ANSI.sub("", capsys.readouterr().out)
        assert "--json" in page, command
        assert "--profile" in page, command


def test_the_command_starts_without_the_heavy_packages() -> None:
    program = (
        "import sys, shoal.cli.main; print(*{'fastapi', 'libp2p', 'hypercorn', 'trio', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_settings_are_read_as_what_they_look_like() -> None:
    settings = ["lr=1e-3", "layers=[64, 64]", "n=4", "on=true", "kind=tanh", "eq=a=b"]
    expected = {"lr": 1e-3, "layers": [64, 64], "n": 4, "on": True, "kind": "tanh", "eq": "a=b"}
    assert hyperparameters(settings) == expected
    for wrong in ("lr", "=1", "lr="):
        with pytest.raises(UsageError, match="key=value"):
            hyperparameters([wrong])


def test_a_process_is_killed_with_all_that_descend_from_it() -> None:
    # A shell, its child, and the child's child, each of which waits for the next.
    with subprocess.Popen(["sh", "-c", "sh -c 'sleep 60; :'; :"], stdout=subprocess.DEVNULL) as top:
        deadline = time.monotonic() + 10
        while len(family := descendants(top.pid)) < 2 and time.monotonic() < deadline:
            os.sched_yield()
        assert len(family) == 2
        assert not wait_gone(family[-1], 0)
        kill_tree(top.pid)
        assert top.wait() == -signal.SIGKILL
        assert all(wait_gone(pid, 5) for pid in family)


def detail(**changes: object) -> SwarmDetail:
    fields: dict[str, object] = {
        "swarm": SWARM, "task": "gym:CartPole-v1", "algorithm": "ppo", "role": "learner", "phase": "collecting",
        "epoch": 7, "mean_return": 123.4, "target_return": 475.0, "env_steps": 14000, "mode": "local", "owner": OTHER,
        "max_env_steps": 100_000, "batch_size": 2048, "steps_per_s": 2500.0,
        "members": [
            MemberInfo(peer_id=ME, role="learner", is_self=True, env_steps=9000, share=0.64, samples=1000),
            MemberInfo(peer_id=OTHER, role="learner", live=False, env_steps=5000, share=0.36),
        ],
        "curve": [CurvePoint(epoch=e, env_steps=e * 2000, mean_return=e * 20.0) for e in (2, 4, 6)],
    }  # fmt: skip
    return SwarmDetail.model_validate(fields | changes)


def printed(what: object, width: int = 80) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    with console.file:
        console.print(what)
        return console.export_text()


def test_a_run_that_waits_for_a_training_loop_says_so() -> None:
    waiting = {"loop_socket": "/x/loop.sock", "phase": "starting"}
    assert "no training loop is attached" in printed(render.swarm(detail().model_copy(update=waiting)))
    attached = waiting | {"phase": "collecting"}
    assert "no training loop" not in printed(render.swarm(detail().model_copy(update=attached)))


def test_a_run_without_end_does_not_name_one() -> None:
    assert render.ENDLESS_STEPS == LOOP_MAX_SAMPLES
    assert "of 1,0" in printed(render.swarm(detail().model_copy(update={"max_env_steps": 1000})))
    assert "of 1,1" not in printed(render.swarm(detail().model_copy(update={"max_env_steps": LOOP_MAX_SAMPLES})))


def test_the_view_of_a_run_fits_into_80_columns_and_shows_what_matters() -> None:
    text = printed(render.swarm(detail()))
    for word in ("123.4 of 475.0", "14,000 of 100,000", "2,500", render.short_peer(ME), "you", "gone", "64%", "█"):
        assert word in text
    assert "ALONE" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\n│ +│\n│ +[a-z]+ +│", text)  # no cell was broken over two lines


def test_being_alone_is_loud() -> None:
    assert "ALONE" in printed(render.swarm(detail(alone=True)))
    assert "ALONE" in render.plain_line(detail(alone=True))
    assert "ALONE" in printed(render.swarms([detail(alone=True)]))
    assert "ALONE" in printed(render.swarm(detail(phase="done", alone=True, trained_alone=True)))
    assert "ALONE" not in printed(render.swarm(detail(phase="done", alone=True)))
    info = NodeInfo(
        peer_id=ME, addresses=[], profile="p", pid=1, version="0", uptime_s=3, num_peers=0, alone=True, can_train=False
    )
    text = printed(render.status(info, []))
    assert "ALONE" in text
    assert "shoal[train]" in text


@pytest.mark.parametrize("curve", [[], [-200.0], [-200.0, -150.0, 0.0], [0.0, 0.0], [1e9]])
def test_any_curve_can_be_drawn(curve: list[float]) -> None:
    points = [CurvePoint(epoch=i, env_steps=i * 10, mean_return=value) for i, value in enumerate(curve)]
    for target in (None, 0.0, -100.0, 475.0):
        assert printed(render.swarm(detail(curve=points, target_return=target)))


def test_text_of_others_is_not_taken_for_markup() -> None:
    peer = PeerInfo(peer_id=OTHER, path="direct", address="[bold]x[/nonsense]")
    assert "[bold]x[/nonsense]" in printed(render.peers([peer]))
    assert "[/red]" in printed(render.swarm(detail(name="[/red]", error="[/red]")))


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (61, "1m01s"), (3725, "1h02m")])
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize("thread_is_daemon", [True, False])
def test_a_process_that_ends_at_once_says_all_and_waits_for_what_runs(tmp_path: Path, thread_is_daemon: bool) -> None:
    program = f"""
        import atexit, sys, threading
        from shoal.cli import main
        def late():
            threading.main_thread().join()
            print("the thread has ended")
        threading.Thread(target=late, daemon={thread_is_daemon}).start()
        atexit.register(print, "said at exit")
        sys.argv = ["shoal", "status", "--json"]
        main.main()
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
    environment = os.environ | {"SHOAL_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    error, *rest = done.stdout.splitlines()
    assert done.returncode == json.loads(error)["error"]["code"] == 3
    assert rest == (["said at exit"] if thread_is_daemon else ["the thread has ended", "said at exit"])
    assert "no node is running" in done.stderr
