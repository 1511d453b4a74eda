"""What nodes tell each other over UDP: on loopback, and through the kernel's NATs between network namespaces."""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.node.mesh.endpoint import Endpoint, Family
from shoal.node.reach.nat import (
    AddressesChanged,
    NatKnowledge,
    NatType,
    Poked,
    PokeSource,
    Seen,
    Silent,
)
from shoal.node.reach.stun import (
    ANSWERS_BURST,
    ANSWERS_PER_S,
    MAX_EXPECTED,
    MAX_USERS,
    AnswerLimits,
    Stun,
    StunAnswer,
    StunError,
    StunRequest,
    decode_stun,
    encode_stun,
    open_stun,
)
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer

LOOPBACK = {"ip_v4": "127.0.0.1", "ip_v6": "::1"}
TOKEN = b"sixteen of bytes"
REQUEST = bytes.fromhex("0001 0000 2112a442 b7e7a701bc34d686fa87dfae")


def local(stun: Stun, family: Family = Family.IPV4) -> Endpoint:
    endpoint = stun.local(family)
    assert endpoint is not None
    return endpoint


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        return True
    return False


# --- the bytes ---


def test_an_answer_is_read_as_the_rfc_writes_it():
    # RFC 5769, 2.2 and 2.3, without the attributes that are of no use here
    v4 = bytes.fromhex("0101 000c 2112a442 b7e7a701bc34d686fa87dfae 0020 0008 0001a147e112a643")
    assert decode_stun(v4) == StunAnswer(v4[8:20], Endpoint("192.0.2.1", 32853))
    v6 = bytes.fromhex(
        "0101 0018 2112a442 b7e7a701bc34d686fa87dfae 0020 0014 0002a147 0113a9faa5d3f179bc25f4b5bed2b9d9"
    )
    assert decode_stun(v6) == StunAnswer(v6[8:20], Endpoint("2001:db8:1234:5678:11:2233:4455:6677", 32853))
    assert encode_stun(StunAnswer(v4[8:20], Endpoint("192.0.2.1", 32853))) == v4
    assert encode_stun(StunAnswer(v6[8:20], Endpoint("2001:db8:1234:5678:11:2233:4455:6677", 32853))) == v6


def test_a_request_with_attributes_that_may_be_ignored_is_one():
    software = bytes.fromhex("8022 0005 736861 6f6c 000000")
    request = REQUEST[:2] + len(software).to_bytes(2) + REQUEST[4:] + software
    assert decode_stun(request) == decode_stun(REQUEST) == StunRequest(REQUEST[8:])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        REQUEST[:-1],
        REQUEST + b"\0",
        REQUEST + bytes.fromhex("8022 0000"),  # more than its length says
        b"\0\2" + REQUEST[2:],
        REQUEST[:4] + b"\0\0\0\0" + REQUEST[8:],
        REQUEST[:2] + b"\0\4" + REQUEST[4:] + bytes.fromhex("0003 0000"),  # CHANGE-REQUEST must be understood
        REQUEST[:2] + b"\0\4" + REQUEST[4:] + bytes.fromhex("8022 ffff"),
        REQUEST[:2] + b"\x04\0" + REQUEST[4:] + bytes(1024),
        b"\1\1\0\x0c" + REQUEST[4:] + bytes.fromhex("0020 0008 0002a147e112a643"),
        b"\1\1" + REQUEST[2:],
    ],
)
def test_what_is_no_binding_message_is_none(data: bytes):
    assert decode_stun(data) is None


@given(st.one_of(st.binary(max_size=600), st.binary(max_size=80).map(lambda body: _wrapped(body))))
@example(b"\1\1" + REQUEST[2:])
def test_whatever_bytes_come_they_do_no_harm(data: bytes):
    message = decode_stun(data)
    if isinstance(message, StunAnswer):
        assert decode_stun(encode_stun(message)) == message


def _wrapped(body: bytes) -> bytes:
    return b"\1\1" + len(body).to_bytes(2) + REQUEST[4:] + body


