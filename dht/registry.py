"""Names of models: ``OWNER/NAME[@VERSION]``, and what they stand for.

The newest version of a model is a record that only its owner can sign, numbered by the version. It names the manifests
of the `MAX_EARLIER` versions before it, so a version never means two things: a newer record that says otherwise
contradicts the older one, and both together prove it (`Record.contradicts`). Whoever has seen a version takes no older
one in its place, and whoever has such a proof takes neither content by that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from shoal.dht.records import MAX_EARLIER, MAX_TAGS, MAX_TOPIC_CHARS, Model, Record
from shoal.protocol.errors import NoPeersError, RefusedError, UsageError
from shoal.protocol.ids import Cid, PeerId

MAX_NAME_CHARS: Final = 64
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAG: Final = re.compile(r"[\w][\w.:/+-]*")


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a person names a model by.

    Attributes:
        owner: the peer that signs it.
        name: that the owner gave it.
        version: which; None: the newest.
    """

    owner: PeerId
    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read ``OWNER/NAME`` or ``OWNER/NAME@VERSION``.

        Raises:
            UsageError: if it is no such name.
        """
        owner, slash, rest = text.partition("/")
        name, at, version = rest.partition("@")
        if not slash or (at and not (version.isascii() and version.isdigit() and 0 < int(version[:20]) < 2**63)):
            raise UsageError(f"{text[:120]!r} is no model; write OWNER/NAME or OWNER/NAME@VERSION, VERSION from 1 on")
        return cls(PeerId.parse(owner), check_name(name), int(version) if at else None)

    def __str__(self) -> str:
        return f"{self.owner}/{self.name}" + ("" if self.version is None else f"@{self.version}")


def check_name(name: str) -> str:
    """A model's name without its owner.

    Raises:
        UsageError: if a model cannot be called that.
    """
    if len(name) > MAX_NAME_CHARS or not _WORD.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is no name for a model; use up to {MAX_NAME_CHARS} letters, digits and . _ -, "
            "with a letter or digit first"
        )
    return name


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags in one spelling, each once.

    Raises:
        UsageError: if one is no tag, or there are too many.
    """
    found = tuple(dict.fromkeys(tag.lower() for tag in tags))
    for tag in found:
        if len(tag) > MAX_TOPIC_CHARS - 8 or not _TAG.fullmatch(tag):
            raise UsageError(f"{tag[:80]!r} is no tag; use letters, digits and . : / + _ - without blanks")
    if len(found) > MAX_TAGS:
        raise UsageError(f"a model has at most {MAX_TAGS} tags, not {len(found)}")
    return found


def next_version(
    newest: Record | None, manifest: Cid, num_bytes: int, tags: tuple[str, ...] = (), task: str = ""
) -> tuple[int, Model]:
    """The version that follows, and its number.

    Args:
        newest: the record of the version before, if there is one.
        manifest: of the new content.
        num_bytes: of it.
        tags: to find it by.
        task: that it was trained for.
    """
    if newest is None:
        return 1, Model(manifest, num_bytes, tags, task)
    before: Model = newest.body
    earlier = (before.manifest, *before.earlier)[:MAX_EARLIER]
    return newest.statement.seq + 1, Model(manifest, num_bytes, tags, task, earlier)


def history(newest: Record) -> dict[int, Cid]:
    """The manifest of each version that a record names, the newest first."""
    body: Model = newest.body
    version = newest.statement.seq
    return {version - back: cid for back, cid in enumerate((body.manifest, *body.earlier)) if version - back > 0}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a model.

    Attributes:
        newest: the record with the highest version that was seen.
        fork: two records of it that contradict each other, if any did.
    """

    newest: Record
    fork: tuple[Record, Record] | None = None

    def records(self) -> tuple[Record, ...]:
        """All that others need to know the same."""
        return tuple(dict.fromkeys((self.newest, *(self.fork or ()))))

    def disputed(self) -> dict[int, tuple[Cid, Cid]]:
        """Versions for which the owner signed two contents, with both."""
        return {} if self.fork is None else _disputed(*self.fork)


def learn(known: Known | None, records: Iterable[Record]) -> Known | None:
    """What is known of a model after some more records of it, a few; the same if they say nothing new."""
    pool = [*(() if known is None else known.records()), *records]
    if not pool:
        return None
    newest = pool[0]
    for record in pool:
        is_new = (record.statement.seq, record.body) != (newest.statement.seq, newest.body)
        newest = record if is_new and record.beats(newest) else newest
    forks = [known.fork] if known is not None and known.fork is not None else []
    forks += [(one, other) for one, other in combinations(pool, 2) if one.contradicts(other)]
    return Known(newest, next((pair for pair in forks if _disputed(*pair)), forks[0] if forks else None))


def _disputed(one: Record, other: Record) -> dict[int, tuple[Cid, Cid]]:
    said, retold = history(one), history(other)
    both = sorted(said.keys() & retold.keys())
    return {version: (said[version], retold[version]) for version in both if said[version] != retold[version]}


def resolve(name: ModelName, known: Known | None) -> tuple[int, Cid]:
    """Which version a name means, and its manifest.

    Raises:
        NoPeersError: if nobody knows the model now.
        UsageError: if there is no such version, or it is too old to be named.
        RefusedError: if its owner signed two contents for it.
    """
    if known is None:
        raise NoPeersError(f"nobody who can be reached knows {name}; check the name, or try when more peers are there")
    versions = history(known.newest)
    version = known.newest.statement.seq if name.version is None else name.version
    if version not in versions:
        raise UsageError(f"{name} is not there: versions {min(versions)} to {max(versions)} of it can be had")
    if version in (disputed := known.disputed()):
        one, other = disputed[version]
        raise RefusedError(
            f"the owner of {name} signed two contents for version {version}: {one} and {other}; "
            "get the one that you trust by its CID"
        )
    return version, versions[version]
