"""What libp2p itself gives, for ``benchmarks/wire.py``: bytes from one host to another by one stream, noise and yamux.

    python benchmarks/peers/libp2p_wire.py serve             prints its address; ends with its standard input
    python benchmarks/peers/libp2p_wire.py measure ADDRESS   reads lines of JSON, answers each with one of figures

The reader throws away what it reads. Of several sizes of a write, the fastest counts.
"""

from __future__ import annotations

import json
import os
import sys
import time

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from multiaddr import Multiaddr

TAKE = TProtocol("/bench/take/1")
READ_BYTES = 256 * 1024
WRITES = (64 * 1024, 128 * 1024, 256 * 1024, 1024 * 1024)


def host() -> IHost:
    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise})


async def take(stream: INetStream) -> None:
    """Eight bytes say how many follow; one says that they came."""
    left = int.from_bytes(await stream.read(8), "big")
    while left > 0:
        left -= len(await stream.read(READ_BYTES))
    await stream.write(b"\1")
    await stream.close()


async def give(one: IHost, address: str, data: bytes, write_bytes: int) -> float:
    stream = await one.new_stream(info_from_p2p_addr(Multiaddr(address)).peer_id, [TAKE])
    began = time.perf_counter()
    await stream.write(len(data).to_bytes(8, "big"))
    for start in range(0, len(data), write_bytes):
        await stream.write(data[start : start + write_bytes])
    assert await stream.read(1) == b"\1"
    rate = len(data) / (time.perf_counter() - began) / 1e6
    await stream.close()
    return rate


async def serve() -> None:
    one = host()
    async with one.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        one.set_stream_handler(TAKE, take)
        print(one.get_addrs()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


async def measure(address: str) -> None:
    one = host()
    async with one.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await one.connect(info_from_p2p_addr(Multiaddr(address)))
        print("{}", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            data = os.urandom(json.loads(line)["size"])
            rates = [await give(one, address, data, write_bytes) for write_bytes in WRITES]
            print(json.dumps({"figure": max(rates)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        trio.run(serve)
    else:
        trio.run(measure, sys.argv[2])
    os._exit(0)
