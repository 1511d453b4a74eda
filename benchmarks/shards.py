"""What shards cost: bytes on the wire, time to make and to open, and the time of a check beside that of acting.

One process of one thread. An actor plays and seals shards; whoever gets them opens them, replays what was shown, and
checks them, as `shoal.training.rollouts` does it. Times are of the processor, the median of several shards; bytes are
per environment step, with what was shown and without. Then so many honest shards of short streams by many authors under
policies of unlike sizes are checked, each by a process-fresh policy: how many were called false.

    python benchmarks/shards.py [--tasks gym:A,gym:B] [--honest 10000] [--keep]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.rollouts.acting import Acting, ActorShape, Words
from shoal.training.rollouts.checking import check_rows
from shoal.training.rollouts.evidence import Verdict
from shoal.training.rollouts.replaying import replay, surroundings
from shoal.training.rollouts.rows import rows_of
from shoal.training.rollouts.shard import open_shard, seal
from shoal.training.rollouts.streams import RowStream
from shoal.training.tasks import Task, load_task

RESULT = Path(__file__).parent / "results" / "shards.md"
SWARM = SwarmId.of_manifest(b"a swarm")
STATE = Cid.of_block(b"a policy")
STEPS, ENVS, TIMES = 256, 8, 7

T = TypeVar("T")


def a_policy(task: Task, seed: int, units: int = 64) -> tuple[ActorShape, Words]:
    """One whose actions depend on what it sees."""
    shape = ActorShape(task.observation_space.size, task.action_space, (units, units), False)
    rng = np.random.default_rng(seed)
    flat = (rng.standard_normal(shape.num_parameters) * rng.choice([0.05, 0.15, 0.4])).astype(np.float32)
    return shape, (flat.view(np.uint32) >> 16).astype(np.uint16)


def timed(action: Callable[..., T], *given: Any, **named: Any) -> tuple[T, float]:
    """What it gives, and how long the processor took."""
    start = time.process_time()
    found = action(*given, **named)
    return found, time.process_time() - start


def of_task(name: str) -> str:
    """A line of the table."""
    task = load_task(name)
    here, me = surroundings(task), Signer(b"a" * 32)
    acting = Acting(*a_policy(task, 1))
    sizes, seconds = [], []
    for is_shown in (False, True):
        stream = RowStream(task, ENVS, author=me.peer_id, swarm=SWARM, surroundings=here, max_lead=0, is_shown=is_shown)
        some: list[tuple[float, ...]] = []
        for _ in range(TIMES):
            (head, rows), act_s = timed(stream.collect, acting, 1, STATE, STEPS)
            columns = rows.columns(task.action_space)
            (cid, data), seal_s = timed(seal, me, head, columns)
            stream.sealed(cid)
            shard, open_s = timed(open_shard, data, cid=cid, swarm=SWARM)
            opened = rows_of(shard, task.observation_space.size, task.action_space)
            _, replay_s = timed(replay, opened, task.make)
            found, check_s = timed(check_rows, shard, task, here, acting)
            assert found.verdict is Verdict.TRUE, found
            some.append((len(data) / rows.samples, act_s, seal_s, open_s, replay_s, check_s))
        stream.close()
        sizes.append(statistics.median(each[0] for each in some))
        if not is_shown:
            seconds = [statistics.median(column) for column in list(zip(*some, strict=True))[1:]]
    act_s, seal_s, open_s, replay_s, check_s = seconds
    sights = 4 * task.observation_space.size
    samples = STEPS * ENVS
    return (
        f"| {name} | {sizes[0]:.2f} | {sizes[1]:.1f} | {sights} | {1e6 * act_s / samples:.1f} "
        f"| {1e6 * seal_s / samples:.2f} | {1e6 * open_s / samples:.2f} | {replay_s / act_s:.2f} "
        f"| **{check_s / act_s:.2f}** |"
    )


def honest(count: int) -> str:
    """How many honest shards are called false."""
    task = load_task("gym:CartPole-v1")
    here, false, looked, samples = surroundings(task), 0, 0, 0
    while looked < count:
        signer = Signer((looked + 1).to_bytes(32, "big"))
        shape, words = a_policy(task, looked, (32, 64, 128)[looked % 3])
        stream = RowStream(task, 1, author=signer.peer_id, swarm=SWARM, surroundings=here)
        before = None
        for version in range(20):
            head, rows = stream.collect(Acting(shape, words), version, STATE, 16)
            cid, data = seal(signer, head, rows.columns(task.action_space))
            stream.sealed(cid)
            shard = open_shard(data, cid=cid, swarm=SWARM)
            found = check_rows(shard, task, here, Acting(shape, words), before=before)
            false += found.verdict is not Verdict.TRUE
            looked, samples, before = looked + 1, samples + rows.samples, rows
        stream.close()
    return f"{looked:,} honest shards of {samples:,} steps were checked: {false} were called anything but true."


def main() -> None:
    """Measure, print, and keep if that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--tasks", default="gym:CartPole-v1,gym:Acrobot-v1,gym:Pendulum-v1,gym:LunarLander-v3,gym:HalfCheetah-v5"
    )
    parser.add_argument("--honest", type=int, default=10_000, help="shards to check (default: 10,000)")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    columns = "task, B/step, B/step shown, B seen, acting µs/step, seal, open, replay ÷ acting, check ÷ acting"
    lines = ["| " + " | ".join(columns.split(", ")) + " |", "|" + "---|" * 9]
    print("\n".join(lines))
    for name in arguments.tasks.split(","):
        lines.append(of_task(name))
        print(lines[-1], flush=True)
    said = honest(arguments.honest)
    print(said)
    if arguments.keep:
        machine = f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}, one thread"
        text = (
            f"# Shards: what they cost\n\n`python benchmarks/shards.py --honest {arguments.honest}`, {machine}.\n"
            f"Shards of {STEPS} steps of {ENVS} environments; see the head of the benchmark.\n\n"
        )
        RESULT.write_text(text + "\n".join(lines) + f"\n\n{said}\n")


if __name__ == "__main__":
    main()
