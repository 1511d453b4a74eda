"""What peers, routers and strangers answer on the way to being reached.

An input is a letter and what follows it: ``s`` a datagram to the STUN socket; ``p`` and ``n`` answers of a router by
PCP and NAT-PMP; ``d`` its answer to a search for UPnP; ``x`` the description of its services; ``l`` a peer's line that
says how it sees this node; ``c`` its addresses for hole punching; ``a`` a circuit's address.
"""

from __future__ import annotations

from random import Random
from typing import Final

from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from shoal.node.mesh.circuits import RelayError, parse_circuit
from shoal.node.mesh.door import _read_endpoint
from shoal.node.mesh.endpoint import Endpoint
from shoal.node.reach.gateway import MappingWish
from shoal.node.reach.nat_pmp import decode_nat_pmp, encode_nat_pmp
from shoal.node.reach.pcp import decode_pcp, encode_pcp
from shoal.node.reach.punch import MAX_ADDRESSES, _connect, _endpoints
from shoal.node.reach.stun import StunAnswer, StunRequest, decode_stun, encode_stun
from shoal.node.reach.upnp import MAX_SERVICES, decode_description, decode_ssdp

from .harness import MutateBytes, Target, refusing, require
from .identities import ALICE, BOB

KINDS: Final = b"spndxlca"
GATEWAY: Final = "192.168.1.1"
WANTED: Final = MappingWish(protocol="tcp", internal_port=4001, external_port=4001, lifetime_s=3600, nonce=bytes(12))
DESCRIPTION: Final = """<root><device><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType><controlURL>/ctl/IPConn</controlURL>
</service></serviceList></device></root>"""


def _run(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    match kind:
        case b"s":
            message = decode_stun(rest)
            if message is not None:
                require(decode_stun(encode_stun(message)) == message, "a STUN message comes back changed")
        case b"p":
            decode_pcp(WANTED, rest)
        case b"n":
            decode_nat_pmp(WANTED, rest)
            decode_nat_pmp(None, rest)
        case b"d":
            url = decode_ssdp(rest, GATEWAY)
            require(url is None or url.startswith(f"http://{GATEWAY}"), "a URL at another host was believed")
        case b"x":
            found = decode_description(rest.decode("utf-8", "replace"), f"http://{GATEWAY}:5000/d.xml", GATEWAY)
            require(len(found) <= MAX_SERVICES, "more services than may be")
            require(all(each.url.startswith(f"http://{GATEWAY}") for each in found), "a service at another host")
        case b"l":
            _run_line(rest.decode("ascii", "replace"))
        case b"c":
            _run_punch(rest)
        case b"a":
            with refusing(RelayError):
                parse_circuit(rest.decode("utf-8", "replace"))


def _run_line(line: str) -> None:
    try:
        ip, port = _read_endpoint(line)
    except OSError:
        return
    require(0 < port < 65536, "a port that is none")
    require(len(ip) < 64, "an address that is none")


def _run_punch(data: bytes) -> None:
    message = HolePunch()
    try:
        message.ParseFromString(data)
        found = _endpoints(message)
    except (DecodeError, ValueError, MultiaddrError):  # `Puncher` takes these for a broken exchange
        return
    require(len(found) <= MAX_ADDRESSES, "more addresses than may be dialed")
    require(all(0 <= port < 65536 for _, port in found), "a port that is none")


def _seeds() -> list[bytes]:
    pcp = bytes([2, 0x81, 0, 0]) + (3600).to_bytes(4) + bytes(16) + encode_pcp(WANTED, "192.168.1.2")[24:]
    nat_pmp = bytes([0, 130, 0, 0]) + bytes(4) + (4001).to_bytes(2) * 2 + (3600).to_bytes(4)
    punch = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[Multiaddr("/ip4/5.1.0.2/tcp/4001").to_bytes()])
    return [
        b"s" + encode_stun(StunRequest(bytes(12))),
        b"s" + encode_stun(StunAnswer(bytes(range(12)), Endpoint("5.1.0.2", 4001))),
        b"s" + encode_stun(StunAnswer(bytes(range(12)), Endpoint("2a00::1", 4001))),
        b"p" + pcp,
        b"n" + nat_pmp,
        b"n" + encode_nat_pmp(WANTED),
        b"d" + f"HTTP/1.1 200 OK\r\nLOCATION: http://{GATEWAY}:5000/d.xml\r\n\r\n".encode(),
        b"x" + DESCRIPTION.encode(),
        b"l5.1.0.2 4001",
        b"l2a00::1 4001",
        b"c" + punch.SerializeToString(),
        b"c" + _connect([("5.1.0.2", 4001), ("2a00::1", 4001)]).SerializeToString(),
        b"a" + f"/ip4/5.1.0.2/tcp/4001/p2p/{ALICE.peer_id}/p2p-circuit/p2p/{BOB.peer_id}".encode(),
    ]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    kind = data[:1] if data[:1] in KINDS and rng.random() < 0.95 else bytes([rng.choice(KINDS)])
    return kind + mutate_bytes(data[1:], max_bytes - 1)


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate)
