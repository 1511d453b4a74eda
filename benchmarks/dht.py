"""How soon, and how surely, is what was said found in a DHT of N simulated peers? Real cores (`shoal.dht.sim`).

    python benchmarks/dht.py [--nodes 1000] [--seconds 30] [--session 3600] [--liars 0.0] [--latency 0.05] [--seed 0]

Prints a row of `results/dht.md`. Real nodes are measured by ``shoal bench dht``.
"""

from __future__ import annotations

import argparse
import resource
import time

from shoal.dht.sim import DhtSimConfig, simulate


def main() -> None:
    """Simulate once, and print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0, help="that are measured")
    parser.add_argument("--warm", type=float, default=30.0, help="seconds before that")
    parser.add_argument("--session", type=float, default=3600.0, help="half of the nodes leave within these seconds")
    parser.add_argument("--liars", type=float, default=0.0, help="part of the nodes")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds one way")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.process_time()
    report = simulate(
        DhtSimConfig(
            nodes=asked.nodes,
            seconds=asked.seconds,
            warm_s=asked.warm,
            latency_s=asked.latency,
            median_session_s=asked.session,
            liars=asked.liars,
            seed=asked.seed,
        )
    )
    cells = [str(asked.nodes), f"{asked.session:g}", f"{100 * asked.liars:g} %"]
    cells += [
        f"{measured.median_s:.2f} s, {100 * measured.success:.1f} % of {len(measured.seconds)}"
        for measured in (report.put, report.get, report.provide, report.find)
    ]
    cpu_s = time.process_time() - began
    cells += [f"{cpu_s:.0f}", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}"]
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
