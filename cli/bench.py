"""``shoal bench``: how fast the wire is between two nodes, both real, each in a process of its own; and an actor."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from shoal.cli import render
from shoal.cli.bench_dht import measure_dht
from shoal.cli.common import AsJson, Profile, connect, console, print_json
from shoal.cli.spawn import BackgroundNode
from shoal.node.api.client import Client
from shoal.node.api.requests import BenchReduceRequest, BenchRequest, GetModel, PublishModel
from shoal.node.api.schemas import BenchReduceResult
from shoal.node.config import NodeConfig
from shoal.node.swarm.workers import child_environment
from shoal.protocol.errors import NoPeersError, UsageError
from shoal.protocol.ids import PeerId

bench_app = typer.Typer(name="bench", help="Measure the wire to another node.", no_args_is_help=True)

CONNECT_S: Final = 20.0
MAX_REDUCERS: Final = 32
REDUCE_S: Final = 600.0
_PIECE_BYTES: Final = 4 * 1024 * 1024
_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMG", start=1)
    for unit, base in (("", 1000), ("B", 1000), ("iB", 1024))
}

PeerOption = Annotated[
    str | None,
    typer.Option(metavar="ID", help="This connected peer, which runs with --serve-bench; else two new nodes."),
]
SizeOption = Annotated[str, typer.Option(help="Bytes, with a unit if you like: 128, 256KiB, 1GB.")]
SecondsOption = Annotated[float, typer.Option(min=0.1, max=600, help="Measure for about so long.")]
TransportOption = Annotated[
    str, typer.Option(help="auto: TLS lanes where there is a direct path; libp2p: a libp2p stream.")
]


@bench_app.command("rpc")
def rpc(
    peer: PeerOption = None,
    size: SizeOption = "128",
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Calls in flight.")] = 64,
    seconds: SecondsOption = 5.0,
    transport: TransportOption = "auto",
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Echo bytes through an ordinary service method."""
    _bench("rpc", peer, size, concurrency, seconds, transport, profile, as_json=as_json)


