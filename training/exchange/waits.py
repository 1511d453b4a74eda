"""How long learners wait for each other: learned from when others' words arrived, never from one's own waiting.

Two waits. *For offers*: from when half of the stake had offered to the last offer that was decided on. It says when the
others will go on without this learner, while it works or holds no offer yet. A learner that holds some waits for a
missing member only as long as what that is expected to bring is worth: waiting ``d`` for ``w`` samples when ``W`` are
there after ``T`` seconds of work pays while ``d < T * w / W``. So a member of a hundredth of the speed holds nobody up
for more than a hundredth of the time, whatever it does. *For silence*: from when the attempt began to when its proposal
was decided on.

Each is median + 4·MAD of the last rounds, within bounds. What was not decided on teaches nothing, so a member that is
always too late cannot stretch what it is waited for.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

MADS: Final = 4.0
PAST_ROUNDS: Final = 32
LEAST_ROUNDS: Final = 3

MIN_OFFERS_S: Final = 0.05
FIRST_OFFERS_S: Final = 10.0
MAX_OFFERS_S: Final = 30.0

MIN_SILENCE_S: Final = 0.4
FIRST_SILENCE_S: Final = 2.0
MAX_SILENCE_S: Final = 10.0


class Waits:
    """What one learner has learned of the others' timing."""

    __slots__ = ("_offers", "_silence", "offers_s", "silence_s")

    def __init__(self) -> None:
        self._offers: deque[float] = deque(maxlen=PAST_ROUNDS)
        self._silence: deque[float] = deque(maxlen=PAST_ROUNDS)
        self.offers_s = FIRST_OFFERS_S
        """After half of the stake has offered."""
        self.silence_s = FIRST_SILENCE_S
        """After somebody should have proposed, until the next one does."""

    def learn(self, offers_s: float, silence_s: float) -> None:
        """A round with others was decided."""
        self._offers.append(max(0.0, offers_s))
        self._silence.append(max(0.0, silence_s))
        self.offers_s = _learned(self._offers, FIRST_OFFERS_S, MIN_OFFERS_S, MAX_OFFERS_S)
        self.silence_s = _learned(self._silence, FIRST_SILENCE_S, MIN_SILENCE_S, MAX_SILENCE_S)


def _learned(past: deque[float], first: float, least: float, most: float) -> float:
    if len(past) < LEAST_ROUNDS:
        return first
    median = statistics.median(past)
    deviation = statistics.median(abs(each - median) for each in past)
    return min(most, max(least, median + MADS * deviation))
