"""Which members to dial, where, and when again: those that are live, and those that were lost. A core.

A member is worth dialing if others hear of it, or if it was a member once and did not say that it left: in this life of
the node, or in an earlier one, whose addresses were kept. In a small swarm all of these are dialed until they are
connected; in a larger one gossip says whom it wants, and here only the lost are tried, one at a time, so that two parts
of a swarm that were cut off from each other find together again whatever their size.

Addresses are claims. What a member signed is dialed, if somebody who is connected passes it on; before a member was
reached for the first time, its tries go on the account of who brought its name, so that a peer who invents members
buys a few tries a minute for all of them. Addresses by which it was reached before come first, then those at an IP from
which it came. One that leads to this machine is dialed only if the member is likely to be on it: others would have this
node try the ports of its own programs.

How often one place may be dialed, whoever names it, says `shoal.node.budgets.Dials`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, assert_never

from shoal.node.budgets import Bucket
from shoal.node.mesh.addresses import ip_of, is_loopback, usefulness
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_MEMBERS

SMALL: Final = 32
"""Up to so many live members are all connected to each other."""
LOST_AT_ONCE: Final = 1
"""In a larger swarm so many lost ones are tried at a time."""
AT_ONCE: Final = 16
"""Members that are being dialed at a time."""
STEADY_S: Final = 10.0
"""Who was connected for less is not dialed at once when it is lost: it may be its game."""
MOVED_AGAIN_S: Final = 30.0
"""One that says again and again that it is somewhere else is not dialed at once each time."""
DIAL_AGAIN_S: Final = 1.0
DIAL_AGAIN_MAX_S: Final = 60.0
LONG_GONE_S: Final = 3600.0
LONG_GONE_AGAIN_S: Final = 600.0
"""How often one that is gone for longer than that is tried."""
MAX_ADDRESSES: Final = 16
"""Taken of what one member says."""
MAX_PROVEN: Final = 4
MAX_DIALED: Final = 8
"""Addresses of one member in one try; the next try takes the others."""
MAX_ADDRESS_CHARS: Final = 512
CARRIER_BURST: Final = 32.0
CARRIER_PER_S: Final = 0.5
"""Tries at members never reached yet, on the account of who passed on what they signed."""
MAX_CARRIERS: Final = 1024
MAX_KEPT_MEMBERS: Final = 64
MAX_KEPT_ADDRESSES: Final = 6
"""What is worth keeping on disk: of so many members, so many addresses each."""


@dataclass(frozen=True, slots=True)
class Told:
    """A member says where it is reached, signed by it.

    Attributes:
        addresses: whatever it sent.
        carrier: who passed it on.
    """

    peer: PeerId
    addresses: object
    carrier: PeerId


@dataclass(frozen=True, slots=True)
class Known:
    """Somebody may be a member: by what an earlier life kept, by a ticket, or by the DHT."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Back:
    """A member is connected.

    Attributes:
        address: of the far end.
        was_dialed: whether this node dialed it there.
    """

    peer: PeerId
    address: str
    was_dialed: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """A member is not connected any more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Left:
    """It said that it left, or that it is not in the swarm."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Tried:
    """A try is over; whether it is `Back` was told before."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Look:
    """Time to look who is to be dialed.

    Attributes:
        live: other members of whom something was heard lately.
        contacts: connected members.
        own: the addresses of this node.
    """

    live: AbstractSet[PeerId]
    contacts: AbstractSet[PeerId]
    own: tuple[str, ...]


Event = Told | Known | Back | Lost | Left | Tried | Look


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial a member by these, and say `Tried` when that is over."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Member:
    """One other member.

    Attributes:
        proven: addresses by which it was reached, newest first.
        told: what it said, in its order.
        named: what others say of it.
        was_met: whether it was connected in this life.
        seen_ip: from where it came last.
        carrier: who passed on its word; None if it needs none.
        is_sought: whether it is to be dialed though nothing is heard of it.
        since: when it was connected.
        moved_at: when it last said something new of where it is.
        gone_since: when it was last connected, or first known of; for how often it is tried.
        next_at: not before that.
        is_dialed: whether a try is under way.
    """

    proven: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    was_met: bool = False
    seen_ip: str = ""
    carrier: PeerId | None = None
    is_sought: bool = False
    since: float = 0.0
    moved_at: float = -math.inf
    gone_since: float = 0.0
    next_at: float = 0.0
    num_tries: int = 0
    is_dialed: bool = False

    def addresses(self) -> tuple[str, ...]:
        """All, in the order in which they are worth trying."""
        told = sorted(self.told, key=lambda address: ip_of(address) != self.seen_ip) if self.seen_ip else self.told
        return tuple(dict.fromkeys((*self.proven, *told, *self.named)))


@dataclass(slots=True)
class MembersStatistics:
    """What was left out."""

    refused_addresses: int = 0
    on_no_account: int = 0
    """Tries put off because who named the member has named too many that nobody reached."""
    forgotten: int = 0


@dataclass(slots=True)
class Members:
    """Where members are reached, and which of those that are not connected are dialed."""

    own: PeerId
    counters: MembersStatistics = field(default_factory=MembersStatistics)
    _members: dict[PeerId, _Member] = field(default_factory=dict)  # who was connected last is last
    _accounts: dict[PeerId, Bucket] = field(default_factory=dict)

    def handle(self, event: Event, now: float) -> list[Dial]:
        """Take in what happened; whom to dial."""
        match event:
            case Told(peer, addresses, carrier):
                self._told(peer, addresses, carrier, now)
            case Known(addresses):
                for peer, named in reversed(by_peer(addresses).items()):  # the newest first, here the newest last
                    self._named(peer, named, now)
            case Back():
                self._back(event, now)
            case Lost(peer):
                member = self._of(peer, now)
                if member is not None:
                    member.is_sought, member.gone_since = True, now
                    if now - member.since >= STEADY_S:
                        member.num_tries = 0
                    self._put_off(member, now)
            case Left(peer):
                self._members.pop(peer, None)
            case Tried(peer):
                self._tried(peer, now)
            case Look():
                return self._look(event, now)
            case _:
                assert_never(event)
        return []

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a member is reached, as far as is known, the best first."""
        member = self._members.get(peer)
        return () if member is None else member.addresses()

    @property
    def sought(self) -> list[PeerId]:
        """Who is to be dialed though nothing may be heard of it."""
        return [peer for peer, member in self._members.items() if member.is_sought]

    def worth_keeping(self) -> tuple[str, ...]:
        """Full multiaddrs of members to find them by in a later life, those connected last first.

        Of each first all that it was reached by, then what it says of itself; from its own machine only if need be.
        """
        kept: list[str] = []
        newest = list(self._members.values())[::-1]
        newest.sort(key=lambda each: (not each.was_met, not each.is_sought))
        for member in newest[:MAX_KEPT_MEMBERS]:
            known = member.addresses()
            others = sorted(known[len(member.proven) :], key=usefulness)
            kept += [*member.proven, *others][:MAX_KEPT_ADDRESSES]
        return tuple(kept)

    # What is known.

    def _of(self, peer: PeerId, now: float) -> _Member | None:
        if peer == self.own:
            return None
        member = self._members.get(peer)
        if member is None:
            while len(self._members) >= 2 * MAX_MEMBERS:  # names cost nothing: those never met go first
                doomed = next((each for each, known in self._members.items() if not known.was_met), None)
                del self._members[doomed or next(iter(self._members))]
                self.counters.forgotten += 1
            member = self._members[peer] = _Member(gone_since=now, next_at=now)
        return member

    def _told(self, peer: PeerId, addresses: object, carrier: PeerId, now: float) -> None:
        member = self._of(peer, now)
        if member is None:
            return
        said = addresses[: 4 * MAX_ADDRESSES] if isinstance(addresses, list) else []
        found = [each for each in said if _is_of(each, peer)]
        self.counters.refused_addresses += len(said) - len(found)
        before = member.told
        member.told = tuple(dict.fromkeys(found))[:MAX_ADDRESSES]
        if not member.proven and member.carrier is None and carrier != peer:
            member.carrier = carrier
        if set(member.told) - set(before) and member.proven and now >= member.moved_at + MOVED_AGAIN_S:
            member.moved_at = now
            member.next_at = min(member.next_at, now)  # it is somewhere else now

    def _named(self, peer: PeerId, addresses: Iterable[str], now: float) -> None:
        member = self._of(peer, now)
        if member is None:
            return
        found = [each for each in addresses if _is_of(each, peer)]
        member.named = tuple(dict.fromkeys((*found, *member.named)))[:MAX_ADDRESSES]
        member.is_sought = True

    def _back(self, event: Back, now: float) -> None:
        member = self._of(event.peer, now)
        if member is None:
            return
        self._members[event.peer] = self._members.pop(event.peer)
        account = self._accounts.get(member.carrier) if member.carrier is not None else None
        if account is not None:  # it was one that exists
            account.give_back(member.num_tries + member.is_dialed)
        member.carrier = None
        member.is_sought = False
        member.was_met, member.since = True, now
        member.seen_ip = ip_of(event.address)
        if event.was_dialed and _is_of(event.address, event.peer):
            member.proven = tuple(dict.fromkeys((event.address, *member.proven)))[:MAX_PROVEN]

    def _tried(self, peer: PeerId, now: float) -> None:
        member = self._members.get(peer)
        if member is not None:
            member.is_dialed = False
            member.num_tries += 1
            self._put_off(member, now)

    @staticmethod
    def _put_off(member: _Member, now: float) -> None:
        """The next try: at once after a connection that was steady, and then after twice the wait each time."""
        longest = LONG_GONE_AGAIN_S if now - member.gone_since > LONG_GONE_S else DIAL_AGAIN_MAX_S
        wait_s = min(DIAL_AGAIN_S * 2.0 ** min(member.num_tries - 1, 16), longest) if member.num_tries else 0.0
        member.next_at = now + wait_s

    # Whom to dial.

    def _look(self, event: Look, now: float) -> list[Dial]:
        is_small = len(event.live) <= SMALL
        num_dialed = sum(member.is_dialed for member in self._members.values())
        room = AT_ONCE if is_small or not event.contacts else LOST_AT_ONCE
        due = [
            (peer not in event.live, member.next_at, peer)
            for peer, member in self._members.items()
            if peer not in event.contacts
            and not member.is_dialed
            and member.next_at <= now
            and (member.is_sought if peer not in event.live else is_small or not event.contacts)
        ]
        found: list[Dial] = []
        for _, _, peer in sorted(due):
            if num_dialed + len(found) >= room:
                break
            member = self._members[peer]
            addresses = self._to_dial(member, event.own)
            if not addresses:
                self._tried(peer, now)
            elif self._is_on_account(member, now):
                member.is_dialed = True
                found.append(Dial(peer, addresses))
        return found

    def _to_dial(self, member: _Member, own: tuple[str, ...]) -> tuple[str, ...]:
        """Those of its addresses that this try takes."""
        known = [each for each in member.addresses() if each in member.proven or _is_sensible(each, member, own)]
        proven = [each for each in known if each in member.proven]
        others = known[len(proven) :]
        room = MAX_DIALED - len(proven)
        if len(others) > room:
            begin = member.num_tries * room % len(others)
            others = [*others[begin:], *others[:begin]][:room]
        return (*proven, *others)

    def _is_on_account(self, member: _Member, now: float) -> bool:
        """Whether who brought this member's name may have it dialed once more."""
        carrier = member.carrier
        if carrier is None or member.proven:
            return True
        account = self._accounts.get(carrier)
        if account is None:
            account = self._accounts[carrier] = Bucket(CARRIER_PER_S, CARRIER_BURST)
            while len(self._accounts) > MAX_CARRIERS:
                del self._accounts[next(iter(self._accounts))]
        if account.take(now):
            return True
        self.counters.on_no_account += 1
        return False


def by_peer(addresses: Iterable[str]) -> dict[PeerId, list[str]]:
    """Full multiaddrs by the peer that they lead to; what leads to none is left out."""
    found: dict[PeerId, list[str]] = {}
    for address in addresses:
        _, marker, peer = address.rpartition("/p2p/")
        try:
            name = PeerId.parse(peer) if marker else None
        except UsageError:  # some other libp2p's, or nonsense
            continue
        if name is not None:
            found.setdefault(name, []).append(address)
    return found


def _is_of(address: object, peer: PeerId) -> bool:
    """Whether this could be an address of a peer's own."""
    return isinstance(address, str) and len(address) <= MAX_ADDRESS_CHARS and address.endswith(f"/p2p/{peer}")


def _is_sensible(address: str, member: _Member, own: tuple[str, ...]) -> bool:
    """Whether an address leads to this machine only if the member may be on it."""
    if not is_loopback(ip_of(address)):
        return True
    here = {ip_of(each) for each in own}
    there = {ip_of(each) for each in (*member.told, *member.named, *member.proven)}
    return all(map(is_loopback, filter(None, here))) or any(ip and not is_loopback(ip) for ip in here & there)
