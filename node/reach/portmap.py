"""Port mapping: ask the router at home to let connections from outside in, and keep it so.

Three protocols are known to routers: PCP (RFC 6887), its forerunner NAT-PMP (RFC 6886), and UPnP's Internet Gateway
Device (IGD 1 and 2: found by SSDP, asked by SOAP over HTTP). Whether a router speaks each is found out side by side;
the mapping itself is asked for by one at a time, PCP first: most routers keep one table for all three, so a mapping
asked for twice would be undone twice, and the one in use with it.

To renew is to ask again for the same, which makes good as well what a router has lost by a restart, and tells a new
external address. So it is done every two minutes at least, and neither the epoch of PCP nor events of UPnP are
followed (deviation from RFC 6887, 11.2.1, which would be content with half the lifetime).

Only the default gateway is believed: datagrams from elsewhere are not read, the nonce of PCP must be right, and a URL
of UPnP that leads to another host is not followed. Answers are cut off at a fixed size.
IPv4 only: there is no NAT to open for IPv6, and a firewall's pinhole (RFC 6887, MAP) is not asked for.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import re
import secrets
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urljoin, urlsplit

import h11
import trio

from shoal.protocol.errors import ShoalError, UsageError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

LIFETIME_S: Final = 3600
RENEW_MIN_S: Final = 10.0
RENEW_MAX_S: Final = 120.0
RETRY_MIN_S: Final = 30.0
"""A router may be just restarting; then twice that, and so on."""
RETRY_MAX_S: Final = 600.0
ANSWER_S: Final = 1.0
"""How long a router, one hop away, may take to answer."""
FIND_S: Final = 2.0
"""A device of UPnP may wait for a second before it answers a search (MX)."""
FIRST_RETRY_S: Final = 0.25
MAX_HTTP_BYTES: Final = 128 * 1024
_MAX_HEADER_BYTES: Final = 16 * 1024
_READ_BYTES: Final = 4096
MAX_SERVICES: Final = 4
NUM_PORTS_TRIED: Final = 4

_METHODS: Final = ("pcp", "nat-pmp", "upnp")
_PROTOCOLS: Final = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_ROUTES: Final = Path("/proc/net/route")
_UP_BY_GATEWAY: Final = 0x0003
_MAX_DATAGRAM_BYTES: Final = 1100  # RFC 6887, 7
_PORT: Final = 5351  # of PCP and NAT-PMP
_SSDP: Final = ("239.255.255.250", 1900)
_SEARCH: Final = (
    b'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\n'
    b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"  # one of version 2 answers to that too
)
_SERVICES: Final = tuple(
    f"urn:schemas-upnp-org:service:{name}" for name in ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
)
_CONFLICT: Final = 718
_ONLY_PERMANENT: Final = 725

_chance = random.Random()  # noqa: S311  a free port, not a secret


class PortMapError(ShoalError):
    """A router does not answer, or does not do what it is asked."""


class _UpnpError(PortMapError):
    """A router's own error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"refused: {text} ({code})")
        self.code = code


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
class MapAttempt:
    """What came of asking by one method, in one line for people."""

    method: str
    outcome: str


# --- for the node ---


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


# --- the methods ---


@dataclass(frozen=True, slots=True)
class Wanted:
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
        if self.protocol not in _PROTOCOLS:
            raise UsageError(f"no protocol {self.protocol!r} to map ports of; choose tcp or udp")


def _new(protocol: str, port: int, lifetime_s: int) -> Wanted:
    return Wanted(protocol, port, port, lifetime_s, secrets.token_bytes(12))


_Ask = Callable[[], Awaitable[PortMapping]]


