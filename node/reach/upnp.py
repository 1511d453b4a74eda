"""UPnP's Internet Gateway Device (IGD 1 and 2): found by SSDP, asked to forward a port by SOAP over HTTP.

A URL that leads to another host than the router is not followed, and answers are cut off at a fixed size. It is not
done by miniupnpc, though libp2p brings that: it reads answers of any length, goes to any host that a description names,
and holds a thread for as long as a router likes.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
from dataclasses import replace
from functools import partial
from typing import Final
from urllib.parse import urljoin, urlsplit

import h11
import trio

from shoal.node.reach.gateway import (
    MAX_DATAGRAM_BYTES,
    Ask,
    MappingWish,
    PortMapError,
    PortMapping,
    UpnpService,
    granted,
    own_ip_towards,
    repeat_until_answered,
)

FIND_S: Final = 2.0
"""A device may wait for a second before it answers a search (MX)."""
MAX_HTTP_BYTES: Final = 128 * 1024
_MAX_HEADER_BYTES: Final = 16 * 1024
_READ_BYTES: Final = 4096
MAX_SERVICES: Final = 4
NUM_PORTS_TRIED: Final = 4

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


class _UpnpError(PortMapError):
    """A router's own error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"refused: {text} ({code})")
        self.code = code


def decode_ssdp(data: bytes, sender: str) -> str | None:
    """Where the description of the device is that answers a search; None if it is not at the sender itself."""
    if not data.startswith(b"HTTP/1.1 200") or len(data) > MAX_DATAGRAM_BYTES:
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
                own_ip = own_ip_towards(gateway)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own_ip))
                await sock.bind((own_ip, 0))
            found = await repeat_until_answered(sock, lambda: sock.sendto(_SEARCH, _SSDP), read, FIND_S)
        except OSError as error:
            raise PortMapError(f"cannot search for UPnP: {error.strerror}") from error
    if found is None:
        raise PortMapError(f"no answer from {gateway or 'any router'}")
    return found


async def _http(method: str, url: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and text; no more is read than `MAX_HTTP_BYTES`, whatever it is."""
    parts = urlsplit(url)
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
    fields = {"Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close"} | (headers or {})
    target = url.partition(parts.netloc)[2]
    request = h11.Request(method=method, target=target, headers=list(fields.items()))
    status, text, received = 0, b"", 0
    try:
        async with await trio.open_tcp_stream(parts.hostname or "", parts.port or 80) as stream:
            sent = [http.send(part) or b"" for part in (request, h11.Data(body), h11.EndOfMessage())]
            await stream.send_all(b"".join(sent))  # at once: there are routers that read but one packet
            while True:
                match http.next_event():
                    case h11.NEED_DATA:
                        data = await stream.receive_some(_READ_BYTES)
                        received += len(data)
                        if received > MAX_HTTP_BYTES:
                            raise PortMapError("its answer by UPnP is too long")
                        http.receive_data(data)
                    case h11.Response() as answer:
                        status = answer.status_code
                    case h11.Data() as part:
                        text += part.data
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


async def external_ip_of_upnp(service: UpnpService) -> str:
    """The router's own address outside.

    Raises:
        PortMapError: if it has none, or does not answer.
    """
    text = _text_of("NewExternalIPAddress", await _soap(service, "GetExternalIPAddress"))
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise PortMapError("the router has no external address") from None


async def prepare_upnp(gateway: str | None, wanted: MappingWish) -> Ask:
    """Find out whether the router speaks it; without a known gateway, whether any does.

    Raises:
        PortMapError: if not.
    """
    router, location = await _find_upnp(gateway)
    status, text = await _http("GET", location)
    services = decode_description(text, location, router) if status == 200 else []
    reason = PortMapError(f"{router} has UPnP, but none that maps ports")
    for service in services:
        try:  # a router may have a service for each kind of line, of which one is in use
            external_ip = await external_ip_of_upnp(service)
        except PortMapError as error:
            reason = error
        else:
            return partial(ask_upnp, router, service, wanted, external_ip)
    raise reason


async def ask_upnp(gateway: str, service: UpnpService, wanted: MappingWish, external_ip: str) -> PortMapping:
    """Ask for a mapping, ask again, or end it.

    Raises:
        PortMapError: if the router does not answer, or refuses.
    """
    name, own_ip = wanted.protocol.upper(), own_ip_towards(gateway)
    if wanted.lifetime_s <= 0:
        await _soap(
            service, "DeletePortMapping", NewRemoteHost="", NewExternalPort=wanted.external_port, NewProtocol=name
        )
        return granted("upnp", gateway, wanted, external_ip, 0, 0)
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
    return replace(granted("upnp", gateway, wanted, external_ip, ports[0], wanted.lifetime_s), handle=service)
