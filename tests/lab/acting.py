#!/usr/bin/env python
"""What actors on small machines give one learner, and what they take for it (root).

    tests/lab/acting.py                                        one learner of half a core, actors of 0.2, 0.2 and 0.1
    tests/lab/acting.py --learner 0.5 --actors 0.3,0.3 --seconds 240 --json build/acting.json

Each machine is a host of the lab with a share of a core (`machines`), 25 ms from the others. What an actor's machine
gives alone is `shoal bench actor` on the same machine before the node is started. The nodes are ordinary ones, in mode
``rollouts`` with the settings that ``shoal swarm create`` gives; nothing is evaluated and nothing ends the run.

Three figures say how well an actor is used: the environment steps that the learner learned from, and those that the
actor made, each over what its machine makes alone in as much time; and steps made per second of processor of all its
processes, over the same of the bench's, which holds also where the lab's own machine is busy with other things.

Exit status: 0, or 2 if the lab cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package `lab` is

from lab import machines, netns
from lab.machines import Machine
from lab.net import Lab
from lab.netns import LabError
from lab.nodes import PORT, SHOAL, LabNode, listen_addresses
from lab.report import write_json
from lab.stage import wait_until
from shoal.node.api.schemas import MemberInfo, SwarmDetail

START_LIMIT_S: Final = 240.0
WARM_S: Final = 20.0
SAMPLE_S: Final = 10.0
BENCH_S: Final = "10"


@dataclass(frozen=True, slots=True)
class Row:
    """One actor.

    Attributes:
        cores: of its machine.
        alone_per_s: environment steps per second, of the bench on its machine.
        made_per_s: in the swarm.
        used_per_s: that the learner learned from.
        waited: part of the looks at which it waited.
        processor: steps per second of processor, over the same of the bench.
        memory_mb: of all its processes, pages that they share counted in parts, after the first minute and at the end.
    """

    cores: float
    alone_per_s: float
    made_per_s: float
    used_per_s: float
    waited: float
    processor: float
    memory_mb: tuple[float, float]


def processor_s(machine: Machine) -> float:
    """Seconds of processor that the programs took which run on this machine now."""
    ticks = 0
    for pid in (machine.cgroup / "cgroup.procs").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mb(machine: Machine) -> float:
    """What its programs take, shared pages in parts."""
    total = 0
    for pid in (machine.cgroup / "cgroup.procs").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):  # likewise
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(total / 1024, 1)


def alone(machine: Machine, task: str) -> tuple[float, float]:
    """Steps per second, and per second of processor, of an actor's worker without a node."""
    words = [*SHOAL, "bench", "actor", "--task", task, "--seconds", BENCH_S, "--json"]
    done = subprocess.run(machine.command(*words), capture_output=True, text=True, timeout=START_LIMIT_S, check=False)
    if done.returncode:
        raise LabError(f"shoal bench actor ended with {done.returncode}: {done.stderr.strip()}")
    figures = json.loads(done.stdout)
    return figures["env_steps_per_s"], figures["env_steps"] / figures["processor_s"]


def member(shown: SwarmDetail, node: LabNode) -> MemberInfo:
    """One of the members."""
    return next(each for each in shown.members if each.peer_id == node.peer_id)


def measure(learner_cores: float, cores: list[float], task: str, algorithm: str, seconds: float) -> dict[str, object]:
    """Play one swarm for so long."""
    with Lab() as lab, ExitStack() as stack:
        places = [
            stack.enter_context(machines.machine(lab, f"m{number}", share))
            for number, share in enumerate((learner_cores, *cores))
        ]
        baselines = [alone(machine, task) for _, machine in places[1:]]
        nodes: list[LabNode] = []
        known: list[str] = []
        for site, machine in places:
            node = LabNode(machine, lab.folder, site.name)
            nodes.append(node.up("--relay", "off", listen=listen_addresses(site), bootstrap=known))
            known = known or [f"/ip4/{site.address}/tcp/{PORT}/p2p/{node.peer_id}"]
        learner, actors = nodes[0], nodes[1:]
        words = ["swarm", "create", "--task", task, "--algorithm", algorithm, "--mode", "rollouts", "--role", "learner"]
        endless = ["--target-return", "1e9", "--eval-interval", "1000000", "--max-env-steps", "1000000000", "--json"]
        created = json.loads(learner.run(*words, *endless, timeout_s=START_LIMIT_S))
        swarm = created["swarm"]
        with learner.client() as client:
            wait_until("the learner's first epoch", lambda: client.swarm(swarm).epoch >= 1, START_LIMIT_S)
            began, first = time.monotonic(), client.swarm(swarm)
            time.sleep(WARM_S)
            before = client.swarm(swarm)
            by_itself = (before.env_steps - first.env_steps) / (time.monotonic() - began)
            for node in actors:
                node.run("join", "--detach", created["ticket"], "--role", "actor", timeout_s=START_LIMIT_S)
            wait_until(
                "all are learned from",
                lambda: all(member(client.swarm(swarm), node).shards_used for node in actors),
                START_LIMIT_S,
            )
            began, first = time.monotonic(), client.swarm(swarm)
            used_s = [processor_s(machine) for _, machine in places]
            waits, looks, early = [0] * len(actors), 0, [0.0] * len(actors)
            while (now := time.monotonic()) < began + seconds:
                time.sleep(min(SAMPLE_S, max(0.1, began + seconds - now)))
                looks += 1
                shown = client.swarm(swarm)
                for index, node in enumerate(actors):
                    waits[index] += bool(member(shown, node).waits)
                if looks == max(1, int(60 / SAMPLE_S)):
                    early = [memory_mb(machine) for _, machine in places[1:]]
            took_s, last = time.monotonic() - began, client.swarm(swarm)
        rows = []
        for index, node in enumerate(actors):
            alone_per_s, per_processor_s = baselines[index]
            machine = places[1 + index][1]
            made = member(last, node).env_steps - member(first, node).env_steps
            used = member(last, node).samples_used - member(first, node).samples_used
            rows.append(
                Row(
                    cores[index],
                    alone_per_s,
                    round(made / took_s, 1),
                    round(used / took_s, 1),
                    round(waits[index] / looks, 2),
                    round(made / (processor_s(machine) - used_s[1 + index]) / per_processor_s, 3),
                    (early[index], memory_mb(machine)),
                )
            )
        return {
            "task": task,
            "algorithm": algorithm,
            "seconds": round(took_s, 1),
            "learner_cores": learner_cores,
            "learner_alone_per_s": round(by_itself, 1),
            "together_per_s": round((last.env_steps - first.env_steps) / took_s, 1),
            "epochs": last.epoch - first.epoch,
            "actors": [asdict(row) for row in rows],
        }


def main() -> int:
    """Play what was asked for, print it, keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--task", default="gym:LunarLander-v3")
    parser.add_argument("--algorithm", default="vtrace")
    parser.add_argument("--learner", type=float, default=0.5, help="cores of the learner")
    parser.add_argument("--actors", default="0.2,0.2,0.1", help="cores of each actor")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where it is kept")
    options = parser.parse_args()
    if lack := netns.missing() or machines.missing():
        print(lack, file=sys.stderr)
        return 2
    netns.clean()
    machines.clean()
    cores = [float(word) for word in options.actors.split(",")]
    try:
        found = measure(options.learner, cores, options.task, options.algorithm, options.seconds)
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found))
    if options.json is not None:
        write_json(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
