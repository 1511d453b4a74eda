"""Whether an owner's result follows from what its authors signed.

What an owner says came of a part it signs, with whose parts are in it. The parts are named by hash in their authors'
signed offers, and reducing is a function of them: so any member that pulls the same parts can do it again, and whoever
signed something else has lied, whatever its reason. One lie is proof for everybody who has, or can have, the parts.

Left out are liars that only leave somebody out: a part that did not come and one that was not wanted look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.protocol.codec import encode
from shoal.protocol.errors import SignatureError
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer, verify
from shoal.training.exchange.allreduce import Outcome

OUTCOME: Final = "outcome"
"""What an owner signs is of this kind."""


class Parts(Protocol):
    """How arrays are cut into parts, and how those of several become one."""

    @property
    def num_parts(self) -> int:
        """How many."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of the whole, written."""
        ...

    def place(self, part: int) -> slice:
        """Which of the bytes a part takes."""
        ...

    def reduce(self, part: int, given: list[memoryview], weights: list[float], out: memoryview) -> list[int]:
        """Reduce one part; gives the indices of those that are in it."""
        ...


@dataclass(frozen=True, slots=True)
class SignedOutcome:
    """What an owner says came of a part.

    Attributes:
        key: of the all-reduce, 16 bytes.
        part: which.
        owner: who says it.
        authors: whose parts are in it.
        digest: SHA-256 of its bytes.
        signature: by the owner, over the others.
    """

    key: bytes
    part: int
    owner: PeerId
    authors: tuple[PeerId, ...]
    digest: bytes
    signature: bytes = b""

    @property
    def outcome(self) -> Outcome:
        """As the core has it."""
        return Outcome(self.owner, self.authors, self.digest)

    def is_signed(self) -> bool:
        """Whether the owner said it."""
        try:
            verify(self.owner, OUTCOME, _payload(self.key, self.part, self.outcome), self.signature)
        except SignatureError:
            return False
        return True


def audited_by(me: PeerId, members: Sequence[PeerId], digest: bytes) -> PeerId:
    """Whose results a member looks into: every member is looked into by another one, and by whom it cannot know before.

    Args:
        me: the member.
        members: all, two at least.
        digest: of what came of all parts, which nobody knows before all owners have signed.
    """
    ordered = sorted(members)
    step = 1 + int.from_bytes(digest[:8], "big") % (len(ordered) - 1)
    return ordered[(ordered.index(me) + step) % len(ordered)]


def sign_outcome(signer: Signer, key: bytes, part: int, outcome: Outcome) -> SignedOutcome:
    """Sign what came of a part that this node reduced."""
    signature = signer.sign(OUTCOME, _payload(key, part, outcome))
    return SignedOutcome(key, part, outcome.owner, outcome.authors, outcome.digest, signature)


def follows(
    parts: Parts, said: SignedOutcome, given: Mapping[PeerId, memoryview], weights: Mapping[PeerId, float]
) -> bool:
    """Whether a result follows from the parts that are said to be in it.

    Args:
        parts: the layout.
        said: by the owner.
        given: the parts of all its authors, as they are named in what they signed.
        weights: of all members.
    """
    place = parts.place(said.part)
    out = memoryview(bytearray(place.stop - place.start))
    if not said.authors or any(author not in weights for author in said.authors):
        return False
    used = parts.reduce(
        said.part, [given[author] for author in said.authors], [weights[author] for author in said.authors], out
    )
    return len(used) == len(said.authors) and hashlib.sha256(out).digest() == said.digest


def _payload(key: bytes, part: int, outcome: Outcome) -> bytes:
    return encode({"key": key, "part": part, "authors": list(outcome.authors), "digest": outcome.digest})
