"""Who is connected by which paths: the best carries, others retire, and who is lost with its relay is waited for."""

from __future__ import annotations

import gc
import random
import weakref
from itertools import count

import pytest

from shoal.node.mesh.address_book import MAX_KNOWN_ADDRESSES, MAX_KNOWN_PEERS, AddressBook
from shoal.node.mesh.connections import (
    COME_BACK_S,
    MAX_LOSSES,
    RELAY_ENDS_S,
    RETIRE_MAX_S,
    RETIRE_S,
    BestPathChanged,
    ClosePath,
    Connections,
    LetGo,
    Measured,
    PathAdded,
    PathDown,
    PathId,
    PathsBroken,
    PathUp,
    PeerDown,
    PeerUp,
    PunchBegan,
    PunchOver,
    RelayKnown,
    Tick,
    Unwanted,
    Used,
    Wake,
    Wanted,
)
from shoal.node.mesh.paths import PathKind
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer

PEERS = [Signer(number.to_bytes(32)).peer_id for number in range(1, 12)]
A, B, RELAY = PEERS[:3]
DIRECT, CIRCUIT = "/ip4/5.1.0.2/tcp/4001", f"/ip4/5.1.0.9/tcp/4001/p2p/{RELAY}/p2p-circuit"


def up(peer: PeerId, number: int, kind: str = DIRECT) -> PathUp:
    return PathUp(peer, PathId(number), f"{kind}/p2p/{peer}", outbound=True, relay=RELAY if kind == CIRCUIT else None)


def down(peer: PeerId, number: int) -> PathDown:
    return PathDown(peer, PathId(number))


def test_a_peer_is_up_with_its_first_path_and_down_with_its_last() -> None:
    connections = Connections(max_peers=8)
    assert connections.handle(up(A, 1), 5.0) == [PeerUp(A)]
    assert connections.handle(up(A, 2), 6.0) == [PathAdded(A)]
    state = connections.peers[A]
    assert (state.since, state.kind, state.address, state.outbound) == (5.0, PathKind.DIRECT, f"{DIRECT}/p2p/{A}", True)
    assert connections.handle(down(A, 2), 7.0) == []
    assert connections.handle(down(A, 1), 8.0) == [PeerDown(A)]
    assert connections.handle(down(A, 1), 8.0) == []
    assert not connections.peers


def test_a_better_path_takes_over_and_the_worse_is_closed_when_it_carries_nothing() -> None:
    connections = Connections(max_peers=8)
    connections.handle(up(A, 1, CIRCUIT), 0.0)
    assert connections.handle(up(A, 2), 1.0) == [BestPathChanged(A), Wake(1.0 + RETIRE_S), PathAdded(A)]
    assert connections.peers[A].best.id == 2
    assert connections.handle(Tick(), 1.0 + RETIRE_S / 2) == [Wake(1.0 + RETIRE_S)], "not before it is due"
    now = 1.0 + RETIRE_S
    busy = frozenset({PathId(1)})
    assert connections.handle(Tick(busy), now) == [Wake(now + RETIRE_S)], "it still carries something"
    assert connections.handle(Tick(), now + RETIRE_S) == [ClosePath(PathId(1))]
    assert connections.handle(Tick(), now + 2 * RETIRE_S) == []


def test_a_path_that_never_empties_is_closed_at_last() -> None:
    connections = Connections(max_peers=8)
    connections.handle(up(A, 1, CIRCUIT), 0.0)
    connections.handle(up(A, 2), 0.0)
    now, outputs = 0.0, []
    while not outputs or isinstance(outputs[0], Wake):
        now = outputs[0].at if outputs else RETIRE_S
        outputs = connections.handle(Tick(frozenset({PathId(1)})), now)
    assert outputs == [ClosePath(PathId(1))]
    assert now == pytest.approx(RETIRE_MAX_S)


