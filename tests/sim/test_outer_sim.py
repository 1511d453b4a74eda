"""Four workers learn by fifty steps apart and one exchange what they learn by an exchange for every step.

A small model on made-up data with the real codecs, the real merge and the real outer step: softmax regression, each
worker with its own samples. Both see the same minibatches, so as many samples.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from shoal.protocol.ids import PeerId
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.exchange.codecs import Sender, decode_contribution
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.rules import Codec

WORKERS = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 5))
FEATURES, CLASSES, SAMPLES, BATCH = 256, 32, 4000, 64
STEPS, RATE = 1500, 0.5


@functools.cache
def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    middles = np.random.default_rng(0).normal(0, 0.15, (CLASSES, FEATURES))
    rng = np.random.default_rng([7, seed])
    classes = rng.integers(0, CLASSES, SAMPLES)
    return rng.normal(middles[classes], 1.0).astype(np.float32), classes


def likelihoods(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    scores = features @ weights
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    return likely / likely.sum(axis=1, keepdims=True)


def gradient(weights: np.ndarray, worker: int, step: int) -> np.ndarray:
    features, classes = data(worker)
    index = np.random.default_rng([worker, step]).integers(0, SAMPLES, BATCH)
    error = likelihoods(weights, features[index])
    error[np.arange(BATCH), classes[index]] -= 1
    return (features[index].T @ error / BATCH + 1e-3 * weights).astype(np.float32)


def loss(weights: np.ndarray) -> float:
    """Mean negative log-likelihood of samples that nobody has trained on."""
    features, classes = data(99)
    return float(-np.log(likelihoods(weights, features)[np.arange(SAMPLES), classes]).mean())


@functools.cache
def by_every_gradient() -> tuple[float, float]:
    """The loss, and bytes per worker and step."""
    weights, size = np.zeros((FEATURES, CLASSES), np.float32), 0
    for step in range(STEPS):
        said = []
        for worker, author in enumerate(WORKERS):
            arrays = {"mean/gradient": gradient(weights, worker, step)}
            size += len(Sender(Codec.FP32).encode(arrays, {}, {}))
            said.append(Contribution(author, float(BATCH), dict(arrays)))
        weights = weights - np.float32(RATE) * merge(said)["mean/gradient"].astype(np.float32)
    return loss(weights), size / STEPS / len(WORKERS)


@functools.cache
def apart(codec: Codec, steps: int, rate: float = 1.0, momentum: float = 0.0) -> tuple[float, float]:
    """Likewise, by so many steps apart and then an outer step of this learning rate and momentum."""
    weights, size = np.zeros((FEATURES, CLASSES), np.float32), 0
    outer = Outer(weights.size, learning_rate=rate, momentum=momentum, max_gradient=1e3)
    senders = [Sender(codec) for _ in WORKERS]
    lossy = {"mean/delta": 1e3}
    for began in range(0, STEPS, steps):
        said = []
        for worker, (author, sender) in enumerate(zip(WORKERS, senders, strict=True)):
            mine = weights
            for step in range(began, min(began + steps, STEPS)):
                mine = mine - np.float32(RATE) * gradient(mine, worker, step)
            template = {"mean/delta": (weights - mine).ravel()}
            packed = sender.encode(template, lossy, {})
            sender.settle(arrived=True)
            size += len(packed)
            said.append(Contribution(author, 1.0, decode_contribution(packed, codec, lossy, {}, template)))
        flat = weights.ravel().copy()
        outer.apply(flat, merge(said)["mean/delta"].astype(np.float32))
        weights = flat.reshape(weights.shape)
    return loss(weights), size / STEPS / len(WORKERS)


@pytest.mark.parametrize(
    ("codec", "steps", "times_fewer"),
    [
        (Codec.FP32, 50, 49),
        (Codec.INT8, 50, 150),
        (Codec.INT4, 50, 300),
        (Codec.INT2, 50, 500),
        (Codec.INT2, 125, 1500),
    ],
)
def test_the_loss_is_within_two_percent_with_far_fewer_bytes_per_step(
    codec: Codec, steps: int, times_fewer: int
) -> None:
    (expected, many), (found, few) = by_every_gradient(), apart(codec, steps)
    assert found < 1.02 * expected, (found, expected)
    assert many / few > times_fewer


def test_what_is_sent_late_and_outer_momentum_do_not_go_together() -> None:
    """Why an algorithm's defaults for topk have none (SparseLoCo, arXiv 2508.15706)."""
    without, _ = apart(Codec.TOPK, 50)
    assert without < np.log(CLASSES) < apart(Codec.TOPK, 50, 0.7, 0.9)[0]
