"""Actors, learners and an evaluator among real nodes: with kills, and with an actor that lies."""

import os

import pytest

CREATE = ("swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "vtrace", "--mode", "rollouts")
ENDLESS = ("--target-return", "100000", "--max-env-steps", "100000000", "--batch-per-learner", "1024")
LIAR = '''
"""Rewards that are more than what was earned."""
from dataclasses import replace

from shoal.training.rollouts import actor

honest = actor.Actor.roll_out


def roll_out(self, samples, before):
    made = honest(self, samples, before)
    return replace(made, rows=replace(made.rows, rewards=made.rows.rewards + 1))


actor.Actor.roll_out = roll_out
'''


def member(shown, node):
    return next(
        (each for each in shown["members"] if each["peer_id"] == node.peer_id), {"shards_used": 0, "live": False}
    )


def test_actors_are_learned_from_and_the_run_goes_on_whoever_is_killed(make_node):
    learner, first, second, evaluator = (make_node() for _ in range(4))
    created = learner.ask(*CREATE, *ENDLESS)
    for node, role in ((first, "actor"), (second, "actor"), (evaluator, "evaluator")):
        assert node.ask("join", created["ticket"], "-d", "--role", role)["role"] == role
    swarm = created["swarm"]
    learner.wait_for(
        swarm,
        "both are learned from",
        lambda shown: all(member(shown, each)["shards_used"] for each in (first, second)),
    )
    learner.wait_for(swarm, "the evaluator evaluates", lambda shown: shown["return"] is not None)
    first.kill()
    gone = learner.wait_for(swarm, "it is gone", lambda shown: not member(shown, first)["live"])
    used = member(gone, second)["shards_used"]
    learner.wait_for(swarm, "the other goes on", lambda shown: member(shown, second)["shards_used"] > used + 3)
    first.up()
    used = member(gone, first)["shards_used"]
    back = learner.wait_for(swarm, "it is learned from again", lambda shown: member(shown, first)["shards_used"] > used)
    assert not any(each["shards_refused"] and not each["shards_used"] for each in back["members"])
    assert not back["evidence"]
    learner.kill()
    learner.up()
    again = learner.wait_for(
        swarm,
        "the learner goes on where it was, and learns from them",
        lambda shown: shown["epoch"] > back["epoch"] and member(shown, second)["shards_used"] > 0,
    )
    assert again["error"] is None


def test_an_actor_that_lies_is_found_out_and_named_and_nobody_else(make_node, tmp_path, monkeypatch):
    learner, honest, liar = (make_node() for _ in range(3))
    created = learner.ask(*CREATE, *ENDLESS)
    honest.ask("join", created["ticket"], "-d", "--role", "actor")
    site = tmp_path / "liar"
    site.mkdir()
    (site / "sitecustomize.py").write_text(LIAR)
    liar.run("down")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        liar.up()
    liar.ask("join", created["ticket"], "-d", "--role", "actor")
    shown = learner.wait_for(created["swarm"], "it is found out", lambda shown: bool(shown["evidence"]))
    assert [(each["against"], each["kind"], each["by"]) for each in shown["evidence"]] == [
        (liar.peer_id, "rewards", learner.peer_id)
    ]
    used = member(shown, honest)["shards_used"]
    later = learner.wait_for(
        created["swarm"], "the honest one goes on", lambda shown: member(shown, honest)["shards_used"] > used + 3
    )
    assert member(later, liar)["shards_used"] == member(shown, liar)["shards_used"] == 0


FAILING = '''
"""The first fetches of shards fail before they have begun."""
import itertools

from shoal.node.swarm import shards

honest, calls = shards.Shards._take, itertools.count()


async def take(self, author, given):
    if next(calls) < 6:
        raise ZeroDivisionError("it was made to fail")
    await honest(self, author, given)


shards.Shards._take = take
'''


def test_fetches_of_shards_that_fail_end_nothing_but_themselves(make_node, tmp_path, monkeypatch):
    learner, actor = make_node(), make_node()
    site = tmp_path / "failing"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAILING)
    learner.run("down")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        learner.up()
    created = learner.ask(*CREATE, *ENDLESS)
    actor.ask("join", created["ticket"], "-d", "--role", "actor")
    learner.wait_for(created["swarm"], "it learns from them", lambda shown: member(shown, actor)["shards_used"] > 3)
    assert "it was made to fail" in learner.log()


def test_there_are_actors_in_mode_rollouts_alone_and_it_is_said(make_node):
    learner, other = make_node(), make_node()
    created = learner.create("--max-env-steps", "1000000")
    failed = other.run("join", created["ticket"], "-d", "--role", "actor", check=False)
    assert failed.returncode != 0
    assert "mode rollouts" in failed.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--max-staleness", "-1", "max staleness"), ("--check-rate", "2", "check rate")]
)
def test_settings_that_cannot_be_are_refused(make_node, option, value, said):
    failed = make_node().run(*CREATE, option, value, check=False)
    assert failed.returncode != 0
    assert said in failed.stderr
