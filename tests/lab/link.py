"""The internet of the lab: one process that carries packets between sites, with delay, loss and a rate.

Every site has an access link: a TUN device in the namespace of its router, whose other end this process holds. A
packet goes up the access link of its sender, is routed by its destination (an IPv4 /16 or an IPv6 /32 belongs to one
link), and goes down the access link of the receiver. Each way of a link is a line of `rate` bytes/s behind a drop-tail
queue, and then takes `delay_ms`; `loss` is the chance that a packet is lost on it. Order is kept. A TUN device without
virtio headers offers no offloads, so packets fit the MTU and carry their checksums.

It is told what to do by lines of JSON on stdin, answers each by one on stdout, and ends when stdin does:

    {"do": "attach", "link": "a", "namespace": "…", "device": "wan", "networks": ["5.1.0.0/16", "2a00:1::/32"]}
    {"do": "set", "link": "a", "delay_ms": 12.5, "loss": 0.01, "rate": 25e6, "dark": false}    what is named changes
    {"do": "route", "link": "a", "networks": ["5.9.0.0/16"]}                                   in place of the old ones
    {"do": "count", "link": "a"}                                                               packets and bytes so far
    {"do": "detach", "link": "a"}
"""

from __future__ import annotations

import fcntl
import gc
import heapq
import ipaddress
import json
import os
import random
import select
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package `lab` is

from lab.netns import inside

QUEUE_BYTES: Final = 1_000_000
MAX_PACKETS: Final = 100_000
"""On their way at once, over all links; those beyond are dropped."""
BURST: Final = 64
"""Packets taken from one device before it is the next one's turn."""

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000


@dataclass(slots=True)
class Way:
    """One direction of an access link."""

    delay_s: float
    loss: float
    rate: float
    queue: int
    free_at: float = 0.0
    packets: int = 0
    num_bytes: int = 0
    dropped: int = 0

    def enter(self, size: int, now: float, rng: random.Random) -> float | None:
        """When a packet of so many bytes, which comes now, is at the other end; None if it never is."""
        begins = max(now, self.free_at)
        if (begins - now) * self.rate > self.queue or (self.loss and rng.random() < self.loss):
            self.dropped += 1
            return None
        self.free_at = begins + size / self.rate
        self.packets += 1
        self.num_bytes += size
        return self.free_at + self.delay_s


@dataclass(slots=True)
class Access:
    """The access link of a site."""

    descriptor: int
    up: Way
    down: Way
    dark: bool = False
    networks: list[bytes] = field(default_factory=list)


