"""Finding what is installed by its name in an entry point group. A manifest names it; code never travels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import entry_points

from shoal.protocol.errors import UsageError


def load_plugin(group: str, noun: str, name: str) -> object:
    """Load the object that an installed package offers as ``name`` in an entry point group.

    Raises:
        UsageError: if nobody offers it, or what it needs is not installed.
    """
    check_plugin(group, noun, name)
    try:
        return entry_points(group=group)[name].load()
    except ImportError as error:
        raise UsageError(f"{noun} {name!r} needs {error.name or error}; pip install 'shoal[train]'") from error


def check_plugin(group: str, noun: str, name: str) -> None:
    """Check that an installed package offers something by this name, without loading it.

    Raises:
        UsageError: if nobody does.
    """
    found = entry_points(group=group)
    if name not in found.names:
        raise UsageError(f"no {noun} is called {name[:80]!r}; {suggest(name, found.names)}")


def installed(group: str) -> list[str]:
    """The names that installed packages offer in an entry point group, in their order."""
    return sorted(entry_points(group=group).names)


def suggest(name: str, known: Iterable[str]) -> str:
    """What the user may have meant: the nearest known names, or all of a few, as half a sentence."""
    names = sorted(known)
    by_lower = {each.lower(): each for each in names}
    near = [by_lower[each] for each in difflib.get_close_matches(name.lower()[:200], by_lower, n=3)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"installed here: {', '.join(names) or 'none'}" if len(names) <= 8 else "check its spelling"
