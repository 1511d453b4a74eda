"""What a swarm loses to peers that are killed, stopped, slowed or cut off, beside a synchronous world.

Real nodes with real workers learn CartPole together, each in a network namespace and a cgroup with a share of a core
(`tests/lab/ground.py`), so that a peer that is gone leaves no processor to the others. Faults come at even intervals,
each to another peer at random, of each kind in turn, and in each phase of a round in turn: a fault waits until the
victim's own signed words, heard by a member that only listens (`tests/lab/observer.py`), say that it is in that phase.
It lasts ``--outage`` seconds; then the killed one is started anew, the stopped one goes on, the cable is back.

What is measured:

*kept*: environment steps that went into the policy, a second, over a whole stretch with faults, by the same of the
stretches without, right before and after. *of what was there*: the same by what the peers had of their processors: who
is killed, stopped or cut off has nothing while it is, and who is slowed a tenth. The rest of the loss is what
recovering costs the victim and what the fault costs the others.

*lost*: by the others, to one fault: from the epoch in which it came to the first one that ended after the victim was
whole again, by how much longer all their epochs took together than as many of the usual length (the median of the dozen
before). An epoch has come when the last of them holds it. *pause*: by how much the longest of these epochs was longer.
*whole*: from the end of the fault (the start of the killed one's process) until others hold a policy that has something
of the victim's in it which it offered since.

The synchronous world (`benchmarks/peers/synchronous.py`) is a real one too: torch.distributed over gloo, the same
learner and the same work per epoch, on the same machines, with the same faults at the same times.

The nodes' shares have to be there: on a machine that does other things meanwhile, these are measured too.

    python benchmarks/faults.py --minutes 30 --faults 62 --curve 1,2,4,8 --keep    all of it; about an hour and a half
    python benchmarks/faults.py --minutes 3 --faults 6
    python benchmarks/faults.py --minutes 0 --each 2       so many of each kind in each phase: 20 of each kind in all
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.lab import ground as grounds  # noqa: E402  after the path is known
from tests.lab import machines, netns  # noqa: E402
from tests.lab.company import Company  # noqa: E402
from tests.lab.ground import Ground, Kind  # noqa: E402
from tests.lab.hearing import Curve, Place  # noqa: E402
from tests.lab.netns import LabError  # noqa: E402
from tests.lab.striking import (  # noqa: E402
    AIM_S,
    IN_A_ROUND,
    OUT_OF_IT,
    WHOLE_S,
    Fault,
    Planned,
    Player,
    Stretch,
    Swarm,
    plan,
    stretch,
)

RESULT: Final = Path(__file__).parent / "results" / "faults.md"
SYNCHRONOUS: Final = str(Path(__file__).parent / "peers" / "synchronous.py")
EPOCHS_AFTER: Final = 4
STORE_PORT: Final = 29_500


class Synchronous:
    """A process of a synchronous world on each machine."""

    def __init__(self, ground: Ground, seed: int) -> None:
        self.ground = ground
        self.env_steps = Curve()
        self._seed = seed
        self._changed = threading.Condition()
        self._did: list[list[float]] = [[] for _ in ground.machines]  # when each came to an epoch
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._log = (ground.folder / "synchronous.log").open("wb")
        self._store = ground.outside.popen(
            *(sys.executable, SYNCHRONOUS, "serve", str(STORE_PORT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._store.stdout is not None
        if not self._store.stdout.readline():
            raise LabError("the synchronous world has no store")

    def up(self, number: int) -> None:
        before = self._processes.pop(number, None)
        if before is not None:
            before.wait()
        world = (str(number), str(len(self.ground.machines)), self.ground.outside.address, str(STORE_PORT))
        process = self._processes[number] = self.ground.machines[number].popen(
            *("env", "GLOO_SOCKET_IFNAME=eth0", sys.executable, SYNCHRONOUS, "learn", *world, str(self._seed)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        threading.Thread(target=self._hear, args=(process, number), daemon=True).start()

    def _hear(self, process: subprocess.Popen[str], number: int) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text)
            with self._changed:
                self._did[number].append(line["at"])
                self.env_steps.add(line["at"], line["env_steps"])
                self._changed.notify_all()

    def place(self, number: int) -> Place | None:
        return None

    def wait(self, holds: Callable[[], bool], limit_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(holds, limit_s)

    def whole_at(self, number: int, since: float) -> float | None:
        return next((at for at in self._did[number] if at > since), None)

    def start(self) -> None:
        """Start them all, and let them learn for some epochs."""
        for number in range(len(self.ground.machines)):
            self.up(number)
        if not self.wait(lambda: all(len(did) >= EPOCHS_AFTER for did in self._did), WHOLE_S):
            raise LabError(f"the synchronous world does not begin; see {self._log.name}")

    def end(self) -> None:
        self.ground.kill_all()
        self._store.kill()
        self._store.wait()
        for process in self._processes.values():
            process.wait()
        self._log.close()


def in_each_phase(swarm: Swarm, kinds: Sequence[Kind], count: int, outage_s: float, seed: int) -> list[Fault]:
    """So many faults of each kind in each phase, one after the other, each when all are well again."""
    rng = random.Random(f"each/{seed}")
    player = Player(swarm, outage_s)
    for _, kind, place in itertools.product(range(count), kinds, (*IN_A_ROUND, *OUT_OF_IT)):
        number = rng.randrange(len(swarm.company.names))
        if place is Place.EVALUATING:
            number = evaluating(swarm, number)
        fault = player.strike(number, kind, place)
        swarm.company.wait_epochs(EPOCHS_AFTER)
        swarm.judge([fault])
        print(json.dumps(shown(fault)), flush=True)
    return player.faults


def evaluating(swarm: Swarm, otherwise: int) -> int:
    """The next that evaluates a policy; another if nobody does for long."""
    found: list[int] = []

    def anybody() -> bool:
        found[:] = [n for n in range(len(swarm.company.names)) if swarm.place(n) is Place.EVALUATING]
        return bool(found)

    return found[0] if swarm.wait(anybody, AIM_S) else otherwise


def shown(fault: Fault) -> dict[str, Any]:
    """For people who watch."""
    told: dict[str, Any] = {"kind": fault.kind, "place": fault.place, "meant": fault.meant, "peer": fault.number}
    if fault.loss is not None:
        told |= {"lost_s": round(fault.loss.lost_s, 2), "pause_s": round(fault.loss.pause_s, 2)}
        told |= {"usual_s": round(fault.loss.usual_s, 2), "epochs": fault.loss.epochs}
    return told | {"whole_s": round(fault.whole_s, 1)}


# The report.


def row(name: str, faults: Sequence[Fault]) -> str:
    """One line of the table of losses."""
    judged = [each.loss for each in faults if each.loss is not None]
    hits = sum(each.place is each.meant for each in faults if each.meant is not None)
    cells = [name, str(len(faults)), str(hits)]
    for values in ([each.lost_s for each in judged], [each.pause_s for each in judged], [f.whole_s for f in faults]):
        cells += [f"{statistics.median(values):.1f}", f"{max(values):.1f}"] if values else ["", ""]
    return f"| {' | '.join(cells)} |"


HEADING: Final = (
    "| | faults | in the phase meant | lost, s: median | worst | pause, s: median | worst "
    "| whole, s: median | worst |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def losses(faults: Sequence[Fault], kinds: Sequence[Kind]) -> list[str]:
    """The table, by kind, by phase, and by both where there are several of each."""
    lines = [HEADING, row("**all**", faults)]
    lines += [row(f"{kind}", [each for each in faults if each.kind is kind]) for kind in kinds]
    for place in Place:
        there = [each for each in faults if each.place is place]
        if there:
            lines.append(row(f"while {place}", there))
        for kind in kinds:
            both = [each for each in there if each.kind is kind]
            if len(both) > 1:
                lines.append(row(f"{kind} while {place}", both))
    return lines


def kept(name: str, with_faults: Stretch, free: float) -> str:
    """A line of the table of throughputs."""
    part = with_faults.steps_per_s / free
    per_minute = len(with_faults.faults) / with_faults.seconds * 60
    return (
        f"| {name} | {len(with_faults.faults)} | {per_minute:.1f} | {with_faults.steps_per_s:,.0f} | {free:,.0f} "
        f"| **{part:.1%}** | {with_faults.there:.1%} | **{part / with_faults.there:.1%}** |"
    )


KEPT: Final = (
    "| | faults | a minute | steps/s | without faults | kept | there | kept, of what was there |\n"
    "|---|---|---|---|---|---|---|---|"
)


def machine() -> str:
    """Where it was measured."""
    cpus = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
    return (
        f"{next((c for c in cpus if 'Hz' in c or 'CPU' in c), platform.machine())}, Python {platform.python_version()}"
    )


def main() -> None:
    """Print the tables, and keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of the stretch with faults; 0: none")
    parser.add_argument("--faults", type=int, default=6, help="in that stretch")
    parser.add_argument("--free-minutes", type=float, default=2.0, help="without faults, before it and after it")
    parser.add_argument("--peers", type=int, default=6)
    parser.add_argument("--cores", type=float, default=0.25, help="of each peer")
    parser.add_argument("--kinds", default="kill,stop,slow,cut")
    parser.add_argument("--outage", type=float, default=5.0, metavar="S", help="how long a fault lasts")
    parser.add_argument("--each", type=int, default=0, metavar="N", help="faults of each kind in each phase")
    parser.add_argument("--curve", default="", metavar="N,N…", help="faults a minute, beside the synchronous world")
    parser.add_argument("--curve-minutes", type=float, default=4.0, help="of each of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    if reason := grounds.missing():
        print(f"skipped: {reason}")  # the other benchmarks go on without it
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by which everything is taken down on the way out
    netns.clean()
    machines.clean()
    lines = [f"# Faults\n\n`python benchmarks/faults.py {' '.join(sys.argv[1:])}`\n"]
    for section in sections(options):
        lines.append(section)
        print(f"\n{section}\n", flush=True)
    lines.append(machine())
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


def sections(options: argparse.Namespace) -> Iterator[str]:
    """Play all that is asked for; gives a part of the report after the other."""
    kinds = [Kind(word) for word in options.kinds.split(",")]
    rates = [float(word) for word in options.curve.split(",") if word]
    free_s, curve_s = 60 * options.free_minutes, 60 * options.curve_minutes

    def planned(seconds: float, count: int) -> list[Planned]:
        return plan(seconds, count, kinds, options.peers, options.seed)

    with Ground(options.peers, options.cores) as ground:
        curves: list[str] = []
        with a_swarm(ground, options) as swarm:
            if options.minutes:
                yield f"{options.peers} peers of {options.cores:g} core; a fault lasts {options.outage:g} s.\n"
                before = stretch(swarm, free_s, [], 0).steps_per_s
                struck = stretch(
                    swarm, 60 * options.minutes, planned(60 * options.minutes, options.faults), options.outage
                )
                swarm.company.wait_epochs(EPOCHS_AFTER)
                after = stretch(swarm, free_s, [], 0).steps_per_s
                swarm.judge(struck.faults)
                yield "\n".join([KEPT, kept("Shoal", struck, (before + after) / 2)])
                yield f"Without faults: {before:,.0f} steps/s before, {after:,.0f} after.\n"
                yield "\n".join(losses(struck.faults, kinds))
            if rates:
                free = stretch(swarm, curve_s, [], 0).steps_per_s
                for rate in rates:
                    count = round(rate * options.curve_minutes)
                    curves.append(kept("Shoal", stretch(swarm, curve_s, planned(curve_s, count), options.outage), free))
                    swarm.company.wait_epochs(EPOCHS_AFTER)
        if rates:
            with a_world(ground, options.seed) as world:
                free = stretch(world, curve_s, [], 0).steps_per_s
                for rate in rates:
                    count = round(rate * options.curve_minutes)
                    struck = stretch(world, curve_s, planned(curve_s, count), options.outage)
                    curves.append(kept("synchronous", struck, free))
            yield "\n".join([f"\n## At other rates, for {options.curve_minutes:g} minutes each\n", KEPT, *curves])
        if options.each:
            with a_swarm(ground, options, eval_interval=3) as swarm:
                faults = in_each_phase(swarm, kinds, options.each, options.outage, options.seed)
            yield "\n".join([f"\n## {options.each} of each kind in each phase\n", *losses(faults, kinds)])


@contextlib.contextmanager
def a_swarm(ground: Ground, options: argparse.Namespace, eval_interval: int = 10**6) -> Iterator[Swarm]:
    """Nodes that learn together; evaluations are not what is measured, unless they are."""
    ground.unlimit()
    company = Company(ground, seed=options.seed, eval_interval=eval_interval)
    try:
        company.start(EPOCHS_AFTER)
        company.wait_epochs(3 * EPOCHS_AFTER)
        yield Swarm(company)
    finally:
        company.end()


@contextlib.contextmanager
def a_world(ground: Ground, seed: int) -> Iterator[Synchronous]:
    """A synchronous world on the same machines."""
    ground.unlimit()
    world = Synchronous(ground, seed)
    try:
        world.start()
        ground.limit()
        world.wait(lambda: False, AIM_S)
        yield world
    finally:
        world.end()


if __name__ == "__main__":
    main()
