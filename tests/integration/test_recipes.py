"""Recipes among real nodes: policies of everybody's and of one's own, and nodes that are killed and come back."""

import json
import subprocess
import sys
import time

import pytest

from shoal.node.api.client import Client

GENEROUS_S = 90
TINY = {
    "policies.own.sizes.width": 16,
    "policies.own.sizes.layers": 1,
    "policies.own.warm.max_steps": 2,
    "source.per_epoch": 8,
    "source.plays": 4,
    "probes.accuracy.source.per_epoch": 8,
    "plays": 32,
}
OWN = {"policies.own.settings.prompts": 8, "policies.own.settings.plays": 4}
EVERYBODYS = {"policies.own.owner": "all", "policies.own.is_varied": "false", "policies.own.objective": "clone"}


def create(node, settings, *options):
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    sizes = ("--batch-per-learner", "32", "--eval-interval", "3", "--min-learners", "3")
    return node.ask("swarm", "create", "--task", "recipe:rlccf", *sizes, *options, *words)


def together(make_node, settings, *options):
    nodes = [make_node() for _ in range(3)]
    created = create(nodes[0], settings, *options)
    for node in nodes[1:]:
        node.ask("join", created["ticket"], "-d")
    return nodes, created["swarm"]


def authors(shown, since=0):
    return {each["author"] for each in shown["scores"] if each["epoch"] >= since}


def test_policies_that_are_each_nodes_own_learn_from_the_crowd_and_a_node_that_is_killed_comes_back_with_its_own(
    make_node,
):
    nodes, swarm = together(make_node, TINY | OWN)
    nodes[0].wait_for(swarm, "all have probed", lambda shown: len(authors(shown)) == 3)
    killed = nodes[2]
    killed.kill()
    survivors = {node.peer_id for node in nodes[:2]}
    gone_at = nodes[0].wait_for(swarm, "how far they are", lambda shown: shown["epoch"] > 0)["epoch"]
    later = nodes[0].wait_for(swarm, "they go on", lambda shown: authors(shown, gone_at + 6) == survivors)
    assert later["error"] is None
    assert list(killed.home.rglob(f"**/{killed.profile}/**/private.safetensors")), "it kept nothing of its own"
    killed.up()
    back_at = later["epoch"]
    nodes[1].wait_for(swarm, "it probes again", lambda shown: killed.peer_id in authors(shown, back_at))


@pytest.mark.parametrize("mode", ["local", "diloco"])
def test_a_policy_of_all_is_the_same_on_every_node_and_survives_a_kill(make_node, mode):
    nodes, swarm = together(make_node, TINY | EVERYBODYS, "--mode", mode)
    nodes[0].wait_for(swarm, "they learn", lambda shown: shown["epoch"] >= 3)
    nodes[2].kill()
    held = [{} for _ in nodes[:2]]  # of each, by epoch
    ends = time.monotonic() + GENEROUS_S
    while len([epoch for epoch in held[0].keys() & held[1].keys() if held[0][epoch] == held[1][epoch]]) < 3:
        assert time.monotonic() < ends, held
        for node, known in zip(nodes, held, strict=False):
            with Client(node.config.paths, node.profile) as client:
                shown = client.swarm(swarm)
            known[shown.epoch] = shown.digest
    assert all(held[0][epoch] == held[1][epoch] for epoch in held[0].keys() & held[1].keys())


def test_a_recipe_that_is_not_there_or_not_so_is_refused_with_what_could_be_meant(make_node):
    node = make_node()
    for words, reason in (
        (("--task", "recipe:rlcff"), "rlccf"),
        (("--task", "recipe:rlccf", "--algorithm", "ppo"), "recipe"),
        (("--task", "recipe:rlccf", "--set", "policies.own.sizes.widht=3"), "width"),
    ):
        failed = node.run("swarm", "create", *words, check=False)
        assert failed.returncode != 0
        assert reason in failed.stderr


def test_recipe_run_ends_with_its_verdict_and_comes_to_the_same_with_the_same_seed():
    words = [word for name, value in (TINY | OWN).items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "shoal.cli.main", "recipe", "run", "rlccf", "--peers", "2", "--epochs", "1"]
    found = []
    for _ in range(2):
        ran = subprocess.run([*command, "--seed", "5", "--json", *words], capture_output=True, text=True, check=False)
        assert ran.stdout.count("\n") == 1, ran.stderr
        said = json.loads(ran.stdout)
        assert said.keys() >= {"recipe", "verdict", "holds", "figure", "baseline", "seconds", "peers"}
        assert ran.returncode == (0 if said["holds"] else 1)
        assert "epoch 1 of 1" in ran.stderr
        found.append((said["figure"], said["baseline"], said["verdict"]))
    assert found[0] == found[1]
