#!/usr/bin/env python
"""What nodes promise when things break, and what they do for each other, each shown in a lab of its own (root).

    tests/lab/scenarios.py                                  all but the long ones; about a quarter of an hour
    tests/lab/scenarios.py --only relay-killed,upnp         some
    tests/lab/scenarios.py --logs build/logs                keeps the nodes' logs

The nodes are ordinary ones, started with the ordinary commands. Exit status: 0 all figures are within their limits,
1 one is not, 2 the lab cannot run here.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package `lab` is

from rich.console import Console
from rich.table import Table

from lab import asking, features, healing, netns
from lab.net import Lab
from lab.netns import LabError
from lab.report import write_json
from lab.stage import Measure, Stage
from shoal.protocol.errors import ShoalError

ROOT: Final = Path(__file__).resolve().parents[2]

SCENARIOS: Final[dict[str, Callable[[Stage], None]]] = {
    "relay-killed": healing.relay_killed,
    "address-change": healing.address_change,
    "mapping-expires": healing.mapping_expires,
    "black-out": healing.black_out,
    "suspended": healing.suspended,
    "apart": healing.apart,
    "only-a-relay": features.only_a_relay,
    "webrtc": features.webrtc,
    "start": features.start,
    "compose": features.compose,
    "upnp": features.upnp,
    "slow-link": features.slow_link,
    "consult": asking.consult,
    "consult-relayed": asking.consult_relayed,
}
LIMIT_S: Final = 420
"""Of one scenario, with building its lab; its own waits are shorter."""
LONG: Final = {"apart": 1200}
"""Those that take longer, and are played by name alone."""


def play(name: str, console: Console, logs: Path | None) -> list[Measure]:
    """Play a scenario in a lab of its own; gives what it shows."""
    scenario = SCENARIOS[name]
    console.print(f"{name}: {scenario.__doc__}", markup=False, highlight=False, soft_wrap=True)
    began = time.monotonic()
    with Lab() as lab:
        stage = Stage(lab, name, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
        signal.alarm(LONG.get(name, LIMIT_S))
        try:
            scenario(stage)
        except (LabError, ShoalError, AssertionError, subprocess.SubprocessError) as error:
            stage.fail(str(error) or type(error).__name__)
        finally:
            signal.alarm(0)
            if logs is not None:
                _keep_logs(lab.folder, logs / name)
    stage.say(f"  {time.monotonic() - began:.0f} s in all")
    return stage.measures


def _keep_logs(folder: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for log in folder.rglob("node.log"):
        shutil.copy(log, into / f"{log.parent.name}.log")


def _show(measures: Sequence[Measure], console: Console) -> None:
    table = Table(title="Scenarios", title_justify="left")
    for heading in ("scenario", "measured", "figure", "limit", ""):
        table.add_column(heading, overflow="fold")
    for each in measures:
        figure = each.figure.splitlines()[0][:200]
        verdict = "[green]ok[/]" if each.ok else "[bold red]FAILED[/]"
        table.add_row(each.scenario, each.what, figure.replace("[", r"\["), each.limit.replace("[", r"\["), verdict)
    console.print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    short = [name for name in SCENARIOS if name not in LONG]
    parser.add_argument("--only", type=_names, default=short, metavar="NAME,…", help=", ".join(SCENARIOS))
    path = ROOT / "build" / "lab-scenarios.json"
    parser.add_argument("--json", type=Path, default=path, metavar="PATH", help="what to write")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the nodes' logs here")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(SCENARIOS)}")
    return names


def main() -> int:
    """Play the scenarios; gives the exit status."""
    options = _parse()
    if reason := netns.missing():
        sys.stderr.write(f"{reason}\n")
        return 2
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _too_late)
    console = Console(width=None if sys.stdout.isatty() else 130, emoji=False)
    measures: list[Measure] = []
    for name in options.only:
        try:
            measures += play(name, console, options.logs)
        except LabError as error:
            sys.stderr.write(f"the NAT lab does not stand: {error}\n")
            return 2
    _show(measures, console)
    write_json([asdict(each) for each in measures], options.json)
    console.print(f"written: {options.json}", highlight=False)
    return 0 if measures and all(each.ok for each in measures) else 1


def _end(*_: object) -> NoReturn:
    raise SystemExit(143)  # by which everything is taken down on the way out


def _too_late(*_: object) -> NoReturn:
    raise LabError("the scenario was not over in time")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
