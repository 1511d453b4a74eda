"""What peers that take part in the distributed hash table ask each other. Who carries it is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.dht.routing import Contact
from shoal.protocol.signing import Signed

MAX_CONTACTS: Final = 20
MAX_RECORDS: Final = 40
MAX_ANSWER_BYTES: Final = 200_000
"""Of an answer: its records take 160,000 at most, its contacts 16,000."""


@dataclass(frozen=True, slots=True)
class FindRequest:
    """Asks for the peers nearest to a key, and for the records that are kept there.

    Attributes:
        key: which, 32 bytes.
        is_for_records: whether these are wanted.
        addresses: where the caller is asked, if it takes part as a server; none: do not ask it.
    """

    key: bytes
    is_for_records: bool = False
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """What the answerer knows.

    Attributes:
        contacts: nearest to the key.
        records: kept there.
        addresses: where the answerer is asked, as above.
    """

    contacts: tuple[Contact, ...]
    records: tuple[Signed, ...] = ()
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """Asks to keep a record."""

    record: Signed


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """Whether it is kept; and what is kept in its place, if something better was there."""

    is_kept: bool
    better: Signed | None = None
