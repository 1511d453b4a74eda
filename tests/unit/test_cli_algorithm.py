"""`shoal algorithm` tells what is installed to learn by, with every setting, its default and the paper."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.settings import plain_default

OURS = ["a2c", "dqn", "ppo", "reinforce", "sac", "vtrace"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main.run(["algorithm", *arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_all_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in told(capsys, "ls")}
    assert set(OURS) <= set(rows)
    for name in OURS:
        assert list(rows[name]) == ["name", "summary", "paper", "version"]
        assert rows[name]["summary"]
        assert rows[name]["paper"].startswith("https://")
        assert rows[name]["version"] == load_algorithm(name).version


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_told_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", name)
    algorithm = load_algorithm(name)
    assert isinstance(algorithm, OnEngine)
    assert {row["name"]: row["default"] for row in shown["settings"]} == {
        each.name: plain_default(each) for each in fields(algorithm.settings)
    }
    for row in shown["settings"]:
        assert list(row) == ["name", "summary", "default", "defaults", "low", "high"]
        assert row["summary"]
    rates = next(row for row in shown["settings"] if row["name"] == "learning_rate")
    assert rates["defaults"]["mode gradient"] == algorithm.in_gradient["learning_rate"]
    assert "Deviations" in shown["about"]


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["algorithm", "ls"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in OURS)
    assert main.run(["algorithm", "show", "ppo"]) == 0
    shown = capsys.readouterr().out
    assert "clip_range" in shown
    assert "1707.06347" in shown


def test_one_that_nobody_offers_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["algorithm", "show", "pop"]) == 2
    assert "did you mean ppo" in capsys.readouterr().err


def test_one_that_cannot_be_loaded_hides_no_other(tmp_path: Path) -> None:
    about = tmp_path / "broken-1.dist-info"
    about.mkdir()
    (tmp_path / "broken.py").write_text("raise KeyError('no such thing')\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[shoal.algorithms]\nbroken = broken:Broken\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from shoal.training.algorithms.catalogue import entries\n"
        "print([each.summary for each in entries() if each.name == 'broken'], len(entries()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("[\"cannot be loaded: KeyError: 'no such thing'\"] ")
    assert int(ran.stdout.split()[-1]) > len(OURS)
