"""What does a slow member cost a fast one, and what does a middling one bring? Environment steps/s into one policy.

Real nodes learn a CartPole-v1 whose step sleeps (`peers.slow_cartpole`), so that they are unequal without fighting for
this machine's cores: a fast one, one at a hundredth and one at a third of its speed. In one run the fast one learns
alone, then beside the slow one, then beside the middling one, then alone again; each time the policy's environment
steps are read off at its first and last epoch within the window. Alone is the mean of the first and the last. Small
batches and few optimiser steps, so that sleeping is nearly all that is done.

The slow one takes 1.6 s for a step of its four environments. Also shown: how long after it has joined it shows samples.

    python benchmarks/unequal.py [--seconds 40] [--modes local,gradient]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from peers.nodes import Node, nodes
from peers.slow_cartpole import SLEEP, plugin_folder

RESULT = Path(__file__).parent / "results" / "unequal.md"
FAST_S = 0.004
SPEEDS = {"fast": FAST_S, "hundredth": 100 * FAST_S, "third": 3 * FAST_S}
"""Seconds per step of one environment, of which each node has four side by side."""
SETTINGS = ("--batch-per-learner", "512", "--set", "update_epochs=4", "--set", "num_minibatches=8")
TARGET = ("--target-return", "100000", "--eval-interval", "1000000")
WARM_UP_S = 12.0
LONGEST_S = 120.0
POLL_S = 0.1


@dataclass(frozen=True)
class Row:
    """Environment steps/s in one mode, and seconds until the slow node showed samples."""

    mode: str
    alone: tuple[float, float]
    with_hundredth: float
    with_third: float
    first_samples_s: float

    @property
    def base(self) -> float:
        """Of the fast one alone."""
        return sum(self.alone) / 2

    def cells(self) -> str:
        """The row of the table."""
        return (
            f"| {self.mode} | {self.alone[0]:,.0f} and {self.alone[1]:,.0f} "
            f"| {self.with_hundredth:,.0f}: **{self.with_hundredth / self.base:.0%}** "
            f"| {self.with_third:,.0f}: **{self.with_third / self.base:.0%}** | {self.first_samples_s:.1f} s |"
        )


def rate(node: Node, swarm: str, seconds: float) -> float:
    """Environment steps/s from the first epoch in the window to the last."""
    seen: list[tuple[float, int]] = []
    ends = time.monotonic() + seconds
    with node.client() as client:
        steps = client.swarm(swarm).env_steps
        while time.monotonic() < ends or (len(seen) < 2 and time.monotonic() < ends + LONGEST_S):
            time.sleep(POLL_S)
            now = client.swarm(swarm).env_steps
            if now != steps:
                steps = now
                seen.append((time.monotonic(), steps))
    if len(seen) < 2:
        return 0.0
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def first_samples_s(node: Node, swarm: str) -> float:
    """Seconds until a node shows samples of its own; infinite if it does not."""
    began = time.monotonic()
    with node.client() as client:
        while time.monotonic() < began + LONGEST_S:
            if any(member.is_self and member.samples > 0 for member in client.swarm(swarm).members):
                return time.monotonic() - began
            time.sleep(POLL_S)
    return float("inf")


def measure(mode: str, seconds: float, logs: Path | None) -> Row:
    """Start the nodes, let them learn, and stop them."""
    with nodes() as home:
        path = plugin_folder(home.home / "plugin")
        running = {name: home.up(name, {"PYTHONPATH": path, SLEEP: str(sleep_s)}) for name, sleep_s in SPEEDS.items()}
        fast = running["fast"]
        settings = ("--mode", mode, *SETTINGS, *TARGET)
        created = fast.run("swarm", "create", "--task", "slow:CartPole-v1", "--algorithm", "ppo", *settings)
        swarm, ticket = str(created["swarm"]), str(created["ticket"])

        def beside(name: str) -> tuple[float, float]:
            running[name].run("join", ticket, "-d")
            shown_s = first_samples_s(running[name], swarm)
            time.sleep(WARM_UP_S)
            found = rate(fast, swarm, seconds)
            report(name, found)
            running[name].run("leave", swarm)
            return found, shown_s

        def alone() -> float:
            time.sleep(WARM_UP_S)
            found = rate(fast, swarm, seconds)
            report("alone", found)
            return found

        def report(name: str, found: float) -> None:
            print(f"{mode}, {name}: {found:,.0f} steps/s", flush=True)
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                for node in running.values():
                    shutil.copy(node.home / "profiles" / node.profile / "node.log", logs / f"{mode}-{node.profile}.log")

        before = alone()
        with_hundredth, shown_s = beside("hundredth")
        with_third, _ = beside("third")
        after = alone()
        return Row(mode, (before, after), with_hundredth, with_third, shown_s)


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--modes", default="local,gradient")
    parser.add_argument("--logs", type=Path, help="a folder for the nodes' logs, which else are deleted")
    options = parser.parse_args()
    rows = [measure(mode, options.seconds, options.logs) for mode in options.modes.split(",")]
    cases = ("fast one alone, before and after", "joined by one of a hundredth", "by one of a third")
    lines = [
        "# Unequal peers: environment steps/s into one policy",
        "",
        f"`python benchmarks/unequal.py --seconds {options.seconds:.0f}`, Python {platform.python_version()}, PPO, a",
        f"CartPole-v1 whose step sleeps {1000 * FAST_S:.0f} ms on the fast node; {' '.join(SETTINGS)}.",
        f"{platform.machine()} with {os.cpu_count()} cores, which all processes share. One run each: how far the two",
        "figures of the fast one alone lie apart is what chance and other load do.",
        "",
        f"| mode | {' | '.join(cases)} | a step of 1.6 s shows after |",
        "|---|---|---|---|---|",
        *(row.cells() for row in rows),
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
