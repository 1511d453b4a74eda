"""Who counts in a run, and for how much: a pure function of the rounds that were decided.

It travels with the state: whoever holds a policy holds the same electorate, a newcomer too. A member's *stake* is what
it delivered in the rounds that were decided lately, so that nobody has a say by claiming, nobody is waited for because
of what it hopes to do, and a member that let `MAX_MISSED` rounds in a row pass counts for nothing until it has
delivered again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.batch import Batch
from shoal.training.statements import MAX_OFFERS, MAX_RATE, MAX_SAMPLES

MAX_MISSED: Final = 3
MEMORY: Final = 0.5
"""How much of a stake is kept from one decided round to the next."""
LEAST_SHARE: Final = 1 / 4
"""Of an equal share: what every learner may collect, whatever others claim."""
MIN_SECONDS: Final = 0.05
"""Shorter collecting says nothing of a member's speed."""
GROWTH: Final = 2.0
"""A share grows by at most this over what was delivered."""
FEW: Final = 4
"""Members up to which each is taken at its word: for all of its stake, and for its speed."""
MAX_SAY: Final = 1 / 4
"""Of the says of more."""
BELIEVED_MEDIANS: Final = 4.0
"""Of more, a weight that nobody can have collected is not waited for, and a speed that nobody has sets no pace."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a member has shown.

    Attributes:
        stake: samples per round, the newest rounds counting most.
        rate: samples per second of work.
        missed: rounds in a row that were decided without it.
    """

    stake: float
    rate: float
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Delivered:
    """What one member gave to a decided round."""

    author: PeerId
    weight: int
    seconds: float


class Electorate(dict[PeerId, Standing]):
    """The standing of every member that has any; at most `MAX_OFFERS`."""

    def after(self, delivered: tuple[Delivered, ...]) -> Electorate:
        """The electorate that follows from this one by a decided round."""
        found: dict[PeerId, Standing] = {}
        for each in delivered:
            rate = min(each.weight / max(each.seconds, MIN_SECONDS), MAX_RATE)
            before = self.get(each.author)
            if before is None:
                found[each.author] = Standing(float(each.weight), rate)
            else:
                stake = MEMORY * before.stake + (1 - MEMORY) * each.weight
                found[each.author] = Standing(stake, MEMORY * before.rate + (1 - MEMORY) * rate)
        for author, before in self.items():
            if author not in found and before.missed + 1 < MAX_MISSED:
                found[author] = Standing(MEMORY * before.stake, before.rate, before.missed + 1)
        kept = sorted(found, key=lambda author: (-found[author].stake, author))[:MAX_OFFERS]
        return Electorate({author: found[author] for author in sorted(kept)})

    @property
    def stakes(self) -> dict[PeerId, float]:
        """The stake of each."""
        return {peer: standing.stake for peer, standing in self.items()}

    def share(self, me: PeerId, batch: Batch, speed: float) -> int:
        """How many samples this member collects before it updates.

        By measured rates, so that all are ready together. Never more than `GROWTH` times what it delivered, and never
        less than a quarter of an equal share, unless it would take this member longer than collecting takes the others:
        so a member that claims any rate can't make the others idle.

        Args:
            me: the member.
            batch: of the manifest.
            speed: this member's samples per second while it collects; 0 if that is not known.
        """
        number = len(self) + (me not in self)
        if number == 1:
            return batch.largest_share
        equal = batch.equal_share(number)
        own = self.get(me)
        rate = own.rate if own is not None else speed
        least = LEAST_SHARE * equal
        if rate:
            others = [standing for peer, standing in self.items() if peer != me]
            usual_s = statistics.median(standing.stake / standing.rate for standing in others)
            least = min(least, rate * max(usual_s, MIN_SECONDS))
            rates = [rate, *(standing.rate for standing in others)]
            fair = batch.fair_share(rate, min(max(rates), _most_believed(rates)), sum(rates))
        else:
            fair = equal
        most = GROWTH * own.stake + least if own is not None else equal / 2
        return max(1, math.ceil(max(least, min(fair, most, float(batch.largest_share)))))

    def to_plain(self) -> dict[str, Any]:
        """For the metadata of a state."""
        return {author: [each.stake, each.rate, each.missed] for author, each in sorted(self.items())}

    @classmethod
    def from_plain(cls, value: Any) -> Electorate:
        """The inverse of `to_plain`.

        Raises:
            ProtocolError: if it is not that.
        """
        if not isinstance(value, Mapping) or len(value) > MAX_OFFERS:
            raise ProtocolError("the state does not say who counts in its run; take another state")
        found = {}
        for author, entry in value.items():
            try:
                peer = PeerId.parse(author)
            except UsageError as error:
                raise ProtocolError(f"the state names a member that cannot be: {error}") from error
            if not (isinstance(entry, list | tuple) and len(entry) == 3 and type(entry[2]) is int):
                raise ProtocolError("the state does not say who counts in its run; take another state")
            stake, rate, missed = entry
            is_whole = _is_positive(stake, MAX_SAMPLES) and _is_positive(rate, MAX_RATE) and 0 <= missed < MAX_MISSED
            if not is_whole or stake < MEMORY ** (missed + 1):  # a sample is the least that is delivered
                raise ProtocolError(f"the state gives {peer} a standing that cannot be; take another state")
            found[peer] = Standing(float(stake), float(rate), missed)
        return cls(dict(sorted(found.items())))


def says_of(stakes: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """What each member counts for in a vote: its stake, but of many nobody more than a quarter of all together.

    What a member delivered is its own word; so a weight that nobody can have collected does not decide alone.
    """
    says = dict(stakes)
    if len(says) <= FEW:
        return says
    most = sum(says.values())
    for number in range(1, FEW + 1):
        rest = sum(sorted(says.values(), reverse=True)[number:])
        # With `number` members at the limit, the limit is a quarter of the sum of all: of theirs and of the rest.
        limit = rest * MAX_SAY / (1 - number * MAX_SAY) if number * MAX_SAY < 1 else most
        if sum(say > limit for say in says.values()) <= number:
            return {peer: min(say, limit) for peer, say in says.items()}
    return says


def most_awaited(stakes: Mapping[PeerId, float]) -> float:
    """The most that one member is waited for, in samples: of many, a few times what the median brings."""
    return _most_believed(stakes.values())


def _most_believed(numbers: Collection[float]) -> float:
    """The most that one member is taken at its word for: of many, a few times the median."""
    return BELIEVED_MEDIANS * statistics.median(numbers) if len(numbers) > FEW else math.inf


def _is_positive(value: Any, limit: float) -> bool:
    return type(value) in (int, float) and 0 < value <= limit
