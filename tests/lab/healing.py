"""Scenarios in which something breaks: nodes that talked go on talking, within the seconds that are promised.

Each takes the `Stage` to play on. Calls go on in both directions all the time; the worse one counts.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Final

from shoal.node.api.client import Client

from . import netns
from .calls import Call, Calls, answers_by_second, failures, healed_after_s, longest_gap_s
from .net import Site
from .nodes import LabNode
from .stage import Stage, path_to, peer_of, wait_for_path, wait_until

RELAY_LIMIT_S: Final = 5.0
HEAL_LIMIT_S: Final = 10.0
BEFORE_S: Final = 3.0
"""Of calls before anything happens."""
AFTER_S: Final = 15.0
"""Of calls afterwards, in which a silence would be seen."""
DARK_S: Final = 10.0
SUSPENDED_S: Final = 60.0
APART_S: Final = 900.0
"""Real ones: no namespace moves the clock by which the timers of a running process go."""
FOUND_LIMIT_S: Final = 75.0
"""A member that is gone is dialed once a minute."""
EPOCHS_LIMIT_S: Final = 60.0
EVERLASTING: Final = ("--target-return", "1000", "--max-env-steps", "1000000000")
"""CartPole returns 500 at most, so that the run goes on for as long as the scenario."""


def relay_killed(stage: Stage) -> None:
    """Members of a swarm behind symmetric NATs talk again within 5 s after their relay was killed; no call fails."""
    _, a, _, b = stage.pair("symmetric")
    with a.client() as at_a, b.client() as at_b:
        for client in (at_a, at_b):
            wait_until("two reservations", lambda client=client: len(client.nat().held_relays) >= 2)
        swarm = _train_together(a, b)
        wait_for_path(at_a, b.peer_id, "relayed")
        epochs = _epochs(at_a, at_b, swarm)
        known = peer_of(at_a, b.peer_id)
        assert known is not None
        relay = next(node for node in stage.relays.nodes if node.peer_id == known.relayed_by)
        pid = int(relay.info["pid"])
        one, other, killed_at, until = _call_both(a, b, lambda: os.kill(pid, signal.SIGKILL))
        now_by = peer_of(at_a, b.peer_id)
        stage.within(
            "longest time between two answers",
            max(longest_gap_s(calls, killed_at, until) for calls in (one, other)),
            RELAY_LIMIT_S,
        )
        stage.equal("calls that failed", sum(bool(call.failure) for call in one + other), 0)
        if any(call.failure for call in one + other):
            stage.say(f"  those: {failures(one + other, killed_at)}")
        stage.equal("path afterwards", path_to(at_a, b.peer_id), "relayed")
        stage.equal("through another relay", now_by is not None and now_by.relayed_by != known.relayed_by, True)
        wait_until(
            "further epochs on both",
            lambda: all(now > before + 1 for now, before in zip(_epochs(at_a, at_b, swarm), epochs, strict=True)),
            EPOCHS_LIMIT_S,
        )
        gained = [now - before for now, before in zip(_epochs(at_a, at_b, swarm), epochs, strict=True)]
        stage.at_least("epochs since", min(gained), 2)


def address_change(stage: Stage) -> None:
    """A node whose public and local address change talks again with a peer behind another NAT within 10 s."""
    site, a, _, b = stage.pair("port_restricted")
    _heals(stage, a, b, ("punched", "webrtc"), lambda: stage.lab.change_address(site))


def mapping_expires(stage: Stage) -> None:
    """Nodes whose NAT forgets all mappings talk again within 10 s, by a relay and by a punched hole."""
    for kind, paths in (("symmetric", ("relayed",)), ("port_restricted", ("punched", "webrtc"))):
        site, a, _, b = stage.pair(kind)
        _heals(stage, a, b, paths, lambda site=site: stage.lab.flush_nat(site))


def black_out(stage: Stage) -> None:
    """Nodes one of which was cut off for 10 s talk again within 10 s of its return, by a relay and by a hole."""
    for kind, paths in (("symmetric", ("relayed",)), ("port_restricted", ("punched", "webrtc"))):
        site, a, _, b = stage.pair(kind)
        _heals(stage, a, b, paths, lambda site=site: _cut_off(stage, site))


def suspended(stage: Stage) -> None:
    """A member of a swarm that was suspended for 60 s, with its workers, talks again within 10 s of its return."""
    site, a, _, b = stage.pair("port_restricted")
    swarm = _train_together(a, b)
    _heals(stage, a, b, ("punched", "webrtc"), lambda: _suspend(site))
    with a.client() as at_a, b.client() as at_b:
        epochs = _epochs(at_a, at_b, swarm)
        took_s = wait_until(
            "further epochs on both",
            lambda: all(now > before for now, before in zip(_epochs(at_a, at_b, swarm), epochs, strict=True)),
            EPOCHS_LIMIT_S,
        )
    stage.within("the swarm goes on", took_s, EPOCHS_LIMIT_S)


def apart(stage: Stage) -> None:
    """Two members that cannot reach each other for a quarter of an hour, and know nobody else, train on together."""
    sites = [stage.lab.add("open", name) for name in ("here", "there")]
    a, b = (stage.start(site, bootstrap=()) for site in sites)
    swarm = _train_together(a, b)
    with a.client() as at_a, b.client() as at_b:
        _cut_off(stage, sites[1], APART_S)
        stage.equal("they were without each other", [path_to(at_a, b.peer_id), path_to(at_b, a.peer_id)], ["", ""])
        epochs = _epochs(at_a, at_b, swarm)
        took_s = wait_until(
            "a path", lambda: bool(path_to(at_a, b.peer_id)) and bool(path_to(at_b, a.peer_id)), 2 * FOUND_LIMIT_S
        )
        stage.within("connected again", took_s, FOUND_LIMIT_S)
        took_s = wait_until(
            "further epochs on both",
            lambda: all(now > before for now, before in zip(_epochs(at_a, at_b, swarm), epochs, strict=True)),
            EPOCHS_LIMIT_S,
        )
        stage.within("the swarm goes on", took_s, EPOCHS_LIMIT_S)


def _heals(stage: Stage, a: LabNode, b: LabNode, paths: tuple[str, ...], happens: Callable[[], object]) -> None:
    """Nodes that are connected by such a path talk again soon after something has happened."""
    with a.client() as client:
        client.ping(b.peer_id)
        wait_for_path(client, b.peer_id, *paths)
        before = path_to(client, b.peer_id)
        one, other, since, until = _call_both(a, b, happens)
        healed_s = max(healed_after_s(calls, since, until) for calls in (one, other))
        failed = sum(bool(call.failure) for call in one + other)
        now = path_to(client, b.peer_id)
        stage.say(f"  {len(one + other)} calls, {failed} of which failed; the path is {now or 'none'}")
        if healed_s > HEAL_LIMIT_S:
            for name, calls in (("a", one), ("b", other)):
                stage.say(f"  answers to {name} in each second afterwards: {answers_by_second(calls, since, until)}")
                stage.say(f"  calls of {name} that failed: {failures(calls, since)}")
        stage.within(f"talking again ({before} before)", healed_s, HEAL_LIMIT_S)


def _call_both(a: LabNode, b: LabNode, happens: Callable[[], object]) -> tuple[list[Call], list[Call], float, float]:
    """Calls in both directions, while something happens.

    Returns:
        The calls of each; when what happened was over; when the calls were.
    """
    with Calls(a, b.peer_id) as one, Calls(b, a.peer_id) as other:
        time.sleep(BEFORE_S)
        began = time.monotonic()
        happens()
        over = time.monotonic()
        time.sleep(AFTER_S)
        until = time.monotonic()
        results = one.finish(), other.finish()
    for calls in results:
        assert healed_after_s(calls, began - BEFORE_S / 2, began) < BEFORE_S, "they talked before"
    return *results, over, until


def _train_together(a: LabNode, b: LabNode) -> str:
    """Both are members of a CartPole run that does not end; gives its name once they have trained together."""
    created = json.loads(
        a.run(
            *("swarm", "create", "--task", "gym:CartPole-v1", "--min-learners", "2", *EVERLASTING, "--json"),
            timeout_s=EPOCHS_LIMIT_S,
        )
    )
    swarm = str(created["swarm"])
    b.run("join", "--detach", str(created["ticket"]), timeout_s=EPOCHS_LIMIT_S)
    with a.client() as at_a, b.client() as at_b:
        wait_until("two epochs", lambda: min(_epochs(at_a, at_b, swarm)) >= 2, EPOCHS_LIMIT_S)
    return swarm


def _epochs(one: Client, other: Client, swarm: str) -> list[int]:
    return [client.swarm(swarm).epoch for client in (one, other)]


def _cut_off(stage: Stage, site: Site, seconds: float = DARK_S) -> None:
    stage.lab.black_out(site)
    time.sleep(seconds)
    stage.lab.come_back(site)


def _suspend(site: Site) -> None:
    """Suspend everything that runs on a site's host."""
    pids = [int(word) for word in netns.command("ip", "netns", "pids", site.host_namespace).split()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(SUSPENDED_S)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