async def _map_port(wanted: Wanted, timeout_s: float) -> tuple[PortMapping | None, list[MapAttempt]]:
    routes = _routes()
    gateway = default_gateway(routes) if routes is not None else None
    if routes is not None and gateway is None:
        return None, [MapAttempt(method, "there is no default gateway") for method in _METHODS]
    outcomes: dict[str, str] = {}
    mapped: PortMapping | None = None
    turn = trio.Lock()

    async def attempt(method: str, prepare: Callable[[], Awaitable[_Ask]]) -> None:
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
                nursery.start_soon(attempt, "pcp", partial(_prepare_pcp, gateway, wanted))
                nursery.start_soon(attempt, "nat-pmp", partial(_prepare_nat_pmp, gateway, wanted))
            nursery.start_soon(attempt, "upnp", partial(_prepare_upnp, gateway, wanted))
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
    wanted = Wanted(mapping.protocol, mapping.internal_port, mapping.external_port, lifetime_s, b"")
    match mapping.handle:
        case UpnpService() as service:
            external_ip = await _external_ip_of_upnp(service) if lifetime_s else ""
            return await _ask_upnp(mapping.gateway, service, wanted, external_ip)
        case bytes() as nonce:
            return await _ask_pcp(mapping.gateway, replace(wanted, nonce=nonce))
        case None:
            external_ip = await _external_ip_of_nat_pmp(mapping.gateway) if lifetime_s else ""
            return await _ask_nat_pmp(mapping.gateway, wanted, external_ip)


def _granted(method: str, gateway: str, wanted: Wanted, ip: str, port: int, lifetime_s: float) -> PortMapping:
    """What a router grants, if it makes sense."""
    if wanted.lifetime_s > 0 and (port == 0 or lifetime_s <= 0 or ipaddress.ip_address(ip).is_unspecified):
        raise PortMapError(f"{gateway} has no external address, or forwards no port of it")
    return PortMapping(method, wanted.protocol, wanted.internal_port, ip, port, lifetime_s, gateway)


# --- the router ---


def _routes() -> str | None:
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


def _own_ip(gateway: str) -> str:
    """This machine's address as a router next to it sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((gateway, _PORT))
        except OSError as error:
            raise PortMapError(f"cannot reach {gateway}: {error.strerror}") from error
        ip: str = sock.getsockname()[0]
        return ip


async def _exchange(gateway: str, request: bytes, decode: Callable[[bytes], Answer | None]) -> Answer:
    """Ask a router by a datagram, and take the first that comes back and can be read."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            await sock.connect((gateway, _PORT))  # from now on the kernel passes on nothing from anybody else
            answer = await _answer(sock, lambda: sock.send(request), lambda data, _: decode(data), ANSWER_S)
        except ConnectionRefusedError:
            raise PortMapError(f"nothing listens at {gateway}") from None
        except OSError as error:
            raise PortMapError(f"cannot reach {gateway}: {error.strerror}") from error
    if answer is None:
        raise PortMapError(f"no answer from {gateway}")
    return answer


