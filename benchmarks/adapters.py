"""Adapters of SmolLM2, averaged: how often it is right, what each node sends, what that costs in processor time.

The recipe `products` by so many nodes in one process, without a network; what is offered are the bytes that nodes would
exchange. Both probes are of the first node, as all hold the same. The model has to be installed, as `docs/models.md`
says.

    OMP_NUM_THREADS=1 python benchmarks/adapters.py [--peers 1] [--epochs 10] [--every 5] [--seed 0]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

from shoal.protocol.errors import UsageError
from shoal.training.models import smollm2
from shoal.training.recipes.local import Company, peers
from shoal.training.recipes.products import RECIPE


class Measured(Company):
    """A company that counts what is offered."""

    offered: int = 0

    def count(self) -> None:
        """From now on."""
        for merging in self._merging.values():
            merging.offer = self._counting(merging.offer)

    def _counting(self, offer: Callable[..., bytes | None]) -> Callable[..., bytes | None]:
        def counted(wanted: object) -> bytes | None:
            data = offer(wanted)
            self.offered += len(data or b"")
            return data

        return counted


def main() -> None:
    """Print a row for each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", type=int, default=5, help="epochs between two probes; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        smollm2.unpack()
    except UsageError as error:
        print(f"not measured: {error}")
        return
    began = time.process_time()
    company = Measured(RECIPE, peers(args.peers), args.seed)
    company.count()
    first = next(iter(company.learners.values()))
    print("| epoch | bytes by each node | collecting, CPU-s | updating | CPU-s so far | sampled | greedy |")
    print("|---|---|---|---|---|---|---|")
    for epoch in range(args.epochs + 1):
        times, company.offered = [time.process_time()], 0
        for act in (company.collect, company.update) if epoch else ():
            act()
            times.append(time.process_time())
        spent = [f"{after - before:.1f}" for before, after in itertools.pairwise(times)] or ["", ""]
        found = ["", ""]
        if args.every and (epoch % args.every == 0 or epoch == args.epochs):
            first.evaluate(1, 1)
            found = [f"{first.scores[name]:.3f}" for name in ("sampled", "greedy")]
        row = [str(epoch), f"{company.offered // args.peers:,}", *spent, f"{time.process_time() - began:.0f}", *found]
        print(f"| {' | '.join(row)} |", flush=True)
    flat = {b"".join(array.tobytes() for array in each.policy_arrays().values()) for each in company.learners.values()}
    print(f"\nadapters after the last merge, over all nodes: {len(flat)} different")


if __name__ == "__main__":
    main()
