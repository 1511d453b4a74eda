"""The main job, as a newcomer runs it."""

import json
import os
import subprocess
import sys

SHOAL = [sys.executable, "-m", "shoal.cli.main"]


def test_the_demo_solves_its_task_though_a_node_is_killed_and_leaves_nothing_behind(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [*SHOAL, "demo", "--kill-one", "--json", "--out", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["solved"] is True
    assert result["return"] >= 475
    assert result["peers"] == 3
    assert result["killed"] not in result["digests"]
    assert len(result["digests"]) == 2
    assert len(set(result["digests"].values())) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"curve.png", "policy.safetensors", "result.json"}
    assert list((tmp_path / "tmp").iterdir()) == []
