"""`shoal sim` ends with one line of exact keys, needs no node and no PyTorch, and gives the same for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shoal.cli import main

KEYS = [
    "peers",
    "epochs",
    "agreed",
    "epochs_per_hour",
    "wait_ratio",
    "messages_per_announcement",
    "bytes_per_peer_per_epoch",
    "lost_s_per_kill",
    "seconds",
]
SMALL = ["sim", "--peers", "4", "--epochs", "3"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    assert main.run([*SMALL, *arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    answer: dict[str, float] = json.loads(lines[0])
    return answer


def test_json_is_one_line_of_exactly_these_keys(capsys: pytest.CaptureFixture[str]) -> None:
    answer = told(capsys)
    assert list(answer) == KEYS
    assert answer["peers"] == 4
    assert answer["epochs"] >= 3
    assert answer["agreed"] == 1.0


def test_the_same_seed_gives_the_same_and_another_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    faults = ["--loss", "0.05", "--late", "1", "--liars", "0.25", "--kills-per-hour", "100", "--seed", "7"]
    first = told(capsys, *faults)
    assert told(capsys, *faults) == first
    assert told(capsys, *faults[:-1], "8") != first


def test_people_get_a_table_with_what_each_figure_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [key.replace("_", " ") for key in KEYS]
    assert "same policy" in lines[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sim"], "--peers"),
        (["sim", "--peers", "0"], "peers must be between 1 and 20000"),
        (["sim", "--peers", "many"], "--peers"),
        (["sim", "--peers", "4", "--epochs", "0"], "epochs must be"),
        (["sim", "--peers", "4", "--loss", "1.5"], "loss must be"),
        (["sim", "--peers", "4", "--loss", "nan"], "loss must be"),
        (["sim", "--peers", "4", "--late", "5"], "late must be between 0 and 4"),
        (["sim", "--peers", "4", "--liars", "0.9"], "liars must be"),
        (["sim", "--peers", "4", "--kills-per-hour", "-1"], "kills per hour must be"),
        (["sim", "--peers", "4", "--seed", "-1"], "seed must be"),
    ],
)
def test_a_bad_value_is_refused_with_a_clear_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    assert says in capsys.readouterr().err


def test_it_needs_no_torch_and_no_other_command_pays_for_it() -> None:
    code = (
        "import sys; from shoal.cli import main; assert 'shoal.training.sim' not in sys.modules;"
        "main.run(['sim', '--peers', '2', '--epochs', '1', '--json']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
