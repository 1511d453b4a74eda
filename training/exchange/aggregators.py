"""Rules that make one of many contributions although some of them may be lies, on one span of an array at a time.

``n`` contributions to a span of ``d`` coordinates are the rows of ``[n, d]``; ``f`` is how many of them are assumed to
be lies. No rule withstands half, so of a larger ``f`` only as many as are fewer than half are assumed.

- **mean**: weighted, with nothing held against anybody.
- **median**, **trimmed mean** of each coordinate (Yin et al., arXiv 1803.01498). Both are of votes: the trimmed mean
  leaves out at either end as many votes as the ``f`` heaviest have.
- **multi-Krum** (Blanchard et al., NeurIPS 2017): the mean of the ``n - f`` whose ``n - f - 1`` nearest others are
  nearest in square; the paper takes ``n - f - 2``, its successors (and byzfl) one more.
- **centered clipping** (Karimireddy et al., arXiv 2012.10333): from a centre, the mean of the differences from it, cut
  to a radius. The paper's centre is the last result, which a span's owner may not have, and its radius is chosen by
  hand; here the centre is the median, the radius the median distance from it, both anew in each of three passes.
- **nearest-neighbour mixing** (Allouah et al., arXiv 2302.01772), before any of them: each row is replaced by the mean
  of the ``n - f`` nearest to it, itself included. This is what makes the rules above hold where honest rows differ.
- **adaptive clipping** (Allouah et al., arXiv 2405.14432), before that: the ``⌊2 f (n - f) / n⌋`` longest rows are cut
  to the length of the next. The length is of the difference from a ``centre`` that all know before: zero for gradients.

**Votes.** Weights are what peers say of themselves, so a lie may be in the weight. All but the plain mean turn them
into votes: a cap, the highest that leaves the ``f`` heaviest a share of at most half-way between ``f / n`` (what they
have when all are equal) and one half. So ``f`` liars never have half of the votes, whatever they claim, and one fast
machine among many slow ones keeps much of its weight. Votes are whole numbers: their sums are exact in any order.

**Bits.** Rows come in the order of their authors. Everything is float64 and elementwise, one operation after the other;
where coordinates are added up, it is by halving spans of 4,096 in a fixed order. So no order of arrival, number of
threads or width of vector unit can change a bit. Of equals the first row counts. A mean is kept within what it is the
mean of, so equal rows give that row. What comes out has the dtype of what came in.

Distances are over the span alone: each owner of a span decides by what it has, and may leave out others than the next
owner does. Of one array in one span (a merge by everybody) it is the array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.training.exchange.rules import Aggregator, Rule, withstood

Wide: TypeAlias = npt.NDArray[np.float64]

_GRID: Final = 2.0**40  # votes of the heaviest; those of 4,096 rows add up exactly
_WIDTH: Final = 4096  # coordinates at once; a power of two, so that they can be halved
_PASSES: Final = 3


def aggregate(
    rows: npt.NDArray[np.floating],
    weights: Sequence[float],
    aggregator: Aggregator,
    liars: int,
    *,
    centre: npt.NDArray[np.floating] | None = None,
) -> npt.NDArray[np.floating]:
    """One row of many; see the head of the module.

    Args:
        rows: ``[n, d]`` float32 or float64, finite, in the order of their authors, n at least 1.
        weights: ``[n]``, positive.
        aggregator: by which rule.
        liars: how many rows to assume to be lies.
        centre: ``[d]``, from which adaptive clipping measures lengths; zeros, if None.

    Returns:
        ``[d]``, of the dtype of ``rows``.
    """
    liars = withstood(len(rows), liars)
    if aggregator.is_plain_mean:
        return weighted_mean(rows, weights).astype(rows.dtype)
    wide = rows.astype(np.float64) + 0.0  # no zero with a sign: sorting takes either for the other
    if len(wide) > 1:
        have = votes(weights, liars)
        if aggregator.clips:
            wide = clip_adaptively(wide, liars, centre=centre)
        if aggregator.mixes:
            wide = mix_nearest(wide, have, liars)
        wide = _RULES[aggregator.rule](wide, have, liars)[None]
    result: npt.NDArray[np.floating] = wide[0].astype(rows.dtype)
    return result


def votes(weights: Sequence[float], liars: int) -> Wide:
    """``[n]`` whole numbers, at least 1: the weights, under a cap; see the head of the module.

    Args:
        weights: ``[n]``, positive.
        liars: fewer than half of them.
    """
    held = np.minimum(np.asarray(weights, np.float64), _cap(sorted(map(float, weights), reverse=True), liars))
    counted: Wide = np.maximum(np.rint(held / held.max() * _GRID), 1.0)
    return counted


def _cap(heaviest: Sequence[float], liars: int) -> float:
    """The highest cap under which the heaviest so many have no more than their share. It lies below some weights."""
    number = len(heaviest)
    if not liars:
        return heaviest[0]
    share = (liars / number + 0.5) / 2
    if sum(heaviest[:liars]) <= share * sum(heaviest):
        return heaviest[0]
    for capped in range(1, number):  # how many weights it lies below
        rest = sum(heaviest[capped:])
        if capped < liars:
            others = sum(heaviest[liars:])
            cap = (share / (1 - share) * others - (rest - others)) / capped
        else:
            cap = share * rest / (liars - share * capped)
        if cap >= heaviest[capped]:
            return min(cap, heaviest[capped - 1])
    return heaviest[-1]


# --- the rules -------------------------------------------------------------------------------------------------------


def weighted_mean(
    rows: npt.NDArray[np.floating] | Sequence[npt.NDArray[np.floating]], weights: Sequence[float]
) -> Wide:
    """``[...]`` of n rows ``[...]``: each times its share of the weights, added up in their order."""
    total = 0.0
    for weight in weights:
        total += weight
    result: Wide = rows[0].astype(np.float64) * (weights[0] / total)
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        result = result + row.astype(np.float64) * (weight / total)
    return result


def _mean(rows: Wide, have: Wide, liars: int) -> Wide:
    return np.clip(weighted_mean(rows, have.tolist()), rows.min(axis=0), rows.max(axis=0))


def median(rows: Wide, have: Wide, liars: int = 0) -> Wide:
    """``[d]``: of each coordinate, the value at half of the votes; between two, the middle."""
    result = np.empty(rows.shape[1])
    half = have.sum() / 2
    for at in _columns(rows):
        values, running = _ranked(rows[:, at], have)
        low = np.argmax(running >= half, axis=0)
        high = np.argmax(running > half, axis=0)
        ends = (np.take_along_axis(values, each[None], axis=0)[0] for each in (low, high))
        result[at] = _middle(*ends)
    return result


def trimmed_mean(rows: Wide, have: Wide, liars: int) -> Wide:
    """``[d]``: of each coordinate, the mean without as many votes at either end as the heaviest ``liars`` have."""
    result = np.empty(rows.shape[1])
    total = float(have.sum())
    trimmed = float(np.sort(have)[len(have) - liars :].sum())
    for at in _columns(rows):
        values, running = _ranked(rows[:, at], have)
        kept = np.diff(np.clip(running, trimmed, total - trimmed), axis=0, prepend=trimmed)
        sums = np.zeros(values.shape[1])
        for value, count in zip(values, kept, strict=True):
            sums += value * (count / (total - 2 * trimmed))
        counts = kept > 0
        low = np.where(counts, values, np.inf).min(axis=0)
        high = np.where(counts, values, -np.inf).max(axis=0)
        result[at] = np.clip(sums, low, high)
    return result


def multi_krum(rows: Wide, have: Wide, liars: int) -> Wide:
    """``[d]``: the mean of the rows whose nearest others are nearest."""
    number = len(rows)
    nearest = np.sort(squared_distances(rows), axis=1)[:, 1 : number - liars]
    scores = np.zeros(number)
    for column in nearest.T:
        scores += column
    chosen = np.sort(np.argsort(scores, kind="stable")[: number - liars])
    return _mean(rows[chosen], have[chosen], 0)


def centered_clipping(rows: Wide, have: Wide, liars: int = 0) -> Wide:
    """``[d]``: from the median, passes of `clip_once` at the median distance."""
    centre = median(rows, have)
    for _ in range(_PASSES):
        lengths = np.sqrt(squared_norms(rows - centre))
        centre = clip_once(rows, have, centre, lengths, float(_lower_median(lengths, have)))
    return np.clip(centre, rows.min(axis=0), rows.max(axis=0))


def clip_once(rows: Wide, have: Wide, centre: Wide, lengths: Wide, radius: float) -> Wide:
    """``[d]``: the centre plus the mean difference from it, each cut to the radius. ``lengths`` are theirs, ``[n]``."""
    total = float(have.sum())
    result = centre
    for row, count, length in zip(rows, have, lengths, strict=True):
        factor = radius / length if length > radius else 1.0
        result = result + (row - centre) * (factor * (count / total))
    return result


def mix_nearest(rows: Wide, have: Wide, liars: int) -> Wide:
    """``[n, d]``: each row replaced by the mean of the ``n - liars`` nearest to it."""
    near = np.argsort(squared_distances(rows), axis=1, kind="stable")[:, : len(rows) - liars]
    mixed = np.empty_like(rows)
    for row, chosen in enumerate(np.sort(near, axis=1)):
        mixed[row] = _mean(rows[chosen], have[chosen], 0)
    return mixed


def clip_adaptively(rows: Wide, liars: int, *, centre: npt.NDArray[np.floating] | None = None) -> Wide:
    """``[n, d]``: the longest rows, seen from the centre, cut to the length of the next."""
    number = len(rows)
    shifted = rows if centre is None else rows - centre.astype(np.float64)
    lengths = np.sqrt(squared_norms(shifted))
    longest = float(np.sort(lengths)[number - 2 * liars * (number - liars) // number - 1])
    factors = np.divide(longest, lengths, out=np.ones(number), where=lengths > longest)
    cut: Wide = shifted * factors[:, None]
    if centre is not None:
        cut += centre
    return np.where((lengths > longest)[:, None], cut, rows)


_RULES: Final[dict[Rule, Callable[[Wide, Wide, int], Wide]]] = {
    Rule.MEAN: _mean,
    Rule.MEDIAN: median,
    Rule.TRIMMED_MEAN: trimmed_mean,
    Rule.MULTI_KRUM: multi_krum,
    Rule.CENTERED_CLIPPING: centered_clipping,
}


# --- arithmetic ------------------------------------------------------------------------------------------------------


def squared_distances(rows: Wide) -> Wide:
    """``[n, n]``, between all pairs of rows."""
    result = np.zeros((len(rows), len(rows)))
    for at in _columns(rows):
        part = rows[:, at]
        for row in range(len(rows) - 1):
            result[row, row + 1 :] += _total(np.square(part[row + 1 :] - part[row]))
    return result + result.T


def squared_norms(rows: Wide) -> Wide:
    """``[n]``, of each row."""
    result = np.zeros(len(rows))
    for at in _columns(rows):
        result += _total(np.square(rows[:, at]))
    return result


def _total(parts: Wide) -> Wide:
    """Sums along the last axis, of at most `_WIDTH`, by halving: NumPy's own depend on the processor's vectors."""
    width = 1 << max(parts.shape[-1] - 1, 0).bit_length()
    if width != parts.shape[-1]:
        parts = np.concatenate([parts, np.zeros((*parts.shape[:-1], width - parts.shape[-1]))], axis=-1)
    while width > 1:
        width //= 2
        parts = parts[..., :width] + parts[..., width:]
    return parts[..., 0]


def _columns(rows: Wide) -> Iterator[slice]:
    for start in range(0, rows.shape[1], _WIDTH):
        yield slice(start, min(start + _WIDTH, rows.shape[1]))


def _ranked(rows: Wide, have: Wide) -> tuple[Wide, Wide]:
    """Each column in ascending order, and the votes up to and with each of its values."""
    order = np.argsort(rows, axis=0, kind="stable")
    return np.take_along_axis(rows, order, axis=0), np.cumsum(have[order], axis=0)


def _middle(low: Wide, high: Wide) -> Wide:
    return np.where(low == high, low, low / 2 + high / 2)


def _lower_median(values: Wide, have: Wide) -> np.float64:
    """Of single values, the lowest at which half of the votes is reached."""
    order = np.argsort(values, kind="stable")
    found: np.float64 = values[order][np.cumsum(have[order]) >= have.sum() / 2][0]
    return found
