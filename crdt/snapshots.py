"""What a snapshot keeps of what it replaces: of the log, the hashes at some places; of growing registers, some entries.

A log is compacted by its author: an op that is a *snapshot* carries the present value of every register, and whoever
has taken it in drops the ops before it. So that an author cannot rewrite its past by this, a snapshot repeats, signed,
the hashes of earlier ops: of all of the newest `WINDOW` places, of every second of as many before, of every fourth of
the next, and so on (`places`). The places of a later snapshot are all among those of an earlier one or after it, so
whoever starts from a snapshot can make the next. Two logs of one author that part at any place contradict each other
in the first snapshot after it, and in every later one unless the shorter branch ended before the next place that is
still named: of a branch that was given up n ops ago, what is seen is one of at least n / `WINDOW` ops.

The idea is that of the skip lists of Git-like logs and of Certificate Transparency's consistency proofs (RFC 9162),
without anybody having to keep a tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

WINDOW: Final = 64
"""Newest places that are all named, and twice what is named of each twofold of the distance."""

NAME_BYTES: Final = 16
"""Of the sha256 of an op, where places are compared."""

MAX_SEQ: Final = 2**32
"""The last op of a log, so that a trail has at most 15 kB."""


def places(seq: int) -> tuple[int, ...]:
    """The places that a snapshot at ``seq`` names beside the one right before it, newest first."""
    found: list[int] = []
    stride, newest = 1, seq - 2
    while newest > 0:
        oldest = max(seq - WINDOW * stride, 1)
        found += range(newest - newest % stride, oldest - 1, -stride)
        stride, newest = 2 * stride, oldest - 1
    return tuple(place for place in found if place > 0)


def thinned(entries: Mapping[str, Any], keep: int) -> dict[str, Any]:
    """At most ``keep`` entries: the newest half of that as they are, and evenly fewer of those before."""
    items = list(entries.items())
    newest = items[-(keep // 2) :] if keep > 1 else []
    older = items[: len(items) - len(newest)]
    while len(older) + len(newest) > keep:
        older = older[::2] if len(older) > 1 else []
    return dict(older + newest)