class Internet:
    """All access links, and what is on its way."""

    def __init__(self, *, delay_ms: float, loss: float, rate: float, seed: int) -> None:
        self._defaults = (delay_ms / 1000, loss, rate, QUEUE_BYTES)
        self._rng = random.Random(seed)
        self._links: dict[str, Access] = {}
        self._by_descriptor: dict[int, Access] = {}
        self._by_network: dict[bytes, Access] = {}
        # Due time, a number that keeps the order, the link that it goes down (None: it comes up to be routed), bytes.
        self._on_the_way: list[tuple[float, int, Access | None, bytes]] = []
        self._count = 0

    def run(self, commands: int, answers: int) -> None:
        """Carry packets until the commands end."""
        text = b""
        while True:
            timeout_s = None
            if self._on_the_way:
                timeout_s = max(0.0, self._on_the_way[0][0] - time.monotonic())
            # Not epoll: its timeouts are whole milliseconds.
            ready, _, _ = select.select([commands, *self._by_descriptor], [], [], timeout_s)
            self._move(time.monotonic())
            for descriptor in ready:
                if descriptor != commands:
                    self._take(descriptor)
                    continue
                data = os.read(commands, 65536)
                if not data:
                    return
                *lines, text = (text + data).split(b"\n")
                for line in lines:
                    os.write(answers, self._obey(line) + b"\n")

    # --- packets ---

    def _take(self, descriptor: int) -> None:
        """Packets that a site sends."""
        link = self._by_descriptor.get(descriptor)
        if link is None:  # detached a moment ago
            return
        now = time.monotonic()
        for _ in range(BURST):
            try:
                packet = os.read(descriptor, 65536)
            except BlockingIOError:
                return
            except OSError:  # its namespace is gone
                self._forget(link)
                return
            if not link.dark:
                self._enter(link.up, None, packet, now)

    def _enter(self, way: Way, link: Access | None, packet: bytes, now: float) -> None:
        due = way.enter(len(packet), now, self._rng) if len(self._on_the_way) < MAX_PACKETS else None
        if due is not None:
            self._count += 1
            heapq.heappush(self._on_the_way, (due, self._count, link, packet))

    def _move(self, now: float) -> None:
        """Let every packet that is due go its next step."""
        while self._on_the_way and self._on_the_way[0][0] <= now:
            due, _, link, packet = heapq.heappop(self._on_the_way)
            if link is None:
                link = self._by_network.get(packet[16:18] if packet[0] >> 4 == 4 else packet[24:28])
                if link is not None and not link.dark:
                    self._enter(link.down, link, packet, due)
            elif not link.dark and link.descriptor in self._by_descriptor:
                try:
                    os.write(link.descriptor, packet)
                except OSError:  # the device is down or gone
                    link.down.dropped += 1

    # --- commands ---

    def _obey(self, line: bytes) -> bytes:
        try:
            answer = self._do(**json.loads(line))
        except (OSError, ValueError, KeyError, TypeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        return json.dumps(answer).encode()

    def _do(self, do: str, link: str, **values: Any) -> dict[str, Any]:
        if do == "attach":
            self._attach(link, **values)
            return {}
        access = self._links[link]
        match do:
            case "route":
                self._route(access, values["networks"])
            case "set":
                self._set(access, **values)
            case "count":
                ways = {"up": access.up, "down": access.down}
                return {
                    name: {"packets": way.packets, "bytes": way.num_bytes, "dropped": way.dropped}
                    for name, way in ways.items()
                }
            case "detach":
                self._forget(access)
                del self._links[link]
            case _:
                raise ValueError(f"cannot {do}")
        return {}

    def _attach(self, name: str, namespace: str, device: str, networks: list[str]) -> None:
        with inside(namespace):
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        access = Access(descriptor, Way(*self._defaults), Way(*self._defaults))
        self._links[name] = self._by_descriptor[descriptor] = access
        self._route(access, networks)

    def _route(self, access: Access, networks: list[str]) -> None:
        for known in access.networks:
            del self._by_network[known]
        access.networks = [_key(network) for network in networks]
        self._by_network |= dict.fromkeys(access.networks, access)

    def _set(self, access: Access, **values: Any) -> None:
        access.dark = bool(values.pop("dark", access.dark))
        for way in (access.up, access.down):
            way.delay_s = values.get("delay_ms", way.delay_s * 1000) / 1000
            way.loss = values.get("loss", way.loss)
            way.rate = values.get("rate", way.rate)

    def _forget(self, access: Access) -> None:
        if self._by_descriptor.pop(access.descriptor, None) is not None:
            self._route(access, [])
            os.close(access.descriptor)


def _key(network: str) -> bytes:
    """What an address begins with that belongs to a network."""
    parsed = ipaddress.ip_network(network)
    if parsed.prefixlen != (16 if parsed.version == 4 else 32):
        raise ValueError(f"{network} is neither an IPv4 /16 nor an IPv6 /32")
    return parsed.network_address.packed[: parsed.prefixlen // 8]


if __name__ == "__main__":
    gc.disable()  # packets make no cycles, and a collection holds them all up
    Internet(**json.loads(sys.argv[1])).run(sys.stdin.fileno(), sys.stdout.fileno())
