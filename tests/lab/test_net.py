"""Each kind of site behaves as its name says: shown with plain sockets, without any node.

They run when asked for: SHOAL_LAB=1 pytest tests/lab (root).
"""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from . import netns
from .expected import expected
from .net import Lab
from .rules import KINDS
from .sockets import (
    arrives,
    dials,
    is_silent,
    listener,
    port_of,
    punch_tcp,
    punch_udp,
    seen_udp,
    tcp,
    tcp_puncher,
    udp,
    udp_puncher,
    wait_until_passed,
)

REASON = netns.missing() if os.environ.get("SHOAL_LAB") == "1" else "the NAT lab's own tests run when SHOAL_LAB=1 asks"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

SO_RCVBUFFORCE = 33

IPV4_NATS = [kind for kind in KINDS if kind not in ("open", "ipv6_only")]
WITH_UDP = [kind for kind in IPV4_NATS if kind not in ("udp_blocked", "tcp443_only")]
WITH_TCP = [kind for kind in IPV4_NATS if kind != "tcp443_only"]


def crossed(kinds):
    return [(one, other) for number, one in enumerate(kinds) for other in kinds[number:]]


class World:
    """A lab with two public hosts, and two sites of each kind."""

    def __init__(self, lab):
        self.lab = lab
        self.relay, self.other_relay = lab.add("open"), lab.add("open")
        self.one = {kind: lab.add(kind) for kind in KINDS}
        self.another = {kind: lab.add(kind) for kind in KINDS}
        self.hairpin, self.same_lan = lab.add("hairpin"), lab.add("same_lan")


@pytest.fixture(scope="module")
def world():
    with Lab(delay_ms=2) as lab:
        yield World(lab)


@pytest.fixture
def sockets():
    """What is put in here is closed with the test."""
    kept = []
    yield lambda *made: (kept.extend(made), made[0] if len(made) == 1 else made)[1]
    for sock in kept:
        sock.close()


# --- mapping and filtering ---


@pytest.mark.parametrize("kind", WITH_UDP)
def test_every_nat_but_the_symmetric_one_shows_everyone_the_same_udp_port(world, sockets, kind):
    site = world.one[kind]
    inner, near, far = sockets(udp(site), udp(world.relay), udp(world.other_relay))
    first, second = seen_udp(inner, near, world.relay.address), seen_udp(inner, far, world.other_relay.address)
    assert first[0] == second[0] == site.address
    if kind == "symmetric":
        assert len({first[1], second[1], port_of(inner)}) == 3
    else:
        assert first[1] == second[1] == port_of(inner)


@pytest.mark.parametrize("kind", WITH_TCP)
def test_every_nat_but_the_symmetric_one_shows_everyone_the_same_tcp_port(world, sockets, kind):
    site = world.one[kind]
    seen = set()
    inner = 0
    for relay in (world.relay, world.other_relay):
        door, sock = sockets(listener(relay), tcp(site, inner))
        inner = port_of(sock)
        sock.connect((relay.address, port_of(door)))
        accepted, outside = door.accept()
        sockets(accepted)
        seen.add(outside)
    expected_ports = 2 if kind == "symmetric" else 1
    assert {ip for ip, _ in seen} == {site.address}
    assert len({port for _, port in seen}) == expected_ports
    assert (inner in {port for _, port in seen}) == (kind != "symmetric")


@pytest.mark.parametrize("kind", WITH_UDP)
def test_a_nat_lets_udp_in_from_whom_its_name_says(world, sockets, kind):
    site, ip = world.one[kind], world.relay.address
    inner, spoken_to, other_port, stranger = sockets(
        udp(site), udp(world.relay), udp(world.relay), udp(world.other_relay)
    )
    outside = seen_udp(inner, spoken_to, ip)
    other_port.sendto(b"other port", outside)
    stranger.sendto(b"stranger", outside)
    wait_until_passed(stranger, spoken_to, ip)
    spoken_to.sendto(b"spoken to", outside)  # the link keeps the order, so it comes last
    got = [inner.recv(64)]
    while got[-1] != b"spoken to":
        got.append(inner.recv(64))
    lets_in = {"full_cone": [b"other port", b"stranger"], "address_restricted": [b"other port"]}
    assert sorted(got[:-1]) == lets_in.get(kind, [])


@pytest.mark.parametrize("kind", WITH_TCP)
def test_a_nat_lets_tcp_in_from_whom_its_name_says(world, sockets, kind):
    door = sockets(listener(world.relay))
    host = tcp_puncher(world.one[kind], door, world.relay.address)
    sockets(host.sock, *host.kept)
    from_other_port, stranger = sockets(tcp(world.relay), tcp(world.other_relay))
    assert dials(from_other_port, host.outside, 0.5) == (kind in ("full_cone", "address_restricted"))
    assert dials(stranger, host.outside, 0.5) == (kind == "full_cone")


