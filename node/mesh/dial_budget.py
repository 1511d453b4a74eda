"""How often one place may be dialed at the word of others. Pure.

A node dials where peers say that members, relays and providers are, and names cost nothing: whoever makes up many of
them, all at the address of a bystander, would have every honest node knock there together. So tries are counted by
where they go, whoever named it: token buckets for each IP with its port, and for each IP (each /64 of IPv6, which is
one household). Whoever turns out to be there, by a handshake that proves the name that was wanted, gives back what the
try cost. What a person asks for is not counted.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

PLACE_BURST: Final = 6.0
PLACE_PER_S: Final = 0.1
"""For one IP and port."""
HOST_BURST: Final = 48.0
HOST_PER_S: Final = 0.5
"""For one IP."""
MAX_COUNTED: Final = 4096
"""Places, and as many IPs; of more, the longest unused are forgotten: those have most of their tokens again."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class DialBudget:
    """The buckets of one node."""

    def __init__(self) -> None:
        self._places: OrderedDict[str, _Bucket] = OrderedDict()
        self._hosts: OrderedDict[str, _Bucket] = OrderedDict()
        self.num_refused = 0
        """Tries that were not made."""

    def take(self, address: str, now: float) -> bool:
        """Whether to dial this multiaddr now; if so, it is paid for."""
        place, host = _place(address)
        of_place = _refilled(self._places, place, now, PLACE_BURST, PLACE_PER_S)
        counted = [of_place, _refilled(self._hosts, host, now, HOST_BURST, HOST_PER_S)] if host else [of_place]
        if min(bucket.tokens for bucket in counted) < 1:
            self.num_refused += 1
            return False
        for bucket in counted:
            bucket.tokens -= 1
        return True

    def give_back(self, address: str) -> None:
        """Who was wanted is there."""
        place, host = _place(address)
        for buckets, name, burst in ((self._places, place, PLACE_BURST), (self._hosts, host, HOST_BURST)):
            bucket = buckets.get(name)
            if bucket is not None:
                bucket.tokens = min(burst, bucket.tokens + 1)


def _refilled(buckets: OrderedDict[str, _Bucket], name: str, now: float, burst: float, per_s: float) -> _Bucket:
    bucket = buckets.get(name)
    if bucket is None:
        bucket = buckets[name] = _Bucket(burst, now)
        while len(buckets) > MAX_COUNTED:
            buckets.popitem(last=False)
    else:
        buckets.move_to_end(name)
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * per_s)
        bucket.at = now
    return bucket


def _place(address: str) -> tuple[str, str]:
    """The first hop of a multiaddr, ``/ip4/192.0.2.1/tcp/4001``, and what that stands on; nothing, on this machine."""
    parts = address.split("/")
    place = "/".join(parts[:5])
    host = parts[2] if len(parts) > 2 else ""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return place, host.lower()
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ip.ipv4_mapped
        if mapped is not None:
            return place, str(mapped)
        return place, "" if ip.is_loopback else str(ipaddress.ip_network((ip, 64), strict=False))
    return place, "" if ip.is_loopback else str(ip)
