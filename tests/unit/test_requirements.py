"""Who cannot compute what the others compute, does not join, and is told in one line what to update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from shoal.protocol.ids import PeerId
from shoal.training import requirements as module
from shoal.training.algorithms import load_algorithm
from shoal.training.manifest import Manifest, Role
from shoal.training.requirements import (
    EXCHANGE_VERSION,
    LOOP_VERSION,
    UnmetError,
    check_here,
    check_loaded,
    loop_requirements,
    requirements,
)
from shoal.training.tasks import load_task
from shoal.training.worker import Worker
from shoal.training.worker_calls import Open

ALICE = PeerId.of_public_key(bytes([1]) * 32)
TASK = "gym:CartPole-v1"


def run(**requires: int) -> Manifest:
    names = {name.replace("__", ":"): version for name, version in requires.items()}
    return Manifest(owner=ALICE, task=TASK, algorithm="ppo", requires=names)


def installed() -> dict[str, int]:
    return requirements("ppo", load_algorithm("ppo").version, TASK, load_task(TASK).version)


def test_who_starts_a_run_can_join_it() -> None:
    needed = installed()
    assert needed.keys() == {"exchange", "algorithm:ppo", "task:gym"}
    manifest = Manifest(owner=ALICE, task=TASK, algorithm="ppo", requires=needed)
    for role in Role:
        check_here(manifest, role)
    check_loaded(manifest, needed)
    assert Worker().open(Open(manifest, ALICE)).epoch == 0


def test_a_run_of_own_loops_needs_nothing_that_is_installed_but_the_way_to_average_them() -> None:
    manifest = Manifest(owner=ALICE, task="loop:x", algorithm="average", requires=loop_requirements())
    check_here(manifest, Role.LEARNER)
    check_loaded(manifest, loop_requirements())
    newer = replace(manifest, requires=loop_requirements() | {"loop": LOOP_VERSION + 1})
    with pytest.raises(UnmetError, match="update Shoal to join it"):
        check_here(newer, Role.STORAGE)


def check_by_a_process(algorithm: str, task: str = TASK) -> dict[str, object]:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "shoal.training.tasks", str(writer), "--", task, algorithm]
    subprocess.run(command, pass_fds=[writer], check=True)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        found: dict[str, object] = json.load(answer)
    return found


def test_the_check_that_a_node_asks_for_gives_the_installed_versions() -> None:
    assert check_by_a_process("ppo") == {"target_return": 475.0, "requires": installed(), "defaults": {}}
    assert check_by_a_process("dqn")["defaults"] == {"batch_per_learner": 256}
    assert "did you mean ppo" in str(check_by_a_process("pppo")["error"])


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("requires", "advice"),
    [
        ({"exchange": EXCHANGE_VERSION + 1}, "update Shoal"),
        ({"exchange": EXCHANGE_VERSION - 1}, "older Shoal"),
        ({"codec__zstd": 1}, "update Shoal"),
        ({"tensors": 1}, "update Shoal"),
    ],
)
def test_what_any_member_needs_is_checked_without_loading_anything(
    requires: dict[str, int], advice: str, role: Role
) -> None:
    with pytest.raises(UnmetError, match=advice) as refused:
        check_here(run(**requires), role)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["algorithm__td3", "task__atari"])
def test_a_learner_needs_what_is_named_and_a_store_does_not(name: str) -> None:
    with pytest.raises(UnmetError, match="not installed here"):
        check_here(run(**{name: 1}), Role.LEARNER)
    check_here(run(**{name: 1}), Role.STORAGE)


@pytest.mark.parametrize("name", ["algorithm:ppo", "task:gym"])
@pytest.mark.parametrize(("by", "advice"), [(1, "update Shoal"), (-1, "older Shoal")])
def test_a_worker_refuses_a_run_of_another_version_than_it_has(name: str, by: int, advice: str) -> None:
    needed = installed()
    manifest = Manifest(owner=ALICE, task=TASK, algorithm="ppo", requires=needed | {name: needed[name] + by})
    worker = Worker()
    with pytest.raises(UnmetError, match=advice) as refused:
        worker.open(Open(manifest, ALICE))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_requirement_that_nothing_loaded_answers_to_is_unmet() -> None:
    with pytest.raises(UnmetError, match="not there"):
        check_loaded(run(algorithm__dqn=1), installed())


def test_the_advice_names_the_package_that_offers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offer:
        dist = type("Dist", (), {"name": "shoal-atari"})

    def offers(**_: Any) -> list[Offer]:
        return [Offer()]

    monkeypatch.setattr(module, "entry_points", offers)
    with pytest.raises(UnmetError, match="update shoal-atari"):
        check_loaded(run(task__atari=2), {"task:atari": 1})


def test_a_recipe_says_what_its_runs_are_like_unless_they_are_asked_to_be_otherwise() -> None:
    """The fields of a manifest that a recipe has other defaults for."""
    found = check_by_a_process("recipe", "recipe:rlccf")
    assert found["target_return"] is None
    assert found["defaults"] == {"mode": "local", "batch_per_learner": 384, "eval_interval": 10, "evaluators": "all"}
