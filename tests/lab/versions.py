#!/usr/bin/env python
"""How long a new version takes to many actors behind a learner's slow uplink, against one actor (root).

    tests/lab/versions.py                          1 and 8 actors, 5 Mbit/s, a policy of two layers of 1,024
    tests/lab/versions.py --actors 1,4 --mbit 20 --versions 10

All are ordinary nodes, each in a network namespace on one switch; the learner's cable is shaped by the kernel, the
others' are not. A member that only listens (`observer`), on the learner's machine, hears it, and then each actor, say
that it has what leads to the copy of a version; an actor acts by it when the shard that it makes just now is done,
within a second. A version's time is from the first to the last of these; who skips it has it with the next.
The run is of mode ``rollouts`` with the settings of ``shoal swarm create``, but for the size of the policy and of an
update: a large copy, so that the link counts, and not the nodes' processors.

Exit status: 0, or 2 if the lab cannot run here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package `lab` is

from lab import ground as grounds
from lab import machines, netns
from lab.company import Company
from lab.ground import Ground
from lab.netns import LabError
from lab.report import write_json

LIMIT_S: Final = 240.0
WARM_VERSIONS: Final = 2
"""Not counted once all act: the first ones come while members still join."""


@dataclass(frozen=True, slots=True)
class Times:
    """Of one number of actors.

    Attributes:
        actors: how many.
        versions: that were counted.
        median_s: until the last actor has a version.
        worst_s: likewise.
        first_s: until the first has it; median.
        interval_s: from one version to the next; median.
        copy_bytes: of the patch, or of the keyframe if that is smaller; median.
        sent_bytes: over the learner's cable, for each of these versions.
        load: of this machine, at the end.
    """

    actors: int
    versions: int
    median_s: float
    worst_s: float
    first_s: float
    interval_s: float
    copy_bytes: int
    sent_bytes: int
    load: float


class Copies:
    """When each member said first that it has the copy of a version, or of a later one."""

    def __init__(self) -> None:
        self.said: dict[str, dict[int, float]] = {}
        self.num_bytes: dict[int, int] = {}

    def take(self, line: dict[str, Any]) -> None:
        """One line of the observer."""
        if line["topic"] == "givencopy":
            self.said.setdefault(line["author"], {}).setdefault(line["epoch"], line["at"])
            self.num_bytes.setdefault(line["epoch"], line["bytes"])

    def had_at(self, author: str, version: int) -> float | None:
        """When a member had it; None if it has not."""
        return min((at for epoch, at in dict(self.said.get(author, {})).items() if epoch >= version), default=None)


class Acting(Company):
    """One learner, and actors that do nothing else."""

    def __init__(self, ground: Ground, **settings: Any) -> None:
        super().__init__(ground, joins_as="actor", role="learner", **settings)
        self.copies = Copies()
        self.listens_from = ground.machines[0]

    def take(self, line: dict[str, Any]) -> None:
        self.copies.take(line)
        super().take(line)


def sent_bytes(ground: Ground) -> int:
    """What has left the learner's machine."""
    told = ground.machines[0].run("cat", "/sys/class/net/eth0/statistics/tx_bytes").stdout
    return int(told)


def measure(actors: int, mbit: float, versions: int, settings: dict[str, Any]) -> Times:
    """Play one swarm until so many versions have come to all."""
    with Ground(1 + actors, grounds.WHOLE) as ground:
        company = Acting(ground, **settings)
        try:
            company.gather()
            learner, names = company.names[0], company.names[1:]
            said = company.copies.said
            _wait("all act", lambda: all(said.get(name) for name in names))
            ground.shape(0, mbit)
            first = max(said[learner]) + WARM_VERSIONS
            _wait("it is warm", lambda: max(said[learner]) >= first)
            before = sent_bytes(ground)
            wanted = first + versions - 1
            _wait("all have it", lambda: all(company.copies.had_at(name, wanted) for name in names))
            sent = sent_bytes(ground) - before
            rows: list[list[float]] = []
            for version in sorted(each for each in said[learner] if first <= each <= wanted):
                at = said[learner][version]
                had = [company.copies.had_at(name, version) for name in names]
                rows.append([each - at for each in had if each is not None])
            began = [at for epoch, at in sorted(said[learner].items()) if first <= epoch <= wanted]
            return Times(
                actors,
                len(rows),
                round(statistics.median(max(row) for row in rows), 2),
                round(max(max(row) for row in rows), 2),
                round(statistics.median(min(row) for row in rows), 2),
                round(statistics.median(b - a for a, b in itertools.pairwise(began)), 2),
                round(
                    statistics.median(
                        company.copies.num_bytes[n] for n in range(first, wanted + 1) if n in company.copies.num_bytes
                    )
                ),
                sent // len(rows),
                round(os.getloadavg()[0], 1),
            )
        finally:
            company.end()


def _wait(what: str, holds: Any) -> None:
    ends = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > ends:
            raise LabError(f"{what}: not within {LIMIT_S:.0f} s")
        time.sleep(0.2)


def main() -> int:
    """Measure what was asked for, print it, keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--task", default="gym:LunarLander-v3")
    parser.add_argument("--actors", default="1,8", help="how many, each in a swarm of its own")
    parser.add_argument("--mbit", type=float, default=5.0, help="of the learner's cable, each way")
    parser.add_argument("--versions", type=int, default=8)
    parser.add_argument("--hidden", default="1024,1024", help="units of the policy's layers")
    parser.add_argument("--batch", type=int, default=512, help="samples of an update")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where it is kept")
    options = parser.parse_args()
    if lack := netns.missing() or grounds.missing():
        print(lack, file=sys.stderr)
        return 2
    netns.clean()
    machines.clean()
    settings = {
        "task": options.task,
        "algorithm": "vtrace",
        "mode": "rollouts",
        "eval_interval": 1_000_000,
        "min_learners": 1,
        "batch_per_learner": options.batch,
        "hyperparameters": {"hidden_sizes": [int(word) for word in options.hidden.split(",")]},
    }
    found = []
    try:
        for word in options.actors.split(","):
            found.append(asdict(measure(int(word), options.mbit, options.versions, settings)))
            print(json.dumps(found[-1]), flush=True)
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json is not None:
        write_json(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
