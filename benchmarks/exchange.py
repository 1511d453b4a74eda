"""All-reduce beside hivemind's averager and torchft's process group, on one machine, in one run.

Four peers, each a process of its own, reduce an array of float32 to its mean. Shoal is measured by ``shoal bench
allreduce`` between real nodes; hivemind and torchft (the extra ``peers``) by their own packages. Rounds of all
alternate, so that whatever else the machine does hits all alike. A round lasts until the last peer has the result;
finding each other is not in it, with none of them. *Bus bandwidth* is what a ring would move for it, 2 (n - 1) / n of
the float32 array, by the time, for each peer: the same bytes whatever the codec, so that it says what a smaller one
gains.

Shoal's lanes are encrypted and authenticated (TLS 1.3), and every part is named by its hash; hivemind's streams are
encrypted by libp2p; torchft's are plain TCP, in one process per peer, without a daemon.

    python benchmarks/exchange.py [--peers 4] [--numel 4194304] [--rounds 7] [--python PYTHON] [--keep]

``--python`` is the interpreter that has hivemind and torchft, where that is another one than this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
RESULT: Final = HERE / "results" / "exchange.md"
SHOAL: Final = (sys.executable, "-m", "shoal.cli.main")
SHOAL_CODECS: Final = ("fp32", "int8")
HIVEMIND_CODECS: Final = ("fp32", "fp16", "int8")
TIMES_HIVEMIND: Final = 3.0
PART_OF_RAW: Final = 0.7
LEAST_ROUNDS: Final = 5
SHOAL_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Round:
    """One all-reduce, or what ``shoal bench`` says of some.

    Attributes:
        raw_mb_s: what the same lanes carry with nothing else done, where that was measured.
    """

    seconds: float
    max_error: float
    raw_mb_s: float | None = None


class Peer:
    """A process of another make."""

    def __init__(self, python: str, script: str, *words: object, log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / "peers" / script), *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        self._log = log

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                return dict(json.loads(line))
        sys.exit(f"a peer has ended:\n{self._log.read_text(errors='replace')[-2000:]}")

    def ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """With all that it started: hivemind's own processes do not end with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def hivemind(python: str, size: int, numel: int, codec: str, log: Path) -> Iterator[list[Peer]]:
    peers = [Peer(python, "hivemind_reduce.py", 0, size, numel, codec, log=log)]
    try:
        addresses = peers[0].answer()["addresses"]
        words = (size, numel, codec, *addresses)
        peers += [Peer(python, "hivemind_reduce.py", rank, *words, log=log) for rank in range(1, size)]
        for peer in peers[1:]:
            peer.answer()
        yield peers
    finally:
        for peer in peers:
            peer.end()


@contextlib.contextmanager
def torchft(python: str, size: int, numel: int, log: Path) -> Iterator[list[Peer]]:
    address = f"127.0.0.1:{free_port()}"
    peers = [Peer(python, "torchft_reduce.py", rank, size, numel, address, log=log) for rank in range(size)]
    try:
        for peer in peers:
            peer.answer()
        yield peers
    finally:
        for peer in peers:
            peer.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def one_round(peers: Sequence[Peer]) -> Round:
    """As slow and as wrong as the slowest and the wrongest of them."""
    with ThreadPoolExecutor(len(peers)) as pool:
        list(pool.map(lambda peer: peer.ask("prepare"), peers))
        answers = list(pool.map(lambda peer: peer.ask("go"), peers))
    return Round(max(each["seconds"] for each in answers), max(each["max_error"] for each in answers))