def test_an_open_host_takes_what_anyone_sends_over_ipv4_and_ipv6(world, sockets):
    site = world.one["open"]
    for ipv6, address in ((False, site.address), (True, site.address6)):
        door, near = sockets(listener(site, ipv6=ipv6), tcp(world.another["open"], ipv6=ipv6))
        assert dials(near, (address, port_of(door)))
    behind_firewall = sockets(tcp(world.one["ipv6_only"], ipv6=True))
    assert dials(behind_firewall, (site.address6, port_of(door)))


# --- hole punching: what the table of expectations stands on ---


@pytest.mark.parametrize(("one", "other"), crossed([kind for kind in WITH_UDP if kind != "upnp"]))
def test_holes_are_punched_by_udp_in_just_those_pairs_where_it_is_expected(world, sockets, one, other):
    observer = sockets(udp(world.relay))
    ends = [udp_puncher(site, observer, world.relay.address) for site in (world.one[one], world.another[other])]
    sockets(*(end.sock for end in ends))
    assert punch_udp(*ends) == ("webrtc" in expected(one, other).paths)


@pytest.mark.parametrize(("one", "other"), crossed([kind for kind in WITH_TCP if kind != "upnp"]))
def test_holes_are_punched_by_tcp_in_just_those_pairs_where_it_is_expected(world, sockets, one, other):
    observer = sockets(listener(world.relay))
    ends = [tcp_puncher(site, observer, world.relay.address) for site in (world.one[one], world.another[other])]
    for end in ends:
        sockets(end.sock, *end.kept)
    assert punch_tcp(*ends) == ("punched" in expected(one, other).paths)


def test_holes_are_punched_between_two_ipv6_firewalls_that_let_no_stranger_in(world, sockets):
    sites = world.one["ipv6_only"], world.another["ipv6_only"]
    observer, stranger = sockets(udp(world.relay, ipv6=True), udp(world.other_relay, ipv6=True))
    one, other = (udp_puncher(site, observer, world.relay.address6, ipv6=True) for site in sites)
    sockets(one.sock, other.sock)
    assert one.outside == (sites[0].address6, port_of(one.sock))
    stranger.sendto(b"stranger", one.outside)
    wait_until_passed(stranger, observer, world.relay.address6)
    observer.sendto(b"observer", one.outside)
    assert not arrives(one.sock, b"stranger", b"observer")
    assert punch_udp(one, other)
    door = sockets(listener(world.relay, ipv6=True))
    ends = [tcp_puncher(site, door, world.relay.address6, ipv6=True) for site in sites]
    for end in ends:
        sockets(end.sock, *end.kept)
    assert not dials(sockets(tcp(world.other_relay, ipv6=True)), ends[0].outside, 0.5)
    assert punch_tcp(*ends)


# --- the special kinds ---


def test_no_udp_passes_where_it_is_blocked(world, sockets):
    site = world.one["udp_blocked"]
    observer, door = sockets(udp(world.relay), listener(world.relay))
    sockets(udp(site)).sendto(b"blocked", (world.relay.address, port_of(observer)))
    assert dials(sockets(tcp(site)), (world.relay.address, port_of(door)))  # it left later, and has arrived
    assert is_silent(observer)


def test_nothing_but_tcp_443_passes_where_only_that_may(world, sockets):
    site = world.one["tcp443_only"]
    door, other_door, observer = sockets(listener(world.relay, 443), listener(world.relay), udp(world.relay, 443))
    assert not dials(sockets(tcp(site)), (world.relay.address, port_of(other_door)), 0.5)
    sockets(udp(site)).sendto(b"blocked", (world.relay.address, 443))
    assert dials(sockets(tcp(site)), (world.relay.address, port_of(door)))  # it left later, and has arrived
    assert is_silent(observer)


def test_an_ipv6_only_host_has_no_ipv4_beyond_loopback(world):
    site = world.one["ipv6_only"]
    addresses = json.loads(site.run("ip", "-j", "-4", "address").stdout)
    assert {link["ifname"] for link in addresses if link.get("addr_info")} == {"lo"}
    assert not site.run("ip", "-4", "route").stdout


