"""Plain sockets in the lab: what a host looks like from outside, and holes punched by hand, without any node.

A socket stays in the namespace in which it was made, so one process can hold sockets on every host.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from dataclasses import dataclass
from typing import Final

from .net import Site
from .netns import inside

Address = tuple[str, int]

WAIT_S: Final = 3.0
ROUNDS: Final = 4


def make_socket(namespace: str, kind: int, port: int = 0, *, ipv6: bool = False) -> socket.socket:
    """A socket bound in a namespace to a port that others may share."""
    with inside(namespace):
        made = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("::" if ipv6 else "0.0.0.0", port))
    made.settimeout(WAIT_S)
    return made


def udp(site: Site, port: int = 0, *, host: int = 0, ipv6: bool = False) -> socket.socket:
    """A UDP socket on a host."""
    return make_socket(site.hosts[host].namespace, socket.SOCK_DGRAM, port, ipv6=ipv6)


def tcp(site: Site, port: int = 0, *, host: int = 0, ipv6: bool = False) -> socket.socket:
    """A TCP socket on a host."""
    return make_socket(site.hosts[host].namespace, socket.SOCK_STREAM, port, ipv6=ipv6)


def listener(site: Site, port: int = 0, *, host: int = 0, ipv6: bool = False) -> socket.socket:
    """A TCP socket that takes connections."""
    made = tcp(site, port, host=host, ipv6=ipv6)
    made.listen()
    return made


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def seen_udp(inner: socket.socket, observer: socket.socket, observer_ip: str) -> Address:
    """The address and port from which a packet of a host arrives elsewhere."""
    inner.sendto(b"who am I?", (observer_ip, port_of(observer)))
    seen: Address = observer.recvfrom(2048)[1][:2]
    return seen


def wait_until_passed(sender: socket.socket, receiver: socket.socket, receiver_ip: str) -> None:
    """Returns when all that one public host has sent is on its last way, and what another sends comes after it."""
    sender.sendto(b"passed", (receiver_ip, port_of(receiver)))
    assert receiver.recv(64) == b"passed"


def is_silent(sock: socket.socket) -> bool:
    """Whether nothing has arrived."""
    return not select.select([sock], [], [], 0)[0]


def arrives(receiver: socket.socket, data: bytes, last: bytes) -> bool:
    """Whether a packet came before this last one, which surely comes."""
    while True:
        got = receiver.recv(2048)
        if got in (data, last):
            return got == data


@dataclass(slots=True)
class Puncher:
    """One end that knows, by way of an observer, how it looks from outside."""

    sock: socket.socket
    outside: Address
    kept: tuple[socket.socket, ...] = ()
    """What holds the mapping open, and takes connections at the same port."""

    def close(self) -> None:
        for sock in (self.sock, *self.kept):
            sock.close()


def udp_puncher(site: Site, observer: socket.socket, observer_ip: str, *, host: int = 0, ipv6: bool = False) -> Puncher:
    sock = udp(site, host=host, ipv6=ipv6)
    return Puncher(sock, seen_udp(sock, observer, observer_ip))


def punch_udp(one: Puncher, other: Puncher) -> bool:
    """Send to each other, as ICE does: to what was announced and to where packets really come from."""
    targets = {one.sock: {other.outside}, other.sock: {one.outside}}
    heard = set()
    for _ in range(ROUNDS):
        for sock, addresses in targets.items():
            for address in addresses:
                sock.sendto(b"punch", address)
        deadline = time.monotonic() + WAIT_S / ROUNDS
        while len(heard) < 2 and (left_s := deadline - time.monotonic()) > 0:
            for sock in select.select(list(targets), [], [], left_s)[0]:
                address = sock.recvfrom(2048)[1][:2]
                heard.add(sock)
                if address not in targets[sock]:
                    targets[sock].add(address)
                    sock.sendto(b"punch", address)
        if len(heard) == 2:
            return True
    return False


def tcp_puncher(site: Site, observer: socket.socket, observer_ip: str, *, host: int = 0, ipv6: bool = False) -> Puncher:
    """Dials the observer from the port from which it will punch and at which it takes connections, as a node does."""
    first = tcp(site, host=host, ipv6=ipv6)
    first.connect((observer_ip, port_of(observer)))
    accepted, outside = observer.accept()
    open_door = listener(site, port_of(first), host=host, ipv6=ipv6)
    return Puncher(tcp(site, port_of(first), host=host, ipv6=ipv6), outside[:2], (first, accepted, open_door))


def punch_tcp(one: Puncher, other: Puncher) -> bool:
    """Each dials the other's outer port from its own at the same time: simultaneous open, or one gets through."""
    ends = (one, other)
    for end, far in (ends, ends[::-1]):
        end.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            end.sock.connect(far.outside)
    dialling = {end.sock for end in ends}
    deadline = time.monotonic() + WAIT_S
    while dialling and (left_s := deadline - time.monotonic()) > 0:
        for sock in select.select([], list(dialling), [], left_s)[1]:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True
            dialling.discard(sock)
    return False


def dials(sock: socket.socket, address: Address, timeout_s: float = WAIT_S) -> bool:
    """Whether a connection stands in time."""
    sock.settimeout(timeout_s)
    try:
        sock.connect(address)
    except OSError:
        return False
    return True
