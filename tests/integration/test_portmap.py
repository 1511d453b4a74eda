"""Port mapping: the bytes, a real router (miniupnpd and the kernel's NAT) in network namespaces, and hostile ones."""

import contextlib
import ctypes
import ipaddress
import os
import secrets
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.node.reach import portmap
from shoal.node.reach.gateway import MappingWish, PortMapError, PortMapping, UpnpService, default_gateway
from shoal.node.reach.nat_pmp import NatPmpAnswer, decode_nat_pmp, encode_nat_pmp
from shoal.node.reach.pcp import PcpAnswer, decode_pcp, encode_pcp
from shoal.node.reach.portmap import MapAttempt, keep_port_mapped, map_port, unmap_port
from shoal.node.reach.upnp import MAX_HTTP_BYTES, decode_description, decode_ssdp
from shoal.protocol.errors import UsageError

NONCE = b"twelve bytes"
TCP = MappingWish("tcp", 4001, 4001, 3600, NONCE)
UDP = replace(TCP, protocol="udp")


# --- the bytes of PCP ---


def pcp_answer(
    *, version=2, opcode=0x81, result=0, nonce=NONCE, protocol=6, port=4001, outside=4002, ip="::ffff:5.1.0.1"
) -> bytes:
    header = struct.pack("!BBBBII12x", version, opcode, 0, result, 1800, 77)
    address = ipaddress.IPv6Address(ip).packed
    return header + struct.pack("!12sB3xHH16s", nonce, protocol, port, outside, address)


def test_a_pcp_request_is_as_the_rfc_draws_it():
    assert encode_pcp(TCP, "192.168.1.2") == (
        bytes.fromhex("02 01 0000 00000e10 00000000000000000000ffff c0a80102")
        + NONCE
        + bytes.fromhex("06 000000 0fa1 0fa1 00000000000000000000ffff 00000000")
    )
    end = encode_pcp(replace(UDP, lifetime_s=0), "192.168.1.2")
    assert end[4:8] == bytes(4)
    assert end[36] == 17
    assert end[42:44] == bytes(2)


def test_a_pcp_answer_is_read():
    assert decode_pcp(TCP, pcp_answer()) == PcpAnswer(0, 1800, "5.1.0.1", 4002)
    assert decode_pcp(TCP, pcp_answer() + bytes(8)) == PcpAnswer(0, 1800, "5.1.0.1", 4002), "options may follow"
    assert decode_pcp(TCP, pcp_answer(result=2)) == PcpAnswer(2)


@pytest.mark.parametrize("answer", [bytes.fromhex("00 81 0001 00000000"), bytes.fromhex("01 80 00 01")])
def test_a_router_of_another_version_says_so(answer):
    assert decode_pcp(TCP, answer) == PcpAnswer(1)


@pytest.mark.parametrize(
    "data",
    [
        pcp_answer(nonce=b"another one!"),
        pcp_answer(nonce=b"another one!", result=2),
        pcp_answer(opcode=0x01),
        pcp_answer(opcode=0x82),
        pcp_answer(protocol=17),
        pcp_answer(port=4000),
        pcp_answer(version=3),
        pcp_answer(ip="2a00::1"),
        pcp_answer() + bytes(1100),
        *(pcp_answer()[:length] for length in range(60)),
    ],
)
def test_what_is_no_answer_to_the_pcp_request_is_none(data):
    assert decode_pcp(TCP, data) is None


# --- the bytes of NAT-PMP ---


def test_nat_pmp_requests_are_as_the_rfc_draws_them():
    assert encode_nat_pmp(None) == b"\0\0"
    assert encode_nat_pmp(TCP) == bytes.fromhex("00 02 0000 0fa1 0fa1 00000e10")
    assert encode_nat_pmp(replace(UDP, lifetime_s=0)) == bytes.fromhex("00 01 0000 0fa1 0000 00000000")