def test_an_answer_is_hardly_longer_than_its_request():
    for ip, header_bytes in (("255.255.255.255", 28), ("2a00::1", 48)):
        answer = encode_stun(StunAnswer(REQUEST[8:], Endpoint(ip, 1)))
        assert len(answer) + header_bytes <= 1.5 * (len(REQUEST) + header_bytes)


# --- limits ---


def test_a_user_gets_a_few_answers_a_second_and_others_do_not_pay_for_it():
    limits = AnswerLimits()
    assert sum(limits.allow("5.1.0.2", 0) for _ in range(100)) == ANSWERS_BURST
    assert limits.allow("5.2.0.2", 0)
    assert sum(limits.allow("5.1.0.2", 2) for _ in range(100)) == 2 * ANSWERS_PER_S
    in_one_network = sum(limits.allow(f"2a00:1::{number:x}", 2) for number in range(100))
    assert in_one_network == ANSWERS_BURST


def test_many_false_addresses_take_no_memory_and_all_together_have_a_limit():
    limits = AnswerLimits()
    num_allowed = sum(limits.allow(f"5.{number >> 8}.{number & 255}.1", 0) for number in range(2 * MAX_USERS))
    assert num_allowed == 1000
    assert len(limits._users) == MAX_USERS


# --- on loopback ---


@pytest.mark.trio
async def test_a_peer_tells_how_it_sees_the_socket():
    async with (
        open_stun(0, None, answers=False, **LOOPBACK) as asker,
        open_stun(0, None, answers=True, **LOOPBACK) as b,
    ):
        assert await asker.ask(local(b)) == Endpoint("127.0.0.1", asker.port)
        assert b.statistics.num_answered == 1


@pytest.mark.trio
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")
async def test_both_families_are_asked_each_by_its_own_socket():
    async with open_stun(0, 0, answers=False, **LOOPBACK) as asker, open_stun(0, 0, answers=True, **LOOPBACK) as b:
        for family in Family:
            assert await asker.ask(local(b, family)) == local(asker, family)


@pytest.mark.trio
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")
async def test_a_node_may_have_ipv6_alone():
    async with open_stun(None, 0, answers=True, **LOOPBACK) as stun:
        assert stun.local(Family.IPV4) is None
        assert stun.port == local(stun, Family.IPV6).port
        with pytest.raises(StunError, match="no UDP socket for IPv4"):
            await stun.ask(Endpoint("127.0.0.1", 3478))


@pytest.mark.trio
async def test_a_question_to_a_family_without_a_socket_is_an_error_and_no_silence():
    async with open_stun(0, None, answers=False, **LOOPBACK) as stun:
        with pytest.raises(StunError, match="no UDP socket for IPv6"):
            await stun.ask(Endpoint("::1", 3478))
        with pytest.raises(StunError, match="not an endpoint"):
            await stun.ask(Endpoint("localhost", 3478))


@pytest.mark.trio
async def test_a_node_that_does_not_answer_is_silent_until_it_does():
    async with open_stun(0, None, answers=False, **LOOPBACK) as a, open_stun(0, None, answers=False, **LOOPBACK) as b:
        assert await a.ask(local(b), timeout_s=0.05) is None
        b.answers = True
        assert await a.ask(local(b)) is not None
        assert b.statistics.num_refused == 1


@pytest.mark.trio
async def test_a_question_that_is_lost_is_asked_again():
    server = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server:
        await server.bind(("127.0.0.1", 0))
        async with open_stun(0, None, answers=False, **LOOPBACK) as asker, trio.open_nursery() as nursery:

            async def answer_the_second() -> None:
                first, _ = await server.recvfrom(600)
                second, address = await server.recvfrom(600)
                assert first == second
                await server.sendto(encode_stun(StunAnswer(second[8:20], Endpoint("5.9.0.1", 7))), address)

            nursery.start_soon(answer_the_second)
            assert await asker.ask(Endpoint(*server.getsockname()), timeout_s=10) == Endpoint("5.9.0.1", 7)


