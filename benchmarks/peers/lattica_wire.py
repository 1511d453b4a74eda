"""Lattica's side of ``benchmarks/wire.py``: a node that serves, and one that measures against it.

    python benchmarks/peers/lattica_wire.py serve PORT             prints its peer id; ends with its standard input
    python benchmarks/peers/lattica_wire.py measure PORT ADDRESS   reads lines of JSON, answers each with one of figures

Of the ways in which Lattica can be asked for many things at once, or for a large one, the fastest counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lattica import ConnectionHandler, Lattica, rpc_method, rpc_stream, rpc_stream_iter

CONNECT_S = 20.0
CHUNKS = (64 * 1024, 1024 * 1024, 4 * 1024 * 1024)


class Wire(ConnectionHandler):
    """What is measured."""

    taken = b""

    @rpc_method
    def echo(self, data: bytes) -> bytes:
        return data

    @rpc_stream
    def take(self, data: bytes) -> int:
        Wire.taken = data
        return len(data)

    @rpc_method
    def digest(self, _: None = None) -> bytes:
        return hashlib.sha256(Wire.taken).digest()

    @rpc_stream_iter
    def give(self, what: list[int]) -> Any:
        num_bytes, chunk_bytes = what
        chunk = bytes(chunk_bytes)
        for _ in range(num_bytes // chunk_bytes):
            yield chunk


def node(port: int, bootstrap: list[str]) -> Lattica:
    builder = Lattica.builder().with_listen_addrs([f"/ip4/127.0.0.1/tcp/{port}"])
    builder = builder.with_mdns(False).with_upnp(False).with_autonat(False).with_dcutr(False)
    return (builder.with_bootstraps(bootstrap) if bootstrap else builder).build()


def serve(port: int) -> None:
    lattica = node(port, [])
    Wire(lattica)
    print(lattica.peer_id(), flush=True)
    sys.stdin.read()


def one_by_one(stub: Any, data: bytes, _: int, seconds: float) -> float:
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        stub.echo(data).result()
        count += 1
    return count / (time.perf_counter() - began)


def by_futures(stub: Any, data: bytes, concurrency: int, seconds: float) -> float:
    waiting = deque(stub.echo(data) for _ in range(concurrency))
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        waiting.popleft().result()
        waiting.append(stub.echo(data))
        count += 1
    rate = count / (time.perf_counter() - began)
    for future in waiting:
        future.result()
    return rate


def by_asyncio(stub: Any, data: bytes, concurrency: int, seconds: float) -> float:
    count = 0

    async def ask(until: float) -> None:
        nonlocal count
        while time.perf_counter() < until:
            await stub.echo(data)
            count += 1

    async def ask_all() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(ask(began + seconds) for _ in range(concurrency)))
        return count / (time.perf_counter() - began)

    return asyncio.run(ask_all())


def calls_per_s(stub: Any, size: int, concurrency: int, seconds: float) -> float:
    data = os.urandom(size)
    assert stub.echo(data).result() == data
    ways: tuple[Callable[[Any, bytes, int, float], float], ...] = (one_by_one,)
    if concurrency > 1:
        ways = (by_futures, by_asyncio)
    for way in ways:
        way(stub, data, concurrency, 0.3)
    return max(way(stub, data, concurrency, seconds / len(ways)) for way in ways)


def mb_per_s(stub: Any, size: int) -> float:
    data = os.urandom(size)
    rates = []
    for _ in range(2):
        began = time.perf_counter()
        assert stub.take(data).result() == size
        rates.append(size / (time.perf_counter() - began) / 1e6)
    assert stub.digest().result() == hashlib.sha256(data).digest()
    for chunk_bytes in CHUNKS:
        began = time.perf_counter()
        given = sum(len(chunk) for chunk in stub.give([size, chunk_bytes]))
        rates.append(given / (time.perf_counter() - began) / 1e6)
    return max(rates)


def measure(port: int, address: str) -> None:
    peer = address.rpartition("/")[2]
    lattica = node(port, [address])
    stub = Wire(lattica).get_stub(peer)
    deadline = time.monotonic() + CONNECT_S
    while peer not in lattica.get_all_peers():
        if time.monotonic() > deadline:
            sys.exit(f"Lattica did not connect to {address} in {CONNECT_S:.0f} s")
        time.sleep(0.02)
    print("{}", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        if wanted["kind"] == "rpc":
            figure = calls_per_s(stub, wanted["size"], wanted["concurrency"], wanted["seconds"])
        else:
            figure = mb_per_s(stub, wanted["size"])
        print(json.dumps({"figure": figure}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        measure(int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # its own threads do not end with the main one
