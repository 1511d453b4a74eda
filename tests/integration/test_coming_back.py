"""Who was away finds the others again: real nodes without mDNS, whose first ports are chosen by the system."""

from __future__ import annotations

import socket
from typing import Any

NEVER = ("--target-return", "100000", "--eval-interval", "1000000")


def together(number: int, after: int) -> Any:
    """So many members are there, and the run went on with all of them since."""

    def holds(shown: dict[str, Any]) -> bool:
        live = [member for member in shown["members"] if member["live"]]
        return len(live) == number and shown["epoch"] > after and all(m["epoch"] > after for m in live)

    return holds


def port_of(node: Any) -> int:
    return int(node.info["addresses"][0].split("/")[4])


def test_two_find_each_other_again_whoever_of_them_restarts_and_when_both_were_killed(make_node: Any) -> None:
    creator, joiner = make_node(), make_node()
    swarm = creator.create("--min-learners", "2", *NEVER)
    joiner.ask("join", swarm["ticket"], "-d")
    ports = port_of(creator), port_of(joiner)
    shown = creator.wait_for(swarm["swarm"], "both learn", together(2, 0))
    for who, killed in (("the joiner", [joiner]), ("the creator", [creator]), ("both", [creator, joiner])):
        for node in killed:
            node.kill()
        for node in killed:
            node.up()
        for node in (creator, joiner):
            shown = node.wait_for(swarm["swarm"], f"{who} came back", together(2, shown["epoch"]), timeout_s=30)
    assert (port_of(creator), port_of(joiner)) == ports


def test_three_of_which_the_one_in_the_ticket_is_gone_for_ever_go_on_as_two(make_node: Any) -> None:
    creator, *rest = [make_node() for _ in range(3)]
    swarm = creator.create("--min-learners", "3", *NEVER)
    for node in rest:
        node.ask("join", swarm["ticket"], "-d")
    shown = creator.wait_for(swarm["swarm"], "all three learn", together(3, 0))
    for node in (creator, *rest):
        node.kill()
    for node in rest:
        node.up()
    for node in rest:
        shown = node.wait_for(swarm["swarm"], "the two are together", together(2, shown["epoch"]), timeout_s=30)
    ticket = rest[0].run("swarm", "ticket", swarm["swarm"]).stdout.strip()
    newcomer = make_node()
    newcomer.ask("join", ticket, "-d")
    newcomer.wait_for(swarm["swarm"], "a ticket asked for anew leads there", together(3, shown["epoch"]))


def test_a_node_whose_port_is_taken_says_so_and_is_found_at_another(make_node: Any) -> None:
    creator, joiner = make_node(), make_node()
    swarm = creator.create("--min-learners", "2", *NEVER)
    joiner.ask("join", swarm["ticket"], "-d")
    shown = creator.wait_for(swarm["swarm"], "both learn", together(2, 0))
    joiner.kill()
    before = port_of(joiner)
    with socket.create_server(("127.0.0.1", before)):
        joiner.up()
        assert port_of(joiner) != before
        assert f"port {before}, at which others know this node, is taken" in joiner.log()
        creator.wait_for(swarm["swarm"], "it came back", together(2, shown["epoch"]), timeout_s=30)
