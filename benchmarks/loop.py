"""Does a node answer while it writes a large state to disk? Round trips of `node.ping` beside 50 requests/s for blocks.

A node holds states of 100 MB and writes each to disk, one after the other, each unlike the one before; another process
asks it for blocks that it does not hold, and pings it. The same without writing is measured first: what it adds is the
loop standing still. Both processes and the disk share this machine.

    python benchmarks/loop.py [--mb 100] [--seconds 20]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from shoal.node.mesh.host import Host, open_host
from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import BlockRequest, ContentService, NodeService
from shoal.protocol.errors import RemoteError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.services import Empty, client

RESULT = Path(__file__).parent / "results" / "loop.md"
LISTEN = ["/ip4/127.0.0.1/tcp/0"]
PINGS_PER_S = 100
BLOCKS_PER_S = 50
WARM_S = 2.0


class _Node(NodeService):
    async def ping(self, request: Empty) -> Empty:
        """Answer, at once."""
        return request


async def serve(num_bytes: int) -> None:
    """The node: says where it is, then writes states as long as its input says so."""
    router = Router()
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder, Storage(Path(folder) / "node.db") as storage:
        async with open_host(secret=b"a" * 32, listen=LISTEN, bootstrap=[], mdns=False, router=router) as host:
            store = ContentStore(storage, host)
            for service in (store, _Node()):
                router.add(service)
            print(json.dumps({"peer": host.peer_id, "addresses": list(host.addresses())}), flush=True)
            commands = trio.lowlevel.FdStream(os.dup(0))
            while await commands.receive_some(1) == b"w":
                took = []
                ends = trio.current_time() + float((await commands.receive_some(16)).decode())
                while trio.current_time() < ends:
                    state = await trio.to_thread.run_sync(os.urandom, num_bytes)
                    began = trio.current_time()
                    cid = await store.put(state, owner="run")
                    await store.keep("run", [cid])
                    store.hold("run", [cid])
                    took.append(trio.current_time() - began)
                print(json.dumps(took), flush=True)


@dataclass(frozen=True)
class Row:
    """Round trips of one phase, in milliseconds, and what the disk took."""

    what: str
    pings: list[float]
    blocks: list[float]
    written_s: list[float]

    def cells(self) -> str:
        """The row of the table."""
        figures = []
        for took in (self.pings, self.blocks):
            took.sort()
            figures += [f"{took[int(part * (len(took) - 1))]:.1f}" for part in (0.5, 0.99, 1.0)]
        figures[1] = f"**{figures[1]}**"
        writes = f"{len(self.written_s)} of {max(self.written_s):.1f} s at most" if self.written_s else "none"
        return f"| {self.what} | {' | '.join(figures)} | {len(self.pings)} | {len(self.blocks)} | {writes} |"


async def ask(host: Host, peer: PeerId, seconds: float) -> tuple[list[float], list[float]]:
    """Ping, and ask for what is not there, at fixed rates; gives the round trips."""
    pings: list[float] = []
    blocks: list[float] = []
    node = client(NodeService, host.at(peer), timeout_s=30)
    content = client(ContentService, host.at(peer), timeout_s=30)
    ends = trio.current_time() + seconds

    async def one_ping() -> None:
        began = time.perf_counter()
        await node.ping(Empty())
        pings.append(1000 * (time.perf_counter() - began))

    async def one_block(number: int) -> None:
        cid = Cid.of_block(hashlib.sha256(str(number).encode()).digest())
        began = time.perf_counter()
        try:
            await content.block(BlockRequest(cid))
        except RemoteError:
            blocks.append(1000 * (time.perf_counter() - began))

    async with trio.open_nursery() as nursery:
        number, next_at = 0, trio.current_time()
        while next_at < ends:
            await trio.sleep_until(next_at)
            nursery.start_soon(one_ping)
            if number % (PINGS_PER_S // BLOCKS_PER_S) == 0:
                nursery.start_soon(one_block, number)
            number += 1
            next_at += 1 / PINGS_PER_S
    return pings, blocks


async def measure(node: subprocess.Popen[str], seconds: float) -> list[Row]:
    """Without writing, and with."""
    assert node.stdin is not None
    assert node.stdout is not None
    told = json.loads(node.stdout.readline())
    peer = PeerId.parse(told["peer"])
    rows = []
    async with open_host(secret=b"b" * 32, listen=LISTEN, bootstrap=[], mdns=False, router=Router()) as host:
        await host.connect(told["addresses"])
        await ask(host, peer, WARM_S)
        rows.append(Row("nothing is written", *await ask(host, peer, seconds), []))
        node.stdin.write(f"w{seconds}")
        node.stdin.flush()
        pings, blocks = await ask(host, peer, seconds)
        written = json.loads(await trio.to_thread.run_sync(node.stdout.readline))
        rows.append(Row("states are written", pings, blocks, written))
    return rows


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.mb * 1_000_000)
        return
    words = [sys.executable, __file__, "--serve", "--mb", str(options.mb)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        try:
            rows = trio.run(measure, node, options.seconds)
        finally:
            node.terminate()
    command = f"python benchmarks/loop.py --mb {options.mb} --seconds {options.seconds:.0f}"
    lines = [
        f"# The loop: round trips to a node that writes states of {options.mb} MB to disk",
        "",
        f"`{command}`, Python {platform.python_version()}, {platform.machine()} with {os.cpu_count()} cores;",
        f"{PINGS_PER_S} pings and {BLOCKS_PER_S} requests for absent blocks a second; milliseconds.",
        "",
        "| | ping p50 | ping p99 | ping max | block p50 | block p99 | block max | pings | blocks | writes |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row.cells() for row in rows),
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
