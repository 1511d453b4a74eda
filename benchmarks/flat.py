"""Does a node grow with the age of its run? Memory, descriptors and disk of daemons that train and train.

Nodes learn CartPole-v1 with the settings that `shoal swarm create` gives, towards a return that cannot be reached.
Every few seconds the resident memory and the open descriptors of each daemon are read from ``/proc``, and the bytes of
its database and of its logs from the disk. The slopes are those of least squares from a minute after the first epoch
on.

    python benchmarks/flat.py [--nodes 2] [--minutes 8]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.nodes import Node, learn_together, nodes

RESULT = Path(__file__).parent / "results" / "flat.md"
WARM_S = 60.0
EVERY_S = 5.0
MEGABYTE = 1e6


@dataclass(frozen=True)
class Reading:
    """Of one node, at one time."""

    at: float
    memory_mb: float
    descriptors: float
    disk_mb: float
    log_mb: float

    @classmethod
    def of(cls, node: Node) -> Reading:
        """Now."""
        status = Path(f"/proc/{node.pid}/status").read_text()
        memory_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        profile = node.home / "profiles" / node.profile
        return cls(
            time.monotonic(),
            memory_kb * 1024 / MEGABYTE,
            len(list(Path(f"/proc/{node.pid}/fd").iterdir())),
            sum(_size(path) for path in profile.glob("node.db*")) / MEGABYTE,
            sum(_size(path) for path in profile.rglob("*.log*")) / MEGABYTE,
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # of a file that comes and goes
        return 0


def slope(readings: Sequence[Reading], what: str) -> float:
    """Of least squares, per minute."""
    times = [each.at / 60 for each in readings]
    values = [float(getattr(each, what)) for each in readings]
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    above = sum((at - mean_time) * (value - mean_value) for at, value in zip(times, values, strict=True))
    return above / sum((at - mean_time) ** 2 for at in times)


def row(node: Node, readings: Sequence[Reading]) -> str:
    """One node's of the table: for each figure the first, the last, the most, and the slope."""
    cells = []
    for what, digits in (("memory_mb", 1), ("descriptors", 0), ("disk_mb", 2), ("log_mb", 2)):
        values = [float(getattr(each, what)) for each in readings]
        told = f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}, at most {max(values):.{digits}f}"
        cells += [told, f"**{slope(readings, what):+.2f}**"]
    return f"| {node.profile} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    readings: dict[str, list[Reading]] = {}
    with nodes() as home:
        running = [home.up(f"node{index}") for index in range(options.nodes)]
        idle = [Reading.of(node).memory_mb for node in running]
        swarm = learn_together(running, "--max-env-steps", "1000000000")
        time.sleep(WARM_S)
        with running[0].client() as client:
            first = client.swarm(swarm).epoch
        began = time.monotonic()
        while time.monotonic() < began + 60 * options.minutes:
            for node in running:
                readings.setdefault(node.profile, []).append(Reading.of(node))
            time.sleep(EVERY_S)
        with running[0].client() as client:
            epochs = client.swarm(swarm).epoch - first
        rows = [row(node, readings[node.profile]) for node in running]
    command = f"python benchmarks/flat.py --nodes {options.nodes} --minutes {options.minutes:g}"
    lines = [
        f"# Age: {options.nodes} nodes that train CartPole-v1 for {options.minutes:g} minutes",
        "",
        f"`{command}`, Python {platform.python_version()}, {platform.machine()} with {os.cpu_count()} cores.",
        f"{epochs} epochs, {epochs / options.minutes / 60:.2f} a second. MB; slopes per minute.",
        f"Idle, before they had a run: {', '.join(f'{each:.0f}' for each in idle)} MB.",
        "",
        "| node | memory | slope | descriptors | slope | database | slope | logs | slope |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
