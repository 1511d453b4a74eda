"""A process is not woken for what can wait: looks share a wake, and who is heard is not called to see if it lives."""

from __future__ import annotations

import ifaddr
import pytest
import trio
import trio.testing

from shoal.node.mesh import interfaces, keepalive
from shoal.node.signals import about
from shoal.protocol.ids import PeerId

pytestmark = pytest.mark.trio

BOB = PeerId("bob")


class Heard:
    """As much of `shoal.node.wire.links.Links` as tells when a peer was heard."""

    def __init__(self, until: float) -> None:
        self.until = until

    def heard_at(self, peer: PeerId) -> float:
        """Bob says something all the time, until he falls silent."""
        return min(trio.current_time(), self.until)


async def test_looks_that_begin_at_different_times_are_made_at_the_same(
    mock_clock: trio.testing.MockClock,
) -> None:
    wakes = set()
    for begin in (0.0, 0.1, 0.3):
        mock_clock.jump(begin)
        wakes |= {about(1.0) % 1, about(2.0) % 1, about(5.0) % 1}
        assert all(abs(about(seconds) - trio.current_time() - seconds) <= 0.5 for seconds in (1.0, 2.0, 5.0))
    assert wakes == {0.0}


async def test_a_short_look_is_made_in_time(mock_clock: trio.testing.MockClock) -> None:
    mock_clock.jump(0.3)
    assert about(0.25) == trio.current_time() + 0.25


async def test_a_peer_that_fell_silent_is_called_as_soon_as_ever(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    await keepalive._quiet(BOB, Heard(began + 7.3), began + keepalive.MEASURE_S)  # type: ignore[arg-type]
    assert abs(trio.current_time() - began - 7.3 - keepalive.KEEPALIVE_INTERVAL_S) <= 0.5


async def test_one_that_is_heard_is_called_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    await keepalive._quiet(BOB, Heard(began + 3600), began + keepalive.MEASURE_S)  # type: ignore[arg-type]
    assert abs(trio.current_time() - began - keepalive.MEASURE_S) <= 0.5


async def test_the_interfaces_are_asked_for_their_addresses_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: asked.append(1) or [])
    monkeypatch.setattr(interfaces, "_known_since", float("-inf"))
    monkeypatch.setattr(interfaces, "FRESH_S", 3600.0)
    for _ in range(3):
        assert interfaces.local_ips() == frozenset()
    assert len(asked) == 1
    monkeypatch.setattr(interfaces, "FRESH_S", 0.0)
    assert interfaces.local_ips() == frozenset()
    assert len(asked) == 2
    monkeypatch.setattr(interfaces, "_known_since", float("-inf"))
