"""What does `kill -9` of a node that fetches a model cost, at ten random moments? Blocks that are sent again.

One node publishes a folder, another one fetches it by its name and is killed, started and asked again. What the giver
sent is counted there, before it goes out, so it holds what was on its way when the receiver died: blocks that nobody
had received. A block of the receiver's counts as received when it is a file.

    python benchmarks/kills.py [--blocks 120] [--kills 10] [--limits 400,0] [--seed 1]
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import random
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peers.nodes import Node, Nodes, nodes
from peers.notes import kept_notes

from shoal.cli.spawn import wait_gone
from shoal.node.api.requests import GetModel
from shoal.protocol.errors import NoDaemonError
from shoal.protocol.limits import BLOCK_BYTES

RESULT = Path(__file__).parent / "results" / "kills.md"
NOTES = "## What limits it"
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Row:
    """What one limit of the receiver's line took; ``again``: blocks sent for each kill that the receiver had not."""

    limit: int
    kept: list[int]
    again: list[int]
    is_equal: bool

    def cells(self) -> str:
        """The row of the table."""
        line = f"{self.limit} Mbit/s" if self.limit else "none"
        moments = ", ".join(map(str, self.kept))
        again = ", ".join(map(str, self.again))
        return f"| {line} | {moments} | {again} | {'yes' if self.is_equal else '**no**'} |"


def blocks_of(taker: Node) -> int:
    """Blocks that a node has as files."""
    return len(list((taker.home / "profiles" / taker.profile).glob("models/*/bafk*")))


def sent_by(giver: Node) -> int:
    """Blocks that a node has begun to send."""
    with giver.client() as client:
        return client.node().use.upload_bytes // BLOCK_BYTES


def start_taker(home: Nodes, address: str, limit: int) -> Node:
    """The receiver, connected to the giver."""
    taker = home.up("taker", options=("--bootstrap", address, "--max-download", str(limit)))
    ends = time.monotonic() + PATIENCE_S
    with taker.client() as client:
        while not client.peers():
            if time.monotonic() > ends:
                raise SystemExit("the receiver did not connect to the giver")
            time.sleep(0.05)
    return taker


def ask_for(taker: Node, model: str) -> None:
    """Have a node fetch a model; it may die meanwhile."""
    with suppress(NoDaemonError), taker.client() as client:
        client.get_model(GetModel(model=model))


def kill_while_fetching(taker: Node, model: str, num_more: int, wait_s: float) -> int:
    """Kill a receiver some time after it got so many blocks more; how many it has then."""
    wanted = blocks_of(taker) + num_more
    asking = threading.Thread(target=ask_for, args=(taker, model))
    asking.start()
    ends = time.monotonic() + PATIENCE_S
    while blocks_of(taker) < wanted and asking.is_alive():
        if time.monotonic() > ends:
            raise SystemExit("nothing came any more")
        time.sleep(0.002)
    time.sleep(wait_s)
    os.kill(taker.pid, signal.SIGKILL)
    asking.join()
    if not wait_gone(taker.pid, PATIENCE_S):
        raise SystemExit("the receiver did not die")
    return blocks_of(taker)


def measure(limit: int, num_blocks: int, num_kills: int, rng: random.Random) -> Row:
    """Publish, fetch and kill, and fetch to the end."""
    with nodes() as home:
        source, out = home.home / "source", home.home / "out"
        source.mkdir()
        with (source / "model").open("wb") as file:
            for _ in range(num_blocks):
                file.write(rng.randbytes(BLOCK_BYTES))
        giver = home.up("giver")
        with giver.client() as client:
            address = client.node().addresses[0]
        published = giver.run("model", "publish", str(source), "--name", "model")
        model = f"{giver.peer_id}/model"
        kept, again = [0], []
        sent = sent_by(giver)
        for _ in range(num_kills):
            taker = start_taker(home, address, limit)
            num_more, wait_s = rng.randint(1, max(1, num_blocks // num_kills - 2)), 0.1 * rng.random()
            kept.append(kill_while_fetching(taker, model, num_more, wait_s))
            before, sent = sent, sent_by(giver)
            again.append(sent - before - (kept[-1] - kept[-2]))
            print(f"{kept[-1]} blocks are there, {again[-1]} were sent for nothing", flush=True)
        start_taker(home, address, limit).run("model", "get", model, "-o", str(out))
        is_equal = published["num_bytes"] == num_blocks * BLOCK_BYTES and filecmp.cmp(
            source / "model", out / "model", shallow=False
        )
    return Row(limit, kept[1:], again, is_equal)


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=120)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--limits", default="400,0")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for limit in map(int, options.limits.split(",")):
        rows.append(measure(limit, options.blocks, options.kills, random.Random(options.seed)))
        print(rows[-1].cells(), flush=True)
    lines = [
        f"# A receiver that is killed {options.kills} times",
        "",
        f"`python benchmarks/kills.py --blocks {options.blocks} --kills {options.kills} --seed {options.seed}`,",
        f"Python {platform.python_version()}, {platform.machine()} with {os.cpu_count()} cores, which all share;",
        f"{options.blocks} blocks of 1 MiB from one node on the same machine.",
        "",
        "| `--max-download` | blocks there after each kill | sent, and not there | equal bytes |",
        "|---|---|---|---|",
        *(row.cells() for row in rows),
    ]
    RESULT.write_text("\n".join([*lines, "", kept_notes(RESULT, NOTES)]).rstrip("\n") + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
