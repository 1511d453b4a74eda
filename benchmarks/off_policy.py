"""How many environment steps each algorithm needs, by all learners together, until a task is solved.

The learners are the real ones in one process and without a network, as in `joining.py`: every epoch each collects what
a learner collects, and what they want averaged is merged as in a swarm. A run ends at the first evaluation, every
second epoch and over 20 greedy episodes, whose mean return reaches the threshold, or when the steps are spent.

    python benchmarks/off_policy.py [--runs dqn:gym:CartPole-v1:475:100000 ...] [--learners 1,3] [--seeds 3]
                                    [--mode local] [--batch 256] [--set gamma=0.99 ...] [--keep]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from joining import update_together

from shoal.protocol.ids import PeerId
from shoal.training.algorithms import load_algorithm
from shoal.training.manifest import Manifest, Mode
from shoal.training.tasks import load_task

RESULT: Final = Path(__file__).parent / "results" / "off_policy.md"
RUNS: Final = ["dqn:gym:CartPole-v1:475:100000", "sac:gym:Pendulum-v1:-200:40000"]


@dataclass(frozen=True, slots=True)
class Plan:
    """An algorithm, a task, the return at which it counts as solved, and the steps that it has for it."""

    algorithm: str
    task: str
    threshold: float
    max_env_steps: int

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The inverse of how ``--runs`` writes it."""
        algorithm, scheme, name, threshold, steps = text.split(":")
        return cls(algorithm, f"{scheme}:{name}", float(threshold), int(steps))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run went.

    Attributes:
        env_steps: of all learners together, until the end.
        last: mean return of the last evaluation.
        cpu_s: seconds of one core for everything.
    """

    plan: Plan
    learners: int
    seed: int
    env_steps: int
    last: float
    cpu_s: float

    @property
    def is_solved(self) -> bool:
        """Whether the last evaluation reached the threshold."""
        return self.last >= self.plan.threshold


def measure(plan: Plan, count: int, seed: int, mode: Mode, batch: int, settings: dict[str, Any]) -> Outcome:
    """One run."""
    began, task = time.process_time(), load_task(plan.task)
    names = [PeerId.of_public_key(bytes([number + 1]) * 32) for number in range(count)]
    manifest = Manifest(
        owner=names[0],
        task=plan.task,
        algorithm=plan.algorithm,
        seed=seed,
        mode=mode,
        hyperparameters=settings,
        batch_per_learner=batch,
    )
    learners = [load_algorithm(plan.algorithm).learner(manifest, task, peer=name) for name in names]
    env_steps, epoch, last = 0, 0, float("-inf")
    while env_steps < plan.max_env_steps and last < plan.threshold:
        env_steps += sum(learner.collect(batch).samples for learner in learners)
        update_together(learners, names, 0)
        epoch += 1
        if epoch % manifest.eval_interval == 0:
            last = statistics.fmean(learners[0].evaluate(manifest.eval_episodes, (seed + 1_000_003) % 2**32))
    return Outcome(plan, count, seed, env_steps, round(last, 1), round(time.process_time() - began, 1))


def report(outcomes: Sequence[Outcome], command: str) -> list[str]:
    """The tables, in Markdown."""
    lines = [
        "# Algorithms: environment steps until a task is solved",
        "",
        f"`{command}`, Python {platform.python_version()}, {platform.machine()}, one thread.",
        "Real learners and merges in one process, without a network; settings that are not named are the defaults.",
        "Steps are those of all learners together until the first of the evaluations (every second epoch, 20 greedy",
        "episodes) whose mean return reaches the threshold.",
        "",
        "| algorithm | task | threshold | learners | steps, by seed | return then, by seed | one core, seconds each |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan, count in dict.fromkeys((each.plan, each.learners) for each in outcomes):
        same = [each for each in outcomes if (each.plan, each.learners) == (plan, count)]
        steps = ", ".join(f"{each.env_steps:,}" if each.is_solved else f"> {each.env_steps:,}" for each in same)
        returns = ", ".join(f"{each.last:g}" for each in same)
        seconds = ", ".join(f"{each.cpu_s:.0f}" for each in same)
        name = plan.task.partition(":")[2]
        lines.append(
            f"| `{plan.algorithm}` | {name} | {plan.threshold:g} | {count} | {steps} | {returns} | {seconds} |"
        )
    return lines


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--learners", default="1,3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mode", default="local", choices=[str(mode) for mode in Mode])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (each.split("=", 1) for each in options.set)}
    outcomes = []
    for plan in (Plan.parse(each) for each in options.runs):
        for count in (int(each) for each in options.learners.split(",")):
            for seed in range(options.seeds):
                outcomes.append(measure(plan, count, seed, Mode(options.mode), options.batch, settings))
                print(outcomes[-1], flush=True)
    command = f"python benchmarks/off_policy.py --batch {options.batch} --mode {options.mode}"
    lines = report(outcomes, command + "".join(f" --set {each}" for each in options.set))
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
