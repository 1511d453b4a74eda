"""A recipe with other settings: each named by a path of fields, ``policies.own.settings.learning_rate``.

A path goes through fields of dataclasses, keys of mappings, and probes by their names. What it ends in is replaced by
something of the same kind, and all that is made on the way checks itself again. A manifest may say this, so whoever
joins has it from anybody: nothing but numbers, words and lists of these goes in, and no name leads to anything that is
not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from shoal.protocol.errors import UsageError
from shoal.training.plugins import suggest
from shoal.training.recipes.recipe import Recipe

_FREE = ("settings", "sizes")
"""Mappings whose keys are known to whoever reads them, who refuses others."""


def overridden(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these settings.

    Raises:
        UsageError: if a path leads nowhere, or to something of another kind.
    """
    for path, value in settings.items():
        recipe = _replaced(recipe, path.split("."), value, path)
    return recipe


def _replaced(whole: Any, names: list[str], value: Any, path: str, *, is_free: bool = False) -> Any:
    if not names:
        return _fitting(whole, value, path)
    name, *rest = names
    if isinstance(whole, Mapping):
        if name not in whole and not (is_free and not rest):
            raise UsageError(f"the recipe has no {path[:80]!r}: {suggest(name, whole)}")
        new = value if name not in whole else _replaced(whole[name], rest, value, path)
        return {**whole, name: new}
    if isinstance(whole, tuple) and whole and all(hasattr(each, "name") for each in whole):
        if name not in [each.name for each in whole]:
            raise UsageError(f"the recipe has no {path[:80]!r}: {suggest(name, [each.name for each in whole])}")
        return tuple(_replaced(each, rest, value, path) if each.name == name else each for each in whole)
    known = [field.name for field in fields(whole)] if is_dataclass(whole) and not isinstance(whole, type) else []
    if name not in known:
        raise UsageError(f"the recipe has no {path[:80]!r}; {suggest(name, known)}")
    new = _replaced(getattr(whole, name), rest, value, path, is_free=name in _FREE)
    return replace(whole, **{name: new})


def _fitting(before: Any, value: Any, path: str) -> Any:
    """The value in the form of what it replaces."""
    if isinstance(before, Enum) and isinstance(value, str):
        try:
            return type(before)(value)
        except ValueError as error:
            raise UsageError(f"{path[:80]!r} cannot be {value[:40]!r}; {suggest(value, type(before))}") from error
    if isinstance(before, tuple) and isinstance(value, list | tuple) and all(isinstance(each, str) for each in before):
        return tuple(str(each) for each in value)
    if type(before) is float and type(value) is int:
        return float(value)
    if type(value) is type(before) and isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"{path[:80]!r} is {before!r:.60}, and cannot be {value!r:.60}; give one of the same kind")
