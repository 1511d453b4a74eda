"""What does one member behind a slow uplink cost an all-reduce, with spans alike and with spans by measured uplinks?

Real hosts, each in a network namespace of its own behind a cable that the kernel shapes (`tests/lab/ground.py`), reduce
an array of float32. Nobody tells them what their cables carry. The first rounds are with spans alike, as nothing is
known: from these each measures its own uplink, as a node does in a run. Then rounds with spans alike and with spans by
what was measured alternate. A round lasts until the last member has the result. Parts that came too late to be in it
are counted.

The slowest one's floor is what its cable takes to carry its array once, which it must whatever it owns.

    sudo python benchmarks/uplinks.py [--mbit 100,100,100,10] [--numel 4194304] [--rounds 5] [--keep]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent
sys.path.insert(0, str(ROOT))

from tests.lab import ground as grounds  # noqa: E402  after the path is known
from tests.lab.ground import Ground  # noqa: E402
from tests.lab.machines import Machine  # noqa: E402

RESULT: Final = HERE / "results" / "uplinks.md"
SCRIPT: Final = HERE / "peers" / "uplink_reduce.py"
FIRST_ROUNDS: Final = 2
ALIKE, MEASURED = "alike", "by measured uplinks"
MBIT: Final = 125_000


class Peer:
    """A host on a machine."""

    def __init__(self, machine: Machine, seed: int, numel: int, log: Path) -> None:
        words = (sys.executable, str(SCRIPT), str(seed), machine.address, str(numel))
        with log.open("wb") as errors:
            self._process = machine.popen(
                *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._log = log
        self.info = self._answer()

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a peer has ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        return dict(json.loads(line))

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Round:
    """One all-reduce.

    Attributes:
        seconds: until the last had the result.
        owned: parts, of each.
        num_left_out: members' parts that came too late (`reducing.PULL_S`).
    """

    seconds: float
    owned: tuple[int, ...]
    num_left_out: int


class Swarm:
    """Hosts that have met."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.uplinks = [0] * len(peers)
        self._peers = peers
        self._num_rounds = 0
        for number, peer in enumerate(peers):
            peer.ask(meet=[other.info["address"] for other in peers[:number]])

    def round(self, claims: Sequence[int]) -> Round:
        """Reduce once."""
        self._num_rounds += 1
        named = {peer.info["peer"]: claim for peer, claim in zip(self._peers, claims, strict=True)}
        with ThreadPoolExecutor(len(self._peers)) as pool:
            answers = list(pool.map(lambda peer: peer.ask(reduce=f"{self._num_rounds}", claims=named), self._peers))
        assert len({answer["digest"] for answer in answers}) == 1, answers
        self.uplinks = [answer["uplink"] for answer in answers]
        owned = tuple(answer["owned"] for answer in answers)
        return Round(max(answer["seconds"] for answer in answers), owned, answers[0]["num_left_out"])


@contextlib.contextmanager
def swarm(mbits: Sequence[float], numel: int) -> Iterator[Swarm]:
    """Of a machine for each of these cables."""
    with Ground(len(mbits), grounds.WHOLE) as ground, contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        for number, mbit in enumerate(mbits):
            ground.shape(number, mbit)
            peers.append(Peer(ground.machines[number], number + 1, numel, ground.folder / f"{number}.log"))
            stack.callback(peers[-1].end)
        yield Swarm(peers)


def measure(mbits: Sequence[float], numel: int, rounds: int) -> tuple[dict[str, list[Round]], list[int]]:
    """Rounds of both kinds in turns; and what each member measured in the end, in bytes per second."""
    found: dict[str, list[Round]] = {ALIKE: [], MEASURED: []}
    nothing = [0] * len(mbits)
    with swarm(mbits, numel) as together:
        for _ in range(FIRST_ROUNDS):
            together.round(nothing)
        for _ in range(rounds):
            for kind, rounds_of in found.items():
                rounds_of.append(together.round(nothing if kind == ALIKE else together.uplinks))
                last = rounds_of[-1]
                uplinks = ", ".join(f"{uplink / MBIT:.1f}" for uplink in together.uplinks)
                parts = f"parts {last.owned}, {last.num_left_out} left out"
                print(f"{kind}: {last.seconds:.2f} s, {parts}; uplinks {uplinks} Mbit/s", flush=True)
        return found, together.uplinks


def table(options: argparse.Namespace, found: dict[str, list[Round]], uplinks: list[int]) -> str:
    """The page of results."""
    mbits = [float(word) for word in options.mbit.split(",")]
    count, floor_s = len(mbits), 4 * options.numel / (min(mbits) * MBIT)
    median = {kind: statistics.median(each.seconds for each in rounds) for kind, rounds in found.items()}
    lines = [
        "# One member behind a slow uplink: seconds per all-reduce",
        "",
        f"`python benchmarks/uplinks.py --mbit {options.mbit} --numel {options.numel} --rounds {options.rounds}`,",
        f"Python {platform.python_version()}: {count} hosts in network namespaces, behind cables of {options.mbit}",
        f"Mbit/s each way (tc-tbf); {options.numel:,} float32 in fp32. {platform.machine()} with {os.cpu_count()}",
        f"cores, which all share; load at the end {os.getloadavg()[0]:.1f}. Rounds of both kinds in turns.",
        "",
        "| spans | median s | of all rounds | parts owned, the last time | left out | times the floor |",
        "|---|---|---|---|---|---|",
        *(
            f"| {kind} | **{median[kind]:.2f}** | {min(r.seconds for r in rounds):.2f} to "
            f"{max(r.seconds for r in rounds):.2f} | {', '.join(map(str, rounds[-1].owned))} "
            f"| {sum(r.num_left_out for r in rounds)} | {median[kind] / floor_s:.2f} |"
            for kind, rounds in found.items()
        ),
        "",
        f"Spans by measured uplinks: **{median[ALIKE] / median[MEASURED]:.2f}** times as fast; by the bytes sent,",
        f"{count} members can gain {2 - 2 / count:.2f}. The floor is {floor_s:.2f} s, in which the slowest cable",
        "carries one array once.",
        f"Measured uplinks, Mbit/s: {', '.join(f'{uplink / MBIT:.1f}' for uplink in uplinks)}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the page if that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="100,100,100,10", help="of each member's cable, each way")
    parser.add_argument("--numel", type=int, default=4_194_304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    if lacking := grounds.missing():
        sys.exit(lacking)
    mbits = [float(word) for word in options.mbit.split(",")]
    found, uplinks = measure(mbits, options.numel, options.rounds)
    page = table(options, found, uplinks)
    print(page)
    if options.keep:
        RESULT.write_text(page + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
