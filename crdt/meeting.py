"""What two members that meet have to tell each other of who is there: what the other lacks or has older, and no more.

Each asks the other. The question is a *summary*: the records that the asker holds, sorted into buckets by whose they
are and on which topic, and a hash of each bucket (`summary`). The answer says which of these buckets differ, and lists
what the answerer holds in them, by author, topic, incarnation and number (`differing`). What is not in that list is
sent (`lacking`). So two that hold nearly the same exchange a few kilobytes, however many members there are, in one
round trip and without anything remembered in between. It is one step of range-based set reconciliation (Meyer 2023,
https://arxiv.org/abs/2212.13567), with the ranges fixed in advance: more steps would cost round trips for bytes that
are few already.

A bucket in which the asker has nothing is not answered for: it has nothing to give there. What either says is taken
for no more than a wish: a liar that names what it does not hold is not sent it, one that names nothing is sent what is
held, once. The hashes are of whole buckets, so nobody's records can hide another's.

All of it is a function of two tables, and bounded by the size of the own one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from shoal.crdt.presence import MAX_STAMP, SUBJECT_BYTES, Opened, PresenceTable
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.signing import Signed

BUCKET_BYTES: Final = 8
MAX_BUCKETS: Final = 2048
RECORDS_PER_BUCKET: Final = 4
"""A summary has about a bucket for so many records: 2 bytes a record asked, some 100 answered for one that differs."""

_ROW: Final = Struct(f">{SUBJECT_BYTES}sQQ")  # whose and on what, incarnation, number
ROW_BYTES: Final = _ROW.size
MAX_ROWS: Final = 8192
"""Records that one answer may list; as many as `limits.MAX_MEMBERS` members can have said. Beyond them a bucket counts
as equal until the next meeting."""
_NOTHING: Final = bytes(BUCKET_BYTES)


@dataclass(frozen=True, slots=True)
class Differing:
    """What is not the same in two tables, as the one that was asked tells it.

    Attributes:
        buckets: a bit for each bucket of the summary, the lowest first: whether it differs.
        rows: `ROW_BYTES` for each record that is held in them.
    """

    buckets: bytes
    rows: bytes


def summary(table: PresenceTable) -> bytes:
    """A hash for each bucket of what is held: a power of two of them, `BUCKET_BYTES` each, zeros for an empty one."""
    held = table.held()
    num_buckets = 1
    while num_buckets * RECORDS_PER_BUCKET < len(held) and num_buckets < MAX_BUCKETS:
        num_buckets *= 2
    return b"".join(map(_hash, _sorted_into(num_buckets, held)))


def differing(table: PresenceTable, theirs: bytes) -> Differing:
    """What is held here where a peer's summary says that it holds something else.

    Raises:
        ProtocolError: if it is no summary.
    """
    num_buckets = len(theirs) // BUCKET_BYTES
    if not 0 < num_buckets <= MAX_BUCKETS or num_buckets & (num_buckets - 1) or len(theirs) % BUCKET_BYTES:
        raise ProtocolError(
            f"{len(theirs)} bytes are no summary: it has 8 for each of 1, 2, 4, … {MAX_BUCKETS} buckets"
        )
    differs = bytearray(-(-num_buckets // 8))
    rows: list[bytes] = []
    for number, bucket in enumerate(_sorted_into(num_buckets, table.held())):
        said = theirs[BUCKET_BYTES * number : BUCKET_BYTES * (number + 1)]
        if said == _NOTHING or said == _hash(bucket) or len(rows) + len(bucket) > MAX_ROWS:
            continue
        differs[number // 8] |= 1 << number % 8
        rows += [_ROW.pack(opened.subject, *opened.stamp) for opened in bucket]
    return Differing(bytes(differs), b"".join(rows))


def lacking(table: PresenceTable, num_buckets: int, theirs: Differing) -> list[Signed]:
    """The records of those who are there that a peer lacks, or has older: this node's first.

    Args:
        table: what is held here.
        num_buckets: of the summary that it answers.
        theirs: the answer.

    Raises:
        LimitError: if it lists more than a table can hold.
        ProtocolError: if it is no answer to such a summary.
    """
    if len(theirs.rows) > MAX_ROWS * ROW_BYTES:
        raise LimitError(f"a peer lists more than {MAX_ROWS} records of presence")
    if len(theirs.buckets) != -(-num_buckets // 8) or len(theirs.rows) % ROW_BYTES:
        raise ProtocolError(f"this answers no summary of {num_buckets} buckets")
    has: dict[bytes, list[tuple[int, int]]] = {}
    for subject, started_at, seq in _ROW.iter_unpack(theirs.rows):
        has.setdefault(subject, []).append((min(started_at, MAX_STAMP), min(seq, MAX_STAMP)))
    return [
        opened.sealed
        for opened in table.held(with_gone=False)
        if _is_set(theirs.buckets, _bucket_of(opened, num_buckets))
        and not _is_superseded(table, opened, has.get(opened.subject, []))
    ]


def _is_superseded(table: PresenceTable, opened: Opened, has: list[tuple[int, int]]) -> bool:
    """Whether somebody that holds these of the same author and topic has no use for the record."""
    stamp = opened.stamp
    if stamp in has:
        return True
    if opened.presence.author == table.own:  # whoever has newer words in this node's name answers with them
        return False
    newest = max(has, default=stamp)
    return newest[0] > stamp[0] or (len(has) >= table.topics[opened.presence.topic].keep and stamp < min(has))


def _bucket_of(opened: Opened, num_buckets: int) -> int:
    return int.from_bytes(opened.subject[-2:], "big") % num_buckets


def _sorted_into(num_buckets: int, held: Iterable[Opened]) -> list[list[Opened]]:
    buckets: list[list[Opened]] = [[] for _ in range(num_buckets)]
    for opened in held:
        buckets[_bucket_of(opened, num_buckets)].append(opened)
    return buckets


def _hash(bucket: list[Opened]) -> bytes:
    if not bucket:
        return _NOTHING
    return hashlib.sha256(b"".join(sorted([opened.item for opened in bucket]))).digest()[:BUCKET_BYTES]


def _is_set(bits: bytes, number: int) -> bool:
    return bool(bits[number // 8] >> number % 8 & 1)
