"""A member of ``benchmarks/uplinks.py``: a real host, which obeys lines of JSON on its standard input.

    python benchmarks/peers/uplink_reduce.py SEED ADDRESS NUMEL     prints its peer id and address; ends with its input
    {"meet": [addresses]}                     connect to these
    {"reduce": name, "claims": {peer: …}}     one all-reduce with all of these; ``claims``: what each says it can send

Owners are found from the claims as from those in signed offers; each answer says what this node would claim by now.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
import trio

from shoal.node.mesh.host import Host, open_host
from shoal.node.swarm.reducing import KEY_BYTES, Reductions
from shoal.node.wire.channel import Router
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer
from shoal.training.exchange.allreduce import Member
from shoal.training.exchange.owning import rates_of
from shoal.training.exchange.spans import Spans

PATIENCE_S = 60.0
"""Longer than any round takes: nobody is left out because it is slow, or left before it has the whole result."""
MEET_S = 20.0


async def reduce(
    reductions: Reductions, spans: Spans, offered: memoryview, name: str, claims: dict[str, float]
) -> dict[str, Any]:
    peers = sorted(PeerId.parse(peer) for peer in claims)
    rates = rates_of({peer: claims[str(peer)] for peer in peers})
    members = [Member(peer, 100.0 + 10 * rank, rates[peer]) for rank, peer in enumerate(peers)]
    key = hashlib.sha256(name.encode()).digest()[:KEY_BYTES]
    into = memoryview(bytearray(spans.num_bytes))
    limits = {"patience_s": PATIENCE_S, "linger_s": PATIENCE_S}
    async with reductions.reducing(key, members, spans, offered, into=into, **limits) as result:
        pass
    outcomes = result.outcomes.values()
    return {
        "seconds": result.seconds,
        "digest": result.digest.hex(),
        "num_left_out": sum(len(peers) - len(outcome.authors) for outcome in outcomes),
        "owned": sum(outcome.owner == reductions.me for outcome in outcomes),
    }


async def meet(host: Host, addresses: list[str]) -> dict[str, Any]:
    for address in addresses:
        await host.connect([address])
    return {}


async def main(seed: int, address: str, numel: int) -> None:
    secret, router = bytes([seed]) * 32, Router()
    listen = [f"/ip4/{address}/tcp/4001"]
    async with open_host(secret=secret, listen=listen, bootstrap=[], mdns=False, router=router) as host:
        reductions = Reductions(host.links, Signer(secret))
        router.add(reductions)
        spans = Spans(numel)
        offered = spans.encode(np.random.default_rng(seed).standard_normal(numel, np.float32))
        say({"peer": str(host.peer_id), "address": f"{listen[0]}/p2p/{host.peer_id}", "parts": spans.num_parts})
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            asked = json.loads(line)
            if "meet" in asked:
                with trio.fail_after(MEET_S):
                    answer = await meet(host, asked["meet"])
            else:
                answer = await reduce(reductions, spans, offered, asked["reduce"], asked["claims"])
            say({**answer, "uplink": round(host.links.bulk.uplink.per_s)})


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
