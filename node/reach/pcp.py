"""The Port Control Protocol, by which a router is asked to forward a port (RFC 6887): MAP requests alone."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from shoal.node.reach.gateway import (
    MAX_DATAGRAM_BYTES,
    PROTOCOLS,
    UNSUPPORTED_VERSION,
    Ask,
    MappingWish,
    PortMapping,
    ask_router,
    check_result,
    granted,
    own_ip_towards,
)

_HEADER: Final = struct.Struct("!BBHI16s")
_ANSWER_HEADER: Final = struct.Struct("!BBBBII12x")
_MAP: Final = struct.Struct("!12sB3xHH16s")
_ANY_V4: Final = ipaddress.IPv6Address("::ffff:0.0.0.0").packed
_RESULTS: Final = (
    *("success", "unsupported version", "not authorised", "malformed request", "unsupported opcode"),
    *("unsupported option", "malformed option", "network failure", "no resources", "unsupported protocol"),
    *("quota exceeded", "cannot provide that external port", "another NAT is in between", "too many remote peers"),
)


@dataclass(frozen=True, slots=True)
class PcpAnswer:
    """An answer to a MAP request; all but ``result`` is meaningless unless that is 0."""

    result: int
    lifetime_s: int = 0
    external_ip: str = "0.0.0.0"  # noqa: S104  no address
    external_port: int = 0


def encode_pcp(wanted: MappingWish, own_ip: str) -> bytes:
    """A MAP request (RFC 6887, 7.1 and 11.1)."""
    client = ipaddress.IPv6Address(f"::ffff:{own_ip}").packed
    suggested = wanted.external_port if wanted.lifetime_s > 0 else 0
    number = PROTOCOLS[wanted.protocol]
    return _HEADER.pack(2, 1, 0, wanted.lifetime_s, client) + _MAP.pack(
        wanted.nonce, number, wanted.internal_port, suggested, _ANY_V4
    )


def decode_pcp(wanted: MappingWish, data: bytes) -> PcpAnswer | None:
    """The answer to that request (RFC 6887, 7.2 and 11.1); None if it is none."""
    if not 4 <= len(data) <= MAX_DATAGRAM_BYTES:
        return None
    if data[0] != 2:  # how those answer that do not know this version, NAT-PMP's among them (RFC 6887, 9)
        return PcpAnswer(UNSUPPORTED_VERSION) if data[1] & 0x80 and data[3] == UNSUPPORTED_VERSION else None
    if len(data) < _ANSWER_HEADER.size + _MAP.size:
        return None
    _, opcode, _, result, lifetime_s, _ = _ANSWER_HEADER.unpack_from(data)
    nonce, protocol, internal_port, port, address = _MAP.unpack_from(data, _ANSWER_HEADER.size)
    asked = (0x81, wanted.nonce, PROTOCOLS[wanted.protocol], wanted.internal_port)
    if (opcode, nonce, protocol, internal_port) != asked:
        return None
    if result != 0:
        return PcpAnswer(result)
    ip = ipaddress.IPv6Address(address).ipv4_mapped
    return None if ip is None else PcpAnswer(0, lifetime_s, str(ip), port)


async def prepare_pcp(gateway: str, wanted: MappingWish) -> Ask:
    """Nothing has to be known before."""
    return partial(ask_pcp, gateway, wanted)


async def ask_pcp(gateway: str, wanted: MappingWish) -> PortMapping:
    """Ask for a mapping, ask again, or end it.

    Raises:
        PortMapError: if the router does not answer, or refuses.
    """
    answer = await ask_router(gateway, encode_pcp(wanted, own_ip_towards(gateway)), partial(decode_pcp, wanted))
    check_result(answer.result, _RESULTS)
    mapping = granted("pcp", gateway, wanted, answer.external_ip, answer.external_port, answer.lifetime_s)
    return replace(mapping, handle=wanted.nonce)
