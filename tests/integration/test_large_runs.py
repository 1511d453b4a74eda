"""Runs whose arrays are so large that they are reduced part by part, among real nodes."""

import time

from shoal.node.api.client import Client

GENEROUS_S = 90

NEVER = ("--target-return", "100000", "--eval-interval", "1000", "--eval-episodes", "1")
BATCH = "2048"
"""So that an epoch takes longer than a newcomer needs to take their state, on a busy machine too."""
LARGE = ("--set", "hidden_sizes=[512,512]", "--set", "update_epochs=1", "--set", "num_minibatches=2")
"""Parameters and both of Adam's moments: 1.6 M values."""


def done(shown):
    return shown["phase"] == "done"


def num_reduced(node):
    """All-reduces in which somebody told this node what it offers, at least."""
    called = node.metrics().served.get("exchange.array")
    return 0 if called is None else called.calls


def test_members_of_a_large_run_and_a_newcomer_reduce_it_together_and_hold_the_same_policy(make_node):
    nodes = [make_node() for _ in range(3)]
    created = nodes[0].create(*LARGE, "--batch-per-learner", BATCH, "--min-learners", "2", *NEVER)
    nodes[1].ask("join", created["ticket"], "-d")
    nodes[1].wait_for(created["swarm"], "they learn", lambda shown: shown["epoch"] >= 1)
    nodes[2].ask("join", created["ticket"], "-d")  # and takes their state, which is large too
    until(lambda: all(num_reduced(node) >= 2 for node in nodes))
    held = [{} for _ in nodes]  # of each, by epoch

    def look():
        for node, known in zip(nodes, held, strict=True):
            with Client(node.config.paths, node.profile) as client:
                shown = client.swarm(created["swarm"])
            known[shown.epoch] = shown.digest
        common = set.intersection(*(set(known) for known in held))
        return sum(len({known[epoch] for known in held}) == 1 for epoch in common) >= 3

    until(look)


def until(holds):
    ends = time.monotonic() + GENEROUS_S
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_member_of_a_large_run_that_is_killed_costs_the_others_nothing(make_node):
    nodes = [make_node() for _ in range(3)]
    chosen = ("--mode", "diloco", "--codec", "int8", "--aggregator", "median", "--set", "hidden_sizes=[768,768]")
    bounds = ("--batch-per-learner", "256", "--min-learners", "3", "--max-env-steps", "4000")
    created = nodes[0].create(*LARGE, *chosen, *bounds, *NEVER)
    for node in nodes[1:]:
        node.ask("join", created["ticket"], "-d")
    nodes[2].wait_for(created["swarm"], "they learn", lambda shown: shown["epoch"] >= 2)
    nodes[2].kill()
    ends = [node.wait_for(created["swarm"], "the run ends", done) for node in nodes[:2]]
    assert len({end["digest"] for end in ends}) == 1
    assert all(end["env_steps"] >= 4000 for end in ends)
