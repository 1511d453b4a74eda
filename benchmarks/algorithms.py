"""Does every algorithm learn over real nodes? Steps until a task is solved, by seeds, three nodes that average.

Each node is a process of its own on this machine, with its worker; what they say is asked of their local APIs. A run is
solved at the first evaluation over 20 greedy episodes whose mean return reaches the target.

    python benchmarks/algorithms.py [--runs ppo:gym:CartPole-v1,sac:gym:Pendulum-v1 ...] [--peers 3] [--seeds 5]
                                    [--mode local] [--set NAME=VALUE ...] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from shoal.cli.school import School, school
from shoal.node.api.requests import CreateSwarm
from shoal.training.manifest import Mode

RESULT: Final = Path(__file__).parent / "results" / "algorithms.md"
RUNS: Final = (
    "ppo:gym:CartPole-v1",
    "a2c:gym:CartPole-v1",
    "reinforce:gym:CartPole-v1",
    "vtrace:gym:CartPole-v1",
    "dqn:gym:CartPole-v1",
    "ppo:gym:Pendulum-v1",
    "sac:gym:Pendulum-v1",
)
TARGETS: Final = {"gym:CartPole-v1": 475.0, "gym:Pendulum-v1": -200.0, "hidden:CartPole-v1": 475.0}
SETTLE_S: Final = 10.0
LIMITS: Final = {"gym:CartPole-v1": 200_000, "gym:Pendulum-v1": 300_000, "hidden:CartPole-v1": 200_000}


@dataclass(frozen=True, slots=True)
class Run:
    """One algorithm, one task, one seed.

    Attributes:
        best: the best evaluation.
        env_steps: by all nodes until the run was over.
        is_agreed: whether all nodes held the same parameters then.
    """

    algorithm: str
    task: str
    seed: int
    solved: bool
    best: float
    env_steps: int
    seconds: float
    is_agreed: bool


def measure(nodes: School, algorithm: str, task: str, seed: int, mode: Mode, settings: dict[str, Any]) -> Run:
    """Learn until solved, or until the limit of steps."""
    began = time.monotonic()
    nodes.deadline = began + nodes.timeout_s
    created = nodes.begin(
        CreateSwarm(
            task=task,
            algorithm=algorithm,
            mode=mode,
            min_learners=len(nodes.pupils),
            seed=seed,
            target_return=TARGETS[task],
            max_env_steps=LIMITS[task],
            hyperparameters=settings,
        )
    )
    finals = [nodes.follow(pupil, created.swarm) for pupil in nodes.pupils]
    until = time.monotonic() + SETTLE_S  # where two policies solved it, all end with the first of them, once they know
    while len({final.digest for final in finals}) > 1 and time.monotonic() < until:
        time.sleep(0.2)
        finals = [nodes.follow(pupil, created.swarm) for pupil in nodes.pupils]
    for pupil in nodes.pupils:
        with pupil.connect() as client:
            client.leave_swarm(created.swarm)
    digests = {final.digest for final in finals}
    return Run(
        algorithm,
        task,
        seed,
        all(bool(final.solved) for final in finals),
        max((point.mean_return for point in finals[0].curve), default=float("nan")),
        finals[0].env_steps,
        round(time.monotonic() - began, 1),
        len(digests) == 1 and None not in digests,
    )


def report(runs: Sequence[Run], peers: int, command: str) -> Iterator[str]:
    """The table, in Markdown."""
    yield "# Algorithms: environment steps until a task is solved, over real nodes"
    yield ""
    yield f"`{command}`, Python {platform.python_version()}, torch {torch.__version__},"
    yield f"{platform.machine()} with {os.cpu_count()} cores, which all processes share. {peers} nodes, each a process"
    yield "with a worker. Solved: the mean of 20 greedy episodes reaches the target. Steps are of all nodes together; a"
    yield "run that did not solve it shows its best evaluation instead."
    yield ""
    yield "| algorithm | task | target | solved | steps, by seed | median | seconds, median | same bits on all nodes |"
    yield "|---|---|---|---|---|---|---|---|"
    for algorithm, task in dict.fromkeys((run.algorithm, run.task) for run in runs):
        same = [run for run in runs if (run.algorithm, run.task) == (algorithm, task)]
        shown = ", ".join(f"{run.env_steps:,}" if run.solved else f"not ({run.best:.0f})" for run in same)
        solved = [run.env_steps for run in same if run.solved]
        median = f"{statistics.median(solved):,.0f}" if solved else "-"
        yield (
            f"| `{algorithm}` | {task} | {TARGETS[task]:g} | {len(solved)} of {len(same)} | {shown} | {median} "
            f"| {statistics.median(run.seconds for run in same):.0f} "
            f"| {sum(run.is_agreed for run in same)} of {len(same)} |"
        )


def main() -> None:
    """Print the table; keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=",".join(RUNS), help="ALGORITHM:TASK, separated by commas")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--mode", type=Mode, default=Mode.LOCAL)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one run")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in options.set)}
    runs: list[Run] = []
    with school("algorithms", options.peers, lambda _: None, options.timeout, keep=False) as nodes:
        for word in options.runs.split(","):
            algorithm, _, task = word.partition(":")
            for seed in range(options.seeds):
                runs.append(measure(nodes, algorithm, task, seed, options.mode, settings))
                print(runs[-1], flush=True)
    chosen = "".join(f" --set {word}" for word in options.set)
    command = (
        f"python benchmarks/algorithms.py --runs {options.runs} --peers {options.peers} --seeds {options.seeds} "
        f"--mode {options.mode}{chosen}"
    )
    lines = list(report(runs, options.peers, command))
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
