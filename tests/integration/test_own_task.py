"""What `shoal new task` makes is learned by two nodes as it is, and what they learned plays and is taken home."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The task of a package that `shoal new task` made, installed for all that this test starts."""
    from shoal.cli import main

    folder = tmp_path / "small_walk"
    assert main.run(["new", "task", str(folder), "--json"]) == 0
    about = folder / "small_walk-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: small_walk\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("[shoal.environments]\nSmallWalk-v0 = small_walk:register\n")
    assert '"SmallWalk-v0" = "small_walk:register"' in (folder / "pyproject.toml").read_text()
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(folder) + (os.pathsep + path if path else ""))
    return "gym:SmallWalk-v0"


def test_two_nodes_learn_a_task_of_ones_own_and_its_policy_is_taken_home(make_node, package, tmp_path):
    creator, other = make_node(), make_node()
    words = ("--task", package, "--env-set", "length=4", "--min-learners", "2", "--eval-interval", "1")
    created = creator.ask("swarm", "create", *words, "--target-return", "0.9")
    other.ask("join", created["ticket"], "-d")
    ends = [
        node.wait_for(created["swarm"], "it is solved", lambda shown: shown["phase"] == "done")
        for node in (creator, other)
    ]
    for end in ends:
        assert end["solved"]
        assert end["env_arguments"] == {"length": 4}
    assert ends[0]["digest"] == ends[1]["digest"]
    published = creator.ask("model", "publish", created["swarm"][:20], "--name", "walk")
    named = f"{published['owner']}/walk"
    assert [each["cid"] for each in other.ask("model", "search", package)] == [published["cid"]]
    assert min(other.ask("play", named, "--episodes", "3")["returns"]) >= 0.9
    unknown = other.run("play", f"{published['owner']}/run", check=False)
    assert unknown.returncode == 4, unknown.stderr
    pytest.importorskip("PIL", reason="the play extra brings Pillow")
    out = tmp_path / "walk.gif"
    played = other.ask("play", created["swarm"][:20], "--episodes", "3", "--out", str(out))
    assert min(played["returns"]) >= 0.9
    assert out.read_bytes().startswith(b"GIF8")
    pytest.importorskip("onnx", reason="the export extra brings it")
    told = other.ask("export", str(Path(ends[1]["results"]) / "policy.safetensors"), "--to", str(tmp_path / "x.onnx"))
    assert (tmp_path / "x.onnx").exists()
    assert told["task"] == package


def test_a_run_that_goes_on_plays_and_is_exported(make_node, tmp_path):
    """By what its node holds now."""
    node = make_node()
    created = node.ask("swarm", "create", "--task", "gym:CartPole-v1", "--target-return", "100000")
    swarm = created["swarm"]
    node.wait_for(swarm, "it has learned something", lambda shown: shown["epoch"] >= 1)
    assert node.ask("play", swarm[:20], "--episodes", "2")["out"] is None
    pytest.importorskip("onnx", reason="the export extra brings it")
    node.ask("export", swarm[:20], "--to", str(tmp_path / "x.onnx"))
    assert (tmp_path / "x.onnx").exists()
    assert node.ask("swarm", "show", swarm)["phase"] != "done"
    node.ask("leave", swarm)
