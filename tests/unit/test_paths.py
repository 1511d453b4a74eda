"""The kinds of path, when a climb is worth another try, and whom to let go."""

from dataclasses import replace

import pytest

from shoal.node.mesh.paths import CLIMB_AGAIN_S, Candidate, Ladder, PathKind, Rung, kind_of, surplus
from shoal.protocol.signing import Signer

PEERS = [Signer(bytes([number]) * 32).peer_id for number in range(1, 9)]


@pytest.mark.parametrize(
    ("address", "is_punching", "kind"),
    [
        ("/ip4/5.1.0.2/tcp/4001/p2p/A", False, PathKind.DIRECT),
        ("/ip6/2a00::1/tcp/4001/p2p/A", False, PathKind.DIRECT),
        ("/ip4/5.1.0.2/tcp/4001/p2p/A", True, PathKind.PUNCHED),
        ("/ip4/5.1.0.2/udp/4001/webrtc-direct/p2p/A", True, PathKind.WEBRTC),
        ("/ip4/5.1.0.2/tcp/4001/p2p/R/p2p-circuit/p2p/A", True, PathKind.RELAYED),
    ],
)
def test_a_path_is_known_by_its_address(address, is_punching, kind):
    assert kind_of(address, is_punching=is_punching) is kind


def test_direct_is_best_and_relayed_is_worst():
    assert sorted(PathKind, key=lambda kind: kind.rank) == ["direct", "punched", "webrtc", "relayed"]


def test_a_new_peer_is_worth_a_climb_at_once_and_then_ever_more_seldom():
    ladder, now, waits = Ladder(), 100.0, []
    assert ladder.wait_s(PathKind.RELAYED, now) == 0
    for _ in range(5):
        ladder.climbed(is_better=False, now=now)
        waits.append(ladder.wait_s(PathKind.RELAYED, now))
    assert waits == [*CLIMB_AGAIN_S, CLIMB_AGAIN_S[-1], CLIMB_AGAIN_S[-1]]


def test_a_change_makes_it_worth_trying_at_once():
    ladder = Ladder()
    for _ in range(3):
        ladder.climbed(is_better=False, now=0)
    ladder.something_changed()
    assert ladder.wait_s(PathKind.RELAYED, 1) == 0


def test_there_is_nothing_better_than_direct():
    assert Ladder().wait_s(PathKind.DIRECT, 0) is None


def test_what_was_tried_and_why_it_failed_is_kept():
    ladder = Ladder()
    ladder.note(Rung.PUNCH, "nobody let it in", 5)
    ladder.note(Rung.WEBRTC, None, 6)
    assert ladder.tried[Rung.PUNCH].failure == "nobody let it in"
    assert ladder.tried[Rung.WEBRTC].failure is None


def candidate(number, *, kind=PathKind.DIRECT, is_wanted=False, used_at=0.0):
    return Candidate(PEERS[number], kind, is_wanted, used_at)


def test_nobody_is_let_go_while_there_is_room():
    assert surplus([candidate(0), candidate(1)], 2, 1000) == []


def test_strangers_go_first_the_longest_unused_before_others():
    peers = [candidate(0, used_at=990), candidate(1, used_at=5), candidate(2, used_at=50), candidate(3, used_at=995)]
    assert surplus(peers, 2, 1000) == [PEERS[1], PEERS[2]]


def test_of_two_strangers_the_relayed_one_goes():
    peers = [candidate(0, used_at=1), candidate(1, kind=PathKind.RELAYED, used_at=2)]
    assert surplus(peers, 1, 1000) == [PEERS[1]]


def test_those_a_swarm_uses_stay_even_if_they_are_too_many():
    peers = [candidate(number, is_wanted=True) for number in range(3)] + [candidate(3)]
    assert surplus(peers, 2, 1000) == [PEERS[3]]


def test_members_without_end_are_let_go_too_but_never_whom_this_node_needs():
    peers = [replace(candidate(0, is_wanted=True), is_needed=True)]
    peers += [candidate(number, is_wanted=True, used_at=number) for number in (3, 2, 1)]
    assert surplus(peers, 1, 1000) == [PEERS[1], PEERS[2]]