ADDRESS = bytes.fromhex("00 80 0000 0000004d 05010001")
MAPPED = bytes.fromhex("00 82 0000 0000004d 0fa1 0fa2 00000708")


def test_nat_pmp_answers_are_read():
    assert decode_nat_pmp(None, ADDRESS) == NatPmpAnswer(0, external_ip="5.1.0.1")
    assert decode_nat_pmp(TCP, MAPPED) == NatPmpAnswer(0, "", 4002, 1800)
    assert decode_nat_pmp(TCP, bytes.fromhex("00 82 0002 0000004d")) == NatPmpAnswer(2)
    assert decode_nat_pmp(None, bytes.fromhex("02 80 00 01")) == NatPmpAnswer(1), "PCP alone is spoken there"


@pytest.mark.parametrize(
    ("wanted", "data"),
    [
        (UDP, MAPPED),
        (None, MAPPED),
        (TCP, ADDRESS),
        (replace(TCP, internal_port=4000), MAPPED),
        (TCP, encode_nat_pmp(TCP)),
        (None, encode_nat_pmp(None)),
        (TCP, MAPPED + b"\0"),
        *((TCP, MAPPED[:length]) for length in range(len(MAPPED))),
        *((None, ADDRESS[:length]) for length in range(len(ADDRESS))),
    ],
)
def test_what_is_no_answer_to_the_nat_pmp_request_is_none(wanted, data):
    assert decode_nat_pmp(wanted, data) is None


@given(st.binary(max_size=1200))
@example(pcp_answer()[:-1])
@example(b"\xff" * 1200)
def test_whatever_datagram_comes_it_does_no_harm(data):
    decode_pcp(TCP, data)
    decode_nat_pmp(None, data)
    decode_nat_pmp(TCP, data)
    decode_ssdp(data, "192.168.1.1")


# --- the texts of UPnP ---


