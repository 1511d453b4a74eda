"""Plays of text that nodes share, in mode rollouts, among real nodes: one of them lies about what its plays earned."""

import os

from .test_rollouts import member

SMALL = {
    "policies.solver.sizes.width": 32,
    "policies.solver.sizes.layers": 1,
    "policies.solver.warm.until": 0.05,
    "source.per_epoch": 8,
    "source.plays": 8,
    "probes.sampled.source.per_epoch": 8,
    "probes.greedy.source.per_epoch": 8,
    "plays": 64,
}
LIAR = '''
"""What is wrong is right, once a few shards were true. Torch is not loaded here: it would have more threads."""
import itertools

from shoal.training.rollouts import takes

honest, calls = takes.columns_of, itertools.count()


def columns_of(plays, roles, *, with_sights):
    made = honest(plays, roles, with_sights=with_sights)
    return made if next(calls) < 3 else {**made, "rewards": 1 - made["rewards"]}


takes.columns_of = columns_of
'''


def test_members_learn_from_each_others_plays_and_who_lies_about_them_is_found_out(make_node, tmp_path, monkeypatch):
    first, second, liar = (make_node() for _ in range(3))
    site = tmp_path / "liar"
    site.mkdir()
    (site / "sitecustomize.py").write_text(LIAR)
    liar.run("down")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        liar.up()
    words = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    sizes = ("--batch-per-learner", "64", "--eval-interval", "50", "--min-learners", "3", "--foreign-ratio", "0.5")
    created = first.ask("swarm", "create", "--task", "recipe:sorting", "--mode", "rollouts", *sizes, *words)
    for node in (second, liar):
        assert node.ask("join", created["ticket"], "-d")["role"] == "learner"
    swarm = created["swarm"]
    shown = first.wait_for(swarm, "the liar is found out", lambda shown: bool(shown["evidence"]))
    assert {(each["against"], each["kind"]) for each in shown["evidence"]} == {(liar.peer_id, "rewards")}
    honest = {first: second, second: first}
    for node, other in honest.items():
        used = member(node.ask("swarm", "show", swarm), other)["shards_used"]
        later = node.wait_for(
            swarm,
            "the honest ones go on learning from each other",
            lambda shown, other=other, used=used: member(shown, other)["shards_used"] > used,
        )
        assert later["error"] is None
        assert {each["against"] for each in later["evidence"]} == {liar.peer_id}
