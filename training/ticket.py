"""Tickets: all that another person needs to join a run, as one string to copy.

``shoal1`` and then base32 of: a CRC-32, and MessagePack of the swarm's CID and some addresses of members. The
checksum catches a ticket that was cut or mistyped; the CID makes the manifest that comes back checkable.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import SwarmId

_PREFIX: Final = "shoal1"
MAX_TICKET_CHARS: Final = 4096
MAX_ADDRESSES: Final = 12


def in_turns(by_member: Iterable[Sequence[str]], usefulness: Callable[[str], int]) -> list[str]:
    """Addresses of several members: the best of each, then the second best of each, and so on.

    So a ticket leads somewhere as long as one of them is there. An address that is useful to few comes after all that
    are useful to more.

    Args:
        by_member: of each its addresses; a member named earlier comes earlier.
        usefulness: the lower the better.
    """
    turns = [
        (usefulness(each), turn, each) for known in by_member for turn, each in enumerate(_ranked(known, usefulness))
    ]
    return list(dict.fromkeys(address for *_, address in sorted(turns, key=lambda each: each[:2])))


def _ranked(addresses: Sequence[str], usefulness: Callable[[str], int]) -> list[str]:
    return sorted(dict.fromkeys(addresses), key=usefulness)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Which run, and where to find some of its members.

    Attributes:
        swarm: the run.
        addresses: full multiaddrs, ``/p2p/`` included.
    """

    swarm: SwarmId
    addresses: tuple[str, ...]

    @classmethod
    def of(cls, swarm: SwarmId, addresses: Iterable[str]) -> Ticket:
        """A ticket with as many of these as it can carry, from the first on."""
        taken: tuple[str, ...] = ()
        for address in dict.fromkeys(addresses):
            if len(taken) == MAX_ADDRESSES:
                break
            if len(str(cls(swarm, (*taken, address)))) <= MAX_TICKET_CHARS:
                taken = (*taken, address)
        return cls(swarm, taken)

    def __str__(self) -> str:
        payload = encode(self)
        raw = zlib.crc32(payload).to_bytes(4, "big") + payload
        return _PREFIX + base64.b32encode(raw).decode().rstrip("=").lower()

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """Read a ticket.

        Raises:
            UsageError: if it is none, or damaged.
        """
        text = text.strip()
        if not text.startswith(_PREFIX) or len(text) > MAX_TICKET_CHARS:
            raise UsageError(f"this is not a ticket: one starts with {_PREFIX!r}; ask for it again")
        body = text[len(_PREFIX) :].upper()
        try:
            raw = base64.b32decode(body + "=" * (-len(body) % 8))
        except ValueError as error:
            raise UsageError("this ticket is damaged: copy it again, whole") from error
        if base64.b32encode(raw).decode().rstrip("=") != body:  # the last character has bits to spare
            raise UsageError("this ticket is damaged: copy it again, whole")
        if len(raw) < 5 or zlib.crc32(raw[4:]).to_bytes(4, "big") != raw[:4]:
            raise UsageError("this ticket is damaged: copy it again, whole")
        try:
            return decode(cls, raw[4:])
        except ProtocolError as error:
            raise UsageError(f"this ticket makes no sense ({error}); ask for it again") from error
