"""What a node concludes about its NAT, from whom, and from whom not."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node.mesh.endpoint import Endpoint
from shoal.node.reach.nat import (
    EXPIRY_S,
    MAX_ADDRESSES,
    MAX_EVIDENCE,
    MAX_PEERS,
    ROUND_S,
    AddressesChanged,
    DialedBack,
    Event,
    Mapping,
    NatKnowledge,
    NatReport,
    NatSummary,
    NatType,
    Poked,
    PokeSource,
    Reachability,
    Seen,
    Silent,
    TcpOrUdp,
    can_punch,
)
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer

PEERS = [Signer(bytes([number]) * 32).peer_id for number in range(1, 60)]
A, B, C = PEERS[:3]
IPS = {A: "5.1.0.2", B: "5.2.0.2", C: "5.3.0.2"}
IPS_V6 = {A: "2a01:1::2", B: "2a02:1::2", C: "2a03:1::2"}

LOCAL = Endpoint("192.168.1.7", 4001)
OUTSIDE = Endpoint("5.9.0.1", 40001)
OWN = Endpoint("5.9.0.1", 4001)
OWN_V6 = Endpoint("2a09:1::7", 4001)


def seen(by: PeerId, as_: Endpoint, *, local: Endpoint = LOCAL, protocol: TcpOrUdp = "udp", ip: str = "") -> Seen:
    return Seen(protocol=protocol, by=by, observer_ip=ip or IPS[by], local=local, seen=as_)


def dialed(by: PeerId, arrived: bool, *, endpoint: Endpoint = OWN, stranger: bool = True, ip: str = "") -> DialedBack:
    return DialedBack(by=by, observer_ip=ip or IPS[by], endpoint=endpoint, arrived=arrived, stranger=stranger)


def poked(by: PeerId, source: PokeSource, arrived: bool, *, target: Endpoint = OUTSIDE, ip: str = "") -> Poked:
    return Poked(by=by, observer_ip=ip or IPS[by], source=source, target=target, arrived=arrived)


def after(*events: Event, now: float = 0) -> NatReport:
    knowledge = NatKnowledge()
    for event in events:
        knowledge.handle(event, now)
    return knowledge.report(now)


SAME_FOR_ALL = (seen(A, OUTSIDE), seen(B, OUTSIDE))
OTHER_FOR_EACH = (seen(A, OUTSIDE), seen(B, Endpoint("5.9.0.1", 40002)))
OPEN = (poked(B, PokeSource.STRANGER, True),)
OPEN_TO_ADDRESSES = (poked(B, PokeSource.STRANGER, False), poked(A, PokeSource.OTHER_PORT, True))
CLOSED = (poked(B, PokeSource.STRANGER, False), poked(A, PokeSource.OTHER_PORT, False))


# --- each type of NAT from its evidence ---


@pytest.mark.parametrize(
    ("events", "nat"),
    [
        ((*SAME_FOR_ALL, *OPEN), NatType.FULL_CONE),
        ((*SAME_FOR_ALL, *OPEN_TO_ADDRESSES), NatType.RESTRICTED),
        ((*SAME_FOR_ALL, *CLOSED), NatType.PORT_RESTRICTED),
        ((*OTHER_FOR_EACH, *CLOSED), NatType.SYMMETRIC),
        (OTHER_FOR_EACH, NatType.SYMMETRIC),
        ((Silent(by=A, observer_ip=IPS[A]), Silent(by=B, observer_ip=IPS[B])), NatType.UDP_BLOCKED),
        ((seen(A, OWN, local=OWN), seen(B, OWN, local=OWN), *OPEN), NatType.NONE),
        ((seen(A, OWN, local=OWN), seen(B, OWN, local=OWN)), NatType.NONE),
        ((seen(A, OWN, local=OWN), seen(B, OWN, local=OWN), *CLOSED), NatType.FIREWALL),
        (SAME_FOR_ALL, NatType.UNKNOWN),
        ((*SAME_FOR_ALL, poked(B, PokeSource.STRANGER, False)), NatType.UNKNOWN),
        ((), NatType.UNKNOWN),
    ],
)
def test_the_type_of_a_nat_follows_from_what_peers_saw_and_what_came_in(events: tuple[Event, ...], nat: NatType):
    report = after(*events)
    assert report.udp is nat
    assert report.ipv6.udp is NatType.UNKNOWN


def test_tcp_is_judged_by_itself():
    report = after(*OTHER_FOR_EACH, seen(A, OUTSIDE, protocol="tcp"), seen(B, OUTSIDE, protocol="tcp"))
    assert (report.udp, report.tcp_mapping) == (NatType.SYMMETRIC, Mapping.INDEPENDENT)
    assert report.public_addresses == (OUTSIDE,)
    assert report.summary == NatSummary(NatType.SYMMETRIC, Mapping.INDEPENDENT)


def test_a_port_that_changes_with_every_peer_is_no_address_to_tell():
    other = Endpoint("5.9.0.1", 40002)
    report = after(seen(A, OUTSIDE, protocol="tcp"), seen(B, other, protocol="tcp"))
    assert report.tcp_mapping is Mapping.DEPENDENT
    assert report.public_addresses == ()


def test_a_firewall_without_nat_is_told_from_a_nat():
    report = after(*(seen(peer, OWN, local=OWN, protocol=way) for peer in (A, B) for way in ("tcp", "udp")), *CLOSED)
    assert (report.udp, report.tcp_mapping) == (NatType.FIREWALL, Mapping.NONE)
    assert "no NAT, but a firewall" in report.evidence[0]


def test_an_address_of_the_machine_is_its_own_on_a_socket_bound_to_all():
    everywhere = Endpoint("0.0.0.0", 4001)
    events = (seen(A, OWN, local=everywhere), seen(B, OWN, local=everywhere))
    assert after(AddressesChanged(frozenset({OWN.ip})), *events).udp is NatType.NONE
    assert after(AddressesChanged(frozenset({"192.168.1.7"})), *events).udp is not NatType.NONE


# --- who can be reached ---


def test_a_connection_from_outside_proves_that_a_node_is_public():
    report = after(dialed(A, True))
    assert report.reachability is Reachability.PUBLIC
    assert report.public_addresses == (OWN,)
    assert report.evidence[-1] == f"a connection from outside by {A[:8]}…{A[-4:]} to 5.9.0.1:4001 came in"


def test_the_proof_stands_however_many_say_that_they_failed():
    assert after(dialed(A, True), dialed(B, False), dialed(C, False)).reachability is Reachability.PUBLIC


def test_a_node_is_private_when_peers_in_two_networks_failed():
    assert after(dialed(A, False)).reachability is Reachability.UNKNOWN
    assert after(dialed(A, False), dialed(B, False, ip="5.1.9.9")).reachability is Reachability.UNKNOWN
    assert after(dialed(A, False), dialed(B, False)).reachability is Reachability.PRIVATE


def test_a_connection_for_which_the_nat_had_a_hole_proves_nothing():
    tcp = (seen(A, OUTSIDE, protocol="tcp"), seen(B, OUTSIDE, protocol="tcp"))
    report = after(*tcp, dialed(A, True, endpoint=OUTSIDE, stranger=False))
    assert report.reachability is Reachability.UNKNOWN
    assert any("only because this node knows it" in sentence for sentence in report.evidence)


def test_without_a_nat_there_are_no_holes_to_mistake():
    tcp = (seen(A, OWN, local=OWN, protocol="tcp"), seen(B, OWN, local=OWN, protocol="tcp"))
    assert after(*tcp, dialed(A, True, stranger=False)).reachability is Reachability.PUBLIC


def test_a_proven_address_comes_before_one_that_was_seen():
    forwarded = Endpoint("5.9.0.1", 5000)
    tcp = (seen(A, OUTSIDE, protocol="tcp"), seen(B, OUTSIDE, protocol="tcp"))
    report = after(*tcp, dialed(A, True, endpoint=forwarded))
    assert report.public_addresses == (forwarded, OUTSIDE)


def test_a_neighbour_proves_nothing_about_what_is_outside():
    assert after(dialed(A, True, ip="5.9.0.77")).reachability is Reachability.UNKNOWN
    assert after(dialed(A, True, endpoint=OWN_V6, ip="2a09:1::99")).reachability is Reachability.UNKNOWN


def test_peers_on_the_lan_have_no_say_once_there_are_peers_in_the_internet():
    at_home = [seen(peer, LOCAL, ip=ip) for peer, ip in ((A, "10.0.0.3"), (B, "172.17.0.2"), (C, "192.168.9.1"))]
    assert after(*at_home).udp is NatType.NONE
    in_the_internet = [seen(PEERS[4], OUTSIDE, ip="5.4.0.2"), seen(PEERS[5], OUTSIDE, ip="5.5.0.2")]
    assert after(*at_home, *in_the_internet, *OPEN).udp is NatType.FULL_CONE


# --- liars ---


@pytest.mark.parametrize("liar", [A, B, C])
@pytest.mark.parametrize("lie", [OWN, Endpoint("5.8.0.1", 1), LOCAL, Endpoint("garbage", 99)])
def test_one_liar_among_three_changes_neither_mapping_nor_addresses(liar: PeerId, lie: Endpoint):
    honest = [seen(peer, OUTSIDE, protocol="tcp") for peer in (A, B, C) if peer != liar]
    for events in ([*honest, seen(liar, lie, protocol="tcp")], [seen(liar, lie, protocol="tcp"), *honest]):
        report = after(*events)
        assert report.tcp_mapping is Mapping.INDEPENDENT
        assert report.public_addresses == (OUTSIDE,)


@pytest.mark.parametrize("lie", [OUTSIDE, Endpoint("5.8.0.1", 1)])
def test_one_liar_among_three_makes_no_nat_of_nothing(lie: Endpoint):
    report = after(seen(A, lie, local=OWN), seen(B, OWN, local=OWN), seen(C, OWN, local=OWN))
    assert report.udp is NatType.NONE


def test_one_liar_among_three_does_not_hide_a_symmetric_nat():
    report = after(*OTHER_FOR_EACH, seen(C, LOCAL), seen(C, Endpoint("5.9.0.1", 4001)))
    assert report.udp is NatType.SYMMETRIC


def test_a_peer_that_keeps_silent_does_not_block_udp():
    silent = (Silent(by=A, observer_ip=IPS[A]), Silent(by=B, observer_ip=IPS[B]))
    assert after(*silent, *SAME_FOR_ALL[:1]).udp is NatType.UNKNOWN
    assert after(Silent(by=A, observer_ip=IPS[A])).udp is NatType.UNKNOWN
    assert after(silent[0], seen(B, OUTSIDE), seen(C, OUTSIDE), *OPEN).udp is NatType.FULL_CONE


def test_a_peer_that_sends_no_poke_does_not_close_an_open_nat():
    assert after(*SAME_FOR_ALL, *CLOSED, poked(C, PokeSource.STRANGER, True)).udp is NatType.FULL_CONE


def test_many_names_in_one_network_have_one_voice():
    crowd = [seen(peer, OUTSIDE, ip=f"5.1.0.{number}") for number, peer in enumerate(PEERS[10:30], start=10)]
    assert after(*crowd).udp is NatType.UNKNOWN
    other = Endpoint("5.9.0.1", 40002)
    assert after(*crowd, seen(B, other), seen(C, other), *OPEN).udp is NatType.FULL_CONE


def test_many_names_in_one_network_do_not_drive_out_the_others():
    crowd = [Silent(by=peer, observer_ip=f"5.7.0.{number}") for number, peer in enumerate(PEERS[3:], start=3)]
    assert len(crowd) > MAX_PEERS
    assert after(*SAME_FOR_ALL, *OPEN, *crowd).udp is NatType.FULL_CONE


def test_the_oldest_peers_are_forgotten_when_there_are_too_many():
    knowledge = NatKnowledge()
    for number, peer in enumerate(PEERS[: MAX_PEERS + 3]):
        knowledge.handle(dialed(peer, number == 0, ip=f"5.{number + 10}.0.2"), now=number)
    assert knowledge.report(now=100).reachability is Reachability.PRIVATE


# --- time and change ---


def test_the_newest_word_of_a_peer_counts():
    knowledge = NatKnowledge()
    for event in (*OTHER_FOR_EACH, *OPEN):
        knowledge.handle(event, 0)
    knowledge.handle(seen(B, OUTSIDE), 1)
    assert knowledge.report(1).udp is NatType.FULL_CONE
    knowledge.handle(poked(B, PokeSource.STRANGER, False), 2)
    knowledge.handle(poked(A, PokeSource.OTHER_PORT, False), 2)
    assert knowledge.report(2).udp is NatType.PORT_RESTRICTED


def test_what_was_seen_long_ago_counts_no_more():
    knowledge = NatKnowledge()
    for event in (*SAME_FOR_ALL, *OPEN, dialed(A, True)):
        knowledge.handle(event, 100)
    before = knowledge.report(100 + EXPIRY_S - 1)
    assert (before.reachability, before.udp) == (Reachability.PUBLIC, NatType.FULL_CONE)
    later = knowledge.report(100 + EXPIRY_S)
    assert (later.reachability, later.udp) == (Reachability.UNKNOWN, NatType.UNKNOWN)
    assert later.evidence == later.public_addresses == ()


def test_a_mapping_that_ended_in_between_is_not_taken_for_a_symmetric_nat():
    knowledge = NatKnowledge()
    knowledge.handle(seen(A, OUTSIDE), 0)
    knowledge.handle(seen(B, Endpoint("5.9.0.1", 40002)), ROUND_S + 1)
    assert knowledge.report(ROUND_S + 1).udp is NatType.UNKNOWN
    knowledge.handle(seen(C, Endpoint("5.9.0.1", 40003)), ROUND_S + 2)
    assert knowledge.report(ROUND_S + 2).udp is NatType.SYMMETRIC


def test_another_network_makes_a_node_forget_what_it_knew():
    knowledge = NatKnowledge()
    knowledge.handle(AddressesChanged(frozenset({"192.168.1.7", "2a09:1::7"})), 0)
    v6 = [seen(peer, OWN_V6, local=OWN_V6, protocol="tcp", ip=IPS_V6[peer]) for peer in (A, B)]
    for event in (*SAME_FOR_ALL, *OPEN, *v6):
        knowledge.handle(event, 0)
    knowledge.handle(AddressesChanged(frozenset({"2a09:1::7", "192.168.1.7"})), 1)
    assert knowledge.report(1).ipv4.udp is NatType.FULL_CONE
    knowledge.handle(AddressesChanged(frozenset({"10.0.0.7", "2a09:1::7"})), 2)
    assert knowledge.report(2).ipv4.udp is NatType.UNKNOWN
    assert knowledge.report(2).ipv6.tcp_mapping is Mapping.NONE


# --- families ---


def test_a_host_with_ipv6_alone_is_judged_by_ipv6():
    report = after(
        *(seen(peer, OWN_V6, local=OWN_V6, protocol=way, ip=IPS_V6[peer]) for peer in (A, B) for way in ("tcp", "udp")),
        poked(C, PokeSource.STRANGER, True, target=OWN_V6, ip=IPS_V6[C]),
        dialed(C, True, endpoint=OWN_V6, ip=IPS_V6[C]),
    )
    assert (report.reachability, report.udp, report.tcp_mapping) == (
        Reachability.PUBLIC,
        NatType.NONE,
        Mapping.NONE,
    )
    assert report.public_addresses == (OWN_V6,)
    assert report.ipv4 == after().ipv4


def test_a_node_that_only_ipv6_reaches_is_public_and_still_behind_its_nat():
    v4 = (seen(A, OUTSIDE, protocol="tcp"), seen(B, OUTSIDE, protocol="tcp"), dialed(A, False), dialed(B, False))
    report = after(*v4, *OTHER_FOR_EACH, dialed(C, True, endpoint=OWN_V6, ip=IPS_V6[C]))
    assert (report.ipv4.reachability, report.ipv6.reachability) == (Reachability.PRIVATE, Reachability.PUBLIC)
    assert (report.reachability, report.udp) == (Reachability.PUBLIC, NatType.SYMMETRIC)
    assert report.public_addresses == (OWN_V6, OUTSIDE)


def test_ipv4_written_as_ipv6_is_ipv4():
    mapped = Endpoint("::ffff:5.9.0.1", OUTSIDE.port)
    report = after(seen(A, mapped, ip="::ffff:5.1.0.2"), seen(B, OUTSIDE), *OPEN)
    assert report.ipv4.udp is NatType.FULL_CONE


# --- what is said ---


def test_the_evidence_names_who_saw_what():
    report = after(seen(A, OUTSIDE, protocol="tcp"), seen(B, OUTSIDE, protocol="tcp"))
    assert f"{A[:8]}…{A[-4:]} saw TCP port 4001 as 5.9.0.1:40001" in report.evidence


def test_evidence_and_addresses_are_bounded():
    events = [
        event
        for number, peer in enumerate(PEERS, start=10)
        for event in (
            dialed(peer, True, endpoint=Endpoint("5.9.0.1", number), ip=f"5.{number}.0.2"),
            seen(peer, Endpoint("5.9.0.1", number), protocol="tcp", ip=f"5.{number}.0.2"),
        )
    ]
    report = after(*events)
    assert len(report.public_addresses) == MAX_ADDRESSES
    assert len(report.evidence) == MAX_EVIDENCE


@pytest.mark.parametrize(
    ("ip", "port"),
    [("", 1), ("name.example", 1), ("0.0.0.0", 1), ("224.0.0.1", 1), ("fe80::1%\n", 1), ("5.1.0.2", 0), ("::1", 65536)],
)
def test_what_is_no_endpoint_is_refused(ip: str, port: int):
    with pytest.raises(UsageError):
        Endpoint.parse(ip, port)


ANY_IP = st.one_of(
    st.ip_addresses().map(str),
    st.text(max_size=60),
    st.sampled_from(["5.1.0.2", "::1", "fe80::1%x", "::ffff:1.2.3.4", "127.0.0.1", "0.0.0.0"]),
)
ANY_ENDPOINT = st.builds(Endpoint, ANY_IP, st.integers(-10, 70_000))
ANY_PEER = st.sampled_from(PEERS)
ANY_EVENT = st.one_of(
    st.builds(
        Seen,
        protocol=st.sampled_from(["tcp", "udp"]),
        by=ANY_PEER,
        observer_ip=ANY_IP,
        local=st.just(LOCAL),
        seen=ANY_ENDPOINT,
    ),
    st.builds(Silent, by=ANY_PEER, observer_ip=ANY_IP),
    st.builds(
        DialedBack,
        by=ANY_PEER,
        observer_ip=ANY_IP,
        endpoint=ANY_ENDPOINT,
        arrived=st.booleans(),
        stranger=st.booleans(),
    ),
    st.builds(
        Poked,
        by=ANY_PEER,
        observer_ip=ANY_IP,
        source=st.sampled_from(PokeSource),
        target=ANY_ENDPOINT,
        arrived=st.booleans(),
    ),
    st.builds(AddressesChanged, st.frozensets(ANY_IP, max_size=3)),
)
PLAIN = set(string.ascii_letters + string.digits + " .,:;[]…-'")


@given(st.lists(ANY_EVENT, max_size=60))
def test_whatever_peers_say_there_is_a_report_of_plain_words(events: list[Event]):
    report = after(*events)
    assert len(report.public_addresses) <= 2 * MAX_ADDRESSES
    for sentence in report.evidence:
        assert set(sentence) <= PLAIN


# --- punching ---


CONES = [NatType.NONE, NatType.FULL_CONE, NatType.RESTRICTED, NatType.PORT_RESTRICTED, NatType.FIREWALL]


@pytest.mark.parametrize("ours", [*CONES, NatType.UNKNOWN])
@pytest.mark.parametrize("theirs", [*CONES, NatType.UNKNOWN])
def test_nodes_with_steady_ports_can_punch(ours: NatType, theirs: NatType):
    assert can_punch(NatSummary(ours), NatSummary(theirs), "udp") is None


@pytest.mark.parametrize(
    ("other", "works"),
    [
        (NatType.NONE, True),
        (NatType.FULL_CONE, True),
        (NatType.RESTRICTED, True),
        (NatType.PORT_RESTRICTED, False),
        (NatType.FIREWALL, False),
        (NatType.SYMMETRIC, False),
        (NatType.UDP_BLOCKED, False),
        (NatType.UNKNOWN, True),
    ],
)
def test_a_symmetric_nat_punches_only_where_its_address_is_enough(other: NatType, works: bool):
    symmetric = NatSummary(NatType.SYMMETRIC)
    for ours, theirs in ((symmetric, NatSummary(other)), (NatSummary(other), symmetric)):
        assert (can_punch(ours, theirs, "udp") is None) is works


def test_the_reason_says_whose_nat_it_is():
    symmetric, closed = NatSummary(NatType.SYMMETRIC), NatSummary(NatType.PORT_RESTRICTED)
    assert can_punch(symmetric, symmetric, "udp") == "both NATs give every connection another port"
    assert str(can_punch(symmetric, closed, "udp")).startswith("the NAT of this node gives every connection another")
    assert str(can_punch(closed, symmetric, "udp")).startswith("the NAT of the peer gives every connection another")
    assert can_punch(closed, NatSummary(NatType.UDP_BLOCKED), "udp") == "UDP does not get through to the peer"


def test_udp_that_is_blocked_does_not_keep_tcp_from_punching():
    ours = NatSummary(NatType.UDP_BLOCKED, Mapping.INDEPENDENT)
    assert can_punch(ours, ours, "tcp") is None


def test_tcp_is_punched_by_its_own_mapping():
    steady = NatSummary(NatType.PORT_RESTRICTED, Mapping.INDEPENDENT)
    moving = NatSummary(NatType.PORT_RESTRICTED, Mapping.DEPENDENT)
    assert can_punch(steady, steady, "tcp") is None
    assert can_punch(moving, moving, "tcp") is not None
    assert can_punch(steady, moving, "tcp") is not None
    assert can_punch(NatSummary(NatType.FULL_CONE, Mapping.INDEPENDENT), moving, "tcp") is None
