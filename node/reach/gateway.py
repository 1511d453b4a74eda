"""What asking the router at home takes, by whichever protocol: what is asked and granted, where it is, datagrams to it.

Only the default gateway is believed: a socket is connected to it, so that the kernel passes on nothing from elsewhere.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import trio

from shoal.protocol.errors import Fault, ShoalError, UsageError

Answer = TypeVar("Answer")

ANSWER_S: Final = 1.0
"""How long a router, one hop away, may take to answer."""
FIRST_RETRY_S: Final = 0.25
MAX_DATAGRAM_BYTES: Final = 1100  # RFC 6887, 7
UNSUPPORTED_VERSION: Final = 1
"""The result by which PCP and NAT-PMP refuse each other's version."""
PROTOCOLS: Final = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_ROUTES: Final = Path("/proc/net/route")
_UP_BY_GATEWAY: Final = 0x0003
_PORT: Final = 5351  # of PCP and NAT-PMP


class PortMapError(ShoalError):
    """A router does not answer, or does not do what it is asked."""

    fault = Fault.REMOTE


@dataclass(frozen=True, slots=True)
class UpnpService:
    """Where a router's UPnP maps ports: the kind of service, and the URL that is asked."""

    kind: str
    url: str


@dataclass(frozen=True, slots=True)
class PortMapping:
    """What a router forwards to this node.

    Attributes:
        method: ``pcp``, ``nat-pmp`` or ``upnp``.
        protocol: ``tcp`` or ``udp``.
        internal_port: this node's.
        external_ip: the router's own address outside, as it says; private if it is itself behind a NAT.
        external_port: at that address.
        lifetime_s: as granted; the router may forget it then.
        gateway: the router's IP on this side.
        handle: what it takes to renew or end it: the nonce of PCP, the service of UPnP.
    """

    method: str
    protocol: str
    internal_port: int
    external_ip: str
    external_port: int
    lifetime_s: float
    gateway: str
    handle: bytes | UpnpService | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class MappingWish:
    """A mapping as it is asked for.

    Attributes:
        protocol: ``tcp`` or ``udp``.
        internal_port: this node's.
        external_port: the one that would be best.
        lifetime_s: 0 ends the mapping.
        nonce: 12 random bytes, by which PCP knows its owner again.
    """

    protocol: str
    internal_port: int
    external_port: int
    lifetime_s: int
    nonce: bytes

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"no protocol {self.protocol!r} to map ports of; choose tcp or udp")


Ask = Callable[[], Awaitable[PortMapping]]
"""Asks for the mapping, once it is known that the router speaks the protocol."""


def granted(method: str, gateway: str, wanted: MappingWish, ip: str, port: int, lifetime_s: float) -> PortMapping:
    """What a router grants.

    Raises:
        PortMapError: if it makes no sense.
    """
    if wanted.lifetime_s > 0 and (port == 0 or lifetime_s <= 0 or ipaddress.ip_address(ip).is_unspecified):
        raise PortMapError(f"{gateway} has no external address, or forwards no port of it")
    return PortMapping(method, wanted.protocol, wanted.internal_port, ip, port, lifetime_s, gateway)


def check_result(result: int, names: tuple[str, ...]) -> None:
    """Of PCP and NAT-PMP.

    Raises:
        PortMapError: if it is not success.
    """
    if result != 0:
        raise PortMapError(f"refused: {names[result] if result < len(names) else 'unknown reason'} ({result})")


def read_routes() -> str | None:
    """This machine's IPv4 routes; None where they cannot be read."""
    try:
        return _ROUTES.read_text(encoding="ascii")
    except OSError:
        return None


def default_gateway(routes: str) -> str | None:
    """The IPv4 address of the default gateway of least metric, in a table as in Linux's ``/proc/net/route``."""
    found: list[tuple[int, str]] = []
    for line in routes.splitlines()[1:]:
        match line.split():
            case [_, "00000000", gateway, flags, _, _, metric, "00000000", *_]:
                if int(flags, 16) & _UP_BY_GATEWAY == _UP_BY_GATEWAY:
                    packed = int(gateway, 16).to_bytes(4, sys.byteorder)
                    found.append((int(metric), str(ipaddress.IPv4Address(packed))))
    return min(found)[1] if found else None


def own_ip_towards(gateway: str) -> str:
    """This machine's address as a router next to it sees it.

    Raises:
        PortMapError: if there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((gateway, _PORT))
        except OSError as error:
            raise PortMapError(f"cannot reach {gateway}: {error.strerror}") from error
        ip: str = sock.getsockname()[0]
        return ip


async def ask_router(gateway: str, request: bytes, decode: Callable[[bytes], Answer | None]) -> Answer:
    """Ask a router by a datagram, and take the first that comes back and can be read.

    Raises:
        PortMapError: if none comes.
    """
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            await sock.connect((gateway, _PORT))  # from now on the kernel passes on nothing from anybody else
            answer = await repeat_until_answered(
                sock, lambda: sock.send(request), lambda data, _: decode(data), ANSWER_S
            )
        except ConnectionRefusedError:
            raise PortMapError(f"nothing listens at {gateway}") from None
        except OSError as error:
            raise PortMapError(f"cannot reach {gateway}: {error.strerror}") from error
    if answer is None:
        raise PortMapError(f"no answer from {gateway}")
    return answer


async def repeat_until_answered(
    sock: trio.socket.SocketType,
    send: Callable[[], Awaitable[int]],
    decode: Callable[[bytes, str], Answer | None],
    timeout_s: float,
) -> Answer | None:
    """Send, again and again, until a datagram comes that can be read (its sender's IP helps to); None if none comes."""
    answer: Answer | None = None
    retry_s = FIRST_RETRY_S
    with trio.move_on_after(timeout_s):
        while answer is None:
            await send()
            with trio.move_on_after(retry_s):
                while answer is None:
                    data, (sender, *_) = await sock.recvfrom(MAX_DATAGRAM_BYTES + 1)
                    answer = decode(data, sender)
            retry_s *= 2
    return answer
