"""Pairs of real nodes one after the other: none leaves anything behind for the next; no punch in vain harms another.

They run when asked for: SHOAL_LAB=1 pytest tests/lab (root).
"""

import os
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.node.reach.punch import MARKED_S

from . import netns
from .net import Lab
from .nodes import LabNode, Relays, listen_addresses
from .run import PairRunner
from .sockets import dials, listener, port_of, tcp
from .stage import path_to, peer_of, wait_for_path, wait_until

REASON = netns.missing() if os.environ.get("SHOAL_LAB") == "1" else "the NAT lab's own tests run when SHOAL_LAB=1 asks"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

ROW = ("address_restricted", "port_restricted", "double", "udp_blocked")
PORT = 4001


LOST = """
table ip lost {{
    chain before {{
        type filter hook prerouting priority raw;
        iifname "lan*" ip daddr {to} drop
    }}
}}
"""
"""Has a router lose what goes to an address, before it takes note of it."""


@pytest.fixture
def lab():
    with Lab() as opened:
        yield opened


@pytest.fixture
def sockets():
    """What is put in here is closed with the test."""
    kept = []
    yield lambda *made: (kept.extend(made), made[0] if len(made) == 1 else made)[1]
    for sock in kept:
        sock.close()


# --- what is left behind ---


def processes_of(lab):
    """The processes whose profile is in this lab's folder."""
    wanted = f"SHOAL_HOME={lab.folder}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def test_address_restricted_sites_punch_one_pair_after_the_other_and_leave_nothing(lab):
    runner = PairRunner(lab, keep=False)
    before = set(netns.names(lab.prefix)), processes_of(lab), set(lab.sites)
    addresses = set()
    for other in ROW:
        result = runner.run("address_restricted", other)
        assert result.path == "punched", "\n".join((result.problem, *result.reasons))
        wait_until("the end of what ran", lambda: processes_of(lab) == before[1], 5)
        assert (set(netns.names(lab.prefix)), processes_of(lab), set(lab.sites)) == before
        fresh = lab.add("address_restricted")
        assert fresh.address not in addresses, "nobody gets what was meant for another"
        addresses.add(fresh.address)
        connections = netns.command("ip", "netns", "exec", fresh.routers[0], "conntrack", "-L")
        assert not connections, "a new router knows nobody"
        lab.remove(fresh)


# --- what a dial in vain leaves in a NAT ---


def connects(sock, address):
    """Begin to dial."""
    sock.setblocking(False)
    assert sock.connect_ex(address)


def stands(sock, timeout_s):
    """Whether a dial that has begun leads to a connection in time."""
    return bool(select.select([], [sock], [], timeout_s)[1]) and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@pytest.mark.parametrize("kind", ["address_restricted", "port_restricted"])
def test_after_a_dial_in_vain_the_same_two_ports_do_not_come_together_but_another_one_does(lab, sockets, kind):
    """The reason of `Marks`: what Linux does, as the router of many homes."""
    one, other = lab.add(kind), lab.add("port_restricted")
    sockets(listener(one, PORT), listener(other, PORT))
    alone = tcp(one, PORT)
    assert not dials(alone, (other.address, PORT), 0.5)
    alone.close()
    waiting = netns.command("ip", "netns", "exec", one.routers[0], "conntrack", "-L", "-p", "tcp")
    timeout_s = int(waiting.split()[2])
    assert "SYN_SENT" in waiting
    assert 100 < timeout_s < MARKED_S
    late = sockets(tcp(other, PORT))
    connects(late, (one.address, PORT))
    assert not stands(late, 2), "it is let in, and the answer to it is dropped"
    late.close()
    spare, again = sockets(tcp(one), tcp(other, PORT))
    connects(again, (one.address, port_of(spare)))
    connects(spare, (other.address, PORT))
    assert stands(again, 3)
    assert stands(spare, 3)


def test_nodes_whose_first_punch_was_in_vain_come_together_by_the_next(lab):
    """The first fails since the packets of one end are lost; the other's NAT remembers that."""
    relays = Relays(lab)
    sites = [lab.add("port_restricted"), lab.add("udp_blocked")]
    a, b = nodes = [LabNode(site.hosts[0], lab.folder, site.name) for site in sites]
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda node, site: node.up(listen=listen_addresses(site), bootstrap=relays.addresses()), nodes, sites
            )
        )
    for node in nodes:
        node.wait_until_reachable()
    netns.nft(sites[1].routers[0], LOST.format(to=sites[0].address))
    with a.client() as at_a, b.client() as at_b:
        at_a.ping(b.peer_id)
        assert path_to(at_a, b.peer_id) == "relayed"

        def was_in_vain():
            known = peer_of(at_b, a.peer_id)
            return known is not None and any("came through" in (each.failure or "") for each in known.tried)

        wait_until("a punch in vain", was_in_vain, 10)
        netns.nft(sites[1].routers[0], "delete table ip lost")
        began = time.monotonic()
        wait_for_path(at_a, b.peer_id, "punched")
        assert time.monotonic() - began < 10, "by the very next try, not by one much later"
