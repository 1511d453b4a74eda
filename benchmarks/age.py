"""What does a run of great age cost? A node that restarts in a swarm of 8 authors after 50,000 epochs.

Every author writes its policy and its contributions in each fourth epoch (a node writes less: it leaves five seconds
between two), and each epoch is evaluated by one of them. The ops go to the node's file as the node keeps them. Each log
ends right before its next snapshot, when it is longest. Then a new process, as a node does it, reads them and shows the
views: the time of that, the longest time that the loop stood still for it, its memory, and the size of the file.

    python benchmarks/age.py [--epochs 50000] [--authors 8]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio
import trio.lowlevel

from shoal.crdt.sync import SwarmDocs
from shoal.crdt.views import Views
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.swarm.journal import Journal, load_docs
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signed, Signer

RESULT = Path(__file__).parent / "results" / "age.md"
SWARM = SwarmId.of_manifest(b"an old run")
BATCH = 2048
EVERY = 4
STORE_AT_ONCE = 1024


def signer_of(number: int) -> Signer:
    """One of the authors."""
    return Signer(bytes([number + 1]) * 32)


def write(path: Path, authors: int, epochs: int) -> dict[str, float]:
    """Fill a node's file; what the writing took."""
    num_ops, began = 0, time.process_time()
    slowest = 0.0
    with Storage(path) as storage:
        storage.add_swarm(StoredSwarm(swarm=SWARM, manifest=b"an old run", role="learner", joined_at=1.0))
        for number in range(authors):
            signer = signer_of(number)
            docs = SwarmDocs(SWARM, signer.peer_id)
            waiting: list[Signed] = [docs.write(signer, member={"role": "learner", "left": False})]
            epoch = 0
            while epoch < epochs or not docs._logs[signer.peer_id].is_due:
                epoch += 1
                if epoch % EVERY and epoch % authors != number:
                    continue
                cid = str(Cid.of_block(epoch.to_bytes(4)))
                registers = {
                    "policy": {"epoch": epoch, "cid": cid, "env_steps": epoch * BATCH, "digest": cid[:32]},
                    "contributions": {"env_steps": epoch * BATCH // authors, "rounds": epoch},
                }
                if epoch % authors == number:
                    entry = {"cid": cid, "return": 100.0 + epoch / 1e3, "env_steps": epoch * BATCH, "episodes": 20}
                    registers["evaluations"] = {str(epoch): entry}
                before = time.process_time()
                waiting.append(docs.write(signer, **registers))
                slowest = max(slowest, time.process_time() - before)
                num_ops += 1
                if len(waiting) >= STORE_AT_ONCE:
                    storage.append_ops(SWARM, waiting)
                    waiting.clear()
            storage.append_ops(SWARM, waiting)
    return {"ops": num_ops, "write_ms": (time.process_time() - began) / num_ops * 1e3, "slowest_ms": slowest * 1e3}


async def restart(path: Path) -> dict[str, float]:
    """What a new process needs for it."""
    memory = _memory_mb()
    longest = 0.0

    async def notice_pauses() -> None:
        nonlocal longest
        while True:
            before = time.thread_time()
            await trio.lowlevel.checkpoint()
            longest = max(longest, time.thread_time() - before)

    with Storage(path) as storage:
        began, processor = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notice_pauses)
            docs = await load_docs(SWARM, signer_of(0).peer_id, storage)
            nursery.cancel_scope.cancel()
        journal, views = Journal(SWARM, signer_of(0), docs, storage), Views(475.0)
        views.update(journal.documents())
        took, processor = time.perf_counter() - began, time.process_time() - processor
        num_ops = docs.num_ops
        op = docs.write(signer_of(0), policy={"epoch": 10**6})
        began, documents = time.process_time(), docs.documents()
        for _ in range(200):
            views.update(dict(documents))
        return {
            "restart_s": took,
            "processor_s": processor,
            "longest_pause_ms": longest * 1e3,
            "held_ops": num_ops,
            "memory_mb": _memory_mb() - memory,
            "evaluations": len(views.evaluations),
            "event_ms": (time.process_time() - began) / 200 * 1e3,
            "snapshot_bytes": len(op.payload),
        }


def _memory_mb() -> float:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50_000)
    parser.add_argument("--authors", type=int, default=8)
    parser.add_argument("--restart", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.restart is not None:
        print(json.dumps(trio.run(restart, options.restart)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.sqlite"
        wrote = write(path, options.authors, options.epochs)
        size = sum(each.stat().st_size for each in Path(folder).iterdir()) / 1e6
        command = [sys.executable, __file__, "--restart", str(path)]
        tries = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    best = min(tries, key=lambda each: each["restart_s"])
    text = f"""# A run of great age

`python benchmarks/age.py --epochs {options.epochs} --authors {options.authors}` on {platform.machine()},
{os.cpu_count()} cores, Python {platform.python_version()}; the best of three restarts.

| what | |
|---|---|
| ops written | {wrote["ops"]:,} |
| a write: mean, longest (a snapshot) | {wrote["write_ms"]:.2f} ms, {wrote["slowest_ms"]:.1f} ms of processor time |
| the node's file | {size:.1f} MB |
| ops held, right before the next snapshots | {best["held_ops"]:,} |
| restart: reading, checking, applying, views | {best["restart_s"]:.2f} s, of a processor {best["processor_s"]:.2f} s |
| the longest that the loop stood still for it | {best["longest_pause_ms"]:.1f} ms of processor time |
| the next op, a snapshot | {best["snapshot_bytes"] / 1e3:.1f} kB |
| memory for it | {best["memory_mb"]:.1f} MB |
| evaluations that are kept and shown | {best["evaluations"]:,} |
| views brought up to date | {best["event_ms"]:.3f} ms |
"""
    print(text)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
