"""What theory allows between two kinds of site: the paths that are good enough, the best first, and why.

Three facts decide. Who can be dialled by anyone: a public host, and a router that maps a port when asked to. Whose port
a stranger can know beforehand: every NAT here keeps it but the symmetric one, which takes another for each destination.
And whom a router lets in: a full cone anyone, an address-restricted one every port of a host that was sent to, the
others only the very port that was sent to. So a hole is punched unless one end's port is unknown while the other end
has to know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .rules import KINDS, PAIRED

LADDER: Final = ("direct", "punched", "webrtc", "relayed")
"""All paths, the best first."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a pair should come to.

    Attributes:
        paths: those that are good enough, the best first.
        why: in one line.
    """

    paths: tuple[str, ...]
    why: str

    def is_met_by(self, path: str) -> bool:
        """Whether a path is one of these, or better than all of them."""
        return path in LADDER and LADDER.index(path) <= max(map(LADDER.index, self.paths))


_DIRECT: Final = ("direct",)
_PUNCHED: Final = ("punched", "webrtc")
_PUNCHED_BY_TCP: Final = ("punched",)
_RELAYED: Final = ("relayed",)


def pairs() -> list[tuple[str, str]]:
    """Every pair of kinds once, each also with itself, and then the kinds that are a pair of their own."""
    crossed = [(one, other) for number, one in enumerate(KINDS) for other in KINDS[number:]]
    return crossed + [(kind, kind) for kind in PAIRED]


def expected(one: str, other: str) -> Expectation:
    """What two kinds of site should come to."""
    both = {one, other}
    if "same_lan" in both:
        return Expectation(_DIRECT, "they are on one LAN, and each knows the other's address there")
    if "hairpin" in both:
        return Expectation(("direct", *_PUNCHED), "the router sends what goes to its own public address back inside")
    if "tcp443_only" in both:
        return Expectation(_RELAYED, "one end reaches nothing but TCP port 443, where only a relay listens")
    if "ipv6_only" in both:
        return _with_ipv6_only(both)
    if "open" in both:
        return Expectation(_DIRECT, "anyone can dial the open end")
    if "upnp" in both:
        return Expectation(_DIRECT, "anyone can dial the port that the router maps when asked to")
    by_tcp_only = "udp_blocked" in both
    if "full_cone" in both:
        paths = ("direct", *(_PUNCHED_BY_TCP if by_tcp_only else _PUNCHED))
        return Expectation(paths, "anyone can dial the full cone's port once something was sent from it")
    if "symmetric" in both:
        if "address_restricted" in both:
            return Expectation(_PUNCHED, "the other end lets in the address, whichever port the symmetric one takes")
        return Expectation(
            _RELAYED, "nobody knows the port that a symmetric end takes, and the other has to send to it"
        )
    if by_tcp_only:
        return Expectation(_PUNCHED_BY_TCP, "both keep their port, but one end has no UDP: TCP simultaneous open")
    return Expectation(_PUNCHED, "both keep their port, so each sends to the other's")


def _with_ipv6_only(both: set[str]) -> Expectation:
    if both == {"ipv6_only"}:
        return Expectation(_PUNCHED, "both addresses are global, and each firewall lets in what it has sent to")
    if "open" in both:
        return Expectation(_DIRECT, "anyone can dial the open end over IPv6")
    return Expectation(_RELAYED, "one has only IPv6, the other only IPv4; a relay has both")
