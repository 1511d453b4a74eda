"""Of what anybody may write into the DHT only what could be a node counts, and what is held is announced in time."""

from __future__ import annotations

import random

import base58
import pytest

from shoal.dht.providers import (
    MAX_ADDRESS_CHARS,
    MAX_PROVIDER_ADDRESSES,
    MAX_PROVIDERS,
    Announce,
    Announced,
    Announcer,
    AnnounceTimes,
    PeerCame,
    ProviderRecord,
    Tick,
    Wake,
    providers_of,
)
from shoal.protocol.signing import Signer

ME, A, B, RELAY = [Signer(number.to_bytes(32)).peer_id for number in range(1, 5)]
ADDRESS = "/ip4/5.1.0.2/tcp/4001"
SECP256K1 = base58.b58encode(bytes([0x00, 0x25, 0x08, 0x02, 0x12, 0x21, 0x02]) + bytes(32)).decode()
RSA = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize("name", [SECP256K1, RSA, "", "12D3KooW", f" {A}", "ä", "1" * 100_000])
def test_a_record_whose_name_no_node_can_have_costs_nobody_elses(name: str) -> None:
    records = [ProviderRecord(name, [ADDRESS]), ProviderRecord(A, [ADDRESS]), ProviderRecord(name, [ADDRESS])]
    assert providers_of(records, ME) == {A: (f"{ADDRESS}/p2p/{A}",)}


def test_this_node_and_peers_without_addresses_are_left_out() -> None:
    assert providers_of([ProviderRecord(ME, [ADDRESS]), ProviderRecord(A, [])], ME) == {}


def test_a_peer_that_several_name_is_there_once_with_all_its_addresses() -> None:
    circuit = f"/ip4/5.1.0.9/tcp/1/p2p/{RELAY}/p2p-circuit"
    records = [
        ProviderRecord(A, [ADDRESS, f"{ADDRESS}/p2p/{A}"]),
        ProviderRecord(B, [ADDRESS]),
        ProviderRecord(A, [circuit, f"{circuit}/p2p/{A}"]),
    ]
    found = providers_of(records, ME)
    assert list(found) == [A, B]
    assert found[A] == (f"{ADDRESS}/p2p/{A}", f"{circuit}/p2p/{A}")


@pytest.mark.parametrize(
    "address",
    [f"{ADDRESS}/p2p/{B}", f"/ip4/1.2.3.4/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{B}", "tcp", "/x\n", "/" + "a" * 400],
)
def test_an_address_of_somebody_else_or_of_nobody_is_left_out(address: str) -> None:
    assert providers_of([ProviderRecord(A, [address])], ME) == {}
    assert providers_of([ProviderRecord(A, [address, ADDRESS])], ME) == {A: (f"{ADDRESS}/p2p/{A}",)}


def test_peers_and_addresses_are_bounded() -> None:
    names = [Signer(number.to_bytes(32)).peer_id for number in range(100, 100 + 2 * MAX_PROVIDERS)]
    many = [f"/ip4/5.1.0.{number}/tcp/1" for number in range(200)]
    found = providers_of([ProviderRecord(name, many) for name in [*names, *names]], ME)
    assert list(found) == names[:MAX_PROVIDERS]
    assert {len(addresses) for addresses in found.values()} == {MAX_PROVIDER_ADDRESSES}


@pytest.mark.parametrize("seed", range(50))
def test_no_record_whatever_is_in_it_makes_a_lookup_fail(seed: int) -> None:
    rng = random.Random(seed)
    words = [A, B, ME, SECP256K1, "/p2p/", "/p2p-circuit", ADDRESS, "/", "\0", "\udcff", "é", "x" * 500]

    def text() -> str:
        return "".join(rng.choice(words) for _ in range(rng.randrange(4)))

    records = [ProviderRecord(text(), [text() for _ in range(rng.randrange(5))]) for _ in range(40)]
    for peer, addresses in providers_of(records, ME).items():
        assert peer != ME, seed
        assert all(each.endswith(f"/p2p/{peer}") and len(each) <= MAX_ADDRESS_CHARS + 60 for each in addresses), seed


# --- announcing ---

TIMES = AnnounceTimes(interval_s=60, retry_s=5, pause_s=1)


def test_it_is_announced_at_once_and_then_ever_again() -> None:
    announcer = Announcer(TIMES)
    assert announcer.handle(Tick(), 100.0) == Announce()
    assert announcer.handle(Announced(is_taken=True), 102.0) == Wake(162.0)
    assert announcer.handle(Tick(), 130.0) == Wake(162.0)
    assert announcer.handle(Tick(), 162.0) == Announce()


def test_where_nobody_took_it_it_is_tried_again_soon() -> None:
    announcer = Announcer(TIMES)
    announcer.handle(Tick(), 100.0)
    assert announcer.handle(Announced(is_taken=False), 100.0) == Wake(105.0)


def test_a_peer_that_comes_is_told_soon_and_those_that_come_with_it_do_not_put_it_off() -> None:
    announcer = Announcer(TIMES)
    announcer.handle(Tick(), 0.0)
    announcer.handle(Announced(is_taken=True), 0.0)
    assert announcer.handle(PeerCame(), 10.0) == Wake(11.0)
    assert announcer.handle(PeerCame(), 10.9) == Wake(11.0)
    assert announcer.handle(Tick(), 11.0) == Announce()


def test_a_peer_that_comes_just_before_the_next_time_puts_nothing_off() -> None:
    announcer = Announcer(TIMES)
    announcer.handle(Tick(), 0.0)
    announcer.handle(Announced(is_taken=True), 0.0)
    assert announcer.handle(PeerCame(), 59.5) == Wake(60.0)
