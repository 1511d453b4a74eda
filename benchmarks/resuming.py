"""How long a run of mode rollouts stands still when learners, or the only evaluator, are killed, by parts.

Four cases of real nodes on this machine that learn CartPole-v1 with V-trace, all members on loopback:

*again*: the only learner is killed (SIGKILL, its worker with it) and started anew at once; an actor stays.
*all*: two learners are killed and one of them is started anew ``--later`` seconds later; an actor stays.
*instead*: the only learner is killed and does not come back; an actor that chose its role itself learns in its place.
*evaluator*: the only evaluator is killed and does not come back; a learner and an actor stay.

The seconds count from the kill (*all*: from when it is started anew), until the node answers, its worker holds the
policy that was kept, the first new version is made, a shard of the actor is learned from, and a policy is evaluated by
whoever is left. Beside them: processor
seconds that the node and its worker took until then, which other work on the machine changes less; and *versions lost*:
that the learner had shown before the kill and the run makes anew.

    python benchmarks/resuming.py [--later 20] [--times 3]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from peers.nodes import Node, Nodes, nodes
from peers.notes import kept_notes

from shoal.cli.spawn import kill_tree
from shoal.node.api.schemas import MemberInfo, SwarmDetail
from shoal.protocol.errors import ShoalError

RESULT: Final = Path(__file__).parent / "results" / "resuming.md"
NOTES: Final = "## What limits it"
LIMIT_S: Final = 120.0
LOOK_S: Final = 0.02
CREATE: Final = (
    *("swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "vtrace", "--mode", "rollouts"),
    *("--target-return", "100000", "--max-env-steps", "100000000", "--batch-per-learner", "1024", "--role", "learner"),
)
ACTS_FIRST: Final = """
from shoal.node.swarm import swarms
from shoal.training.manifest import Role

