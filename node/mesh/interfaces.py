"""The addresses of this machine's interfaces.

They are asked for often, by whatever tells others where this node is, and asking takes most of a millisecond and a
descriptor. So an answer is good for a moment, and a machine that has no descriptor to spare has the addresses that it
had.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from dataclasses import dataclass
from typing import Final

import ifaddr

log = logging.getLogger(__name__)

FRESH_S: Final = 1.5
"""For which an answer is good."""


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One of them.

    Attributes:
        prefix_bits: of the network that is on the link.
        has_scope: whether an IPv6 address makes sense only together with the interface.
    """

    ip: str
    prefix_bits: int
    has_scope: bool = False


_last_known: tuple[InterfaceAddress, ...] = ()
_known_since = -math.inf


def interface_addresses() -> tuple[InterfaceAddress, ...]:
    """All addresses of this machine's interfaces, in their order; those of the last time if it cannot tell now."""
    global _last_known, _known_since  # what the machine has, not what anybody here decided
    now = time.monotonic()
    if now < _known_since + FRESH_S:
        return _last_known
    try:
        adapters = list(ifaddr.get_adapters())
    except OSError as error:
        log.warning("the addresses of this machine cannot be read now: %s", error)
        return _last_known
    _last_known = tuple(
        InterfaceAddress(each.ip, each.network_prefix)
        if isinstance(each.ip, str)
        else InterfaceAddress(each.ip[0], each.network_prefix, has_scope=bool(each.ip[2]))
        for adapter in adapters
        for each in adapter.ips
    )
    _known_since = now
    return _last_known


def interface_ips() -> list[str]:
    """The addresses of this machine's interfaces, in their order, but for link-local ones."""
    return [each.ip for each in interface_addresses() if not ipaddress.ip_address(each.ip).is_link_local]


def local_ips() -> frozenset[str]:
    """The same, to compare."""
    return frozenset(interface_ips())


def on_link() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks that this machine's interfaces are in, but for loopback and link-local ones."""
    return [
        ipaddress.ip_network(f"{each.ip}/{each.prefix_bits}", strict=False)
        for each in interface_addresses()
        if not (address := ipaddress.ip_address(each.ip)).is_loopback and not address.is_link_local
    ]


def reachable_addresses(address: str) -> list[str]:
    """A listening multiaddr that stands for every interface, as those of the interfaces; loopback last."""
    _, family, ip, rest = address.split("/", 3)
    if ip not in ("0.0.0.0", "::"):  # noqa: S104  compared with, not bound to
        return [address]
    known = [ipaddress.ip_address(each.ip) for each in interface_addresses() if not each.has_scope]
    found = [each for each in known if f"ip{each.version}" == family and not each.is_link_local]
    found.sort(key=lambda each: (each.is_loopback, each.is_private))
    return [f"/{family}/{each}/{rest}" for each in found]