def ssdp_answer(location: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nST: upnp:rootdevice\r\nLocation: {location}\r\nUSN: uuid:1\r\n\r\n".encode()


def description(*services: tuple[str, str], base: str = "") -> str:
    listed = "".join(
        f"<service><serviceType>urn:schemas-upnp-org:service:{kind}</serviceType>"
        f"<SCPDURL>/x.xml</SCPDURL><controlURL>{url}</controlURL></service>"
        for kind, url in services
    )
    return f'<?xml version="1.0"?><root>{base}<device><serviceList>{listed}</serviceList></device></root>'


LOCATION = "http://192.168.1.1:5000/root.xml"


def test_the_description_is_sought_at_the_router_alone():
    assert decode_ssdp(ssdp_answer(LOCATION), "192.168.1.1") == LOCATION
    assert decode_ssdp(ssdp_answer("http://192.168.1.1"), "192.168.1.1") == "http://192.168.1.1:80/"
    for location in (
        *("http://192.168.1.66/root.xml", "http://192.168.1.1@5.1.0.2/", "http://192.168.1.1.evil.org/", "", "//"),
        *("https://192.168.1.1/root.xml", "file:///etc/passwd", "http://192.168.1.1:99999/", "http://[::1/", "http://"),
        "http://192.168.1.1/" + "x" * 1000,
    ):
        assert decode_ssdp(ssdp_answer(location), "192.168.1.1") is None
    assert decode_ssdp(ssdp_answer(LOCATION).replace(b"200", b"404"), "192.168.1.1") is None


def test_the_newest_service_that_maps_ports_comes_first_and_those_elsewhere_not_at_all():
    text = description(
        ("Layer3Forwarding:1", "/l3"),
        ("WANPPPConnection:1", "/ppp"),
        ("WANIPConnection:1", "http://5.1.0.2/ctl"),
        ("WANIPConnection:1", "http://[broken/ctl"),
        ("WANIPConnection:1", "ctl?a=1&amp;b=2"),
        ("WANIPConnection:2", "http://192.168.1.1:99/ctl"),
    )
    kind = "urn:schemas-upnp-org:service:"
    assert decode_description(text, LOCATION, "192.168.1.1") == [
        UpnpService(f"{kind}WANIPConnection:2", "http://192.168.1.1:99/ctl"),
        UpnpService(f"{kind}WANIPConnection:1", "http://192.168.1.1:5000/ctl?a=1&b=2"),
        UpnpService(f"{kind}WANPPPConnection:1", "http://192.168.1.1:5000/ppp"),
    ]
    based = description(("WANIPConnection:1", "/ctl"), base="<URLBase>http://192.168.1.1:7/</URLBase>")
    assert [service.url for service in decode_description(based, LOCATION, "192.168.1.1")] == [
        "http://192.168.1.1:7/ctl"
    ]
    away = description(("WANIPConnection:1", "/ctl"), base="<URLBase>http://5.1.0.2/</URLBase>")
    assert decode_description(away, LOCATION, "192.168.1.1") == []


@given(st.text(max_size=300))
def test_whatever_description_comes_it_does_no_harm(text):
    decode_description(text, LOCATION, "192.168.1.1")
    decode_description(description(("WANIPConnection:1", text)), LOCATION, "192.168.1.1")
    decode_description(description(("WANIPConnection:1", "/"), base=f"<URLBase>{text}"), LOCATION, "192.168.1.1")


@pytest.mark.parametrize("piece", ["<service>", "<service ", "<URLBase ", "<a:URLBase>", "<URLBase>a ", " ", "<"])
def test_a_description_of_the_greatest_length_is_read_at_once(piece):
    text = piece * (MAX_HTTP_BYTES // len(piece))
    start = time.process_time()
    decode_description(text, LOCATION, "192.168.1.1")
    assert time.process_time() - start < 2


# --- the routes ---

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t{far}\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t{near}\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
"""


def test_the_default_gateway_is_that_of_the_least_metric():
    written = {
        name: f"{int.from_bytes(socket.inet_aton(ip), 'little' if struct.pack('=H', 1)[0] else 'big'):08X}"
        for name, ip in (("far", "10.0.0.1"), ("near", "192.168.1.1"))
    }
    assert default_gateway(ROUTES.format(**written)) == "192.168.1.1"
    assert default_gateway(ROUTES.splitlines()[0]) is None
    assert default_gateway("") is None


def test_another_protocol_than_those_two_is_a_mistake():
    with pytest.raises(UsageError, match="choose tcp or udp"):
        trio.run(map_port, "sctp", 4001)


# --- a home: a host behind a router at the internet ---

ROUTER, HOST, STRANGER = "192.168.1.1", "192.168.1.2", "192.168.1.66"
OUTSIDE = "5.1.0.1"
PORT = 4001
GENEROUS_S = 20.0
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

RULES = """
flush ruleset
table inet filter {
    chain to_router {
        type filter hook input priority filter; policy accept;
        iifname "wan" ct state new meta l4proto tcp reject with tcp reset
        iifname "wan" ct state new drop
        SILENT
    }
    chain miniupnpd { }
    chain through {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "lan0" accept
        ct status dnat accept
        jump miniupnpd
    }
}
table inet nat {
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
    chain before {
        type nat hook prerouting priority dstnat;
        iifname "wan" jump prerouting_miniupnpd
    }
    chain after {
        type nat hook postrouting priority srcnat;
        oifname "wan" jump postrouting_miniupnpd
        oifname "wan" masquerade
    }
}
"""
NO_PCP = "udp dport 5351 @th,64,8 2 drop"  # a router that has never heard of it, and says nothing

SETTINGS = """
ext_ifname=wan
listening_ip=lan0
secure_mode=yes
min_lifetime=120
max_lifetime=86400
uuid=00000000-0000-4000-8000-000000000000
upnp_table_name=filter
upnp_nat_table_name=nat
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
"""
ALLOW = "allow 1024-65535 192.168.1.0/24 1024-65535\n"
DENY = "deny 0-65535 0.0.0.0/0 0-65535\n"


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is in a namespace; what it opens stays there. The tests have no other thread that opens sockets."""
    with Path("/proc/self/ns/net").open() as before, Path(f"/run/netns/{namespace}").open() as there:
        assert _libc.setns(there.fileno(), _CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert _libc.setns(before.fileno(), _CLONE_NEWNET) == 0


def do(*words: str, text: str | None = None) -> None:
    subprocess.run(words, input=text, text=True, check=True, capture_output=True, timeout=20)


@dataclass
class Home:
    folder: Path
    name: str = field(default_factory=lambda: f"shoal-{secrets.token_hex(3)}")
    daemon: subprocess.Popen[str] | None = None
    watcher: threading.Thread | None = None

    def space(self, role: str) -> str:
        return f"{self.name}-{role}"

    def load_rules(self, silent: str = "") -> None:
        do("ip", "netns", "exec", self.space("router"), "nft", "-f", "-", text=RULES.replace("SILENT", silent))

    def move(self, role: str, device: str, ip: str) -> None:
        """Give a device another address."""
        do("ip", "-n", self.space(role), "addr", "flush", "dev", device)
        do("ip", "-n", self.space(role), "addr", "add", f"{ip}/24", "dev", device)
        if role == "host":
            do("ip", "-n", self.space(role), "route", "add", "default", "via", ROUTER)

    def start(self, *, nat_pmp: bool = True, upnp: bool = True, who: str = ALLOW + DENY) -> None:
        """Run miniupnpd, and wait until it answers."""
        settings = self.folder / "miniupnpd.conf"
        switches = f"enable_natpmp={'yes' if nat_pmp else 'no'}\nenable_upnp={'yes' if upnp else 'no'}\n"
        settings.write_text(SETTINGS + switches + who, encoding="ascii")
        command = ("miniupnpd", "-d", "-f", str(settings), "-P", str(self.folder / "pid"))
        self.daemon = daemon = subprocess.Popen(
            ("ip", "netns", "exec", self.space("router"), *command),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = threading.Event()
        said: list[str] = []

        def watch() -> None:
            assert daemon.stderr is not None
            for line in daemon.stderr:
                said.append(line)
                if ("Listening for NAT-PMP" if nat_pmp else "HTTP listening on port") in line:
                    ready.set()
            daemon.stderr.close()

        self.watcher = threading.Thread(target=watch)
        self.watcher.start()
        assert ready.wait(GENEROUS_S), "".join(said)

    def stop(self) -> None:
        if self.daemon is not None and self.watcher is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.watcher.join()
            self.daemon = None

    def udp(self, ip: str, port: int) -> trio.socket.SocketType:
        """A socket at the router."""
        with inside(self.space("router")):
            sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            raw = socket.fromfd(sock.fileno(), socket.AF_INET, socket.SOCK_DGRAM)
            with raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                raw.bind((ip, port))
        return sock

    async def map_port(self, protocol: str = "tcp", **options: float) -> tuple[PortMapping | None, dict[str, str]]:
        with trio.fail_after(GENEROUS_S), inside(self.space("host")):
            mapping, attempts = await map_port(protocol, PORT, **options)
        return mapping, {attempt.method: attempt.outcome for attempt in attempts}

    async def unmap_port(self, mapping: PortMapping) -> None:
        with trio.fail_after(GENEROUS_S), inside(self.space("host")):
            await unmap_port(mapping)

    async def gets_in(self, mapping: PortMapping) -> bool:
        """Whether a TCP connection from the internet arrives at the host."""
        with inside(self.space("host")):
            door = socket.create_server(("0.0.0.0", PORT))
        with trio.socket.from_stdlib_socket(door) as listener, trio.fail_after(GENEROUS_S):
            with inside(self.space("internet")):
                caller = trio.socket.socket()
            with caller:
                try:
                    await caller.connect((mapping.external_ip, mapping.external_port))
                except ConnectionRefusedError:
                    return False
                arrived, _ = await listener.accept()
                with arrived:
                    await caller.send(b"hello")
                    assert await arrived.recv(5) == b"hello"
        return True


@pytest.fixture
def home(tmp_path) -> Iterator[Home]:
    absent = [name for name in ("ip", "nft", "miniupnpd") if shutil.which(name) is None]
    if absent:
        pytest.skip(f"a router in a network namespace needs {', '.join(absent)}")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Home(tmp_path)
    host, router, internet = (made.space(role) for role in ("host", "router", "internet"))
    try:
        try:
            for name in (host, router, internet):
                do("ip", "netns", "add", name)
                do("ip", "-n", name, "link", "set", "lo", "up")
            for device, far in (("lan0", host), ("wan", internet)):
                do(*("ip", "-n", router, "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", far))
            for name, device, address in (
                (router, "lan0", f"{ROUTER}/24"),
                (router, "wan", f"{OUTSIDE}/24"),
                (host, "eth0", f"{HOST}/24"),
                (internet, "eth0", "5.1.0.9/24"),
            ):
                do("ip", "-n", name, "addr", "add", address, "dev", device)
                do("ip", "-n", name, "link", "set", device, "up")
            do("ip", "-n", host, "route", "add", "default", "via", ROUTER)
            do("ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            made.load_rules()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no routers in network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        made.stop()
        for name in (host, router, internet):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


# --- real routers ---


@pytest.mark.trio
@pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
async def test_a_mapped_port_lets_the_internet_in_until_it_is_unmapped(home, method):
    home.load_rules(NO_PCP if method == "nat-pmp" else "")
    home.start(nat_pmp=method != "upnp", upnp=method == "upnp")
    nobody = PortMapping(method, "tcp", PORT, OUTSIDE, PORT, 0, ROUTER)
    assert not await home.gets_in(nobody)
    mapping, outcomes = await home.map_port()
    assert mapping == PortMapping(method, "tcp", PORT, OUTSIDE, PORT, 3600, ROUTER), outcomes
    assert outcomes[method] == f"forwards {OUTSIDE}:{PORT}"
    assert await home.gets_in(mapping)
    await home.unmap_port(mapping)
    assert not await home.gets_in(mapping)


@pytest.mark.trio
async def test_a_router_that_speaks_all_is_asked_once(home):
    home.start()
    mapping, outcomes = await home.map_port("udp", lifetime_s=600)
    assert mapping == PortMapping("pcp", "udp", PORT, OUTSIDE, PORT, 600, ROUTER)
    assert outcomes["nat-pmp"] == outcomes["upnp"] == "not needed"


@pytest.mark.trio
@pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
async def test_a_port_that_another_host_has_is_replaced(home, method):
    home.load_rules(NO_PCP if method == "nat-pmp" else "")
    home.start(nat_pmp=method != "upnp", upnp=method == "upnp")
    home.move("host", "eth0", STRANGER)
    other, _ = await home.map_port()
    home.move("host", "eth0", HOST)
    mapping, outcomes = await home.map_port()
    assert other is not None
    assert mapping is not None, outcomes
    assert mapping.external_port != other.external_port
    assert await home.gets_in(mapping)


@pytest.mark.trio
async def test_a_router_that_refuses_by_upnp_says_why(home):
    home.start(nat_pmp=False, who=DENY)
    mapping, outcomes = await home.map_port()
    assert mapping is None
    assert outcomes["upnp"] == "refused: Action not authorized (606)"


@pytest.mark.trio
async def test_a_router_that_maps_no_ports_is_told_at_once(home):
    start = trio.current_time()
    mapping, outcomes = await home.map_port(timeout_s=1.0)
    assert mapping is None
    assert outcomes["pcp"] == outcomes["nat-pmp"] == f"nothing listens at {ROUTER}"
    assert outcomes["upnp"] == "no answer in time"
    assert trio.current_time() - start < 2


@pytest.mark.trio
async def test_a_router_that_is_silent_is_told_in_time(home):
    home.load_rules('iifname "lan0" drop')
    mapping, outcomes = await home.map_port()
    assert mapping is None
    assert set(outcomes.values()) == {f"no answer from {ROUTER}"}


@pytest.mark.trio
async def test_without_a_default_gateway_nobody_is_asked(home):
    do("ip", "-n", home.space("host"), "route", "del", "default")
    mapping, outcomes = await home.map_port()
    assert mapping is None
    assert set(outcomes.values()) == {"there is no default gateway"}


@pytest.mark.trio
async def test_a_mapping_that_the_router_does_not_end_is_an_error(home):
    mapping = PortMapping("pcp", "tcp", PORT, OUTSIDE, PORT, 3600, ROUTER, NONCE)
    with pytest.raises(PortMapError, match="nothing listens"):
        await home.unmap_port(mapping)
    home.load_rules('iifname "lan0" drop')
    with pytest.raises(PortMapError, match="no answer"):
        await home.unmap_port(mapping)


# --- kept ---

News = tuple[PortMapping | None, list[MapAttempt]]


@contextlib.asynccontextmanager
async def kept(home: Home, monkeypatch: pytest.MonkeyPatch):
    """A port that is kept mapped; gives what is told, and takes seconds for what takes minutes."""
    for name in ("RENEW_MIN_S", "RENEW_MAX_S", "RETRY_MIN_S", "RETRY_MAX_S"):
        monkeypatch.setattr(portmap, name, 0.2)
    tell, told = trio.open_memory_channel[News](10)
    with trio.fail_after(GENEROUS_S):
        async with trio.open_nursery() as nursery:

            async def keep() -> None:
                await keep_port_mapped("tcp", PORT, lambda *news: tell.send_nowait(news))

            nursery.start_soon(keep)
            yield told
            nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
async def test_a_mapping_is_renewed_and_ends_with_the_node(home, monkeypatch, method):
    silent = NO_PCP if method == "nat-pmp" else ""
    home.load_rules(silent)
    home.start(nat_pmp=method != "upnp", upnp=method == "upnp")
    with inside(home.space("host")):
        async with kept(home, monkeypatch) as told:
            mapping, _ = await told.receive()
            assert mapping is not None
            assert mapping.method == method
            home.load_rules(silent)  # the router has forgotten all that it forwarded
            while not await home.gets_in(mapping):  # noqa: ASYNC110  nothing tells when the router has it again
                await trio.sleep(0.05)
            home.move("router", "wan", "5.1.0.3")
            mapping, _ = await told.receive()
            while mapping is None or mapping.external_ip != "5.1.0.3":
                mapping, _ = await told.receive()
            assert await home.gets_in(mapping)
    assert not await home.gets_in(mapping)


@pytest.mark.trio
async def test_a_router_that_goes_and_comes_back_is_told(home, monkeypatch):
    home.start()
    with inside(home.space("host")):
        async with kept(home, monkeypatch) as told:
            mapping, _ = await told.receive()
            assert mapping is not None
            home.stop()
            gone, attempts = await told.receive()
            assert gone is None
            assert attempts[0] == MapAttempt("pcp", f"nothing listens at {ROUTER}")
            home.load_rules()
            home.start()
            while (mapping := (await told.receive())[0]) is None:
                pass
            assert await home.gets_in(mapping)


# --- hostile routers, written here ---


async def answer_all(sock: trio.socket.SocketType, answer: Callable[[bytes], list[bytes]]) -> None:
    """A responder of this test for PCP, NAT-PMP or SSDP."""
    with sock:
        while True:
            data, sender = await sock.recvfrom(2048)
            for reply in answer(data):
                await sock.sendto(reply, sender)


def join_ssdp(sock: trio.socket.SocketType) -> trio.socket.SocketType:
    group = socket.inet_aton("239.255.255.250") + socket.inet_aton(ROUTER)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    return sock


@pytest.mark.trio
async def test_noise_from_the_router_is_no_answer(home):
    def noise(request: bytes) -> list[bytes]:
        nonce = request[24:36]
        return [
            b"",
            request,
            secrets.token_bytes(60),
            pcp_answer(nonce=secrets.token_bytes(12)),
            pcp_answer(nonce=nonce)[:59],
            b"\0\x80\0\0",
            b"\xff" * 2000,
            ssdp_answer("http://5.1.0.9/root.xml"),
        ]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, home.udp(ROUTER, 5351), noise)
        nursery.start_soon(answer_all, join_ssdp(home.udp("0.0.0.0", 1900)), noise)
        mapping, outcomes = await home.map_port()
        nursery.cancel_scope.cancel()
    assert mapping is None
    assert set(outcomes.values()) == {f"no answer from {ROUTER}"}


@pytest.mark.trio
async def test_a_router_that_refuses_says_why(home):
    # a responder of this test: miniupnpd, if it may map no port, tries all 65536 before it says so
    def refuse(request: bytes) -> list[bytes]:
        if request[0] == 2:
            return [pcp_answer(nonce=request[24:36], result=2)]
        return [ADDRESS if request == encode_nat_pmp(None) else bytes.fromhex("00 82 0003 00000000")]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, home.udp(ROUTER, 5351), refuse)
        mapping, outcomes = await home.map_port()
        nursery.cancel_scope.cancel()
    assert mapping is None
    assert outcomes["pcp"] == "refused: not authorised (2)"
    assert outcomes["nat-pmp"] == "refused: network failure (3)"


@pytest.mark.trio
async def test_a_grant_of_nothing_is_none(home):
    def nothing(request: bytes) -> list[bytes]:
        if request[0] == 2:
            return [pcp_answer(nonce=request[24:36], outside=0)]
        return [bytes.fromhex("00 80 0000 00000000 00000000"), bytes.fromhex("00 82 0000 00000000 0fa1 0fa1 00000708")]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, home.udp(ROUTER, 5351), nothing)
        mapping, outcomes = await home.map_port()
        nursery.cancel_scope.cancel()
    assert mapping is None
    assert outcomes["pcp"] == outcomes["nat-pmp"] == f"{ROUTER} has no external address, or forwards no port of it"


@pytest.mark.trio
async def test_a_stranger_of_the_network_is_not_believed(home):
    do("ip", "-n", home.space("router"), "addr", "add", f"{STRANGER}/24", "dev", "lan0")
    searched, asked = join_ssdp(home.udp("0.0.0.0", 1900)), home.udp(ROUTER, 5351)
    stranger, other = home.udp(STRANGER, 1901), home.udp(STRANGER, 5351)

    async def betray(sock: trio.socket.SocketType, voice: trio.socket.SocketType, *, is_ssdp: bool) -> None:
        with sock, voice:
            while True:
                data, sender = await sock.recvfrom(2048)
                truth = ssdp_answer(f"http://{STRANGER}:80/root.xml") if is_ssdp else pcp_answer(nonce=data[24:36])
                await voice.sendto(truth, sender)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(betray, searched, stranger, is_ssdp=True))
        nursery.start_soon(partial(betray, asked, other, is_ssdp=False))
        mapping, outcomes = await home.map_port()
        nursery.cancel_scope.cancel()
    assert mapping is None
    assert set(outcomes.values()) == {f"no answer from {ROUTER}"}


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


HTTP_REPLIES = {
    "nothing": (b"", "cannot be asked"),
    "no HTTP": (b"\0\xff\r\n\r\n", "cannot be asked"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 1_000_000, "cannot be asked"),
    "too long": (http("200 OK", b"<" * (MAX_HTTP_BYTES + 1)), "too long"),
    "a false length": (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "cannot be asked"),
    "cut off": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<root>", "cannot be asked"),
    "a bomb": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b" + b"\0" * 99, "none that maps ports"),
    "elsewhere": (b"HTTP/1.1 302 Found\r\nLocation: http://5.1.0.9/\r\n\r\n", "none that maps ports"),
    "a printer": (http("200 OK", b"<root>\xff</root>"), "none that maps ports"),
    "no reason": (http("500 \x1b[31m", description(("WANIPConnection:1", "/")).encode()), "none that maps ports"),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" * 3, "cannot be asked"),
    "never an end": (b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, "too long"),
    "broken chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 21 + b"\r\n",
        "cannot be asked",
    ),
    "no address": (http("200 OK", description(("WANIPConnection:1", "/")).encode()), "no external address"),
}


