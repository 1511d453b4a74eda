"""The methods that nodes serve each other, with the types of their requests and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import Empty, Method
from shoal.protocol.signing import Signed


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Asks for one block; it comes as the answer's only attachment."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Asks for the ops that the caller lacks.

    Attributes:
        version: the caller's newest sequence number, by author.
    """

    swarm: SwarmId
    version: dict[str, int]


@dataclass(frozen=True, slots=True)
class SyncAnswer:
    """Ops that the caller lacks, in order (maybe not all of them), and the answerer's own version."""

    ops: tuple[Signed, ...]
    version: dict[str, int]


@dataclass(frozen=True, slots=True)
class OpsPush:
    """New ops."""

    swarm: SwarmId
    ops: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class PresencePush:
    """New presence records."""

    swarm: SwarmId
    records: tuple[Signed, ...] = field(default=())


def typed_version(version: dict[str, int]) -> dict[PeerId, int]:
    """A version vector as it came from a peer, checked.

    Raises:
        UsageError: if an author is not a peer id.
    """
    return {PeerId.parse(author): seq for author, seq in version.items()}


PING: Final = Method("node.ping", Empty, Empty)
BLOCK: Final = Method("content.block", BlockRequest, Empty)
SYNC: Final = Method("crdt.sync", SyncRequest, SyncAnswer)
PUSH_OPS: Final = Method("crdt.push", OpsPush, Empty)
PUSH_PRESENCE: Final = Method("presence.push", PresencePush, Empty)
