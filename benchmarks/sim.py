"""What do agreement and gossip cost as a swarm grows? Real cores on a simulated network (`shoal.training.sim`).

Seeded, so the simulated figures repeat to the last digit anywhere; processor time and memory are of this machine.

    python benchmarks/sim.py [--peers 8 32 128] [--epochs 20] [--loss 0.0] [--liars 0.0] [--seed 0]
    python benchmarks/sim.py --peers 1000 --epochs 2

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
from pathlib import Path

from shoal.training.sim import SimConfig, Swarm, limit_s

RESULT = Path(__file__).parent / "results" / "sim.md"
HEAD = """# A swarm as it grows

`python benchmarks/sim.py`: real cores, simulated machines (a factor of four apart) and network (50 ms round trips).
Up to 128 members learn, the others follow and store. *messages* are those of one member for one thing that one member
says; *kB* are what one member sends in an epoch, contributions of 40 kB included. CPU and memory are of one process on
one core of {machine}.

| peers | epochs | faults | agreed | epochs/h | wait s | messages | kB | duplicates | CPU s | MB per member |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def measure(config: SimConfig) -> dict[str, float]:
    """One swarm, in this process."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    swarm = Swarm(config)
    swarm.play(limit_s(config))
    report = swarm.report()
    counts = [member.gossip.statistics() for member in swarm.members.values()]
    fresh, known = sum(each.fresh for each in counts), sum(each.duplicates for each in counts)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "epochs": report.epochs,
        "agreed": report.agreed,
        "epochs_per_hour": report.epochs_per_hour,
        "wait_s": report.wait_s,
        "messages": report.messages_per_announcement,
        "bytes": report.bytes_per_peer_per_epoch,
        "duplicates": known / max(1, fresh + known),
        "cpu_s": time.process_time() - began,
        "mb": grown_kib / 1024 / config.peers,
    }


def row(config: SimConfig, got: dict[str, float]) -> str:
    """For the table."""
    parts = (("loss", config.loss), ("liars", config.liars))
    faults = ", ".join(f"{value:.0%} {name}" for name, value in parts if value) or "none"
    cells = [f"{config.peers}", f"{got['epochs']:.0f}", faults, f"{got['agreed']:.3f}"]
    cells += [f"{got['epochs_per_hour']:.0f}", f"{got['wait_s']:.2f}", f"{got['messages']:.2f}"]
    cells += [f"{got['bytes'] / 1000:.0f}", f"{got['duplicates']:.1%}", f"{got['cpu_s']:.1f}", f"{got['mb']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def keep(rows: list[str]) -> None:
    """Put rows into the result, in order of size."""
    old = RESULT.read_text().splitlines() if RESULT.exists() else []
    kept = {_name(line): line for line in (*old, *rows) if line.startswith("| ") and line[2].isdigit()}
    lines = sorted(kept.values(), key=lambda line: (int(line.split("|")[1]), line.split("|")[3]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(HEAD.format(machine=f"{platform.machine()}, {platform.system()}") + "\n".join(lines) + "\n")


def _name(line: str) -> tuple[str, str]:
    cells = line.split("|")
    return cells[1], cells[3]


def main() -> None:
    """Measure each size, and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--liars", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = []
    for peers in options.peers:
        config = SimConfig(
            peers=peers, epochs=options.epochs, loss=options.loss, liars=options.liars, seed=options.seed
        )
        if options.one:
            print(json.dumps(measure(config)))
            return
        command = [sys.executable, __file__, "--one", "--peers", str(peers), "--epochs", str(options.epochs)]
        command += ["--loss", str(options.loss), "--liars", str(options.liars), "--seed", str(options.seed)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(row(config, json.loads(done.stdout)))
        print(rows[-1], flush=True)
        keep(rows)


if __name__ == "__main__":
    main()
