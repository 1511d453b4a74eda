"""Two honest members, and a third whose environment fails: whether the run of the two goes on as if it were not there.

``python tests/hostile/environments.py [--seconds 12] [--only NAME,…]``

The environments are those of `tests/integration/bad_environments.py`; ``Plain`` is a third that is honest. Before each
third, the two are measured alone. Told are the run's epochs a second by the counter of whichever of the two is behind,
what both and their workers took of the processors for one epoch, and what became of the third.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile.measuring import measure
from tests.hostile.run import Nodes

from shoal.node.api.client import Client
from shoal.node.config import NodeConfig

KINDS: Final = ("Plain", "KeyErrorInStep", "NanReward", "HungStep", "HungInC", "Forks", "GoneAtOnce")
WHICH: Final = "HOSTILE_ENVIRONMENT"
MODULE: Final = f"""
import os
import bad_environments

def task(name):
    return bad_environments.task(os.environ.get({WHICH!r}, name))
"""


def install(site: Path) -> None:
    """Have the task ``bad:Plain``, which on one machine is another one."""
    shutil.copy(Path(__file__).parents[1] / "integration" / "bad_environments.py", site)
    (site / "bad_here.py").write_text(MODULE, encoding="ascii")
    about = site / "bad_here-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bad_here\nVersion: 1\n", encoding="ascii")
    (about / "entry_points.txt").write_text("[shoal.tasks]\nbad = bad_here:task\n", encoding="ascii")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))


def main() -> int:
    """Play them, print a table; 1 if the run of the two stood still."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--only", default=",".join(KINDS))
    arguments = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as site:
        install(Path(site))
        nodes = Nodes(Path(home), 2)

        def client(number: int) -> Client:
            return Client(NodeConfig(home=Path(home), profile=f"n{number}").paths, f"n{number}")

        def up() -> int:
            nodes.infos.append(nodes.ask(len(nodes.infos), "up", "-d", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"))
            return len(nodes.infos) - 1

        try:
            one, two = up(), up()
            endless = ("--target-return", "100000", "--eval-interval", "1000000", "--set", "update_epochs=1")
            created = nodes.ask(one, "swarm", "create", "--task", "bad:Plain", "--algorithm", "ppo", *endless)
            swarm, ticket = created["swarm"], created["ticket"]
            nodes.ask(two, "join", ticket, "--detach")
            pids = [int(info["pid"]) for info in nodes.infos]
            print("| third | epochs/s of the two without / with | CPU s an epoch without / with | it ends |")
            print("|---" * 4 + "|", flush=True)
            for kind in arguments.only.split(","):
                with client(one) as at_one, client(two) as at_two:
                    alone = measure((at_one, at_two), pids, swarm, arguments.seconds)
                    os.environ[WHICH] = kind
                    third = up()
                    del os.environ[WHICH]
                    began = time.monotonic()
                    nodes.ask(third, "join", ticket, "--detach")
                    with client(third) as at_third:
                        beside = measure((at_one, at_two), pids, swarm, arguments.seconds)
                        shown = at_third.swarm(swarm)
                        ended = (
                            f"{shown.phase} {time.monotonic() - began:.0f} s after its join: {(shown.error or '')[:90]}"
                        )
                    nodes.ask(third, "down")
                is_good &= beside.per_s > 0
                rates = f"{alone.per_s:.2f} / {beside.per_s:.2f}"
                print(f"| {kind} | {rates} | {alone.cpu_s:.2f} / {beside.cpu_s:.2f} | {ended} |", flush=True)
        finally:
            nodes.number = len(nodes.infos)
            nodes.stop()
    return int(not is_good)


if __name__ == "__main__":
    raise SystemExit(main())