swarms.first_role = lambda machine, mode: Role.ACTOR
"""
PARTS: Final = ("answers", "holds", "new version", "actor used", "evaluated")
EVALUATED: Final = 3
"""Policies, until the evaluator is killed."""
LEARNING: Final = ("collecting", "updating", "exchanging", "evaluating")
BESIDE: Final = ("processor", "versions lost")


def wait(node: Node, swarm: str, marks: Mapping[str, Callable[[SwarmDetail], bool]], since: float) -> dict[str, float]:
    """When each of these came to hold first, in seconds; it is looked at all the time."""
    found: dict[str, float] = {}
    while len(found) < len(marks):
        try:
            with node.client() as client:
                while len(found) < len(marks):
                    shown = client.swarm(swarm)
                    for name, holds in marks.items():
                        if name not in found and holds(shown):
                            found[name] = round(time.monotonic() - since, 2)
                    if time.monotonic() > since + LIMIT_S:
                        raise SystemExit(f"{set(marks) - set(found)}: not within {LIMIT_S:.0f} s")
                    time.sleep(LOOK_S)
        except ShoalError:  # it is about to begin
            if time.monotonic() > since + LIMIT_S:
                raise
            time.sleep(LOOK_S)
    return found


def member(shown: SwarmDetail, node: Node) -> MemberInfo | None:
    """One of the members, if it is known."""
    return next((each for each in shown.members if each.peer_id == node.peer_id), None)


def used(shown: SwarmDetail, node: Node) -> int:
    """Shards of an actor that were learned from."""
    found = member(shown, node)
    return 0 if found is None else found.shards_used


def run_case(case: str, later_s: float) -> dict[str, float]:
    """One kill."""
    with nodes() as started:
        learner = started.up("learner")
        actor = acting(started) if case == "instead" else started.up("actor")
        created = learner.run(*CREATE, *(("--eval-interval", "1") if case == "evaluator" else ()))
        swarm, ticket = str(created["swarm"]), str(created["ticket"])
        actor.run("join", ticket, "-d", *(() if case == "instead" else ("--role", "actor")))
        killed = [learner]
        if case == "evaluator":
            killed = [started.up("evaluator")]
            killed[0].run("join", ticket, "-d", "--role", "evaluator")
            wait(killed[0], swarm, {"evaluates": lambda shown: len(shown.curve) > EVALUATED}, time.monotonic())
        if case == "all":
            killed.append(started.up("other"))
            killed[-1].run("join", ticket, "-d", "--role", "learner")
        wait(learner, swarm, {"used": lambda shown: used(shown, actor) > 3}, time.monotonic())
        wait(actor, swarm, {"holds": lambda shown: shown.epoch > 5}, time.monotonic())
        spent_s = actor.daemon_s()
        with learner.client() as client:
            before = client.swarm(swarm)
        since = time.monotonic()
        for node in killed:
            kill_tree(node.pid)
        if case == "evaluator":
            marks: dict[str, Callable[[SwarmDetail], bool]] = {
                "new version": lambda shown: shown.epoch > before.epoch,
                "evaluated": lambda shown: len(shown.curve) > len(before.curve) + 1,  # one may have been told before
            }
            return wait(learner, swarm, marks, since)
        held: list[int] = []

        def holds(shown: SwarmDetail) -> bool:
            if shown.role == "learner" and shown.phase in LEARNING and shown.epoch:
                held[:] = held or [shown.epoch]
            return bool(held)

        def is_newer(shown: SwarmDetail) -> bool:
            return holds(shown) and shown.epoch > held[0]

        def beside(processor_s: float) -> dict[str, float]:
            return {"processor": round(processor_s, 2), "versions lost": max(0, before.epoch - held[0])}

        if case == "instead":
            marks = {"answers": lambda shown: shown.role == "learner", "holds": holds, "new version": is_newer}
            found = wait(actor, swarm, marks, since)
            return found | beside(actor.daemon_s() - spent_s + actor.workers_s())
        if case == "all":
            time.sleep(later_s)
            since = time.monotonic()
        again = started.up("learner")
        found = wait(
            again,
            swarm,
            {
                "answers": lambda _: True,
                "holds": holds,
                "new version": is_newer,
                "actor used": lambda shown: used(shown, actor) > 0,
            },
            since,
        )
        return found | beside(again.daemon_s() + again.workers_s())


def acting(started: Nodes) -> Node:
    """A node that could learn, and begins as an actor."""
    site = started.home / "acting"
    site.mkdir()
    (site / "sitecustomize.py").write_text(ACTS_FIRST, encoding="ascii")
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return started.up("actor", {"PYTHONPATH": paths})


def main() -> None:
    """Play all cases, and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--later", type=float, default=20.0, help="seconds that all learners are gone for")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument(
        "--cases", type=lambda words: words.split(","), default=["again", "all", "instead", "evaluator"]
    )
    options = parser.parse_args()
    loads, lines = [os.getloadavg()[0]], []
    for case in options.cases:
        rows = [run_case(case, options.later) for _ in range(options.times)]
        loads.append(os.getloadavg()[0])
        cells = [
            statistics.median(row[name] for row in rows) if name in rows[0] else None for name in (*PARTS, *BESIDE)
        ]
        worst = max(max(each for name, each in row.items() if name not in BESIDE) for row in rows)
        words = " | ".join("" if cell is None else f"{cell:.1f}" for cell in cells)
        lines.append(f"| {case} | {words} | {worst:.1f} |")
        print(lines[-1], flush=True)
    head = (
        "# Learners that are killed\n\n"
        f"`python benchmarks/resuming.py --later {options.later:g} --times {options.times}`, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; medians of {options.times}, seconds. Load of the machine while it was "
        f"measured: {min(loads):.1f} to {max(loads):.1f}.\n\n"
        "| case | answers (*instead*: has taken the role) | holds the policy | new version | actor used | evaluated "
        "| processor seconds | versions lost | longest in all |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    notes = kept_notes(RESULT, NOTES) or f"{NOTES}\n"
    RESULT.write_text(head + "\n".join(lines) + f"\n\n{notes}", encoding="utf-8")


if __name__ == "__main__":
    main()