def test_a_path_is_kept_that_is_the_best_again_by_the_time_it_would_be_closed() -> None:
    connections = Connections(max_peers=8)
    connections.handle(up(A, 1, CIRCUIT), 0.0)
    connections.handle(up(A, 2), 0.0)
    assert connections.handle(down(A, 2), 1.0)[0] == BestPathChanged(A)
    assert connections.handle(Tick(), RETIRE_S) == []
    assert connections.peers[A].kind is PathKind.RELAYED


def test_two_paths_of_one_kind_stand_side_by_side() -> None:
    connections = Connections(max_peers=8)
    connections.handle(up(A, 1), 0.0)
    connections.handle(up(A, 2), 0.0)
    assert not connections.retiring
    assert connections.peers[A].best.id == 1, "what works is not changed"


def test_a_direct_connection_that_comes_while_holes_are_punched_was_punched() -> None:
    connections = Connections(max_peers=8)
    connections.handle(PunchBegan(A), 0.0)
    connections.handle(up(A, 1), 0.0)
    connections.handle(PunchOver(A), 0.0)
    connections.handle(up(A, 2), 0.0)
    assert [path.kind for path in connections.peers[A].paths] == [PathKind.DIRECT, PathKind.PUNCHED]
    assert not connections.punching


def test_over_the_limit_the_longest_unused_goes_and_neither_the_wanted_nor_the_newcomer() -> None:
    connections = Connections(max_peers=3)
    for number, peer in enumerate(PEERS[:3]):
        connections.handle(up(peer, number), float(number))
    connections.handle(Wanted(PEERS[0], "swarm"), 3.0)
    connections.handle(Used(PEERS[1]), 4.0)
    assert connections.handle(up(PEERS[3], 3), 200.0) == [PeerUp(PEERS[3]), LetGo(PEERS[2])]
    connections.handle(down(PEERS[2], 2), 201.0)
    connections.handle(Unwanted(PEERS[0], "swarm"), 202.0)
    assert connections.handle(up(PEERS[4], 4), 203.0) == [PeerUp(PEERS[4]), LetGo(PEERS[0])]


def test_a_peer_is_wanted_until_nobody_wants_it() -> None:
    connections = Connections(max_peers=3)
    for why in ("one swarm", "another", "another"):
        connections.handle(Wanted(A, why), 0.0)
    connections.handle(Unwanted(A, "another"), 0.0)
    assert connections.wanted == {A: {"one swarm"}}
    connections.handle(Unwanted(A, "one swarm"), 0.0)
    connections.handle(Unwanted(A, "never"), 0.0)
    assert connections.wanted == {}


def test_whoever_relays_is_known_as_long_as_it_is_connected() -> None:
    connections = Connections(max_peers=3)
    connections.handle(RelayKnown(A, DIRECT), 0.0)
    assert connections.relays == {}
    connections.handle(up(A, 1), 0.0)
    connections.handle(RelayKnown(A, DIRECT), 0.0)
    assert connections.relays == {A: DIRECT}
    connections.handle(down(A, 1), 0.0)
    assert connections.relays == {}


def test_a_peer_that_is_gone_with_its_relay_is_waited_for() -> None:
    connections = Connections(max_peers=8)
    connections.handle(up(A, 1, CIRCUIT), 0.0)
    connections.handle(down(A, 1), 100.0)
    loss = connections.loss(A)
    assert loss is not None
    assert loss.relay == RELAY
    assert loss.may_be_made_good(100.0 + RELAY_ENDS_S / 2, is_relay_there=True), "it may be about to end"
    assert not loss.may_be_made_good(100.0 + RELAY_ENDS_S, is_relay_there=True), "it is not the relay's fault"
    assert loss.may_be_made_good(100.0 + COME_BACK_S / 2, is_relay_there=False)
    assert not loss.may_be_made_good(100.0 + COME_BACK_S, is_relay_there=False)
    connections.handle(up(A, 2), 101.0)
    assert connections.loss(A) is None, "it is back"
    connections.handle(down(A, 2), 102.0)
    assert connections.loss(A) is None, "no relay was in between"


