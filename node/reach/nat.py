"""What kind of NAT this node is behind, judged from what its peers saw of it. A core: no I/O, no clock.

There is no third party's server: several peers are asked, as in RFC 5780, and none of them is believed alone.

- **Mapping** (RFC 4787, 4.1): how peers in different networks see one local port. The same external port for all is
  endpoint-independent mapping, another one for each is endpoint-dependent ("symmetric"), its own address is no NAT.
  Every network of observers has one vote, its newest, since peers cost nothing and networks do.
- **Filtering** (RFC 4787, 5): which datagrams get in that this node did not ask for: a stranger's, or those of
  another port of a peer that it did ask. One that came in proves itself.
- **Reachability** (as AutoNAT, https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md): whether a fresh
  TCP connection from outside came in. That proves itself too, unless the NAT had a hole for its sender.

An observer says something about the boundary between it and this node alone. So neighbours are not asked, and where
there are observers in the internet, those in private networks have no say. IPv4 and IPv6 are judged apart. Where RFC
3489's types have no word for it (a firewall without NAT, usual with IPv6), there is one here.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from typing import Final, Literal

from shoal.node.mesh.endpoint import Endpoint, Family, IpAddress, parse_ip
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

MAX_PEERS: Final = 32
"""Observers that are remembered."""
EXPIRY_S: Final = 900.0
"""How long an observation counts."""
ROUND_S: Final = 120.0
"""Observations further apart than this may differ because an idle mapping ended, which a NAT keeps for 2 minutes."""
MAX_ADDRESSES: Final = 4
MAX_EVIDENCE: Final = 16
"""Sentences for each family."""

_NETWORK_BITS: Final = {4: 16, 6: 32}
_NEIGHBOUR_BITS: Final = {4: 24, 6: 48}

TcpOrUdp = Literal["tcp", "udp"]


class Reachability(StrEnum):
    """Whether anybody can connect to this node without its help."""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    PRIVATE = "private"


class Mapping(StrEnum):
    """How a NAT chooses the external port of a local one."""

    UNKNOWN = "unknown"
    NONE = "none"
    INDEPENDENT = "endpoint-independent"
    DEPENDENT = "endpoint-dependent"


class NatType(StrEnum):
    """What stands in the way of UDP."""

    UNKNOWN = "unknown"
    NONE = "none"
    FIREWALL = "firewall without NAT"
    FULL_CONE = "full cone"
    RESTRICTED = "address-restricted cone"
    PORT_RESTRICTED = "port-restricted cone"
    SYMMETRIC = "symmetric"
    UDP_BLOCKED = "UDP blocked"


class PokeSource(StrEnum):
    """Who sent a datagram that nobody had asked for."""

    STRANGER = "stranger"
    """A peer to which nothing had gone over UDP, see `shoal.node.reach.stun.Stun.is_stranger`."""
    OTHER_PORT = "other port"
    """A peer that this node had asked, from a port that it had not."""


# --- events ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A peer said how it sees one of this node's ports.

    Attributes:
        observer_ip: the address at which this node asked the peer (not one that the peer told).
        local: the port, at the address that packets to the peer leave from, or at the unspecified address if that is
            not known; for TCP always the port that this node listens on, for UDP that of `shoal.node.reach.stun`.
    """

    protocol: TcpOrUdp
    by: PeerId
    observer_ip: str
    local: Endpoint
    seen: Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """A peer that answers over TCP, and that says that it answers STUN, did not do so."""

    by: PeerId
    observer_ip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DialedBack:
    """A peer tried to open a TCP connection to this node.

    Attributes:
        observer_ip: the address that it dialed from, or would have.
        arrived: whether this node itself saw the connection and the nonce in it.
        stranger: whether this node had no connection of its own to that address, for which a NAT that only looks at
            addresses would let others in, too.
    """

    by: PeerId
    observer_ip: str
    endpoint: Endpoint
    arrived: bool
    stranger: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Poked:
    """A peer was asked to send a datagram to where another one had seen this node.

    Attributes:
        observer_ip: the address that it came from, or would have.
        arrived: whether this node itself saw the token in it.
    """

    by: PeerId
    observer_ip: str
    source: PokeSource
    target: Endpoint
    arrived: bool


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """These are the machine's addresses now; what was known about a family whose addresses differ is forgotten."""

    local_ips: frozenset[str]


Event = Seen | Silent | DialedBack | Poked | AddressesChanged


# --- reports ---


