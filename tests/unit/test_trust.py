"""How closely a learner looks at whose shards."""

from __future__ import annotations

from collections import Counter

import numpy as np

from shoal.protocol.ids import PeerId
from shoal.training.rollouts.trust import MAX_AUTHORS, NUM_WHOLE, PATIENCE, Look, Trust, caught_after, rate_of

ACTOR, OTHER = (PeerId.of_public_key(bytes([number]) * 32) for number in range(2))


def test_trust_grows_with_what_was_found_true_and_never_ends_the_looking() -> None:
    rates = [rate_of(found) for found in (0, PATIENCE, 100, 10_000)]
    assert rates[:2] == [1.0, 0.25]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0.05
    assert caught_after(0.5, 0.05, 100) > 0.9


def test_who_is_new_is_looked_at_whole_and_always_then_less_and_one_environment_for_all() -> None:
    trust, rng = Trust(0.05), np.random.default_rng(3)
    looks = []
    for _ in range(4000):
        looks.append(trust.look(ACTOR, rng.random()))
        if looks[-1] is not Look.NONE:
            trust.found_true(ACTOR)
    assert looks[0] is Look.WHOLE
    assert looks.count(Look.WHOLE) == NUM_WHOLE
    late = Counter(looks[1000:])
    assert late[Look.WHOLE] == 0
    assert 0.04 < late[Look.ONE] / 3000 < 0.06
    assert trust.look(OTHER, 0.999) is Look.WHOLE


def test_whom_anybody_accuses_is_looked_at_always_and_whole() -> None:
    trust = Trust(0.05)
    for _ in range(1000):
        trust.found_true(ACTOR)
    assert trust.look(ACTOR, 0.9) is Look.NONE
    trust.suspects.add(ACTOR)
    assert trust.look(ACTOR, 0.9) is Look.WHOLE


def test_who_asks_for_no_checks_gets_none() -> None:
    trust = Trust(0.0, suspects={ACTOR})
    assert trust.look(ACTOR, 0.0) is trust.look(OTHER, 0.0) is Look.NONE


def test_accounts_are_bounded() -> None:
    trust = Trust(0.1)
    for number in range(MAX_AUTHORS + 10):
        trust.found_true(PeerId.of_public_key(number.to_bytes(32, "big")))
    assert len(trust._found_true) == MAX_AUTHORS
