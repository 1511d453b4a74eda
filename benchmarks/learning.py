"""Does training together cost samples? Environment steps until CartPole-v1 is solved: one process against three peers.

*One process* is the algorithm alone: collect a batch, update, evaluate; no node, no network.
*Three peers* are three nodes on this machine, each its own process, that average every epoch (mode ``local``) under the
same manifest. Both stop at the first evaluation over 20 episodes whose mean return reaches 475.

    python benchmarks/learning.py [--seeds 5] [--task gym:CartPole-v1]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from shoal.protocol.ids import PeerId
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.local import update_together
from shoal.training.manifest import Manifest
from shoal.training.tasks import load_task

RESULT = Path(__file__).parent / "results" / "learning.md"
ALONE = PeerId.of_public_key(bytes(32))


def one_process(task_name: str, seed: int, max_env_steps: int) -> tuple[int | None, float]:
    """Environment steps until solved, and seconds."""
    task = load_task(task_name)
    manifest = Manifest(
        owner=ALONE, task=task_name, algorithm="ppo", seed=seed, target_return=task.target_return, eval_interval=1
    )
    learner = load_algorithm("ppo").learner(manifest, task, peer=ALONE)
    began, env_steps, epoch = time.monotonic(), 0, 0
    while env_steps < max_env_steps:
        env_steps += learner.collect(manifest.batch.largest_share).samples
        update_together({ALONE: learner})
        epoch += 1
        if epoch % manifest.eval_interval == 0:
            returns = learner.evaluate(manifest.eval_episodes, (seed + 1_000_003) % 2**32)
            if manifest.target_return is not None and statistics.fmean(returns) >= manifest.target_return:
                return env_steps, time.monotonic() - began
    return None, time.monotonic() - began


def shoal(home: Path, profile: str, *words: str) -> dict[str, object]:
    """Run one command of a node and read its answer."""
    command = [sys.executable, "-m", "shoal.cli.main", *words, "--profile", profile, "--json"]
    environment = os.environ | {"SHOAL_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    answer: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def peers(num_peers: int, task_name: str, seed: int, max_env_steps: int) -> tuple[int | None, float]:
    """Environment steps until solved by all peers together, and seconds from the first epoch."""
    profiles = [f"peer{index}" for index in range(num_peers)]
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        home = Path(folder)
        try:
            for profile in profiles:
                shoal(home, profile, "up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")
            options = [
                "--min-learners",
                str(num_peers),
                "--eval-interval",
                "1",
                "--seed",
                str(seed),
                "--max-env-steps",
                str(max_env_steps),
            ]
            created = shoal(home, profiles[0], "swarm", "create", "--task", task_name, "--algorithm", "ppo", *options)
            for profile in profiles[1:]:
                shoal(home, profile, "join", str(created["ticket"]), "-d")
            began = time.monotonic()
            while True:
                shown = shoal(home, profiles[0], "swarm", "show", str(created["swarm"]))
                if shown["phase"] == "done":
                    env_steps = shown["env_steps"]
                    assert isinstance(env_steps, int)
                    return (env_steps if shown["solved"] else None), time.monotonic() - began
                time.sleep(1)
        finally:
            for profile in profiles:
                subprocess.run(
                    [sys.executable, "-m", "shoal.cli.main", "down", "--profile", profile],
                    env=os.environ | {"SHOAL_HOME": str(home)},
                    capture_output=True,
                    check=False,
                )


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="gym:CartPole-v1")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--max-env-steps", type=int, default=300_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        single = one_process(options.task, seed, options.max_env_steps)
        together = peers(options.peers, options.task, seed, options.max_env_steps)
        rows.append((seed, single, together))
        print(rows[-1], flush=True)
    lines = [
        f"# Learning: environment steps until {options.task} is solved",
        "",
        f"`python benchmarks/learning.py --seeds {options.seeds}`, Python {platform.python_version()},",
        f"torch {torch.__version__},",
        f"{platform.machine()} with {os.cpu_count()} cores, which all processes share.",
        "",
        f"| seed | one process: steps | seconds | {options.peers} peers: steps in all | seconds |",
        "|---|---|---|---|---|",
    ]
    for seed, single, together in rows:
        cells = [
            f"{steps:,} | {seconds:.1f}" if steps else f"not solved | {seconds:.1f}"
            for steps, seconds in (single, together)
        ]
        lines.append(f"| {seed} | {cells[0]} | {cells[1]} |")
    solved = [[row[which][0] for row in rows if row[which][0]] for which in (1, 2)]
    for label, steps in zip(("one process", f"{options.peers} peers"), solved, strict=True):
        spread = statistics.stdev(steps) if len(steps) > 1 else 0.0
        lines.append("")
        lines.append(
            f"{label}: {len(steps)} of {len(rows)} solved, median {statistics.median(steps):,.0f}, "
            f"mean {statistics.fmean(steps):,.0f} ± {spread:,.0f} steps"
        )
    lines += [
        "",
        f"Ratio of the means, peers to one process: {statistics.fmean(solved[1]) / statistics.fmean(solved[0]):.2f}",
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