@bench_app.command("stream")
def stream(
    peer: PeerOption = None,
    size: SizeOption = "256MB",
    seconds: SecondsOption = 5.0,
    transport: TransportOption = "auto",
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Move one tensor, one way, and check its digest at the far end."""
    _bench("stream", peer, size, 1, seconds, transport, profile, as_json=as_json)


@bench_app.command("load")
def load(
    peer: PeerOption = None,
    size: SizeOption = "1GB",
    seconds: SecondsOption = 5.0,
    transport: TransportOption = "auto",
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """What a large transfer does to small calls, and to memory."""
    _bench("load", peer, size, 1, seconds, transport, profile, as_json=as_json)


@bench_app.command("allreduce")
def allreduce(
    peers: Annotated[int, typer.Option(min=2, max=MAX_REDUCERS, help="Nodes, each in a process of its own.")] = 4,
    numel: Annotated[int, typer.Option(min=1, max=2**28, help="Values of float32.")] = 4_194_304,
    codec: Annotated[str, typer.Option(help="How they travel: fp32, fp16, bf16, int8 or int4.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="All-reduces that are measured.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Reduce an array among new nodes on this machine."""
    with reducing_nodes(peers) as (clients, names):
        request = BenchReduceRequest(name=secrets.token_hex(8), peers=names, numel=numel, codec=codec, rounds=rounds)
        with nullcontext() if as_json else console().status("measuring …"):
            found = _at_once([partial(client.bench_reduce, request, timeout_s=REDUCE_S) for client in clients])
    figures = reduce_figures(found, request)
    if as_json:
        print_json(figures)
    else:
        console().print(render.bench_reduce(figures))


@bench_app.command("blocks")
def blocks(
    size: SizeOption = "256MB",
    receivers: Annotated[int, typer.Option(min=1, max=MAX_REDUCERS, help="Nodes that fetch at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Fetch a file as blocks, from one new node to others on this machine, onto their disks."""
    num_bytes = parse_size(size)
    waiting = nullcontext() if as_json else console().status("measuring …")
    with reducing_nodes(receivers + 1) as (clients, _), _new_home() as folder, waiting:
        figures = _bench_blocks(clients, folder / "data", num_bytes)
    if as_json:
        print_json(figures)
    else:
        from shoal.cli.render_models import bench_blocks

        console().print(bench_blocks(figures))


def _bench_blocks(clients: Sequence[Client], path: Path, num_bytes: int) -> dict[str, Any]:
    with path.open("wb") as file:
        for start in range(0, num_bytes, _PIECE_BYTES):
            file.write(secrets.token_bytes(min(_PIECE_BYTES, num_bytes - start)))
    giver, *takers = clients
    deadline = time.monotonic() + CONNECT_S
    while len(giver.peers()) < len(takers):
        if time.monotonic() > deadline:
            raise NoPeersError(f"the nodes on this machine did not connect in {CONNECT_S:.0f} s")
        time.sleep(0.05)
    model = giver.publish_model(PublishModel(path=str(path), name="bench"))
    before = [_memory(client.pid, "VmRSS") for client in clients]
    busy_s = sum(_cpu_s(client.pid) for client in clients)
    began = time.perf_counter()
    with ThreadPoolExecutor(len(takers)) as pool:
        list(pool.map(lambda client: client.get_model(GetModel(model=str(model.cid))), takers))
    seconds = time.perf_counter() - began
    busy_s = sum(_cpu_s(client.pid) for client in clients) - busy_s
    grown = [_memory(client.pid, "VmHWM") - was for client, was in zip(clients, before, strict=True)]
    return {
        "seconds": round(seconds, 3),
        "mb_per_s": round(num_bytes / seconds / 1e6, 1),
        "receivers": len(takers),
        "memory_mb": round(max(grown) / 1e6, 1),
        "cpu_s_per_gb": round(busy_s / (num_bytes * len(takers) / 1e9), 3),
    }


def _cpu_s(pid: int) -> float:
    """Of the processor, that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int, what: str) -> int:
    """Of a process, by what Linux calls it."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return 0


@bench_app.command("actor")
def actor(
    task: Annotated[str, typer.Option(help="What is played.")] = "gym:CartPole-v1",
    algorithm: Annotated[str, typer.Option(help="Whose policy acts.")] = "vtrace",
    seconds: SecondsOption = 5.0,
    as_json: AsJson = False,
) -> None:
    """Act as an actor's worker does, on this machine, alone: steps, memory, and bytes of what it would give."""
    words = [sys.executable, "-P", "-m", "shoal.training.rollouts.bench", task, algorithm, str(seconds)]
    with nullcontext() if as_json else console().status(f"acting, about {seconds:g} s …"):
        done = subprocess.run(  # noqa: S603  this Python, with what was asked for as its arguments
            words, env=child_environment(), cwd="/", capture_output=True, text=True, check=False
        )
    lines = done.stdout.strip().splitlines()
    try:
        figures = json.loads(lines[-1]) if lines else {}
    except ValueError:
        figures = {}
    if done.returncode or "env_steps_per_s" not in figures:
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UsageError(str(figures.get("error", f"acting failed: {why[:300]}")))
    if as_json:
        print_json(figures)
    else:
        console().print(render.bench_actor(figures))


@bench_app.command("dht")
def dht(
    nodes: Annotated[int, typer.Option(min=2, max=128, help="Nodes, each in a process of its own.")] = 32,
    kill: Annotated[float, typer.Option(min=0, max=0.9, help="Part of them that is killed before the look-ups.")] = 0.3,
    as_json: AsJson = False,
) -> None:
    """Put and get names, announce and find holders, among new nodes on this machine of which some are killed."""
    with nullcontext() if as_json else console().status("measuring …"):
        figures = measure_dht(nodes, kill)
    if as_json:
        print_json(figures)
    else:
        console().print(render.bench_dht(figures))


def reduce_figures(found: Sequence[BenchReduceResult], request: BenchReduceRequest) -> dict[str, Any]:
    """What all nodes saw, in one: a round lasts until its last node has the result."""
    seconds = statistics.median(max(each) for each in zip(*(result.seconds for result in found), strict=True))
    raw_s = max(result.raw_seconds or 0.0 for result in found)
    times = 2 * (len(found) - 1) / len(found)
    moved, carried = times * 4 * request.numel, times * found[0].num_bytes
    return {
        "seconds_median": round(seconds, 4),
        "bus_mb_s_per_peer": round(moved / seconds / 1e6, 1),
        "codec": request.codec,
        "peers": len(found),
        "numel": request.numel,
        "bit_identical": len({tuple(result.digests) for result in found}) == 1,
        "lane_mb_s": round(carried / raw_s / 1e6, 1) if raw_s else None,
        "wire_mb_s_per_peer": round(carried / seconds / 1e6, 1),
        "num_left_out": max(result.num_left_out for result in found),
        "max_error": max(result.max_error for result in found),
    }


def _at_once(calls: Sequence[Callable[[], BenchReduceResult]]) -> list[BenchReduceResult]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


@contextmanager
def reducing_nodes(count: int) -> Iterator[tuple[list[Client], list[PeerId]]]:
    """So many new nodes that are all connected, once they are asked."""
    with _new_home() as home, ExitStack() as stack:
        configs = [_config(home, f"node{number}") for number in range(count)]
        names = stack.enter_context(_started(configs))
        yield [stack.enter_context(Client(config.paths, config.profile)) for config in configs], names


def parse_size(text: str) -> int:
    """Bytes: a number, with a decimal (kB, MB, GB) or binary (KiB, MiB, GiB) unit or none.

    Raises:
        UsageError: if it is no such thing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KkMG]?i?B?)", text.strip())
    unit = match[2].replace("k", "K") if match else None
    if match is None or unit not in _UNITS:
        raise UsageError(f"--size {text[:40]!r} should be a number of bytes, for example 128, 256KiB or 1GB")
    return int(float(match[1]) * _UNITS[unit])


def _bench(
    kind: Literal["rpc", "stream", "load"],
    peer: str | None,
    size: str,
    concurrency: int,
    seconds: float,
    transport: str,
    profile: str,
    *,
    as_json: bool,
) -> None:
    if transport not in ("auto", "libp2p"):
        raise UsageError(f"--transport should be auto or libp2p, not {transport[:40]!r}")
    fields: dict[str, Any] = {"kind": kind, "size": parse_size(size), "seconds": seconds, "transport": transport}
    with ExitStack() as stack:
        if peer is None:
            client, peer = stack.enter_context(_two_nodes())
        else:
            client = stack.enter_context(connect(profile))
            peer = _whole_name(client, peer)
        request = BenchRequest(peer=PeerId.parse(peer), concurrency=concurrency, **fields)
        with nullcontext() if as_json else console().status(f"measuring, about {seconds:g} s …"):
            result = client.bench(request)
    if as_json:
        print_json(result.model_dump(mode="json", exclude_none=True))
    else:
        console().print(render.bench(result))


def _whole_name(client: Client, text: str) -> str:
    known = [str(info.peer_id) for info in client.peers()]
    found = [name for name in known if name.startswith(text)]
    if len(found) != 1:
        reason = "could be several" if found else "is not one"
        raise UsageError(f"{text[:80]!r} {reason} of the {len(known)} connected peers; `shoal peers` lists them")
    return found[0]


@contextmanager
def _two_nodes() -> Iterator[tuple[Client, str]]:
    """A node to measure from, and the name of another, which it is connected to."""
    with _new_home() as home:
        far, near = _config(home, "far", serve_bench=True), _config(home, "near")
        with _started([far, near]) as names, Client(near.paths, near.profile) as client:
            deadline = time.monotonic() + CONNECT_S
            while not client.peers():
                if time.monotonic() > deadline:
                    raise NoPeersError(f"two nodes on this machine did not connect in {CONNECT_S:.0f} s")
                time.sleep(0.05)
            yield client, str(names[0])


@contextmanager
def _new_home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="shoal-bench-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _config(home: Path, profile: str, *, serve_bench: bool = False) -> NodeConfig:
    return NodeConfig(home=home, profile=profile, listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, serve_bench=serve_bench)


@contextmanager
def _started(configs: Sequence[NodeConfig]) -> Iterator[list[PeerId]]:
    """A node of each, which dials those before it; their names."""
    nodes: list[BackgroundNode] = []
    addresses: list[str] = []
    names: list[PeerId] = []
    try:
        for config in configs:
            nodes.append(BackgroundNode(replace(config, bootstrap=tuple(addresses))))
            ready = nodes[-1].wait_ready()
            addresses += ready["addresses"][:1]
            names.append(PeerId.parse(str(ready["peer_id"])))
        yield names
    finally:
        for node in nodes:
            node.kill()