@pytest.mark.trio
async def test_an_answer_counts_only_from_whom_was_asked():
    server = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stranger = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, stranger:
        await server.bind(("127.0.0.1", 0))
        async with open_stun(0, None, answers=False, **LOOPBACK) as asker, trio.open_nursery() as nursery:

            async def let_a_stranger_answer_first() -> None:
                request, address = await server.recvfrom(600)
                await stranger.sendto(encode_stun(StunAnswer(request[8:20], Endpoint("5.8.0.1", 1))), address)
                await server.sendto(encode_stun(StunAnswer(b"other number", Endpoint("5.8.0.1", 2))), address)
                await server.sendto(encode_stun(StunAnswer(request[8:20], Endpoint("5.9.0.1", 3))), address)

            nursery.start_soon(let_a_stranger_answer_first)
            assert await asker.ask(Endpoint(*server.getsockname()), timeout_s=10) == Endpoint("5.9.0.1", 3)
            assert asker.statistics.num_ignored == 2


@pytest.mark.trio
async def test_a_poke_arrives_and_tells_from_where():
    async with open_stun(0, None, answers=False, **LOOPBACK) as a, open_stun(0, None, answers=False, **LOOPBACK) as b:
        with a.expect(TOKEN, "127.0.0.1") as arrival:
            await b.poke(local(a), TOKEN, other_port=False)
            assert await arrival.wait(5) == local(b)
        with a.expect(TOKEN, "127.0.0.1") as arrival:
            await b.poke(local(a), TOKEN, other_port=True)
            source = await arrival.wait(5)
        assert source is not None
        assert (source.ip, source.port != b.port) == ("127.0.0.1", True)


@pytest.mark.trio
async def test_a_poke_counts_only_with_its_token_and_from_its_address():
    async with open_stun(0, None, answers=False, **LOOPBACK) as a, open_stun(0, None, answers=True, **LOOPBACK) as b:
        with a.expect(TOKEN, "127.0.0.1") as known, a.expect(TOKEN[::-1], "127.0.0.2") as elsewhere:
            await b.poke(local(a), bytes(16), other_port=False)
            await b.poke(local(a), TOKEN[::-1], other_port=False)
            await a.ask(local(b))  # comes back after the pokes, on the same way
            assert await known.wait(0) is None
            assert await elsewhere.wait(0) is None
        assert a.statistics.num_ignored == 6


@pytest.mark.trio
async def test_tokens_are_bounded():
    async with open_stun(0, None, answers=False, **LOOPBACK) as stun:
        with contextlib.ExitStack() as stack:
            for number in range(MAX_EXPECTED):
                stack.enter_context(stun.expect(number.to_bytes(16), "127.0.0.1"))
            with pytest.raises(StunError):
                stack.enter_context(stun.expect(TOKEN, "127.0.0.1"))
        with stun.expect(TOKEN, "127.0.0.1"), pytest.raises(StunError):
            await stun.poke(local(stun), b"short", other_port=False)


@pytest.mark.trio
async def test_whoever_was_sent_something_is_no_stranger():
    async with open_stun(0, None, answers=False, **LOOPBACK) as a, open_stun(0, None, answers=True, **LOOPBACK) as b:
        assert a.is_stranger("127.0.0.1")
        await b.poke(local(a), TOKEN, other_port=True)
        assert b.is_stranger("127.0.0.1")  # that port is gone, and what a NAT let in for it
        await a.ask(local(b))
        assert not a.is_stranger("127.0.0.1")
        assert not b.is_stranger("127.0.0.1")
        assert a.is_stranger("127.0.0.2")


@pytest.mark.trio
async def test_a_port_that_is_taken_is_replaced():
    async with (
        open_stun(0, None, answers=True, **LOOPBACK) as first,
        open_stun(first.port, None, answers=True, **LOOPBACK) as second,
    ):
        assert second.port != first.port
        assert await first.ask(local(second)) == local(first)