@contextlib.asynccontextmanager
async def upnp_responder(home: Home, answer: Callable[[bytes], bytes]):
    """A router of this test that is found by SSDP and answers each HTTP request so."""
    with inside(home.space("router")):
        door = trio.socket.from_stdlib_socket(socket.create_server((ROUTER, 0)))
    url = f"http://{ROUTER}:{door.getsockname()[1]}/"

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(answer(await stream.receive_some(4096)))
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, join_ssdp(home.udp("0.0.0.0", 1900)), lambda _: [ssdp_answer(url)])
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(door)])
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.parametrize("name", HTTP_REPLIES)
async def test_a_hostile_device_of_upnp_does_no_harm(home, name):
    reply, expected = HTTP_REPLIES[name]
    async with upnp_responder(home, lambda _: reply):
        mapping, outcomes = await home.map_port()
    assert mapping is None
    assert expected in outcomes["upnp"]
    assert outcomes["upnp"].isprintable()


@pytest.mark.trio
async def test_a_device_of_upnp_that_says_nothing_is_told_in_time(home):
    with inside(home.space("router")):
        door = socket.create_server((ROUTER, 0))  # the kernel connects whoever calls, and nobody takes the call
    url = f"http://{ROUTER}:{door.getsockname()[1]}/"
    with door:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_all, join_ssdp(home.udp("0.0.0.0", 1900)), lambda _: [ssdp_answer(url)])
            mapping, outcomes = await home.map_port(timeout_s=0.5)
            nursery.cancel_scope.cancel()
    assert mapping is None
    assert outcomes["upnp"] == "no answer in time"


@pytest.mark.trio
async def test_a_router_that_maps_only_for_ever_is_asked_for_that(home):
    leases: list[bytes] = []

    def answer(request: bytes) -> bytes:
        if request.startswith(b"GET"):
            return http("200 OK", description(("WANPPPConnection:1", "/ppp"), ("WANIPConnection:1", "/ip")).encode())
        if request.startswith(b"POST /ip"):
            return http("500 Internal Server Error", b"<errorCode>501</errorCode>")  # that line is not in use
        if b"#GetExternalIPAddress" in request:
            return http("200 OK", b"<NewExternalIPAddress>5.1.0.1</NewExternalIPAddress>")
        leases.append(request.partition(b"<NewLeaseDuration>")[2].partition(b"<")[0])
        refusal = b"<errorCode>725</errorCode><errorDescription>OnlyPermanentLeasesSupported</errorDescription>"
        return http("500 Internal Server Error", refusal) if len(leases) == 1 else http("200 OK", b"<ok/>")

    async with upnp_responder(home, answer):
        mapping, _ = await home.map_port()
    assert mapping == PortMapping("upnp", "tcp", PORT, OUTSIDE, PORT, 3600, ROUTER)
    assert leases == [b"3600", b"0"]