def shoal(size: int, numel: int, codec: str, rounds: int) -> Round:
    words = ("--peers", str(size), "--numel", str(numel), "--codec", codec, "--rounds", str(rounds), "--json")
    done = subprocess.run([*SHOAL, "bench", "allreduce", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bit_identical"], figures
    return Round(figures["seconds_median"], figures["max_error"], figures["lane_mb_s"])


def measure(options: argparse.Namespace, log: Path) -> dict[str, list[Round]]:
    """As many rounds of each; the first of the others' is not counted, as ``shoal bench`` does not count its own."""
    size, numel, got = options.peers, options.numel, defaultdict[str, list[Round]](list)
    with contextlib.ExitStack() as stack:
        others = {"torchft fp32": stack.enter_context(torchft(options.python, size, numel, log))}
        for codec in HIVEMIND_CODECS:
            others[f"hivemind {codec}"] = stack.enter_context(hivemind(options.python, size, numel, codec, log))
        for peers in others.values():
            one_round(peers)
        for number in range(options.rounds):
            for name, peers in others.items():
                got[name].append(one_round(peers))
            for codec in SHOAL_CODECS:
                got[f"shoal {codec}"].append(shoal(size, numel, codec, SHOAL_ROUNDS))
            shown = {name: round(rounds[-1].seconds, 3) for name, rounds in got.items()}
            print(f"round {number + 1} of {options.rounds}, s: {json.dumps(shown)}", flush=True)
    return got


def table(got: dict[str, list[Round]], options: argparse.Namespace) -> str:
    """The result, as it is kept."""
    seconds = {name: statistics.median(each.seconds for each in rounds) for name, rounds in got.items()}
    moved_mb = 2 * (options.peers - 1) / options.peers * 4 * options.numel / 1e6
    bus = {name: moved_mb / each for name, each in seconds.items()}

    def line(name: str) -> str:
        ratios = " | ".join(f"{bus[name] / bus[other]:.2f}" for other in ("hivemind fp32", "torchft fp32"))
        rounds = got[name]
        spread = f"{min(each.seconds for each in rounds):.3f} to {max(each.seconds for each in rounds):.3f}"
        error = max(each.max_error for each in rounds)
        return f"| {name} | {seconds[name]:.3f} | {spread} | **{bus[name]:,.0f}** | {ratios} | {error:.1e} |"

    raw = statistics.median(each.raw_mb_s or 0.0 for each in got["shoal fp32"])
    times, part = bus["shoal fp32"] / bus["hivemind fp32"], bus["shoal fp32"] / raw if raw else float("nan")
    targets = (
        ("float32, times hivemind's bus bandwidth", f"{times:.2f}", f"≥ {TIMES_HIVEMIND:g}", times >= TIMES_HIVEMIND),
        (f"of {raw:,.0f} MB/s raw by the same lanes", f"{part:.0%}", f"≥ {PART_OF_RAW:.0%}", part >= PART_OF_RAW),
    )
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        f"""\
# All-reduce beside hivemind's and torchft's

`python benchmarks/exchange.py --peers {options.peers} --numel {options.numel} --rounds {options.rounds}`
({where}, {versions(options.python)}; load {options.load}).
{options.peers} peers on one machine, {options.numel:,} float32; medians of {options.rounds} alternating rounds (of
Shoal each is a median of {SHOAL_ROUNDS} in new nodes). Peers are processes; finding each other is not measured.
Bus bandwidth, per peer: 2 (n - 1) / n of the float32 array by the time, whatever the codec.

| | median, s | rounds, s | bus, MB/s per peer | by hivemind fp32 | by torchft fp32 | largest error |
|---|---|---|---|---|---|---|""",
        *(line(name) for name in sorted(got)),
        """
| what | figure | target | met |
|---|---|---|---|""",
        *(f"| {what} | {figure} | {target} | {'yes' if met else 'no'} |" for what, figure, target, met in targets),
        """
Shoal's lanes are TLS 1.3 with both ends proven, and parts are named by their hashes; hivemind's streams are encrypted
by libp2p, with its Go daemon beside each peer; torchft's are plain TCP within the process.""",
    ]
    return "\n".join(lines) + "\n"


def versions(python: str) -> str:
    names = ("hivemind", "torchft", "torch")
    code = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print the table, and keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--numel", type=int, default=4_194_304)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--python", default=sys.executable, help="that has hivemind and torchft")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    if subprocess.run([options.python, "-c", "import hivemind, torchft"], capture_output=True, check=False).returncode:
        sys.exit("hivemind and torchft are not installed; run: .venv/bin/pip install -e '.[peers]'")
    if options.keep and options.rounds < LEAST_ROUNDS:
        sys.exit(f"what is kept is of {LEAST_ROUNDS} rounds or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by which the peers are ended on the way out
    options.load = f"{os.getloadavg()[0]:.1f} when it began"
    with tempfile.TemporaryDirectory(prefix="shoal-exchange-") as folder:
        result = table(measure(options, Path(folder) / "peers.log"), options)
    print(result)
    if options.keep:
        RESULT.write_text(result)


if __name__ == "__main__":
    main()
