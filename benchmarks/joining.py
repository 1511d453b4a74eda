"""Does it help to join? Epochs until a task is learned, by one learner and by several, that are alike.

The learners are the real ones, each with environments of its own, in one process and without a network: every epoch
each collects what a learner collects, and what they want averaged is merged as in a swarm. On machines of their own an
epoch of several takes as long as one of a single learner, but for the exchange; so the epochs to the threshold are the
time to it. `make scale` measures that time, with nodes and links.

The threshold is passed at the first epoch at which the mean return of the last 100 training episodes, of all learners,
reaches it. Who has not passed after the limit counts with the limit, so the true ratio is at most as far from 1.

    python benchmarks/joining.py [--learners 1,2,4,8] [--tasks gym:LunarLander-v3] [--seeds 3] [--epochs 150]
                                 [--algorithm ppo] [--mode local] [--ahead 0.25] [--set learning_rate=3e-4 ...] [--keep]

With ``--ahead`` each collects that part of an epoch's samples while the one before is averaged, with the parameters
that its own steps led to, as learners do that wait for the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from shoal.protocol.ids import PeerId
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.base import Learner
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.manifest import Manifest, Mode
from shoal.training.tasks import load_task

RESULT: Final = Path(__file__).parent / "results" / "joining.md"
THRESHOLDS: Final = {
    "gym:LunarLander-v3": 200.0,
    "gym:InvertedDoublePendulum-v5": 8000.0,
    "gym:Hopper-v5": 1000.0,
    "gym:CartPole-v1": 450.0,
    "gym:Acrobot-v1": -100.0,
}
WINDOW: Final = 100


@dataclass(frozen=True, slots=True)
class Run:
    """One task, one number of learners, one seed.

    Attributes:
        epochs: until the threshold; the limit, if it was not passed.
        env_steps: by all together until then.
        passed: whether the threshold was passed.
        final_return: mean of 20 greedy episodes at the end.
        cpu_s: seconds of one core for everything.
    """

    task: str
    learners: int
    seed: int
    epochs: int
    env_steps: int
    passed: bool
    final_return: float
    cpu_s: float


def update_together(learners: Sequence[Learner], names: Sequence[PeerId], num_ahead: int) -> int:
    """One joint update: every exchange is merged and given to all; how many steps were taken before that."""
    updates = [learner.update() for learner in learners]
    exchanges = [next(update) for update in updates]
    ahead = sum(collect_ahead(learner, num_ahead) for learner in learners) if num_ahead else 0
    while True:
        merged = merge(
            [
                Contribution(name, exchange.weight, exchange.arrays)
                for name, exchange in zip(names, exchanges, strict=True)
                if exchange.arrays
            ]
        )
        over = 0
        for index, update in enumerate(updates):
            try:
                exchanges[index] = update.send(merged)
            except StopIteration:
                over += 1
        if over:
            return ahead


def collect_ahead(learner: Learner, number: int) -> int:
    """Take so many steps while an update waits; how many it took."""
    until = learner.samples + number
    return learner.collect_ahead(lambda: learner.samples >= until).samples


def measure(
    task_name: str,
    count: int,
    seed: int,
    threshold: float,
    limit: int,
    mode: Mode,
    ahead: float,
    settings: dict[str, Any],
    algorithm: str,
) -> Run:
    """Learn until the threshold is passed, or for ``limit`` epochs."""
    began = time.process_time()
    task = load_task(task_name)
    names = [PeerId.of_public_key(bytes([number + 1]) * 32) for number in range(count)]
    manifest = Manifest(
        owner=names[0], task=task_name, algorithm=algorithm, seed=seed, mode=mode, hyperparameters=settings
    )
    learners = [load_algorithm(algorithm).learner(manifest, task, peer=name) for name in names]
    recent: deque[float] = deque(maxlen=WINDOW)
    env_steps, epoch, passed = 0, 0, False
    while epoch < limit and not passed:
        epoch += 1
        for learner in learners:
            collected = learner.collect(manifest.batch.largest_share - learner.samples)
            env_steps += collected.samples
            recent.extend(collected.episode_returns)
        env_steps += update_together(learners, names, round(ahead * manifest.batch.largest_share))
        passed = len(recent) == WINDOW and statistics.fmean(recent) >= threshold
    final = statistics.fmean(learners[0].evaluate(20, seed + 1_000_003))
    return Run(task_name, count, seed, epoch, env_steps, passed, round(final, 1), round(time.process_time() - began, 1))


def report(runs: Sequence[Run], limit: int, command: str) -> list[str]:
    """The table, in Markdown."""
    lines = [
        "# Does it help to join? Epochs until a task is learned",
        "",
        f"`{command}`, Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}.",
        "Real learners and merges in one process, without a network; settings that are not named are the defaults.",
        "An epoch takes as long for several learners as for one. *Time* is the mean of the epochs, of one learner's;",
        f"a run that has not passed the threshold after {limit} epochs counts with these, marked >.",
        "",
        "| task | threshold | learners | epochs to it, by seed | environment steps, mean | greedy return then | time |",
        "|---|---|---|---|---|---|---|",
    ]
    firsts: dict[str, float] = {}
    for task, count in dict.fromkeys((run.task, run.learners) for run in runs):
        same = [run for run in runs if (run.task, run.learners) == (task, count)]
        epochs = statistics.fmean(run.epochs for run in same)
        first = firsts.setdefault(task, epochs)
        shown = ", ".join(f"{'' if run.passed else '>'}{run.epochs}" for run in same)
        returns = ", ".join(f"{run.final_return:.0f}" for run in same)
        env_steps = statistics.fmean(run.env_steps for run in same)
        lines.append(
            f"| {task} | {THRESHOLDS[task]:g} | {count} | {shown} | {env_steps:,.0f} | {returns} "
            f"| **{epochs / first:.2f}** |"
        )
    return lines


def main() -> None:
    """Print the table; keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", default="1,2,4,8")
    parser.add_argument("--tasks", default="gym:LunarLander-v3,gym:InvertedDoublePendulum-v5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=150, help="limit of one run")
    parser.add_argument("--algorithm", default="ppo")
    parser.add_argument("--mode", type=Mode, default=Mode.LOCAL)
    parser.add_argument("--ahead", type=float, default=0.0, help="part of an epoch collected while it is averaged")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in options.set)}
    runs: list[Run] = []
    for task in options.tasks.split(","):
        for count in map(int, options.learners.split(",")):
            for seed in range(options.seeds):
                limits = (THRESHOLDS[task], options.epochs)
                how = (options.mode, options.ahead, settings, options.algorithm)
                runs.append(measure(task, count, seed, *limits, *how))
                print(runs[-1], flush=True)
    chosen = "".join(f" --set {word}" for word in options.set)
    chosen += f" --algorithm {options.algorithm} --mode {options.mode} --ahead {options.ahead}"
    command = (
        f"python benchmarks/joining.py --tasks {options.tasks} --learners {options.learners} "
        f"--seeds {options.seeds} --epochs {options.epochs}{chosen}"
    )
    lines = report(runs, options.epochs, command)
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