async def _answer(
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
                    data, (sender, *_) = await sock.recvfrom(_MAX_DATAGRAM_BYTES + 1)
                    answer = decode(data, sender)
            retry_s *= 2
    return answer


# --- PCP ---

_PCP_HEADER: Final = struct.Struct("!BBHI16s")
_PCP_ANSWER_HEADER: Final = struct.Struct("!BBBBII12x")
_PCP_MAP: Final = struct.Struct("!12sB3xHH16s")
_ANY_V4: Final = ipaddress.IPv6Address("::ffff:0.0.0.0").packed
_PCP_RESULTS: Final = (
    *("success", "unsupported version", "not authorised", "malformed request", "unsupported opcode"),
    *("unsupported option", "malformed option", "network failure", "no resources", "unsupported protocol"),
    *("quota exceeded", "cannot provide that external port", "another NAT is in between", "too many remote peers"),
)
_UNSUPPORTED_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class PcpAnswer:
    """An answer to a MAP request; all but ``result`` is meaningless unless that is 0."""

    result: int
    lifetime_s: int = 0
    external_ip: str = "0.0.0.0"  # noqa: S104  no address
    external_port: int = 0


def encode_pcp(wanted: Wanted, own_ip: str) -> bytes:
    """A MAP request (RFC 6887, 7.1 and 11.1)."""
    client = ipaddress.IPv6Address(f"::ffff:{own_ip}").packed
    suggested = wanted.external_port if wanted.lifetime_s > 0 else 0
    number = _PROTOCOLS[wanted.protocol]
    return _PCP_HEADER.pack(2, 1, 0, wanted.lifetime_s, client) + _PCP_MAP.pack(
        wanted.nonce, number, wanted.internal_port, suggested, _ANY_V4
    )


def decode_pcp(wanted: Wanted, data: bytes) -> PcpAnswer | None:
    """The answer to that request (RFC 6887, 7.2 and 11.1); None if it is none."""
    if not 4 <= len(data) <= _MAX_DATAGRAM_BYTES:
        return None
    if data[0] != 2:  # how those answer that do not know this version, NAT-PMP's among them (RFC 6887, 9)
        return PcpAnswer(_UNSUPPORTED_VERSION) if data[1] & 0x80 and data[3] == _UNSUPPORTED_VERSION else None
    if len(data) < _PCP_ANSWER_HEADER.size + _PCP_MAP.size:
        return None
    _, opcode, _, result, lifetime_s, _ = _PCP_ANSWER_HEADER.unpack_from(data)
    nonce, protocol, internal_port, port, address = _PCP_MAP.unpack_from(data, _PCP_ANSWER_HEADER.size)
    asked = (0x81, wanted.nonce, _PROTOCOLS[wanted.protocol], wanted.internal_port)
    if (opcode, nonce, protocol, internal_port) != asked:
        return None
    if result != 0:
        return PcpAnswer(result)
    ip = ipaddress.IPv6Address(address).ipv4_mapped
    return None if ip is None else PcpAnswer(0, lifetime_s, str(ip), port)


async def _prepare_pcp(gateway: str, wanted: Wanted) -> _Ask:
    return partial(_ask_pcp, gateway, wanted)


async def _ask_pcp(gateway: str, wanted: Wanted) -> PortMapping:
    answer = await _exchange(gateway, encode_pcp(wanted, _own_ip(gateway)), partial(decode_pcp, wanted))
    _check_result(answer.result, _PCP_RESULTS)
    mapping = _granted("pcp", gateway, wanted, answer.external_ip, answer.external_port, answer.lifetime_s)
    return replace(mapping, handle=wanted.nonce)


def _check_result(result: int, names: tuple[str, ...]) -> None:
    if result != 0:
        raise PortMapError(f"refused: {names[result] if result < len(names) else 'unknown reason'} ({result})")


# --- NAT-PMP ---

_NAT_PMP_ADDRESS: Final = struct.Struct("!BBHI4s")
_NAT_PMP_REQUEST: Final = struct.Struct("!BBHHHI")
_NAT_PMP_MAP: Final = struct.Struct("!BBHIHHI")
_NAT_PMP_OPCODES: Final = {"udp": 1, "tcp": 2}
_NAT_PMP_RESULTS: Final = (
    *("success", "unsupported version", "not authorised", "network failure", "no resources", "unsupported opcode"),
)


@dataclass(frozen=True, slots=True)
class NatPmpAnswer:
    """An answer; all but ``result`` is meaningless unless that is 0, and some to either kind of request."""

    result: int
    external_ip: str = ""
    external_port: int = 0
    lifetime_s: int = 0


def encode_nat_pmp(wanted: Wanted | None) -> bytes:
    """A request for a mapping (RFC 6886, 3.3), or with None for the external address (3.2)."""
    if wanted is None:
        return bytes(2)
    suggested = wanted.external_port if wanted.lifetime_s > 0 else 0
    opcode = _NAT_PMP_OPCODES[wanted.protocol]
    return _NAT_PMP_REQUEST.pack(0, opcode, 0, wanted.internal_port, suggested, wanted.lifetime_s)


def decode_nat_pmp(wanted: Wanted | None, data: bytes) -> NatPmpAnswer | None:
    """The answer to that request; None if it is none."""
    if not 4 <= len(data) <= _MAX_DATAGRAM_BYTES:
        return None
    if data[0] != 0:  # a PCP server that speaks no NAT-PMP
        return NatPmpAnswer(_UNSUPPORTED_VERSION) if data[1] & 0x80 and data[3] == _UNSUPPORTED_VERSION else None
    opcode = 0 if wanted is None else _NAT_PMP_OPCODES[wanted.protocol]
    result = int.from_bytes(data[2:4])
    if data[1] != 0x80 | opcode:
        return None
    if result != 0:
        return NatPmpAnswer(result)
    if wanted is None:
        if len(data) != _NAT_PMP_ADDRESS.size:
            return None
        return NatPmpAnswer(0, external_ip=str(ipaddress.IPv4Address(data[8:])))
    if len(data) != _NAT_PMP_MAP.size:
        return None
    *_, internal_port, port, lifetime_s = _NAT_PMP_MAP.unpack(data)
    return NatPmpAnswer(0, "", port, lifetime_s) if internal_port == wanted.internal_port else None


async def _external_ip_of_nat_pmp(gateway: str) -> str:
    answer = await _exchange(gateway, encode_nat_pmp(None), partial(decode_nat_pmp, None))
    _check_result(answer.result, _NAT_PMP_RESULTS)
    return answer.external_ip


async def _prepare_nat_pmp(gateway: str, wanted: Wanted) -> _Ask:
    return partial(_ask_nat_pmp, gateway, wanted, await _external_ip_of_nat_pmp(gateway))


async def _ask_nat_pmp(gateway: str, wanted: Wanted, external_ip: str) -> PortMapping:
    answer = await _exchange(gateway, encode_nat_pmp(wanted), partial(decode_nat_pmp, wanted))
    _check_result(answer.result, _NAT_PMP_RESULTS)
    return _granted("nat-pmp", gateway, wanted, external_ip, answer.external_port, answer.lifetime_s)


# --- UPnP ---
# Not by miniupnpc, though libp2p brings it: it reads answers of any length, goes to any host that a description names,
# and holds a thread for as long as a router likes.


def decode_ssdp(data: bytes, sender: str) -> str | None:
    """Where the description of the device is that answers a search; None if it is not at the sender itself."""
    if not data.startswith(b"HTTP/1.1 200") or len(data) > _MAX_DATAGRAM_BYTES:
        return None
    found = re.search(rb"\r\nlocation:[ \t]*([!-~]+)", data, re.IGNORECASE)
    return None if found is None else _url_at(sender, found[1].decode("ascii"))


def decode_description(text: str, location: str, gateway: str) -> list[UpnpService]:
    """The services that map ports, newest kind first, of a device's description (UPnP Device Architecture 1.1, 2.3).

    Those at another host than the router are left out.
    """
    base = _text_of("URLBase", text) or location
    services = []
    for part in re.split(r"<service\s*>", text)[1:]:
        kind, path = _text_of("serviceType", part), _text_of("controlURL", part)
        try:
            url = _url_at(gateway, urljoin(base, path))
        except ValueError:
            continue
        if kind in _SERVICES and url is not None:
            services.append(UpnpService(kind, url))
    return sorted(services, key=lambda service: _SERVICES.index(service.kind))[:MAX_SERVICES]


def _text_of(name: str, xml: str) -> str:
    """The text of the first element of that name; empty if there is none. Of all of XML, routers need no more."""
    found = re.search(rf"<(?:\w{{1,20}}:)?{name}(?:\s[^<>]{{0,200}})?>\s{{0,200}}([!-;=-~]+(?: [!-;=-~]+)*)\s*<", xml)
    return found[1].replace("&amp;", "&") if found else ""


def _url_at(host: str, url: str) -> str | None:
    """A URL, if it is plain HTTP to that host and can be asked."""
    try:
        parts = urlsplit(url)
        is_there = parts.scheme == "http" and parts.hostname == host and not parts.username
        port = parts.port or 80
    except ValueError:
        return None
    if not is_there or len(url) > 512 or re.fullmatch(r"[!-~]*", url) is None:
        return None
    query = f"?{parts.query}" if parts.query else ""
    return f"http://{host}:{port}{parts.path or '/'}{query}"


async def _find_upnp(gateway: str | None) -> tuple[str, str]:
    """The IP of the router, and where its description is; without a known gateway, of whoever answers first."""

    def read(data: bytes, sender: str) -> tuple[str, str] | None:
        location = decode_ssdp(data, sender) if gateway in (None, sender) else None
        return None if location is None else (sender, location)

    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
            if gateway is not None:
                own_ip = _own_ip(gateway)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own_ip))
                await sock.bind((own_ip, 0))
            found = await _answer(sock, lambda: sock.sendto(_SEARCH, _SSDP), read, FIND_S)
        except OSError as error:
            raise PortMapError(f"cannot search for UPnP: {error.strerror}") from error
    if found is None:
        raise PortMapError(f"no answer from {gateway or 'any router'}")
    return found


