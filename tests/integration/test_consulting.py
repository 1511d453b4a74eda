"""Plays between nodes: one thinks, another answers; and if nobody does, the plays go on as the recipe says."""

import re

TINY = {
    "policies.large.sizes.width": 16,
    "policies.large.sizes.layers": 1,
    "policies.large.sizes.heads": 4,
    "policies.large.warm.max_steps": 1,
    "policies.small.sizes.width": 16,
    "policies.small.sizes.layers": 1,
    "policies.small.warm.max_steps": 1,
    "source.per_epoch": 4,
    "source.plays": 2,
    "probes.right.source.per_epoch": 4,
    "probes.tokens.source.per_epoch": 4,
    "plays": 8,
}


def test_plays_wait_for_another_node_and_go_on_by_their_own_when_it_is_killed(make_node):
    large, small = make_node(), make_node()
    words = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    sizes = ("--batch-per-learner", "16", "--eval-interval", "5", "--min-learners", "2")
    created = large.ask("swarm", "create", "--task", "recipe:hawkeye", "--part", "large", *sizes, *words)
    swarm = created["swarm"]
    small.ask("join", created["ticket"], "--part", "small", "-d")
    large.wait_for(swarm, "they play together", lambda shown: shown["epoch"] >= 10)
    answered = small.metrics().served["swarm.consult"]
    assert answered.calls >= 5
    assert not answered.errors
    small.kill()
    gone_at = large.wait_for(swarm, "how far it is", lambda shown: shown["epoch"] > 0)["epoch"]
    shown = large.wait_for(swarm, "it plays alone", lambda shown: shown["epoch"] >= gone_at + 10)
    assert shown["error"] is None


def test_a_part_that_is_none_is_refused_with_what_could_be_meant(make_node):
    node = make_node()
    failed = node.run("swarm", "create", "--task", "recipe:hawkeye", "--part", "lrage", check=False)
    assert failed.returncode != 0
    assert re.search("large", failed.stderr)
