"""Whom a node may ask: contacts in buckets by distance, many of those near it and few of those far (Kademlia).

A bucket keeps whoever was there first, as long as it answers: who has been up long stays up longer, and a flood of new
names displaces nobody. Newcomers wait as replacements. So that one owner of many addresses does not fill a bucket, few
contacts of one network (IPv4 /16, IPv6 /32) are in one; private addresses are not counted, as a LAN has no other.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Final

from shoal.dht.keyspace import BITS, Key, key_of_peer
from shoal.protocol.ids import PeerId

K: Final = 20
"""Contacts of a bucket, and peers that keep a record (Kademlia's k)."""
MAX_REPLACEMENTS: Final = 8
MAX_OF_NETWORK: Final = 3
"""Contacts of one bucket in one network."""
MAX_CONTACT_ADDRESSES: Final = 4
MAX_CONTACT_ADDRESS_CHARS: Final = 160
MAX_FAILURES: Final = 2
"""Questions in a row that a contact may leave unanswered, if nobody waits for its place."""


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer that takes part, and full multiaddrs to ask it at; none where it is asked by its connection alone."""

    peer: PeerId
    addresses: tuple[str, ...]


def usable(contact: Contact) -> Contact | None:
    """The same with those of its addresses that count, a few of them; None if there is none, so that nobody asks it."""
    found = direct(contact.addresses, contact.peer)
    if len(found) == len(contact.addresses):
        return contact if found else None
    return Contact(contact.peer, found) if found else None


def direct(addresses: Iterable[str], peer: PeerId) -> tuple[str, ...]:
    """The first few of those addresses that lead to a peer by TCP, with nobody in between and no name to look up."""
    found = (each for each in addresses if len(each) <= MAX_CONTACT_ADDRESS_CHARS and _is_direct(each, peer))
    return tuple(islice(found, MAX_CONTACT_ADDRESSES))


@lru_cache(maxsize=8192)
def _is_direct(address: str, peer: PeerId) -> bool:
    match address.split("/"):
        case ["", "ip4" | "ip6" as family, ip, "tcp", port, "p2p", name] if name == peer:
            is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
            return is_port and _is_ip(ip, int(family[2:]))
    return False


def _is_ip(text: str, version: int) -> bool:
    try:
        return "%" not in text and ipaddress.ip_address(text).version == version
    except ValueError:
        return False


@lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """The network that a multiaddr is in; empty if it is a private one, or none can be told."""
    parts = address.split("/", 3)
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return ""
    try:
        ip = ipaddress.ip_address(parts[2])
    except ValueError:
        return ""
    if not ip.is_global:
        return ""
    prefix = 16 if ip.version == 4 else 32
    return str(ipaddress.ip_network(f"{ip}/{prefix}", strict=False))


class _Bucket:
    __slots__ = ("contacts", "failures", "refreshed_at", "waiting")

    def __init__(self) -> None:
        self.contacts: dict[PeerId, Contact] = {}  # whoever answered last is last
        self.failures: Counter[PeerId] = Counter()
        self.waiting: dict[PeerId, Contact] = {}
        self.refreshed_at = float("-inf")


class RoutingTable:
    """The contacts of one node."""

    def __init__(self, me: PeerId) -> None:
        self._me = key_of_peer(me)
        self._buckets: list[_Bucket | None] = [None] * BITS
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Contact]:
        for bucket in self._buckets:
            if bucket is not None:
                yield from bucket.contacts.values()

    def heard(self, contact: Contact) -> None:
        """A peer that takes part answered, or asked."""
        bucket = self._bucket(contact.peer)
        if bucket is None:
            return
        if bucket.contacts.pop(contact.peer, None) is not None:
            bucket.contacts[contact.peer] = contact
            if contact.peer in bucket.failures:
                del bucket.failures[contact.peer]
        elif len(bucket.contacts) < K and self._is_welcome(bucket, contact):
            bucket.waiting.pop(contact.peer, None)
            bucket.contacts[contact.peer] = contact
            self._size += 1
        else:
            bucket.waiting.pop(contact.peer, None)
            bucket.waiting[contact.peer] = contact
            if len(bucket.waiting) > MAX_REPLACEMENTS:
                del bucket.waiting[next(iter(bucket.waiting))]

    def failed(self, peer: PeerId) -> None:
        """A peer did not answer."""
        bucket = self._bucket(peer)
        if bucket is None or peer not in bucket.contacts:
            return
        bucket.failures[peer] += 1
        if bucket.waiting or bucket.failures[peer] >= MAX_FAILURES:
            self.forget(peer)
            for other in list(reversed(bucket.waiting.values())):
                if self._is_welcome(bucket, other):
                    del bucket.waiting[other.peer]
                    bucket.contacts[other.peer] = other
                    self._size += 1
                    return

    def forget(self, peer: PeerId) -> None:
        """A peer takes part no more."""
        bucket = self._bucket(peer)
        if bucket is not None:
            bucket.waiting.pop(peer, None)
            del bucket.failures[peer]
            if bucket.contacts.pop(peer, None) is not None:
                self._size -= 1

    def get(self, peer: PeerId) -> Contact | None:
        """A contact by its name."""
        bucket = self._bucket(peer)
        return None if bucket is None else bucket.contacts.get(peer)

    def closest(self, key: Key, count: int = K, but: PeerId | None = None) -> list[Contact]:
        """The contacts nearest to a key, the nearest first."""
        found: list[Contact] = []
        top = (self._me ^ key).bit_length() - 1
        # What is in bucket `top` is nearer than 2^top to the key, what is in lower ones is not; higher ones come after.
        if top >= 0:
            self._add_nearest(found, [self._buckets[top]], key, count, but)
        if len(found) < count:
            self._add_nearest(found, self._buckets[: max(top, 0)], key, count, but)
        for bucket in self._buckets[top + 1 :]:
            if len(found) >= count:
                break
            if bucket is not None:
                self._add_nearest(found, [bucket], key, count, but)
        return found

    def stalest(self) -> int | None:
        """The bucket in whose range nobody was looked for longest: its number, for `touch`; None if all are empty."""
        filled = [number for number, bucket in enumerate(self._buckets) if bucket is not None and bucket.contacts]
        if not filled:
            return None
        # those nearer than the nearest contact are as good as empty; one below is worth a look
        return min(range(max(filled[0] - 1, 0), BITS), key=self._refreshed_at)

    def touch(self, key: Key, now: float) -> None:
        """Somebody is looked for there."""
        number = (self._me ^ key).bit_length() - 1
        if number >= 0:
            self._at(number).refreshed_at = now

    def key_in(self, number: int, chance: int) -> Key:
        """A key in the range of a bucket; which one, ``chance`` says, a number of 256 random bits."""
        return Key(self._me ^ ((1 << number) | (chance & ((1 << number) - 1))))

    def _refreshed_at(self, number: int) -> float:
        bucket = self._buckets[number]
        return float("-inf") if bucket is None else bucket.refreshed_at

    def _bucket(self, peer: PeerId) -> _Bucket | None:
        number = (self._me ^ key_of_peer(peer)).bit_length() - 1
        return None if number < 0 else self._at(number)

    def _at(self, number: int) -> _Bucket:
        bucket = self._buckets[number]
        if bucket is None:
            bucket = self._buckets[number] = _Bucket()
        return bucket

    @staticmethod
    def _is_welcome(bucket: _Bucket, contact: Contact) -> bool:
        networks = {network for address in contact.addresses if (network := network_of(address))}
        if not networks:
            return True
        taken = Counter(
            network
            for other in bucket.contacts.values()
            for network in {network_of(address) for address in other.addresses}
        )
        return all(taken[network] < MAX_OF_NETWORK for network in networks)

    @staticmethod
    def _add_nearest(
        found: list[Contact], buckets: list[_Bucket | None], key: Key, count: int, but: PeerId | None
    ) -> None:
        here = [
            (key_of_peer(peer) ^ key, contact)
            for bucket in buckets
            if bucket is not None
            for peer, contact in bucket.contacts.items()
            if peer != but
        ]
        here.sort(key=lambda each: each[0])
        found += [contact for _, contact in here[: count - len(found)]]
