"""Ten workers learn to tell classes apart; three of them lie, and by a rule of the manifest's it costs next to nothing.

The small sibling of `benchmarks/robust.py`: made-up data, softmax regression, the real merge.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.hostile.poison import ATTACKS, poison

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.exchange.averager import Contribution, merge, validate
from shoal.training.exchange.rules import Aggregator

WORKERS = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 11))
CLASSES, FEATURES, SAMPLES, LIARS = 5, 20, 100, 3


def data(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Features ``[n, FEATURES]`` around the middle of their class, and classes ``[n]``."""
    middles = np.random.default_rng(0).normal(0, 0.75, (CLASSES, FEATURES))
    rng = np.random.default_rng([1, seed])
    classes = rng.integers(0, CLASSES, number)
    return rng.normal(middles[classes], 1.0), classes


def gradient(weights: np.ndarray, features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    scores = features @ weights
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    likely[np.arange(len(classes)), classes] -= 1
    return features.T @ likely / len(classes)


def accuracy(aggregator: str, attack: str | None) -> float:
    """Percent of unseen samples that are named rightly after forty epochs of five local steps."""
    rule, rng = Aggregator.parse(aggregator), np.random.default_rng(3)
    honest = WORKERS if attack is None else WORKERS[:-LIARS]
    owned = [data(index, SAMPLES) for index in range(len(honest))]
    weights = np.zeros((FEATURES, CLASSES))
    for _ in range(40):
        said = []
        for author, (features, classes) in zip(honest, owned, strict=True):
            mine = weights
            for _ in range(5):
                mine = mine - 0.2 * gradient(mine, features, classes)
            said.append(Contribution(author, float(SAMPLES), {"mean/parameters": mine}))
        centres = {"mean/parameters": weights}
        if attack is not None:
            said += poison(attack, said, WORKERS[-LIARS:], rng, centres)
        try:
            for each in said:
                validate(each, centres)
        except ProtocolError:  # numbers that nobody takes any more
            break
        weights = merge(said, rule, centres=centres)["mean/parameters"].astype(np.float64)
    features, classes = data(99, 2000)
    return 100 * float(((features @ weights).argmax(axis=1) == classes).mean())


@pytest.mark.parametrize("attack", ATTACKS)
def test_three_liars_of_ten_cost_less_than_two_points(attack: str) -> None:
    clean = accuracy("mean", None)
    assert clean > 90
    assert max(accuracy(each, attack) for each in ("nnm+trimmed_mean", "nnm+multi_krum")) > clean - 2


@pytest.mark.parametrize("attack", ["sign flip", "invented weight"])
def test_by_the_mean_they_end_it(attack: str) -> None:
    assert accuracy("mean", attack) < 50


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "multi_krum", "arc+nnm+centered_clipping"])
def test_where_nobody_lies_no_rule_costs_more_than_a_point(aggregator: str) -> None:
    assert accuracy(aggregator, None) > accuracy("mean", None) - 1
