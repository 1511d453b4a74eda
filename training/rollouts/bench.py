"""``shoal bench actor``: what an actor's worker does on this machine, alone: its steps, its memory, its bytes.

The process is what an actor's worker is, with a policy of random weights, and stands for one: the same environments,
shards and signatures, without the node, whose part is a look at each shard. It prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Final

import numpy as np

from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.rationing import FIRST_SAMPLES, MIN_SAMPLES, SHARD_S
from shoal.training.rollouts.shard import signed, unsigned
from shoal.training.worker import make_actor
from shoal.training.worker_calls import Open

WARM_SHARDS: Final = 2
"""Not counted: what is made once is made by then."""


def measure(task: str, algorithm: str, seconds: float) -> dict[str, object]:
    """Act for so long.

    Raises:
        ShoalError: if nobody here can act for such a run.
    """
    signer = Signer(bytes(32))
    manifest = Manifest(owner=signer.peer_id, task=task, algorithm=algorithm, mode=Mode.ROLLOUTS)
    swarm = SwarmId.of_manifest(b"a bench")
    actor, _ = make_actor(Open(manifest, signer.peer_id, role=Role.ACTOR, swarm=swarm, stream=1))
    rng = np.random.default_rng(0)
    shape = actor.shape
    arrays: Arrays = {name: 0.1 * rng.standard_normal(size, np.float32) for name, size in shape.shapes().items()}
    if shape.is_normalized:
        arrays |= Moments.none((shape.observation_size,)).to_arrays("observation")
    actor.take(arrays, 0, Cid.of_block(b"a policy"))
    before: Cid | None = None
    samples, steps, num_bytes, shards, took_s, processor_s = FIRST_SAMPLES, 0, 0, 0, 0.0, 0.0
    while shards < WARM_SHARDS or took_s < seconds:
        began, used_s = time.monotonic(), time.process_time()
        made = actor.roll_out(samples, before)
        before, data = signed(signer, *unsigned(made.head, made.rows.columns(actor.action_space)))
        one_s = time.monotonic() - began
        samples = max(MIN_SAMPLES, int(made.rows.samples / one_s * SHARD_S))
        shards += 1
        if shards > WARM_SHARDS:
            steps, num_bytes, took_s = steps + made.rows.samples, num_bytes + len(data), took_s + one_s
            processor_s += time.process_time() - used_s
    return {
        "task": task,
        "algorithm": algorithm,
        "env_steps_per_s": round(steps / took_s, 1),
        "bytes_per_step": round(num_bytes / steps, 2),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "env_steps": steps,
        "shards": shards - WARM_SHARDS,
        "seconds": round(took_s, 3),
        "processor_s": round(processor_s, 3),
    }


def main() -> int:
    """Measure what the arguments name: task, algorithm, seconds."""
    task, algorithm, seconds = sys.argv[1:4]
    try:
        print(json.dumps(measure(task, algorithm, float(seconds))), flush=True)
    except ShoalError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
