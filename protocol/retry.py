"""When a failed call is made again: only if it is idempotent, only for faults that pass, never past the deadline.

The waits are exponential with full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog 2015),
so that callers who failed together do not come back together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shoal.protocol.errors import Status

if TYPE_CHECKING:
    from random import Random

MAX_TRIES: Final = 3
FIRST_WAIT_S: Final = 0.1
PASSING: Final = frozenset((Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED))


def wait_before_retry(status: Status, tries: int, left_s: float, chance: Random) -> float | None:
    """Seconds to wait before an idempotent call is tried again; None: give up.

    Args:
        status: what the last try failed with.
        tries: made so far.
        left_s: until the caller's deadline.
        chance: the jitter's source.
    """
    if status not in PASSING or tries >= MAX_TRIES:
        return None
    wait_s = chance.uniform(0, FIRST_WAIT_S * 2 ** (tries - 1))
    return wait_s if wait_s < left_s else None
