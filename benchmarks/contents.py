"""Do members merge contributions of 100 MB each? Three nodes, more in a round than a node has memory for contents.

Three nodes learn CartPole-v1 with networks so large that what each contributes to an epoch (its parameters and Adam's
moments) is 100 MB, three times that a round, where a node has 256 MiB of memory for contents. Measured from the join of
the last: the time to the first epochs in which all three have a part, and the most memory that each daemon had.

    python benchmarks/contents.py [--width 2048] [--epochs 3]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers.nodes import Node, nodes

RESULT = Path(__file__).parent / "results" / "contents.md"
NUM_NODES = 3
TIMEOUT_S = 400.0


def peak_mb(node: Node) -> float:
    """The most memory that a daemon had, without what it maps of files."""
    lines = Path(f"/proc/{node.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


PLUGIN = """
import numpy as np

from shoal.training.models import actor_critic
from shoal.training.algorithms.ppo import PPO as Wide


def quick(rows, columns, raw):
    return (raw.random_raw(rows * columns) * 2.0**-64 - 0.5).reshape(rows, columns) / np.sqrt(max(rows, columns))


actor_critic._orthogonal = quick
"""
"""PPO whose first values are no orthogonal matrices: those of such large networks take minutes to find."""


def install_plugin(folder: Path) -> dict[str, str]:
    """Put the algorithm ``wide`` into a folder; gives the environment of nodes that have it."""
    about = folder / "wide-1.dist-info"
    about.mkdir(parents=True)
    (folder / "shoal_wide.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wide\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[shoal.algorithms]\nwide = shoal_wide:Wide\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def contributions_mb(width: int) -> float:
    """What one member gives: of actor and critic, four observations in, two actions or one value out; three times."""
    num_parameters = sum(4 * width + width + width * width + width + width * out + out for out in (2, 1))
    return 3 * 4 * num_parameters / 1e6


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    with nodes() as home:
        environment = install_plugin(home.home / "plugin")
        running = [home.up(f"node{index}", environment) for index in range(NUM_NODES)]
        settings = ["--min-learners", str(NUM_NODES), "--target-return", "100000", "--batch-size", "512"]
        for each in (
            f"hidden_sizes=[{options.width},{options.width}]",
            "update_epochs=1",
            "num_minibatches=1",
        ):
            settings += ["--set", each]
        created = running[0].run("swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "wide", *settings)
        swarm, ticket = str(created["swarm"]), str(created["ticket"])
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.run("join", ticket, "-d"), running[1:]))
        began = time.monotonic()
        shown = []
        while not shown or min(each.epoch for each in shown) < options.epochs:
            if time.monotonic() > began + TIMEOUT_S:
                raise SystemExit(f"not {options.epochs} epochs in {TIMEOUT_S:.0f} s: {shown}")
            time.sleep(0.5)
            shown = []
            for node in running:
                with node.client() as client:
                    shown.append(client.swarm(swarm))
        took_s = time.monotonic() - began
        rounds = [next(m.rounds for m in each.members if m.is_self) for each in shown]
        errors = [each.error for each in shown if each.error]
        rows = [
            f"| {node.profile} | {each.epoch} | {number} | {peak_mb(node):.0f} |"
            for node, each, number in zip(running, shown, rounds, strict=True)
        ]
    size = contributions_mb(options.width)
    line = f"python benchmarks/contents.py --width {options.width} --epochs {options.epochs}"
    lines = [
        f"# Large contributions: {NUM_NODES} members, {size:.0f} MB of each in every epoch",
        "",
        f"`{line}`, Python {platform.python_version()}, {platform.machine()}",
        f"with {os.cpu_count()} cores, which all processes share.",
        f"{took_s:.0f} s until all had {options.epochs} epochs; errors: {'; '.join(errors) or 'none'}.",
        "",
        "| node | epoch | rounds it had a part in | most memory of the daemon, MB |",
        "|---|---|---|---|",
        *rows,
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
