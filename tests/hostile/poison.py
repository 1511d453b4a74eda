"""Plausible lies in contributions: what members say who know what the honest ones say and want the merge elsewhere.

Every attack sees all honest contributions, and makes one for each liar. Arrays named ``mean`` are forged, as
differences from their centre (what the epoch began from; zeros for gradients); the rest is an honest member's. With m
the mean and s the deviation of the honest differences, by coordinate:

- **sign flip**: -m, three times as long.
- **noise**: Gaussian, ten times as long as m.
- **a little is enough** (Baruch et al., arXiv 1902.06156): m - z s, all liars alike, with the largest z at which they
  still have a majority with those honest ones that are further out, but at least 1.5, which is byzfl's.
- **inner product** (Xie et al., arXiv 1903.03936): -m / 2: short enough to look like anybody, and turned round.
- **mimic** (Karimireddy et al., arXiv 2006.09365): all say what one honest member says, so that it counts many times.
- **invented weight**: sign flip, and a million times the samples of the honest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np

from shoal.protocol.ids import PeerId
from shoal.training.exchange.averager import Arrays, Contribution

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Forger: TypeAlias = Callable[[Array, int, np.random.Generator], Array]
"""Of honest differences ``[n, d]``, and how many lie: the lies ``[liars, d]``."""


def poison(
    attack: str,
    honest: Sequence[Contribution],
    liars: Sequence[PeerId],
    rng: np.random.Generator,
    centres: Mapping[str, Array] | None = None,
) -> list[Contribution]:
    """What the liars contribute beside the honest."""
    weight = float(np.median([each.weight for each in honest])) * (1e6 if attack == "invented weight" else 1.0)
    arrays: list[Arrays] = [dict(honest[0].arrays) for _ in liars]
    for name, example in honest[0].arrays.items():
        if not name.startswith("mean/"):
            continue
        centre = (centres or {}).get(name, np.zeros_like(example)).ravel().astype(np.float64)
        true = np.stack([each.arrays[name].ravel().astype(np.float64) - centre for each in honest])
        for said, lie in zip(arrays, ATTACKS[attack](true, len(liars), rng), strict=True):
            said[name] = (centre + lie).reshape(example.shape).astype(example.dtype)
    return [Contribution(author, weight, each) for author, each in zip(liars, arrays, strict=True)]


def _sign_flip(true: Array, liars: int, rng: np.random.Generator) -> Array:
    return np.stack([-3 * true.mean(axis=0)] * liars)


def _noise(true: Array, liars: int, rng: np.random.Generator) -> Array:
    size = 10 * np.linalg.norm(true.mean(axis=0)) / np.sqrt(true.shape[1])
    return rng.normal(0, size, (liars, true.shape[1]))


def _a_little(true: Array, liars: int, rng: np.random.Generator) -> Array:
    number = len(true) + liars
    needed = number // 2 + 1 - liars  # honest ones that are to be further out
    reach = max(NormalDist().inv_cdf((len(true) - needed) / len(true)), 1.5) if needed < len(true) else 1.5
    return np.stack([true.mean(axis=0) - reach * true.std(axis=0, ddof=1)] * liars)


def _inner_product(true: Array, liars: int, rng: np.random.Generator) -> Array:
    return np.stack([-0.5 * true.mean(axis=0)] * liars)


def _mimic(true: Array, liars: int, rng: np.random.Generator) -> Array:
    return np.stack([true[0]] * liars)


ATTACKS: dict[str, Forger] = {
    "sign flip": _sign_flip,
    "noise": _noise,
    "a little is enough": _a_little,
    "inner product": _inner_product,
    "mimic": _mimic,
    "invented weight": _sign_flip,
}
