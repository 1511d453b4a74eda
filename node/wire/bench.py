"""Measuring the wire between two nodes: what ``shoal bench`` runs, and the service that the far node answers with.

A node serves this only if it was started to (``shoal up --serve-bench``), since whoever calls it takes its time and
memory. Figures are of this run on these machines: nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from shoal.node.wire.bulk import BulkRef, Transport
from shoal.node.wire.links import Links
from shoal.protocol.codec import Attachment
from shoal.protocol.errors import NoPeersError, RefusedError, RemoteError, ShoalError, Status, UsageError, unwrap
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Caller, Empty, Service, client, current_call, unary

MAX_ECHO_BYTES: Final = 1024 * 1024
MAX_STREAM_BYTES: Final = 4 * 1000**3
SMALL_CALL_BYTES: Final = 128
WARM_UP_S: Final = 0.5
LANE_WAIT_S: Final = 3.0
LONG_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Echo:
    """Bytes, there and back."""

    data: Attachment


@dataclass(frozen=True, slots=True)
class Prepare:
    """Set a buffer aside for what will be taken; 0 bytes: give it back."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Take:
    """Pull what the caller offers into the buffer."""

    ref: BulkRef
    transport: str


@dataclass(frozen=True, slots=True)
class Taken:
    """By what it came."""

    transport: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a node has used.

    Attributes:
        cpu_s: CPU time of the process so far.
        peak_growth_bytes: how far its memory has risen above what it was when the buffer had been set aside.
    """

    cpu_s: float
    peak_growth_bytes: int


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 of the buffer."""

    sha256: bytes


class BenchService(Service, name="bench"):
    """Another node's end of a measurement."""

    @unary(idempotent=True, max_answer_bytes=MAX_ECHO_BYTES + 4096)
    async def echo(self, request: Echo) -> Echo:
        """Give back what came."""
        raise NotImplementedError

    @unary(timeout_s=60)
    async def prepare(self, request: Prepare) -> Empty:
        """Set a buffer aside."""
        raise NotImplementedError

    @unary(timeout_s=LONG_S)
    async def take(self, request: Take) -> Taken:
        """Pull into the buffer."""
        raise NotImplementedError

    @unary(timeout_s=60)
    async def digest(self, request: Empty) -> Digest:
        """Hash the buffer."""
        raise NotImplementedError

    @unary()
    async def usage(self, request: Empty) -> Usage:
        """Say what was used."""
        raise NotImplementedError


class BenchServer(BenchService):
    """This node's end, for others to measure against; it holds one buffer, for one peer at a time."""

    def __init__(self, links: Links, *, is_open: bool) -> None:
        self._links = links
        self._is_open = is_open
        self._owner: PeerId | None = None  # whose the buffer is
        self._preparing = trio.Lock()
        self._buffer = bytearray()
        self._memory = PeakMemory()

    async def echo(self, request: Echo) -> Echo:
        """Give back what came."""
        self._check_open()
        return request

    async def prepare(self, request: Prepare) -> Empty:
        """Set a buffer aside."""
        self._check_open()
        if not 0 <= request.num_bytes <= MAX_STREAM_BYTES:
            raise UsageError(f"a transfer may have up to {MAX_STREAM_BYTES} bytes, not {request.num_bytes}")
        peer = current_call().peer
        async with self._preparing:
            if self._owner not in (None, peer) and self._links.is_connected(self._owner):
                raise RemoteError(Status.RESOURCE_EXHAUSTED, "another node measures against this one; try again later")
            self._buffer = bytearray()
            self._buffer = await trio.to_thread.run_sync(lambda: bytearray(b"\x00") * request.num_bytes)
            self._owner = peer if request.num_bytes else None
            self._memory = PeakMemory()
        return Empty()

    async def take(self, request: Take) -> Taken:
        """Pull into the buffer."""
        peer, view = self._owned(), memoryview(self._buffer)
        if request.transport not in ("auto", "libp2p") or request.ref.num_bytes > len(view):
            raise UsageError("more than the buffer holds, or no such transport")
        into = view[: request.ref.num_bytes]
        transport: Transport = "auto" if request.transport == "auto" else "libp2p"
        return Taken(await self._links.bulk.pull(peer, request.ref, into, timeout_s=LONG_S, transport=transport))

    async def digest(self, request: Empty) -> Digest:
        """Hash the buffer."""
        self._owned()
        return Digest(await trio.to_thread.run_sync(lambda: hashlib.sha256(self._buffer).digest()))

    async def usage(self, request: Empty) -> Usage:
        """Say what was used."""
        self._check_open()
        return Usage(time.process_time(), self._memory.growth())

    def _check_open(self) -> None:
        if not self._is_open:
            raise RefusedError("this node does not serve benchmarks; start it with --serve-bench")

    def _owned(self) -> PeerId:
        self._check_open()
        peer = current_call().peer
        if self._owner != peer:
            raise RemoteError(Status.FAILED_PRECONDITION, "no buffer is set aside for this peer")
        return peer


