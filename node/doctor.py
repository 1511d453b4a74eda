"""What stands between this node and its peers, in words, and what the person can do about it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.node.api.schemas import FindingInfo, NatInfo, PeerInfo
from shoal.node.mesh.paths import PathKind
from shoal.node.reach.nat import NatType, Reachability


def examine(nat: NatInfo, peers: Sequence[PeerInfo], *, listens: Sequence[str]) -> list[FindingInfo]:
    """The findings, problems first.

    Args:
        nat: how the node is reached.
        peers: whom it is connected to.
        listens: the multiaddrs that it was told to listen on.
    """
    found = [*_own(nat, peers, listens), *_udp(nat), *_peers(peers)]
    order = ("problem", "note", "good")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _own(nat: NatInfo, peers: Sequence[PeerInfo], listens: Sequence[str]) -> list[FindingInfo]:
    if all("/127." in address or "/::1/" in address for address in listens):
        advice = "leave out --listen, or name an address that others can reach"
        return [FindingInfo(level="note", what="this node listens on loopback alone", advice=advice)]
    if not peers:
        advice = (
            "join a swarm with a ticket, or name a node with --bootstrap /ip4/…/tcp/…/p2p/…; a firewall may block it"
        )
        return [
            FindingInfo(level="problem", what="no peer is connected, so nothing is known of the network", advice=advice)
        ]
    if nat.reachability == Reachability.PUBLIC:
        what = "everybody can dial this node" + (", and it relays for others" if nat.relaying else "")
        return [FindingInfo(level="good", what=what)]
    if nat.reachability == Reachability.UNKNOWN and not nat.held_relays:
        what = "it is not known whether others can dial this node: too few peers in other networks have tried"
        return [
            FindingInfo(level="note", what=what, advice="nothing to do on a local network; else wait, or join a swarm")
        ]
    by_relay = f"it is reached through {len(nat.held_relays)} relay{'s' if len(nat.held_relays) != 1 else ''}"
    forwarding = (
        "to be dialed directly, switch on UPnP or NAT-PMP in the router, or forward a TCP port to this machine and say "
        "so with --listen /ip4/0.0.0.0/tcp/PORT --announce /ip4/PUBLIC-ADDRESS/tcp/PORT"
    )
    if not nat.held_relays:
        what = "nobody can dial this node, and no relay has been found that it could be reached through"
        advice = f"{forwarding}; or give it the address of a public node with --bootstrap"
        return [FindingInfo(level="problem", what=what, advice=advice)]
    level = "note" if len(nat.held_relays) > 1 else "problem"
    if level == "problem":
        by_relay += "; if that fails, it is cut off until another one is found"
    return [FindingInfo(level=level, what=f"nobody can dial this node; {by_relay}", advice=forwarding)]


def _udp(nat: NatInfo) -> list[FindingInfo]:
    if nat.udp == NatType.UDP_BLOCKED:
        what = "UDP does not get out of this network, so WebRTC cannot help where TCP fails"
        return [FindingInfo(level="note", what=what, advice="allow outgoing UDP in the firewall, if it is yours")]
    if nat.udp == NatType.SYMMETRIC:
        what = "the NAT is symmetric: it gives every connection another port, so holes can be punched to few peers"
        advice = "if the router is yours, choose a full cone or 'open' NAT in its settings, or forward a port"
        return [FindingInfo(level="note", what=what, advice=advice)]
    return []


def _peers(peers: Sequence[PeerInfo]) -> list[FindingInfo]:
    relayed = [peer for peer in peers if peer.path == PathKind.RELAYED]
    if not peers:
        return []
    if not relayed:
        return [FindingInfo(level="good", what=f"no peer of {len(peers)} needs a relay")]
    found = []
    for peer in relayed:
        failed = "; ".join(f"{each.rung}: {each.failure}" for each in peer.tried if each.failure)
        what = f"{peer.peer_id} is reached through a relay only"
        found.append(FindingInfo(level="note", what=f"{what} ({failed})" if failed else what))
    return found
