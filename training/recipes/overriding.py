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
from shoal.protocol.ids import Cid
from shoal.training.plugins import suggest
from shoal.training.recipes.recipe import Recipe

_FREE = ("settings", "sizes")
"""Mappings whose keys are known to whoever reads them, who refuses others."""


def overridden(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these settings, all of them at once.

    Raises:
        UsageError: if a path leads nowhere, or to something of another kind, or what comes of all cannot be.
    """
    found: Recipe = _replaced(recipe, {tuple(path.split(".")): value for path, value in settings.items()}, "")
    return found


def _replaced(whole: Any, settings: Mapping[tuple[str, ...], Any], at: str, *, is_free: bool = False) -> Any:
    """What is at a place, with what is set below it."""
    if () in settings:
        if len(settings) > 1:
            raise UsageError(f"{at[:80]!r} and what is in it are both set; leave one of them out")
        return _fitting(whole, settings[()], at)
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, value in settings.items():
        below.setdefault(path[0], {})[path[1:]] = value

    def place(name: str) -> str:
        return f"{at}.{name}" if at else name

    if isinstance(whole, Mapping):
        found = dict(whole)
        for name, inner in below.items():
            if name in whole:
                found[name] = _replaced(whole[name], inner, place(name))
            elif is_free and inner.keys() == {()}:
                found[name] = inner[()]
            else:
                raise _missing(place(name), name, list(whole))
        return found
    if isinstance(whole, tuple) and whole and all(hasattr(each, "name") for each in whole):
        names = [each.name for each in whole]
        for name in below:
            if name not in names:
                raise _missing(place(name), name, names)
        return tuple(
            _replaced(each, below[each.name], place(each.name)) if each.name in below else each for each in whole
        )
    known = [field.name for field in fields(whole)] if is_dataclass(whole) and not isinstance(whole, type) else []
    new = {}
    for name, inner in below.items():
        if name not in known:
            raise _missing(place(name), name, known)
        new[name] = _replaced(getattr(whole, name), inner, place(name), is_free=name in _FREE)
    return replace(whole, **new) if new else whole


def _missing(path: str, name: str, known: list[str]) -> UsageError:
    return UsageError(f"the recipe has no {path[:80]!r}; {suggest(name, known)}")


def _fitting(before: Any, value: Any, path: str) -> Any:
    """The value in the form of what it replaces."""
    if isinstance(before, Enum) and isinstance(value, str):
        try:
            return type(before)(value)
        except ValueError as error:
            raise UsageError(f"{path[:80]!r} cannot be {value[:40]!r}; {suggest(value, type(before))}") from error
    if isinstance(before, Cid) and isinstance(value, str):
        return Cid.parse(value)
    if isinstance(before, tuple) and isinstance(value, list | tuple) and all(isinstance(each, str) for each in before):
        return tuple(str(each) for each in value)
    if type(before) is float and type(value) is int:
        return float(value)
    if type(value) is type(before) and isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"{path[:80]!r} is {before!r:.60}, and cannot be {value!r:.60}; give one of the same kind")
