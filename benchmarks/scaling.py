"""Does joining cost on one machine? Environment steps/s into one policy by one node, by three and by six of them.

Nodes of this machine learn CartPole-v1 with the settings that `shoal swarm create` gives, towards a return that cannot
be reached and without evaluations. They share the cores, of which one node's worker uses one; so what is shown is what
exchanging and merging take away. Each swarm is measured between two epochs of one window; one node is measured first
and last. What joining brings on machines of their own, `make scale` shows.

    python benchmarks/scaling.py [--seconds 30] [--nodes 3,6]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

from peers.nodes import learn_together, nodes
from unequal import rate

RESULT = Path(__file__).parent / "results" / "scaling.md"
SETTLE_S = 15.0


def measure(count: int, seconds: float) -> float:
    """Environment steps/s of so many nodes together."""
    with nodes() as home:
        running = [home.up(f"node{number}") for number in range(count)]
        swarm = learn_together(running, "--eval-interval", "1000000")
        time.sleep(SETTLE_S)
        found = rate(running[0], swarm, seconds)
        print(f"{count} nodes: {found:,.0f} steps/s", flush=True)
        return found


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--nodes", default="3,6")
    options = parser.parse_args()
    before = measure(1, options.seconds)
    several = {int(word): measure(int(word), options.seconds) for word in options.nodes.split(",")}
    after = measure(1, options.seconds)
    base = (before + after) / 2
    lines = [
        "# Several nodes on one machine: environment steps/s into one policy",
        "",
        f"`python benchmarks/scaling.py --seconds {options.seconds:.0f} --nodes {options.nodes}`,",
        f"Python {platform.python_version()}, CartPole-v1, PPO, mode `local`; {platform.machine()} with",
        f"{os.cpu_count()} cores, which all processes share. One run each.",
        "",
        "| nodes | environment steps/s | of one node |",
        "|---|---|---|",
        f"| 1 | {before:,.0f} and {after:,.0f} | 1 |",
        *(f"| {count} | {found:,.0f} | **{found / base:.2f}** |" for count, found in several.items()),
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
