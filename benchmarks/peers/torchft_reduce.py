"""torchft's side of ``benchmarks/exchange.py``: one peer of its fault-tolerant process group over gloo.

    python benchmarks/peers/torchft_reduce.py RANK SIZE NUMEL HOST:PORT     the first peer also keeps the store there

Finding a quorum is not measured: the group stands before the first round begins.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from reducing import Array, array_of, obey, say
from torchft.process_group import ProcessGroupGloo

PATIENCE = timedelta(seconds=60)


def main(rank: int, size: int, numel: int, address: str) -> None:
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False, timeout=PATIENCE)
    group = ProcessGroupGloo(timeout=PATIENCE)
    group.configure(f"{address}/bench", f"peer_{rank}", rank, size)
    own = torch.from_numpy(array_of(rank, numel))
    work = own.clone()
    say(store=store.port)

    def prepare() -> None:
        work.copy_(own)

    def reduce() -> Array:
        group.allreduce([work], dist.ReduceOp.SUM).wait()
        work.div_(size)
        return work.numpy()

    obey(size, numel, prepare, reduce)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    os._exit(0)  # its own threads do not end with the main one
