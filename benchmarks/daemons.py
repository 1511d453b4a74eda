"""What do the daemons cost beside the learning? Processor time of six nodes of one swarm, and that of their workers.

Six nodes on this machine learn CartPole-v1 with the settings that `shoal swarm create` gives, towards a return that
cannot be reached. From half a minute after the first epoch on, when they have found each other, the processor time of
the daemons, and that of their workers, is read from ``/proc``: a ratio that other load on the machine hardly changes.

    python benchmarks/daemons.py [--nodes 6] [--seconds 60] [--modes local,gradient]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from peers.nodes import Node, learn_together, nodes
from peers.notes import kept_notes

RESULT = Path(__file__).parent / "results" / "daemons.md"
NOTES = "## What limits it"
SETTLE_S = 30.0


@dataclass(frozen=True)
class Reading:
    """Of all nodes together, at one time."""

    at: float
    daemons_s: float
    workers_s: float
    epoch: int
    env_steps: int

    @classmethod
    def of(cls, running: list[Node], swarm: str) -> Reading:
        """Now."""
        with running[0].client() as client:
            shown = client.swarm(swarm)
        return cls(
            time.monotonic(),
            sum(node.daemon_s() for node in running),
            sum(node.workers_s() for node in running),
            shown.epoch,
            shown.env_steps,
        )


@dataclass(frozen=True)
class Row:
    """What one mode took."""

    mode: str
    seconds: float
    daemons_s: float
    workers_s: float
    epochs: int
    env_steps: int

    def cells(self) -> str:
        """The row of the table."""
        return (
            f"| {self.mode} | {self.seconds:.0f} | {self.daemons_s:.1f} | {self.workers_s:.1f} "
            f"| **{self.daemons_s / self.workers_s:.0%}** | {self.epochs / self.seconds:.2f} "
            f"| {self.env_steps / self.seconds:,.0f} | {1000 * self.daemons_s / max(1, self.epochs):.0f} ms |"
        )


def measure(mode: str, num_nodes: int, seconds: float) -> Row:
    """Start the nodes, let them learn, and stop them."""
    with nodes() as home:
        running = [home.up(f"node{index}") for index in range(num_nodes)]
        swarm = learn_together(running, "--mode", mode)
        time.sleep(SETTLE_S)
        before = Reading.of(running, swarm)
        time.sleep(seconds)
        after = Reading.of(running, swarm)
    return Row(
        mode,
        after.at - before.at,
        after.daemons_s - before.daemons_s,
        after.workers_s - before.workers_s,
        after.epoch - before.epoch,
        after.env_steps - before.env_steps,
    )


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--modes", default="local,gradient")
    options = parser.parse_args()
    rows = []
    for mode in options.modes.split(","):
        rows.append(measure(mode, options.nodes, options.seconds))
        print(rows[-1].cells(), flush=True)
    command = f"python benchmarks/daemons.py --nodes {options.nodes} --seconds {options.seconds:.0f}"
    lines = [
        f"# Daemons: processor time of {options.nodes} nodes of one swarm, beside that of their workers",
        "",
        f"`{command}`, Python {platform.python_version()}, CartPole-v1, PPO,",
        f"{platform.machine()} with {os.cpu_count()} cores, which all processes share.",
        "",
        "| mode | seconds | daemons, s | workers, s | ratio | epochs/s | env steps/s | daemons per epoch |",
        "|---|---|---|---|---|---|---|---|",
        *(row.cells() for row in rows),
    ]
    RESULT.write_text("\n".join([*lines, "", kept_notes(RESULT, NOTES)]).rstrip("\n") + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
