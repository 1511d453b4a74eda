"""Signatures over canonical bytes, by kind.

What is signed is ``shoal/``, the kind, a zero byte and the payload, so that a signature given for one kind of
thing is never valid for another. Keys are Ed25519 (RFC 8032); the public key is read out of the author's peer id.
The library of their mathematics is imported by the first who signs or checks: most commands do neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from shoal.protocol.errors import SignatureError
from shoal.protocol.ids import PeerId

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE_BYTES: Final = 64

_PRIME: Final = 2**255 - 19
# The points of order 1, 2, 4 and 8 by their y: as a public key, each has signatures that hold for any message.
_SMALL_ORDER: Final = frozenset(
    {
        0,
        1,
        _PRIME - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        55188659117513257062467267217118295137698188065244968500265048394206261417927,
    }
)


class Signer:
    """Holds a node's private key and signs in its name."""

    __slots__ = ("_key", "peer_id")

    def __init__(self, secret: bytes) -> None:
        """Take a raw 32-byte Ed25519 secret key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.peer_id = PeerId.of_public_key(self._key.public_key().public_bytes_raw())

    def sign(self, kind: str, payload: bytes) -> bytes:
        """A 64-byte signature over ``payload`` as a thing of this kind."""
        return self._key.sign(_message(kind, payload))

    def seal(self, kind: str, payload: bytes) -> Signed:
        """``payload`` with its author and signature."""
        return Signed(author=self.peer_id, payload=payload, signature=self.sign(kind, payload))


@dataclass(frozen=True, slots=True)
class Signed:
    """Some canonical bytes, who says them, and the proof."""

    author: PeerId
    payload: bytes
    signature: bytes

    def check(self, kind: str) -> None:
        """Check the signature.

        Raises:
            SignatureError: if the author did not sign this payload as a thing of this kind.
        """
        verify(self.author, kind, self.payload, self.signature)


def verify(author: PeerId, kind: str, payload: bytes, signature: bytes) -> None:
    """Check that ``author`` signed ``payload`` as a thing of this kind.

    Raises:
        SignatureError: if it did not.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        _key_of(author).verify(signature, _message(kind, payload))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(f"a {kind} that claims to be by {author} is not signed by it") from error


@lru_cache(maxsize=1024)
def _key_of(author: PeerId) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = author.public_key
    if int.from_bytes(key, "little") % 2**255 % _PRIME in _SMALL_ORDER:
        raise SignatureError(f"{author} is a key in whose name anybody could sign; it proves nothing")
    return Ed25519PublicKey.from_public_bytes(key)


def _message(kind: str, payload: bytes) -> bytes:
    return b"shoal/" + kind.encode() + b"\0" + payload
