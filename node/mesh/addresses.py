"""What can be told of a multiaddr without asking anybody. Pure."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Final

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from shoal.node.mesh.endpoint import Endpoint
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

CIRCUIT: Final = "/p2p-circuit"
_OURS: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "127.0.0.0/8",
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "100.64.0.0/10",
            "0.0.0.0/8",
            "::1",
            "fc00::/7",
        ),
    )
)
"""Where an address means something else to everybody: this machine, private networks, those of providers."""


def ip_port(address: str) -> tuple[str, int] | None:
    """IP and TCP port that a multiaddr begins with, ready to dial; None if it begins otherwise or makes no sense."""
    match address.split("/")[:5]:
        case ["", "ip4" | "ip6" as family, ip, "tcp", port] if _is_ip(family, ip) and _is_port(port):
            return ip, int(port)
    return None


def full_address(address: str, peer: PeerId) -> str:
    """A multiaddr that ends in the name of the peer that it leads to."""
    return address.removesuffix(f"/p2p/{peer}") + f"/p2p/{peer}"


def ip_of(address: str) -> str:
    """The IP that a multiaddr begins with; empty if it begins otherwise."""
    found = ip_port(address)
    return found[0] if found else ""


def tcp_address(ip: str, port: int) -> str:
    """The multiaddr of a TCP endpoint."""
    return f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}"


def endpoint(ip: str, port: int) -> Endpoint | None:
    """A checked endpoint; None if it is none."""
    try:
        return Endpoint.parse(ip, port)
    except UsageError:
        return None


def is_global(ip: str) -> bool:
    """Whether an IP is one of the internet's."""
    try:
        return ipaddress.ip_address(ip).is_global
    except ValueError:
        return False


def is_loopback(ip: str) -> bool:
    """Whether an IP is this machine's alone."""
    try:
        return ipaddress.ip_address(ip).is_loopback
    except ValueError:
        return False


def may_be_heard_of(
    ip: str,
    seen_from: Iterable[str],
    on_link: Callable[[], Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]],
) -> bool:
    """Whether an IP that others named is worth dialing, and no way to have this node look around where it is.

    Of this machine and of private networks are only those where somebody is connected from, or that are on the link.

    Args:
        ip: which.
        seen_from: where the peer, or others that this node chose itself, are connected from.
        on_link: gives the networks of this machine's interfaces; asked only if it matters.
    """
    try:
        address = ipaddress.ip_address(ip)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    except ValueError:
        return False
    if address.is_unspecified or address.is_multicast or address.is_link_local or ip == "255.255.255.255":
        return False
    block = next((each for each in _OURS if each.version == address.version and address in each), None)
    if block is None:
        return True
    if any(each in block for each in map(_parsed, seen_from) if each is not None and each.version == block.version):
        return True
    return not address.is_loopback and any(
        address in network for network in on_link() if network.version == address.version
    )


def _parsed(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(ip)
    except ValueError:
        return None


def network_of(ip: str) -> str:
    """What an IP stands and falls with: its /16, or /32 of IPv6."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return ip
    return str(ipaddress.ip_network((address, 16 if address.version == 4 else 32), strict=False))


def dialable(addresses: Iterable[str]) -> list[str]:
    """The best address of each IP family that is no circuit: one of the internet's if there is one."""
    found: dict[str, str] = {}
    for address in sorted(addresses, key=lambda address: not is_global(ip_of(address))):
        family = address.split("/", 2)[1] if ip_of(address) else ""
        if family and CIRCUIT not in address:
            found.setdefault(family, address)
    return list(found.values())


def usefulness(address: str) -> int:
    """How likely somebody anywhere can dial a multiaddr, for sorting: the lowest is the best.

    By the internet, by a relay on it, on the same network, by a relay there, on the same machine alone.
    """
    ip = ip_of(address)
    if is_loopback(ip):
        return 4
    is_local = bool(ip) and not is_global(ip)
    return 2 * is_local + (CIRCUIT in address)


def check_listen(text: str) -> None:
    """Whether a node could listen on a multiaddr.

    Raises:
        UsageError: if not.
    """
    names = protocols_of(text)
    if len(names) != 2 or names[0] not in ("ip4", "ip6") or names[1] != "tcp":
        raise UsageError(f"cannot listen on {text[:120]!r}; write /ip4/ADDRESS/tcp/PORT or /ip6/ADDRESS/tcp/PORT")


def protocols_of(text: str) -> list[str]:
    """The names of the protocols that a multiaddr is made of.

    Raises:
        UsageError: if it is none.
    """
    try:
        names = [protocol.name for protocol in Multiaddr(text).protocols()]
    except (MultiaddrError, ValueError) as error:
        reason = str(error).split(": ", 1)[-1].removesuffix(f" (string: {text})")
        raise UsageError(f"{text[:120]!r} is not a multiaddr ({reason[:120]})") from error
    if not names:
        raise UsageError("an empty multiaddr; one looks like /ip4/192.0.2.1/tcp/4001")
    return names


def _is_ip(family: str, text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if family == "ip6" else socket.AF_INET, text)
    except (OSError, ValueError):
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536
