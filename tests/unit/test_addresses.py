"""What a multiaddr says by itself: nothing that a peer may write in one is mistaken for an endpoint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node.mesh.addresses import (
    dialable,
    endpoint,
    full_address,
    ip_of,
    ip_port,
    is_global,
    is_loopback,
    network_of,
    tcp_address,
)
from shoal.node.mesh.endpoint import Endpoint
from shoal.node.mesh.interfaces import local_ips
from shoal.protocol.signing import Signer

ANN, BOB = (Signer(bytes([seed]) * 32).peer_id for seed in (1, 2))


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("/ip4/192.0.2.1/tcp/4001", ("192.0.2.1", 4001)),
        (f"/ip4/192.0.2.1/tcp/4001/p2p/{ANN}", ("192.0.2.1", 4001)),
        ("/ip6/2001:db8::1/tcp/443", ("2001:db8::1", 443)),
        (f"/ip4/192.0.2.1/tcp/1/p2p/{ANN}/p2p-circuit/p2p/{BOB}", ("192.0.2.1", 1)),
    ],
)
def test_ip_and_port_are_those_that_an_address_begins_with(address: str, found: tuple[str, int]) -> None:
    assert ip_port(address) == found
    assert ip_of(address) == found[0]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "ip4/192.0.2.1/tcp/1",
        "/dns4/example.org/tcp/1",
        "/ip4/192.0.2.1/udp/1/quic-v1",
        "/ip4/192.0.2.1/tcp",
        "/ip4/192.0.2.1/tcp/",
        "/ip4/192.0.2.1/tcp/-1",
        "/ip4/192.0.2.1/tcp/0",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/99999999999999999999",
        "/ip4/192.0.2.1/tcp/x",
        "/ip4/192.0.2.1/tcp/²",
        "/ip4/localhost/tcp/1",
        "/ip4/192.0.2/tcp/1",
        "/ip4/2001:db8::1/tcp/1",
        "/ip6/192.0.2.1/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1",
        f"/p2p/{ANN}",
    ],
)
def test_what_can_not_be_dialed_has_no_ip_and_port(address: str) -> None:
    assert ip_port(address) is None
    assert ip_of(address) == ""


@given(st.text(max_size=80) | st.builds("/ip4/{}/tcp/{}".format, st.text(max_size=20), st.text(max_size=20)))
def test_no_text_of_a_peer_breaks_anything(text: str) -> None:
    found = ip_port(text)
    assert found is None or endpoint(*found) is not None or found[0] in ("0.0.0.0", "::")
    assert ip_of(text) == (found[0] if found else "")
    assert dialable([text]) == ([text] if found and "/p2p-circuit" not in text else [])
    assert not (is_global(text) and is_loopback(text))
    assert isinstance(network_of(text), str)


def test_the_name_of_the_peer_is_there_once() -> None:
    plain = "/ip4/192.0.2.1/tcp/1"
    assert full_address(plain, ANN) == full_address(f"{plain}/p2p/{ANN}", ANN) == f"{plain}/p2p/{ANN}"
    assert full_address(f"{plain}/p2p/{ANN}/p2p-circuit", BOB) == f"{plain}/p2p/{ANN}/p2p-circuit/p2p/{BOB}"


@pytest.mark.parametrize("found", [("192.0.2.1", 4001), ("2001:db8::1", 443)])
def test_an_endpoint_makes_an_address_and_back(found: tuple[str, int]) -> None:
    assert ip_port(tcp_address(*found)) == found
    assert endpoint(*found) == Endpoint(*found)


@pytest.mark.parametrize(("ip", "port"), [("x", 1), ("192.0.2.1", 0), ("192.0.2.1", 65536), ("0.0.0.0", 1), ("", 1)])
def test_what_is_no_endpoint_is_none(ip: str, port: int) -> None:
    assert endpoint(ip, port) is None


@pytest.mark.parametrize(
    ("ip", "is_of_the_internet", "is_this_machine"),
    [
        ("1.1.1.1", True, False),
        ("2606:4700::1111", True, False),
        ("10.0.0.1", False, False),
        ("100.64.0.1", False, False),
        ("192.168.1.1", False, False),
        ("fd00::1", False, False),
        ("127.0.0.1", False, True),
        ("127.9.9.9", False, True),
        ("::1", False, True),
        ("", False, False),
        ("example.org", False, False),
    ],
)
def test_an_ip_belongs_to_the_internet_a_network_or_this_machine(
    ip: str, is_of_the_internet: bool, is_this_machine: bool
) -> None:
    assert (is_global(ip), is_loopback(ip)) == (is_of_the_internet, is_this_machine)


def test_addresses_of_one_provider_count_as_one_network() -> None:
    assert network_of("198.51.100.7") == network_of("198.51.7.100") != network_of("198.52.100.7")
    assert network_of("2001:db8:1::1") == network_of("2001:db8:2::1") != network_of("2001:db9::1")
    assert network_of("example.org") == "example.org"


def test_the_internets_address_of_each_family_goes_first_and_no_circuit_counts() -> None:
    home, internet, six = "/ip4/192.168.1.5/tcp/1", "/ip4/1.1.1.1/tcp/2", "/ip6/fd00::1/tcp/1"
    circuit = f"/ip4/9.9.9.9/tcp/1/p2p/{ANN}/p2p-circuit/p2p/{BOB}"
    assert sorted(dialable([circuit, home, six, internet])) == sorted([internet, six])
    assert dialable([home]) == [home]
    assert dialable([circuit, "/dns4/example.org/tcp/1"]) == []


def test_this_machine_has_addresses() -> None:
    ips = local_ips()
    assert any(is_loopback(ip) for ip in ips)
    assert not any(ip.startswith(("fe80:", "169.254.")) for ip in ips)