@pytest.mark.trio
async def test_without_any_address_there_is_an_error():
    with pytest.raises(StunError):
        async with open_stun(None, None, answers=True):
            pytest.fail("it opened")


@pytest.mark.trio
async def test_noise_does_not_end_a_node():
    noise = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with noise:
        async with open_stun(0, None, answers=True, **LOOPBACK) as a, open_stun(0, None, answers=True, **LOOPBACK) as b:
            for data in (b"", bytes(16), bytes(20), bytes(9000), REQUEST[:19], os.urandom(100)):
                await noise.sendto(data, ("127.0.0.1", b.port))
            assert await a.ask(local(b)) == local(a)
            assert b.statistics.num_ignored == 6


# --- through real NATs ---
#
#     node 10.0.0.2 ── 10.0.0.1 nat 5.9.0.1 ──┬── 5.1.0.2 a
#                                             └── 5.2.0.2 b

INPUT_RULES = 'chain to_itself { type filter hook input priority 0; iifname != "lan" drop; }'
NATS = {
    NatType.FULL_CONE: """
        chain inward { type nat hook prerouting priority -100; ip daddr 5.9.0.1 meta l4proto udp dnat to 10.0.0.2; }
        chain outward { type nat hook postrouting priority 100; ip saddr 10.0.0.2 snat to 5.9.0.1; }
    """,
    NatType.RESTRICTED: """
        set known { type ipv4_addr; flags dynamic; size 64; timeout 60s; }
        chain learn { type filter hook forward priority 0; iifname "lan" update @known { ip daddr }; }
        chain inward { type nat hook prerouting priority -100;
            ip daddr 5.9.0.1 ip saddr @known meta l4proto udp dnat to 10.0.0.2; }
        chain outward { type nat hook postrouting priority 100; ip saddr 10.0.0.2 snat to 5.9.0.1; }
    """,
    NatType.PORT_RESTRICTED: """
        chain outward { type nat hook postrouting priority 100; ip saddr 10.0.0.2 snat to 5.9.0.1; }
    """,
    NatType.SYMMETRIC: """
        chain outward { type nat hook postrouting priority 100;
            ip saddr 10.0.0.2 meta l4proto udp snat to 5.9.0.1:20000-60000 fully-random; }
    """,
    NatType.UDP_BLOCKED: """
        chain through { type filter hook forward priority 0; meta l4proto udp drop; }
        chain outward { type nat hook postrouting priority 100; ip saddr 10.0.0.2 snat to 5.9.0.1; }
    """,
    NatType.FIREWALL: """
        chain through { type filter hook forward priority 0; policy drop; iifname "lan" accept;
            ct state established accept; }
    """,
    NatType.NONE: "",
}
_CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets made in this block belong to a network namespace. Don't await anything that lets others make some."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open() as before, Path(f"/run/netns/{namespace}").open() as there:
        assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), _CLONE_NEWNET) == 0


@dataclass(frozen=True)
class Lab:
    """Names of the four namespaces."""

    node: str
    nat: str
    a: str
    b: str


