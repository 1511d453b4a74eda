"""Where things are in the distributed hash table: 256-bit numbers, and who is how far from one.

As in Kademlia (Maymounkov and Mazières, 2002) a thing is kept by the peers whose keys are nearest to its own, where the
distance of two keys is their exclusive or.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final, NewType

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId

Key = NewType("Key", int)
BITS: Final = 256
KEY_BYTES: Final = BITS // 8


@lru_cache(maxsize=32_768)
def key_of_peer(peer: PeerId) -> Key:
    """Where a peer is."""
    return _hash(b"peer\0" + peer.encode())


def key_of_topic(kind: str, topic: str, owner: PeerId | None) -> Key:
    """Where records are kept: those of all authors about a topic, or of one owner's."""
    return _hash("\0".join(("record", kind, topic, owner or "")).encode())


def key_to_bytes(key: Key) -> bytes:
    """As it goes over the wire."""
    return key.to_bytes(KEY_BYTES, "big")


def key_from_bytes(raw: bytes) -> Key:
    """As it came.

    Raises:
        ProtocolError: if it is of another length.
    """
    if len(raw) != KEY_BYTES:
        raise ProtocolError(f"a key of the DHT has {KEY_BYTES} bytes, not {len(raw)}")
    return Key(int.from_bytes(raw, "big"))


def _hash(data: bytes) -> Key:
    return Key(int.from_bytes(hashlib.sha256(b"shoal/dht/" + data).digest(), "big"))