def test_two_lans_behind_a_hairpin_reach_each_other_by_the_public_address_alone(world, sockets):
    site = world.hairpin
    observer, stranger = sockets(udp(world.relay), udp(world.other_relay))
    ends = [udp_puncher(site, observer, world.relay.address, host=host) for host in (0, 1)]
    one, other = sockets(*(end.sock for end in ends))
    assert [end.outside for end in ends] == [(site.address, port_of(one)), (site.address, port_of(other))]
    one.sendto(b"straight", (site.hosts[1].address, port_of(other)))
    one.sendto(b"by the public address", ends[1].outside)
    assert not arrives(other, b"straight", b"by the public address")
    other.sendto(b"again", ends[0].outside)
    assert one.recvfrom(64) == (b"again", ends[1].outside)
    stranger.sendto(b"stranger", ends[0].outside)
    assert one.recv(64) == b"stranger"  # it is a full cone as well
    door = sockets(listener(world.relay))
    callee = tcp_puncher(site, door, world.relay.address, host=1)
    sockets(callee.sock, *callee.kept)
    assert not dials(sockets(tcp(site)), (site.hosts[1].address, callee.outside[1]), 0.5)
    assert dials(sockets(tcp(site)), callee.outside)


def test_two_hosts_on_one_lan_reach_each_other_at_once_and_both_reach_the_internet(world, sockets):
    site = world.same_lan
    door = sockets(listener(site, host=1))
    assert dials(sockets(tcp(site)), (site.hosts[1].address, port_of(door)))
    observer = sockets(udp(world.relay))
    for host in (0, 1):
        assert seen_udp(sockets(udp(site, host=host)), observer, world.relay.address)[0] == site.address


# --- a router that maps ports when asked to ---


def test_a_upnp_router_maps_a_port_by_nat_pmp_and_then_lets_anyone_in(world, sockets):
    site = world.one["upnp"]
    door, stranger, asking = sockets(listener(site, 4001), tcp(world.relay), udp(site))
    assert not dials(stranger, (site.address, 4001), 0.5)
    request = struct.pack("!BBHHHI", 0, 2, 0, 4001, 4001, 3600)  # RFC 6886: map TCP
    answer = ask(asking, request, (site.hosts[0].address.rpartition(".")[0] + ".1", 5351))
    version, operation, result, _, inner, outer, lifetime_s = struct.unpack("!BBHIHHI", answer)
    assert (version, operation, result, inner) == (0, 130, 0, 4001)
    assert lifetime_s > 0
    assert dials(sockets(tcp(world.relay)), (site.address, outer))
    sockets(door.accept()[0])


def test_a_upnp_router_answers_who_looks_for_one(world, sockets):
    site = world.one["upnp"]
    search = (
        'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\n'
        "ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"
    )
    answer = ask(sockets(udp(site)), search.encode(), ("239.255.255.250", 1900)).decode()
    assert answer.startswith("HTTP/1.1 200 OK")
    assert "http://192.168.1.1:" in answer


def ask(sock, request, address):
    """Ask as clients do, several times: the daemon may be just starting."""
    sock.settimeout(0.5)
    for _ in range(10):
        sock.sendto(request, address)
        try:
            return sock.recv(2048)
        except (TimeoutError, ConnectionRefusedError):
            time.sleep(0.1)
    pytest.fail(f"nobody answers at {address}")


# --- what the link does, and what can befall a site ---


@pytest.fixture
def small():
    with Lab() as lab:
        yield lab, lab.add("open"), lab.add("port_restricted")


def test_a_round_trip_between_two_sites_takes_four_access_delays(small, sockets):
    _, relay, site = small
    inner, observer = sockets(udp(site), udp(relay))
    seen_udp(inner, observer, relay.address)
    round_trips = []
    for _ in range(5):
        began = time.monotonic()
        observer.sendto(b"echo", seen_udp(inner, observer, relay.address))
        inner.recv(64)
        round_trips.append(time.monotonic() - began)
    assert 0.050 <= min(round_trips) < 0.060


def test_a_link_carries_its_rate_and_no_more(small, sockets):
    lab, relay, site = small
    rate, size = 5e6, 10_000_000
    lab.set_link(site, rate=rate, delay_ms=1)
    lab.set_link(relay, delay_ms=1)
    door, sock = sockets(listener(relay), tcp(site))
    sock.connect((relay.address, port_of(door)))
    accepted = sockets(door.accept()[0])
    sender = threading.Thread(target=lambda: (sock.sendall(b"\0" * size), sock.shutdown(socket.SHUT_WR)))
    began = time.monotonic()
    sender.start()
    received = 0
    while data := accepted.recv(1 << 20):
        received += len(data)
    took_s = time.monotonic() - began
    sender.join()
    assert received == size
    assert 0.5 * rate < size / took_s < rate


