"""What a member says of itself in presence, several times a second; checked when it comes from others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from shoal.protocol.codec import from_plain
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.rounds import LearnerView, Offer, Proposal, RoundKey
from shoal.training.manifest import Role

MAX_COUNT: Final = 2**53
"""Above this a count is a lie; sums of 256 still fit into 64 bits."""


class Phase(StrEnum):
    """What a member does now."""

    STARTING = "starting"
    WAITING = "waiting"
    FETCHING = "fetching"
    COLLECTING = "collecting"
    UPDATING = "updating"
    EXCHANGING = "exchanging"
    EVALUATING = "evaluating"
    STORING = "storing"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One member's presence.

    Attributes:
        addresses: full multiaddrs at which it listens.
        epoch: of the policy it holds.
        step: the exchange within the epoch that it works towards.
        samples: environment steps it collected since that policy.
        env_steps: by itself, in this run, in all.
        steps_per_s: its recent rate of environment steps, pauses included.
        speed: environment steps per second while it collects.
        offer_cid: what it wants averaged at (epoch, step), once it does.
        offer_weight: in samples.
        proposal: the newest it made or accepted.
    """

    role: Role
    phase: Phase = Phase.STARTING
    addresses: tuple[str, ...] = ()
    epoch: int = 0
    step: int = 0
    samples: int = 0
    env_steps: int = 0
    steps_per_s: float = 0.0
    speed: float = 0.0
    offer_cid: Cid | None = None
    offer_weight: int = 0
    proposal: Proposal | None = None

    def __post_init__(self) -> None:
        counts = (self.epoch, self.step, self.samples, self.env_steps, self.offer_weight)
        if not all(0 <= count <= MAX_COUNT for count in counts) or self.steps_per_s < 0 or self.speed < 0:
            raise ProtocolError("a member's counts and rates cannot be negative, nor endless")

    def view(self, author: PeerId) -> LearnerView:
        """The part that rounds need."""
        offer = Offer(author, self.offer_cid, self.offer_weight) if self.offer_cid and self.offer_weight > 0 else None
        return LearnerView(RoundKey(self.epoch, self.step), self.phase is Phase.EXCHANGING, offer, self.proposal)


def read_facts(facts: dict[str, Any]) -> Facts | None:
    """The facts of another member; None if they make no sense."""
    try:
        return from_plain(Facts, facts)
    except ProtocolError:
        return None
