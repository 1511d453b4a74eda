"""Who owns which parts of an all-reduce: by what each can send, so that nobody waits longer than it must.

Of n members one that owns the share f sends (1 - f) of its array to other owners and f of the result to each of n - 1
others, 1 + (n - 2) f arrays in all, and receives as much. So a slow member is best off with nothing to own: it sends
its array once in place of almost twice. The share follows the *uplink* alone: bytes down are as many as bytes up, links
to homes are slower up, and how fast things come says more of those who send them. Parts are given out one by one, each
to the member that would have sent all of its own the soonest, which is the shortest round there is (a greedy choice is
the best one for a maximum of rising functions: Ibaraki and Katoh, Resource Allocation Problems, 1988). Of two members
each sends its array once, whoever owns what: they share alike.

A rate is its member's own word, signed in its offer, and all find the same owners by it, to the part. What a lie gains:

* A high one counts for `BELIEVED_MEDIANS` of the median, and of three members or more nobody owns more than
  `MAX_SHARE`: one owner alone cannot make anybody count as absent. Whoever sends a times less than it claims makes a
  round at most a times as long as with shares alike.
* A low one owns less. The others share its part: with k of n that own nothing, each sends 1 + (n - 2) / (n - k) arrays
  in place of 2 - 2 / n. No floor is set to what is believed, as links do differ by a hundred times.
* An unknown rate counts for the median of those that are known, and so does one within `NEAR` of it: as much does what
  is measured on a busy machine differ from one time to the next, and shares by chance cost what shares by rate gain.

Nothing here depends on the order of a sum: each number is one rounded operation on what was signed.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.training.electorate import BELIEVED_MEDIANS

MAX_SHARE: Final = 1 / 2
"""Of the parts: what one of three owners or more has at most."""
NEAR: Final = 1.5
"""Times the median, up or down."""
ALIKE: Final = 1.0
"""The rate of each where none is known."""


def rates_of(claims: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """What members are taken to send.

    Args:
        claims: what each says that it can send, in bytes per second; 0: it does not know.

    Returns:
        The rate of each, more than 0.
    """
    known = [claim for claim in claims.values() if claim > 0]
    usual = statistics.median(known) if known else ALIKE

    def believed(claim: float) -> float:
        is_usual = claim <= 0 or usual / NEAR <= claim <= usual * NEAR
        return usual if is_usual else min(claim, BELIEVED_MEDIANS * usual)

    return {peer: believed(claim) for peer, claim in claims.items()}


def owners(rates: Mapping[PeerId, float], num_parts: int) -> list[PeerId]:
    """Who owns each part: contiguous spans, in the order of the peers.

    Args:
        rates: what each member can send, in any unit; who has 0 owns nothing.
        num_parts: that the array is cut into.

    Raises:
        UsageError: if nobody has a rate.
    """
    able = sorted(peer for peer, rate in rates.items() if rate > 0)
    if not able:
        raise UsageError("nobody could own a part: all rates are zero")
    others = max(0, len(rates) - 2)
    most = num_parts if len(able) < 3 else max(1, math.floor(MAX_SHARE * num_parts))

    def sent_by(index: int, count: int) -> tuple[float, int, int]:
        """When a member would have sent everything, if it owned so many parts."""
        return (num_parts + others * count) / rates[able[index]], count, index

    counts = [0] * len(able)
    soonest = [sent_by(index, 1) for index in range(len(able))]
    heapq.heapify(soonest)
    for _ in range(num_parts):
        _, count, index = soonest[0]
        counts[index] = count
        if count < most:
            heapq.heapreplace(soonest, sent_by(index, count + 1))
        else:
            heapq.heappop(soonest)
    return [peer for peer, count in zip(able, counts, strict=True) for _ in range(count)]


def order_of(part: int, peers: Sequence[PeerId]) -> list[PeerId]:
    """In which order members take over a part (rendezvous hashing, Thaler and Ravishankar 1998)."""
    return sorted(peers, key=lambda peer: hashlib.sha256(f"{part}/{peer}".encode()).digest())