def test_a_link_loses_what_it_is_told_to_lose(small, sockets):
    lab, relay, site = small
    lab.set_link(site, loss=0.2)
    inner, observer = sockets(udp(site), udp(relay))
    observer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)  # as many packets as are sent, whoever reads when
    for _ in range(1000):
        inner.sendto(b"x", (relay.address, port_of(observer)))
    up = lab.count(site)["up"]
    while up["packets"] + up["dropped"] < 1000:
        up = lab.count(site)["up"]
    lab.set_link(site, loss=0.0)
    inner.sendto(b"last", (relay.address, port_of(observer)))
    arrived = 0
    while observer.recv(64) != b"last":
        arrived += 1
    assert arrived == 1000 - up["dropped"]
    assert 740 <= arrived <= 860  # the chance is seeded; four and a half standard deviations


def test_nothing_passes_in_a_black_out_and_connections_live_on_after_it(small, sockets):
    lab, relay, site = small
    inner, observer = sockets(udp(site), udp(relay))
    outside = seen_udp(inner, observer, relay.address)
    lab.black_out(site)
    inner.sendto(b"lost", (relay.address, port_of(observer)))
    observer.sendto(b"lost", outside)
    inner.settimeout(0.3)
    with pytest.raises(TimeoutError):
        inner.recv(64)
    lab.come_back(site)
    assert seen_udp(inner, observer, relay.address) == outside
    observer.sendto(b"back", outside)
    assert inner.recv(64) == b"back"


def test_a_flushed_nat_lets_nobody_in_until_the_host_speaks_again(world, sockets):
    for kind in ("full_cone", "address_restricted", "port_restricted", "symmetric", "double"):
        site = world.another[kind]
        inner, observer = sockets(udp(site), udp(world.relay))
        outside = seen_udp(inner, observer, world.relay.address)
        world.lab.flush_nat(site)
        observer.sendto(b"forgotten", outside)
        later = sockets(udp(site))
        observer.sendto(b"overtakes nobody", seen_udp(later, observer, world.relay.address))
        later.recv(64)
        again = seen_udp(inner, observer, world.relay.address)
        observer.sendto(b"again", again)
        assert not arrives(inner, b"forgotten", b"again"), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_that_moves_has_other_addresses_and_is_reached_at_them_alone(world, sockets, kind):
    site = world.another[kind]
    before, inner_before, ipv6 = (site.address, site.address6), site.hosts[0].address, not site.has_ipv4
    world.lab.change_address(site)
    assert site.hosts[0].address != inner_before
    assert (site.address, site.address6) != before
    relay_ip = world.relay.address6 if ipv6 else world.relay.address
    door, sock = sockets(listener(world.relay, 443, ipv6=ipv6), tcp(site, ipv6=ipv6))
    assert dials(sock, (relay_ip, 443))
    accepted, outside = door.accept()
    sockets(accepted)
    assert outside[0] == (site.address6 if ipv6 else site.address)
    assert before[0] not in site.run("ip", "address").stdout


# --- the host's own network ---


def own_network():
    commands = ("address", "route show table all", "-6 route show table all", "rule", "-6 rule")
    shown = [json.loads(netns.command("ip", "-j", *words.split()) or "[]") for words in commands]
    for link in shown[0]:
        for address in link["addr_info"]:
            address.pop("valid_life_time", None)
            address.pop("preferred_life_time", None)
    return shown


def test_the_hosts_own_network_is_never_touched(world, tmp_path):
    before = own_network()
    with Lab() as lab:
        for kind in ("open", "full_cone", "double", "same_lan", "hairpin", "upnp"):
            lab.add(kind)
        assert own_network() == before
        names = netns.names(lab.prefix)
    assert not set(names) & set(netns.names())
    assert own_network() == before


def test_a_site_that_is_removed_takes_its_processes_along(small):
    lab, _, site = small
    sleeper = site.popen("sleep", "1000")
    namespaces = site.namespaces
    lab.remove(site)
    assert sleeper.wait(timeout=5) == -signal.SIGKILL
    assert not set(namespaces) & set(netns.names())


def test_a_lab_whose_owner_was_killed_is_cleaned_up_afterwards(world):
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from lab.net import Lab\n"
        "with Lab() as lab:\n"
        "    site = lab.add('upnp'); sleeper = site.popen('sleep', '1000')\n"
        "    print(lab.prefix, sleeper.pid, flush=True); time.sleep(1000)\n"
    )
    folder = Path(__file__).parent
    owner = subprocess.Popen([sys.executable, "-c", program, str(folder.parent)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    prefix, sleeper = owner.stdout.readline().split()
    sleeper_end = os.pidfd_open(int(sleeper))
    owner.kill()
    owner.wait()
    owner.stdout.close()  # the sleeper holds the other end
    assert netns.names(prefix)
    subprocess.run([sys.executable, str(folder / "netns.py"), "clean"], check=True, capture_output=True)
    assert not netns.names(prefix)
    assert netns.names(world.lab.prefix), "the lab of this test run has an owner"
    assert select.select([sleeper_end], [], [], 5)[0], "what ran in it has ended"
    os.close(sleeper_end)
