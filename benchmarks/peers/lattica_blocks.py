"""Lattica's side of ``benchmarks/blocks.py``: blocks of a mebibyte by Bitswap, from one node to another.

python benchmarks/peers/lattica_blocks.py serve COUNT          prints its address and the blocks' names
python benchmarks/peers/lattica_blocks.py measure COUNT        starts that, and prints figures as JSON
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lattica import Lattica

BLOCK_BYTES = 1024 * 1024
AT_A_TIME = 8
CONNECT_S = 20.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def serve(count: int) -> None:
    where = f"/ip4/127.0.0.1/tcp/{free_port()}"
    node = Lattica.builder().with_listen_addrs([where]).build()
    cids = [node.put_block(os.urandom(BLOCK_BYTES)) for _ in range(count)]
    print(json.dumps({"address": f"{where}/p2p/{node.peer_id()}", "cids": cids}), flush=True)
    before = time.process_time()
    sys.stdin.readline()
    print(json.dumps({"cpu_s": time.process_time() - before}), flush=True)


def measure(count: int) -> None:
    words = [sys.executable, __file__, "serve", str(count)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        given = answer(server)
        where = f"/ip4/127.0.0.1/tcp/{free_port()}"
        node = Lattica.builder().with_listen_addrs([where]).with_bootstraps([given["address"]]).build()
        deadline = time.monotonic() + CONNECT_S
        while not node.get_all_peers() and time.monotonic() < deadline:
            time.sleep(0.1)
        before, began = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            num_bytes = sum(pool.map(lambda cid: len(node.get_block(cid)[1]), given["cids"]))
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - before
        cpu_s += answer(server, "\n")["cpu_s"]
        server.kill()
    if num_bytes != count * BLOCK_BYTES:
        raise SystemExit(f"{num_bytes} bytes came of {count} blocks")
    figures = {"mb_per_s": num_bytes / seconds / 1e6, "cpu_s_per_gb": cpu_s / (num_bytes / 1e9)}
    print(json.dumps(figures), flush=True)
    os._exit(0)  # its threads would keep the process


def answer(server: subprocess.Popen[str], ask: str = "") -> dict[str, Any]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(ask)
    server.stdin.flush()
    while not (line := server.stdout.readline()).startswith("{"):  # it logs there too
        if not line:
            raise SystemExit("the node that serves ended")
    found: dict[str, Any] = json.loads(line)
    return found


if __name__ == "__main__":
    {"serve": serve, "measure": measure}[sys.argv[1]](int(sys.argv[2]))
