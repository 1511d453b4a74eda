"""Blocks from disk to disk beside the wire alone: ``shoal bench blocks`` and ``shoal bench stream``, turn by turn.

    python benchmarks/blocks.py [--rounds 5] [--size 256MB] [--large 1GB] [--lattica PYTHON]

Where other processes share the machine, MB/s say little and processor seconds a GB more. Prints `results/blocks.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COUNT = 256
BLOCK_BYTES = 1024 * 1024


def main() -> None:
    """Measure turn by turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="256MB")
    parser.add_argument("--large", default="1GB", help="whose memory is compared")
    parser.add_argument("--lattica", metavar="PYTHON", help="one that has lattica; without it, Lattica is left out")
    asked = parser.parse_args()
    rounds = []
    for number in range(asked.rounds):
        load = os.getloadavg()[0]
        found = [bench("stream", asked.size), bench("blocks", asked.size)]
        if asked.lattica:
            found.append(lattica(asked.lattica))
        rounds.append(found)
        print(table_row([number + 1, f"{load:.1f}", *(cell(each) for each in found)]), file=sys.stderr)
    show(asked, rounds, bench("blocks", asked.large))


def show(asked: argparse.Namespace, rounds: list[list[dict[str, Any]]], large: dict[str, Any]) -> None:
    """Print the page."""
    print("# Blocks from disk to disk\n")
    print(f"`python benchmarks/blocks.py --rounds {asked.rounds} --size {asked.size} --large {asked.large}`:")
    print("one giver, one receiver, both on this machine; processor seconds are of both, user and system.\n")
    print(table_row(["round", "stream", "blocks", "Lattica, Bitswap"][: 1 + len(rounds[0])]))
    print(table_row(["---"] * (1 + len(rounds[0]))))
    for number, found in enumerate(rounds, start=1):
        print(table_row([number, *(cell(each) for each in found)]))
    ratio = statistics.median(blocks["mb_per_s"] / stream["mb_per_s"] for stream, blocks, *_ in rounds)
    cpu = statistics.median(stream["cpu_s_per_gb"] / blocks["cpu_s_per_gb"] for stream, blocks, *_ in rounds)
    print(f"\nAgainst the stream: {ratio:.2f} of its MB/s (target 0.7), {cpu:.2f} in processor time (medians).")
    if asked.lattica:
        ratio = statistics.median(blocks["mb_per_s"] / other["mb_per_s"] for _, blocks, other in rounds)
        print(f"Against Lattica: {ratio:.2f} times its MB/s (target 2).")
    print(f"Memory on either side grew by {rounds[-1][1]['memory_mb']} MB for {asked.size}, and by")
    print(f"{large['memory_mb']} MB for {asked.large} (target 64 MB).")
    print("\nWhat the parts cost by themselves, alone in one thread, in the same minute:\n")
    print("| part | processor s/GB |\n|---|---|")
    for what, seconds in parts():
        print(table_row([what, f"{seconds:.2f}"]))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    print(f"\n{machine}, Python {platform.python_version()}.")


def cell(found: dict[str, Any]) -> str:
    """Of one run."""
    return f"{found['mb_per_s']:.0f} MB/s, {found['cpu_s_per_gb']:.2f} s/GB"


def table_row(cells: Sequence[object]) -> str:
    """Of Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def lattica(python: str) -> dict[str, Any]:
    """Its Bitswap: 128 blocks of a mebibyte, 8 asked for at a time."""
    script = Path(__file__).parent / "peers" / "lattica_blocks.py"
    done = subprocess.run([python, script, "measure", "128"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def bench(kind: str, size: str) -> dict[str, Any]:
    """One run of the command."""
    words = [sys.executable, "-m", "shoal.cli.main", "bench", kind, "--size", size, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parts() -> list[tuple[str, float]]:
    """What is done with each block beside sending it."""
    memory = mmap.mmap(-1, BLOCK_BYTES)
    memory[:] = os.urandom(BLOCK_BYTES)
    with tempfile.TemporaryDirectory() as folder:

        def write(number: int, flags: int) -> None:
            descriptor = os.open(Path(folder) / str(number), os.O_CREAT | os.O_WRONLY | flags, 0o600)
            os.write(descriptor, memory)
            os.close(descriptor)

        def read(number: int) -> None:
            descriptor = os.open(Path(folder) / str(number), os.O_RDONLY)
            os.readv(descriptor, [memory])
            os.close(descriptor)

        return [
            ("SHA-256, by the receiver", cost(lambda _: hashlib.sha256(memory).digest())),
            ("writing files by the cache, not done", cost(lambda number: write(number, 0))),
            ("reading files, by the giver", cost(read)),
            ("writing files past the cache, by the receiver", cost(lambda number: write(COUNT + number, os.O_DIRECT))),
        ]


def cost(act: Callable[[int], object]) -> float:
    """Of this process, in seconds a GB."""
    began = time.process_time()
    for number in range(COUNT):
        act(number)
    return (time.process_time() - began) / (COUNT * BLOCK_BYTES / 1e9)


if __name__ == "__main__":
    main()
