"""What is offered and decided in a round; what happens in it, and what is to be done, for `exchange.rounds`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

from shoal.protocol.ids import Cid, PeerId
from shoal.training.batch import Batch
from shoal.training.statements import MAX_OFFERS, Offer, Proposal, Vote

BALLOT_BATCHES: Final = 3
"""How many times what is usual a ballot may weigh: those who have shown nothing yet never count for more than that."""
SPARE_SAMPLES: Final = 1024
"""What the vector steps of a few environments may add to a share."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What honest members can say.

    Attributes:
        offer: the heaviest offer, in samples.
        ballot: the heaviest ballot.
    """

    offer: int
    ballot: int

    @classmethod
    def of_batch(cls, batch: Batch, stake: float | None) -> Limits:
        """For the batch of a manifest: nobody has more than the largest share, and what it kept when it was late.

        Args:
            batch: of the manifest.
            stake: of all together; None where nobody has shown anything.
        """
        offer = 2 * batch.largest_share + SPARE_SAMPLES
        if batch.together is not None:
            usual = float(batch.together)
        elif stake is not None:
            usual = max(stake, batch.largest_share)
        else:
            return cls(offer, MAX_OFFERS * offer)
        return cls(offer, math.ceil(BALLOT_BATCHES * usual) + SPARE_SAMPLES)


@dataclass(frozen=True, slots=True)
class SignedOffer:
    """An offer, who signed it, and the hash of the record."""

    author: PeerId
    name: bytes
    offer: Offer


@dataclass(frozen=True, slots=True)
class Ballot:
    """What is to be averaged, in the order of the authors.

    Attributes:
        name: see `shoal.training.statements.ballot_name`.
    """

    name: bytes
    offers: tuple[SignedOffer, ...]


# What happens.


@dataclass(frozen=True, slots=True)
class Begin:
    """This learner has arrived at the round.

    Attributes:
        productive_s: how long it collected and optimised for it.
    """

    productive_s: float


@dataclass(frozen=True, slots=True)
class OfferHeard:
    """An offer for this round was signed; this learner's own as well."""

    offer: SignedOffer


@dataclass(frozen=True, slots=True)
class ProposalHeard:
    """A proposal for this round was signed."""

    author: PeerId
    proposal: Proposal


@dataclass(frozen=True, slots=True)
class VoteHeard:
    """A vote in this round was signed."""

    author: PeerId
    vote: Vote


@dataclass(frozen=True, slots=True)
class Committed:
    """A member says what it made of a ballot of this round, or offers in the round that follows from it."""

    author: PeerId
    ballot: bytes


@dataclass(frozen=True, slots=True)
class Held:
    """These bytes are here."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class CannotBeHad:
    """These bytes did not come; they may be asked for again."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class Left:
    """A member is gone, or says that it is at an earlier epoch."""

    author: PeerId


@dataclass(frozen=True, slots=True)
class Joined:
    """Where nobody has shown anything yet: one more who learns."""

    author: PeerId
    stake: float


@dataclass(frozen=True, slots=True)
class Busy:
    """A member says that it does something else now, so that it will not offer soon."""

    author: PeerId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


RoundEvent: TypeAlias = (
    Begin | OfferHeard | ProposalHeard | VoteHeard | Committed | Held | CannotBeHad | Left | Joined | Busy | Tick
)

# What to do.


@dataclass(frozen=True, slots=True)
class Obtain:
    """Get these bytes, from their author or any of the others, and say `Held` or `CannotBeHad`."""

    cid: Cid
    sources: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Propose:
    """Sign this proposal and tell everybody."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class Cast:
    """Sign this vote and tell everybody."""

    vote: Vote


@dataclass(frozen=True, slots=True)
class Decide:
    """Average these; all of them are held. The round is over."""

    ballot: Ballot


RoundOutput: TypeAlias = Obtain | Propose | Cast | Decide
