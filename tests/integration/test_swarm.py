"""Whole runs between real nodes: what the README promises."""

import os
import signal
from pathlib import Path

from shoal.training.state import decode_arrays, digest


def done(shown):
    return shown["phase"] == "done"


def epoch_is(epoch):
    return lambda shown: shown["epoch"] >= epoch


NEVER = ("--target-return", "100000")


def test_three_nodes_solve_their_task_though_its_creator_is_killed_and_hold_the_same_policy(make_node):
    creator, *rest = [make_node() for _ in range(3)]
    # Evaluated first when the creator is long dead; `test_demo` goes on to 475.
    created = creator.create("--min-learners", "3", "--target-return", "400", "--eval-interval", "20")
    for node in rest:
        node.ask("join", created["ticket"], "-d")
    all_there = creator.wait_for(
        created["swarm"], "all three contribute", lambda s: s["epoch"] >= 1 and len(s["members"]) == 3
    )
    creator.kill()
    ends = [node.wait_for(created["swarm"], "the rest solve it", done) for node in rest]
    assert all(end["solved"] and end["return"] >= 400 and end["epoch"] > all_there["epoch"] for end in ends)
    assert len({end["digest"] for end in ends}) == 1
    for node, end in zip(rest, ends, strict=True):
        folder = Path(end["results"])
        arrays, meta = decode_arrays((folder / "policy.safetensors").read_bytes())
        assert digest(arrays) == end["digest"] == meta["digest"]
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "result.json").exists()
        assert node.peer_id in {member["peer_id"] for member in end["members"] if member["rounds"] > 0}


def test_who_joins_halfway_takes_the_current_policy_and_contributes(make_node):
    first, second = make_node(), make_node()
    created = first.create("--min-learners", "2", *NEVER)
    second.ask("join", created["ticket"], "-d")
    before = first.wait_for(created["swarm"], "the two learn", epoch_is(2))
    newcomer = make_node()
    newcomer.ask("join", created["ticket"], "-d")

    def contributes(shown):
        return any(m["peer_id"] == newcomer.peer_id and m["rounds"] > 0 for m in shown["members"])

    after = first.wait_for(created["swarm"], "the newcomer contributes", contributes)
    assert after["epoch"] > before["epoch"]
    assert newcomer.ask("swarm", "show", created["swarm"])["epoch"] >= before["epoch"]


def test_a_node_alone_says_so_everywhere(make_node):
    node = make_node()
    assert node.ask("status")["alone"] is True
    assert "ALONE" in node.run("status").stdout
    created = node.create("--target-return", "50")
    node.wait_for(created["swarm"], "it says that it is alone", lambda shown: shown["alone"])
    node.wait_for(created["swarm"], "it solves the task", done)
    assert node.run("watch", created["swarm"], check=False).returncode == 4
    assert "ALONE" in node.log()


def test_a_node_that_was_killed_goes_on_where_it_was(make_node):
    node = make_node()
    created = node.create(*NEVER)
    before = node.wait_for(created["swarm"], "it learns", epoch_is(2))
    node.kill()
    node.up()
    after = node.wait_for(created["swarm"], "it goes on", lambda shown: shown["epoch"] > before["epoch"])
    assert after["env_steps"] > before["env_steps"]


def test_a_worker_that_dies_is_replaced_and_the_run_goes_on(make_node):
    node = make_node()
    created = node.create(*NEVER)
    before = node.wait_for(created["swarm"], "it learns", epoch_is(2))
    (worker,) = node.workers()
    os.kill(worker, signal.SIGKILL)
    node.wait_for(created["swarm"], "it goes on", epoch_is(before["epoch"] + 3))
    assert node.workers() != [worker]


def test_peers_that_average_every_gradient_end_with_the_same_policy(make_node):
    first, second = make_node(), make_node()
    settings = ("--set", "update_epochs=1", "--set", "num_minibatches=4")
    created = first.create("--mode", "gradient", "--min-learners", "2", "--max-env-steps", "5000", *settings)
    second.ask("join", created["ticket"], "-d")
    ends = [node.wait_for(created["swarm"], "the run ends", done) for node in (first, second)]
    assert len({end["digest"] for end in ends}) == 1
    assert len({end["env_steps"] for end in ends}) == 1


def test_peers_that_exchange_the_least_by_a_rule_that_withstands_liars_end_with_the_same_policy(make_node):
    nodes = [make_node() for _ in range(3)]
    chosen = ("--mode", "diloco", "--codec", "topk", "--aggregator", "nnm+trimmed_mean")
    small = ("--batch-per-learner", "512", "--max-env-steps", "4000", "--set", "update_epochs=2")
    created = nodes[0].create(*chosen, *small, "--min-learners", "3", *NEVER)
    for node in nodes[1:]:
        node.ask("join", created["ticket"], "-d")
    ends = [node.wait_for(created["swarm"], "the run ends", done) for node in nodes]
    assert len({end["digest"] for end in ends}) == 1
    assert {(end["mode"], end["codec"], end["aggregator"]) for end in ends} == {chosen[1::2]}


def test_a_node_that_only_stores_holds_the_newest_policy_for_those_who_come_later(make_node):
    learner, storage = make_node(), make_node()
    created = learner.create(*NEVER)
    storage.ask("join", created["ticket"], "-d", "--role", "storage")
    storage.wait_for(created["swarm"], "it stores", epoch_is(2))
    learner.kill()
    held = storage.ask("swarm", "show", created["swarm"])
    later = make_node()
    later.ask("join", storage.ask("swarm", "show", created["swarm"])["ticket"], "-d")
    later.wait_for(created["swarm"], "it goes on from there", epoch_is(held["epoch"] + 1))


def test_a_run_is_found_in_the_dht_when_the_addresses_in_the_ticket_are_gone(make_node):
    creator = make_node()
    created = creator.create(*NEVER)
    member = make_node()
    member.ask("join", created["ticket"], "-d")
    bystander = make_node("--bootstrap", member.info["addresses"][0])
    member.wait_for(created["swarm"], "the run is under way", epoch_is(1))
    creator.kill()
    newcomer = make_node("--bootstrap", bystander.info["addresses"][0])
    newcomer.wait_until_connected()
    newcomer.ask("join", created["ticket"], "-d")
    newcomer.wait_for(created["swarm"], "it takes part", lambda s: s["epoch"] >= 1 and len(s["members"]) >= 2)


def test_leaving_is_heard_by_the_others(make_node):
    first, second = make_node(), make_node()
    created = first.create("--min-learners", "2", *NEVER)
    second.ask("join", created["ticket"], "-d")
    first.wait_for(created["swarm"], "both are there", epoch_is(1))
    second.run("leave", created["swarm"])
    assert second.ask("swarm", "ls") == []
    first.wait_for(created["swarm"], "it is gone", lambda shown: len(shown["members"]) == 1 and shown["alone"])
