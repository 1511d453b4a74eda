"""What a manifest says of an exchange: by which rule contributions become one, ``[arc+][nnm+]rule``, and the codec.

=====================  ==============================================================================================
``mean``               weighted mean: the best where nobody lies, and whatever its largest liar wants where one does
``median``             of each coordinate, weighted
``trimmed_mean``       of each coordinate, without what the liars could be at either end
``multi_krum``         mean of those whose nearest others are nearest
``centered_clipping``  everybody's difference from a point in their middle, none longer than the usual
``nnm+``               before any of them: each is replaced by the mean of those nearest to it
``arc+``               before that: the longest are cut to the length of the longest that may be honest
=====================  ==============================================================================================

`shoal.training.exchange.aggregators` does them, and names their sources. This module knows no NumPy, as every member
reads manifests and one that only stores has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from shoal.protocol.errors import UsageError

_MIX: Final = "nnm"
_CLIP: Final = "arc"


ROUNDING: Final = 1.01
"""A value that was decoded is at most so many times larger than the largest that was encoded."""


class Codec(StrEnum):
    """What the floats of contributions travel as; `shoal.training.exchange.codecs` does them."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"
    TOPK = "topk"
    AUTO = "auto"
    """Not one of them, but the run's choice among them from round to round; see `shoal.training.exchange.adapting`."""


WRITTEN: Final = tuple(each for each in Codec if each is not Codec.AUTO)
"""Those that bytes are in."""


class Rule(StrEnum):
    """What makes one of many; see the head of the module."""

    MEAN = "mean"
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed_mean"
    MULTI_KRUM = "multi_krum"
    CENTERED_CLIPPING = "centered_clipping"


@dataclass(frozen=True, slots=True)
class Aggregator:
    """A rule, and what is done before it.

    Attributes:
        rule: makes one of many.
        mixes: nearest neighbours are mixed before it.
        clips: the longest are cut before that.
    """

    rule: Rule = Rule.MEAN
    mixes: bool = False
    clips: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a manifest says. There is one spelling of each.

        Raises:
            UsageError: if it is none.
        """
        *before, rule = text.split("+")
        if rule not in list(Rule) or before not in ([], [_MIX], [_CLIP], [_CLIP, _MIX]):
            raise UsageError(
                f"there is no aggregator {text[:80]!r}; choose one of {', '.join(Rule)}, with {_MIX}+ before it to mix "
                f"nearest neighbours, and {_CLIP}+ before that to cut the longest: for example {_MIX}+trimmed_mean"
            )
        return cls(Rule(rule), _MIX in before, _CLIP in before)

    def __str__(self) -> str:
        return "+".join([*([_CLIP] if self.clips else []), *([_MIX] if self.mixes else []), self.rule.value])

    @property
    def is_plain_mean(self) -> bool:
        """Whether every contribution counts by its weight alone."""
        return self.rule is Rule.MEAN and not self.mixes and not self.clips


def assumed_liars(contributions: int) -> int:
    """How many of so many contributions may be lies, where nothing is known of anybody: under a third, one of three.

    To assume too few is fatal and too many is dear (arXiv 2510.04432); a third is what the ballots of a round withstand
    too. Of two there is no telling which one lies.
    """
    return max((contributions - 1) // 3, 1) if contributions > 2 else 0


def withstood(contributions: int, liars: int) -> int:
    """So many of the ``liars`` a rule can be asked to withstand: fewer than half of all."""
    return max(min(liars, (contributions - 1) // 2), 0)
