"""What a node remembers of itself from one life to the next."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from shoal.node.store.database import Storage
from shoal.node.store.remembered import MAX_RELAYS, Remembered

HOUR_S = 3600.0


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_each_incarnation_is_later_than_all_before_whatever_the_clock_does(tmp_path: Path) -> None:
    clock, given = Clock(1_800_000_000.0), []
    for jump_s in (0.0, 5.0, -HOUR_S, 0.0, 0.25, 2 * HOUR_S, -24 * HOUR_S):
        clock.now += jump_s
        with Storage(tmp_path / "node.db") as storage:
            remembered = Remembered(storage, clock)
            given += [remembered.next_incarnation(), remembered.next_incarnation()]
    assert all(later > earlier for earlier, later in pairwise(given))
    assert given[0] == 1_800_000_000_000
    assert given[2] == 1_800_000_005_000
    assert given[4] == given[3] + 1


def test_an_incarnation_that_was_forced_on_it_counts_too(tmp_path: Path) -> None:
    with Storage(tmp_path / "node.db") as storage:
        remembered = Remembered(storage, Clock(10.0))
        remembered.note_incarnation(99_000)
        remembered.note_incarnation(50_000)
        remembered.note_incarnation(2**60)
        assert remembered.next_incarnation() == 99_001


def test_ports_and_relays_are_there_again_and_nonsense_is_nothing(tmp_path: Path) -> None:
    listen = "/ip4/0.0.0.0/tcp/0"
    with Storage(tmp_path / "node.db") as storage:
        remembered = Remembered(storage)
        assert (remembered.ports(), remembered.relays()) == ({}, ())
        remembered.set_ports({listen: 4001})
        remembered.set_ports({"/ip6/::/tcp/0": 4002})
        remembered.set_relays(f"/ip4/5.1.0.{n}/tcp/1" for n in range(20))
    with Storage(tmp_path / "node.db") as storage:
        remembered = Remembered(storage)
        assert remembered.ports() == {listen: 4001, "/ip6/::/tcp/0": 4002}
        assert len(remembered.relays()) == MAX_RELAYS
        assert remembered.relays()[0] == "/ip4/5.1.0.0/tcp/1"
        for name in ("ports", "relays", "incarnation"):
            storage.put_fact(name, b"\xc1")
        assert (remembered.ports(), remembered.relays()) == ({}, ())
        assert remembered.next_incarnation() > 1_700_000_000_000