@dataclass(frozen=True, slots=True)
class NatSummary:
    """What peers tell each other before they punch."""

    udp: NatType = NatType.UNKNOWN
    tcp_mapping: Mapping = Mapping.UNKNOWN


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """What is known for one IP.

    Attributes:
        public_addresses: external TCP endpoints at which others may reach this node or punch, best attested first.
        evidence: sentences for people, conclusions before observations.
    """

    reachability: Reachability = Reachability.UNKNOWN
    udp: NatType = NatType.UNKNOWN
    tcp_mapping: Mapping = Mapping.UNKNOWN
    public_addresses: tuple[Endpoint, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NatReport:
    """What is known. The properties put both families into one answer: the NAT is IPv4's, wherever there is IPv4."""

    ipv4: FamilyReport
    ipv6: FamilyReport

    @property
    def families(self) -> tuple[FamilyReport, FamilyReport]:
        """Both, IPv4 first."""
        return self.ipv4, self.ipv6

    @property
    def reachability(self) -> Reachability:
        """Public if by any family."""
        both = (self.ipv4.reachability, self.ipv6.reachability)
        return next((found for found in (Reachability.PUBLIC, Reachability.PRIVATE) if found in both), both[0])

    @property
    def udp(self) -> NatType:
        """What stands in the way of UDP."""
        return self.ipv6.udp if self.ipv4.udp is NatType.UNKNOWN else self.ipv4.udp

    @property
    def tcp_mapping(self) -> Mapping:
        """How TCP ports are mapped."""
        return self.ipv6.tcp_mapping if self.ipv4.tcp_mapping is Mapping.UNKNOWN else self.ipv4.tcp_mapping

    @property
    def public_addresses(self) -> tuple[Endpoint, ...]:
        """As of a family, those of a public one first."""
        families = sorted((self.ipv4, self.ipv6), key=lambda family: family.reachability is not Reachability.PUBLIC)
        return tuple(endpoint for family in families for endpoint in family.public_addresses)

    @property
    def evidence(self) -> tuple[str, ...]:
        """Sentences for people."""
        return self.ipv4.evidence + self.ipv6.evidence

    @property
    def summary(self) -> NatSummary:
        """What a peer has to know to punch."""
        return NatSummary(self.udp, self.tcp_mapping)


def can_punch(ours: NatSummary, theirs: NatSummary, protocol: TcpOrUdp) -> str | None:
    """Whether a hole can be punched between two nodes, in theory: None, or the reason why not, in one line.

    Whoever is behind an endpoint-dependent mapping sends from a port that nobody knows before, so the other side must
    let it in by its address alone (RFC 5128, 3.3). What TCP is let in by is not measured, and taken to be as for UDP.
    """
    sides = (("this node", ours), ("the peer", theirs))
    if protocol == "udp":
        blocked = next((who for who, nat in sides if nat.udp is NatType.UDP_BLOCKED), None)
        if blocked is not None:
            return f"UDP does not get through to {blocked}"
        moving = [nat.udp is NatType.SYMMETRIC for _, nat in sides]
    else:
        moving = [nat.tcp_mapping is Mapping.DEPENDENT for _, nat in sides]
    if all(moving):
        return "both NATs give every connection another port"
    for (who, nat), other_moves in zip(sides, reversed(moving), strict=True):
        if other_moves and nat.udp in (NatType.PORT_RESTRICTED, NatType.FIREWALL):
            other = next(name for name, _ in sides if name != who)
            return f"the NAT of {other} gives every connection another port, and {who} lets none in from unknown ports"
    return None


# --- the core ---


class _Kind(Enum):
    """What an observation is about; the newest of each peer counts."""

    TCP = "TCP"
    UDP = "UDP"
    DIAL = "dial"
    STRANGER = "stranger"
    OTHER_PORT = "other port"


class _Scope(IntEnum):
    MACHINE = 0
    PRIVATE = 1
    INTERNET = 2


@dataclass(frozen=True, slots=True)
class _Record:
    """An observation, checked. `endpoint` is None where a peer was silent."""

    kind: _Kind
    by: PeerId
    at: float
    observer: IpAddress
    endpoint: Endpoint | None
    local: Endpoint | None
    arrived: bool
    stranger: bool

    @property
    def network(self) -> str:
        return _prefix(self.observer, _NETWORK_BITS)


class NatKnowledge:
    """What this node knows about its NAT."""

    def __init__(self) -> None:
        self._local_ips: frozenset[str] = frozenset()
        self._records: dict[tuple[_Kind, int, PeerId], _Record] = {}

    def handle(self, event: Event, now: float) -> None:
        """Take in what was found out; what makes no sense is left out."""
        match event:
            case AddressesChanged(local_ips):
                self._change_addresses(local_ips)
            case Seen(protocol=protocol, local=local, seen=seen):
                self._note(_Kind.TCP if protocol == "tcp" else _Kind.UDP, event, now, seen, local)
            case Silent():
                self._note(_Kind.UDP, event, now)
            case DialedBack(endpoint=endpoint, arrived=arrived, stranger=stranger):
                self._note(_Kind.DIAL, event, now, endpoint, arrived=arrived, stranger=stranger)
            case Poked(source=source, target=target, arrived=arrived):
                kind = _Kind.STRANGER if source is PokeSource.STRANGER else _Kind.OTHER_PORT
                self._note(kind, event, now, target, arrived=arrived)

    def report(self, now: float) -> NatReport:
        """What follows from all that, at this time."""
        records = [record for record in self._records.values() if now - record.at < EXPIRY_S]
        families = [[record for record in records if record.observer.version == family] for family in Family]
        return NatReport(*(self._judge(of_family) for of_family in families))

    # --- taking in ---

    def _note(
        self,
        kind: _Kind,
        event: Seen | Silent | DialedBack | Poked,
        now: float,
        endpoint: Endpoint | None = None,
        local: Endpoint | None = None,
        *,
        arrived: bool = False,
        stranger: bool = True,
    ) -> None:
        observer = parse_ip(event.observer_ip)
        if observer is None:
            return
        if endpoint is not None:
            try:
                endpoint = Endpoint.parse(endpoint.ip, endpoint.port)
            except UsageError:
                return
            address = ipaddress.ip_address(endpoint.ip)
            if address.version != observer.version or _scope(address) is not _scope(observer):
                return  # nobody in the internet sees a private address, and the other way round it is not about a NAT
            if _prefix(address, _NEIGHBOUR_BITS) == _prefix(observer, _NEIGHBOUR_BITS):
                return
        record = _Record(kind, event.by, now, observer, endpoint, local, arrived, stranger)
        self._records[kind, observer.version, event.by] = record
        if len({known.by for known in self._records.values()}) > MAX_PEERS:
            self._forget_one_peer(but=event.by)

    def _forget_one_peer(self, *, but: PeerId) -> None:
        """The oldest of the network that has the most, so that nobody with many names drives out all others."""
        newest: dict[PeerId, _Record] = {}
        for record in self._records.values():
            if record.by != but and (record.by not in newest or newest[record.by].at < record.at):
                newest[record.by] = record
        crowd = Counter(record.network for record in newest.values())
        leaves = max(newest.values(), key=lambda record: (crowd[record.network], -record.at)).by
        self._records = {key: record for key, record in self._records.items() if record.by != leaves}

    def _change_addresses(self, local_ips: Iterable[str]) -> None:
        addresses = {address for address in map(parse_ip, local_ips) if address is not None}
        ips = frozenset(map(str, addresses))
        changed = {ipaddress.ip_address(ip).version for ip in ips ^ self._local_ips}
        self._records = {key: record for key, record in self._records.items() if key[1] not in changed}
        self._local_ips = ips

    # --- judging one family ---

    def _judge(self, records: list[_Record]) -> FamilyReport:
        scope = max((_scope(record.observer) for record in records), default=_Scope.MACHINE)
        records = [record for record in records if _scope(record.observer) is scope]
        kinds = {kind: [record for record in records if record.kind is kind] for kind in _Kind}
        tcp_mapping = self._mapping(kinds[_Kind.TCP])
        proofs = [record for record in kinds[_Kind.DIAL] if self._is_proof(record, tcp_mapping)]
        udp = self._udp_type(kinds)
        failed = {record.network for record in kinds[_Kind.DIAL] if not record.arrived}
        reachability = Reachability.UNKNOWN
        if proofs:
            reachability = Reachability.PUBLIC
        elif len(failed) >= 2:
            reachability = Reachability.PRIVATE
        return FamilyReport(
            reachability,
            udp,
            tcp_mapping,
            _addresses(proofs, [] if tcp_mapping is Mapping.DEPENDENT else kinds[_Kind.TCP]),
            self._evidence(records, udp, tcp_mapping),
        )

    def _mapping(self, records: list[_Record]) -> Mapping:
        votes = _votes([record for record in records if record.endpoint is not None])
        if 2 <= len(votes) < 2 * sum(map(self._is_own, votes)):
            return Mapping.NONE
        # One port may leave by several interfaces, each with a NAT of its own.
        ports = dict.fromkeys(record.local for record in records if record.local is not None)
        of_each = [_votes([record for record in records if record.local == port]) for port in ports]
        votes = max(of_each, key=lambda votes: (len(votes), max(vote.at for vote in votes)), default=[])
        newest = max((vote.at for vote in votes), default=0.0)
        for counted in (votes, [vote for vote in votes if newest - vote.at <= ROUND_S]):
            if len(counted) < 2:
                return Mapping.UNKNOWN
            ((_, num_agreeing),) = Counter(vote.endpoint for vote in counted).most_common(1)
            if 2 * num_agreeing > len(counted):
                return Mapping.INDEPENDENT
        return Mapping.DEPENDENT

    def _udp_type(self, kinds: dict[_Kind, list[_Record]]) -> NatType:
        heard = [record for record in kinds[_Kind.UDP] if record.endpoint is not None]
        silent = {record.network for record in kinds[_Kind.UDP] if record.endpoint is None}
        if not heard and len(silent) >= 2:
            return NatType.UDP_BLOCKED
        cone = _cone(kinds[_Kind.STRANGER], kinds[_Kind.OTHER_PORT])
        match self._mapping(kinds[_Kind.UDP]):
            case Mapping.INDEPENDENT:
                return cone
            case Mapping.DEPENDENT:
                return NatType.SYMMETRIC
            case Mapping.NONE:
                return NatType.NONE if cone in (NatType.FULL_CONE, NatType.UNKNOWN) else NatType.FIREWALL
            case Mapping.UNKNOWN:
                return NatType.UNKNOWN

    def _is_own(self, record: _Record) -> bool:
        """Whether the peer saw the address that the packets left from."""
        local, seen = record.local, record.endpoint
        return (
            local is not None
            and seen is not None
            and local.port == seen.port
            and (seen.ip == local.ip or seen.ip in self._local_ips)
        )

    def _is_proof(self, record: _Record, tcp_mapping: Mapping) -> bool:
        """Whether a connection came in that would have done so for anybody."""
        if not record.arrived or record.endpoint is None:
            return False
        return record.stranger or tcp_mapping is Mapping.NONE or record.endpoint.ip in self._local_ips

    def _evidence(self, records: list[_Record], udp: NatType, tcp_mapping: Mapping) -> tuple[str, ...]:
        sentences = []
        if udp is NatType.FIREWALL:
            sentences.append("there is no NAT, but a firewall lets in only what this node asked for")
        if records and tcp_mapping is Mapping.UNKNOWN:
            num_networks = len({record.network for record in records if record.kind is _Kind.TCP})
            sentences.append(f"peers in two networks have to tell how they see TCP ports; so far {num_networks} did")
        newest = sorted(records, key=lambda record: (not record.arrived, -record.at, record.kind.value, record.by))
        sentences += [self._sentence(record, tcp_mapping) for record in newest]
        return tuple(sentences[:MAX_EVIDENCE])

    def _sentence(self, record: _Record, tcp_mapping: Mapping) -> str:
        peer = f"{record.by[:8]}…{record.by[-4:]}"
        came = "came in" if record.arrived else "did not come in"
        match record.kind:
            case _Kind.TCP | _Kind.UDP:
                if record.endpoint is None or record.local is None:
                    return f"{peer} did not answer over UDP"
                own = "this machine's own " if self._is_own(record) else ""
                return f"{peer} saw {record.kind.value} port {record.local.port} as {own}{record.endpoint}"
            case _Kind.DIAL if record.arrived and not self._is_proof(record, tcp_mapping):
                return f"a connection by {peer} to {record.endpoint} came in, maybe only because this node knows it"
            case _Kind.DIAL:
                return f"a connection from outside by {peer} to {record.endpoint} {came}"
            case _Kind.STRANGER:
                return f"a datagram by {peer}, to which this node had sent none, {came}"
            case _Kind.OTHER_PORT:
                return f"a datagram from another port of {peer} {came}"


def _cone(by_strangers: list[_Record], from_other_ports: list[_Record]) -> NatType:
    """The type of a NAT whose mapping is endpoint-independent, by what it lets in."""
    if any(record.arrived for record in by_strangers):
        return NatType.FULL_CONE
    if not by_strangers or not from_other_ports:
        return NatType.UNKNOWN
    return NatType.RESTRICTED if any(record.arrived for record in from_other_ports) else NatType.PORT_RESTRICTED


def _votes(records: Iterable[_Record]) -> list[_Record]:
    """The newest of each network."""
    return list({record.network: record for record in sorted(records, key=lambda record: record.at)}.values())


def _addresses(proofs: list[_Record], seen: list[_Record]) -> tuple[Endpoint, ...]:
    """Where this node may be reached: what is proven, then what most networks saw (one alone only if none agree)."""
    found: list[Endpoint] = []
    for attested, least in ((_attested(proofs), 1), (_attested(seen), 2)):
        enough = [endpoint for endpoint, num_networks in attested if num_networks >= least]
        found += enough or [endpoint for endpoint, _ in attested]
    return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]


def _attested(records: list[_Record]) -> list[tuple[Endpoint, int]]:
    newest_first = sorted(_votes(records), key=lambda record: -record.at)
    return Counter(record.endpoint for record in newest_first if record.endpoint is not None).most_common()


def _prefix(address: IpAddress, bits: dict[int, int]) -> str:
    return str(ipaddress.ip_network((address, bits[address.version]), strict=False))


def _scope(address: IpAddress) -> _Scope:
    if address.is_loopback:
        return _Scope.MACHINE
    return _Scope.INTERNET if address.is_global else _Scope.PRIVATE
