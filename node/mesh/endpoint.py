"""An IP address with a port, checked, in one spelling. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from shoal.protocol.errors import UsageError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_IP_CHARS: Final = 45


class Family(IntEnum):
    """IP's versions."""

    IPV4 = 4
    IPV6 = 6


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """An address and a port."""

    ip: str
    port: int

    @classmethod
    def parse(cls, ip: str, port: int) -> Self:
        """Check and take an endpoint, in the one spelling of its address (IPv4 inside IPv6 becomes IPv4).

        Raises:
            UsageError: if this is not a unicast address with a port.
        """
        address = parse_ip(ip)
        if address is None or address.is_unspecified or address.is_multicast or not 0 < port < 65536:
            raise UsageError(f"{ip[:_MAX_IP_CHARS]!r}, port {port}, is not an endpoint such as 192.0.2.1, port 4001")
        return cls(str(address), port)

    @property
    def family(self) -> Family:
        """Which IP."""
        return Family.IPV6 if ":" in self.ip else Family.IPV4

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.family is Family.IPV6 else f"{self.ip}:{self.port}"


def parse_ip(text: str) -> IpAddress | None:
    """An IP address, IPv4 inside IPv6 as IPv4; None if it is none."""
    if len(text) > _MAX_IP_CHARS or "%" in text:  # a zone is free text, and names an interface of somebody else's
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
