"""What `shoal new` makes is found by Shoal, and keeps what its own tests promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shoal.cli import main


def installed(folder: Path) -> dict[str, str]:
    """An environment of processes that find a package as if pip had installed it."""
    about = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{about['name']}-{about['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    lines = []
    for group, entries in about["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [("task", "gym:MyOwn-v0", "summary"), ("algorithm", "my_own", "settings"), ("recipe", "my_own", "claim")],
)
def test_a_package_runs_as_it_is(
    kind: str, name: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my_own"
    assert main.run(["new", kind, str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told[kind]) == (str(folder), name)
    assert sorted(told["files"]) == ["README.md", "my_own/__init__.py", "pyproject.toml", "tests/test_my_own.py"]
    assert not any(word in (folder / path).read_text() for path in told["files"] for word in ("NAME", "ENV_ID"))
    environment = installed(folder)
    pytests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(pytests, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    program = "import sys; from shoal.cli import main; sys.exit(main.run(sys.argv[1:]))"
    for words in ([kind, "ls"], [kind, "show", name]):
        shown = subprocess.run(
            [sys.executable, "-c", program, *words, "--json"], env=environment, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        found = json.loads(shown.stdout)
        assert name in [each["name"] for each in found] if words[1] == "ls" else found[key]


@pytest.mark.parametrize(
    ("name", "words"), [("9x", "no package's name"), ("Big", "no package's name"), ("full", "there")]
)
@pytest.mark.parametrize("kind", ["task", "algorithm", "recipe"])
def test_a_package_that_cannot_be_is_one_line(
    kind: str, name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main.run(["new", kind, str(tmp_path / name), "--json"]) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]