def test_a_loss_counts_from_the_moment_that_it_is_noticed() -> None:
    connections = Connections(max_peers=8)
    connections.handle(up(A, 1, CIRCUIT), 0.0)
    connections.handle(PathsBroken(A), 50.0)
    connections.handle(down(A, 1), 51.0)
    loss = connections.loss(A)
    assert loss is not None
    assert loss.at == 50.0
    connections.handle(PathsBroken(B), 52.0)
    assert connections.loss(B) is None


def test_losses_are_bounded_and_leave_nothing_behind() -> None:
    connections = Connections(max_peers=8)
    numbers = count(1)
    lost = [Signer(number.to_bytes(32)).peer_id for number in range(1000, 1000 + MAX_LOSSES + 2)]
    for peer in lost:
        number = next(numbers)
        connections.handle(up(peer, number, CIRCUIT), 0.0)
        connections.handle(down(peer, number), 0.0)
    assert connections.statistics()["losses"] == MAX_LOSSES
    assert connections.loss(lost[0]) is None
    held = weakref.ref(connections.loss(lost[-1]))
    connections.handle(up(lost[-1], next(numbers)), 0.0)
    gc.collect()
    assert held() is None


def test_a_measured_round_trip_of_somebody_gone_is_dropped() -> None:
    connections = Connections(max_peers=8)
    connections.handle(Measured(A, 3.0), 0.0)
    connections.handle(Used(A), 0.0)
    connections.handle(up(A, 1), 0.0)
    connections.handle(Measured(A, 4.0), 0.0)
    assert connections.peers[A].rtt_ms == 4.0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_the_best_path_carries_and_nothing_is_left_behind(seed: int) -> None:
    rng = random.Random(seed)
    connections, now = Connections(max_peers=4), 0.0
    standing: dict[int, PeerId] = {}
    ups: set[PeerId] = set()
    for number in range(300):
        now += rng.expovariate(1.0)
        event: PathUp | PathDown | Tick
        if standing and rng.random() < 0.45:
            gone = rng.choice(list(standing))
            event = down(standing.pop(gone), gone)
        elif rng.random() < 0.2:
            event = Tick(frozenset(PathId(each) for each in standing if rng.random() < 0.5))
        else:
            standing[number] = rng.choice(PEERS)
            event = up(standing[number], number, rng.choice([DIRECT, CIRCUIT]))
        outputs = connections.handle(event, now)
        for output in outputs:
            match output:
                case PeerUp(peer):
                    assert peer not in ups, seed
                    ups.add(peer)
                case PeerDown(peer):
                    ups.remove(peer)
                case ClosePath(path):
                    state = connections.peers[standing[path]]
                    assert state.best.id != path, seed
                    connections.handle(down(standing.pop(path), path), now)
                case LetGo(peer):
                    assert peer in connections.peers, seed
                case Wake(at):
                    assert at > now or not isinstance(event, Tick), seed
        assert ups == set(connections.peers) == set(standing.values()), seed
        for peer, state in connections.peers.items():
            assert {path.id for path in state.paths} == {each for each, of in standing.items() if of == peer}, seed
            assert state.best.kind.rank == min(path.kind.rank for path in state.paths), seed
        assert set(connections.retiring) <= set(standing), seed
    for number, peer in list(standing.items()):
        connections.handle(down(peer, number), now)
    left = connections.statistics()
    assert (left["peers"], left["paths"], left["retiring"]) == (0, 0, 0), seed


# --- the address book ---


def test_the_newest_addresses_of_the_newest_peers_are_kept() -> None:
    book = AddressBook()
    book.remember(A, [f"/ip4/5.1.0.{number}/tcp/1" for number in range(MAX_KNOWN_ADDRESSES + 2)])
    book.remember(A, ["/ip4/5.1.0.3/tcp/1"])
    known = book.addresses(A)
    assert len(known) == MAX_KNOWN_ADDRESSES
    assert known[0] == "/ip4/5.1.0.3/tcp/1"
    assert "/ip4/5.1.0.0/tcp/1" not in known
    for number in range(MAX_KNOWN_PEERS):
        book.remember(PeerId(f"peer {number}"), ["/ip4/5.1.0.1/tcp/1"])
    assert len(book) == MAX_KNOWN_PEERS
    assert book.addresses(A) == []
