"""What members of an all-reduce say is taken only as far as a member could say it."""

from __future__ import annotations

import pytest

from shoal.protocol.signing import Signer
from shoal.training.exchange.allreduce import AllReduce, Announced, Fetch, Member, Outcome

ME, OTHER, STRANGER = sorted(Signer(bytes([number]) * 32).peer_id for number in range(1, 4))
DIGEST = b"d" * 32


def fetches(holder: str, part: int, outcome: Outcome) -> bool:
    reduction = AllReduce(ME, [Member(ME, 1.0), Member(OTHER, 1.0)], 2, patience_s=1.0, now=0.0)
    reduction.start(0.0)
    outputs = reduction.handle(Announced(holder, part, outcome), 0.1)  # type: ignore[arg-type]
    return any(isinstance(output, Fetch) for output in outputs)


def test_an_outcome_of_its_owner_is_fetched() -> None:
    assert fetches(OTHER, 1, Outcome(OTHER, (ME, OTHER), DIGEST))


@pytest.mark.parametrize(
    ("holder", "part", "outcome"),
    [
        (STRANGER, 1, Outcome(OTHER, (ME,), DIGEST)),
        (OTHER, 2, Outcome(OTHER, (ME,), DIGEST)),
        (OTHER, -1, Outcome(OTHER, (ME,), DIGEST)),
        (OTHER, 1, Outcome(STRANGER, (ME,), DIGEST)),
        (OTHER, 1, Outcome(OTHER, (ME, STRANGER), DIGEST)),
    ],
)
def test_what_no_member_could_say_is_not_taken(holder: str, part: int, outcome: Outcome) -> None:
    assert not fetches(holder, part, outcome)
