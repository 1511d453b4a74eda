"""How far do liars bend what is learned by reinforcement? CartPole by ten learners, of whom one, two or three lie.

The learners are the real ones, in one process and without a network: every epoch each honest one collects and
optimises, and what all say is checked and merged as a worker does it: what no honest learner can have made is left out,
the rest is merged by the manifest's aggregator. The liars know what the honest say (`tests/hostile/poison.py`); what
they would have collected is lost. Nobody is told how many lie.

Told is the mean return of 20 greedy episodes after so many epochs.

    python benchmarks/robust_rl.py [--epochs 25] [--seeds 1] [--task gym:CartPole-v1] [--keep]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.hostile.poison import ATTACKS, poison  # noqa: E402  after the path is known

from shoal.protocol.errors import ProtocolError  # noqa: E402
from shoal.protocol.ids import PeerId  # noqa: E402
from shoal.training.algorithms import DivergedError, Exchange  # noqa: E402
from shoal.training.algorithms.ppo import PPO  # noqa: E402
from shoal.training.exchange.averager import Arrays, Contribution, merge, validate  # noqa: E402
from shoal.training.exchange.outliers import outliers  # noqa: E402
from shoal.training.exchange.rules import Aggregator  # noqa: E402
from shoal.training.manifest import Manifest  # noqa: E402
from shoal.training.tasks import load_task  # noqa: E402

RESULT: Final = Path(__file__).parent / "results" / "robust_rl.md"
NAMES: Final = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 11))
RULES: Final = ("mean", "nnm+trimmed_mean")
LIARS: Final = (1, 2, 3)
BATCH: Final = 512
ALLOWED: Final = 0.95


def averaged(exchange: Exchange, said: Sequence[Contribution], aggregator: Aggregator) -> Arrays:
    """As `shoal.training.worker.Worker` merges a ballot."""
    let_in = []
    for each in said:
        try:
            validate(each, exchange.template)
            exchange.check(each)
        except ProtocolError:
            continue
        let_in.append(each)
    absurd = outliers(let_in, exchange.scales)
    let_in = [each for each in let_in if each.author not in absurd]
    return merge(let_in, aggregator, centres=exchange.centres)


def learned(task_name: str, rule: str, attack: str | None, liars: int, epochs: int, seed: int) -> float:
    """The mean return of what the honest hold in the end; of their last sound policy, if a merge leads nowhere."""
    task, aggregator, rng = load_task(task_name), Aggregator.parse(rule), np.random.default_rng([seed, liars])
    manifest = Manifest(
        owner=NAMES[0], task=task_name, algorithm="ppo", seed=seed, aggregator=rule, batch_per_learner=BATCH
    )
    honest = NAMES[: len(NAMES) - liars]
    learners = [PPO().learner(manifest, task, peer=name) for name in honest]
    for _ in range(epochs):
        for learner in learners:
            learner.collect(BATCH)
        updates = [learner.update() for learner in learners]
        exchanges = [next(update) for update in updates]
        said = [
            Contribution(name, exchange.weight, exchange.arrays)
            for name, exchange in zip(honest, exchanges, strict=True)
        ]
        if attack is not None:
            centres = {name: np.asarray(array) for name, array in exchanges[0].centres.items()}
            said += poison(attack, said, NAMES[len(honest) :], rng, centres)
        average = averaged(exchanges[0], said, aggregator)
        for update in updates:
            try:
                update.send(average)
            except (StopIteration, DivergedError):
                continue
    return statistics.fmean(learners[0].evaluate(20, seed + 1_000_003))


def main() -> None:
    """Print the table; keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="gym:CartPole-v1")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()

    def returns(rule: str, attack: str | None, liars: int) -> float:
        return statistics.fmean(
            learned(options.task, rule, attack, liars, options.epochs, seed) for seed in range(options.seeds)
        )

    clean = {rule: returns(rule, None, 0) for rule in RULES}
    lines = [
        "# Liars among ten learners",
        "",
        f"`python benchmarks/robust_rl.py --task {options.task} --epochs {options.epochs} --seeds {options.seeds}`,",
        f"Python {platform.python_version()}, {platform.machine()}.",
        "",
        f"| liars of 10 | attack | {' | '.join(f'`{rule}`' for rule in RULES)} |",
        "|---|---|" + "---|" * len(RULES),
        f"| 0 | | {' | '.join(f'{clean[rule]:.0f}' for rule in RULES)} |",
    ]
    print("\n".join(lines[4:]), flush=True)
    kept = num = 0
    for liars in LIARS:
        for attack in ATTACKS:
            row = {rule: returns(rule, attack, liars) for rule in RULES}
            num += 1
            kept += row[RULES[-1]] >= ALLOWED * clean["mean"]
            lines.append(f"| {liars} | {attack} | {' | '.join(f'{row[rule]:.0f}' for rule in RULES)} |")
            print(lines[-1], flush=True)
    lines += ["", f"By `{RULES[-1]}` {kept} of {num} rows keep {ALLOWED:.0%} of the clean return, {clean['mean']:.0f}."]
    print(lines[-1], f"({time.monotonic() - began:.0f} s)")
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
