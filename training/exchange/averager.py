"""What several peers contributed, merged into one: the same bytes on every peer, in whatever order it arrived.

The first segment of an array's name says how it merges:

==========================  ==================================================================================
``mean/<name>``             weighted mean, or what another rule makes of them
``nonneg/<name>``           the same of what can't be negative, such as Adam's second moment
``sum/<name>``              sum
``first/<name>``            not merged: as the contribution has it whose author comes first
``each/<name>``             not merged: all of them, one after the other in the order of the authors, ``[n, ...]``
``moments/<name>/count``    how many samples were seen (a scalar, all three float64), with
``moments/<name>/mean``     their mean and
``moments/<name>/m2``       the sum of their squared distances from it: what the joint samples would have given
==========================  ==================================================================================

Rules other than the mean (`shoal.training.exchange.aggregators`) assume that ``f`` contributions are lies. They see one
array at a time, as a span's owner does. What is summed, and moments, have no rule of their own, as their parts are not
samples of one thing; there each number is held, before it is added, between the ``f + 1``-th smallest and the
``f + 1``-th largest of its kind: each addend of a sum; of moments the means, the variances and, from above alone, the
counts. So ``f`` liars say nothing that an honest peer on either side of them does not, and where nobody lies little is
lost.

Moments are merged by Chan, Golub and LeVeque's pairwise update ("Algorithms for computing the sample variance",
1983), the parallel form of Welford's. Contributions are taken in the order of their authors and accumulated
in float64, one elementwise operation after the other: no order of arrival, number of threads or width of
vector unit can change a bit. The result has the dtypes that were given.

Contributions come from the network. `validate` checks one against what it should look like and names its
author when it lies; the caller drops the liar and merges the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.exchange.aggregators import aggregate, weighted_mean
from shoal.training.exchange.rules import Aggregator, assumed_liars, withstood

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]

_Array: TypeAlias = npt.NDArray[Any]

_MEAN: Final = Aggregator()
_NO_ARRAYS: Final[Mapping[str, npt.NDArray[np.generic]]] = {}
_MAX_MAGNITUDE: Final = 1e30  # squares of it, times any count, are still finite in float64
_MAX_COUNT: Final = 2.0**53  # integers up to here are exact in float64
_FLOATS: Final = (np.dtype(np.float32), np.dtype(np.float64))
_DTYPES: Final = {
    "mean": _FLOATS,
    "nonneg": _FLOATS,
    "sum": (*_FLOATS, np.dtype(np.int64)),
    "first": _FLOATS,
    "each": (*_FLOATS, np.dtype(np.int64)),
    "moments": (np.dtype(np.float64),),
}
_MOMENT_PARTS: Final = ("count", "mean", "m2")


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one peer wants merged.

    Attributes:
        author: who made it.
        weight: how much it counts in a mean, in samples; positive.
        arrays: by name; see the head of the module for what names mean.
    """

    author: PeerId
    weight: float
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared distances of samples, mergeable without loss.

    Attributes:
        count: of samples.
        mean: float64, the shape of one sample.
        m2: float64, sum over the samples of the squared distance from the mean, the shape of one sample.
    """

    count: float
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @classmethod
    def none(cls, shape: tuple[int, ...] = ()) -> Self:
        """The moments of no samples of this shape."""
        return cls(0.0, np.zeros(shape), np.zeros(shape))

    @classmethod
    def of(cls, samples: npt.NDArray[np.floating]) -> Self:
        """The moments of samples ``[n, ...]``."""
        if len(samples) == 0:
            return cls.none(samples.shape[1:])
        wide = samples.astype(np.float64)
        mean = np.asarray(wide.mean(axis=0))
        return cls(float(len(wide)), mean, np.asarray(np.square(wide - mean).sum(axis=0)))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of samples together."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        total = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / total)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / total))
        return Moments(total, np.asarray(mean), np.asarray(m2))

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Population standard deviation; ones where no samples were seen."""
        return np.sqrt(self.m2 / self.count) if self.count else np.ones_like(self.mean)

    def to_arrays(self, name: str) -> Arrays:
        """As arrays that `merge` merges: ``moments/<name>/{count,mean,m2}``, float64."""
        return {
            f"moments/{name}/count": np.asarray(self.count),
            f"moments/{name}/mean": self.mean,
            f"moments/{name}/m2": self.m2,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]], name: str) -> Self:
        """The inverse of `to_arrays`."""
        count, mean, m2 = (arrays[f"moments/{name}/{part}"].astype(np.float64) for part in _MOMENT_PARTS)
        return cls(float(count), mean, m2)


