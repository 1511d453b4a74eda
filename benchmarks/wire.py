"""The wire against Lattica's and against libp2p itself, side by side in one run, each end a process of its own.

Shoal is measured by ``shoal bench`` between two real nodes on loopback; Lattica (the extra ``peers``) by its own
package in the same way. Rounds alternate, so that whatever else the machine does hits all alike.

    python benchmarks/wire.py [--rounds 3] [--seconds 5] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "wire.md"
SHOAL = [sys.executable, "-m", "shoal.cli.main"]
TENSOR_BYTES = 256_000_000  # 64 million float32
LOAD_BYTES = 1_000_000_000


class Other:
    """A peer of another make: a process that measures, and one that it measures against."""

    def __init__(self, script: str, server: subprocess.Popen[str], *address: str) -> None:
        self.server = server
        self.client = start(script, "measure", *address)
        assert self.client.stdout is not None
        assert self.client.stdout.readline(), f"{script} did not connect"

    def ask(self, **wanted: Any) -> float:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(json.dumps(wanted) + "\n")
        self.client.stdin.flush()
        return float(json.loads(self.client.stdout.readline())["figure"])


def start(script: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "peers" / script), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def lattica() -> Iterator[Other]:
    port = free_port()
    server = start("lattica_wire.py", "serve", str(port))
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{first_line(server)}"
    with ended(Other("lattica_wire.py", server, str(free_port()), address)) as other:
        yield other


@contextmanager
def libp2p() -> Iterator[Other]:
    server = start("libp2p_wire.py", "serve")
    with ended(Other("libp2p_wire.py", server, first_line(server))) as other:
        yield other


@contextmanager
def ended(other: Other) -> Iterator[Other]:
    try:
        yield other
    finally:
        other.client.kill()
        other.server.kill()


def shoal(kind: str, *words: str, seconds: float) -> dict[str, Any]:
    command = [*SHOAL, "bench", kind, *words, "--seconds", str(seconds), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["secure"], figures
    return figures


def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Every figure of every round."""
    got: dict[str, list[float]] = defaultdict(list)
    calls = (("128, 64", 128, 64), ("128, 1", 128, 1), ("256 KiB, 16", 256 * 1024, 16))
    tensor = ("--size", str(TENSOR_BYTES))
    for number in range(rounds):
        for name, size, concurrency in calls:
            words = ("--size", str(size), "--concurrency", str(concurrency))
            got[f"shoal {name}"].append(shoal("rpc", *words, seconds=seconds)["calls_per_s"])
            with lattica() as other:
                got[f"lattica {name}"].append(
                    other.ask(kind="rpc", size=size, concurrency=concurrency, seconds=seconds)
                )
        got["shoal tensor"].append(shoal("stream", *tensor, seconds=seconds)["mb_per_s"])
        with lattica() as other:
            got["lattica tensor"].append(other.ask(kind="stream", size=TENSOR_BYTES))
        got["shoal by libp2p"].append(shoal("stream", *tensor, "--transport", "libp2p", seconds=seconds)["mb_per_s"])
        with libp2p() as other:
            got["libp2p"].append(other.ask(size=TENSOR_BYTES))
        loaded = shoal("load", "--size", str(LOAD_BYTES), seconds=seconds)
        for key in (
            *("idle_p99_ms", "loaded_p99_ms", "ratio_p99"),
            *("transfer_mb_per_s", "sender_memory_mb", "receiver_memory_mb"),
        ):
            got[key].append(loaded[key])
        print(f"round {number + 1} of {rounds}: " + json.dumps({name: values[-1] for name, values in got.items()}))
        sys.stdout.flush()
    return got


def table(got: dict[str, list[float]], options: argparse.Namespace) -> str:
    """The result, as it is kept."""
    mid = {name: statistics.median(values) for name, values in got.items()}

    def against(what: str, ours: str, theirs: str, unit: str, target: float) -> str:
        ratio = mid[ours] / mid[theirs]
        met = "yes" if ratio >= target else "no"
        return f"| {what} | {mid[ours]:,.0f} {unit} | {mid[theirs]:,.0f} {unit} | {ratio:.2f} | ≥ {target:g} | {met} |"

    fast, p99 = mid["shoal tensor"], mid["ratio_p99"]
    memory = max(mid["sender_memory_mb"], mid["receiver_memory_mb"])
    rounds = "\n".join(
        f"| {name} | " + " | ".join(f"{value:,.4g}" for value in values) + " |" for name, values in got.items()
    )
    return f"""\
# The wire

`python benchmarks/wire.py --rounds {options.rounds} --seconds {options.seconds:g}`: medians of {options.rounds} \
alternating rounds, both ends on this machine, over loopback,
each a process of its own, always encrypted and authenticated (Shoal: TLS 1.3 lanes, or noise where it says libp2p; the
others: noise). An echo's bytes go there and back; a tensor goes one way, and its digest is checked.

| what | Shoal | against | ratio | target | met |
|---|---|---|---|---|---|
| | | **Lattica** | | | |
{against("echo of 128 B, 64 in flight", "shoal 128, 64", "lattica 128, 64", "calls/s", 10)}
{against("echo of 128 B, one at a time", "shoal 128, 1", "lattica 128, 1", "calls/s", 1.2)}
{against("echo of 256 KiB, 16 in flight", "shoal 256 KiB, 16", "lattica 256 KiB, 16", "calls/s", 2)}
{against("one float32 tensor of 256 MB", "shoal tensor", "lattica tensor", "MB/s", 3)}
| | | **libp2p's own stream** | | | |
{against("the same tensor by a libp2p stream", "shoal by libp2p", "libp2p", "MB/s", 0.9)}
| | | **a figure** | | | |
| the same tensor by lanes | {fast:,.0f} MB/s | 700 MB/s | {fast / 700:.2f} | ≥ 1 | {"yes" if fast >= 700 else "no"} |
| p99 of small calls while 1 GB is moved | {mid["loaded_p99_ms"]:.2f} ms | {mid["idle_p99_ms"]:.2f} ms without \
| {p99:.2f} | < 3 | {"yes" if p99 < 3 else "no"} |
| memory that this takes, on either side | {memory:.1f} MB | 64 MB | {memory / 64:.2f} | < 1 \
| {"yes" if memory < 64 else "no"} |

The 1 GB went at {mid["transfer_mb_per_s"]:,.0f} MB/s while the small calls, one after the other, took what they could \
of the same cores.

{machine()}

## Every round

| figure | {" | ".join(str(number + 1) for number in range(options.rounds))} |
|---|{"---|" * options.rounds}
{rounds}
"""


def machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in cpuinfo().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("libp2p", "lattica"))
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, {versions}."
    )


def cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="one short round, which is not kept")
    options = parser.parse_args()
    if importlib.util.find_spec("lattica") is None:
        sys.exit("Lattica is not installed; run: .venv/bin/pip install -e '.[peers]'")
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    result = table(measure(options.rounds, options.seconds), options)
    print(result)
    if not options.quick:
        RESULT.write_text(result)


if __name__ == "__main__":
    main()
