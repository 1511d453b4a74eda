"""What does a memory bring where not all is shown? CartPole-v1 without velocities, over three real nodes that average.

Each algorithm learns `hidden:CartPole-v1` (`peers.hidden_cartpole`) with and without ``memory=gru``, by seeds. Solved
is the first evaluation over 20 greedy episodes whose mean return is 475. Runs and nodes are those of `algorithms`.

    python benchmarks/memory.py [--algorithms ppo,a2c,vtrace] [--seeds 3] [--peers 3] [--mode local] [--keep]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from algorithms import Run, measure
from peers.hidden_cartpole import plugin_folder

from shoal.cli.school import school
from shoal.training.manifest import Mode

RESULT: Final = Path(__file__).parent / "results" / "memory.md"
TASK: Final = "hidden:CartPole-v1"
MEMORIES: Final = ("gru", "none")


def report(runs: Sequence[tuple[str, Run]], peers: int, command: str) -> Iterator[str]:
    """The table, in Markdown."""
    yield "# Memory: CartPole whose velocities are not shown, over real nodes"
    yield ""
    yield f"`{command}`, Python {platform.python_version()},"
    yield f"{platform.machine()} with {os.cpu_count()} cores, which all processes share. {peers} nodes, each a process"
    yield "with a worker. Solved: the mean of 20 greedy episodes reaches 475. Steps are of all nodes together; a run"
    yield "that did not solve it shows its best evaluation instead."
    yield ""
    yield "| algorithm | memory | solved | steps, by seed | seconds, median | same bits on all nodes |"
    yield "|---|---|---|---|---|---|"
    for key in dict.fromkeys((run.algorithm, memory) for memory, run in runs):
        same = [run for memory, run in runs if (run.algorithm, memory) == key]
        shown = ", ".join(f"{run.env_steps:,}" if run.solved else f"not ({run.best:.0f})" for run in same)
        yield (
            f"| `{key[0]}` | {key[1]} | {sum(run.solved for run in same)} of {len(same)} | {shown} "
            f"| {statistics.median(run.seconds for run in same):.0f} "
            f"| {sum(run.is_agreed for run in same)} of {len(same)} |"
        )


def main() -> None:
    """Print the table; keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="ppo,a2c,vtrace")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mode", type=Mode, default=Mode.LOCAL)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one run")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    runs: list[tuple[str, Run]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = plugin_folder(Path(folder) / "plugin")  # for the nodes
        with school("memory", options.peers, lambda _: None, options.timeout, keep=False) as nodes:
            for algorithm in options.algorithms.split(","):
                for memory in MEMORIES:
                    for seed in range(options.seeds):
                        run = measure(nodes, algorithm, TASK, seed, options.mode, {"memory": memory})
                        runs.append((memory, run))
                        print(memory, run, flush=True)
    command = (
        f"python benchmarks/memory.py --algorithms {options.algorithms} --peers {options.peers} "
        f"--seeds {options.seeds} --mode {options.mode}"
    )
    lines = list(report(runs, options.peers, command))
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
