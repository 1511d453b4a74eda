"""Names of things, each a type of its own.

`PeerId` is libp2p's (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md) for an Ed25519 key:
the public key itself under an identity multihash, in base58btc. So whoever knows a peer's name can check its
signatures. `Cid` is CIDv1 in base32 (https://github.com/multiformats/cid), always over sha2-256.

All are ``str`` underneath: they print, compare, sort and serialise as their text form.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from typing import Final, Self, TypeVar

import base58

from shoal.protocol.errors import UsageError

_Name = TypeVar("_Name", bound=str)

_PEER_PREFIX: Final = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])  # identity multihash, 36 bytes, protobuf Ed25519
_MAX_PEER_CHARS: Final = 64  # an Ed25519 peer id has 52
_MAX_REMEMBERED: Final = 4096
"""Names of each kind whose bytes are at hand: a peer's is read with each signed thing of its author, a swarm's with
each call about it."""
_CID_PREFIX_RAW: Final = bytes([0x01, 0x55, 0x12, 0x20])  # CIDv1, raw, sha2-256, 32 bytes
_CID_PREFIX_MSGPACK: Final = bytes([0x01, 0x81, 0x04, 0x12, 0x20])  # CIDv1, messagepack, sha2-256, 32 bytes


class PeerId(str):
    """The name of a node: its Ed25519 public key, for example ``12D3KooW…``."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check and take a peer id as text.

        Raises:
            UsageError: if it is not the base58 form of an Ed25519 peer id.
        """
        _public_key_in(text)
        known: Self = _same(cls, text)
        return known

    @classmethod
    def of_public_key(cls, key: bytes) -> Self:
        """The peer id of a raw 32-byte Ed25519 public key."""
        return cls(base58.b58encode(_PEER_PREFIX + key).decode())

    @property
    def public_key(self) -> bytes:
        """The raw 32-byte Ed25519 public key inside the name."""
        return _public_key_in(str(self))


@lru_cache(maxsize=_MAX_REMEMBERED)
def _same(kind: type[_Name], text: str) -> _Name:
    """One object for one name: what is remembered of what peers said names each of them again and again."""
    return kind(text)


@lru_cache(maxsize=_MAX_REMEMBERED)
def _public_key_in(text: str) -> bytes:
    if len(text) > _MAX_PEER_CHARS:  # decoding takes time that grows with the square of the length
        raise UsageError(f"{text[:80]!r}… is too long for a peer id; one looks like 12D3KooW…")
    try:
        raw = base58.b58decode(text)
    except ValueError as error:
        raise UsageError(f"{text[:80]!r} is not a peer id; one looks like 12D3KooW…") from error
    if base58.b58encode(raw).decode() != text:  # the decoder drops white space; a name has one spelling
        raise UsageError(f"{text[:80]!r} is not a peer id; leave out the white space")
    if len(raw) != len(_PEER_PREFIX) + 32 or not raw.startswith(_PEER_PREFIX):
        raise UsageError(f"{text[:80]!r} is not an Ed25519 peer id; one looks like 12D3KooW…")
    return raw[len(_PEER_PREFIX) :]


class Cid(str):
    """The name of some bytes: CIDv1 over their sha2-256, for example ``bafkrei…``."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check and take a CID as text.

        Raises:
            UsageError: if it is not a base32 CIDv1 (raw or messagepack) over sha2-256.
        """
        _cid_bytes(str(text))
        return cls(text)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Take a CID's binary form.

        Raises:
            UsageError: as `parse`.
        """
        text = "b" + base64.b32encode(raw).decode().rstrip("=").lower()
        return cls.parse(text)

    @classmethod
    def of_block(cls, data: bytes | memoryview) -> Self:
        """The CID of one block of raw bytes."""
        return cls._of(_CID_PREFIX_RAW, data)

    @classmethod
    def of_manifest(cls, data: bytes | memoryview) -> Self:
        """The CID of a MessagePack manifest, which describes something bigger than itself."""
        return cls._of(_CID_PREFIX_MSGPACK, data)

    @classmethod
    def of_digest(cls, digest: bytes) -> Self:
        """The CID of one block of raw bytes, by its sha2-256."""
        return cls("b" + base64.b32encode(_CID_PREFIX_RAW + digest).decode().rstrip("=").lower())

    @classmethod
    def _of(cls, prefix: bytes, data: bytes | memoryview) -> Self:
        raw = prefix + hashlib.sha256(data).digest()
        return cls("b" + base64.b32encode(raw).decode().rstrip("=").lower())

    def to_bytes(self) -> bytes:
        """The binary form: version, codec, hash function, length, digest."""
        return _cid_bytes(str(self))

    @property
    def is_manifest(self) -> bool:
        """Whether the bytes describe something bigger than themselves."""
        return self.to_bytes().startswith(_CID_PREFIX_MSGPACK)

    def matches(self, data: bytes | memoryview) -> bool:
        """Whether these are the bytes that the CID names."""
        return self.to_bytes()[-32:] == hashlib.sha256(data).digest()


@lru_cache(maxsize=_MAX_REMEMBERED)
def _cid_bytes(text: str) -> bytes:
    error = UsageError(f"{text[:80]!r} is not a CID; one looks like bafk…")
    if len(text) > 70 or not text.startswith("b") or text != text.lower():
        raise error
    body = text[1:].upper()
    try:
        raw = base64.b32decode(body + "=" * (-len(body) % 8))
    except ValueError as cause:
        raise error from cause
    prefix = _CID_PREFIX_MSGPACK if raw.startswith(_CID_PREFIX_MSGPACK) else _CID_PREFIX_RAW
    if len(raw) != len(prefix) + 32 or not raw.startswith(prefix):
        raise error
    if "b" + base64.b32encode(raw).decode().rstrip("=").lower() != text:
        raise error
    return raw


class SwarmId(Cid):
    """The name of a training run: the CID of its signed manifest."""

    __slots__ = ()