class PeakMemory:
    """How far this process's resident memory rises above what it is now."""

    def __init__(self) -> None:
        # Linux forgets the old peak on this; elsewhere the peak of the whole life has to do.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = self._peak()

    def growth(self) -> int:
        """Bytes above the start, at the highest."""
        return max(0, self._peak() - self._start)

    @staticmethod
    def _peak() -> int:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Bench:
    """This node's measurements of one peer that serves them."""

    def __init__(self, links: Links, peer: PeerId, transport: Transport) -> None:
        self._links = links
        self._peer = peer
        self._transport = transport

    async def rpc(self, *, size: int, concurrency: int, seconds: float) -> dict[str, Any]:
        """Echo ``size`` bytes through an ordinary service method, so many calls at a time."""
        if not 0 <= size <= MAX_ECHO_BYTES:
            raise UsageError(f"--size of a call may be up to {MAX_ECHO_BYTES} bytes; larger ones go by `bench stream`")
        async with self._caller() as (caller, transport):
            service = client(BenchService, caller)
            request = Echo(os.urandom(size))
            await self._echo(service, request, concurrency, min(WARM_UP_S, seconds))
            before = await service.usage(Empty())
            cpu_before, began = time.process_time(), time.perf_counter()
            latencies = await self._echo(service, request, concurrency, seconds)
            elapsed = time.perf_counter() - began
            cpu_s = time.process_time() - cpu_before
            cpu_s += (await service.usage(Empty())).cpu_s - before.cpu_s
        moved = 2 * size * len(latencies)
        return _figures(latencies, elapsed, moved, cpu_s) | _transport(transport)

    async def stream(self, *, size: int, seconds: float) -> dict[str, Any]:
        """Move ``size`` bytes one way, again and again, and check their digest at the far end."""
        async with self._caller() as (caller, _), self._sending(caller, size) as (service, data):
            before = await service.usage(Empty())
            memory = PeakMemory()
            cpu_before = time.process_time()
            durations: list[float] = []
            transport = ""
            while sum(durations) < seconds:
                took, transport = await self._send(service, data)
                durations.append(took)
            cpu_s = time.process_time() - cpu_before
            grown, usage = memory.growth(), await service.usage(Empty())
            await self._check(service, data)
        figures = _figures(durations, sum(durations), size * len(durations), cpu_s + usage.cpu_s - before.cpu_s)
        return figures | {
            **_transport(transport),
            "sender_memory_mb": round(grown / 1e6, 1),
            "receiver_memory_mb": round(usage.peak_growth_bytes / 1e6, 1),
        }

    async def load(self, *, size: int, seconds: float) -> dict[str, Any]:
        """Small calls one at a time, first alone, then while ``size`` bytes are moved again and again."""
        async with self._caller() as (caller, _), self._sending(caller, size) as (service, data):
            request = Echo(os.urandom(SMALL_CALL_BYTES))
            await self._echo(service, request, 1, WARM_UP_S)
            idle = await self._echo(service, request, 1, seconds)
            memory = PeakMemory()
            loaded: list[float] = []
            durations: list[float] = []
            transport = ""
            while sum(durations) < seconds:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._echo_into, loaded, service, request, trio.current_time() + LONG_S)
                    took, transport = await self._send(service, data)
                    nursery.cancel_scope.cancel()
                durations.append(took)
            grown, usage = memory.growth(), await service.usage(Empty())
            await self._check(service, data)
        idle_p99, loaded_p99 = _quantile(idle, 0.99), _quantile(loaded, 0.99)
        return {
            "idle_p50_ms": _ms(_quantile(idle, 0.5)),
            "idle_p99_ms": _ms(idle_p99),
            "loaded_p50_ms": _ms(_quantile(loaded, 0.5)),
            "loaded_p99_ms": _ms(loaded_p99),
            "ratio_p99": round(loaded_p99 / idle_p99, 2) if idle_p99 else 0.0,
            "calls": len(loaded),
            "transfer_mb_per_s": round(size * len(durations) / sum(durations) / 1e6, 1),
            "sender_memory_mb": round(grown / 1e6, 1),
            "receiver_memory_mb": round(usage.peak_growth_bytes / 1e6, 1),
            **_transport(transport),
        }

    @asynccontextmanager
    async def _caller(self) -> AsyncIterator[tuple[Caller, str]]:
        """What carries the calls, by the transport that was asked for, and which that is."""
        try:
            if self._transport == "libp2p":
                channel = await self._links.dedicated_channel(self._peer)
                try:
                    yield channel, "libp2p"
                finally:
                    channel.stop()
                return
            with trio.move_on_after(LANE_WAIT_S):
                while self._links.transport(self._peer) != "lane":  # noqa: ASYNC110  it is at most once a run
                    await trio.sleep(0.01)
            yield self._links.at(self._peer), self._links.transport(self._peer) or "libp2p"
        except RemoteError as error:
            raise _explain(error, self._peer) from error
        except BaseExceptionGroup as group:  # of the calls that were under way together
            first = unwrap(group)
            raise (_explain(first, self._peer) if isinstance(first, RemoteError) else first) from None

    @asynccontextmanager
    async def _sending(self, caller: Caller, size: int) -> AsyncIterator[tuple[BenchService, bytes]]:
        if not 1 <= size <= MAX_STREAM_BYTES:
            raise UsageError(f"--size of a transfer may be 1 to {MAX_STREAM_BYTES} bytes, not {size}")
        service = client(BenchService, caller)
        data = await trio.to_thread.run_sync(os.urandom, size)
        await service.prepare(Prepare(size))
        try:
            await self._send(service, data[: 1024 * 1024])  # opens the lanes
            yield service, data
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 2, shield=True), contextlib.suppress(RemoteError):
                await service.prepare(Prepare(0))

    async def _send(self, service: BenchService, data: bytes) -> tuple[float, str]:
        async with self._links.bulk.offer(self._peer, data) as ref:
            began = time.perf_counter()
            taken = await service.take(Take(ref, self._transport))
            return time.perf_counter() - began, taken.transport

    async def _check(self, service: BenchService, data: bytes) -> None:
        expected = await trio.to_thread.run_sync(lambda: hashlib.sha256(data).digest())
        if (await service.digest(Empty())).sha256 != expected:
            raise ShoalError("the bytes that arrived are not those that were sent")

    async def _echo(self, service: BenchService, request: Echo, concurrency: int, seconds: float) -> list[float]:
        latencies: list[float] = []
        until = trio.current_time() + seconds
        async with trio.open_nursery() as nursery:
            for _ in range(concurrency):
                nursery.start_soon(self._echo_into, latencies, service, request, until)
        return latencies

    @staticmethod
    async def _echo_into(latencies: list[float], service: BenchService, request: Echo, until: float) -> None:
        began = trio.current_time()
        while began < until:
            answer = await service.echo(request)
            ended = trio.current_time()
            if len(answer.data) != len(request.data):
                raise ShoalError("an echo is not as long as what was sent")
            latencies.append(ended - began)
            began = ended


def _explain(error: RemoteError, peer: PeerId) -> ShoalError:
    match error.status:
        case Status.PERMISSION_DENIED | Status.RESOURCE_EXHAUSTED:
            return RefusedError(f"{peer}: {error.message}")
        case Status.UNAVAILABLE:
            return NoPeersError(f"{error.message}; `shoal peers` lists whom this node is connected to")
    return error


def _figures(latencies: Sequence[float], elapsed: float, moved: int, cpu_s: float) -> dict[str, Any]:
    return {
        "calls_per_s": round(len(latencies) / elapsed, 1),
        "mb_per_s": round(moved / elapsed / 1e6, 2),
        "p50_ms": _ms(_quantile(latencies, 0.5)),
        "p99_ms": _ms(_quantile(latencies, 0.99)),
        "cpu_s_per_gb": round(cpu_s / (moved / 1e9), 3) if moved else 0.0,
    }


def _quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)


def _transport(transport: str) -> dict[str, str]:
    return {"transport": transport, "security": "tls1.3" if transport == "lane" else "noise"}
