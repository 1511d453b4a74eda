"""hivemind's side of ``benchmarks/exchange.py``: one peer of a group that averages an array.

    python benchmarks/peers/hivemind_reduce.py RANK SIZE NUMEL CODEC ADDRESS…     prints its own addresses

Finding a group is not measured: it is found before the round begins (`require_trigger`), by at least all of them.
``CODEC`` is ``fp32``, ``fp16`` or ``int8`` (hivemind's uniform quantization).
"""

from __future__ import annotations

import os
import sys
import time

import hivemind
import torch
from hivemind.averaging.control import AveragingStage, StepControl
from hivemind.compression import CompressionBase, Float16Compression, NoCompression, Uniform8BitQuantization
from reducing import Array, array_of, obey, say

CODECS: dict[str, type[CompressionBase]] = {
    "fp32": NoCompression,
    "fp16": Float16Compression,
    "int8": Uniform8BitQuantization,
}
ROUND_S = 60.0
POLL_S = 0.01


def main(rank: int, size: int, numel: int, codec: str, addresses: list[str]) -> None:
    own = torch.from_numpy(array_of(rank, numel))
    dht = hivemind.DHT(initial_peers=addresses, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        [own.clone()],
        dht,
        prefix=f"bench_{codec}",
        target_group_size=size,
        min_group_size=size,
        compression=CODECS[codec](),
        start=True,
    )
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    steps: list[StepControl] = []

    def prepare() -> None:
        with averager.get_tensors() as tensors:
            tensors[0][:] = own
        step = averager.step(wait=False, require_trigger=True, timeout=ROUND_S)
        assert isinstance(step, StepControl)
        while step.stage in (AveragingStage.IDLE, AveragingStage.LOOKING_FOR_GROUP):
            time.sleep(POLL_S)
        steps[:] = [step]

    def reduce() -> Array:
        steps[0].allow_allreduce()
        assert steps[0].result(ROUND_S) is not None, "no group"
        with averager.get_tensors() as tensors:
            return tensors[0].numpy().copy()

    obey(size, numel, prepare, reduce)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
    os._exit(0)  # its own processes do not end with it
