"""Port mapping: ask the router at home to let connections from outside in, and keep it so.

Three protocols are known to routers: PCP (RFC 6887), its forerunner NAT-PMP (RFC 6886), and UPnP's Internet Gateway
Device (IGD 1 and 2: found by SSDP, asked by SOAP over HTTP). Whether a router speaks each is found out side by side;
the mapping itself is asked for by one at a time, PCP first: most routers keep one table for all three, so a mapping
asked for twice would be undone twice, and the one in use with it.

To renew is to ask again for the same, which makes good as well what a router has lost by a restart, and tells a new
external address. So it is done every two minutes at least, and neither the epoch of PCP nor events of UPnP are
followed (deviation from RFC 6887, 11.2.1, which would be content with half the lifetime).

The protocols are `shoal.node.reach.pcp`, `nat_pmp` and `upnp`; what they share is `shoal.node.reach.gateway`.
IPv4 only: there is no NAT to open for IPv6, and a firewall's pinhole (RFC 6887, MAP) is not asked for.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import trio

from shoal.node.reach.gateway import (
    ANSWER_S,
    Ask,
    MappingWish,
    PortMapError,
    PortMapping,
    UpnpService,
    default_gateway,
    read_routes,
)
from shoal.node.reach.nat_pmp import ask_nat_pmp, external_ip_of_nat_pmp, prepare_nat_pmp
from shoal.node.reach.pcp import ask_pcp, prepare_pcp
from shoal.node.reach.upnp import ask_upnp, external_ip_of_upnp, prepare_upnp

log = logging.getLogger(__name__)

LIFETIME_S: Final = 3600
RENEW_MIN_S: Final = 10.0
RENEW_MAX_S: Final = 120.0
RETRY_MIN_S: Final = 30.0
"""A router may be just restarting; then twice that, and so on."""
RETRY_MAX_S: Final = 600.0
_METHODS: Final = ("pcp", "nat-pmp", "upnp")


@dataclass(frozen=True, slots=True)
class MapAttempt:
    """What came of asking by one method, in one line for people."""

    method: str
    outcome: str


async def map_port(
    protocol: str, internal_port: int, *, lifetime_s: float = LIFETIME_S, timeout_s: float = 3.0
) -> tuple[PortMapping | None, list[MapAttempt]]:
    """Ask the default gateway to forward a port, the same outside as inside if it is free there.

    Nothing that a router says or does not say makes this raise. When it is cancelled, or a router's answer is
    lost, what was asked for at that moment may stay mapped for the lifetime.

    Args:
        protocol: ``tcp`` or ``udp``.
        internal_port: where this node listens.
        lifetime_s: that is asked for; a router may grant another.
        timeout_s: for all methods together.

    Returns:
        The mapping, if any, and what came of each method.

    Raises:
        UsageError: there is no such protocol.
    """
    return await _map_port(_new(protocol, internal_port, math.ceil(lifetime_s)), timeout_s)


async def unmap_port(mapping: PortMapping, *, timeout_s: float = 1.0) -> None:
    """End a mapping.

    Raises:
        PortMapError: the router does not confirm it; it ends with its lifetime then.
    """
    with trio.move_on_after(timeout_s):
        await _ask_again(mapping, lifetime_s=0)
        return
    raise PortMapError(f"no answer from {mapping.gateway}")


async def keep_port_mapped(
    protocol: str, internal_port: int, tell: Callable[[PortMapping | None, list[MapAttempt]], None]
) -> None:
    """Have a port mapped from now on, renewed and found again as need be; until cancelled, which ends the mapping.

    Cancelled, it takes up to 1 s more to tell the router.

    Args:
        protocol: ``tcp`` or ``udp``.
        internal_port: where this node listens.
        tell: hears the first outcome and whatever differs later (but for the lifetime).

    Raises:
        UsageError: there is no such protocol.
    """
    wanted = _new(protocol, internal_port, LIFETIME_S)
    mapping: PortMapping | None = None
    attempts: list[MapAttempt] = []
    told: object = ()
    retry_s = RETRY_MIN_S
    try:
        while True:
            mapping = await _renewed(mapping)
            if mapping is None:
                mapping, attempts = await _map_port(wanted, timeout_s=3.0)
            news = (mapping and replace(mapping, lifetime_s=0), attempts)
            if news != told:
                told = news
                tell(mapping, attempts)
            if mapping is None:
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)
            else:
                wanted = replace(wanted, external_port=mapping.external_port)
                retry_s = RETRY_MIN_S
                await trio.sleep(min(max(mapping.lifetime_s / 2, RENEW_MIN_S), RENEW_MAX_S))
    finally:
        if mapping is not None:
            with trio.CancelScope(shield=True):
                try:
                    await unmap_port(mapping)
                except PortMapError as error:
                    log.info("the router keeps forwarding port %d for a while: %s", mapping.external_port, error)


def _new(protocol: str, port: int, lifetime_s: int) -> MappingWish:
    return MappingWish(protocol, port, port, lifetime_s, secrets.token_bytes(12))


async def _map_port(wanted: MappingWish, timeout_s: float) -> tuple[PortMapping | None, list[MapAttempt]]:
    routes = read_routes()
    gateway = default_gateway(routes) if routes is not None else None
    if routes is not None and gateway is None:
        return None, [MapAttempt(method, "there is no default gateway") for method in _METHODS]
    outcomes: dict[str, str] = {}
    mapped: PortMapping | None = None
    turn = trio.Lock()

    async def attempt(method: str, prepare: Callable[[], Awaitable[Ask]]) -> None:
        nonlocal mapped
        try:
            ask = await prepare()
            async with turn:
                mapped = await ask()
                outcomes[method] = f"forwards {mapped.external_ip}:{mapped.external_port}"
                nursery.cancel_scope.cancel()
        except PortMapError as error:
            outcomes[method] = str(error)

    with trio.move_on_after(timeout_s):
        async with trio.open_nursery() as nursery:
            if gateway is None:
                for method in ("pcp", "nat-pmp"):
                    outcomes[method] = "left out: the address of the router is only known on Linux"
            else:
                nursery.start_soon(attempt, "pcp", partial(prepare_pcp, gateway, wanted))
                nursery.start_soon(attempt, "nat-pmp", partial(prepare_nat_pmp, gateway, wanted))
            nursery.start_soon(attempt, "upnp", partial(prepare_upnp, gateway, wanted))
    other = "no answer in time" if mapped is None else "not needed"
    return mapped, [MapAttempt(method, outcomes.get(method, other)) for method in _METHODS]


async def _renewed(mapping: PortMapping | None) -> PortMapping | None:
    """The mapping, asked for again; None if there is none any more."""
    if mapping is not None:
        with trio.move_on_after(2 * ANSWER_S):
            try:
                return await _ask_again(mapping, lifetime_s=LIFETIME_S)
            except PortMapError as error:
                log.info("the router does not renew the mapping of port %d: %s", mapping.external_port, error)
    return None


async def _ask_again(mapping: PortMapping, lifetime_s: int) -> PortMapping:
    wanted = MappingWish(mapping.protocol, mapping.internal_port, mapping.external_port, lifetime_s, b"")
    match mapping.handle:
        case UpnpService() as service:
            external_ip = await external_ip_of_upnp(service) if lifetime_s else ""
            return await ask_upnp(mapping.gateway, service, wanted, external_ip)
        case bytes() as nonce:
            return await ask_pcp(mapping.gateway, replace(wanted, nonce=nonce))
        case None:
            external_ip = await external_ip_of_nat_pmp(mapping.gateway) if lifetime_s else ""
            return await ask_nat_pmp(mapping.gateway, wanted, external_ip)
