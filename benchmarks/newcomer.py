"""How long does a newcomer take, from ``shoal join`` to its first contribution to the common policy?

Two nodes of this machine learn CartPole-v1. A third, whose node is up, joins: the clock starts with the command and
stops when a node that was there before sees a round with the newcomer's samples in it. All share the machine's cores,
and the newcomer's worker has yet to start, import torch and fetch the current policy.

    python benchmarks/newcomer.py [--times 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from learning import shoal

from shoal.node.api.client import Client
from shoal.node.config import NodeConfig

RESULT = Path(__file__).parent / "results" / "newcomer.md"


def measure(home: Path) -> tuple[float, float]:
    """Seconds until ``join`` returned, and until the newcomer had contributed."""
    profiles = ["first", "second", "newcomer"]
    started = []
    try:
        for profile in profiles:
            started += [shoal(home, profile, "up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")]
        target = ["--min-learners", "2", "--target-return", "100000"]
        created = shoal(home, "first", "swarm", "create", "--task", "gym:CartPole-v1", "--algorithm", "ppo", *target)
        swarm, ticket = str(created["swarm"]), str(created["ticket"])
        shoal(home, "second", "join", ticket, "-d")
        with Client(NodeConfig(home=home, profile="first").paths, "first") as client:
            for shown in client.watch_swarm(swarm):
                if shown.epoch >= 3:
                    break
            began = time.monotonic()
            shoal(home, "newcomer", "join", ticket, "-d")
            joined = time.monotonic() - began
            for shown in client.watch_swarm(swarm):
                if any(m.peer_id == started[2]["peer_id"] and m.rounds > 0 for m in shown.members):
                    break
            return joined, time.monotonic() - began
    finally:
        for profile in profiles[: len(started)]:
            shoal(home, profile, "down")


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for _ in range(options.times):
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            rows.append(measure(Path(folder)))
            print(rows[-1], flush=True)
    lines = [
        "# A newcomer: from `shoal join` to its first contribution",
        "",
        f"`python benchmarks/newcomer.py --times {options.times}`, Python {platform.python_version()}, CartPole-v1,",
        f"{platform.machine()} with {os.cpu_count()} cores, which the three nodes and their workers share.",
        "",
        "| run | `join` returned after | contributed after |",
        "|---|---|---|",
        *(
            f"| {index + 1} | {joined:.2f} s | {contributed:.2f} s |"
            for index, (joined, contributed) in enumerate(rows)
        ),
        "",
        f"Median {statistics.median(row[1] for row in rows):.2f} s, longest {max(row[1] for row in rows):.2f} s.",
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
