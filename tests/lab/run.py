#!/usr/bin/env python
"""Two real nodes at every pair of kinds of site: do they connect, how, and how fast (``make lab``; root).

    tests/lab/run.py                                            every pair; at most a quarter of an hour
    tests/lab/run.py --pairs full_cone:symmetric,open:open      some
    tests/lab/run.py --pairs symmetric:symmetric --keep         leaves it all standing until Ctrl-C, to look around in

Three public nodes stand on the internet of the lab and relay. For each pair, two fresh nodes start with the ordinary
command and know nothing but these. Once both know how they are reached, ``shoal ping`` on one names the other, and its
peers are watched until the path is as good as `expected` says, or `SETTLE_S` have passed. Where it is not the best that
could be hoped for, both nodes are asked what they know of their NATs and what came of each rung of the ladder. Exit
status: 0 all pairs are as expected, 1 one is not, 2 the lab cannot run here.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Final, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package `lab` is

from rich.console import Console

from lab import netns
from lab.expected import expected, pairs
from lab.net import DELAY_MS, RATE, Lab
from lab.netns import LabError
from lab.nodes import POLL_S, LabNode, Relays, listen_addresses
from lab.report import Result, line, show, write
from lab.rules import KINDS, PAIRED
from lab.stage import peer_of
from shoal.node.api.client import Client
from shoal.protocol.errors import ShoalError

ROOT: Final = Path(__file__).resolve().parents[2]
SETTLE_S: Final = 15.0
PING_TIMEOUT_S: Final = 30.0
RUN_LIMIT_S: Final = 780.0
"""No pair begins after that; one that runs by then is bounded by its own limits."""


class PairRunner:
    """Runs pairs in one lab."""

    def __init__(self, lab: Lab, *, keep: bool) -> None:
        self._lab = lab
        self._keep = keep
        self._relays = Relays(lab)
        self._num_runs = 0

    def run(self, one: str, other: str) -> Result:
        """One pair, at sites of its own."""
        self._num_runs += 1
        sites = [self._lab.add(one)] if one in PAIRED else [self._lab.add(one), self._lab.add(other)]
        places = [(site, number) for site in sites for number in range(len(site.hosts))]
        nodes = [
            LabNode(site.hosts[number], self._lab.folder, f"pair{self._num_runs}-{end}")
            for (site, number), end in zip(places, "ab", strict=True)
        ]
        try:
            with ThreadPoolExecutor(2) as pool:
                started = [
                    pool.submit(node.up, listen=listen_addresses(*place), bootstrap=self._relays.addresses())
                    for node, place in zip(nodes, places, strict=True)
                ]
            for future in started:
                future.result()
            for node in nodes:
                node.wait_until_reachable()
            return measure(one, other, *nodes)
        except (LabError, ShoalError, subprocess.SubprocessError) as error:
            return Result(one, other, connected=False, problem=str(error))
        finally:
            if not self._keep:
                for node in nodes:
                    node.stop()
                for site in sites:
                    self._lab.remove(site)


def measure(one: str, other: str, a: LabNode, b: LabNode) -> Result:
    """Let one node call the other, and watch how it reaches it."""
    wanted = expected(one, other)
    ping = subprocess.Popen(
        a.command("ping", b.peer_id, "--json", "--count", "1"),
        env=a.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with a.client() as client:
            pong, problem, seen = _follow(ping, client, b.peer_id, wanted.is_met_by)
    finally:
        ping.kill()
        ping.communicate()
    path = seen[-1][1] if seen else ""
    if pong is None:
        return Result(one, other, connected=False, path=path, problem=problem, reasons=_reasons(a, b))
    answered_at, first_byte_s = pong
    began = answered_at - first_byte_s
    good = [when - began for when, path in seen if wanted.is_met_by(path)]
    best_path_s = max(first_byte_s, good[0]) if good else None
    if best_path_s is None:
        problem = f"{wanted.why}; the end of the caller's log:\n{a.log(6)}"
    result = Result(one, other, True, path, round(first_byte_s, 3), best_path_s and round(best_path_s, 3), problem)
    return result if result.is_best else replace(result, reasons=_reasons(a, b))


def _reasons(a: LabNode, b: LabNode) -> tuple[str, ...]:
    """What both know of their NATs, and what came of each rung by which one tried to reach the other."""
    told: list[str] = []
    for name, node, peer in (("a", a, b), ("b", b, a)):
        try:
            with node.client() as client:
                nat, known = client.nat(), peer_of(client, peer.peer_id)
        except ShoalError as error:
            told.append(f"{name} does not say why: {error}")
            continue
        told += [
            f"{name} by {each.family}: {each.reachability}, UDP {each.udp}, TCP ports {each.tcp_mapping}"
            for each in nat.families
            if (each.reachability, each.udp, each.tcp_mapping) != ("unknown", "unknown", "unknown")
        ]
        tried = [] if known is None else known.tried
        told += [f"{name} tried {each.rung}: {each.failure or 'it worked'}, {each.ago_s:.1f} s ago" for each in tried]
    return tuple(told)


def _follow(
    ping: subprocess.Popen[str], client: Client, peer: str, is_good: Callable[[str], bool]
) -> tuple[tuple[float, float] | None, str, list[tuple[float, str]]]:
    """Watch both.

    Returns:
        When the ping was answered and what it took; what went wrong with it; each path that was seen, with its time.
    """
    answers: IO[str] | None = ping.stdout
    errors: IO[str] | None = ping.stderr
    assert answers is not None
    assert errors is not None
    pong: tuple[float, float] | None = None
    seen: list[tuple[float, str]] = []
    deadline = time.monotonic() + PING_TIMEOUT_S
    while time.monotonic() < deadline:
        path = next((known.path for known in client.peers() if known.peer_id == peer), "")
        if path and (not seen or seen[-1][1] != path):
            seen.append((time.monotonic(), path))
        if pong is not None:
            if is_good(path):
                break
            time.sleep(POLL_S)
        elif select.select([answers], [], [], POLL_S)[0]:
            said = answers.readline()
            answer = json.loads(said) if said else {}
            if "first_byte_s" not in answer:
                return None, f"shoal ping ended with {ping.wait(5)}: {errors.read().strip()}", seen
            pong = time.monotonic(), float(answer["first_byte_s"])
            deadline = time.monotonic() + SETTLE_S
    return pong, "" if pong else f"shoal ping was not over in {PING_TIMEOUT_S:.0f} s", seen


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=_pairs, default=pairs(), metavar="KIND:KIND,…", help=", ".join(KINDS + PAIRED))
    parser.add_argument("--delay-ms", type=float, default=DELAY_MS, help="of each access link, one way")
    parser.add_argument("--loss", type=float, default=0.0, help="chance that an access link loses a packet")
    parser.add_argument("--rate", type=float, default=RATE, help="bytes/s of an access link, each way")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "lab.json", metavar="PATH", help="what to write")
    parser.add_argument("--keep", action="store_true", help="leave it standing until Ctrl-C")
    return parser.parse_args()


def _pairs(text: str) -> list[tuple[str, str]]:
    asked = [(one, other or one) for one, _, other in (pair.partition(":") for pair in text.split(","))]
    known = {pair for one, other in pairs() for pair in ((one, other), (other, one))}
    for pair in asked:
        if pair not in known:
            raise argparse.ArgumentTypeError(f"{':'.join(pair)} is no pair of {', '.join(KINDS + PAIRED)}")
    return asked


def _run(options: argparse.Namespace, console: Console) -> list[Result]:
    results: list[Result] = []
    ends_at = time.monotonic() + RUN_LIMIT_S
    link = {"delay_ms": options.delay_ms, "loss": options.loss, "rate": options.rate}
    with Lab(**link) as lab:
        runner = PairRunner(lab, keep=options.keep)
        for number, (one, other) in enumerate(options.pairs, 1):
            if time.monotonic() < ends_at:
                result = runner.run(one, other)
            else:
                result = Result(one, other, connected=False, problem="not tried: the time for the whole run was over")
            results.append(result)
            told = "\n        ".join((line(result), *result.reasons))
            console.print(f"{number:>3}/{len(options.pairs)} {told}", markup=False, highlight=False, soft_wrap=True)
        show(results, console)
        write(results, options.json)
        console.print(f"written: {options.json}", highlight=False)
        if options.keep:
            console.print(
                f"SHOAL_HOME is {lab.folder}; the namespaces, until Ctrl-C:", *netns.names(lab.prefix), sep="\n"
            )
            signal.pause()
    return results


def main() -> int:
    """Run the lab; gives the exit status."""
    options = _parse()
    if reason := netns.missing():
        sys.stderr.write(f"{reason}\n")
        return 2
    signal.signal(signal.SIGTERM, _end)
    try:
        results = _run(options, Console(width=None if sys.stdout.isatty() else 130, emoji=False))
    except LabError as error:
        sys.stderr.write(f"the NAT lab does not stand: {error}\n")
        return 2
    return 0 if all(result.is_good for result in results) else 1


def _end(*_: object) -> NoReturn:
    raise SystemExit(143)  # by which everything is taken down on the way out


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
