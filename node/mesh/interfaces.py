"""The addresses of this machine's interfaces."""

from __future__ import annotations

import ipaddress

import ifaddr


def interface_ips() -> list[str]:
    """The addresses of this machine's interfaces, in their order, but for link-local ones."""
    known = [each.ip if isinstance(each.ip, str) else each.ip[0] for a in ifaddr.get_adapters() for each in a.ips]
    return [ip for ip in known if not ipaddress.ip_address(ip).is_link_local]


def local_ips() -> frozenset[str]:
    """The same, to compare."""
    return frozenset(interface_ips())


def reachable_addresses(address: str) -> list[str]:
    """A listening multiaddr that stands for every interface, as those of the interfaces; loopback last."""
    _, family, ip, rest = address.split("/", 3)
    if ip not in ("0.0.0.0", "::"):  # noqa: S104  compared with, not bound to
        return [address]
    found = []
    for adapter in ifaddr.get_adapters():
        for known in adapter.ips:
            if family == "ip4" and isinstance(known.ip, str):
                found.append(ipaddress.ip_address(known.ip))
            elif family == "ip6" and not isinstance(known.ip, str) and not known.ip[2]:  # no link-local scope
                found.append(ipaddress.ip_address(known.ip[0]))
    found.sort(key=lambda known: (known.is_loopback, known.is_private))
    return [f"/{family}/{known}/{rest}" for known in found if not known.is_link_local]
