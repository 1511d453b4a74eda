"""NAT-PMP, the forerunner of PCP, by which a router is asked to forward a port (RFC 6886)."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from functools import partial
from typing import Final

from shoal.node.reach.gateway import (
    MAX_DATAGRAM_BYTES,
    UNSUPPORTED_VERSION,
    Ask,
    MappingWish,
    PortMapping,
    ask_router,
    check_result,
    granted,
)

_ADDRESS: Final = struct.Struct("!BBHI4s")
_REQUEST: Final = struct.Struct("!BBHHHI")
_MAP: Final = struct.Struct("!BBHIHHI")
_OPCODES: Final = {"udp": 1, "tcp": 2}
_RESULTS: Final = (
    *("success", "unsupported version", "not authorised", "network failure", "no resources", "unsupported opcode"),
)


@dataclass(frozen=True, slots=True)
class NatPmpAnswer:
    """An answer; all but ``result`` is meaningless unless that is 0, and some to either kind of request."""

    result: int
    external_ip: str = ""
    external_port: int = 0
    lifetime_s: int = 0


def encode_nat_pmp(wanted: MappingWish | None) -> bytes:
    """A request for a mapping (RFC 6886, 3.3), or with None for the external address (3.2)."""
    if wanted is None:
        return bytes(2)
    suggested = wanted.external_port if wanted.lifetime_s > 0 else 0
    opcode = _OPCODES[wanted.protocol]
    return _REQUEST.pack(0, opcode, 0, wanted.internal_port, suggested, wanted.lifetime_s)


def decode_nat_pmp(wanted: MappingWish | None, data: bytes) -> NatPmpAnswer | None:
    """The answer to that request; None if it is none."""
    if not 4 <= len(data) <= MAX_DATAGRAM_BYTES:
        return None
    if data[0] != 0:  # a PCP server that speaks no NAT-PMP
        return NatPmpAnswer(UNSUPPORTED_VERSION) if data[1] & 0x80 and data[3] == UNSUPPORTED_VERSION else None
    opcode = 0 if wanted is None else _OPCODES[wanted.protocol]
    result = int.from_bytes(data[2:4])
    if data[1] != 0x80 | opcode:
        return None
    if result != 0:
        return NatPmpAnswer(result)
    if wanted is None:
        if len(data) != _ADDRESS.size:
            return None
        return NatPmpAnswer(0, external_ip=str(ipaddress.IPv4Address(data[8:])))
    if len(data) != _MAP.size:
        return None
    *_, internal_port, port, lifetime_s = _MAP.unpack(data)
    return NatPmpAnswer(0, "", port, lifetime_s) if internal_port == wanted.internal_port else None


async def external_ip_of_nat_pmp(gateway: str) -> str:
    """The router's own address outside.

    Raises:
        PortMapError: if the router does not answer, or refuses.
    """
    answer = await ask_router(gateway, encode_nat_pmp(None), partial(decode_nat_pmp, None))
    check_result(answer.result, _RESULTS)
    return answer.external_ip


async def prepare_nat_pmp(gateway: str, wanted: MappingWish) -> Ask:
    """Find out whether the router speaks it.

    Raises:
        PortMapError: if not.
    """
    return partial(ask_nat_pmp, gateway, wanted, await external_ip_of_nat_pmp(gateway))


async def ask_nat_pmp(gateway: str, wanted: MappingWish, external_ip: str) -> PortMapping:
    """Ask for a mapping, ask again, or end it.

    Raises:
        PortMapError: if the router does not answer, or refuses.
    """
    answer = await ask_router(gateway, encode_nat_pmp(wanted), partial(decode_nat_pmp, wanted))
    check_result(answer.result, _RESULTS)
    return granted("nat-pmp", gateway, wanted, external_ip, answer.external_port, answer.lifetime_s)