async def _http(method: str, url: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and text; the text no longer than `MAX_HTTP_BYTES`."""
    parts = urlsplit(url)
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
    fields = {"Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close"} | (headers or {})
    target = url.partition(parts.netloc)[2]
    request = h11.Request(method=method, target=target, headers=list(fields.items()))
    status, text = 0, b""
    try:
        async with await trio.open_tcp_stream(parts.hostname or "", parts.port or 80) as stream:
            sent = [http.send(part) or b"" for part in (request, h11.Data(body), h11.EndOfMessage())]
            await stream.send_all(b"".join(sent))  # at once: there are routers that read but one packet
            while True:
                match http.next_event():
                    case h11.NEED_DATA:
                        http.receive_data(await stream.receive_some(_READ_BYTES))
                    case h11.Response() as answer:
                        status = answer.status_code
                    case h11.Data() as data:
                        text += data.data
                        if len(text) > MAX_HTTP_BYTES:
                            raise PortMapError("its answer by UPnP is too long")
                    case h11.EndOfMessage():
                        return status, text.decode("utf-8", "replace")
                    case h11.InformationalResponse():
                        pass
                    case _:  # it stopped, or speaks something else from now on
                        raise PortMapError("its UPnP breaks off")
    except (OSError, trio.BrokenResourceError, h11.ProtocolError) as error:
        raise PortMapError(f"its UPnP cannot be asked ({type(error).__name__})") from error


async def _soap(service: UpnpService, action: str, **arguments: object) -> str:
    """What a service answers (UPnP Device Architecture 1.1, 3.2)."""
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?>\r\n<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.kind}">{inside}</u:{action}></s:Body></s:Envelope>\r\n'
    ).encode()
    headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{service.kind}#{action}"'}
    status, text = await _http("POST", service.url, body, headers)
    if status == 200:
        return text
    code = _text_of("errorCode", text)
    if re.fullmatch(r"[0-9]{3}", code) is None:
        raise PortMapError(f"refused: HTTP status {status}")
    raise _UpnpError(int(code), _text_of("errorDescription", text)[:60] or "no reason given")


async def _external_ip_of_upnp(service: UpnpService) -> str:
    text = _text_of("NewExternalIPAddress", await _soap(service, "GetExternalIPAddress"))
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise PortMapError("the router has no external address") from None


async def _prepare_upnp(gateway: str | None, wanted: Wanted) -> _Ask:
    router, location = await _find_upnp(gateway)
    status, text = await _http("GET", location)
    services = decode_description(text, location, router) if status == 200 else []
    reason = PortMapError(f"{router} has UPnP, but none that maps ports")
    for service in services:
        try:  # a router may have a service for each kind of line, of which one is in use
            external_ip = await _external_ip_of_upnp(service)
        except PortMapError as error:
            reason = error
        else:
            return partial(_ask_upnp, router, service, wanted, external_ip)
    raise reason


async def _ask_upnp(gateway: str, service: UpnpService, wanted: Wanted, external_ip: str) -> PortMapping:
    name, own_ip = wanted.protocol.upper(), _own_ip(gateway)
    if wanted.lifetime_s <= 0:
        await _soap(
            service, "DeletePortMapping", NewRemoteHost="", NewExternalPort=wanted.external_port, NewProtocol=name
        )
        return _granted("upnp", gateway, wanted, external_ip, 0, 0)
    ports = [wanted.external_port, *(_chance.randrange(1024, 65536) for _ in range(NUM_PORTS_TRIED - 1))]
    lease_s = wanted.lifetime_s
    while True:
        try:
            await _soap(
                service,
                "AddPortMapping",
                NewRemoteHost="",
                NewExternalPort=ports[0],
                NewProtocol=name,
                NewInternalPort=wanted.internal_port,
                NewInternalClient=own_ip,
                NewEnabled=1,
                NewPortMappingDescription="shoal",
                NewLeaseDuration=lease_s,
            )
        except _UpnpError as error:
            if error.code == _ONLY_PERMANENT and lease_s != 0:
                lease_s = 0
            elif error.code == _CONFLICT and len(ports) > 1:
                del ports[0]
            else:
                raise
        else:
            break
    return replace(_granted("upnp", gateway, wanted, external_ip, ports[0], wanted.lifetime_s), handle=service)
