"""Roles in plain words, as they go from process to process. No NumPy here: the node imports this module."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlainSpace:
    """A space in plain words: ``box``, ``discrete``, ``continuous`` or ``text``, and its size."""

    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class PlainRole:
    """A role in plain words."""

    name: str
    sights: PlainSpace
    acts: PlainSpace
