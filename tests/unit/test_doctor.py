"""What a node's doctor finds is true, says what to do, and puts what is worst first."""

from __future__ import annotations

from itertools import product

import pytest

from shoal.node.api.schemas import FindingInfo, NatInfo, PeerInfo, TriedInfo
from shoal.node.doctor import examine
from shoal.node.mesh.paths import PathKind
from shoal.node.reach.nat import NatType, Reachability
from shoal.protocol.signing import Signer

ANN, BOB, RELAY, OTHER_RELAY = (Signer(bytes([seed]) * 32).peer_id for seed in (1, 2, 3, 4))
LISTENS = ("/ip4/0.0.0.0/tcp/4001",)
LEVELS = ("problem", "note", "good")


def nat(reachability: Reachability = Reachability.UNKNOWN, udp: NatType = NatType.UNKNOWN, **facts: object) -> NatInfo:
    return NatInfo.model_validate({"reachability": str(reachability), "udp": str(udp)} | facts)


def peer(path: PathKind = PathKind.DIRECT, *tried: TriedInfo) -> PeerInfo:
    return PeerInfo(peer_id=BOB, path=str(path), address="/ip4/192.0.2.1/tcp/1", tried=list(tried))


def only(findings: list[FindingInfo], word: str) -> FindingInfo:
    (found,) = [finding for finding in findings if word in finding.what]
    return found


@pytest.mark.parametrize(
    ("listens", "is_on_loopback_alone"),
    [
        (["/ip4/127.0.0.1/tcp/0"], True),
        (["/ip6/::1/tcp/0"], True),
        (["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"], True),
        (["/ip4/127.0.0.1/tcp/0", "/ip4/0.0.0.0/tcp/0"], False),
        (["/ip6/::/tcp/0"], False),
    ],
)
def test_a_node_on_loopback_alone_is_told_to_listen_elsewhere(listens: list[str], is_on_loopback_alone: bool) -> None:
    findings = examine(nat(), [peer()], listens=listens)
    assert any("loopback alone" in finding.what for finding in findings) == is_on_loopback_alone
    if is_on_loopback_alone:
        assert "--listen" in only(findings, "loopback alone").advice


def test_a_node_without_peers_has_a_problem_and_is_told_how_to_find_some() -> None:
    (finding,) = examine(nat(), [], listens=LISTENS)
    assert finding.level == "problem"
    assert "no peer is connected" in finding.what
    assert "ticket" in finding.advice
    assert "--bootstrap" in finding.advice


@pytest.mark.parametrize("relaying", [False, True])
def test_a_public_node_is_well_and_says_whether_it_relays(relaying: bool) -> None:
    findings = examine(nat(Reachability.PUBLIC, NatType.NONE, relaying=relaying), [peer()], listens=LISTENS)
    assert {finding.level for finding in findings} == {"good"}
    assert ("relays for others" in only(findings, "everybody can dial").what) == relaying


def test_what_is_not_known_is_no_problem() -> None:
    finding = only(examine(nat(), [peer()], listens=LISTENS), "not known")
    assert finding.level == "note"
    assert finding.advice


def test_a_private_node_without_a_relay_has_a_problem_and_is_told_about_its_router() -> None:
    findings = examine(nat(Reachability.PRIVATE, NatType.PORT_RESTRICTED), [peer()], listens=LISTENS)
    assert findings[0].level == "problem"
    assert "no relay" in findings[0].what
    for word in ("UPnP", "--announce", "--bootstrap"):
        assert word in findings[0].advice


def test_one_relay_is_a_problem_since_it_may_fail_and_two_are_none() -> None:
    one = examine(nat(Reachability.PRIVATE, held_relays=[RELAY]), [peer()], listens=LISTENS)[0]
    two = only(
        examine(nat(Reachability.PRIVATE, held_relays=[RELAY, OTHER_RELAY]), [peer()], listens=LISTENS),
        "nobody can dial",
    )
    assert (one.level, two.level) == ("problem", "note")
    assert "through 1 relay;" in one.what
    assert "cut off" in one.what
    assert "2 relays" in two.what
    assert "cut off" not in two.what


@pytest.mark.parametrize(("udp", "word"), [(NatType.SYMMETRIC, "symmetric"), (NatType.UDP_BLOCKED, "UDP does not get")])
def test_a_nat_that_stands_in_the_way_is_named_with_what_can_be_done(udp: NatType, word: str) -> None:
    finding = only(examine(nat(Reachability.PRIVATE, udp), [peer()], listens=LISTENS), word)
    assert finding.level == "note"
    assert finding.advice


def test_a_relayed_peer_is_named_with_the_reason_of_every_rung_that_failed() -> None:
    tried = (
        TriedInfo(rung="direct", failure="no answer within 1 s"),
        TriedInfo(rung="hole punching (TCP)", failure="both NATs give every connection another port"),
        TriedInfo(rung="WebRTC (UDP)", failure=None),
    )
    findings = examine(nat(Reachability.PUBLIC), [peer(PathKind.RELAYED, *tried)], listens=LISTENS)
    what = only(findings, "through a relay only").what
    assert BOB in what
    assert "direct: no answer within 1 s; hole punching (TCP): both NATs" in what
    assert "WebRTC" not in what
    assert not any("needs a relay" in finding.what for finding in findings)


def test_a_relayed_peer_to_which_nothing_was_tried_yet_is_named_too() -> None:
    what = only(examine(nat(Reachability.PUBLIC), [peer(PathKind.RELAYED)], listens=LISTENS), "relay only").what
    assert what.endswith("only")


@pytest.mark.parametrize("path", [PathKind.DIRECT, PathKind.PUNCHED, PathKind.WEBRTC])
def test_peers_that_need_no_relay_are_good_news(path: PathKind) -> None:
    assert only(examine(nat(Reachability.PUBLIC), [peer(path)], listens=LISTENS), "needs a relay").level == "good"


def test_problems_come_first_and_good_news_last_whatever_is_the_case() -> None:
    relays = ([], [RELAY], [RELAY, OTHER_RELAY])
    peers = ([], [peer()], [peer(PathKind.RELAYED), peer()])
    for reachability, udp, held, known in product(Reachability, NatType, relays, peers):
        findings = examine(nat(reachability, udp, held_relays=held), known, listens=LISTENS)
        levels = [LEVELS.index(finding.level) for finding in findings]
        assert levels == sorted(levels)
        assert levels, "it always says something"
        assert all(finding.advice for finding in findings if finding.level == "problem")
