"""One member of an all-reduce: what others say is taken only as far as they could; what it holds at a time."""

from __future__ import annotations

import pytest

from shoal.protocol.signing import Signer
from shoal.training.exchange.allreduce import (
    MAX_SCRATCH,
    AllReduce,
    Announced,
    Fetch,
    Member,
    Outcome,
    Pull,
    Pulled,
    Ready,
    Reduce,
    Reduced,
)

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


def test_few_parts_of_others_lie_here_at_a_time_however_slowly_they_are_reduced() -> None:
    num_parts = 200
    reduction = AllReduce(ME, [Member(ME, 1.0), Member(OTHER, 1.0, rate=0.0)], num_parts, patience_s=10.0, now=0.0)
    outputs = [*reduction.start(0.0), *reduction.handle(Ready(OTHER), 0.0)]
    lying, most, num_pulled, reducing = 0, 0, 0, list[Reduce]()
    while outputs or reducing:
        pulls = [output for output in outputs if isinstance(output, Pull)]
        reducing += [output for output in outputs if isinstance(output, Reduce)]
        lying, num_pulled, outputs = lying + len(pulls), num_pulled + len(pulls), []
        most = max(most, lying)
        for pull in pulls:
            outputs += reduction.handle(Pulled(pull.author, pull.part), 1.0)
        if not pulls and reducing:
            done = reducing.pop(0)
            lying -= 1
            outputs += reduction.handle(Reduced(done.part, done.authors, DIGEST), 1.0)
    assert most == MAX_SCRATCH
    assert num_pulled == num_parts
    assert reduction.is_over