def validate(contribution: Contribution, template: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Check a contribution from the network before it is merged.

    Args:
        contribution: what the peer sent.
        template: arrays with the names, shapes and dtypes that it must have; their values mean nothing.

    Raises:
        ProtocolError: if it does not fit the template, or holds what no honest peer sends: NaN or infinity, a weight
            or count that is not positive and finite, a negative sum of squares. The message names the author.
    """
    author, arrays = contribution.author, contribution.arrays
    if not 0 < contribution.weight <= _MAX_COUNT:
        raise _lie(author, f"its weight {contribution.weight} is not between 0 and 2**53")
    if arrays.keys() != template.keys():
        odd = min(arrays.keys() ^ template.keys())
        raise _lie(author, f"{odd[:80]!r} is {'missing' if odd in template else 'not asked for'}")
    for name, array in arrays.items():
        expected = template[name]
        if (array.dtype, array.shape) != (expected.dtype, expected.shape):
            raise _lie(
                author, f"{name!r} is {array.dtype}{list(array.shape)}, not {expected.dtype}{list(expected.shape)}"
            )
        _check_values(author, name, array)


def merge(
    contributions: Iterable[Contribution],
    aggregator: Aggregator = _MEAN,
    *,
    liars: int | None = None,
    centres: Mapping[str, npt.NDArray[np.generic]] = _NO_ARRAYS,
) -> Arrays:
    """Merge by the rules that the names say; see the head of the module.

    A lone contribution comes back unchanged, but for ``each``. Nothing at all merges to nothing: ``{}``.

    Args:
        contributions: in any order.
        aggregator: by which rule those named ``mean`` and ``nonneg`` merge.
        liars: how many to assume among them; by their number alone (`assumed_liars`), if None.
        centres: by name, what adaptive clipping measures lengths from; zeros, where there is none.

    Raises:
        ProtocolError: if one differs from the first by author in names, shapes or dtypes, if `validate` would refuse
            its values, if an author appears twice, or if a name says no way to merge. The message names the author.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.author)
    if not ordered:
        return {}
    for before, after in itertools.pairwise(ordered):
        if before.author == after.author:
            raise _lie(after.author, "it appears twice")
    first = ordered[0]
    kinds = {name: _kind(first.author, name, first.arrays) for name in sorted(first.arrays)}
    for contribution in ordered:
        validate(contribution, first.arrays)
    weights = [contribution.weight for contribution in ordered]
    is_trusting = aggregator.is_plain_mean or len(ordered) == 1
    liars = 0 if is_trusting else withstood(len(ordered), assumed_liars(len(ordered)) if liars is None else liars)
    merged: Arrays = {}
    for name, kind in kinds.items():
        columns: list[_Array] = [contribution.arrays[name] for contribution in ordered]
        match kind:
            case "mean" | "nonneg" if is_trusting:
                merged[name] = np.asarray(weighted_mean(columns, weights)).astype(columns[0].dtype)
            case "mean" | "nonneg":
                rows: _Array = np.stack([column.ravel() for column in columns])
                centre: _Array | None = centres[name].ravel() if name in centres else None
                merged[name] = aggregate(rows, weights, aggregator, liars, centre=centre).reshape(columns[0].shape)
            case "sum":
                merged[name] = _sum(_held(columns, liars))
            case "first":
                merged[name] = columns[0].copy()
            case "each":
                merged[name] = np.stack(columns)
            case "moments" if name.endswith("/count"):
                subject = name.removeprefix("moments/").removesuffix("/count")
                moments, *others = _held_moments([Moments.from_arrays(each.arrays, subject) for each in ordered], liars)
                for each in others:
                    moments = moments.merge(each)
                merged |= moments.to_arrays(subject)
    return merged


def _held(columns: Sequence[_Array], liars: int) -> Sequence[_Array]:
    """Each number kept between the smallest and the largest that are not among the ``liars`` most extreme."""
    if not liars:
        return columns
    ranked = np.sort(np.stack(columns), axis=0)
    return [np.clip(column, ranked[liars], ranked[-1 - liars]) for column in columns]


def _held_moments(parts: Sequence[Moments], liars: int) -> Sequence[Moments]:
    seen = [each for each in parts if each.count]
    liars = withstood(len(seen), liars)
    if not liars:
        return parts
    most = sorted(each.count for each in seen)[-1 - liars]
    means = _held([np.asarray(each.mean) for each in seen], liars)
    variances = _held([np.asarray(each.m2 / max(each.count, 1.0)) for each in seen], liars)
    counts = [min(each.count, most) for each in seen]
    return [
        Moments(count, np.asarray(mean), np.asarray(variance * count))
        for count, mean, variance in zip(counts, means, variances, strict=True)
    ]


def _sum(columns: Sequence[_Array]) -> _Array:
    dtype = columns[0].dtype
    wide = np.int64 if dtype == np.int64 else np.float64
    result = columns[0].astype(wide)
    for column in columns[1:]:
        result = np.asarray(result + column.astype(wide))
    return result.astype(dtype)


def _kind(author: PeerId, name: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """How an array merges, once its name, dtype and companions have been found to make sense."""
    kind, _, rest = name.partition("/")
    if not rest or kind not in _DTYPES:
        raise _lie(author, f"the name {name[:80]!r} does not say how to merge it")
    if arrays[name].dtype not in _DTYPES[kind]:
        raise _lie(author, f"{name!r} is {arrays[name].dtype}, which cannot be merged as {kind}")
    if kind == "moments":
        subject, _, part = rest.rpartition("/")
        parts = [arrays.get(f"moments/{subject}/{each}") for each in _MOMENT_PARTS]
        count, mean, m2 = parts
        if not subject or part not in _MOMENT_PARTS or count is None or mean is None or m2 is None:
            raise _lie(author, f"{name[:80]!r} lacks one of count, mean and m2")
        if count.shape != () or mean.shape != m2.shape:
            raise _lie(author, f"the shapes of moments/{subject} do not belong together")
    return kind


def _check_values(author: PeerId, name: str, array: npt.NDArray[np.generic]) -> None:
    limit = _MAX_MAGNITUDE if array.dtype in _FLOATS else _MAX_COUNT
    if array.size == 0:
        return
    low, high = float(array.min()), float(array.max())
    if not (-limit <= low and high <= limit):  # NaN fails as well
        raise _lie(author, f"{name!r} holds NaN, infinity or a number beyond {limit:g}")
    kind, _, rest = name.partition("/")
    never_negative = kind == "nonneg" or (kind == "moments" and not rest.endswith("/mean"))
    if never_negative and low < 0:
        raise _lie(author, f"{name!r} is negative")
    if kind == "moments" and rest.endswith("/count") and high > _MAX_COUNT:
        raise _lie(author, f"{name!r} counts more than 2**53 samples")


def _lie(author: PeerId, what: str) -> ProtocolError:
    return ProtocolError(f"the contribution of {author} cannot be merged: {what}; leave it out")
