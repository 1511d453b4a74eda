#!/usr/bin/env python
"""Does it help to join? Nodes on machines of limited, unequal size learn one policy (``make scale``; root).

    tests/lab/scale.py                                       the table; about an hour
    tests/lab/scale.py --cores 0.4 --cores 0.4,0.4,0.4,0.4   these swarms only
    tests/lab/scale.py --cores 0.4/0.4/0.4/0.4               four swarms of one node each, at the same time
    tests/lab/scale.py --tasks gym:CartPole-v1 --seeds 1 --limit-s 60 --json build/scale.json

What one node does is measured by four at a time that know nothing of each other: two processors of a host may share a
core, and then each is a sixth slower while the other one is busy, which is no cost of joining.

Each machine is a host of the lab with a share of a core (`machines`), 25 ms from the others, with 25 MB/s each way. The
nodes are ordinary ones, in mode ``local`` with the settings that ``shoal swarm create`` gives, but that nothing is
evaluated: the threshold is passed when the mean return of recent training episodes passes it, on the first node. The
clock starts at the first epoch. Exit status: 0, or 2 if the lab cannot run here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package `lab` is

from rich.console import Console
from rich.table import Table

from lab import machines, netns
from lab.net import Lab
from lab.netns import LabError
from lab.nodes import PORT, LabNode, listen_addresses
from lab.report import write_json
from lab.stage import wait_until
from shoal.protocol.errors import ShoalError

DEFAULT_CORES: Final = ("0.4/0.4/0.4/0.4", "0.4,0.4,0.4,0.4", "0.2,0.4,0.8", "0.8")
THRESHOLDS: Final = {"gym:LunarLander-v3": 200.0, "gym:Hopper-v5": 1000.0, "gym:CartPole-v1": 450.0}
SEEDS_APART: Final = 1000
"""Between the seeds of swarms that are played at the same time."""
START_LIMIT_S: Final = 120.0
POLL_S: Final = 1.0
SETTLE_EPOCHS: Final = 5
"""Shares follow what was delivered, so the first epochs say nothing of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One swarm, one task, one seed.

    Attributes:
        nodes: how many.
        core_share: of each, in their order.
        env_steps_per_s: into the policy, from the first epoch to the end.
        seconds_to_threshold: from the first epoch; None if it was not passed within the limit.
        shares: of the environment steps, in the nodes' order, after the first few epochs.
        epoch_s: mean length of an epoch.
    """

    nodes: int
    core_share: tuple[float, ...]
    task: str
    env_steps_per_s: float
    seconds_to_threshold: float | None
    seed: int
    shares: tuple[float, ...]
    epoch_s: float


def measure(
    swarms: Sequence[Sequence[float]], task: str, threshold: float, seed: int, limit_s: float, settings: Sequence[str]
) -> list[Row]:
    """Play swarms at the same time, each until it has passed the threshold, or the limit is over."""
    with Lab() as lab, ExitStack() as stack:
        companies: list[list[LabNode]] = []
        for cores in swarms:
            nodes: list[LabNode] = []
            known: list[str] = []
            for share in cores:
                number = sum(map(len, companies)) + len(nodes) + 1
                site, machine = stack.enter_context(machines.machine(lab, f"m{number}", share))
                node = LabNode(machine, lab.folder, site.name)
                nodes.append(node.up("--relay", "off", listen=listen_addresses(site), bootstrap=known))
                known = known or [f"/ip4/{site.address}/tcp/{PORT}/p2p/{node.peer_id}"]
            companies.append(nodes)
        with ThreadPoolExecutor(len(swarms)) as pool:
            playing = [
                pool.submit(_play, nodes, tuple(cores), task, threshold, seed + SEEDS_APART * index, limit_s, settings)
                for index, (nodes, cores) in enumerate(zip(companies, swarms, strict=True))
            ]
            return [each.result() for each in playing]


def _play(
    nodes: Sequence[LabNode],
    cores: tuple[float, ...],
    task: str,
    threshold: float,
    seed: int,
    limit_s: float,
    settings: Sequence[str],
) -> Row:
    options = ["--min-learners", str(len(nodes)), "--target-return", "1e9", "--eval-interval", "1000000", *settings]
    begin = ["swarm", "create", "--task", task, "--seed", str(seed), *options, "--json"]
    created = json.loads(nodes[0].run(*begin, timeout_s=START_LIMIT_S))
    swarm = created["swarm"]
    for node in nodes[1:]:
        node.run("join", "--detach", created["ticket"], timeout_s=START_LIMIT_S)
    with nodes[0].client() as client:
        wait_until("the first epoch", lambda: client.swarm(swarm).epoch >= 1, START_LIMIT_S)
        began, first = time.monotonic(), client.swarm(swarm)
        settled, shown, passed_s = first, first, None
        while time.monotonic() < began + limit_s:
            time.sleep(POLL_S)
            shown = client.swarm(swarm)
            if shown.epoch < first.epoch + SETTLE_EPOCHS:
                settled = shown
            if shown.training_return is not None and shown.training_return >= threshold:
                passed_s = time.monotonic() - began
                break
        took_s = time.monotonic() - began
    before = {member.peer_id: member.env_steps for member in settled.members}
    delivered = {member.peer_id: member.env_steps - before.get(member.peer_id, 0) for member in shown.members}
    total = max(1, sum(delivered.values()))
    return Row(
        len(nodes),
        cores,
        task,
        round((shown.env_steps - first.env_steps) / took_s, 1),
        None if passed_s is None else round(passed_s, 1),
        seed,
        tuple(round(delivered.get(node.peer_id, 0) / total, 3) for node in nodes),
        round(took_s / max(1, shown.epoch - first.epoch), 2),
    )


def table(rows: Sequence[Row]) -> Table:
    """Means over the seeds, beside the first swarm of the same task."""
    shown = Table(
        "task", "cores", "env steps/s", "of the first", "s to threshold", "of the first", "epoch, s", "shares"
    )
    firsts: dict[str, tuple[float, float]] = {}
    for task, cores in dict.fromkeys((row.task, row.core_share) for row in rows):
        same = [row for row in rows if (row.task, row.core_share) == (task, cores)]
        rate = statistics.fmean(row.env_steps_per_s for row in same)
        times = [row.seconds_to_threshold for row in same]
        reached = [seconds for seconds in times if seconds is not None]
        seconds = statistics.fmean(reached) if len(reached) == len(same) else float("inf")
        first_rate, first_seconds = firsts.setdefault(task, (rate, seconds))
        shown.add_row(
            task,
            " ".join(f"{share:g}" for share in cores),
            f"{rate:,.0f}",
            f"{rate / first_rate:.2f}",
            " ".join("-" if each is None else f"{each:.0f}" for each in times),
            f"{seconds / first_seconds:.2f}" if seconds < float("inf") > first_seconds else "-",
            f"{statistics.fmean(row.epoch_s for row in same):.2f}",
            " ".join(f"{statistics.fmean(part):.2f}" for part in zip(*(row.shares for row in same), strict=True)),
        )
    return shown


def main() -> None:
    """Play all that was asked for, print the table, keep the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        *("--cores",),
        action="append",
        metavar="SHARE[,SHARE…]",
        help="of each node; repeat for more swarms; / between swarms at the same time",
    )
    parser.add_argument("--tasks", default="gym:LunarLander-v3,gym:Hopper-v5")
    parser.add_argument("--threshold", type=float, help="of the mean training return, in place of the usual ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds of one swarm")
    parser.add_argument("--settings", default="", metavar="WORDS", help="for `shoal swarm create`, in one word")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are kept")
    options = parser.parse_args()
    console = Console()
    if lack := netns.missing() or machines.missing():
        _stop(lack)
    netns.clean()
    machines.clean()
    rows: list[Row] = []
    for task in options.tasks.split(","):
        threshold = THRESHOLDS.get(task, float("inf")) if options.threshold is None else options.threshold
        for words in options.cores or DEFAULT_CORES:
            swarms = [[float(word) for word in swarm.split(",")] for swarm in words.split("/")]
            for seed in range(options.seeds):
                try:
                    more = measure(swarms, task, threshold, seed, options.limit_s, options.settings.split())
                except (LabError, ShoalError) as error:
                    _stop(str(error))
                rows += more
                for row in more:
                    console.print(json.dumps(asdict(row)), highlight=False, soft_wrap=True)
                if options.json is not None:
                    write_json([asdict(row) for row in rows], options.json)
    console.print(table(rows))


def _stop(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
