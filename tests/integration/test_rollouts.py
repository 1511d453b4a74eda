"""Actors, learners and an evaluator among real nodes: with kills, and with an actor that lies."""

import os

import pytest

CREATE = ("swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "vtrace", "--mode", "rollouts")
ENDLESS = ("--target-return", "100000", "--max-env-steps", "100000000", "--batch-per-learner", "1024")
LIAR = '''
"""Rewards that are more than what was earned, once a few shards were true."""
import itertools
from dataclasses import replace

from shoal.training.rollouts import actor

honest, calls = actor.Actor.roll_out, itertools.count()


def roll_out(self, samples, before):
    made = honest(self, samples, before)
    return made if next(calls) < 4 else replace(made, rows=replace(made.rows, rewards=made.rows.rewards + 1))


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
    learner, honest, other, liar = (make_node() for _ in range(4))
    create = ["ppo" if word == "vtrace" else word for word in CREATE]
    created = learner.ask(*create, *ENDLESS, "--check-rate", "0.5")
    for node in (honest, other):
        node.ask("join", created["ticket"], "-d", "--role", "actor")
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
    assert f"{liar.peer_id} gave a shard that is false (rewards)" in learner.log()
    later = learner.wait_for(
        created["swarm"],
        "the honest ones go on, and the run learns",
        lambda now: (
            all(member(now, each)["shards_used"] > member(shown, each)["shards_used"] for each in (honest, other))
            and (now["return"] or 0) > 150
        ),
    )
    assert member(later, liar)["shards_used"] <= 8
    assert sum(member(later, each)["shards_share"] for each in (honest, other, liar)) > 0.99
    assert len(later["evidence"]) == 1


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


BEGINS_AS_ACTOR = '''
"""A node whose machine could learn, and that begins as an actor."""
from shoal.node.swarm import swarms
from shoal.training.manifest import Role

swarms.first_role = lambda machine, mode: Role.ACTOR
'''


def test_an_actor_that_chose_its_role_learns_when_the_only_learner_is_killed(make_node, tmp_path, monkeypatch):
    learner, standby = make_node(), make_node()
    created = learner.ask(*CREATE, *ENDLESS, "--role", "learner")
    swarm = created["swarm"]
    site = tmp_path / "acting"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BEGINS_AS_ACTOR)
    standby.run("down")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        standby.up()
    assert standby.ask("join", created["ticket"], "-d")["role"] == "actor"
    learner.wait_for(swarm, "it learns from the actor", lambda shown: member(shown, standby)["shards_used"] > 2)
    held = standby.wait_for(swarm, "the actor is at some epoch", lambda shown: shown["epoch"] >= 3)
    learner.kill()
    alone = standby.wait_for(
        swarm,
        "it learns in its place, from what it held",
        lambda shown: shown["role"] == "learner" and shown["epoch"] > held["epoch"] + 2,
    )
    assert alone["env_steps"] > held["env_steps"]
    learner.up()
    back = learner.wait_for(swarm, "it has come to where the other is", lambda shown: shown["epoch"] > alone["epoch"])
    assert back["env_steps"] > alone["env_steps"]
    assert {each["peer_id"]: each["role"] for each in back["members"]}[standby.peer_id] == "learner"


def test_the_run_goes_on_when_all_learners_are_killed_and_one_comes_back(make_node):
    first, second, actor, evaluator = (make_node() for _ in range(4))
    created = first.ask(*CREATE, *ENDLESS, "--eval-interval", "1")
    swarm = created["swarm"]
    for node, role in ((second, "learner"), (actor, "actor"), (evaluator, "evaluator")):
        node.ask("join", created["ticket"], "-d", "--role", role)
    actor.wait_for(swarm, "the actor takes copies", lambda shown: shown["copies"] > 3)
    for node in (first, second):
        node.wait_for(swarm, "it learns from the actor", lambda shown: member(shown, actor)["shards_used"] > 2)
    first.wait_for(swarm, "it is evaluated", lambda shown: shown["return"] is not None)
    evaluator.kill()
    held = first.wait_for(swarm, "it is gone", lambda shown: not member(shown, evaluator)["live"])
    seen = len(held["curve"])
    first.wait_for(swarm, "learners evaluate in its place", lambda shown: len(shown["curve"]) > seen + 1)
    first.kill()
    second.kill()
    waits = actor.wait_for(swarm, "the actor says what it waits for", lambda shown: "a learner" in shown["waits"])
    second.up()
    back = second.wait_for(
        swarm,
        "it goes on from what it kept, and learns from the actor again",
        lambda shown: shown["epoch"] > waits["epoch"] and member(shown, actor)["shards_used"] > 0,
    )
    # The actor has a copy to act by and no state: what the other learned since this one last wrote to disk is gone.
    assert back["env_steps"] > 0.9 * waits["env_steps"]
    assert not back["evidence"]
