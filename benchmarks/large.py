"""What does a round of a large model cost? Training loops at real nodes average so many parameters as float32.

Each loop is a process with a PyTorch model of that size (`shoal.training.exchange.Averager`), attached to a node of its
own on this machine. Its gradients are made up: what is measured is the averaging. Told are the seconds of each average,
whether all loops hold the same bits after it, and how much memory of their own (``RssAnon``; what is shared with the
loop, and files that the system may take back, are other) the daemons took beyond what they had before the first.

    python benchmarks/large.py [--millions 100] [--nodes 3] [--averages 3] [--mode diloco] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

from peers.nodes import nodes

RESULT: Final = Path(__file__).parent / "results" / "large.md"
LIMIT_S: Final = 540.0


def loop(options: argparse.Namespace) -> None:
    """One member: average a few times; a line of JSON for each."""
    import hashlib

    import torch

    from shoal.training.exchange import Averager

    torch.set_num_threads(1)
    model = torch.nn.ParameterList([torch.zeros(1000, 1000) for _ in range(options.millions)])
    with Averager(model, options.swarm, profile=options.profile) as averager, torch.no_grad():
        while averager.epoch < options.averages:
            for tensor in model:
                tensor.add_(torch.full_like(tensor, 0.001 * (1 + averager.epoch)))
            began = time.monotonic()
            averaged = averager.step(1)
            took = time.monotonic() - began
            if averaged is not None:
                whole = hashlib.sha256()
                for tensor in model:
                    whole.update(tensor.numpy())
                row = {"epoch": averaged.epoch, "members": averaged.members, "seconds": round(took, 2)}
                print(json.dumps(row | {"digest": whole.hexdigest()[:16]}), flush=True)
            else:
                time.sleep(0.1)


def own_mb(pid: int) -> float:
    """Memory that a process has for itself, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def main() -> None:
    """Play it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--averages", type=int, default=3)
    parser.add_argument("--mode", default="diloco")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--swarm", help=argparse.SUPPRESS)
    parser.add_argument("--profile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        loop(options)
        return
    rows: list[dict[str, object]] = []
    with nodes() as home:
        running = [home.up(f"node{number}") for number in range(options.nodes)]
        before = [own_mb(node.pid) for node in running]
        most = list(before)
        words = [sys.executable, __file__, "--millions", str(options.millions), "--nodes", str(options.nodes)]
        words += ["--averages", str(options.averages), "--mode", options.mode]
        environment = os.environ | {"SHOAL_HOME": str(home.home)}

        def begin(number: int, *more: str) -> subprocess.Popen[str]:
            command = [*words, "--profile", f"node{number}", *more]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

        settings = ("--batch-per-learner", "1", "--min-learners", str(options.nodes), "--mode", options.mode)
        created = running[0].run("swarm", "create", "--task", "loop:large", *settings)
        swarm, ticket = str(created["swarm"]), str(created["ticket"])
        for node in running[1:]:
            node.run("join", ticket, "-d")
        members = [begin(number, "--swarm", swarm) for number in range(options.nodes)]

        def read(member: subprocess.Popen[str]) -> None:
            assert member.stdout is not None
            rows.extend(json.loads(line) for line in member.stdout)

        readers = [threading.Thread(target=read, args=(member,), daemon=True) for member in members]
        for reader in readers:
            reader.start()
        until = time.monotonic() + LIMIT_S
        while any(reader.is_alive() for reader in readers) and time.monotonic() < until:
            most = [max(high, own_mb(node.pid)) for high, node in zip(most, running, strict=True)]
            time.sleep(0.05)
        for member in members:
            member.kill()
    grown = [high - low for high, low in zip(most, before, strict=True)]
    lines = [
        f"# Averages of {options.millions} million parameters",
        "",
        f"`python benchmarks/large.py --millions {options.millions} --nodes {options.nodes} --mode {options.mode}`,",
        f"Python {platform.python_version()}, {platform.machine()} with {os.cpu_count()} cores, which all share.",
        "",
        "| average | members | seconds, of each | the same bits |",
        "|---|---|---|---|",
    ]
    for epoch in sorted({int(str(row["epoch"])) for row in rows}):
        same = [row for row in rows if row["epoch"] == epoch]
        alike = len({row["digest"] for row in same}) == 1 and len(same) == options.nodes
        seconds = ", ".join(str(row["seconds"]) for row in same)
        lines.append(f"| {epoch} | {same[0]['members']} | {seconds} | {'yes' if alike else 'no'} |")
    lines += ["", f"Own memory of the daemons grew by {', '.join(f'{each:.0f}' for each in grown)} MB at most."]
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
