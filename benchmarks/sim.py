"""What do agreement and gossip cost as a swarm grows? Real cores on a simulated network (`shoal.training.sim`).

Seeded, so the simulated figures repeat to the last digit anywhere; processor time and memory are of this machine.

    python benchmarks/sim.py [--peers 8 32 128] [--epochs 20] [--loss 0.0] [--liars 0.0] [--seed 0]
    python benchmarks/sim.py --peers 128 --epochs 100 --loss 0.05 --kills-per-hour 200 --late 1 --liars 0.1
    python benchmarks/sim.py --peers 1000 10000 --epochs 4 --loss 0.05

Each size is a process of its own. A row of the result that is measured anew replaces the old one.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from shoal.training.sim import SimConfig, Swarm, limit_s

RESULT = Path(__file__).parent / "results" / "sim.md"
HEAD = """# A swarm as it grows

`python benchmarks/sim.py`: real cores, simulated machines (a factor of four apart) and network (50 ms round trips).
Up to 128 members learn, the others follow and store. *wait* is the mean in the rounds of an honest learner; *messages*
are those of one member for one thing that one member says; *kB* are what one member sends in an epoch, contributions
of 40 kB included. CPU and memory are of one process on one core of {machine}.

| peers | epochs | faults | agreed | stopped | epochs/h | wait s | messages | kB | lost s/kill | sim s | CPU s | MB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
FAULTS = ("loss", "kills_per_hour", "late", "liars")


def measure(config: SimConfig) -> dict[str, float]:
    """One swarm, in this process."""
    began = time.process_time()
    swarm = Swarm(config)
    swarm.play(limit_s(config))
    got = asdict(swarm.report())
    got["cpu_s"] = time.process_time() - began
    got["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return got


def row(config: SimConfig, got: dict[str, float]) -> str:
    """For the table."""
    parts = [f"{config.loss:.0%} loss"] if config.loss else []
    parts += [f"{config.kills_per_hour:.0f} kills/h"] if config.kills_per_hour else []
    parts += [f"{config.late} late"] if config.late else []
    parts += [f"{config.liars:.0%} liars"] if config.liars else []
    cells = [f"{config.peers}", f"{got['epochs']:.0f}", ", ".join(parts) or "none", f"{got['agreed']:.3f}"]
    cells += [f"{got['stopped']:.0f}", f"{got['epochs_per_hour']:.0f}", f"{got['wait_s']:.2f}"]
    cells += [f"{got['messages_per_announcement']:.2f}", f"{got['bytes_per_peer_per_epoch'] / 1000:.0f}"]
    cells += [f"{got['lost_s_per_kill']:.2f}", f"{got['seconds']:.0f}", f"{got['cpu_s']:.0f}", f"{got['mb']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def keep(rows: list[str]) -> None:
    """Put rows into the result, in order of size."""
    text = RESULT.read_text() if RESULT.exists() else ""
    table, mark, rest = text.partition("\n## ")  # what is written by hand below stays
    kept = {_name(line): line for line in (*table.splitlines(), *rows) if line.startswith("| ") and line[2].isdigit()}
    lines = sorted(kept.values(), key=lambda line: (int(line.split("|")[1]), line.split("|")[3]))
    RESULT.parent.mkdir(exist_ok=True)
    head = HEAD.format(machine=f"{platform.machine()}, {platform.system()}")
    RESULT.write_text(head + "\n".join(lines) + "\n" + mark + rest)


def _name(line: str) -> tuple[str, str]:
    cells = line.split("|")
    return cells[1], cells[3]


def main() -> None:
    """Measure each size, and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--kills-per-hour", type=float, default=0.0)
    parser.add_argument("--late", type=int, default=0)
    parser.add_argument("--liars", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = []
    for peers in options.peers:
        faults = {name: getattr(options, name) for name in FAULTS}
        config = SimConfig(peers=peers, epochs=options.epochs, seed=options.seed, **faults)
        if options.one:
            print(json.dumps(measure(config)))
            return
        command = [sys.executable, __file__, "--one", "--peers", str(peers), "--epochs", str(options.epochs)]
        command += ["--seed", str(options.seed)]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in faults.items()]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(row(config, json.loads(done.stdout)))
        print(rows[-1], flush=True)
        keep(rows)


if __name__ == "__main__":
    main()