def _do(*words: str, text: str | None = None) -> None:
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A node behind a router that has no rules yet, and two peers in networks of their own."""
    made = Lab(*(f"stun{os.getpid()}-{name}" for name in ("node", "nat", "a", "b")))
    try:
        _do("ip", "netns", "add", made.node)
    except (AssertionError, OSError) as error:
        pytest.skip(f"needs network namespaces: {error}")
    try:
        for name in (made.nat, made.a, made.b):
            _do("ip", "netns", "add", name)
        links = (
            (made.node, "lan", "10.0.0.1", "10.0.0.2"),
            (made.a, "to_a", "5.1.0.1", "5.1.0.2"),
            (made.b, "to_b", "5.2.0.1", "5.2.0.2"),
        )
        for host, link, router_ip, host_ip in links:
            _do("ip", "-n", made.nat, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", host)
            _do("ip", "-n", made.nat, "address", "add", f"{router_ip}/24", "dev", link)
            _do("ip", "-n", host, "address", "add", f"{host_ip}/24", "dev", "eth0")
            _do("ip", "-n", made.nat, "link", "set", link, "up")
            _do("ip", "-n", host, "link", "set", "eth0", "up")
            _do("ip", "-n", host, "route", "add", "default", "via", router_ip)
        _do("ip", "-n", made.nat, "address", "add", "5.9.0.1/32", "dev", "to_a")
        _do("ip", "netns", "exec", made.nat, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        yield made
    finally:
        for name in (made.node, made.nat, made.a, made.b):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


@contextlib.asynccontextmanager
async def stun_in(namespace: str, *, answers: bool):
    async with contextlib.AsyncExitStack() as stack:
        with inside(namespace):
            stun = await stack.enter_async_context(open_stun(4001, None, answers=answers))
        yield stun


async def find_out(lab: Lab, node_ip: str) -> NatKnowledge:
    """Do what a node does: ask A, be poked by B, which is a stranger, and by another port of A, then ask B."""
    ip_a, ip_b = "5.1.0.2", "5.2.0.2"
    peer_a, peer_b = (Signer(bytes([number]) * 32).peer_id for number in (1, 2))
    knowledge = NatKnowledge()
    knowledge.handle(AddressesChanged(frozenset({node_ip})), 0)
    async with (
        stun_in(lab.node, answers=False) as node,
        stun_in(lab.a, answers=True) as a,
        stun_in(lab.b, answers=True) as b,
    ):

        async def ask(peer: PeerId, ip: str) -> Endpoint | None:
            seen = await node.ask(Endpoint(ip, 4001), timeout_s=0.5)
            event = (
                Silent(by=peer, observer_ip=ip)
                if seen is None
                else Seen(protocol="udp", by=peer, observer_ip=ip, local=local(node), seen=seen)
            )
            knowledge.handle(event, 0)
            return seen

        async def be_poked(peer: PeerId, ip: str, stun: Stun, source: PokeSource, target: Endpoint) -> None:
            with node.expect(TOKEN, ip) as arrival:
                with inside(lab.a if stun is a else lab.b):
                    await stun.poke(target, TOKEN, other_port=source is PokeSource.OTHER_PORT)
                arrived = await arrival.wait(0.3) is not None
            knowledge.handle(Poked(by=peer, observer_ip=ip, source=source, target=target, arrived=arrived), 0)

        target = await ask(peer_a, ip_a)
        if target is not None:
            assert node.is_stranger(ip_b)
            await be_poked(peer_b, ip_b, b, PokeSource.STRANGER, target)
            await be_poked(peer_a, ip_a, a, PokeSource.OTHER_PORT, target)
        await ask(peer_b, ip_b)
    return knowledge


@pytest.mark.trio
@pytest.mark.parametrize("nat", NATS, ids=lambda nat: nat.replace(" ", "-"))
async def test_a_node_finds_out_what_its_nat_is(lab: Lab, nat: NatType):
    node_ip = "10.0.0.2"
    if nat in (NatType.NONE, NatType.FIREWALL):
        node_ip = "5.3.0.2"
        _do("ip", "-n", lab.nat, "address", "add", "5.3.0.1/24", "dev", "lan")
        _do("ip", "-n", lab.node, "address", "flush", "dev", "eth0")
        _do("ip", "-n", lab.node, "address", "add", "5.3.0.2/24", "dev", "eth0")
        _do("ip", "-n", lab.node, "route", "replace", "default", "via", "5.3.0.1")
    rules = f"table ip nat_lab {{\n{INPUT_RULES}\n{NATS[nat]}\n}}"
    _do("ip", "netns", "exec", lab.nat, "nft", "-f", "-", text=rules)
    report = (await find_out(lab, node_ip)).report(0)
    assert report.udp is nat, report.evidence
