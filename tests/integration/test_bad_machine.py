"""Machines that are not as they should be: one clear line, the documented exit code, nothing lost."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

SHOAL = [sys.executable, "-m", "shoal.cli.main"]
LOOPBACK = ("--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")


def shoal(home, *words, **environment):
    return subprocess.run(
        [*SHOAL, *words],
        env=os.environ | {"SHOAL_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_one_line(done, code, *words):
    assert done.returncode == code, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_home_that_cannot_be_written_is_one_line():
    assert_one_line(shoal("/proc/shoal", "up", "-d", *LOOPBACK), 1, "/proc/shoal")


@pytest.fixture
def small_disk(tmp_path):
    """A file system that is soon full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    shoal(folder, "down")
    (folder / "filler").unlink(missing_ok=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 1024):
                pass
        except OSError:
            return


def test_a_full_disk_is_one_line_when_a_node_starts(small_disk):
    fill(small_disk)
    assert_one_line(shoal(small_disk, "up", "-d", *LOOPBACK), 1, "no space left", str(small_disk))


def test_a_disk_that_fills_up_refuses_a_new_run_and_the_node_lives_on(small_disk):
    assert shoal(small_disk, "up", "-d", *LOOPBACK).returncode == 0
    fill(small_disk)
    refused = shoal(small_disk, "swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo")
    assert_one_line(refused, 1, "full")
    assert json.loads(shoal(small_disk, "status", "--json").stdout)["swarms"] == []
    (small_disk / "filler").unlink()
    assert shoal(small_disk, "status").returncode == 0


def test_without_the_train_extra_a_node_says_how_to_get_it_and_can_still_store(tmp_path):
    blocker = tmp_path / "site"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys

            class NoTorch:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] == "torch":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, NoTorch())
            """
        )
    )
    bare = {"PYTHONPATH": os.pathsep.join([str(blocker), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}
    learner, storage = tmp_path / "learner", tmp_path / "bare"
    try:
        assert shoal(learner, "up", "-d", *LOOPBACK).returncode == 0
        assert shoal(storage, "up", "-d", *LOOPBACK, **bare).returncode == 0
        create = ("swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo")
        assert_one_line(shoal(storage, *create, **bare), 1, "shoal[train]")
        created = json.loads(shoal(learner, *create, "--target-return", "100000", "--json").stdout)
        assert_one_line(shoal(storage, "join", created["ticket"], "-d", "--role", "learner", **bare), 1, "shoal[train]")
        joined = shoal(storage, "join", created["ticket"], "-d", "--json", **bare)
        assert json.loads(joined.stdout)["role"] == "storage"

        assert shoal(learner, "down").returncode == 0
        assert shoal(learner, "up", "-d", *LOOPBACK, **bare).returncode == 0
        (run,) = json.loads(shoal(learner, "swarm", "ls", "--json").stdout)
        assert run["phase"] == "failed"
        shown = json.loads(shoal(learner, "swarm", "show", created["swarm"], "--json").stdout)
        assert "shoal[train]" in shown["error"]
        assert shoal(learner, "down").returncode == 0
        assert shoal(learner, "up", "-d", *LOOPBACK).returncode == 0
        (run,) = json.loads(shoal(learner, "swarm", "ls", "--json").stdout)
        assert run["phase"] != "failed", "with the packages back, the run goes on"
    finally:
        for home in (learner, storage):
            shoal(home, "down")
