"""The synchronous side of ``benchmarks/faults.py``: a world of fixed size over gloo; all wait for all.

    python benchmarks/peers/synchronous.py serve PORT                         the store by which a world meets
    python benchmarks/peers/synchronous.py learn RANK WORLD HOST PORT SEED    prints a line of JSON for each epoch

The work of an epoch is a node's: the same learner collects as much and updates, and what each learner wants averaged is
gathered from all and merged by the same rule. What differs is what a fault does: a collective ends when all are in it.
If one is killed, gloo fails in the others; they keep their processes and their learners, and meet again as soon as it
is back, which takes the state of whoever is furthest. So nothing but waiting is lost, which is less than what a
launcher that restarts all of a world would lose. The store is never struck.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from shoal.protocol.ids import PeerId
from shoal.training.algorithms.ppo import PPO
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.manifest import Manifest
from shoal.training.state import decode_arrays, encode_arrays
from shoal.training.tasks import load_task

TASK: Final = "gym:CartPole-v1"
POLL_S: Final = 0.05
GIVE_UP_S: Final = 30.0
"""After a failure in which nobody died, the world meets anew."""
PATIENCE: Final = timedelta(minutes=30)
"""torch.distributed's own default: a collective waits so long for one that is silent."""


class World:
    """One process in a world of so many, which meets again after each failure."""

    def __init__(self, rank: int, size: int, host: str, port: int) -> None:
        self.rank = rank
        self.size = size
        self._store = dist.TCPStore(host, port, is_master=False, timeout=PATIENCE)
        self._generation = self._store.add("generation", 1)  # whoever starts asks all to meet anew

    def meet(self) -> None:
        """Returns when all are there."""
        while True:
            self._generation = int(self._store.add("generation", 0))
            joined = f"joined/{self._generation}"
            self._store.add(f"{joined}/{self.rank}", 1)
            while int(self._store.add("generation", 0)) == self._generation:
                if all(self._store.check([f"{joined}/{rank}"]) for rank in range(self.size)):
                    store = dist.PrefixStore(joined, self._store)
                    dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
                    return
                time.sleep(POLL_S)

    def part(self) -> None:
        """A collective failed: leave, and wait until somebody asks all to meet anew."""
        dist.destroy_process_group()
        ends = time.monotonic() + GIVE_UP_S
        while int(self._store.add("generation", 0)) == self._generation and time.monotonic() < ends:
            time.sleep(POLL_S)
        if int(self._store.add("generation", 0)) == self._generation:
            self._store.add("generation", 1)

    def gather(self, data: bytes) -> list[bytes]:
        """What each has; bytes of any length."""
        length = torch.tensor([len(data)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = int(max(each.item() for each in lengths))
        own = torch.zeros(longest, dtype=torch.uint8)
        own[: len(data)] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        parts = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [part.numpy()[: int(size.item())].tobytes() for part, size in zip(parts, lengths, strict=True)]


def learn(rank: int, size: int, host: str, port: int, seed: int) -> None:
    """Epoch after epoch, until killed."""
    torch.set_num_threads(1)
    names = [PeerId.of_public_key(bytes([number + 1]) * 32) for number in range(size)]
    manifest = Manifest(owner=names[0], task=TASK, algorithm="ppo", seed=seed)
    learner = PPO().learner(manifest, load_task(TASK), peer=names[rank], life=str(os.getpid()))
    world = World(rank, size, host, port)
    epoch = env_steps = 0
    while True:
        world.meet()
        try:
            epoch, env_steps = catch_up(world, learner, epoch, env_steps)
            while True:
                if learner.samples < manifest.batch.largest_share:
                    learner.collect(manifest.batch.largest_share - learner.samples)
                env_steps += update(world, learner, names)
                epoch += 1
                print(json.dumps({"at": time.monotonic(), "rank": rank, "epoch": epoch, "env_steps": env_steps}))
                sys.stdout.flush()
        except RuntimeError as error:  # gloo's: another one is gone
            print(f"epoch {epoch}: {str(error)[:200]}", file=sys.stderr)
            world.part()


def catch_up(world: World, learner: Any, epoch: int, env_steps: int) -> tuple[int, int]:
    """Take the state of whoever is furthest; gives its epoch and environment steps."""
    told = [json.loads(each) for each in world.gather(json.dumps([epoch, env_steps]).encode())]
    furthest = max(range(world.size), key=lambda rank: told[rank][0])
    own = encode_arrays(learner.export_state(), {}) if world.rank == furthest else b""
    state = world.gather(own)[furthest]
    if epoch != told[furthest][0]:
        learner.import_state(decode_arrays(state)[0])
    return int(told[furthest][0]), int(told[furthest][1])


def update(world: World, learner: Any, names: list[PeerId]) -> int:
    """One joint update; gives the environment steps in it. If it fails, the learner is as before."""
    steps = learner.update()
    try:
        exchange, samples = next(steps), 0
        while True:
            parts = world.gather(encode_arrays(exchange.arrays, {"weight": exchange.weight}))
            given = [decode_arrays(part) for part in parts]
            samples = samples or int(sum(meta["weight"] for _, meta in given))
            merged = merge([Contribution(n, meta["weight"], a) for n, (a, meta) in zip(names, given, strict=True) if a])
            try:
                exchange = steps.send(merged)
            except StopIteration:
                return samples
    finally:
        steps.close()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        store = dist.TCPStore("0.0.0.0", int(sys.argv[2]), is_master=True, wait_for_workers=False)
        print(store.port, flush=True)
        sys.stdin.read()
    else:
        learn(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
