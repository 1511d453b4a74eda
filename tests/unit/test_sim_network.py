"""The seeded network: what arrives, when, and what does not."""

from __future__ import annotations

import pytest

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.sim import Links, Network, Traffic

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


class Log:
    """Who was told what, and when."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.entries: list[tuple[float, object]] = []

    def __call__(self, what: object = None) -> None:
        self.entries.append((self.network.now, what))

    @property
    def whats(self) -> list[object]:
        return [what for _, what in self.entries]


def network_of(links: Links, *peers: PeerId, seed: int = 1) -> tuple[Network, Log]:
    network = Network(seed, links)
    for peer in peers:
        network.add(peer)
    return network, Log(network)


def test_a_message_takes_the_latency_of_its_pair_which_is_the_same_both_ways_and_every_time() -> None:
    links = Links(latency_s=0.05, latency_spread_s=0.1)
    network, log = network_of(links, A, B, C)
    assert 0.05 <= network.latency_s(A, B) <= 0.15
    assert network.latency_s(A, B) == network.latency_s(B, A) != network.latency_s(A, C)
    assert network.latency_s(A, B) == network_of(links, A, B)[0].latency_s(A, B)
    network.send(A, B, 10, log, "x")
    network.run(1.0)
    assert log.entries == [(network.latency_s(A, B), "x")]
    assert network.now == 1.0


def test_nothing_overtakes_on_a_link_whatever_the_jitter_and_what_is_sent_again() -> None:
    links = Links(latency_s=0.05, jitter_s=0.2, loss=0.3, resend_s=0.1)
    network, log = network_of(links, A, B)
    for number in range(200):
        network.at(number / 100, network.send, A, B, 10, log, number)
    network.run(60.0)
    assert log.whats == list(range(200))
    assert network.traffic().lost == 0


def test_what_is_lost_never_comes_and_is_counted() -> None:
    network, log = network_of(Links(loss=0.25), A, B)
    for number in range(2000):
        network.send(A, B, 10, log, number)
    network.run(60.0)
    lost = network.traffic(A).lost
    assert len(log.entries) == 2000 - lost
    assert 400 < lost < 600
    assert network.traffic(A) == Traffic(messages=2000, num_bytes=20_000, lost=lost)
    assert network.traffic(B) == Traffic(0, 0, 0)
    assert network.traffic() == network.traffic(A)


def test_an_uplink_sends_one_after_the_other_to_whomever() -> None:
    network = Network(1, Links(latency_s=0.0))
    network.add(A, uplink_bytes_per_s=1000)
    network.add(B)
    network.add(C)
    log = Log(network)
    network.send(A, B, 500, log, "b")
    network.send(A, C, 1000, log, "c")
    network.send(B, C, 10**9, log, "from b")
    network.run(10.0)
    assert log.entries == [(0.0, "from b"), (0.5, "b"), (1.5, "c")]


def test_a_killed_peer_sends_and_receives_nothing_and_its_timers_are_gone() -> None:
    network, log = network_of(Links(latency_s=0.05), A, B)
    network.send(A, B, 1, log, "on its way when B dies")
    network.at(0.5, log, "timer of B", of=B)
    network.at(0.5, log, "timer of nobody")
    network.wake(B, 0.5, log, "wake of B")
    network.kill(B)
    assert not network.is_alive(B)
    assert not network.can_reach(A, B)
    network.send(A, B, 1, log, "sent to the dead")
    network.send(B, A, 1, log, "sent by the dead")
    network.at(0.1, log, "timer of the dead", of=B)
    network.at(0.2, network.revive, B)
    network.at(0.3, network.send, A, B, 1, log, "to the living")
    network.run(1.0)
    assert log.whats == ["to the living", "timer of nobody"]
    assert network.traffic(A).lost == 1


def test_a_partition_loses_what_is_sent_across_it_until_it_heals() -> None:
    network, log = network_of(Links(latency_s=0.05), A, B, C)
    network.partition([[A]])
    assert network.can_reach(B, C)
    assert not network.can_reach(A, B)
    network.send(A, B, 1, log, "across")
    network.send(B, C, 1, log, "within")
    network.run(1.0)
    network.heal()
    network.send(A, B, 1, log, "healed")
    network.run(2.0)
    assert log.whats == ["within", "healed"]


def test_every_peer_has_a_clock_of_its_own() -> None:
    network = Network(1)
    network.add(A, clock_offset_s=100.0, clock_rate=2.0)
    network.add(B)
    log = Log(network)
    network.wake(A, 103.0, log, "a")
    network.wake(B, 1.0, log, "b")
    network.wake(A, 50.0, log, "past")
    network.run(2.0)
    assert log.entries == [(0.0, "past"), (1.0, "b"), (1.5, "a")]
    assert network.clock(A) == 104.0
    assert network.clock(B) == 2.0


def test_what_is_due_at_one_time_happens_in_the_order_in_which_it_was_asked_for() -> None:
    network, log = network_of(Links(), A)
    for number in range(100):
        network.at(1.0, log, number)
    assert network.num_waiting == 100
    while network.step():
        pass
    assert log.whats == list(range(100))
    assert network.num_events == 100
    assert network.num_waiting == 0


def test_the_same_seed_gives_the_same_run_and_another_gives_another() -> None:
    def run(seed: int) -> list[tuple[float, object]]:
        network, log = network_of(Links(0.05, 0.1, 0.02, 0.1), A, B, C, seed=seed)

        def gossip(source: PeerId, target: PeerId, number: int) -> None:
            log((target, number))
            if number < 200:
                other = network.rng.choice([peer for peer in (A, B, C) if peer != target])
                network.send(target, other, 10, gossip, target, other, number + 1)
                network.send(target, source, 10, gossip, target, source, number + 40)

        network.send(A, B, 1, gossip, A, B, 0)
        network.run(1000.0)
        return log.entries

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    "settings", [{"latency_s": -1.0}, {"loss": 1.0}, {"loss": -0.1}, {"jitter_s": -1.0}, {"resend_s": 0.0}]
)
def test_links_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Links(**settings)


def test_a_name_is_taken_once_and_rates_are_above_zero() -> None:
    network = Network(1)
    network.add(A)
    with pytest.raises(UsageError, match="already"):
        network.add(A)
    with pytest.raises(UsageError, match="above 0"):
        network.add(B, uplink_bytes_per_s=0)
    with pytest.raises(UsageError, match="above 0"):
        network.add(B, clock_rate=0)
